"""x1 and x2 evaluated apart: other shapes, and other outputs, on the two sides."""

import re

import pytest
import torch
from cases import moved
from conftest import COMPUTES, assert_close, fully_convolutional, limit_memory, loop_jacobians, mapped, reduced, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import (
    NotFiniteWarning,
    UnsupportedModelError,
    empirical_kernels,
    empirical_ntk,
    explain,
    nngp,
    shared,
)
from ggn_ntk.contraction import contract
from ggn_ntk.problem.errors import UnsupportedRouteError

ROUTES = [
    {"capture": "autograd"},
    {"method": "auto"},
    {"method": "jacobian_contraction"},
    {"method": "ntk_vector_products"},
]


class Pooled(nn.Module):
    """Attention over tokens of which some are padding; the mean of those that are not."""

    def __init__(self):
        super().__init__()
        self.embedding, self.block = (
            nn.Embedding(7, 4),
            nn.TransformerEncoderLayer(4, 2, 5, dropout=0, batch_first=True),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, tokens, padding):
        h = self.head(self.block(self.embedding(tokens), src_key_padding_mask=padding))
        return h.masked_fill(padding.unsqueeze(-1), 0).sum(1) / (~padding).sum(1, keepdim=True)


class Unrolled(nn.Module):
    """A recurrent network written as a loop, in which parameters are used once for each token."""

    def __init__(self):
        super().__init__()
        self.w, self.u, self.head = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            h = torch.tanh(self.w(step) + self.u(h))
        return self.head(h)


class Scaled(nn.Module):
    """Has a parameter that no rule covers, and one that falls back for one form of the input alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.rand(4))
        self.power = nn.Parameter(torch.rand(4))

    def forward(self, x):
        h = self.layer(x)
        if x.ndim > 2:
            h = h.abs().add(1).pow(self.power).mean(1)
        return torch.logsumexp(h * self.scale.cumsum(0), -1, keepdim=True) * self.scale + self.power


def pooled_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )


def tokens(n, length):
    padding = torch.zeros(n, length, dtype=torch.bool)
    padding[0, length - 1] = length > 1
    return {"tokens": torch.randint(7, (n, length)), "padding": padding}


def images(n, height, width):
    return torch.randn(n, 1, height, width).double()


# A model, x1 and x2.
CASES = {
    "attention": (seeded(Pooled), lambda: (tokens(3, 5), tokens(2, 3))),
    "recurrent": (seeded(Unrolled), lambda: (torch.randn(2, 4, 2).double(), torch.randn(3, 1, 2).double())),
    "images": (seeded(pooled_net), lambda: (images(3, 5, 4), images(2, 3, 6))),
    "one_sample": (seeded(pooled_net), lambda: (images(1, 5, 4), images(3, 4, 4))),
    "one_output": (
        seeded(lambda: nn.Sequential(*pooled_net()[:-1], nn.Linear(2, 1), nn.Flatten(0))),
        lambda: (images(2, 5, 4), images(1, 4, 4)),
    ),
    "fallback": (seeded(Scaled), lambda: (torch.randn(3, 3).double(), torch.randn(2, 4, 3).double())),
    "fallback_first": (seeded(Scaled), lambda: (torch.randn(2, 4, 3).double(), torch.randn(3, 3).double())),
}


def kernels_of(model, x1, x2, outputs=(None, None)):
    """Each parameter's kernel [N1, N2, *out1, *out2] by a loop over samples and outputs."""
    out1, out2 = (shape_of(model, x, output) for x, output in zip((x1, x2), outputs, strict=True))
    first, second = (loop_jacobians(model, x, output) for x, output in zip((x1, x2), outputs, strict=True))
    return {
        name: torch.einsum("ncp,mdp->nmcd", j, second[name]).reshape(len(j), len(second[name]), *out1, *out2)
        for name, j in first.items()
    }


