"""Outputs a few at a time, where ``s`` of all of them would not fit.

Chunks of traced outputs have kernels to be added up, chunks of diagonal ones have different entries of the kernel. Free
outputs are the only ones that have to meet. Those of one side, with itself, pass back together: each pair of parts is a
chunk. Of two sides, each part of one meets each part of the other.
"""

from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.problem.output_axes import KernelAxes, Roles


class Chunk(NamedTuple):
    """Some outputs, and their place in the kernel."""

    # Where they are in ``[*out]`` of x1 and of x2, flattened; diagonal ones outermost, then free and traced ones
    outputs: tuple[Tensor, Tensor]
    roles: Roles  # the number of x1's outputs in each role
    diagonal: Tensor  # the numbers of its diagonal outputs, ``[E]``
    free: tuple[Tensor, Tensor]  # the numbers of its free outputs of x1 and of x2, ``[F1]`` and ``[F2]``
    new: Tensor  # which pairs of free outputs are in no chunk before, ``[F1, F2]``

    def add(self, kernel: Tensor, block: Tensor) -> None:
        """Add the chunk's part to a kernel."""
        rows, columns = self.free
        kernel[..., self.diagonal[:, None, None], rows[:, None], columns] += block * self.new.to(block)


def split_outputs(axes: KernelAxes, size: int, *, apart: bool) -> list[Chunk]:
    """Split outputs into chunks of at most so many outputs of a side; ``apart``: x1 and x2 pass back apart."""
    e, _, t = axes.first.roles
    f = max(axes.first.roles.free, axes.second.roles.free)
    traced = min(t, max(1, size // (e * f)))
    diagonal = min(e, max(1, size // (f * traced)))
    most = size // (traced * diagonal)
    pairs = _of_two(axes, most) if apart else [((free, free), new) for free, new in _of_one(f, most)]
    numbers = [side.numbers for side in (axes if apart else axes[:1])]
    return [
        Chunk(_chosen(numbers, i, free, k), Roles(len(i), len(free[0]), len(k)), i, free, new)
        for i in torch.arange(e).split(diagonal)
        for k in torch.arange(t).split(traced)
        for free, new in pairs  # innermost: those of one part of x1 follow one another, and its Jacobians are kept
    ]


def _chosen(
    numbers: list[Tensor], diagonal: Tensor, free: tuple[Tensor, Tensor], traced: Tensor
) -> tuple[Tensor, Tensor]:
    """Look up where the outputs of a chunk are; once for both, where they pass back together."""
    # numbers [E, F, T], of x1 and, if apart, of x2
    found = [places[diagonal][:, j][:, :, traced].flatten() for places, j in zip(numbers, free, strict=False)]
    return found[0], found[-1]


def _of_two(axes: KernelAxes, size: int) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Split free outputs of two sides."""
    rows, columns = (torch.arange(side.roles.free).split(max(1, size)) for side in axes)
    return [((i, j), torch.ones(len(i), len(j), dtype=torch.bool)) for i, j in product(rows, columns)]


def _of_one(total: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Split free outputs of one side so that each two of them meet."""
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
