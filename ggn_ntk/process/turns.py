"""Who goes first where threads share what only one of them can have: a model, or forward mode."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch.nn import Module

# Who uses which modules and parameters, by their id, or forward mode: a thread, and how often. And who waits for which.
_USERS: dict[int, tuple[int, int]] = {}
_WAITING: dict[int, set[int]] = {}
_RELEASED = threading.Condition()
_FORWARD_MODE = {-1}


@contextmanager
def alone_with(model: Module) -> Iterator[None]:
    """Have a model for this thread alone, as it is between the evaluations of others, which exchange its parameters."""
    modules = {id(module) for module in model.modules()}

    def wanted() -> set[int]:
        return modules | ({id(p) for p in model.parameters()} if _is_free(modules) else set())

    with _claimed(wanted):
        yield


@contextmanager
def forward_mode() -> Iterator[None]:
    """Have forward mode for this thread alone: torch keeps its level for the process."""
    with _claimed(lambda: _FORWARD_MODE):
        yield


@contextmanager
def if_free(model: Module) -> Iterator[bool]:
    """Keep others from having a model meanwhile, unless one has it already."""
    with _RELEASED:
        yield _is_free(map(id, model.modules()))


def _is_free(keys: Iterable[int]) -> bool:
    """Tell whether no other thread uses any of these."""
    return not _owners(keys) - {threading.get_ident()}


def _owners(keys: Iterable[int]) -> set[int]:
    """List the threads that use any of these."""
    return {_USERS[key][0] for key in keys if key in _USERS}


def _is_circular(thread: int) -> bool:
    """Tell whether a thread that waits is waited for by those that it waits for."""
    reached, waiting = set[int](), [thread]
    while waiting:
        found = _owners(_WAITING.get(waiting.pop(), ())) - reached
        reached |= found
        waiting += found
    return thread in reached


@contextmanager
def _claimed(wanted: Callable[[], set[int]]) -> Iterator[None]:
    """Wait until something is free, and have it for this thread alone."""
    thread = threading.get_ident()
    with _RELEASED:
        keys = wanted()
        try:
            while not _is_free(keys):
                _WAITING[thread] = {key for key in keys if not _is_free({key})}
                if _is_circular(thread):
                    raise RuntimeError(
                        "Two threads wait for each other: the forward pass of each asks for the kernel of a model that "
                        "the other one evaluates. Compute these kernels one after the other."
                    )
                _RELEASED.wait()
                keys = wanted()
        finally:
            _WAITING.pop(thread, None)
        for key in keys:
            _USERS[key] = thread, _USERS.get(key, (thread, 0))[1] + 1
    try:
        yield
    finally:
        with _RELEASED:
            for key in keys:
                count = _USERS.pop(key)[1] - 1
                if count:
                    _USERS[key] = thread, count
            _RELEASED.notify_all()
