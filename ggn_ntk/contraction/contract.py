"""What two sides yield on their way back is contracted layer by layer.

Samples that are evaluated together are one side: the first N1 of them meet the others, or all meet all. x1 and x2 that
are evaluated apart are two, which may use parameters in different orders, and each a different number of times: the
Jacobians of the first are held, and meet those of the second as these come. So are those of a strip of samples, where
not all fit, while blocks of the others stream by.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator
from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.gathered import Gathered
from ggn_ntk.contraction.products import Part, contracted, parts
from ggn_ntk.memory.budget import MemoryBudget, available
from ggn_ntk.memory.chunks import Chunk, split_outputs
from ggn_ntk.memory.layout import Layout
from ggn_ntk.problem.output_axes import KernelAxes, Roles
from ggn_ntk.problem.result import transpose
from ggn_ntk.process.progress import Progress, counting

_T = TypeVar("_T")


class Step(Protocol):
    """A layer on the way back."""

    def jacobians(self) -> Jacobians:
        """Write Jacobians, by name, of parameters that no layer before it uses."""


class Side(Protocol):
    """Samples that a model was evaluated on together: outputs, and a backward pass that yields Jacobians."""

    output: Tensor  # the outputs ``[N, *out]``

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of one output holds where it is largest."""

    @property
    def total(self) -> int:
        """Numbers that ``s`` of one output holds on the whole way back."""

    def steps(self, outputs: Tensor, parts: Any, *, again: bool, hold: bool = False) -> Iterator[Step]:
        """Pass back some outputs; ``again``: and others later; ``hold``: Jacobians outlive their steps."""


class Wanted(NamedTuple):
    """What is wanted of the kernels."""

    axes: KernelAxes  # the roles of output axes
    group: Callable[[str], str]  # the name of the kernel that a parameter counts for
    params: Collection[str]  # parameters that have a kernel, also where nothing uses them
    formed: Container[str] = ()  # parameters whose Jacobians are formed before x1 meets x2


class Samples(Protocol):
    """A set of samples, evaluated a block at a time."""

    @property
    def output(self) -> Tensor:
        """The outputs ``[N, *out]``, once all blocks were evaluated."""

    def side(self, block: slice) -> Side:
        """Evaluate the model on a block."""


def contract(
    first: Side,
    second: Side,
    wanted: Wanted,
    *,
    n1: int | None = None,
    make: Callable[..., Accumulator] = Accumulator,
) -> dict[str, Tensor]:
    """Compute the kernels between two sides, by name."""
    # One side with itself is the symmetric case; or x1 and x2 are the first N1 samples and the others of one side,
    # which is faster than to evaluate them one after the other.
    # -> [N1, N2, E, F1, F2]
    kernels: dict[str, Tensor] = {}
    chunks = _chunks(first, second, wanted.axes)
    held = Held[Jacobians]()

    def of_first(outputs: Tensor, parts: Any) -> Jacobians:
        steps = first.steps(outputs, parts, again=not torch.equal(outputs, chunks[-1].outputs[0]), hold=True)
        return _merged(step.jacobians() for step in steps)

    with counting(len(chunks) * len(wanted.params)) as progress:
        for number, chunk in enumerate(chunks, 1):
            accumulator = make(chunk.roles, n1, wanted.group, wanted.formed, wanted.axes.paired)
            ours, theirs = chunk.outputs
            known = None if second is first else held.of(ours, partial(of_first, ours, accumulator.parts))
            for step in second.steps(theirs, accumulator.parts, again=number < len(chunks)):
                jacobians = step.jacobians()
                _meet(accumulator, known, jacobians)
                progress.add(len(jacobians))
                del jacobians  # frees memory before more is taken
            known = None  # frees memory before more is taken
            if len(chunks) == 1:
                kernels = accumulator.kernels
            else:
                for name, block in accumulator.kernels.items():
                    chunk.add(kernels.setdefault(name, block.new_zeros(*block.shape[:-3], *wanted.axes.shape)), block)
            progress.add(number * len(wanted.params) - progress.done)  # those that nothing uses
    n, m = len(first.output), len(second.output)
    return _complete(kernels, wanted, (n, m) if n1 is None else (n1, n - n1), first.output)


