"""Capture by a walk through a Sequential model: ``s`` passes back through one layer after the other.

What belongs to a layer is freed before the next, so the memory peak is one layer's. Up to the last nonlinearity ``s``
is the same for all samples, and is kept once. Layers and their transposed Jacobians are those of
:mod:`ggn_ntk.rules`, as in the BackPACK extension :class:`ggn_ntk.EmpiricalNTK`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from ggn_ntk.checks import Problem, UnsupportedModelError, eager, hidden_computation, output_problem, random_state
from ggn_ntk.request import Request
from ggn_ntk.rules import Factored, backpropagation_for, channels_last, rule_for

_REMEDY = "Use capture='autograd' ('auto' does)"


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        module: The layer.
        x: Its input ``[N, ...]``; a tuple where it takes several.
        params: Its wanted parameters: their names on the layer, and those users know them by.
    """

    module: Module
    x: Any
    params: dict[str, str]


class Walk:
    """A forward pass through a Sequential model, layer by layer, and the way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        counts: How often each wanted parameter is used, by name.
    """

    kind = "backpack"

    def __init__(self, request: Request) -> None:
        """Evaluate the model on all samples and record the input of each layer.

        Args:
            request: The request.

        Raises:
            UnsupportedModelError: If the model is more than a sequence of layers on samples, or its output cannot be
                differentiated.
        """
        before = random_state(request.model)
        self._uses, self.output = _forward(request)
        n = sum(request.sizes)
        problem = output_problem(self.output, before == random_state(request.model), n)
        problems = [] if problem is None else [problem]
        if any(use.params and len(x) != n for use in self._uses for x in _tensors(use.x)):
            problems.append(Problem("", "the leading axis of a layer's input is not that of the samples", _REMEDY))
        if problems:
            raise UnsupportedModelError(problems)
        self.counts = Counter(name for use in self._uses for name in use.params.values())

    def pieces(self, compute: str) -> list[Tensor]:
        """Split the outputs: here they pass back together.

        Args:
            compute: What is computed.

        Returns:
            The numbers of all outputs.
        """
        return [torch.arange(self.output[0].numel())]

    def jacobians(self, outputs: Tensor) -> Iterator[dict[str, Factored]]:
        """Pass ``s`` back and write Jacobians on the way. Recorded inputs are freed, so this works once.

        Args:
            outputs: The numbers of all outputs.

        Yields:
            The Jacobians of each layer, by the names users know parameters by. The caller has to drop them before it
            asks for more, since ``s`` may be overwritten, unless a parameter among them is used again.
        """
        s = identity(self.output)
        while any(use.params for use in self._uses):
            use = self._uses.pop()
            if use.params:
                yield jacobians(use, s)
            if any(earlier.params for earlier in self._uses):
                waits = any(self.counts[name] > 1 for name in use.params.values()) and s.stride(1) != 0
                s = backpropagate(use, s.clone() if waits else s)


def structure_problems(request: Request) -> Iterator[Problem]:
    """Find what keeps a model from being taken apart into layers.

    Args:
        request: The request.

    Yields:
        The problems.
    """
    if request.x1.kwargs:
        yield Problem("", "it is called with keyword arguments, which layers do not pass on", _REMEDY)
    if request.output is not None:
        yield Problem("", "what it returns is not its last layer's output (output=)", _REMEDY)
    wanted = {id(p) for p in request.params.values()}
    for name, module in _named_layers(eager(request.model)):
        yield from hidden_computation(module, name)
        has_wanted = any(id(p) in wanted for p in module.parameters(recurse=_is_layer(module)))
        kind = type(module).__name__
        if not _is_layer(module):
            if has_wanted:
                yield Problem(name, f"{kind} has a parameter of its own", _REMEDY)
        elif rule_for(module) is not None:
            continue
        elif has_wanted and any(True for _ in module.children()):
            yield Problem(name, f"{kind} may compute between its modules what a walk cannot see", _REMEDY)
        elif has_wanted:
            yield Problem(name, f"no rule is registered for {kind}", f"Write one with register_rule({kind})")
        elif not type(module).__module__.startswith("torch.nn."):
            yield Problem(name, f"{kind} is not a layer of torch's", _REMEDY)


