"""What a kernel takes, estimated from a few samples."""

from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import torch

from ggn_ntk.jacobians.footprint import effort, measured
from ggn_ntk.jacobians.plan import Plans
from ggn_ntk.memory.budget import MemoryBudget, fits
from ggn_ntk.memory.layout import Footprint, Layout
from ggn_ntk.methods.blocks import bytes_of_gradients, bytes_of_kernels, layout_for
from ggn_ntk.models.independence import how_often
from ggn_ntk.problem.request import Request

# The share of a large product's rate at which contractions run, and the side of that product.
_EFFICIENCY, _SIDE = 0.6, 1024


class Estimate(NamedTuple):
    """What a kernel takes: operations, bytes and seconds."""

    forward: float
    backward: float
    contraction: float
    peak_bytes: float
    seconds: float
    layout: Layout | None  # how samples are taken in blocks; ``None`` where all are evaluated together


@torch.no_grad()
def estimated(request: Request, plans: Plans, sizes: tuple[int, int], contraction: float, largest: float) -> Estimate:
    """Estimate what a kernel of N1 and N2 samples takes."""
    # contraction: its operations; largest: bytes of its largest intermediate result, were it not made in blocks
    sets = [of_set.x1 for of_set in plans.request.apart]
    which = [min(i, len(plans.plans) - 1) for i in range(len(sets))]
    few = list(zip(plans.plans, sets, strict=False))
    of_plans, efforts_of_plans = [measured(*one) for one in few], [effort(*one) for one in few]
    footprints, efforts = [of_plans[i] for i in which], [efforts_of_plans[i] for i in which]
    request = replace(request, per_parameter=False)  # the kernel of all
    axes, first = plans.axes, next(iter(request.params.values()))
    of_sets = sizes[: len(sets)]
    layout = None
    if not fits(sum(n * f.evaluated for n, f in zip(of_sets, footprints, strict=True)), first.device):
        layout = layout_for(request, axes, sizes, footprints)
    forward = backward = seconds = 0.0
    for place, (n, found) in enumerate(zip(of_sets, efforts, strict=True)):
        outputs = axes[place].out_shape.numel()
        everyone = plans.verifications[which[place]].everyone
        halves = how_often(request, n, outputs) if everyone else 0
        again = 1.0 if layout is None else layout.evaluations(axes) / (sum(of_sets) * (1 + outputs))
        evaluated, passed = n * (again + everyone + halves), n * (again * outputs + 2 * halves)
        forward, backward = forward + evaluated * found.forward.flops, backward + passed * found.backward.flops
        seconds += evaluated * found.forward.seconds + passed * found.backward.seconds + found.call * (1 + everyone)
    rate = _EFFICIENCY * _rate(first)
    # A symmetric kernel is added to its transpose.
    held = _held(of_sets, footprints, layout, outputs=max(side.out_shape.numel() for side in axes), like=first)
    budget = MemoryBudget.of(first.device)
    working = min(largest, budget.rows + budget.columns)
    kernels = bytes_of_kernels(request, axes, sizes) * (3 if request.symmetric else 2)
    peak = kernels + bytes_of_gradients(request) + held + working
    return Estimate(forward, backward, contraction, peak, seconds + contraction / rate, layout)


def _held(
    sizes: tuple[int, ...], footprints: list[Footprint], layout: Layout | None, *, outputs: int, like: torch.Tensor
) -> float:
    """Count the bytes of what is held of samples at the peak."""
    if layout is not None:
        kept = footprints[min(layout.stays, len(footprints) - 1)].kept(layout.outputs)
        working = max(f.working(layout.outputs) for f in footprints)
        return min(layout.strip, layout.sizes[layout.stays]) * kept + min(layout.block, max(layout.sizes)) * working
    kept = sum(n * f.evaluated for n, f in zip(sizes, footprints, strict=True))
    passing = sum(n * f.passing for n, f in zip(sizes, footprints, strict=True))
    return kept + min(outputs * passing, max(passing, MemoryBudget.of(like.device).backpropagated))


def _rate(like: torch.Tensor) -> float:
    """Measure the operations a second of a matrix product."""
    a = like.new_ones(_SIDE, _SIDE)
    times = []
    for _ in range(3):
        start = perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(perf_counter() - start)
    return 2 * _SIDE**3 / min(times)
