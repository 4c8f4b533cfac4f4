"""The empirical NTK as an operator."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.kernels.ntk import Method, compute_kernels
from ggn_ntk.memory.budget import check_dtypes
from ggn_ntk.models.independence import look
from ggn_ntk.models.requirements import configuration_problems, warn_of_statistics
from ggn_ntk.operators.jacobian_operator import JacobianOperator
from ggn_ntk.operators.model_operator import ModelOperator, products_of
from ggn_ntk.operators.side import Side
from ggn_ntk.operators.tensor_operator import in_parts
from ggn_ntk.problem.errors import UnsupportedModelError
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Pick, Request

_TAKEN = ("params", "output", "batch_size", "memory")

# What to do instead of keywords that kernels have, and operators do not.
_ROLES = "it pairs all outputs; output= picks some of them, and diagonal() and block_diagonal() compute these parts"
_INSTEAD = {
    "interacting": (
        "a product takes samples in batches, and these would be one input with all others; "
        "empirical_ntk(..., interacting=True) computes such a kernel, of which as_matrix() makes a matrix"
    ),
    "paired": "block_diagonal() has the kernels of samples with themselves, and empirical_ntk(..., paired=True) others",
    "compute": _ROLES,
    "trace_axes": _ROLES,
    "diagonal_axes": _ROLES,
    "per_parameter": "make an operator for each of them (params=), which can be added",
    "method": "a product has one way, which is compared with autograd when the operator is made",
    "capture": "a product runs the model as it is, and takes nothing apart",
    "check": "products are always compared with autograd, when the operator is made",
    "progress": "a product is one of many; what makes these, a solver say, can count them",
}


def _refused(keywords: Collection[str]) -> str:
    """Say which keywords there are, and what to do instead of others."""
    instead = "".join(f" {name}: {_INSTEAD[name]}." for name in keywords if name in _INSTEAD)
    return f"NTKOperator has the keywords {', '.join(_TAKEN)}, got {', '.join(keywords)}.{instead}"


class KernelOperator(ModelOperator):
    """The kernel of two sides that were looked at."""

    def __init__(self, request: Request, rows: Side, columns: Side) -> None:
        """Set up."""
        super().__init__(request, [columns.shape], [rows.shape])
        self.SELF_ADJOINT = request.symmetric
        self._rows, self._columns = rows, columns

    def jacobian(self, of: str = "x1") -> JacobianOperator:
        """Make an operator of the Jacobian of one side.

        Args:
            of: ``"x1"`` or ``"x2"``.

        Returns:
            The Jacobian ``[N C, P]``, which multiplies parameters; its ``adjoint()`` multiplies outputs.

        Raises:
            ValueError: If ``of`` is neither.
        """
        if of not in ("x1", "x2"):
            raise ValueError(f"of must be 'x1' or 'x2', got {of!r}.")
        return JacobianOperator(self._request, self._rows if of == "x1" else self._columns)

    def to_dense(self) -> Tensor:
        """Compute the kernel by :func:`ggn_ntk.empirical_ntk`.

        Returns:
            The matrix ``[N1 C, N2 C]``.
        """
        # [N1, N2, *out1, *out2] -> [N1, *out1, N2, *out2]
        return self._kernel(self._request).movedim(1, len(self._rows.shape)).reshape(self.shape)

    def diagonal(self) -> Tensor:
        """Compute the diagonal, from the kernels of samples with themselves alone.

        Returns:
            The entries of row ``i`` and column ``i``: ``[N C]``.

        Raises:
            ValueError: If the operator is not square.
        """
        return self._paired("diagonal").flatten()

    def block_diagonal(self) -> Tensor:
        """Compute the kernels of samples with themselves alone, all outputs with all.

        Returns:
            ``[N, C, C]``.

        Raises:
            ValueError: If the operator is not square.
        """
        n, *out = self._rows.shape
        c = torch.Size(out).numel()
        return self._paired("full").reshape(n, c, c)

    def _paired(self, compute: str) -> Tensor:
        """Compute the kernels of x1[n] with x2[n]."""
        if self._rows.shape != self._columns.shape:
            shapes = f"{list(self._rows.shape)} and {list(self._columns.shape)}"
            raise ValueError(f"Only a square operator has a diagonal: outputs of x1 and x2 have the shapes {shapes}.")
        return self._kernel(replace(self._request, axes=AxesRequest.parse(compute, paired=True)))

    @staticmethod
    def _kernel(request: Request) -> Tensor:
        """Compute a kernel."""
        kernel, _ = compute_kernels(request, Method.AUTO, check=False)
        assert isinstance(kernel, Tensor)  # of one output, summed over parameters
        return kernel

    def _multiplied(self, rows: list[Tensor]) -> list[Tensor]:
        """Multiply K vectors."""
        size = min(self._rows.sizes.vectors, self._columns.sizes.vectors)
        return in_parts(lambda v: [self._rows.push(self._columns.pull(v[0]))], rows, size)

    def _adjoint(self) -> "KernelOperator":
        """Exchange x1 and x2."""
        return KernelOperator(self._request.exchanged, self._columns, self._rows)


class NTKOperator(KernelOperator):
    """The empirical NTK ``J(x1) J(x2)^T`` as an operator ``[N1 C, N2 C]`` on outputs ``[N2, *out]``.

    Its rows are those of outputs ``[N, *out]``, flattened: samples first. A product takes a backward pass over x2 and a
    forward pass in forward mode over x1 (Novak, Sohl-Dickstein, Schoenholz: "Fast Finite Width Neural Tangent Kernel",
    ICML 2022, section 3.3), a batch of samples at a time, whatever the size of the kernel. The memory that this takes
    is that of a batch, and of twice the parameters for each vector that is multiplied.

    When it is made, all samples are looked at: those that influence one another are refused, and products must be what
    autograd says. It takes a few products' time. Products follow the values that the parameters have when they are
    computed. The model, its gradients and all global settings are left as found.

    >>> import torch
    >>> from ggn_ntk.operators import NTKOperator
    >>> model = torch.nn.Linear(3, 2)
    >>> kernel = NTKOperator(model, torch.randn(5, 3))
    >>> (kernel @ torch.randn(5, 2)).shape, (kernel @ torch.randn(10)).shape
    (torch.Size([5, 2]), torch.Size([10]))
    """

    def __init__(
        self,
        model: Model,
        x1: Any,
        x2: Any = None,
        *,
        params: Params | None = None,
        output: Pick | tuple[Pick, Pick] = None,
        batch_size: int | None = None,
        memory: int | str | None = None,
        **others: Any,
    ) -> None:
        """Look at a model and its samples.

        Args:
            model: The model, or a function, as for :func:`ggn_ntk.empirical_ntk`.
            x1: N1 samples ``[N1, ...]``, as for :func:`ggn_ntk.empirical_ntk`.
            x2: N2 samples like x1, also of other shapes; ``None`` for x1: the operator is then self-adjoint.
            params: The parameters to sum over, as for :func:`ggn_ntk.empirical_ntk`.
            output: Turns what the model returns into one tensor ``[N, *out]``; or a pair, for x1 and for x2.
            batch_size: How many samples to evaluate at once; ``None`` for what memory allows, and is fast.
            memory: Bytes that a product may take beyond what it returns, or text such as ``"2GiB"``; ``None`` for what
                the device has free.
            **others: None: other keywords of a kernel are refused, with what to do instead.

        Raises:
            UnsupportedModelError: If the model has no exact kernel.
            TypeError: If an argument is of the wrong type, or there is no such keyword.
            ValueError: If an argument has a value that is not accepted.
        """
        if others:
            raise TypeError(_refused(others))
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}.")
        full = AxesRequest.parse("full")
        request = Request.parse(model, x1, x2, full, params=params, per_parameter=False, output=output, memory=memory)
        with products_of(request):
            problems = configuration_problems(request)
            if problems:
                raise UnsupportedModelError(problems)
            few = [look(side) for side in request.apart]
            check_dtypes(few)
            sides = [Side(side, f, batch_size) for side, f in zip(request.apart, few, strict=True)]
            warn_of_statistics(request.model)
        super().__init__(request, sides[0], sides[-1])
