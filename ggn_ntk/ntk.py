"""The front door: one function for every model and every route."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import Module

from ggn_ntk.checks import TOLERANCES, NTKMismatchError, check_model, is_out_of_memory
from ggn_ntk.isolation import isolated
from ggn_ntk.reference import contract_jacobians, multiply_vectors
from ggn_ntk.request import Request
from ggn_ntk.structured import structured_kernels
from ggn_ntk.vivit import check_vivit, gram_kernels


class Method(str, Enum):
    """The routes to the kernel.

    - ``structured``: one pass back through the layers, contracting only the x1-x2 block of each in the cheapest
      order; parameters without a layer that has a rule by their Jacobians. For any model; fastest and leanest.
    - ``vivit``: GGN Gram matrices from one backward pass. For Sequential models of the layers that ViViT knows.
      Contracts all (N1 + N2)^2 pairs to use N1 N2 of them.
    - ``jacobian_contraction``: ``torch.func`` Jacobians of both sets, contracted. For any model. Holds the
      Jacobians in memory, (N1 + N2) C P numbers for P parameters.
    - ``ntk_vector_products``: a vjp and a jvp of ``torch.func`` for each pair and output. For any model. Little
      memory; wins where C P is large against a forward pass.
    - ``auto``: ``structured``; ``jacobian_contraction`` should that fail.
    """

    AUTO = "auto"
    STRUCTURED = "structured"
    VIVIT = "vivit"
    JACOBIAN_CONTRACTION = "jacobian_contraction"
    NTK_VECTOR_PRODUCTS = "ntk_vector_products"


_Kernels = Iterable[tuple[str, Tensor]]

# How each method is carried out: it raises unless it gets the kernel right, and returns the shape of one sample's
# output, and names of parameters with kernels.
_ROUTES: dict[Method, Callable[[Request], tuple[Size, _Kernels]]] = {
    Method.STRUCTURED: structured_kernels,
    Method.VIVIT: lambda request: (check_vivit(request), gram_kernels(request)),
    Method.JACOBIAN_CONTRACTION: lambda request: (check_model(request), contract_jacobians(request)),
    Method.NTK_VECTOR_PRODUCTS: lambda request: (check_model(request), multiply_vectors(request)),
}

# How many samples of each set check=True compares.
_BLOCK = 2


def empirical_ntk(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Iterable[str] | None = None,
    per_parameter: bool = False,
    check: bool = False,
    capture: str = "auto",
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor | dict[str, Tensor]:
    """Compute the empirical neural tangent kernel of a model.

    Theta[n, m, c, d] = sum_p J[n, c, p] J[m, d, p] with the Jacobian J[n, c, p] = d f(x_n)_c / d theta_p (Jacot,
    Gabriel, Hongler: "Neural Tangent Kernel", NeurIPS 2018, section 4). The kernel is exact up to rounding, or
    an error is raised. The model, its gradients and all global settings are left as found.

    Args:
        model: Any module whose samples do not influence one another, in float32 or float64.
        x1: N1 samples: a tensor ``[N1, ...]``, a tuple (called as ``model(*x1)``) or a mapping
            (``model(**x1)``) of tensors that share their leading axis, on the model's device, and of its
            dtype where real.
        x2: N2 samples like x1. ``None`` means x1: half the work, and a kernel that is exactly symmetric under
            ``(n, c) <-> (m, d)``.
        compute: ``"full"``, ``"diagonal"`` (entries with c = d) or ``"trace"`` (their sum over c).
        method: ``"auto"`` or another value of :class:`ggn_ntk.ntk.Method`, which says when each wins.
        params: Names of the parameters to sum over, as in ``model.named_parameters()``; a tied parameter counts
            once. ``None`` for all that require a gradient.
        per_parameter: Return one kernel for each parameter, by name, instead of their sum.
        check: Compare a small random block with an independent ``torch.func`` computation.
        capture: How the structured route takes the model apart: ``"backpack"`` walks through a Sequential model layer
            by layer, as the BackPACK extension does; ``"autograd"`` records the layers of any model. ``"auto"`` takes
            the first where it can. Another value forces the structured route.
        output: Turns what the model returns into the tensor ``[N, *out]`` to differentiate, say
            ``lambda out: out.logits``.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]`` for a model with outputs ``[N, *out]``, or a
        dict of such kernels; in the model's dtype on its device, without a graph.

    Raises:
        UnsupportedModelError: If the model has no exact kernel, or not by this method; lists every problem.
        NTKMismatchError: If ``check`` finds a difference above rounding.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    wanted = _parse_method(method)
    if not isinstance(check, bool):
        raise TypeError(f"check must be True or False, got {type(check).__name__}.")
    request = Request.parse(
        model, x1, x2, compute=compute, params=params, per_parameter=per_parameter, capture=capture, output=output
    )
    if capture != "auto":
        wanted = _structured(wanted)
    with isolated(model):
        taken, out_shape, kernels = _take_route(request, wanted)
        result = request.assemble(kernels, out_shape)
        if check:
            _compare_with_oracle(request, result, taken, out_shape)
    return result


