"""Numbers in the README and in the pages, from committed results. ``python -m benchmarks.figures`` writes them again.

A page marks where a number or a table belongs, and which. Markdown shows neither comment::

    <!-- measured: cpu "cnn trace" seconds -->120 ms<!-- end -->

The first word is the kind of device, the second a workload, or a value of a sweep such as ``N=128``, or a model beside
loops by hand, ``by-hand:ALBERT``. Of several runs, the latest counts that measured the workload beside its peers.
"""

import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import floor, log10
from pathlib import Path

from benchmarks import plan
from benchmarks.environment import title
from benchmarks.network import network
from benchmarks.pictures import draw_speed
from benchmarks.process import ROOT
from benchmarks.results import Results, WorkloadResult
from benchmarks.workloads import SWEEPS, TABLES

#: Where committed runs are.
RUNS = ROOT / "docs" / "benchmarks"

_MARK = re.compile(r"<!-- measured: (?P<what>.*?) -->(?P<old>.*?)<!-- end -->", re.DOTALL)

_NETWORKS = {
    "cnn": "CNN of the PyTorch tutorial",
    "vgg": "VGG of four convolutions",
    "fcn": "MLP 3072-1024-1024-10",
    "fcn_wideout": "MLP 784-512-512-100",
    "segmentation": "segmentation CNN, pixels traced",
    "resnet18": "ResNet-18",
    "resnet18_cifar": "ResNet-18 for CIFAR-10",
    "transformer": "transformer of four layers",
    "paired mlp": "MLP 784-256-256-1",
    "paired cnn": "small CNN",
}


@dataclass(frozen=True)
class Run:
    """A committed run.

    Attributes:
        folder: Its folder.
        results: What it measured.
    """

    folder: Path
    results: Results

    @property
    def device(self) -> str:
        """The kind of device."""
        return "gpu" if "GPU" in self.results.environment else "cpu"


def pages() -> list[Path]:
    """Find the pages that may show numbers.

    Returns:
        Their files.
    """
    written = (path for path in sorted((ROOT / "docs").rglob("*.md")) if not {"_build", "gallery"} & set(path.parts))
    return [ROOT / "README.md", *(path for path in written if RUNS not in path.parents)]


def update(text: str) -> str:
    """Write the numbers of a page again.

    Args:
        text: The page.

    Returns:
        The page with the numbers of the committed runs.
    """
    return _MARK.sub(lambda mark: f"<!-- measured: {mark['what']} -->{measured(mark['what'])}<!-- end -->", text)


def measured(what: str) -> str:
    """Look up what a mark asks for.

    Args:
        what: The words of the mark.

    Returns:
        A number with its unit, or a table.

    Raises:
        LookupError: If nobody measured that.
    """
    device, name, *rest = shlex.split(what)
    if name in _TABLES:
        return f"\n\n{_TABLES[name](device)}\n\n"
    if name == "machine":
        return title(_latest(device, lambda run: any(map(_beside_peers, run.results.workloads))).results.environment)
    if name.startswith("by-hand:"):
        return _time(_by_hand(device)[name.removeprefix("by-hand:")][rest[0]])
    return _of_workload(_result(device, name), *rest)


def _of_workload(result: WorkloadResult, quantity: str, contender: str = plan.GGN_NTK) -> str:
    """Show a quantity of a workload."""
    seconds, ours = result.seconds(contender), result.seconds(plan.GGN_NTK)
    if seconds is None or ours is None:
        raise LookupError(f"{contender} did not measure {result.name}")
    if quantity == "seconds":
        return _time(seconds)
    if quantity == "memory":
        return _memory(result.measurements[contender].peak_mb)
    if quantity == "ratio":  # of a peer's time to ours
        return _digits(seconds / ours)
    raise LookupError(f"{quantity!r} is none of 'seconds', 'memory', 'ratio'")


@cache
def runs() -> list[Run]:
    """Load the committed runs.

    Returns:
        The runs, the latest first.
    """
    files = sorted(RUNS.glob("*/results.json"), key=lambda file: file.parent.name[-10:], reverse=True)
    return [Run(file.parent, Results.load(file)) for file in files]


def _latest(device: str, holds: Callable[[Run], bool]) -> Run:
    """Choose the latest run of a device for which something holds."""
    for run in runs():
        if run.device == device and holds(run):
            return run
    raise LookupError(f"no run on a {device} in {RUNS} has that")


def swept(device: str, quantity: str) -> Results:
    """Choose the latest run that swept a quantity.

    Args:
        device: The kind of device.
        quantity: The quantity.

    Returns:
        Its results.
    """
    return _latest(device, lambda run: quantity in run.results.sweeps).results


def _beside_peers(result: WorkloadResult) -> bool:
    """Tell whether others than this library took part."""
    return any(not name.startswith((plan.GGN_NTK, plan.PREPARED)) for name in result.measurements)


def _results(device: str) -> Iterator[tuple[str, WorkloadResult]]:
    """List what was measured, by name, the latest first; of tables, beside peers."""
    for run in runs():
        if run.device == device:
            yield from ((result.name, result) for result in run.results.workloads if _beside_peers(result))
            for name, sweep in run.results.sweeps.items():
                yield from ((f"{name}={value}", result) for value, result in sweep.items())


