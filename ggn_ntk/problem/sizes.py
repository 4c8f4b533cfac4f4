"""Sizes of memory, as users state them and as messages do."""

import re
from typing import Any

from ggn_ntk.problem.errors import kind_of

# A number with a unit: decimal or binary prefixes, as in "8GiB", "500 MB" and "1.5e9 B".
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?|\.\d+)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE)
_PREFIXES = "kmgt"


def parse_bytes(size: Any, argument: str = "memory") -> int | None:
    """Read a number of bytes, an integer or text such as ``"8GiB"``; ``None`` stays as it is."""
    if size is None or (type(size) is int and size > 0):
        return size
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is not None and float(match[1]) > 0:
            prefix, binary = match[2], match[3]
            power = 0 if prefix is None else 1 + _PREFIXES.index(prefix.lower())
            return int(float(match[1]) * (1024 if binary else 1000) ** power)
    what = f"{argument} must be a positive number of bytes, or text such as '8GiB' or '500MB', or None"
    got = repr(size) if isinstance(size, str | int) and not isinstance(size, bool) else kind_of(size)
    raise (ValueError if isinstance(size, str) or type(size) is int else TypeError)(f"{what}, got {got}.")


def shown(size: float) -> str:
    """Write a number of bytes for a message."""
    if size >= 2**40:
        return f"{size / 2**40:.2f} TiB"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
