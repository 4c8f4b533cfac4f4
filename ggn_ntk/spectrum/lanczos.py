"""Leading eigenpairs of large kernels: SciPy's Lanczos iterations, which need products alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# Up to so many rows, all eigenvalues take about as long as the largest.
_SMALL = 300


def import_scipy(what: str) -> Any:
    """Import SciPy's iterative solvers."""
    try:
        import scipy.sparse.linalg
    except ImportError:
        raise ImportError(f"{what} needs SciPy: pip install ggn-ntk[dynamics].") from None
    return scipy.sparse.linalg


def of_matrix(matrix: Tensor) -> "LinearOperator":
    """Offer products with a matrix, on whatever device, to SciPy."""
    # [n, n]

    def multiply(columns: Any) -> Any:
        return (matrix @ torch.from_numpy(columns).to(matrix)).cpu().numpy()

    return by_products(multiply, len(matrix))


def by_products(multiply: Callable[[Any], Any], n: int) -> "LinearOperator":
    """Offer to SciPy what multiplies vectors ``[n]`` and ``[n, K]`` of float64 by a square matrix."""
    products: LinearOperator = import_scipy("A large kernel").LinearOperator(
        (n, n), matvec=multiply, matmat=multiply, dtype=np.float64
    )
    return products


def eigenpairs(matrix: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute the ``k`` largest eigenvalues of a symmetric matrix, or all, and their eigenvectors."""
    # [n, n] -> [k] ascending, [n, k] in columns
    n = len(matrix)
    if k is None or n <= _SMALL or k > n // 10:
        values, vectors = torch.linalg.eigh(matrix)
        return values[n - (k or n) :], vectors[:, n - (k or n) :]
    values, vectors = leading(of_matrix(matrix), k)
    return values.to(matrix.device), vectors.to(matrix.device)


def leading(products: "LinearOperator", k: int) -> tuple[Tensor, Tensor]:
    """Compute the ``k`` largest eigenvalues of a symmetric operator, and their eigenvectors."""
    # -> [k] ascending, [n, k] in columns
    if k == products.shape[0]:  # Lanczos iterations find fewer than all
        return eigenpairs(torch.from_numpy(products.matmat(np.eye(k))))
    # from a vector that is the same at each call, so that results are
    start = np.random.default_rng(0).standard_normal(products.shape[0])
    if not products.matvec(start).any():  # the zero kernel, where there is nothing to iterate on
        return torch.zeros(k).double(), torch.eye(len(start), k).double()
    found = import_scipy("A large kernel").eigsh(products, k, which="LA", v0=start)
    values, vectors = map(torch.from_numpy, found)
    order = values.argsort()
    return values[order], vectors[:, order]


def largest_eigenvalue(matrices: Tensor) -> float:
    """Compute the largest eigenvalue of symmetric matrices."""
    # [E, n, n]
    if matrices.shape[1] <= _SMALL:
        return float(torch.linalg.eigvalsh(matrices).max())
    return max(eigenpairs(matrix, 1)[0].item() for matrix in matrices)
