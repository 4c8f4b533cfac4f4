"""What a forward pass does that makes its kernel random, or that a call has to put back: looked at while it runs."""

import random
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ggn_ntk.errors import Problem, UnsupportedModelError
from ggn_ntk.state import global_generators

_T = TypeVar("_T")

DRAWS = Problem("", "its forward pass draws random numbers", "Call eval(), or make its forward pass deterministic")


class Inspection(TorchDispatchMode):
    """Looks at each operation of a forward pass before it is carried out."""

    def __init__(self, params: Iterable[Tensor], written: dict[Tensor, Tensor]) -> None:
        """Set up.

        Args:
            params: Parameters that operations may write to.
            written: Takes down those that they do write to, with the values that they had.
        """
        super().__init__()
        self._params, self._written = {p.untyped_storage()._cdata: p for p in params}, written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, unless it draws random numbers."""
        kwargs = kwargs or {}
        draws, written = _effects(func)
        if draws and _draws(func, args, kwargs):
            raise UnsupportedModelError([DRAWS])
        for tensor in tree_leaves([args[i] if i < len(args) else kwargs.get(name) for i, name in written]):
            param = self._params.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
            if param is not None and param not in self._written:
                self._written[param] = param.detach().clone()
        return func(*args, **kwargs)


class OwnGenerator(TorchDispatchMode):
    """Has operations draw random numbers from a generator of their own, and leave those of the process alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation."""
        kwargs = kwargs or {}
        draws, _ = _effects(func)
        if not draws or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        device = next((x.device for x in args if isinstance(x, Tensor)), kwargs.get("device") or "cpu")
        takes_one = _with_generator(func)
        if takes_one is not None:
            return takes_one(*args, **kwargs | {"generator": torch.Generator(device)})
        with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
            return func(*args, **kwargs)


@cache
def _with_generator(func: Any) -> Any:
    """Look up the form of an operation that takes a generator; ``None`` where there is none."""
    names = {a.name for a in func._schema.arguments} | {"generator"}
    forms = [func, *(getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())]
    return next((form for form in forms if {a.name for a in form._schema.arguments} == names), None)


@cache
def _effects(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Tell whether an operation may draw random numbers, and which of its arguments it writes to."""
    infos = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments)]
    writes = ((i, name) for i, name, alias in infos if alias is not None and alias.is_write)
    return torch.Tag.nondeterministic_seeded in func.tags, tuple(writes)


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of an operation that may draw does so, from a generator that is not the caller's own."""
    given = {a.name: a.default_value for a in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    off = any(given.get(name) is False for name in ("train", "training")) or given.get("dropout_p") == 0
    return not off and given.get("generator") is None


def without_draws(call: Callable[..., _T], *args: Any) -> _T:
    """Evaluate a model, unless it draws random numbers from the generators of NumPy or Python.

    Where these have moved, another thread may have moved them: then the call is made once more, under watch.

    Args:
        call: Evaluates the model.
        *args: Its arguments, but for the call under watch.

    Returns:
        What the call returns.

    Raises:
        UnsupportedModelError: If it draws. The generators are as before.
    """
    generators = global_generators()
    result = call(*args)
    if any(generator.changed() for generator in generators) and _calls_a_generator(call):
        for generator in generators:
            generator.put_back()
        raise UnsupportedModelError([DRAWS])
    return result


def _calls_a_generator(call: Callable[[], Any]) -> bool:
    """Tell whether a call draws from the generators of Python or NumPy in this thread."""
    of_python: Any = vars(random)["_inst"]
    drawn = False

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal drawn
        drawn = drawn or (event == "c_call" and getattr(argument, "__self__", None) is of_python)

    lock = np.random.mtrand._rand._bit_generator.lock
    reentrant = isinstance(lock, type(threading.RLock()))  # since NumPy 2; then no other thread can draw meanwhile
    before = sys.getprofile()
    with lock if reentrant else nullcontext():
        _, of_numpy = global_generators()
        sys.setprofile(watch)
        try:
            call()
        finally:
            sys.setprofile(before)
        return drawn or of_numpy.changed()
