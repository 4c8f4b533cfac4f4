"""Solving with the kernel of a training set: by Cholesky, or by an iterative solver that needs products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.spectrum.decompositions import Ridged, factorize
from ggn_ntk.spectrum.lanczos import import_scipy, of_matrix
from ggn_ntk.spectrum.matrix import Axes
from ggn_ntk.spectrum.operator import Operator, parse_kernel
from ggn_ntk.training.arguments import Layout

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

#: Solves a symmetric system, as SciPy's do: ``solver(operator, vector)`` returns the solution, or it and a flag.
Solver = Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Regression:
    """A training set, and how to solve with its kernel."""

    layout: Layout
    solve: Callable[[Tensor], Tensor]  # multiplies columns [E, N F, K] by the inverse of the kernel
    weights: Tensor  # what it makes of the targets, [E, N F, T]

    @classmethod
    def parse(
        cls, kernel: Any, y_train: Any, diag_reg: Any, solver: Any, trace_axes: Axes, diagonal_axes: Axes
    ) -> "Regression":
        """Check the arguments, and solve for the targets."""
        argument = "k_train_train"
        if solver is not None and not callable(solver):
            raise TypeError(
                f"solver must be a callable solver(operator, vector), as scipy.sparse.linalg.cg is, got {solver!r}."
            )
        kernel = parse_kernel(kernel, argument)
        layout = Layout.parse(kernel, "y_train", y_train, trace_axes, diagonal_axes)
        solve: Callable[[Tensor], Tensor]
        if isinstance(kernel, Operator):
            kernel.check_symmetric()
            solve = Iterations([_ridged(kernel.products, kernel.ridge(diag_reg))], solver or _default(kernel.dtype))
        elif solver is not None:
            ridged = Ridged.parse(kernel, argument, layout.axes, diag_reg)
            solve = Iterations([_ridged(of_matrix(matrix), ridged.ridge) for matrix in ridged.matrices], solver)
        else:
            solve = partial(_by_cholesky, factorize(kernel, argument, layout.axes, diag_reg))
        return cls(layout, solve, solve(layout.columns("y_train", y_train)))


def _by_cholesky(factors: Tensor, columns: Tensor) -> Tensor:
    """Solve with matrices that are factorized."""
    # factors [E, n, n], columns [E, n, K] -> [E, n, K]
    return torch.cholesky_solve(columns, factors)


@dataclass(frozen=True, eq=False)
class Iterations:
    """Symmetric systems, solved column by column."""

    systems: list["LinearOperator"]
    solver: Solver

    def __call__(self, columns: Tensor) -> Tensor:
        """Solve each of the systems for columns of its own."""
        # [E, n, K] -> [E, n, K]
        solved = [
            [self._solve(system, vector) for vector in block.mT.cpu().numpy()]
            for system, block in zip(self.systems, columns, strict=True)
        ]
        return torch.from_numpy(np.array(solved)).to(columns.device).mT

    def _solve(self, system: "LinearOperator", vector: Any) -> Any:
        """Call the solver, and believe it unless it says that it has failed."""
        found = self.solver(system, vector)
        solution, flag = found if isinstance(found, tuple) and len(found) == 2 else (found, 0)
        if not isinstance(solution, np.ndarray) or solution.shape != vector.shape:
            raise TypeError(
                f"solver must return a NumPy vector of shape {list(vector.shape)}, or the pair of it and a flag, zero "
                f"for success, as scipy.sparse.linalg.cg does, got {type(found).__name__}."
            )
        if flag or not np.isfinite(solution).all():
            off = np.linalg.norm(system.matvec(solution) - vector) / np.linalg.norm(vector)
            raise RuntimeError(
                f"solver has not solved the system: its flag is {flag}, and the residual {off:.1e} of the right-hand "
                "side. Pass a larger diag_reg, or a solver with other limits, say "
                "functools.partial(scipy.sparse.linalg.cg, rtol=1e-5, maxiter=10_000)."
            )
        return solution


def _ridged(products: "LinearOperator", ridge: float) -> "LinearOperator":
    """Add a ridge to the diagonal of a symmetric operator."""

    def multiply(columns: Any) -> Any:
        return products @ columns + ridge * columns

    system: LinearOperator = import_scipy("solver").LinearOperator(
        products.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=np.float64
    )
    return system


def _default(dtype: torch.dtype) -> Solver:
    """Choose conjugate gradients, to some digits fewer than products of this dtype have."""
    return partial(import_scipy("solver").cg, rtol=torch.finfo(dtype).eps ** 0.75)
