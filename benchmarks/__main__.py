"""``python -m benchmarks``: all workloads, sweeps and the overhead, then the report."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import by_hand, plan, predictions, te_nas
from benchmarks.contenders import BEFORE_FOLDER
from benchmarks.counts import measure_counts
from benchmarks.environment import describe_environment, slug
from benchmarks.overhead import measure_overhead
from benchmarks.process import ROOT
from benchmarks.report import summary_line, write_report
from benchmarks.results import Results, WorkloadResult
from benchmarks.runner import run_sweep, run_workload
from benchmarks.workloads import QUICK, SWEEPS, TABLES, WORKLOADS, Workload

_OVERHEAD, _COUNTS, _BY_HAND, _TE_NAS = "overhead", "counts", "by_hand", "te_nas"
_PREDICTIONS = "predictions"
_NAMES = [*TABLES, *SWEEPS, _OVERHEAD, _COUNTS, _BY_HAND, _TE_NAS, _PREDICTIONS]
_LONG = [_PREDICTIONS, "N-resnet18_cifar"]  # parts of a quarter of an hour or more, for which --only asks
_ROUNDS, _SWEEP_ROUNDS = 5, 3
_BY_HAND_ROUNDS = 5
_QUICK_ROUNDS = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        arguments: Command line arguments; ``None`` for the process's.

    Returns:
        The exit status: 0 if every kernel of ggn_ntk is right, else 1.
    """
    options = _parse(arguments)
    with _at_commit(options.against) as commit:
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
    folder = options.output or options.parent / slug(environment)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    # A part of the run replaces that part of what the folder has.
    results = Results.load(file) if options.part and file.exists() else Results(environment)
    results.environment |= {name: value for name, value in environment.items() if name == plan.BEFORE}
    for name in options.only:
        start = time.monotonic()
        _measure(name, options, results, file)
        results.took[f"{name} against" if options.against else name] = (time.monotonic() - start) / 60
        results.save(file)  # an interrupted run keeps what it has
    write_report(results, folder)
    for name, minutes in results.took.items():
        print(f"  {name:<28}{minutes:.1f} minutes")
    print(f"Report written to {folder}")
    return int(_ours_is_wrong(results))


def _measure(name: str, options: argparse.Namespace, results: Results, file: Path) -> None:
    """Measure a part of the run.

    Args:
        name: The part.
        options: The options.
        results: Where to keep what is measured.
        file: Where they are kept.
    """
    if name in WORKLOADS:
        result = _run_workload(WORKLOADS[name], options)
        results.put(result, bool(options.against))
        _show(result)
    elif name in SWEEPS:
        results.sweeps[name] = {}
        for value, result in run_sweep(SWEEPS[name], min(options.rounds, _SWEEP_ROUNDS), options.device):
            results.sweeps[name][value] = result
            _show(result)
            results.save(file)
    elif name == _OVERHEAD:
        results.overhead = measure_overhead(options.rounds, options.device)
    elif name == _COUNTS:
        results.counts = measure_counts()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == _TE_NAS:
                results.te_nas = te_nas.measure()
            if name == _PREDICTIONS:
                results.predictions = predictions.measure()
            for model in by_hand.CASES if name == _BY_HAND else ():
                results.by_hand[model] = by_hand.measure(model, min(options.rounds, _BY_HAND_ROUNDS))
                results.save(file)


def _run_workload(workload: Workload, options: argparse.Namespace) -> WorkloadResult:
    """Measure a workload.

    Args:
        workload: The workload.
        options: The options.

    Returns:
        The results.
    """
    contenders = plan.AGAINST if options.against else plan.available(plan.contenders_of(workload), options.device)
    counted = not (workload.symmetric or workload.architecture or workload.trace_axes or workload.paired)
    return run_workload(workload, contenders, options.rounds, options.device, with_floor=counted)


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
    parser.add_argument(
        "--rounds", type=int, help=f"timed rounds (default: {_ROUNDS}; at most {_SWEEP_ROUNDS} in sweeps)"
    )
    parser.add_argument(
        "--against", metavar="REV", help="this library beside itself at another commit, on workloads, without peers"
    )
    parser.add_argument("--quick", action="store_true", help="tiny workloads, to try the command")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of the report (default: a new one in docs/benchmarks, for a part or --quick in build/benchmarks)",
    )
    options = parser.parse_args(arguments)
    unable = sorted(set(options.only or []) - set(TABLES)) if options.against else []
    if unable:
        parser.error(f"--against compares workloads, not {', '.join(unable)}")
    options.part = bool(options.only or options.against)
    options.parent = ROOT / ("build" if options.quick or options.part else "docs") / "benchmarks"
    options.rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    whole = [name for name in _NAMES if name not in _LONG]
    everything = [workload.name for workload in QUICK] + [_OVERHEAD] if options.quick else whole
    options.only = options.only or (list(TABLES) if options.against else everything)
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
    ours = [
        r.measurements[plan.GGN_NTK]
        for r in (*results.workloads, *results.against, *swept)
        if plan.GGN_NTK in r.measurements
    ]
    return any(measurement.wrong or measurement.failure for measurement in ours)


if __name__ == "__main__":
    sys.exit(main())
