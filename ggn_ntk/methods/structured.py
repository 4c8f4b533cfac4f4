"""The structured route: layer by layer, the x1-x2 block alone, in the cheapest order.

A model is looked at once (a *plan*: which rules are right, where the samples are). Evaluated on samples, it gives a
*side*, whose backward pass yields, layer by layer, Jacobians as einsums of the layer's input and of
``s = d f / d (layer output)``. One side, of all samples, is contracted with itself to the kernel; or two, where x1 and
x2 are not evaluated together.

No rule is trusted (:mod:`ggn_ntk.jacobians.verification`). Parameters whose Jacobian no rule gives, or not the right
one, *fall back*: they, and only they, are contracted from Jacobians of each sample by
:mod:`ggn_ntk.methods.reference`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import chain
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from opt_einsum.contract import PathInfo
from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator, Recorder, Taken
from ggn_ntk.contraction.contract import contract
from ggn_ntk.contraction.einsum import path_of
from ggn_ntk.contraction.one_hot import looked_up
from ggn_ntk.contraction.operand import Operand
from ggn_ntk.jacobians.places import Places, find_places
from ggn_ntk.jacobians.plan import Plans, make_plans
from ggn_ntk.jacobians.verification import diagnosed
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.methods.blocks import computed_in_blocks, repeated_in_blocks, some, warn_of_wrong_rules
from ggn_ntk.methods.reference import contract_jacobians
from ggn_ntk.models.independence import Checked
from ggn_ntk.models.requirements import check_model
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Computed
from ggn_ntk.process.progress import showing

_T = TypeVar("_T")

# How many samples the fallback differentiates at once.
_CHUNK = 16


def structured_kernels(request: Request) -> Computed:
    """Compute kernels and the outputs of all samples. Call it inside ``isolated(request.model)``."""
    found = verified(request, _contracted)
    if found is not None:
        return _computed(*found)
    return computed_in_blocks(request, learnt(request))


def learnt(request: Request) -> Plans:
    """Look at a few samples."""
    with showing(False):
        known = verified(request.of_others(some), _contracted, few=True)
    assert known is not None
    return known[0]


@torch.no_grad()
def repeated_kernels(request: Request, known: Plans) -> Computed | None:
    """Compute kernels of samples of the same form, without what was learnt; ``None`` if it does not hold for these."""
    if known.layout is not None:
        return repeated_in_blocks(request, known)
    plans = known.for_others(request)
    if plans is None:
        return None
    kernels = _contracted(plans)
    return _computed(plans, kernels) if plans.fallback.keys() == known.fallback.keys() else None


def _computed(plans: Plans, kernels: dict[str, Tensor]) -> Computed:
    """Put together what rules give and what falls back."""
    warn_of_wrong_rules(plans.fallback)
    outputs = [side.output for side in plans.sides]
    summands = chain(kernels.items(), _fallback_kernels(plans, outputs))
    return Computed(plans.axes, summands, outputs, plans)


@torch.no_grad()
def verified(request: Request, use: Callable[[Plans], _T], *, few: bool = False) -> tuple[Plans, _T] | None:
    """Make plans, evaluate and use all Jacobians, until those are right whose parameters do not fall back."""
    # ``None`` where all samples together, unless they are few, may take more memory than there is.
    fallback: dict[str, str] = {}
    everyone = False
    while True:
        plans = make_plans(request, fallback, everyone=everyone, few=few)
        if plans is None:
            return None
        result, missed = use(plans), plans.fallback
        doubtful = [verification for verification in plans.verifications if verification.judge(missed)]
        if not doubtful:
            return plans, result
        if all(verification.everyone for verification in doubtful):
            wrong = diagnosed(doubtful, missed)
            if not wrong:
                return plans, result
            fallback = missed | wrong
        everyone = True


def _contracted(plans: Plans, make: Callable[..., Accumulator] = Accumulator) -> dict[str, Tensor]:
    """Contract x1 with x2, which are one side, or its two parts, or two sides."""
    return contract(plans.sides[0], plans.sides[-1], plans.wanted, n1=plans.request.n1, make=make)


def _fallback_kernels(plans: Plans, outputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Compute kernels of parameters that rules do not cover, from their Jacobians."""
    # outputs [N, *out] of each side -> [N1, N2, E, F1, F2]
    for request, checked in fallback_requests(plans, outputs):
        yield from contract_jacobians(request, plans.axes, checked)


def fallback_requests(plans: Plans, outputs: Sequence[Tensor]) -> Iterator[tuple[Request, list[Checked]]]:
    """Ask for the Jacobians of parameters that rules do not cover, a few at a time, with what is known of samples."""
    # outputs [N, *out] of each side
    if not plans.fallback:
        return
    request, verifications = plans.request, plans.verifications
    # That samples leave one another alone, Jacobians of each take for granted.
    if verifications and all(verification.everyone for verification in verifications):
        checked = [verification.checked(output) for verification, output in zip(verifications, outputs, strict=True)]
    else:
        _, checked = check_model(request)
    for part in in_groups(request, plans.fallback, outputs):
        yield part, checked


def in_groups(request: Request, names: Iterable[str], outputs: Sequence[Tensor]) -> list[Request]:
    """Group parameters so that the Jacobians of each group keep to the budget."""
    # outputs [N, *out] of each side; paired samples come in blocks
    held = [o[:1] for o in outputs] if request.axes.pairs else outputs
    most = MemoryBudget.of(outputs[0].device).jacobians // sum(o.element_size() * o.numel() for o in held)
    groups: list[dict[str, Tensor]] = []
    for name in names:
        p = request.params[name]
        if not groups or sum(q.numel() for q in groups[-1].values()) + p.numel() > most:
            groups.append({})
        groups[-1][name] = p
    return [replace(request, params=params, chunk_size=_CHUNK) for params in groups]


class Recorded(NamedTuple):
    """What :func:`structured_kernels` would contract."""

    plans: Plans
    taken: Taken  # products of Jacobians, by names of parameters, and what contracting all of them takes
    places: Places  # where in the model these come from, for x1 and for x2
    seconds: float  # what looking at the model took

    def paths(self, request: Request, sizes: tuple[int, int]) -> Iterator[tuple[str, list[Operand], PathInfo]]:
        """List how each product is contracted: the name of its parameter, its operands and their order."""
        n, m = sizes
        start = 0 if request.n1 is None else n  # of x2, among the samples that it is evaluated with
        for name, product in self.taken.products:
            operands = looked_up(product.restrict(slice(0, n), slice(start, start + m)), product.result)
            yield name, operands, path_of(operands, product.result, apart=product.apart)


def recorded_products(request: Request, sizes: Sequence[int]) -> Recorded:
    """List the products of Jacobians that :func:`structured_kernels` would contract for as many samples."""
    # sizes N1 and N2

    def record_all(plans: Plans) -> tuple[Taken, float]:
        taken, began = Taken(), perf_counter()
        _contracted(plans, partial(Recorder, taken, sizes))
        return taken, perf_counter() - began

    start = perf_counter()
    found = verified(request.of_others(partial(some, count=2)), record_all, few=True)
    assert found is not None
    plans, (taken, recording) = found
    seconds = perf_counter() - start - recording  # a call records nothing
    places = [find_places(plan, v.inputs) for plan, v in zip(plans.plans, plans.verifications, strict=True)]
    return Recorded(plans, taken, reduce(Places.merged, places), seconds)
