"""A forward pass in a graph, and the calls of layers that are taken as a whole.

Where parameters are used shows in the graph (:mod:`ggn_ntk.jacobians.finding`), but not how a rule of the user's sees a
layer: forward hooks record the input and output of each of its calls. Of a Sequential model's layers, whose rules are
tried before they are used, they record all that have a rule.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module

from ggn_ntk.jacobians.layer_call import LayerCall, Recording, kept, map_tensors, tensors_among
from ggn_ntk.models.evaluation import evaluate, runs_foreign_code
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import has_global_hooks, parameters_of, version_of
from ggn_ntk.process.transforms import is_transformed
from ggn_ntk.rules.registry import Rule, rule_for, users_rule_for


def record(
    request: Request,
    inputs: Inputs,
    *,
    every: bool = False,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Recording:
    """Evaluate the model, and record the calls of layers with a rule of the user's, or of ``every`` one with a rule."""
    calls: list[LayerCall] = []

    def take(module: Module, rule: Rule, args: tuple[Any, ...], output: Tensor, params: dict[str, str]) -> Tensor:
        sources = tuple(get_gradient_edge(t).node for t in tensors_among(args) if t.requires_grad)
        args = map_tensors(kept, args)
        output = torch.ops.aten.alias(output)  # a node of the graph of its own
        versions = tuple((t, version_of(t)) for t in tensors_among(args) if t.is_floating_point())
        calls.append(LayerCall(module, rule, args, get_gradient_edge(output), output.shape, params, sources, versions))
        return output.clone()  # so that the recorded output stays as it is where others work in place

    @contextmanager
    def recorded() -> Iterator[None]:
        with within(), hooked(request, take, every=every):
            yield

    with torch.enable_grad():
        result = evaluate(request, None, inputs, inspect=runs_foreign_code(request), within=recorded)
        if isinstance(result, Tensor) and result.is_floating_point() and not result.requires_grad:
            result = result.clone().requires_grad_()  # of no parameter: a graph all the same
    return Recording(calls, result, inputs)


@contextmanager
def hooked(
    request: Request, take: Callable[[Module, Rule, tuple[Any, ...], Tensor, dict[str, str]], Tensor], *, every: bool
) -> Iterator[None]:
    """Call a function for each call of a layer that has a rule and wanted parameters."""
    names, thread = {id(p): name for name, p in request.params.items()}, threading.get_ident()
    find, handles = rule_for if every else users_rule_for, []
    try:
        # Hooks of all modules may change outputs before any hook of a module's own sees them.
        for module in () if has_global_hooks() else request.model.modules():
            rule = find(module) if "forward" not in vars(module) else None
            params = module.named_parameters(remove_duplicate=False) if rule is not None else ()
            wanted = {key: names[id(p)] for key, p in params if id(p) in names}
            if rule is not None and wanted:
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
