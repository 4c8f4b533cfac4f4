"""Few of many combinations, which meet the faults that all of them would: most come of one value, or of two."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

_Marked = type(pytest.param())


def covering(first: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combine each value of the first factor with every value of each other one, in as few rows as that takes.

    The rows of a value go through all others at once, each from a start of its own. The starts count up, as digits
    do, from one value of the first factor to the next: neighbours, as many as the others have combinations, meet
    every one of these.
    """
    rows = []
    for i, value in enumerate(first):
        starts = []
        for other in others:
            i, start = divmod(i, len(other))
            starts.append(start)
        for row in range(max(map(len, others))):
            rows.append((value, *(o[(start + row) % len(o)] for o, start in zip(others, starts, strict=True))))
    return rows


def _label(value: Any) -> str:
    """What stands for a value in the name of a test."""
    return str(getattr(value, "__name__", value)).removeprefix("torch.")


def covers(*tables: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrize a test by ``covering`` of the factors of each table, which name the same arguments in one order.

    A factor may be of several arguments, as pytest has them: ``{"dtype, device": PLACES}``. Values of one argument
    may be ``pytest.param``s. The fixture ``device`` prepares its values.
    """
    (names,) = {", ".join(table) for table in tables}
    params = {}
    for table in tables:
        for row in covering(*table.values()):
            marks = [mark for value in row if isinstance(value, _Marked) for mark in value.marks]
            row = [value.values[0] if isinstance(value, _Marked) else value for value in row]
            values = [
                entry for key, value in zip(table, row, strict=True) for entry in (value if "," in key else [value])
            ]
            name = "-".join(map(_label, values))
            params[name] = pytest.param(*values, marks=marks, id=name)
    return pytest.mark.parametrize(names, list(params.values()), indirect=["device"] if "device" in names else [])
