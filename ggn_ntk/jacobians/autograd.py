"""The way back of capture by autograd: from the model's output to the outputs of layers, in stages.

Where a residual block ends, or a layer of a sequence, all that lies before is reached through one tensor. There the way
back is divided: the cotangents of all outputs pass one stage, its layers are contracted, and from where it ends they
pass the next. So ``s`` of one stage is in memory at a time, not that of all layers.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.jacobians.recording import Call, Recording
from ggn_ntk.jacobians.sequential import identity, written
from ggn_ntk.memory.blocks import SIZE_ELSEWHERE, SIZES
from ggn_ntk.memory.chunks import Piece, split_outputs
from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.problem.errors import is_out_of_memory
from ggn_ntk.problem.output_axes import OutputAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import output_metadata

#: Numbers that ``s`` of a stage may hold before the outputs are taken in pieces.
BUDGET = 2**27

# Tensors start at multiples of so many numbers, for the sake of vector instructions.
_ALIGNED = 64

#: Numbers in the output of a layer, on average, from which on the model's outputs are passed back one by one: several
#: at once save calls of functions, but read and write more than a processor's cache holds. Elsewhere all pass at once.
ONE_BY_ONE = {"cpu": 2**16}


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of the way back."""

    start: GradientEdge  # where it starts in the graph
    calls: tuple[Call, ...]  # the calls of layers on the way, those first that it passes last
    end: tuple[GradientEdge, ...]  # where the next stage starts; empty for the last stage

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of its calls holds for one output."""
        return sum(call.shape.numel() for call in self.calls)


def stages(output: Tensor, calls: Sequence[Call]) -> list[Stage]:
    """Divide the way back wherever all of it passes through one tensor."""
    if not calls:
        return []
    nodes = _sorted_nodes(output, {call.edge.node for call in calls})
    places = {node: place for place, node in enumerate(nodes)}
    waiting = sorted(calls, key=lambda call: places.get(call.edge.node, len(nodes)), reverse=True)
    found: list[Stage] = []
    start, passed, reached = get_gradient_edge(output), list[Call](), 0
    for place, node in enumerate(nodes):
        while waiting and waiting[-1].edge.node is node:
            passed.append(waiting.pop())
        around = reached > place  # an edge leads past this node
        if passed and waiting and not around and len(output_metadata(node)) == 1:
            end = GradientEdge(node, 0)
            found.append(Stage(start, tuple(reversed(passed)), (end,)))
            start, passed = end, []
        reached = max([reached, *(places[before] for before, _ in node.next_functions if before in places)])
    return [*found, Stage(start, (*waiting, *reversed(passed)), ())]


def _sorted_nodes(output: Tensor, ends: Collection[Node]) -> list[Node]:
    """Sort the nodes of a graph, as far as they lead to some of them, so that each comes before those it leads to."""
    leads: dict[Node, bool] = {}
    found: list[Node] = []
    waiting = [(get_gradient_edge(output).node, False)]
    while waiting:
        node, done = waiting.pop()
        following = [before for before, _ in node.next_functions if before is not None]
        if done:
            leads[node] = node in ends or any(leads[before] for before in following)
            found += [node] * leads[node]
        elif node not in leads:
            leads[node] = False
            waiting.append((node, True))
            waiting += [(before, False) for before in following]
    return found[::-1]


def merged(parts: Sequence[Stage], size: int) -> list[Stage]:
    """Join stages, for fewer calls of functions."""
    found: list[Stage] = []
    for stage in parts:
        if found and found[-1].numel + stage.numel <= size:
            last = found.pop()
            stage = Stage(last.start, stage.calls + last.calls, stage.end)
        found.append(stage)
    return found


def pass_back(
    start: Tensor | GradientEdge,
    calls: Sequence[Call],
    cotangents: Tensor,
    others: Sequence[Tensor | GradientEdge] = (),
    *,
    batched: bool = False,
    allow_unused: bool = True,
) -> tuple[list[Tensor | None], tuple[Tensor | None, ...]]:
    """Pass cotangents back to layers."""
    # batched [K, ...] -> [*output]
    inputs: Any = [*(call.edge for call in calls), *others]
    if not inputs or (isinstance(start, Tensor) and not start.requires_grad):
        return [None] * len(calls), (None,) * len(others)
    found = torch.autograd.grad(
        start, inputs, cotangents, retain_graph=True, allow_unused=allow_unused, is_grads_batched=batched
    )
    lead = cotangents.shape[:batched]
    passed = zip(found[: len(calls)], calls, strict=True)
    return [None if s is None else s.reshape(*lead, *call.shape) for s, call in passed], found[len(calls) :]


class Rooms:
    """Memory for ``s`` of one stage after the other: to get new memory for each takes as long as to write it."""

    def __init__(self, numel: int) -> None:
        """Set up."""
        self._numel, self._used = numel, 0
        self._memory: Tensor | None = None

    def clear(self) -> None:
        """Let what was taken be overwritten."""
        self._used = 0

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Make room."""
        if self._memory is None:
            self._memory = like.new_empty(self._numel)
        start, stop = self._used, self._used + math.prod(shape)
        if stop > self._numel or self._memory.dtype != like.dtype or self._memory.device != like.device:
            return like.new_empty(shape)
        self._used = stop + -stop % _ALIGNED
        return self._memory[start:stop].view(shape)


