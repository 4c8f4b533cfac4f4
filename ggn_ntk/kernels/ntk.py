"""The front door: one function for every model and every route."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Size, Tensor

from ggn_ntk.methods.computation import carry_out, is_finite
from ggn_ntk.methods.reference import contract_jacobians, jacobian_kernels, multiply_vectors, product_kernels
from ggn_ntk.methods.structured import structured_kernels
from ggn_ntk.models.comparison import SEEN, TOLERANCES, Difference, cotangent, kernel_tolerance, norms
from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.models.requirements import check_model
from ggn_ntk.models.rounding import rounding_of
from ggn_ntk.models.several import of_all_outputs
from ggn_ntk.problem.errors import NTKMismatchError, RouteWarning, UnsupportedRouteError, silent, warn
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.output_axes import AxesRequest, KernelAxes
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.result import Computed, Kernels
from ggn_ntk.process.progress import Wanted


class Method(str, Enum):
    """The routes to the kernel.

    - ``structured``: one pass back through the layers, contracting only the x1-x2 block of each in the cheapest
      order; parameters that no rule covers by their Jacobians. For any model; fastest and leanest.
    - ``vivit``: GGN Gram matrices from one backward pass. For Sequential models of the layers that ViViT knows.
      Contracts all (N1 + N2)^2 pairs to use N1 N2 of them.
    - ``jacobian_contraction``: ``torch.func`` Jacobians of both sets, contracted. For any model. Holds the
      Jacobians in memory, (N1 + N2) C P numbers for P parameters.
    - ``ntk_vector_products``: a vjp and a jvp of ``torch.func`` for each pair and output. For any model. Little
      memory; wins where C P is large against a forward pass.
    - ``auto``: ``structured``; ``jacobian_contraction``, with a :class:`ggn_ntk.RouteWarning`, for a model that it
      cannot do.
    """

    AUTO = "auto"
    STRUCTURED = "structured"
    VIVIT = "vivit"
    JACOBIAN_CONTRACTION = "jacobian_contraction"
    NTK_VECTOR_PRODUCTS = "ntk_vector_products"


def _vivit_kernels(request: Request) -> Computed:
    """Import ViViT's route, and ViViT and BackPACK with it, when it is taken."""
    from ggn_ntk.methods.vivit import vivit_kernels

    return vivit_kernels(request)


# How each method is carried out: it raises unless it gets the kernel right.
_ROUTES: dict[Method, Callable[[Request], Computed]] = {
    Method.STRUCTURED: structured_kernels,
    Method.VIVIT: _vivit_kernels,
    Method.JACOBIAN_CONTRACTION: jacobian_kernels,
    Method.NTK_VECTOR_PRODUCTS: product_kernels,
}

# How many samples of each set check=True compares.
_BLOCK = 2


