"""Sizes of memory."""

import pytest

from ggn_ntk.problem.sizes import parse_bytes, shown


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (5, 5),
        ("8GiB", 8 * 2**30),
        ("8 gb", 8 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5 MiB", 3 * 2**19),
        ("1.5e9", 15 * 10**8),
        ("2k", 2000),
        (None, None),
    ],
)
def test_sizes_are_read(size, count):
    assert parse_bytes(size) == count


@pytest.mark.parametrize("size", ["", "8 GiBs", "-3GB", "0", "GiB", 0, -1])
def test_a_size_that_is_none_is_an_error(size):
    with pytest.raises(ValueError, match="memory must be a positive number of bytes"):
        parse_bytes(size)


@pytest.mark.parametrize("size", [1.5, True, [1]])
def test_a_size_of_another_type_is_an_error(size):
    with pytest.raises(TypeError, match="tile must be a positive number"):
        parse_bytes(size, "tile")


def test_sizes_are_written():
    assert list(map(shown, (2**20, 3 * 2**30, 2**41))) == ["1.0 MiB", "3.00 GiB", "2.00 TiB"]
