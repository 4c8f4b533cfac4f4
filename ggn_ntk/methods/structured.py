"""The structured route: layer by layer, the x1-x2 block alone, in the cheapest order.

A model is looked at once (a *plan*: which rules are right, where the samples are). Evaluated on samples, it gives a
*side*, whose backward pass yields, layer by layer, Jacobians as einsums of the layer's input and of
``s = d f / d (layer output)``. Two sides, or one with itself, are contracted to the kernel.

No rule is trusted (:mod:`ggn_ntk.jacobians.verification`). Parameters whose Jacobian no rule gives, or not the right
one, *fall back*: they, and only they, are contracted from Jacobians of each sample by
:mod:`ggn_ntk.methods.reference`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator, Recorder
from ggn_ntk.contraction.contract import Wanted, contract
from ggn_ntk.contraction.products import NamedEinsum
from ggn_ntk.jacobians.backward import FAILS
from ggn_ntk.jacobians.places import Places, find_places
from ggn_ntk.jacobians.plan import Plan, Side, make_plan
from ggn_ntk.jacobians.trial import DIFFERS
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.methods.reference import contract_jacobians
from ggn_ntk.models.requirements import check_model
from ggn_ntk.problem.errors import RouteWarning, warn
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Computed

_T = TypeVar("_T")

# How many samples the fallback differentiates at once.
_CHUNK = 16


def structured_kernels(request: Request) -> Computed:
    """Compute kernels and the outputs of all samples. Call it inside ``isolated(request.model)``."""
    plan, side, kernels = _verified(request, _contracted)
    for name, why in plan.fallback.items():
        if why.startswith((DIFFERS, FAILS)):
            what = f"{name}: {why}. Its kernel comes from Jacobians of each sample instead: exact, but slower."
            warn(what, RouteWarning)
    return Computed(plan.axes, chain(kernels.items(), _fallback_kernels(plan, side)), side.output)


@torch.no_grad()
def _verified(request: Request, use: Callable[[Plan, Side], _T]) -> tuple[Plan, Side, _T]:
    """Make a plan, evaluate and use all Jacobians, until those are right whose parameters do not fall back."""
    fallback: dict[str, str] = {}
    everyone = False
    while True:
        plan, side = make_plan(request, fallback, everyone=everyone)
        result = use(plan, side)
        plan = replace(plan, fallback=plan.fallback | side.failures)
        verification = side.verification
        assert verification is not None
        if not verification.judge(plan.fallback):
            return plan, side, result
        if verification.everyone:
            wrong = verification.diagnose(plan.fallback)
            if not wrong:
                return plan, side, result
            fallback = plan.fallback | wrong
        everyone = True


def _contracted(plan: Plan, side: Side, make: Callable[..., Accumulator] = Accumulator) -> dict[str, Tensor]:
    """Contract x1 with x2, which are one side, or its two parts."""
    request = plan.request
    formed = request.params if request.jacobians_first else plan.cancelling
    wanted = Wanted(plan.axes, request.groups.__getitem__, plan.covered, formed)
    return contract(side, side, wanted, n1=request.n1, make=make)


def _fallback_kernels(plan: Plan, side: Side) -> Iterator[tuple[str, Tensor]]:
    """Compute kernels of parameters that rules do not cover, from their Jacobians."""
    # -> [N1, N2, E, F, F]
    if not plan.fallback:
        return
    request, verification = plan.request, side.verification
    assert verification is not None
    # That samples leave one another alone, Jacobians of each take for granted.
    checked = verification.checked(plan.axes, side.output) if verification.everyone else check_model(request)
    for params in _groups(plan, side.output):
        yield from contract_jacobians(replace(request, params=params, chunk_size=_CHUNK), plan.axes, checked)


def _groups(plan: Plan, output: Tensor) -> list[dict[str, Tensor]]:
    """Group parameters so that the Jacobians of each group keep to the budget."""
    # output [N, *out]
    most = MemoryBudget.of(output.device).jacobians // (output.element_size() * output.numel())
    groups: list[dict[str, Tensor]] = []
    for name in plan.fallback:
        p = plan.request.params[name]
        if not groups or sum(q.numel() for q in groups[-1].values()) + p.numel() > most:
            groups.append({})
        groups[-1][name] = p
    return groups


class Recorded(NamedTuple):
    """What :func:`structured_kernels` would contract."""

    plan: Plan
    products: list[NamedEinsum]  # products of Jacobians, by names of parameters
    places: Places  # where in the model these come from


def recorded_products(request: Request) -> Recorded:
    """List the products of Jacobians that :func:`structured_kernels` would contract."""
    products = list[NamedEinsum]()

    def record_all(plan: Plan, side: Side) -> None:
        products.clear()
        _contracted(plan, side, partial(Recorder, products))

    plan, side, _ = _verified(request, record_all)
    assert side.verification is not None
    return Recorded(plan, products, find_places(plan, side.verification.inputs))
