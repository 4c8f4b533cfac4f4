"""Fingerprints of what a kernel is made of, by content: of the same in another process they are the same."""

import hashlib
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from numbers import Number
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ggn_ntk.problem.functions import FunctionModule
from ggn_ntk.problem.inputs import Shared, parts_of
from ggn_ntk.process.torch_internals import buffers_of, forward_hooks, parameters_of

_PLAIN = (Number, str, bytes, type(None), type(...), slice, torch.dtype, torch.device, torch.memory_format, Enum)


def fingerprint(value: Any) -> str:
    """Compute the fingerprint of tensors, functions, models, plain values, and containers of these."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _contents(value, set()):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def of_samples(x: Any) -> str:
    """Compute the fingerprint of one set of inputs: of its tensors, their places, and what samples share."""
    leaves = ((label, part, is_shared) for label, part, is_shared in parts_of(x) if not _holds_parts(part))
    return fingerprint(list(leaves))


def of_state(model: Module) -> dict[str, str]:
    """Compute the fingerprints of a model's parameters and buffers, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: fingerprint(tensor) for name, tensor in tensors.items()}


def of_structure(model: Module) -> str:
    """Compute the fingerprint of a model without its parameters and buffers: types, options, hooks, training flags."""
    found: list[Any] = []
    for name, module in model.named_modules():
        options = {key: value for key, value in vars(module).items() if _is_option(value)}
        hooks = [hook for several in forward_hooks(module) for hook in several.values()]
        frozen = {key: p.requires_grad for key, p in parameters_of(module).items() if p is not None}
        found += [name, type(module), module.training, options, hooks, frozen, list(buffers_of(module))]
        if isinstance(module, FunctionModule):
            found.append(module.function)
    return fingerprint(found)


def _holds_parts(part: Any) -> bool:
    """Tell whether a part of inputs has parts in turn, which are listed after it."""
    return not isinstance(part, Tensor | Shared) and len(list(parts_of(part))) > 1


def _is_option(value: Any) -> bool:
    """Tell whether an attribute of a module is an option, a function, or several of these."""
    if isinstance(value, Mapping):
        return all(map(_is_option, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_option, value))
    return isinstance(value, (*_PLAIN, FunctionType, MethodType, partial))


def _contents(value: Any, seen: set[int]) -> Iterator[bytes | memoryview]:
    """List what tells a value from others."""
    yield type(value).__qualname__.encode()
    if isinstance(value, _PLAIN):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield from _of_tensor(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif id(value) not in seen:  # functions may refer to themselves
        for part in _parts(value):
            yield from _contents(part, seen | {id(value)})


def _of_tensor(tensor: Tensor) -> Iterator[bytes | memoryview]:
    """List form and numbers of a tensor."""
    yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    numbers = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if len(numbers):
        yield memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _parts(value: Any) -> Iterator[Any]:
    """List what an object consists of."""
    if isinstance(value, Module):
        yield from (of_structure(value), of_state(value))
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, set | frozenset):
        yield from sorted(map(fingerprint, value))
    elif isinstance(value, tuple | list):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, CodeType):
        yield from (value.co_code, value.co_consts, value.co_names)
    else:
        yield f"{type(value).__module__}.{getattr(value, '__qualname__', '')}"
        yield from (item for item in getattr(value, "__dict__", {}).items() if _is_option(item[1]))


def _of_function(function: FunctionType) -> Iterator[Any]:
    """List code and variables of a function; of those of packages, the name."""
    yield f"{function.__module__}.{function.__qualname__}"
    if function.__module__.partition(".")[0] in ("torch", "numpy"):
        return
    yield from (function.__code__, function.__defaults__, function.__kwdefaults__)
    yield from (cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not function)
    names = {name for name in function.__code__.co_names if name in function.__globals__}
    yield from ((name, function.__globals__[name]) for name in sorted(names) if _is_option(function.__globals__[name]))
