"""Samples must leave one another alone: a Jacobian of one sample is otherwise not defined.

No sample is exempt. The output of each in the batch of all is compared with what it is by itself: ``vmap`` maps the
model over samples, each alone, in the time of one pass; where it does not go through the model, samples are evaluated
one after the other. Values may be the same where gradients are not. So the gradient of ``sum v[n, c] f[n, c]``, with a
number ``v`` for each sample and output, is computed from the samples in two halves. The halves are given by a bit of a
random numbering; all its bits together separate every pair of samples.

Rounding depends on how many samples there are, and may take a unit to the other side of a kink. What differs in float32
is looked at again in float64; where the model does not compute in that, and differs by little, in batches of one size,
where one half is kept in its place and the rest is exchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.func import vmap

from ggn_ntk.memory.budget import resolve_axes
from ggn_ntk.models.autograd_graph import dense, precisions
from ggn_ntk.models.comparison import (
    KINKS,
    PROBE_TOLERANCES,
    SEEN,
    TOLERANCES,
    all_finite,
    cotangent,
    differing,
    norms,
    relative_error,
    rows_differing,
    total_norm,
)
from ggn_ntk.models.evaluation import evaluate, leaves_of, runs_foreign_code
from ggn_ntk.models.inspection import UNSTEADY, in_low_precision
from ggn_ntk.problem.errors import NotFiniteError, Problem, UnsupportedModelError, is_out_of_memory, listed
from ggn_ntk.problem.output_axes import OutputAxes
from ggn_ntk.problem.request import Inputs, Request

# The share of a call's time that looking at halves may take beyond the first pair, and up to how many samples it is
# small in any case.
_SHARE, _FEW = 0.04, 8

# How many samples are evaluated one after the other where vmap fails, and how many of those that differ.
_ONE_BY_ONE, _LOOKED_AT = 256, 16

# What is less than this share of a difference, in a higher precision, is no interaction but rounding.
_LESS = 0.1

_REMEDY = (
    "Remove what mixes the leading axis, e.g. use batch_first=True, or eval(); or make each sample a call of its own"
)
_SHAPE_REMEDY = "Keep the sample axis also for a single sample (say squeeze(-1), not squeeze())"


#: Makes something of the gradient with respect to a parameter; takes both.
Form = Callable[[Tensor, Tensor], Tensor]


def _whole(gradient: Tensor, param: Tensor) -> Tensor:
    """Keep a gradient as it is."""
    return gradient


class Parts(NamedTuple):
    """Samples in parts, of which there are two mostly: their outputs and gradients."""

    samples: list[list[int]]  # which samples are in each part
    outputs: Tensor  # the outputs of all samples ``[N, *out]``, in their order
    gradient: dict[str, Tensor]  # what is made of the gradient of ``sum v f`` for each wanted parameter, by name


def partitions(n: int, count: int) -> list[list[list[int]]]:
    """Divide samples in two halves, several times."""
    numbers = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(n), device="cpu").tolist()
    bits = range(min(count, (n - 1).bit_length()))
    return [[[i for i in range(n) if numbers[i] >> bit & 1 == side] for side in (0, 1)] for bit in bits]


def how_often(request: Request, n: int, outputs: int) -> int:
    """Choose how many times samples are divided."""
    # A kernel takes a way back for each output at least, and a pass in halves as long as three passes forward, so its
    # share in the time is known from the number of outputs.
    return n if request.thorough or n <= _FEW else max(1, int(_SHARE * outputs / 3))


def check_output(output: object, n: int) -> Tensor:
    """Make sure that a model returns something to differentiate, for each sample."""
    # -> [N, *out]
    problem = None
    if not isinstance(output, Tensor):
        remedy = "Pass output=, a function that picks the tensor [N, ...] to differentiate"
        problem = Problem("", f"it returns {type(output).__name__}, not a tensor", remedy)
    elif output.ndim == 0 or len(output) != n or output.numel() == 0:
        what = f"its output for {n} sample{'s' * (n > 1)} has shape {list(output.shape)}"
        problem = Problem("", what, "Its leading axis must be the samples, and it must not be empty")
    elif output.dtype not in TOLERANCES:
        problem = Problem("", f"its output is {output.dtype}", "Outputs must be float32 or float64")
    elif lower := precisions(output) - TOLERANCES.keys():
        problem = in_low_precision(lower)
    if problem is not None:
        raise UnsupportedModelError([problem])
    assert isinstance(output, Tensor)
    return output


def probe_tolerance(output: Tensor) -> float:
    """Choose the tolerance of gradients: that of the lowest precision which takes part in the output's graph."""
    # Normalisation layers of Hugging Face's convert to float32 inside, also where all parameters are in float64.
    return max(PROBE_TOLERANCES[dtype] for dtype in precisions(output))


