"""Few of many combinations, which meet the faults that all of them would: most come of one value, or of two."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pytest

# The values of a factor, or what gives them for a value of the first factor.
Factor: TypeAlias = Sequence[Any] | Callable[..., Sequence[Any]]

_Marked = type(pytest.param())


def covering(first: Sequence[Any], *others: Factor) -> list[tuple[Any, ...]]:
    """Combine each value of the first factor with every value of each other one, in as few rows as that takes.

    The rows of a value go through all others at once, each from a start of its own. The starts count up, as digits
    do, from one value of the first factor to the next: neighbours, as many as the others have combinations, meet
    every one of these.
    """
    rows = []
    for number, value in enumerate(first):
        factors = [other(*_unmarked(value)) if callable(other) else other for other in others]
        starts = []
        for factor in factors:
            number, start = divmod(number, len(factor))
            starts.append(start)
        for row in range(max(map(len, factors))):
            rows.append((value, *(f[(start + row) % len(f)] for f, start in zip(factors, starts, strict=True))))
    return rows


def covers(*tables: Mapping[str, Factor], indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test by ``covering`` of the factors of each table, which name the same arguments in one order.

    A factor of several arguments has tuples as values: ``{"case, method": [(case, "vivit")]}``. Values may be
    ``pytest.param``s. Fixtures that prepare values are named in ``indirect``; ``device`` always is one.
    """
    (names,) = {", ".join(table) for table in tables}
    params = {}
    for table in tables:
        for row in covering(*table.values()):
            marks = [mark for value in row if isinstance(value, _Marked) for mark in value.marks]
            values = [entry for value in row for entry in _unmarked(value)]
            name = "-".join(map(_label, values))
            params[name] = pytest.param(*values, marks=marks, id=name)
    prepared = [name for name in names.split(", ") if name in ("device", *indirect)]
    return pytest.mark.parametrize(names, list(params.values()), indirect=prepared)


def _unmarked(value: Any) -> Sequence[Any]:
    """The entries of a value of a factor."""
    return value.values if isinstance(value, _Marked) else value if isinstance(value, tuple) else (value,)


def _label(value: Any) -> str:
    """What stands for a value in the name of a test."""
    return str(getattr(value, "__name__", value)).removeprefix("torch.")
