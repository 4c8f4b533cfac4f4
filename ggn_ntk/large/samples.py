"""Sets of samples of which some are taken at a time: inputs of a model, or data sets, which are loaded bit by bit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.large import fingerprint
from ggn_ntk.problem.errors import kind_of
from ggn_ntk.problem.inputs import Shared, count_samples, select, stack_samples

# How many items of a data set, spread over it, are looked at before the work: all would have to be loaded.
_LOOKED_AT = 16


class Samples(Protocol):
    """N samples."""

    def __len__(self) -> int:
        """Return their number N."""

    def take(self, index: slice, device: torch.device) -> Any:
        """Load some of them, as inputs of the model on a device."""

    def fingerprint(self) -> str:
        """Tell them from others."""


def parse_samples(x: Any, argument: str, pick: Callable[[Any], Any] | None) -> Samples:
    """Tell inputs of a model from a data set."""
    is_items = hasattr(x, "__len__") and hasattr(x, "__getitem__") and not isinstance(x, type)
    is_inputs = isinstance(x, Tensor | tuple | Shared) or hasattr(x, "keys")
    if pick is not None and (is_inputs or not is_items):
        raise TypeError(
            f"input= picks the model's input of an item, so {argument} must be a data set, with len({argument}) and "
            f"{argument}[i], got {kind_of(x)}."
        )
    if is_inputs or not is_items or (pick is None and isinstance(x, list | np.ndarray)):
        return _Inputs(x, count_samples(x, argument))
    if not len(x):
        raise ValueError(f"{argument} has no samples: len({argument}) is 0.")
    return _DataSet(x, argument, pick)


@dataclass(frozen=True)
class _Inputs:
    """Inputs of a model."""

    x: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, index: slice, device: torch.device) -> Any:
        return select(self.x, index, device)

    def fingerprint(self) -> str:
        return fingerprint.of_samples(self.x)


@dataclass(frozen=True)
class _DataSet:
    """Anything with a length and items, of each of which the model's input is picked."""

    items: Any
    argument: str
    pick: Callable[[Any], Any] | None

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: slice, device: torch.device) -> Any:
        x = stack_samples([self._sample(i) for i in range(len(self))[index]], self.argument)
        return select(x, slice(None), device)

    def _sample(self, i: int) -> Any:
        """Load the model's input of one item."""
        item = self.items[i]
        if self.pick is not None:
            return self.pick(item)
        if not isinstance(item, Tensor) and not hasattr(item, "keys"):
            raise TypeError(
                f"{self.argument}[{i}] is a {kind_of(item)}: pass input=, which picks the model's input of an item, "
                "say input=lambda item: item[0]."
            )
        return item

    def fingerprint(self) -> str:
        n = len(self)
        places = sorted({i * (n - 1) // max(1, _LOOKED_AT - 1) for i in range(_LOOKED_AT)} & set(range(n)))
        first, again = ([fingerprint.of_samples(self._sample(i)) for i in places] for _ in range(2))
        if first != again:
            i = next(i for i, a, b in zip(places, first, again, strict=True) if a != b)
            raise ValueError(
                f"{self.argument}[{i}] is another each time that it is loaded: leave out what is random, such as "
                "augmentation."
            )
        return fingerprint.fingerprint([n, first])
