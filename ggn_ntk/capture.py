"""Capture by autograd: the inputs of layers and ``s``, for any ``nn.Module`` whose samples do not interact.

Forward hooks record the input and output of each call of a layer that has a rule and wanted parameters; then autograd
passes all output basis vectors back to the recorded outputs at once. The rest of the model may be anything.

A layer's leading axis need not hold the samples. Their axis is the one that grows from one sample to two: in front,
further back (sequence first), or in front with several rows for each sample (windows). An output that does not grow is
the same for all samples (position embeddings), and is repeated for each. Whether this holds for all samples, and
whether the rules are right, is for :mod:`ggn_ntk.probe` to find out.
"""

import inspect
import math
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

from ggn_ntk.axes import OutputAxes
from ggn_ntk.checks import graph_nodes, is_out_of_memory, random_state
from ggn_ntk.pieces import Piece, split_outputs
from ggn_ntk.request import Inputs, Request
from ggn_ntk.rules import Factored, OneHot, Rule, inner_of, rule_for
from ggn_ntk.walk import identity

#: Numbers that ``s`` of all layers may hold before the outputs are taken in pieces.
BUDGET = 2**27

#: Numbers in the output of a layer, on average, from which on the model's outputs are passed back one by one: several
#: at once save calls of functions, but read and write more than a processor's cache holds. Elsewhere all pass at once.
ONE_BY_ONE = {"cpu": 2**16}

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
        call = Call(module, rule, x, get_gradient_edge(output), output.shape, params, axis, rows, sources)
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
    edge = GradientEdge(node, 0)
    product = replace(call, rule=inner.rule, edge=edge, shape=inner.shape, params=names[0], axis=inner.axis)
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


def pass_back(
    output: Tensor,
    calls: Sequence[Call],
    cotangents: Tensor,
    params: Sequence[Tensor] = (),
    *,
    batched: bool = False,
    allow_unused: bool = True,
) -> tuple[list[Tensor | None], tuple[Tensor | None, ...]]:
    """Pass cotangents back to layers.

    Args:
        output: The model's output ``[N, *out]``, in a graph, which is kept.
        calls: Calls of layers.
        cotangents: ``[N, *out]``.
        params: Parameters.
        batched: Whether there are several, ``[K, N, *out]``.
        allow_unused: Whether the output may not depend on some of them.

    Returns:
        ``[*output]`` of each call, or ``[K, *output]``, and the gradient of each parameter, or with ``K`` in front;
        ``None`` where the output does not depend on it.

    Raises:
        RuntimeError: If it does not depend on one, and has to.
    """
    inputs: Any = [*(call.edge for call in calls), *params]
    if not inputs or not output.requires_grad:
        return [None] * len(calls), (None,) * len(params)
    found = torch.autograd.grad(
        output, inputs, cotangents, retain_graph=True, allow_unused=allow_unused, is_grads_batched=batched
    )
    lead = cotangents.shape[:batched]
    passed = zip(found[: len(calls)], calls, strict=True)
    return [None if s is None else s.reshape(*lead, *call.shape) for s, call in passed], found[len(calls) :]


def pull_back(output: Tensor, calls: Sequence[Call], cotangents: Tensor) -> list[Tensor]:
    """Pass several cotangents back, at once where layers are small, and one by one where ``vmap`` fails.

    Args:
        output: The model's output ``[N, *out]``.
        calls: Calls of layers, on all of whose outputs it depends.
        cotangents: ``[K, N, *out]``.

    Returns:
        ``[K, *output]`` for each call.
    """
    if sum(call.shape.numel() for call in calls) < len(calls) * ONE_BY_ONE.get(output.device.type, math.inf):
        try:
            return [
                s for s in pass_back(output, calls, cotangents, batched=True, allow_unused=False)[0] if s is not None
            ]
        except Exception as error:
            if is_out_of_memory(error):
                raise
    found: list[Tensor] = []
    for k, cotangent in enumerate(cotangents):
        parts = [s for s in pass_back(output, calls, cotangent, allow_unused=False)[0] if s is not None]
        found = found or [_room(call, part, len(cotangents)) for call, part in zip(calls, parts, strict=True)]
        for whole, part in zip(found, parts, strict=True):
            whole[k].copy_(part)
    return found


def _room(call: Call, part: Tensor, k: int) -> Tensor:
    """Make room for the cotangents of a layer's output.

    Args:
        call: The call of the layer.
        part: The first cotangent.
        k: The number of cotangents K.

    Returns:
        ``[K, *output]``. Samples are outermost in memory. Behind them are positions, if there are more of them than
        channels: products sum over them, to which K and channels are one axis. Fewer positions stay beside their
        channels, behind K: products that keep either leave them one axis for the next.
    """
    strides = part.contiguous().stride() if 0 in part.stride() else part.stride()
    axes = sorted(range(part.ndim), key=lambda axis: (axis != call.axis, -strides[axis]))
    channels = part.shape[axes[-1]]
    place = max(1, part.ndim - 1) if part.numel() > part.shape[axes[0]] * channels**2 else 1
    axes.insert(place, part.ndim)
    sizes = [*part.shape, k]
    room = part.new_empty([sizes[axis] for axis in axes])
    return room.permute(place, *(axes.index(axis) for axis in range(part.ndim)))


class Capture:
    """A forward pass of all samples, and autograd's way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        counts: How often each wanted parameter is used, by name.
    """

    kind = "autograd"

    def __init__(self, request: Request, calls: Sequence[Call], output: Tensor) -> None:
        """Set up.

        Args:
            request: The request; calls count with its parameters alone.
            calls: Calls of layers, on all of whose outputs the model's depends.
            output: The model's output ``[N, *out]``, in a graph.
        """
        wanted = [
            replace(call, params={key: name for key, name in call.params.items() if name in request.params})
            for call in calls
        ]
        self._calls = [call for call in wanted if call.params]
        self._output, self.output = output, output.detach()
        self.counts = Counter(name for call in self._calls for name in call.params.values())

    def pieces(self, axes: OutputAxes) -> list[Piece]:
        """Split the outputs so that ``s`` of all layers does not exceed the budget.

        Args:
            axes: The role of each output axis.

        Returns:
            The pieces.
        """
        per_output = sum(call.shape.numel() for call in self._calls)
        return split_outputs(axes, BUDGET // max(1, per_output))

    def jacobians(self, outputs: Tensor, parts: object) -> Iterator[dict[str, Factored]]:
        """Pass basis vectors of some outputs back and write Jacobians.

        Args:
            outputs: Where they are in ``[*out]``, flattened.
            parts: Not used: here all samples pass back together.

        Yields:
            The Jacobians of each call, by the names users know parameters by.
        """
        s = pull_back(self._output, self._calls, identity(self.output, outputs))
        for call in reversed(self._calls):
            yield call.jacobians(s.pop())
