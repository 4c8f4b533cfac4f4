"""Einsums: the order of many operands, and products of two in any memory order."""

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ggn_ntk.contraction import einsum


def in_memory_order(letters, order, sizes):
    """A random tensor with an axis for each letter, which lie in memory as the order says."""
    kept = [letter for letter in order if letter in letters]
    tensor = torch.randn([sizes[letter] for letter in kept], dtype=torch.float64)
    return einsum.Operand(letters, tensor.permute([kept.index(letter) for letter in letters])).ready("nm")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_products_of_operands_in_any_memory_order(data):
    letters = "abcde"
    sizes = {letter: data.draw(st.integers(1, 5), label=letter) for letter in letters}
    first, second = (data.draw(st.sets(st.sampled_from(letters), min_size=1).map(sorted)) for _ in range(2))
    both, shared = set(first) | set(second), set(first) & set(second)
    needed = (both - shared) | data.draw(st.sets(st.sampled_from(letters)))
    a, b = (
        in_memory_order("".join(names), data.draw(st.permutations(letters)), sizes)._replace(key=key)
        for key, names in enumerate((first, second))
    )
    expected = torch.einsum(f"{a.letters},{b.letters}->{''.join(sorted(both & needed))}", a.tensor, b.tensor)
    for keep_copies in (False, True):
        product = einsum.as_matrices(a, b, needed)
        found = einsum.Operand(product.letters, einsum.multiply(product, einsum.Memo(keep_copies=keep_copies)), None)
        torch.testing.assert_close(found.aligned("".join(sorted(both & needed))), expected)


def test_outer_rows_become_a_batch_instead_of_a_copy():
    sizes = {"n": 3, "c": 4, "p": 6, "o": 64, "q": 6}
    s, gram = in_memory_order("cnpo", "ncpo", sizes), in_memory_order("npq", "npq", sizes)
    product = einsum.as_matrices(s, gram, set("cnoq"))
    assert (product.letters, product.batch, product.first.letters) == ("ncqo", ["n", "c"], "npq")
    windows = in_memory_order("npk", "npk", {**sizes, "k": 5000})
    assert einsum.as_matrices(s, windows, set("cnok")).batch == ["n"]  # repeating these would cost more than the copy


@pytest.mark.parametrize("count", [5, 9, 12, 20])
@pytest.mark.parametrize("apart", [0, 4])
def test_many_operands_are_ordered_by_dynamic_programming(count, apart, monkeypatch):
    optimizers, search = [], einsum.opt_einsum.contract_path

    def searching(*args, **kwargs):
        optimizers.append(kwargs["optimize"])
        return search(*args, **kwargs)

    monkeypatch.setattr(einsum.opt_einsum, "contract_path", searching)
    einsum.path_info.cache_clear()
    letters = "abcdefghijklmnopqrstu"
    terms = [letters[i : i + 2] for i in range(count)]
    tensors = [torch.randn(2 + i % 2, 2 + (i + 1) % 2, dtype=torch.float64) for i in range(count)]
    operands = [einsum.Operand(term, tensor, i) for i, (term, tensor) in enumerate(zip(terms, tensors, strict=True))]
    info = einsum.path_of(operands, "a" + letters[count], apart=apart)
    named = {name for name in optimizers if isinstance(name, str)}
    sizes = [count] if not apart else [apart, count - apart]
    assert named == {"optimal" if size <= 6 else "dp" for size in sizes}
    assert len(info.contraction_list) == count - 1
    assert sum(len(step[0]) - 1 for step in info.contraction_list) == count - 1
    found = einsum.contract(operands, "a" + letters[count], einsum.Memo())
    assert_close(found.aligned("a" + letters[count]), torch.linalg.multi_dot(tensors))
