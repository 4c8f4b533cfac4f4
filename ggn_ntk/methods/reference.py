"""The oracle: empirical NTKs by ``torch.func``, short and slow, for any ``nn.Module``.

Both functions follow the PyTorch tutorial "Neural Tangent Kernels" (Jacobian contraction and NTK-vector
products), after Novak, Sohl-Dickstein, Schoenholz: "Fast Finite Width Neural Tangent Kernel", ICML 2022,
sections 3.2 and 3.3. Letters: ``n``, ``m`` samples of x1, x2; ``c``, ``d`` free, ``e`` diagonal and ``f`` traced
outputs; ``p`` parameters.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, einsum
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn import Module

from ggn_ntk.methods.computation import compute as _compute
from ggn_ntk.models.autograd_graph import precisions
from ggn_ntk.models.comparison import KINKS, PROBE_TOLERANCES, cotangent, differing, total_norm
from ggn_ntk.models.evaluation import evaluate, leaves_of, primals_of
from ggn_ntk.models.independence import Checked, Parts, compare_gradients, gradients, gradients_of, rounding_of
from ggn_ntk.models.requirements import check_model
from ggn_ntk.problem.errors import RouteWarning, UnsupportedModelError, is_out_of_memory, listed, warn
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import AxesRequest, OutputAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Computed, transpose


def jacobian_contraction(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Iterable[str] | None = None,
    per_parameter: bool = False,
    output: Callable[[Any], Tensor] | None = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    chunk_size: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Compute the empirical NTK by contracting per-sample Jacobians.

    Theta[n, m, c, d] = sum_p J[n, c, p] J[m, d, p], with J by ``vmap(jacrev)``. Where ``vmap`` fails (recurrent
    networks, data-dependent control flow), J comes from a plain autograd loop over samples and outputs. The
    memory is that of the Jacobians, (N1 + N2) C P numbers for P parameters; with ``x2=None``, N1 C P.

    Args:
        model: Any module whose samples do not influence one another.
        x1: N1 samples: a tensor ``[N1, ...]``, a tuple (called as ``model(*x1)``) or a mapping
            (``model(**x1)``) of tensors that share their leading axis; float32 or float64 where real.
        x2: N2 samples like x1, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        params: Names of the parameters to sum over; ``None`` for all that require a gradient.
        per_parameter: Return one kernel for each parameter, by name.
        output: Turns what the model returns into a tensor ``[N, *out]``.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        chunk_size: How many samples to differentiate at once; ``None`` for all.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``; with axes, ``[N1, N2, *(x1's axes not traced),
        *(x2's axes neither traced nor diagonal)]``; or a dict of such kernels. In the model's dtype on its device.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = AxesRequest.parse(compute, trace_axes, diagonal_axes)
    request = Request.parse(
        model, x1, x2, wanted, params=params, per_parameter=per_parameter, output=output, chunk_size=chunk_size
    )
    return _compute(request, jacobian_kernels)


def ntk_vector_products(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Iterable[str] | None = None,
    per_parameter: bool = False,
    output: Callable[[Any], Tensor] | None = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    chunk_size: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Compute the empirical NTK from its products with the basis vectors of the outputs.

    Theta(x1, x2) e_d = J(x1) (J(x2)^T e_d): a vjp, then a jvp, for one sample of x2 after the other. No
    Jacobian is kept, and ``"diagonal"`` and ``"trace"`` keep of each product only what they sum, so the memory
    beyond the result is that of ``chunk_size`` gradients and of N1 ``chunk_size`` forward passes. With
    ``x2=None``, pairs m > n are mirrored. Where ``torch.func`` fails, the kernel comes from
    :func:`jacobian_contraction`'s autograd loop.

    Args:
        model: Any module whose samples do not influence one another.
        x1: N1 samples: a tensor ``[N1, ...]``, a tuple (called as ``model(*x1)``) or a mapping
            (``model(**x1)``) of tensors that share their leading axis; float32 or float64 where real.
        x2: N2 samples like x1, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        params: Names of the parameters to sum over; ``None`` for all that require a gradient.
        per_parameter: Return one kernel for each parameter, by name, each by products of its own.
        output: Turns what the model returns into a tensor ``[N, *out]``.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        chunk_size: How many basis vectors to multiply at once; ``None`` for all C.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``; with axes, ``[N1, N2, *(x1's axes not traced),
        *(x2's axes neither traced nor diagonal)]``; or a dict of such kernels. In the model's dtype on its device.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = AxesRequest.parse(compute, trace_axes, diagonal_axes)
    request = Request.parse(
        model, x1, x2, wanted, params=params, per_parameter=per_parameter, output=output, chunk_size=chunk_size
    )
    return _compute(request, product_kernels)


def jacobian_kernels(request: Request) -> Computed:
    """Compute kernels by Jacobian contraction, if the model has any. Call it inside ``isolated(request.model)``."""
    checked = check_model(request)
    return Computed(checked.axes, contract_jacobians(request, checked.axes, checked), checked.outputs)


def product_kernels(request: Request) -> Computed:
    """Compute kernels by NTK-vector products, if the model has any. Call it inside ``isolated(request.model)``."""
    checked = check_model(request)
    return Computed(checked.axes, multiply_vectors(request, checked.axes, checked), checked.outputs)


def contract_jacobians(request: Request, axes: OutputAxes, checked: Checked) -> Iterator[tuple[str, Tensor]]:
    """Contract Jacobians, parameter by parameter. Call it inside ``isolated(request.model)``."""
    # -> [N1, N2, E, F, F]
    first, second = _all_jacobians(request, checked)
    for name, jacobian in first.items():
        kernel = einsum("necfp,medfp->nmfecd", axes.arrange(jacobian), axes.arrange(second[name]))
        # A trace as a sum of T inner products rounds less than as one long inner product.
        yield name, kernel.sum(2)


def _sample_output(request: Request, primals: dict[str, Tensor], sample: Inputs) -> Tensor:
    """Evaluate the model on one sample."""
    # -> [C]
    output: Tensor = evaluate(request, primals, sample.map(lambda x: x.unsqueeze(0)))
    return output.flatten()


def _over_samples(function: Callable[[Inputs], Any], inputs: Inputs, chunk_size: int | None = None) -> Any:
    """Map a function over samples with ``vmap``."""
    mapped = vmap(lambda args, kwargs: function(Inputs(args, kwargs)), chunk_size=chunk_size)
    return mapped(inputs.args, inputs.kwargs)


def _all_jacobians(request: Request, checked: Checked) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the Jacobians of x1 and x2, by ``vmap`` where it gets all samples right."""
    # It does not where the model keeps references to parameters elsewhere than in its modules, nor for some layers in
    # some releases (PReLU in torch 2.6).
    # -> [N, C, P]
    sets = [x for x in (request.x1, request.x2) if x is not None]
    try:
        found = [_jacobians(request, x) for x in sets]
        why = "" if _hold_for_all(request, found, checked) else "it gets some samples wrong"
    except UnsupportedModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = _first_line(error)
    if why:
        what = f"Jacobians of {listed(request.params)} come from a loop over samples and outputs: exact, but slower"
        warn(f"{what}, since torch.func does not go through the model ({why}).", RouteWarning)
        found = [_loop_jacobians(request, x) for x in sets]
        _compare_with_batch(request, found, checked)
    return found[0], found[-1]


