"""The structured route: layer by layer, the x1-x2 block alone, in the cheapest order.

A capture yields, layer by layer, the layer's input and ``s = d f / d (layer output)``; a rule writes the Jacobians of
the layer's parameters as einsums of the two, and these are contracted to the block of the kernel. There are two
captures: a walk through a Sequential model (:mod:`ggn_ntk.jacobians.sequential`), and autograd for any other
(:mod:`ggn_ntk.jacobians.recording`).

No rule is trusted (:mod:`ggn_ntk.jacobians.verification`). Parameters whose Jacobian no rule gives, or not the right
one, are the *remainder*: they, and only they, are contracted from Jacobians of each sample by :mod:`ggn_ntk.reference`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator, Recorder
from ggn_ntk.contraction.products import Doubled
from ggn_ntk.jacobians.autograd import Capture
from ggn_ntk.jacobians.recording import Layout, Recording, learn_layouts, locate, record
from ggn_ntk.jacobians.sequential import FAILS, Walk, is_known, structure_problems
from ggn_ntk.jacobians.verification import DIFFERS, Probe, outside_of_calls
from ggn_ntk.memory.chunks import Piece
from ggn_ntk.methods.reference import contract_jacobians
from ggn_ntk.models.evaluation import check_shape
from ggn_ntk.models.independence import Checked
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import check_model, configuration_problems
from ggn_ntk.problem.errors import (
    NotCapturedError,
    Problem,
    RouteWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
    is_out_of_memory,
    warn,
)
from ggn_ntk.problem.output_axes import OutputAxes, Roles
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Computed

_T = TypeVar("_T")

_ROUTE = "structured empirical NTK"

# Numbers that the Jacobians of one output may hold in the remainder before parameters are taken one after the other.
_BUDGET = 2**24

# How many samples the remainder differentiates at once.
_CHUNK = 16


class Prepared(NamedTuple):
    """A model that has been evaluated, and is to be differentiated."""

    capture: Walk | Capture  # yields the Jacobians that rules write
    axes: OutputAxes  # the role of each output axis
    probe: Probe  # what they are compared with
    missed: dict[str, str]  # why rules do not give the Jacobian of a parameter, by name


def structured_kernels(request: Request) -> Computed:
    """Compute kernels. Call it inside ``isolated(request.model)``."""
    prepared, kernels = _probed(request, lambda prepared: _contract(prepared, request))
    faults = {name: why for name, why in prepared.missed.items() if why.startswith((DIFFERS, FAILS))}
    for name, why in faults.items():
        what = f"{name}: {why}. Its kernel comes from Jacobians of each sample instead: exact, but slower."
        warn(what, RouteWarning)
    output = prepared.capture.output
    if not prepared.missed:
        return Computed(prepared.axes, kernels.items(), output)
    # That samples leave one another alone, the remainder takes for granted.
    everyone = prepared.probe.everyone
    checked = prepared.probe.checked(prepared.axes, output) if everyone else check_model(request)
    return Computed(prepared.axes, chain(kernels.items(), _remainder(request, prepared, checked)), output)


@torch.no_grad()
def _probed(request: Request, use: Callable[[Prepared], _T]) -> tuple[Prepared, _T]:
    """Evaluate and differentiate a model, until all Jacobians that are not missed are right."""
    missed: dict[str, str] = {}
    everyone = False
    while True:
        prepared = prepare(request, missed, everyone=everyone)
        result = use(prepared)
        prepared.missed.update(prepared.capture.failures)
        if not prepared.probe.judge(prepared.missed):
            return prepared, result
        if prepared.probe.everyone:
            wrong = prepared.probe.diagnose(prepared.missed)
            if not wrong:
                return prepared, result
            missed = prepared.missed | wrong
        everyone = True


def prepare(request: Request, missed: dict[str, str] | None = None, *, everyone: bool = False) -> Prepared:
    """Evaluate a model, by the capture that was asked for or suits it, and find out which parameters rules get right.

    Args:
        request: The request.
        missed: Why rules do not give the Jacobian of a parameter, by name, for those where this is known.
        everyone: Whether to look at all samples, whatever the model.

    Returns:
        The evaluated model.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        UnsupportedRouteError: If the capture that was asked for does not support it.
        ValueError: If an output axis that was asked for does not exist.
    """
    problems = configuration_problems(request)
    if problems:
        raise UnsupportedModelError(problems)
    walks, missed = _can_walk(request), missed or {}
    stand_for_all = sum(request.sizes) == 1 or (walks and not request.thorough and is_known(request))
    probe = Probe(request, everyone=everyone or not stand_for_all)
    _refuse_writes(request)
    if walks:
        found = probe.try_rules(None) | missed
        try:
            capture: Walk | Capture = Walk(_without(request, found), probe.inputs)
        except UnsupportedRouteError:
            if request.capture == "backpack":
                raise
            return prepare(replace(request, capture="autograd"), missed)
    else:
        recording, layouts = _record_all(request, probe)
        found = outside_of_calls(request, recording) | probe.try_rules(layouts) | missed
        capture = Capture(_without(request, found), recording)
    probe.see(capture.output)
    return Prepared(capture, probe.axes, probe, found)


def _refuse_writes(request: Request) -> None:
    """Refuse a model whose forward pass writes to what it is made of: a pass's graph does not survive the next."""
    with isolated(request.model) as session:
        names = [name for name, p in request.model.named_parameters() if p in session.written]
        set_back = set(map(id, session.set_back))
        names += [name for name, b in request.model.named_buffers() if id(b) in set_back]
    if names:
        remedy = "Do so in a parametrization, before the call, or on a copy"
        raise UnsupportedRouteError([Problem(n, "its forward pass writes to it", remedy) for n in names], _ROUTE)