def shape_of(model, x, output):
    found = model(**x) if isinstance(x, dict) else model(x)
    return (found if output is None else output(found)).shape[1:]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(
    ("name", "route"),
    [
        *((name, route) for name in CASES for route in ROUTES[:2]),
        *((name, route) for name in ("images", "recurrent", "fallback") for route in ROUTES[2:]),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x.values())),
)
@pytest.mark.filterwarnings(
    "ignore:Jacobians of .* loop over samples", "ignore:.* Jacobian contraction instead of prod"
)
def test_unequal_shapes(name, route, compute):
    build, inputs = CASES[name]
    model, (x1, x2) = build(), inputs()
    expected = {key: reduced(kernel, compute) for key, kernel in kernels_of(model, x1, x2).items()}
    total = sum(expected.values())
    assert_close(empirical_ntk(model, x1, x2, compute=compute, check=True, **route), total)
    kernels = empirical_ntk(model, x1, x2, compute=compute, per_parameter=True, **route)
    assert list(kernels) == list(expected)
    for key, kernel in kernels.items():
        assert_close(kernel, expected[key], scale=total)


# ---------------------------------------------------------------- outputs of other shapes


@pytest.mark.parametrize("route", [*ROUTES, {"capture": "sequential"}], ids=lambda route: next(iter(route.values())))
def test_unequal_outputs(route):
    model, x1, x2 = seeded(fully_convolutional)(), images(2, 5, 4), images(3, 3, 5)
    expected = kernels_of(model, x1, x2)
    kernel = empirical_ntk(model, x1, x2, check=True, **route)
    assert kernel.shape == (2, 3, 2, 3, 2, 2, 1, 3)
    assert_close(kernel, sum(expected.values()))
    for name, kernel in empirical_ntk(model, x1, x2, per_parameter=True, **route).items():
        assert_close(kernel, expected[name], scale=sum(expected.values()))


@settings(deadline=None, max_examples=8)
@given(
    n1=st.integers(1, 3), n2=st.integers(1, 3), sizes=st.tuples(*[st.integers(3, 4)] * 4), budget=st.integers(1, 999)
)
def test_outputs_in_chunks(n1, n2, sizes, budget):
    model, x1, x2 = seeded(fully_convolutional)(), images(n1, *sizes[:2]), images(n2, *sizes[2:])
    expected = sum(kernels_of(model, x1, x2).values())
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, backpropagated=8 * budget)
        patch.setattr(contract, "available", lambda device: None)
        for capture in ("autograd", "sequential"):
            assert_close(empirical_ntk(model, x1, x2, capture=capture), expected)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"compute": "trace"}, r"compute='trace' pair"),
        ({"compute": "diagonal"}, r"compute='diagonal' pair"),
        ({"trace_axes": (0, 1)}, "trace_axes and diagonal_axes pair"),
    ],
)
@pytest.mark.parametrize("function", [empirical_ntk, nngp, explain])
def test_outputs_that_have_no_pairs(function, arguments, what):
    model = seeded(fully_convolutional)()
    message = rf"{what}.* x2, but their shapes differ: \[2, 3, 2\] and \[2, 1, 2\], without the sample axis"
    with pytest.raises(ValueError, match=message):
        function(model, images(2, 5, 4), images(2, 3, 4), **arguments)


@pytest.mark.parametrize("route", ROUTES)
def test_axes_where_others_differ(route):
    model, x1, x2 = seeded(fully_convolutional)(), images(2, 5, 4), images(2, 3, 4)
    full = sum(kernels_of(model, x1, x2).values())  # [2, 2, 2, 3, 2, 2, 1, 2]
    kernel = empirical_ntk(model, x1, x2, trace_axes=0, diagonal_axes=-1, **route)
    assert_close(kernel, torch.einsum("nmchwcvw->nmhwv", full))


@pytest.mark.parametrize("size", [500, 1000, 2000, 4000])
def test_axes_where_others_differ_a_few_outputs_at_a_time(size, monkeypatch):
    model, x1, x2 = seeded(fully_convolutional)(), images(2, 5, 4), images(2, 4, 4)
    full = sum(kernels_of(model, x1, x2).values())  # [2, 2, 2, 3, 2, 2, 2, 2]
    limit_memory(monkeypatch, backpropagated=size)
    monkeypatch.setattr(contract, "available", lambda device: None)
    kernel = empirical_ntk(model, x1, x2, trace_axes=0, diagonal_axes=-1)
    assert_close(kernel, torch.einsum("nmchwcvw->nmhwv", full))


def test_outputs_of_two_dtypes():
    model = seeded(nn.Linear, 3, 2)()
    with pytest.raises(
        ValueError, match=r"Outputs of x1 are torch.float64, and of x2 torch.float32: bring them to one"
    ):
        empirical_ntk(model, torch.randn(2, 3).double(), output=(None, torch.Tensor.float))


# ---------------------------------------------------------------- other outputs on the two sides


