"""Samples a few at a time.

What passes between convolutions, ``s`` ``[C, N, ...]``, is far larger than a processor's cache, and every layer would
read and write all of it. A block of samples that fits stays there from layer to layer. What has to wait for the other
blocks are the Jacobians of the layers' parameters, where the cheapest order of contraction forms them (or whatever it
makes of them before x1 meets x2), and ``s`` itself where it does not.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import ceil

from torch import Tensor

#: Numbers that ``s`` may hold in a block, and an intermediate result of samples of both x1 and x2: 8 MiB in float32,
#: which fits a last-level cache, and on other devices as much as their memory should spare.
SIZES = {"cpu": 2**21}
SIZE_ELSEWHERE = 2**28

#: Numbers that may wait for other blocks. At the layer that exceeds it, blocks are put together.
WAITING = 2**24


def split(n: int, block: int) -> list[slice]:
    """Split samples evenly."""
    count = ceil(n / max(1, min(n, block)))
    edges = [i * n // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


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
