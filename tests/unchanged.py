"""That a call leaves a model and the process as they were."""

import random
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch
from backpack import disable
from backpack.context import CTX


def module_state(model):
    """Everything on a model, down to the identity of its objects."""
    state = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else []
            entries += [id(v) for v in value] if isinstance(value, list | set | deque) else []
            state.append((name, key, id(value), entries))
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        state.append((name, id(p), p.requires_grad, id(p.grad), p._version, sorted(vars(p)), p.tolist()))
        state.append(None if p.grad is None else p.grad.tolist())
    return state


def precision():
    """The float32 precision flags: reading the legacy ones raises where torch has others, and they were set."""
    b = torch.backends
    if not hasattr(b, "fp32_precision"):
        return torch.get_float32_matmul_precision(), b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32
    switches = [b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv]
    return [switch.fp32_precision for switch in switches]


def process_state():
    """Every global setting that a kernel computation switches."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "precision": precision(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "rng": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "backpack": (CTX.active_exts, CTX.debug, CTX.extension_hook, CTX.retain_graph, list(CTX.hook_handles)),
        "store_io": disable.store_io,
    }


@contextmanager
def unchanged(model):
    torch.rand(())
    before = module_state(model), process_state()
    yield
    assert module_state(model) == before[0]
    assert process_state() == before[1]
