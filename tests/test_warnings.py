"""What gives way says so with the reason, what is a bug comes through, and a refused model is probed once."""

import warnings

import pytest
import torch
from cases import CASES, Shift, TiedTransformer, mlp, normal, tokens
from conftest import assert_close, kernel_of
from models import (
    MODELS,
    Branches,
    Checkpointed,
    CrossAttention,
    Recurrent,
    Scaled,
    UsedFunctionally,
    each,
    with_memory,
)
from torch import nn

from ggn_ntk import (
    Factored,
    NotFiniteWarning,
    RouteWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_vivit,
    explain,
    register_rule,
)
from ggn_ntk.kernels import ntk
from ggn_ntk.problem.errors import Problem
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products
from ggn_ntk.rules.linear import linear

LOOP = "come from a loop over samples and outputs: exact, but slower, since torch.func does not go through the model"
PRODUCTS = "is computed by Jacobian contraction instead of products, since torch.func does not go through the model"
RULE = "Its kernel comes from Jacobians of each sample instead: exact, but slower"
GIVES_WAY = "method='auto' takes 'jacobian_contraction'"


def caught(function, *args, **kwargs):
    """What a call returns, and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [w for w in found if issubclass(w.category, RouteWarning | NotFiniteWarning)]


class Writing(nn.Module):
    """Rescales its weight at each call, which the structured route refuses."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            self.body.weight.div_(self.body.weight.norm())
        return self.head(self.body(x).tanh())


class WritingLate(nn.Module):
    """The same to the weight of its last layer, with attention in between."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            self.head.weight.clamp_(-0.2, 0.2)
        return self.head(self.block(x)).sum(1)


REFUSED = [
    pytest.param(Writing, normal(5), "body.weight", id="first"),
    pytest.param(WritingLate, normal(3, 4), "head.weight", id="last"),
]


def written(model, x):
    """The model with the values that its forward pass leaves."""
    with torch.no_grad():
        model(x)
    return model


# ---------------------------------------------------------------- auto


@pytest.mark.parametrize("case", [*(pytest.param(case, id=case.name) for case in CASES), *each(MODELS)])
def test_auto_takes_the_structured_route(case):
    """Or says that it does not."""
    model, x1, x2 = case.build(torch.float32 if getattr(case, "rounds", False) else torch.float64)
    request = {"output": case.output}
    auto, found = caught(empirical_ntk, model, x1, x2, **request)
    assert not [w for w in found if GIVES_WAY in str(w.message)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RouteWarning)
        assert torch.equal(auto, empirical_ntk(model, x1, x2, method="structured", **request))


@pytest.mark.parametrize(("build", "inputs", "name"), REFUSED)
@pytest.mark.parametrize("function", [empirical_ntk, empirical_kernels], ids=lambda f: f.__name__)
def test_auto_gives_way_with_the_reason(build, inputs, name, function):
    model, x1, x2 = build().double(), inputs(3).double(), inputs(2).double()
    with pytest.raises(UnsupportedRouteError, match=f"{name}: its forward pass writes to it") as info:
        function(model, x1, x2, method="structured")
    with pytest.warns(RouteWarning, match=GIVES_WAY) as found:
        result = function(model, x1, x2)
    (warning,) = [w for w in found if GIVES_WAY in str(w.message)]
    assert str(info.value) in str(warning.message)
    assert warning.filename == __file__
    kernel = result if isinstance(result, torch.Tensor) else result.ntk
    assert_close(kernel, kernel_of(written(model, x1), x1, x2))


@pytest.mark.parametrize("check", [False, True])
def test_auto_gives_way_for_a_route_error(monkeypatch, check):
    def refused(request):
        raise UnsupportedRouteError([Problem("2", "it is blue", "Paint it")], "structured empirical NTK")

    model, x1, x2 = mlp(nn.Tanh)().double(), torch.randn(3, 5).double(), torch.randn(2, 5).double()
    monkeypatch.setitem(ntk._ROUTES, ntk.Method.STRUCTURED, refused)
    reason = "No structured empirical NTK of this model:\n  - 2: it is blue. Paint it."
    with pytest.warns(RouteWarning) as found:
        kernel = empirical_ntk(model, x1, x2, check=check)
    assert_close(kernel, kernel_of(model, x1, x2))
    (warning,) = found
    assert reason in str(warning.message)
    assert "'jacobian_contraction', which is slower" in str(warning.message)
    assert warning.filename == __file__
    for kwargs in ({"method": "structured"}, {"capture": "autograd"}, {"capture": "sequential"}):
        with pytest.raises(UnsupportedRouteError, match="2: it is blue"):
            empirical_ntk(model, x1, x2, **kwargs)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        NotImplementedError("a bug"),
        ArithmeticError("a bug"),
        AssertionError("a bug"),
        KeyError("a bug"),
        ValueError("a bug"),
        TypeError("a bug"),
        IndexError("a bug"),
        torch.linalg.LinAlgError("a bug"),
        UnsupportedModelError([Problem("", "a bug", "Mend it")]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["route", "contraction", "rule"])
def test_other_errors_come_through(monkeypatch, error, where):
    def failing(*args, **kwargs):
        raise error

    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    if where == "rule":  # the one place that may fail: its parameters come from elsewhere, with a warning
        register_rule(nn.Linear)(failing)
        with pytest.warns(RouteWarning, match="a bug"):
            assert_close(empirical_ntk(model, x), kernel_of(model.double(), x.double()))
        return
    if where == "route":
        monkeypatch.setitem(ntk._ROUTES, ntk.Method.STRUCTURED, failing)
    else:
        monkeypatch.setattr("ggn_ntk.contraction.accumulator.add_products", failing)
    with pytest.raises(type(error), match="a bug") as info:
        empirical_ntk(model, x)
    assert info.value is error or isinstance(error, UnsupportedModelError)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, ArithmeticError])
@pytest.mark.parametrize("method", ["auto", "structured", "jacobian_contraction", "ntk_vector_products"])
def test_errors_of_the_model_come_through(error, method):
    class Failing(nn.Linear):
        def forward(self, x):
            raise error("of the user")

    with pytest.raises(error, match="of the user"):
        empirical_ntk(nn.Sequential(nn.Linear(5, 4), Failing(4, 2)), torch.randn(3, 5), method=method)


# ---------------------------------------------------------------- torch.func gives way to a loop


class Looping(nn.Module):
    """Takes rows one by one, which vmap does not go through."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.stack([self.body(row) if row.sum() > 0 else self.body(-row).sin() for row in x]))


