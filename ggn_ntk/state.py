"""How a model was found, in all that its forward pass may change, and how it is put back.

A forward pass is any code. It may keep activations on its modules, append to lists, move on a generator of its own,
fill a cache that some object holds. What is found changed is put back, in place, and nothing else is touched.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

# How far to follow objects that modules hold, and up to how many entries to look into a container: a model may hold the
# data set that it is trained on.
_DEPTH, _ENTRIES = 5, 1000

_FUNCTIONS = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)
# Objects of these packages are no state of a model's: loggers, locks, threads, files, groups of processes.
_OTHERS = (
    "logging",
    "threading",
    "_thread",
    "concurrent",
    "asyncio",
    "multiprocessing",
    "io",
    "_io",
    "socket",
    "weakref",
)


class State:
    """The state that modules hold, as it is now."""

    def __init__(self, modules: Iterable[Module], *, thorough: bool) -> None:
        """Take it down.

        Args:
            modules: The modules.
            thorough: Whether to follow other objects that they hold: torch's own modules hold none.
        """
        modules = list(modules)
        self._entries: list[_Entry] = []
        self._generators: list[_Entry] = []
        self._thorough = thorough
        # Parameters and buffers are for the session to look after.
        self._seen = {id(t) for m in modules for t in (*m._parameters.values(), *m._buffers.values())}
        for module in modules:
            self._add(module, 0)

    def restore(self) -> None:
        """Put back what has changed."""
        for entry in self._entries:
            if entry.changed():
                entry.put_back()

    def generators_moved(self) -> bool:
        """Tell whether a generator that a module holds is not where it was."""
        return any(entry.changed() for entry in self._generators)

    def _add(self, value: Any, depth: int) -> None:
        """Take down one object, and what it holds."""
        if id(value) in self._seen or isinstance(value, _FUNCTIONS):
            return
        self._seen.add(id(value))
        entry = _entry_of(value)
        if entry is not None:
            self._entries.append(entry)
            self._generators += [entry] if isinstance(entry, Generator) else []
            follow = self._thorough and depth < _DEPTH
            for held in entry.held() if follow or isinstance(value, Module) else ():
                if follow or isinstance(held, _Container.KINDS):
                    self._add(held, depth + 1)
        elif isinstance(value, tuple) and self._thorough and depth < _DEPTH:
            for held in value[:_ENTRIES]:
                self._add(held, depth + 1)


class _Entry:
    """Something that holds state: whether it has changed, and how to put it back."""

    def held(self) -> Iterable[Any]:
        """List what may hold state in turn."""
        return ()

    def changed(self) -> bool:
        """Tell whether it is no longer as it was."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Give it the state that it had."""
        raise NotImplementedError


class _Attributes(_Entry):
    """The attributes of an object."""

    def __init__(self, owner: Any) -> None:
        self._attributes: dict[str, Any] = vars(owner)
        self._before = dict(self._attributes)
        self._identities = _identities(self._attributes)

    def held(self) -> Iterable[Any]:
        return self._before.values()

    def changed(self) -> bool:
        return _identities(self._attributes) != self._identities

    def put_back(self) -> None:
        self._attributes.clear()
        self._attributes.update(self._before)


class _Slots(_Entry):
    """The attributes of an object that has no dictionary."""

    def __init__(self, owner: Any, names: list[str]) -> None:
        self._owner = owner
        self._before = {name: getattr(owner, name) for name in names if hasattr(owner, name)}

    def held(self) -> Iterable[Any]:
        return self._before.values()

    def changed(self) -> bool:
        return any(getattr(self._owner, name, None) is not value for name, value in self._before.items())

    def put_back(self) -> None:
        for name, value in self._before.items():
            object.__setattr__(self._owner, name, value)


