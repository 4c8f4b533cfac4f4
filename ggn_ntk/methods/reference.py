"""The oracle: empirical NTKs by ``torch.func``, short and slow, for any ``nn.Module`` or function.

Both functions follow the PyTorch tutorial "Neural Tangent Kernels" (Jacobian contraction and NTK-vector
products), after Novak, Sohl-Dickstein, Schoenholz: "Fast Finite Width Neural Tangent Kernel", ICML 2022,
sections 3.2 and 3.3. Letters: ``n``, ``m`` samples of x1, x2; ``c``, ``d`` free, ``e`` diagonal and ``f`` traced
outputs; ``p`` parameters.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, einsum
from torch.func import jvp, vjp, vmap

from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget, check_size
from ggn_ntk.methods.computation import compute as _compute
from ggn_ntk.methods.sample_jacobians import all_jacobians, first_line, sample_output
from ggn_ntk.models.comparison import (
    KINKS,
    Difference,
    cotangent,
    difference,
    gradient_tolerance,
    is_coarse,
    total_norm,
)
from ggn_ntk.models.evaluation import evaluate, primals_of
from ggn_ntk.models.gradients import gradients
from ggn_ntk.models.independence import Checked
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import check_model
from ggn_ntk.models.rounding import finest
from ggn_ntk.models.sizes import bytes_per_sample
from ggn_ntk.problem.errors import Problem, RouteWarning, UnsupportedModelError, is_bug, is_out_of_memory, listed, warn
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import AxesRequest, KernelAxes, OutputAxes
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.result import Computed, transpose
from ggn_ntk.process.progress import Progress, Wanted, counting
from ggn_ntk.process.switches import without_checkpoints


def jacobian_contraction(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Params | None = None,
    per_parameter: bool | str = False,
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    chunk_size: int | None = None,
    create_graph: bool = False,
    memory: int | str | None = None,
) -> Tensor | dict[Any, Any]:
    """Compute the empirical NTK by contracting per-sample Jacobians.

    Theta[n, m, c, d] = sum_p J[n, c, p] J[m, d, p], with J by ``vmap(jacrev)``. Where ``vmap`` fails (recurrent
    networks, data-dependent control flow), J comes from a plain autograd loop over samples and outputs. The
    memory is that of the Jacobians, (N1 + N2) C P numbers for P parameters; with ``x2=None``, N1 C P. Those of
    ``paired`` samples come a few at a time.

    Args:
        model: Any module whose samples do not influence one another, or a function, as for
            :func:`ggn_ntk.empirical_ntk`.
        x1: N1 samples ``[N1, ...]``, as for :func:`ggn_ntk.empirical_ntk`; float32 or float64 where real.
        x2: N2 samples like x1, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        params: The parameters to sum over, as for :func:`ggn_ntk.empirical_ntk`.
        per_parameter: Return one kernel for each parameter, or each ``"module"``, by name.
        output: Turns what the model returns into a tensor ``[N, *out]``; a pair, one for x1 and one for x2.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        paired: Take x1[n] with x2[n] alone, or with itself where ``x2`` is ``None``: ``[N]`` stands for ``[N1, N2]``.
        interacting: Take the whole batch for one input, as for :func:`ggn_ntk.empirical_ntk`.
        chunk_size: How many samples to differentiate at once; ``None`` for all, or for what ``memory`` allows.
        create_graph: Whether the kernel is to be differentiable in the model's parameters and in inputs that require a
            gradient, which are accepted here alone. Its slope along a random direction is compared with a difference of
            gradients. The graph holds what all backward passes have computed.
        memory: Bytes that the call may take, or text such as ``"8GiB"``; ``None`` for what the device has free. Kernels
            and Jacobians that cannot fit are refused. All samples are evaluated at once to look at them.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``; with axes, ``[N1, N2, *(x1's axes not traced),
        *(x2's axes neither traced nor diagonal)]``; or dicts of such kernels, as of :func:`ggn_ntk.empirical_ntk`. In
        the model's dtype on its device.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired, interacting=interacting)
    request = Request.parse(
        model,
        x1,
        x2,
        wanted,
        params=params,
        per_parameter=per_parameter,
        output=output,
        chunk_size=chunk_size,
        create_graph=create_graph,
        memory=memory,
    )
    # A graph that outlives the call must not evaluate the model once more.
    with without_checkpoints() if create_graph else nullcontext():
        return _compute(request, jacobian_kernels)


def ntk_vector_products(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Params | None = None,
    per_parameter: bool | str = False,
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    chunk_size: int | None = None,
    memory: int | str | None = None,
    progress: Wanted = None,
) -> Tensor | dict[Any, Any]:
    """Compute the empirical NTK from its products with the basis vectors of the outputs.

    Theta(x1, x2) e_d = J(x1) (J(x2)^T e_d): a vjp, then a jvp, for one sample of x2 after the other. No
    Jacobian is kept, and ``"diagonal"`` and ``"trace"`` keep of each product only what they sum, so the memory
    beyond the result is that of ``chunk_size`` gradients and of N1 ``chunk_size`` forward passes. With
    ``x2=None``, pairs m > n are mirrored. Where ``torch.func`` fails, the kernel comes from
    :func:`jacobian_contraction`'s autograd loop.

    Args:
        model: Any module whose samples do not influence one another, or a function, as for
            :func:`ggn_ntk.empirical_ntk`.
        x1: N1 samples ``[N1, ...]``, as for :func:`ggn_ntk.empirical_ntk`; float32 or float64 where real.
        x2: N2 samples like x1, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        params: The parameters to sum over, as for :func:`ggn_ntk.empirical_ntk`.
        per_parameter: Return one kernel for each parameter, or each ``"module"``, by name, each by products of its own.
        output: Turns what the model returns into a tensor ``[N, *out]``; a pair, one for x1 and one for x2.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        paired: Take x1[n] with x2[n] alone, or with itself where ``x2`` is ``None``: ``[N]`` stands for ``[N1, N2]``.
        interacting: Take the whole batch for one input, as for :func:`ggn_ntk.empirical_ntk`.
        chunk_size: How many basis vectors to multiply at once; ``None`` for all C, or for what ``memory`` allows. Of
            ``paired`` samples, a few at a time are multiplied together.
        memory: Bytes that the call may take, or text such as ``"8GiB"``; ``None`` for what the device has free. It
            decides on how many vectors, and samples of x1, are multiplied at once. All samples are evaluated at once to
            look at them.
        progress: A bar, for ``None`` on a terminal where it is expected to take over ten seconds; ``True``, ``False``,
            or a callable that is called with the numbers of samples of x2 that are done and of all.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``; with axes, ``[N1, N2, *(x1's axes not traced),
        *(x2's axes neither traced nor diagonal)]``; or dicts of such kernels, as of :func:`ggn_ntk.empirical_ntk`. In
        the model's dtype on its device.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired, interacting=interacting)
    request = Request.parse(
        model,
        x1,
        x2,
        wanted,
        params=params,
        per_parameter=per_parameter,
        output=output,
        chunk_size=chunk_size,
        memory=memory,
        progress=progress,
    )
    return _compute(request, product_kernels)


def jacobian_kernels(request: Request) -> Computed:
    """Compute kernels by Jacobian contraction, if the model has any. Call it inside ``isolated(request.model)``."""
    axes, checked = check_model(request.detached())
    if request.graph is not None:
        _refuse_writes(request)
    request = _within_memory(request, axes)
    return Computed(axes, contract_jacobians(request, axes, checked), [known.outputs for known in checked])


def _within_memory(request: Request, axes: KernelAxes) -> Request:
    """Refuse Jacobians that cannot fit into memory, and choose how many samples are differentiated at once."""
    sides = list(zip(request.apart, axes, strict=False))
    if not axes.paired:  # else they come a few at a time
        numbers = sum(len(batch.x1) * side.out_shape.numel() for batch, side in sides)
        size = numbers * sum(p.numel() * p.element_size() for p in request.params.values())
        check_size(size, request.device, "Jacobians of all samples take")
    if request.memory is None or request.chunk_size is not None:
        return request
    # A forward pass, and a backward pass for each output
    of_sample = max((1 + side.out_shape.numel()) * bytes_per_sample(batch) for batch, side in sides)
    return replace(request, chunk_size=max(1, MemoryBudget.of(request.device).products // of_sample))


def _refuse_writes(request: Request) -> None:
    """Refuse a model that writes to parameters or buffers: what it was differentiated at does not last."""
    with isolated(request.model) as session:
        if session.written or session.set_back:
            what = "its forward pass writes to parameters or buffers, so that its kernel cannot be differentiated"
            raise UnsupportedModelError([Problem("", what, "Do so before the call, or on a copy")])


def product_kernels(request: Request) -> Computed:
    """Compute kernels by NTK-vector products, if the model has any. Call it inside ``isolated(request.model)``."""
    axes, checked = check_model(request)
    with counting(len(request.grouped()) * len(request.second)) as progress:
        kernels = list(multiply_vectors(request, axes, checked, progress))
    return Computed(axes, kernels, [known.outputs for known in checked])


def contract_jacobians(request: Request, axes: KernelAxes, checked: Sequence[Checked]) -> Iterator[tuple[str, Tensor]]:
    """Contract Jacobians, parameter by parameter, for kernels by name. Call it inside ``isolated(request.model)``."""
    # -> [N1, N2, E, F1, F2], or [N, E, F1, F2] of paired samples, which come a few at a time
    if axes.paired:
        blocks = [list(_contracted(*block, axes, "necfp,nedfp->nfecd")) for block in _pairs(request, axes, checked)]
        for of_parameter in zip(*blocks, strict=True):
            yield of_parameter[0][0], torch.cat([kernel for _, kernel in of_parameter])
    else:
        yield from _contracted(request, checked, axes, "necfp,medfp->nmfecd")


def _contracted(
    request: Request, checked: Sequence[Checked], axes: KernelAxes, equation: str
) -> Iterator[tuple[str, Tensor]]:
    """Contract Jacobians, and sum over traced outputs, which come before those that the kernel has."""
    first, second = all_jacobians(request, checked)
    for name, jacobian in first.items():
        kernel = einsum(equation, axes.first.arrange(jacobian), axes.second.arrange(second[name]))
        # A trace as a sum of T inner products rounds less than as one long inner product.
        yield request.groups[name], kernel.sum(-4)


def _pairs(
    request: Request, axes: KernelAxes, checked: Sequence[Checked]
) -> Iterator[tuple[Request, Sequence[Checked]]]:
    """Split paired samples, with what is known of them, so that the Jacobians of a block keep to the budget."""
    n, size = len(request.x1), _pairs_at_once(request, axes)
    if size >= n:
        yield request, checked
        return
    for block in split(n, size):
        part = _block(request, block)
        yield part, [_known(*batch, block, n) for batch in zip(part.batches, checked, strict=True)]


def _block(request: Request, block: slice) -> Request:
    """Restrict paired samples to some of them."""
    return request.of_others(lambda x: x[block])


def _known(batch: Request, checked: Checked, block: slice, n: int) -> Checked:
    """Restrict what is known of a batch, in which each set has N samples, to a block of each."""
    outputs = checked.outputs.unflatten(0, (-1, n))[:, block].flatten(0, 1)
    v = cotangent(outputs, seed=0)  # of all outputs, since samples are few
    return replace(checked, outputs=outputs, v=v, gradient=gradients(batch, batch.inputs, v)[1])


def _pairs_at_once(request: Request, axes: KernelAxes) -> int:
    """Look up the Jacobians of how many pairs of samples keep to the budget."""
    params, sides = request.params.values(), axes[:1] if request.symmetric else axes
    numbers = sum(side.out_shape.numel() for side in sides)
    budget = MemoryBudget.of(request.device).jacobians
    return max(1, budget // max(1, numbers * sum(p.numel() * p.element_size() for p in params)))


class _Side(NamedTuple):
    """x1 or x2, and what it takes to differentiate its outputs."""

    request: Request  # of the batch that it is in
    axes: OutputAxes  # the role of each output axis
    inputs: Inputs  # its samples
    at_once: int | None = None  # how many of them vectors are multiplied with together; ``None`` for all


def _sides(request: Request, axes: KernelAxes) -> tuple[_Side, _Side]:
    """Take x1 and x2."""
    batches = request.batches
    return _Side(batches[0], axes.first, request.x1), _Side(batches[-1], axes.second, request.second)


def multiply_vectors(
    request: Request, axes: KernelAxes, checked: Sequence[Checked] | None = None, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Compute kernels by NTK-vector products. Call it inside ``isolated(request.model)``."""
    # -> [N1, N2, E, F1, F2]
    if request.per_parameter:
        for group, params in request.grouped():
            part = replace(request, params=params, per_parameter=False)
            yield from ((group, kernel) for _, kernel in multiply_vectors(part, axes, checked, progress))
        return
    kernel, why = None, "it gets products with vectors wrong"
    try:
        # One sample before all others are computed, of each batch.
        first = [(batch, batch.x1[:1]) for batch in request.batches]
        tolerances = [gradient_tolerance(evaluate(batch, None, sample)) for batch, sample in first]
        if all(_products_agree(*one, tolerance) for one, tolerance in zip(first, tolerances, strict=True)):
            kernel = _kernel_from_products(request, axes, progress or Progress(False, 0))
            if not _holds_for_all(request, axes, kernel, max(tolerances)):
                kernel = None
    except Exception as error:
        if is_out_of_memory(error) or is_bug(error):
            raise
        why = first_line(error)
    if kernel is None:
        what = f"The kernel of {listed(request.params)} is computed by Jacobian contraction instead of products"
        warn(f"{what}, since torch.func does not go through the model ({why}).", RouteWarning)
        yield from contract_jacobians(request, axes, checked or check_model(request)[1])
    else:
        yield "", kernel


def _products_agree(request: Request, sample: Inputs, tolerance: float) -> bool:
    """Tell whether ``torch.func`` multiplies the Jacobian of one sample by vectors right, from both sides."""
    # Forward mode ignores ``torch.no_grad()`` in the forward pass, and neither mode reaches parameters that the model
    # holds elsewhere than in its modules.
    primals, alone = primals_of(request), sample.map(lambda x: x[0])
    sizes = [p.numel() for p in primals.values()]
    # One copy to the device, of the numbers for all parameters.
    numbers = cotangent(next(iter(primals.values())), 0, torch.Size([sum(sizes)])).split(sizes)
    tangent = {name: t.view(p.shape).to(p) for (name, p), t in zip(primals.items(), numbers, strict=True)}
    output, pullback, *_ = vjp(lambda p: evaluate(request, p, sample), primals)
    v = cotangent(output, seed=1)
    (pulled,), pushed = pullback(v), v.flatten() @ _pushforward(request, alone, tangent)
    _, expected = gradients(request, sample, v)
    right = torch.stack([(g * tangent[name]).sum() for name, g in expected.items()]).sum()
    differs = difference(pulled, expected)
    return differs.within(tolerance) and Difference((pushed - right).abs().item(), differs.scale).within(tolerance)


def _holds_for_all(request: Request, axes: KernelAxes, kernel: Tensor, tolerance: float) -> bool:
    """Tell whether a kernel is right at all samples: ``a^T Theta b`` is ``(J^T a)^T (J^T b)`` for random a and b."""
    # kernel [N1, N2, E, F1, F2], a [N1, E, F1], b [N2, E, F2]
    if axes.paired:  # each pair by itself
        alone = KernelAxes(*(replace(side, paired=False) for side in axes))
        pairs = ((_block(request, slice(n, n + 1)), of_pair) for n, of_pair in enumerate(kernel.split(1)))
        return all(_holds_for_all(pair, alone, of_pair.unsqueeze(1), tolerance) for pair, of_pair in pairs)
    first, second = _sides(request, axes)
    a, b = (
        cotangent(kernel, seed, torch.Size([len(side.inputs), *side.axes.roles[:2]]))
        for seed, side in enumerate((first, second))
    )
    # Plain autograd gives the right side, for each diagonal and each traced output.
    groups = [(e, t) for e in range(first.axes.roles.diagonal) for t in range(first.axes.roles.traced)]
    right = [_products_with(second, b, group) for group in groups]
    rows = einsum("nec,nmecd,med->ne", a, kernel, b).sum(1)  # [N1], which add up to a^T Theta b
    total, size = 0.0, 0.0
    for group, g in zip(groups, right, strict=True):
        left = _products_with(first, a, group)
        total += sum((left[name] * g[name]).sum().item() for name in left)
        size += total_norm(left.values()) * total_norm(g.values())
    if Difference(abs(rows.sum().item() - total), size).within(tolerance):
        return True
    if not is_coarse(tolerance):
        return False
    # Kinks may be the reason. So each sample is looked at by itself, at which wrong products stand out.
    if not all(_row_holds(first, n, a, rows[n].item(), groups, right) for n in range(len(first.inputs))):
        return False
    each = ((*finest(batch), batch.inputs[[i]]) for batch in request.batches for i in range(len(batch.inputs)))
    return all(_products_agree(finer, sample, tolerance) for finer, tolerance, sample in each)


def _row_holds(
    side: _Side,
    n: int,
    a: Tensor,
    actual: float,
    groups: list[tuple[int, int]],
    right: list[dict[str, Tensor]],
) -> bool:
    """Tell whether the products of one sample of x1 are off by no more than kinks explain."""
    one = side._replace(inputs=side.inputs[[n]])
    left = [_products_with(one, a[[n]], group) for group in groups]
    pairs = list(zip(left, right, strict=True))
    expected = sum((ours[name] * theirs[name]).sum().item() for ours, theirs in pairs for name in ours)
    size = sum(total_norm(ours.values()) * total_norm(theirs.values()) for ours, theirs in pairs)
    return Difference(abs(actual - expected), size).within(KINKS)


def _products_with(side: _Side, a: Tensor, group: tuple[int, int]) -> dict[str, Tensor]:
    """Compute ``J^T a`` by plain autograd, of ``a`` at one diagonal and one traced output."""
    # a [N, E, F] -> [*parameter]
    (e, t), axes = group, side.axes
    v = a.new_zeros(len(a), axes.out_shape.numel())
    v[:, axes.numbers[e, :, t].to(v.device)] = a[:, e]
    return gradients(side.request, side.inputs, v.reshape(len(a), *axes.out_shape))[1]


def _kernel_from_products(request: Request, axes: KernelAxes, progress: Progress) -> Tensor:
    """Compute the kernel column by column: one sample of x2, then the next; that of paired samples all at once."""
    # -> [N1, N2, E, F1, F2]
    first, second = _products_within_memory(request, axes)
    n2 = len(second.inputs)
    if axes.paired:
        size = _pairs_at_once(request, axes)
        kernel: Tensor = first.inputs.over_samples(partial(_of_pair, first, second), second.inputs, chunk_size=size)
        progress.add(n2)
        return kernel
    for m in range(n2):
        start = m if request.symmetric else 0
        column = _column(first._replace(inputs=first.inputs[start:]), second, m)  # [N1 - start, E, F1, F2]
        kernel = column.new_zeros(len(column), n2, *column.shape[1:]) if m == 0 else kernel
        kernel[start:, m] = column
        if request.symmetric:
            transpose(kernel)[m:, m] = column
        progress.add()
    return kernel


def _products_within_memory(request: Request, axes: KernelAxes) -> tuple[_Side, _Side]:
    """Take x1 and x2, and choose how many samples of x1, and vectors, are multiplied at once."""
    first, second = _sides(request, axes)
    if request.memory is None:
        return first, second
    budget = MemoryBudget.of(request.device).products
    of_sample = 2 * bytes_per_sample(first.request)  # values and tangents
    samples = min(len(first.inputs), max(1, budget // of_sample))
    of_vector = samples * of_sample + sum(p.numel() * p.element_size() for p in request.params.values())
    vectors = request.chunk_size or max(1, budget // of_vector)
    request = replace(second.request, chunk_size=vectors)
    return first._replace(at_once=samples), second._replace(request=request)


def _of_pair(first: _Side, second: _Side, x: Inputs, y: Inputs) -> Tensor:
    """Compute the kernel of two samples without a sample axis."""
    # -> [E, F1, F2]
    x, y = (sample.map(lambda t: t.unsqueeze(0)) for sample in (x, y))
    return _column(first._replace(inputs=x), second._replace(inputs=y), 0)[0]


def _column(first: _Side, second: _Side, m: int) -> Tensor:
    """Compute the kernel of x1 and one sample of x2."""
    # -> [N1, E, F1, F2]
    primals, y = primals_of(second.request), second.inputs[m : m + 1]
    output, pullback, *_ = vjp(lambda p: evaluate(second.request, p, y).flatten(), primals)

    def product(basis_vector: Tensor) -> Tensor:
        (gradient,) = pullback(basis_vector)
        push = partial(_pushforward, first.request, tangent=gradient)
        pushed = first.inputs.over_samples(push, chunk_size=first.at_once)  # [N1, C1]
        chosen = second.axes.arrange(basis_vector.unsqueeze(0))[0].sum(1)  # [E, T]
        return einsum("necf,ef->nc", first.axes.arrange(pushed), chosen)

    basis = torch.eye(len(output), dtype=output.dtype, device=output.device)
    columns = vmap(product, chunk_size=second.request.chunk_size)(basis)  # [C2, N1, F1]
    return second.axes.arrange(columns.unsqueeze(0))[0].sum(2).permute(2, 0, 3, 1)  # edfnc, over f, -> necd


def _pushforward(request: Request, sample: Inputs, tangent: dict[str, Tensor]) -> Tensor:
    """Multiply one sample's Jacobian by a vector."""
    # -> [C]
    product: Tensor = jvp(lambda p: sample_output(request, p, sample), (primals_of(request),), (tangent,))[1]
    return product
