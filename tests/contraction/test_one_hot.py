"""One-hot operands: compared and looked up, formed only where that is cheaper."""

from math import prod

import pytest
import torch
from conftest import COMPUTES, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import empirical_ntk, explain
from ggn_ntk.contraction import one_hot
from ggn_ntk.contraction.einsum import Memo, contract
from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.one_hot import looked_up
from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.contraction.products import kernel_einsum
from ggn_ntk.problem.output_axes import Roles
from ggn_ntk.reference import jacobian_contraction


@st.composite
def jacobians(draw):
    """Roles of outputs; two Jacobians of a table [V, K], each of tokens, bags, maxima or a tied Linear layer."""
    v, k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    roles = Roles(*(draw(st.integers(1, 3)) for _ in range(3)))
    c = prod(roles)

    def jacobian(n):
        p = draw(st.integers(1, 4))

        def random(*shape):
            return torch.randn(shape, dtype=torch.float64)

        def one_hot(*shape):
            return OneHot(torch.randint(-1, v, shape), v)

        return draw(
            st.sampled_from(
                [
                    Factored("cnpk,npv->cnvk", (random(c, n, p, k), one_hot(n, p))),
                    Factored("cnk,np,npv->cnvk", (random(c, n, k), random(n, p), one_hot(n, p))),
                    Factored("cnk,nkv->cnvk", (random(c, n, k), one_hot(n, k))),
                    Factored("cno,ni->cnoi", (random(c, n, v), random(n, k))),
                ]
            )
        )

    return roles, jacobian(3), jacobian(2)


def in_full(jacobian, roles):
    operands = [
        (o.places.unsqueeze(-1) == torch.arange(o.size)).double() if isinstance(o, OneHot) else o
        for o in jacobian.operands
    ]
    return torch.einsum(jacobian.equation, *operands).flatten(2).unflatten(0, roles)


@settings(deadline=None, max_examples=200)
@given(drawn=jacobians(), seed=st.integers(0, 99))
def test_all_pairs_of_uses_of_a_table(drawn, seed):
    torch.manual_seed(seed)
    roles, first, second = drawn
    product = kernel_einsum(first, second, roles)
    kernel = contract(looked_up(product.operands, product.result), product.result, Memo())
    expected = torch.einsum("ecfnp,edfmp->nmecd", in_full(first, roles), in_full(second, roles))
    assert_close(kernel.aligned(product.result).expand_as(expected), expected)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_a_large_vocabulary_is_never_formed(layer, compute, monkeypatch):
    original = one_hot._dense

    def shapes_only(hot, dtype):
        assert hot.tensor.is_meta
        return original(hot, dtype)

    monkeypatch.setattr(one_hot, "_dense", shapes_only)
    model = nn.Sequential(layer(50_000, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x1, x2 = torch.randint(50_000, (3, 4)), torch.randint(50_000, (2, 4))
    x2[:, :2] = x1[:2, 1:3]
    model(x1)
    kernel = empirical_ntk(model, x1, x2, compute=compute, method="structured")
    assert_close(kernel, jacobian_contraction(model, x1, x2, compute=compute))


def test_the_cost_decides():
    def forms_vectors(vocabulary, positions):
        one_hot = OneHot(torch.zeros(2, positions, dtype=torch.long), vocabulary)
        jacobian = Factored("cnpk,npv->cnvk", (torch.randn(3, 2, positions, 4), one_hot))
        return not kernel_einsum(jacobian, jacobian, Roles(free=3)).first[1].hot

    assert not forms_vectors(50_000, 8)
    assert forms_vectors(2, 200)


def test_explain_shows_the_comparison_of_tokens():
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Linear(12, 2))
    equation = explain(model, torch.randint(1000, (5, 3))).contractions[-1].equation
    assert any(set("nm") <= set(term) for term in equation.split("->")[0].split(",")), equation
