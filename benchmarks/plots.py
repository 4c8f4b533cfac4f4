"""Plots of results."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import plan
from benchmarks.environment import title
from benchmarks.results import Results, WorkloadResult, three_digits
from benchmarks.workloads import SWEEPS, Sweep

SUMMARY_PLOT = "ratios.png"

# Colours of Okabe and Ito, which people with colour blindness can tell apart, and a marker for each contender.
STYLES = {
    plan.GGN_NTK: ("#D55E00", "o"),
    plan.PREPARED: ("#D55E00", "*"),
    plan.BOUNDED: ("#7A3300", "o"),
    plan.BY_HAND: ("0.6", "h"),
    plan.GRADIENTS: ("#F0E442", "<"),
    plan.JACOBIANS: ("#0072B2", "s"),
    plan.PRODUCTS: ("#56B4E9", "v"),
    plan.VIVIT: ("#009E73", "^"),
    plan.NEURAL_TANGENTS: ("#CC79A7", "D"),
    plan.NNGEOMETRY: ("#E69F00", "P"),
    plan.ASDFGHJKL: ("#000000", "X"),
}


def sweep_plot(name: str) -> str:
    """Name the picture of a sweep.

    Args:
        name: The sweep.

    Returns:
        The name of the file.
    """
    return f"against_{name.lower()}.png"


def contenders_in(sweep: dict[int, WorkloadResult]) -> list[str]:
    """List who took part in a sweep.

    Args:
        sweep: The results by value.

    Returns:
        The contenders at its first value, of which others drop out.
    """
    return list(next(iter(sweep.values())).measurements)


def draw(results: Results, folder: Path) -> None:
    """Draw all plots.

    Args:
        results: The results.
        folder: Where to put the pictures.
    """
    source = title(results.environment)
    if results.workloads:
        _draw_ratios(results.workloads, source).savefig(folder / SUMMARY_PLOT, dpi=150)
    for name, sweep in results.sweeps.items():
        _draw_sweep(SWEEPS[name], sweep, source).savefig(folder / sweep_plot(name), dpi=150)


def _draw_ratios(results: list[WorkloadResult], source: str) -> Figure:
    """Draw how many times longer than ggn_ntk peers take.

    Args:
        results: The workloads.
        source: Where they ran.

    Returns:
        The picture.
    """
    shown = {r.name: _ratios(r) for r in results if plan.CLONE not in r.measurements and r.seconds(plan.GGN_NTK)}
    rows = sum(map(len, shown.values())) + len(shown)
    figure = Figure(figsize=(9, 1.5 + 0.23 * rows), layout="constrained")
    axes = figure.subplots()
    row, ticks = 0, []
    for ratios in shown.values():
        ticks.append(row + (len(ratios) - 1) / 2)
        for name, ratio in ratios.items():
            _draw_bar(axes, row, name, ratio)
            row += 1
        row += 1
    axes.axvline(1, color=STYLES[plan.GGN_NTK][0], linewidth=2)
    axes.set_xscale("log")
    known = [ratio for ratios in shown.values() for ratio in ratios.values() if isinstance(ratio, float)]
    span = max(*known, 10) / min(*known, 1)
    axes.set_xlim(min(*known, 1) / span**0.03, max(*known, 10) * span**0.35)  # text stands behind the bars
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(ticks, list(shown), fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(row - 1, -1)
    axes.set_xlabel("time relative to ggn_ntk's, the line at 1x")
    _dress(figure, axes, "Time of peers relative to ggn_ntk", source)
    axes.yaxis.grid(visible=False)
    return figure


def _ratios(result: WorkloadResult) -> dict[str, float | str]:
    """Compare peers with ggn_ntk.

    Args:
        result: The results of a workload.

    Returns:
        For each peer, its time relative to that of ggn_ntk, or why there is none.
    """
    ours, found = result.seconds(plan.GGN_NTK), dict[str, float | str]()
    for name in STYLES:
        theirs = result.seconds(name)
        if theirs and ours and name != plan.GGN_NTK:
            found[name] = theirs / ours
        elif name in result.measurements and theirs is None:
            found[name] = _shortened(result.measurements[name].failure)
    return found


def _shortened(failure: str | None) -> str:
    """Say in few words why a contender failed.

    Args:
        failure: The reason.

    Returns:
        What fits into a picture.
    """
    return failure if failure is not None and failure.startswith(("out of memory", "more than")) else "fails"


def _draw_bar(axes: Axes, row: int, name: str, ratio: float | str) -> None:
    """Draw the bar of a peer, or write why there is none.

    Args:
        axes: Where to draw.
        row: At which height.
        name: The peer.
        ratio: Its time relative to ggn_ntk, or why there is none.
    """
    end = ratio if isinstance(ratio, float) else 1.0
    axes.barh(row, end - 1, left=1, height=0.8, color=STYLES[name][0])
    text = f"{three_digits(ratio)}x" if isinstance(ratio, float) else ratio
    axes.annotate(f"{name}: {text}", (max(end, 1), row), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _dress(figure: Figure, axes: Axes, heading: str, source: str) -> None:
    """Add what all pictures have.

    Args:
        figure: The picture.
        axes: Its axes.
        heading: Its title.
        source: Where the results are from.
    """
    axes.grid(color="0.88")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=13, fontweight="bold")
    axes.set_title(source, fontsize=9, color="0.35")


def _draw_sweep(sweep: Sweep, results: dict[int, WorkloadResult], source: str) -> Figure:
    """Draw times and memory against a quantity, on logarithmic axes.

    Args:
        sweep: What is swept.
        results: The results by its value.
        source: Where they ran.

    Returns:
        The picture.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = zip(figure.subplots(ncols=2), ("seconds", "peak memory in MB"), (_times, _peaks), strict=True)
    for axes, label, values in panels:
        for name in contenders_in(results):
            if found := values(name, results):
                colour, marker = STYLES[name]
                width = 2.6 if name == plan.GGN_NTK else 1.6
                drawn = {
                    "marker": marker,
                    "color": colour,
                    "linewidth": width,
                    "label": f"{name}{_end(name, sweep, results)}",
                }
                axes.plot(list(found), list(found.values()), **drawn)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(results), [str(value) for value in results])
        axes.set(xlabel=sweep.label, ylabel=label)
        _draw_slopes(axes, sweep.quantity, values(plan.GGN_NTK, results))
        _dress(figure, axes, f"Against {sweep.quantity}: {sweep.network}", source)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _times(name: str, results: dict[int, WorkloadResult]) -> dict[int, float]:
    """Look up median times.

    Args:
        name: The contender.
        results: The results by value.

    Returns:
        Seconds by value, where it has any.
    """
    return {value: seconds for value, r in results.items() if (seconds := r.seconds(name)) is not None}


