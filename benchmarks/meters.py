"""Peak memory of a computation, above what there was before the first one."""

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak of the resident set size to its current value


class ProcessMeter:
    """The memory that the process holds by itself, from Linux.

    Pages of files, which are the code of libraries, are left out: the system drops and reloads them as it likes.
    """

    def __init__(self) -> None:
        """Take what the process holds now as the baseline."""
        self._baseline = _megabytes("RssAnon")

    def start(self) -> None:
        """Forget the peak so far."""
        _CLEAR.write_text(_RESET_PEAK)

    def synchronize(self) -> None:
        """Wait for computations: none outlives its call."""

    def peak(self) -> float:
        """Measure the peak since the start.

        Returns:
            Megabytes above the baseline.
        """
        return _megabytes("VmHWM") - _megabytes("RssFile") - _megabytes("RssShmem") - self._baseline


class CudaMeter:
    """The memory of tensors on a GPU, from torch."""

    def __init__(self) -> None:
        """Take what is on the GPU now as the baseline."""
        from torch import cuda

        self._cuda = cuda
        self._baseline = cuda.memory_allocated()

    def start(self) -> None:
        """Forget the peak so far."""
        self._cuda.reset_peak_memory_stats()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for computations."""
        self._cuda.synchronize()

    def peak(self) -> float:
        """Measure the peak since the start.

        Returns:
            Megabytes above the baseline.
        """
        return (self._cuda.max_memory_allocated() - self._baseline) / 1e6


def _megabytes(field: str) -> float:
    """Read the process's status.

    Args:
        field: Name of a size in it.

    Returns:
        The size in megabytes.
    """
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6  # its "kB" are kibibytes
