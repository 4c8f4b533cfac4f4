"""Faults of torch's own gradients are no kernel's."""

import pytest
import torch
from conftest import DEVICES, assert_close, kernel_of
from torch import nn

from ggn_ntk import NTKOperator, UnsupportedModelError, empirical_ntk, empirical_ntk_fn
from ggn_ntk.models import faults

METHODS = ["structured", "vivit", "jacobian_contraction", "ntk_vector_products", "auto"]
ROUTES = {
    **{method: lambda model, x, method=method: empirical_ntk(model, x, method=method) for method in METHODS},
    "autograd": lambda model, x: empirical_ntk(model, x, capture="autograd"),
    "prepared": lambda model, x: empirical_ntk_fn(model)(x),
    "interacting": lambda model, x: empirical_ntk(model, x, interacting=True),
    "operator": lambda model, x: NTKOperator(model, x) @ torch.ones(len(x) * 2, dtype=x.dtype, device=x.device),
}


def network(pool, size=4):
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), pool, nn.Flatten(), nn.Linear(3 * size**2, 2))


def images(layout=torch.channels_last):
    return torch.randn(3, 2, 7, 7).contiguous(memory_format=layout)


@pytest.mark.parametrize("route", ROUTES)
def test_wrong_gradients_of_padded_pooling_are_refused(route, monkeypatch):
    monkeypatch.setattr(faults, "_pools_wrongly", lambda device: True)
    model = network(nn.AvgPool2d(3, 2, padding=1))
    with pytest.raises(
        UnsupportedModelError, match=r"gradient of avg_pool2d with padding wrong on cpu .* Update torch"
    ):
        ROUTES[route](model, images())
    ROUTES[route](model, images(torch.contiguous_format))
    ROUTES[route](network(nn.AvgPool2d(3, 2), 3), images())


def test_pooling_along_one_axis_is_pooling_along_two(monkeypatch):
    monkeypatch.setattr(faults, "_pools_wrongly", lambda device: True)

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return nn.functional.avg_pool1d(self.layer(x).mT, 2, 1, 1).flatten(1)

    with pytest.raises(UnsupportedModelError, match="avg_pool2d with padding"):
        empirical_ntk(Sequences(), torch.randn(3, 5, 4))


@pytest.mark.parametrize("route", ["structured", "autograd", "jacobian_contraction", "ntk_vector_products"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_padded_pooling_is_right_or_refused(device, layout, route):
    model, x = network(nn.AvgPool2d(3, 2, padding=1)), images(layout)
    expected = kernel_of(model, x)
    model, x = model.to(device), x.to(device)
    wrong = faults._pools_wrongly(x.device)
    assert not wrong or device == "cuda"
    if wrong and layout is torch.channels_last:
        with pytest.raises(UnsupportedModelError, match="avg_pool2d with padding"):
            ROUTES[route](model, x)
    else:
        assert_close(ROUTES[route](model, x), expected)
