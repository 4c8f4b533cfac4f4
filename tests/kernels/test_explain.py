"""What explain says is what the route does."""

import pytest
import torch
from cases import BY_NAME, CustomParameter, Residual, mlp
from torch import nn

from ggn_ntk import UnsupportedModelError, explain


def wide_mlp():
    return nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 4))


def test_gram_matrices_for_wide_layers():
    explanation = explain(wide_mlp(), torch.randn(6, 300), torch.randn(5, 300))
    assert explanation.method == "structured"
    assert [c.parameter for c in explanation.contractions] == ["2.weight", "2.bias", "0.weight", "0.bias"]
    weight = explanation.contractions[2]
    assert weight.layer == "Linear"
    assert len(weight.order) == 3
    # the Gram matrices of x and of s, and their product
    assert weight.flops == 2 * 6 * 5 * 300 + 2 * (6 * 4) * (5 * 4) * 200 + 6 * 5 * 4 * 4
    assert weight.memory == 4 * 6 * 5 * 4 * 4


def test_jacobians_for_convolutions():
    model, x1, x2 = BY_NAME["tutorial_cnn_small"].build(torch.float32)
    by_name = {c.parameter: c for c in explain(model, x1, x2).contractions}
    assert by_name["2.weight"].layer == "Conv2d"
    assert len(by_name["2.weight"].order) == 3
    assert by_name["2.bias"].flops == 2 * 4 * 3 * 10 * 10 * 4  # positions are summed first


def test_uses_of_one_form_are_contracted_together():
    model, x1, _ = BY_NAME["tied"].build()
    assert [c.parameter for c in explain(model, x1).contractions].count("0.weight") == 1
    model, x1, _ = BY_NAME["tied_embedding"].build()  # a look-up and a product
    assert [c.parameter for c in explain(model, x1).contractions].count("0.weight") == 4


def test_printed():
    printed = str(explain(mlp(nn.Tanh)(), torch.randn(3, 5), compute="trace")).splitlines()
    assert printed[0] == "method: structured, capture: sequential; rules cover 79 of 79 parameter entries (100.0%)"
    assert printed[1].split() == ["parameter", "layer", "GFLOP", "MB", "order", "of", "contraction"]
    assert printed[2].startswith("4.weight   Linear")
    assert printed[-1].startswith("total")


def test_other_models():
    x = torch.randn(3, 5)
    explanation = explain(Residual(), x)
    assert (explanation.method, explanation.capture) == ("structured", "autograd")
    uses = [c.parameter.split(".") for c in explanation.contractions]
    assert [layer for layer, _ in uses] == ["head", "head", "second", "second", "first", "first"]
    assert [{name for _, name in uses[i : i + 2]} for i in (0, 2, 4)] == [{"weight", "bias"}] * 3


def test_parameters_of_no_layer_are_covered():
    explanation = explain(CustomParameter(), torch.randn(3, 5))
    assert not explanation.fallback
    assert explanation.covered == explanation.entries == 26
    assert {"scale", "temperature"} <= {c.parameter for c in explanation.contractions}


class Unknown(torch.autograd.Function):
    """An operation for which there is no rule."""

    @staticmethod
    def forward(ctx, x, scale, shift):
        ctx.save_for_backward(x, scale)
        return x * scale + shift

    @staticmethod
    def backward(ctx, s):
        x, scale = ctx.saved_tensors
        return s * scale, (s * x).sum(0), s.sum(0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)
        self.scale, self.shift = nn.Parameter(torch.rand(2)), nn.Parameter(torch.rand(2))

    def forward(self, x):
        return Unknown.apply(self.layer(x), self.scale, self.shift)


def test_the_fallback_is_printed():
    explanation = explain(Custom(), torch.randn(3, 5))
    assert explanation.fallback == dict.fromkeys(["scale", "shift"], "there is no rule for UnknownBackward")
    assert (explanation.covered, explanation.entries) == (12, 16)
    assert str(explanation).splitlines()[-2:] == [
        "  - scale: there is no rule for UnknownBackward",
        "  - shift: there is no rule for UnknownBackward",
    ]


def test_models_that_take_another_route():
    x = torch.randn(3, 5)
    explanation = explain(Residual(), x, capture="sequential")
    assert explanation.method == "jacobian_contraction"
    assert str(explanation).startswith("method: jacobian_contraction, since:")
    assert "Residual may compute between its modules" in str(explanation)
    with pytest.raises(UnsupportedModelError):
        explain(Residual(), x, method="structured", capture="sequential")


def test_methods_without_a_choice():
    with pytest.raises(ValueError, match=r"method must be 'auto' or 'structured'.* got 'vivit'"):
        explain(mlp(nn.Tanh)(), torch.randn(3, 5), method="vivit")


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_compute_is_all_axes_in_one_role(capture):
    model, x1, x2 = BY_NAME["output_image"].build()
    for compute, axes in [("trace", {"trace_axes": (0, 1, 2)}), ("diagonal", {"diagonal_axes": [0, -1, 1]})]:
        by_compute = explain(model, x1, x2, compute=compute, capture=capture)
        assert explain(model, x1, x2, capture=capture, **axes) == by_compute
        assert sum(c.flops for c in by_compute.contractions) < sum(c.flops for c in explain(model, x1, x2).contractions)


def test_params_are_selected():
    explanation = explain(wide_mlp(), torch.randn(3, 300), params=["0.bias"])
    assert [c.parameter for c in explanation.contractions] == ["0.bias"]
