"""Which rule a layer has, and that each is tested."""

import pytest
import torch
from cases import CASES
from conftest import assert_close, kernel_of
from torch import nn

from ggn_ntk import Factored, RouteWarning, empirical_ntk, explain, register_rule
from ggn_ntk.rules import register_rule_by_name, registry
from ggn_ntk.rules.linear import linear

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("registered", [registry._RULES, registry._BACKPROPAGATIONS], ids=["rules", "backpropagations"])
def test_every_registered_layer_has_a_case(registered):
    covered = {type(module) for case in CASES for module in case.model().modules()}
    assert not set(registered) - covered


def test_register_rule_takes_layers():
    with pytest.raises(TypeError, match=r"register_rule takes types of torch.nn.Module, got 'Linear'"):
        register_rule("Linear")


class Layer(nn.Linear):
    """A layer of the user's."""


def test_rules_by_name_take_effect_after_a_look_up(monkeypatch):
    monkeypatch.setattr(registry, "_RULES_BY_NAME", dict(registry._RULES_BY_NAME))
    model, calls = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Layer(4, 2)).double(), []
    assert explain(model, X).fallback.keys() == {"2.weight", "2.bias"}

    @register_rule_by_name(f"{__name__}.Lay*")
    def rule(module, x, s):
        calls.append(module)
        return linear(module, x, s)

    try:
        assert not explain(model, X).fallback
        assert_close(empirical_ntk(model, X), kernel_of(model, X))
        assert calls
        wrong = register_rule_by_name(f"{__name__}.Lay*")(lambda m, x, s: {"weight": Factored("cno,ni->cnoi", (-s, x))})
        with pytest.warns(RouteWarning, match=r"2\.weight"):
            assert_close(empirical_ntk(model, X), kernel_of(model, X))
        assert registry.rule_for(model[2]) is wrong
    finally:
        registry._rule_by_name.cache_clear()
