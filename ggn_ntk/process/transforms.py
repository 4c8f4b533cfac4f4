"""Transforms of ``torch.func`` that are under way around a call."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def is_transformed() -> bool:
    """Tell whether a transform is under way, in which tensors stand for others."""
    return torch._C._functorch.maybe_current_level() is not None


def is_wrapped(x: Any) -> bool:
    """Tell whether a value stands for another inside of a transform."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Leave transforms of ``torch.func`` that are under way, in whose course a model may ask for another's kernel."""
    with temporarily_clear_interpreter_stack() if is_transformed() else nullcontext():
        yield
