"""Sketches: gradients of large parameters, by their products with a few random vectors.

Verification compares gradients from factored Jacobians with autograd's. A difference of two gradients is as large,
relative to them, after the products as before, but for a factor that is far from one only with a small probability.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored, multiply_rows

# With how many vectors the rows of a gradient are multiplied, if the parameter has at least so many entries.
_VECTORS, _LARGE = 8, 2**16


def sketched(gradient: Tensor, param: Tensor) -> Tensor:
    """Multiply the rows of a large gradient with random vectors; others are only flattened."""
    vectors = _vectors(param)
    return gradient.flatten() if vectors is None else multiply_rows(gradient, vectors)


def sketched_sum(jacobian: Factored, weights: Tensor, param: Tensor) -> Tensor:
    """Compute ``sum_cn v[c, n] J[c, n]``, :func:`sketched`."""
    # weights [C, N]
    return jacobian.weighted_sum(weights, _vectors(param))


def norm_of_sketch(products: Tensor, param: Tensor) -> Tensor:
    """Estimate the norm of a gradient from what :func:`sketched` has made of it."""
    norm: Tensor = torch.linalg.vector_norm(products)
    return norm if _vectors(param) is None else norm / math.sqrt(_VECTORS)


def operations_of_sketch(param: Tensor) -> int:
    """Count the operations of :func:`sketched`."""
    return 0 if _vectors(param) is None else 2 * _VECTORS * param.numel()


def bytes_of_sketch(param: Tensor) -> int:
    """Count the bytes of what :func:`sketched` makes."""
    row = 1 if _vectors(param) is None else param.numel() // len(param)
    return param.nbytes * (_VECTORS if row > 1 else 1) // row


def _vectors(param: Tensor) -> Tensor | None:
    """Draw the vectors that rows of a gradient are multiplied with, always the same ones; none if it is not large."""
    # param [rows, ...] -> [V, entries of a row]
    row = param.numel() // max(1, len(param)) if param.ndim > 1 else 0
    return None if param.numel() < _LARGE or row <= _VECTORS else _random_vectors(row, param.dtype, param.device)


@lru_cache(maxsize=64)
def _random_vectors(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw vectors."""
    # -> [V, size]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):  # they are kept for calls outside of it, too
        return torch.randn(_VECTORS, size, generator=generator, dtype=torch.float64).to(device, dtype)
