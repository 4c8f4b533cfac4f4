"""Uses of parameters, read off autograd's graph: paths to them, weights with graphs of their own, users' rules."""

import pytest
import torch
from conftest import assert_close
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from ggn_ntk import empirical_ntk, explain, register_rule
from ggn_ntk.jacobians.finding import find_uses
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.uses import read
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.rules import rule_for


class Written(nn.Module):
    """A function of parameters and the samples."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function, self.names = function, list(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(x, *(getattr(self, name) for name in self.names))


def calls_of(model, x):
    """The uses of a model's parameters."""
    request = Request.parse(model, x, None, AxesRequest.parse("full"), params=None, per_parameter=False)
    few = [record(request, request.x1[list(range(n))]) for n in (2, 3)]
    return request, read(find_uses(few, request.params), record(request, request.x1))


def expect_covered(model, x1, x2=None, **options):
    found = empirical_ntk(model, x1, x2, method="structured", **options)
    assert_close(found, jacobian_contraction(model, x1, x2, **options))
    assert explain(model, x1, x2, **options).fallback == {}


X1, X2 = torch.randn(4, 5).double(), torch.randn(2, 5).double()


# ---------------------------------------------------------------- paths and weights


PATHS = {
    # a function of x [N, 5], w [5, 5], v [5]; how many Jacobians are written of each, those of weights apart
    "once": (lambda x, w, v: x @ w + v, {"w": 1, "v": 1}),
    "twice in an operation": (lambda x, w, v: x @ (w + w.T) * v, {"w": 2, "v": 1}),
    "as both arguments": (lambda x, w, v: x @ w * w[0] * v, {"w": 2, "v": 1}),
    "four paths": (lambda x, w, v: x @ (w + w.T + w.flip(0).abs() * v + 2 * w), {"w": 0, "v": 0}),
    "sliced, scaled, masked": (
        lambda x, w, v: (x[:, :3] @ w[1:4, ::2].mul(3).masked_fill(w[:3, :3] > 0, 0)) * v[:3],
        {"w": 1, "v": 1},
    ),
    "expanded": (lambda x, w, v: x * v.expand(len(x), -1) + w[0], {"w": 1, "v": 1}),
    "an outer product": (lambda x, w, v: x @ (w * torch.outer(v, v)), {"w": 1, "v": 0}),
    "normalised": (lambda x, w, v: x @ F.normalize(w, dim=1) + v, {"w": 2, "v": 1}),
    "softmax": (lambda x, w, v: x @ w.softmax(1) * v.softmax(0), {"w": 0, "v": 0}),
    "two normalised weights, one of them twice": (
        lambda x, w, v: (x @ w.softmax(1)).tanh() @ F.normalize(w, dim=0) + v,
        {"w": 2, "v": 1},
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_and_weights(name, compute):
    function, counts = PATHS[name]
    model = Written(function, w=(5, 5), v=(5,)).double()
    expect_covered(model, X1, X2, compute=compute)
    expect_covered(model, X1, compute=compute)
    if name not in ("four paths", "an outer product"):  # where several paths may be found
        _, calls = calls_of(model, X1)
        assert {key: sum(name == key for call in calls for name, _ in call.site.paths) for key in counts} == counts


def test_uses_of_a_weight_are_added_up_before_they_pass_its_graph(monkeypatch):
    """Once for all of them, and in one Jacobian."""

    def function(x, w):
        weight = w.softmax(1)
        h = (x @ weight).tanh()
        return (h @ weight).tanh() @ weight.T

    model = Written(function, w=(5, 5)).double()
    _, calls = calls_of(model, X1)
    assert len(calls) == 3
    assert all(not call.names and len(call.weights) == 1 for call in calls)
    assert len({call.weights[0].key for call in calls}) == 1
    (row,) = explain(model, X1).contractions
    assert row.parameter == "w"
    expect_covered(model, X1, X2)


def test_a_weight_of_several_parameters():
    model = Written(lambda x, w, g: x @ (w / w.norm(dim=0) * g).tanh() + (w.T @ w).exp()[0], w=(5, 5), g=(5,)).double()
    expect_covered(model, X1, X2)
    for wanted in (["w"], ["g"]):
        expect_covered(model, X1, X2, params=wanted)


def test_weights_whose_graph_vmap_does_not_pass(monkeypatch):
    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w**3

        @staticmethod
        def backward(ctx, s):
            assert s.sum().item() != 7  # depends on data
            return 3 * ctx.saved_tensors[0] ** 2 * s

    class Net(Written):
        def forward(self, x):
            w, plain = self.w, torch.func.vmap is None
            return x @ (w**3 if plain else Cubed.apply(w))

    model = Net(None, w=(5, 3)).double()
    plain = Written(lambda x, w: x @ w**3, w=(5, 3)).double()
    plain.load_state_dict(model.state_dict())
    assert_close(empirical_ntk(model, X1, X2, method="structured"), jacobian_contraction(plain, X1, X2))
    assert not explain(model, X1, X2).fallback


def test_operations_that_compute_nothing():
    model = Written(lambda x, w, v: (x[:, :0] @ w[:0]).sum(1, keepdim=True) + x * v, w=(5, 5), v=(5,)).double()
    expect_covered(model, X1, X2)
    assert empirical_ntk(model, X1, params=["w"], method="structured").count_nonzero() == 0


# ---------------------------------------------------------------- layers of a user's


class Own(nn.Linear):
    """A layer of a user's."""


@pytest.fixture
def called():
    """Registers a rule for it; for how many samples it was asked."""
    seen, rule = [], rule_for(nn.Linear(1, 1))

    @register_rule(Own)
    def own(module, x, s):
        seen.append(x.shape[0])
        return rule(module, x, s)

    return seen


class With(nn.Module):
    """A layer of a user's, used by a function, with a layer of torch's behind."""

    def __init__(self, function):
        super().__init__()
        self.own, self.head, self.function = Own(5, 4), nn.Linear(4, 2), function
        self.register_buffer("table", torch.randn(4, 5))

    def forward(self, x):
        return self.head(self.function(self, x).tanh())


def exchanged(model, x):
    weights = {"weight": 2 * model.own.weight.flip(0), "bias": model.own.bias.sin()}
    return functional_call(model.own, weights, (x,))


# What is made of the layer, and whether its rule is asked.
USES_OF_OWN = {
    "called": (lambda m, x: m.own(x), True),
    "called twice": (lambda m, x: m.own(x + F.pad(m.own(x).tanh(), (0, 1))), True),
    "sequence first": (lambda m, x: m.own(x.expand(3, -1, -1)).sum(0), True),
    "windows": (lambda m, x: m.own(x.repeat(1, 2).reshape(-1, 5)).reshape(-1, 8)[:, ::2], True),
    "called, and its weight used": (lambda m, x: m.own(x) + F.linear(x, m.own.weight).sin(), True),
    "called for nothing": (lambda m, x: (m.own(x), x[:, :4] * 1.0)[1] + m.own.bias, False),
    "called on constants alone": (lambda m, x: x[:, :4] @ m.own(m.table), False),
    "with exchanged weights": (exchanged, False),
    "its weight alone": (lambda m, x: x @ m.own.weight.T, False),
}


@pytest.mark.parametrize("name", USES_OF_OWN)
@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_rule_of_the_user_takes_precedence_over_the_graph(name, n, called):
    function, asked = USES_OF_OWN[name]
    model = With(function).double()
    expect_covered(model, X1[:n], X2)
    assert bool(called) == asked
    called.clear()
    expect_covered(model, X1[:n])
    assert bool(called) == asked


def test_a_rule_of_the_user_is_not_replaced_by_the_graph_where_it_is_wrong():
    """It is said that it is wrong, though the graph would have told."""
    rule = rule_for(nn.Linear(1, 1))
    register_rule(Own)(lambda module, x, s: rule(module, 1.001 * x, s))
    model = With(lambda m, x: m.own(x)).double()
    fallback = explain(model, X1).fallback
    assert list(fallback) == ["own.weight"]
    assert fallback["own.weight"].startswith("its Jacobian by its rule differs from autograd's")
    assert_close(empirical_ntk(model, X1, method="structured"), jacobian_contraction(model, X1))


def test_a_layer_of_a_user_that_is_called_with_one_sample_at_a_time(called):
    def one(model, x):
        assert len(x) == 1
        return model.own(x)

    expect_covered(With(one).double(), X1[:1])
    assert set(called) == {1}


def test_a_layer_of_a_user_inside_of_another(called):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Own(5, 4)

        def forward(self, x):
            return self.inner(x).sin()

    @register_rule(Outer)
    def outer(module, x, s):
        factored = rule_for(nn.Linear(1, 1))(module.inner, x, s * module.inner(x).cos())
        return {f"inner.{key}": jacobian for key, jacobian in factored.items()}

    model = With(lambda m, x: m.outer(x))
    model.outer, model.own = Outer(), None
    expect_covered(model.double(), X1, X2)
    assert not called


# ---------------------------------------------------------------- any model


T, K = 2, 4

# How a weight [K, K] is made of a parameter of some shape.
MADE = {
    "plain": ((K, K), lambda w: w),
    "transposed": ((K, K), lambda w: w.t()),
    "viewed": ((K * K,), lambda w: w.view(K, K)),
    "permuted": ((2, K, 2), lambda w: w.permute(0, 2, 1).reshape(K, K)),
    "sliced": ((K + 2, 2 * K), lambda w: w[1:-1, ::2]),
    "selected": ((3, K, K), lambda w: w[1]),
    "chunked": ((K, 2 * K), lambda w: w.chunk(2, dim=1)[1]),
    "masked": ((K, K), lambda w: w * torch.ones(K, K, dtype=w.dtype).tril()),
    "filled": ((K, K), lambda w: w.masked_fill(torch.eye(K, dtype=torch.bool), 0.0)),
    "scaled": ((K, K), lambda w: 0.5 * w),
    "expanded": ((1, K), lambda w: w.expand(K, K)),
    "repeated": ((2, K), lambda w: w.repeat(2, 1)),
    "symmetric": ((K, K), lambda w: w + w.t()),
    "nonlinear": ((K, K), lambda w: w.sin()),
    "normalised": ((K, K), lambda w: w / w.norm(dim=1, keepdim=True)),
}


def by_convolution(x, w):
    h = F.conv1d(x.transpose(1, 2), w.unsqueeze(2).expand(-1, -1, 2), padding=1)
    return h[..., :-1].transpose(1, 2)


def by_look_up(x, w):
    return x + F.embedding((x.detach()[..., 0] > 0).long() + 1, w)


# How a weight [K, K] is used on x [A, B, K], of which either of the first two axes is that of the samples.
APPLIED = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w,
    "rows": lambda x, w: (x.reshape(-1, K) @ w).reshape(x.shape),
    "einsum": lambda x, w: torch.einsum("abi,io->abo", x, w),
    "heads": lambda x, w: torch.einsum("abhi,ih->abh", x.unflatten(-1, (2, 2)), w[:2, :2]).repeat(1, 1, 2),
    "batches": lambda x, w: torch.bmm(x, w.expand(len(x), K, K)),
    "conv": by_convolution,
    "mul": lambda x, w: x * w[0],
    "gate": lambda x, w: x * torch.sigmoid(w[:, 1]),
    "add": lambda x, w: x + w.diagonal(),
    "subtract": lambda x, w: 1.5 * w[2] - x,
    "divide": lambda x, w: x / (2 + w[1].square()),
    "embedding": by_look_up,
}

STEPS = st.tuples(st.integers(0, 2), st.sampled_from(sorted(MADE)), st.sampled_from(sorted(APPLIED)), st.booleans())


class Drawn(nn.Module):
    """Steps one after the other, each of which uses a parameter, made and applied in some way."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterDict(
            {f"{place}_{made}": nn.Parameter(torch.randn(MADE[made][0]) / 2) for place, made, *_ in steps}
        )

    def forward(self, x):  # [N, T, K]
        for place, made, applied, time_first in self.steps:
            weight = MADE[made][1](self.weights[f"{place}_{made}"])
            h = x.transpose(0, 1) if time_first and applied != "conv" else x
            h = APPLIED[applied](h, weight)
            x = (h.transpose(0, 1) if time_first and applied != "conv" else h).tanh()
        return x[:, -1, :2]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEPS, min_size=1, max_size=4), n=st.integers(1, 5), m=st.sampled_from([0, 2]))
@example(steps=[(0, "sliced", "add", False), (0, "sliced", "heads", False)], n=1, m=0)  # forms Jacobians without data
def test_any_model_of_raw_parameters(steps, n, m):
    """Wherever parameters are used, and however weights are made of them, rules cover them."""
    torch.manual_seed(0)
    model = Drawn(steps).double()
    x1, x2 = torch.randn(n, T, K).double(), torch.randn(m, T, K).double() if m else None
    expect_covered(model, x1, x2)