def _peaks(name: str, results: dict[int, WorkloadResult]) -> dict[int, float]:
    """Look up peaks of memory.

    Args:
        name: The contender.
        results: The results by value.

    Returns:
        Megabytes by value, where it has any and takes memory.
    """
    return {value: peak for value, r in results.items() if (peak := r.peak(name))}


def _draw_slopes(axes: Axes, quantity: str, values: dict[int, float]) -> None:
    """Draw lines that grow as the quantity and as its square, through the last value of ggn_ntk.

    Args:
        axes: Where to draw.
        quantity: What is swept.
        values: Those of ggn_ntk.
    """
    if not values:
        return
    last = max(values)
    first = last / 8
    for power, sign in ((1, ""), (2, "²")):
        start = values[last] / 8**power
        axes.plot([first, last], [start, values[last]], linestyle=":", color="0.45", linewidth=1.2, zorder=1)
        axes.annotate(
            f"∝ {quantity}{sign}", (first, start), (-4, 0), textcoords="offset points", ha="right", va="center"
        )


def _end(name: str, sweep: Sweep, results: dict[int, WorkloadResult]) -> str:
    """Say why a line ends before the largest value.

    Args:
        name: The contender.
        sweep: What is swept.
        results: The results by value.

    Returns:
        The reason, or nothing.
    """
    failures = [(value, r.measurements[name].failure) for value, r in results.items() if name in r.measurements]
    value, failure = failures[-1]
    if failure is not None:
        return f" ({_shortened(failure)}, from {value})"
    return "" if value == list(results)[-1] else f" (more than {sweep.patience:.0f} s at {value})"
