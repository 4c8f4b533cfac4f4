"""What a GPU would pay for in a call: ``python -m benchmarks.counts`` prints it in JSON.

It is counted on the device that the tests pretend to have, in a process of its own.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.process import ROOT
from benchmarks.workloads import ANY_MODULE, FULL, SMALL, TRACE

#: Operations that are started, waits for all of them to end, and copies from or to the CPU.
Counts = dict[str, int]

_COUNTED = (*FULL, *TRACE, *SMALL, *ANY_MODULE)


def measure_counts() -> dict[str, Counts]:
    """Count for workloads and for all cases of the tests, in another process.

    Returns:
        The counts by name; cases come last.
    """
    command = [sys.executable, "-m", "benchmarks.counts"]
    counts: dict[str, Counts] = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    return counts


def _calls() -> Iterator[tuple[str, Any, Any, Any, dict[str, Any]]]:
    """List what to count.

    Yields:
        A name, a model, x1, x2 and keywords.
    """
    import pytest
    from cases import CASES

    from benchmarks.network import network, samples

    for workload in _COUNTED:
        x1, x2 = samples(workload, 0, "pretend")
        second, options = None if workload.symmetric else x2, {"compute": workload.compute}
        yield workload.name, network(workload, "pretend"), x1, second, options
    for case in CASES:
        try:
            model, x1, x2 = case.build(device="pretend")
        except pytest.skip.Exception:
            continue
        yield case.name, model, x1, x2, {}


def main() -> None:
    """Count launches, syncs and copies of each call, when it runs for the second time."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from pretend_device import COUNTS, reset

    from ggn_ntk import empirical_ntk

    counted: dict[str, Counts] = {}
    with torch.autograd.set_multithreading_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model, x1, x2, options in _calls():
            for _ in range(2):
                reset()
                empirical_ntk(model, x1, x2, method="structured", **options)
            counted[name] = dict(COUNTS)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
