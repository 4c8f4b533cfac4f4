"""The floor: the arithmetic that a kernel needs in the cheapest order, at the rate of a large matrix product.

Counted, with a multiplication and an addition as two operations:

- the forward pass of all samples;
- passing ``s``, the Jacobian of the outputs, back through each layer with weights but the first, for every output and
  sample. From the output back to the last nonlinearity ``s`` is the same for all samples and passed back once; at the
  output it is the identity, which is free to pass through the last layer;
- the contraction of each weight's Jacobians ``s x``, in the order that an exhaustive search over all orders finds
  cheapest.

Left out, since they are small or shared: biases, nonlinearities, pooling, and the memory traffic of all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import opt_einsum

from benchmarks.workloads import Workload

_NONLINEAR = ("relu", "maxpool")


@dataclass(frozen=True)
class Floor:
    """Operations that a kernel needs.

    Attributes:
        forward: In the forward pass.
        backward: To pass ``s`` back.
        contraction: To contract Jacobians.
    """

    forward: float
    backward: float
    contraction: float

    @property
    def total(self) -> float:
        """All operations."""
        return self.forward + self.backward + self.contraction


@dataclass(frozen=True)
class _Weighted:
    """A layer with a weight, as a matrix product at each position of its output.

    Attributes:
        positions: Number of positions; 1 for a fully-connected layer.
        inputs: Numbers that enter at a position.
        outputs: Numbers that leave at a position.
        shared: Whether ``s`` at its output is the same for all samples.
    """

    positions: int
    inputs: int
    outputs: int
    shared: bool

    @property
    def flops(self) -> float:
        """Operations to evaluate it for a sample, or to pass a vector back."""
        return 2.0 * self.positions * self.inputs * self.outputs


def floor(workload: Workload) -> Floor:
    """Count operations.

    Args:
        workload: The workload, with x2 other than x1.

    Returns:
        Their numbers.
    """
    layers, number = list(_weighted_layers(workload)), workload.n1 + workload.n2
    passed = [layer.flops * (1 if layer.shared else number) for layer in layers[1:-1]]
    return Floor(
        forward=number * sum(layer.flops for layer in layers),
        backward=workload.outputs * sum(passed),
        contraction=sum(_contraction(workload, layer) for layer in layers),
    )


def _weighted_layers(workload: Workload) -> Iterator[_Weighted]:
    """Find the layers with weights.

    Args:
        workload: The workload.

    Yields:
        The layers, from input to output.
    """
    kinds = [str(kind) for kind, *_ in workload.layers]
    for index, (kind, *sizes) in enumerate(workload.layers):
        shared = not any(later in _NONLINEAR for later in kinds[index + 1 :])
        if kind == "conv":
            positions = prod(workload.shapes()[index + 1][1:])
            yield _Weighted(positions, 9 * int(sizes[0]), int(sizes[1]), shared)
        elif kind == "linear":
            yield _Weighted(1, int(sizes[0]), int(sizes[1]), shared)


def _contraction(workload: Workload, layer: _Weighted) -> float:
    """Count the operations of the cheapest order for one weight.

    Args:
        workload: The workload.
        layer: The layer.

    Returns:
        Their number.
    """
    d, result = ("c", "nm") if workload.compute == "trace" else ("d", "nmcd")
    n, m = ("", "") if layer.shared else ("n", "m")
    operands = [f"c{n}po", "npi", f"{d}{m}qo", "mqi"]
    sizes = {"c": workload.outputs, "d": workload.outputs, "n": workload.n1, "m": workload.n2}
    sizes |= {"p": layer.positions, "q": layer.positions, "i": layer.inputs, "o": layer.outputs}
    shapes = [tuple(sizes[letter] for letter in operand) for operand in operands]
    _, path = opt_einsum.contract_path(f"{','.join(operands)}->{result}", *shapes, shapes=True, optimize="optimal")
    return float(path.opt_cost)
