"""A process for one contender and workload: ``python -m benchmarks.worker CONTENDER WORKLOAD DEVICE``.

It reads a command per line, ``{"seed": 1, "calls": 1, "save": "kernel.npy"}`` in JSON, and answers with a line each:
``{"seconds": 0.1, "peak_mb": 300}`` or ``{"error": "out of memory at 16 GB"}``. ``"save"`` may be ``null``. Its first
line says that it is ready. Of several calls, each has inputs of its own, the last those of the seed; seconds are the
median, and the kernel is the last.
"""

import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import plan
from benchmarks.failures import MEMORY_LIMIT, describe
from benchmarks.meters import CudaMeter, ProcessMeter
from benchmarks.workloads import WORKLOADS, Array, Workload, tiny

_OTHER_CALLS = 10**7  # added to the seed of a call for each that comes after it


def main(contender: str, workload: str, device: str) -> None:
    """Serve commands until there are no more, or one fails.

    Args:
        contender: Name of the contender.
        workload: Name of the workload.
        device: Where to compute.
    """
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    on_cpu = device == "cpu"
    if on_cpu:  # on a GPU, the driver reserves more than it uses
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    try:
        for answer in _serve(contender, WORKLOADS[workload], device):
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        # some out-of-memory errors of Python itself have no message
        text = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        print(json.dumps({"error": describe(text, on_cpu)}), file=answers, flush=True)
        raise


def _serve(contender: str, workload: Workload, device: str) -> Iterator[dict[str, Any]]:
    """Prepare, then carry out commands from the standard input.

    Args:
        contender: Name of the contender.
        workload: The workload.
        device: Where to compute.

    Yields:
        The answers.
    """
    _load_code(contender, workload, device)
    load, run = _prepare(contender, workload, device)
    inputs = [load(x) for x in workload.inputs(0)]
    meter = ProcessMeter() if device == "cpu" else CudaMeter()
    del inputs
    yield {"ready": True}
    for line in sys.stdin:
        command = json.loads(line)
        seeds = [command["seed"] + _OTHER_CALLS * call for call in reversed(range(command["calls"]))]
        sets = [[load(x) for x in workload.inputs(seed)] for seed in seeds]
        seconds: list[float] = []
        kernel: Any = None
        gc.collect()
        meter.start()
        for x1, x2 in sets:
            del kernel  # of the call before
            start = time.perf_counter()
            kernel = run(x1, x2)
            meter.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = meter.peak()
        if command["save"]:
            np.save(command["save"], np.asarray(kernel if device == "cpu" else kernel.cpu()))
        del kernel, x1, x2, sets
        yield {"seconds": statistics.median(seconds), "peak_mb": peak}


def _load_code(contender: str, workload: Workload, device: str) -> None:
    """Let a contender compute a tiny kernel, for the imports that it puts off until then, and free what that took.

    Args:
        contender: Its name.
        workload: The kind of kernel.
        device: Where to compute.
    """
    small = tiny(workload)
    load, run = _prepare(contender, small, device)
    run(*(load(x) for x in small.inputs(0)))
    del load, run
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _prepare(contender: str, workload: Workload, device: str) -> tuple[Callable[[Array], Any], Callable[..., Any]]:
    """Import a contender and nothing of the others.

    Args:
        contender: Its name.
        workload: The workload.
        device: Where to compute.

    Returns:
        A function that loads samples, and one that computes the kernel from them.
    """
    if contender == plan.NEURAL_TANGENTS:
        from benchmarks import neural_tangents_peer

        return neural_tangents_peer.prepare(workload)
    from benchmarks import contenders

    return contenders.prepare(contender, workload, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
