"""Kernels as matrices: read, checked and flattened, in float64.

With E diagonal, F free and T traced outputs (:mod:`ggn_ntk.problem.output_axes`), a kernel is E matrices
``[N1 F, N2 F]`` with rows ``(n, c)`` and columns ``(m, d)``, one for each diagonal output, and outputs are columns
``[E, N F, T]`` that they multiply: traced outputs share a matrix. A full kernel is one matrix, and all outputs are one
column.
"""

import math
from collections.abc import Iterable
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.problem.output_axes import COMPUTES, AxesRequest, KernelAxes

#: Output axes, as :func:`ggn_ntk.empirical_ntk` takes them.
Axes = int | Iterable[int] | None

# Rows and columns of a matrix that are transposed at once: a tile of half a MB fits a cache.
_TILE = 256


def check_real(tensor: Any, argument: str) -> Tensor:
    """Refuse what is not a tensor of real numbers; detach it from its graph."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{argument} must be a tensor of real numbers, got {kind}.")
    real: Tensor = tensor.detach()
    return real


def read(kernel: Any) -> Any:
    """Read a kernel that is kept elsewhere, a store on disk say, as a tensor; leave any other alone."""
    return kernel.to_torch() if hasattr(kernel, "to_torch") else kernel


def check_entries(kernel: Any, argument: str) -> Tensor:
    """Refuse what cannot be a kernel of any kind; read it if it is kept elsewhere, and detach it from its graph."""
    entries = check_real(read(kernel), argument)
    if entries.ndim < 2 or entries.numel() == 0:
        raise ValueError(f"{argument} must have shape [N1, N2, ...] and not be empty, got {list(entries.shape)}.")
    # a finite sum has finite summands, and is fast; that of finite ones may overflow
    if not entries.sum().isfinite() and not entries.isfinite().all():
        raise ValueError(
            f"{argument} holds numbers that are not finite. Tiles that are missing() from a store are NaN."
        )
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
    # kernel [N, N, ...], or an operator [N F, N F]; y [N, *out]
    shape = list(kernel.shape)
    stated = trace_axes is not None or diagonal_axes is not None
    computes = ("full",) if stated else COMPUTES
    requests = [AxesRequest.parse(compute, trace_axes, diagonal_axes) for compute in computes]
    if y.ndim == 0:
        raise ValueError(f"{y_argument} must have shape [N, *out], got [].")
    candidates = [request.resolve(y.shape[1:]) for request in requests]
    if isinstance(kernel, Tensor):
        shapes = [[len(y), len(y), *axes.kernel_shape] for axes in candidates]
    else:  # one matrix, so one diagonal output
        candidates = [axes for axes in candidates if axes.first.roles.diagonal == 1]
        shapes = [[len(y) * axes.first.roles.free] * 2 for axes in candidates]
    if not shapes:
        raise ValueError(f"{argument} must be a tensor for diagonal_axes: it is a matrix for each diagonal output.")
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
    # kernel [N, N, *axes.kernel_shape] -> [E, N F, N F], which is a copy
    if kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"{argument} must be the kernel of a set with itself, [N, N, ...], got {list(kernel.shape)}.")
    matrices = flatten(kernel, axes)
    symmetric, asymmetry = _symmetric_part(matrices)
    norm = torch.linalg.vector_norm(matrices).item()
    if asymmetry > math.sqrt(torch.finfo(kernel.dtype).eps) * norm:
        raise ValueError(
            f"{argument} must be symmetric, the kernel of a set with itself: K and its transpose differ by "
            f"{asymmetry / norm:.1e} of the norm."
        )
    return symmetric


def _symmetric_part(matrices: Tensor) -> tuple[Tensor, float]:
    """Compute the symmetric part of matrices, and the norm of their difference from their transposes."""
    # [E, n, n] -> [E, n, n]; tile by tile, since transposes of whole matrices are read out of order
    symmetric, squares = torch.empty_like(matrices, memory_format=torch.contiguous_format), matrices.new_zeros(())
    tiles = [slice(start, start + _TILE) for start in range(0, matrices.shape[1], _TILE)]
    for rows, columns in combinations_with_replacement(tiles, 2):
        tile, mirrored = matrices[:, rows, columns], matrices[:, columns, rows].mT
        squares += (tile - mirrored).square().sum() * (1 if rows == columns else 2)
        symmetric[:, rows, columns] = mean = (tile + mirrored) / 2
        symmetric[:, columns, rows] = mean.mT
    return symmetric, squares.sqrt().item()


def symmetric_matrix(kernel: Any, argument: str) -> Tensor:
    """Turn the kernel of a set with itself, which pairs all output axes that it has, into a symmetric matrix."""
    # kernel [N, N, *out, *out] -> [N C, N C]
    kernel = check_kernel(kernel, argument)
    return symmetric_matrices(kernel, argument, _paired_axes(kernel))[0]


def as_matrix(kernel: Any) -> Tensor:
    """Turn a full kernel into the matrix that it stands for, as operators have it.

    Args:
        kernel: ``[N1, N2, *out1, *out2]`` with as many axes for either output, or ``[N1, N2]``. Or a
            :class:`ggn_ntk.KernelStore`, which knows the axes of either output, of any number.

    Returns:
        ``[N1 C1, N2 C2]`` in the kernel's dtype, with rows ``(n, c)`` and columns ``(m, d)``: outputs ``[N, *out]``,
        flattened, are vectors that it multiplies, as multi-dimensional kernels do functions (Jacot, Gabriel, Hongler:
        "Neural Tangent Kernel", NeurIPS 2018, section 3).

    Raises:
        TypeError: If the kernel is no tensor of real numbers.
        ValueError: If it has another number of axes, or a store's are diagonal.
    """
    entries = read(kernel)
    check_real(entries, "kernel")
    rows, columns = kernel.sides if hasattr(kernel, "sides") else _halves(entries)
    if set(rows) & set(columns):
        raise ValueError(
            "kernel takes outputs or samples at equal indices, so that it is no matrix: StoreOperator has zeros where "
            "outputs differ."
        )
    matrix: Tensor = entries.permute(*rows, *columns).flatten(len(rows)).flatten(0, len(rows) - 1)
    return matrix


def _halves(kernel: Tensor) -> tuple[list[int], list[int]]:
    """Take half of the axes behind those of samples for outputs of x1, and half for outputs of x2."""
    # kernel [N1, N2, *out1, *out2]
    if kernel.ndim < 2 or kernel.ndim % 2:
        raise ValueError(f"kernel must have shape [N1, N2] or [N1, N2, *out, *out], got {list(kernel.shape)}.")
    half = 1 + kernel.ndim // 2
    return [0, *range(2, half)], [1, *range(half, kernel.ndim)]


def _paired_axes(kernel: Tensor) -> KernelAxes:
    """Take each output axis for one that is kept for both inputs."""
    # kernel [N1, N2, *out, *out]
    return AxesRequest.parse("full").resolve(kernel.shape[2 : 1 + kernel.ndim // 2])


def rounding(kernel: Tensor, dtype: torch.dtype) -> float:
    """Compute the size below which eigenvalues cannot be told from zero: 10 eps |K|, the bound of Weyl's inequality."""
    # of matrices or of their eigenvalues, whose norm is the same
    norm: float = torch.linalg.vector_norm(kernel).item()
    return 10 * torch.finfo(dtype).eps * norm


def check_number(argument: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Refuse what is not a number in a range, which includes ``low`` unless it has to be ``above``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}.")
    if not (low < value if above else low <= value) or not value < high:
        relation = "above" if above else "at least"
        upper = "finite" if high == math.inf else f"below {high:g}"
        raise ValueError(f"{argument} must be {relation} {low:g} and {upper}, got {value}.")
