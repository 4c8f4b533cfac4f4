"""Memory that is written to piece by piece, or again and again."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

# Tensors start at multiples of so many numbers, for the sake of vector instructions.
ALIGNED = 64

# The largest block, in bytes, from whose return glibc learns; a bit less, for what it adds (mallopt(3),
# M_MMAP_THRESHOLD: 4 * 1024 * 1024 * sizeof(long)).
_LEARNT = 2**25 - 2**14


@cache
def keep_freed() -> None:
    """Have the allocator keep what one layer, or one call, frees for the next, instead of asking the system again."""
    # The system clears all pages that it gives, which took 5 to 18 % of the processor time of kernels. glibc maps each
    # block above a threshold by itself, and gives back what is free at the end beyond twice that. The threshold follows
    # the largest block that was freed so far: this one, which is never written to and so takes no memory. At most 64
    # MiB stay.
    torch.empty(_LEARNT, dtype=torch.uint8)


class Joined:
    """A tensor over all samples, put together from blocks."""

    # A letter for each axis, ``n`` for samples, which are outermost in memory so that each block is one run
    letters: str
    tensor: Tensor  # the tensor; there is none before the first block

    def __init__(self, n: int) -> None:
        """Set up."""
        self._n = n

    @property
    def numel(self) -> int:
        """Its size; zero before the first block."""
        return self.tensor.numel() if hasattr(self, "tensor") else 0

    def room(self, block: slice, letters: str, sizes: Mapping[str, int], like: Tensor) -> Tensor:
        """Make room for a block."""
        if not hasattr(self, "tensor"):
            self.letters = "n" + letters.replace("n", "")
            self.tensor = like.new_empty([self._n, *(sizes[letter] for letter in self.letters[1:])])
        return self.tensor[block].permute([self.letters.index(letter) for letter in letters])

    def put(self, block: slice, letters: str, part: Tensor) -> None:
        """Copy a block to its place."""
        axes = sorted(range(part.ndim), key=part.stride, reverse=True)
        sizes = dict(zip(letters, part.shape, strict=True))
        self.room(block, "".join(letters[axis] for axis in axes), sizes, part).copy_(part.permute(axes))

    def ordered(self, letters: str) -> Tensor:
        """Order its axes."""
        return self.tensor.permute([self.letters.index(letter) for letter in letters])


class Buffer:
    """Memory for ``s`` of one stage after the other: to get new memory for each takes as long as to write it."""

    def __init__(self, numel: int) -> None:
        """Set up."""
        self._numel, self._used = numel, 0
        self._memory: Tensor | None = None

    def clear(self) -> None:
        """Let what was taken be overwritten."""
        self._used = 0

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Make room."""
        if self._memory is None:
            self._memory = like.new_empty(self._numel)
        start, stop = self._used, self._used + math.prod(shape)
        if stop > self._numel or self._memory.dtype != like.dtype or self._memory.device != like.device:
            return like.new_empty(shape)
        self._used = stop + -stop % ALIGNED
        return self._memory[start:stop].view(shape)
