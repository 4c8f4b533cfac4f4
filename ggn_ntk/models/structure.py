"""The structure of a model: what of it decides which function of its parameters and inputs it is."""

from collections.abc import Hashable
from itertools import chain
from numbers import Number

import torch
from torch import Tensor
from torch.nn import Module

from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.process.torch_internals import buffers_of, forward_hooks, has_global_hooks, parameters_of
from ggn_ntk.rules.registry import registered

# What a layer's own options are, such as its padding, or made of.
_PLAIN = (Number, str, type(None), torch.dtype)


class _Same:
    """An object that is equal to itself alone, and kept: no other can get its identity."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def structure_of(model: Module, params: dict[str, Tensor]) -> Hashable:
    """Describe a model, without the values of its parameters and buffers."""
    # Names of modules are left out: in their order, types and options are as good.
    tensors: dict[int, int] = {}  # those that modules share, by the place where they are met first
    found: list[Hashable] = [
        registered(),
        has_global_hooks(),
        torch.get_default_dtype(),
        *((name, tensors.setdefault(id(p), len(tensors))) for name, p in params.items()),
    ]
    for module in model.modules():
        held = vars(module)
        found += [_Same(type(module)), module.training, _Same(held.get("forward"))]
        found += [(key, _option(value)) for key, value in held.items() if _is_option(value)]
        found += [_Same(hook) for hooks in forward_hooks(module) for hook in hooks.values()]
        for key, tensor in chain(parameters_of(module).items(), buffers_of(module).items()):
            place = tensors.setdefault(id(tensor), len(tensors))
            found.append((key, place, *(() if tensor is None else (tensor.requires_grad, *_form(tensor)))))
    return tuple(found)


def form_of(inputs: Inputs) -> Hashable:
    """Describe samples without their values, and what they share."""
    constants = (
        (key, _form(c) if isinstance(c, Tensor) else _option(c) if _is_option(c) else _Same(c))
        for key, c in inputs.constants.items()
    )
    return (*((key, _form(x)) for key, x in inputs.tensors.items()), *constants, *inputs.kinds.items())


def _is_option(value: object) -> bool:
    """Tell whether an attribute of a module is an option, or several in tuples and lists."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(_is_option, value)))


def _option(value: object) -> Hashable:
    """Take an option down as it is now, also one in a list that may be written to."""
    return tuple(map(_option, value)) if isinstance(value, tuple | list) else value


def _form(tensor: Tensor) -> tuple[Hashable, ...]:
    """Describe a tensor without its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