def empirical_ntk(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Params | None = None,
    per_parameter: bool | str = False,
    check: bool = False,
    capture: str = "auto",
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    memory: int | str | None = None,
    progress: Wanted = None,
) -> Tensor | dict[Any, Any]:
    """Compute the empirical neural tangent kernel of a model.

    Theta[n, m, c, d] = sum_p J[n, c, p] J[m, d, p] with the Jacobian J[n, c, p] = d f(x_n)_c / d theta_p (Jacot,
    Gabriel, Hongler: "Neural Tangent Kernel", NeurIPS 2018, section 4). The kernel is exact up to rounding, or
    an error is raised. The model, its gradients and all global settings are left as found.

    Args:
        model: Any module whose samples do not influence one another (but see ``interacting``), with outputs and wanted
            parameters in float32 or float64; what is frozen may be of any dtype, and its rounding is then the
            kernel's. Or a function ``f(params, *args, **kwargs)``, as ``torch.func`` has it, of the batch ``[N, ...]``.
            What it refers to is constant, modules included.
        x1: N1 samples: a tensor ``[N1, ...]``, a tuple (called as ``model(*x1)``) or a mapping (``model(**x1)``) of
            tensors that share their leading axis, on the model's device, and of a dtype of its parameters where real.
            In lists, tuples, mappings and dataclasses, if the model takes them; beside entries that are no tensors, and
            what :func:`ggn_ntk.shared` marks as the same for all samples.
        x2: N2 samples like x1, in the same structure. Their tensors may have other axes behind that of the samples, say
            sequences of another length, and they may share other values: x1 and x2 are then evaluated apart, instead
            of together, which is faster. ``None`` means x1: half the work, and a kernel that is exactly symmetric
            under ``(n, c) <-> (m, d)``.
        compute: ``"full"``, ``"diagonal"`` (entries with c = d) or ``"trace"`` (their sum over c).
        method: ``"auto"`` or another value of :class:`ggn_ntk.kernels.Method`, which says when each wins.
        params: The parameters to sum over: an entry, or several, each a name as in ``model.named_parameters()``, a
            glob (``"encoder.layer.*.bias"``, as in ``fnmatch``), or the dotted name of a module, for all that are in
            it. Globs and modules leave frozen parameters out; to name one is an error. A tied parameter counts once.
            ``None`` for all that require a gradient. For a function the mapping of names to tensors that is its first
            argument: all of them that are real, whether they require a gradient or not. Tensors in nested dicts, lists
            and tuples go by names such as ``"layers.0.weight"``; the same tensor under two names counts once.
        per_parameter: Return kernels by name instead of their sum: one for each parameter, or, for ``"module"``, one
            for each module, summed over the parameters that are its own and not of a module inside it. The model's own
            are under ``""``; what several modules share counts for the first.
        check: Compare a small random block with an independent ``torch.func`` computation, and look for samples that
            influence one another in as many ways as tell every pair of them apart. Of whole batches, all is compared.
        capture: How the structured route takes the model apart: ``"sequential"`` walks through a Sequential model layer
            by layer, as the BackPACK extension does; ``"autograd"`` finds in the graph of any model where
            parameters are used. ``"auto"`` takes the first where it can. Another value forces the structured route.
        output: Turns what the model returns into the tensor ``[N, *out]`` to differentiate, say
            ``lambda out: out.logits``. A pair of these takes one output of x1 and another of x2, where ``None`` is what
            the model returns; with ``x2=None``, two outputs of the same samples. What is left may be a mapping, a tuple
            or a list of such tensors, of one dtype: all of them are outputs.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis (of ``[N, C, H, W]``, the
            image axes are ``(1, 2)``); negative ones count from the last. With ``compute="full"`` alone, as
            ``diagonal_axes``: ``"trace"`` is all axes here, ``"diagonal"`` all axes there.
        diagonal_axes: Output axes to take at equal indices.
        paired: Take x1[n] with x2[n] alone, or with itself where ``x2`` is ``None``, for the price of N kernels of one
            sample. In the shape of every result ``[N]`` stands for ``[N1, N2]``.
        interacting: Take the whole batch for one input, as BatchNorm in train mode does, attention across samples and
            contrastive losses: J[n, c] is then the derivative of the batch's output n, with all of x1, or all of x2,
            in the batch. x1 and x2 are evaluated apart. Buffers are left alone. Roles of axes are those of ``[*out]``;
            ``paired=True`` takes the kernel of n with n.
        memory: Bytes that the call may take beyond what is there, or text such as ``"8GiB"``; ``None`` for what the
            device has free, less a fifth. Samples are taken in blocks, and outputs a few at a time, where all at once
            would take more; with ``method="structured"`` alone, and what that contracts from Jacobians.
        progress: ``None`` for a bar (of tqdm, if it is installed) on a terminal where the structured route is expected
            to take over ten seconds; ``True``, ``False``, or a callable that is called with what is done and all.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]`` for a model with outputs ``[N, *out]``; with
        axes, ``[N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]``; or a dict of such
        kernels. Outputs of x1 and x2 may differ in shape, ``[N1, N2, *out1, *out2]``, but for axes that are traced or
        diagonal. Of several outputs, a dict of kernels by pairs of their keys, ``("u", "v")``, or for ``"diagonal"``
        and ``"trace"`` by keys; with ``per_parameter``, such a dict for each name. Each in the widest dtype of the
        parameters it sums over, on the model's device, without a graph.

    Warns:
        RouteWarning: If another route or a slower way is taken, with the reason.
        NotFiniteWarning: If Jacobians of some samples are infinite or NaN: their rows and columns are NaN; of a batch
            that is one input, all.

    Raises:
        UnsupportedModelError: If the model has no exact kernel, or not by this method; lists every problem.
        NTKMismatchError: If ``check`` finds a difference above rounding.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    request = Request.parse(
        model,
        x1,
        x2,
        AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired, interacting=interacting),
        params=params,
        per_parameter=per_parameter,
        capture=capture,
        output=output,
        memory=memory,
        progress=progress,
    )
    wanted = parse_method(method, check, capture)
    return of_all_outputs(request, lambda request: compute_kernels(request, wanted, check)[0])


def parse_method(method: str, check: bool, capture: str = "auto") -> Method:
    """Check what a call says about how to compute."""
    if not isinstance(check, bool):
        raise TypeError(f"check must be True or False, got {type(check).__name__}.")
    try:
        wanted = Method(method)
    except ValueError:
        accepted = ", ".join(repr(m.value) for m in Method)
        raise ValueError(f"method must be one of {accepted}, got {method!r}.") from None
    if capture == "auto":
        return wanted
    if wanted not in (Method.AUTO, Method.STRUCTURED):
        raise ValueError(f"capture is for method='structured' alone, got method={method!r}.")
    return Method.STRUCTURED


def compute_kernels(request: Request, method: Method, check: bool) -> tuple[Kernels, Computed]:
    """Compute what a request asks for."""

    def kernels(request: Request) -> tuple[Kernels, Computed]:
        taken, computed = _take_route(request, method)
        result = request.assemble(computed.kernels, computed.axes)
        if check and is_finite(result):  # else samples are left out, and the others computed again
            _compare_with_oracle(request, result, taken, computed.axes)
        return result, computed

    return carry_out(replace(request, thorough=check), kernels)


def _take_route(request: Request, method: Method) -> tuple[Method, Computed]:
    """Compute by the method asked for, or choose one."""
    if method is not Method.AUTO:
        return method, _ROUTES[method](request)
    try:
        return Method.STRUCTURED, _ROUTES[Method.STRUCTURED](request)
    except UnsupportedRouteError as error:
        warn(f"method='auto' takes 'jacobian_contraction', which is slower. {error}", RouteWarning)
        return Method.JACOBIAN_CONTRACTION, _ROUTES[Method.JACOBIAN_CONTRACTION](request)


def _compare_with_oracle(request: Request, result: Kernels, method: Method, axes: KernelAxes) -> None:
    """Compare a random block of a kernel with an independent computation."""
    drawn = torch.Generator("cpu").manual_seed(0)
    rows, columns = (
        torch.randperm(len(x), generator=drawn, device="cpu")[:_BLOCK].tolist() for x in (request.x1, request.second)
    )
    columns = rows if request.symmetric or request.axes.pairs else columns
    second = None if request.symmetric else request.second[columns]
    block = replace(request, x1=request.x1[rows], x2=second)
    with torch.enable_grad():  # for the graph, which shows all precisions that take part
        least = max(kernel_tolerance(evaluate(batch, None, batch.x1)) for batch in block.batches)
    with silent():
        if method is Method.NTK_VECTOR_PRODUCTS:
            kernels = contract_jacobians(block, *check_model(block))
        else:
            kernels = multiply_vectors(block, axes)
        expected = block.assemble(kernels, axes)
    actuals, expecteds = _by_outputs(request, result), _by_outputs(request, expected)
    for key, of_outputs in expecteds.items():
        found = {name: _block(kernel, rows, columns, axes) for name, kernel in actuals[key].items()}
        scale, *errors = norms(
            [
                torch.stack([kernel.double() for kernel in of_outputs.values()]).sum(0),
                *(found[name].double() - kernel.double() for name, kernel in of_outputs.items()),
            ]
        )
        for (name, kernel), error in zip(of_outputs.items(), errors, strict=True):
            tolerance, differs = max(least, TOLERANCES[kernel.dtype]), Difference(error, scale)
            if not differs.within(tolerance) and not error <= _rounding_of_kernel(block, axes, math.sqrt(scale)):
                of = f" of {'module' if request.per_parameter == 'module' else 'parameter'} {name!r}" if name else ""
                at = "" if key is None else f" at {key!r}"
                raise NTKMismatchError(
                    f"The kernel{of}{at} by method={method.value!r} differs from the oracle's on samples {rows} of x1 "
                    f"and {columns} of x2: relative error {differs.relative:.1e}, above {tolerance:.0e} for "
                    f"{kernel.dtype}."
                )


def _by_outputs(request: Request, kernels: Any) -> dict[Any, dict[str, Tensor]]:
    """List kernels by the keys of several outputs, or ``None``, and then by name, empty for the sum."""
    named = kernels if request.per_parameter else {"": kernels}
    if request.several is None:
        return {None: named}
    return {key: {name: by_key[key] for name, by_key in named.items()} for key in next(iter(named.values()))}


def _block(kernel: Tensor, rows: list[int], columns: list[int], axes: KernelAxes) -> Tensor:
    """Restrict a kernel to some samples; that of whole batches, of which there is one, is left as it is."""
    # kernel [N1, N2, ...], or [N, ...] of paired samples
    if axes.first.interacting:
        return kernel
    return kernel[rows] if axes.paired else kernel[rows][:, columns]


def _rounding_of_kernel(request: Request, axes: KernelAxes, size: float) -> float:
    """Measure what rounding does to a kernel of Jacobians of some size, that may be all that is left of larger ones."""
    like, seen = next(iter(request.params.values())), list[float]()
    for batch, side in zip(request.batches, axes, strict=False):
        v = cotangent(like, 0, Size([len(batch.inputs), *side.out_shape]))
        seen += rounding_of(batch, batch.inputs, v)().values()
    moved = SEEN * math.hypot(*seen)
    return 2 * moved * size + moved**2
