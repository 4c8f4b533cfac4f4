"""How samples are taken in blocks, where all of them at once would not fit.

What a model keeps of an evaluation, to pass back through it, is large; the factors of its Jacobians are not. So samples
are evaluated and passed back a block at a time. Of one set, as many as fit have their Jacobians *held* (a *strip*), and
meet those of all others as these *stream* by. If the whole set is one strip, nothing is computed twice. If it is not,
the others stream by once for each strip, and Jacobians of the strip are formed anew for each block that it meets; or
fewer outputs pass back at a time, and samples are evaluated once more for the next ones. What takes the fewest passes
is chosen, where to form a Jacobian counts as one. Where memory is left, what is held is contracted as far as the order
of contraction does that with each of the others anew: Jacobians of a strip are formed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

import torch

from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.chunks import Chunk, split_outputs
from ggn_ntk.problem.output_axes import KernelAxes

# The shares of the memory for what is held, and for a block that is evaluated. The rest is for contraction, and for
# what a process takes beside tensors.
_HELD, _EVALUATED = 0.6, 0.12

# Into how many chunks outputs may be split: each is a pass of its own. And how many are tried: 1, 2, 3, 4, 6, 8, 12...
_CHUNKS = 2**10
_PASSES = sorted({1, *(factor * 2**power for factor in (2, 3) for power in range(20))})


class Footprint(NamedTuple):
    """Bytes that a sample takes."""

    evaluated: float  # for what its evaluation keeps
    passing: float  # for ``s`` of one output, where it is largest
    held: float  # for the factors of its Jacobians that all outputs share
    held_by_output: float  # for those that each output has
    formed: float  # for its Jacobian of one output, once it is formed

    def working(self, outputs: int) -> float:
        """Count what it takes to evaluate it, and to pass some outputs back."""
        return self.evaluated + outputs * self.passing

    def kept(self, outputs: int) -> float:
        """Count what its Jacobians of some outputs take."""
        return self.held + outputs * self.held_by_output


class Passes(NamedTuple):
    """What all evaluations take, in passes of one sample."""

    forward: int
    backward: int  # of one output each
    formed: float  # Jacobians of an output that are formed to meet others, at most


@dataclass(frozen=True)
class Layout:
    """How samples and outputs are taken."""

    sizes: tuple[int, int]  # N1 and N2
    symmetric: bool  # whether x2 is x1
    stays: int  # the place of the set whose Jacobians are held: 0 for x1, 1 for x2
    strip: int  # how many of its samples are held at a time
    block: int  # how many samples are evaluated together
    outputs: int  # how many outputs of a side pass back together
    early: float = inf  # bytes for what the order of contraction makes of held Jacobians before they meet others

    def chunks(self, axes: KernelAxes) -> list[Chunk]:
        """Split the outputs."""
        return split_outputs(axes, self.outputs, apart=not self.symmetric)

    def blocks(self, which: int) -> list[slice]:
        """Split x1 or x2 for evaluation."""
        return split(self.sizes[which], self.block)

    @property
    def strips(self) -> list[list[slice]]:
        """Group the blocks of the set that stays: those whose Jacobians are held at a time."""
        found: list[list[slice]] = []
        for block in self.blocks(self.stays):
            if found and block.stop - found[-1][0].start <= self.strip:
                found[-1].append(block)
            else:
                found.append([block])
        return found

    def streaming(self, strip: Sequence[slice]) -> list[slice]:
        """List the blocks that a strip meets as they stream by; of the same set, those behind it."""
        blocks = self.blocks(1 - self.stays)
        return [b for b in blocks if b.start >= strip[-1].stop] if self.symmetric else blocks

    def passes(self, axes: KernelAxes, formed: float) -> Passes:
        """Count the passes, given the bytes of a Jacobian of one output that is formed."""
        chunks, n = self.chunks(axes), self.sizes[self.stays]
        ours = [chunk.outputs[self.stays] for chunk in chunks]
        held = [len(outputs) for i, outputs in enumerate(ours) if not i or not torch.equal(outputs, ours[i - 1])]
        others = [len(chunk.outputs[1 - self.stays]) for chunk in chunks]
        blocks, streaming, anew, done = len(self.blocks(1 - self.stays)), 0, 0, 0
        for strip in self.strips:
            done += len(strip)
            start, stop = strip[0].start, strip[-1].stop
            streaming += self.sizes[1 - self.stays] - (stop if self.symmetric else 0)
            # Its Jacobians are formed for each block that it meets, and of one set for the strip itself at first.
            anew += (stop - start) * (blocks - done if self.symmetric else blocks - 1)
        kept = min(1.0, self.early / max(1.0, n * max(held) * formed))
        return Passes(
            forward=n * len(held) + streaming * len(chunks),
            backward=n * sum(held) + streaming * sum(others),
            formed=(n + (1 - kept) * anew) * sum(map(len, ours)) + streaming * sum(others),
        )


def choose(
    sizes: tuple[int, int],
    symmetric: bool,
    axes: KernelAxes,
    footprints: Sequence[Footprint],
    memory: float,
    *,
    x1_stays: bool = False,
) -> Layout:
    """Choose the layout that takes the fewest passes within so many bytes beside the kernel."""
    # footprints of x1, and of x2 if it is another set; x1_stays: with Jacobians of all outputs
    free, most, possible = max(axes.shape[1:]), most_outputs(axes), dict[Layout, float]()
    for outputs in dict.fromkeys(ceil(most / passes) for passes in (_PASSES[:1] if x1_stays else _PASSES)):
        if ceil(2 * free / outputs) ** 2 > max(_CHUNKS, 4):  # pairs of parts of the free outputs
            break
        for stays in (0,) if symmetric or x1_stays else (0, 1):
            footprint = footprints[min(stays, len(footprints) - 1)]
            kept = footprint.kept(outputs)
            strip = int(_HELD * memory / max(1, kept))
            block = int(_EVALUATED * memory / max(1, *(f.working(outputs) for f in footprints)))
            early = max(0.0, _HELD * memory - sizes[stays] * kept)
            smallest = Layout(sizes, symmetric, stays, max(2, strip), max(2, block), outputs, early)
            if strip >= 2 and block >= 2:
                possible[smallest] = sum(smallest.passes(axes, footprint.formed))
    return min(possible, key=possible.__getitem__) if possible else smallest


def most_outputs(axes: KernelAxes) -> int:
    """Count the outputs of the side that has most."""
    return max(side.roles.diagonal * side.roles.free * side.roles.traced for side in axes)
