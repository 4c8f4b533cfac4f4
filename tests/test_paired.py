"""Paired samples: the kernel of all pairs where n = m, on every route."""

import pytest
import torch
from cases import BY_NAME, CASES, TiedTransformer
from conftest import (
    COMPUTES,
    ROLES,
    assert_close,
    axes_of,
    exchanged,
    first_samples,
    fully_convolutional,
    kernel_of,
    limit_memory,
    num_samples,
    oracle,
    oracle_sum,
    reduce_axes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, each
from torch import nn

from ggn_ntk import (
    NotFiniteWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_fn,
    explain,
    nngp,
)
from ggn_ntk.contraction.accumulate import add_products
from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.products import kernel_einsum
from ggn_ntk.problem.output_axes import Roles
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

ROUTES = ["structured", "jacobian_contraction", "ntk_vector_products"]


def of_pairs(kernel):
    """What pairs have of a kernel [N1, N2, ...]."""
    return torch.stack([kernel[n, n] for n in range(min(kernel.shape[:2]))])


def build_pairs(case, dtype=torch.float64, device="cpu"):
    model, x1, x2 = case.build(dtype, device)
    n = min(num_samples(x1), num_samples(x2))
    return model, first_samples(x1, slice(n)), first_samples(x2, slice(n))


@pytest.mark.parametrize("case", [*(pytest.param(case, id=case.name) for case in CASES), *each(MODELS)])
def test_structured(case):
    model, x1, x2 = build_pairs(case, torch.float32 if getattr(case, "rounds", False) else torch.float64)
    options = {"method": "structured", "output": case.output, "paired": True}
    kernels = empirical_ntk(model, x1, x2, per_parameter=True, **options)
    for name, expected in oracle(case.name).items():
        assert_close(kernels[name], of_pairs(expected), scale=of_pairs(oracle_sum(case)))
    if case in CASES:
        compute = COMPUTES[CASES.index(case) % 3]
        kernel = empirical_ntk(model, x1, compute=compute, **options)
        assert_close(kernel, of_pairs(oracle_sum(case, symmetric=True, compute=compute))[: len(kernel)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_routes(case):
    model, x1, x2 = build_pairs(case)
    number = CASES.index(case)
    method, compute = ROUTES[1 + number % 2], COMPUTES[number % 3]
    kernel = empirical_ntk(model, x1, x2, compute=compute, method=method, paired=True)
    assert_close(kernel, of_pairs(oracle_sum(case, compute=compute)))


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("tutorial_cnn_small", "tied_transformer", "embedding")], ids=str
)
def test_on_devices(case, method, device):
    model, x1, x2 = build_pairs(case, device=device)
    kernel = empirical_ntk(model, x1, x2, method=method, paired=True)
    assert_close(kernel, of_pairs(oracle_sum(case, device=device)))


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("name", ["tutorial_cnn_small", "tied", "embedding"])
def test_one_set_is_exactly_symmetric(name, method):
    model, x, _ = BY_NAME[name].build()
    kernel = empirical_ntk(model, x, method=method, paired=True)
    assert_close(kernel, of_pairs(oracle_sum(BY_NAME[name], symmetric=True)))
    assert torch.equal(kernel, kernel.mT)
    assert_close(empirical_ntk(model, first_samples(x, slice(1)), method=method, paired=True), kernel[:1])


@pytest.mark.parametrize("roles", ROLES, ids=str)
def test_axes(roles):
    model, x1, x2 = fully_convolutional(), torch.randn(2, 1, 5, 4).double(), torch.randn(2, 1, 5, 4).double()
    expected, axes = of_pairs(reduce_axes(kernel_of(model, x1, x2), roles)), axes_of(roles)
    for method in ROUTES:
        assert_close(empirical_ntk(model, x1, x2, method=method, paired=True, **axes), expected)
    kernel = empirical_ntk(model, x1, paired=True, **axes)
    assert torch.equal(kernel, exchanged(kernel.unsqueeze(0), roles).squeeze(1))
    outputs = nngp(model, x1, x2, paired=True, **axes)
    assert_close(outputs, of_pairs(nngp(model, x1, x2, **axes)))
    both = empirical_kernels(model, x1, x2, paired=True, **axes)
    assert_close(both.ntk, expected)
    assert_close(both.nngp, outputs)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["tutorial_cnn_small", "linear_3d", "tied", "max_pool2d", "embedding"])
