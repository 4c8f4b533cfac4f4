"""Biases that are contracted with their weights."""

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import Factored, empirical_ntk
from ggn_ntk.contraction import accumulator, bias
from ggn_ntk.reference import jacobian_contraction


def linear(c=4, n=3, positions=5, o=2, i=4, equation="cnpo,npi->cnoi"):
    """The Jacobians of a linear layer's weight and bias."""
    torch.manual_seed(0)
    s, x = torch.randn(c, n, positions, o).double(), torch.randn(n, positions, i).double()
    return Factored(equation, (s, x)), Factored("cnpo->cno", (s,))


def kernel(*jacobians):
    dense = [jacobian.formed() for jacobian in jacobians]
    return sum(torch.einsum("cnk,dmk->nmcd", j, j) for j in dense)


sizes = st.integers(1, 4)


@settings(deadline=None)
@given(
    c=sizes, n=sizes, positions=sizes, o=sizes, i=sizes, equation=st.sampled_from(["cnpo,npi->cnoi", "cnpo,npi->cnio"])
)
def test_joined_jacobians_have_the_sum_of_kernels(c, n, positions, o, i, equation):
    weight, own = linear(c, n, positions, o, i, equation)
    joined = bias.join_biases([own, weight])
    assert len(joined) == (1 if i <= c * o else 2)
    torch.testing.assert_close(kernel(*joined), kernel(weight, own))


def test_a_scaled_bias_is_joined_too():
    weight, own = linear()
    scaled = Factored("cnpo,->cno", (own.operands[0], torch.tensor(0.1).double()))
    (joined,) = bias.join_biases([scaled, weight])
    torch.testing.assert_close(kernel(joined), kernel(weight, scaled))


def test_of_several_layers_each_bias_finds_its_weight():
    (a, a_bias), (b, b_bias) = linear(), linear(o=3)
    joined = bias.join_biases([a_bias, b_bias, a, b])
    assert [jacobian.sizes["i"] for jacobian in joined] == [5, 5]
    torch.testing.assert_close(kernel(*joined), kernel(a, a_bias, b, b_bias))


def test_what_is_no_weight_and_bias_of_one_layer_stays_apart():
    weight, own = linear()
    s, x = weight.operands
    for apart in (
        [weight, Factored("cnpo->cno", (s.clone(),))],
        [weight, Factored("cnpo->cnpo", (s,))],
        [weight, Factored("cnpo->cn", (s,))],
        [weight, Factored("cnop->cno", (s.transpose(2, 3).contiguous(),))],
        [Factored("cnpo,npio->cnoi", (s, x.unsqueeze(-1).expand(-1, -1, -1, 2))), own],
        [Factored("cnpo,npiq->cnoi", (s, torch.randn(3, 5, 4, 2).double())), own],
        [Factored("cnpo,npi,npj->cnoij", (s, x, x)), own],
        [Factored("cnpo,npi->cnoi", (s, x[:1].expand_as(x))), own],
        [Factored("cnpo,npo->cno", (s, x[..., :2])), own],
        [weight, weight],
        [own, own],
    ):
        joined = bias.join_biases(apart)
        assert sorted(j.equation for j in joined) == sorted(j.equation for j in apart)
        torch.testing.assert_close(kernel(*joined), kernel(*apart))


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_sequences_are_contracted_with_joined_biases(capture, compute, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(24, 3)).double()
    x1, x2 = torch.randn(4, 6, 3).double(), torch.randn(2, 6, 3).double()
    doubled, kernel_einsum = [], accumulator.kernel_einsum

    def count(first, *args, **options):
        letters = (letter for letter in dict.fromkeys(first.result + first.equation) if letter.isalpha())
        doubled.append(first.equation.translate(str.maketrans(dict(zip(letters, "cnoip", strict=False)))))
        return kernel_einsum(first, *args, **options)

    monkeypatch.setattr(accumulator, "kernel_einsum", count)
    found = empirical_ntk(model, x1, x2, compute=compute, capture=capture, method="structured")
    assert_close(found, jacobian_contraction(model, x1, x2, compute=compute))
    assert sorted(doubled) == ["cno,ni->cnoi", "cno->cno", "cnpo,npi->cnoi", "cnpo,npi->cnoi"]
