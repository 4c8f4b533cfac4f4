"""What operators have in common: the forms of vectors that they take, and a session for each product."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.operators.curvlinops_internals import IdentityLinearOperator, PyTorchLinearOperator
from ggn_ntk.problem.errors import kind_of
from ggn_ntk.process.transforms import is_wrapped

_WHAT = "What an operator multiplies"


class TensorOperator(PyTorchLinearOperator):
    """An operator between outputs ``[N, *out]`` of a model, or its parameters."""

    _owner = "the operator"  # what vectors have the dtype and the device of

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that vectors must have."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device where vectors must be."""
        raise NotImplementedError

    def __matmul__(self, other: Any) -> Any:
        """Multiply vectors, or another operator.

        Args:
            other: For an operator ``[m, n]``, a vector ``[n]`` or a matrix ``[n, K]``. Or the same in the shape of what
                it acts on, say ``[N, *out]`` or ``[N, *out, K]``; a list of such tensors where that are several, the
                parameters. Or another operator.

        Returns:
            The products, in the form that was given: ``[m]`` or ``[m, K]``, or in the shape of what results, or a list.
            Of two operators, their product as an operator.

        Raises:
            TypeError: If it is none of these.
            ValueError: If it has another shape, dtype or device than the operator takes, or requires a gradient.
        """
        if not isinstance(other, Tensor | list | PyTorchLinearOperator):
            raise TypeError(f"{_WHAT} must be a tensor, a list of tensors or an operator, got {kind_of(other)}.")
        if not isinstance(other, Tensor) or (other.ndim in (1, 2) and len(other) == self.shape[1]):
            return super().__matmul__(other)
        shape, n = self._in_shape[0], self.shape[1]
        several = other.shape[len(shape) :]
        if len(self._in_shape) > 1 or other.shape[: len(shape)] != shape or len(several) > 1:
            shaped = f", or {list(shape)} with K behind for several" if len(self._in_shape) == 1 else ""
            raise ValueError(f"{_WHAT} must have shape [{n}] or [{n}, K]{shaped}, got {list(other.shape)}.")
        products = super().__matmul__(other.reshape(n, *several))
        return products.reshape(*self._out_shape[0], *several) if len(self._out_shape) == 1 else products

    def identity(self) -> PyTorchLinearOperator:
        """Make the identity, for shifts such as ``K + 0.1 * K.identity()``.

        Returns:
            An operator ``[n, n]``.

        Raises:
            ValueError: If this operator is not square.
        """
        if self._in_shape != self._out_shape:
            raise ValueError(f"Only a square operator can be shifted, and this one is {list(self.shape)}.")
        return IdentityLinearOperator(self._in_shape, self.device, self.dtype)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:  # noqa: N803 - curvlinops calls it so
        """Multiply K vectors, in a session."""
        # [*in, K] -> [*out, K]
        for x in X:
            self._check(x)
        with self._session():
            if not X[0].shape[-1]:
                return [X[0].new_empty(*shape, 0) for shape in self._out_shape]
            rows = [(x.clone() if x.is_inference() else x.detach()).movedim(-1, 0) for x in X]
            return [y.to(self.dtype).movedim(0, -1) for y in self._multiplied(rows)]

    def _session(self) -> AbstractContextManager[None]:
        """Prepare for products, and leave all as found."""
        raise NotImplementedError

    def _multiplied(self, rows: list[Tensor]) -> list[Tensor]:
        """Multiply K vectors."""
        # [K, *in] -> [K, *out]
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        """Refuse vectors of another dtype or device, and those whose products would lose a graph."""
        if is_wrapped(x):
            raise ValueError(f"{_WHAT} is what a torch.func transform makes of a tensor: compute products outside.")
        for what in ("dtype", "device"):
            given, wanted = getattr(x, what), getattr(self, what)
            if given != wanted:
                raise ValueError(f"{_WHAT} must have the {what} of {self._owner}, {wanted}, got {given}.")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{_WHAT} requires a gradient, but products carry no graph: pass it with detach().")


def in_parts(multiply: Callable[[list[Tensor]], list[Tensor]], rows: list[Tensor], size: int) -> list[Tensor]:
    """Multiply vectors a few at a time."""
    # [K, *in] -> [K, *out]
    parts = [multiply(list(some)) for some in zip(*(x.split(size) for x in rows), strict=True)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]
