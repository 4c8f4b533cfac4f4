"""The model as a pure function of the wanted parameters and the inputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.models.inspection import in_low_precision, without_draws
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.errors import Problem, UnsupportedModelError
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import tree_map


def evaluate(
    request: Request,
    primals: dict[str, Tensor] | None,
    inputs: Inputs,
    *,
    inspect: bool = False,
    jitter: int | None = None,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """Evaluate the model as a pure function of the wanted parameters and the inputs."""
    # It starts from the state in which the model was found. The other parameters are constants, and buffers and inputs
    # are passed as copies, so that code that writes to them leaves the user's alone.
    # -> [N, *out]
    with isolated(request.model) as session:
        values: dict[int, Tensor] = {}
        if request.widened:
            values = {id(t): _widened(t.detach()) for t in (*request.model.parameters(), *request.model.buffers())}
        elif primals is not None:
            values = {id(p): p.detach().clone() if session.written else p.detach() for p in request.model.parameters()}
        if primals is not None:
            if jitter is not None:
                values = {key: _jittered(value, jitter) for key, value in values.items()}
            values |= {id(request.params[name]): value for name, value in primals.items()}

        def call(within: Callable[[], AbstractContextManager[None]] = nullcontext) -> Any:
            x = inputs.map(torch.clone if jitter is None else lambda t: _jittered(t, jitter))
            x = x.map(_widened) if request.widened else x
            with session.evaluation(values, inspect=inspect), within():
                result = request.model(*x.args, **x.kwargs)
                return result if request.output is None else request.output(result)

        def call_with_graph() -> Any:
            """Let a model differentiate something inside where no graph is wanted of it."""
            try:
                return call()
            except RuntimeError as error:
                if torch.is_grad_enabled() or "does not require grad" not in str(error):
                    raise
            with torch.enable_grad():
                return tree_map(lambda y: y.detach() if isinstance(y, Tensor) else y, call())

        if not inspect:
            return call(within) if within is not nullcontext else call_with_graph()
        result = without_draws(call, within)
        if not isinstance(result, Tensor):
            return result
        if session.low and result.dtype in TOLERANCES:
            raise UnsupportedModelError([in_low_precision(session.low)])
        if session.earlier and not session.earlier.isdisjoint(graph_nodes(result)):
            what = "it uses a tensor with a graph from an earlier call, which a module holds"
            raise UnsupportedModelError([Problem("", what, "Compute it in the forward pass, or detach() it")])
        return result


def runs_foreign_code(request: Request) -> bool:
    """Tell whether code that is not torch's own may run between x and the outputs."""
    with isolated(request.model) as session:
        return session.foreign or request.output is not None


def primals_of(request: Request) -> dict[str, Tensor]:
    """Give the wanted parameters as plain tensors without a graph: where derivatives are taken."""
    with isolated(request.model) as session:
        copy = _widened if request.widened else torch.clone if session.written else torch.Tensor.detach
        return {name: copy(p.detach()) for name, p in request.params.items()}


def leaves_of(request: Request, jitter: int | None = None) -> dict[str, Tensor]:
    """Copy the wanted parameters, to take derivatives at; changed in the last digit, as a seed decides."""
    copies = {name: (_widened(p) if request.widened else p).detach().clone() for name, p in request.params.items()}
    if jitter is not None:
        copies = {name: _jittered(copy, jitter) for name, copy in copies.items()}
    return {name: copy.requires_grad_() for name, copy in copies.items()}


def _widened(x: Tensor) -> Tensor:
    """Copy a tensor, real numbers in float64."""
    return x.to(torch.float64, copy=True) if x.is_floating_point() else x.clone()


def _jittered(x: Tensor, seed: int) -> Tensor:
    """Change each number by a unit in its last digit, up or down."""
    if not x.is_floating_point():
        return x.clone()
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, x.shape, generator=generator, device="cpu").to(x.device, x.dtype) * 2 - 1
    return x + x * signs * torch.finfo(x.dtype).eps
