"""What a kernel takes, estimated from a few samples."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from time import perf_counter
from typing import NamedTuple

import torch

from ggn_ntk.contraction.accumulate import Counts
from ggn_ntk.contraction.contract import outputs_together
from ggn_ntk.contraction.vector_products import bytes_of_sketch, operations_of_sketch
from ggn_ntk.jacobians.footprint import Effort, Work, effort, measured
from ggn_ntk.jacobians.plan import Plans
from ggn_ntk.memory.budget import IN_GRAPH, MemoryBudget, fits
from ggn_ntk.memory.layout import Footprint, Layout, most_outputs
from ggn_ntk.methods.blocks import bytes_of_kernels, layout_for
from ggn_ntk.methods.structured import Recorded
from ggn_ntk.models.independence import how_often
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.request import Request

# The share of a large product's rate at which contractions run, and the side of that product.
_EFFICIENCY, _SIDE = 0.6, 1024

# How many samples are evaluated, and their outputs passed back, to look at a model that is not known beforehand.
_LOOKED = (5, 6)


class Estimate(NamedTuple):
    """What a kernel takes: operations, bytes and seconds."""

    forward: float
    backward: float
    contraction: float
    peak_bytes: float
    seconds: float
    layout: Layout | None  # how samples are taken in blocks; ``None`` where all are evaluated together


@torch.no_grad()
def estimated(request: Request, recorded: Recorded, sizes: tuple[int, int]) -> Estimate:
    """Estimate what a kernel of N1 and N2 samples takes."""
    plans, contraction = recorded.plans, recorded.taken.flops
    footprints, efforts = _looked_at(plans, sizes)
    request = replace(request, per_parameter=False)  # the kernel of all
    axes, first = plans.axes, next(iter(request.params.values()))
    of_sets = sizes[: len(efforts)]
    layout = None
    of_each = list(zip(of_sets, footprints, strict=True))
    kept, passing = sum(n * f.evaluated for n, f in of_each), sum(n * f.passing for n, f in of_each)
    kept *= 1 if plans.capture == "sequential" else IN_GRAPH
    if not (fits(kept, first.device) and fits(2 * max(axes.shape[1:]) * passing, first.device)):
        layout = layout_for(request, axes, sizes, footprints)
    again = (1.0, 1.0)
    if layout is not None:
        passes = layout.passes(axes, footprints[0].formed)
        once = sum(of_sets), sum(n * axes[place].out_shape.numel() for place, n in enumerate(of_sets))
        again = passes.forward / once[0], passes.backward / once[1]
    if request.n1 is not None and layout is None:  # they are evaluated together
        works = [_evaluations(request, plans, 0, sum(sizes), efforts[0])]
    else:
        works = [_evaluations(request, plans, place, n, efforts[place], again) for place, n in enumerate(of_sets)]
    forward, backward = (sum(work.flops for work in which) for which in zip(*works, strict=True))
    seconds = recorded.seconds + sum(work.seconds for both in works for work in both)
    rate = _EFFICIENCY * _rate(first.device, first.dtype)
    peak = _peak(request, recorded, sizes, footprints, layout)
    seconds += (contraction + recorded.taken.waiting) / rate
    return Estimate(forward, backward, contraction, peak, seconds, layout)


class Tile(NamedTuple):
    """What a tile of a large kernel takes."""

    block: int | None  # how many samples to evaluate together where x1 is held; ``None`` where it does not fit
    contraction: Work
    diagonal: Work  # the contraction of a tile of samples with themselves
    evaluations: tuple[Work, Work]  # of all samples of x1, and of x2, once


@torch.no_grad()
def estimated_tile(request: Request, recorded: Recorded, contraction: float, sizes: tuple[int, int]) -> Tile:
    """Estimate what a tile of N1 and N2 samples takes, and choose how it is evaluated."""
    # contraction: its operations, of other samples of x2 than of x1
    plans = recorded.plans
    footprints, efforts = _looked_at(plans, sizes)
    layout = layout_for(request, plans.axes, sizes, footprints, x1_stays=True)
    found = [_evaluations(request, plans, place, n, efforts[place]) for place, n in enumerate(sizes[: len(efforts)])]
    works = [Work(sum(work.flops for work in both), sum(work.seconds for work in both)) for both in found]
    first = next(iter(request.params.values()))
    rate = _EFFICIENCY * _rate(first.device, first.dtype)
    block = layout.block if layout.strip >= sizes[0] and plans.covered else None
    contracted, diagonal = (Work(flops, flops / rate) for flops in (contraction, recorded.taken.flops))
    return Tile(block, contracted, diagonal, (works[0], works[-1]))


def _looked_at(plans: Plans, sizes: tuple[int, int]) -> tuple[list[Footprint], list[Effort]]:
    """Measure what samples of x1 take, and of x2 if it is another set; they may share a plan."""
    sets = [of_set.x1 for of_set in plans.request.apart]
    which = [min(i, len(plans.plans) - 1) for i in range(len(sets))]
    few = list(zip(plans.plans, sets, strict=False))
    footprints = [measured(*one) for one in few]
    efforts = [effort(*one, footprint, max(sizes)) for one, footprint in zip(few, footprints, strict=True)]
    return [footprints[i] for i in which], [efforts[i] for i in which]


def _evaluations(
    request: Request, plans: Plans, place: int, n: int, found: Effort, again: tuple[float, float] = (1.0, 1.0)
) -> tuple[Work, Work]:
    """Estimate what forward and backward passes of N samples of x1 or x2 take, with those that verify them."""
    # again: how often all samples are evaluated, and all outputs pass back
    outputs = plans.axes[place].out_shape.numel()
    everyone = plans.verifications[min(place, len(plans.plans) - 1)].everyone
    halves = how_often(request, n, outputs) if everyone else 0
    evaluated, passed = n * (again[0] + everyone + halves), n * (again[1] * outputs + 2 * halves)
    looked, passed_first = _LOOKED if everyone else (2, 4)
    sketches = (2 * halves + 1) * sum(map(operations_of_sketch, request.params.values()))
    forward, backward, (evaluating, passing) = found.forward, found.backward, found.calls
    calls = again[0] + everyone + 2 * halves
    return (
        Work((evaluated + looked) * forward.flops, evaluated * forward.seconds + calls * evaluating),
        Work(
            (passed + passed_first) * backward.flops + outputs * again[1] * found.shared + sketches,
            passed * backward.seconds + (outputs * again[1] + 4 * halves) * passing,
        ),
    )


def _peak(
    request: Request, recorded: Recorded, sizes: tuple[int, int], footprints: list[Footprint], layout: Layout | None
) -> float:
    """Count the bytes at the peak: as a model is verified, as Jacobians are contracted, or as a kernel is finished."""
    plans, axes, params = recorded.plans, recorded.plans.axes, request.params.values()
    budget = MemoryBudget.of(request.device)
    everyone = any(v.everyone for v in plans.verifications)  # else a few samples stand for all
    kernels, of_sets = bytes_of_kernels(request, axes, sizes), sizes[: len(footprints)]
    counted = [*recorded.taken.counts[:-1], *(found._replace(passed=0) for found in recorded.taken.counts[-1:])]
    if layout is not None:
        kept = footprints[min(layout.stays, len(footprints) - 1)].kept(layout.outputs)
        working = max(f.working(layout.outputs) for f in footprints)
        evaluated = min(layout.block, max(layout.sizes)) * working
        held = min(layout.strip, layout.sizes[layout.stays]) * kept + evaluated
        layers = [found.rows + found.pairs for found in counted]
    else:
        evaluated = sum(n * f.evaluated for n, f in zip(of_sets, footprints, strict=True))
        passing, outputs = sum(n * f.passing for n, f in zip(of_sets, footprints, strict=True)), most_outputs(axes)
        chunk = min(outputs, max(1, outputs_together(max(1.0, passing), axes, request.device)))
        passing *= chunk
        counted = [found.of_outputs(chunk / outputs) for found in counted]
        if plans.capture == "sequential" and passing > budget.passing:
            held, layers = evaluated + budget.passing, _in_chains(counted, budget.waiting)
        elif plans.capture == "sequential":
            held = evaluated
            freed = [0, *accumulate(found.inputs for found in counted)]  # with the layers behind
            layers = [
                (found.alone or found.given) + max(found.pairs, found.passed) - behind
                for found, behind in zip(counted, freed, strict=False)
            ]
        else:
            held = evaluated + passing
            layers = [found.given + found.rows + found.pairs for found in counted]
        if len(plans.sides) > 1:  # each passes back by itself, and meets what is held of the other
            layers = [sum(found.alone or found.given for found in counted) / 2 + layer / 2 for layer in layers]
    gradients, sketches = sum(p.nbytes for p in params), sum(map(bytes_of_sketch, params))
    verifying = gradients + (evaluated / 2 if everyone else 0)
    contracting = kernels + 2 * sketches + held + max(layers, default=0)
    # A symmetric kernel is added to its transpose.
    finishing = max(kernels * (3 if request.symmetric else 2), kernels + 3 * sketches)
    with isolated(request.model) as session:
        return max(verifying, contracting, finishing) + session.bytes_of_copies


def _in_chains(counted: Sequence[Counts], most: float) -> list[float]:
    """Count what Jacobians of a sequence of layers take, where blocks of samples pass through several of them."""
    # Of a layer waits what the order of contraction makes of all samples before they meet, or else ``s``. There is
    # also the ``s`` of all samples that enters a chain, and that which leaves it.
    chains, waiting, entering = list[float](), 0.0, 0.0
    for found in counted:
        waiting += found.alone or found.given
        chains.append(entering + waiting + found.pairs)
        if waiting > most:
            chains[-1] += found.passed
            waiting, entering = 0.0, found.passed
    return chains


@cache
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of a matrix product."""
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        start = perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(perf_counter() - start)
    return 2 * _SIDE**3 / min(times)
