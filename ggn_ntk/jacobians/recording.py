"""Capture by autograd: the calls of layers, for any ``nn.Module`` whose samples do not interact.

Forward hooks record the input and output of each call of a layer that has a rule and wanted parameters; then autograd
passes all output basis vectors back to the recorded outputs (:mod:`ggn_ntk.jacobians.autograd`). The rest of the model
may be anything.

A layer's leading axis need not hold the samples. Their axis is the one that grows from one sample to several: in
front, further back (sequence first), or in front with several rows for each sample (windows). An output that does not
grow is the same for all samples (position embeddings), and is repeated for each. Whether this holds for all samples,
and whether the rules are right, is for :mod:`ggn_ntk.jacobians.verification` to find out.
"""

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.models.evaluation import evaluate, runs_foreign_code
from ggn_ntk.models.isolation import has_global_hooks
from ggn_ntk.problem.errors import NotCapturedError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.transforms import is_transformed
from ggn_ntk.rules import Rule, inner_of, rule_for

# The node of a graph that transposes a weight.
_TRANSPOSED = "TBackward0"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer that has a rule."""

    module: Module  # the layer
    rule: Rule  # its rule
    args: tuple[Any, ...]  # its arguments; once the samples are found, they are in front
    edge: GradientEdge  # where its output is in the graph of the model's output
    shape: Size  # shape of its output
    strides: tuple[int, ...]  # how its output lies in memory
    params: dict[str, str]  # its wanted parameters: their names on the layer, and those users know them by
    sources: tuple[Node, ...]  # nodes of the graph that its inputs come from
    # The arguments that were not copied, and how often each had been written to
    versions: tuple[tuple[Tensor, int], ...] = ()
    repeated: bool = False  # whether its output was the same for all samples, and repeated for each
    axis: int | None = None  # the axis of the samples in the output; ``None`` where it is not known
    rows: int = 1  # how many entries of that axis, one behind the other, belong to a sample

    def at(self, edge: GradientEdge, shape: Size, strides: tuple[int, ...]) -> "Call":
        """Move its output to another place in the graph."""
        return replace(self, edge=edge, shape=shape, strides=strides)

    @property
    def x(self) -> Any:
        """Its input; a tuple where it took several arguments."""
        return self.args[0] if len(self.args) == 1 else self.args

    def jacobians(self, s: Tensor) -> dict[str, Factored]:
        """Write the Jacobians of the layer's wanted parameters."""
        # s [C, *output]
        if any(tensor._version != version for tensor, version in self.versions):
            raise NotCapturedError("an argument of a call of its layer was changed in place later")
        if self.axis is None:
            raise NotCapturedError(f"samples are not told apart in an output {list(self.shape)} of its layer")
        factored = self.rule(self.module, self.x, s.movedim(1 + self.axis, 1))
        return {name: factored[key].split_samples(self.rows) for key, name in self.params.items() if key in factored}


@dataclass(frozen=True, eq=False)
class Recording:
    """A forward pass."""

    calls: list[Call]  # the calls of layers that have rules and wanted parameters, in their order
    output: Any  # the model's output, in a graph
    inputs: Inputs  # the N samples

    @property
    def n(self) -> int:
        """The number of samples N."""
        return len(self.inputs)


class Layout(NamedTuple):
    """Where the samples are in one call of a layer."""

    module: Module  # the layer
    axis: int | None  # their axis in the output; ``None`` if there is none
    rows: int  # how many entries of that axis belong to a sample
    args: list[int | None]  # their axes in the arguments; ``None`` where there is none
    same: bool  # whether the output is the same for all samples, since it does not grow


def record(request: Request, inputs: Inputs, one: Recording | None = None) -> Recording:
    """Evaluate the model, and record the calls of layers."""
    calls: list[Call] = []
    n = len(inputs)

    def take(module: Module, rule: Rule, args: tuple[Any, ...], output: Tensor, params: dict[str, str]) -> Tensor:
        sources = tuple(get_gradient_edge(t).node for t in _tensors(args) if t.requires_grad)
        args = _map_tensors(_kept, args)
        output = torch.ops.aten.alias(output)  # a node of the graph of its own, with the same strides
        versions = tuple((t, t._version) for t in _tensors(args) if t.is_floating_point())
        shape, alone = output.shape, None if one is None else _of_same_layer(module, one.calls, len(calls))
        repeated = n > 1 and alone is not None and alone.shape == shape
        if repeated:
            kept = _axes_of_all(shape)
            args = _map_tensors(lambda t: t.expand(n, *t.shape[kept:]), args)
            output = output.expand(n, *shape[kept:])
        edge = get_gradient_edge(output)
        axis = 0 if repeated else None
        place = edge, output.shape, output.stride()
        calls.append(Call(module, rule, args, *place, params, sources, versions, repeated, axis))
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


def _kept(argument: Tensor) -> Tensor:
    """Keep an argument as it was: a copy of tokens and masks, which autograd does not guard against being changed."""
    return argument.detach() if argument.is_floating_point() else argument.clone()


def _axes_of_all(shape: Size) -> int:
    """Count the axes that stand for the samples in an output that is the same for all."""
    return 1 if shape[:1] == (1,) else 0


