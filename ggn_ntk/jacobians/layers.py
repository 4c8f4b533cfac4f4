"""Sequential models, as the layers that they call one after the other."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Module

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.models.requirements import hidden_computation
from ggn_ntk.problem.errors import Problem
from ggn_ntk.problem.functions import FunctionModule
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import children_of, uncompiled
from ggn_ntk.rules.registry import acts_on_each_sample, backpropagation_for, rule_for

REMEDY = "Use capture='autograd' ('auto' does)"


def structure_problems(request: Request) -> Iterator[Problem]:
    """Find what keeps a model from being taken apart into layers."""
    if isinstance(request.model, FunctionModule):
        yield Problem("", "it is a function, which shows no layers", REMEDY)
        return
    if request.x1.positional is None:
        yield Problem("", "it is called with something else than tensors [N, ...] by position", REMEDY)
    if request.output is not None:
        yield Problem("", "what it returns is not its last layer's output (output=)", REMEDY)
    wanted = {id(p) for p in request.params.values()}
    for name, module in named_layers(uncompiled(request.model)):
        yield from hidden_computation(module, name)
        layer, kind = is_layer(module), type(module).__name__
        if layer and rule_for(module) is not None:
            continue
        has_wanted = any(id(p) in wanted for p in module.parameters(recurse=layer))
        if not layer:
            if has_wanted:
                yield Problem(name, f"{kind} has a parameter of its own", REMEDY)
        elif has_wanted and any(True for _ in module.children()):
            yield Problem(name, f"{kind} may compute between its modules what no layer shows", REMEDY)
        elif has_wanted:
            yield Problem(name, f"no rule is registered for {kind}", f"Write one with register_rule({kind})")
        elif not type(module).__module__.startswith("torch.nn."):
            yield Problem(name, f"{kind} is not a layer of torch's", REMEDY)


def is_layer(module: Module) -> bool:
    """Tell layers from containers that call their children one after the other."""
    return not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward


def named_layers(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """List a model's containers and layers, these in the order of their calls."""
    yield name, module
    if not is_layer(module):
        for key, child in children_of(module).items():
            if child is not None:
                yield from named_layers(child, f"{name}.{key}".lstrip("."))


def is_known(request: Request) -> bool:
    """Tell whether nothing but layers acts on samples of which the library knows that they act on each by itself."""
    layers = (layer for _, layer in named_layers(uncompiled(request.model)) if is_layer(layer))
    return all(acts_on_each_sample(layer) for layer in layers)


class Use(NamedTuple):
    """One call of a layer."""

    module: Module  # the layer
    x: Any  # its input ``[N, ...]``; a tuple where it takes several
    params: dict[str, str]  # its wanted parameters: their names on the layer, and those users know them by

    def restrict(self, samples: slice) -> "Use":
        """Select samples."""
        x = tuple(x[samples] for x in self.x) if isinstance(self.x, tuple) else self.x[samples]
        return self._replace(x=x)


def tensors_of(x: Any) -> tuple[Tensor, ...]:
    """List the inputs of a layer."""
    return x if isinstance(x, tuple) else (x,)


def jacobians(use: Use, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a layer's wanted parameters."""
    # s [C, N, *layer output]
    rule = rule_for(use.module)
    assert rule is not None
    factored = rule(use.module, use.x, s)
    return {name: factored[key] for key, name in use.params.items()}


def backpropagate(use: Use, s: Tensor) -> Tensor:
    """Pass ``s`` back through a layer."""
    # s [C, N, *layer output] -> [C, N, *layer input]
    function, linear = backpropagation_for(use.module)
    if linear and s.stride(1) == 0:
        return function(use.module, use.x[:1], s[:, :1]).expand(-1, s.shape[1], *use.x.shape[1:])
    return function(use.module, use.x, s)
