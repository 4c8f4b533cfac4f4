"""Kernels in tiles, beside one call and beside arithmetic.

The trace kernel in float32 by ``tiled_ntk``, by one call of ``empirical_ntk``, and what the contractions of one call
would take at the rate of a large matrix product, with one evaluation of all samples. Seconds of processors, on one
thread. Then tiles of a quarter of x1 by a pool of one process, and of two, in seconds on a clock.
"""

import argparse
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.meters import ProcessMeter
from benchmarks.page import write_page
from ggn_ntk import empirical_ntk, explain, tiled_ntk

# Rows and columns of the matrices whose product measures the rate.
_MATRIX = 1024

# How many samples are taken first, and into how many strips pools divide the kernel where no tile is asked for.
_FEW, _STRIPS = 20, 4


class Case(NamedTuple):
    """A model, its samples, and how they are divided."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a sample
    n1: int
    n2: int | None  # ``None`` for x1 with itself
    memory: str = "2GiB"


def digits_cnn() -> nn.Sequential:
    """Build a network for images of 8 x 8 pixels."""
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10))


def cifar_cnn() -> nn.Sequential:
    """Build a network for images of 32 x 32 pixels."""
    channels = ((3, 16), (16, 32), (32, 64))
    layers = [m for c in channels for m in (nn.Conv2d(*c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


CASES = {
    "digits, 1,797": Case(digits_cnn, (1, 8, 8), 1797, None),
    "CIFAR, 2,000 x 1,000": Case(cifar_cnn, (3, 32, 32), 2000, 1000),
}


def measure(case: Case, tile: int | None = None, *, pools: bool = True) -> dict[str, Any]:
    """Time a case.

    Args:
        case: The case.
        tile: How many samples make a tile; ``None`` for what is chosen.
        pools: Whether pools of processes compute it, too.

    Returns:
        The tile, seconds by what took them, and peak memory in megabytes.
    """
    torch.manual_seed(0)
    model, x1 = case.build(), torch.randn(case.n1, *case.shape)
    x2 = None if case.n2 is None else torch.randn(case.n2, *case.shape)
    with tempfile.TemporaryDirectory() as folder:
        call = partial(tiled_ntk, model, x1, x2, compute="trace", tile=tile, memory=case.memory, progress=False)
        few = x1[:_FEW], None if x2 is None else x2[:_FEW]
        empirical_ntk(model, *few, compute="trace")  # for what is imported late
        meter = ProcessMeter()
        meter.start()
        taken, store = _processor(partial(call, store=Path(folder) / "here"))
        peak, used = meter.peak(), store.plan.tile
        whole, _ = _processor(lambda: empirical_ntk(model, x1, x2, compute="trace"))
        contractions = explain(model, x1, x2, compute="trace").flops.contraction / _rate()
        samples = x1 if x2 is None else torch.cat([x1, x2])
        with torch.no_grad():
            evaluation, _ = _processor(lambda: model(samples))
        clock = {
            f"{n} processes": _pooled(
                n, partial(call, store=Path(folder) / str(n), tile=tile or -(-case.n1 // _STRIPS))
            )
            for n in ((1, 2) if pools else ())
        }
    seconds = {"tiles": taken, "one call": whole, "contractions": contractions, "evaluation": evaluation}
    return {"tile": used, "seconds": seconds, "clock": clock, "peak": peak}


def _processor(run: Callable[[], Any]) -> tuple[float, Any]:
    """Take the time that processors spend."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def _rate() -> float:
    """Measure the operations per second of a large matrix product."""
    a: Tensor = torch.randn(_MATRIX, _MATRIX)
    torch.mm(a, a)
    seconds, _ = _processor(lambda: [torch.mm(a, a) for _ in range(10)])
    return 10 * 2 * _MATRIX**3 / seconds


def _pooled(workers: int, run: Callable[..., Any]) -> float:
    """Take the time on a clock with a pool whose processes are there before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        list(executor.map(_ready, range(4 * workers)))
        start = time.perf_counter()
        run(executor=executor)
        return time.perf_counter() - start


def _ready(_: int) -> None:
    """Import what a worker needs, as it is imported with this module."""
    time.sleep(0.2)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write results as a table.

    Args:
        results: What :func:`measure` returns, by case.

    Returns:
        The table, in Markdown.
    """
    lines = ["| kernel | tile | tiles | one call | contractions | evaluation | two processes | peak memory |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, result in results.items():
        seconds, clock = result["seconds"], result["clock"]
        times = [f"{seconds[what]:.3g} s" for what in ("tiles", "one call", "contractions", "evaluation")]
        faster = f"{clock['1 processes'] / clock['2 processes']:.2f} times as fast as one" if clock else ""
        tile = " x ".join(map(str, result["tile"]))
        lines.append(f"| {name} | {tile} | {' | '.join(times)} | {faster} | {result['peak']:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--tile", type=int, help="how many samples make a tile (default: what is chosen)")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/large"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {name: measure(CASES[name], options.tile) for name in options.names or CASES}
    write_page(options.out, "large", "Large kernels", __doc__, results, table(results))


if __name__ == "__main__":
    main()
