"""Kernels that are summed from products of factored Jacobians, with as few multiplications as they take."""

import pytest
import torch
from conftest import assert_close, limit_memory
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ggn_ntk import Factored, empirical_ntk
from ggn_ntk.contraction import accumulate, einsum
from ggn_ntk.contraction.products import kernel_einsum
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.models.comparison import relative_error
from ggn_ntk.problem.output_axes import Roles
from ggn_ntk.reference import jacobian_contraction


def count_products(monkeypatch):
    """Record the shapes of the matrices that are multiplied."""
    shapes = []
    original = einsum.multiply
    monkeypatch.setattr(einsum, "multiply", lambda p, *r: shapes.append(p.letters) or original(p, *r))
    return shapes


def test_weight_and_bias_share_the_gram_matrix_of_s(monkeypatch):
    products = count_products(monkeypatch)
    n, c, features = 8, 3, 500
    s, x = torch.randn(c, n, features), torch.randn(n, features)
    jacobians = {"weight": Factored("cno,ni->cnoi", (s, x)), "bias": Factored("cno->cno", (s,))}
    kernels = {"": torch.zeros(4, 4, 1, c, c)}
    accumulate.add_products(
        kernels, [("", kernel_einsum(j, j, Roles(free=c))) for j in jacobians.values()], (4, 4, 1, c, c), offset=4
    )
    assert len(products) == 2  # x with x and s with s, of which the kernel is the product
    expected = torch.einsum("cno,ni,dmo,mi->nmcd", s[:, :4], x[:4], s[:, 4:], x[4:])
    torch.testing.assert_close(kernels[""][:, :, 0], expected + torch.einsum("cno,dmo->nmcd", s[:, :4], s[:, 4:]))


def test_a_weight_and_a_bias_in_ntk_parametrization_share_it_too(monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            bias = None if self.bias is None else self.bias * 0.1
            return nn.functional.linear(x, self.weight * self.in_features**-0.5, bias)

    multiplied, x = count_products(monkeypatch), torch.randn(8, 40)
    found = []
    for bias in (False, True):
        model = nn.Sequential(Scaled(40, 30, bias), nn.Tanh(), Scaled(30, 3, bias))
        multiplied.clear()
        assert_close(empirical_ntk(model, x), jacobian_contraction(model, x))
        found.append([letters for letters in multiplied if letters])  # the scales of biases are multiplied, too
    assert found[0] == found[1]


def test_the_jacobian_of_one_set_is_formed_once(monkeypatch):
    multiplied = count_products(monkeypatch)
    s, x = torch.randn(2, 4, 3, 50), torch.randn(4, 5, 50)
    jacobian = Factored("cnop,nip->cnoi", (s, x))
    for n1, count in [(None, 2), (2, 3)]:
        multiplied.clear()
        kernel = torch.zeros((4, 4, 1, 2, 2) if n1 is None else (2, 2, 1, 2, 2))
        samples = {"symmetric": True} if n1 is None else {"offset": n1}
        products = [("", kernel_einsum(jacobian, jacobian, Roles(free=2)))]
        accumulate.add_products({"": kernel}, products, kernel.shape, **samples)
        assert len(multiplied) == count


def weight_and_bias(s, x):
    """Jacobians of a layer at several positions, whose weight's are formed before samples meet."""
    # s [C, N, P, O], x [N, P, I]
    return Factored("cnpo,npi->cnoi", (s, x)), Factored("cnpo->cno", (s,))


def contracted(jacobians, axes, n1, c):
    """Kernels of weight and bias, added up; and how: what is counted and what torch counts."""
    n = jacobians[0].sizes["n"]
    roles, (first, second) = Roles(**{axes: c}), (n1, n - n1) if n1 else (n, n)
    products = [("", kernel_einsum(j, j, roles)) for j in jacobians]
    kernels, options = {}, {"offset": n1} if n1 else {"symmetric": True}
    with FlopCounterMode(display=False) as counter:
        accumulate.add_products(kernels, products, (first, second, roles.diagonal, roles.free, roles.free), **options)
    budget = MemoryBudget.of(torch.device("cpu"))
    counted = accumulate.counts(products, {"n": first, "m": second}, budget=budget, symmetric=not n1)
    return kernels[""], counted, counter.get_total_flops()


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 5),
    axes=st.sampled_from(["free", "diagonal", "traced"]),
    budgets=st.tuples(*[st.sampled_from([1, 2**7, 2**9, 2**11])] * 3),
    apart=st.booleans(),
)
def test_jacobians_of_any_shape_in_little_memory(sizes, axes, budgets, apart):
    c, n, positions, inputs, outputs = sizes
    n += 1
    jacobians = weight_and_bias(
        torch.randn(c, n, positions, outputs).double(), torch.randn(n, positions, inputs).double()
    )
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, **dict(zip(("rows", "columns", "passing"), budgets, strict=True)))
        kernel, *_ = contracted(jacobians, axes, apart and n // 2, c)
    j = torch.cat([jacobian.formed() for jacobian in jacobians], 2)
    ours, theirs = (j[:, : n // 2], j[:, n // 2 :]) if apart else (j, j)
    expected = {
        "free": lambda: torch.einsum("cnk,dmk->nmcd", ours, theirs).unsqueeze(2),
        "diagonal": lambda: torch.einsum("cnk,cmk->nmc", ours, theirs)[..., None, None],
        "traced": lambda: torch.einsum("cnk,cmk->nm", ours, theirs)[..., None, None, None],
    }[axes]()
    assert_close(kernel, expected)


@pytest.mark.parametrize("n1", [0, 12], ids=["symmetric", "x1 and x2"])
def test_jacobians_are_formed_once_in_little_memory_too(monkeypatch, n1):
    c, n, positions, inputs, outputs = 3, 24, 9, 40, 50
    jacobians = weight_and_bias(torch.randn(c, n, positions, outputs), torch.randn(n, positions, inputs))
    _, at_once, done = contracted(jacobians, "traced", n1, c)
    assert done == pytest.approx(at_once.flops, rel=0.01)
    limit_memory(monkeypatch, rows=2**16, columns=2**17)
    _, in_parts, done = contracted(jacobians, "traced", n1, c)
    forming = 2 * c * n * positions * inputs * outputs
    assert done == pytest.approx(in_parts.flops, rel=0.01)
    assert done - at_once.flops < 0.1 * forming  # a set with itself may be divided in another way
    assert in_parts.rows <= 2**16 + 2**17
    assert in_parts.rows < at_once.rows / 2


def test_different_factorisations_are_matched_by_position():
    torch.manual_seed(0)
    embedding = Factored("cnpk,npv->cnvk", (torch.randn(2, 3, 4, 5).double(), torch.randn(3, 4, 6).double()))
    linear = Factored("cno,ni->cnoi", (torch.randn(2, 3, 6).double(), torch.randn(3, 5).double()))
    grouped = Factored("cngo,ngi->cngoi", (torch.randn(2, 3, 2, 3).double(), torch.randn(3, 2, 5).double()))
    dense = [torch.einsum(f.equation, *f.operands).reshape(2, 3, 30) for f in (embedding, linear, grouped)]
    for a, i in zip((embedding, linear, grouped), dense, strict=True):
        for b, j in zip((embedding, linear, grouped), dense, strict=True):
            kernel = torch.zeros(1, 2, 1, 2, 2).double()
            accumulate.add_products({"": kernel}, [("", kernel_einsum(a, b, Roles(free=2)))], kernel.shape, offset=1)
            assert relative_error(kernel[:, :, 0], torch.einsum("cnz,dmz->nmcd", i[:, :1], j[:, 1:])) < 1e-14
