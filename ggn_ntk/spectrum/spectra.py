"""Eigenvalues of kernels, and what they tell."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggn_ntk.problem.errors import warn
from ggn_ntk.spectrum.lanczos import eigenpairs, leading
from ggn_ntk.spectrum.losses import hessian_roots
from ggn_ntk.spectrum.matrix import check_kernel, rounding, symmetric_matrix
from ggn_ntk.spectrum.operator import Operator, is_operator, parse_kernel


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a kernel.

    Attributes:
        values: ``[K]``, ascending.
        vectors: ``[N, *out, K]``: functions on the samples, orthonormal, each up to its sign. Of an operator,
            ``[N C, K]``.
    """

    values: Tensor
    vectors: Tensor


def eigenvalues(kernel: Any, k: int | None = None) -> Tensor:
    """Compute the eigenvalues of a kernel, or the largest.

    They are not negative but for rounding, which moves each by up to about ``10 eps |K|`` in the Frobenius norm (by
    Weyl's inequality; Golub, Van Loan: "Matrix Computations", 2013, section 8.1; see :mod:`ggn_ntk.spectrum`).
    Negative ones are returned as they are, and a warning states their size in this unit.

    A few of a large kernel, and those of an operator, come from SciPy's Lanczos iterations, to all digits.

    Args:
        kernel: ``[N, N, *out, *out]`` or ``[N, N]``, symmetric up to rounding. Or an operator of SciPy's or curvlinops'
            kind, ``[N C, N C]``.
        k: How many of the largest to compute; ``None`` for all, but of an operator.

    Returns:
        ``[N C]``, ``[N]`` or ``[K]``, ascending, in the kernel's dtype.

    Raises:
        TypeError: If the kernel is not a real tensor or operator, or ``k`` not an integer.
        ValueError: If it has not the shape of a kernel of a set with itself, is not symmetric, or has fewer than ``k``
            eigenvalues.
    """
    if k is None and not is_operator(kernel):
        matrix = symmetric_matrix(kernel := check_kernel(kernel, "kernel"), "kernel")
        return _in_dtype(torch.linalg.eigvalsh(matrix), kernel.dtype)
    return eigenvectors(kernel, k).values


def eigenvectors(kernel: Any, k: int | None = None) -> Eigenpairs:
    """Compute the eigenvalues of a kernel, or the largest, and their eigenvectors.

    Few of many come from SciPy's Lanczos iterations (Lehoucq, Sorensen, Yang: "ARPACK Users' Guide", 1998, chapter 4).
    With targets y, ``vectors.flatten(0, -2).T @ y.flatten()`` is how much of each has to be learned.

    Args:
        kernel: As for :func:`eigenvalues`.
        k: As for :func:`eigenvalues`.

    Returns:
        Eigenvalues ``[K]``, ascending, and eigenvectors ``[N, *out, K]``, in the kernel's dtype.

    Raises:
        TypeError: If the kernel is not a real tensor or operator, or ``k`` not an integer.
        ValueError: If it has not the shape of a kernel of a set with itself, is not symmetric, or has fewer than ``k``
            eigenvalues.
    """
    parsed = parse_kernel(kernel, "kernel")
    if isinstance(parsed, Operator):
        parsed.check_symmetric()
        values, vectors = leading(parsed.products, _parse_count(k, parsed.shape[0], "an operator"))
        values, vectors = values.to(parsed.device), vectors.to(parsed.device)
    else:
        matrix = symmetric_matrix(parsed, "kernel")
        values, vectors = eigenpairs(matrix, None if k is None else _parse_count(k, len(matrix)))
        vectors = vectors.reshape(*_samples_and_outputs(parsed), -1)
    return Eigenpairs(_in_dtype(values, parsed.dtype), vectors.to(parsed.dtype))


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


