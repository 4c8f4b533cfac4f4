"""Memory of tensors; in a file of its own, since peers without torch import :mod:`benchmarks.meters`."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ggn_ntk.process.torch_internals import OperationMode, storage_id, tree_leaves


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
