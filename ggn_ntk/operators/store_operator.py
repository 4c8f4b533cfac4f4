"""A kernel on disk as an operator, tile by tile."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ggn_ntk.large.plan import Tile
from ggn_ntk.large.store import KernelStore
from ggn_ntk.memory.budget import explained
from ggn_ntk.operators.tensor_operator import TensorOperator
from ggn_ntk.problem.errors import kind_of, listed
from ggn_ntk.process.switches import process_switches
from ggn_ntk.process.transforms import outside_of_transforms


class TilesOperator(TensorOperator):
    """The kernel of a store that was looked at, or its transpose."""

    _owner = "the store"

    def __init__(self, store: KernelStore, device: torch.device, rows: list[int], columns: list[int]) -> None:
        """Set up, given which axes of the kernel ``[N1, N2, ...]`` rows and columns stand for, samples first."""
        super().__init__(*([[store.shape[axis] for axis in axes]] for axes in (columns, rows)))
        self.SELF_ADJOINT = store.symmetric
        self._store, self._device, self._rows, self._columns = store, device, rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the store, which vectors must have."""
        found: torch.dtype = getattr(torch, self._store.dtype.name)
        return found

    @property
    def device(self) -> torch.device:
        """The device to which tiles are brought, where vectors must be."""
        return self._device

    def diagonal(self) -> Tensor:
        """Read the diagonal, from the tiles that it goes through.

        Returns:
            The entries of row ``i`` and column ``i``: ``[N C]``.

        Raises:
            ValueError: If the operator is not square.
            StoreError: If a tile is missing or damaged.
        """
        shape, of_columns = self._out_shape[0], self._in_shape[0]
        if shape != of_columns:
            shapes = f"{list(shape)} and {list(of_columns)}"
            raise ValueError(f"Only a square operator has a diagonal: its outputs have the shapes {shapes}.")
        found = torch.empty(shape, dtype=self.dtype, device=self.device)
        of_row = dict(zip(self._columns, self._rows, strict=True))
        with self._session():
            on_diagonal = (tile for tile in self._tiles() if _common(*self._at(tile)))
            for places, numbers in self._read(on_diagonal):
                common = _common(*places)
                rows, columns = (slice(common.start - part.start, common.stop - part.start) for part in places)
                axes = [of_row.get(axis, axis) for axis in range(numbers.ndim)]
                block = torch.einsum(numbers[rows, columns], axes, self._rows)
                found[common.start : common.stop] = block
        return found.flatten()

    def _multiplied(self, rows: list[Tensor]) -> list[Tensor]:
        """Multiply K vectors."""
        # [K, *in] -> [K, *out]
        (v,) = rows
        found = v.new_zeros(len(v), *self._out_shape[0])
        for places, numbers in self._read(self._tiles()):
            turns = [(self._rows, self._columns)]
            if self.SELF_ADJOINT and places[0] != places[1]:  # the tile stands for its mirror image, too
                turns.append((self._columns, self._rows))
            for to, of in turns:
                axes, several = list(range(numbers.ndim)), numbers.ndim
                of_tile = v[:, places[of[0]]]
                found[:, places[to[0]]] += torch.einsum(numbers, axes, of_tile, [several, *of], [several, *to])
        return [found]

    def _adjoint(self) -> "TilesOperator":
        """Exchange rows and columns."""
        return TilesOperator(self._store, self._device, self._columns, self._rows)

    def _tiles(self) -> Iterator[Tile]:
        """List the tiles that have to be read."""
        plan = self._store.plan
        return plan.tiles() if self.SELF_ADJOINT else plan.places()

    def _at(self, tile: Tile) -> tuple[slice, slice]:
        """Find the samples of x1 and of x2 in a tile."""
        return self._store.plan.rows_of(tile), self._store.plan.columns_of(tile)

    def _read(self, tiles: Iterable[Tile]) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Read tiles, the next one while this one is used, and find their samples."""
        first, *others = tiles
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._store.read, first)
            for tile, following in zip([first, *others], [*others, None], strict=True):
                numbers = ahead.result()
                if following is not None:
                    ahead = thread.submit(self._store.read, following)
                yield self._at(tile), torch.from_numpy(numbers).to(self.device)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Compute without a graph, in full precision, whatever the caller's settings are."""
        with (
            outside_of_transforms(),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            process_switches(recurrent=False),
            explained(lambda: "products with vectors", "What helps: fewer vectors at once, or smaller tiles (tile=)."),
        ):
            yield


class StoreOperator(TilesOperator):
    """A kernel on disk as an operator ``[N1 C, N2 C]`` on outputs ``[N2, *out]``, as :class:`NTKOperator` has it.

    A product reads each tile once, however many vectors it multiplies, the next one while this one is multiplied; of a
    kernel of a set with itself, those on and above the diagonal alone. Its memory is that of vectors and three tiles.
    Of a diagonal kernel, outputs meet themselves alone: the operator has zeros where outputs differ. Traced outputs
    are none: the operator of ``[N1, N2]`` has one row for each sample.
    """

    def __init__(self, store: KernelStore, device: torch.device | str | None = None) -> None:
        """Look at a store; tiles are read by products.

        Args:
            store: A kernel that is complete, of float32 or float64; one of several is chosen by its key.
            device: Where to multiply; ``None`` for the CPU.

        Raises:
            TypeError: If it is no store, or one of several kernels.
            ValueError: If tiles are missing, or the kernel is one of pairs of samples.
            StoreError: If a tile is damaged.
        """
        if not isinstance(store, KernelStore):
            raise TypeError(f"store must be a KernelStore, got {kind_of(store)}. KernelStore(path) opens one.")
        if store.keys():
            keys = listed(map(repr, store.keys()))
            raise TypeError(f"{store.path} holds several kernels: choose one by its key, store[key], of {keys}.")
        if store.plan.paired:
            raise ValueError(f"{store.path} holds pairs of samples alone (paired=True), which are no operator.")
        missing, tiles = len(store.missing()), len(list(store.plan.places()))
        if missing:
            raise ValueError(
                f"{missing} of {tiles} tiles of {store.path} are missing. The call of tiled_ntk that made the store "
                "computes these, and no others: repeat it, and make the operator of what it returns."
            )
        at = torch.empty(0, device=device or "cpu").device  # with its number
        super().__init__(store, at, *map(list, store.sides))


def _common(rows: slice, columns: slice) -> range:
    """Find the samples that are in rows and in columns."""
    return range(max(rows.start, columns.start), min(rows.stop, columns.stop))
