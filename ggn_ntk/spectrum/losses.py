"""Hessians of losses in the outputs, sample by sample, and their square roots."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import check_real

# How far off a Hessian in float64 may be from one that has a block for each sample, and no negative eigenvalue.
_TOLERANCE = 1e-10


def hessian_roots(loss: Any, f: Any, y: Any, shape: list[int] | None = None) -> Tensor:
    """Compute a square root S of the loss Hessian at each sample, ``S Sᵀ``."""
    # f [N, *out], which is this shape where it is known -> [N, C, C]
    if not callable(loss):
        raise TypeError(f"loss must be a callable loss(f, y), got {type(loss).__name__}.")
    outputs = check_real(f, "f")
    if shape is not None and list(outputs.shape) != shape:
        raise ValueError(f"f must have shape {shape} to fit the kernel, got {list(outputs.shape)}.")
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}.")
    blocks = _hessian_blocks(loss, outputs.double(), y.double() if y.is_floating_point() else y)
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    if values.min() < -_TOLERANCE * values.abs().max():
        raise ValueError(
            f"loss must be convex in the outputs, but its Hessian at a sample has the eigenvalue {values.min():.3g}."
        )
    roots: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    return roots


def _hessian_blocks(loss: Callable[[Tensor, Tensor], Tensor], f: Tensor, y: Tensor) -> Tensor:
    """Differentiate a loss twice, with one backward pass for each output of all samples."""
    # f [N, *out] -> [N, C, C]
    with torch.enable_grad():
        f = f.detach().requires_grad_()
        value = loss(f, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("loss must return a scalar: pass one with reduction='mean' or 'sum'.")
        if not value.requires_grad:
            raise ValueError("loss must be differentiable in the outputs, but what it returns has no graph.")
        (slope,) = torch.autograd.grad(value.sum(), f, create_graph=True)

    def multiply(vectors: Tensor) -> Tensor:
        if not slope.requires_grad:  # a loss that is linear
            return torch.zeros_like(f)
        (product,) = torch.autograd.grad(slope, f, vectors, retain_graph=True, materialize_grads=True)
        return product

    units = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device).reshape(-1, *f.shape[1:])
    blocks = torch.stack([multiply(unit.expand_as(f)).flatten(1) for unit in units.unsqueeze(1)], dim=1)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(f.shape, dtype=f.dtype, generator=generator).to(f.device)
    expected = torch.einsum("ncd,nd->nc", blocks, probe.reshape(len(f), -1))
    norm = torch.linalg.vector_norm
    if norm(multiply(probe).reshape(len(f), -1) - expected) > _TOLERANCE * norm(expected):
        raise ValueError("loss must be a sum or a mean over samples: its Hessian couples outputs of several.")
    return blocks