def _record_all(request: Request, probe: Probe) -> tuple[Recording, list[Layout]]:
    """Evaluate the model on all samples, and find them in each call of a layer."""
    one, n = probe.recordings[0], len(probe.inputs)
    try:
        recording = record(request, probe.inputs, one)
        repeats = not any(call.repeated for call in recording.calls) or probe.agrees(recording.output)
    except NotCapturedError:
        repeats = False
    if not repeats:
        recording = record(request, probe.inputs)
    check_shape(recording.output, n, probe.out_shape)
    layouts = learn_layouts(one, recording) if n > 1 else _layouts_of_one(request, probe)
    return locate(recording, layouts), layouts


def _layouts_of_one(request: Request, probe: Probe) -> list[Layout]:
    """Find a single sample in each call of a layer: by a pass of two of it, or else everything is about it."""
    one = probe.recordings[0]
    try:
        twice = record(request, probe.inputs[[0, 0]])
        check_shape(twice.output, 2, probe.out_shape)
    except Exception as error:  # a model that takes one sample at a time
        if is_out_of_memory(error):
            raise
        return [Layout(call.module, None, 1, [], same=True) for call in one.calls]
    return learn_layouts(one, twice)


def _can_walk(request: Request) -> bool:
    """Tell whether to walk through the model layer by layer."""
    problems = [] if request.capture == "autograd" else list(structure_problems(request))
    if problems and request.capture == "backpack":
        raise UnsupportedRouteError(problems, _ROUTE)
    return request.capture != "autograd" and not problems


def _without(request: Request, names: Iterable[str]) -> Request:
    """Leave parameters out."""
    return replace(request, params={name: p for name, p in request.params.items() if name not in names})


def _contract(prepared: Prepared, request: Request) -> dict[str, Tensor]:
    """Contract the Jacobians that rules write, and show them to the probe."""
    kernels: dict[str, Tensor] = {}
    for piece, accumulator in _passed(prepared, request, Accumulator):
        _place(kernels, accumulator.kernels, piece, prepared.axes.roles)
    covered = [name for name in request.params if name not in prepared.missed]
    for key in covered if request.per_parameter else covered and [""]:
        if key not in kernels:  # its parameters are not used
            samples = len(request.x1), len(request.second)
            kernels[key] = prepared.capture.output.new_zeros(*samples, *prepared.axes.roles.kernel)
    return kernels


def _passed(
    prepared: Prepared, request: Request, make: Callable[..., "Accumulator"]
) -> Iterator[tuple[Piece, "Accumulator"]]:
    """Pass ``s`` back, a piece of the outputs at a time, and show Jacobians to the probe and to an accumulator."""
    capture, probe = prepared.capture, prepared.probe
    formed = request.params if request.jacobians_first else probe.cancelling
    for piece in capture.pieces(prepared.axes):
        accumulator = make(piece.roles, request.n1, request.per_parameter, capture.counts, formed)
        probe.begin(piece.outputs)
        for jacobians in capture.jacobians(piece.outputs, accumulator.parts):
            probe.add(jacobians)
            accumulator.add(jacobians)
            del jacobians  # frees its operands, but for those of parameters that are used again
        yield piece, accumulator


def _place(kernels: dict[str, Tensor], blocks: dict[str, Tensor], piece: Piece, roles: Roles) -> None:
    """Add kernels over some outputs to kernels over all of them."""
    for name, block in blocks.items():
        if piece.roles == roles:
            kernels[name] = block
            continue
        if name not in kernels:
            kernels[name] = block.new_zeros(*block.shape[:2], *roles.kernel)
        piece.add(kernels[name], block)


def _remainder(request: Request, prepared: Prepared, checked: Checked) -> Iterator[tuple[str, Tensor]]:
    """Compute kernels of parameters that rules do not cover, from their Jacobians."""
    # -> [N1, N2, E, F, F]
    largest = _BUDGET // sum(request.sizes)
    groups: list[dict[str, Tensor]] = []
    for name in prepared.missed:
        p = request.params[name]
        if not groups or sum(q.numel() for q in groups[-1].values()) + p.numel() > largest:
            groups.append({})
        groups[-1][name] = p
    for group in groups:
        yield from contract_jacobians(replace(request, params=group, chunk_size=_CHUNK), prepared.axes, checked)


def recorded_products(request: Request) -> tuple[Prepared, list[tuple[str, Doubled]]]:
    """List the products of Jacobians that :func:`structured_kernels` would contract."""
    products: list[tuple[str, Doubled]] = []

    def record_all(prepared: Prepared) -> None:
        products.clear()
        for _, accumulator in _passed(prepared, request, partial(Recorder, products)):
            del accumulator

    prepared, _ = _probed(request, record_all)
    return prepared, products
