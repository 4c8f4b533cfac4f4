"""Kernels on disk: a Zarr array whose chunks are the tiles, each written by itself and at once."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.large.axes import is_pair
from ggn_ntk.large.plan import Cost, Form, Path, Plan, Tile
from ggn_ntk.problem.errors import listed

_T = TypeVar("_T")

# Of what is in the attributes of a store, and how these are to be read.
_NAME, _FORMAT = "ggn_ntk", 3

#: What the name of a file ends with in which a model comes to workers, beside the store.
JOB = ".job"

_REMEDY = "Delete the file, and the same call computes it anew."


class StoreError(OSError):
    """A tile cannot be written, or what was written cannot be read."""


def _arrays() -> ModuleType:
    """Import what needs ``zarr``, at its first use."""
    try:
        from ggn_ntk.large import arrays
    except ImportError as error:
        what = f"Large kernels need Python 3.11 or later, and more packages ({error})"
        raise ImportError(f"{what}: pip install 'ggn-ntk[large]'.") from error
    return arrays


class KernelStore:
    """A kernel on disk: what :func:`ggn_ntk.tiled_ntk` returns, and what opens one by its path.

    A Zarr array (version 3) that ``zarr``, ``xarray`` and ``dask.array`` read, too; a group of arrays where there are
    several kernels, whose attributes have their keys. Tiles that are missing read as NaN.

    Attributes:
        path: The folder.
        plan: How the kernel is divided into tiles.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a store.

        Args:
            path: The folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no store of a kernel, or one of another version.
        """
        self.path = FilePath(path)
        self._info = _info(self.path)
        self._at: Path = ()
        self.plan = _plan(self._info)
        self._arrays = {keys: _arrays().open_array(self.path, _name(keys)) for keys in self.plan.forms}

    @property
    def info(self) -> Mapping[str, Any]:
        """Keywords, versions, parameters, and fingerprints of the model and the data that the kernel is made of."""
        return self._info

    def keys(self) -> list[Any]:
        """List the keys of kernels, where there are several.

        Returns:
            Names of parameters or modules, or keys of outputs; none where there is one kernel.
        """
        return list(dict.fromkeys(path[len(self._at)] for path in self._arrays if len(path) > len(self._at)))

    @property
    def shape(self) -> Any:
        """The kernel's shape, ``(N1, N2, ...)``; of several, a dict."""
        return self._each(lambda array: tuple(array.shape))

    @property
    def dtype(self) -> Any:
        """NumPy's dtype of what is stored; of several kernels, a dict."""
        return self._each(lambda array: array.dtype)

    def __len__(self) -> int:
        """Return N1, or how many kernels there are."""
        return len(self.keys()) or int(self.shape[0])

    def __getitem__(self, index: Any) -> Any:
        """Read a part of the kernel; of several kernels, choose by key.

        Args:
            index: Integers and slices, as of a NumPy array; or a key.

        Returns:
            A NumPy array; or the :class:`KernelStore` of the kernels under the key.

        Raises:
            KeyError: If there is no such key.
            StoreError: If a tile is damaged.
        """
        if not self.keys():
            with self._reading():
                return np.asarray(self._arrays[self._at][index])
        path = (*self._at, index)
        found = {p: array for p, array in self._arrays.items() if p[: len(path)] == path}
        if not found:
            raise KeyError(f"{self.path} has no kernel {index!r}. It has: {listed(map(repr, self.keys()))}.")
        chosen = object.__new__(KernelStore)
        chosen.__dict__.update(self.__dict__, _at=path, _arrays=found)
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Read all of it, missing tiles as NaN."""
        if self.keys():
            raise TypeError(f"{self.path} holds several kernels: choose one of {listed(map(repr, self.keys()))}.")
        if copy is False:
            raise ValueError("A kernel that is on disk can only be copied.")
        return np.asarray(self[...], dtype=dtype)

    def to_torch(self, device: torch.device | str | None = None) -> Any:
        """Read all of it, missing tiles as NaN.

        Args:
            device: Where to put it; ``None`` for the CPU.

        Returns:
            What :func:`ggn_ntk.empirical_ntk` returns: ``[N1, N2, ...]``, or a dict of such tensors.

        Raises:
            StoreError: If a tile is damaged.
        """

        def read(array: Any) -> Tensor:
            with self._reading():
                return torch.from_numpy(np.asarray(array[...])).to(device or "cpu")

        return self._each(read)

    def to_dask(self) -> Any:
        """Make a Dask array of it, whose chunks are the tiles.

        Returns:
            The array ``[N1, N2, ...]``, of which nothing is read before it is computed; of several kernels, a dict.
        """
        import dask.array

        return self._each(lambda array: dask.array.from_array(array, chunks=array.chunks))

    def missing(self) -> list[Tile]:
        """List the tiles that are not there.

        Returns:
            Their places in the grid of tiles, row and column; mirrored ones too.
        """
        return [tile for tile in self.plan.places() if not self.has(tile)]

    @property
    def complete(self) -> bool:
        """Whether no tile is missing."""
        return not self.missing()

    def has(self, tile: Tile) -> bool:
        """Tell whether a tile is there, of all kernels.

        Args:
            tile: Its place.

        Returns:
            Whether it is there.

        Raises:
            StoreError: If a file has another size than that of a tile.
        """
        return all(self._is_there(array, tile) for array in self._arrays.values())

    def read(self, tile: Tile) -> np.ndarray[Any, Any]:
        """Read a tile of one kernel; internal.

        Args:
            tile: Its place.

        Returns:
            Its numbers.

        Raises:
            StoreError: If it is missing or damaged.
        """
        array = self._arrays[self._at]
        if not self._is_there(array, tile):
            raise StoreError(f"{self._file(array, tile)} is missing: the call that made the store computes it anew.")
        return self._read(array, tile)

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of one kernel that belong to x1, and to x2, samples first; diagonal ones are of both; internal."""
        form, samples = self.plan.forms[self._at], (0, 0) if self.plan.paired else (0, 1)
        return (samples[0], *form.first), (samples[1], *form.second)

    @property
    def symmetric(self) -> bool:
        """Whether one kernel is its own transpose; internal."""
        return self.plan.symmetric and not (is_pair(self._at) and len(set(self._at[-1])) > 1)

    def verify(self) -> dict[Tile, str]:
        """Read every tile.

        Returns:
            What is wrong, by place: tiles that are missing, damaged, or hold NaN.
        """
        found = {}
        for tile in self.plan.places():
            try:
                if not self.has(tile):
                    found[tile] = "missing"
                    continue
                holes = sum(int(np.isnan(self._read(array, tile)).sum()) for array in self._arrays.values())
            except StoreError as error:
                found[tile] = str(error)
                continue
            if holes:
                found[tile] = f"{holes} NaN"
        return found

    def __repr__(self) -> str:
        """Say what it is and how complete."""
        rows, columns = self.plan.grid
        total = rows * columns
        what = f"keys={self.keys()}" if self.keys() else f"shape={self.shape}, dtype={self.dtype}"
        return f"KernelStore({str(self.path)!r}, {what}, {total - len(self.missing())} of {total} tiles)"

    def write(self, tile: Tile, kernels: Mapping[Path, np.ndarray[Any, Any]]) -> None:
        """Write a tile of all kernels; internal.

        Args:
            tile: Its place.
            kernels: Its numbers, by keys.

        Raises:
            StoreError: If the file system does not allow it.
        """
        for path, kernel in kernels.items():
            try:
                self._arrays[path][self._places(tile)] = kernel
            except OSError as error:
                raise StoreError(
                    error.errno,
                    f"{error.strerror or error}: tile {tuple(tile)} cannot be written to {self.path}. All tiles before "
                    "it are kept; when this is mended, the same call goes on",
                ) from error

    def _each(self, function: Callable[[Any], _T]) -> Any:
        """Apply a function to the arrays, and return its results in the structure of the kernels."""
        found: dict[Any, Any] = {}
        for path, array in self._arrays.items():
            *above, last = ((), *path[len(self._at) :])
            level = found
            for key in above:
                level = level.setdefault(key, {})
            level[last] = function(array)
        return found[()]

    def _places(self, tile: Tile) -> tuple[slice, ...]:
        """Find the samples of a tile."""
        rows, columns = self.plan.rows_of(tile), self.plan.columns_of(tile)
        return (rows,) if self.plan.paired else (rows, columns)

    def _file(self, array: Any, tile: Tile) -> FilePath:
        """Find the file of a tile."""
        place = (tile.row,) if self.plan.paired else tuple(tile)
        coordinates = (*place, *(0,) * (array.ndim - len(place)))
        key: str = array.metadata.encode_chunk_key(coordinates)
        file: FilePath = self.path / str(array.path) / key
        return file

    def _is_there(self, array: Any, tile: Tile) -> bool:
        """Tell whether a tile of one kernel is there, as large as it has to be."""
        file = self._file(array, tile)
        try:
            size = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return False
        expected = _arrays().chunk_bytes(array)
        if size != expected:
            raise StoreError(f"{file} is damaged: it has {size} bytes instead of {expected}. {_REMEDY}")
        return True

    def _read(self, array: Any, tile: Tile) -> np.ndarray[Any, Any]:
        """Read a tile of one kernel."""
        with self._reading(self._file(array, tile)):
            return np.asarray(array[self._places(tile)])

    @contextmanager
    def _reading(self, file: FilePath | None = None) -> Iterator[None]:
        """Explain why what was written cannot be read."""
        try:
            yield
        except ValueError as error:
            if "checksum" not in str(error):
                raise
            where = file or f"`python -m ggn_ntk verify {self.path}` says which. A tile"
            raise StoreError(f"{where} is damaged: its checksum is not that of its numbers. {_REMEDY}") from error


