"""The calls of layers, recorded in a forward pass, for any ``nn.Module`` whose samples do not interact.

Forward hooks record the input and output of each call of a layer that has a rule and wanted parameters; then autograd
passes all output basis vectors back to the recorded outputs (:mod:`ggn_ntk.jacobians.autograd`). The rest of the model
may be anything.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module

from ggn_ntk.jacobians.layer_call import LayerCall, Recording, kept, map_tensors, tensors_among
from ggn_ntk.jacobians.sample_axes import SampleAxes, axes_of_all, of_same_layer
from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.models.evaluation import evaluate, runs_foreign_code
from ggn_ntk.problem.errors import NotCapturedError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import has_global_hooks, parameters_of, version_of
from ggn_ntk.process.transforms import is_transformed
from ggn_ntk.rules.registry import Rule, rule_for


def record(request: Request, inputs: Inputs, one: Sequence[LayerCall] | Sequence[SampleAxes] = ()) -> Recording:
    """Evaluate the model, and record the calls of layers."""
    # Outputs that have the shape they have for one sample are the same for all, and are repeated for each.
    calls: list[LayerCall] = []
    n = len(inputs)

    def take(module: Module, rule: Rule, args: tuple[Any, ...], output: Tensor, params: dict[str, str]) -> Tensor:
        sources = tuple(get_gradient_edge(t).node for t in tensors_among(args) if t.requires_grad)
        args = map_tensors(kept, args)
        output = torch.ops.aten.alias(output)  # a node of the graph of its own, with the same strides
        versions = tuple((t, version_of(t)) for t in tensors_among(args) if t.is_floating_point())
        shape, alone = output.shape, of_same_layer(module, one, len(calls))
        repeated = n > 1 and alone is not None and alone.shape == shape
        if repeated:
            lead = axes_of_all(shape)
            args = map_tensors(lambda t: t.expand(n, *t.shape[lead:]), args)
            output = output.expand(n, *shape[lead:])
        edge = get_gradient_edge(output)
        axis = 0 if repeated else None
        place = edge, output.shape, output.stride()
        calls.append(LayerCall(module, rule, args, *place, params, sources, versions, repeated, axis))
        return output.clone()  # so that the recorded output stays as it is where others work in place

    try:
        with torch.enable_grad():
            result = evaluate(
                request, None, inputs, inspect=runs_foreign_code(request), within=partial(hooked, request, take)
            )
    except Exception as error:
        if any(call.repeated for call in calls) and not is_out_of_memory(error):
            raise NotCapturedError("an output that is the same for all samples cannot be repeated") from error
        raise
    return Recording(calls, result, inputs)


@contextmanager
def hooked(
    request: Request, take: Callable[[Module, Rule, tuple[Any, ...], Tensor, dict[str, str]], Tensor]
) -> Iterator[None]:
    """Call a function for each call of a layer that has a rule and wanted parameters."""
    names, thread = {id(p): name for name, p in request.params.items()}, threading.get_ident()
    handles = []
    try:
        # Hooks of all modules may change outputs before any hook of a module's own sees them.
        for module in () if has_global_hooks() else request.model.modules():
            params = module.named_parameters(remove_duplicate=False)
            wanted = {key: names[id(p)] for key, p in params if id(p) in names}
            rule = rule_for(module) if wanted and "forward" not in vars(module) else None
            if rule is not None:
                # In front of the user's hooks: what these make of the output is no longer the layer's.
                hook = partial(_hook, take, rule, wanted, _own_parameters(module), thread)
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_parameters(module: Module) -> list[tuple[dict[str, Any], str, Any]]:
    """List the parameters of a layer, with what holds each and its name there."""
    return [(parameters_of(m), key, p) for m in module.modules() for key, p in parameters_of(m).items()]


def _hook(
    take: Callable[..., Tensor],
    rule: Rule,
    params: dict[str, str],
    own: list[tuple[dict[str, Any], str, Any]],
    thread: int,
    module: Module,
    args: Any,
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """Pass a call on, if it is one of this thread's with the layer's own parameters, and no transform sees it."""
    first = output[0] if isinstance(output, tuple) else output
    if not (isinstance(first, Tensor) and first.requires_grad) or threading.get_ident() != thread or is_transformed():
        return output
    if any(store.get(key) is not param for store, key, param in own):
        return output
    passed = take(module, rule, _positional(module, args, kwargs), first, params)
    return (passed, *output[1:]) if isinstance(output, tuple) else passed


def _positional(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Bring a layer's arguments to the order of its signature."""
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    last = list(bound.arguments)[-1]
    bound.apply_defaults()
    given = list(bound.arguments)[: list(bound.arguments).index(last) + 1]
    return tuple(bound.arguments[name] for name in given)


def used_elsewhere(recording: Recording) -> set[int]:
    """Find the parameters that enter the output on a way that does not lead through a recorded call."""
    sources = {call.edge.node: call.sources for call in recording.calls}
    return {id(getattr(node, "variable", None)) for node in graph_nodes(recording.output, sources)}