_Module = TypeVar("_Module", Call, Layout)


def _of_same_layer(module: Module, entries: Sequence[_Module], place: int) -> _Module | None:
    """Look up what is known of a call from another pass."""
    return entries[place] if place < len(entries) and entries[place].module is module else None


def learn_layouts(one: Recording, several: Recording) -> list[Layout]:
    """Find out where the samples are in each call of a layer."""
    layouts = []
    for place, call in enumerate(several.calls):
        axis, rows, args = None, 1, list[int | None]()
        alone = _of_same_layer(call.module, one.calls, place)
        same = alone is not None and (call.repeated or call.shape == alone.shape)
        if alone is not None and len(alone.args) == len(call.args) and not same:
            axis = _grown(alone.shape, call.shape, several.n)
            rows = 1 if axis is None else alone.shape[axis]
            args = [_grown(_shape(x), _shape(y), several.n) for x, y in zip(alone.args, call.args, strict=True)]
        layouts.append(Layout(call.module, axis if rows == 1 or axis == 0 else None, rows, args, same))
    return layouts


def locate(recording: Recording, layouts: Sequence[Layout] | None) -> Recording:
    """Find the samples in recorded calls, and tell products inside of layers from the rest of these."""
    calls: list[Call] = []
    for place, call in enumerate(recording.calls):
        if layouts is None:
            located = replace(call, axis=0, rows=call.shape[0] // recording.n)
        else:
            located = _locate(call, _of_same_layer(call.module, layouts, place), recording.n)
        calls += _split_call(located)
    return replace(recording, calls=calls)


def _locate(call: Call, layout: Layout | None, n: int) -> Call:
    """Find the samples in a call."""
    if layout is not None and layout.same and n == 1:
        return _repeat_for_one(call)
    if layout is None or layout.axis is None or call.shape[layout.axis : layout.axis + 1] != (n * layout.rows,):
        return call
    moved = (x.movedim(axis, 0) if axis else x for x, axis in zip(call.args, layout.args, strict=False))
    return replace(call, args=tuple(moved), axis=layout.axis, rows=layout.rows)


def _repeat_for_one(call: Call) -> Call:
    """Give an output that is the same for all samples an axis of samples."""
    kept = _axes_of_all(call.shape)
    args = call.args if kept else _map_tensors(lambda t: t.unsqueeze(0), call.args)
    strides = (0, *call.strides[kept:])
    return replace(call, args=args, shape=Size([1, *call.shape[kept:]]), strides=strides, axis=0, repeated=True)


def _split_call(call: Call) -> list[Call]:
    """Tell a product with a parameter inside of a layer from the rest of the layer."""
    inner = None
    if call.axis is not None and call.rows == 1 and not call.repeated:
        inner = inner_of(call.rule, call.module, call.x)
    if inner is None:
        return [call]
    own = {id(p) for name in inner.params if (p := getattr(call.module, name)) is not None}
    inside = graph_nodes(call.edge, dict.fromkeys(call.sources, ()))
    nodes = (n for n in inside if n.name() != _TRANSPOSED and any(id(_leaf(m)) in own for m, _ in n.next_functions))
    node = next(nodes, None)  # the nearest to the output: a bias may be added by a node of its own
    if node is None or math.prod(node._input_metadata[0].shape) != inner.shape.numel():
        return [call]
    names = [{k: v for k, v in call.params.items() if (k in inner.params) == enters} for enters in (True, False)]
    strides = torch.empty(inner.shape, device="meta").stride()
    place = GradientEdge(node, 0), inner.shape, strides
    product = replace(call, rule=inner.rule, params=names[0], axis=inner.axis).at(*place)
    return [part for part in (replace(call, rule=inner.outer_rule, params=names[1]), product) if part.params]


def _leaf(node: Node | None) -> Any:
    """Look up the parameter that a node of a graph accumulates the gradient of, itself or behind a transposition."""
    while node is not None and node.name() == _TRANSPOSED:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


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
    return [(m._parameters, key, p) for m in module.modules() for key, p in m._parameters.items()]


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


def _map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to the tensors among a layer's arguments."""
    if isinstance(x, tuple):
        return tuple(_map_tensors(function, entry) for entry in x)
    return function(x) if isinstance(x, Tensor) and x.ndim else x


def _tensors(x: Any) -> Iterator[Tensor]:
    """List the tensors among a layer's arguments."""
    for entry in x if isinstance(x, tuple) else ():
        yield from _tensors(entry)
    if isinstance(x, Tensor):
        yield x


def _shape(x: Any) -> Size:
    """Look up the shape of an argument."""
    return x.shape if isinstance(x, Tensor) else Size()


def _grown(one: Size, several: Size, n: int) -> int | None:
    """Find the axis along which a tensor for several samples is longer than for one."""
    if len(one) != len(several):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(one, several, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and several[axes[0]] == n * one[axes[0]] else None


def used_elsewhere(recording: Recording) -> set[int]:
    """Find the parameters that enter the output on a way that does not lead through a recorded call."""
    sources = {call.edge.node: call.sources for call in recording.calls}
    return {id(getattr(node, "variable", None)) for node in graph_nodes(recording.output, sources)}