def test_samples_and_outputs_a_few_at_a_time(name, symmetric, compute, monkeypatch):
    case = BY_NAME[name]
    model, x1, x2 = build_pairs(case)
    x2 = None if symmetric else x2
    expected = of_pairs(oracle_sum(case, symmetric, compute))[: num_samples(x1)]
    for limits in ({"passing": 8}, {"passing": 4000}, {"rows": 8, "backpropagated": 8, "jacobians": 8}):
        limit_memory(monkeypatch, **limits)
        for method in ROUTES if name == "tied" else ROUTES[:1]:
            kernel = empirical_ntk(model, x1, x2, compute=compute, method=method, paired=True)
            assert_close(kernel, expected)


class Distances(nn.Module):
    """No rule knows the parameter of its second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.centers = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return torch.cdist(self.first(x), self.centers)


@pytest.mark.parametrize("symmetric", [False, True])
def test_parameters_without_a_rule(symmetric, monkeypatch):
    model, x1, x2 = Distances().double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    x2 = None if symmetric else x2
    assert set(explain(model, x1, x2, paired=True).fallback) == {"centers"}
    expected = of_pairs(kernel_of(model, x1, x2))
    for budget in (8, 2**26):
        limit_memory(monkeypatch, jacobians=budget)
        for chunk in (None, 2):
            assert_close(jacobian_contraction(model, x1, x2, paired=True, chunk_size=chunk), expected)
            assert_close(ntk_vector_products(model, x1, x2, paired=True, chunk_size=chunk), expected)
        assert_close(empirical_ntk(model, x1, x2, paired=True, check=True), expected)
        by_module = empirical_ntk(model, x1, x2, paired=True, per_parameter="module")
        assert list(by_module) == ["", "first"]
        assert_close(sum(by_module.values()), expected)


def test_the_kernel_of_one_output_is_that_of_squared_norms():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)).double()
    x = torch.randn(7, 5).double()
    kernel = empirical_ntk(model, x, paired=True)
    params = list(model.parameters())
    norms = [sum(g.square().sum() for g in torch.autograd.grad(model(x[[n]]).sum(), params)) for n in range(7)]
    assert_close(kernel, torch.stack(norms))
    # what depends on pairs of samples is never formed
    contractions = explain(model, x, paired=True).contractions
    assert all("m" not in c.equation for c in contractions)
    assert sum(c.flops for c in contractions) < 7 * 2 * 3 * (5 + 6 + 6 + 1 + 5)


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_samples_that_are_not_finite(method, symmetric):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x1, x2 = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    expected = of_pairs(kernel_of(model, x1, None if symmetric else x2))
    x1[1], x2[3] = torch.nan, torch.inf
    bad = [1] if symmetric else [1, 3]
    with pytest.warns(NotFiniteWarning, match=r"x1\[1\]" if symmetric else r"x1\[1\], x2\[3\]"):
        kernel = empirical_ntk(model, x1, None if symmetric else x2, method=method, paired=True)
    kept = [n for n in range(5) if n not in bad]
    assert kernel[bad].isnan().all()
    assert_close(kernel[kept], expected[kept])
    with pytest.warns(NotFiniteWarning, match=r"Outputs of x1\[1\]"):
        outputs = nngp(model, x1, None if symmetric else x2, paired=True)
    assert outputs[bad].isnan().all()
    assert outputs[kept].isfinite().all()


def test_no_pair_is_finite():
    model, x1, x2 = nn.Linear(4, 3).double(), torch.randn(2, 4).double(), torch.randn(2, 4).double()
    x1[0], x2[1] = torch.nan, torch.nan
    with pytest.warns(NotFiniteWarning):
        kernel = empirical_ntk(model, x1, x2, paired=True)
    assert kernel.shape == (2, 3, 3)
    assert kernel.isnan().all()
    x1[1] = torch.nan
    x2[0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="its gradients are not finite"):
        empirical_ntk(model, x1, x2, paired=True)


@pytest.mark.parametrize("method", ROUTES)
def test_check_compares_the_same_pairs(method):
    model, x1, x2 = build_pairs(BY_NAME["tutorial_cnn_small"])
    kernel = empirical_ntk(model, x1, x2, method=method, paired=True, check=True)
    assert_close(kernel, of_pairs(oracle_sum(BY_NAME["tutorial_cnn_small"])))


@pytest.mark.parametrize("method", ROUTES)
def test_sides_that_are_evaluated_apart(method, compute):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.AdaptiveAvgPool1d(2)).double()
    x1, x2 = torch.randn(3, 4, 3).double(), torch.randn(3, 4, 3).double()
    options = {"compute": compute, "method": method}
    for second, output in ((x2, (None, torch.sin)), (None, (torch.cos, None)), (torch.randn(3, 4, 3).double(), None)):
        kernel = empirical_ntk(model, x1, second, output=output, paired=True, **options)
        assert_close(kernel, of_pairs(empirical_ntk(model, x1, second, output=output, **options)))
    # outputs of different shapes, samples of different lengths
    if compute == "full":
        longer, output = torch.randn(3, 6, 3).double(), (lambda out: out[:, 0], lambda out: out[:, 1:])
        kernel = empirical_ntk(model, x1, longer, output=output, method=method, paired=True, check=True)
        assert kernel.shape == (3, 2, 5, 2)
        assert_close(kernel, of_pairs(empirical_ntk(model, x1, longer, output=output, method=method)))
        outputs = nngp(model, x1, longer, output=output, paired=True)
        assert_close(outputs, of_pairs(nngp(model, x1, longer, output=output)))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_contraction_that_is_played_again(symmetric):
    model, x1, x2 = build_pairs(BY_NAME["tutorial_cnn_small"])
    x2 = None if symmetric else x2
    expected = oracle_sum(BY_NAME["tutorial_cnn_small"], symmetric)[: num_samples(x1), : num_samples(x1)]
    for _ in range(4):
        assert_close(empirical_ntk(model, x1, x2, paired=True), of_pairs(expected))
        assert_close(empirical_ntk(model, x1, x2), expected)
    prepared = empirical_ntk_fn(model, paired=True)
    for _ in range(4):
        assert torch.equal(prepared(x1, x2), empirical_ntk(model, x1, x2, paired=True))


def test_what_nothing_uses_has_a_kernel_of_zeros():
    model = TiedTransformer().double()
    model.unused = nn.Linear(2, 2).double()
    kernels = empirical_ntk(model, torch.randint(7, (3, 4)), paired=True, per_parameter=True, compute="trace")
    assert torch.equal(kernels["unused.weight"], torch.zeros(3).double())


def test_vivit_refuses():
    with pytest.raises(UnsupportedRouteError, match=r"all pairs of samples, of which paired=True takes N.*auto"):
        empirical_ntk(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), method="vivit", paired=True)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 6),
    roles=st.sampled_from(["free", "diagonal", "traced"]),
    formed=st.booleans(),
    offset=st.booleans(),
)
def test_factors_of_any_shape(sizes, roles, formed, offset):
    c, n, positions, inputs, outputs, rows = sizes
    stacked = 2 * n if offset else n
    s, x = torch.randn(c, stacked, positions, outputs).double(), torch.randn(stacked, positions, inputs).double()
    jacobian = Factored("cnpo,npi->cnoi", (s, x))
    whole = torch.einsum(f"{jacobian.equation}", s, x).flatten(2)
    axes = Roles(**{roles: c})
    product = kernel_einsum(jacobian, jacobian, axes, formed=formed, paired=True)
    kernels = {}
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, passing=8 * rows * outputs * inputs)
        options = {"offset": n} if offset else {"symmetric": True}
        add_products(kernels, [("", product)], (n, axes.diagonal, axes.free, axes.free), **options)
    first, second = whole[:, :n], whole[:, stacked - n :]
    expected = {
        "free": lambda: torch.einsum("cnk,dnk->ncd", first, second).unsqueeze(1),
        "diagonal": lambda: torch.einsum("cnk,cnk->nc", first, second)[:, :, None, None],
        "traced": lambda: torch.einsum("cnk,cnk->n", first, second)[:, None, None, None],
    }[roles]()
    assert_close(kernels[""], expected)