class Field(nn.Module):
    """u(x), and by its side the residual of a differential equation: u'' + u."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.layers(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return {"u": u, "r": torch.cat([ddu + u, du], 1)}


class Transformed(Field):
    """The same, by torch.func."""

    def forward(self, x):
        def u(x):
            return self.layers(x).squeeze(-1)

        du = torch.func.grad(u)
        value, slope, curvature = (
            torch.func.vmap(f)(x) for f in (u, du, lambda x: torch.func.grad(lambda x: du(x).sum())(x))
        )
        return {"u": value.unsqueeze(1), "r": torch.cat([curvature + value.unsqueeze(1), slope], 1)}


def pick(key):
    return lambda found: found[key]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: next(iter(route.values())))
@pytest.mark.parametrize("kind", [Field, Transformed])
@pytest.mark.filterwarnings(
    "ignore:Jacobians of .* loop over samples", "ignore:.* Jacobian contraction instead of prod"
)
def test_two_outputs(kind, route, symmetric):
    model, x1 = seeded(kind)(), torch.randn(3, 1).double()
    x2 = None if symmetric else torch.randn(2, 1).double()
    outputs = pick("u"), pick("r")
    expected = kernels_of(model, x1, x1 if symmetric else x2, outputs)
    kernel = empirical_ntk(model, x1, x2, output=outputs, check=True, **route)
    assert kernel.shape == (3, 3 if symmetric else 2, 1, 2)
    assert_close(kernel, sum(expected.values()))
    for name, kernel in empirical_ntk(model, x1, x2, output=outputs, per_parameter=True, **route).items():
        assert_close(kernel, expected[name], scale=sum(expected.values()))


@pytest.mark.parametrize(
    ("output", "given"),
    [((None,), r"\(NoneType\)"), ((None, 3), r"\(NoneType, int\)"), ([None, None], "list"), ("u", "str")],
)
def test_what_is_no_pair(output, given):
    with pytest.raises(
        TypeError, match=f"output must be a callable or None, or a pair of these for x1 and x2, got {given}"
    ):
        empirical_ntk(nn.Linear(2, 2), torch.randn(2, 2), output=output)


def test_equal_outputs_are_one():
    model, x = seeded(nn.Linear, 2, 2)(), torch.randn(3, 2).double()
    expected = empirical_ntk(model, x, output=torch.tanh)
    assert torch.equal(empirical_ntk(model, x, output=(torch.tanh, torch.tanh)), expected)
    assert torch.equal(
        empirical_ntk(model, x, output=(None, None), method="vivit"), empirical_ntk(model, x, method="vivit")
    )


# ---------------------------------------------------------------- what samples share, NaN, other functions


class Operator(nn.Module):
    """A function of samples u at points that they share."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk = nn.Linear(3, 4), nn.Linear(1, 4)

    def forward(self, u, points, sign=1):
        return sign * self.branch(u).tanh() @ self.trunk(points).tanh().T


def test_samples_of_the_two_sets_share_other_values():
    model, u = seeded(Operator)(), torch.randn(3, 3).double()
    points, others = torch.randn(4, 1).double(), torch.randn(2, 1).double()
    x1, x2 = {"u": u, "points": shared(points), "sign": 1}, {"u": u[:2], "points": shared(others), "sign": -1}
    at = [lambda _: model(u, points), lambda _: model(u[:2], others, -1)]
    first, second = (jacobian(model, f(None)) for f in at)
    assert_close(empirical_ntk(model, x1, x2, check=True), torch.einsum("ncp,mdp->nmcd", first, second))


def jacobian(model, outputs):
    """The Jacobian [N, C, P] of outputs [N, C]."""
    rows = [torch.autograd.grad(entry, [*model.parameters()], retain_graph=True) for entry in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*outputs.shape, -1)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: next(iter(route.values())))
@pytest.mark.parametrize("bad", [([0, 2], [1]), ([0, 1, 2], [0])], ids=str)
def test_samples_that_are_not_finite_on_every_route(route, bad):
    test_samples_that_are_not_finite(bad, False, **route)


