"""Parameters, chosen by what a user calls them: by name, by a glob, or by the module that they are in."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from ggn_ntk.problem.errors import kind_of, listed


def selected(entries: Any, known: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Go through the entries of ``params``, or the only one, with the names that each stands for."""
    names = list(known)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, Iterable):
        what = "names of parameters, globs or names of modules, e.g. ['0.weight', 'encoder.*'] or 'encoder.layer.3'"
        raise TypeError(f"params must hold {what}, got {kind_of(entries)}.")
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"params must hold names of parameters, got {kind_of(entry)}.")
        found = _matching(entry, names)
        if not found:
            raise ValueError(f"params names {entry!r}, which the model does not have. {_suggestions(entry, names)}")
        yield entry, found


def _matching(entry: str, names: list[str]) -> list[str]:
    """List the names that an entry stands for."""
    if entry in names:
        return [entry]
    if any(sign in entry for sign in "*?["):
        return [name for name in names if fnmatchcase(name, entry)]
    return [name for name in names if name.startswith(f"{entry}.")]


def _suggestions(entry: str, names: list[str]) -> str:
    """List the names that exist, and those of parameters and modules that are close to a wrong one."""
    modules = {name[:place] for name in names for place, sign in enumerate(name) if sign == "."}
    close = get_close_matches(entry, [*names, *sorted(modules)], n=4, cutoff=0.5)
    return f"It has: {listed(names)}" + (f"; close are: {', '.join(close)}." if close else ".")
