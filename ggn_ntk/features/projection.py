"""Random directions in the space of parameters, written as Jacobians.

The derivatives of outputs along random directions are features whose inner products are the kernel in the mean. A set
of directions has the form of a Jacobian, of a single output of as many samples. So features are a kernel themselves,
between the samples and the directions, and all that is known of contracting factored Jacobians holds for them.

Directions are drawn from a counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1,
2, 3", SC 2011), by the seed and a parameter's name alone: they are the same ones on every device, in every dtype and
however many are drawn at a time.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Size, Tensor

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import Operand
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget

PROJECTIONS = ("kronecker", "dense")


@dataclass(frozen=True)
class Projection:
    """What features must have in common for their inner products to be those of Jacobians.

    Attributes:
        kind: ``"kronecker"`` or ``"dense"``.
        dim: The number of directions.
        seed: What they are drawn from, together with the names of parameters.
        shapes: Names and shapes of the parameters.
        preconditioner: A digest of the preconditioner; empty without one.
    """

    kind: str
    dim: int
    seed: int
    shapes: tuple[tuple[str, Size], ...]
    preconditioner: str = ""


class Directions(NamedTuple):
    """Some random directions for a parameter: products of one vector for its first axis and one for all others."""

    vectors: list[Tensor]  # ``[K, rows]`` and ``[K, columns]``; or one of both, ``[K, entries]``
    scale: Tensor | None  # what each entry of a product is multiplied by

    def like(self, jacobian: Factored) -> Factored:
        """Write them as a Jacobian that splits the parameter's axes as another does."""
        sizes = jacobian.parameter_sizes
        letters = string.ascii_uppercase[: len(sizes)]
        rows = _first_axis(sizes, self.vectors[0].shape[1]) if len(self.vectors) > 1 else len(sizes)
        assert rows is not None
        operands, lead = list[Operand](), "cn"
        for vectors, place in zip(self.vectors, (slice(rows), slice(rows, None)), strict=False):
            shaped = vectors.reshape([1] * (lead == "cn") + [len(vectors), *sizes[place]])
            operands.append(Operand(lead + letters[place], shaped))
            lead = "n"
        if self.scale is not None:
            operands.append(Operand(letters, self.scale.reshape(sizes)))
        return Factored.of(operands, f"cn{letters}")


class Drawing:
    """Draws the directions of a projection, a few at a time."""

    def __init__(self, projection: Projection, params: Mapping[str, Tensor], roots: Mapping[str, Tensor]) -> None:
        """Set up; ``roots`` are those of the preconditioner's entries, by name."""
        self.projection, self._roots = projection, roots
        # What is drawn together keeps to the budget for the parameter that takes most.
        numbers = max(sum(self._widths(p.shape)) * p.element_size() for p in params.values())
        device = next(iter(params.values())).device
        self.chunks = split(projection.dim, MemoryBudget.of(device).columns // max(1, numbers))

    def directions(self, name: str, shape: Size, like: Tensor) -> Iterator[Directions]:
        """Draw directions for a parameter, a chunk after the other."""
        widths, root = self._widths(shape), self._roots.get(name)
        root = None if root is None else root.to(like)
        generators = [_generator(self.projection.seed, name, i) for i, _ in enumerate(widths)]
        for chunk in self.chunks:
            count = chunk.stop - chunk.start
            vectors = [_signs(g, count, width, like) for g, width in zip(generators, widths, strict=True)]
            if root is not None and len(vectors) == 1:
                yield Directions([vectors[0] * root.flatten()], None)
            else:
                yield Directions(vectors, root)

    def _widths(self, shape: Size) -> list[int]:
        """Count the entries of the vectors that a direction is the product of."""
        if self.projection.kind == "dense" or len(shape) < 2:
            return [shape.numel()]
        return [shape[0], shape[1:].numel()]


def with_first_axis(jacobian: Factored, shape: Size) -> Factored:
    """Make sure that the letters of a Jacobian tell the parameter's first axis from the others."""
    if len(shape) < 2 or _first_axis(jacobian.parameter_sizes, shape[0]) is not None:
        return jacobian
    formed = jacobian.formed()  # [C, N, P]
    return Factored("cnoi->cnoi", (formed.reshape(*formed.shape[:2], shape[0], shape[1:].numel()),))


def _first_axis(sizes: Sequence[int], rows: int) -> int | None:
    """Find how many leading letters of a parameter stand for its first axis; ``None`` if it is merged with others."""
    return next((i for i in range(len(sizes) + 1) if prod(sizes[:i]) == rows), None)


def _generator(seed: int, name: str, which: int) -> np.random.Philox:
    """Set up the generator of the vectors that directions of a parameter are products of."""
    key = sha256(f"{seed} {which} {name}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(key[:16], "little"))


def _signs(generator: np.random.Philox, count: int, width: int, like: Tensor) -> Tensor:
    """Draw vectors of signs, each from words of its own."""
    # -> [count, width]
    words = generator.random_raw((count, -(-width // 64))).astype("<u8", copy=False)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=width, bitorder="little")
    return torch.from_numpy(bits).to(like.device).to(like.dtype).mul_(2).sub_(1)
