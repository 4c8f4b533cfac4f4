"""Eigenvalues of kernels, and what they tell."""

import math

import torch
from torch import Tensor

from ggn_ntk.problem.errors import warn
from ggn_ntk.spectrum.matrix import rounding, symmetric_matrix


def eigenvalues(kernel: Tensor) -> Tensor:
    """Compute the eigenvalues of a kernel.

    They are not negative but for rounding, which moves each by up to about ``10 eps |K|`` in the Frobenius norm (by
    Weyl's inequality; Golub, Van Loan: "Matrix Computations", 2013, section 8.1; see :mod:`ggn_ntk.spectrum`).
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
        warn(_report_negative(values, kernel.dtype), UserWarning)
    result: Tensor = values.to(kernel.dtype)
    return result


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


def _report_negative(values: Tensor, dtype: torch.dtype) -> str:
    """Say how many eigenvalues are negative, and whether rounding explains them."""
    smallest, small, count = values[0].item(), rounding(values, dtype), (values < 0).sum().item()
    verdict = "zero up to rounding" if -smallest <= small else "so the kernel is not positive semi-definite"
    return (
        f"{count} of {len(values)} eigenvalues are negative, down to {smallest:.2e}, {-smallest / small:.2g} times the "
        f"rounding of a {dtype} kernel, 10 eps |K| = {small:.2e}: {verdict}."
    )