def contract_in_blocks(
    sets: Sequence[Samples],
    wanted: Wanted,
    layout: Layout,
    make: Callable[..., Accumulator] = Accumulator,
    *,
    kept: "Held[list[Jacobians]] | None" = None,
) -> dict[str, Tensor]:
    """Compute the kernels between x1 and x2, or of x1 with itself, by name, a block of samples at a time."""
    # kept: what an only strip held when it met other samples
    # -> [N1, N2, E, F1, F2]
    if wanted.axes.paired:
        return _paired_blocks(sets, wanted, layout, make)
    stays, kernels = layout.stays, dict[str, Tensor]()
    ours, theirs = (sets[0], sets[0]) if layout.symmetric else (sets[stays], sets[1 - stays])

    def put(found: dict[str, Tensor], strip: slice, other: slice, chunk: Chunk) -> None:
        places = (strip, other) if stays == 0 else (other, strip)
        for name, block in found.items():
            if name not in kernels:
                kernels[name] = block.new_zeros(*layout.sizes, *wanted.axes.shape)
            chunk.add(kernels[name][places], block)
            if layout.symmetric and strip != other:
                chunk.add(transpose(kernels[name][other, strip]), block)

    def meet(blocks: list[slice], chunk: Chunk, held: Held[list[Jacobians]], progress: Progress) -> None:
        strip, streaming = slice(blocks[0].start, blocks[-1].stop), layout.streaming(blocks)
        outputs, others = chunk.outputs[stays], chunk.outputs[1 - stays]
        count = strip.stop - strip.start
        met = sum(block.stop - block.start for block in streaming) + (count if layout.symmetric else 0)
        early = _Early(wanted, chunk.roles, (count, max(held.others, met)), layout.block, layout.early)
        steps = held.of(outputs, partial(_gathered, ours, blocks, outputs, early))
        new = partial(make, chunk.roles, None, wanted.group, wanted.formed)
        if layout.symmetric:
            accumulator = new()
            for jacobians in steps:
                accumulator.add(jacobians)
            put(accumulator.kernels, strip, strip, chunk)
        known = _merged(steps)
        progress.add(len(blocks))
        for block in streaming:
            accumulator, side = new(), theirs.side(block)
            for step in side.steps(others, accumulator.parts, again=False):
                _meet(accumulator, known, step.jacobians(), second=stays == 0)
            put(accumulator.kernels, strip, block, chunk)
            progress.add()

    chunks, strips = layout.chunks(wanted.axes), layout.strips
    parts = sum(len(blocks) + len(layout.streaming(blocks)) for blocks in strips)
    with counting(len(chunks) * parts) as progress:
        for blocks in strips:
            held = Held[list[Jacobians]]() if kept is None else kept
            for chunk in chunks:
                meet(blocks, chunk, held, progress)
    return _complete(kernels, wanted, layout.sizes, sets[0].output)


def _paired_blocks(
    sets: Sequence[Samples], wanted: Wanted, layout: Layout, make: Callable[..., Accumulator]
) -> dict[str, Tensor]:
    """Compute the kernels of paired samples a block at a time."""
    # -> [N, E, F1, F2]
    kernels: dict[str, Tensor] = {}
    with counting(len(layout.blocks(0))) as progress:
        for block in layout.blocks(0):
            sides = [samples.side(block) for samples in sets]
            for name, kernel in contract(sides[0], sides[-1], wanted, make=make).items():
                kernels.setdefault(name, kernel.new_empty(layout.sizes[0], *kernel.shape[1:]))[block] = kernel
            progress.add()
    return kernels