def _first_line(error: Exception) -> str:
    """Name an error, and say the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _jacobians(request: Request, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the Jacobians of all samples, ``[N, C, P]`` for each parameter (with P entries), by name."""
    jacobian = jacrev(lambda primals, sample: _sample_output(request, primals, sample))
    primals = primals_of(request)
    jacobians = _over_samples(lambda x: jacobian(primals, x), inputs, request.chunk_size)
    return {name: j.reshape(*j.shape[:2], -1) for name, j in jacobians.items()}


def _hold_for_all(request: Request, found: list[dict[str, Tensor]], checked: Checked) -> bool:
    """Tell whether Jacobians of all samples add up to the gradient by plain autograd."""
    # Rounding may take a unit of a sample to the other side of a kink. So where they do not, each sample is looked at
    # by itself, at which an error of a few samples is far larger than what kinks do.
    # found [N, C, P]
    inputs = request.x1.stack(request.x2)
    rounding, expected = rounding_of(request, inputs, checked.v), {name: checked.gradient[name] for name in found[0]}
    if not differing(_summed(request, found, checked), expected, checked.tolerance, rounding):
        return True
    if checked.tolerance < PROBE_TOLERANCES[torch.float32]:
        return False
    v = checked.v.reshape(len(checked.v), -1)
    finest = _finest(request)
    each = [(jacobians, n) for jacobians in found for n in range(len(next(iter(jacobians.values()))))]
    for i, (jacobians, n) in enumerate(each):
        sample, numbers = inputs[[i]], checked.v[[i]]
        _, alone = gradients(request, sample, numbers)
        error = total_norm(v[i].to(j.dtype) @ j[n] - alone[name].flatten() for name, j in jacobians.items())
        if not error <= KINKS * total_norm(alone.values()):
            return False
        if not _mapped_agrees(*finest, sample, numbers):
            return False
    _compare_with_batch(request, found, checked)
    return True


