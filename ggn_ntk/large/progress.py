"""What a user sees of a long computation."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

#: ``None`` for a bar on a terminal where it takes long, whether there is a bar, or what is called with tiles done and
#: all.
Wanted = bool | Callable[[int, int], object] | None

# Seconds after which a bar is shown to those who did not ask for one.
_PATIENCE = 10.0


class Progress:
    """Counts tiles."""

    def __init__(self, wanted: Wanted, done: int, total: int) -> None:
        """Start, with some tiles that were there before."""
        self.done, self.total = done, total
        self._call = wanted if callable(wanted) else None
        self._bar: Any = None
        if wanted is True or (wanted is None and sys.stderr.isatty()):
            from tqdm import tqdm

            delay = 0.0 if wanted else _PATIENCE
            self._bar = tqdm(total=total, initial=done, unit="tile", delay=delay, smoothing=0.1)

    def __enter__(self) -> "Progress":
        """Show where it starts."""
        self._show(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def add(self, tiles: int = 1) -> None:
        """Count tiles that are done."""
        if tiles:
            self.done += tiles
            self._show(tiles)

    def _show(self, tiles: int) -> None:
        if self._bar is not None:
            self._bar.update(tiles)
        if self._call is not None:
            self._call(self.done, self.total)


def check_progress(progress: Any) -> None:
    """Refuse what does not say how to show progress."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress must be True, False, None or a callable (done, total), got {type(progress).__name__}."
        )
