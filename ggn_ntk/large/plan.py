"""How a kernel is divided into tiles."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod, sqrt
from typing import Any, NamedTuple

from ggn_ntk.problem.errors import KernelMemoryError
from ggn_ntk.problem.sizes import shown

#: Where a kernel stands among those that a call returns: its keys on all levels, none where it is the only one.
Path = tuple[Any, ...]

# Bytes of a tile on disk, above which larger ones gain nothing: samples are evaluated once for each tile.
_LARGEST = 2**26

# How many times a tile is held: as it is computed, made symmetric, brought to the processor and written.
_HELD = 4


class Tile(NamedTuple):
    """The place of a tile in the grid of tiles: which rows it has, and which columns."""

    row: int
    column: int


@dataclass(frozen=True)
class Form:
    """One of the kernels that are computed together."""

    outputs: tuple[int, ...]  # the sizes of its axes behind those of samples
    first: tuple[int, ...]  # the places of the axes that are outputs of x1
    second: tuple[int, ...]  # the same of x2; diagonal ones are of both
    dtype: str  # of what is stored

    @property
    def bytes(self) -> int:
        """What an entry of the sample axes takes."""
        return prod(self.outputs) * (8 if self.dtype == "float64" else 4)


class Cost(NamedTuple):
    """What all tiles of a kernel take, as an estimate.

    Attributes:
        contraction: Operations that contract the Jacobians of each tile, a multiplication and an addition counted as
            two. What x1 makes alone is counted for each tile, though a strip makes it once where memory is left.
        evaluation: Operations of evaluations and of passes back.
        seconds: The time, of one worker.
    """

    contraction: float
    evaluation: float
    seconds: float

    def described(self, *, kept: bool) -> str:
        """Format as a line."""
        how = "samples of x1 are kept while x2 streams by" if kept else "each tile evaluates its samples"
        ratio = (self.contraction + self.evaluation) / max(1.0, self.contraction)
        return (
            f"GFLOP: contraction {self.contraction / 1e9:.3g}, evaluation {self.evaluation / 1e9:.3g} ({how}): "
            f"{ratio:.2f} times the contraction; about {self.seconds:.2g} seconds"
        )


@dataclass(frozen=True)
class Plan:
    """How a kernel is divided into tiles; ``print`` shows it.

    Attributes:
        samples: N1 and N2.
        tile: How many samples of x1 and of x2 make a tile; at the ends, what is left of them.
        symmetric: Whether tiles below the diagonal are those above it, transposed.
        paired: Whether each sample of x1 meets its partner alone.
        forms: The kernels that are computed together, by their keys.
        block: How many samples are evaluated at a time where those of a row are evaluated once, and kept while columns
            stream by; ``None`` where each tile evaluates its samples.
        cost: What all tiles take, as an estimate; ``None`` where rules for layers do not apply.
    """

    samples: tuple[int, int]
    tile: tuple[int, int]
    symmetric: bool
    paired: bool
    forms: Mapping[Path, Form]
    block: int | None = None
    cost: Cost | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of rows and columns of tiles."""
        rows, columns = (ceil(n / t) for n, t in zip(self.samples, self.tile, strict=True))
        return rows, 1 if self.paired else columns

    @property
    def strips(self) -> range:
        """The rows of tiles, each of which is computed as one."""
        return range(self.grid[0])

    def columns(self, row: int) -> range:
        """List the tiles of a strip that are computed."""
        return range(row if self.symmetric and not self.paired else 0, self.grid[1])

    def tiles(self) -> Iterator[Tile]:
        """List the tiles that are computed, strip by strip."""
        return (Tile(row, column) for row in self.strips for column in self.columns(row))

    def places(self) -> Iterator[Tile]:
        """List all tiles, row by row, mirrored ones too."""
        rows, columns = self.grid
        return (Tile(row, column) for row in range(rows) for column in range(columns))

    def keeps(self, row: int) -> bool:
        """Tell whether the samples of a strip are evaluated once; a tile alone evaluates x1 and x2 together."""
        return self.block is not None and len(self.columns(row)) > 1

    def met(self, row: int) -> int:
        """Count the samples of x2 that those of a strip meet."""
        return sum(_length(self.columns_of(Tile(row, column))) for column in self.columns(row))

    def evaluated(self) -> tuple[float, float]:
        """Count how often the samples of a tile are evaluated: those of x1, and those of x2."""
        rows = columns = 0.0
        for tile in self.tiles():
            again = not self.keeps(tile.row) or tile.column == self.columns(tile.row).start
            if again:
                rows += _length(self.rows_of(tile)) / self.tile[0]
            if not self.symmetric or tile.row != tile.column:
                columns += _length(self.columns_of(tile)) / self.tile[1]
        return rows, columns

    def pairs(self, *, diagonal: bool) -> float:
        """Count the pairs of samples that meet, in tiles: those of a set with itself on the diagonal, or others."""
        tiles = (tile for tile in self.tiles() if (self.symmetric and tile.row == tile.column) == diagonal)
        return sum(_length(self.rows_of(tile)) * _length(self.columns_of(tile)) for tile in tiles) / prod(self.tile)

    def mirror(self, tile: Tile) -> Tile | None:
        """Find the tile that is this one, transposed; there is none for tiles on the diagonal."""
        mirrored = self.symmetric and not self.paired and tile.row != tile.column
        return Tile(tile.column, tile.row) if mirrored else None

    def rows_of(self, tile: Tile) -> slice:
        """Find the samples of x1 in a tile."""
        return slice(tile.row * self.tile[0], min((tile.row + 1) * self.tile[0], self.samples[0]))

    def columns_of(self, tile: Tile) -> slice:
        """Find the samples of x2 in a tile."""
        if self.paired:
            return self.rows_of(tile)
        return slice(tile.column * self.tile[1], min((tile.column + 1) * self.tile[1], self.samples[1]))

    def sample_axes(self, sizes: tuple[int, int]) -> tuple[int, ...]:
        """Choose the sample axes of a kernel: two of them, or one of paired samples."""
        return sizes[:1] if self.paired else sizes

    @property
    def bytes(self) -> int:
        """What the kernel takes on disk, edges of the grid of tiles included."""
        return self.tile_bytes * prod(self.grid)

    @property
    def tile_bytes(self) -> int:
        """What a tile takes."""
        return tile_bytes(self.forms, self.sample_axes(self.tile))

    def __str__(self) -> str:
        """Format as lines.

        Returns:
            The lines.
        """
        n1, n2 = self.samples
        samples = f"{n1} pairs of samples" if self.paired else f"{n1} x {n2} samples"
        names = "" if () in self.forms else f", {len(self.forms)} kernels"
        tiles = " x ".join(map(str, self.sample_axes(self.tile)))
        count = len(list(self.tiles()))
        mirrored = prod(self.grid) - count
        lines = [
            f"kernel of {samples}{names}: {shown(self.bytes)} on disk",
            f"{prod(self.grid)} tiles of {tiles} samples, {shown(self.tile_bytes)} each, in {len(self.strips)} strips",
        ]
        lines += [f"{count} tiles are computed, {mirrored} are these transposed"] if mirrored else []
        lines += [] if self.cost is None else [self.cost.described(kept=any(map(self.keeps, self.strips)))]
        return "\n".join(lines)