def _result(device: str, name: str) -> WorkloadResult:
    """Look up the latest results of a workload."""
    for known, result in _results(device):
        if known == name:
            return result
    raise LookupError(f"no run on a {device} in {RUNS} has the workload {name!r}")


def _by_hand(device: str) -> dict[str, dict[str, float]]:
    """Look up the latest medians of models beside loops by hand, by contender."""
    found = _latest(device, lambda run: bool(run.results.by_hand)).results.by_hand
    return {model: {name: statistics.median(s) for name, s in r["seconds"].items()} for model, r in found.items()}


def _sizes(device: str) -> str:
    """Show time and memory of each network beside Jacobian contraction's."""
    latest = {name: result for name, result in reversed(list(_results(device))) if name in TABLES}
    rows = []
    for name, workload in TABLES.items():
        network_name = name.removesuffix(" trace")
        if name in latest and network_name in _NETWORKS:
            result = latest[name]
            samples = f"{result.n1} pairs" if workload.paired else f"{result.n1} x {result.n2}"
            sizes = [samples, str(result.outputs), _count(_parameters(network_name)), workload.compute]
            rows.append([_NETWORKS[network_name], *sizes, *_cells(result, plan.GGN_NTK, plan.JACOBIANS)])
    header = ["network", "samples", "outputs", "parameters", "kernel", "time", "memory", "torch.func", "its memory"]
    return _table(header, rows)


def _cells(result: WorkloadResult, *contenders: str) -> list[str]:
    """Show the time and the memory of contenders."""
    cells = []
    for name in contenders:
        seconds, peak = result.seconds(name), result.peak(name)
        failure = result.measurements[name].failure if name in result.measurements else None
        known = seconds is not None and peak is not None
        cells += [_time(seconds or 0), _memory(peak or 0)] if known else [failure or "–", "–"]
    return cells


def _sweeps(device: str, quantity: str) -> str:
    """Show times and memory against a quantity, in a table for each sweep of it that was measured."""
    tables = []
    for name, sweep in SWEEPS.items():
        if sweep.quantity == quantity and any(known.startswith(f"{name}=") for known, _ in _results(device)):
            found = swept(device, name).sweeps[name]
            shown = [c for c in (plan.GGN_NTK, plan.JACOBIANS) if c in next(iter(found.values())).measurements]
            header = [sweep.label, *(cell for c in shown for cell in (c, "memory"))]
            rows = [[str(value), *_cells(result, *shown)] for value, result in found.items()]
            tables.append(f"{sweep.network}:\n\n{_table(header, rows)}")
    return "\n\n".join(tables)


def _peers(device: str) -> str:
    """Show times of all contenders, for each workload of the latest run."""
    run = _latest(device, lambda run: any(map(_beside_peers, run.results.workloads)))
    shown = [r for r in run.results.workloads if _beside_peers(r) and plan.CLONE not in r.measurements]
    names = [n for n in dict.fromkeys(n for r in shown for n in r.measurements) if not n.startswith("ggn_ntk,")]
    rows = [[f"{r.name}, {r.n1} x {r.n2}", *(_cells(r, name)[0] for name in names)] for r in shown]
    return _table(["", *names], rows)


def _loops(device: str) -> str:
    """Show times beside loops by hand."""
    found = {model: times for model, times in _by_hand(device).items() if "loop" in times}
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    rows = [
        [model, *(_time(times[name]) if name in times else "–" for name in names)] for model, times in found.items()
    ]
    return _table(["", *names], rows)


_TABLES: dict[str, Callable[[str], str]] = {
    "sizes": _sizes,
    "peers": _peers,
    "loops": _loops,
    "against-samples": lambda device: _sweeps(device, "N"),
    "against-outputs": lambda device: _sweeps(device, "O"),
}


@cache
def _parameters(name: str) -> int:
    """Count the parameters of a workload's network."""
    return sum(p.numel() for p in network(TABLES[name]).parameters())


def _digits(value: float) -> str:
    """Show a positive number with two digits."""
    places = 1 - floor(log10(value))
    return f"{round(value, places):.{max(places, 0)}f}"


def _time(seconds: float) -> str:
    """Show a time."""
    return f"{_digits(seconds)} s" if seconds >= 1 else f"{_digits(1e3 * seconds)} ms"


def _memory(megabytes: float) -> str:
    """Show a size."""
    return f"{_digits(megabytes / 1e3)} GB" if megabytes >= 1e3 else f"{_digits(max(megabytes, 1))} MB"


def _count(number: int) -> str:
    """Show a large number."""
    return f"{_digits(number / 1e6)} million" if number >= 1e6 else f"{_digits(number / 1e3)} thousand"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def main() -> None:
    """Write the numbers of all pages, and draw what the README shows of them."""
    for page in pages():
        text = page.read_text()
        try:
            new = update(text)
        except LookupError as error:
            sys.exit(f"{page.relative_to(ROOT)}: {error}")
        if new != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: written")
    draw_speed(swept("cpu", "N"))


if __name__ == "__main__":
    main()
