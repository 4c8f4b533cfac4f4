"""Spectra of kernels, and how well kernels align with targets and with each other.

A kernel ``[N, N, *out, *out]`` stands for the matrix ``[N C, N C]`` with rows ``(n, c)`` and columns ``(m, d)``, and a
kernel ``[N, N]`` for itself. Everything is computed in float64.

The entries of a kernel are off by rounding in the dtype that it was computed in, by a few eps of their size: ten, to
be safe. That moves eigenvalues by no more than ``10 eps |K|`` in the Frobenius norm (Weyl's inequality; Golub, Van
Loan: "Matrix Computations", 2013, section 8.1). What is smaller cannot be told from zero. Solving for such directions
amplifies rounding without bound: where :mod:`ggn_ntk.training` would have to, it adds a jitter to all eigenvalues, with
a warning.
"""

from ggn_ntk.spectrum.alignment import centered_kernel_alignment, kernel_target_alignment, relative_kernel_change
from ggn_ntk.spectrum.matrix import as_matrix
from ggn_ntk.spectrum.spectra import (
    Eigenpairs,
    condition_number,
    effective_rank,
    eigenvalues,
    eigenvectors,
    ggn_eigenvalues,
)

__all__ = [
    "Eigenpairs",
    "as_matrix",
    "centered_kernel_alignment",
    "condition_number",
    "effective_rank",
    "eigenvalues",
    "eigenvectors",
    "ggn_eigenvalues",
    "kernel_target_alignment",
    "relative_kernel_change",
]