class _Container(_Entry):
    """A list, deque, dict or set, or one of a class derived from these, whose own methods may refuse."""

    KINDS = (dict, list, set, deque)

    def __init__(self, container: Any) -> None:
        self._container = container
        self._before = list(container.items() if isinstance(container, dict) else container)
        self._identities = _identities(container)

    def held(self) -> Iterable[Any]:
        if len(self._before) > _ENTRIES:
            return ()
        return [entry[1] for entry in self._before] if isinstance(self._container, dict) else self._before

    def changed(self) -> bool:
        return _identities(self._container) != self._identities

    def put_back(self) -> None:
        kind: Any = next(k for k in (OrderedDict, *self.KINDS) if isinstance(self._container, k))
        kind.clear(self._container)
        if issubclass(kind, dict):
            for key, value in self._before:
                kind.__setitem__(self._container, key, value)
        elif kind is set:
            kind.update(self._container, self._before)
        else:
            kind.extend(self._container, self._before)


class _Values(_Entry):
    """The numbers of a tensor that is no parameter or buffer of a module."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._before = tensor.detach().clone()

    def changed(self) -> bool:
        return self._tensor._version != self._version

    def put_back(self) -> None:
        with torch.no_grad():
            self._tensor.copy_(self._before)
        self._version = self._tensor._version


class _Array(_Entry):
    """The numbers of a NumPy array."""

    def __init__(self, array: Any) -> None:
        self._array, self._before = array, array.copy()

    def changed(self) -> bool:
        return bool((self._array.view(np.uint8) != self._before.view(np.uint8)).any())

    def put_back(self) -> None:
        self._array[...] = self._before


class Generator(_Entry):
    """A generator of random numbers."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object]) -> None:
        """Take down where it is, by the functions that read and set its state."""
        self._read, self._write = read, write
        self._before = read()

    def changed(self) -> bool:
        """Tell whether it has moved on."""
        return bool(_comparable(self._read()) != _comparable(self._before))

    def put_back(self) -> None:
        """Move it back."""
        self._write(self._before)


def global_generators() -> tuple[Generator, Generator]:
    """Take down where the generators of the process are, Python's and NumPy's."""
    of_numpy = Generator(lambda: np.random.get_state(legacy=False), np.random.set_state)
    return Generator(random.getstate, random.setstate), of_numpy


def _entry_of(value: Any) -> _Entry | None:
    """Choose how to keep the state of an object; ``None`` for one that has none."""
    if isinstance(value, Tensor):
        kept = value.is_leaf and value.layout is torch.strided  # what has a graph is the result of another pass
        return _Values(value) if kept and not (value.is_meta or value.is_inference()) else None
    if isinstance(value, np.ndarray):
        return _Array(value) if value.flags.writeable and value.flags.c_contiguous and value.ndim else None
    if isinstance(value, torch.Generator):
        return Generator(value.get_state, value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(value, np.random.RandomState):
        return Generator(lambda: value.get_state(legacy=False), value.set_state)
    if isinstance(value, random.Random):
        return Generator(value.getstate, value.setstate)
    if isinstance(value, _Container.KINDS):
        return _Container(value)
    if type(value).__module__.split(".")[0] in _OTHERS:
        return None
    if isinstance(getattr(value, "__dict__", None), dict):
        return _Attributes(value)
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return _Slots(value, names) if names else None


def _slots(kind: type) -> Iterator[str]:
    """List the attributes that a class keeps in slots, if it is written in Python."""
    declared = vars(kind).get("__slots__", ()) if kind.__flags__ & (1 << 9) else ()  # made by a class statement
    for name in (declared,) if isinstance(declared, str) else declared:
        if name not in ("__dict__", "__weakref__") and not name.startswith("__"):
            yield name


def _identities(container: Any) -> tuple[list[Any], list[int]]:
    """List the keys and which objects there are, in an order that stays, without comparing the objects."""
    if isinstance(container, dict):
        return list(container), list(map(id, container.values()))
    identities = list(map(id, container))
    return [], sorted(identities) if isinstance(container, set) else identities


def _comparable(state: Any) -> Any:
    """Bring the state of a generator to a form that ``==`` compares."""
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    if isinstance(state, np.ndarray):
        return state.tobytes()
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    return state