class _Early:
    """Contracts of held Jacobians what the order of contraction makes of them alone, where memory is left for that."""

    def __init__(self, wanted: Wanted, roles: Roles, sizes: tuple[int, int], block: int, memory: float) -> None:
        """Set up for samples that are held, and as many as they meet in all; a block of them comes at a time."""
        self._wanted, self._roles, self._sizes, self._memory = wanted, roles, sizes, memory
        self._made = sizes[0] + min(block, sizes[0])  # samples: what a block makes is copied to its place among all
        self._chosen: dict[str, bool] = {}

    def __call__(self, jacobians: Jacobians) -> Jacobians:
        """Contract what is chosen, of a block of samples."""
        return {
            name: [self._contracted(name, several[0])] if len(several) == 1 else several
            for name, several in jacobians.items()
        }

    def _contracted(self, name: str, jacobian: Factored) -> Factored:
        """Contract what is chosen of a Jacobian; of all blocks, what was chosen of the first."""
        if self._chosen.get(name, True):
            found = parts(jacobian, *self._sizes, self._roles, formed=name in self._wanted.formed)
            if name not in self._chosen:
                taken = 0 if found is None else self._made * sum(map(_bytes_of_sample, found))
                self._chosen[name] = found is not None and taken <= self._memory
                self._memory -= taken if self._chosen[name] else 0
            if found is not None and self._chosen[name]:
                return contracted(jacobian, found)
        return jacobian


def _bytes_of_sample(part: Part) -> int:
    """Count the bytes that a part takes for each sample once it is contracted."""
    sizes = {letter: size for operand in part.operands for letter, size in operand.sizes.items()}
    return part.operands[0].tensor.element_size() * prod(sizes[letter] for letter in part.letters if letter != "n")


def _gathered(samples: Samples, blocks: Sequence[slice], outputs: Tensor, early: _Early) -> list[Jacobians]:
    """Pass some outputs of samples back, a block at a time, and put the Jacobians together."""
    start = blocks[0].start
    gathered = Gathered(blocks[-1].stop - start)
    for block in blocks:
        steps = samples.side(block).steps(outputs, _nothing_before, again=False)
        gathered.put(slice(block.start - start, block.stop - start), (early(step.jacobians()) for step in steps))
    return gathered.steps()


def _nothing_before(name: str, jacobian: Factored, n: int) -> None:
    """Contract nothing before x1 meets x2."""


def _meet(accumulator: Accumulator, held: Jacobians | None, found: Jacobians, *, second: bool = True) -> None:
    """Add what comes on the way back of x2 (``second``) or x1, and what is held of the other; nothing, of one set."""
    if held is None:
        accumulator.add(found)
        return
    found = {name: uses for name, uses in found.items() if name in held}  # parameters that only one side has fall back
    known = {name: held[name] for name in found}
    accumulator.add(*((known, found) if second else (found, known)))


def _merged(steps: Iterable[Jacobians]) -> Jacobians:
    """Put the Jacobians of all steps in one place."""
    return {name: uses for jacobians in steps for name, uses in jacobians.items()}


def _complete(kernels: dict[str, Tensor], wanted: Wanted, samples: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
    """Add kernels of zeros for parameters that nothing uses."""
    for name in wanted.params:
        key = wanted.group(name)
        if key not in kernels:
            axes = samples[:1] if wanted.axes.paired else samples
            kernels[key] = like.new_zeros(*axes, *wanted.axes.shape)
    return kernels


class Held(Generic[_T]):
    """What is made of some outputs of one side, until others take their turn."""

    def __init__(self, others: int = 0) -> None:
        """Start with nothing, for as many samples of the other side, or those of a call if they are more."""
        self.others = others
        self._outputs: Tensor | None = None
        self._held: list[_T] = []

    def of(self, outputs: Tensor, make: Callable[[], _T]) -> _T:
        """Look up what is held of these outputs, or make it."""
        if self._outputs is None or not torch.equal(outputs, self._outputs):
            self._held.clear()  # frees memory before more is taken
            self._held.append(make())
            self._outputs = outputs
        return self._held[0]


def outputs_together(passing: float, axes: KernelAxes, device: torch.device) -> int:
    """Choose how many outputs pass back together, given the bytes that each takes."""
    size = int(MemoryBudget.of(device).backpropagated // passing)
    if size < max(axes.shape[1:]):  # free outputs have to meet: their passes grow with the square of the chunks' number
        size = max(size, int((available(device) or 0) // 4 // passing))
    return size


def _chunks(first: Side, second: Side, axes: KernelAxes) -> list[Chunk]:
    """Split the outputs so that what passes back keeps to the budget."""
    apart = second is not first
    passing = (first.total + second.numel if apart else first.numel) * first.output.element_size()
    return split_outputs(axes, outputs_together(passing, axes, first.output.device), apart=apart)
