"""What rounding does to outputs and gradients of a model: measured, so that it is not taken for something else.

Two measures: by how much numbers move with the last digit of inputs and parameters (*jitter*), and whether a difference
goes away in float64.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ggn_ntk.models.autograd_graph import precisions
from ggn_ntk.models.comparison import (
    GRADIENT_TOLERANCES,
    KINKS,
    difference,
    differing,
    norms,
    relative_error,
    row_norms,
    total_norm,
)
from ggn_ntk.models.evaluation import evaluate, leaves_of
from ggn_ntk.models.gradients import Form, gradients, in_parts, whole
from ggn_ntk.models.inspection import UNSTEADY
from ggn_ntk.models.precision import spacing
from ggn_ntk.problem.errors import UnsupportedModelError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request

_T = TypeVar("_T")


def rounding_of_outputs(request: Request, inputs: Inputs) -> Tensor:
    """Measure by how much outputs move with the last digit of inputs and parameters."""
    # -> [N]
    with torch.no_grad():
        jittered = [evaluate(request, leaves_of(request, jitter), inputs, jitter=jitter) for jitter in (None, 0, 1, 2)]
    return torch.stack([row_norms(x - jittered[0]) for x in jittered[1:]]).amax(0)


def rounding_of(
    request: Request, inputs: Inputs, v: Tensor, form: Form = whole, *, digit: float | None = None
) -> Callable[[], dict[str, float]]:
    """Measure, when called, by how much a gradient moves with the last digit of inputs and parameters, by name."""
    # Or with a finer ``digit``, relative to the size of numbers, where what is compared does not round to theirs.

    def measure() -> dict[str, float]:
        # All with exchanged parameters, which do not reach a model that keeps references to its own elsewhere.
        (_, before), (_, again) = (gradients(request, inputs, v, leaves_of(request)) for _ in range(2))
        if differing(again, before, GRADIENT_TOLERANCES[v.dtype]):
            raise UnsupportedModelError([UNSTEADY])
        _, after = gradients(request, inputs, v, leaves_of(request, jitter=0), jitter=0)
        moved = norms(form(after[name], p) - form(before[name], p) for name, p in request.params.items())
        # A gradient may be zero, or what is left where far larger ones cancel: then it rounds as those of the
        # parameters around it do.
        others = request.of_all_parameters()
        _, around = gradients(others, inputs, v, leaves_of(others))
        least = torch.finfo(v.dtype).eps * total_norm(around.values())
        share = 1.0 if digit is None else min(1.0, digit / _last_digit(request, inputs))
        return {name: max(share * size, least) for name, size in zip(request.params, moved, strict=True)}

    return measure


def _last_digit(request: Request, inputs: Inputs) -> float:
    """Find the last digit that counts most, relative to the size of numbers."""
    of_model = (*request.model.parameters(), *request.model.buffers())
    return max(d for d in map(spacing, (*of_model, *inputs.tensors.values())) if math.isfinite(d))


def in_double(request: Request, measure: Callable[[Request], _T | None]) -> _T | None:
    """Measure something of a model in float64; ``None`` where it cannot be evaluated in that."""
    # Rounding is then far smaller, and what samples do to one another, or what torch.func gets wrong, is the same.
    try:
        return measure(replace(request, widened=True))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def finest(request: Request) -> tuple[Request, float]:
    """Choose the precision in which ``torch.func`` is compared with plain autograd, and its tolerance."""

    def measure(wide: Request) -> bool:
        with torch.enable_grad():  # for the graph, which shows all precisions that take part
            output = evaluate(wide, leaves_of(wide), request.x1[:1])
        return precisions(output) == {torch.float64}

    if in_double(request, measure):
        return replace(request, widened=True), GRADIENT_TOLERANCES[torch.float64]
    return request, KINKS


def errors_in_double(request: Request, inputs: Inputs, output: Tensor, samples: list[int]) -> Tensor | None:
    """Measure in float64 how far outputs of some samples by themselves are from those in the batch of all."""

    # output [N, *out] -> [len(samples)]
    def measure(wide: Request) -> Tensor | None:
        with torch.enable_grad():  # for the graph, which shows all precisions that take part
            found = evaluate(wide, None, inputs)
        if precisions(found) != {torch.float64} or not relative_error(output, found.detach()) <= KINKS:
            return None
        with torch.no_grad():
            alone = [evaluate(wide, None, inputs[[i]]) for i in samples]
        return row_norms(torch.cat(alone) - found.detach()[samples])

    return in_double(request, measure)


def gradients_in_double(request: Request, inputs: Inputs, v: Tensor, parts: list[list[int]]) -> dict[str, float] | None:
    """Find in float64 which gradients of samples in parts differ from those in one batch."""
    # v [N, *out]
    _, narrow = gradients(request, inputs, v)

    def measure(wide: Request) -> dict[str, float] | None:
        output, together = gradients(wide, inputs, v.double())
        if output.dtype != torch.float64 or not difference(narrow, together).within(KINKS):
            return None
        apart = in_parts(wide, inputs, parts, v.double()).gradient
        return differing(apart, together, GRADIENT_TOLERANCES[torch.float64])

    return in_double(request, measure)
