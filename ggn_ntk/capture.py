"""Capture by autograd: the calls of layers, for any ``nn.Module`` whose samples do not interact.

Forward hooks record the input and output of each call of a layer that has a rule and wanted parameters; then autograd
passes all output basis vectors back to the recorded outputs (:mod:`ggn_ntk.way_back`). The rest of the model may be
anything.

A layer's leading axis need not hold the samples. Their axis is the one that grows from one sample to two: in front,
further back (sequence first), or in front with several rows for each sample (windows). An output that does not grow is
the same for all samples (position embeddings), and is repeated for each. Whether this holds for all samples, and
whether the rules are right, is for :mod:`ggn_ntk.probe` to find out.
"""

import inspect
import math
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from ggn_ntk.checks import graph_nodes, random_state
from ggn_ntk.request import Inputs, Request
from ggn_ntk.rules import Factored, OneHot, Rule, inner_of, rule_for

# The node of a graph that transposes a weight.
_TRANSPOSED = "TBackward0"


@dataclass(frozen=True)
class Call:
    """One call of a layer that has a rule.

    Attributes:
        module: The layer.
        rule: Its rule.
        x: Its input, with the samples in front; a tuple where it took several arguments.
        edge: Where its output is in the graph of the model's output.
        shape: Shape of its output.
        strides: How its output lies in memory.
        params: Its wanted parameters: their names on the layer, and those users know them by.
        axis: The axis of the samples in the output; ``None`` where it is not known.
        rows: How many entries of that axis, one behind the other, belong to a sample.
        sources: Nodes of the graph that its inputs come from.
    """

    module: Module
    rule: Rule
    x: Any
    edge: GradientEdge
    shape: Size
    strides: tuple[int, ...]
    params: dict[str, str]
    axis: int | None
    rows: int
    sources: tuple[Node, ...]

    def jacobians(self, s: Tensor) -> dict[str, Factored]:
        """Write the Jacobians of the layer's wanted parameters.

        Args:
            s: ``[C, *output]``.

        Returns:
            The Jacobians, by the names users know parameters by; those that the rule does not state are left out.
        """
        assert self.axis is not None
        factored = self.rule(self.module, self.x, s.movedim(1 + self.axis, 1))
        return {name: _split_rows(factored[key], self.rows) for key, name in self.params.items() if key in factored}


class Layout(NamedTuple):
    """Where the samples are in one call of a layer.

    Attributes:
        module: The layer.
        output: The shapes of its output for one sample and for two.
        args: The same for each of its arguments; empty for those that are no tensors.
    """

    module: Module
    output: tuple[Size, Size]
    args: list[tuple[Size, Size]]


@dataclass(frozen=True)
class Recording:
    """A forward pass.

    Attributes:
        calls: The calls of layers that have rules and wanted parameters, in their order.
        output: The model's output, in a graph.
        deterministic: Whether no random numbers were drawn.
        repeated: Whether outputs of layers were repeated for each sample.
    """

    calls: list[Call]
    output: Any
    deterministic: bool
    repeated: bool


def learn_layouts(request: Request, sample: Inputs) -> list[Layout]:
    """Find out where the samples are in each call of a layer.

    Args:
        request: The request.
        sample: One sample.

    Returns:
        The layouts of the calls, in their order.
    """
    one, two = _shapes(request, sample), _shapes(request, sample[[0, 0]])
    return [
        Layout(module, (shape, shape_of_two), list(zip(args, args_of_two, strict=True)))
        for (module, shape, args), (module_of_two, shape_of_two, args_of_two) in zip(one, two, strict=False)
        if module is module_of_two and len(args) == len(args_of_two)
    ]


def _shapes(request: Request, inputs: Inputs) -> list[tuple[Module, Size, list[Size]]]:
    """Evaluate the model, and note the shapes of calls.

    Args:
        request: The request.
        inputs: N samples.

    Returns:
        The layer of each call, with the shapes of its output and its arguments.
    """
    found = []

    def note(module: Module, args: tuple[Any, ...], output: Tensor, params: dict[str, str]) -> Tensor:
        shapes = [x.shape if isinstance(x, Tensor) else Size() for x in args]
        found.append((module, output.shape, shapes))
        return output

    with hooked(request, note), torch.enable_grad():
        request.evaluate(None, inputs)
    return found


