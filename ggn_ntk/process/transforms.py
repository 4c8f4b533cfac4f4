"""Transforms of ``torch.func`` inside of which a call is made."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from ggn_ntk.process.torch_internals import is_wrapped_tensor, transform_level, without_transforms


def is_transformed() -> bool:
    """Tell whether a transform is under way, inside of which tensors are wrapped."""
    return transform_level() is not None


def is_wrapped(x: Any) -> bool:
    """Tell whether a value is a tensor that a transform has wrapped."""
    return isinstance(x, Tensor) and is_wrapped_tensor(x)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Leave transforms that are under way: a model that is being transformed may ask for the kernel of another."""
    with without_transforms() if is_transformed() else nullcontext():
        yield
