"""What is computed from factored Jacobians, against the Jacobians themselves."""

from math import prod

import pytest
import torch
from conftest import assert_close, limit_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from ggn_ntk import Factored
from ggn_ntk.contraction.accumulate import add_products
from ggn_ntk.contraction.products import kernel_einsum
from ggn_ntk.contraction.uses import put_together
from ggn_ntk.problem.output_axes import Roles
from ggn_ntk.rules import OneHot


@st.composite
def jacobians(draw, rows=1):
    """A Jacobian of any equation, its operands in any layout, shared along any axes, and one-hot vectors among them."""
    sizes = {letter: draw(st.integers(1, 3), label=letter) for letter in "cnoikpqm"}
    sizes["n"] *= rows
    result = "cn" + "".join(draw(st.permutations("oik"))[: draw(st.integers(0, 3))])
    letters = result + "".join(draw(st.permutations("pqm"))[: draw(st.integers(0, 3))])
    terms = [
        draw(st.permutations(letters))[: draw(st.integers(1, len(letters)))] for _ in range(draw(st.integers(1, 4)))
    ]
    terms[0] += [letter for letter in result if letter not in "".join(map("".join, terms))]
    operands = []
    for place, term in enumerate(terms):
        if place and term[-1] not in "cn" and draw(st.booleans(), label="one-hot"):
            size = sizes[term[-1]]
            shape = [sizes[letter] for letter in term[:-1]]
            operands.append(OneHot(laid_out(draw, torch.randint(-1, size, shape)), size))
        else:
            operands.append(laid_out(draw, torch.randn([sizes[letter] for letter in term], dtype=torch.float64)))
    return Factored(f"{','.join(map(''.join, terms))}->{result}", tuple(operands))


def laid_out(draw, tensor):
    """A tensor of the same shape, with another order of axes in memory, and a single value along some of them."""
    order = draw(st.permutations(range(tensor.ndim)))
    tensor = tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(tensor.ndim)])
    shape = tensor.shape
    for axis in draw(st.sets(st.integers(0, tensor.ndim - 1)), label="shared") if tensor.ndim else ():
        tensor = tensor.narrow(axis, 0, 1)
    return tensor.expand(shape)


def with_vectors_formed(jacobian):
    return [
        (o.places.unsqueeze(-1) == torch.arange(o.size)).double() if isinstance(o, OneHot) else o
        for o in jacobian.operands
    ]


def dense(jacobian):
    """The Jacobian ``[C, N, P]``."""
    tensor = torch.einsum(jacobian.equation, *with_vectors_formed(jacobian))
    return tensor.reshape(*tensor.shape[:2], prod(tensor.shape[2:]))


def check(*strategies):
    """Draw a Jacobian, and what else a test takes."""
    return lambda test: settings(deadline=None, max_examples=150)(given(*strategies)(test))


@check(jacobians())
def test_formed(jacobian):
    assert_close(jacobian.formed(), dense(jacobian))
    with pytest.MonkeyPatch.context() as patch:  # a few samples at a time
        limit_memory(patch, rows=1)
        assert_close(jacobian.formed(), dense(jacobian))


@check(jacobians())
def test_map_hands_out_letters_and_axes(jacobian):
    seen = []

    def doubled(letters, tensor):
        assert len(letters) == tensor.ndim
        seen.append(letters)
        return 2 * tensor if tensor.is_floating_point() else tensor

    mapped = jacobian.map(doubled)
    assert mapped.equation == jacobian.equation
    assert all(term.startswith(letters) for term, letters in zip(jacobian.terms, seen, strict=True))
    factors = sum(not isinstance(o, OneHot) for o in jacobian.operands)
    assert_close(dense(mapped), 2**factors * dense(jacobian))


@check(jacobians(), st.data())
def test_select_samples(jacobian, data):
    n = jacobian.sizes["n"]
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    assert_close(dense(jacobian.select_samples(chosen)), dense(jacobian)[:, chosen])
    start = data.draw(st.integers(0, n - 1))
    for block in (range(start, n), range(0, n, 2)):
        assert_close(dense(jacobian.select_samples(block)), dense(jacobian)[:, block.start : block.stop : block.step])


