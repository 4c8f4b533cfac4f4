"""Spectra of kernels, and how well kernels align with targets and with each other.

A kernel ``[N, N, *out, *out]`` stands for the matrix ``[N C, N C]`` with rows ``(n, c)`` and columns ``(m, d)``, and a
kernel ``[N, N]`` for itself. Everything is computed in float64.
"""

import math
import warnings

import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import check_kernel, flatten, level_of_caller, rounding, symmetric_matrix


def eigenvalues(kernel: Tensor) -> Tensor:
    """Compute the eigenvalues of a kernel.

    They are not negative but for rounding, which moves each by up to about ``10 eps |K|`` in the Frobenius norm (by
    Weyl's inequality; Golub, Van Loan: "Matrix Computations", 2013, section 8.1; see :mod:`ggn_ntk.spectrum.matrix`).
    Negative ones are returned as they are, and a warning states their size in this unit.

    Args:
        kernel: ``[N, N, *out, *out]`` or ``[N, N]``, symmetric up to rounding.

    Returns:
        ``[N C]`` or ``[N]``, ascending, in the kernel's dtype.

    Raises:
        TypeError: If the kernel is not a real tensor.
        ValueError: If it has not the shape of a kernel of a set with itself, or is not symmetric.
    """
    values = torch.linalg.eigvalsh(symmetric_matrix(kernel, "kernel"))
    if values[0] < 0:
        warnings.warn(_report_negative(values, kernel.dtype), stacklevel=level_of_caller())
    result: Tensor = values.to(kernel.dtype)
    return result


def _report_negative(values: Tensor, dtype: torch.dtype) -> str:
    """Describe negative eigenvalues."""
    smallest, small, count = values[0].item(), rounding(values, dtype), (values < 0).sum().item()
    verdict = "zero up to rounding" if -smallest <= small else "so the kernel is not positive semi-definite"
    return (
        f"{count} of {len(values)} eigenvalues are negative, down to {smallest:.2e}, {-smallest / small:.2g} times the "
        f"rounding of a {dtype} kernel, 10 eps |K| = {small:.2e}: {verdict}."
    )


def condition_number(kernel: Tensor) -> float:
    """Compute the condition number of a kernel: its largest eigenvalue over its smallest.

    It is that of a symmetric matrix in the spectral norm (Golub, Van Loan: "Matrix Computations", 2013, section 2.6).

    Above about ``0.1 / eps`` (machine epsilon of the kernel's dtype) it says that, and no more.

    Args:
        kernel: ``[N, N, *out, *out]`` or ``[N, N]``, symmetric up to rounding.

    Returns:
        The condition number; infinite where the smallest eigenvalue is not positive.

    Raises:
        TypeError: If the kernel is not a real tensor.
        ValueError: If it has not the shape of a kernel of a set with itself, or is not symmetric.
    """
    values = torch.linalg.eigvalsh(symmetric_matrix(kernel, "kernel"))
    smallest, largest = values[0].item(), values[-1].item()
    return largest / smallest if smallest > 0 else math.inf


def effective_rank(kernel: Tensor, definition: str = "entropy") -> float:
    """Compute how many eigenvalues of a kernel matter.

    With shares p_i = λ_i / Σ λ, both definitions lie between 1 and the rank, which they reach if all non-zero
    eigenvalues are the same:

    - ``"entropy"``: exp(-Σ p_i log p_i) (Roy, Vetterli: "The Effective Rank", EUSIPCO 2007, section 2).
    - ``"participation"``: the participation ratio 1 / Σ p_i² = (Σ λ)² / Σ λ² (Bell, Dean: "Atomic Vibrations in
      Vitreous Silica", Discussions of the Faraday Society, 1970). It is never above the other: large ones weigh more.

    >>> effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])), "participation")
    2.0

    Args:
        kernel: ``[N, N, *out, *out]`` or ``[N, N]``, symmetric up to rounding. Negative eigenvalues count as zero.
        definition: ``"entropy"`` or ``"participation"``.

    Returns:
        The effective rank.

    Raises:
        TypeError: If the kernel is not a real tensor.
        ValueError: If it has not the shape of a kernel of a set with itself, is not symmetric or has no positive
            eigenvalue, or if there is no such definition.
    """
    if definition not in ("entropy", "participation"):
        raise ValueError(f"definition must be 'entropy' or 'participation', got {definition!r}.")
    values = torch.linalg.eigvalsh(symmetric_matrix(kernel, "kernel")).clamp(min=0)
    if not values[-1] > 0:
        raise ValueError("kernel has no positive eigenvalue, and so no effective rank.")
    shares = values / values.sum()
    rank = torch.special.entr(shares).sum().exp() if definition == "entropy" else 1 / shares.square().sum()
    return float(rank)


