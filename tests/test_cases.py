"""The list of cases itself."""

import torch
from backpack.custom_module.branching import SumModule
from backpack.custom_module.pad import Pad
from backpack.custom_module.scale_module import ScaleModule
from backpack.custom_module.slicing import Slicing
from cases import CASES
from torch.nn.modules.loss import _Loss

from ggn_ntk.extensions.limits import VIVIT_LAYERS


def test_enough_cases_with_different_names():
    assert len({case.name for case in CASES}) == len(CASES) >= 30


def test_every_layer_of_vivit_has_a_case():
    made_by_backpacks_converter = {SumModule, Pad, ScaleModule, Slicing}
    layers = {layer for layer in VIVIT_LAYERS if not issubclass(layer, _Loss)} - made_by_backpacks_converter
    covered = {type(module) for case in CASES if case.vivit for module in case.model().modules()}
    assert not layers - covered


def test_building_a_case_draws_no_global_random_numbers():
    state = torch.get_rng_state()
    CASES[0].build()
    assert torch.equal(state, torch.get_rng_state())