def _finest(request: Request) -> tuple[Request, float]:
    """Choose in what to compare ``torch.func`` with plain autograd, sample by sample."""
    wide = replace(request, widened=True)
    try:
        with torch.enable_grad():
            output = evaluate(wide, leaves_of(wide), request.x1[:1])
        if precisions(output) == {torch.float64}:
            return wide, PROBE_TOLERANCES[torch.float64]
    except Exception as error:
        if is_out_of_memory(error):
            raise
    return request, KINKS


def _mapped_agrees(request: Request, tolerance: float, sample: Inputs, v: Tensor) -> bool:
    """Tell whether the Jacobian of one sample by ``vmap`` is right, with numbers ``v`` like its output."""
    jacobians = _jacobians(request, sample)
    v = v.to(next(iter(jacobians.values())))
    _, expected = gradients(request, sample, v)
    error = total_norm(v.flatten() @ j[0] - expected[name].flatten() for name, j in jacobians.items())
    return error <= tolerance * total_norm(expected.values())


def _summed(request: Request, found: list[dict[str, Tensor]], checked: Checked) -> dict[str, Tensor]:
    """Compute ``sum v J`` over all samples from their Jacobians, by name."""
    v = checked.v.reshape(len(checked.v), -1)
    of_sets = v.split([len(next(iter(jacobians.values()))) for jacobians in found])
    sums = {name: torch.zeros_like(p.detach()).flatten() for name, p in request.params.items()}
    for w, jacobians in zip(of_sets, found, strict=True):
        sums = {name: total + w.flatten().to(total) @ jacobians[name].flatten(0, 1) for name, total in sums.items()}
    return {name: total.view(request.params[name].shape) for name, total in sums.items()}


def _compare_with_batch(request: Request, found: list[dict[str, Tensor]], checked: Checked) -> None:
    """Raise ``UnsupportedModelError`` if Jacobians of samples by themselves are not those in one batch."""
    alone = Parts([[i] for i in range(len(checked.v))], checked.outputs, _summed(request, found, checked))
    expected = {name: checked.gradient[name] for name in request.params}
    compare_gradients(request, request.x1.stack(request.x2), checked.v, expected, alone, checked.tolerance)


