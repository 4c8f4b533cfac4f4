"""What two sides yield on their way back is contracted layer by layer.

Samples that are evaluated together are one side: the first N1 of them meet the others, or all meet all. x1 and x2 that
are evaluated apart are two, which may use parameters in different orders, and each a different number of times: the
Jacobians of the first are held, and meet those of the second as these come.
"""

from collections.abc import Callable, Collection, Container, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator
from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.memory.budget import MemoryBudget, available
from ggn_ntk.memory.chunks import Chunk, split_outputs
from ggn_ntk.problem.output_axes import KernelAxes


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
    held = _Held(first, chunks)
    for number, chunk in enumerate(chunks, 1):
        accumulator = make(chunk.roles, n1, wanted.group, wanted.formed, wanted.axes.paired)
        theirs = None if second is first else held.jacobians(chunk, accumulator)
        for step in second.steps(chunk.outputs[1], accumulator.parts, again=number < len(chunks)):
            if theirs is None:
                accumulator.add(step.jacobians())
            else:  # parameters that only one side has fall back
                found = {name: uses for name, uses in step.jacobians().items() if name in theirs}
                accumulator.add({name: theirs[name] for name in found}, found)
        if len(chunks) == 1:
            kernels = accumulator.kernels
        else:
            _place(kernels, accumulator.kernels, chunk, wanted.axes)
    n, m = len(first.output), len(second.output)
    samples = (n, m) if n1 is None else (n1, n - n1)
    for name in wanted.params:
        key = wanted.group(name)
        if key not in kernels:  # nothing uses its parameters
            axes = samples[:1] if wanted.axes.paired else samples
            kernels[key] = first.output.new_zeros(*axes, *wanted.axes.shape)
    return kernels


class _Held:
    """The Jacobians of x1's side, while x2's passes back by itself."""

    def __init__(self, side: Side, chunks: Sequence[Chunk]) -> None:
        """Set up for these chunks, one after the other."""
        self._side, self._last = side, chunks[-1].outputs[0]
        self._outputs: Tensor | None = None
        self._jacobians: Jacobians = {}

    def jacobians(self, chunk: Chunk, accumulator: Accumulator) -> Jacobians:
        """Pass back the outputs of a chunk, unless they are those of the one before."""
        outputs = chunk.outputs[0]
        if self._outputs is None or not torch.equal(outputs, self._outputs):
            self._jacobians = {}  # frees memory before more is taken
            again = not torch.equal(outputs, self._last)
            for step in self._side.steps(outputs, accumulator.parts, again=again, hold=True):
                self._jacobians |= step.jacobians()
            self._outputs = outputs
        return self._jacobians


def _chunks(first: Side, second: Side, axes: KernelAxes) -> list[Chunk]:
    """Split the outputs so that what passes back keeps to the budget."""
    device, apart = first.output.device, second is not first
    bytes_of_one = (first.total + second.numel if apart else first.numel) * first.output.element_size()
    size = MemoryBudget.of(device).backpropagated // bytes_of_one
    if size < max(axes.shape[1:]):  # free outputs have to meet: their passes grow with the square of the chunks' number
        size = max(size, (available(device) or 0) // 4 // bytes_of_one)
    return split_outputs(axes, size, apart=apart)


def _place(kernels: dict[str, Tensor], blocks: dict[str, Tensor], chunk: Chunk, axes: KernelAxes) -> None:
    """Add kernels over a chunk of the outputs to kernels over all of them."""
    for name, block in blocks.items():
        if name not in kernels:
            kernels[name] = block.new_zeros(*block.shape[:-3], *axes.shape)
        chunk.add(kernels[name], block)
