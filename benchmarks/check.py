"""Is a kernel right? Some of its entries from gradients in float64, one output of one sample at a time."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.network import samples
from benchmarks.workloads import Array, Workload

#: The largest relative error of a kernel in float32 that is right.
TOLERANCE = 1e-4

_OUTPUTS = 8


@dataclass(frozen=True)
class Spot:
    """Some entries of a kernel.

    Attributes:
        n: A sample of x1.
        m: A sample of x2; ``None`` where x1[n] meets x2[n] alone.
        c: Outputs of the first, or all for the trace.
        d: Outputs of the second, or all for the trace.
        entries: ``[c, d]``, or for the trace ``[]``.
    """

    n: int
    m: int | None
    c: NDArray[np.int64]
    d: NDArray[np.int64]
    entries: NDArray[np.float64]

    def error(self, kernel: Array) -> float:
        """Compare a kernel.

        Args:
            kernel: ``[N1, N2, O, O]``, or for the trace ``[N1, N2]``; of pairs with ``[N]`` in the place of both.

        Returns:
            The relative error of the entries.
        """
        block = kernel[self.n] if self.m is None else kernel[self.n, self.m]
        return relative_error(block if block.ndim == 0 else block[np.ix_(self.c, self.d)], self.entries)


def spot(workload: Workload, model: nn.Module, seed: int) -> Spot:
    """Compute random entries of the kernel.

    Args:
        workload: The workload.
        model: Its network in float64.
        seed: Decides on the inputs and on the entries.

    Returns:
        The entries.
    """
    rng, trace = np.random.default_rng(seed), workload.compute == "trace"
    n, m = int(rng.integers(workload.n1)), int(rng.integers(workload.n2))
    if workload.paired:
        m = n
    place = None if workload.paired else m
    number = workload.outputs if trace else min(workload.outputs, _OUTPUTS)
    c = rng.permutation(workload.outputs)[:number]
    d = c if trace else rng.permutation(workload.outputs)[:number]
    x1, x2 = samples(workload, seed, dtype=torch.float64)
    first = [_gradients(model, x1[n], int(output)) for output in c]
    if trace:
        products = [_product(g, _gradients(model, x2[m], int(output))) for g, output in zip(first, d, strict=True)]
        return Spot(n, place, c, d, torch.stack(products).sum().numpy())
    columns = []
    for output in d:  # gradients of the second sample are many numbers, and needed once
        second = _gradients(model, x2[m], int(output))
        columns.append(torch.stack([_product(g, second) for g in first]))
    return Spot(n, place, c, d, torch.stack(columns, 1).numpy())


def relative_error(actual: Array, expected: Array | NDArray[np.float64]) -> float:
    """Compare arrays.

    Args:
        actual: An array.
        expected: What it should be.

    Returns:
        The norm of the difference over that of the expected; infinite if shapes differ.
    """
    if actual.shape != expected.shape:
        return float("inf")
    exact = expected.astype(np.float64)
    return float(np.linalg.norm((actual - exact).ravel()) / np.linalg.norm(exact.ravel()))


def _gradients(model: nn.Module, x: Tensor, output: int) -> list[Tensor]:
    """Differentiate an output of a sample.

    Args:
        model: The network.
        x: The sample.
        output: Index of the output.

    Returns:
        Its gradient with respect to all parameters, ``[P]``, at each of its positions; a network without has one.
    """
    params = list(model.parameters())
    rows = (torch.autograd.grad(y, params, retain_graph=True) for y in model(x[None])[0, output].flatten())
    return [torch.cat([g.flatten() for g in row]) for row in rows]


def _product(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Multiply gradients of two outputs, and sum over positions.

    Args:
        first: The gradients of one, at each position.
        second: Those of the other.

    Returns:
        The entry of the kernel.
    """
    return torch.stack([a @ b for a, b in zip(first, second, strict=True)]).sum()
