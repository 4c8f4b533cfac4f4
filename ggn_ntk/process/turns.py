"""Who goes first where threads share what only one can have: a model, forward mode, or the state of a generator."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch.nn import Module

# Which thread has a module or parameter, by its id, or forward mode, and how many times it has claimed it
_USERS: dict[int, tuple[int, int]] = {}
# What a thread waits for
_WAITING: dict[int, set[int]] = {}
# Guards both, and wakes waiting threads up when something is released
_RELEASED = threading.Condition()
# Stands for forward mode among ids
_FORWARD_MODE = {-1}

#: To be held where the state of torch's generators is read or set. Torch has a lock for each generator, and keeps it
#: while it makes a tensor of the state. Python may collect garbage at that moment, and let another thread go on: if
#: that one reads the same generator, it waits for torch's lock with Python's in its hands, and neither ever goes on.
GENERATOR_STATE = threading.RLock()


@contextmanager
def alone_with(model: Module, shared: Iterable[int] = ()) -> Iterator[None]:
    """Have a model for this thread alone, as it is when no other thread evaluates it with exchanged parameters."""
    modules = {id(module) for module in model.modules()}.union(shared)

    # Parameters count, too: two models may share one. They are listed once the modules are free, since an evaluation
    # puts others in their place.
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
    """Tell whether no other thread has a model, and keep it so inside."""
    with _RELEASED:  # no claim is granted while this is held
        yield _is_free(map(id, model.modules()))


def _is_free(keys: Iterable[int]) -> bool:
    """Tell whether no other thread uses any of these."""
    return not _owners(keys) - {threading.get_ident()}


def _owners(keys: Iterable[int]) -> set[int]:
    """List the threads that use any of these."""
    return {_USERS[key][0] for key in keys if key in _USERS}


def _is_circular(thread: int) -> bool:
    """Tell whether threads wait for each other in a circle, of which this is one."""
    reached, waiting = set[int](), [thread]
    while waiting:
        found = _owners(_WAITING.get(waiting.pop(), ())) - reached
        reached |= found
        waiting += found
    return thread in reached


@contextmanager
def _claimed(wanted: Callable[[], set[int]]) -> Iterator[None]:
    """Wait until what is wanted is free, and have it for this thread alone."""
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
                keys = wanted()  # anew: what is wanted may have changed
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
