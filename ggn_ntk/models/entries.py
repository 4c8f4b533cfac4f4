"""Kinds of objects that hold state: how each is taken down, compared and put back.

Objects are compared by identity and read past the methods of their class: these may be any code, and may refuse.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.process.torch_internals import storage_id, version_of
from ggn_ntk.process.turns import GENERATOR_STATE

#: Up to how many entries to look into a container: a model may hold the data set that it is trained on.
ENTRIES = 1000

# Up to how many entries a tensor's numbers are compared, besides torch's count of the times it was written to.
_COMPARED = 2**16

# Objects of these packages are no state of a model: loggers, locks, threads, files, groups of processes.
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

# The value of a slot that was never set.
_UNSET = object()


class Entry:
    """Something that holds state, as it was when it was taken down."""

    def held(self) -> Iterable[Any]:
        """List what it holds, which may hold state in turn."""
        return ()

    def changed(self) -> bool:
        """Tell whether it has changed since."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Give it back the state that it had."""
        raise NotImplementedError


class Attributes(Entry):
    """The attributes of an object."""

    def __init__(self, owner: Any) -> None:
        """Take them down, past what their class does to attributes."""
        self._attributes: dict[str, Any] = object.__getattribute__(owner, "__dict__")
        self._before = dict(self._attributes)
        self._identities = _identities(self._attributes)

    def held(self) -> Iterable[Any]:
        """List their values."""
        return self._before.values()

    def changed(self) -> bool:
        """Tell whether one was added, removed or exchanged."""
        return _identities(self._attributes) != self._identities

    def put_back(self) -> None:
        """Give the object those that it had."""
        self._attributes.clear()
        self._attributes.update(self._before)


class _Slots(Entry):
    """The attributes that an object keeps outside of a dictionary."""

    def __init__(self, owner: Any, slots: list[MemberDescriptorType]) -> None:
        self._owner, self._slots = owner, slots
        self._before = self._read()

    def _read(self) -> list[Any]:
        """Read the slots by their descriptors, past what the class does to attributes."""
        values = []
        for slot in self._slots:
            try:
                values.append(slot.__get__(self._owner))
            except AttributeError:
                values.append(_UNSET)
        return values

    def held(self) -> Iterable[Any]:
        return self._before

    def changed(self) -> bool:
        return any(now is not before for now, before in zip(self._read(), self._before, strict=True))

    def put_back(self) -> None:
        for slot, now, before in zip(self._slots, self._read(), self._before, strict=True):
            if before is not _UNSET:
                slot.__set__(self._owner, before)
            elif now is not _UNSET:
                slot.__delete__(self._owner)


