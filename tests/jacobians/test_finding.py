"""Which tensors depend on samples, and where these are, as the graphs of a few tell."""

import pytest
import torch
from conftest import assert_close, first_samples
from models import CrossAttention, with_memory
from torch import nn
from torch.nn import functional as F

from ggn_ntk import empirical_ntk, explain
from ggn_ntk.jacobians.finding import find_uses
from ggn_ntk.jacobians.recording import record
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.rules.flow import SampleAxis


class Written(nn.Module):
    """A function of a weight and the samples."""

    def __init__(self, function, *shape):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.weight)


def uses_of(model, x, sizes=(2, 3)):
    """Find uses in the graphs of the first samples."""
    request = Request.parse(model, x, None, AxesRequest.parse("full"), params=None, per_parameter=False)
    few = [record(request, request.x1[[i % len(request.x1) for i in range(n)]]) for n in sizes]
    return find_uses(few, request.params)


def axes_of(uses):
    return [site.samples for site in uses.sites]


def expect_right(model, *sets, covered=True):
    for x1 in (sets[0], first_samples(sets[0], slice(1))):
        found = empirical_ntk(model, x1, *sets[1:], method="structured")
        assert_close(found, jacobian_contraction(model, x1, *sets[1:]))
        fallback = explain(model, x1, *sets[1:]).fallback
        assert bool(fallback) != covered, fallback


def turned(x):
    return x.transpose(0, 1)


# For samples [N, 3, 4] and a weight [4, 4]: the axis of the samples where both meet.
PLACES = {
    "rows, samples first": (lambda x, w: (x.reshape(-1, 4) @ w).reshape(len(x), 3, 4), SampleAxis(0, 1, 3)),
    "rows, time first": (lambda x, w: turned((turned(x).reshape(-1, 4) @ w).reshape(3, -1, 4)), SampleAxis(0, 3, 1)),
    "rows between others": (
        lambda x, w: turned((x.reshape(-1, 3, 2, 2).permute(2, 0, 1, 3).reshape(-1, 2) @ w[:2]).reshape(2, -1, 12)),
        SampleAxis(0, 2, 3),
    ),
    "one row of each": (lambda x, w: x[:, 1] @ w, SampleAxis(0, 1, 1)),
    "columns": (lambda x, w: (w @ x[:, 1].T).T, SampleAxis(1, 1, 1)),
    "second axis": (lambda x, w: turned(turned(x) * w[0]), SampleAxis(1, 1, 1)),
    "last axis": (lambda x, w: (x.permute(1, 2, 0) * w[:, :1]).permute(2, 0, 1), SampleAxis(2, 1, 1)),
    "matrices": (lambda x, w: x.flatten(1)[:, :4] * w.diagonal(), SampleAxis(0, 1, 1)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [4, 3, 12])  # as many as features, as positions, as both
def test_where_samples_are(place, n):
    function, axis = PLACES[place]
    model, x = Written(function, 4, 4).double(), torch.randn(n, 3, 4).double()
    assert axes_of(uses_of(model, x)) == [axis]
    expect_right(model, x, torch.randn(2, 3, 4).double())


@pytest.mark.parametrize("first", ["samples", "time"])
@pytest.mark.parametrize("silent", [[], [0], [1], [2], [0, 2], [1, 2]])
@pytest.mark.parametrize("places", [[0], [1], [2], [0, 1], [0, 2]])
def test_rows_of_which_few_reach_the_output(first, silent, places):
    """Which entries pass a gradient tells whose they are: few of them leave that open for two samples."""

    def function(x, w):
        kept = x[:, 0, :1] > 0
        x = x if first == "samples" else turned(x)
        h = (x.reshape(-1, 4) @ w).reshape(*x.shape[:2], 4).tanh()
        return (h if first == "samples" else turned(h))[:, places].sum(1) * kept

    x = torch.rand(6, 3, 4).double()
    x[silent, 0, 0] = -1
    model = Written(function, 4, 4).double()
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))
    # Where two of the three that are looked at pass no gradient at all, the third may leave it open.
    assert silent == [1, 2] or not explain(model, x).fallback


def test_keys_of_samples_that_attend_to_one_alone():
    """They pass no gradient to it: which rows are theirs shows in the graph of more samples."""
    torch.manual_seed(0)
    model, x = CrossAttention(kdim=6, vdim=6).double(), with_memory(3)
    x = tuple(t.double() if t.is_floating_point() else t for t in x)
    for k in range(3):
        order = [*range(k, 3), *range(k)]
        turned_on = tuple(t[order] for t in x)
        assert not explain(model, turned_on).fallback
        assert_close(empirical_ntk(model, turned_on), jacobian_contraction(model, turned_on))