def record(
    request: Request, inputs: Inputs, layouts: Sequence[Layout] | None = None, *, repeat: bool = True
) -> Recording:
    """Evaluate the model, and record the calls of layers.

    Args:
        request: The request.
        inputs: N samples.
        layouts: Where the samples are in each call; ``None``: in front.
        repeat: Whether outputs that are the same for all samples are repeated for each.

    Returns:
        The recording.
    """
    calls: list[Call] = []
    n, number, repeated = len(inputs), 0, False

    def take(module: Module, args: tuple[Any, ...], output: Tensor, params: dict[str, str]) -> Tensor:
        nonlocal number, repeated
        sources = tuple(get_gradient_edge(t).node for t in _tensors(args) if t.requires_grad)
        args, output = _map_tensors(Tensor.detach, args), output.view_as(output)  # a node of the graph of its own
        shape = None
        layout = None if layouts is None else _layout_of(module, layouts[number:])
        number += 1
        axis, rows = (0, len(output) // n) if layouts is None else _sample_axis(layout, output, n)
        if layout is not None and axis is not None:
            moved = (_to_front(x, *shapes) for x, shapes in zip(args, layout.args, strict=False))
            args = tuple(moved)
        elif layout is not None and repeat and layout.output[0] == layout.output[1] == output.shape:
            kept = 1 if len(output) == 1 else 0  # an axis of length one stands for the samples
            args = _map_tensors(lambda t: t.expand(n, *t.shape[kept:]), args)
            shape, output, axis, rows = output.shape, output.expand(n, *output.shape[kept:]), 0, 1
            repeated = n > 1
        x, rule = args[0] if len(args) == 1 else args, rule_for(module)
        assert rule is not None
        edge = get_gradient_edge(output)
        call = Call(module, rule, x, edge, output.shape, output.stride(), params, axis, rows, sources)
        calls.extend(_split_call(call, output) if shape is None else [call])
        # A copy, so that the recorded output stays as it is where others work in place.
        return output.clone() if n > 1 or shape is None else output.reshape(shape).clone()

    before = random_state(request.model)
    with hooked(request, take), torch.enable_grad():
        result = request.evaluate(None, inputs)
    return Recording(calls, result, before == random_state(request.model), repeated)


def _split_call(call: Call, output: Tensor) -> list[Call]:
    """Tell a product with a parameter inside of a layer from the rest of the layer.

    Args:
        call: A call of the layer.
        output: Its output.

    Returns:
        The layer without the product, and the product, as far as their parameters are wanted; the call as it is where
        there is none in the graph.
    """
    inner = inner_of(call.module, call.x) if call.axis is not None and call.rows == 1 else None
    if inner is None:
        return [call]
    own = {id(p) for name in inner.params if (p := getattr(call.module, name)) is not None}
    inside = graph_nodes(output, dict.fromkeys(call.sources, ()))
    nodes = (n for n in inside if n.name() != _TRANSPOSED and any(id(_leaf(m)) in own for m, _ in n.next_functions))
    node = next(nodes, None)  # the nearest to the output: a bias may be added by a node of its own
    if node is None or math.prod(node._input_metadata[0].shape) != inner.shape.numel():
        return [call]
    names = [{k: v for k, v in call.params.items() if (k in inner.params) == enters} for enters in (True, False)]
    strides = torch.empty(inner.shape, device="meta").stride()
    edge = GradientEdge(node, 0)
    product = Call(call.module, inner.rule, call.x, edge, inner.shape, strides, names[0], inner.axis, 1, call.sources)
    return [part for part in (replace(call, rule=inner.outer_rule, params=names[1]), product) if part.params]


def _leaf(node: Node | None) -> Any:
    """Look up the parameter that a node of a graph accumulates the gradient of, itself or behind a transposition.

    Args:
        node: The node.

    Returns:
        The parameter, or ``None``.
    """
    while node is not None and node.name() == _TRANSPOSED:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


@contextmanager
def hooked(
    request: Request, take: Callable[[Module, tuple[Any, ...], Tensor, dict[str, str]], Tensor]
) -> Iterator[None]:
    """Call a function for each call of a layer that has a rule and wanted parameters.

    Args:
        request: The request.
        take: Takes the layer, its arguments, its output, and its wanted parameters; returns what to pass on as the
            output.

    Yields:
        Nothing. The hooks are gone before a backward pass, in which checkpoints evaluate layers again.
    """
    names = {id(p): name for name, p in request.params.items()}
    handles = []
    try:
        for module in request.model.modules():
            params = module.named_parameters(remove_duplicate=False)
            wanted = {key: names[id(p)] for key, p in params if id(p) in names}
            if wanted and rule_for(module) is not None:
                # In front of the user's hooks: what these make of the output is no longer the layer's.
                hook = partial(_hook, take, wanted)
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    take: Callable[..., Tensor], params: dict[str, str], module: Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Any:
    """Pass a call on.

    Args:
        take: See :func:`hooked`.
        params: The wanted parameters of the layer.
        module: The layer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned; of a tuple, the first entry counts.

    Returns:
        What it returns instead.
    """
    first = output[0] if isinstance(output, tuple) else output
    if not (isinstance(first, Tensor) and first.requires_grad):
        return output
    passed = take(module, _positional(module, args, kwargs), first, params)
    return (passed, *output[1:]) if isinstance(output, tuple) else passed


def _positional(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Bring a layer's arguments to the order of its signature.

    Args:
        module: The layer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        All arguments, those that were not given in between with their defaults.
    """
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    last = list(bound.arguments)[-1]
    bound.apply_defaults()
    given = list(bound.arguments)[: list(bound.arguments).index(last) + 1]
    return tuple(bound.arguments[name] for name in given)


def _map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to the tensors among a layer's arguments.

    Args:
        function: The function.
        x: A tensor, another argument, or a tuple of such.

    Returns:
        The same with the function's results.
    """
    if isinstance(x, tuple):
        return tuple(_map_tensors(function, entry) for entry in x)
    return function(x) if isinstance(x, Tensor) and x.ndim else x


def _tensors(x: Any) -> Iterator[Tensor]:
    """List the tensors among a layer's arguments.

    Args:
        x: A tensor, another argument, or a tuple of such.

    Yields:
        The tensors.
    """
    for entry in x if isinstance(x, tuple) else ():
        yield from _tensors(entry)
    if isinstance(x, Tensor):
        yield x


def _layout_of(module: Module, layouts: Sequence[Layout]) -> Layout | None:
    """Look up the layout of a call.

    Args:
        module: The layer that is called.
        layouts: Those of this call and the following.

    Returns:
        The layout; ``None`` where another layer was called when the layouts were learned.
    """
    return layouts[0] if layouts and layouts[0].module is module else None


def _sample_axis(layout: Layout | None, output: Tensor, n: int) -> tuple[int | None, int]:
    """Find the samples in a layer's output.

    Args:
        layout: The layout.
        output: The output for N samples.
        n: The number of samples N.

    Returns:
        Their axis, ``None`` where there is none, and how many entries of it belong to a sample.
    """
    axis = None if layout is None else _grown(*layout.output)
    if layout is None or axis is None or output.ndim <= axis:
        return None, 0
    rows = layout.output[0][axis]
    return (axis, rows) if output.shape[axis] == n * rows and (rows == 1 or axis == 0) else (None, 0)


def _grown(one: Size, two: Size) -> int | None:
    """Find the axis along which a tensor for two samples is twice as long as for one.

    Args:
        one: Its shape for one sample.
        two: Its shape for two.

    Returns:
        The axis; ``None`` if it is not a single one.
    """
    if len(one) != len(two):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and two[axes[0]] == 2 * one[axes[0]] else None


def _to_front(x: Any, one: Size, two: Size) -> Any:
    """Move the samples of an argument to its leading axis.

    Args:
        x: The argument.
        one: Its shape for one sample.
        two: Its shape for two.

    Returns:
        The argument; as it is where it does not depend on the samples.
    """
    axis = _grown(one, two)
    return x.movedim(axis, 0) if isinstance(x, Tensor) and axis else x


def _split_rows(factored: Factored, rows: int) -> Factored:
    """Sum a Jacobian over the rows that belong to a sample.

    Args:
        factored: The Jacobian, with ``n`` over N times R rows.
        rows: The number R.

    Returns:
        The Jacobian, with ``n`` over N samples.
    """
    if rows == 1:
        return factored
    letter = next(a for a in string.ascii_uppercase if a not in factored.equation)

    def split(term: str, tensor: Tensor) -> Tensor:
        return tensor.unflatten(term.index("n"), (-1, rows)) if "n" in term else tensor

    operands = (
        operand._replace(places=split(term, operand.places)) if isinstance(operand, OneHot) else split(term, operand)
        for term, operand in zip(factored.terms, factored.operands, strict=True)
    )
    terms = ",".join(term.replace("n", "n" + letter) for term in factored.terms)
    return Factored(f"{terms}->{factored.result}", tuple(operands))


def used_elsewhere(recording: Recording) -> set[int]:
    """Find the parameters that enter the output on a way that does not lead through a recorded call.

    Args:
        recording: A forward pass.

    Returns:
        The ids of parameters that are used outside of the calls of layers that have rules.
    """
    sources = {call.edge.node: call.sources for call in recording.calls}
    return {id(getattr(node, "variable", None)) for node in graph_nodes(recording.output, sources)}
