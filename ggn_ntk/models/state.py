"""How a model was found, in all that its forward pass may change, and how it is put back.

A forward pass is any code. It may keep activations on its modules, append to lists, move on a generator of its own,
fill a cache that some object holds. What is found changed is put back, in place, and nothing else is touched.
"""

from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

from ggn_ntk.models.entries import ENTRIES, Attributes, Container, Entry, Generator, entries_of
from ggn_ntk.process.torch_internals import buffers_of, parameters_of
from ggn_ntk.process.turns import if_free

# How far to follow objects that modules hold.
_DEPTH = 5

_FUNCTIONS = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


class State:
    """The state that modules hold, as it is now.

    Attributes:
        tensors: Tensors that they hold, other than as parameters and buffers.
    """

    def __init__(self, modules: Iterable[Module], *, thorough: bool) -> None:
        """Take it down; thoroughly, with what objects hold that are neither modules nor containers."""
        modules = list(modules)
        self.tensors: list[Tensor] = []
        self._entries: list[Entry] = []
        self._generators: list[Entry] = []
        # Most of what modules hold are empty containers, such as those of hooks: kept apart, they are checked quickly.
        self._empty: list[Any] = []
        self._others: list[tuple[Module, State]] = []  # models held as values, which other threads may evaluate
        self._thorough = thorough
        self._modules = set(map(id, modules))
        # Parameters and buffers: the session looks after their values, and which there are is taken down last.
        own = {
            id(t): t for m in modules for t in (*parameters_of(m).values(), *buffers_of(m).values()) if t is not None
        }
        if thorough:
            self._entries += map(Attributes, own.values())
        self._members = [store for module in modules for store in (parameters_of(module), buffers_of(module))]
        self._own = set(own)
        self._seen = self._own | set(map(id, self._members))
        for module in modules:
            self._add(module, 0)

    def add_members(self) -> None:
        """Take down which parameters and buffers there are, as they are now."""
        self._entries += map(Container, self._members)

    def restore(self) -> None:
        """Put back what has changed."""
        if any(self._empty):
            for container in self._empty:
                container.clear()
        for entry in self._entries:
            if entry.changed():
                entry.put_back()
        for module, state in self._others:
            with if_free(module) as free:
                if free:
                    state.restore()

    def generators_moved(self) -> bool:
        """Tell whether a generator that a module holds is not where it was."""
        return any(entry.changed() for entry in self._generators)

    def _add(self, value: Any, depth: int) -> None:
        """Take down one object, and what it holds."""
        kind = type(value)  # not isinstance: an object may lie about its class, or refuse to tell
        if id(value) in self._own:  # another name of a parameter or buffer
            self.tensors.append(value)
        if id(value) in self._seen or issubclass(kind, _FUNCTIONS):
            return
        if issubclass(kind, Module) and depth and id(value) not in self._modules:
            self._add_other(value, depth)
            return
        self._seen.add(id(value))  # by identity: objects may hold each other in a circle
        follow = self._thorough and depth < _DEPTH
        if kind in Container.BUILT_IN and not value:
            self._empty.append(value)
            return
        if issubclass(kind, Tensor):
            self.tensors.append(value)
        for entry in entries_of(value):
            self._entries.append(entry)
            self._generators += [entry] if isinstance(entry, Generator) else []
            for held in entry.held() if follow or issubclass(kind, Module) else ():
                if follow or issubclass(type(held), Container.KINDS):  # containers on modules are always looked into
                    self._add(held, depth + 1)
        if issubclass(kind, tuple) and follow:
            for held in tuple.__getitem__(value, slice(ENTRIES)):
                self._add(held, depth + 1)

    def _add_other(self, module: Module, depth: int) -> None:
        """Take down a model that is held as a value, say a teacher in a list, unless another thread evaluates it."""
        with if_free(module) as free:
            if free:
                # A state of its own, to be put back only while no other thread has the model.
                state = State((), thorough=self._thorough)
                state._seen, state._own, state._modules = self._seen, self._own, set(map(id, module.modules()))
                state._add(module, depth)
                self._others.append((module, state))
                self.tensors += state.tensors
                self._generators += state._generators
