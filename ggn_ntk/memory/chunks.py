"""Outputs a few at a time, where ``s`` of all of them would not fit.

Chunks of traced outputs have kernels to be added up, chunks of diagonal ones have different entries of the kernel. Free
outputs are the only ones that have to meet: there, each pair of parts is a chunk.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.problem.output_axes import OutputAxes, Roles


class Chunk(NamedTuple):
    """Some outputs, and their place in the kernel."""

    outputs: Tensor  # where they are in ``[*out]``, flattened; diagonal ones outermost, then free and traced ones
    roles: Roles  # the number of outputs in each role
    diagonal: Tensor  # the numbers of its diagonal outputs, ``[E]``
    free: Tensor  # the numbers of its free outputs, ``[F]``
    new: Tensor  # which pairs of free outputs are in no chunk before, ``[F, F]``

    def add(self, kernel: Tensor, block: Tensor) -> None:
        """Add the chunk's part to a kernel."""
        kernel[..., self.diagonal[:, None, None], self.free[:, None], self.free] += block * self.new.to(block)


def split_outputs(axes: OutputAxes, size: int) -> list[Chunk]:
    """Split outputs into chunks."""
    e, f, t = axes.roles
    traced = min(t, max(1, size // (e * f)))
    diagonal = min(e, max(1, size // (f * traced)))
    numbers, pairs = axes.numbers, _pairs(f, size // (traced * diagonal))
    return [
        Chunk(numbers[i][:, j][:, :, k].flatten(), Roles(len(i), len(j), len(k)), i, j, new)
        for i in torch.arange(e).split(diagonal)
        for j, new in pairs
        for k in torch.arange(t).split(traced)
    ]


def _pairs(total: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Split free outputs so that each two of them meet."""
    everything = torch.arange(total)
    parts = everything.split(max(1, size // 2))
    if size >= total or len(parts) < 3:
        return [(everything, torch.ones(total, total, dtype=torch.bool))]
    met, found = torch.zeros(total, total, dtype=torch.bool), []
    for pair in combinations(parts, 2):
        free = torch.cat(pair)
        found.append((free, ~met[free][:, free]))
        met[free[:, None], free] = True
    return found