@check(jacobians(), st.data())
def test_pick(jacobian, data):
    c, n = (jacobian.sizes[letter] for letter in "cn")
    pairs = data.draw(st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, n - 1)), min_size=1, max_size=4))
    outputs, samples = torch.tensor(pairs).T
    assert_close(dense(jacobian.pick(outputs, samples)), dense(jacobian)[outputs, samples].unsqueeze(0))


@check(st.integers(1, 3).flatmap(lambda rows: st.tuples(jacobians(rows), st.just(rows))))
def test_split_samples(drawn):
    jacobian, rows = drawn
    expected = dense(jacobian).unflatten(1, (-1, rows)).sum(2)
    assert_close(dense(jacobian.split_samples(rows)), expected)
    assert_close(jacobian.split_samples(rows).formed(), expected)


@check(jacobians())
def test_sum_private_letters(jacobian):
    summed = jacobian.sum_private_letters()
    assert_close(dense(summed), dense(jacobian))
    letters = "".join(summed.terms)
    for o in summed.labelled:
        assert o.hot or all(letter in summed.result or letters.count(letter) > 1 for letter in o.letters)
    assert summed.sum_private_letters() is summed


@check(jacobians(), st.sampled_from([1, 5, 2**24]), st.data())
def test_weighted_sum(jacobian, copied, data):
    """Also of a few samples at a time, and by products of its rows with vectors."""
    whole = dense(jacobian)
    weights, p = torch.randn(whole.shape[:2]).double(), whole.shape[2]
    expected = torch.einsum("cn,cnk->k", weights, whole)
    row = data.draw(st.sampled_from([size for size in range(1, p + 1) if p % size == 0]))
    vectors = torch.randn(2, row).double()
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, rows=8 * copied)
        assert_close(jacobian.weighted_sum(weights), expected)
        assert_close(jacobian.weighted_sum(weights, vectors), (vectors @ expected.reshape(-1, row).T).flatten())


@check(jacobians(), st.sampled_from([1, 5, 2**24]))
def test_times(jacobian, copied):
    """Also of a few samples at a time."""
    whole = dense(jacobian)
    u = torch.randn(1, whole.shape[2]).double()
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, rows=8 * copied)
        assert_close(jacobian.times(u), whole @ u[0])


def test_times_takes_the_shape_of_the_parameter():
    """Whose axes the equation may merge or split."""
    s, windows = torch.randn(2, 3, 2, 5, 4).double(), torch.randn(3, 2, 6, 4).double()
    convolution = Factored("cngop,ngip->cngoi", (s, windows))
    table = Factored("cnpk,npv->cnvk", (torch.randn(2, 3, 4, 5).double(), OneHot(torch.randint(-1, 7, (3, 4)), 7)))
    for jacobian, shape in ((convolution, (10, 2, 3)), (table, (7, 5))):
        u = torch.randn(shape).double()
        assert_close(jacobian.times(u), dense(jacobian) @ u.flatten())


@check(jacobians())
def test_squared_terms(jacobian):
    inputs = jacobian.equation.split("->")[0]
    expected = torch.einsum(f"{inputs}->", *(o.square() for o in with_vectors_formed(jacobian)))
    assert_close(jacobian.squared_terms(), expected)


@check(jacobians(), st.integers(1, 3))
def test_uses_are_put_together(jacobian, count):
    together = put_together([jacobian] * count)
    assert_close(sum(map(dense, together)), count * dense(jacobian))


@check(jacobians(), st.booleans())
def test_kernel_einsum(jacobian, formed):
    c, n = (jacobian.sizes[letter] for letter in "cn")
    kernels, whole = {}, dense(jacobian)
    product = kernel_einsum(jacobian, jacobian, Roles(free=c), formed=formed)
    add_products(kernels, [("", product)], (n, n, 1, c, c), symmetric=True)
    assert_close(kernels[""][:, :, 0], torch.einsum("cnk,dmk->nmcd", whole, whole))


def test_a_jacobian_without_s_is_an_error():
    with pytest.raises(ValueError, match="no tensor among its operands: where does s enter"):
        Factored("cnv->cnv", (OneHot(torch.zeros(2, 3, dtype=torch.long), 4),))


@pytest.mark.parametrize("equation", ["cno->cno", "cno,no->nco", "cn,no->cno", "cno,nk->cnoz"])
def test_equations_that_do_not_fit(equation):
    operands = (torch.zeros(2, 3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"operands of shapes \[\[2, 3, 4\], \[3, 4\]\]: the equation needs"):
        Factored(equation, operands)
