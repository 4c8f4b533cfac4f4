"""How much memory an evaluation of a model takes."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.problem.errors import is_out_of_memory
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import OperationMode, schema_of, storage_id, tree_leaves

_T = TypeVar("_T")


class _Made(OperationMode):
    """Adds up the bytes of what operations make."""

    def __init__(self) -> None:
        """Set up."""
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation."""
        result = func(*args, **(kwargs or {}))
        if _makes(func):
            self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


@cache
def _makes(func: Any) -> bool:
    """Tell whether an operation makes tensors, and returns no view nor what it has written to."""
    return all(returned.alias_info is None for returned in schema_of(func).returns)


def bytes_per_sample(request: Request) -> int:
    """Measure how many bytes a forward pass makes for one more sample, or for a whole batch that is one input."""
    # What a graph may hold
    made = list[_Made]()
    for count in (1,) if request.x1.whole else (1, 2):
        made.append(_Made())
        with torch.enable_grad():
            evaluate(request, None, request.x1[[0] * count], within=lambda: made[-1])
    return max(1, made[-1].bytes - sum(smaller.bytes for smaller in made[:-1]))


def kept_by(evaluation: Callable[[], _T], own: Iterable[Tensor]) -> tuple[_T, int]:
    """Evaluate a model, and measure how many bytes the graph keeps beside the model's ``own`` tensors."""
    before, kept = {storage_id(t) for t in own}, dict[int, int]()

    def take(x: Tensor) -> Tensor:
        if storage_id(x) not in before:
            kept[storage_id(x)] = x.untyped_storage().nbytes()
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(take, lambda x: x):
            found = evaluation()
        return found, sum(kept.values())
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
    # Transforms inside of a model let nothing see what they save: all that operations make is counted.
    with _Made() as made:
        found = evaluation()
    return found, made.bytes
