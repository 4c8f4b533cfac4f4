"""Strips of tiles: a row's samples are loaded and evaluated once, and meet those of one column after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ggn_ntk.kernels.ntk import empirical_ntk
from ggn_ntk.kernels.outputs import nngp
from ggn_ntk.kernels.strips import Strip as Held
from ggn_ntk.kernels.strips import Strips
from ggn_ntk.large.axes import is_pair
from ggn_ntk.large.plan import Path, Plan, Tile
from ggn_ntk.large.samples import Samples
from ggn_ntk.large.store import KernelStore
from ggn_ntk.problem.inputs import select

#: Numbers of the kernels that are computed together, by their keys.
Numbers = dict[Path, np.ndarray[Any, Any]]


@dataclass
class Kernels:
    """Which kernels are computed, of any samples."""

    model: Any
    keywords: Mapping[str, Any]  # of :func:`ggn_ntk.empirical_ntk`, or of :func:`ggn_ntk.nngp`
    kind: str  # ``"ntk"`` or ``"nngp"``
    # The kernels that the parameters' kernels are summed to in float64, by the parameters' names; none where these are
    # not kept apart before
    groups: Mapping[str, Path] | None = None

    @property
    def _wanted(self) -> dict[str, Any]:
        """The keywords of a call."""
        return {**self.keywords, **({} if self.groups is None else {"per_parameter": True})}

    def strips(self, x1: Any, x2: Any, block: int) -> Strips:
        """Look at a few samples, for strips whose samples are evaluated so many at a time."""
        return Strips(self.model, (x1, x2), block, self._wanted)

    def on(self, device: torch.device) -> "Kernels":
        """Compute the same on another device."""
        if isinstance(self.model, Module):
            return replace(self, model=self.model.to(device))
        params = select(self.keywords["params"], slice(None), device)
        return replace(self, keywords={**self.keywords, "params": params})

    def __call__(self, x1: Any, x2: Any = None) -> dict[Path, Tensor]:
        """Compute them, by their keys."""
        compute: Callable[..., Any] = nngp if self.kind == "nngp" else empirical_ntk
        return self.by_keys(compute(self.model, x1, x2, **self._wanted))

    def by_keys(self, result: Any) -> dict[Path, Tensor]:
        """List what a call returns by keys, summed where this is asked for."""
        found = by_keys(result)
        if self.groups is None:
            return found
        sums: dict[Path, Tensor] = {}
        for (name, *others), kernel in found.items():
            keys = (*self.groups[name], *others)
            sums[keys] = sums[keys].add_(kernel) if keys in sums else kernel.double()
        return sums


@dataclass
class Job:
    """All that is needed to compute tiles of a kernel."""

    kernels: Kernels
    x1: Samples
    x2: Samples
    plan: Plan
    path: FilePath
    device: torch.device

    def on(self, device: torch.device) -> "Job":
        """Compute the same on another device."""
        return replace(self, kernels=self.kernels.on(device), device=device)

    @cached_property
    def strips(self) -> Strips | None:
        """What is known of the model, from a few samples that are the same whichever tiles are missing."""
        if self.plan.block is None:
            return None
        x1, x2 = (
            x.take(slice(0, size, max(1, (size - 1) // 2)), self.device)
            for x, size in zip((self.x1, self.x2), self.plan.tile, strict=True)
        )
        return self.kernels.strips(x1, None if self.plan.symmetric else x2, self.plan.block)

    @cached_property
    def verified(self) -> set[int]:
        """The columns of tiles whose samples this process has verified."""
        return set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is learnt of the model, which another process learns anew."""
        return {key: value for key, value in vars(self).items() if key not in ("strips", "verified")}

    def work(self, row: int, done: Callable[[], object] = lambda: None) -> None:
        """Compute the tiles of a strip that are not there, and write each."""
        store = KernelStore(self.path)
        missing = [
            tile for tile in (Tile(row, column) for column in self.plan.columns(row)) if not done_in(store, tile)
        ]
        if not missing:
            return
        strip = Strip(self, row, self.x1.take(self.plan.rows_of(missing[0]), self.device))
        for tile in missing:
            numbers = strip.tile(tile)
            mirror = self.plan.mirror(tile)
            if mirror is not None:
                store.write(mirror, self._transposed(numbers))
            store.write(tile, numbers)
            done()

    def _transposed(self, numbers: Numbers) -> Numbers:
        """Exchange x1 and x2 in kernels of a set with itself."""
        found = {}
        for keys in numbers:
            source = (*keys[:-1], keys[-1][::-1]) if is_pair(keys) else keys  # each output is now the other's
            form = self.plan.forms[source]
            order = [1, 0, *form.second, *(axis for axis in form.first if axis not in form.second)]
            found[keys] = numbers[source].transpose(order)
        return found


class Strip:
    """The samples of x1 in a row of tiles, which stay while those of x2 come and go."""

    def __init__(self, job: Job, row: int, x1: Any) -> None:
        """Take the samples."""
        self._job, self._x1 = job, x1
        self._held: Held | None = None
        # A tile alone is a call of its own: x1 and x2 are evaluated together.
        if job.plan.keeps(row) and job.strips is not None:
            verified = job.plan.symmetric and row in job.verified
            self._held = job.strips.of(x1, job.plan.met(row), verified=verified)

    def tile(self, tile: Tile) -> Numbers:
        """Compute a tile."""
        job, column = self._job, tile.column
        alone = job.plan.symmetric and (job.plan.paired or tile.row == column)
        x2 = None if alone else job.x2.take(job.plan.columns_of(tile), job.device)
        result = None if self._held is None else self._held.kernels(x2, verified=column in job.verified)
        if result is None:
            found = job.kernels(self._x1, x2)
        else:
            found = job.kernels.by_keys(result)
            if not alone:
                job.verified.add(column)
        return {
            keys: kernel.cpu().numpy().astype(job.plan.forms[keys].dtype, copy=False) for keys, kernel in found.items()
        }


def by_keys(result: Any, keys: Path = ()) -> dict[Path, Tensor]:
    """List kernels by their keys on all levels."""
    if isinstance(result, Tensor):
        return {keys: result}
    return {k: kernel for key, part in result.items() for k, kernel in by_keys(part, (*keys, key)).items()}


def done_in(store: KernelStore, tile: Tile) -> bool:
    """Tell whether a tile and the one that is the same, transposed, are there."""
    mirror = store.plan.mirror(tile)
    return store.has(tile) and (mirror is None or store.has(mirror))
