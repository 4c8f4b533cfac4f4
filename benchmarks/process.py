"""The parent's end of a contender's process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import plan
from benchmarks.failures import describe
from benchmarks.workloads import Workload

ROOT = Path(__file__).parent.parent

#: The interpreter that has neural-tangents. Absolute, but not resolved: a virtual environment's is a link.
JAX_PYTHON = Path.cwd() / os.environ.get("JAX_PYTHON", ROOT / ".venv-jax/bin/python")

#: The longest that a contender may take for anything, in seconds.
TIME_LIMIT = 150.0


class ContenderError(RuntimeError):
    """A contender failed; the message says how."""


class Contender:
    """A contender's process. Use it in a ``with`` statement, which ends it."""

    def __init__(self, name: str, workload: Workload, device: str, folder: Path) -> None:
        """Start the process; it may not be ready yet.

        Args:
            name: The contender.
            workload: The workload.
            device: Where to compute.
            folder: Takes what it prints.

        Raises:
            ContenderError: If it has no interpreter.
        """
        python = str(JAX_PYTHON) if name == plan.NEURAL_TANGENTS else sys.executable
        self._limited = device == "cpu"
        self._printed = folder / f"{name}.txt"
        try:
            with self._printed.open("w") as printed:
                self._process = subprocess.Popen(
                    [python, "-m", "benchmarks.worker", name, workload.name, device],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                )
        except FileNotFoundError:
            raise ContenderError("its interpreter is not installed; make benchmark does that") from None

    def __enter__(self) -> "Contender":
        """Enter the ``with`` statement.

        Returns:
            The contender.
        """
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the process.

        Args:
            kind: Not used.
            error: Not used.
            traceback: Not used.
        """
        self.end()

    def end(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def wait(self) -> None:
        """Wait until it is ready."""
        self._answer()

    def compute(self, seed: int, save: Path | None = None, calls: int = 1) -> tuple[float, float]:
        """Compute the kernel of fresh inputs.

        Args:
            seed: Decides on the inputs.
            save: Where to save the kernel.
            calls: How often, each time of other inputs; those of the seed come last.

        Returns:
            The median of the time it took in seconds, and the peak of its memory in megabytes.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer finds out why
            command = {"seed": seed, "calls": calls, "save": save and str(save)}
            print(json.dumps(command), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], answer["peak_mb"]

    def _answer(self) -> dict[str, Any]:
        """Read an answer.

        Returns:
            The answer.

        Raises:
            ContenderError: If it is an error, or there is none.
        """
        assert self._process.stdout is not None
        alarm = threading.Timer(TIME_LIMIT, self._process.kill)
        alarm.start()
        line = self._process.stdout.readline()
        late = not alarm.is_alive()
        alarm.cancel()
        if late and not line:
            raise ContenderError(f"more than {TIME_LIMIT:.0f} s")
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._how_it_died()}
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def _how_it_died(self) -> str:
        """Find out what ended the process.

        Returns:
            One line.
        """
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "killed by the operating system, which does that when it runs out of memory"
        lines = self._printed.read_text().strip().splitlines()
        return describe(f"it died with status {status}: {lines[-1] if lines else ''}", self._limited)