def pull_back(
    stage: Stage, cotangents: Tensor | Sequence[Tensor], rooms: Rooms
) -> tuple[list[Tensor], Tensor | Sequence[Tensor]]:
    """Pass several cotangents back, at once where layers are small, and one by one where ``vmap`` fails."""
    # cotangents [K, ...] -> [K, *output]
    if stage.numel < len(stage.calls) * ONE_BY_ONE.get(cotangents[0].device.type, math.inf):
        try:
            several = cotangents if isinstance(cotangents, Tensor) else torch.stack(list(cotangents))
            found, ends = _pass_stage(stage, several, batched=True)
            return found, ends[0] if ends else []
        except Exception as error:
            if is_out_of_memory(error):
                raise
    found, passed = [], []
    for k, cotangent in enumerate(cotangents):
        parts, ends = _pass_stage(stage, cotangent)
        passed += ends
        found = found or [
            _room(call, part, len(cotangents), rooms) for call, part in zip(stage.calls, parts, strict=True)
        ]
        for whole, part in zip(found, parts, strict=True):
            whole[k].copy_(part)
    return found, passed


def _pass_stage(stage: Stage, cotangents: Tensor, *, batched: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Pass a stage."""
    # batched [K, ...]
    found, ends = pass_back(stage.start, stage.calls, cotangents, stage.end, batched=batched, allow_unused=False)
    return [s for s in found if s is not None], [s for s in ends if s is not None]


def _room(call: Call, part: Tensor, k: int, rooms: Rooms) -> Tensor:
    """Make room for the cotangents of a layer's output."""
    # -> [K, *output]
    axes = sorted(range(part.ndim), key=lambda axis: (axis != call.axis, -call.strides[axis]))
    channels = part.shape[axes[-1]]
    place = max(1, part.ndim - 1) if part.numel() > part.shape[axes[0]] * channels**2 else 1
    axes.insert(place, part.ndim)
    sizes = [*part.shape, k]
    room = rooms.take([sizes[axis] for axis in axes], part)
    return room.permute(place, *(axes.index(axis) for axis in range(part.ndim)))


class Capture:
    """A forward pass of all samples, and autograd's way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        counts: How often each wanted parameter is used, by name.
        failures: Why the rule of a parameter's layer failed on the way, by name.
    """

    kind = "autograd"

    def __init__(self, request: Request, recording: Recording) -> None:
        """Set up."""
        reached = set(graph_nodes(recording.output))
        wanted = [
            replace(call, params={key: name for key, name in call.params.items() if name in request.params})
            for call in recording.calls
            if call.edge.node in reached
        ]
        calls = [call for call in wanted if call.params]
        self._stages, self.output = stages(recording.output, calls), recording.output.detach()
        self.counts = Counter(name for call in calls for name in call.params.values())
        self.failures: dict[str, str] = {}

    def pieces(self, axes: OutputAxes) -> list[Piece]:
        """Split the outputs so that ``s`` of no stage exceeds the budget."""
        per_output = max((1, *(stage.numel for stage in self._stages)))  # a layer's output may be empty
        return split_outputs(axes, BUDGET // per_output)

    def jacobians(self, outputs: Tensor, parts: object) -> Iterator[dict[str, Factored]]:
        """Pass basis vectors of some outputs back and write Jacobians."""
        # outputs [*out]
        cotangents: Tensor | Sequence[Tensor] = identity(self.output, outputs)
        size = SIZES.get(self.output.device.type, SIZE_ELSEWHERE)
        divided = merged(self._stages, size // len(outputs))
        rooms = Rooms(max((len(outputs) * stage.numel + _ALIGNED * len(stage.calls) for stage in divided), default=0))
        for stage in divided:
            found, cotangents = pull_back(stage, cotangents, Rooms(0) if self._waits(stage) else rooms)
            for call in reversed(stage.calls):
                yield written(lambda: call.jacobians(found.pop()), call.module, call.params, self.failures)
            rooms.clear()

    def _waits(self, stage: Stage) -> bool:
        """Tell whether Jacobians of a stage wait for those of others."""
        return any(self.counts[name] > 1 for call in stage.calls for name in call.params.values())
