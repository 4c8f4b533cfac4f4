"""The Jacobian of all outputs with respect to all parameters, and its adjoint, as operators."""

from torch import Size, Tensor

from ggn_ntk.operators.model_operator import ModelOperator
from ggn_ntk.operators.side import Side
from ggn_ntk.operators.tensor_operator import in_parts
from ggn_ntk.problem.request import Request


def _shapes(request: Request) -> list[Size]:
    """List the shapes of parameters."""
    return [p.shape for p in request.params.values()]


class JacobianOperator(ModelOperator):
    """The Jacobian ``[N C, P]`` of a model: what :meth:`NTKOperator.jacobian` returns.

    Its vectors are parameters, flat ``[P]`` in the order of ``params``, or in a list of their shapes.
    """

    def __init__(self, request: Request, side: Side) -> None:
        """Set up."""
        super().__init__(request, _shapes(request), [side.shape])
        self._side = side

    def _multiplied(self, rows: list[Tensor]) -> list[Tensor]:
        """Multiply K vectors."""
        names = self._request.params
        return in_parts(lambda u: [self._side.push(dict(zip(names, u, strict=True)))], rows, self._side.sizes.vectors)

    def _adjoint(self) -> "TransposedJacobianOperator":
        """Transpose it."""
        return TransposedJacobianOperator(self._request, self._side)


class TransposedJacobianOperator(ModelOperator):
    """The adjoint ``[P, N C]`` of a :class:`JacobianOperator`."""

    def __init__(self, request: Request, side: Side) -> None:
        """Set up."""
        super().__init__(request, [side.shape], _shapes(request))
        self._side = side

    def _multiplied(self, rows: list[Tensor]) -> list[Tensor]:
        """Multiply K vectors."""
        return in_parts(lambda v: list(self._side.pull(v[0]).values()), rows, self._side.sizes.vectors)

    def _adjoint(self) -> JacobianOperator:
        """Transpose it."""
        return JacobianOperator(self._request, self._side)
