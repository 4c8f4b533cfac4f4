"""A call leaves the model and the process as it found them, also when it raises, and also beside other threads.

A *session* is entered once for all evaluations of a call (:func:`isolated`). It has the modules of the model for
itself: calls in other threads that share one of them wait. Settings of the process are switched for as long as any
session lasts (:mod:`ggn_ntk.process.switches`). Every evaluation starts from the state in which the model was found,
and on exit that state is put back (:mod:`ggn_ntk.models.state`).
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, RNNBase
from torch.nn.parameter import is_lazy

from ggn_ntk.models.comparison import read
from ggn_ntk.models.entries import Values, address_of, storage_of
from ggn_ntk.models.inspection import DRAWS, Inspection
from ggn_ntk.models.state import State
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, is_out_of_memory
from ggn_ntk.problem.functions import shared_by
from ggn_ntk.process.switches import process_switches
from ggn_ntk.process.torch_internals import (
    backward_hooks,
    buffers_of,
    forward_hooks,
    has_global_hooks,
    parameters_of,
    take_hooks_off,
    tensor_hooks,
    version_of,
)
from ggn_ntk.process.turns import alone_with


class _Entered(threading.local):
    """The sessions that this thread is in."""

    def __init__(self) -> None:
        # By the id of the model, with how many times the thread has entered it
        self.sessions: dict[int, tuple[Session, int]] = {}


_ENTERED = _Entered()


@contextmanager
def plain_torch(model: Module) -> Iterator[None]:
    """Have torch compute in full precision with its usual settings, whatever the caller's are."""
    with ExitStack() as stack:
        # First what torch keeps for each thread. Leaving inference mode also resets autograd's multithreading, whatever
        # the caller chose: so only if it is on.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        modules = list(model.modules())
        held = (t for m in modules for store in (parameters_of(m), buffers_of(m)) for t in store.values())
        for device_type in {t.device.type for t in held if t is not None} - {"meta"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(process_switches(recurrent=any(isinstance(m, RNNBase) for m in modules)))
        stack.enter_context(_default_device(torch.device("cpu")))
        yield


@contextmanager
def isolated(model: Module) -> Iterator["Session"]:
    """Open a session for a model, in which kernels are computed and after which no trace is left."""
    session, depth = _ENTERED.sessions.get(id(model), (None, 0))
    if session is not None:  # inside of itself, in the same thread, it goes on with the same session
        _ENTERED.sessions[id(model)] = session, depth + 1
        try:
            yield session
        finally:
            _ENTERED.sessions[id(model)] = session, depth
        return
    device = torch.get_default_device()  # the caller's, which evaluations of the model find as usual
    with ExitStack() as stack:
        stack.enter_context(plain_torch(model))
        # On exit the order is the reverse: it is put back before other threads get their turn.
        stack.enter_context(alone_with(model, shared_by(model)))
        session = Session(model, device)
        stack.callback(session.close)
        _ENTERED.sessions[id(model)] = session, 1
        stack.callback(_ENTERED.sessions.pop, id(model))
        try:
            yield session
        except UnsupportedModelError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                session.verify(error)  # what the model does to its parameters may have caused the error
            raise
        session.verify()


def _default_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the default for new tensors."""
    # Where it is the default anyway, without a mode: each operation would have to pass it.
    return nullcontext() if torch.get_default_device() == device else device


def runs_other_code(module: Module) -> bool:
    """Tell whether a call of a module may run code that is not torch's own, apart from that of its children."""
    own = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
    return not own or runs_hooks(module)


def runs_hooks(module: Module) -> bool:
    """Tell whether a module has forward hooks other than BackPACK's."""
    return any(not _is_of_backpack(hook) for hooks in forward_hooks(module) for hook in hooks.values())


def _is_of_backpack(hook: Any) -> bool:
    """Tell whether a hook is the one by which BackPACK stores inputs and outputs; it is not imported for that."""
    return hook is getattr(sys.modules.get("backpack"), "hook_store_io", None)


class Session:
    """A model during a call.

    Attributes:
        foreign: Whether its forward pass may run code that is not torch's own.
        written: Parameters that its forward pass writes to, with the values they had.
        set_back: Buffers that its forward pass has written to, and that are no copies since they have a second name.
        low: Dtypes of low precision in which it computes.
        earlier: Nodes of graphs from earlier forward passes, of which its modules hold a result.
    """

    def __init__(self, model: Module, device: torch.device) -> None:
        """Take down the state of the model, and set aside what would take part in backward passes."""
        self._model, self._modules, self._default_device = model, list(model.modules()), device
        self.foreign = has_global_hooks() or any(runs_other_code(module) for module in self._modules)
        self.written: dict[Tensor, Tensor] = {}
        self.set_back: list[Tensor] = []
        self.low: set[torch.dtype] = set()
        self._evaluating = False
        self._changed: list[_Parameter] | None = None
        # Code that is not torch's may write to parameters in some evaluations, and past torch's counters.
        named = {name: p for name, p in model.named_parameters() if not is_lazy(p)}
        self._params = [_Parameter(name, p, keep=self.foreign) for name, p in named.items()]
        self._hooks: list[tuple[Any, dict[int, Any]]] = []  # stores of hooks, and what was in them
        self._buffers: list[Values] = []  # buffers that may be written to in their place
        # Where a buffer was replaced by a copy: the module's buffers, the name, the buffer, the copy
        self._aside: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._hidden: list[Tensor] = []  # buffers that were written to although the model had a copy
        self._state: State | None = None
        try:
            self._set_hooks_aside()
            for param in self._params:
                param.set_aside()
            state = State(self._modules, thorough=self.foreign)
            self._set_buffers_aside([*state.tensors, *named.values()])
            state.add_members()  # with the copies of buffers in place
            self._state = state
        except BaseException:
            self.close()
            raise
        self.earlier = {t.grad_fn for t in state.tensors if t.grad_fn is not None}

    @property
    def bytes_of_copies(self) -> int:
        """What copies of parameters take, by which it shows whether code that is not torch's has changed them."""
        return sum(param.copy.nbytes for param in self._params if param.copy is not None)

    def _set_hooks_aside(self) -> None:
        """Take off hooks of backward passes, on which ``torch.func`` fails, and those with which BackPACK stores."""
        modules, params = self._modules, [kept.param for kept in self._params]
        hooks: list[Any] = [h for m in modules for h in backward_hooks(m)]
        hooks += [h for stores in map(tensor_hooks, params) for h in stores if h]
        of_backpack = [h for h, _ in map(forward_hooks, modules) if any(map(_is_of_backpack, h.values()))]
        self._hooks = [(h, dict(h)) for h in (*hooks, *of_backpack) if h]
        for h in hooks:
            h.clear()
        for h in of_backpack:
            for key in [key for key, hook in h.items() if _is_of_backpack(hook)]:
                del h[key]

    def _set_buffers_aside(self, others: list[Tensor]) -> None:
        """Replace buffers by copies, which evaluations may write to, and watch those that cannot be replaced."""
        buffers = {id(b): b for b in self._model.buffers() if not is_lazy(b)}
        # A buffer that is also known under another name stays in its place, to be set back.
        shared = Counter(map(storage_of, (*others, *buffers.values())))
        alone = [b for b in buffers.values() if not storage_of(b) or shared[storage_of(b)] < 2]
        copies = {id(b): b.detach().clone() for b in alone}
        # Code that is not torch's may write to the others, too, under a name that does not show.
        watched = [b for b in buffers.values() if self.foreign or id(b) not in copies]
        self._buffers = [Values(b) for b in watched if b.layout is torch.strided and not b.is_meta]
        for store in map(buffers_of, self._modules):
            places: list[Any] = [(store, key, b, copies[id(b)]) for key, b in store.items() if id(b) in copies]
            store.update({key: copy for _, key, _, copy in places})
            self._aside += places

    def close(self) -> None:
        """Put everything back, whatever fails."""
        # Last in, first out. First comes the state, to which the copies of buffers belong; then what was in the way of
        # evaluations: hooks, the buffers themselves, gradients. Each is put back even if another fails.
        with ExitStack() as stack:
            for param in self._params:
                stack.callback(param.put_back)
            for store, key, found, _ in self._aside:
                stack.callback(store.__setitem__, key, found)
            for h, content in self._hooks:
                stack.callback(h.update, content)
                stack.callback(h.clear)  # comes before the update
            stack.callback(self._restore)

    def _restore(self) -> None:
        """Give parameters that were written to unnoticed the values that they had."""
        for param in self._rewritten():
            param.restore()

    def _rewritten(self) -> "list[_Parameter]":
        """Put the model back to how it was found, and list the parameters that were written to unnoticed."""
        if self._changed is None:
            self._reset()
            others = [param for param in self._params if param.param not in self.written]
            counted = [param for param in others if param.counted]
            rest = [param for param in others if not param.counted and param.copy is not None]
            flags = read([param.looks_changed() for param in rest])  # waits for the device once
            suspects = (param for param, flag in zip(rest, flags, strict=True) if flag)
            self._changed = [*counted, *(param for param in suspects if param.differs())]
        return self._changed

    def verify(self, cause: Exception | None = None) -> None:
        """Make sure that no evaluation did what would make kernels wrong."""
        problems = []
        for param in self._params:
            if param.accumulated:
                what = "its .grad was set, by a backward pass inside of the model's own (as of reversible layers)"
                problems.append(
                    Problem(param.name, what, "Switch that off, so that autograd alone passes gradients back")
                )
        for param in self._rewritten():
            if not param.accumulated:
                what = "its values changed during the call"
                problems.append(
                    Problem(param.name, what, "Let neither the forward pass nor another thread write to it")
                )
        for name in {key for _, key, found, _ in self._aside if any(found is buffer for buffer in self._hidden)}:
            what = "it is a buffer that is written to under another name, which does not show"
            problems.append(Problem(name, what, "Write to it as an attribute of its module"))
        if problems:
            raise UnsupportedModelError(problems) from cause

    @contextmanager
    def evaluation(self, values: dict[int, Tensor], *, inspect: bool = False) -> Iterator[None]:
        """Let the model be called once, from the state in which it was found."""
        # A hook of the model may ask for a kernel of this very model: then the outer evaluation goes on as it was.
        around = State(self._modules, thorough=self.foreign) if self._evaluating else None
        if around is not None:
            around.add_members()
        self._reset()
        copies = {id(copy): found.detach().clone() for _, _, found, copy in self._aside}  # of buffers, to write to
        inspection = Inspection({kept.param: kept.copy for kept in self._params}, self.written) if inspect else None
        outer, self._evaluating = self._evaluating, True
        try:
            with ExitStack() as stack:
                stack.enter_context(_default_device(self._default_device))
                stack.enter_context(_exchanged(self._model, {**copies, **values}))
                if inspection is not None:
                    stack.enter_context(inspection)
                yield
            if self._state is not None and self._state.generators_moved():
                raise UnsupportedModelError([DRAWS])
        finally:
            self._evaluating = outer
            if inspection is not None:
                self.low |= inspection.low
            if around is not None:
                around.restore()

    def _reset(self) -> None:
        """Put the model back to how it was found, except for what is set aside."""
        if self._state is not None:
            self._state.restore()
        for param in self._params:
            param.reset()
        for buffer in self._buffers:
            if buffer.changed():
                buffer.put_back()
                replaced = any(buffer.tensor is found for _, _, found, _ in self._aside)
                (self._hidden if replaced else self.set_back).append(buffer.tensor)
        with torch.no_grad():
            for written, before in self.written.items():
                written.copy_(before)


class _Parameter:
    """A parameter, and how it was found.

    Attributes:
        name: Its name.
        param: The parameter.
        copy: Its values, if they are kept.
    """

    def __init__(self, name: str, param: Tensor, *, keep: bool) -> None:
        self.name, self.param, self._memory = name, param, param.data
        self._requires_grad, self._address = param.requires_grad, address_of(param)
        self._version = None if param.is_inference() else version_of(param)
        self._grad = param.grad if param.is_leaf else None
        self._hooks = tensor_hooks(param)
        self.copy = param.detach().clone() if keep and not param.is_meta else None

    @property
    def accumulated(self) -> bool:
        """Whether a backward pass has added to its gradient."""
        return self.param.is_leaf and self.param.grad is not None

    @property
    def counted(self) -> bool:
        """Whether torch counted that it was written to."""
        return self._version is not None and version_of(self.param) != self._version

    def looks_changed(self) -> Tensor:
        """Compute on its device whether it has other values than it had, or NaN."""
        assert self.copy is not None
        return torch.ne(self.param.detach(), self.copy).any()

    def differs(self) -> bool:
        """Tell whether it has other values than it had; NaN is equal to NaN."""
        assert self.copy is not None
        return not bool(((self.param.detach() == self.copy) | (self.copy != self.copy)).all())

    def set_aside(self) -> None:
        """Take its gradient off."""
        if self._grad is not None:
            self.param.grad = None

    def reset(self) -> None:
        """Give it the memory and the flag that it had, and no hooks."""
        if address_of(self.param) != self._address:
            self.param.data = self._memory
        if self.param.requires_grad != self._requires_grad:
            self.param.requires_grad_(self._requires_grad)
        take_hooks_off(self.param, self._hooks)  # the session keeps those that it had

    def restore(self) -> None:
        """Give it the values that it had."""
        if self.copy is not None:
            with torch.no_grad():
                self.param.copy_(self.copy)

    def put_back(self) -> None:
        """Give it the gradient that it had."""
        if self.param.is_leaf:
            self.param.grad = self._grad


@contextmanager
def _exchanged(model: Module, values: dict[int, Tensor]) -> Iterator[None]:
    """Exchange parameters and buffers of a model, by their id, wherever its modules hold them."""
    # ``torch.func.functional_call`` does the same, but leaves a plain tensor where the parameter was if a module is
    # held in two places.
    modules = model.modules() if values else ()
    stores: list[dict[str, Any]] = [
        store for module in modules for store in (parameters_of(module), buffers_of(module))
    ]
    places = [(store, key, t) for store in stores for key, t in store.items() if id(t) in values]
    try:
        for store, key, tensor in places:
            store[key] = values[id(tensor)]
        yield
    finally:
        for store, key, tensor in places:
            store[key] = tensor
