"""Samples must leave one another alone: a Jacobian of one sample is otherwise not defined.

No sample is exempt. The output of each in the batch of all is compared with its output by itself: ``vmap`` maps the
model over samples, each alone, in the time of one pass; where it does not go through the model, samples are evaluated
one after the other. Values may be the same where gradients are not. So the gradient of ``sum v[n, c] f[n, c]``, with a
number ``v`` for each sample and output, is computed from the samples in two halves. A bit of each sample's number, in a
random numbering, says which half it is in; all bits together separate every pair of samples.

Rounding depends on how many samples there are, and may take a unit to the other side of a kink. What differs in float32
is looked at again in float64. Where the model does not compute in float64, small differences are looked at in batches
of one size, in which one half stays in its place and the rest is exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from ggn_ntk.models.comparison import (
    KINKS,
    SEEN,
    check_finite,
    cotangent,
    differing,
    gradient_tolerance,
    is_coarse,
    relative_error,
    row_norms,
    rows_differing,
)
from ggn_ntk.models.evaluation import SHAPE_REMEDY, check_output, evaluate, evaluate_checked
from ggn_ntk.models.gradients import Form, Parts, gradients, gradients_of, in_parts, whole
from ggn_ntk.models.inspection import UNSTEADY
from ggn_ntk.models.rounding import errors_in_double, gradients_in_double, rounding_of, rounding_of_outputs
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, is_out_of_memory, listed
from ggn_ntk.problem.request import Inputs, Request

# The share of a call's time that looking at halves may take beyond the first pair, and up to how many samples it is
# small in any case.
_SHARE, _FEW = 0.04, 8

# How many samples are evaluated one after the other where vmap fails, and how many of those that differ.
_ONE_BY_ONE, _LOOKED_AT = 256, 16

# A difference that shrinks to less than this share in a higher precision is rounding, and no interaction.
_LESS = 0.1

_REMEDY = (
    "Remove what mixes the leading axis, e.g. use batch_first=True, or eval(); mark inputs that all samples share with "
    "ggn_ntk.shared; or make each sample a call of its own; or pass interacting=True, if the whole batch is one input"
)


@dataclass(frozen=True, eq=False)
class Checked:
    """What is known of a model whose samples leave one another alone."""

    outputs: Tensor  # the outputs of samples that are evaluated together, ``[N, *out]``, without a graph
    v: Tensor  # a number for each of them
    gradient: dict[str, Tensor]  # the gradient of ``sum v f`` by plain autograd, by the name of the parameter
    tolerance: float  # the largest relative error of gradients that rounding makes


def check_samples(request: Request, shape: Size) -> Checked:
    """Raise unless samples leave one another alone that are evaluated together. Call it inside ``isolated``."""
    # shape [*out]
    inputs = request.inputs
    with torch.enable_grad():
        output = evaluate_checked(request, inputs, shape)
    v, tolerance = cotangent(output, seed=0), gradient_tolerance(output)
    gradient = gradients_of(output, v, request.params)
    check_finite(gradient.values())
    compare_alone(request, inputs, output)
    for samples in partitions(len(inputs), how_often(request, len(inputs), shape.numel())):
        halves = in_parts(request, inputs, samples, v)
        compare_outputs(request, inputs, output, range(len(inputs)), halves.outputs)
        compare_gradients(request, inputs, v, gradient, halves, tolerance)
    return Checked(output.detach(), v, gradient, tolerance)


def look(request: Request) -> Tensor:
    """Evaluate a few samples together and one of them by itself, to find the shape of an output before all are."""
    # -> [few, *out]
    stacked = request.inputs
    few = stacked[[*range(min(2, len(request.x1))), len(stacked) - 1]] if len(stacked) > 1 else stacked
    with torch.enable_grad():
        together = evaluate_checked(request, few)
        _check_alone(evaluate(request, None, few[:1]), together.shape[1:])
    return together.detach()


def _check_alone(output: object, shape: Size) -> Tensor:
    """Make sure that a model returns for one sample by itself what it returns for it in a batch."""
    # shape [*out] -> [1, *out]
    found = list(getattr(output, "shape", []))
    if found != [1, *shape]:
        what = (
            "its output for one sample alone has another shape than in a batch "
            f"(1 of the samples alone has shape {found}, not {[1, *shape]})"
        )
        raise UnsupportedModelError([Problem("", what, SHAPE_REMEDY)])
    return check_output(output, 1)


def partitions(n: int, count: int) -> list[list[list[int]]]:
    """Divide samples in two halves, several times."""
    numbers = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(n), device="cpu").tolist()
    bits = range(min(count, most_partitions(n)))
    return [[[i for i in range(n) if numbers[i] >> bit & 1 == side] for side in (0, 1)] for bit in bits]


def most_partitions(n: int) -> int:
    """Count the divisions of N samples in two halves after which any two were apart once."""
    return (n - 1).bit_length()


def how_often(request: Request, n: int, outputs: int) -> int:
    """Choose how many times samples are divided."""
    # A kernel takes a backward pass for each output at least, and a pass in halves as long as three forward passes: the
    # number of outputs tells their share of the time.
    most = most_partitions(n)
    return most if request.thorough or n <= _FEW else min(most, max(1, int(_SHARE * outputs / 3)))


def compare_alone(request: Request, inputs: Inputs, output: Tensor) -> None:
    """Compare the output of each sample in the batch of all with that by itself."""
    # output [N, *out]
    n, mapped = len(inputs), _mapped(request, inputs, output.shape)
    if mapped is None:
        drawn = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(n), device="cpu").tolist()
        chosen = sorted(drawn if request.thorough else drawn[:_ONE_BY_ONE])
    else:
        # vmap itself may be wrong: samples at which it differs are evaluated without it.
        chosen = rows_differing(mapped, output.detach(), gradient_tolerance(output)).nonzero().flatten().tolist()
        chosen = chosen[:_ONE_BY_ONE]
    if chosen:
        with torch.no_grad():
            alone = [_check_alone(evaluate(request, None, inputs[[i]]), output.shape[1:]) for i in chosen]
        compare_outputs(request, inputs, output, chosen, torch.cat(alone))


def _mapped(request: Request, inputs: Inputs, shape: Size) -> Tensor | None:
    """Map the model over samples, each by itself; ``None`` where ``vmap`` does not go through it."""
    try:
        with torch.no_grad():
            outputs = inputs.over_samples(lambda x: evaluate(request, None, x.map(lambda t: t.unsqueeze(0))))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    fits = isinstance(outputs, Tensor) and outputs.shape == (shape[0], 1, *shape[1:])
    return torch.squeeze(outputs, 1) if fits else None


def compare_outputs(request: Request, inputs: Inputs, output: Tensor, chosen: Sequence[int], others: Tensor) -> None:
    """Compare outputs of samples in the batch of all with those in other batches."""
    # output [N, *out], others [len(chosen), *out]
    tolerance, output = gradient_tolerance(output), output.detach()
    differ = rows_differing(others, output[chosen], tolerance)
    if not differ.any():
        return
    with torch.no_grad():
        if rows_differing(evaluate(request, None, inputs), output, tolerance).any():
            raise UnsupportedModelError([UNSTEADY])
    places = differ.nonzero().flatten()
    error, suspects = row_norms(others - output[chosen])[places], [chosen[i] for i in places.tolist()]
    # Is it rounding? float64 tells for sure; jitter tells of the bulk of the numbers, but not of single kinks.
    in_double = errors_in_double(request, inputs, output, suspects[:_LOOKED_AT]) if is_coarse(tolerance) else None
    if in_double is None:
        explained = error <= SEEN * rounding_of_outputs(request, inputs)[suspects]
    else:
        explained = in_double <= _LESS * error[: len(in_double)]
    places = places[: len(explained)][~explained]
    suspects = [chosen[i] for i in places.tolist()]
    if not suspects:
        return
    size = relative_error(others[places], output[suspects])
    if in_double is None and _by_kinks(tolerance, size):
        with torch.no_grad():
            if not _depend_on_others(request, inputs, output, suspects, tolerance):
                return
    raise UnsupportedModelError([interaction(request, suspects, size)])


def _by_kinks(tolerance: float, size: float) -> bool:
    """Tell whether rounding can make a difference of this size, by taking few of many units past a kink or a step."""
    return is_coarse(tolerance) and size <= KINKS


def _depend_on_others(request: Request, inputs: Inputs, output: Tensor, samples: list[int], tolerance: float) -> bool:
    """Tell whether outputs of samples change where, in a batch of the same size, others are exchanged."""
    # output [N, *out]
    n, kept = len(inputs), set(samples[: (len(inputs) + 1) // 2])
    rest = [i for i in range(n) if i not in kept]
    for fill in ([*kept], *([i] for i in rest[:3])):
        found = evaluate(request, None, inputs[_exchanged(n, kept, fill)])
        if rows_differing(found, output, tolerance)[list(kept)].any():
            return True
    return False


def _exchanged(n: int, kept: set[int], fill: list[int]) -> list[int]:
    """Leave some of N samples in their place, and put copies of others in all other places."""
    return [i if i in kept else fill[i % len(fill)] for i in range(n)]


def compare_gradients(
    request: Request,
    inputs: Inputs,
    v: Tensor,
    expected: dict[str, Tensor],
    parts: Parts,
    tolerance: float,
    form: Form = whole,
) -> None:
    """Compare the gradient of samples in the batch of all with that in parts."""
    # v [N, *out]
    differ = differing(parts.gradient, expected, tolerance, rounding_of(request, inputs, v, form))
    if not differ:
        return
    in_double = gradients_in_double(request, inputs, v, parts.samples) if is_coarse(tolerance) else None
    if in_double is not None and all(in_double.get(name, 0.0) <= _LESS * error for name, error in differ.items()):
        return
    for half in parts.samples[:_LOOKED_AT]:
        # The gradient of this half's outputs, beside the other samples and beside copies of its own in their place.
        of_half = torch.zeros_like(v)
        of_half[half] = v[half]
        _, among_others = gradients(request, inputs, of_half)
        _, among_copies = gradients(request, inputs[_exchanged(len(v), set(half), half)], of_half)
        if differing(among_copies, among_others, tolerance, rounding_of(request, inputs, of_half)):
            raise UnsupportedModelError([interaction(request, half, max(differ.values()), gradient=True)])
    if in_double is not None or not _by_kinks(tolerance, max(differ.values())):
        raise UnsupportedModelError([interaction(request, range(len(v)), max(differ.values()), gradient=True)])


def interaction(request: Request, samples: Sequence[int], error: float, *, gradient: bool = False) -> Problem:
    """Say that samples influence one another, which and by how much."""
    names = listed(request.label(sample) for sample in samples)
    whose = f"gradients of some of {names}" if gradient else f"outputs of {names}"
    what = f"samples influence one another (the {whose} change by {error:.1e} with the rest of the batch)"
    return Problem("", what, _REMEDY)
