"""Capture by autograd: the inputs of layers and ``s``, for any ``nn.Module`` whose samples do not interact.

Forward hooks record the input and output of each call of a layer that has a rule and wanted parameters; then autograd
passes all output basis vectors back to the recorded outputs at once. The rest of the model may be anything.

A layer's leading axis need not hold the samples. Next to a forward pass on one sample, the axis of the samples is the
one that has grown: in front, further back (sequence first), or in front with several rows for each sample (windows).
An output that has not grown is the same for all samples (position embeddings), and is repeated for each. That this is
so, and that the rules are right, is for :mod:`ggn_ntk.probe` to find out.
"""

import inspect
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module

from ggn_ntk.checks import is_out_of_memory, random_state
from ggn_ntk.request import Inputs, Request
from ggn_ntk.rules import Factored, rule_for

#: Numbers that ``s`` of all layers may hold before the outputs are taken in pieces.
BUDGET = 2**27


@dataclass(frozen=True)
class Call:
    """One call of a layer that has a rule.

    Attributes:
        module: The layer.
        x: Its input; a tuple where it took several arguments.
        output: What it returned, in the graph of the model's output.
        params: Its wanted parameters: their names on the layer, and those users know them by.
        axis: The axis of the samples; ``None`` where there is none.
        rows: How many entries of that axis, one behind the other, belong to a sample.
        sources: Nodes of the graph that its inputs come from.
    """

    module: Module
    x: Any
    output: Tensor
    params: dict[str, str]
    axis: int | None
    rows: int
    sources: tuple[Node, ...]

    def jacobians(self, s: Tensor) -> dict[str, Factored]:
        """Write the Jacobians of the layer's wanted parameters.

        Args:
            s: ``[C, *output]``.

        Returns:
            The Jacobians, by the names users know parameters by; those for which the rule has none are left out.
        """
        rule, axis = rule_for(self.module), self.axis
        assert rule is not None
        assert axis is not None
        x = _map_tensors(lambda t: t.movedim(axis, 0), self.x) if axis else self.x
        factored = rule(self.module, x, s.movedim(1 + axis, 1))
        return {name: _split_rows(factored[key], self.rows) for key, name in self.params.items() if key in factored}


@dataclass(frozen=True)
class Recording:
    """A forward pass.

    Attributes:
        calls: The calls of layers that have rules and wanted parameters, in their order.
        output: The model's output, in a graph.
        deterministic: Whether no random numbers were drawn.
    """

    calls: list[Call]
    output: Any
    deterministic: bool


#: Layers in the order of their calls, with the shapes of their outputs.
Shapes = Sequence[tuple[Module, Size]]


def record(request: Request, inputs: Inputs, alone: Shapes = (), *, repeat: bool = True) -> Recording:
    """Evaluate the model, and record the calls of layers.

    Args:
        request: The request.
        inputs: N samples.
        alone: What one sample by itself calls; not needed for N = 1.
        repeat: Whether outputs that are the same for all samples are repeated for each.

    Returns:
        The recording.
    """
    recorder = _Recorder(request, len(inputs), alone, repeat)
    before = random_state(request.model)
    handles = [handle for module in request.model.modules() for handle in recorder.attach(module)]
    try:
        with torch.enable_grad():
            output = request.evaluate(None, inputs)
    finally:
        for handle in handles:
            handle.remove()  # also before the backward pass, in which checkpoints evaluate layers again
    return Recording(recorder.calls, output, before == random_state(request.model))


class _Recorder:
    """Hooks that record the calls of layers.

    Attributes:
        calls: The calls so far.
    """

    def __init__(self, request: Request, n: int, alone: Shapes, repeat: bool) -> None:
        """Set up.

        Args:
            request: The request.
            n: The number of samples.
            alone: What one sample by itself calls.
            repeat: Whether outputs that are the same for all samples are repeated for each.
        """
        self.calls: list[Call] = []
        self._names = {id(p): name for name, p in request.params.items()}
        self._n, self._alone, self._repeat = n, alone, repeat

    def attach(self, module: Module) -> Iterator[Any]:
        """Record the calls of a layer from now on, if it has a rule and wanted parameters.

        Args:
            module: The layer.

        Yields:
            The hook's handle.
        """
        params = module.named_parameters(remove_duplicate=False)
        wanted = {key: self._names[id(p)] for key, p in params if id(p) in self._names}
        if wanted and rule_for(module) is not None:

            def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                return self._record(module, _positional(module, args, kwargs), output, wanted)

            # In front of the user's hooks: what these make of the output is no longer the layer's.
            yield module.register_forward_hook(hook, prepend=True, with_kwargs=True)

    def _record(self, module: Module, args: tuple[Any, ...], output: Any, params: dict[str, str]) -> Any:
        """Record a call.

        Args:
            module: The layer.
            args: Its arguments.
            output: What it returned.
            params: Its wanted parameters.

        Returns:
            What to pass on: a copy, so that the recorded output stays as it is where others work in place.
        """
        first = output[0] if isinstance(output, tuple) else output
        if not (isinstance(first, Tensor) and first.requires_grad):
            return output
        sources = tuple(get_gradient_edge(t).node for t in _tensors(args) if t.requires_grad)
        args, first = _map_tensors(Tensor.detach, args), first.view_as(first)  # a node of the graph of its own
        axis, rows = _sample_axis(first.shape, self._shape_alone(module), self._n)
        if axis is None and self._repeat and first.shape == self._shape_alone(module):
            axis, rows = 0, 1
            kept = 1 if len(first) == 1 else 0  # an axis of length one stands for the samples
            args = _map_tensors(lambda t: t.expand(self._n, *t.shape[kept:]), args)
            first = first.expand(self._n, *first.shape[kept:])
        self.calls.append(Call(module, args[0] if len(args) == 1 else args, first, params, axis, rows, sources))
        passed = first.clone()
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    def _shape_alone(self, module: Module) -> Size:
        """Look up what one sample alone gives.

        Args:
            module: The layer that is called now.

        Returns:
            The shape of its output in the same call; empty if there is none.
        """
        calls = self._alone[len(self.calls) :][:1]
        return calls[0][1] if calls and calls[0][0] is module else Size()


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


