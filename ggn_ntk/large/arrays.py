"""Zarr arrays in a folder; the only module that imports ``zarr``."""

import asyncio
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

#: What the name of a file ends with that is not all written.
PARTIAL = ".partial"

# Bytes of the checksum behind the numbers of a tile.
_CHECKSUM = 4


class _Folder(LocalStore):
    """A folder in which a file is there as a whole or not at all, also where the process or the machine stops."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file."""
        await asyncio.to_thread(write, self.root / key, value.to_bytes())


def write(path: Path, content: bytes) -> None:
    """Write a file under another name, and give it its own when it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """Name what is on its way to a path, unlike all others."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def make_group(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make a group of arrays."""
    zarr.create_group(_Folder(path), attributes=dict(attributes))


def make_array(
    path: Path,
    name: str,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    dimension_names: list[str],
    attributes: Mapping[str, Any],
) -> None:
    """Make an array whose chunks are missing, and then are numbers with a checksum."""
    zarr.create_array(
        _Folder(path),
        name=name or None,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=float("nan"),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        dimension_names=dimension_names,
        attributes=dict(attributes),
    )


def open_array(path: Path, name: str) -> Any:
    """Open an array."""
    # A chunk that equals the fill value is there nevertheless.
    return zarr.open_array(_Folder(path), path=name, mode="r+", config={"write_empty_chunks": True})


def chunk_bytes(array: Any) -> int:
    """Compute the size of the file of a chunk."""
    count = array.dtype.itemsize
    for size in array.chunks:
        count *= size
    return int(count) + _CHECKSUM
