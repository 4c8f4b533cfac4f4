"""Transforms of ``torch.func`` that are under way around a call."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from ggn_ntk.process.torch_internals import is_wrapped_tensor, transform_level, without_transforms


def is_transformed() -> bool:
    """Tell whether a transform is under way, in which tensors stand for others."""
    return transform_level() is not None


def is_wrapped(x: Any) -> bool:
    """Tell whether a value stands for another inside of a transform."""
    return isinstance(x, Tensor) and is_wrapped_tensor(x)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Leave transforms of ``torch.func`` that are under way, in whose course a model may ask for another's kernel."""
    with without_transforms() if is_transformed() else nullcontext():
        yield