def _sample_axis(shape: Size, alone: Size, n: int) -> tuple[int | None, int]:
    """Find the samples in a layer's output.

    Args:
        shape: Its shape for N samples.
        alone: Its shape for one of them; empty where unknown.
        n: The number of samples N.

    Returns:
        Their axis, ``None`` where there is none, and how many entries of it belong to a sample.
    """
    if n == 1:
        return 0, shape[0] if shape else 1
    grown = [axis for axis, (size, one) in enumerate(zip(shape, alone, strict=False)) if size != one]
    if len(shape) != len(alone) or len(grown) != 1:
        return None, 0
    axis, rows = grown[0], alone[grown[0]]
    return (axis, rows) if shape[axis] == n * rows and (rows == 1 or axis == 0) else (None, 0)


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
    operands = (
        tensor.unflatten(term.index("n"), (-1, rows)) if "n" in term else tensor
        for term, tensor in zip(factored.terms, factored.operands, strict=True)
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
    sources = {call.output.grad_fn: call.sources for call in recording.calls}
    waiting = [get_gradient_edge(recording.output).node] if recording.output.requires_grad else []
    seen, found = set(), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in sources:
            waiting += sources[node]
            continue
        waiting += [before for before, _ in node.next_functions if before is not None]
        found.add(id(getattr(node, "variable", None)))
    return found


def pull_back(output: Tensor, tensors: Sequence[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """Pass several cotangents back at once, or one by one where ``vmap`` fails.

    Args:
        output: The model's output ``[N, *out]``.
        tensors: Tensors in its graph.
        cotangents: ``[K, N, *out]``.

    Returns:
        ``[K, *tensor]`` for each tensor; ``None`` where the output does not depend on it.
    """
    if not tensors or not output.requires_grad:
        return [None] * len(tensors)
    try:
        return list(
            torch.autograd.grad(
                output, tensors, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
    rows = [torch.autograd.grad(output, tensors, v, retain_graph=True, allow_unused=True) for v in cotangents]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


class Capture:
    """A forward pass of all samples, and autograd's way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        counts: How often each wanted parameter is used, by name.
    """

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

    def pieces(self, compute: str) -> list[Tensor]:
        """Split the outputs so that ``s`` of all layers does not exceed the budget.

        Args:
            compute: What is computed; for ``"full"``, each pair of outputs is together in a piece.

        Returns:
            Numbers of outputs.
        """
        total = self.output[0].numel()
        per_output = sum(call.output.numel() for call in self._calls)
        size = max(1, BUDGET // max(1, per_output))
        if size >= total or (compute == "full" and total < 3):
            return [torch.arange(total)]
        if compute != "full":
            return list(torch.arange(total).split(size))
        parts = torch.arange(total).split(max(1, size // 2))
        return [torch.cat(pair) for pair in combinations(parts, 2)]

    def jacobians(self, outputs: Tensor) -> Iterator[dict[str, Factored]]:
        """Pass basis vectors of some outputs back and write Jacobians.

        Args:
            outputs: Their numbers.

        Yields:
            The Jacobians of each call, by the names users know parameters by.
        """
        n, *out = self.output.shape
        basis = torch.eye(self.output[0].numel(), dtype=self.output.dtype, device=self.output.device)
        basis = basis[outputs].reshape(-1, 1, *out).expand(-1, n, *out)
        s = pull_back(self._output, [call.output for call in self._calls], basis)
        for call in reversed(self._calls):
            passed = s.pop()
            assert passed is not None
            yield call.jacobians(passed)
