"""Kernels of more samples than fit into memory at once: a block at a time.

A few samples are looked at first, as any are: they tell which rules are right, and how much memory a sample takes. Then
each block is evaluated and verified by itself, as in a call of its own.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from math import prod

import torch
from torch import Tensor

from ggn_ntk.contraction.contract import Held, contract_in_blocks
from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.jacobians.backward import FAILS, OTHER_GRAPH
from ggn_ntk.jacobians.footprint import measured
from ggn_ntk.jacobians.plan import Plans
from ggn_ntk.jacobians.samples import Samples
from ggn_ntk.jacobians.trial import DIFFERS
from ggn_ntk.jacobians.verification import diagnosed
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget, room
from ggn_ntk.memory.layout import Footprint, Layout, choose, most_outputs
from ggn_ntk.methods.reference import contract_jacobians
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import check_model
from ggn_ntk.problem.errors import NotCapturedError, RouteWarning, warn
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import KernelAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Computed, transpose

# How many samples are looked at, and how many the fallback differentiates at once.
_SOME, _CHUNK = 3, 16


def some(x: Inputs, count: int = _SOME) -> Inputs:
    """Choose the few samples that are looked at."""
    n = len(x)
    return x if n <= count else x[[i * (n - 1) // (count - 1) for i in range(count)]]


@torch.no_grad()
def computed_in_blocks(request: Request, known: Plans) -> Computed:
    """Compute kernels, given what is known of a few samples."""
    plans, fallback = known._replace(layout=_layout(request, known)), known.fallback
    while True:
        plans = plans.with_fallback(fallback)
        sets = _sets(request, plans, known)
        kernels = _contracted(plans, sets)
        missed = _missed(plans, sets, kernels)
        doubtful = [v for samples in sets for v in samples.verifications if v.judge(missed)]
        fallback = missed | (diagnosed(doubtful, missed) if missed.keys() == plans.fallback.keys() else {})
        if kernels is not None and fallback.keys() == plans.fallback.keys():
            return _computed(request, plans, sets, kernels)


@torch.no_grad()
def repeated_in_blocks(request: Request, known: Plans) -> Computed | None:
    """Compute kernels of samples of the same form, without what was learnt; ``None`` if it does not hold for these."""
    sets = _sets(request, known)
    kernels = _contracted(known, sets)
    if kernels is None or not all(samples.as_planned for samples in sets) or any(s.failures for s in sets):
        return None
    return _computed(request, known, sets, kernels)


class Strip:
    """Samples of x1 that are evaluated once, and meet one set of samples after the other."""

    def __init__(
        self, known: Plans, footprints: Sequence[Footprint], block: int, others: int, *, verified: bool
    ) -> None:
        """Set up, given what is known of a few samples; ``verified``: these samples were, a block at a time."""
        # others: how many samples of x2 they meet
        self._known, self._plans, self._footprints = known, known.with_fallback(known.fallback), footprints
        self._block, self._verified = block, verified
        self._kept = Held[list[Jacobians]](others)
        self._ours: Samples | None = None

    @torch.no_grad()
    def met(self, request: Request, *, verified: bool) -> Computed | None:
        """Compute kernels of x1 and x2, or of x1 with itself; ``None`` if what is known does not hold for these."""
        first, *others = request.apart
        if self._ours is None:
            self._ours = self._set(first, 0, self._verified)
            self._early = _layout(request, self._known, self._footprints, x1_stays=True).early
        sets = [self._ours, *(self._set(x2, 1, verified) for x2 in others)]
        sizes, outputs = (len(request.x1), len(request.second)), most_outputs(self._plans.axes)
        layout = Layout(sizes, request.symmetric, 0, sizes[0], self._block, outputs, self._early)
        plans = self._plans._replace(layout=layout)
        kernels = _contracted(plans, sets, self._kept)
        holds = all(samples.as_planned and not samples.failures for samples in sets)
        if kernels is None or not holds or any(v.judge(plans.fallback) for s in sets for v in s.verifications):
            return None
        return _computed(request, plans, sets, kernels)

    def _set(self, request: Request, place: int, verified: bool) -> Samples:
        """Set up for x1 or x2; what was verified is not verified again."""
        return _set(request, place, self._plans, None if verified else self._known)


def warn_of_wrong_rules(fallback: dict[str, str]) -> None:
    """Say which parameters have no Jacobians by rules that they should have."""
    for name, why in fallback.items():
        if why.startswith((DIFFERS, FAILS, OTHER_GRAPH)):
            what = f"{name}: {why}. Its kernel comes from Jacobians of each sample instead: exact, but slower."
            warn(what, RouteWarning)


def _layout(
    request: Request, known: Plans, footprints: Sequence[Footprint] | None = None, *, x1_stays: bool = False
) -> Layout:
    """Choose how samples are taken, from what a few of them take."""
    sizes = len(request.x1), len(request.second)
    return layout_for(request, known.axes, sizes, footprints or footprints_of(known), x1_stays=x1_stays)


@torch.no_grad()
def footprints_of(known: Plans) -> list[Footprint]:
    """Measure what the few samples take that were looked at, of x1 and of x2 if they have a plan of their own."""
    return [measured(plan, of_set.x1) for plan, of_set in zip(known.plans, known.request.apart, strict=False)]


def layout_for(
    request: Request,
    axes: KernelAxes,
    sizes: tuple[int, int],
    footprints: Sequence[Footprint],
    *,
    x1_stays: bool = False,
) -> Layout:
    """Choose how N1 and N2 samples are taken, from what each takes; ``x1_stays``: with Jacobians of all outputs."""
    beside = bytes_of_kernels(request, axes, sizes) + _bytes_of_parameters(request)
    return choose(sizes, request.symmetric, axes, footprints, room(request.device) - beside, x1_stays=x1_stays)


def bytes_of_kernels(request: Request, axes: KernelAxes, sizes: tuple[int, int]) -> int:
    """Count the bytes of all kernels of N1 and N2 samples."""
    samples = sizes[:1] if axes.paired else sizes
    first = next(iter(request.params.values()))
    return prod((*samples, *axes.shape)) * first.element_size() * len(request.grouped())


def _bytes_of_parameters(request: Request) -> int:
    """Count the bytes of what verification has of all parameters: gradients of two halves, and copies."""
    with isolated(request.model) as session:
        return 2 * sum(p.nbytes for p in request.params.values()) + session.bytes_of_copies


def _sets(request: Request, plans: Plans, verified: Plans | None = None) -> list[Samples]:
    """Set up for x1, and for x2 if it is another set, which may share a plan; verified as a few were, if so."""
    return [_set(of_set, i, plans, verified) for i, of_set in enumerate(request.apart)]


def _set(request: Request, place: int, plans: Plans, verified: Plans | None) -> Samples:
    """Set up for x1 or x2."""
    which = min(place, len(plans.plans) - 1)
    verification = None if verified is None else verified.verifications[which]
    everyone = verification is not None and verification.everyone
    return Samples(plans.plans[which], request, verification if everyone else None)


def _contracted(
    plans: Plans, sets: Sequence[Samples], kept: Held[list[Jacobians]] | None = None
) -> dict[str, Tensor] | None:
    """Contract all blocks; ``None`` where the model computes something else for some than for others."""
    assert plans.layout is not None
    try:
        return contract_in_blocks(sets, plans.wanted, plans.layout, kept=kept)
    except NotCapturedError:
        return None


def _missed(plans: Plans, sets: Sequence[Samples], kernels: dict[str, Tensor] | None) -> dict[str, str]:
    """List the parameters whose Jacobians are missing of any samples, with the reason."""
    missed = reduce(operator.or_, (samples.failures for samples in sets), plans.fallback)
    # A rule that failed for some leaves nothing to put together, either.
    everything = kernels is None and missed.keys() == plans.fallback.keys()
    return dict.fromkeys(plans.covered, OTHER_GRAPH) | missed if everything else missed


def _computed(request: Request, plans: Plans, sets: Sequence[Samples], kernels: dict[str, Tensor]) -> Computed:
    """Put together what rules give and what falls back."""
    warn_of_wrong_rules(plans.fallback)
    outputs = [samples.output for samples in sets]
    if len(request.batches) < len(outputs):
        outputs = [torch.cat(outputs)]
    wanted = replace(request, params={name: request.params[name] for name in plans.fallback}, chunk_size=_CHUNK)
    fallback = in_tiles(wanted, plans.axes) if plans.fallback else ()
    return Computed(plans.axes, chain(kernels.items(), fallback), outputs, plans)


def in_tiles(request: Request, axes: KernelAxes) -> Iterator[tuple[str, Tensor]]:
    """Contract Jacobians of samples and parameters a few at a time, for kernels by name."""
    # -> [N1, N2, E, F1, F2], or [N, E, F1, F2] of paired samples
    for group, params in request.grouped():
        size = _tile(request, axes, params)
        rows, columns = split(len(request.x1), size), split(len(request.second), size)
        whole: Tensor | None = None
        for row in rows:
            for column in [row] if axes.paired else columns:
                if request.symmetric and column.start < row.start:
                    continue  # the transpose of a tile that is computed
                same = request.symmetric and column == row
                x2 = None if same or (axes.paired and request.x2 is None) else request.second[column]
                tile = replace(request, x1=request.x1[row], x2=x2, params=params)
                kernel = torch.stack([k for _, k in contract_jacobians(tile, *check_model(tile))]).sum(0)
                if whole is None:
                    whole = kernel.new_empty(*request.sample_axes, *axes.shape)
                whole[row if axes.paired else (row, column)] = kernel
                if request.symmetric and not same and not axes.paired:
                    transpose(whole[column, row]).copy_(kernel)
        assert whole is not None
        yield group, whole


def _tile(request: Request, axes: KernelAxes, params: dict[str, Tensor]) -> int:
    """Choose of how many samples Jacobians are held at once."""
    numbers = sum(side.out_shape.numel() for side in axes)
    taken = numbers * sum(p.numel() * p.element_size() for p in params.values())
    return max(2, MemoryBudget.of(next(iter(params.values())).device).jacobians // max(1, taken))
