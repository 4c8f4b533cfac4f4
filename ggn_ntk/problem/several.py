"""Several outputs of a model, by key, as one: flattened and put behind one another, and kernels taken apart again."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Output(NamedTuple):
    """One of several outputs."""

    shape: Size  # ``[*out]``
    # What it is multiplied by, a power of two: nothing rounds, and outputs of one size are compared alike
    scale: float


@dataclass(frozen=True)
class Several:
    """Turns several outputs ``[N, *out]`` of a model into one, ``[N, C]``."""

    pick: Pick  # what is applied to the model's results before
    outputs: dict[Hashable, Output]  # by key

    @property
    def shapes(self) -> dict[Hashable, Size]:
        """The shapes ``[*out]`` by key."""
        return {key: output.shape for key, output in self.outputs.items()}

    @property
    def sizes(self) -> list[int]:
        """The number of outputs at each key, which add up to C."""
        return [output.shape.numel() for output in self.outputs.values()]

    def __call__(self, returned: Any) -> Tensor:
        """Join outputs."""
        found = returned if self.pick is None else self.pick(returned)
        entries = entries_by_key(found)
        if {key: x.shape[1:] if isinstance(x, Tensor) else None for key, x in entries.items()} != self.shapes:
            raise NoTensorError.of(found, "their keys or shapes change from one evaluation to another")
        return torch.cat([o.scale * entries[key].reshape(len(entries[key]), -1) for key, o in self.outputs.items()], 1)


def split(kernel: Tensor, compute: str, first: Several, second: Several) -> dict[Any, Tensor]:
    """Take a kernel apart by the keys of outputs: by pairs of them, or by keys that meet themselves."""
    # kernel [N1, N2, C1, C2] -> [N1, N2, *out1, *out2]; [N1, N2, C] -> [N1, N2, *out] or, summed, [N1, N2]
    if compute == "full":
        return {
            (key, other): block.reshape(*block.shape[:-2], *a.shape, *b.shape) / (a.scale * b.scale)
            for (key, a), row in zip(first.outputs.items(), kernel.split(first.sizes, -2), strict=True)
            for (other, b), block in zip(second.outputs.items(), row.split(second.sizes, -1), strict=True)
        }
    pairs = zip(first.outputs.items(), second.outputs.values(), kernel.split(first.sizes, -1), strict=True)
    return {
        key: (part.sum(-1) if compute == "trace" else part.reshape(*part.shape[:-1], *a.shape)) / (a.scale * b.scale)
        for (key, a), b, part in pairs
    }
