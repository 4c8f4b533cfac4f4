"""How much memory and work a sample takes, measured on a few."""

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from ggn_ntk.contraction.gathered import Gathered
from ggn_ntk.jacobians.plan import Plan
from ggn_ntk.memory.layout import Footprint
from ggn_ntk.models.sizes import kept_by
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.process.torch_internals import OperationMode, storage_id

# How often a few samples are timed.
_REPEATS = 2

_NOTHING = nullcontext[Any]()


def measured(plan: Plan, inputs: Inputs) -> Footprint:
    """Evaluate a few samples, pass one output back, or two, and see what is kept."""
    n = len(inputs)
    side, evaluated = kept_by(lambda: plan.evaluate(inputs), plan.request.model.parameters())
    evaluated += sum({storage_id(t): t.untyped_storage().nbytes() for t in side.kept}.values())
    outputs = torch.arange(min(2, side.output[0].numel()))
    passing, gathered = side.numel * side.output.element_size(), Gathered(n)
    steps = side.steps(outputs, lambda *_: None, again=False)
    gathered.put(slice(0, n), (step.jacobians() for step in steps))
    held, by_output = (gathered.nbytes(of_outputs=of_outputs) for of_outputs in (False, True))
    return Footprint(evaluated / n, passing / n, held / n, by_output / n / len(outputs))


class Work(NamedTuple):
    """Operations, and seconds."""

    flops: float
    seconds: float


class Effort(NamedTuple):
    """What it takes to evaluate a sample, and to pass an output of it back."""

    forward: Work
    backward: Work
    call: float  # seconds that an evaluation takes, however few samples there are


def effort(plan: Plan, inputs: Inputs) -> Effort:
    """Evaluate a few samples, and pass an output back, or two; operations are those that torch counts."""
    n, forward, backward = len(inputs), _Counter(), _Counter()
    outputs = _passes(plan, inputs, forward, backward)[2]
    several, one = (_fastest(plan, inputs[:count]) for count in (n, 1))
    # What an evaluation takes however few samples there are, more of them do not take again.
    slopes = [max(t - alone, t / n / 2) / max(1, n - 1) for t, alone in zip(several, one, strict=True)]
    return Effort(
        Work(forward.flops / n, slopes[0]),
        Work(backward.flops / n / outputs, slopes[1] / outputs),
        max(0.0, one[0] - slopes[0]),
    )


def _fastest(plan: Plan, inputs: Inputs) -> tuple[float, float]:
    """Time both passes, several times."""
    times = [_passes(plan, inputs)[:2] for _ in range(_REPEATS)]
    return min(forward for forward, _ in times), min(backward for _, backward in times)


def _passes(
    plan: Plan,
    inputs: Inputs,
    forward: AbstractContextManager[Any] = _NOTHING,
    backward: AbstractContextManager[Any] = _NOTHING,
) -> tuple[float, float, int]:
    """Evaluate samples, and pass an output back, or two: the seconds of both, and the number of outputs."""
    start = perf_counter()
    with forward:
        side = plan.evaluate(inputs)
    middle, outputs = perf_counter(), torch.arange(min(2, side.output[0].numel()))
    with backward:
        for _ in side.steps(outputs, lambda *_: None, again=False):
            pass
    return middle - start, perf_counter() - middle, len(outputs)


class _Counter(OperationMode):
    """Counts operations, a multiplication and an addition as two."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and count its."""
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
