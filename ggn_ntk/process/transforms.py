"""Transforms of ``torch.func`` inside of which a call is made."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def is_transformed() -> bool:
    """Tell whether a transform is under way, inside of which tensors are wrapped."""
    return torch._C._functorch.maybe_current_level() is not None


def is_wrapped(x: Any) -> bool:
    """Tell whether a value is a tensor that a transform has wrapped."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Leave transforms that are under way: a model that is being transformed may ask for the kernel of another."""
    with temporarily_clear_interpreter_stack() if is_transformed() else nullcontext():
        yield
