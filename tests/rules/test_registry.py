"""Which rule a layer has, and that each is tested."""

import pytest
from cases import CASES

from ggn_ntk import register_rule
from ggn_ntk.rules import registry


@pytest.mark.parametrize("registered", [registry._RULES, registry._BACKPROPAGATIONS], ids=["rules", "backpropagations"])
def test_every_registered_layer_has_a_case(registered):
    covered = {type(module) for case in CASES for module in case.model().modules()}
    assert not set(registered) - covered


def test_register_rule_takes_layers():
    with pytest.raises(TypeError, match=r"register_rule takes types of torch.nn.Module, got 'Linear'"):
        register_rule("Linear")