class Unhooked(nn.Module):
    """A parameter held in a list beside its module: torch.func computes with the wrong one."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
        self.kept = [self.body.weight]

    def forward(self, x):
        return self.head((x @ self.kept[0].T + self.body.bias).tanh())


NOT_MAPPED = [
    pytest.param(Looping, normal(5), id="control_flow"),
    pytest.param(Unhooked, normal(5), id="parameter_elsewhere"),
    pytest.param(lambda: Recurrent(nn.LSTM), normal(3, 3), id="lstm"),
    pytest.param(lambda: Checkpointed(False), normal(5), id="checkpoint"),
]
MAPPED = [
    pytest.param(mlp(nn.Tanh), normal(5), id="mlp"),
    pytest.param(Scaled, normal(5), id="scaled"),
    pytest.param(lambda: TiedTransformer().eval(), tokens(4), id="transformer"),
    pytest.param(lambda: CrossAttention().eval(), with_memory, id="attention"),
]


def doubled(x):
    if isinstance(x, tuple):
        return tuple(map(doubled, x))
    return x.double() if x.is_floating_point() else x


ON_ROUTES = [
    ("jacobian_contraction", [LOOP]),
    ("ntk_vector_products", [PRODUCTS, LOOP]),
]


@pytest.mark.parametrize(("method", "texts"), ON_ROUTES)
@pytest.mark.parametrize(("build", "inputs"), NOT_MAPPED)
@pytest.mark.parametrize("symmetric", [False, True], ids=["pair", "symmetric"])
def test_a_loop_is_announced(build, inputs, method, texts, symmetric):
    model, x1, x2 = build().double(), doubled(inputs(3)), None if symmetric else doubled(inputs(2))
    kernel, found = caught(empirical_ntk, model, x1, x2, method=method)
    assert_close(kernel, kernel_of(model, x1, x2))
    assert [text for text in texts for w in found if text in str(w.message)] == texts
    assert len(found) == len(texts)
    assert {w.filename for w in found} == {__file__}


@pytest.mark.parametrize("function", [jacobian_contraction, ntk_vector_products])
@pytest.mark.parametrize(("build", "inputs"), NOT_MAPPED)
def test_a_loop_of_the_oracle_is_announced(build, inputs, function):
    model, x = build().double(), doubled(inputs(3))
    with pytest.warns(RouteWarning, match=LOOP) as found:
        assert_close(function(model, x), kernel_of(model, x))
    assert {w.filename for w in found} == {__file__}


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products", "auto"])
@pytest.mark.parametrize(("build", "inputs"), MAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_nothing_is_announced_where_all_is_well(build, inputs, method, dtype):
    model, x = build().double(), doubled(inputs(3))
    expected = kernel_of(model, x)
    x = tuple(t.to(dtype) if t.is_floating_point() else t for t in (x if isinstance(x, tuple) else (x,)))
    kernel, found = caught(empirical_ntk, model.to(dtype), x, method=method, check=True)
    assert not [str(w.message) for w in found]
    assert_close(kernel, expected)


def test_reentrant_checkpoints_are_nothing_to_announce():
    model, x = Checkpointed(False).double(), torch.randn(3, 5).double()
    expected = kernel_of(model, x)
    model.use_reentrant = True
    for method in ("auto", "jacobian_contraction", "ntk_vector_products"):
        kernel, found = caught(empirical_ntk, model, x, method=method, check=True)
        assert not found
        assert_close(kernel, expected)


@pytest.mark.parametrize(("build", "inputs"), NOT_MAPPED)
def test_the_structured_route_announces_a_loop_for_what_it_leaves(build, inputs):
    """The fallback alone comes from torch.func: a warning names its parameters, and no others."""
    model, x = build().double(), doubled(inputs(3))
    fallback = explain(model, x).fallback
    kernel, found = caught(empirical_ntk, model, x)
    assert_close(kernel, kernel_of(model, x))
    assert len(found) == bool(fallback)
    for warning in found:
        named = str(warning.message).partition(" come from")[0].removeprefix("Jacobians of ").split(", ")
        assert named == list(fallback)
        assert LOOP in str(warning.message)


@pytest.mark.parametrize(("build", "inputs"), NOT_MAPPED)
def test_what_the_check_does_is_not_said_of_the_kernel(build, inputs):
    """The structured route computes no products, so none give way."""
    model, x = build().double(), doubled(inputs(3))
    _, expected = caught(empirical_ntk, model, x)
    kernel, found = caught(empirical_ntk, model, x, check=True)
    assert_close(kernel, kernel_of(model, x))
    assert not [str(w.message) for w in found if PRODUCTS in str(w.message)]
    assert {str(w.message) for w in expected} <= {str(w.message) for w in found}


# ---------------------------------------------------------------- wrong rules


class Layer(nn.Linear):
    """A layer of the user's."""


