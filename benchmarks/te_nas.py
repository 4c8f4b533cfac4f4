"""Condition numbers of random cells, with BatchNorm in train mode.

Architectures are ranked without training by the condition number of the NTK of their summed logits, with BatchNorm in
train mode, over all weights (Chen, Gong, Wang: "Neural Architecture Search on ImageNet in Four GPU Hours: A
Theoretically Inspired Perspective", ICLR 2021, section 3.1.1). A backward pass for each sample of the batch, as is
usual there, takes turns with ``empirical_ntk(..., interacting=True)``. Cells are of the kind of NAS-Bench-201 (Dong,
Yang: "NAS-Bench-201", ICLR 2020): four nodes, and on each of six edges one of four operations.
"""

import statistics
import time
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn

from ggn_ntk import empirical_ntk, explain
from ggn_ntk.reference import relative_error

_NODES, _WIDTH, _CLASSES, _ROUNDS = 4, 16, 10, 3


def _convolution(size: int) -> nn.Module:
    """Make ReLU, a convolution and BatchNorm."""
    layer = nn.Conv2d(_WIDTH, _WIDTH, size, padding=size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), layer, nn.BatchNorm2d(_WIDTH))


_OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "skip": nn.Identity,
    "pool": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "1x1": lambda: _convolution(1),
    "3x3": lambda: _convolution(3),
}


class Cell(nn.Module):
    """Nodes that each sum what comes from all before it."""

    def __init__(self, names: list[str]) -> None:
        """Make the operations."""
        super().__init__()
        edges = combinations(range(_NODES), 2)
        self.edges = nn.ModuleDict({f"{i}-{j}": _OPERATIONS[k]() for (i, j), k in zip(edges, names, strict=True)})

    def forward(self, x: Tensor) -> Tensor:
        """Compute the last node."""
        nodes = [x]
        for j in range(1, _NODES):
            nodes.append(torch.stack([self.edges[f"{i}-{j}"](nodes[i]) for i in range(j)]).sum(0))
        return nodes[-1]


def network(names: list[str]) -> nn.Module:
    """Make a small network of a cell, in train mode.

    Args:
        names: The operations on its edges.

    Returns:
        The network.
    """
    stem = [nn.Conv2d(3, _WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTH)]
    end = [nn.BatchNorm2d(_WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTH, _CLASSES)]
    return nn.Sequential(*stem, Cell(names), *end)


def by_loop(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the kernel of summed logits by a backward pass for each sample.

    Args:
        model: The network, in train mode.
        x: Images ``[N, 3, H, W]``.

    Returns:
        ``[N, N]``.
    """
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    logits = model(x)
    rows = []
    for n in range(len(x)):
        found = torch.autograd.grad(logits[n : n + 1], weights, torch.ones_like(logits[n : n + 1]), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    gradients = torch.stack(rows)
    return torch.einsum("np,mp->nm", gradients, gradients)


def by_library(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the same by ``empirical_ntk``.

    Args:
        model: The network, in train mode.
        x: Images ``[N, 3, H, W]``.

    Returns:
        ``[N, N]``.
    """
    kernel = empirical_ntk(model, x, params="*weight", output=lambda out: out.sum(1), interacting=True)
    assert isinstance(kernel, Tensor)
    return kernel


def condition(kernel: Tensor) -> float:
    """Compute the condition number of a kernel.

    Args:
        kernel: ``[N, N]``.

    Returns:
        The largest eigenvalue over the smallest.
    """
    eigenvalues = torch.linalg.eigvalsh(kernel.double())
    return float(eigenvalues[-1] / eigenvalues[0])


def measure(cells: int = 20, batch: int = 32, size: int = 16) -> dict[str, dict[str, float]]:
    """Compare kernels and times.

    Args:
        cells: The number of cells.
        batch: The number of images.
        size: Their height and width.

    Returns:
        Numbers by what they are, for each cell by its operations.
    """
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    measured = {}
    for _ in range(cells):
        names = [list(_OPERATIONS)[i] for i in torch.randint(len(_OPERATIONS), (_NODES * (_NODES - 1) // 2,))]
        model = network(names)
        covered = explain(model, x, params="*weight", output=lambda out: out.sum(1), interacting=True)
        (expected, found), (by_loop_seconds, by_library_seconds) = _taking_turns([by_loop, by_library], model, x)
        measured[" ".join(names)] = {
            "entries": covered.entries,
            "covered by rules": covered.covered / covered.entries,
            "condition, loop": condition(expected),
            "condition, library": condition(found),
            "error of the kernel": relative_error(found, expected),
            "seconds, loop": by_loop_seconds,
            "seconds, library": by_library_seconds,
        }
    return measured


def table(measured: dict[str, dict[str, float]]) -> str:
    """Write results as a table.

    Args:
        measured: What :func:`measure` returns.

    Returns:
        The table in Markdown, and what follows from it.
    """
    kinds = list(next(iter(measured.values())))
    lines = [["cell", *kinds], ["---"] * (1 + len(kinds))]
    lines += [[cell, *(f"{numbers[kind]:.4g}" for kind in kinds)] for cell, numbers in measured.items()]
    ratio = statistics.median(numbers["seconds, loop"] / numbers["seconds, library"] for numbers in measured.values())
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\nThe loop takes {ratio:.2f} times as long (median of {len(measured)} cells)."


def _taking_turns(
    functions: list[Callable[[nn.Module, Tensor], Tensor]], model: nn.Module, x: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Call functions in turn, several times: their results, and the medians of their times."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(_ROUNDS):
        results = []
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            results.append(function(model, x))
            own.append(time.perf_counter() - start)
    return results, [statistics.median(own) for own in times]
