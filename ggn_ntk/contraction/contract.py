"""Two sides walk back in lockstep, and what they yield is contracted layer by layer."""

from collections.abc import Callable, Collection, Container, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator
from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.memory.budget import MemoryBudget, available
from ggn_ntk.memory.chunks import Chunk, split_outputs
from ggn_ntk.problem.output_axes import OutputAxes, Roles


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

    def steps(self, outputs: Tensor, parts: Any, *, again: bool) -> Iterator[Step]:
        """Pass back some outputs; ``again``: and others later."""


class Wanted(NamedTuple):
    """What is wanted of the kernels."""

    axes: OutputAxes  # the role of each output axis
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
    # -> [N1, N2, E, F, F]
    sides = [first] if second is first else [first, second]
    kernels: dict[str, Tensor] = {}
    chunks = _chunks(sides, wanted.axes)
    for number, chunk in enumerate(chunks, 1):
        accumulator = make(chunk.roles, n1, wanted.group, wanted.formed)
        again = number < len(chunks)
        for steps in zip(*(side.steps(chunk.outputs, accumulator.parts, again=again) for side in sides), strict=True):
            accumulator.add(*(step.jacobians() for step in steps))
        _place(kernels, accumulator.kernels, chunk, wanted.axes.roles)
    n, m = len(first.output), len(second.output)
    samples = (n, m) if n1 is None else (n1, n - n1)
    for name in wanted.params:
        key = wanted.group(name)
        if key not in kernels:  # nothing uses its parameters
            kernels[key] = first.output.new_zeros(*samples, *wanted.axes.roles.kernel)
    return kernels


def _chunks(sides: list[Side], axes: OutputAxes) -> list[Chunk]:
    """Split the outputs so that what passes back keeps to the budget."""
    device = sides[0].output.device
    bytes_of_one = sum(side.numel for side in sides) * sides[0].output.element_size()
    size = MemoryBudget.of(device).backpropagated // bytes_of_one
    if size < axes.roles.free:  # free outputs have to meet: their passes grow with the square of the number of chunks
        size = max(size, (available(device) or 0) // 4 // bytes_of_one)
    return split_outputs(axes, size)


def _place(kernels: dict[str, Tensor], blocks: dict[str, Tensor], chunk: Chunk, roles: Roles) -> None:
    """Add kernels over a chunk of the outputs to kernels over all of them."""
    for name, block in blocks.items():
        if chunk.roles == roles:
            kernels[name] = block
            continue
        if name not in kernels:
            kernels[name] = block.new_zeros(*block.shape[:2], *roles.kernel)
        chunk.add(kernels[name], block)
