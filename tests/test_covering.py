"""What the tests combine misses no value, and of neighbours no combination."""

from itertools import combinations, product

import pytest
from covering import covering

FACTORS = [["full", "diagonal", "trace"], [0, 1], [None, "x", "y", "z"]]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_value_meets_every_other(number):
    others = FACTORS[:number]
    rows = covering(range(100), *others)
    assert len(rows) == len(set(rows)) == 100 * max(map(len, others))
    for at, other in enumerate(others, 1):
        assert {(row[0], row[at]) for row in rows} == set(product(range(100), other))
    assert {row[1:] for row in rows[: len(rows) // 4]} == set(product(*others))


def test_neighbours_meet_every_pair():
    rows = covering(range(3), FACTORS[0], "abc")
    for first, second in combinations(range(3), 2):
        assert len({(row[first], row[second]) for row in rows}) == 9
