"""How well kernels align with targets and with each other."""

import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import (
    Axes,
    check_entries,
    check_kernel,
    find_axes,
    symmetric_matrices,
    symmetric_matrix,
    to_columns,
)


def kernel_target_alignment(
    kernel: Tensor,
    y: Tensor,
    *,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> float:
    """Compute the alignment of a kernel with targets.

    ``<K, y y^T> / (|K| |y y^T|)``, with Frobenius products and norms (Cristianini, Shawe-Taylor, Elisseeff, Kandola:
    "On Kernel-Target Alignment", NeurIPS 2001, section 2). It is not centred; centre the targets, or use
    :func:`centered_kernel_alignment` with y y^T.

    Args:
        kernel: ``[N, N, *out, *out]``, where y y^T pairs samples and outputs; ``[N, N]``, where it pairs samples and
            sums over outputs; or any other kernel: y y^T is traced and diagonal along the same axes.
        y: Targets ``[N, *out]``: real numbers, so one-hot for classes.
        trace_axes: The output axes that the kernel is traced along, as for :func:`ggn_ntk.empirical_ntk`.
        diagonal_axes: The output axes that the kernel is diagonal along. With both ``None``, the shape tells a full, a
            diagonal and a trace kernel apart.

    Returns:
        The alignment, between 0 and 1 for a positive semi-definite kernel.

    Raises:
        TypeError: If an argument is not a real tensor.
        ValueError: If a shape does not fit, the kernel is not symmetric, or either is zero.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError("y must be a tensor of real numbers; for classes, torch.nn.functional.one_hot(y).to(dtype).")
    kernel = check_entries(kernel, "kernel")
    axes = find_axes(kernel, "kernel", y, "y", trace_axes, diagonal_axes)
    columns = to_columns(y.detach(), axes)
    return _cosine(symmetric_matrices(kernel, "kernel", axes), columns @ columns.mT, "kernel and y")


def centered_kernel_alignment(kernel1: Tensor, kernel2: Tensor) -> float:
    """Compute the centred alignment of two kernels.

    ``<H K1 H, H K2 H> / (|H K1 H| |H K2 H|)``, where H subtracts the mean over samples, output by output (Cortes,
    Mohri, Rostamizadeh: "Algorithms for Learning Kernels Based on Centered Alignment", JMLR 2012, section 2; as a
    similarity of representations, "CKA", Kornblith, Norouzi, Lee, Hinton, ICML 2019). Scaling a kernel does not change
    it.

    Args:
        kernel1: ``[N, N, *out, *out]`` or ``[N, N]``.
        kernel2: A kernel of the same shape.

    Returns:
        The alignment, between 0 and 1 for positive semi-definite kernels.

    Raises:
        TypeError: If an argument is not a real tensor.
        ValueError: If the shapes differ or are not those of kernels of a set with itself, or a centred kernel is zero.
    """
    kernel1, kernel2 = check_kernel(kernel1, "kernel1"), check_kernel(kernel2, "kernel2")
    first, second = symmetric_matrix(kernel1, "kernel1"), symmetric_matrix(kernel2, "kernel2")
    _check_same_shape("kernel1", kernel1, "kernel2", kernel2)
    n = len(kernel1)
    return _cosine(_centred(first, n), _centred(second, n), "centred kernel1 and kernel2")


def relative_kernel_change(before: Tensor, after: Tensor) -> float:
    """Compute how far a kernel has moved, say between two checkpoints of a training.

    ``|K_after - K_before| / |K_before|`` in the Frobenius norm. It tells lazy training, where the kernel stays, from
    the learning of features (Chizat, Oyallon, Bach: "On Lazy Training in Differentiable Programming", NeurIPS 2019).

    Args:
        before: A kernel of any kind, ``[N1, N2, ...]``.
        after: A kernel of the same shape.

    Returns:
        The change, 0 for none.

    Raises:
        TypeError: If an argument is not a real tensor.
        ValueError: If the shapes differ, or the kernel before is zero.
    """
    first, second = check_entries(before, "before").double(), check_entries(after, "after").double()
    _check_same_shape("before", first, "after", second)
    norm = torch.linalg.vector_norm(first)
    if norm == 0:
        raise ValueError("before is zero, so there is no relative change.")
    return float(torch.linalg.vector_norm(second - first) / norm)


def _check_same_shape(argument1: str, kernel1: Tensor, argument2: str, kernel2: Tensor) -> None:
    """Refuse two kernels of different shapes."""
    if kernel1.shape != kernel2.shape:
        shapes = f"{list(kernel1.shape)} and {list(kernel2.shape)}"
        raise ValueError(f"{argument1} and {argument2} must have the same shape, got {shapes}.")


def _centred(matrix: Tensor, n: int) -> Tensor:
    """Subtract the mean over samples from rows and columns, output by output."""
    # matrix [N C, N C] -> [N C, N C]
    blocks = matrix.reshape(n, -1, n, matrix.shape[1] // n)  # [N, C, N, C]
    blocks = blocks - blocks.mean(0, keepdim=True)
    return (blocks - blocks.mean(2, keepdim=True)).reshape(matrix.shape)


def _cosine(first: Tensor, second: Tensor, what: str) -> float:
    """Compute the cosine of the angle between matrices, in the Frobenius product."""
    norms = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    if norms == 0:
        raise ValueError(f"{what} must not be zero: there is no angle to measure.")
    return float((first * second).sum() / norms)
