"""Rounds in which all contenders compute the kernel of the same fresh inputs, one after the other."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks import check, plan
from benchmarks.contenders import MATRIX_SIZE
from benchmarks.floor import floor
from benchmarks.network import network
from benchmarks.process import Contender, ContenderError
from benchmarks.results import Measurement, WorkloadResult
from benchmarks.workloads import Array, Sweep, Workload

#: After a round in which it takes longer than this many seconds, a contender is left out.
PATIENCE = 20.0

#: A contender whose kernel takes less than this many seconds computes another just before each that is timed: while it
#: waits for its turn, the operating system takes memory and caches from it, as it would not in a program at work.
PRIMED = 2.0

#: Of kernels that take less than this many seconds, as many are computed in a row, and timed one by one.
LEAST = 0.1
_MOST_CALLS = 20

_OTHER_INPUTS = 10**6  # added to the seed of a call that is not timed

_PAUSE = 0.05  # seconds in which the threads of the contender before go to sleep


def run_workload(
    workload: Workload,
    contenders: list[str],
    rounds: int,
    device: str,
    *,
    patience: float = PATIENCE,
    with_floor: bool = False,
) -> WorkloadResult:
    """Measure contenders on a workload.

    Args:
        workload: The workload.
        contenders: Their names.
        rounds: How often each is timed.
        device: Where to compute.
        patience: After a round in which it takes longer than this many seconds, a contender is left out.
        with_floor: Whether to count operations and measure the rate of arithmetic.

    Returns:
        The results.
    """
    measurements = {name: Measurement() for name in contenders}
    result = WorkloadResult(
        workload.name, workload.n1, workload.n2, workload.outputs, measurements, paired=workload.paired
    )
    if with_floor:
        result.floor = floor(workload).total
    with ExitStack() as stack:
        run = _Run(workload, result, device, stack)
        run.warm_up()
        for number in range(1, rounds + 1):
            run.round(number, patience)
    return result


def run_sweep(sweep: Sweep, rounds: int, device: str) -> Iterator[tuple[int, WorkloadResult]]:
    """Measure contenders on workloads of growing size, each up to the size where it fails or gets slow.

    Args:
        sweep: The workloads.
        rounds: How often each contender is timed.
        device: Where to compute.

    Yields:
        Each value, and the results.
    """
    contenders = plan.available(plan.swept(sweep), device)
    for value, workload in sweep.workloads.items():
        result = run_workload(workload, contenders, rounds, device, patience=sweep.patience)
        yield value, result
        medians = {name: result.seconds(name) for name in contenders}
        contenders = [name for name, median in medians.items() if median is not None and median <= sweep.patience]


class _Run:
    """The processes of a workload, and what was measured so far."""

    def __init__(self, workload: Workload, result: WorkloadResult, device: str, stack: ExitStack) -> None:
        """Prepare to start processes.

        Args:
            workload: The workload.
            result: Where to keep what is measured.
            device: Where to compute.
            stack: Ends the processes.
        """
        self._workload, self._result, self._device, self._stack = workload, result, device, stack
        self._model = network(workload, dtype=torch.float64)
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._processes: dict[str, Contender] = {}

    def warm_up(self) -> None:
        """Start the processes and let every contender compute kernels, without a measurement.

        They import what they need at once, which takes most of the time on a GPU, and compute one after the other: who
        needs all memory should find out while few others hold any. Who is fast computes several: what compiles or
        writes down its operations may do that in the second call, or in the third.
        """
        kernels: dict[str, Array] = {}
        for name in self._result.measurements:
            try:
                self._processes[name] = self._start(name)
            except ContenderError as error:
                self._leave_out(name, error)
        for name in list(self._processes):
            try:
                self._processes[name].wait()
                (seconds, _), kernels[name] = self._compute(name, 0)
                if seconds < PRIMED:
                    self._processes[name].compute(_OTHER_INPUTS, calls=2)
            except ContenderError as error:
                self._leave_out(name, error)
        self._check(kernels, 0)
        if self._result.floor is not None:
            self._product = self._start(plan.MATRIX_PRODUCT)
            self._product.wait()
            self._product.compute(0)

    def round(self, number: int, patience: float) -> None:
        """Let every contender compute the kernel of the same inputs, and check the kernels.

        Args:
            number: Decides on the inputs, and on the order of contenders.
            patience: Leave out who takes longer than this many seconds.
        """
        kernels: dict[str, Array] = {}
        for name in list(self._processes)[:: 1 if number % 2 else -1]:
            calls = 1
            try:
                if max(self._result.measurements[name].seconds, default=0.0) < PRIMED:
                    seconds, _ = self._processes[name].compute(_OTHER_INPUTS + number)
                    calls = max(1, min(_MOST_CALLS, int(LEAST / seconds)))
                (seconds, peak_mb), kernels[name] = self._compute(name, number, calls)
            except ContenderError as error:
                self._leave_out(name, error)
                continue
            measurement = self._result.measurements[name]
            measurement.seconds.append(seconds)
            measurement.peak_mb = max(measurement.peak_mb, peak_mb)
            if seconds > patience:
                self._processes.pop(name).end()
            self._measure_rate()
        self._check(kernels, number)

    def _start(self, name: str) -> Contender:
        """Start a process.

        Args:
            name: The contender.

        Returns:
            The process, which may not be ready yet.
        """
        return self._stack.enter_context(Contender(name, self._workload, self._device, self._folder))

    def _compute(self, name: str, seed: int, calls: int = 1) -> tuple[tuple[float, float], Array]:
        """Let a contender compute a kernel.

        Args:
            name: The contender.
            seed: Decides on the inputs.
            calls: How often, and of other inputs before.

        Returns:
            Time in seconds and peak of memory in megabytes, and the kernel.
        """
        path = self._folder / "kernel.npy"
        measured = self._processes[name].compute(seed, path, calls)
        time.sleep(_PAUSE)
        return measured, np.load(path)

    def _measure_rate(self) -> None:
        """Multiply large matrices, if the floor is wanted."""
        if self._result.floor is not None:
            self._product.compute(0)  # primed, as contenders are
            seconds, _ = self._product.compute(0)
            time.sleep(_PAUSE)
            self._result.rates.append(2 * MATRIX_SIZE**3 / seconds)

    def _check(self, kernels: dict[str, Array], seed: int) -> None:
        """Compare kernels with each other, and with entries computed in float64.

        Args:
            kernels: The kernels by contender.
            seed: What decided on their inputs.
        """
        spot = check.spot(self._workload, self._model, seed)
        ours = kernels.get(plan.GGN_NTK)
        for name, kernel in kernels.items():
            measurement = self._result.measurements[name]
            measurement.spot_error = max(measurement.spot_error, spot.error(kernel))
            if ours is not None:
                measurement.error = max(measurement.error or 0.0, check.relative_error(kernel, ours))
            if measurement.wrong:
                print(f"WRONG: {name} on {self._workload.name}, error {measurement.spot_error:.1e}", flush=True)

    def _leave_out(self, name: str, error: ContenderError) -> None:
        """End a contender that failed.

        Args:
            name: The contender.
            error: How it failed.
        """
        self._result.measurements[name].failure = str(error)
        if name in self._processes:
            self._processes.pop(name).end()