def _is_layer(module: Module) -> bool:
    """Tell layers from containers that call their children one after the other.

    Args:
        module: The module.

    Returns:
        Whether it is a layer.
    """
    return not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward


def _named_layers(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """List a model's containers and layers, these in the order of their calls.

    Args:
        module: The model.
        name: Its dotted name.

    Yields:
        Dotted names and modules; a layer that is called several times comes as often.
    """
    yield name, module
    if not _is_layer(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from _named_layers(child, f"{name}.{key}".lstrip("."))


def _tensors(x: Any) -> tuple[Tensor, ...]:
    """List the inputs of a layer.

    Args:
        x: A tensor or a tuple of tensors.

    Returns:
        The tensors.
    """
    return x if isinstance(x, tuple) else (x,)


@torch.no_grad()
def _forward(request: Request) -> tuple[list[Use], Any]:
    """Evaluate the model on all samples and record the input of each layer.

    Args:
        request: The request.

    Returns:
        The uses of layers in the order of their calls, and the output.

    Raises:
        UnsupportedModelError: If a layer in between returns no tensor.
    """
    names = {id(p): name for name, p in request.params.items()}
    args = tuple(channels_last(x) for x in request.x1.stack(request.x2).args)
    uses: list[Use] = []
    for name, layer in _named_layers(eager(request.model)):
        if not _is_layer(layer):
            continue
        if not all(isinstance(x, Tensor) for x in args):
            what = f"{type(layer).__name__} takes {type(args[0]).__name__}, not a tensor, from the layer before"
            raise UnsupportedModelError([Problem(name, what, _REMEDY)])
        params = layer.named_parameters(recurse=False, remove_duplicate=False)
        wanted = {key: names[id(p)] for key, p in params if id(p) in names}
        uses.append(Use(layer, args[0] if len(args) == 1 else args, wanted))
        args = (layer(*(x.clone() if _may_overwrite(layer) else x for x in args)),)
    return uses, args[0]


def _may_overwrite(layer: Module) -> bool:
    """Tell whether a layer may work in place, on the recorded output of the layer before.

    Args:
        layer: The layer.

    Returns:
        Whether it is set to, or is not one of torch's.
    """
    return getattr(layer, "inplace", False) or not type(layer).__module__.startswith("torch.nn.")


def jacobians(use: Use, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a layer's wanted parameters.

    Args:
        use: The layer and its input.
        s: ``[C, N, *layer output]``.

    Returns:
        The Jacobians, by the name users know the parameter by.
    """
    rule = rule_for(use.module)
    assert rule is not None
    factored = rule(use.module, use.x, s)
    return {name: factored[key] for key, name in use.params.items()}


def identity(output: Tensor) -> Tensor:
    """Start ``s`` at the output.

    Args:
        output: ``[N, *out]``.

    Returns:
        The Jacobian of the flattened output with respect to the output, ``[C, N, *out]``: the same for all samples,
        and kept once.
    """
    n, *out = output.shape
    eye = torch.eye(output[0].numel(), dtype=output.dtype, device=output.device)
    return eye.reshape(-1, 1, *out).expand(-1, n, *out)


def backpropagate(use: Use, s: Tensor) -> Tensor:
    """Pass ``s`` back through a layer.

    Args:
        use: The layer and its input.
        s: ``[C, N, *layer output]``; may be overwritten.

    Returns:
        ``[C, N, *layer input]``; kept once where it is the same for all samples.
    """
    function, linear = backpropagation_for(use.module)
    if linear and s.stride(1) == 0:
        return function(use.module, use.x[:1], s[:, :1]).expand(-1, s.shape[1], *use.x.shape[1:])
    return function(use.module, use.x, s)