def ggn_eigenvalues(
    kernel: Any,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    f: Tensor | None = None,
    y: Tensor | None = None,
    *,
    k: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the eigenvalues that the GGN of a loss shares with its Gram matrix, or the largest.

    With S Sᵀ the Hessian of the loss in the outputs, which has a block for each sample, the GGN is (Jᵀ S) (Jᵀ S)ᵀ, and
    its Gram matrix (Jᵀ S)ᵀ (Jᵀ S) = Sᵀ Θ S: the two have the same non-zero eigenvalues (Dangel, Tatzel, Hennig:
    "ViViT: Curvature access through the generalized Gauss-Newton's low-rank structure", TMLR 2022). The Hessian of
    ``torch.nn.MSELoss`` is h I, with h = 2 for reduction "sum" and 2 / (N C) for "mean", whatever the outputs are; that
    of any other loss is computed by autograd.

    >>> K, f, y = torch.eye(4).reshape(2, 2, 2, 2).transpose(1, 2), torch.zeros(2, 2), torch.tensor([0, 1])
    >>> ggn_eigenvalues(K, torch.nn.CrossEntropyLoss(reduction="sum"), f, y)
    tensor([0.0000, 0.0000, 0.5000, 0.5000])

    Args:
        kernel: The full NTK ``[N, N, *out, *out]`` of the batch with itself; ``[N, N]`` for outputs ``[N]``. Or an
            operator of SciPy's or curvlinops' kind, ``[N C, N C]``.
        loss: ``loss(f, y)``, convex in the outputs, and a sum or a mean over samples: ``nn.CrossEntropyLoss()``,
            ``nn.BCEWithLogitsLoss()`` or another. It takes floating-point tensors in float64. ``None`` for
            ``nn.MSELoss``.
        f: With a loss, the network's outputs ``[N, *out]``.
        y: With a loss, its targets.
        k: How many of the largest to compute, as for :func:`eigenvalues`; ``None`` for all, but of an operator.
        reduction: Without a loss, the reduction of ``nn.MSELoss``, ``"mean"`` or ``"sum"``.

    Returns:
        ``[N C]`` or ``[K]``, ascending, in the kernel's dtype: the non-zero eigenvalues of the GGN, and zeros. With a
        loss, none is negative by rounding alone.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the kernel has not the shape of one of a set with itself or is not symmetric, if there is no such
            reduction, if it has fewer than ``k`` eigenvalues, if outputs do not fit, or if the loss is not convex or
            couples samples.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if loss is None:
        if f is not None or y is not None:
            raise ValueError("loss must be given beside f and y: the Hessian of nn.MSELoss does not depend on them.")
        kernel = kernel if is_operator(kernel) else check_kernel(kernel, "kernel")
        n = math.isqrt(math.prod(kernel.shape))  # of a matrix [N C, N C]
        return eigenvalues(kernel, k) * (2 / n if reduction == "mean" else 2)
    if reduction != "mean":
        raise ValueError(f"reduction is that of nn.MSELoss, got {reduction!r} beside a loss, which has its own.")
    parsed = parse_kernel(kernel, "kernel")
    if isinstance(parsed, Operator):
        parsed.check_symmetric()
        count = _parse_count(k, parsed.shape[0], "an operator")
        roots, size = hessian_roots(loss, f, y), parsed.norm
        values = leading(parsed.between(roots).products, count)[0].to(parsed.device)
    else:
        size = matrix = symmetric_matrix(parsed, "kernel")
        wanted = None if k is None else _parse_count(k, len(matrix))
        roots = hessian_roots(loss, f, y, _samples_and_outputs(parsed))
        values = _of_gram(matrix, roots, wanted)
    # Hessians of cross-entropy have an eigenvalue zero each, so half of these are negative by rounding.
    small = rounding(size, parsed.dtype) * roots.square().sum(1).max().item()
    return _in_dtype(torch.where(values.abs() <= small, values.clamp(min=0), values), parsed.dtype)


def _of_gram(matrix: Tensor, roots: Tensor, k: int | None) -> Tensor:
    """Compute the eigenvalues of ``S^T K S``, or the largest."""
    # matrix [N C, N C], roots [N, C, C] -> [N C] or [K]
    n, c, _ = roots.shape
    gram = torch.einsum("nac,namb,mbd->ncmd", roots, matrix.reshape(n, c, n, c), roots).reshape(matrix.shape)
    gram = (gram + gram.mT) / 2
    return torch.linalg.eigvalsh(gram) if k is None else eigenpairs(gram, k)[0]


def _samples_and_outputs(kernel: Tensor) -> list[int]:
    """Read the shape of outputs off the kernel of a set with itself."""
    # kernel [N, N, *out, *out] -> [N, *out]
    return [len(kernel), *kernel.shape[2 : 1 + kernel.ndim // 2]]


def _parse_count(k: Any, n: int, of: str = "") -> int:
    """Check how many eigenvalues of n are wanted."""
    if k is None:
        raise ValueError(f"k must be given for {of}: how many of its {n} eigenvalues to compute.")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer or None, got {type(k).__name__}.")
    if not 0 < k <= n:
        raise ValueError(f"k must be from 1 to {n}, the number of eigenvalues, got {k}.")
    return k


def _in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round eigenvalues of a kernel to its dtype, and warn of negative ones."""
    # [K] ascending
    if values[0] < 0:
        warn(_report_negative(values, dtype), UserWarning)
    return values.to(dtype)


def _report_negative(values: Tensor, dtype: torch.dtype) -> str:
    """Say how many eigenvalues are negative, and whether rounding explains them."""
    smallest, small, count = values[0].item(), rounding(values, dtype), (values < 0).sum().item()
    verdict = "zero up to rounding" if -smallest <= small else "so the kernel is not positive semi-definite"
    return (
        f"{count} of {len(values)} eigenvalues are negative, down to {smallest:.2e}, {-smallest / small:.2g} times the "
        f"rounding of a {dtype} kernel, 10 eps |K| = {small:.2e}: {verdict}."
    )
