"""What is learnt by looking at a model once, and what is evaluated with it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.jacobians.autograd import AutogradPass
from ggn_ntk.jacobians.backward import BackwardPass, Parts, Step
from ggn_ntk.jacobians.layer_call import Recording
from ggn_ntk.jacobians.layers import is_known, structure_problems
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.sample_axes import SampleAxes, learn_sample_axes, locate, not_located
from ggn_ntk.jacobians.sequential import SequentialPass
from ggn_ntk.jacobians.trial import outside_of_calls
from ggn_ntk.jacobians.verification import Alone, Verification, evaluate_alone
from ggn_ntk.models.independence import check_shape
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import configuration_problems
from ggn_ntk.problem.errors import (
    NotCapturedError,
    Problem,
    UnsupportedModelError,
    UnsupportedRouteError,
    is_out_of_memory,
)
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import OutputAxes
from ggn_ntk.problem.request import Request

_ROUTE = "structured empirical NTK"


@dataclass(frozen=True, eq=False)
class Plan:
    """What was learnt by looking at a model once: it holds for other samples of the same shapes and dtype."""

    request: Request
    axes: OutputAxes  # the role of each output axis
    fallback: dict[str, str]  # parameters whose Jacobians rules do not give, with the reason
    cancelling: set[str]  # parameters whose Jacobian is far smaller than the terms that rules add up for it
    # Where the samples are in each call of a layer; ``None`` for a Sequential model, where they are in front.
    sample_axes: list[SampleAxes] | None
    repeats: bool = True  # whether outputs of layers that are the same for all samples are repeated for each

    @property
    def capture(self) -> str:
        """How the model is taken apart: a value of ``capture``."""
        return "sequential" if self.sample_axes is None else "autograd"

    @property
    def covered(self) -> list[str]:
        """The parameters whose Jacobians rules give."""
        return [name for name in self.request.params if name not in self.fallback]

    def evaluate(self, inputs: Inputs) -> "Side":
        """Evaluate the model on samples."""
        if self.sample_axes is None:
            return Side(SequentialPass(_without(self.request, self.fallback), inputs))
        recording = record(self.request, inputs, self.sample_axes if self.repeats else ())
        return Side(AutogradPass(_without(self.request, self.fallback), locate(recording, self.sample_axes)))


class Side:
    """Samples that a model was evaluated on together: outputs, and a backward pass that yields Jacobians.

    Attributes:
        output: The outputs ``[N, *out]``.
        verification: What is shown all Jacobians, if they are to be verified.
    """

    def __init__(self, backward: BackwardPass, verification: Verification | None = None) -> None:
        """Set up."""
        self._backward, self.verification = backward, verification
        self.output = backward.output

    @property
    def counts(self) -> Counter[str]:
        """How often each parameter is used, by name."""
        return self._backward.counts

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of one output holds where it is largest."""
        return self._backward.numel

    @property
    def failures(self) -> dict[str, str]:
        """Why the rule of a parameter's layer failed on the way back, by name."""
        return self._backward.failures

    def steps(self, outputs: Tensor, parts: Parts, *, again: bool) -> "Iterator[Step | _VerifiedStep]":
        """Pass some outputs back, a layer at a time; ``again``: and others later."""
        # outputs [C], their places in [*out], flattened
        steps = self._backward.steps(outputs, parts, again=again)
        if self.verification is None:
            return steps
        self.verification.begin(outputs)
        return (_VerifiedStep(step, self.verification) for step in steps)


class _VerifiedStep(NamedTuple):
    """A layer on the way back, whose Jacobians are shown to a verification."""

    step: Step
    verification: Verification

    def jacobians(self) -> dict[str, Factored]:
        """Write the Jacobians of the layer's wanted parameters, by name."""
        jacobians = self.step.jacobians()
        self.verification.add(jacobians)
        return jacobians


