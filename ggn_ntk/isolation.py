"""A call leaves the model and the process as it found them.

Everything a kernel computation switches or stores is switched and stored inside :func:`isolated`,
and set back when it exits, also when it raises.
"""

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from backpack import disable
from torch import Tensor
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

_CONTAINERS = (dict, list, set, deque)


@contextmanager
def isolated(model: Module) -> Iterator[None]:
    """Run kernel computations on ``model`` in a clean room, and leave no trace.

    Inside, gradients are recorded whatever the caller's grad or inference mode, compiled models run
    eagerly, autocast and TF32 are off, attention uses the backend that batched gradients support, and
    the model's backward hooks are set aside (``torch.func`` fails on BackPACK's). On exit, all of it is
    set back, and so are the attributes of all modules (with the contents of those that are dicts, lists, sets
    or deques) and the random number generators of torch, NumPy and Python.

    Args:
        model: The model that is evaluated inside.

    Yields:
        Nothing.
    """
    devices = {tensor.device for tensor in _tensors(model)}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_state_restored([d for d in devices if d.type == "cuda"]))
        for device_type in {d.type for d in devices} - {"meta"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(full_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_attention_fast_path_off())
        stack.enter_context(disable())
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_reentrant_checkpoints_off())
        stack.enter_context(_third_party_warnings_off())
        stack.enter_context(_state_restored(model))
        yield


def _tensors(model: Module) -> Iterator[Tensor]:
    """Iterate over the parameters and buffers of a model.

    Args:
        model: The model.

    Yields:
        Each parameter, then each buffer.
    """
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def _random_state_restored(devices: list[torch.device]) -> Iterator[None]:
    """Restore the random number generators that a forward pass may draw from.

    Args:
        devices: The GPUs among them.

    Yields:
        Nothing.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _state_restored(model: Module) -> Iterator[None]:
    """Set the backward hooks of modules and parameters aside, and restore every attribute of its modules on exit.

    Args:
        model: The model to restore.

    Yields:
        Nothing.
    """
    modules = list(model.modules())
    before = [(m, dict(vars(m)), _contents(m)) for m in modules]
    tensor_hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in model.parameters() if p._backward_hooks]
    for module in modules:
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    for hooks, _ in tensor_hooks:
        hooks.clear()
    copies = {id(buffer): buffer.clone() for buffer in model.buffers()}  # forward passes may update these
    for module in modules:
        module._buffers.update({key: copies[id(b)] for key, b in module._buffers.items() if b is not None})
    try:
        yield
    finally:
        for hooks, content in tensor_hooks:
            hooks.update(content)
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)


@contextmanager
def without_hooks(module: Module) -> Iterator[None]:
    """Set all hooks of a module aside, say BackPACK's, to call it as the function it is.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [getattr(m, name) for m in module.modules() for name in names]
    before = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, content in zip(hooks, before, strict=True):
            h.update(content)


def _contents(module: Module) -> dict[str, Any]:
    """Copy what a module's containers hold: parameters, buffers, hooks, a user's lists.

    Args:
        module: The module.

    Returns:
        Shallow copies of the module's attributes that are containers, by attribute name.
    """
    return {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, _CONTAINERS)}


def _refill(container: Any, content: Any) -> None:
    """Give a container, in place, the content it had.

    Args:
        container: A dict, list, set or deque.
        content: A container of the same type.
    """
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn off TF32 and reduced-precision float32 products in matmuls, convolutions and RNNs.

    ``set_float32_matmul_precision("medium")`` costs 2e-3 relative error even on some CPUs, and GPU
    convolutions use TF32 by default.

    Yields:
        Nothing.
    """
    scope = _fp32_precision_ieee if hasattr(torch.backends, "fp32_precision") else _legacy_precision_highest
    with scope():
        yield


@contextmanager
def _fp32_precision_ieee() -> Iterator[None]:
    """Full precision through the flags of torch 2.9 and later.

    Yields:
        Nothing.
    """
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
            switch.fp32_precision = "none"  # inherit from the backend, then the process...
            if switch.fp32_precision != value:
                switch.fp32_precision = value  # ...unless the value was the operation's own


@contextmanager
def _legacy_precision_highest() -> Iterator[None]:
    """Full precision through the flags of torch before 2.9.

    Yields:
        Nothing.
    """
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
    """Let transformer layers call their modules, also where nothing in them requires a gradient.

    Yields:
        Nothing.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _reentrant_checkpoints_off() -> Iterator[None]:
    """Keep what reentrant checkpoints would evaluate again: they support neither ``torch.func`` nor ``autograd.grad``.

    Yields:
        Nothing.
    """

    def evaluate(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

    before = vars(CheckpointFunction).get("apply")
    CheckpointFunction.apply = evaluate
    try:
        yield
    finally:
        del CheckpointFunction.apply
        if before is not None:
            CheckpointFunction.apply = before


@contextmanager
def _third_party_warnings_off() -> Iterator[None]:
    """Silence the warnings that say nothing about the user's call, by their exact text.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # torch.func.jvp's first use
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        yield
