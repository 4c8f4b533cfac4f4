"""The structured route: blocks of samples, rules of users, and the probe that trusts no rule."""

import pytest
import torch
from cases import BY_NAME, CASES
from conftest import COMPUTES, assert_close, limit_memory, oracle_sum
from covering import covers
from torch import nn

from ggn_ntk import Factored, UnsupportedModelError, empirical_ntk, explain, register_rule
from ggn_ntk.contraction import accumulator
from ggn_ntk.jacobians import sequential
from ggn_ntk.jacobians.backward import identity
from ggn_ntk.jacobians.layers import Use, backpropagate
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.rules import register_backpropagation


def test_the_capture_suits_the_model(case):
    model, x1, x2 = case.build()
    if case.sequential:
        assert_close(empirical_ntk(model, x1, x2, capture="sequential"), oracle_sum(case))
        return
    with pytest.raises(UnsupportedModelError, match="No structured empirical NTK"):
        empirical_ntk(model, x1, x2, capture="sequential")


@pytest.mark.parametrize("case", [case for case in CASES if case.vivit], ids=str)
def test_agrees_with_vivit(case):
    model, x1, x2 = case.build()
    structured = empirical_ntk(model, x1, x2, method="structured")
    assert_close(structured, empirical_ntk(model, x1, x2, method="vivit"))


# ---------------------------------------------------------------- samples and outputs a few at a time


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "name", ["tutorial_cnn_small", "linear_3d", "tied", "conv2d_options", "max_pool2d", "embedding"]
)
def test_blocks_of_samples(name, symmetric, compute, monkeypatch):
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    large = 10**6
    for rows, columns, pairs in [(1, 1, 1), (500, 1, large), (1, 500, large), (large, large, 1), (large, large, 500)]:
        limit_memory(monkeypatch, rows=8 * rows, columns=8 * columns, passing=8 * pairs)
        kernel = empirical_ntk(model, x1, None if symmetric else x2, compute=compute, method="structured")
        assert_close(kernel, oracle_sum(case, symmetric, compute))


@covers(
    {
        "case": [case for case in CASES if case.sequential],
        "compute": COMPUTES,
        "symmetric": [False, True],
        "waiting": [0, 2**26],
    }
)
def test_layers_on_a_few_samples_at_a_time(case, compute, symmetric, waiting, monkeypatch):
    limit_memory(monkeypatch, passing=8, waiting=8 * waiting)
    model, x1, x2 = case.build()
    kernel = empirical_ntk(model, x1, None if symmetric else x2, compute=compute, method="structured")
    assert_close(kernel, oracle_sum(case, symmetric, compute))


def test_blocks_of_samples_wait_as_jacobians_or_as_s(monkeypatch):
    kept = []
    put = sequential._Link._keep
    limit_memory(monkeypatch, passing=4)
    monkeypatch.setattr(sequential._Link, "_keep", lambda link, *args: put(link, *args) or kept.append(link))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2), nn.ReLU(), nn.Linear(2, 2))
    empirical_ntk(model, torch.randn(2, 1, 8, 8), torch.randn(3, 1, 8, 8), method="structured")
    by_layer = {type(link.use.module): link for link in kept}
    assert by_layer[nn.Linear]._s.numel == 2 * 5 * 2  # [C, N, O]: less than a Jacobian
    assert by_layer[nn.Conv2d]._s.numel == 0
    assert by_layer[nn.Conv2d].waiting == 2 * 5 * (2 * 9 + 2)  # the Jacobians of weight and bias


def test_s_is_kept_once_up_to_the_last_nonlinearity():
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)]
    x, uses = torch.randn(4, 2, 6, 6), []
    for layer in layers:
        uses.append(Use(layer, x, {}))
        x = layer(x)
    with torch.no_grad():
        s = identity(x)
        for use in reversed(uses):
            assert s.stride(1) == 0
            s = backpropagate(use, s)
        assert s.stride(1) == 0
        assert s.shape == (5, 4, 2, 6, 6)
        assert backpropagate(Use(nn.Tanh(), torch.randn(4, 2, 6, 6), {}), s).stride(1) != 0


