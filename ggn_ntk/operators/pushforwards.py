"""Ways to multiply the Jacobian of some samples by vectors of the parameters' shape, the fastest first.

``J u`` is the derivative of the outputs along ``u``. Forward mode computes it beside the outputs, for all vectors at
once. In reverse mode it takes two passes: ``J^T v`` is linear in ``v``, so that the derivative of ``u^T J^T v`` with
respect to ``v`` is ``J u``. Where neither goes through a model, Jacobians of single samples are formed. Torch has no
forward mode for all operations, and a wrong one for some: which way is taken, :mod:`ggn_ntk.operators.side` finds out.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.methods.sample_jacobians import jacobians_by_loop, jacobians_by_vmap
from ggn_ntk.models.evaluation import evaluate, leaves_of, primals_of
from ggn_ntk.models.gradients import gradients_of
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request

#: Several vectors of the parameters' shape, ``[K, *parameter]`` by the name of the parameter.
Vectors = dict[str, Tensor]

#: Multiplies the Jacobian of N samples by K vectors: ``[K, N, *out]``.
Pushforward = Callable[[Request, Inputs, Vectors], Tensor]


def forward_mode(request: Request, inputs: Inputs, vectors: Vectors) -> Tensor:
    """Multiply by all vectors at once, in forward mode."""
    primals = primals_of(request)

    def along(direction: dict[str, Tensor]) -> Tensor:
        slope: Tensor = jvp(lambda p: evaluate(request, p, inputs), (primals,), (direction,))[1]
        return slope

    products: Tensor = vmap(along)(vectors)
    return products


def double_backward(request: Request, inputs: Inputs, vectors: Vectors) -> Tensor:
    """Multiply by one vector after the other, by backward passes through a backward pass."""
    leaves = leaves_of(request) if request.widened else None
    with torch.enable_grad():
        output = evaluate(request, leaves, inputs)
        v = torch.zeros_like(output, requires_grad=True)
        gradient = gradients_of(output, v, leaves or request.params, create_graph=True)
    used = [name for name, g in gradient.items() if g.requires_grad]
    if not used:
        return v.detach().expand(_count(vectors), *v.shape)
    ends = [gradient[name] for name in used]
    rows = [
        torch.autograd.grad(ends, v, [vectors[name][k] for name in used], retain_graph=True)[0]
        for k in range(_count(vectors))
    ]
    return torch.stack(rows)


def _contraction(method: Callable[[Request, Inputs], Vectors], request: Request, inputs: Inputs, u: Vectors) -> Tensor:
    """Multiply Jacobians of single samples, which are formed a few at a time."""
    params = list(request.params.values())
    with torch.no_grad():
        shape = evaluate(request, None, inputs[:1]).shape[1:]
    of_sample = prod(shape) * sum(p.numel() * p.element_size() for p in params)
    size = MemoryBudget.of(params[0].device).jacobians // max(1, of_sample)
    parts = []
    for block in split(len(inputs), size):
        jacobians = method(request, inputs[block])  # [N, C, P]
        products = (torch.einsum("ncp,kp->knc", j, u[name].flatten(1)) for name, j in jacobians.items())
        parts.append(torch.stack([*products]).sum(0))
    return torch.cat(parts, 1).unflatten(2, shape) if shape else torch.cat(parts, 1).squeeze(2)


#: Each way by what it is called in a warning.
WAYS: dict[str, Pushforward] = {
    "forward mode": forward_mode,
    "double backward passes": double_backward,
    "Jacobians of each sample": partial(_contraction, jacobians_by_vmap),
    "a loop over samples and outputs": partial(_contraction, jacobians_by_loop),
}


def _count(vectors: Vectors) -> int:
    """Count vectors."""
    return len(next(iter(vectors.values())))
