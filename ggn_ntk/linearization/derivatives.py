"""Derivatives of models along a direction of their parameters, and whether ``torch.func`` gets them right."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ggn_ntk.models.comparison import KINKS, Difference, cotangent, gradient_tolerance, norms, read, total_norm
from ggn_ntk.models.evaluation import evaluate, leaves_of, primals_of
from ggn_ntk.models.gradients import gradients, gradients_of
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, is_out_of_memory, without
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import tree_map

_KIND = "Taylor expansion"

Parameters = dict[str, Tensor]

# Takes a function, its arguments and their tangents; returns the function's value and its derivative along them.
Pushforward = Callable[[Callable[..., Any], tuple[Parameters], tuple[Parameters]], tuple[Any, Any]]


def derivatives_along(
    function: Callable[[Parameters], Tensor], step: Parameters, degree: int, pushforward: Pushforward
) -> Callable[..., Any]:
    """Make a function of its value and its derivatives along a step, up to a degree."""
    # point -> (f, f', ..., the derivative of that degree), each [N, *out]
    if degree == 0:
        return lambda point: (function(point),)
    lower = derivatives_along(function, step, degree - 1, pushforward)

    def derivatives(point: Parameters) -> tuple[Tensor, ...]:
        values, slopes = pushforward(lower, (point,), (step,))
        return (*values, slopes[-1])  # the other slopes are values, too

    return derivatives


def forward_mode(
    function: Callable[..., Any], primals: tuple[Parameters], tangents: tuple[Parameters]
) -> tuple[Any, Any]:
    """Differentiate along a direction in forward mode."""
    values, slopes, *_ = jvp(function, primals, tangents)
    return values, slopes


def _double_vjp(
    function: Callable[..., Any], primals: tuple[Parameters], tangents: tuple[Parameters]
) -> tuple[Any, Any]:
    """Differentiate along a direction in reverse mode, twice."""
    # The pullback is linear in its argument, so that its own pullback, at whatever point, is the jvp.
    values, pullback, *_ = vjp(function, *primals)
    _, pushforward, *_ = vjp(pullback, tree_map(torch.zeros_like, values))
    return values, pushforward(tangents)[0]


def fingerprints(inputs: Inputs) -> list[tuple[Any, ...]]:
    """Tell samples apart by numbers of their bits, and by what they share."""
    shared = tuple(
        (label, *_sums(x.to_dense().unsqueeze(0)).tolist(), x.shape) if isinstance(x, Tensor) else (label, repr(x))
        for label, x in inputs.constants.items()
    )
    rows = torch.stack([_sums(x) for x in inputs.tensors.values()], dim=1)
    return [(*row, *shared, *inputs.kinds.items()) for row in rows.tolist()]


def _sums(x: Tensor) -> Tensor:
    """Sum the bits of each sample, in words, with random weights: a sample that differs has another sum."""
    # x [N, ...] -> [N]
    rows = x.detach().reshape(len(x), -1).contiguous()
    word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.uint8) if not rows.itemsize % w.itemsize)
    words = (torch.view_as_real(rows) if rows.is_complex() else rows).view(word).reshape(len(x), -1).long()
    return (words * _weights(words.shape[1], words.device)).sum(1)


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    """Draw odd numbers of 64 bits: times one of these, different words stay different."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        return (torch.randint(-(2**62), 2**62, (count,), generator=generator, device="cpu") * 2 + 1).to(device)


def find_pushforward(request: Request, degree: int) -> Pushforward:
    """Find a pushforward that gets a model right, or raise ``UnsupportedModelError``."""
    # Forward mode ignores ``torch.no_grad()``, and does not know all operations. Neither way reaches parameters that a
    # model uses past its modules.
    with without(_KIND):
        output = evaluate(request, None, request.x1, inspect=True)
    if not isinstance(output, Tensor):
        what = f"it returns {type(output).__name__}, not a tensor"
        remedy = "Pass output=, a function that picks the tensor [N, ...] to expand"
        raise UnsupportedModelError([Problem("", what, remedy)], _KIND)
    for pushforward in (forward_mode, _double_vjp):
        if is_right(request, request.x1, pushforward, degree):
            return pushforward
    what = "torch.func does not get its derivatives right"
    remedy = (
        "Look for parameters that its forward pass uses past the modules that hold them, custom autograd functions and "
        "fused operations"
    )
    raise UnsupportedModelError([Problem("", what, remedy)], _KIND)


def is_right(request: Request, inputs: Inputs, pushforward: Pushforward, degree: int) -> bool:
    """Tell whether a pushforward gets a model right at some samples."""
    try:
        return _agrees_with_autograd(request, inputs, pushforward) and (
            degree < 2 or _derivatives_commute(request, inputs, pushforward)
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False


def _agrees_with_autograd(request: Request, inputs: Inputs, pushforward: Pushforward) -> bool:
    """Tell whether a model's derivative along a direction is that of plain autograd, in the sum over samples."""
    output = evaluate(request, None, inputs)
    v = cotangent(output, seed=0)
    direction = {name: cotangent(p, seed=1) for name, p in request.params.items()}
    gradient = gradients_of(output, v, request.params)
    slope = pushforward(lambda p: evaluate(request, p, inputs), (primals_of(request),), (direction,))[1]
    return slope_agrees(request, inputs, v, slope, direction, gradient, gradient_tolerance(output))


def slope_agrees(
    request: Request,
    inputs: Inputs,
    v: Tensor,
    slope: Tensor,
    direction: Parameters,
    gradient: Parameters,
    tolerance: float,
) -> bool:
    """Tell whether ``sum v J u``, for the slope ``J u`` along a direction ``u``, is that of the gradient ``J^T v``."""

    # v, slope [N, *out]; direction, gradient [*parameter]
    def along(gradient: Parameters) -> float:
        return math.fsum(read([(g * direction[name]).sum(dtype=torch.float64) for name, g in gradient.items()]))

    error = abs((v * slope).sum(dtype=torch.float64).item() - along(gradient))
    differs = Difference(error, total_norm(gradient.values()))
    if differs.within(tolerance):
        return True
    moved = [gradients(request, inputs, v, leaves_of(request, jitter), jitter=jitter)[1] for jitter in (None, 0)]
    # Of deep networks, rounding may move more than that: inputs and parameters changed in the last digit show it.
    seen = abs(along(moved[0]) - along(moved[1]))
    return differs.explained_by(seen) and differs.within(KINKS)


def _derivatives_commute(request: Request, inputs: Inputs, pushforward: Pushforward) -> bool:
    """Tell whether second derivatives along two random directions are the same in both orders."""
    # They are not where torch loses a term of a nested derivative.
    u, v = ({name: cotangent(p, seed) for name, p in primals_of(request).items()} for seed in (0, 1))

    def second_derivative(inner: Parameters, outer: Parameters) -> Tensor:
        def slope(point: Parameters) -> Any:
            return pushforward(lambda p: evaluate(request, p, inputs), (point,), (inner,))[1]

        result: Tensor = pushforward(slope, (primals_of(request),), (outer,))[1]
        return result

    one, other = second_derivative(u, v), second_derivative(v, u)
    return Difference(*norms([one - other, one])).within(math.sqrt(torch.finfo(one.dtype).eps))
