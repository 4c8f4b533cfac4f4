"""Several outputs of a model, by key, as one: flattened and put behind one another, and kernels taken apart again."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from ggn_ntk.problem.errors import NoTensorError

#: Turns what a model returns into a tensor; ``None`` where it is one.
Pick = Callable[[Any], Any] | None


def entries_by_key(returned: object) -> dict[Hashable, Any]:
    """List what a mapping, a tuple or a list holds; nothing of anything else."""
    if isinstance(returned, Mapping):
        return dict(returned)
    return dict(enumerate(returned)) if isinstance(returned, tuple | list) else {}


@dataclass(frozen=True)
class Several:
    """Turns several outputs ``[N, *out]`` of a model into one, ``[N, C]``."""

    pick: Pick  # what is applied to the model's results before
    shapes: dict[Hashable, Size]  # ``[*out]`` of each output, by key

    @property
    def sizes(self) -> list[int]:
        """The number of outputs at each key, which add up to C."""
        return [shape.numel() for shape in self.shapes.values()]

    def __call__(self, returned: Any) -> Tensor:
        """Join outputs."""
        found = returned if self.pick is None else self.pick(returned)
        entries = entries_by_key(found)
        if {key: x.shape[1:] if isinstance(x, Tensor) else None for key, x in entries.items()} != self.shapes:
            raise NoTensorError.of(found, "their keys or shapes change from one evaluation to another")
        return torch.cat([entries[key].reshape(len(entries[key]), -1) for key in self.shapes], 1)


def split(kernel: Tensor, compute: str, first: Several, second: Several) -> dict[Any, Tensor]:
    """Take a kernel apart by the keys of outputs: by pairs of them, or by keys that meet themselves."""
    # kernel [N1, N2, C1, C2] -> [N1, N2, *out1, *out2]; [N1, N2, C] -> [N1, N2, *out] or, summed, [N1, N2]
    if compute == "full":
        rows = zip(first.shapes.items(), kernel.split(first.sizes, -2), strict=True)
        return {
            (ours, theirs): block.reshape(*block.shape[:-2], *shape, *other)
            for (ours, shape), row in rows
            for (theirs, other), block in zip(second.shapes.items(), row.split(second.sizes, -1), strict=True)
        }
    parts = zip(first.shapes.items(), kernel.split(first.sizes, -1), strict=True)
    if compute == "trace":
        return {key: part.sum(-1) for (key, _), part in parts}
    return {key: part.reshape(*part.shape[:-1], *shape) for (key, shape), part in parts}
