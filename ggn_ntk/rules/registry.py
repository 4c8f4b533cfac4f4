"""The registry of rules, and the form in which they state a Jacobian.

That the NTK of a layer is cheaper than a product of its Jacobians is due to their structure (Novak, Sohl-Dickstein,
Schoenholz: "Fast Finite Width Neural Tangent Kernel", ICML 2022). Here the structure is an einsum, for convolutions too
(Dangel: "Convolutions and More as Einsum", NeurIPS 2024).
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Module

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.process.transforms import batched_gradients

_F = TypeVar("_F", bound=Callable[..., Any])

#: Takes the layer, its input and ``s``; returns the Jacobians of its parameters, as :func:`register_rule` has it.
Rule = Callable[[Any, Any, Tensor], dict[str, Factored]]

_RULES: dict[type[Module], Rule] = {}


def register_rule(*layer_types: type[Module]) -> Callable[[_F], _F]:
    """Register how the parameter Jacobians of layers are written.

    The decorated function takes the layer, its input ``x`` (a tensor ``[N, ...]``, or a tuple where the layer takes
    several) and ``s`` ``[C, N, *layer output]``, the Jacobian of the network's outputs with respect to the
    layer's output. It returns a :class:`Factored` for each parameter, by its name on the layer; extra
    entries, say for a bias that is ``None``, are ignored.

    Args:
        *layer_types: The exact types of the layers; a subclass may override ``forward``, so it does not match.

    Returns:
        The decorator.

    Raises:
        TypeError: If an argument is not a type of layer.
    """
    for layer_type in layer_types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, Module)):
            raise TypeError(f"register_rule takes types of torch.nn.Module, got {layer_type!r}.")

    def register(rule: _F) -> _F:
        _RULES.update(dict.fromkeys(layer_types, rule))
        return rule

    return register


def rule_for(module: Module) -> Rule | None:
    """Look up a layer's rule by its exact type.

    Args:
        module: The layer.

    Returns:
        The function that was registered for it; ``None`` if there is none.
    """
    return _RULES.get(type(module))


def registered() -> Hashable:
    """Tell what is registered, to notice what has been since."""
    return (*_RULES.items(), *_BACKPROPAGATIONS.items())


def users_entries() -> tuple[dict[Any, Rule], dict[Any, "Backpropagation"]]:
    """List what users have registered, for another process."""
    rules = {kind: rule for kind, rule in _RULES.items() if not _is_own(rule)}
    return rules, {kind: way for kind, way in _BACKPROPAGATIONS.items() if not _is_own(way.function)}


def register_entries(entries: tuple[dict[Any, Rule], dict[Any, "Backpropagation"]]) -> None:
    """Register what users have registered in another process."""
    rules, ways = entries
    _RULES.update(rules)
    _BACKPROPAGATIONS.update(ways)


def users_rule_for(module: Module) -> Rule | None:
    """Look up the rule that a user has registered for a layer; none where the rule is this package's, for torch's."""
    rule = rule_for(module)
    return None if rule is not None and _is_own(rule) and _is_torchs(type(module)) else rule


def _is_own(function: Callable[..., Any]) -> bool:
    """Tell a function of this package from one that a user has registered."""
    return function.__module__.startswith(f"{__package__}.")


def _is_torchs(kind: type[Module]) -> bool:
    """Tell a layer of torch's."""
    return kind.__module__.startswith("torch.nn.modules.")


class Backpropagation(NamedTuple):
    """How a Jacobian passes back through a layer.

    Attributes:
        function: Takes the layer, its input ``x`` and ``s`` ``[C, N, *layer output]``; returns
            ``[C, N, *layer input]``. It may overwrite ``s``.
        linear: Whether the layer's Jacobian is the same for all samples, so that an ``s`` that is the same
            for all samples stays so.
    """

    function: Callable[[Any, Tensor, Tensor], Tensor]
    linear: bool


_BACKPROPAGATIONS: dict[type[Module], Backpropagation] = {}


def register_backpropagation(*layer_types: type[Module], linear: bool = False) -> Callable[[_F], _F]:
    """Register how a Jacobian passes back through layers, faster than by autograd.

    Args:
        *layer_types: The exact types of the layers.
        linear: Whether their Jacobian is the same for all samples.

    Returns:
        The decorator of a function as in :class:`Backpropagation`.
    """

    def register(function: _F) -> _F:
        _BACKPROPAGATIONS.update(dict.fromkeys(layer_types, Backpropagation(function, linear)))
        return function

    return register


def backpropagation_for(module: Module) -> Backpropagation:
    """Look up how a Jacobian passes back through a layer."""
    return _BACKPROPAGATIONS.get(type(module), Backpropagation(batched_vjp, False))


def acts_on_each_sample(module: Module) -> bool:
    """Tell whether a layer is known to act on each sample by itself: one of torch's that this package registers."""
    kind = type(module)
    # A rule or a function that a user has registered for one of torch's layers says nothing of its samples.
    known = [_RULES.get(kind), _BACKPROPAGATIONS[kind].function if kind in _BACKPROPAGATIONS else None]
    registered = [function for function in known if function is not None]
    own = _is_torchs(kind) and bool(registered)
    # Reshaping may start at the axis of the samples; counted from behind, any may be it.
    axis = module.dim if isinstance(module, nn.Unflatten) else getattr(module, "start_dim", 1)
    reshapes_samples = not (isinstance(axis, int) and axis >= 1)
    return own and not reshapes_samples and all(map(_is_own, registered))


def batched_vjp(module: Module, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by any layer's transposed Jacobian with autograd, output by output where ``vmap`` fails.

    Args:
        module: The layer.
        x: Its input ``[N, ...]``.
        s: ``[C, N, *layer output]``.

    Returns:
        ``[C, N, *layer input]``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = module(x.clone())  # a clone, for layers that work in place
    try:
        passed: Tensor = batched_gradients(output, [x], s)[0]
        return passed
    except RuntimeError:
        return torch.stack([torch.autograd.grad(output, x, entry, retain_graph=True)[0] for entry in s])


def channels_last(x: Tensor) -> Tensor:
    """Put channels last in memory, where convolutions are fastest and their windows long runs."""
    # x [N, ...]
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def stack_outputs(s: Tensor) -> Tensor:
    """Treat the outputs of a sample as so many samples, for layers that are the same for all samples."""
    # s [C, N, ...] -> [N * C, ...]
    return s.transpose(0, 1).flatten(0, 1)


def unstack_outputs(stacked: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`stack_outputs`, with the sizes of ``like``."""
    # stacked [N * C, ...], like [C, N, ...] -> [C, N, ...]
    return stacked.reshape(like.shape[1], like.shape[0], *stacked.shape[1:]).transpose(0, 1)
