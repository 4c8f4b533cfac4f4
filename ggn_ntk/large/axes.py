"""Which axes of a kernel are outputs of x1, and which of x2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from ggn_ntk.large.plan import Path
from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.several import entries_by_key

#: How many axes an output has; of several outputs, each by its key.
Counts = int | Mapping[Any, int]


def count_axes(request: Request) -> tuple[Counts, Counts]:
    """Count the axes of the outputs of x1, and of x2."""
    with isolated(request.model), torch.enable_grad():
        counts = [_count(evaluate(side, None, side.x1)) for side in request.apart]
    return counts[0], counts[-1]


def _count(returned: Any) -> Counts:
    """Count the axes of outputs ``[N, *out]``."""
    if isinstance(returned, Tensor):
        return returned.ndim - 1
    return {key: x.ndim - 1 for key, x in entries_by_key(returned).items()}


def output_axes(
    keys: Path, counts: tuple[Counts, Counts], request: AxesRequest
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the axes of a kernel ``[N1, N2, ...]`` that are outputs of x1, and of x2; diagonal ones are of both."""
    pair = keys[-1] if is_pair(keys) else keys[-1:] * 2 or (None, None)
    sides = [count if isinstance(count, int) else count[key] for count, key in zip(counts, pair, strict=True)]
    first, second = (request.resolve(Size([1] * count)).first for count in sides)
    samples = 1 if request.paired else 2
    of_first = {axis: samples + place for place, axis in enumerate(first.kept)}
    of_second = {axis: samples + len(of_first) + place for place, axis in enumerate(second.free)}
    of_second |= {axis: of_first[same] for axis, same in zip(second.diagonal, first.diagonal, strict=True)}
    return tuple(of_first.values()), tuple(of_second[axis] for axis in second.kept)


def is_pair(keys: Path) -> bool:
    """Tell whether a kernel is one of a pair of outputs, by its keys."""
    return bool(keys) and isinstance(keys[-1], tuple)
