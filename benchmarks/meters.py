"""Peak memory of a computation, above what there was before the first one."""

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ggn_ntk.process.torch_internals import OperationMode, storage_id, tree_leaves

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


class TensorMeter(OperationMode):
    """The memory of the tensors that operations make, as long as they are there; of those alone, on any device."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Take tensors that are there already."""
        super().__init__()
        self._sizes = {storage_id(x): 0 for x in known}
        self._held = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and take down what it makes."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not x.is_meta and storage_id(x) not in self._sizes:
                self._take(x)
        return result

    def _take(self, x: Tensor) -> None:
        """Take down memory until it is freed."""
        storage, identity = x.untyped_storage(), storage_id(x)
        self._sizes[identity] = storage.nbytes()
        self._held += storage.nbytes()
        self._most = max(self._most, self._held)
        weakref.finalize(storage, self._free, identity)

    def _free(self, identity: int) -> None:
        """Forget memory."""
        self._held -= self._sizes.pop(identity)

    def peak(self) -> float:
        """Look up the peak.

        Returns:
            Megabytes.
        """
        return self._most / 1e6


def _megabytes(field: str) -> float:
    """Read the process's status.

    Args:
        field: Name of a size in it.

    Returns:
        The size in megabytes.
    """
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6  # its "kB" are kibibytes
