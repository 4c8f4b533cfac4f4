"""What is learnt by looking at a model once, and what is evaluated with it.

All samples that are evaluated together share a plan; x1 and x2 that are evaluated apart have one each, and parameters
that fall back for one of them fall back for both.
"""

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.contraction.contract import Wanted
from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.jacobians.autograd import AutogradPass
from ggn_ntk.jacobians.backward import BackwardPass, Parts, Step
from ggn_ntk.jacobians.finding import find_uses
from ggn_ntk.jacobians.layer_call import LayerCall, Recording
from ggn_ntk.jacobians.layers import is_known, structure_problems
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.sequential import SequentialPass
from ggn_ntk.jacobians.uses import Use, Uses, read
from ggn_ntk.jacobians.verification import Few, Verification, evaluate_few, following
from ggn_ntk.memory.budget import IN_GRAPH, fits, resolve_axes
from ggn_ntk.memory.layout import Layout
from ggn_ntk.models.evaluation import check_output, check_shape
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import configuration_problems
from ggn_ntk.models.sizes import kept_by
from ggn_ntk.problem.errors import (
    NotCapturedError,
    Problem,
    UnsupportedModelError,
    UnsupportedRouteError,
    is_out_of_memory,
)
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import KernelAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import storage_id
from ggn_ntk.rules.registry import channels_last

_ROUTE = "structured empirical NTK"


@dataclass(frozen=True, eq=False)
class Plan:
    """What was learnt by looking at a model once: it holds for other samples of the same shapes and dtype."""

    request: Request  # of samples that are evaluated together
    fallback: dict[str, str]  # parameters whose Jacobians rules do not give, with the reason
    cancelling: set[str]  # parameters whose Jacobian is far smaller than the terms that rules add up for it
    uses: Uses | None  # where parameters are used; ``None`` for a Sequential model, whose layers tell
    channels_last: bool  # whether samples that are images are evaluated with channels last in memory

    @property
    def capture(self) -> str:
        """How the model is taken apart: a value of ``capture``."""
        return "sequential" if self.uses is None else "autograd"

    def suited(self, inputs: Inputs) -> Inputs:
        """Bring samples to the memory layout that suits the model."""
        return inputs.map(channels_last) if self.channels_last else inputs

    def evaluate(self, inputs: Inputs) -> "Side":
        """Evaluate the model on samples."""
        inputs = self.suited(inputs)
        if self.uses is None:
            return Side(SequentialPass(_without(self.request, self.fallback), inputs))
        backward, uses = _autograd_pass(self.request, inputs, self.uses, self.fallback)
        return Side(backward, as_planned=uses is self.uses)


