"""Settings of the whole process, switched while any thread computes a kernel, and set back when none does.

Torch keeps some settings for each thread (grad mode, autocast), but others for the process: the precision of products,
the backends of attention, what ``torch.compile`` does. The first thread to come switches them, the last one to go sets
them back to what the first one found.
"""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from ggn_ntk.process.torch_internals import checkpoint_generators, jvp_nesting, may_compile, set_jvp_nesting
from ggn_ntk.process.turns import forward_mode

# Warnings that do not concern the user's call, by the start of their text.
_WARNINGS = [
    re.compile("`torch.jit.script` is deprecated"),  # at the first use of torch.func.jvp
    re.compile("There is a performance drop because we have not yet implemented"),
    re.compile("Full backward hook is firing when gradients are computed"),
]


class Switch:
    """A context of the process that any number of threads may be in at once."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Take what makes the context, which the first thread enters and the last one leaves."""
        self._context, self._lock = context, threading.RLock()
        self._inside, self._stack = 0, ExitStack()

    def __enter__(self) -> None:
        """Count a thread that enters; the first one switches."""
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self._context())
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        """Count a thread that leaves; the last one switches back."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stack.close()


class _Here(threading.local):
    """How many contexts this thread is in.

    Attributes:
        sessions: Of isolated computations.
        plain: In which checkpoints keep what they would evaluate again.
    """

    sessions, plain = 0, 0


here = _Here()


@contextmanager
def process_switches(*, recurrent: bool) -> Iterator[None]:
    """Compute in full precision and eagerly, with the backends that can be differentiated."""
    with ExitStack() as stack:
        stack.enter_context(_SWITCHES)
        if recurrent:
            stack.enter_context(_UNFUSED)
        if may_compile():
            stack.enter_context(_EAGER)
        here.sessions += 1
        try:
            yield
        finally:
            here.sessions -= 1


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Have checkpoints keep what they would evaluate again: a graph that outlives the call must not lead back to it."""
    with _SWITCHES:
        here.plain += 1
        try:
            yield
        finally:
            here.plain -= 1


@contextmanager
def _all_switches() -> Iterator[None]:
    """Switch everything that takes no further import."""
    with ExitStack() as stack:
        for context in (
            full_precision,
            _attention_fast_path_off,
            _checkpoints_that_can_be_kept,
            _forward_mode_in_turns,
        ):
            stack.enter_context(context())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # batched gradients do not go through the fused ones
        stack.enter_context(_warnings_off())
        yield


@contextmanager
def _fused_recurrence_off() -> Iterator[None]:
    """Turn off cuDNN, which cannot differentiate recurrent layers in eval mode, and oneDNN, which fuses their steps."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.enabled = value


_SWITCHES = Switch(_all_switches)
_EAGER = Switch(lambda: torch.compiler.set_stance("force_eager"))
_UNFUSED = Switch(_fused_recurrence_off)


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn off TF32 and reduced-precision float32 products in matmuls, convolutions and RNNs."""
    # ``set_float32_matmul_precision("medium")`` costs 2e-3 relative error even on some CPUs, and GPU convolutions use
    # TF32 by default.
    scope = _fp32_precision_ieee if hasattr(torch.backends, "fp32_precision") else _legacy_precision_highest
    with scope():
        yield


@contextmanager
def _fp32_precision_ieee() -> Iterator[None]:
    """Set full precision by the flags of torch 2.9 and later."""
    backends: Any = torch.backends
    switches: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    switches += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            # A switch reads as its backend's or the process's where it has no value of its own. So it gets none first,
            # and the value only where that makes a difference.
            switch.fp32_precision = "none"
            if switch.fp32_precision != value:
                switch.fp32_precision = value


@contextmanager
def _legacy_precision_highest() -> Iterator[None]:
    """Set full precision by the flags of torch before 2.9."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


@contextmanager
def _attention_fast_path_off() -> Iterator[None]:
    """Have transformer layers call their modules, also where nothing in them requires a gradient."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _checkpoints_that_can_be_kept() -> Iterator[None]:
    """Have checkpoints evaluate their function directly, in the threads that need it."""
    # Reentrant ones support neither ``torch.func`` nor ``autograd.grad``. Torch looks the names below up in its module
    # whenever a checkpoint is called, so they are exchanged there, and its classes stay as they are.
    module: Any = checkpoint
    reentrant = module.CheckpointFunction
    generators = checkpoint_generators()

    def unless_plain(generator: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        return lambda *args, **kwargs: iter([None]) if here.plain else generator(*args, **kwargs)

    module.CheckpointFunction = _direct(reentrant)
    vars(module).update({name: unless_plain(generator) for name, generator in generators.items()})
    try:
        yield
    finally:
        vars(module).update(generators, CheckpointFunction=reentrant)


@lru_cache(maxsize=1)
def _direct(reentrant: Any) -> type:
    """Derive a class of checkpoints that calls their function directly in sessions; to make a class takes long."""

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if here.sessions or here.plain:
            return function(*args)
        return reentrant.apply(function, preserve_rng_state, *args)

    return type(reentrant.__name__, (reentrant,), {"apply": staticmethod(apply)})


@contextmanager
def _forward_mode_in_turns() -> Iterator[None]:
    """Have threads enter forward mode one at a time: torch keeps its level and the count of jvps for the process."""
    original = jvp_nesting()

    @contextmanager
    def in_turns() -> Iterator[Any]:
        with forward_mode(), original() as nesting:
            yield nesting

    set_jvp_nesting(in_turns)
    try:
        yield
    finally:
        set_jvp_nesting(original)


@contextmanager
def _warnings_off() -> Iterator[None]:
    """Silence warnings that do not concern the user's call, by the start of their text."""
    # ``warnings.catch_warnings`` would undo the filters that other threads set in the meantime.
    entries = [("ignore", message, Warning, None, 0) for message in _WARNINGS]
    filters: Any = warnings.filters
    filters[:0] = entries
    try:
        yield
    finally:
        now: Any = warnings.filters  # somebody's catch_warnings may have exchanged the list
        for holder in (filters, now):
            holder[:] = [entry for entry in holder if not any(entry is own for own in entries)]


#: A context without warnings that do not concern the user's call; within a computation there are none anyway.
WITHOUT_WARNINGS = Switch(_warnings_off)