class Squared(nn.Module):
    """A layer of the user's that squares its input for flagged samples."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.where(x[:, :1] > 1.5, x**2, x) * self.weight


def negated(module, x, s):
    return linear(module, x, s) | {"weight": Factored("cno,ni->cnoi", (-s, x))}


def unsquared(module, x, s):
    return {"weight": Factored("cnk,nk->cnk", (s, x))}


def with_layer(layer, plain):
    layers = [nn.Linear(5, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double() if plain else Wrapped(nn.Sequential(*layers)).double()


class Wrapped(nn.Module):
    """A model that is no Sequential."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("plain", [True, False], ids=["walk", "autograd"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["pair", "symmetric"])
def test_a_wrong_rule_is_announced(plain, symmetric):
    register_rule(Layer)(negated)
    model = with_layer(Layer(4, 4), plain)
    x1, x2 = torch.randn(3, 5).double(), None if symmetric else torch.randn(2, 5).double()
    kernel, found = caught(empirical_ntk, model, x1, x2)
    assert_close(kernel, kernel_of(model, x1, x2))
    (warning,) = found
    assert RULE in str(warning.message)
    assert str(warning.message).startswith(f"{'' if plain else 'model.'}2.weight: its Jacobian by its rule")
    assert warning.filename == __file__


