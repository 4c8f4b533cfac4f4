"""Kernels as symmetric matrices: flattened, checked, and decomposed in float64.

With E diagonal, F free and T traced outputs (:mod:`ggn_ntk.problem.output_axes`), a kernel is E matrices
``[N1 F, N2 F]`` with rows ``(n, c)`` and columns ``(m, d)``, one for each diagonal output, and outputs are columns
``[E, N F, T]`` that they multiply: traced outputs share a matrix. A full kernel is one matrix, and all outputs are one
column.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.problem.errors import warn
from ggn_ntk.problem.output_axes import COMPUTES, AxesRequest, KernelAxes

#: Output axes, as :func:`ggn_ntk.empirical_ntk` takes them.
Axes = int | Iterable[int] | None


class IllConditionedWarning(UserWarning):
    """A kernel is singular up to rounding, and what was computed from it depends on how that is handled."""


def check_real(tensor: Any, argument: str) -> Tensor:
    """Refuse what is not a tensor of real numbers; detach it from its graph."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{argument} must be a tensor of real numbers, got {kind}.")
    real: Tensor = tensor.detach()
    return real


def check_entries(kernel: Any, argument: str) -> Tensor:
    """Refuse what cannot be a kernel of any kind; detach it from its graph."""
    entries = check_real(kernel, argument)
    if entries.ndim < 2 or entries.numel() == 0:
        raise ValueError(f"{argument} must have shape [N1, N2, ...] and not be empty, got {list(entries.shape)}.")
    if not entries.isfinite().all():
        raise ValueError(f"{argument} holds numbers that are not finite.")
    return entries


def check_kernel(kernel: Any, argument: str) -> Tensor:
    """Refuse what cannot be a kernel that pairs all output axes it has; detach it from its graph."""
    entries = check_entries(kernel, argument)
    if entries.shape[2:] != _paired_axes(entries).kernel_shape:
        raise ValueError(f"{argument} must have shape [N1, N2] or [N1, N2, *out, *out], got {list(entries.shape)}.")
    return entries


def find_axes(
    kernel: Any, argument: str, y: Tensor, y_argument: str, trace_axes: Axes, diagonal_axes: Axes
) -> KernelAxes:
    """Find the roles of output axes in a training set's kernel: as stated, or of the ``compute`` with this shape."""
    # kernel [N, N, ...], y [N, *out]
    shape = list(check_entries(kernel, argument).shape)
    stated = trace_axes is not None or diagonal_axes is not None
    computes = ("full",) if stated else COMPUTES
    requests = [AxesRequest.parse(compute, trace_axes, diagonal_axes) for compute in computes]
    if y.ndim == 0:
        raise ValueError(f"{y_argument} must have shape [N, *out], got [].")
    candidates = [request.resolve(y.shape[1:]) for request in requests]
    shapes = [[len(y), len(y), *axes.kernel_shape] for axes in candidates]
    if shape not in shapes:
        accepted = " or ".join(dict.fromkeys(map(str, shapes)))
        remedy = "" if stated else " For some axes traced or diagonal, pass trace_axes= and diagonal_axes=."
        raise ValueError(
            f"{argument} must have shape {accepted} for {y_argument} of shape {list(y.shape)}, got {shape}.{remedy}"
        )
    return candidates[shapes.index(shape)]


def flatten(kernel: Tensor, axes: KernelAxes) -> Tensor:
    """Turn a kernel into matrices in float64, without its graph."""
    # kernel [N1, N2, *axes.kernel_shape] -> [E, N1 F, N2 F]
    blocks = torch.einsum("nmecd->encmd", axes.merge(kernel.detach().double()))
    return blocks.flatten(3).flatten(1, 2)


def unflatten(matrices: Tensor, axes: KernelAxes) -> Tensor:
    """Undo :func:`flatten`."""
    # matrices [..., E, N1 F, N2 F] -> [..., N1, N2, *axes.kernel_shape]
    blocks = matrices.unflatten(-1, (-1, axes.first.roles.free)).unflatten(-3, (-1, axes.first.roles.free))
    merged = torch.einsum("...encmd->...nmecd", blocks)
    kernels = axes.separate(merged.flatten(0, -5))  # the leading axes and N1 are one
    return kernels.reshape(*merged.shape[:-3], *axes.kernel_shape)


def to_columns(f: Tensor, axes: KernelAxes) -> Tensor:
    """Turn outputs into columns in float64."""
    # f [N, *out] -> [E, N F, T]
    return torch.einsum("neft->enft", axes.first.arrange(f.double().reshape(len(f), -1))).flatten(1, 2)