def _loop_jacobians(request: Request, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the Jacobians of all samples with plain autograd, one after the other."""
    # -> [N, C, P]
    rows = [_autograd_jacobian(request, inputs[i : i + 1]) for i in range(len(inputs))]
    return {name: torch.stack([row[name] for row in rows]) for name in request.params}


def _autograd_jacobian(request: Request, sample: Inputs) -> dict[str, Tensor]:
    """Compute one sample's Jacobian with plain autograd, output by output."""
    # -> [C, P]
    output = evaluate(request, None, sample).flatten()
    rows = [gradients_of(entry, torch.ones_like(entry), request.params, retain_graph=True) for entry in output]
    return {name: torch.stack([row[name].flatten() for row in rows]) for name in request.params}


def multiply_vectors(
    request: Request, axes: OutputAxes, checked: Checked | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Compute kernels by NTK-vector products. Call it inside ``isolated(request.model)``."""
    # -> [N1, N2, E, F, F]
    if request.per_parameter:
        for name, param in request.params.items():
            part = replace(request, params={name: param}, per_parameter=False)
            yield from multiply_vectors(part, axes, checked)
        return
    kernel, why = None, "it gets products with vectors wrong"
    try:
        first = request.x1[:1]  # before all others are computed
        tolerance = PROBE_TOLERANCES[evaluate(request, None, first).dtype]
        if _products_agree(request, tolerance, axes.out_shape, first):
            kernel = _kernel_from_products(request, axes)
            if not _holds_for_all(request, axes, kernel):
                kernel = None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = _first_line(error)
    if kernel is None:
        what = f"The kernel of {listed(request.params)} is computed by Jacobian contraction instead of products"
        warn(f"{what}, since torch.func does not go through the model ({why}).", RouteWarning)
        yield from contract_jacobians(request, axes, checked or check_model(request))
    else:
        yield next(iter(request.params)), kernel


def _products_agree(request: Request, tolerance: float, out_shape: Size, sample: Inputs) -> bool:
    """Tell whether ``torch.func`` multiplies the Jacobian of one sample by vectors right, from both sides."""
    # It does not where the model computes under ``torch.no_grad()``, which forward mode ignores, or keeps references to
    # parameters elsewhere than in its modules.
    # out_shape [*out]
    primals, alone = primals_of(request), sample.map(lambda x: x[0])
    sizes = [p.numel() for p in primals.values()]
    numbers = cotangent(next(iter(primals.values())), 0, Size([sum(sizes)])).split(sizes)  # one copy to the device
    tangent = {name: t.view(p.shape).to(p) for (name, p), t in zip(primals.items(), numbers, strict=True)}
    output, pullback, *_ = vjp(lambda p: evaluate(request, p, sample).flatten(), primals)
    v = cotangent(output, seed=1)
    (pulled,), pushed = pullback(v), v @ _pushforward(request, alone, tangent)
    _, expected = gradients(request, sample, v.reshape(1, *out_shape))
    right = torch.stack([(g * tangent[name]).sum() for name, g in expected.items()]).sum()
    errors = [(pulled[name] - g for name, g in expected.items()), [pushed - right]]
    return max(map(total_norm, errors)) <= tolerance * total_norm(expected.values())


def _holds_for_all(request: Request, axes: OutputAxes, kernel: Tensor) -> bool:
    """Tell whether a kernel is right at all samples: ``a^T Theta b`` is ``(J^T a)^T (J^T b)`` for random a and b."""
    # Plain autograd gives the right side, for each diagonal and each traced output. Where they differ, kinks may be the
    # reason: then each sample is looked at by itself, as in :func:`_hold_for_all`.
    # kernel [N1, N2, E, F, F]
    first, second = request.x1, request.second
    a, b = (cotangent(kernel, seed, torch.Size([len(x), *axes.roles[:2]])) for seed, x in ((0, first), (1, second)))
    groups = [(e, t) for e in range(axes.roles.diagonal) for t in range(axes.roles.traced)]
    right = [_products_with(request, axes, second, b, group) for group in groups]
    rows = einsum("nec,nmecd,med->ne", a, kernel, b).sum(1)  # of each sample of x1, by itself
    total, size = 0.0, 0.0
    for group, g in zip(groups, right, strict=True):
        left = _products_with(request, axes, first, a, group)
        total += sum((left[name] * g[name]).sum().item() for name in left)
        size += total_norm(left.values()) * total_norm(g.values())
    if abs(rows.sum().item() - total) <= PROBE_TOLERANCES[kernel.dtype] * size:
        return True
    if kernel.dtype == torch.float64:
        return False
    if not all(_row_holds(request, axes, n, a, rows[n].item(), groups, right) for n in range(len(first))):
        return False
    inputs, finest = request.x1.stack(request.x2), _finest(request)
    return all(_products_agree(*finest, axes.out_shape, inputs[[i]]) for i in range(len(inputs)))


def _row_holds(
    request: Request,
    axes: OutputAxes,
    n: int,
    a: Tensor,
    actual: float,
    groups: list[tuple[int, int]],
    right: list[dict[str, Tensor]],
) -> bool:
    """Tell whether the products of one sample of x1 are off by no more than kinks explain."""
    left = [_products_with(request, axes, request.x1[[n]], a[[n]], group) for group in groups]
    pairs = list(zip(left, right, strict=True))
    expected = sum((one[name] * other[name]).sum().item() for one, other in pairs for name in one)
    size = sum(total_norm(one.values()) * total_norm(other.values()) for one, other in pairs)
    return abs(actual - expected) <= KINKS * size


def _products_with(
    request: Request, axes: OutputAxes, inputs: Inputs, a: Tensor, group: tuple[int, int]
) -> dict[str, Tensor]:
    """Compute ``J^T a`` by plain autograd, with ``a`` ``[N, E, F]`` at one diagonal and one traced output."""
    e, t = group
    v = a.new_zeros(len(a), axes.out_shape.numel())
    v[:, axes.numbers[e, :, t].to(v.device)] = a[:, e]
    return gradients(request, inputs, v.reshape(len(a), *axes.out_shape))[1]


def _kernel_from_products(request: Request, axes: OutputAxes) -> Tensor:
    """Compute the kernel column by column: one sample of x2, then the next."""
    # -> [N1, N2, E, F, F]
    x2 = request.second
    if not request.symmetric:
        return torch.stack([_column(request, axes, request.x1, x2[m : m + 1]) for m in range(len(x2))], dim=1)
    first = _column(request, axes, request.x1, x2[:1])
    kernel = first.new_zeros(len(x2), *first.shape)
    for m in range(len(x2)):
        column = _column(request, axes, request.x1[m:], x2[m : m + 1]) if m else first
        kernel[m:, m] = column
        transpose(kernel)[m:, m] = column
    return kernel


def _column(request: Request, axes: OutputAxes, x1: Inputs, y: Inputs) -> Tensor:
    """Compute the kernel of x1 and one sample of x2."""
    # -> [N, E, F, F]
    primals = primals_of(request)
    output, pullback, *_ = vjp(lambda p: evaluate(request, p, y).flatten(), primals)

    def product(basis_vector: Tensor) -> Tensor:
        (gradient,) = pullback(basis_vector)
        products = axes.arrange(_over_samples(lambda x: _pushforward(request, x, gradient), x1))
        return einsum("necf,ef->nc", products, axes.arrange(basis_vector.unsqueeze(0))[0].sum(1))

    basis = torch.eye(len(output), dtype=output.dtype, device=output.device)
    columns = vmap(product, chunk_size=request.chunk_size)(basis)  # [C, N, F]
    return axes.arrange(columns.unsqueeze(0))[0].sum(2).permute(2, 0, 3, 1)  # edfnc, over f, -> necd


def _pushforward(request: Request, sample: Inputs, tangent: dict[str, Tensor]) -> Tensor:
    """Multiply one sample's Jacobian by a vector."""
    # -> [C]
    product: Tensor = jvp(lambda p: _sample_output(request, p, sample), (primals_of(request),), (tangent,))[1]
    return product