def _length(samples: slice) -> int:
    """Count samples."""
    return int(samples.stop - samples.start)


def tile_bytes(forms: Mapping[Path, Form], sizes: tuple[int, ...]) -> int:
    """Compute what a tile of so many samples takes."""
    return prod(sizes) * sum(form.bytes for form in forms.values())


@dataclass(frozen=True)
class Footprint:
    """What a tile takes to compute, as an upper estimate."""

    forms: Mapping[Path, Form]
    paired: bool
    forward: int  # bytes that are kept of the evaluation of a sample
    backward: int  # bytes that the Jacobians of all outputs with respect to these would take
    most: int  # bytes of such Jacobians above which outputs pass back a part at a time

    def of(self, tile: tuple[int, int]) -> int:
        """Estimate the bytes for a tile."""
        samples = sum(tile)
        passes = samples * self.forward + min(samples * self.backward, self.most)
        return self._held(tile) + passes

    def least(self, tile: tuple[int, int]) -> int:
        """Estimate the bytes for a tile whose samples are evaluated one after the other."""
        return self._held(tile) + 2 * self.forward

    def _held(self, tile: tuple[int, int]) -> int:
        """Compute what the numbers of a tile take on their way to the disk."""
        return _HELD * tile_bytes(self.forms, tile[:1] if self.paired else tile)


def choose_tile(samples: tuple[int, int], footprint: Footprint, memory: int, *, symmetric: bool) -> tuple[int, int]:
    """Choose the largest tile that is worth it and fits, as even as the grid allows."""
    entry = sum(form.bytes for form in footprint.forms.values())
    worth = _LARGEST // entry if footprint.paired else int(sqrt(_LARGEST / entry))
    sizes = range(1, max(1, min(worth, max(samples))) + 1)
    largest = max(1, bisect_right(sizes, memory, key=lambda size: footprint.of((size, size))))
    check_tile((largest, largest), footprint, memory)
    first, second = (ceil(n / ceil(n / largest)) for n in samples)
    return (first, first) if symmetric or footprint.paired else (first, second)


def check_tile(tile: tuple[int, int], footprint: Footprint, memory: int) -> None:
    """Refuse a tile that cannot fit into memory."""
    needed = footprint.least(tile)
    if needed > memory:
        raise KernelMemoryError(
            f"A tile of {tile[0]} x {tile[1]} samples takes at least {shown(needed)} to compute, and memory= allows "
            f"{shown(memory)}. What helps: a smaller tile=, compute='trace' or 'diagonal' instead of the full kernel, "
            "fewer parameters at a time (params=)."
        )
