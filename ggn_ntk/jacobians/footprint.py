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

# How often a few samples are timed, unless it takes longer than so many seconds; how many at most, and how many bytes
# these may take.
_REPEATS, _LONG, _TIMED, _MOST = 2, 0.1, 64, 2**24

_NOTHING = nullcontext[Any]()


def measured(plan: Plan, inputs: Inputs) -> Footprint:
    """Evaluate a few samples, pass one output back, or two, and see what is kept."""
    n, inputs = len(inputs), inputs.map(torch.clone)  # these may be views of many more
    side, evaluated = kept_by(lambda: plan.evaluate(inputs), plan.request.model.parameters())
    evaluated += sum({storage_id(t): t.untyped_storage().nbytes() for t in side.kept}.values())
    outputs = torch.arange(min(2, side.output[0].numel()))
    passing, gathered = side.numel * side.output.element_size(), Gathered(n)
    steps = side.steps(outputs, lambda *_: None, again=False)
    gathered.put(slice(0, n), (step.jacobians() for step in steps))
    held, by_output = (gathered.nbytes(of_outputs=of_outputs) for of_outputs in (False, True))
    formed = sum(p.nbytes for p in plan.request.params.values())
    return Footprint(evaluated / n, passing / n, held / n, by_output / n / len(outputs), formed)


class Work(NamedTuple):
    """Operations, and seconds."""

    flops: float
    seconds: float


class Effort(NamedTuple):
    """What it takes to evaluate a sample, and to pass an output of it back."""

    forward: Work
    backward: Work
    calls: tuple[float, float]  # seconds that an evaluation, and a way back, take however few samples there are
    shared: float  # operations that pass an output back, however few samples there are: up to the last nonlinearity


def effort(plan: Plan, inputs: Inputs, footprint: Footprint, most: int) -> Effort:
    """Evaluate a few samples, and pass outputs back; operations are those that torch counts."""
    if len(inputs) == 1:  # one input, whatever is in it, or all that a model takes at a time
        (forward, backward), (evaluating, passing) = _counted(plan, inputs), _fastest(plan, inputs, 2)
        return Effort(Work(forward, evaluating), Work(backward, passing), (0.0, 0.0), 0.0)
    # Many small samples take less time than as many times two, and many outputs: they are timed together, as far as
    # that is soon done. A single one may take part in another graph than several.
    n = max(4, min(most, _TIMED, int(_MOST / max(1.0, footprint.working(2)))))
    outputs = max(2, int(_MOST / max(1.0, n * footprint.passing)))
    several, two = (inputs[[i % len(inputs) for i in range(count)]] for count in (n, 2))
    (forward, backward), (of_two, passed) = (_counted(plan, x) for x in (several, two))
    slope = (backward - passed) / (n - 2)
    # What an evaluation takes however few samples there are, more of them do not take again.
    times = list(zip(_fastest(plan, several, outputs), _fastest(plan, two, outputs), strict=True))
    seconds = [max((t - of_few) / (n - 2), t / n / 2) for t, of_few in times]
    evaluating, passing = (max(0.0, of_few - 2 * each) for (_, of_few), each in zip(times, seconds, strict=True))
    works = Work((forward - of_two) / (n - 2), seconds[0]), Work(slope, seconds[1])
    return Effort(*works, (evaluating, passing), passed - 2 * slope)


def _counted(plan: Plan, inputs: Inputs) -> tuple[float, float]:
    """Count the operations of an evaluation, and of passing an output back."""
    forward, backward = Counter(), Counter()
    passed = _passes(plan, inputs, 2, forward, backward)[2]
    return forward.flops, backward.flops / passed


def _fastest(plan: Plan, inputs: Inputs, outputs: int) -> tuple[float, float]:
    """Time both passes, several times if they are short: an evaluation, and passing an output back."""
    times = [_passes(plan, inputs, outputs)]
    while len(times) < _REPEATS and sum(times[0][:2]) < _LONG:
        times.append(_passes(plan, inputs, outputs))
    return min(forward for forward, _, _ in times), min(backward / passed for _, backward, passed in times)


def _passes(
    plan: Plan,
    inputs: Inputs,
    outputs: int,
    forward: AbstractContextManager[Any] = _NOTHING,
    backward: AbstractContextManager[Any] = _NOTHING,
) -> tuple[float, float, int]:
    """Evaluate samples, and pass so many outputs back, if there are: the seconds of both, and the number of outputs."""
    start = perf_counter()
    with forward:
        side = plan.evaluate(inputs)
    middle, chosen = perf_counter(), torch.arange(min(outputs, side.output[0].numel()))
    with backward:
        for _ in side.steps(chosen, lambda *_: None, again=False):
            pass
    return middle - start, perf_counter() - middle, len(chosen)


class Counter(OperationMode):
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
