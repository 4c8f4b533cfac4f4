"""Derivatives of kernels, compared with differences of gradients.

Second derivatives are not right everywhere: those of torch are wrong for weight normalisation, those of ``torch.func``
for normalisation layers. For numbers a and b, ``a^T Theta b`` is the product of the gradients of ``sum a f(x1)`` and
``sum b f(x2)``. Its slope along a random direction is compared with a central difference, in float64 where the model
computes in that.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ggn_ntk.models.comparison import Difference, cotangent
from ggn_ntk.models.evaluation import leaves_of
from ggn_ntk.models.gradients import gradients, gradients_of
from ggn_ntk.models.independence import Checked
from ggn_ntk.models.rounding import finest
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request

#: Computes the Jacobians ``[N, C, P]`` of some samples, by name.
Method = Callable[[Request, Inputs], dict[str, Tensor]]

# Kinks that a difference crosses spoil it: along how many directions it is taken at most.
_DIRECTIONS = 3

# By how much slopes may be off, relative to their usual size, in float64 and in lower precisions.
_FINE, _COARSE = 1e-4, 1e-1


def check_derivatives(request: Request, jacobians: Method, checked: Checked) -> None:
    """Raise unless the derivatives of kernels are right."""
    try:
        right, why = have_right_derivatives(request, jacobians, checked), "they differ from differences of gradients"
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        right, why = False, f"{type(error).__name__}: {error}".splitlines()[0]
    if not right:
        what = f"autograd does not get its second derivatives right, which those of kernels are made of ({why})"
        raise UnsupportedModelError([Problem("", what, "Write it with other operations, or leave create_graph out")])


def have_right_derivatives(request: Request, jacobians: Method, checked: Checked) -> bool:
    """Tell whether kernels made of Jacobians have the right derivatives with respect to parameters and inputs."""
    everything = request.of_all_parameters()
    params, sets = leaves_of(everything), [_as_leaves(x) for x in request.sets]
    attached = replace(request, graph={id(everything.params[name]): leaf for name, leaf in params.items()})
    product = _inner(
        {name: v.flatten().to(j) @ j.flatten(0, 1) for name, j in jacobians(attached, x).items()}
        for x, v in zip(sets, _numbers(request, checked), strict=True)
    )
    ends = params | {_key(i, label): x for i, inputs in enumerate(sets) for label, x in inputs.with_graphs().items()}
    slopes = {end: g.double() for end, g in gradients_of(product, torch.ones_like(product), ends).items()}
    finer, _ = finest(request)
    tolerance = max(_FINE if finer.widened else _COARSE, math.sqrt(checked.tolerance))
    for attempt in range(_DIRECTIONS):
        steps = {end: _step(x.detach(), attempt * len(ends) + i) for i, (end, x) in enumerate(ends.items())}
        terms = torch.stack([(slopes[end] * step).sum() for end, step in steps.items()])
        sizes = torch.stack([(slopes[end] * step).square().sum() for end, step in steps.items()])
        error = terms.sum() - _difference(finer, steps, checked)
        if Difference(error.abs().item(), sizes.sum().sqrt().item()).within(tolerance):
            return True
    return False


def _key(number: int, label: str) -> str:
    """Name an input of x1 (0) or x2 (1) beside parameters."""
    return f"x{number + 1}: {label}"


def _numbers(request: Request, checked: Checked) -> tuple[Tensor, ...]:
    """List the numbers a and b, one for each sample and output."""
    found: tuple[Tensor, ...] = checked.v.split(request.sizes)
    return found


def _as_leaves(x: Inputs) -> Inputs:
    """Let all real numbers in inputs be differentiated."""
    return x.each(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))


def _inner(gradients: Iterable[dict[str, Tensor]]) -> Tensor:
    """Multiply the gradients of x1 by those of x2, or of x1."""
    found = list(gradients)
    first, second = found[0], found[-1]
    return torch.stack([(g.flatten() * second[name].flatten()).sum() for name, g in first.items()]).sum()


def _step(x: Tensor, seed: int) -> Tensor:
    """Draw a step, of a size that is usual for the numbers in a tensor, in float64."""
    size = x.double().square().mean().sqrt()
    return cotangent(x, seed).double() * torch.where(size > 0, size, torch.ones_like(size))


def _difference(request: Request, steps: dict[str, Tensor], checked: Checked) -> Tensor:
    """Take the central difference of the product of gradients along some steps."""
    everything, dtype = request.of_all_parameters(), torch.float64 if request.widened else checked.v.dtype
    small = math.sqrt(torch.finfo(dtype).eps)

    def at(t: float) -> Tensor:
        def moved(x: Tensor, end: str) -> Tensor:
            x = x.double() if request.widened else x
            return x + (t * steps[end]).to(x)

        params = {name: moved(p.detach(), name).requires_grad_() for name, p in everything.params.items()}
        found = []
        for i, (x, v) in enumerate(zip(request.sets, _numbers(request, checked), strict=True)):
            real = {label: t for label, t in (x.tensors | x.constants).items() if _key(i, label) in steps}
            inputs = x.exchanged({label: moved(x, _key(i, label)) for label, x in real.items()})
            found.append(gradients(everything, inputs, v.to(dtype), params)[1])
        return _inner({name: g[name] for name in request.params} for g in found)

    return (at(small) - at(-small)).double() / (2 * small)