def kernel_target_alignment(kernel: Tensor, y: Tensor) -> float:
    """Compute the alignment of a kernel with targets.

    ``<K, y y^T> / (|K| |y y^T|)``, with Frobenius products and norms (Cristianini, Shawe-Taylor, Elisseeff, Kandola:
    "On Kernel-Target Alignment", NeurIPS 2001, section 2). It is not centred; centre the targets, or use
    :func:`centered_kernel_alignment` with y y^T.

    Args:
        kernel: ``[N, N, *out, *out]``, where y y^T pairs samples and outputs, or ``[N, N]``, where it pairs samples and
            sums over outputs.
        y: Targets ``[N, *out]``: real numbers, so one-hot for classes.

    Returns:
        The alignment, between 0 and 1 for a positive semi-definite kernel.

    Raises:
        TypeError: If an argument is not a real tensor.
        ValueError: If a shape does not fit, the kernel is not symmetric, or either is zero.
    """
    matrix = symmetric_matrix(kernel, "kernel")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError("y must be a tensor of real numbers; for classes, torch.nn.functional.one_hot(y).to(dtype).")
    if y.ndim == 0 or kernel.shape not in (y.shape[:1] * 2, y.shape[:1] * 2 + y.shape[1:] * 2):
        raise ValueError(f"y must have shape [N, *out] for the kernel {list(kernel.shape)}, got {list(y.shape)}.")
    columns = y.detach().double().reshape(len(matrix), -1)
    return _cosine(matrix, columns @ columns.T, "kernel and y")


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
    first, second = symmetric_matrix(kernel1, "kernel1"), symmetric_matrix(kernel2, "kernel2")
    _check_same_shape("kernel1", kernel1, "kernel2", kernel2)
    n = len(kernel1)
    return _cosine(_centred(first, n), _centred(second, n), "centred kernel1 and kernel2")


def relative_kernel_change(before: Tensor, after: Tensor) -> float:
    """Compute how far a kernel has moved, say between two checkpoints of a training.

    ``|K_after - K_before| / |K_before|`` in the Frobenius norm. It tells lazy training, where the kernel stays, from
    the learning of features (Chizat, Oyallon, Bach: "On Lazy Training in Differentiable Programming", NeurIPS 2019).

    Args:
        before: A kernel of any kind: ``[N1, N2, *out, *out]``, ``[N1, N2]``.
        after: A kernel of the same shape.

    Returns:
        The change, 0 for none.

    Raises:
        TypeError: If an argument is not a real tensor.
        ValueError: If the shapes differ, or the kernel before is zero.
    """
    first, second = flatten(check_kernel(before, "before")), flatten(check_kernel(after, "after"))
    _check_same_shape("before", before, "after", after)
    norm = torch.linalg.matrix_norm(first)
    if norm == 0:
        raise ValueError("before is zero, so there is no relative change.")
    return float(torch.linalg.matrix_norm(second - first) / norm)


def ggn_eigenvalues(kernel: Tensor, *, reduction: str = "mean") -> Tensor:
    """Compute the eigenvalues that the GGN of ``torch.nn.MSELoss`` shares with its Gram matrix.

    The loss Hessian is h I, with h = 2 for reduction "sum" and 2 / (N C) for "mean". So the GGN is h J^T J, and h times
    the NTK is h J J^T: the two have the same non-zero eigenvalues (Dangel, Tatzel, Hennig: "ViViT: Curvature access
    through the generalized Gauss-Newton's low-rank structure", TMLR 2022).

    Args:
        kernel: The full NTK ``[N, N, *out, *out]`` of the batch with itself; ``[N, N]`` for outputs ``[N]``.
        reduction: The reduction of the loss, ``"mean"`` or ``"sum"``.

    Returns:
        ``[N C]``, ascending, in the kernel's dtype: the non-zero eigenvalues of the GGN, and zeros.

    Raises:
        TypeError: If the kernel is not a real tensor.
        ValueError: If it has not the shape of a kernel of a set with itself or is not symmetric, or if there is no such
            reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    values = eigenvalues(kernel)
    return values * (2 / len(values) if reduction == "mean" else 2)


def _check_same_shape(argument1: str, kernel1: Tensor, argument2: str, kernel2: Tensor) -> None:
    """Check that two kernels have one shape."""
    if kernel1.shape != kernel2.shape:
        shapes = f"{list(kernel1.shape)} and {list(kernel2.shape)}"
        raise ValueError(f"{argument1} and {argument2} must have the same shape, got {shapes}.")


def _centred(matrix: Tensor, n: int) -> Tensor:
    """Subtract the mean over samples from rows and columns."""
    # matrix [N C, N C] -> [N C, N C]
    blocks = matrix.reshape(n, -1, n, matrix.shape[1] // n)
    blocks = blocks - blocks.mean(0, keepdim=True)
    return (blocks - blocks.mean(2, keepdim=True)).reshape(matrix.shape)


def _cosine(first: Tensor, second: Tensor, what: str) -> float:
    """Compute the cosine of the angle between two matrices."""
    norms = torch.linalg.matrix_norm(first) * torch.linalg.matrix_norm(second)
    if norms == 0:
        raise ValueError(f"{what} must not be zero: there is no angle to measure.")
    return float((first * second).sum() / norms)
