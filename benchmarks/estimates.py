"""``python -m benchmarks.estimates [--out FOLDER] [WORKLOAD ...]``: what ``explain`` says beside what a call takes.

``explain`` looks at two samples of each set, and says what a call of ``empirical_ntk`` takes for all of them:
operations, bytes at the peak and seconds. Beside it the same of a call: the operations that torch counts, the bytes of
all tensors at the peak, and the median time of three calls. Ratios are of the estimate to the call. A process takes
more memory than its tensors: what libraries have for themselves, and what is freed but kept; the peak of one that has
done nothing else before but a tiny kernel stands beside it. The last column is the time of ``explain`` itself.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.meters import ProcessMeter
from benchmarks.network import network
from benchmarks.page import write_page
from benchmarks.process import ROOT
from benchmarks.tensors import TensorMeter
from benchmarks.workloads import TABLES, tiny
from ggn_ntk import empirical_ntk, explain
from ggn_ntk.jacobians.footprint import Counter

_ROUNDS = 3


def measure(name: str) -> dict[str, float]:
    """Compare a workload, in a process that is new.

    Args:
        name: The workload.

    Returns:
        Ratios of estimates to what a call took, and what that was.
    """
    workload = TABLES[name]
    keywords: dict[str, Any] = {
        "compute": workload.compute,
        "trace_axes": workload.trace_axes or None,
        "paired": workload.paired,
        "method": "structured",
    }
    small = tiny(workload)
    of_small: dict[str, Any] = {**keywords, "trace_axes": None}
    empirical_ntk(network(small, "cpu"), *_samples(small), **of_small)  # for what is imported late
    model, (x1, x2) = network(workload, "cpu"), _samples(workload)
    explained = partial(explain, model, x1[:2], None if x2 is None else x2[:2], n1=workload.n1, **keywords)
    explained = explained if x2 is None else partial(explained, n2=workload.n2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    meter = ProcessMeter()
    meter.start()
    empirical_ntk(model, x1, x2, **keywords)
    peak = meter.peak()
    with Counter() as counted:
        empirical_ntk(model, x1, x2, **keywords)
    with TensorMeter([*model.parameters(), *model.buffers(), x1, *([] if x2 is None else [x2])]) as tensors:
        empirical_ntk(model, x1, x2, **keywords)
    seconds = statistics.median(_timed(lambda: empirical_ntk(model, x1, x2, **keywords)) for _ in range(_ROUNDS))
    explained()
    explaining, said = _timed(explained), explained()
    return {
        "operations": said.flops.total / counted.flops,
        "bytes": said.peak_bytes / 1e6 / tensors.peak(),
        "time": said.seconds / seconds,
        "GFLOP": counted.flops / 1e9,
        "MB": tensors.peak(),
        "process": peak,
        "seconds": seconds,
        "explaining": explaining,
    }


def _samples(workload: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw samples."""
    x1, x2 = map(torch.from_numpy, workload.inputs(0))
    return x1, None if workload.symmetric else x2


def _timed(run: Callable[[], object]) -> float:
    """Take the time."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(results: dict[str, dict[str, float]]) -> str:
    """Write results as a table.

    Args:
        results: What :func:`measure` returns, by workload.

    Returns:
        The table, in Markdown.
    """
    header = ["workload", "operations", "bytes", "time", "GFLOP", "peak MB", "of the process", "seconds", "explain"]
    lines = [header, ["---"] * len(header)]
    for name, r in results.items():
        ratios = [f"{r[what]:.2f}" for what in ("operations", "bytes", "time")]
        taken = [f"{r['GFLOP']:.3g}", f"{r['MB']:.3g}", f"{r['process']:.3g}"]
        lines.append([name, *ratios, *taken, f"{r['seconds']:.3g}", f"{r['explaining']:.2g} s"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/estimates"))
    parser.add_argument("--here", action="store_true", help="measure one workload in this process, and print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.here:
        print(json.dumps(measure(options.names[0])))
        return
    results = {}
    for name in options.names or TABLES:
        command = [sys.executable, "-m", "benchmarks.estimates", "--here", name]
        results[name] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])
        print(name, results[name], flush=True)
    write_page(options.out, "estimates", "What explain says", __doc__, results, table(results))


if __name__ == "__main__":
    main()
