"""Kernels of which products are known: operators of SciPy's kind, or of curvlinops'."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.spectrum.lanczos import by_products
from ggn_ntk.spectrum.matrix import as_matrix, check_entries, check_number

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def is_operator(kernel: Any) -> bool:
    """Tell operators by their methods: SciPy's have ``matvec``, and curvlinops' have ``to_scipy``."""
    dense = isinstance(kernel, Tensor) or hasattr(kernel, "to_torch")
    return not dense and any(callable(getattr(kernel, name, None)) for name in ("to_scipy", "matvec"))


@dataclass(frozen=True, eq=False)
class Operator:
    """A kernel as an operator, whose vectors are outputs ``[N, *out]``, flattened."""

    argument: str  # the name of the argument that held it
    given: Any
    products: "LinearOperator"
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def parse(cls, kernel: Any, argument: str) -> "Operator":
        """Refuse operators that are no matrix of real numbers."""
        products = kernel.to_scipy() if hasattr(kernel, "to_scipy") else kernel
        dtype = kernel.dtype if isinstance(kernel.dtype, torch.dtype) else _torch_dtype(kernel.dtype)
        if not dtype.is_floating_point:
            raise TypeError(f"{argument} must be an operator of real numbers, got {kernel.dtype}.")
        if len(products.shape) != 2 or not math.prod(products.shape):
            raise ValueError(f"{argument} must be an operator [N1 C, N2 C] and not empty, got {list(products.shape)}.")
        return cls(argument, kernel, products, dtype, torch.device(getattr(kernel, "device", "cpu")))

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns."""
        rows, columns = self.products.shape
        return int(rows), int(columns)

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Multiply columns, in float64."""
        # [n, K] -> [m, K]
        return torch.from_numpy(self.products.matmat(columns.cpu().numpy())).to(columns.device)

    def check_symmetric(self) -> None:
        """Refuse an operator that two random vectors show not to be symmetric."""
        rows, columns = self.shape
        if rows != columns:
            raise ValueError(
                f"{self.argument} must be the kernel of a set with itself, [N C, N C], got {[rows, columns]}."
            )
        probes, products = self._probed
        if not np.isfinite(products).all():
            raise ValueError(f"{self.argument} has products that are not finite.")
        difference = abs(probes[:, 0] @ products[:, 1] - probes[:, 1] @ products[:, 0])
        size = np.linalg.norm(probes[:, 0]) * np.linalg.norm(products)
        if difference > math.sqrt(torch.finfo(self.dtype).eps) * size:
            raise ValueError(
                f"{self.argument} must be symmetric, the kernel of a set with itself: u K v and v K u differ by "
                f"{difference / size:.1e} of their size, for random vectors u and v."
            )

    @property
    def norm(self) -> Tensor:
        """Estimate the Frobenius norm from products with Gaussian vectors, whose mean square it is."""
        # Girard: "A fast 'Monte-Carlo cross-validation' procedure for large least squares problems with noisy data",
        # Numerische Mathematik, 1989: E |K v|^2 = tr K^T K
        probes, products = self._probed
        return torch.tensor(np.linalg.norm(products) / math.sqrt(probes.shape[1]))

    @cached_property
    def _probed(self) -> tuple[Any, Any]:
        """Multiply two random vectors."""
        # -> [n, 2], [m, 2]
        probes = np.random.default_rng(0).standard_normal((self.shape[1], 2))
        return probes, self.products.matmat(probes)

    def between(self, roots: Tensor) -> "Operator":
        """Multiply from both sides with a matrix that has a block ``S`` for each sample: ``S^T K S``, in float64."""
        # roots [N, C, C], of an operator [N C, N C]
        n, c, _ = roots.shape
        if n * c != self.shape[0]:
            raise ValueError(f"f must have {self.shape[0]} numbers to fit {self.argument}, got {n} x {c}.")
        blocks = roots.cpu()

        def multiply(columns: Any) -> Any:
            v = torch.from_numpy(columns).reshape(n, c, -1)  # [N, C, K]
            products = torch.from_numpy(self.products.matmat((blocks @ v).reshape(n * c, -1).numpy())).double()
            return (blocks.mT @ products.reshape(n, c, -1)).reshape(columns.shape).numpy()

        return replace(self, products=by_products(multiply, n * c))

    def ridge(self, diag_reg: Any) -> float:
        """Compute a multiple of the mean diagonal, which an operator has to offer for that."""
        check_number("diag_reg", diag_reg, 0.0)
        if not diag_reg:
            return 0.0
        if not callable(getattr(self.given, "diagonal", None)):
            raise ValueError(
                f"diag_reg is a multiple of the mean diagonal, and {self.argument} is an operator without diagonal(). "
                f"Add the ridge to the operator, and leave diag_reg out."
            )
        return float(diag_reg * torch.as_tensor(self.given.diagonal()).double().mean())

    def dense(self) -> Tensor:
        """Compute the matrix."""
        # -> [m, n]
        if callable(getattr(self.given, "to_dense", None)):
            return as_matrix(self.given.to_dense()).detach().double()
        return torch.from_numpy(self.products.matmat(np.eye(self.shape[1]))).to(self.device)


def parse_kernel(kernel: Any, argument: str) -> Tensor | Operator:
    """Check a kernel that may be an operator, and read any other as a tensor."""
    return Operator.parse(kernel, argument) if is_operator(kernel) else check_entries(kernel, argument)


def _torch_dtype(dtype: Any) -> torch.dtype:
    """Find torch's name of a dtype of NumPy; integers, whose products are exact, count as float64."""
    kind = np.dtype(dtype)
    return torch.from_numpy(np.empty(0, np.float64 if kind.kind in "biu" else kind)).dtype
