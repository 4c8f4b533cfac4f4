"""What the structured route compares with autograd, and where a few samples stand for all."""

import pytest
import torch
from cases import CASES, cast
from conftest import assert_close, call
from torch import Tensor, nn

from ggn_ntk import Factored, RouteWarning, empirical_ntk, register_rule
from ggn_ntk.jacobians import trial
from ggn_ntk.jacobians.plan import make_plans
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.rules import registry
from ggn_ntk.rules.registry import acts_on_each_sample

KNOWN = {kind for kind in (*registry._RULES, *registry._BACKPROPAGATIONS) if kind.__module__.startswith("torch.nn.")}


def uses(case, n):
    """The layers that are known, with their inputs for some samples."""
    model, found = case.build()[0], []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: found.append((module, [x.detach().clone() for x in args]))
        )
        for module in model.modules()
        if acts_on_each_sample(module)
    ]
    torch.manual_seed(1)
    call(model, cast(case.inputs(n), torch.float64, "cpu"))
    for handle in handles:
        handle.remove()
    return found


SEQUENTIAL = [case for case in CASES if case.sequential]


@pytest.mark.parametrize("case", SEQUENTIAL, ids=str)
def test_layers_said_to_act_on_each_sample_do(case):
    """In values and in gradients, of each sample by itself."""
    for module, args in uses(case, 7):
        wanted = [t.requires_grad_() for t in (*args, *module.parameters()) if t.is_floating_point()]
        y = module(*(x.clone() for x in args))  # for layers that work in place
        v = torch.randn_like(y)
        together = torch.autograd.grad(y, wanted, v) if wanted else ()
        apart = [torch.zeros_like(t) for t in wanted]
        for i in range(len(y)):
            y_i = module(*(x[i : i + 1].clone() for x in args))
            torch.testing.assert_close(y_i, y[i : i + 1], rtol=1e-12, atol=1e-13)
            for total, g in zip(apart, torch.autograd.grad(y_i, wanted, v[i : i + 1]) if wanted else (), strict=True):
                total += g
        torch.testing.assert_close(list(together), apart, rtol=1e-11, atol=1e-12)


def test_every_known_layer_is_looked_at():
    seen = {type(module) for case in SEQUENTIAL for module, _ in uses(case, 2)}
    assert KNOWN - seen <= {nn.MultiheadAttention}


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.Flatten(), True),
        (nn.Flatten(0), False),
        (nn.Flatten(-2), False),
        (nn.Unflatten(1, (2, 3)), True),
        (nn.Unflatten(0, (1, -1)), False),
        (nn.Unflatten(-2, (1, -1)), False),
        (nn.MultiheadAttention(2, 1), False),
        (nn.Softmax(0), False),
    ],
)
def test_layers_that_may_move_samples_are_not_known(layer, known):
    assert acts_on_each_sample(layer) == known


def looks_at_everyone(model, x, **options):
    request = Request.parse(model, x, None, AxesRequest.parse("full"), params=None, per_parameter=False, **options)
    with isolated(model), torch.no_grad():
        return make_plans(request, {}, everyone=False).verifications[0].everyone


class Own(nn.Linear):
    pass


def test_a_few_samples_stand_for_all_where_nothing_else_acts_on_them():
    x = torch.randn(20, 5)
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    assert not looks_at_everyone(nn.Sequential(*layers), x)
    assert looks_at_everyone(nn.Sequential(*layers), x, capture="autograd")
    assert looks_at_everyone(nn.Sequential(layers[0], nn.Softmax(1), layers[2]), x)
    layers[1].register_forward_hook(lambda module, args, output: output)
    assert looks_at_everyone(nn.Sequential(*layers), x)


class Half(nn.Module):
    """Scales features; its rule is wrong where the first of them is large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def wrong_rule(module, x, s):
    return {"weight": Factored("cnk,nk->cnk", (s, torch.where(x[:, :1] > 1, x * 1.5, x)))}


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
@pytest.mark.parametrize("flagged", [[3], [0, 199], [*range(50, 59)]])
def test_a_rule_that_is_wrong_for_few_samples(capture, flagged):
    register_rule(Half)(wrong_rule)
    model = nn.Sequential(Half(), nn.Linear(4, 2)).double()
    x = torch.rand(200, 4).double()
    x[flagged, 0] = 2
    with pytest.warns(RouteWarning, match="0.weight: its Jacobian by its rule differs"):
        kernel = empirical_ntk(model, x, compute="trace", capture=capture)
    assert_close(kernel, torch.einsum("nmcc->nm", jacobian_contraction(model, x)))


class Difference(nn.Module):
    """The difference of two passes through a network."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) - self.net(0.999 * x)


def cancelling(model, *sets):
    request = Request.parse(model, *sets, AxesRequest.parse("full"), params=None, per_parameter=False)
    with isolated(model), torch.no_grad():
        return make_plans(request, {}, everyone=False).cancelling


def test_jacobians_that_cancel_are_no_chance_of_the_vectors_they_are_compared_with(monkeypatch):
    """Formed for no reason, Jacobians take a thousand times as long."""
    net = nn.Sequential(nn.Conv2d(1, 40, 3), nn.Tanh(), nn.Flatten(), nn.Linear(40 * 36, 50))
    x = torch.randn(3, 1, 8, 8)
    # The Jacobians of biases are formed when their uses are put together.
    assert cancelling(Difference(net), x, None) == {"net.0.weight", "net.3.weight"}
    monkeypatch.setattr(trial, "norm_of_sketch", lambda sketch, param: sketch.new_zeros(()))
    assert not cancelling(net, x, None)