def gradients(
    request: Request,
    inputs: Inputs,
    v: Tensor,
    primals: dict[str, Tensor] | None = None,
    *,
    jitter: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a gradient with plain autograd."""
    # v [N, *out]
    if request.widened and primals is None:
        primals = leaves_of(request)
    with torch.enable_grad():
        output = evaluate(request, primals, inputs, jitter=jitter)
    if output.shape != v.shape:
        what = f"its output for {len(v)} of the samples has shape {list(output.shape)}, not {list(v.shape)}"
        raise UnsupportedModelError([Problem("", what, _SHAPE_REMEDY)])
    return output.detach(), gradients_of(output, v, request.params if primals is None else primals)


def gradients_of(
    output: Tensor, v: Tensor, params: dict[str, Tensor], *, retain_graph: bool = False
) -> dict[str, Tensor]:
    """Compute the gradient of ``sum v f`` with respect to parameters, by name."""
    if not (output.requires_grad and params):
        return {name: torch.zeros_like(p) for name, p in params.items()}
    found = torch.autograd.grad(output, list(params.values()), v, retain_graph=retain_graph, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else dense(g).detach()
        for (name, p), g in zip(params.items(), found, strict=True)
    }


def in_parts(request: Request, inputs: Inputs, samples: list[list[int]], v: Tensor, form: Form = _whole) -> Parts:
    """Evaluate and differentiate a model on samples in parts."""
    # v [N, *out]
    outputs, gradient = torch.empty_like(v), dict[str, Tensor]()
    for of_part in samples:
        chosen = torch.tensor(of_part, device=v.device)
        outputs[chosen], found = gradients(request, inputs[chosen], v[chosen])
        summand = {name: form(found.pop(name), p) for name, p in request.params.items()}
        gradient = {name: gradient[name] + g for name, g in summand.items()} if gradient else summand
    return Parts(samples, outputs, gradient)


def compare_alone(request: Request, inputs: Inputs, output: Tensor) -> None:
    """Compare the output of each sample in the batch of all with that by itself."""
    # output [N, *out]
    n, mapped = len(inputs), _mapped(request, inputs, output.shape)
    if mapped is None:
        drawn = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(n), device="cpu").tolist()
        chosen = sorted(drawn if request.thorough else drawn[:_ONE_BY_ONE])
    else:  # vmap itself may be wrong
        chosen = rows_differing(mapped, output.detach(), probe_tolerance(output)).nonzero().flatten().tolist()
        chosen = chosen[:_ONE_BY_ONE]
    if chosen:
        with torch.no_grad():
            alone = [check_shape(evaluate(request, None, inputs[[i]]), 1, output.shape[1:]) for i in chosen]
        compare_outputs(request, inputs, output, chosen, torch.cat(alone))


def _mapped(request: Request, inputs: Inputs, shape: Size) -> Tensor | None:
    """Map the model over samples, each by itself; ``None`` where ``vmap`` does not go through it."""

    def evaluate_one(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        return evaluate(request, None, Inputs(args, kwargs).map(lambda x: x.unsqueeze(0)))

    try:
        with torch.no_grad():
            outputs = vmap(evaluate_one)(inputs.args, inputs.kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    fits = isinstance(outputs, Tensor) and outputs.shape == (shape[0], 1, *shape[1:])
    return torch.squeeze(outputs, 1) if fits else None


def compare_outputs(request: Request, inputs: Inputs, output: Tensor, chosen: Sequence[int], others: Tensor) -> None:
    """Compare outputs of samples in the batch of all with those in other batches."""
    # output [N, *out], others [len(chosen), *out]
    tolerance, output = probe_tolerance(output), output.detach()
    differ = rows_differing(others, output[chosen], tolerance)
    if not differ.any():
        return
    with torch.no_grad():
        if rows_differing(evaluate(request, None, inputs), output, tolerance).any():
            raise UnsupportedModelError([UNSTEADY])
    places = differ.nonzero().flatten()
    error, suspects = _row_norms(others - output[chosen])[places], [chosen[i] for i in places.tolist()]
    coarse = tolerance >= PROBE_TOLERANCES[torch.float32]
    in_double = _errors_in_double(request, inputs, output, suspects) if coarse else None
    if in_double is None:
        explained = error <= SEEN * _rounding_of_outputs(request, inputs)[suspects]
    else:
        explained = in_double <= _LESS * error[: len(in_double)]
    places = places[: len(explained)][~explained]
    suspects = [chosen[i] for i in places.tolist()]
    if not suspects:
        return
    size = relative_error(others[places], output[suspects])
    if in_double is None and _by_rounding(tolerance, size):
        with torch.no_grad():
            if not _depend_on_others(request, inputs, output, suspects, tolerance):
                return
    raise UnsupportedModelError([interaction(request, suspects, size)])


def _rounding_of_outputs(request: Request, inputs: Inputs) -> Tensor:
    """Measure ``[N]`` by how much outputs move with the last digit of inputs and parameters."""
    with torch.no_grad():
        jittered = [evaluate(request, leaves_of(request, jitter), inputs, jitter=jitter) for jitter in (None, 0, 1, 2)]
    return torch.stack([_row_norms(x - jittered[0]) for x in jittered[1:]]).amax(0)


def _errors_in_double(request: Request, inputs: Inputs, output: Tensor, samples: list[int]) -> Tensor | None:
    """Measure in float64 how far outputs of some samples by themselves are from those in the batch of all."""
    # Rounding is then far smaller, and what samples do to one another is the same.
    wide, samples = replace(request, widened=True), samples[:_LOOKED_AT]
    try:
        with torch.enable_grad():
            found = evaluate(wide, None, inputs)
        if precisions(found) != {torch.float64} or not relative_error(output, found.detach()) <= KINKS:
            return None
        with torch.no_grad():
            alone = [evaluate(wide, None, inputs[[i]]) for i in samples]
        return _row_norms(torch.cat(alone) - found.detach()[samples])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def _gradients_in_double(
    request: Request, inputs: Inputs, v: Tensor, parts: list[list[int]]
) -> dict[str, float] | None:
    """Measure in float64 how far a gradient of samples in parts is from that in one batch."""
    _, narrow = gradients(request, inputs, v)
    wide, v = replace(request, widened=True), v.double()
    try:
        output, together = gradients(wide, inputs, v)
        error = total_norm(narrow[name] - g for name, g in together.items())
        if output.dtype != torch.float64 or not error <= KINKS * total_norm(together.values()):
            return None
        apart = in_parts(wide, inputs, parts, v).gradient
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    return differing(apart, together, PROBE_TOLERANCES[torch.float64])


def _row_norms(x: Tensor) -> Tensor:
    """Compute the norm of each sample's numbers."""
    norms_of_rows: Tensor = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
    return norms_of_rows


def _by_rounding(tolerance: float, size: float) -> bool:
    """Tell whether rounding can make a difference of this size, by taking few of many units past a kink or a step."""
    return tolerance >= PROBE_TOLERANCES[torch.float32] and size <= KINKS


def _depend_on_others(request: Request, inputs: Inputs, output: Tensor, samples: list[int], tolerance: float) -> bool:
    """Tell whether outputs of samples change where, in a batch of the same size, others are exchanged."""
    n, kept = len(inputs), set(samples[: (len(inputs) + 1) // 2])
    rest = [i for i in range(n) if i not in kept]
    for fill in ([*kept], *([i] for i in rest[:3])):
        exchanged = [i if i in kept else fill[i % len(fill)] for i in range(n)]
        found = evaluate(request, None, inputs[exchanged])
        if rows_differing(found, output, tolerance)[list(kept)].any():
            return True
    return False


def compare_gradients(
    request: Request,
    inputs: Inputs,
    v: Tensor,
    expected: dict[str, Tensor],
    parts: Parts,
    tolerance: float,
    form: Form = _whole,
) -> None:
    """Compare the gradient of samples in the batch of all with that in parts."""
    differ = differing(parts.gradient, expected, tolerance, rounding_of(request, inputs, v, form))
    if not differ:
        return
    coarse = tolerance >= PROBE_TOLERANCES[torch.float32]
    in_double = _gradients_in_double(request, inputs, v, parts.samples) if coarse else None
    if in_double is not None and all(in_double.get(name, 0.0) <= _LESS * error for name, error in differ.items()):
        return
    for half in parts.samples[:_LOOKED_AT]:
        of_half = torch.zeros_like(v)
        of_half[half] = v[half]
        kept = set(half)
        exchanged = [i if i in kept else half[i % len(half)] for i in range(len(v))]
        _, among_others = gradients(request, inputs, of_half)
        _, among_copies = gradients(request, inputs[exchanged], of_half)
        if differing(among_copies, among_others, tolerance, rounding_of(request, inputs, of_half)):
            raise UnsupportedModelError([interaction(request, half, max(differ.values()), gradient=True)])
    if in_double is not None or not _by_rounding(tolerance, max(differ.values())):
        raise UnsupportedModelError([interaction(request, range(len(v)), max(differ.values()), gradient=True)])


def rounding_of(
    request: Request,
    inputs: Inputs,
    v: Tensor,
    form: Form = _whole,
) -> Callable[[], dict[str, float]]:
    """Measure what rounding does to a gradient: by how much it moves with the last digit of inputs and parameters."""

    def measure() -> dict[str, float]:
        # All with exchanged parameters, which do not reach a model that keeps references to its own elsewhere.
        (_, before), (_, again) = (gradients(request, inputs, v, leaves_of(request)) for _ in range(2))
        if differing(again, before, PROBE_TOLERANCES[v.dtype]):
            raise UnsupportedModelError([UNSTEADY])
        _, after = gradients(request, inputs, v, leaves_of(request, jitter=0), jitter=0)
        moved = norms(form(after[name], p) - form(before[name], p) for name, p in request.params.items())
        # A gradient may be zero, or what is left where far larger ones cancel: those of the parameters around it.
        others = request.of_all_parameters()
        _, around = gradients(others, inputs, v, leaves_of(others))
        least = torch.finfo(v.dtype).eps * total_norm(around.values())
        return {name: max(size, least) for name, size in zip(request.params, moved, strict=True)}

    return measure


def interaction(request: Request, samples: Sequence[int], error: float, *, gradient: bool = False) -> Problem:
    """Say that samples influence one another, which and by how much."""
    names = listed(request.label(sample) for sample in samples)
    whose = f"gradients of some of {names}" if gradient else f"outputs of {names}"
    what = f"samples influence one another (the {whose} change by {error:.1e} with the rest of the batch)"
    return Problem("", what, _REMEDY)


@dataclass(frozen=True, eq=False)
class Checked:
    """What was found of a model whose samples leave one another alone."""

    axes: OutputAxes  # the role of each output axis
    outputs: Tensor  # the outputs of all samples ``[N1 + N2, *out]``, x2's behind x1's, without a graph
    v: Tensor  # A number for each of them
    gradient: dict[str, Tensor]  # the gradient of ``sum v f`` by plain autograd, by the name of the parameter
    tolerance: float  # the largest relative error of gradients that rounding makes


def check_samples(request: Request) -> Checked:
    """Raise unless samples leave one another alone. Call it inside ``isolated(request.model)``."""
    shape = look(request)
    axes, inputs = resolve_axes(request, shape), request.x1.stack(request.x2)
    with torch.enable_grad():
        output = check_shape(evaluate(request, None, inputs, inspect=runs_foreign_code(request)), len(inputs), shape)
    v = cotangent(output, seed=0)
    gradient = gradients_of(output, v, request.params)
    if not all_finite(gradient.values()):
        raise NotFiniteError
    compare_alone(request, inputs, output)
    for samples in partitions(len(inputs), how_often(request, len(inputs), shape.numel())):
        halves = in_parts(request, inputs, samples, v)
        compare_outputs(request, inputs, output, range(len(inputs)), halves.outputs)
        compare_gradients(request, inputs, v, gradient, halves, probe_tolerance(output))
    return Checked(axes, output.detach(), v, gradient, probe_tolerance(output))


def look(request: Request) -> Size:
    """Evaluate a few samples together, and one of them by itself."""
    # -> [*out]
    stacked = request.x1.stack(request.x2)
    few = stacked[[*range(min(2, len(request.x1))), len(stacked) - 1]] if len(stacked) > 1 else stacked
    with torch.enable_grad():
        together = check_output(evaluate(request, None, few, inspect=runs_foreign_code(request)), len(few))
        alone = evaluate(request, None, few[:1])
    shape = list(getattr(alone, "shape", []))
    if shape != [1, *together.shape[1:]]:
        what = (
            "its output for one sample alone has another shape than in a batch "
            f"(1 of the samples alone has shape {shape}, not {[1, *together.shape[1:]]})"
        )
        raise UnsupportedModelError([Problem("", what, _SHAPE_REMEDY)])
    return together.shape[1:]


def check_shape(output: object, n: int, shape: Size) -> Tensor:
    """Make sure that a model returns for some samples what it returns for others."""
    # shape [*out]
    output = check_output(output, n)
    if output.shape[1:] != shape:
        what = f"its output for {n} of the samples has shape {list(output.shape)}, not {[n, *shape]}"
        raise UnsupportedModelError([Problem("", what, _SHAPE_REMEDY)])
    return output
