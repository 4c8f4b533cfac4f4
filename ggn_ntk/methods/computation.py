"""What surrounds every route: a session for the model, errors about memory, and samples whose Jacobians are not finite.

A sample with NaN or infinity in its Jacobian has no row and no column in the kernel. It must not spoil those of others:
their kernel is computed without it, and its own rows and columns are NaN.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget, explained, fits, limited, resolve_axes
from ggn_ntk.memory.buffers import keep_freed
from ggn_ntk.models.comparison import all_finite, cotangent
from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.models.gradients import gradients
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import warn_of_statistics
from ggn_ntk.models.several import of_all_outputs
from ggn_ntk.models.sizes import bytes_per_sample
from ggn_ntk.problem.errors import NotFiniteError, NotFiniteWarning, Problem, UnsupportedModelError, listed, warn
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Computed, Kernels
from ggn_ntk.process.progress import showing
from ggn_ntk.process.torch_internals import tree_leaves, tree_map
from ggn_ntk.process.transforms import outside_of_transforms

_INFINITE = Problem("", "its gradients are not finite", "Look for overflow in its weights and inputs")


def compute(request: Request, route: Callable[[Request], Computed]) -> Kernels:
    """Compute kernels by a route, in the layout of the public API."""

    def assembled(request: Request) -> tuple[Kernels, Computed]:
        computed = route(request)
        return request.assemble(computed.kernels, computed.axes), computed

    return of_all_outputs(request, lambda request: carry_out(request, assembled)[0])


@contextmanager
def session(request: Request, what: str | None = None) -> Iterator[None]:
    """Open a session for a model, and explain errors about memory."""
    keep_freed()
    with (
        outside_of_transforms(),
        isolated(request.model),
        explained(lambda: what or _described(request)),
        limited(request.memory),
        showing(request.progress),
    ):
        yield


def carry_out(request: Request, kernels: Callable[[Request], tuple[Kernels, Computed]]) -> tuple[Kernels, Computed]:
    """Compute kernels in a session, without those samples whose Jacobians are not finite."""
    with session(request):
        try:
            result, computed = kernels(request)
            if is_finite(result):
                warn_of_statistics(request.model)
                return result, computed
        except NotFiniteError:
            computed = None
        infinite = [infinite_samples(batch) for batch in request.batches]
        if any(map(torch.any, infinite)):
            return _around(request, kernels, infinite)
        if computed is None:
            raise UnsupportedModelError([_INFINITE])
        if not request.jacobians_first:
            # Gram matrices of very large and very small numbers may have left the dtype's range; Jacobians may not.
            return carry_out(replace(request, jacobians_first=True), kernels)
        what = "The kernel has entries beyond the range of its dtype, or of intermediate results: use float64."
        warn(what, NotFiniteWarning)
        return result, computed


def _around(
    request: Request, kernels: Callable[[Request], tuple[Kernels, Computed]], infinite: list[Tensor]
) -> tuple[Kernels, Computed]:
    """Compute the kernels of all other samples, and put NaN in the rows and columns of these."""
    # infinite [N] of each batch
    if all(map(torch.all, infinite)) and not request.axes.interacting:
        raise UnsupportedModelError([_INFINITE])
    bad = request.sides(infinite)
    if request.axes.pairs:  # a pair needs both
        bad = (bad[0] | bad[1],) * 2
    rows, columns = ((~of_side).nonzero().flatten().tolist() for of_side in bad)
    if rows and columns:
        x2 = None if request.symmetric else request.second[columns]
        result, computed = kernels(replace(request, x1=request.x1[rows], x2=x2))
        places, sizes = [rows] if request.axes.pairs else [rows, columns], request.sample_axes
        result = tree_map(lambda kernel: _spread(kernel, places, sizes), result)
    else:
        result, computed = _without_numbers(request)
    warn(f"Jacobians of {listed(request.labels(infinite))} are not finite: NaN in the kernel.", NotFiniteWarning)
    return result, computed


def _without_numbers(request: Request) -> tuple[Kernels, Computed]:
    """Make kernels of a set without any sample that has a row or a column: of NaN."""
    outputs = [_output_of_one(batch) for batch in request.batches]
    axes = resolve_axes(request, outputs)
    nothing = outputs[0].new_full((*request.sample_axes, *axes.shape), torch.nan)
    kernels = ((name, nothing) for name, _ in request.grouped())
    return request.assemble(kernels, axes), Computed(axes, ())


@torch.no_grad()
def _output_of_one(request: Request) -> Tensor:
    """Evaluate a single sample of a batch, to find the shape of an output."""
    # -> [1, *out]
    output: Tensor = evaluate(request, None, request.x1[:1])
    return output


def _spread(kernel: Tensor, places: list[list[int]], sizes: tuple[int, ...]) -> Tensor:
    """Put the kernel of some samples into that of all, with NaN elsewhere."""
    # kernel [len(rows), len(columns), ...] -> [*sizes, ...], or of paired samples with one axis for both
    whole = kernel.new_full((*sizes, *kernel.shape[len(sizes) :]), torch.nan)
    axes = (torch.tensor(chosen, device=kernel.device) for chosen in places)
    whole[torch.meshgrid(*axes, indexing="ij")] = kernel
    return whole


def is_finite(result: Kernels) -> bool:
    """Tell whether no entry is infinite or NaN."""
    return all_finite(tree_leaves(result))


def infinite_samples(request: Request) -> Tensor:
    """Find the samples of a batch whose Jacobians are not finite, by bisection."""
    # -> [N]
    inputs, one = request.inputs, _output_of_one(request)
    v = cotangent(one, 0, torch.Size([len(inputs), *one.shape[1:]]))  # [N, *out]
    found = torch.zeros(len(inputs), dtype=torch.bool)
    waiting = [list(range(block.start, block.stop)) for block in split(len(inputs), samples_at_once(request))]
    while waiting:
        samples = waiting.pop()
        if all_finite(gradients(request, inputs[samples], v[samples])[1].values()):
            continue
        if len(samples) == 1:
            found[samples] = True
        else:
            middle = len(samples) // 2
            waiting += [samples[:middle], samples[middle:]]
    return found


def samples_at_once(request: Request) -> int:
    """Choose how many samples of a batch to evaluate together: all of them, if they are small beside what there is."""
    device, of_sample = next(iter(request.x1.tensors.values())).device, bytes_per_sample(request)
    if request.x1.whole or fits(of_sample * len(request.inputs), device):
        return len(request.inputs)
    return max(1, MemoryBudget.of(device).products // of_sample)


def _described(request: Request) -> str:
    """Describe a kernel in a message."""
    counts = [request.x1.count] if request.axes.paired else [request.x1.count, request.second.count]
    samples = " x ".join(map(str, counts))
    of = "pairs of samples" if request.axes.paired else "samples"
    return f"the {request.axes.compute} kernel of {samples} {of} and {len(request.params)} parameters"