@pytest.mark.parametrize("plain", [True, False], ids=["walk", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_rule_wrong_for_three_of_200_is_announced(plain, dtype):
    register_rule(Squared)(unsquared)
    model = with_layer(Squared(), plain)
    with torch.no_grad():
        model.get_parameter(f"{'' if plain else 'model.'}0.weight")[0] = torch.tensor([1.0, 0, 0, 0, 0])
        model.get_parameter(f"{'' if plain else 'model.'}0.bias")[0] = 0
    (model if plain else model.model)[1] = nn.Hardtanh(-3, 3)
    x = torch.randn(200, 5).double()
    x[:, 0] = 0
    x[[17, 100, 163], 0] = 2
    expected = kernel_of(model, x)
    kernel, found = caught(empirical_ntk, model.to(dtype), x.to(dtype))
    assert_close(kernel, expected)
    assert [RULE in str(w.message) for w in found] == [True]


def test_no_rule_is_wrong_on_other_routes():
    register_rule(Layer)(negated)
    model, x = with_layer(Layer(4, 4), True), torch.randn(3, 5).double()
    for method in ("jacobian_contraction", "ntk_vector_products"):
        kernel, found = caught(empirical_ntk, model, x, method=method, check=True)
        assert_close(kernel, kernel_of(model, x))
        assert not found


def test_rules_of_this_package_are_not_called_wrong():
    """Where a layer is used in a way that its rule does not have, that is no fault of the rule."""
    for build, inputs in ((UsedFunctionally, normal(5)), (Branches, normal(4)), (Scaled, normal(5))):
        model, x = build().double(), inputs(4).double()
        kernel, found = caught(empirical_ntk, model, x)
        assert_close(kernel, kernel_of(model, x))
        assert not found


def test_a_rule_that_fails_is_announced_with_its_error():
    @register_rule(Shift)
    def failing(module, x, s):
        raise ZeroDivisionError("of the rule")

    for plain in (True, False):
        model = nn.Sequential(nn.Linear(5, 5), Shift(), nn.Tanh(), nn.Linear(5, 2)).double()
        model, x = model if plain else Wrapped(model), torch.randn(3, 5).double()
        with pytest.warns(RouteWarning, match=r"1\.shift: .*of the rule.* exact, but slower"):
            assert_close(empirical_ntk(model, x), kernel_of(model, x))


# ---------------------------------------------------------------- a refused model is probed once


class Counting(nn.Module):
    """Counts its evaluations."""

    count = 0

    def __init__(self, mixes=None, writes=False):
        super().__init__()
        self.body, self.head, self.mixes, self.writes = nn.Linear(5, 4), nn.Linear(4, 2), mixes, writes

    def forward(self, x):
        Counting.count += 1
        if self.writes:
            with torch.no_grad():
                self.body.weight.clamp_(-0.3, 0.3)
        h = self.body(x).tanh()
        return self.head(h if self.mixes is None else self.mixes(h))


def evaluations(function, *args, **kwargs):
    Counting.count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RouteWarning)
        try:
            function(*args, **kwargs)
        except UnsupportedModelError as error:
            return Counting.count, error
    return Counting.count, None


MIXING = [
    lambda h: h - h.mean(0),
    lambda h: h + torch.rand(()),
    lambda h: (h, None),
    lambda h: h.bfloat16().to(h.dtype),
    lambda h: h.detach(),
]


@pytest.mark.parametrize("mixes", MIXING[:4], ids=["mean", "random", "tuple", "half"])
def test_a_refused_model_is_probed_once(mixes):
    """By ``auto`` as often as by the route that refuses it."""
    model, x = Counting(mixes), torch.randn(6, 5)
    if mixes is MIXING[2]:
        model.head = nn.Identity()
        model.head.forward = lambda h: h
    counts = {method: evaluations(empirical_ntk, model, x, method=method) for method in ("structured", "auto")}
    assert counts["auto"][0] == counts["structured"][0]
    assert str(counts["auto"][1]) == str(counts["structured"][1])
    assert isinstance(counts["auto"][1], UnsupportedModelError)
    assert not isinstance(counts["auto"][1], UnsupportedRouteError)


@pytest.mark.parametrize("method", ["auto", "structured", "vivit", "jacobian_contraction", "ntk_vector_products"])
def test_what_shows_in_the_configuration_takes_no_evaluation(method):
    model = Counting()
    model.dropout = nn.Dropout(0.3)
    count, error = evaluations(empirical_ntk, model, torch.randn(6, 5), method=method)
    assert count == 0
    assert "dropout: Dropout drops activations at random" in str(error)


def test_a_model_that_one_route_refuses_is_refused_early():
    """Before anything is passed back or compared: a few evaluations, whatever the number of samples."""
    counts = [
        evaluations(empirical_ntk, Counting(writes=True), torch.randn(n, 5), method="structured")[0] for n in (4, 64)
    ]
    assert max(counts) <= 12
    model, x = Counting(writes=True), torch.randn(8, 5)
    together, _ = evaluations(empirical_ntk, model, x)
    apart = sum(evaluations(empirical_ntk, model, x, method=m)[0] for m in ("structured", "jacobian_contraction"))
    assert together == apart


# ---------------------------------------------------------------- messages


def test_equal_problems_are_one_line():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.2)) for _ in range(4)))
    with pytest.raises(UnsupportedModelError) as info:
        empirical_ntk(model, torch.randn(3, 5))
    head, *lines = str(info.value).splitlines()
    assert head == "No empirical NTK of this model:"
    assert len(lines) == 2
    assert lines[0].startswith("  - 0.1, 1.1, 2.1, 3.1: BatchNorm1d normalises by batch statistics")
    assert lines[1].startswith("  - 0.2, 1.2, 2.2, 3.2: Dropout drops activations at random")
    assert [p.where for p in info.value.problems] == [f"{i}.{j}" for i in range(4) for j in (1, 2)]


