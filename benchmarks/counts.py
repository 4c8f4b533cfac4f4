"""What a GPU would pay for in a call: ``python -m benchmarks.counts`` prints it in JSON.

Of ``empirical_ntk`` and of ``empirical_ntk_fn``. It is counted on the device that the tests pretend to have, in a
process of its own.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks import plan
from benchmarks.process import ROOT
from benchmarks.workloads import ANY_MODULE, FULL, SMALL, TRACE

#: Operations that are started, waits for all of them to end, and copies from or to the CPU, by what is called.
Counts = dict[str, int]

_CALLS = 3  # the first verifies, the second may write down what it does, the third is counted

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
    """Count launches, syncs and copies of a call, when all that is done once is done."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from pretend_device import COUNTS, reset

    from ggn_ntk import empirical_ntk, empirical_ntk_fn

    counted: dict[str, Counts] = {}
    with torch.autograd.set_multithreading_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model, x1, x2, options in _calls():
            kernel_fn = empirical_ntk_fn(model, method="structured", **options)
            calls = {
                plan.GGN_NTK: lambda: empirical_ntk(model, x1, x2, method="structured", **options),
                plan.PREPARED: lambda: kernel_fn(x1, x2),
            }
            counted[name] = {}
            for called, call in calls.items():
                for _ in range(_CALLS):
                    reset()
                    call()
                counted[name] |= {f"{called}: {kind}": number for kind, number in COUNTS.items()}
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
