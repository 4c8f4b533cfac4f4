"""Tables of results in Markdown. ``python -m benchmarks.report FOLDER`` writes them again from kept results."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import by_hand, plan, predictions, te_nas
from benchmarks.check import TOLERANCE
from benchmarks.environment import title
from benchmarks.plots import SUMMARY_PLOT, contenders_in, draw, sweep_plot
from benchmarks.results import Measurement, Results, WorkloadResult, three_digits
from benchmarks.workloads import SWEEPS, WORKLOADS

_NONE = "–"

_HOW = """Times are medians in seconds; peak memory is in megabytes above each process's own baseline; errors are
relative to the kernels of ggn_ntk, the largest of all rounds. [How it is measured](../README.md)."""

_COUNTED = """Operations that a call starts on a device, how often it waits for all of them to end (to read numbers),
and copies from or to the CPU. They are counted in a third call, on the device that the tests pretend to have."""

_COUNTS_FILE, _BY_HAND_FILE, _TE_NAS_FILE = "counts.md", "by_hand.md", "te_nas.md"
_PREDICTIONS_FILE = "predictions.md"


def write_report(results: Results, folder: Path) -> None:
    """Write the report and draw its plots.

    Args:
        results: The results.
        folder: Where to put them.
    """
    draw(results, folder)
    sections = [f"# {title(results.environment)}", _HOW]
    if results.workloads:
        sections += ["## Summary", _summary(results.workloads), f"![Times relative to ggn_ntk]({SUMMARY_PLOT})"]
    sections += ["## Environment", _environment(results)]
    sections += [part for r in results.workloads for part in (f"## {_heading(r)}", _workload(r))]
    for name, sweep in results.sweeps.items():
        quantity, network = SWEEPS[name].quantity, SWEEPS[name].network
        picture = f"![Time and memory against {quantity}]({sweep_plot(name)})"
        sections += [f"## Against {quantity}: {network}", picture, "Seconds:", _sweep(quantity, sweep, _seconds_in)]
        sections += ["Peak MB:", _sweep(quantity, sweep, _peak_in)]
    if results.against:
        sections += [f"## Against {results.environment[plan.BEFORE]}", _against(results.against)]
    if results.overhead:
        sections += ["## EmpiricalNTK beside BatchGrad", _overhead(results.overhead)]
    for file, what, measured in (
        (_BY_HAND_FILE, by_hand, results.by_hand),
        (_TE_NAS_FILE, te_nas, results.te_nas),
        (_PREDICTIONS_FILE, predictions, results.predictions),
    ):
        if measured:
            heading, text = (what.__doc__ or "").strip().split("\n\n", 1)
            table = what.table(measured)
            (folder / file).write_text(f"# {heading} {title(results.environment)}\n\n{text}\n\n{table}\n")
            sections += [f"## {heading.rstrip('.')}", f"[Times of each]({file})."]
    if results.counts:
        workloads = {name: counts for name, counts in results.counts.items() if name in WORKLOADS}
        more = f"[The same for the cases of the tests]({_COUNTS_FILE})."
        sections += ["## What a GPU would pay for", _COUNTED, _counts(workloads), more]
        cases = {name: counts for name, counts in results.counts.items() if name not in WORKLOADS}
        (folder / _COUNTS_FILE).write_text(f"# {title(results.environment)}\n\n{_COUNTED}\n\n{_counts(cases)}\n")
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def _counts(counts: dict[str, dict[str, int]]) -> str:
    """Show counts.

    Args:
        counts: By name.

    Returns:
        A table.
    """
    kinds = list(next(iter(counts.values())))
    return _table(["", *kinds], [[name, *(str(of_one[kind]) for kind in kinds)] for name, of_one in counts.items()])


def summary_line(measurement: Measurement) -> str:
    """Describe a measurement in a line.

    Args:
        measurement: The measurement.

    Returns:
        The line.
    """
    if measurement.median is None:
        return measurement.failure or _NONE
    seconds, rounds = f"{measurement.median:.4f} s", len(measurement.seconds)
    return f"{seconds}  {measurement.peak_mb:.0f} MB  error {_error(measurement.error)}  rounds {rounds}"


def _summary(results: list[WorkloadResult]) -> str:
    """Compare ggn_ntk with the peers that matter most.

    Args:
        results: The results.

    Returns:
        A table.
    """
    header = [
        "workload",
        "seconds",
        plan.PREPARED,
        f"against {plan.JACOBIANS}",
        "against ViViT",
        "against neural-tangents",
    ]
    header += ["over the floor", "against x2=x1.clone()", "peak MB", f"of {plan.JACOBIANS}'s", "of neural-tangents'"]
    rows = []
    for r in results:
        ours, memory = r.seconds(plan.GGN_NTK), r.peak(plan.GGN_NTK)
        row = [r.name, _seconds(ours), _seconds(r.seconds(plan.PREPARED))]
        row += [_faster(r, peer, ours) for peer in (plan.JACOBIANS, plan.VIVIT, plan.NEURAL_TANGENTS)]
        row += [_ratio(ours, r.floor_seconds), _faster(r, plan.CLONE, ours), _megabytes(memory)]
        row += [_ratio(memory, r.peak(peer)) for peer in (plan.JACOBIANS, plan.NEURAL_TANGENTS)]
        rows.append(row)
    return _table(header, rows)


def _against(results: list[WorkloadResult]) -> str:
    """Compare ggn_ntk with itself at another commit.

    Args:
        results: The results.

    Returns:
        A table.
    """
    header, rows = ["workload"], []
    for name in (plan.GGN_NTK, plan.PREPARED):
        header += [name, "before", "time now", "memory now"]
    for r in results:
        row = [r.name]
        for name, before in ((plan.GGN_NTK, plan.BEFORE), (plan.PREPARED, plan.PREPARED_BEFORE)):
            times = r.seconds(name), r.seconds(before)
            row += [_seconds(times[0]), _seconds(times[1]), _ratio(*times), _ratio(r.peak(name), r.peak(before))]
        rows.append(row)
    return _table(header, rows)


def _faster(result: WorkloadResult, peer: str, ours: float | None) -> str:
    """Say how many times faster than a peer ggn_ntk is.

    Args:
        result: The results of the workload.
        peer: The peer.
        ours: The time of ggn_ntk.

    Returns:
        A cell.
    """
    if peer not in result.measurements:
        return _NONE
    return result.measurements[peer].failure or _ratio(result.seconds(peer), ours)


def _environment(results: Results) -> str:
    """List what the run depends on.

    Args:
        results: The results.

    Returns:
        A table.
    """
    rows = [[name, value] for name, value in results.environment.items()]
    rates = [rate for result in results.workloads for rate in result.rates]
    if rates:
        rows.append(["rate of a matrix product over the run", _rates(rates)])
    if results.took:
        rows.append(["minutes of the run", f"{sum(results.took.values()):.0f}"])
    return _table(["", ""], rows)


def _workload(result: WorkloadResult) -> str:
    """Compare all contenders on a workload.

    Args:
        result: The results.

    Returns:
        A table.
    """
    ours = result.seconds(plan.GGN_NTK)
    rows = []
    for name, m in result.measurements.items():
        if m.median is None:
            rows.append([name, m.failure or _NONE, *[_NONE] * 5])
            continue
        span = f"{_seconds(min(m.seconds))} to {_seconds(max(m.seconds))}"
        error = f"**wrong: {m.spot_error:.0e}**" if m.wrong else _error(m.error)
        row = [name, _seconds(m.median), span, str(len(m.seconds)), _ratio(m.median, ours), _megabytes(m.peak_mb)]
        rows.append([*row, error])
    if result.floor is not None and result.rates:
        rows.append(["floor", _seconds(result.floor_seconds), _NONE, _NONE, _ratio(result.floor_seconds, ours)])
        rows[-1] += [_NONE, _NONE]
    table = _table(["", "seconds", "from, to", "rounds", "times ggn_ntk's", "peak MB", "error"], rows)
    checked = f"ggn_ntk against gradients in float64: {_exactness(result)}."
    if result.floor is None or not result.rates:
        return f"{table}\n\n{checked}"
    return f"{table}\n\n{checked} Floor: {result.floor / 1e9:.3g} GFLOP at {_rates(result.rates)}."


def _exactness(result: WorkloadResult) -> str:
    """Describe the error of ggn_ntk.

    Args:
        result: The results of the workload.

    Returns:
        Its error, and whether that is too large.
    """
    ours = result.measurements[plan.GGN_NTK]
    return f"error {_error(ours.spot_error)}{f', **above {TOLERANCE:.0e}**' if ours.wrong else ''}"


def _sweep(quantity: str, sweep: dict[int, WorkloadResult], cell: Callable[[Measurement], str]) -> str:
    """Show what was measured in a sweep.

    Args:
        quantity: What is swept.
        sweep: The results by its value.
        cell: What to show of each.

    Returns:
        A table.
    """
    names, rows = contenders_in(sweep), []
    for value, result in sweep.items():
        found = [result.measurements.get(name) for name in names]
        rows.append([str(value), *(_NONE if m is None else m.failure or cell(m) for m in found)])
    return _table([quantity, *names], rows)


def _seconds_in(measurement: Measurement) -> str:
    """Format the time of a measurement.

    Args:
        measurement: The measurement.

    Returns:
        A cell.
    """
    return _seconds(measurement.median)


def _peak_in(measurement: Measurement) -> str:
    """Format the memory of a measurement.

    Args:
        measurement: The measurement.

    Returns:
        A cell.
    """
    return _megabytes(measurement.peak_mb)


def _overhead(measured: dict[str, Measurement]) -> str:
    """Show the cost of the kernel in a training step.

    Args:
        measured: Times by variant.

    Returns:
        A table, and what follows from it.
    """
    medians = {name: m.median or 0.0 for name, m in measured.items()}
    rows = [
        [name, _seconds(medians[name]), f"{_seconds(min(m.seconds))} to {_seconds(max(m.seconds))}"]
        for name, m in measured.items()
    ]
    extra = medians[plan.KERNEL_STEP] - medians[plan.BATCH_GRAD_STEP]
    share, error = _ratio(extra, medians[plan.ALONE]), _error(measured[plan.KERNEL_STEP].error)
    return f"""A training step of the CNN with the cross-entropy loss on 25 samples; the kernel is that of the first 20