def _parse_method(method: str) -> Method:
    """Look up a method by name.

    Args:
        method: The name.

    Returns:
        The method.

    Raises:
        ValueError: If there is none of that name.
    """
    try:
        return Method(method)
    except ValueError:
        accepted = ", ".join(repr(m.value) for m in Method)
        raise ValueError(f"method must be one of {accepted}, got {method!r}.") from None


def _structured(method: Method) -> Method:
    """Take the structured route, of which a capture was asked for.

    Args:
        method: The method asked for.

    Returns:
        The structured route.

    Raises:
        ValueError: If another was asked for.
    """
    if method not in (Method.AUTO, Method.STRUCTURED):
        raise ValueError(f"capture is for method='structured' alone, got method={method.value!r}.")
    return Method.STRUCTURED


def _take_route(request: Request, method: Method) -> tuple[Method, Size, _Kernels]:
    """Compute by the method asked for, or choose one.

    Args:
        request: The request.
        method: The method asked for.

    Returns:
        The method taken, the shape of one sample's output, and names of parameters with kernels.
    """
    if method is not Method.AUTO:
        return method, *_ROUTES[method](request)
    try:
        return Method.STRUCTURED, *_ROUTES[Method.STRUCTURED](request)
    except Exception as error:  # what is wrong with the model itself, the other route will raise again
        if is_out_of_memory(error):
            raise
        return Method.JACOBIAN_CONTRACTION, *_ROUTES[Method.JACOBIAN_CONTRACTION](request)


def _compare_with_oracle(request: Request, result: Tensor | dict[str, Tensor], method: Method, out_shape: Size) -> None:
    """Compare a random block of a kernel with an independent computation.

    Args:
        request: The request.
        result: What the method made of it.
        method: The method.
        out_shape: The shape of one sample's output.

    Raises:
        NTKMismatchError: If they differ by more than the tolerance for the dtype.
    """
    rows, columns = (torch.randperm(len(x), device="cpu")[:_BLOCK].tolist() for x in (request.x1, request.second))
    block = replace(request, x1=request.x1[rows], x2=request.second[columns])
    oracle = contract_jacobians if method is Method.NTK_VECTOR_PRODUCTS else multiply_vectors
    expected = block.assemble(oracle(block), out_shape)
    actuals = result if isinstance(result, dict) else {"": result}
    expecteds = expected if isinstance(expected, dict) else {"": expected}
    scale = torch.linalg.vector_norm(torch.stack(list(expecteds.values())).double().sum(0))
    for name, kernel in expecteds.items():
        error = torch.linalg.vector_norm(actuals[name][rows][:, columns].double() - kernel.double())
        tolerance = TOLERANCES[kernel.dtype]
        if not error <= tolerance * scale:
            of = f" of parameter {name!r}" if name else ""
            raise NTKMismatchError(
                f"The kernel{of} by method={method.value!r} differs from the oracle's on samples {rows} of x1 and "
                f"{columns} of x2: relative error {error / scale:.1e}, above {tolerance:.0e} for {kernel.dtype}."
            )
