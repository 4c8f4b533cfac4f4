"""Kernels as symmetric matrices: flattened, checked, and decomposed in float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.problem.errors import warn


class IllConditionedWarning(UserWarning):
    """A kernel is singular up to rounding, and what was computed from it depends on how that is handled."""


def check_kernel(kernel: Any, argument: str) -> Tensor:
    """Refuse what cannot be a kernel; detach it from its graph."""
    if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
        kind = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
        raise TypeError(f"{argument} must be a tensor of real numbers, got {kind}.")
    out = kernel.shape[2:]
    half = len(out) // 2
    if kernel.ndim < 2 or out[:half] != out[half:] or kernel.numel() == 0:
        raise ValueError(
            f"{argument} must have shape [N1, N2] or [N1, N2, *out, *out] and not be empty, got {list(kernel.shape)}."
        )
    if not kernel.isfinite().all():
        raise ValueError(f"{argument} holds numbers that are not finite.")
    return kernel.detach()


def flatten(kernel: Tensor) -> Tensor:
    """Turn a kernel into a matrix in float64."""
    # kernel [N1, N2, *out, *out] -> [N1 C, N2 C], rows (n, c) and columns (m, d)
    n1, n2, *out = kernel.shape
    c = math.prod(out[: len(out) // 2])
    return kernel.double().reshape(n1, n2, c, c).transpose(1, 2).reshape(n1 * c, n2 * c)


def unflatten(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo :func:`flatten`."""
    # matrix [N1 C, N2 C], shape [N1, N2, *out, *out]
    n1, n2, *out = shape
    c = math.prod(out[: len(out) // 2])
    return matrix.reshape(n1, c, n2, c).transpose(1, 2).reshape(shape)


def symmetric_matrix(kernel: Any, argument: str) -> Tensor:
    """Turn the kernel of a set with itself into a symmetric matrix, which it has to be up to rounding."""
    # kernel [N, N, *out, *out] -> [N C, N C]
    kernel = check_kernel(kernel, argument)
    if kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"{argument} must be the kernel of a set with itself, [N, N, ...], got {list(kernel.shape)}.")
    matrix = flatten(kernel)
    norm = torch.linalg.matrix_norm
    asymmetry = norm(matrix - matrix.T).item()
    if asymmetry > math.sqrt(torch.finfo(kernel.dtype).eps) * norm(matrix).item():
        raise ValueError(
            f"{argument} must be symmetric, the kernel of a set with itself: K and its transpose differ by "
            f"{asymmetry / norm(matrix).item():.1e} of the norm."
        )
    return (matrix + matrix.T) / 2


def rounding(eigenvalues: Tensor, dtype: torch.dtype) -> float:
    """Compute the size below which eigenvalues cannot be told from zero: 10 eps |K|, the bound of Weyl's inequality."""
    norm: float = torch.linalg.vector_norm(eigenvalues).item()
    return 10 * torch.finfo(dtype).eps * norm


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A kernel in the basis of its eigenvectors."""

    argument: str  # the name of the argument that held the kernel
    values: Tensor  # eigenvalues [n], ascending, in float64; negative ones, which are rounding, are zero
    vectors: Tensor  # eigenvectors [n, n], in columns
    rounding: float  # the size below which eigenvalues cannot be told from zero
    # What to add to the eigenvalues of a kernel that is singular up to rounding: sqrt(eps) of the mean diagonal, so
    # that larger eigenvalues hardly move, and rounding grows to about sqrt(eps)
    jitter: float

    @property
    def singular(self) -> bool:
        """Whether the kernel is singular up to rounding."""
        return self.values[0].item() <= self.rounding

    @property
    def certain_values(self) -> Tensor:
        """The eigenvalues ``[n]``, zero where they cannot be told from it."""
        return torch.where(self.values > self.rounding, self.values, 0.0)

    def warn(self, consequence: str) -> None:
        """Warn that the kernel is singular up to rounding."""
        condition = self.values[-1].item() / self.rounding if self.rounding else math.inf
        what = (
            f"{self.argument} is singular up to rounding, with a condition number above {condition:.1e}: {consequence}"
        )
        warn(f"{what}. Pass a larger diag_reg to regularise it as you see fit.", IllConditionedWarning)

    def inverse(self) -> Tensor:
        """Invert the kernel, with a jitter and a warning if it is singular up to rounding."""
        # -> [n, n]
        values = self.values
        if self.singular:
            self.warn(f"a jitter of {self.jitter:.1e} is added to its diagonal")
            values = values + self.jitter
        inverse: Tensor = (self.vectors / values) @ self.vectors.T
        return inverse


def decompose(kernel: Any, argument: str, diag_reg: float = 0.0) -> Decomposition:
    """Decompose the kernel of a set with itself, with ``diag_reg`` times its mean diagonal added to the diagonal."""
    # kernel [N, N, *out, *out] -> eigenvalues [N C], eigenvectors [N C, N C]
    check_number("diag_reg", diag_reg, 0.0)
    matrix = symmetric_matrix(kernel, argument)
    mean_diagonal = matrix.diagonal().mean().item()
    values, vectors = torch.linalg.eigh(matrix)
    small = rounding(values, kernel.dtype)  # of the kernel that was given: what is added has no rounding
    values = values + diag_reg * mean_diagonal
    smallest, largest = values[0].item(), values[-1].item()
    if smallest < -math.sqrt(torch.finfo(kernel.dtype).eps) * abs(largest):
        raise ValueError(
            f"{argument} must be positive semi-definite, but its eigenvalues, with diag_reg={diag_reg:g}, go from "
            f"{smallest:.3g} to {largest:.3g}. If its entries have errors, a larger diag_reg makes up for them."
        )
    jitter = math.sqrt(torch.finfo(kernel.dtype).eps) * mean_diagonal
    # for the zero kernel, any jitter will do
    return Decomposition(argument, values.clamp(min=0), vectors, small, jitter or 1.0)


def check_number(argument: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Refuse what is not a number in a range, which includes ``low`` unless it has to be ``above``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}.")
    if not (low < value if above else low <= value) or not value < high:
        relation = "above" if above else "at least"
        upper = "finite" if high == math.inf else f"below {high:g}"
        raise ValueError(f"{argument} must be {relation} {low:g} and {upper}, got {value}.")