def create(path: FilePath, info: Mapping[str, Any], plan: Plan) -> KernelStore:
    """Make a store, unless there is one; several processes may do so at once."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = _arrays().partial_of(path)
        try:
            _make(new, {_NAME: {**info, "format": _FORMAT, "plan": _described(plan)}}, plan)
            new.replace(path)
        except OSError:
            if not (path / "zarr.json").exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return KernelStore(path)


def remove(path: FilePath) -> None:
    """Remove a store, and nothing that is none."""
    if path.exists():
        _info(path)
        shutil.rmtree(path)


def sweep(path: FilePath) -> None:
    """Remove what is left of processes that were stopped: tiles not all written, and what workers were to load."""
    left = [*path.rglob(f".*{_arrays().PARTIAL}"), *path.parent.glob(f".{escape(path.name)}.*{JOB}")]
    for file in left:
        file.unlink(missing_ok=True)
    for folder in path.parent.glob(f".{escape(path.name)}.*{_arrays().PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def _make(path: FilePath, attributes: Mapping[str, Any], plan: Plan) -> None:
    """Make the arrays."""
    several = () not in plan.forms
    if several:
        _arrays().make_group(path, attributes)
    for keys, form in plan.forms.items():
        samples = plan.sample_axes(plan.samples)
        _arrays().make_array(
            path,
            _name(keys),
            shape=(*samples, *form.outputs),
            chunks=(*plan.sample_axes(plan.tile), *form.outputs),
            dtype=form.dtype,
            dimension_names=[*("x1", "x2")[: len(samples)], *(f"out{axis}" for axis in range(len(form.outputs)))],
            attributes={"keys": _listed(keys)} if several else attributes,
        )


def _info(path: FilePath) -> dict[str, Any]:
    """Read what a store says of itself."""
    if not path.exists():
        raise FileNotFoundError(f"There is no store {path}.")
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"][_NAME]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no store of a kernel: name one, or, to make it, a new folder.") from None
    if found["format"] != _FORMAT:
        raise ValueError(
            f"{path} was written by ggn_ntk {found['versions']['ggn_ntk']} in format {found['format']}, and this one "
            f"reads format {_FORMAT}: use that version."
        )
    return dict(found)


def _described(plan: Plan) -> dict[str, Any]:
    """Write a plan as JSON has it."""
    forms = [
        {"keys": _listed(keys), "outputs": form.outputs, "x1": form.first, "x2": form.second, "dtype": form.dtype}
        for keys, form in plan.forms.items()
    ]
    return {
        "samples": plan.samples,
        "tile": plan.tile,
        "symmetric": plan.symmetric,
        "paired": plan.paired,
        "kernels": forms,
        "block": plan.block,
        "cost": plan.cost,
    }


def _plan(info: Mapping[str, Any]) -> Plan:
    """Undo :func:`_described`."""
    found = info["plan"]
    forms = {
        _tupled(f["keys"]): Form(tuple(f["outputs"]), tuple(f["x1"]), tuple(f["x2"]), f["dtype"])
        for f in found["kernels"]
    }
    sizes, cost = (tuple(found["samples"]), tuple(found["tile"])), found["cost"] and Cost(*found["cost"])
    return Plan(*sizes, found["symmetric"], found["paired"], forms, found["block"], cost)


def _name(keys: Path) -> str:
    """Name the array of a kernel."""
    return ";".join(",".join(quote(str(k), safe="") for k in _several(key)) or "(model)" for key in keys)


def _several(key: Any) -> tuple[Any, ...]:
    """List the keys of a pair."""
    return key if isinstance(key, tuple) else (key,)


def _listed(keys: Path) -> list[Any]:
    """Write keys as JSON has them."""
    return [list(key) if isinstance(key, tuple) else key for key in keys]


def _tupled(keys: list[Any]) -> Path:
    """Undo :func:`_listed`."""
    return tuple(tuple(key) if isinstance(key, list) else key for key in keys)
