"""Errors and warnings: what can keep a kernel from being computed, and how messages say so."""

import re
import sys
import threading
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

#: What to do where one route cannot, but others can.
OTHER_METHOD = "Use another method ('auto' finds one)"

# How many names a message lists before it counts the rest.
_LISTED = 8

# What allocators and libraries say when memory has run out: torch on CPUs (Linux, Windows), CUDA's runtime and driver,
# cuBLAS, cuDNN and their kin, C++.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|could not|failed to) allocate|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)
# How much memory an allocator was asked for, in its message.
_ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ ?\w*)", re.IGNORECASE)

# What wrong code raises.
_OF_WRONG_CODE = (AssertionError, AttributeError, NameError, TypeError)

# Packages between a warning and the user's code: this one, torch (for its decorators), context managers.
_PASSED_BY = (__name__.split(".")[0], "torch", "contextlib")


class Problem(NamedTuple):
    """Something that keeps a kernel from being computed.

    Attributes:
        where: Dotted name of the module or parameter; empty for the model itself.
        what: What is wrong with it.
        remedy: What to do about it.
    """

    where: str
    what: str
    remedy: str


class UnsupportedModelError(ValueError):
    """A kernel cannot be computed for a model; the message lists every problem and its remedy.

    Attributes:
        problems: The problems found.
    """

    def __init__(self, problems: Iterable[Problem], route: str = "empirical NTK") -> None:
        """Format the problems, equal ones of several modules as one line.

        Args:
            problems: What was found.
            route: What cannot be computed.
        """
        self.problems = list(problems)
        super().__init__("\n".join([f"No {route} of this model:", *(f"  - {line}" for line in _lines(self.problems))]))


class NoTensorError(UnsupportedModelError):
    """A model returns something else than a tensor."""

    @classmethod
    def of(cls, returned: object, why: str = "") -> "NoTensorError":
        """Name what is returned, and why it is not several outputs either."""
        remedy = "Pass output=, a function that picks the tensor [N, ...] to differentiate"
        several = f"; of several tensors each must be an output, but {why}" if why else ""
        return cls([Problem("", f"it returns {type(returned).__name__}, not a tensor", remedy + several)])


class UnsupportedRouteError(UnsupportedModelError):
    """One route cannot compute the kernel of a model, though others may: the error at which ``"auto"`` gives way."""


class NTKMismatchError(RuntimeError):
    """A kernel differs from the oracle's by more than rounding."""


class NotFiniteError(ArithmeticError):
    """Jacobians of some samples are not finite; :mod:`ggn_ntk.methods.computation` finds out which."""


class NotCapturedError(ValueError):
    """A call of a layer was not recorded in a form that its rule can handle."""


class KernelMemoryError(torch.OutOfMemoryError, MemoryError):
    """Memory does not suffice for a kernel, or ran out on the way to it; the message says what helps."""


class RouteWarning(UserWarning):
    """A kernel is computed in another way than the fastest, or the one that was asked for: exact, but slower."""


class NotFiniteWarning(RuntimeWarning):
    """Jacobians of some samples are not finite: their rows and columns of the kernel are NaN."""


class StatisticsWarning(UserWarning):
    """BatchNorm normalises by running statistics that were never set: the kernel is that of a model without it."""


@contextmanager
def without(route: str) -> Iterator[None]:
    """Let the message about problems that are found inside name what cannot be computed."""
    try:
        yield
    except UnsupportedModelError as error:
        raise type(error)(error.problems, route) from None


def _lines(problems: Iterable[Problem]) -> list[str]:
    """Format problems, those that differ only in the module on one line."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for where, what, remedy in problems:
        places[what, remedy].append(where or "the model")
    return [f"{listed(names)}: {what}. {remedy}." for (what, remedy), names in places.items()]


def listed(names: Iterable[object]) -> str:
    """List names in a message, only the first few of many."""
    shown = [str(name) for name in names]
    others = len(shown) - _LISTED
    if others <= 1:  # to count a single one takes as long as to name it
        return ", ".join(shown)
    return f"{', '.join(shown[:_LISTED])} and {others} others"


def kind_of(value: Any) -> str:
    """Name a value's type for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class _Here(threading.local):
    """What becomes of warnings in this thread."""

    silent = False  # whether they are off
    kept: "list[tuple[type[Warning], str]] | None" = None  # where they are kept instead


_HERE = _Here()


@contextmanager
def silent() -> Iterator[None]:
    """Turn this package's warnings off in this thread, say where only a check takes a slower way."""
    before, _HERE.silent = _HERE.silent, True
    try:
        yield
    finally:
        _HERE.silent = before


@contextmanager
def collected() -> Iterator[list[tuple[type[Warning], str]]]:
    """Keep this package's warnings in this thread, for who is to say them elsewhere."""
    before, _HERE.kept = _HERE.kept, []
    try:
        yield _HERE.kept
    finally:
        _HERE.kept = before


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that called this package."""
    if _HERE.silent:
        return
    if _HERE.kept is not None:
        _HERE.kept.append((category, message))
        return
    frame, level = sys._getframe(1), 1  # noqa: SLF001 - Python documents it
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_BY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_bug(error: BaseException) -> bool:
    """Tell whether an error is of a kind that wrong code raises, and was raised at a line of this package."""
    if not isinstance(error, _OF_WRONG_CODE):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)  # the last frame, in which it was raised
    return str(frame.f_globals.get("__name__", "")).startswith(f"{_PASSED_BY[0]}.")


def bytes_asked_for(error: BaseException) -> str:
    """Read off an error how much memory was asked for; empty where it does not say."""
    found = _ASKED_FOR.search(str(error))
    return found.group(1) if found else ""
