"""What the operators of a model have in common: a session for the model in each product."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Size

from ggn_ntk.memory.budget import explained, limited
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.structure import structure_of
from ggn_ntk.operators.tensor_operator import TensorOperator
from ggn_ntk.problem.functions import shared_by
from ggn_ntk.problem.request import Request
from ggn_ntk.process.transforms import outside_of_transforms
from ggn_ntk.process.turns import alone_with


@contextmanager
def products_of(request: Request) -> Iterator[None]:
    """Open a session for products with a model's Jacobian, and explain errors about memory."""
    what, helps = "products with vectors", "What helps: memory= (say '2GiB') or a smaller batch_size."
    with (
        outside_of_transforms(),
        isolated(request.model),
        explained(lambda: what, helps),
        limited(request.memory),
    ):
        yield


def _structure_of(request: Request) -> Hashable:
    """Describe a model while no other thread evaluates it with exchanged parameters."""
    with alone_with(request.model, shared_by(request.model)):
        return structure_of(request.model, request.params)


class ModelOperator(TensorOperator):
    """An operator that a model stands for."""

    _owner = "the parameters"

    def __init__(self, request: Request, in_shape: list[Size], out_shape: list[Size]) -> None:
        """Set up, for a model that was looked at."""
        super().__init__(in_shape, out_shape)
        self._request, self._structure = request, _structure_of(request)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the parameters, which vectors must have."""
        return reduce(torch.promote_types, (p.dtype for p in self._request.params.values()))

    @property
    def device(self) -> torch.device:
        """The device of the parameters, where vectors must be."""
        return self._request.device

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Refuse a model that has changed, and open a session for it."""
        if _structure_of(self._request) != self._structure:
            raise ValueError(
                "The model has changed since the operator was made: its modules, their options, hooks or training "
                "flags, or which parameters require a gradient. Make a new operator."
            )
        with products_of(self._request):
            yield