with the others.

{_table(["", "seconds", "from, to"], rows)}

The kernel adds {_seconds(extra)} s to the step with BatchGrad, {share} the time of `empirical_ntk` by itself. It is
within {error} of that function's, and all gradients are the same bit for bit with and without it."""


def _heading(result: WorkloadResult) -> str:
    """Name a workload with its sizes.

    Args:
        result: Its results.

    Returns:
        The heading.
    """
    samples = f"{result.n1} pairs of" if result.paired else f"{result.n1} x {result.n2}"
    return f"{result.name}: {samples} samples, {result.outputs} outputs"


def _rates(rates: list[float]) -> str:
    """Describe rates of arithmetic.

    Args:
        rates: Operations in a second.

    Returns:
        Their median and range.
    """
    ordered = sorted(rate / 1e9 for rate in rates)
    return f"{ordered[len(ordered) // 2]:.0f} GFLOP/s ({ordered[0]:.0f} to {ordered[-1]:.0f})"


def _seconds(value: float | None) -> str:
    """Format a time.

    Args:
        value: Seconds.

    Returns:
        A cell.
    """
    return _NONE if value is None else three_digits(value)


def _megabytes(value: float | None) -> str:
    """Format a size.

    Args:
        value: Megabytes.

    Returns:
        A cell.
    """
    return _NONE if value is None else f"{value:.0f}"


def _error(value: float | None) -> str:
    """Format a relative error.

    Args:
        value: The error.

    Returns:
        A cell.
    """
    return _NONE if value is None else f"{value:.0e}" if value else "0"


def _ratio(value: float | None, base: float | None) -> str:
    """Format a ratio.

    Args:
        value: The numerator.
        base: The denominator.

    Returns:
        A cell.
    """
    return _NONE if value is None or not base else f"{three_digits(value / base)}x"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Lay out a table.

    Args:
        header: Its header.
        rows: Its rows, of cells.

    Returns:
        The table in Markdown.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write_report(Results.load(Path(sys.argv[1]) / "results.json"), Path(sys.argv[1]))
