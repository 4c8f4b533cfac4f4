"""``python -m benchmarks``: all workloads, sweeps and the overhead, then the report."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import plan
from benchmarks.contenders import BEFORE_FOLDER
from benchmarks.counts import measure_counts
from benchmarks.environment import describe_environment, slug
from benchmarks.overhead import measure_overhead
from benchmarks.process import ROOT
from benchmarks.report import summary_line, write_report
from benchmarks.results import Results, WorkloadResult
from benchmarks.runner import run_sweep, run_workload
from benchmarks.workloads import ANY_MODULE, AXES, FULL, QUICK, SMALL, SWEEPS, SYMMETRIC, TRACE

_TABLES = {workload.name: workload for workload in (*FULL, *TRACE, *SMALL, *SYMMETRIC, *AXES, *ANY_MODULE)}
_OVERHEAD, _COUNTS = "overhead", "counts"
_NAMES = [*_TABLES, *SWEEPS, _OVERHEAD, _COUNTS]
_SWEEP_ROUNDS = 3
_QUICK_ROUNDS = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        arguments: Command line arguments; ``None`` for the process's.

    Returns:
        The exit status: 0 if every kernel of ggn_ntk is right, else 1.
    """
    options = _parse(arguments)
    with _at_commit(options.before) as commit:
        return _run(options, describe_environment(options.device) | commit)


@contextmanager
def _at_commit(name: str | None) -> Iterator[dict[str, str]]:
    """Have this library ready as it was at a commit.

    Args:
        name: The commit; ``None`` for nothing.

    Yields:
        What to add to the environment.
    """
    if name is None:
        yield {}
        return
    commit = subprocess.check_output(["git", "rev-parse", "--short", name], cwd=ROOT, text=True).strip()
    archive = subprocess.check_output(["git", "archive", commit, "ggn_ntk"], cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        os.environ[BEFORE_FOLDER] = folder
        yield {plan.BEFORE: commit}


def _run(options: argparse.Namespace, environment: dict[str, str]) -> int:
    """Measure what was asked for, and write the report.

    Args:
        options: The options.
        environment: What the run depends on besides the code.

    Returns:
        The exit status.
    """
    folder = options.output / slug(environment)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    # A part of the run replaces that part of the same day's results.
    results = Results.load(file) if options.part and file.exists() else Results(environment)
    if options.quick:
        chosen, sweeps, overhead, counts = {workload.name: workload for workload in QUICK}, [], True, False
    else:
        chosen = {name: workload for name, workload in _TABLES.items() if name in options.only}
        sweeps = [name for name in SWEEPS if name in options.only]
        overhead, counts = _OVERHEAD in options.only, _COUNTS in options.only

    for workload in chosen.values():
        contenders = plan.available(plan.contenders_of(workload), options.device)
        if options.before is not None:
            contenders = [plan.GGN_NTK, plan.BEFORE]
        result = run_workload(
            workload,
            contenders,
            options.rounds,
            options.device,
            with_floor=not (workload.symmetric or workload.architecture or workload.trace_axes),
        )
        results.put(result)
        _show(result)
        results.save(file)  # an interrupted run keeps what it has
    for quantity in sweeps:
        results.sweeps[quantity] = {}
        for value, result in run_sweep(SWEEPS[quantity], min(options.rounds, _SWEEP_ROUNDS), options.device):
            results.sweeps[quantity][value] = result
            _show(result)
            results.save(file)
    if overhead:
        results.overhead = measure_overhead(options.rounds, options.device)
        results.save(file)
    if counts:
        results.counts = measure_counts()
        results.save(file)
    write_report(results, folder)
    print(f"Report written to {folder}")
    return int(_ours_is_wrong(results))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: The arguments.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="ggn_ntk beside its peers.")
    parser.add_argument(
        "--only", nargs="+", choices=_NAMES, metavar="NAME", help=f"part of the run: {', '.join(map(repr, _NAMES))}"
    )
    parser.add_argument("--rounds", type=int, help=f"timed rounds (default: 7; at most {_SWEEP_ROUNDS} in sweeps)")
    parser.add_argument("--before", metavar="COMMIT", help="compare with ggn_ntk at this commit alone, not with peers")
    parser.add_argument("--quick", action="store_true", help="tiny workloads, to try the command")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to make a folder for the report (default: docs/benchmarks, for a part or --quick build/benchmarks)",
    )
    options = parser.parse_args(arguments)
    options.part = bool(options.only)
    options.output = options.output or ROOT / ("build" if options.quick or options.part else "docs") / "benchmarks"
    options.rounds = options.rounds or (_QUICK_ROUNDS if options.quick else 7)
    options.only = options.only or _NAMES
    return options


def _show(result: WorkloadResult) -> None:
    """Print a result while the others are still to come.

    Args:
        result: The result.
    """
    print(result.name)
    for name, measurement in result.measurements.items():
        print(f"  {name:<28}{summary_line(measurement)}")
    if result.floor_seconds is not None:
        print(f"  {'floor':<28}{result.floor_seconds:.4f} s")
    sys.stdout.flush()


def _ours_is_wrong(results: Results) -> bool:
    """Look for wrong kernels of ggn_ntk.

    Args:
        results: The results.

    Returns:
        Whether there are any, or it failed.
    """
    swept = [result for sweep in results.sweeps.values() for result in sweep.values()]
    ours = [r.measurements[plan.GGN_NTK] for r in (*results.workloads, *swept) if plan.GGN_NTK in r.measurements]
    return any(measurement.wrong or measurement.failure for measurement in ours)


if __name__ == "__main__":
    sys.exit(main())
