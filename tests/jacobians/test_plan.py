"""Phases as objects: a plan that is made once, the sides it evaluates, and the kernels between two of them."""

from itertools import cycle

import pytest
import torch
from cases import BY_NAME, CASES
from conftest import COMPUTES, assert_close, first_samples, limit_memory
from models import MODELS
from torch import nn

from ggn_ntk import Factored, register_rule
from ggn_ntk.contraction import contract as module
from ggn_ntk.contraction.contract import Wanted, contract
from ggn_ntk.jacobians.plan import make_plans
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction


def plan_for(model, x1, x2, compute="full", output=None, capture="auto"):
    axes = AxesRequest.parse(compute)
    request = Request.parse(model, x1, x2, axes, params=None, per_parameter=False, output=output, capture=capture)
    with isolated(model), torch.no_grad():
        return request, make_plans(request, {}, everyone=False)


def between(request, plans, *sides):
    """The kernel between two sides, of the parameters that do not fall back."""
    first, second = sides if len(sides) == 2 else sides * 2
    wanted = Wanted(plans.axes, plans.request.groups.__getitem__, plans.covered, plans.cancelling)
    return request.assemble(contract(first, second, wanted).items(), plans.axes)


@pytest.mark.parametrize(("case", "compute"), list(zip([*CASES, *MODELS], cycle(COMPUTES))), ids=str)
def test_two_sides_that_were_evaluated_apart(case, compute):
    model, x1, x2 = case.build()
    request, plans = plan_for(model, x1, x2, compute, case.output)
    if not plans.covered:
        pytest.skip("no rule covers any parameter")
    with isolated(model), torch.no_grad():
        first, second = (plans.plans[0].evaluate(x) for x in (request.x1, request.x2))
        kernel = between(request, plans, first, second)
    expected = jacobian_contraction(model, x1, x2, compute=compute, params=plans.covered, output=case.output)
    # Gemma's norms compute in float32.
    assert_close(kernel, expected, scale=1e5 * expected if case.name == "gemma" else expected)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("capture", ["sequential", "autograd"])
@pytest.mark.parametrize("name", ["tutorial_cnn_small", "tied", "embedding"])
def test_a_plan_is_made_once(name, capture, compute):
    """It holds for other samples, and for parameters that have changed since."""
    model, x1, x2 = BY_NAME[name].build()
    request, plans = plan_for(model, x1, x2, compute, capture=capture)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    x = first_samples(x2, slice(2))
    other = Request.parse(model, x, None, request.axes, params=None, per_parameter=False)
    with isolated(model), torch.no_grad():
        kernel = between(other, plans, plans.plans[0].evaluate(other.x1))
    assert_close(kernel, jacobian_contraction(model, x, compute=compute))


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_a_side_walks_back_once_for_each_chunk(capture, monkeypatch):
    limit_memory(monkeypatch, backpropagated=1)
    monkeypatch.setattr(module, "available", lambda device: None)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    x1, x2 = torch.randn(3, 4).double(), torch.randn(2, 4).double()
    request, plans = plan_for(model, x1, x2, capture=capture)
    with isolated(model), torch.no_grad():
        sides = [plans.plans[0].evaluate(x) for x in (request.x1, request.x2)]
        kernel = between(request, plans, *sides)
    assert_close(kernel, jacobian_contraction(model, x1, x2))


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_what_a_pass_has_left_is_an_error(capture):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 4)
    request, plans = plan_for(model, x, None, capture=capture)
    with isolated(model), torch.no_grad():
        side = plans.plans[0].evaluate(request.x1)
        steps = list(side.steps(torch.arange(2), lambda *args: None, again=False))
        assert len(steps) == 2
        for step in steps:
            with pytest.raises(RuntimeError, match="has left this use"):
                step.jacobians()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x):
        return x * self.weight


def fails_for_five_samples(module, x, s):
    if len(x) == 5:
        raise ArithmeticError
    return {"weight": Factored("cnk,nk->cnk", (s, x))}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_a_rule_that_fails_for_one_side_alone(capture, turned):
    """Its parameter is left out of the kernel, and named, whichever side it is."""
    register_rule(Scale)(fails_for_five_samples)
    model = nn.Sequential(nn.Linear(4, 5), Scale(), nn.Linear(5, 2)).double()
    sets = [torch.randn(3, 4).double(), torch.randn(5, 4).double()]
    x1, x2 = sets[::-1] if turned else sets
    request, plans = plan_for(model, x1, x2, capture=capture)
    with isolated(model), torch.no_grad():
        sides = [plans.plans[0].evaluate(x) for x in (request.x1, request.x2)]
        kernel = between(request, plans, *sides)
    assert {name for side in sides for name in side.failures} == {"1.weight"}
    others = [name for name in plans.covered if name != "1.weight"]
    assert_close(kernel, jacobian_contraction(model, x1, x2, params=others))