def from_columns(columns: Tensor, axes: KernelAxes) -> Tensor:
    """Undo :func:`to_columns`."""
    # columns [..., E, N F, T] -> [..., N, *out]
    side = axes.first
    arranged = torch.einsum("...enft->...neft", columns.unflatten(-2, (-1, side.roles.free)))
    order, lead = [*side.diagonal, *side.free, *side.traced], arranged.shape[:-3]
    separate = arranged.reshape(*lead, *(side.out_shape[axis] for axis in order))
    return separate.permute(*range(len(lead)), *(len(lead) + order.index(axis) for axis in range(len(order))))


def symmetric_matrices(kernel: Any, argument: str, axes: KernelAxes) -> Tensor:
    """Turn the kernel of a set with itself into symmetric matrices, which they have to be up to rounding."""
    # kernel [N, N, *axes.kernel_shape] -> [E, N F, N F]
    if kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"{argument} must be the kernel of a set with itself, [N, N, ...], got {list(kernel.shape)}.")
    matrices = flatten(kernel, axes)
    norm = torch.linalg.vector_norm
    asymmetry = norm(matrices - matrices.mT).item()
    if asymmetry > math.sqrt(torch.finfo(kernel.dtype).eps) * norm(matrices).item():
        raise ValueError(
            f"{argument} must be symmetric, the kernel of a set with itself: K and its transpose differ by "
            f"{asymmetry / norm(matrices).item():.1e} of the norm."
        )
    return (matrices + matrices.mT) / 2


def symmetric_matrix(kernel: Any, argument: str) -> Tensor:
    """Turn the kernel of a set with itself, which pairs all output axes that it has, into a symmetric matrix."""
    # kernel [N, N, *out, *out] -> [N C, N C]
    kernel = check_kernel(kernel, argument)
    return symmetric_matrices(kernel, argument, _paired_axes(kernel))[0]


def _paired_axes(kernel: Tensor) -> KernelAxes:
    """Take each output axis for one that is kept for both inputs."""
    # kernel [N1, N2, *out, *out]
    return AxesRequest.parse("full").resolve(kernel.shape[2 : 1 + kernel.ndim // 2])


def rounding(eigenvalues: Tensor, dtype: torch.dtype) -> float:
    """Compute the size below which eigenvalues cannot be told from zero: 10 eps |K|, the bound of Weyl's inequality."""
    norm: float = torch.linalg.vector_norm(eigenvalues).item()
    return 10 * torch.finfo(dtype).eps * norm


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A kernel in the basis of its eigenvectors."""

    argument: str  # the name of the argument that held the kernel
    values: Tensor  # eigenvalues [E, n], ascending, in float64; negative ones, which are rounding, are zero
    vectors: Tensor  # eigenvectors [E, n, n], in columns
    rounding: float  # the size below which eigenvalues cannot be told from zero
    # What to add to the eigenvalues of a kernel that is singular up to rounding: sqrt(eps) of the mean diagonal, so
    # that larger eigenvalues hardly move, and rounding grows to about sqrt(eps)
    jitter: float

    @property
    def singular(self) -> bool:
        """Whether the kernel is singular up to rounding."""
        return self.values.min().item() <= self.rounding

    @property
    def certain_values(self) -> Tensor:
        """The eigenvalues ``[E, n]``, zero where they cannot be told from it."""
        return torch.where(self.values > self.rounding, self.values, 0.0)

    def warn(self, consequence: str) -> None:
        """Warn that the kernel is singular up to rounding."""
        condition = self.values.max().item() / self.rounding if self.rounding else math.inf
        what = (
            f"{self.argument} is singular up to rounding, with a condition number above {condition:.1e}: {consequence}"
        )
        warn(f"{what}. Pass a larger diag_reg to regularise it as you see fit.", IllConditionedWarning)

    def inverse(self) -> Tensor:
        """Invert the kernel, with a jitter and a warning if it is singular up to rounding."""
        # -> [E, n, n]
        values = self.values
        if self.singular:
            self.warn(f"a jitter of {self.jitter:.1e} is added to its diagonal")
            values = values + self.jitter
        inverse: Tensor = (self.vectors / values[:, None]) @ self.vectors.mT
        return inverse


def decompose(kernel: Any, argument: str, axes: KernelAxes, diag_reg: float = 0.0) -> Decomposition:
    """Decompose the kernel of a set with itself, with ``diag_reg`` times its mean diagonal added to the diagonal."""
    # kernel [N, N, *axes.kernel_shape] -> eigenvalues [E, N F], eigenvectors [E, N F, N F]
    check_number("diag_reg", diag_reg, 0.0)
    matrices = symmetric_matrices(kernel, argument, axes)
    mean_diagonal = matrices.diagonal(dim1=1, dim2=2).mean().item()
    values, vectors = torch.linalg.eigh(matrices)
    small = rounding(values, kernel.dtype)  # of the kernel that was given: what is added has no rounding
    values = values + diag_reg * mean_diagonal
    smallest, largest = values.min().item(), values.max().item()
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