@pytest.mark.parametrize("count", [8, 9, 10, 60])
def test_many_modules_are_counted(count):
    model = nn.Sequential(nn.Linear(5, 3), *(nn.Dropout(0.1) for _ in range(count)))
    with pytest.raises(UnsupportedModelError) as info:
        empirical_ntk(model, torch.randn(3, 5))
    _, line = str(info.value).splitlines()
    names = line.removeprefix("  - ").partition(":")[0]
    shown = names.partition(" and ")[0].split(", ")
    assert shown == [str(i + 1) for i in range(len(shown))]
    others = f" and {count - len(shown)} others" if count > len(shown) else ""
    assert names == ", ".join(shown) + others
    assert len(info.value.problems) == count
    assert len(line) < 200


def test_equal_problems_of_vivit_are_one_line():
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    for function in (empirical_ntk_vivit, lambda *args: empirical_ntk(*args, method="vivit")):
        with pytest.raises(UnsupportedRouteError, match="1, 3: ViViT has no extension for GELU") as info:
            function(model, torch.randn(3, 5))
        assert str(info.value).count("GELU") == 1


@pytest.mark.parametrize(
    "function", [empirical_ntk, jacobian_contraction, ntk_vector_products, explain, empirical_kernels]
)
def test_a_wrong_name_lists_close_ones(function):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(40)))
    with pytest.raises(ValueError, match=r"params names '17\.0\.wieght', which the model does not have") as info:
        function(model, torch.randn(3, 5), params=["17.0.wieght"])
    message = str(info.value)
    assert "17.0.weight" in message.partition("close are: ")[2]
    assert len(message.splitlines()) == 1
    assert len(message) < 400


@pytest.mark.parametrize("name", ["", "xyz", "7", "model.0.weight", "Weight"])
def test_a_name_unlike_any_other(name):
    model = mlp(nn.Tanh)()
    with pytest.raises(ValueError, match=r"which the model does not have\. It has: 0\.weight, 0\.bias") as info:
        empirical_ntk(model, torch.randn(3, 5), params=["0.bias", name])
    assert len(str(info.value)) < 250


def test_warnings_point_at_the_line_of_the_call():
    def call(model, x):
        return empirical_ntk(model, x)

    model, x = Writing().double(), torch.randn(3, 5).double()
    with torch.no_grad(), pytest.warns(RouteWarning, match=GIVES_WAY) as found:
        call(model, x)
    (warning,) = [w for w in found if GIVES_WAY in str(w.message)]
    assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno + 1)


def test_not_finite_samples_are_announced_once():
    model, x = mlp(nn.Tanh)().double(), torch.randn(6, 5).double()
    x[2, 0] = torch.nan
    for method in ("auto", "structured", "jacobian_contraction", "ntk_vector_products"):
        with pytest.warns(NotFiniteWarning, match=r"Jacobians of x1\[2\] are not finite: NaN in the kernel") as found:
            kernel = empirical_ntk(model, x, method=method)
        assert len(found) == 1
        assert found[0].filename == __file__
        good = [0, 1, 3, 4, 5]
        assert_close(kernel[good][:, good], kernel_of(model, x[good]))
        assert kernel[2].isnan().all()
        assert kernel[:, 2].isnan().all()
