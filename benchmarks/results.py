"""What was measured, and how it is kept."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.check import TOLERANCE
from benchmarks.workloads import WORKLOADS


@dataclass
class Measurement:
    """One contender on one workload.

    Attributes:
        seconds: The time of each round.
        peak_mb: The largest peak of memory in these rounds, above the process's own baseline.
        error: The largest relative error against ggn_ntk's kernels, over all rounds; ``None`` if it has none.
        spot_error: The largest relative error of the entries that were computed in float64.
        failure: Why it is left out, if it is.
    """

    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    error: float | None = None
    spot_error: float = 0.0
    failure: str | None = None

    @property
    def median(self) -> float | None:
        """The median time in seconds; ``None`` if it failed."""
        return statistics.median(self.seconds) if self.seconds and self.failure is None else None

    @property
    def wrong(self) -> bool:
        """Whether one of its kernels is not the empirical NTK."""
        return not self.spot_error <= TOLERANCE


@dataclass
class WorkloadResult:
    """All contenders on one workload.

    Attributes:
        name: The workload.
        n1: The number of samples x1.
        n2: The number of samples x2.
        outputs: The number of outputs.
        measurements: By contender.
        rates: Operations in a second of a matrix product, measured between the contenders.
        floor: Operations that the kernel needs; ``None`` where they are not counted.
        paired: Whether each sample of x1 met the one of x2 at its place alone.
    """

    name: str
    n1: int
    n2: int
    outputs: int
    measurements: dict[str, Measurement]
    rates: list[float] = field(default_factory=list)
    floor: float | None = None
    paired: bool = False

    @property
    def floor_seconds(self) -> float | None:
        """The time that the arithmetic alone takes at the median rate."""
        return self.floor / statistics.median(self.rates) if self.floor and self.rates else None

    def seconds(self, contender: str) -> float | None:
        """Look up a median time.

        Args:
            contender: The contender.

        Returns:
            Its median time; ``None`` if it did not take part or failed.
        """
        return self.measurements[contender].median if contender in self.measurements else None

    def peak(self, contender: str) -> float | None:
        """Look up a peak of memory.

        Args:
            contender: The contender.

        Returns:
            Its peak in megabytes; ``None`` if it did not take part or failed.
        """
        return None if self.seconds(contender) is None else self.measurements[contender].peak_mb


@dataclass
class Results:
    """A whole run.

    Attributes:
        environment: What it ran in, by what it is called in the report.
        workloads: The results.
        against: Those of this library beside itself at another commit.
        sweeps: Results by the value of the quantity that is swept, by the name of the sweep.
        overhead: The cost of the kernel in a training step: times by variant.
        counts: What a GPU would pay for in a call, by the name of a workload or of a case of the tests.
        by_hand: Models that are no sequence of layers beside loops by hand: what was measured, by model.
        te_nas: Condition numbers of cells beside a loop: what was measured, by cell.
        took: The minutes that each part of the run took.
        predictions: Predictions from kernels beside eigendecompositions: what was measured, by prediction and size.
    """

    environment: dict[str, str]
    workloads: list[WorkloadResult] = field(default_factory=list)
    against: list[WorkloadResult] = field(default_factory=list)
    sweeps: dict[str, dict[int, WorkloadResult]] = field(default_factory=dict)
    overhead: dict[str, Measurement] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    by_hand: dict[str, dict[str, Any]] = field(default_factory=dict)
    te_nas: dict[str, dict[str, float]] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, dict[str, float]] = field(default_factory=dict)

    def put(self, result: WorkloadResult, against: bool = False) -> None:
        """Add the results of a workload, in the place of earlier ones, in the order of the tables.

        Args:
            result: The results.
            against: Whether this library ran beside itself at another commit.
        """
        results, order = self.against if against else self.workloads, list(WORKLOADS)
        results[:] = [known for known in results if known.name != result.name] + [result]
        results.sort(key=lambda known: order.index(known.name))

    def save(self, path: Path) -> None:
        """Write to a file.

        Args:
            path: The file.
        """
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read from a file.

        Args:
            path: The file.

        Returns:
            The results.
        """
        kept = json.loads(path.read_text())
        return cls(
            environment=kept["environment"],
            workloads=[_workload_result(result) for result in kept["workloads"]],
            against=[_workload_result(result) for result in kept.get("against", [])],
            sweeps={
                quantity: {int(value): _workload_result(result) for value, result in sweep.items()}
                for quantity, sweep in kept["sweeps"].items()
            },
            overhead={variant: Measurement(**kept) for variant, kept in kept["overhead"].items()},
            **{name: kept.get(name, {}) for name in ("counts", "by_hand", "te_nas", "predictions", "took")},
        )


def _workload_result(kept: dict[str, Any]) -> WorkloadResult:
    """Rebuild the results of a workload.

    Args:
        kept: As in the file.

    Returns:
        The results.
    """
    measurements = {contender: Measurement(**m) for contender, m in kept["measurements"].items()}
    return WorkloadResult(**{**kept, "measurements": measurements})


def three_digits(value: float) -> str:
    """Format a positive number.

    Args:
        value: The number.

    Returns:
        At least its first three digits.
    """
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