class Container(Entry):
    """A list, deque, dict or set, or one of a class derived from these, whose own methods may refuse."""

    KINDS = (dict, list, set, deque)
    BUILT_IN = (OrderedDict, *KINDS)

    def __init__(self, container: Any) -> None:
        """Take down its entries."""
        self._container, kind = container, type(container)
        self._kind: Any = next(k for k in self.BUILT_IN if issubclass(kind, k))
        self._before = self._read()
        self._identities = self._identify()

    def _read(self) -> list[Any]:
        """List the entries; of a dict, the keys and then the values."""
        if not issubclass(self._kind, dict):
            return list(self._kind.__iter__(self._container))
        return [*self._kind.keys(self._container), *self._kind.values(self._container)]

    def _identify(self) -> list[int]:
        """Identify the entries without comparing them; those of a set, which has no order, sorted."""
        identities = list(map(id, self._read()))
        return sorted(identities) if self._kind is set else identities

    def held(self) -> Iterable[Any]:
        """List its entries, unless there are too many to look into; of a dict, the values."""
        values = self._before[len(self._before) // 2 :] if issubclass(self._kind, dict) else self._before
        return values if len(values) <= ENTRIES else ()

    def changed(self) -> bool:
        """Tell whether one was added, removed, exchanged or, where they have an order, moved."""
        return self._identify() != self._identities

    def put_back(self) -> None:
        """Give it the entries that it had, by methods of the built-in type alone."""
        self._kind.clear(self._container)
        if issubclass(self._kind, dict):
            half = len(self._before) // 2
            for key, value in zip(self._before[:half], self._before[half:], strict=True):
                self._kind.__setitem__(self._container, key, value)
        elif self._kind is set:
            set.update(self._container, self._before)
        else:
            self._kind.extend(self._container, self._before)


class Values(Entry):
    """The numbers of a dense tensor."""

    def __init__(self, tensor: Tensor) -> None:
        """Take them down."""
        self.tensor, self._memory, self._before = tensor, tensor.data, tensor.detach().clone()
        self._address, self._version = address_of(tensor), _version(tensor)
        self._requires_grad, self._grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    def changed(self) -> bool:
        """Tell whether it was written to, or its gradient or ``requires_grad`` was set."""
        tensor = self.tensor
        if self._moved() or _version(tensor) != self._version or tensor.requires_grad != self._requires_grad:
            return True
        if tensor.is_leaf and tensor.grad is not self._grad:
            return True
        # Code may write past torch's counter, say through NumPy. On a device a comparison would wait.
        if tensor.device.type != "cpu" or tensor.numel() > _COMPARED:
            return False
        return not bool(((tensor.detach() == self._before) | (self._before != self._before)).all())

    def put_back(self) -> None:
        """Give it back its memory, its numbers and its gradient."""
        tensor = self.tensor
        if tensor.is_leaf and tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if self._moved():
                tensor.data = self._memory
            tensor.copy_(self._before)
        if tensor.is_leaf:
            tensor.grad = self._grad
        self._version = _version(tensor)  # to put it back was counted, too

    def _moved(self) -> bool:
        """Tell whether it has another memory or shape."""
        return address_of(self.tensor) != self._address or self.tensor.shape != self._before.shape


def _version(tensor: Tensor) -> int:
    """Read torch's count of how often a tensor was written to; 0 for those of inference mode, which have none."""
    return 0 if tensor.is_inference() else version_of(tensor)


def address_of(tensor: Tensor) -> int:
    """Find the address of a tensor's numbers; -1 where it is not dense, or stands for another inside a transform."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return -1


class _Array(Entry):
    """The numbers of a NumPy array."""

    def __init__(self, array: Any) -> None:
        self._array, self._before = array, array.copy()

    def changed(self) -> bool:
        return bool(self._array.tobytes() != self._before.tobytes())

    def put_back(self) -> None:
        self._array[...] = self._before


class _Objects(Entry):
    """The objects in a NumPy array."""

    def __init__(self, array: Any) -> None:
        self._array, self._before = array, list(array.flat)

    def held(self) -> Iterable[Any]:
        return self._before if len(self._before) <= ENTRIES else ()

    def changed(self) -> bool:
        return any(now is not before for now, before in zip(self._array.flat, self._before, strict=True))

    def put_back(self) -> None:
        for place, value in enumerate(self._before):
            self._array.flat[place] = value


class Generator(Entry):
    """A generator of random numbers."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object]) -> None:
        """Take down its state, by the functions that read and set it."""
        self._read, self._write = read, write
        self._before = read()

    def changed(self) -> bool:
        """Tell whether it has moved on."""
        return bool(_comparable(self._read()) != _comparable(self._before))

    def put_back(self) -> None:
        """Move it back."""
        self._write(self._before)


def global_generators() -> list[Generator]:
    """Take down the state of the process's generators: Python's, NumPy's and torch's."""
    of_torch = map(_generator_of_torch, generators_of_torch())
    return [Generator(random.getstate, random.setstate), generator_of_numpy(), *of_torch]


def _generator_of_torch(generator: torch.Generator) -> Generator:
    """Take down the state of a generator of torch."""

    def read() -> Tensor:
        with GENERATOR_STATE:
            return generator.get_state()

    def write(state: Tensor) -> None:
        with GENERATOR_STATE:
            generator.set_state(state)

    return Generator(read, write)


def generator_of_numpy() -> Generator:
    """Take down the state of NumPy's generator of the process."""
    return Generator(lambda: np.random.get_state(legacy=False), np.random.set_state)


def generators_of_torch() -> list[torch.Generator]:
    """List torch's generators of the process, one for each device in use."""
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


def entries_of(value: Any) -> Iterator[Entry]:
    """Take down the state of an object, by its kind; nothing for one that has none."""
    kind = type(value)
    if issubclass(kind, Tensor):
        kept = value.is_leaf and value.layout is torch.strided  # a tensor with a graph is the result of an earlier pass
        if kept and not value.is_meta:
            yield Values(value)
    elif issubclass(kind, np.ndarray):
        array = value.view(np.ndarray)
        if array.flags.writeable:
            yield _Objects(array) if array.dtype.hasobject else _Array(array)
        if kind is not np.ndarray:  # a subclass may have attributes, say a mask
            yield Attributes(value)
    elif issubclass(kind, torch.Generator):
        yield _generator_of_torch(value)
    elif issubclass(kind, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if issubclass(kind, np.random.Generator) else value
        yield Generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
    elif issubclass(kind, np.random.RandomState):
        yield Generator(lambda: value.get_state(legacy=False), value.set_state)
    elif issubclass(kind, random.Random):
        yield Generator(value.getstate, value.setstate)
    elif issubclass(kind, Container.KINDS):
        yield Container(value)
        yield from _attributes_of(value)
    elif str(kind.__module__).split(".")[0] not in _OTHERS:
        yield from _attributes_of(value)


def _attributes_of(value: Any) -> Iterator[Entry]:
    """Take down the attributes of an object, in its dictionary and in slots."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        attributes = None
    if type(attributes) is dict:
        yield Attributes(value)
    kinds = [kind for kind in type(value).__mro__ if "__slots__" in vars(kind)]
    slots = [slot for kind in kinds for slot in vars(kind).values() if isinstance(slot, MemberDescriptorType)]
    if slots:
        yield _Slots(value, slots)


def _identities(attributes: dict[str, Any]) -> list[Any]:
    """List the names of attributes and the identities of their values, without comparing these."""
    return [*attributes, *map(id, attributes.values())]


def _comparable(state: Any) -> Any:
    """Bring the state of a generator to a form that ``==`` can compare."""
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    if isinstance(state, np.ndarray):
        return state.tobytes()
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    return state


def storage_of(tensor: Tensor) -> int:
    """Identify the memory that a tensor shares with its views; 0 where it has none of its own."""
    return storage_id(tensor) if tensor.layout is torch.strided else 0
