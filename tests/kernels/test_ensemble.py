"""Means over initialisations: by stacking all of them, and against what they converge to."""

import math

import pytest
import torch
from cases import mlp
from torch import nn

from ggn_ntk import EmpiricalKernels, UnsupportedModelError, empirical_kernels, ensemble, nngp
from ggn_ntk.kernels import Member
from ggn_ntk.training import gradient_flow_mse, nngp_posterior, ntk_ensemble

MLP = mlp(nn.Tanh)


def networks(count, make=MLP):
    """Networks that are made one by one."""
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make().double()
        yield model


def tensors(member):
    for entry in member:
        if isinstance(entry, torch.Tensor):
            yield entry
        elif entry is not None:
            yield from tensors(entry)


@pytest.mark.parametrize("keywords", [{}, {"compute": "trace"}, {"diagonal_axes": 0}, {"params": "0"}], ids=str)
def test_means_and_deviations(keywords, device):
    x_train, x_test, y = torch.randn(4, 5).double(), torch.randn(2, 5).double(), torch.randn(4, 3).double()
    x_train, x_test, y = (t.to(device) for t in (x_train, x_test, y))
    axes = {name: value for name, value in keywords.items() if name != "params"}

    def trained(member):
        _, f_test = gradient_flow_mse(member.k_train_train.ntk, y, **axes_of_training)(
            50.0, member.f_train, member.f_test, member.k_test_train.ntk
        )
        return f_test, f_test.square()

    axes_of_training = {name: value for name, value in axes.items() if name != "compute"}
    members = []
    for model in networks(3):
        model = model.to(device)
        kernels = empirical_kernels(model, x_train, **keywords), empirical_kernels(model, x_test, x_train, **keywords)
        with torch.no_grad():
            member = Member(*kernels, nngp(model, x_test, **axes), model(x_train), model(x_test))
        members.append(list(tensors(member._replace(prediction=trained(member)))))
    found = ensemble((m.to(device) for m in networks(3)), x_train, x_test, predict=trained, **keywords)
    assert found.count == 3
    for mean, std, *entries in zip(tensors(found.mean), tensors(found.std), *members, strict=True):
        stacked = torch.stack(entries)
        assert mean.device == std.device == stacked.device
        assert torch.allclose(mean, stacked.mean(0), rtol=1e-12, atol=1e-13)
        assert torch.allclose(std, stacked.std(0), rtol=1e-10, atol=1e-13)


def test_results_are_what_predictions_take():
    x_train, x_test, y = torch.randn(4, 5).double(), torch.randn(2, 5).double(), torch.randn(4, 3).double()
    mean = ensemble(networks(4), x_train, x_test).mean
    assert isinstance(mean.k_train_train, EmpiricalKernels)
    assert mean.prediction is None
    posterior = nngp_posterior(mean.k_train_train.nngp, y, diag_reg=0.1)(mean.k_test_train.nngp, mean.nngp_test_test)
    assert posterior.covariance.shape == (2, 2, 3, 3)
    trained = ntk_ensemble(mean.k_train_train, y)(mean.k_test_train, mean.nngp_test_test, 3.0)
    assert trained.mean.shape == (2, 3)
    alone = ensemble(networks(4), x_train)
    assert torch.equal(alone.mean.k_train_train.ntk, mean.k_train_train.ntk)
    assert alone.mean.k_test_train is alone.mean.nngp_test_test is alone.mean.f_test is None


def test_kernels_converge_to_those_of_infinite_width():
    """A linear network with weights of variance 1 / width, whose NTK and NNGP kernel are known."""

    class Deep(nn.Module):
        def __init__(self, width=40):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(width, 3)), nn.Parameter(torch.randn(1, width))

        def forward(self, x):
            return (x @ self.first.T / 3**0.5) @ self.second.T / len(self.first) ** 0.5

    x = torch.randn(4, 3).double()
    found = ensemble(networks(60, Deep), x, compute="trace")
    covariance = x @ x.T / 3
    for actual, std, expected in zip(found.mean.k_train_train, found.std.k_train_train, (2, 1), strict=True):
        assert ((actual - expected * covariance).abs() <= 4 * std / 60**0.5 + 1e-12).all()
    assert (found.mean.f_train.abs() <= 4 * found.std.f_train / 60**0.5).all()


def test_functions_and_their_parameters():
    def f(params, x):
        return torch.tanh(x @ params["w"]) @ params["v"]

    own = [{"w": torch.randn(5, 8).double(), "v": torch.randn(8, 2).double()} for _ in range(3)]
    x = torch.randn(4, 5).double()
    found = ensemble([(f, params) for params in own], x, x[:2])
    kernels = [empirical_kernels(f, x, params=params).ntk for params in own]
    assert torch.allclose(found.mean.k_train_train.ntk, torch.stack(kernels).mean(0))
    assert torch.allclose(found.mean.f_test, torch.stack([f(params, x[:2]) for params in own]).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_at_a_time(dtype):
    """A network is gone when the next comes, and is left as it was found."""
    alive = []

    def made():
        for model in networks(3):
            alive.append(model.to(dtype))
            assert len(alive) == 1
            yield alive[0]
            assert all(p.grad is None for p in alive[0].parameters())
            alive.clear()

    found = ensemble(made(), torch.randn(3, 5, dtype=dtype), output=lambda out: out[:, :2])
    assert found.mean.f_train.shape == (3, 2)
    assert {t.dtype for t in (*tensors(found.mean), *tensors(found.std))} == {dtype}
    assert not any(t.requires_grad for t in tensors(found.mean))
    one = ensemble(networks(1), torch.randn(3, 5).double())
    assert one.count == 1
    assert all(t.isnan().all() for t in tensors(one.std))


def test_a_list_of_modules():
    found = ensemble(nn.ModuleList(networks(2)), torch.randn(3, 5).double())
    assert found.count == 2


@pytest.mark.parametrize(
    ("models", "keywords", "error", "message"),
    [
        (mlp(nn.Tanh)(), {}, TypeError, "models must be several networks, got one: pass a list of them, or a gen"),
        (3, {}, TypeError, "models must be several networks, got int"),
        ([], {}, ValueError, "models must hold at least one network"),
        ([mlp(nn.Tanh)()], {"predict": 3}, TypeError, r"predict must be a callable predict\(member\), got int"),
        ([mlp(nn.Tanh)()], {"predict": lambda m: 3}, TypeError, "predict must return a tensor of real numbers, .* int"),
        ([nn.Linear(5, 2), nn.Linear(5, 3)], {}, ValueError, "models must have results of one shape, .* network 1 dif"),
        ([nn.Linear(5, 2)], {"compute": "sum"}, ValueError, "compute must be one of"),
        ([nn.BatchNorm1d(5)], {}, UnsupportedModelError, "BatchNorm1d normalises by batch"),
    ],
)
def test_bad_arguments(models, keywords, error, message):
    with pytest.raises(error, match=message):
        ensemble(models, torch.randn(3, 5), **keywords)


def test_predictions_of_different_forms():
    forms = iter([lambda m: m.f_train, lambda m: (m.f_train, m.f_train)])
    with pytest.raises(ValueError, match="models must have results of one shape"):
        ensemble(networks(2), torch.randn(3, 5).double(), predict=lambda m: next(forms)(m))
    assert math.isclose(ensemble(networks(2), torch.ones(1, 5).double(), predict=lambda m: m.f_train).count, 2)
