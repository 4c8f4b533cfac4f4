"""Gradients by plain autograd, which derivatives that are computed otherwise are compared with.

For numbers ``v``, one for each sample and output, they are those of ``sum v[n, c] f[n, c]``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.models.autograd_graph import dense
from ggn_ntk.models.evaluation import evaluate, leaves_of, other_shape
from ggn_ntk.problem.errors import UnsupportedModelError
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.transforms import batched_gradients

#: Makes of a gradient and its parameter what is compared: the gradient itself, or a sketch of it.
Form = Callable[[Tensor, Tensor], Tensor]


def whole(gradient: Tensor, param: Tensor) -> Tensor:
    """Keep a gradient as it is."""
    return gradient


class Parts(NamedTuple):
    """Outputs and gradients of samples that were evaluated in parts, mostly in two halves."""

    samples: list[list[int]]  # which samples are in each part
    outputs: Tensor  # the outputs of all samples ``[N, *out]``, in their order
    gradient: dict[str, Tensor]  # the form of the gradient of ``sum v f`` for each wanted parameter, by name


def gradients(
    request: Request,
    inputs: Inputs,
    v: Tensor,
    primals: dict[str, Tensor] | None = None,
    *,
    jitter: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evaluate a model, and differentiate ``sum v f``."""
    # v [N, *out]
    if request.widened and primals is None:
        primals = leaves_of(request)
    with torch.enable_grad():
        output = evaluate(request, primals, inputs, jitter=jitter)
    if output.shape != v.shape:
        raise UnsupportedModelError([other_shape(output, v.shape)])
    return output.detach(), gradients_of(output, v, request.params if primals is None else primals)


def gradients_of(
    output: Tensor, v: Tensor, params: dict[str, Tensor], *, retain_graph: bool = False, create_graph: bool = False
) -> dict[str, Tensor]:
    """Compute the gradient of ``sum v f`` with respect to parameters, by name."""
    if not (output.requires_grad and params):
        return {name: torch.zeros_like(p) for name, p in params.items()}
    found = torch.autograd.grad(
        output,
        list(params.values()),
        v,
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(p) if g is None else dense(g) if create_graph else dense(g).detach()
        for (name, p), g in zip(params.items(), found, strict=True)
    }


def in_parts(request: Request, inputs: Inputs, samples: list[list[int]], v: Tensor, form: Form = whole) -> Parts:
    """Evaluate and differentiate a model on samples in parts."""
    # v [N, *out]
    outputs, gradient = torch.empty_like(v), dict[str, Tensor]()
    for of_part in samples:
        chosen = torch.tensor(of_part, device=v.device)
        outputs[chosen], found = gradients(request, inputs[chosen], v[chosen])
        summand = {name: form(found.pop(name), p) for name, p in request.params.items()}
        gradient = {name: gradient[name] + g for name, g in summand.items()} if gradient else summand
    return Parts(samples, outputs, gradient)


def gradients_of_several(output: Tensor, vs: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gradients of ``sum v f`` for several ``v`` in one batched backward pass, by name."""
    # vs [K, N, *out] -> [K, *parameter]
    found: tuple[Tensor | None, ...] = (None,) * len(params)
    if output.requires_grad:
        found = batched_gradients(output, list(params.values()), vs, allow_unused=True)
    return {
        name: p.new_zeros(len(vs), *p.shape) if g is None else dense(g).detach()
        for (name, p), g in zip(params.items(), found, strict=True)
    }
