"""Predictions from kernels, beside eigendecompositions.

Kernel ridge regression, fitted to all outputs of N samples at once and asked for ten, and the largest learning rate at
which training converges, from the float64 NTK of a network of 10 outputs as a matrix ``[N C, N C]``. The peer
decomposes it into eigenvectors, which serve for both (for the latter, eigenvalues alone); where it would take longer
than ten minutes, by the cube of the size, it is left out. On one thread and on all: medians of up to three rounds, of
seconds and of those that threads were busy, since the latter hardly depend on what else runs where there is one thread;
and how many processes wanted the cores (load).
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ggn_ntk import empirical_ntk
from ggn_ntk.reference import relative_error
from ggn_ntk.spectrum import as_matrix
from ggn_ntk.training import kernel_ridge_regression, max_learning_rate

_OUTPUTS, _TESTS, _ROUNDS, _PATIENCE, _DIAG_REG = 10, 10, 3, 600.0, 1e-6

_KINDS, _PEER, _NONE = ("seconds", "busy seconds"), ", eigendecomposition", "–"

# A round that takes longer is the last.
_LONG = 20.0


def regression_by_eigenvectors(kernel: Tensor, y: Tensor, cross: Tensor) -> Tensor:
    """Fit kernel ridge regression by an eigendecomposition, and predict.

    Args:
        kernel: ``[N, N, C, C]``.
        y: Targets ``[N, C]``.
        cross: The kernel of test and training samples, ``[M, N, C, C]``.

    Returns:
        ``[M, C]``.
    """
    matrix = as_matrix(kernel)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    inverse = (vectors / (values + _DIAG_REG * matrix.diagonal().mean())) @ vectors.mT
    prediction: Tensor = (as_matrix(cross) @ (inverse @ y.flatten())).reshape(len(cross), -1)
    return prediction


def regression_by_library(kernel: Tensor, y: Tensor, cross: Tensor) -> Tensor:
    """Do the same by ``kernel_ridge_regression``.

    Args:
        kernel: ``[N, N, C, C]``.
        y: Targets ``[N, C]``.
        cross: The kernel of test and training samples, ``[M, N, C, C]``.

    Returns:
        ``[M, C]``.
    """
    prediction: Tensor = kernel_ridge_regression(kernel, y, diag_reg=_DIAG_REG)(cross)
    return prediction


def rate_by_library(kernel: Tensor) -> Tensor:
    """Compute the largest learning rate by ``max_learning_rate``.

    Args:
        kernel: ``[N, N, C, C]``.

    Returns:
        The learning rate.
    """
    return torch.tensor(max_learning_rate(kernel), dtype=torch.float64)


def rate_by_eigenvalues(kernel: Tensor) -> Tensor:
    """Do the same from all eigenvalues.

    Args:
        kernel: ``[N, N, C, C]``.

    Returns:
        The learning rate.
    """
    matrix = as_matrix(kernel)
    rate: Tensor = 2 * len(matrix) / torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[-1]
    return rate


def measure(sizes: tuple[int, ...] = (1000, 3000, 10000)) -> dict[str, dict[str, float]]:
    """Compare results and times.

    Args:
        sizes: The numbers of rows N C, ascending.

    Returns:
        Numbers by what they are, for each prediction, size and number of threads.
    """
    measured: dict[str, dict[str, float]] = {}
    cores = torch.get_num_threads()
    seconds: dict[tuple[str, int], float] = {}  # what the peer will take, at the next size
    for size, larger in zip(sizes, [*sizes[1:], sizes[-1]], strict=True):
        kernel, y, cross = _problem(size // _OUTPUTS)
        contenders: dict[str, list[Callable[[], Tensor]]] = {
            "kernel_ridge_regression": [
                partial(function, kernel, y, cross) for function in (regression_by_library, regression_by_eigenvectors)
            ],
            "max_learning_rate": [partial(function, kernel) for function in (rate_by_library, rate_by_eigenvalues)],
        }
        for (name, (ours, peer)), threads in product(contenders.items(), sorted({1, cores})):
            torch.set_num_threads(threads)
            found, times = _timed(ours)
            numbers = {"threads": threads, "load": os.getloadavg()[0], **dict(zip(_KINDS, times, strict=True))}
            if seconds.get((name, threads), 0.0) < _PATIENCE:
                expected, times = _timed(peer)
                numbers |= {kind + _PEER: time for kind, time in zip(_KINDS, times, strict=True)}
                numbers["relative difference"] = relative_error(found, expected)
                seconds[name, threads] = times[0] * (larger / size) ** 3
            measured[f"{name}, N C = {size}, threads: {threads}"] = numbers
            print(f"{name}, N C = {size}: {numbers}", flush=True)
        torch.set_num_threads(cores)
    return measured


def table(measured: dict[str, dict[str, float]]) -> str:
    """Write results as a table.

    Args:
        measured: What :func:`measure` returns.

    Returns:
        The table in Markdown.
    """
    columns = [kind + peer for kind in _KINDS for peer in ("", _PEER)] + ["relative difference"]
    header = ["prediction", *columns, *(f"ratio of {kind}" for kind in _KINDS), "load"]
    lines = [header, ["---"] * len(header)]
    for name, numbers in measured.items():
        cells = [f"{numbers[column]:.3g}" if column in numbers else _NONE for column in columns]
        peers = [(numbers.get(kind + _PEER), numbers[kind]) for kind in _KINDS]
        ratios = [_NONE if peer is None else f"{peer / ours:.1f}" for peer, ours in peers]
        lines.append([name, *cells, *ratios, f"{numbers['load']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _problem(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make the kernels of a network at n training samples, and their targets."""
    # -> [n, n, C, C], [n, C], [M, n, C, C]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, _OUTPUTS))
    x, x_test = torch.randn(n, 100).double(), torch.randn(_TESTS, 100).double()
    kernel, cross = empirical_ntk(model.double(), x), empirical_ntk(model, x_test, x)
    assert isinstance(kernel, Tensor)
    assert isinstance(cross, Tensor)
    return kernel, torch.randn(n, _OUTPUTS).double(), cross


def _timed(function: Callable[[], Any]) -> tuple[Any, list[float]]:
    """Call a function a few times: its result, and medians of its seconds and of those that cores were busy."""
    times: list[tuple[float, float]] = []
    while len(times) < _ROUNDS and (not times or times[-1][0] < _LONG):
        start, busy = time.perf_counter(), time.process_time()
        result = function()
        times.append((time.perf_counter() - start, time.process_time() - busy))
    return result, [statistics.median(kind) for kind in zip(*times, strict=True)]