def make_plan(request: Request, fallback: dict[str, str], *, everyone: bool) -> tuple[Plan, Side]:
    """Look at a model: the plan, and the side of all samples, whose evaluation it takes to find the samples."""
    # ``everyone``: Jacobians of all samples are verified, whatever the model.
    problems = configuration_problems(request)
    if problems:
        raise UnsupportedModelError(problems)
    sequential = _is_sequential(request)
    stand_for_all = sum(request.sizes) == 1 or (sequential and not request.thorough and is_known(request))
    alone = evaluate_alone(request, request.x1.stack(request.x2))
    verification = Verification(request, alone, everyone=everyone or not stand_for_all)
    _refuse_writes(request)
    if sequential:
        fallback = verification.try_rules(alone, None) | fallback
        try:
            backward: BackwardPass = SequentialPass(_without(request, fallback), alone.inputs)
        except UnsupportedRouteError:
            if request.capture != "auto":
                raise
            return make_plan(replace(request, capture="autograd"), fallback, everyone=everyone)
        sample_axes, repeats = None, False
    else:
        recording, sample_axes, repeats = _record_all(request, alone, verification)
        fallback = outside_of_calls(request, recording) | verification.try_rules(alone, sample_axes) | fallback
        fallback = not_located(recording) | fallback
        backward = AutogradPass(_without(request, fallback), recording)
    verification.see(backward.output)
    plan = Plan(request, verification.axes, fallback, verification.cancelling, sample_axes, repeats)
    return plan, Side(backward, verification)


def _is_sequential(request: Request) -> bool:
    """Tell whether the model is a sequence of layers, and is to be taken as one."""
    problems = [] if request.capture == "autograd" else list(structure_problems(request))
    if problems and request.capture == "sequential":
        raise UnsupportedRouteError(problems, _ROUTE)
    return request.capture != "autograd" and not problems


def _refuse_writes(request: Request) -> None:
    """Refuse a model whose forward pass writes to what it is made of: a pass's graph does not survive the next."""
    with isolated(request.model) as session:
        names = [name for name, p in request.model.named_parameters() if p in session.written]
        set_back = set(map(id, session.set_back))
        names += [name for name, b in request.model.named_buffers() if id(b) in set_back]
    if names:
        remedy = "Do so in a parametrization, before the call, or on a copy"
        raise UnsupportedRouteError([Problem(n, "its forward pass writes to it", remedy) for n in names], _ROUTE)


def _record_all(request: Request, alone: Alone, verification: Verification) -> tuple[Recording, list[SampleAxes], bool]:
    """Evaluate the model on all samples, and find them in each call of a layer."""
    one, n = alone.recordings[0], len(alone.inputs)
    try:
        recording = record(request, alone.inputs, one.calls)
        # What is the same for all samples by its shape alone may differ: then outputs do, once it is repeated.
        repeats = not any(call.repeated for call in recording.calls) or verification.agrees(recording.output)
    except NotCapturedError:
        repeats = False
    if not repeats:
        recording = record(request, alone.inputs)
    check_shape(recording.output, n, verification.out_shape)
    sample_axes = learn_sample_axes(one, recording) if n > 1 else _axes_of_one(request, alone, verification)
    return locate(recording, sample_axes), sample_axes, repeats


def _axes_of_one(request: Request, alone: Alone, verification: Verification) -> list[SampleAxes]:
    """Find a single sample in each call of a layer: by a pass of two of it, or else everything is about it."""
    one = alone.recordings[0]
    try:
        twice = record(request, alone.inputs[[0, 0]])
        check_shape(twice.output, 2, verification.out_shape)
    except Exception as error:  # a model that takes one sample at a time
        if is_out_of_memory(error):
            raise
        return [SampleAxes(call.module, None, 1, [], same=True, shape=call.shape) for call in one.calls]
    return learn_sample_axes(one, twice)


def _without(request: Request, names: Iterable[str]) -> Request:
    """Leave parameters out of a request."""
    return replace(request, params={name: p for name, p in request.params.items() if name not in names})
