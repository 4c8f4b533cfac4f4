"""A call leaves the model and the process as it found them, also when it raises, and also beside other threads.

A *session* is entered once for all evaluations of a call (:func:`isolated`). It has the modules of the model for
itself: calls in other threads that share one of them wait. Settings of the process are switched for as long as any
session lasts (:mod:`ggn_ntk.switches`). Every evaluation starts from the state in which the model was found, and on
exit that state is put back (:mod:`ggn_ntk.state`).
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from backpack import hook_store_io
from torch import Tensor
from torch.nn import Module, RNNBase
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from ggn_ntk.errors import Problem, UnsupportedModelError
from ggn_ntk.inspection import DRAWS, Inspection
from ggn_ntk.state import State
from ggn_ntk.switches import process_switches

# Who uses which modules and parameters, by their id: a thread, and how many of its sessions.
_USERS: dict[int, tuple[int, int]] = {}
_RELEASED = threading.Condition()


class _Entered(threading.local):
    """The sessions that this thread is in, by the id of the model, and how often."""

    def __init__(self) -> None:
        self.sessions: dict[int, tuple[Session, int]] = {}


_ENTERED = _Entered()


@contextmanager
def isolated(model: Module) -> Iterator["Session"]:
    """Run kernel computations on ``model`` in a clean room, and leave no trace.

    Inside, gradients are recorded whatever the caller's grad or inference mode, compiled models run eagerly, autocast
    and TF32 are off, attention uses the backend that batched gradients support, and the model's gradients and backward
    hooks are set aside (``torch.func`` fails on BackPACK's). On exit, all of it is set back, with the values of
    parameters and buffers, the attributes of all modules, and what these hold.

    Inside of itself, in the same thread, it goes on with the same session.

    Args:
        model: The model that is evaluated inside.

    Yields:
        The session.

    Raises:
        UnsupportedModelError: On exit, if evaluations did what makes kernels wrong: accumulate gradients in parameters,
            or write to parameters unnoticed.
    """
    session, depth = _ENTERED.sessions.get(id(model), (None, 0))
    if session is not None:
        _ENTERED.sessions[id(model)] = session, depth + 1
        try:
            yield session
        finally:
            _ENTERED.sessions[id(model)] = session, depth
        return
    device = torch.get_default_device()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # to leave it switches threads of autograd on, whatever the caller chose
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {t.device.type for t in (*model.parameters(), *model.buffers())} - {"meta"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(process_switches(recurrent=any(isinstance(m, RNNBase) for m in model.modules())))
        stack.enter_context(_default_device(torch.device("cpu")))
        stack.enter_context(_alone_with(model))
        session = Session(model, device)
        stack.callback(session.close)
        _ENTERED.sessions[id(model)] = session, 1
        stack.callback(_ENTERED.sessions.pop, id(model))
        yield session
        session.verify()


def _default_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make tensors on a device unless told otherwise; if that is so anyway, without a mode that each call passes."""
    return nullcontext() if torch.get_default_device() == device else device


@contextmanager
def _alone_with(model: Module) -> Iterator[None]:
    """Wait until no other thread uses a module or parameter of the model."""
    thread, wanted = threading.get_ident(), {id(x) for x in (*model.modules(), *model.parameters())}
    nobody = (thread, 0)
    with _RELEASED:
        _RELEASED.wait_for(lambda: all(_USERS.get(key, nobody)[0] == thread for key in wanted))
        for key in wanted:
            _USERS[key] = thread, _USERS.get(key, nobody)[1] + 1
    try:
        yield
    finally:
        with _RELEASED:
            for key in wanted:
                count = _USERS.pop(key)[1] - 1
                if count:
                    _USERS[key] = thread, count
            _RELEASED.notify_all()


def runs_other_code(module: Module) -> bool:
    """Tell whether a call of a module, without its children, may run code that is not torch's own."""
    own = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
    return not own or runs_hooks(module)


def runs_hooks(module: Module) -> bool:
    """Tell whether a module has forward hooks other than BackPACK's."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(hook is not hook_store_io for hook in hooks)


def has_global_hooks() -> bool:
    """Tell whether hooks run at the calls of all modules."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class Session:
    """A model during a call.

    Attributes:
        foreign: Whether its forward pass may run code that is not torch's own.
        written: Parameters that its forward pass writes to, with the values they had.
    """

    def __init__(self, model: Module, device: torch.device) -> None:
        """Take down the state of the model, and set aside what would take part in backward passes.

        Args:
            model: The model.
            device: Where it makes tensors unless told otherwise.
        """
        modules = list(model.modules())
        params = {name: p for name, p in model.named_parameters() if not is_lazy(p)}
        self._default_device = device
        self.foreign = has_global_hooks() or any(runs_other_code(module) for module in modules)
        self.written: dict[Tensor, Tensor] = {}
        self._model, self._params = model, [_Parameter(name, p) for name, p in params.items()]
        hooks: list[Any] = [h for m in modules for h in (m._backward_hooks, m._backward_pre_hooks)]
        hooks += [p._backward_hooks for p in params.values() if p._backward_hooks]
        self._hooks = [(h, dict(h)) for h in hooks if h]
        copies = {id(b): b.detach().clone() for b in model.buffers() if not is_lazy(b)}
        self._buffers = [
            _Buffer(m._buffers, key, b, copies[id(b)])
            for m in modules
            for key, b in m._buffers.items()
            if b is not None and id(b) in copies
        ]
        self._kept: list[_Parameter | _Buffer] = [*self._params, *self._buffers]
        self._state: State | None = None
        try:
            for h, _ in self._hooks:
                h.clear()
            for kept in self._kept:
                kept.set_aside()
            self._state = State(modules, thorough=self.foreign)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put everything back."""
        self._reset()
        for h, content in self._hooks:
            h.update(content)
        for kept in self._kept:
            kept.put_back()

    def verify(self) -> None:
        """Make sure that no evaluation did what would make kernels wrong.

        Raises:
            UnsupportedModelError: If one did.
        """
        problems = []
        for kept in self._params:
            if kept.accumulated:
                what = "its .grad was set, by a backward pass inside of the model's own (as of reversible layers)"
                problems.append(
                    Problem(kept.name, what, "Switch that off, so that autograd alone passes gradients back")
                )
            elif kept.rewritten and kept.param not in self.written:
                what = "its values changed during the call"
                problems.append(Problem(kept.name, what, "Let neither the forward pass nor another thread write to it"))
        if problems:
            raise UnsupportedModelError(problems)

    @contextmanager
    def evaluation(self, values: dict[int, Tensor], *, inspect: bool = False) -> Iterator[None]:
        """Let the model be called once, from the state in which it was found.

        Args:
            values: Tensors to put in place of parameters, by the id of these.
            inspect: Whether to look at what code does that is not torch's own: whether it draws random numbers, or
                writes to parameters.

        Yields:
            Nothing.

        Raises:
            UnsupportedModelError: If it draws random numbers from torch's generators or from one of its own.
        """
        self._reset()
        copies = {id(kept.copy): kept.found.detach().clone() for kept in self._buffers}
        params = [kept.param for kept in self._params]
        inspection = Inspection(params, self.written) if inspect else nullcontext()
        with _default_device(self._default_device), _exchanged(self._model, {**copies, **values}), inspection:
            yield
        if self._state is not None and self._state.generators_moved():
            raise UnsupportedModelError([DRAWS])

    def _reset(self) -> None:
        """Give the model the state in which it was found, but for what was set aside."""
        if self._state is not None:
            self._state.restore()
        for kept in self._params:
            kept.reset()
        with torch.no_grad():
            for param, before in self.written.items():
                param.copy_(before)


class _Parameter:
    """A parameter, and how it was found."""

    def __init__(self, name: str, param: Tensor) -> None:
        self.name = name
        self.param, self._memory, self._requires_grad = param, param.data, param.requires_grad
        self._address = param.data_ptr()
        self._version = None if param.is_inference() else param._version
        self._grad = param.grad if param.is_leaf else None

    @property
    def accumulated(self) -> bool:
        """Whether it was given a gradient."""
        return self.param.is_leaf and self.param.grad is not None

    @property
    def rewritten(self) -> bool:
        """Whether it was written to."""
        return self._version is not None and self.param._version != self._version

    def set_aside(self) -> None:
        """Take its gradient off."""
        if self._grad is not None:
            self.param.grad = None

    def reset(self) -> None:
        """Give it the memory and the flag that it had."""
        if self.param.data_ptr() != self._address:
            self.param.data = self._memory
        if self.param.requires_grad != self._requires_grad:
            self.param.requires_grad_(self._requires_grad)

    def put_back(self) -> None:
        """Give it the gradient that it had."""
        if self.param.is_leaf:
            self.param.grad = self._grad


class _Buffer:
    """A buffer, and a copy that takes its place.

    Attributes:
        found: The buffer.
        copy: The copy.
    """

    def __init__(self, store: dict[str, Any], key: str, found: Tensor, copy: Tensor) -> None:
        self.found, self.copy = found, copy
        self._store, self._key = store, key
        self._version = None if found.is_inference() else found._version

    def set_aside(self) -> None:
        """Let the copy take its place."""
        self._store[self._key] = self.copy

    def put_back(self) -> None:
        """Give it its place, and its values if the model writes to it under another name."""
        self._store[self._key] = self.found
        if self._version is not None and self.found._version != self._version:
            with torch.no_grad():
                self.found.copy_(self.copy)


@contextmanager
def _exchanged(model: Module, values: dict[int, Tensor]) -> Iterator[None]:
    """Exchange parameters and buffers of a model, by their id, wherever its modules hold them.

    ``torch.func.functional_call`` does the same, but leaves a plain tensor where the parameter was if a module is held
    in two places.
    """
    stores: list[dict[str, Any]] = [
        store for module in model.modules() for store in (module._parameters, module._buffers)
    ]
    places = [(store, key, t) for store in stores for key, t in store.items() if id(t) in values]
    try:
        for store, key, tensor in places:
            store[key] = values[id(tensor)]
        yield
    finally:
        for store, key, tensor in places:
            store[key] = tensor
