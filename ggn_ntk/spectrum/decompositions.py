"""Kernels of a set with itself, decomposed: by Cholesky to solve with them, by eigenvectors for functions of them.

The two agree on which kernels are singular up to rounding, and on what is added to those.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.problem.errors import warn
from ggn_ntk.problem.output_axes import KernelAxes
from ggn_ntk.spectrum.lanczos import largest_eigenvalue
from ggn_ntk.spectrum.matrix import check_number, rounding, symmetric_matrices

# A Gaussian vector has a component below 0.01 along a given direction with probability 0.008; eight of them, 1.7e-17.
_PROBES, _COMPONENT = 8, 0.01


class IllConditionedWarning(UserWarning):
    """A kernel is singular up to rounding, and what was computed from it depends on how that is handled."""


@dataclass(frozen=True, eq=False)
class Ridged:
    """A kernel of a set with itself, and what is added to its diagonal."""

    argument: str  # the name of the argument that held the kernel
    matrices: Tensor  # the kernel that was given, symmetric [E, n, n] in float64
    diag_reg: float  # what is added, as a multiple of the mean diagonal
    ridge: float  # the same as a number
    rounding: float  # the size below which eigenvalues cannot be told from zero: what is added has no rounding
    # What to add to a kernel that is singular up to rounding: sqrt(eps) of the mean diagonal, so that larger
    # eigenvalues hardly move, and rounding grows to about sqrt(eps)
    jitter: float
    tolerance: float  # how negative eigenvalues may be, as a share of the largest

    @classmethod
    def parse(cls, kernel: Tensor, argument: str, axes: KernelAxes, diag_reg: Any) -> "Ridged":
        """Check the arguments."""
        # kernel [N, N, *axes.kernel_shape]
        check_number("diag_reg", diag_reg, 0.0)
        matrices = symmetric_matrices(kernel, argument, axes)
        mean_diagonal, small = matrices.diagonal(dim1=1, dim2=2).mean().item(), rounding(matrices, kernel.dtype)
        tolerance = math.sqrt(torch.finfo(kernel.dtype).eps)
        jitter = tolerance * mean_diagonal or 1.0  # for the zero kernel, any will do
        return cls(argument, matrices, diag_reg, diag_reg * mean_diagonal, small, jitter, tolerance)

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Compute eigenvalues, without the negative ones that are rounding, and eigenvectors."""
        # -> [E, n] ascending, [E, n, n] in columns
        values, vectors = torch.linalg.eigh(self.matrices)
        values = values + self.ridge
        smallest, largest = values.min().item(), values.max().item()
        if smallest < -self.tolerance * abs(largest):
            raise ValueError(
                f"{self.argument} must be positive semi-definite, but its eigenvalues, with diag_reg="
                f"{self.diag_reg:g}, go from {smallest:.3g} to {largest:.3g}. If its entries have errors, a larger "
                "diag_reg makes up for them."
            )
        return values.clamp(min=0), vectors

    def cholesky(self, shift: float = 0.0) -> Tensor | None:
        """Compute Cholesky factors, with the ridge and a shift on the diagonal; ``None`` if there are none."""
        # -> lower triangles [E, n, n]; they exist if and only if all eigenvalues are positive
        diagonal = self.matrices.diagonal(dim1=1, dim2=2)
        given = diagonal.clone()
        diagonal += self.ridge + shift
        factors, info = torch.linalg.cholesky_ex(self.matrices)
        diagonal.copy_(given)
        return None if info.any() else factors

    def warn(self, largest: float, consequence: str) -> None:
        """Warn that the kernel, with this largest eigenvalue, is singular up to rounding."""
        condition = largest / self.rounding if self.rounding else math.inf
        what = (
            f"{self.argument} is singular up to rounding, with a condition number above {condition:.1e}: {consequence}"
        )
        warn(f"{what}. Pass a larger diag_reg to regularise it as you see fit.", IllConditionedWarning)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A kernel in the basis of its eigenvectors."""

    ridged: Ridged
    values: Tensor  # eigenvalues [E, n], ascending, in float64; negative ones, which are rounding, are zero
    vectors: Tensor  # eigenvectors [E, n, n], in columns

    @property
    def singular(self) -> bool:
        """Whether the kernel is singular up to rounding."""
        return self.values.min().item() <= self.ridged.rounding

    @property
    def certain_values(self) -> Tensor:
        """The eigenvalues ``[E, n]``, zero where they cannot be told from it."""
        return torch.where(self.values > self.ridged.rounding, self.values, 0.0)

    def warn(self, consequence: str) -> None:
        """Warn that the kernel is singular up to rounding."""
        self.ridged.warn(self.values.max().item(), consequence)


def decompose(kernel: Tensor, argument: str, axes: KernelAxes, diag_reg: Any) -> Decomposition:
    """Decompose the kernel of a set with itself, with ``diag_reg`` times its mean diagonal added to the diagonal."""
    # kernel [N, N, *axes.kernel_shape]
    ridged = Ridged.parse(kernel, argument, axes, diag_reg)
    return Decomposition(ridged, *ridged.eigenpairs())


def factorize(kernel: Tensor, argument: str, axes: KernelAxes, diag_reg: Any) -> Tensor:
    """Factorize the same by Cholesky, with a jitter and a warning if it is singular up to rounding."""
    # kernel [N, N, *axes.kernel_shape] -> lower triangles [E, N F, N F]
    ridged = Ridged.parse(kernel, argument, axes, diag_reg)
    factors = ridged.cholesky()
    if factors is not None and (_far_above(ridged.rounding, factors) or ridged.cholesky(-ridged.rounding) is not None):
        return factors
    factors = ridged.cholesky(ridged.jitter)
    if factors is None:  # negative eigenvalues: more than rounding, or else they count as zero
        values, vectors = ridged.eigenpairs()
        factors = torch.linalg.cholesky((vectors * (values + ridged.jitter)[:, None]) @ vectors.mT)
    largest = largest_eigenvalue(ridged.matrices) + ridged.ridge
    ridged.warn(largest, f"a jitter of {ridged.jitter:.1e} is added to its diagonal")
    return factors


def _far_above(bound: float, factors: Tensor) -> bool:
    """Tell from Gaussian vectors whether all eigenvalues are far above a bound."""
    # Cholesky factors [E, n, n]. Dixon: "Estimating extremal eigenvalues and condition numbers of matrices", SIAM J.
    # Numer. Anal. 1983: a vector with a component of size c along the last eigenvector has a solution of size c / w at
    # least, with the smallest eigenvalue w. That takes far less time than another factorisation.
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(factors.shape[-1], _PROBES, dtype=factors.dtype, generator=generator).to(factors.device)
    norms = torch.linalg.vector_norm(torch.cholesky_solve(probes.expand(len(factors), -1, -1), factors), dim=1)
    return bool((bound * norms.amax(1) < _COMPONENT).all())
