"""What a user sees of a long computation."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import TracebackType
from typing import Any

#: ``None`` for a bar on a terminal where it takes long, whether there is a bar, or what is called with parts done and
#: all.
Wanted = bool | Callable[[int, int], object] | None

# Seconds that a computation is expected to take, from which on a bar is shown to those who did not ask for one.
_LONG = 10.0

# What this thread's call shows.
_WANTED: ContextVar[Wanted] = ContextVar("wanted", default=False)


class Progress:
    """Counts the parts of a computation."""

    def __init__(self, wanted: Wanted, total: int, *, done: int = 0, unit: str = "part") -> None:
        """Start, with some parts that were there before."""
        self.done, self.total, self._first = done, total, done
        self._call = wanted if callable(wanted) else None
        self._unit, self._start = unit, time.monotonic()
        self._bar: Any = self._new_bar() if wanted is True else None
        self._waits = wanted is None and sys.stderr.isatty() and _has_bars()

    def __enter__(self) -> "Progress":
        """Show where it starts; what is inside shows nothing of its own."""
        self._token = _WANTED.set(False)
        if self._call is not None:
            self._call(self.done, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        _WANTED.reset(self._token)
        if self._bar is not None:
            self._bar.close()

    def add(self, parts: int = 1) -> None:
        """Count parts that are done."""
        if not parts:
            return
        self.done += parts
        if self._bar is not None:
            self._bar.update(parts)
        elif self._waits:
            expected = (time.monotonic() - self._start) * (self.total - self._first) / (self.done - self._first)
            if expected > _LONG:
                self._bar, self._waits = self._new_bar(), False
        if self._call is not None:
            self._call(self.done, self.total)

    def _new_bar(self) -> Any:
        """Show a bar."""
        if not _has_bars():
            raise ImportError("progress=True shows a bar of tqdm, which is not installed: pip install tqdm.")
        from tqdm import tqdm

        return tqdm(total=self.total, initial=self.done, unit=self._unit, smoothing=0.1)


def _has_bars() -> bool:
    """Tell whether tqdm is installed."""
    return find_spec("tqdm") is not None


@contextmanager
def showing(wanted: Wanted) -> Iterator[None]:
    """Show what is computed inside as a user wants it."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def counting(total: int) -> Progress:
    """Count the parts of what this thread's call computes."""
    return Progress(_WANTED.get(), total)


def check_progress(progress: Any) -> None:
    """Refuse what does not say how to show progress."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress must be True, False, None or a callable (done, total), got {type(progress).__name__}."
        )
