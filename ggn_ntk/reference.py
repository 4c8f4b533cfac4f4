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
from torch import Tensor, einsum
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn import Module

from ggn_ntk.axes import AxesRequest, OutputAxes
from ggn_ntk.checks import (
    PROBE_TOLERANCES,
    TRIES,
    check_model,
    cotangent,
    gradients,
    gradients_agree,
    is_out_of_memory,
    total_norm,
)
from ggn_ntk.isolation import isolated
from ggn_ntk.layout import transpose
from ggn_ntk.request import Inputs, Request


def jacobian_contraction(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Iterable[str] | None = None,
    per_parameter: bool = False,
    output: Callable[[Any], Tensor] | None = None,
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
        chunk_size: How many samples to differentiate at once; ``None`` for all.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``, or a dict of such kernels, in the model's
        dtype on its device.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = AxesRequest.parse(compute)
    request = Request.parse(
        model, x1, x2, wanted, params=params, per_parameter=per_parameter, output=output, chunk_size=chunk_size
    )
    with isolated(model):
        axes = request.axes.resolve(check_model(request))
        return request.assemble(contract_jacobians(request, axes), axes)


def ntk_vector_products(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Iterable[str] | None = None,
    per_parameter: bool = False,
    output: Callable[[Any], Tensor] | None = None,
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
        chunk_size: How many basis vectors to multiply at once; ``None`` for all C.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``, or a dict of such kernels, in the model's
        dtype on its device.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = AxesRequest.parse(compute)
    request = Request.parse(
        model, x1, x2, wanted, params=params, per_parameter=per_parameter, output=output, chunk_size=chunk_size
    )
    with isolated(model):
        axes = request.axes.resolve(check_model(request))
        return request.assemble(multiply_vectors(request, axes), axes)


def contract_jacobians(request: Request, axes: OutputAxes) -> Iterator[tuple[str, Tensor]]:
    """Contract Jacobians, parameter by parameter. Call it inside ``isolated(request.model)``.

    Args:
        request: The request.
        axes: The role of each output axis.

    Yields:
        The name of a parameter and its kernel ``[N1, N2, E, F, F]``.
    """
    first = _jacobians(request, request.x1)
    second = first if request.x2 is None else _jacobians(request, request.x2)
    for name, jacobian in first.items():
        kernel = einsum("necfp,medfp->nmfecd", axes.arrange(jacobian), axes.arrange(second[name]))
        # A trace as a sum of T inner products rounds less than as one long inner product.
        yield name, kernel.sum(2)


def _sample_output(request: Request, primals: dict[str, Tensor], sample: Inputs) -> Tensor:
    """Evaluate the model on one sample.

    Args:
        request: The request.
        primals: Values of the wanted parameters.
        sample: The sample, without a sample axis.

    Returns:
        The flattened output ``[C]``.
    """
    return request.evaluate(primals, sample.map(lambda x: x.unsqueeze(0))).flatten()


def _over_samples(function: Callable[[Inputs], Any], inputs: Inputs, chunk_size: int | None = None) -> Any:
    """Map a function over samples with ``vmap``.

    Args:
        function: Takes one sample, without a sample axis.
        inputs: N samples.
        chunk_size: How many samples to map over at once.

    Returns:
        The function's results, stacked along a new leading axis.
    """
    mapped = vmap(lambda args, kwargs: function(Inputs(args, kwargs)), chunk_size=chunk_size)
    return mapped(inputs.args, inputs.kwargs)


def _jacobians(request: Request, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the Jacobians of all samples.

    Args:
        request: The request.
        inputs: N samples.

    Returns:
        The Jacobian ``[N, C, P]`` of each parameter (with P entries), by name.
    """
    try:
        jacobian = jacrev(lambda primals, sample: _sample_output(request, primals, sample))
        jacobians = _over_samples(lambda x: jacobian(request.primals, x), inputs, request.chunk_size)
        jacobians = {name: j.reshape(*j.shape[:2], -1) for name, j in jacobians.items()}
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return _loop_jacobians(request, inputs)
    return jacobians if _agrees_with_autograd(request, inputs, jacobians) else _loop_jacobians(request, inputs)


def _agrees_with_autograd(request: Request, inputs: Inputs, jacobians: dict[str, Tensor]) -> bool:
    """Tell whether ``torch.func`` got the Jacobians right.

    It does not where the model keeps references to parameters elsewhere than in its modules, nor for some
    layers in some releases (PReLU in torch 2.6).

    Args:
        request: The request.
        inputs: N samples.
        jacobians: The Jacobian ``[N, C, P]`` of each parameter, by name.

    Returns:
        Whether a gradient by plain autograd agrees for one of the first samples. One suffices: what is wrong is wrong
        for all, while rounding may take a single sample to the other side of a kink.
    """
    for i in range(min(TRIES, len(inputs))):
        v = cotangent(request.evaluate(None, inputs[i : i + 1]), seed=i)
        expected = gradients(request, inputs[i : i + 1], v)
        actual = {
            name: (v.flatten().to(jacobian.dtype) @ jacobian[i]).reshape(expected[name].shape)
            for name, jacobian in jacobians.items()
        }
        if gradients_agree(actual, expected):
            return True
    return False


def _loop_jacobians(request: Request, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the Jacobians of all samples with plain autograd, one after the other.

    Args:
        request: The request.
        inputs: N samples.

    Returns:
        The Jacobian ``[N, C, P]`` of each parameter, by name.
    """
    rows = [_autograd_jacobian(request, inputs[i : i + 1]) for i in range(len(inputs))]
    return {name: torch.stack([row[name] for row in rows]) for name in request.params}


def _autograd_jacobian(request: Request, sample: Inputs) -> dict[str, Tensor]:
    """Compute one sample's Jacobian with plain autograd, output by output.

    Args:
        request: The request.
        sample: The sample, with a sample axis of length one.

    Returns:
        The Jacobian ``[C, P]`` of each parameter, by name.
    """
    output = request.evaluate(None, sample).flatten()
    if not output.requires_grad:
        return {name: output.new_zeros(len(output), p.numel()) for name, p in request.params.items()}
    params = list(request.params.values())
    rows = [
        torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in output
    ]
    columns = zip(*rows, strict=True)
    return {n: torch.stack([g.flatten() for g in c]) for n, c in zip(request.params, columns, strict=True)}


def multiply_vectors(request: Request, axes: OutputAxes) -> Iterator[tuple[str, Tensor]]:
    """Compute kernels by NTK-vector products. Call it inside ``isolated(request.model)``.

    Args:
        request: The request.
        axes: The role of each output axis.

    Yields:
        Names of parameters (any one for their sum) and kernels ``[N1, N2, E, F, F]``.
    """
    if request.per_parameter:
        for name, param in request.params.items():
            yield from multiply_vectors(replace(request, params={name: param}, per_parameter=False), axes)
        return
    try:
        kernel = _kernel_from_products(request, axes) if _products_agree_with_autograd(request, axes) else None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kernel = None
    if kernel is None:
        yield from contract_jacobians(request, axes)
    else:
        yield next(iter(request.params)), kernel


def _products_agree_with_autograd(request: Request, axes: OutputAxes) -> bool:
    """Tell whether ``torch.func`` gets NTK-vector products right.

    It does not where the model computes under ``torch.no_grad()``, which forward mode ignores, or keeps
    references to parameters elsewhere than in its modules.

    Args:
        request: The request.
        axes: The role of each output axis.

    Returns:
        Whether ``v^T Theta v`` is ``|J^T v|^2`` by plain autograd, for one sample and random v.
    """
    sample = request.x1[:1]
    v = cotangent(request.evaluate(None, sample), seed=0)
    expected = total_norm(gradients(request, sample, v).values()) ** 2
    kernel = _column(request, OutputAxes(axes.out_shape), sample, sample)[0, 0]
    actual = (v.flatten() @ kernel @ v.flatten()).item()
    return abs(actual - expected) <= PROBE_TOLERANCES[v.dtype] * expected


def _kernel_from_products(request: Request, axes: OutputAxes) -> Tensor:
    """Compute the kernel column by column: one sample of x2, then the next.

    Args:
        request: The request.
        axes: The role of each output axis.

    Returns:
        ``[N1, N2, E, F, F]``.
    """
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
    """Compute the kernel of x1 and one sample of x2.

    Args:
        request: The request.
        axes: The role of each output axis.
        x1: N samples of x1.
        y: The sample, with a sample axis of length one.

    Returns:
        ``[N, E, F, F]``.
    """
    primals = request.primals
    output, pullback, *_ = vjp(lambda p: request.evaluate(p, y).flatten(), primals)

    def product(basis_vector: Tensor) -> Tensor:
        (gradient,) = pullback(basis_vector)
        products = axes.arrange(_over_samples(lambda x: _pushforward(request, x, gradient), x1))
        return einsum("necf,ef->nc", products, axes.arrange(basis_vector.unsqueeze(0))[0].sum(1))

    basis = torch.eye(len(output), dtype=output.dtype, device=output.device)
    columns = vmap(product, chunk_size=request.chunk_size)(basis)  # [C, N, F]
    return axes.arrange(columns.unsqueeze(0))[0].sum(2).permute(2, 0, 3, 1)  # edfnc, over f, -> necd


def _pushforward(request: Request, sample: Inputs, tangent: dict[str, Tensor]) -> Tensor:
    """Multiply one sample's Jacobian by a vector.

    Args:
        request: The request.
        sample: The sample, without a sample axis.
        tangent: The vector, shaped like the parameters.

    Returns:
        The product ``[C]``.
    """
    product: Tensor = jvp(lambda p: _sample_output(request, p, sample), (request.primals,), (tangent,))[1]
    return product