def test_what_is_as_large_for_more_samples_depends_on_none():
    model = Written(lambda x, w: x @ (w.T @ w).tanh() * w.sum() + torch.arange(4.0).double() @ w, 4, 4).double()
    uses = uses_of(model, torch.randn(3, 4).double())
    assert axes_of(uses) == [SampleAxis(0)] * 3
    assert not uses.problems
    expect_right(model, torch.randn(4, 4).double())


def test_two_axes_that_grow_are_not_told_apart():
    model = Written(lambda x, w: (x @ w).unsqueeze(0).expand(len(x), -1, -1).diagonal().T, 4, 4).double()
    expect_right(model, torch.randn(3, 4).double())
    both = Written(lambda x, w: (torch.ones(len(x), len(x)).double().unsqueeze(2) * x * w).diagonal().T, 4).double()
    assert list(uses_of(both, torch.randn(3, 4).double()).problems) == ["weight"]
    assert (
        "samples are not told apart in an output [2, 2, 4] of mul"
        in explain(both, torch.randn(3, 4).double()).fallback["weight"]
    )
    assert_close(
        empirical_ntk(both, x := torch.randn(3, 4).double(), method="structured"), jacobian_contraction(both, x)
    )


# ---------------------------------------------------------------- graphs that differ


def by_number(limit):
    """The same, in another way for more samples."""

    def function(x, w):
        return F.linear(x, w).tanh() if len(x) <= limit else (x @ w.T).tanh() * 1.0

    return function


@pytest.mark.parametrize("n", [5, 8])
def test_graphs_of_few_samples_and_of_all_differ(n):
    model = Written(by_number(4), 3, 4).double()
    x = torch.randn(n, 4).double()
    assert not uses_of(model, x).problems
    assert not explain(model, x).fallback
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_graphs_of_few_samples_differ():
    """From there on nothing is known of the graph; what is used elsewhere, is."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Written(by_number(2), 3, 4), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(x).sin())

    model, x = Net().double(), torch.randn(4, 4).double()
    assert list(uses_of(model, x).problems) == ["body.weight"]
    fallback = explain(model, x).fallback
    assert list(fallback) == ["body.weight"]
    assert fallback["body.weight"].startswith("the graph of more samples differs at ")
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_the_graph_of_one_sample_is_not_that_of_two():
    def function(x, w):
        return F.linear(x[0], w).sin().unsqueeze(0) if len(x) == 1 else F.linear(x, w).sin()

    expect_right(Written(function, 3, 4).double(), torch.randn(4, 4).double())
    expect_right(Written(function, 3, 4).double(), torch.randn(4, 4).double(), torch.randn(1, 4).double())


# ---------------------------------------------------------------- models that take one sample at a time


class OneByOne(nn.Module):
    """Takes a single sample at a time: without its axis, with it as another, or with it in front."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.scale, self.kind = nn.Linear(4, 4), nn.Parameter(torch.rand(3, 4)), kind
        self.head = nn.Linear(4, 2)

    def forward(self, x):  # [1, 3, 4]
        if len(x) != 1:
            raise ValueError("one sample at a time")
        h = x if self.kind == "front" else x.transpose(0, 1) if self.kind == "second" else x[0]
        scale = self.scale.unsqueeze(1) if self.kind == "second" else self.scale
        h = (self.inner(h) * scale).tanh()
        h = self.head(h)
        return h.sum({"front": 1}.get(self.kind, 0)).reshape(1, 2)


@pytest.mark.parametrize("kind", ["front", "second", "none"])
def test_models_that_take_one_sample_at_a_time(kind, compute):
    model, x = OneByOne(kind).double(), torch.randn(1, 3, 4).double()
    assert not explain(model, x).fallback
    options = {"compute": compute}
    assert_close(empirical_ntk(model, x, method="structured", **options), jacobian_contraction(model, x, **options))


def test_running_out_of_memory_is_no_reason_to_look_at_one_sample(monkeypatch):
    class Large(OneByOne):
        def forward(self, x):
            if len(x) != 1:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    with pytest.raises(torch.OutOfMemoryError):
        empirical_ntk(Large("front").double(), torch.randn(1, 3, 4).double(), method="structured")