class Side:
    """Samples that a model was evaluated on together: outputs, and a backward pass that yields Jacobians.

    Attributes:
        output: The outputs ``[N, *out]``.
        verification: What is shown all Jacobians, if they are to be verified.
        as_planned: Whether parameters were used where the plan says.
    """

    def __init__(
        self, backward: BackwardPass, verification: Verification | None = None, *, as_planned: bool = True
    ) -> None:
        """Set up."""
        self._backward, self.verification, self.as_planned = backward, verification, as_planned
        self.output = backward.output

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of one output holds where it is largest."""
        return self._backward.numel

    @property
    def total(self) -> int:
        """Numbers that ``s`` of one output holds on the whole way back."""
        return self._backward.total

    @property
    def kept(self) -> Sequence[Tensor]:
        """What the evaluation keeps, beside a graph."""
        return self._backward.kept

    @property
    def failures(self) -> dict[str, str]:
        """Why the rule of a parameter failed on the way back, by name."""
        return self._backward.failures

    def steps(
        self, outputs: Tensor, parts: Parts, *, again: bool, hold: bool = False
    ) -> "Iterator[Step | _VerifiedStep]":
        """Pass some outputs back, a use at a time; ``again``: and others later; ``hold``: Jacobians are kept."""
        # outputs [C], their places in [*out], flattened
        steps = self._backward.steps(outputs, parts, again=again, hold=hold)
        if self.verification is None:
            return steps
        self.verification.begin(outputs)
        return (_VerifiedStep(step, self.verification) for step in steps)


class _VerifiedStep(NamedTuple):
    """A use on the way back, whose Jacobians are shown to a verification."""

    step: Step
    verification: Verification

    def jacobians(self) -> Jacobians:
        """Write Jacobians by name."""
        jacobians = self.step.jacobians()
        self.verification.add(jacobians)
        return jacobians


class Plans(NamedTuple):
    """The plans for a kernel, and its sides: one of each, or x1's and x2's."""

    request: Request
    axes: KernelAxes  # the roles of output axes
    plans: list[Plan]
    sides: list[Side]
    # Whether nothing but the shapes of samples and parameters is known to decide on what is computed
    follows_shapes: bool = False
    layout: Layout | None = None  # how samples are taken in blocks; ``None`` where all are evaluated together

    @property
    def verifications(self) -> list[Verification]:
        """What the sides are compared with."""
        return [side.verification for side in self.sides if side.verification is not None]

    @property
    def fallback(self) -> dict[str, str]:
        """The parameters whose Jacobians rules do not give for a side, with the reason; it grows on the way back."""
        reasons = [*(plan.fallback for plan in self.plans), *(side.failures for side in self.sides)]
        return reduce(operator.or_, reasons, {})

    @property
    def covered(self) -> list[str]:
        """The parameters whose Jacobians rules give for all sides."""
        fallback = self.fallback
        return [name for name in self.request.params if name not in fallback]

    @property
    def cancelling(self) -> set[str]:
        """The parameters whose Jacobian is far smaller than the terms that rules add up for it."""
        return set().union(*(plan.cancelling for plan in self.plans))

    @property
    def wanted(self) -> Wanted:
        """What is wanted of the kernels."""
        request = self.request
        formed = request.params if request.jacobians_first else self.cancelling
        return Wanted(self.axes, request.groups.__getitem__, self.covered, formed)

    @property
    def capture(self) -> str:
        """How the model is taken apart."""
        return ", ".join(dict.fromkeys(plan.capture for plan in self.plans))

    def for_others(self, request: Request) -> "Plans | None":
        """Evaluate samples of the same form; ``None`` if the model computes something else for these."""
        found = zip(self.plans, request.batches, strict=True)
        plans = [replace(plan, request=batch) for plan, batch in found]
        sides = [plan.evaluate(plan.request.inputs) for plan in plans]
        fits = zip(sides, self.axes, strict=False)
        if all(side.as_planned and side.output.shape[1:] == of_side.out_shape for side, of_side in fits):
            return Plans(request, self.axes, plans, sides)
        return None

    def with_fallback(self, fallback: dict[str, str]) -> "Plans":
        """Let parameters fall back."""
        return self._replace(plans=[replace(plan, fallback=fallback) for plan in self.plans], sides=[])

    def without_samples(self) -> "Plans":
        """Keep what was learnt alone."""
        request, fallback = self.request.few(), self.fallback
        plans = [replace(plan, request=request, fallback=fallback) for plan in self.plans]
        known = all(plan.uses is None and is_known(plan.request) for plan in plans)
        follows_shapes = known and not fallback and self.layout is None
        return Plans(request, self.axes, plans, [], follows_shapes, self.layout)


def make_plans(request: Request, fallback: dict[str, str], *, everyone: bool, few: bool = False) -> Plans | None:
    """Look at a model: the plans, and the sides, whose evaluation it takes to find the samples."""
    # ``everyone``: Jacobians of all samples are verified, whatever the model. ``None`` where all samples together may
    # take more memory than there is, unless they are few in any case.
    problems = configuration_problems(request)
    if problems:
        raise UnsupportedModelError(problems)
    looked = [(batch, _evaluate_few(batch)) for batch in request.batches]
    # A kernel that cannot fit is refused before more is evaluated.
    axes = resolve_axes(request, [looked_at.outputs[0] for _, looked_at in looked])
    if not few and max(map(len, request.sets)) > 1 and not _fit(looked, axes):
        return None
    plans = Plans(request, axes, [], [])
    for batch, looked_at in looked:
        plan, side = _make_plan(batch, looked_at, fallback, everyone=everyone)
        plans.plans.append(plan)
        plans.sides.append(side)
        fallback = plans.fallback | fallback
    return plans


def _fit(looked: Sequence[tuple[Request, Few]], axes: KernelAxes) -> bool:
    """Tell whether all samples may be evaluated together, and free outputs pass back together."""
    device, sizes = looked[0][1].outputs[0].device, [(len(few.inputs), *few.bytes_of_one) for _, few in looked]
    if not fits(2 * max(axes.shape[1:]) * sum(n * largest for n, _, largest in sizes), device):
        return False
    # What is computed is more than what is kept, but known already.
    if fits(sum(n * computed for n, computed, _ in sizes), device):
        return True
    return fits(sum(len(few.inputs) * _kept_of_one(batch, few) for batch, few in looked), device)


def _kept_of_one(request: Request, few: Few) -> int:
    """Evaluate few samples again, and see what it takes to keep one."""
    inputs = few.recordings[0].inputs.map(torch.clone)
    try:
        if few.every:
            kept = {storage_id(x): x.untyped_storage().nbytes() for x in SequentialPass(request, inputs).kept}
            return sum(kept.values()) // len(inputs)
    except UnsupportedRouteError:
        if request.capture != "auto":
            raise
    _, in_graph = kept_by(lambda: record(request, inputs), request.model.parameters())
    return IN_GRAPH * in_graph // len(inputs)


def _evaluate_few(batch: Request) -> Few:
    """Evaluate a few samples."""
    every = _is_sequential(batch)
    return evaluate_few(batch, batch.inputs, every=every, known=every and is_known(batch))


def _make_plan(request: Request, few: Few, fallback: dict[str, str], *, everyone: bool) -> tuple[Plan, Side]:
    """Look at a model on samples that are evaluated together."""
    stand_for_all = sum(request.sizes) == 1 or (few.known and not request.thorough)
    verification = Verification(request, few, everyone=everyone or not stand_for_all)
    _refuse_writes(request)
    if few.every:
        fallback = verification.try_rules(few.recordings, None) | fallback
        try:
            backward: BackwardPass = SequentialPass(_without(request, fallback), few.inputs)
        except UnsupportedRouteError:
            if request.capture != "auto":
                raise
            request = replace(request, capture="autograd")
            return _make_plan(request, _evaluate_few(request), fallback, everyone=everyone)
        uses = None
    else:
        recordings = _two_and_three(request, few, verification.out_shape)
        _refuse_writes(request)
        uses = find_uses(recordings, request.params)
        fallback = verification.try_rules(recordings[:1], uses) | fallback
        autograd_pass, _ = _autograd_pass(request, few.inputs, uses, fallback)
        backward, fallback = autograd_pass, autograd_pass.failures | fallback
    verification.see(backward.output)
    plan = Plan(request, fallback, verification.cancelling, uses, few.channels_last)
    return plan, Side(backward, verification)


def _autograd_pass(request: Request, inputs: Inputs, uses: Uses, fallback: Container[str]) -> tuple[AutogradPass, Uses]:
    """Evaluate the model on some samples, and set up the way back."""
    recording, uses, calls = recorded(request, inputs, uses)
    check_output(recording.output, recording.n)
    wanted = [call.without(fallback) for call in calls]
    backward = AutogradPass(request.params, wanted, recording.output, kept=len(inputs))
    backward.failures |= {name: why for name, why in uses.problems.items() if name not in fallback}
    return backward, uses


def recorded(
    request: Request, inputs: Inputs, uses: Uses, within: Callable[[], AbstractContextManager[None]] = nullcontext
) -> tuple[Recording, Uses, list[LayerCall | Use]]:
    """Evaluate the model on some samples, and find the uses of parameters in their graph."""
    recording = record(request, inputs, within=within)
    try:
        return recording, uses, read(uses, recording)
    except NotCapturedError:  # it computes something else than for the samples that were looked at
        if len(inputs) == 1 and not inputs.whole:
            inputs = inputs[[0, 0]]
            recording = record(request, inputs, within=within)
        twice = [] if inputs.whole else [record(request, inputs[[*range(len(inputs))] * 2])]
        uses = find_uses([recording, *twice], request.params)
        return recording, uses, read(uses, recording)


def _two_and_three(request: Request, few: Few, out_shape: Size) -> list[Recording]:
    """Evaluate two samples, and three; or one, if the model takes no more at a time."""
    n, found = len(few.inputs), few.recordings if len(few.inputs) > 1 else []
    if few.inputs.whole:
        return few.recordings
    for count in range(2 + len(found), 4):
        try:
            recording = record(request, few.inputs[following(few.samples[0], count, n)])
            check_shape(recording.output, count, out_shape)
        except Exception as error:
            if n > 1 or is_out_of_memory(error):
                raise
            return few.recordings
        found = [*found, recording]
    return found


def _is_sequential(request: Request) -> bool:
    """Tell whether the model is a sequence of layers, and is to be taken as one."""
    if request.axes.interacting:
        what, remedy = "its layers see the whole batch (interacting=True)", "Use capture='autograd'"
        problems = [Problem("", what, remedy)]
    else:
        problems = [] if request.capture == "autograd" else list(structure_problems(request))
    if problems and request.capture == "sequential":
        raise UnsupportedRouteError(problems, _ROUTE)
    return request.capture != "autograd" and not problems


def _refuse_writes(request: Request) -> None:
    """Refuse a model whose forward pass writes to what it is made of: a pass's graph does not survive the next."""
    with isolated(request.model) as session:
        if not session.written and not session.set_back:
            return
        names = [name for name, p in request.model.named_parameters() if p in session.written]
        set_back = set(map(id, session.set_back))
        names += [name for name, b in request.model.named_buffers() if id(b) in set_back]
    if names:
        remedy = "Do so in a parametrization, before the call, or on a copy"
        raise UnsupportedRouteError([Problem(n, "its forward pass writes to it", remedy) for n in names], _ROUTE)


def _without(request: Request, names: Iterable[str]) -> Request:
    """Leave parameters out of a request."""
    return replace(request, params={name: p for name, p in request.params.items() if name not in names})