def test_nothing_passes_below_the_first_wanted_parameter(monkeypatch):
    class Untouched(nn.Tanh):
        def forward(self, x):
            if x.requires_grad:
                pytest.fail("differentiated")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(5, 4), Untouched(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    x = torch.randn(3, 5)
    expected = jacobian_contraction(model, x)
    torch.testing.assert_close(empirical_ntk(model, x, method="structured"), expected)


# ---------------------------------------------------------------- rules of users, and wrong ones


class Scale(nn.Module):
    """A layer of a user."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.weight * x


def scale_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), Scale(), nn.Tanh(), nn.Linear(4, 2)).double()


def test_a_layer_of_the_users_own():
    model, x = scale_net(), torch.randn(3, 5).double()
    with pytest.raises(UnsupportedModelError, match=r"1: no rule is registered for Scale.*register_rule\(Scale\)"):
        empirical_ntk(model, x, capture="sequential")
    assert not explain(model, x).fallback

    @register_rule(Scale)
    def scale(module, x, s):
        return {"weight": Factored("cnk,nk->cnk", (s, x))}

    assert_close(empirical_ntk(model, x, capture="sequential"), jacobian_contraction(model, x))


@pytest.mark.parametrize("factor", [1.001, 0.0, -2.0])
def test_a_wrong_rule_is_caught(factor):
    @register_rule(Scale)
    def scale(module, x, s):
        return {"weight": Factored("cnk,nk->cnk", (factor * s, x))}

    model, x = scale_net(), torch.randn(3, 5).double()
    (why,) = explain(model, x, capture="sequential").fallback.values()
    assert "its Jacobian by its rule differs from autograd's" in why
    assert_close(empirical_ntk(model, x, capture="sequential"), jacobian_contraction(model, x))


def test_a_wrong_backpropagation_is_caught():
    @register_backpropagation(Scale)
    def wrong(module, x, s):
        return 2 * s

    @register_rule(Scale)
    def scale(module, x, s):
        return {"weight": Factored("cnk,nk->cnk", (s, x))}

    model, x = scale_net(), torch.randn(3, 5).double()
    assert set(explain(model, x, capture="sequential").fallback) == {"0.weight", "0.bias"}
    assert_close(empirical_ntk(model, x, capture="sequential"), jacobian_contraction(model, x))


def test_batch_statistics_behind_the_back_of_the_checks():
    class Sneaky(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = nn.Sequential(nn.Linear(5, 4), Sneaky(), nn.Linear(4, 2))
    for n in (2, 6):
        with pytest.raises(UnsupportedModelError, match="samples influence one another"):
            empirical_ntk(model, torch.randn(n, 5), method="structured")
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(nn.Sequential(nn.Linear(5, 4), nn.Softmax(0)), torch.randn(2, 5), capture="sequential")


def test_a_layer_with_children_and_nothing_wanted_is_a_layer():
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).requires_grad_(False).double()
    model = nn.Sequential(nn.Linear(5, 4).double(), block, nn.Flatten(), nn.Linear(8, 2).double()).eval()
    x = torch.randn(3, 2, 5).double()
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))
    block.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match="1: TransformerEncoderLayer may compute between its modules"):
        empirical_ntk(model, x, capture="sequential")
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_layers_of_users_that_work_in_place():
    class SinInPlace(nn.Module):
        def forward(self, x):
            return x.sin_()

    model, x = nn.Sequential(nn.Linear(5, 4), SinInPlace(), nn.Linear(4, 2)).double(), torch.randn(3, 5).double()
    expected = jacobian_contraction(nn.Sequential(model[0], Function(torch.sin), model[2]), x)
    assert_close(empirical_ntk(model, x, method="structured"), expected)


class Function(nn.Module):
    """Applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_keyword_arguments():
    model, x = nn.Sequential(nn.Linear(5, 2)), torch.randn(3, 5)
    with pytest.raises(UnsupportedModelError, match="it is called with something else than tensors"):
        empirical_ntk(model, {"input": x}, capture="sequential")
    torch.testing.assert_close(empirical_ntk(model, {"input": x}, method="structured"), jacobian_contraction(model, x))


def test_tuples_between_layers():
    model = nn.Sequential(nn.LSTM(5, 4, batch_first=True), Function(lambda x: x[0][:, -1]), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    x = torch.randn(3, 2, 5).double()
    with pytest.raises(UnsupportedModelError, match="1: Function is not a layer of torch's"):
        empirical_ntk(model, x, capture="sequential")
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_layers_that_take_a_tuple():
    class Last(nn.Linear):
        def forward(self, x):
            return super().forward(x[0][:, -1])

    @register_rule(Last)
    def last(module, x, s):
        return {"weight": Factored("cno,ni->cnoi", (s, x[0][:, -1])), "bias": Factored("cno->cno", (s,))}

    model, x = nn.Sequential(nn.LSTM(5, 4, batch_first=True), Last(4, 2)).double(), torch.randn(3, 2, 5).double()
    model[0].requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="1: Last takes tuple, not a tensor, from the layer before"):
        empirical_ntk(model, x, capture="sequential")
    assert not explain(model, x).fallback
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_an_error_in_a_route_is_no_reason_to_take_another(monkeypatch):
    def broken(*args, **options):
        raise ArithmeticError

    monkeypatch.setattr(accumulator, "add_products", broken)
    model, x = nn.Linear(5, 2).double(), torch.randn(3, 5).double()
    for method in ("structured", "auto"):
        with pytest.raises(ArithmeticError):
            empirical_ntk(model, x, method=method)