@pytest.mark.parametrize("bad", [([], [1]), ([0, 2], []), ([1], [0]), ([], [0, 1])], ids=str)
@pytest.mark.parametrize("per_parameter", [False, True])
def test_samples_that_are_not_finite(bad, per_parameter, **route):
    model, x1, x2 = seeded(pooled_net)(), images(3, 4, 4), images(2, 3, 5)
    kernel = empirical_ntk(model, x1, x2, per_parameter=per_parameter)
    for x, samples in zip((x1, x2), bad, strict=True):
        x[samples] = torch.nan
    names = ", ".join(f"x{i}[{n}]" for i, samples in enumerate(bad, 1) for n in samples)
    with pytest.warns(NotFiniteWarning, match=re.escape(f"Jacobians of {names} are not finite")):
        found = empirical_ntk(model, x1, x2, per_parameter=per_parameter, **route)
    for one, expected in zip(*([k.values() if per_parameter else [k] for k in (found, kernel)]), strict=True):
        expected[bad[0]], expected[:, bad[1]] = torch.nan, torch.nan
        assert torch.equal(one.isnan(), expected.isnan())
        assert_close(one.nan_to_num(), expected.nan_to_num())


def test_nothing_is_finite():
    model, x = seeded(pooled_net)(), torch.nan * images(1, 4, 4)
    with pytest.raises(UnsupportedModelError, match="its gradients are not finite"):
        empirical_ntk(model, x, x[..., :3])


def test_samples_that_influence_one_another_are_named_by_their_set():
    class Mixed(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if y.ndim == 2 else y.mean(1) - 0.1 * y[:1].mean(1)

    with pytest.raises(UnsupportedModelError, match=r"outputs of x2\[1\], x2\[2\] change by"):
        empirical_ntk(Mixed(2, 2), torch.randn(2, 2), torch.randn(3, 4, 2))


def test_other_functions():
    model, x1, x2 = seeded(fully_convolutional)(), images(2, 5, 4), images(3, 3, 5)
    expected = torch.einsum("nchw,mdij->nmchwdij", model(x1), model(x2)).detach()
    assert_close(nngp(model, x1, x2), expected)
    for method in ("auto", "jacobian_contraction"):
        both = empirical_kernels(model, x1, x2, method=method)
        assert_close(both.nngp, expected)
        assert torch.equal(both.ntk, empirical_ntk(model, x1, x2, method=method))
    x1[0], x2[2] = torch.nan, torch.inf
    with pytest.warns(NotFiniteWarning, match=r"Outputs of x1\[0\], x2\[2\] are not finite"):
        kernel = nngp(model, x1, x2)
    assert_close(kernel[1:, :2], expected[1:, :2])
    assert kernel[0].isnan().all()
    assert kernel[:, 2].isnan().all()


def test_vivit_takes_one_side():
    model, x1, x2 = seeded(pooled_net)(), images(2, 5, 4), images(3, 3, 5)
    for arguments in ({"method": "vivit"}, {"method": "vivit", "output": (None, torch.tanh)}):
        with pytest.raises(UnsupportedRouteError, match=r"differ in form|not its last layer's output"):
            empirical_ntk(model, x1, x2, **arguments)


def test_explanation():
    model, x1, x2 = seeded(pooled_net)(), images(2, 5, 4), images(3, 3, 5)
    both, one = explain(model, x1, x2), explain(model, x1, x1)
    assert [c.parameter for c in both.contractions] == [c.parameter for c in one.contractions]
    assert both.places == one.places
    assert both.capture == "sequential"
    pair = explain(Field(), torch.randn(3, 1), output=(pick("u"), pick("r")))
    assert {c.parameter for c in pair.contractions} == {name for name, _ in Field().named_parameters()}
    assert not pair.fallback


def test_a_parameter_that_falls_back_for_one_side():
    model, (x1, x2) = CASES["fallback"][0](), CASES["fallback"][1]()
    for one, fallback in (((x1,), set()), ((x2,), {"power"}), ((x1, x2), {"power"}), ((x2, x1), {"power"})):
        assert set(explain(model, *one).fallback) == fallback


@pytest.mark.parametrize("name", ["attention", "images"])
def test_on_other_devices(name, device):
    build, inputs = CASES[name]
    model, (x1, x2) = build(), inputs()
    expected = sum(kernels_of(model, x1, x2).values())
    x1, x2 = (mapped(lambda t: t.to(device), x) for x in (x1, x2))
    for options in ({}, {"method": "jacobian_contraction"}, {"compute": "trace"}):
        kernel = empirical_ntk(moved(model, device), x1, x2, **options)
        assert_close(kernel, reduced(expected, options.get("compute", "full")))
