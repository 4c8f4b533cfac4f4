"""Backward passes by autograd: from the model's output to the uses of parameters, a stage at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.jacobians.backward import Step, identity
from ggn_ntk.jacobians.layer_call import LayerCall
from ggn_ntk.jacobians.stages import Stage, merged, stages
from ggn_ntk.jacobians.sums import Sums
from ggn_ntk.jacobians.uses import Use
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.memory.buffers import ALIGNED, Buffer
from ggn_ntk.problem.errors import is_out_of_memory
from ggn_ntk.process.transforms import batched_gradients


def pass_back(
    start: Tensor | GradientEdge,
    calls: Sequence[LayerCall | Use],
    cotangents: Tensor,
    others: Sequence[Tensor | GradientEdge] = (),
    *,
    batched: bool = False,
    allow_unused: bool = True,
) -> tuple[list[Tensor | None], tuple[Tensor | None, ...]]:
    """Pass cotangents back to uses."""
    # batched [K, ...] -> [*output]
    inputs: Any = [*(call.edge for call in calls), *others]
    if not inputs or (isinstance(start, Tensor) and not start.requires_grad):
        return [None] * len(calls), (None,) * len(others)
    found: tuple[Tensor | None, ...]
    if batched:
        found = batched_gradients(start, inputs, cotangents, allow_unused=allow_unused)
    else:
        found = torch.autograd.grad(start, inputs, cotangents, retain_graph=True, allow_unused=allow_unused)
    lead = cotangents.shape[:batched]
    passed = zip(found[: len(calls)], calls, strict=True)
    return [None if s is None else s.reshape(*lead, *call.shape) for s, call in passed], found[len(calls) :]


def pull_back(
    stage: Stage, cotangents: Tensor | Sequence[Tensor], buffer: Buffer
) -> tuple[list[Tensor], Tensor | Sequence[Tensor]]:
    """Pass several cotangents back, at once where outputs are small, and one by one where ``vmap`` fails."""
    # cotangents [K, ...] -> [K, *output]
    if stage.numel < len(stage.calls) * _one_by_one(cotangents[0]):
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
            _room(call, part, len(cotangents), buffer) for call, part in zip(stage.calls, parts, strict=True)
        ]
        for whole, part in zip(found, parts, strict=True):
            whole[k].copy_(part)
    return found, passed


def _one_by_one(like: Tensor) -> float:
    """Look up from how many numbers in the output of a use on cotangents pass back one by one."""
    return MemoryBudget.of(like.device).one_by_one / like.element_size()


def _pass_stage(stage: Stage, cotangents: Tensor, *, batched: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Pass a stage."""
    # batched [K, ...]
    found, ends = pass_back(stage.start, stage.calls, cotangents, stage.end, batched=batched, allow_unused=False)
    return [s for s in found if s is not None], [s for s in ends if s is not None]


def _room(call: LayerCall | Use, part: Tensor, k: int, buffer: Buffer) -> Tensor:
    """Make room for the cotangents of the output of a use."""
    # -> [K, *output]
    strides = part.stride()
    axes = sorted(range(part.ndim), key=lambda axis: (axis != call.axis, -strides[axis]))
    if not axes:  # a single number
        return buffer.take([k], part)
    channels = part.shape[axes[-1]]
    place = max(1, part.ndim - 1) if part.numel() > part.shape[axes[0]] * channels**2 else 1
    place = 0 if call.rows > 1 else place  # outside of rows that belong to a sample, which are one run then
    axes.insert(place, part.ndim)
    sizes = [*part.shape, k]
    room = buffer.take([sizes[axis] for axis in axes], part)
    return room.permute(place, *(axes.index(axis) for axis in range(part.ndim)))


class AutogradPass:
    """A forward pass of all samples, and autograd's way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        failures: Why the rule of a parameter failed on the way, by name.
    """

    def __init__(
        self, params: dict[str, Tensor], calls: Sequence[LayerCall | Use], output: Tensor, *, kept: int
    ) -> None:
        """Set up; the first samples are ``kept``, and any others were evaluated for their company alone."""
        wanted = [call for call in calls if call.names or call.weights]
        self._params, self._calls, self._whole = params, wanted, output.detach()
        self._stages, self.output = stages(output, wanted), self._whole[:kept]
        self.failures: dict[str, str] = {}

    @property
    def kept(self) -> list[Tensor]:
        """What the evaluation keeps beside its graph: nothing that this does not hold."""
        return []

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of one output holds where it is largest, or as it waits; or the Jacobian of a weight."""
        weights = {w.key: w for call in self._calls for w in call.weights}.values()
        formed = (len(self._whole) * w.numel(self._params) for w in weights)
        sums = sums_of(self._calls, self._params, self.failures)
        waiting = sum(stage.numel for stage in self._stages if _waits(stage, sums))
        return max((1, waiting, *(stage.numel for stage in self._stages), *formed))  # an output may be empty

    @property
    def total(self) -> int:
        """Numbers that ``s`` of one output holds on the whole way back."""
        return max(self.numel, sum(stage.numel for stage in self._stages))

    def steps(self, outputs: Tensor, parts: object, *, again: bool, hold: bool) -> Iterator[Step]:
        """Pass ``s`` of some outputs back, a use at a time; what is not needed ``again`` is freed on the way."""
        cotangents: Tensor | Sequence[Tensor] = identity(self._whole, outputs)
        size = MemoryBudget.of(self.output.device).passing // (self.output.element_size() * len(outputs))
        divided, sums = merged(self._stages, size), sums_of(self._calls, self._params, self.failures)
        if not again:
            self._stages, self._calls = [], []
        numels = (len(outputs) * stage.numel + ALIGNED * len(stage.calls) for stage in divided)
        buffer = Buffer(max(numels, default=0))
        for stage in divided:
            found, cotangents = pull_back(stage, cotangents, Buffer(0) if hold or _waits(stage, sums) else buffer)
            for call in reversed(stage.calls):
                yield from Step.standing(partial(self._kept, partial(call.add_to, sums, found.pop())))
            buffer.clear()

    def _kept(self, write: Callable[[], Jacobians]) -> Jacobians:
        """Write Jacobians of the samples that are kept."""
        jacobians, kept = write(), len(self.output)
        if kept == len(self._whole):
            return jacobians
        return {name: [part.select_samples(range(kept)) for part in parts] for name, parts in jacobians.items()}


def _waits(stage: Stage, sums: Sums) -> bool:
    """Tell whether Jacobians of a stage wait for other uses of their parameters, and keep ``s``."""
    return any(sums.several(call.names, call.weights) for call in stage.calls)


def sums_of(calls: Sequence[LayerCall | Use], params: dict[str, Tensor], failures: dict[str, str]) -> Sums:
    """Set up for the Jacobians of some calls."""
    weights = (weight for call in calls for weight in call.weights)
    return Sums((name for call in calls for name in call.names), weights, params, failures)
