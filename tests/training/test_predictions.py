"""Predictions of training: against the training itself, against ODE solvers, and against neural-tangents."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import mlp
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

from ggn_ntk import EmpiricalKernels, empirical_ntk, linearize
from ggn_ntk.training import (
    Gaussian,
    IllConditionedWarning,
    gradient_descent,
    gradient_descent_mse,
    gradient_flow,
    gradient_flow_mse,
    kernel_ridge_regression,
    max_learning_rate,
    nngp_posterior,
    ntk_ensemble,
)

FIGURES = json.loads((DATA / "neural_tangents.json").read_text())
STYLES = ["full", "one_for_all_outputs"]


def half_mse(f, y):
    """The loss, as stated: half the mean over all N C entries."""
    return sum(0.5 * (a - b) ** 2 for a, b in zip(f.flatten(), y.flatten(), strict=True)) / f.numel()


class Task:
    """A network, few samples, and its kernels, in float64."""

    def __init__(self, n=4, m=3):
        torch.manual_seed(1)
        self.model = mlp(nn.Tanh)().double()
        self.x_train, self.x_test = torch.randn(n, 5).double(), torch.randn(m, 5).double()
        self.y = torch.randn(n, 3).double()
        self.k_train_train = empirical_ntk(self.model, self.x_train)
        self.k_test_train = empirical_ntk(self.model, self.x_test, self.x_train)
        with torch.no_grad():
            self.f_train, self.f_test = self.model(self.x_train), self.model(self.x_test)
        self.f_lin = linearize(self.model)

    def outputs(self, params):
        with torch.no_grad():
            return self.f_lin(params, self.x_train), self.f_lin(params, self.x_test)

    def predict(self, predictor, t):
        return predictor(t, self.f_train, self.f_test, self.k_test_train)


@pytest.fixture
def task():
    return Task()


def kernels(n, m, c, p=None, seed=0):
    """Random kernels of training and test samples; of rank at most p."""
    generator = torch.Generator().manual_seed(seed)
    p = p or 3 * (n + m) * c
    j = torch.randn(n + m, c, p, dtype=torch.float64, generator=generator)
    full = torch.einsum("ncp,mdp->nmcd", j, j)
    return full[:n, :n], full[n:, :n], full[n:, n:]


def each_output_alone(kernel, c):
    """The full kernel that a kernel for all outputs stands for."""
    return torch.einsum("nm,cd->nmcd", kernel, torch.eye(c, dtype=kernel.dtype))


class Roles:
    """What is done with each output axis: kept, traced or diagonal, written as einsums over one letter an axis."""

    def __init__(self, out, roles):
        self.out, self.roles = out, roles
        self.axes = {name: [i for i, role in enumerate(roles) if role == name] for name in ("traced", "diagonal")}
        self.keywords = {"trace_axes": self.axes["traced"], "diagonal_axes": self.axes["diagonal"]}
        self.traced = math.prod(out[i] for i in self.axes["traced"])
        self.first, self.second = "abc"[: len(out)], "xyz"[: len(out)]
        self.kept = "".join(a for a, role in zip(self.first, roles, strict=True) if role != "traced")
        self.free = "".join(a for a, role in zip(self.second, roles, strict=True) if role == "kept")

    def reduce(self, full):
        """The kernel with some axes traced, to their mean, or diagonal: [N1, N2, *out, *out] -> [N1, N2, ...]."""
        second = "".join(x if x in self.free else a for a, x in zip(self.first, self.second, strict=True))
        return torch.einsum(f"nm{self.first}{second}->nm{self.kept}{self.free}", full) / self.traced

    def stand_for(self, kernel):
        """The full kernel that another one stands for: [N1, N2, ...] -> [N1, N2, *out, *out]."""
        pairs = [(i, a + x) for i, (a, x) in enumerate(zip(self.first, self.second, strict=True)) if x not in self.free]
        terms = ",".join([f"nm{self.kept}{self.free}", *(pair for _, pair in pairs)])
        eyes = [torch.eye(self.out[i], dtype=kernel.dtype) for i, _ in pairs]
        return torch.einsum(f"{terms}->nm{self.first}{self.second}", kernel, *eyes)


# ---------------------------------------------------------------- against training itself


@pytest.mark.parametrize("learning_rate", [1.0, 0.3])
def test_flow_is_that_of_the_linearized_model(task, learning_rate):
    """Its parameters are integrated by an ODE solver."""
    names, shapes = zip(*((name, p.shape) for name, p in task.f_lin.point.items()), strict=True)
    sizes = [math.prod(shape) for shape in shapes]

    def unpack(theta):
        parts = torch.from_numpy(theta).split(sizes)
        return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def derivative(_, theta):
        params = {name: p.clone().requires_grad_() for name, p in unpack(theta).items()}
        loss = half_mse(task.f_lin(params, task.x_train), task.y)
        gradients = torch.autograd.grad(loss, list(params.values()))
        return -learning_rate * torch.cat([g.flatten() for g in gradients]).numpy()

    start = torch.cat([p.flatten() for p in task.f_lin.point.values()]).numpy()
    times = [0.0, 0.1, 2.0, 10.0]
    solution = solve_ivp(derivative, (0, times[-1]), start, method="DOP853", t_eval=times, rtol=1e-11, atol=1e-11)
    predictor = gradient_flow_mse(task.k_train_train, task.y, learning_rate=learning_rate)
    f_train, f_test = task.predict(predictor, times)
    for i, theta in enumerate(solution.y.T):
        train, test = task.outputs(unpack(np.ascontiguousarray(theta)))
        assert torch.allclose(f_train[i], train, rtol=0, atol=1e-8)
        assert torch.allclose(f_test[i], test, rtol=0, atol=1e-8)


def train_by_sgd(task, learning_rate, steps, momentum=0.0):
    """Outputs of the linearized network after each step of torch.optim.SGD, the first before all."""
    params = {name: p.clone().requires_grad_() for name, p in task.f_lin.point.items()}
    optimizer = torch.optim.SGD(params.values(), lr=learning_rate, momentum=momentum)
    history = [task.outputs(params)]
    for _ in range(steps):
        optimizer.zero_grad()
        ((task.f_lin(params, task.x_train) - task.y).square().mean() / 2).backward()
        optimizer.step()
        history.append(task.outputs(params))
    return [torch.stack(outputs) for outputs in zip(*history, strict=True)]


def test_descent_with_small_steps_approaches_the_flow(task):
    """The distance falls linearly with the step."""
    time = 4.0
    flow = task.predict(gradient_flow_mse(task.k_train_train, task.y), time)
    distances = []
    for steps in (8, 16, 32):
        history = train_by_sgd(task, time / steps, steps)
        distances.append([(h[-1] - f).norm().item() for h, f in zip(history, flow, strict=True)])
    for coarse, fine in pairwise(distances):
        assert [a / b for a, b in zip(coarse, fine, strict=True)] == pytest.approx([2, 2], rel=0.15)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_descent_is_that_of_sgd_step_by_step(task, momentum):
    learning_rate = 0.8 * max_learning_rate(task.k_train_train)
    history = train_by_sgd(task, learning_rate, 25, momentum)
    predictor = gradient_descent_mse(task.k_train_train, task.y, learning_rate=learning_rate, momentum=momentum)
    for predicted, real in zip(task.predict(predictor, torch.arange(26)), history, strict=True):
        assert torch.allclose(predicted, real, rtol=1e-10, atol=1e-11)


def cross_entropy(f, y):
    return nn.functional.cross_entropy(f, y)


def train_under(task, loss, y, learning_rate, steps, momentum):
    """Outputs of the linearized network after each step of torch.optim.SGD under a loss, the first before all."""
    params = {name: p.clone().requires_grad_() for name, p in task.f_lin.point.items()}
    optimizer = torch.optim.SGD(params.values(), lr=learning_rate, momentum=momentum)
    history = [task.outputs(params)]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(task.f_lin(params, task.x_train), y).backward()
        optimizer.step()
        history.append(task.outputs(params))
    return [torch.stack(outputs) for outputs in zip(*history, strict=True)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_on_any_loss_is_that_of_sgd_step_by_step(task, momentum):
    labels = torch.tensor([0, 2, 1, 0])
    history = train_under(task, cross_entropy, labels, 0.5, 25, momentum)
    predictor = gradient_descent(cross_entropy, task.k_train_train, labels, learning_rate=0.5, momentum=momentum)
    for predicted, real in zip(task.predict(predictor, torch.arange(26)), history, strict=True):
        assert torch.allclose(predicted, real, rtol=1e-10, atol=1e-11)
    some = task.predict(predictor, [[7, 0], [3, 7]])
    for predicted, real in zip(some, history, strict=True):
        assert torch.allclose(predicted, real[torch.tensor([[7, 0], [3, 7]])])
    assert torch.equal(predictor(0, task.f_train), task.f_train)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_descent_on_any_loss_with_the_squared_one_is_the_closed_form(task, momentum):
    rates = {"learning_rate": 0.5, "momentum": momentum}
    closed = gradient_descent_mse(task.k_train_train, task.y, **rates)
    stepped = gradient_descent(half_mse, task.k_train_train, task.y, **rates)
    for a, b in zip(task.predict(closed, range(20)), task.predict(stepped, range(20)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.3, 0.9])
def test_flow_with_momentum_is_where_descent_with_small_steps_leads(task, momentum):
    """Twice as many steps with half the friction, at a quarter of the rate: the distance falls linearly."""
    labels, distances = torch.tensor([0, 2, 1, 0]), []
    for scale in (4, 8, 16):
        mu, rate, steps = 1 - (1 - momentum) / scale, 2.0 / scale**2, 6 * scale
        rates = {"learning_rate": rate, "momentum": mu}
        flow = task.predict(gradient_flow(cross_entropy, task.k_train_train, labels, **rates), steps)
        descent = task.predict(gradient_descent(cross_entropy, task.k_train_train, labels, **rates), steps)
        distances.append([(a - b).norm().item() for a, b in zip(flow, descent, strict=True)])
    for coarse, fine in pairwise(distances):
        assert [a / b for a, b in zip(coarse, fine, strict=True)] == pytest.approx([2, 2], rel=0.3)


@pytest.mark.parametrize("momentum", [0.01, 0.5, 0.95])
def test_flow_with_momentum_under_the_squared_loss(task, momentum):
    """A linear system in f and v, whose solution is a matrix exponential."""
    n, rate, time = 12, 0.5, 7.0
    theta = task.k_train_train.transpose(1, 2).reshape(n, n)
    eye = torch.eye(n).double()
    rows = [torch.cat([0 * eye, -rate * theta], 1), torch.cat([eye / n, -(1 - momentum) * eye], 1) / momentum]
    start = torch.cat([(task.f_train - task.y).flatten(), torch.zeros(n).double()])
    expected = (torch.linalg.matrix_exp(time * torch.cat(rows)) @ start)[:n].reshape(4, 3) + task.y
    predictor = gradient_flow(half_mse, task.k_train_train, task.y, learning_rate=rate, momentum=momentum)
    assert torch.allclose(predictor(time, task.f_train), expected, rtol=0, atol=1e-6)
    if momentum < 0.1:  # a mass that is next to nothing
        without = gradient_flow(half_mse, task.k_train_train, task.y, learning_rate=rate)(time, task.f_train)
        assert torch.allclose(predictor(time, task.f_train), without, atol=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_max_learning_rate_divides_convergence_from_divergence(task, momentum):
    limit = max_learning_rate(task.k_train_train, momentum)
    before = (task.f_train - task.y).norm()
    for factor, converges in ((0.98, True), (1.02, False)):
        descent = gradient_descent_mse(task.k_train_train, task.y, learning_rate=factor * limit, momentum=momentum)
        after = (descent(3000, task.f_train) - task.y).norm()
        assert (after < before) == converges
    assert max_learning_rate(torch.zeros(3, 3)) == math.inf


# ---------------------------------------------------------------- against neural-tangents


def figures(style):
    return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in FIGURES[style].items()}


def close(actual, expected, rtol=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("name", "diag_reg"), [("flow", 0.0), ("flow_regularised", FIGURES["diag_reg"])])
def test_flow_against_neural_tangents(style, name, diag_reg):
    f = figures(style)
    predictor = gradient_flow_mse(
        f["ntk_train_train"], f["y"], learning_rate=FIGURES["learning_rate"], diag_reg=diag_reg
    )
    train, test = predictor(FIGURES["times"], f["f_train"], f["f_test"], f["ntk_test_train"])
    close(train, f[name]["train"])
    close(test, f[name]["test"])
    train, test = predictor(math.inf, f["f_train"], f["f_test"], f["ntk_test_train"])
    close(train, f["y"])
    close(test, f[name]["test_infinite"])


@pytest.mark.parametrize("style", STYLES)
def test_any_loss_against_neural_tangents(style):
    f = figures(style)

    def cross_entropy(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    predictor = gradient_flow(
        cross_entropy, f["ntk_train_train"], f["probabilities"], learning_rate=FIGURES["learning_rate"]
    )
    train, test = predictor(FIGURES["times"][:4], f["f_train"], f["f_test"], f["ntk_test_train"])
    close(train, f["cross_entropy"]["train"], rtol=1e-6)  # of its solver
    close(test, f["cross_entropy"]["test"], rtol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_inference_against_neural_tangents(style):
    f, reg = figures(style), FIGURES["diag_reg"]
    train_train = EmpiricalKernels(f["ntk_train_train"], f["nngp_train_train"])
    test_train = EmpiricalKernels(f["ntk_test_train"], f["nngp_test_train"])
    posterior = nngp_posterior(train_train.nngp, f["y"], diag_reg=reg)(test_train.nngp, f["nngp_test_test"])
    ensemble = ntk_ensemble(train_train, f["y"], diag_reg=reg)(test_train, f["nngp_test_test"])
    for name, actual in {"nngp": posterior, "ntk": ensemble}.items():
        assert isinstance(actual, Gaussian)
        close(actual.mean, f["inference"][name]["mean"])
        close(actual.covariance, f["inference"][name]["covariance"])


@pytest.mark.parametrize("style", STYLES)
def test_ensemble_at_finite_times_against_neural_tangents(style):
    f = figures(style)
    train_train = EmpiricalKernels(f["ntk_train_train"], f["nngp_train_train"])
    test_train = EmpiricalKernels(f["ntk_test_train"], f["nngp_test_train"])
    rates = {"learning_rate": FIGURES["learning_rate"], "diag_reg": FIGURES["diag_reg"]}
    actual = ntk_ensemble(train_train, f["y"], **rates)(test_train, f["nngp_test_test"], FIGURES["times"])
    close(actual.mean, f["ensemble"]["mean"])
    close(actual.covariance, f["ensemble"]["covariance"])


@pytest.mark.parametrize("style", STYLES)
def test_max_learning_rate_against_neural_tangents(style):
    f = figures(style)
    outputs = 1 if style == "full" else f["y"].shape[1]  # which a kernel for all of them does not tell
    assert max_learning_rate(f["ntk_train_train"]) * outputs == pytest.approx(f["max_learning_rate"])
    actual = max_learning_rate(f["ntk_train_train"], momentum=0.9) * outputs
    assert actual == pytest.approx(f["max_learning_rate_momentum"])


# ---------------------------------------------------------------- properties


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 4), c=st.integers(1, 3), momentum=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 99))
def test_a_kernel_for_all_outputs_is_a_block_diagonal_one(n, c, momentum, seed):
    torch.manual_seed(seed)
    train_train, test_train, _ = (k[..., 0, 0] for k in kernels(n, 2, 1, seed=seed))
    y, f_train, f_test = (torch.randn(rows, c).double() for rows in (n, n, 2))
    for make in (
        lambda k: gradient_flow_mse(k, y, diag_reg=0.01),
        lambda k: gradient_descent_mse(k, y, momentum=momentum, learning_rate=0.01),
        lambda k: gradient_flow(lambda f, y: (f - y).abs().pow(3).sum(), k, y, learning_rate=0.01),
    ):
        one = make(train_train)([1, 7], f_train, f_test, test_train)
        full = make(each_output_alone(train_train, c))([1, 7], f_train, f_test, each_output_alone(test_train, c))
        for a, b in zip(one, full, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("out", "roles"),
    [
        ((3,), ["diagonal"]),
        ((2, 2), ["traced", "traced"]),
        ((2, 2), ["traced", "kept"]),
        ((2, 3), ["kept", "diagonal"]),
        ((3, 2), ["diagonal", "traced"]),
        ((2, 3, 2), ["traced", "kept", "diagonal"]),
    ],
    ids=str,
)
def test_kernels_with_any_axes_are_the_full_ones_that_they_stand_for(out, roles):
    torch.manual_seed(0)
    roles = Roles(out, roles)
    reduced = [
        [roles.reduce(k.reshape(*k.shape[:2], *out, *out)) for k in kernels(3, 2, math.prod(out), seed=seed)]
        for seed in (0, 1)
    ]
    full = [[roles.stand_for(k) for k in some] for some in reduced]
    y, f_train, f_test = (torch.randn(n, *out).double() for n in (3, 3, 2))
    keywords = roles.keywords if len(set(roles.roles)) > 1 else {}  # of one role for all axes, the shape tells
    rate = {"learning_rate": max_learning_rate(full[0][0]) / 4}
    assert max_learning_rate(reduced[0][0], y_train=y, **keywords) / 4 == pytest.approx(rate["learning_rate"])

    def predictions(ntk, nngp, **keywords):
        train, cross = EmpiricalKernels(ntk[0], nngp[0]), EmpiricalKernels(ntk[1], nngp[1])
        start = f_train, f_test, ntk[1]
        posterior = nngp_posterior(nngp[0], y, diag_reg=0.1, **keywords)(nngp[1], nngp[2])
        ensemble = ntk_ensemble(train, y, **rate, **keywords)(cross, nngp[2], [1.0, 9.0])
        outputs = [
            *gradient_flow_mse(ntk[0], y, diag_reg=0.01, **rate, **keywords)([1, 7, math.inf], *start),
            *gradient_descent_mse(ntk[0], y, momentum=0.5, **rate, **keywords)([[1], [7]], *start),
            *gradient_flow(quartic, ntk[0], y, momentum=0.5, **rate, **keywords)([0, 2], *start),
            *gradient_descent(quartic, ntk[0], y, momentum=0.5, **rate, **keywords)([0, 2], *start),
            kernel_ridge_regression(ntk[0], y, diag_reg=0.1, **keywords)(ntk[1]),
            posterior.mean,
            ensemble.mean,
        ]
        return outputs, [posterior.covariance, *ensemble.covariance]

    outputs, covariances = predictions(*reduced, **keywords)
    expected, expected_covariances = predictions(*full)
    outputs += [roles.stand_for(covariance) for covariance in covariances]
    for a, b in zip(outputs, expected + expected_covariances, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # of the solver, for any loss


def quartic(f, y):
    return (f - y).pow(4).mean()


def test_axes_of_a_networks_kernel():
    """The kernel of the library for these keywords, with its trace divided by the number of traced outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, (2, 3))).double()
    x, y = torch.randn(3, 4).double(), torch.randn(3, 2, 3).double()
    roles = Roles((2, 3), ["diagonal", "traced"])
    kernel = empirical_ntk(net, x, **roles.keywords) / 3
    full = roles.stand_for(roles.reduce(empirical_ntk(net, x)))
    actual = gradient_flow_mse(kernel, y, trace_axes=-1, diagonal_axes=[0])(2.0, net(x))
    assert torch.allclose(actual, gradient_flow_mse(full, y)(2.0, net(x)))
    assert torch.allclose(
        gradient_flow_mse(empirical_ntk(net, x, compute="diagonal"), y)(2.0),
        gradient_flow_mse(empirical_ntk(net, x, compute="diagonal"), y, diagonal_axes=(0, 1))(2.0),
    )


@settings(deadline=None, max_examples=20)
@given(s=st.floats(0, 5), t=st.floats(0, 5), seed=st.integers(0, 99))
def test_flows_compose(s, t, seed):
    """Training for s, then for t, is training for s + t."""
    torch.manual_seed(seed)
    train_train, test_train, _ = kernels(3, 2, 2, seed=seed)
    y, f_train, f_test = (torch.randn(rows, 2).double() for rows in (3, 3, 2))
    predictor = gradient_flow_mse(train_train, y)
    once = predictor(s + t, f_train, f_test, test_train)
    twice = predictor(t, *predictor(s, f_train, f_test, test_train), test_train)
    for a, b in zip(once, twice, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_any_loss_with_the_squared_one_is_the_closed_form(task):
    times = torch.tensor([[0.0, 3.0], [1.0, 30.0]])
    closed = task.predict(gradient_flow_mse(task.k_train_train, task.y, learning_rate=0.5), times)
    solved = task.predict(gradient_flow(half_mse, task.k_train_train, task.y, learning_rate=0.5), times)
    for a, b in zip(closed, solved, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    alone = gradient_flow(half_mse, task.k_train_train, task.y, learning_rate=0.5)(times, task.f_train)
    assert torch.allclose(alone, closed[0], rtol=0, atol=1e-6)


def test_any_loss_takes_class_labels_and_falls(task):
    labels = torch.tensor([0, 2, 1, 0])
    predictor = gradient_flow(nn.functional.cross_entropy, task.k_train_train, labels)
    losses = [nn.functional.cross_entropy(f, labels).item() for f in predictor([0, 1, 10, 100, 1000], task.f_train)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05
    assert torch.equal(predictor(0.0, task.f_train), task.f_train)
    assert torch.equal(predictor([0.0, 0.0], task.f_train), task.f_train.expand(2, -1, -1))
    for make in (predictor, gradient_flow_mse(task.k_train_train, task.y)):
        assert make([], task.f_train).shape == (0, 4, 3)


@pytest.mark.parametrize("factory", [gradient_flow_mse, gradient_descent_mse])
def test_shapes_of_times(task, factory):
    predictor = factory(task.k_train_train, task.y)
    assert predictor(3, task.f_train).shape == (4, 3)
    for t in ([1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2])):
        assert predictor(t, task.f_train).shape == (2, 4, 3)
        train, test = task.predict(predictor, t)
        assert train.shape == (2, 4, 3)
        assert test.shape == (2, 3, 3)
    assert predictor(torch.zeros(2, 5, dtype=torch.int64), task.f_train).shape == (2, 5, 4, 3)
    assert predictor(np.int64(3), task.f_train).shape == (4, 3)
    assert torch.allclose(predictor([1, 3], task.f_train)[1], predictor(3, task.f_train), rtol=1e-12)
    assert torch.equal(predictor(0, task.f_train), task.f_train)


def test_outputs_without_axes_and_with_several():
    for out in ((), (2, 2)):
        torch.manual_seed(0)
        c = math.prod(out)
        train_train, test_train, test_test = (k.reshape(*k.shape[:2], *out, *out) for k in kernels(3, 2, c))
        y, f_train, f_test = (torch.randn(rows, *out).double() for rows in (3, 3, 2))
        train, test = gradient_flow_mse(train_train, y)([0, 1, math.inf], f_train, f_test, test_train)
        assert train.shape == (3, 3, *out)
        assert test.shape == (3, 2, *out)
        assert torch.allclose(train[-1], y)
        mean, covariance = nngp_posterior(train_train, y)(test_train, test_test)
        assert mean.shape == (2, *out)
        assert covariance.shape == (2, 2, *out, *out)
        if out:
            flat = [k.reshape(*k.shape[:2], c, c) for k in (train_train, test_train)]
            expected = gradient_flow_mse(flat[0], y.reshape(3, c))(
                [0, 1, math.inf], f_train.reshape(3, c), f_test.reshape(2, c), flat[1]
            )
            assert torch.allclose(test.reshape(3, 2, c), expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_devices(task, dtype, device):
    def cast(*tensors):
        return [t.to(device, dtype) for t in tensors]

    k_train, k_test, y, f_train, f_test = cast(task.k_train_train, task.k_test_train, task.y, task.f_train, task.f_test)
    expected = task.predict(gradient_flow_mse(task.k_train_train, task.y), [0.5, 2.0])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for factory in (gradient_flow_mse, lambda *args: gradient_flow(half_mse, *args)):
        actual = factory(k_train, y)([0.5, 2.0], f_train, f_test, k_test)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert a.device == f_train.device
            assert not a.requires_grad
            assert torch.allclose(a.double().cpu(), e, rtol=0, atol=max(tolerance, 1e-7))
    regression = kernel_ridge_regression(k_train, y, diag_reg=1.0)(k_test)
    assert regression.dtype == dtype
    assert gradient_flow(half_mse, k_train, y)(0.5).dtype == dtype
    for result in gradient_flow_mse(k_train.diagonal(dim1=2, dim2=3), y)(
        0.5, 0.0, f_test, k_test.diagonal(dim1=2, dim2=3)
    ):
        assert result.dtype == dtype
        assert result.device == f_train.device
    wider = gradient_flow_mse(k_train, y.double())(1.0, f_train)
    assert wider.dtype == torch.float64


def test_results_carry_no_graph(task):
    f_train = task.model(task.x_train)
    assert f_train.requires_grad
    assert not gradient_flow_mse(task.k_train_train, task.y)(1.0, f_train).requires_grad
    assert not gradient_flow(half_mse, task.k_train_train, task.y)(1.0, f_train).requires_grad


# ---------------------------------------------------------------- regression and posteriors


@pytest.mark.parametrize("diag_reg", [0.0, 0.3])
def test_kernel_ridge_regression_minimises_the_ridge_loss(diag_reg):
    """In weights w of features φ: |φ w - y|² + ridge |w|²."""
    torch.manual_seed(0)
    features, test_features, y = torch.randn(4, 20).double(), torch.randn(3, 20).double(), torch.randn(4, 2).double()
    kernel = features @ features.T
    ridge = diag_reg * kernel.diagonal().mean()
    if diag_reg:
        weights = torch.linalg.solve(features.T @ features + ridge * torch.eye(20), features.T @ y)
    else:
        weights = torch.linalg.pinv(features) @ y
    predict = kernel_ridge_regression(kernel, y, diag_reg=diag_reg)
    assert torch.allclose(predict(test_features @ features.T), test_features @ weights)


def test_kernel_regression_is_where_training_from_zero_leads(task):
    zero_train, zero_test = torch.zeros_like(task.f_train), torch.zeros_like(task.f_test)
    for diag_reg in (0.0, 0.1):
        flow = gradient_flow_mse(task.k_train_train, task.y, diag_reg=diag_reg)
        _, limit = flow(math.inf, zero_train, zero_test, task.k_test_train)
        regression = kernel_ridge_regression(task.k_train_train, task.y, diag_reg=diag_reg)(task.k_test_train)
        assert torch.allclose(limit, regression)


@pytest.mark.parametrize("time", [0.5, math.inf])
def test_ensemble_is_what_many_trained_draws_are(time):
    """Monte Carlo: networks start as Gaussian draws, and follow the flow."""
    torch.manual_seed(0)
    n, m = 3, 2
    ntk = kernels(n, m, 1, seed=1)
    whole = torch.randn(n + m, 12).double()
    prior = whole @ whole.T / 12
    y = torch.randn(n, 1).double()
    draws = torch.distributions.MultivariateNormal(torch.zeros(n + m).double(), prior).sample((40000,))
    flow = gradient_flow_mse(ntk[0], y)
    columns = draws.T[..., None]  # all draws at once: their outputs do not influence one another
    many = gradient_flow_mse(ntk[0][..., 0, 0], y.expand(n, 40000).contiguous())
    _, trained = many(time * 40000, columns[:n, :, 0], columns[n:, :, 0], ntk[1][..., 0, 0])
    one = flow(time, columns[:n, 0], columns[n:, 0], ntk[1])[1]
    assert torch.allclose(one[:, 0], trained[:, 0])
    block = prior.reshape(n + m, n + m, 1, 1)
    kernels_train = EmpiricalKernels(ntk[0], block[:n, :n])
    mean, covariance = ntk_ensemble(kernels_train, y)(EmpiricalKernels(ntk[1], block[n:, :n]), block[n:, n:], time)
    assert torch.allclose(mean[:, 0], trained.mean(1), atol=0.03 * trained.std().item())
    assert torch.allclose(covariance[..., 0, 0], trained.cov(), rtol=0.05, atol=0.03 * covariance.max().item())


@pytest.mark.parametrize("diag_reg", [0.0, 0.2])
def test_ensemble_at_finite_time_is_the_closed_form(diag_reg):
    """Lee et al., equations 14 and 15, with matrix exponentials."""
    torch.manual_seed(0)
    n, m, c, rate, times = 3, 2, 2, 0.7, [0.0, 0.3, 4.0]
    ntk, y = kernels(n, m, c, seed=1), torch.randn(n, c).double()
    root = torch.randn((n + m) * c, 30).double() / 30**0.5
    joint = (root @ root.T).reshape(n + m, c, n + m, c).transpose(1, 2)  # the NNGP kernel of all samples
    predict = ntk_ensemble(EmpiricalKernels(ntk[0], joint[:n, :n]), y, learning_rate=rate, diag_reg=diag_reg)
    mean, covariance = predict(EmpiricalKernels(ntk[1], joint[n:, :n]), joint[n:, n:], times)
    assert mean.shape == (3, m, c)
    assert covariance.shape == (3, m, m, c, c)

    def matrix(kernel):
        return kernel.transpose(1, 2).reshape(kernel.shape[0] * c, -1)

    theta, cross = matrix(ntk[0]), matrix(ntk[1])
    theta = theta + diag_reg * theta.diagonal().mean() * torch.eye(n * c)
    k, k_cross, k_test = matrix(joint[:n, :n]), matrix(joint[n:, :n]), matrix(joint[n:, n:])
    for t, one_mean, one_covariance in zip(times, mean, covariance, strict=True):
        decay = torch.eye(n * c) - torch.linalg.matrix_exp(-theta * rate * t / (n * c))
        a = cross @ torch.linalg.inv(theta) @ decay
        assert torch.allclose(one_mean.flatten(), a @ y.flatten())
        expected = k_test + a @ k @ a.T - a @ k_cross.T - k_cross @ a.T
        assert torch.allclose(matrix(one_covariance), expected)
        assert torch.equal(
            one_covariance, predict(EmpiricalKernels(ntk[1], joint[n:, :n]), joint[n:, n:], t).covariance
        )


def test_ensemble_before_and_long_after_training():
    torch.manual_seed(0)
    ntk, nngp, y = kernels(3, 2, 2, seed=1), kernels(3, 2, 2, seed=2), torch.randn(3, 2).double()
    predict, cross = ntk_ensemble(EmpiricalKernels(ntk[0], nngp[0]), y), EmpiricalKernels(ntk[1], nngp[1])
    start = predict(cross, nngp[2], 0)
    assert torch.equal(start.mean, torch.zeros(2, 2).double())
    assert torch.allclose(start.covariance, nngp[2], rtol=1e-14)
    for t in (None, math.inf, 1e9):
        assert torch.allclose(predict(cross, nngp[2], t).covariance, predict(cross, nngp[2]).covariance)
    # the last layer alone: the NNGP kernel is its NTK, and Bayesian inference is where its training ends
    alone = ntk_ensemble(EmpiricalKernels(nngp[0], nngp[0]), y)(EmpiricalKernels(nngp[1], nngp[1]), nngp[2])
    for a, b in zip(alone, nngp_posterior(nngp[0], y)(nngp[1], nngp[2]), strict=True):
        assert torch.allclose(a, b)
    # training samples, taken for test samples, are where the targets are
    mean, covariance = predict(EmpiricalKernels(ntk[0], nngp[0]), nngp[0])
    assert torch.allclose(mean, y)
    assert covariance.abs().max() < 1e-9 * nngp[0].abs().max()


def test_outputs_that_start_as_a_number(task):
    zero_train, zero_test = torch.zeros_like(task.f_train), torch.zeros_like(task.f_test)
    for predictor in (
        gradient_flow_mse(task.k_train_train, task.y),
        gradient_descent_mse(task.k_train_train, task.y),
        gradient_flow(quartic, task.k_train_train, task.y),
        gradient_descent(quartic, task.k_train_train, task.y, momentum=0.3),
    ):
        expected = predictor(2, zero_train, zero_test, task.k_test_train)
        for start in ((0.0, 0.0), (None, None), (0.0, None), (0,), (zero_train, 0.0), ()):
            for a, b in zip(predictor(2, *start, k_test_train=task.k_test_train), expected, strict=True):
                assert torch.equal(a, b)
        assert torch.allclose(predictor(2), expected[0], rtol=0, atol=1e-7)  # of the solver, for any loss
        shifted = predictor(2, 1.5, k_test_train=task.k_test_train)
        tensors = predictor(2, zero_train + 1.5, zero_test + 1.5, task.k_test_train)
        for a, b in zip(shifted, tensors, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match=r"f_test_0 must be given beside k_test_train, as f_train_0 is: 0\.0 for"):
            predictor(2, zero_train, k_test_train=task.k_test_train)
        with pytest.raises(TypeError, match="f_test_0 must be a tensor of real numbers, got bool"):
            predictor(2, zero_train, False, task.k_test_train)


def test_no_time_is_infinite_time(task):
    predictor = gradient_flow_mse(task.k_train_train, task.y)
    for a, b in zip(task.predict(predictor, None), task.predict(predictor, math.inf), strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(predictor(), task.y)
    regression = kernel_ridge_regression(task.k_train_train, task.y)(task.k_test_train)
    assert torch.allclose(predictor(k_test_train=task.k_test_train)[1], regression)


def test_posterior_interpolates_without_noise():
    torch.manual_seed(0)
    train_train, test_train, test_test = kernels(3, 2, 2)
    y = torch.randn(3, 2).double()
    mean, covariance = nngp_posterior(train_train, y)(train_train, train_train)
    assert torch.allclose(mean, y)
    assert covariance.abs().max() < 1e-10 * train_train.max()
    _, covariance = nngp_posterior(train_train, y, diag_reg=0.1)(test_train, test_test)
    assert torch.equal(covariance, covariance.permute(1, 0, 3, 2))
    matrix = covariance.permute(0, 2, 1, 3).reshape(4, 4)
    prior = test_test.permute(0, 2, 1, 3).reshape(4, 4)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    assert torch.linalg.eigvalsh(prior - matrix)[0] > 0


# ---------------------------------------------------------------- kernels that are singular


def test_directions_the_kernel_does_not_have_do_not_train():
    """Least squares: with fewer parameters than outputs, the targets cannot be reached."""
    torch.manual_seed(0)
    features = torch.randn(6, 3).double()
    kernel, y, start = features @ features.T, torch.randn(6, 1).double(), torch.randn(6, 1).double()
    projection = features @ torch.linalg.pinv(features)
    expected = start + projection @ (y - start)
    assert torch.allclose(gradient_flow_mse(kernel, y)(1e6, start), expected)
    with pytest.warns(
        IllConditionedWarning, match="training outputs are left as they are in directions that it cannot"
    ):
        assert torch.allclose(gradient_flow_mse(kernel, y)(math.inf, start), expected)
    assert torch.allclose(gradient_descent_mse(kernel, y, learning_rate=0.1)(10**5, start), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_singular_kernels_warn_and_give_sensible_numbers(dtype):
    """Of a sample that comes twice, or of fewer parameters than outputs."""
    torch.manual_seed(0)
    features, test_features = torch.randn(6, 4).double(), torch.randn(3, 4).double()
    features = torch.cat([features, features[:2]])
    weights = torch.randn(4, 1).double()
    y, truth = (features @ weights).to(dtype), test_features @ weights
    kernel, cross = (features @ features.T).to(dtype), (test_features @ features.T).to(dtype)
    zero_train, zero_test = torch.zeros(8, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype)
    tolerance = 100 * math.sqrt(torch.finfo(dtype).eps)
    message = r"k_train_train is singular up to rounding, with a condition number above .* a jitter of .* diag_reg"
    with pytest.warns(IllConditionedWarning, match=message):
        assert torch.allclose(kernel_ridge_regression(kernel, y)(cross).double(), truth, atol=tolerance)
    for t in (math.inf, 1e30):
        with pytest.warns(IllConditionedWarning, match=message):
            _, test = gradient_flow_mse(kernel, y)(t, zero_train, zero_test, cross)
        assert torch.allclose(test.double(), truth, atol=tolerance)
    with pytest.warns(IllConditionedWarning, match=message):
        mean, covariance = nngp_posterior(kernel, y)(cross, test_features.to(dtype) @ test_features.T.to(dtype))
    assert torch.allclose(mean.double(), truth, atol=tolerance)
    assert covariance.abs().max() < tolerance * kernel.max()


def test_small_eigenvalues_of_a_float32_kernel_train():
    """Rounding in float32 hides them in the long run, not before."""
    kernel, y, start = torch.diag(torch.tensor([1.0, 1e-7])), torch.zeros(2, 1), torch.ones(2, 1)
    predictor = gradient_flow_mse(kernel, y)
    train, test = predictor(1e5, start, start, kernel)
    assert torch.allclose(train[1], torch.tensor(math.exp(-1e-7 * 1e5 / 2)))
    assert torch.allclose(test, train)
    with pytest.warns(IllConditionedWarning):
        train = predictor([1e7, 1e8], start)[:, 1]
    assert torch.allclose(train[0], torch.tensor(math.exp(-0.5)))


def test_no_warning_where_nothing_grows():
    """At moderate times and with a ridge, a singular kernel is no reason to worry."""
    kernel, y = torch.ones(4, 4).double(), torch.randn(4, 1).double()
    zero = torch.zeros_like(y)
    gradient_flow_mse(kernel, y)([1, 1e3], zero, zero, kernel)
    gradient_descent_mse(kernel, y)([1, 1000], zero, zero, kernel)
    gradient_flow_mse(kernel, y, diag_reg=0.01)(math.inf, zero, zero, kernel)
    kernel_ridge_regression(kernel, y, diag_reg=0.01)(kernel)


def test_the_warning_names_the_line_of_the_call():
    kernel, y = torch.ones(4, 4), torch.randn(4, 1)
    both = EmpiricalKernels(kernel, kernel)
    for call, name in (
        (lambda: kernel_ridge_regression(kernel, y), "k_train_train"),
        (lambda: gradient_flow_mse(kernel, y)(math.inf, y, y, kernel), "k_train_train"),
        (lambda: ntk_ensemble(both, y)(both, kernel), "k_train_train.ntk"),
    ):
        with pytest.warns(IllConditionedWarning, match=f"{name} is singular") as caught:
            call()
        assert [Path(w.filename).name for w in caught] == [Path(__file__).name]


def test_zero_kernel():
    kernel, y, start = torch.zeros(3, 3), torch.randn(3, 2), torch.randn(3, 2)
    predictor = gradient_flow_mse(kernel, y)
    assert torch.equal(predictor(7.0, start, start, kernel)[1], start)
    with pytest.warns(IllConditionedWarning, match="condition number above inf"):
        train, test = predictor(math.inf, start, start, kernel)
    assert torch.equal(train, start)
    assert torch.equal(test, start)


# ---------------------------------------------------------------- bad arguments

K, Y = torch.eye(4), torch.randn(4, 2)


@pytest.mark.parametrize("factory", [gradient_flow_mse, gradient_descent_mse, kernel_ridge_regression, nngp_posterior])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k_train_train": [[1.0]]}, TypeError, "k_train_train must be a tensor of real numbers, got list"),
        ({"k_train_train": K.int()}, TypeError, "k_train_train must be a tensor of real numbers, got torch.int32"),
        ({"k_train_train": torch.ones(4)}, ValueError, r"k_train_train must have shape \[N1, N2, ...\] .*, got \[4\]"),
        ({"k_train_train": torch.ones(4, 4, 3)}, ValueError, r"k_train_train must have shape .*, got \[4, 4, 3\]"),
        (
            {"k_train_train": torch.eye(3)},
            ValueError,
            r"\[4, 4, 2, 2\] or \[4, 4, 2\] or \[4, 4\] for y_train .* \[4, 2\], got \[3, 3\]\. .* trace_axes= and",
        ),
        ({"k_train_train": K / 0}, ValueError, "k_train_train holds numbers that are not finite"),
        ({"k_train_train": K + torch.ones(4, 4).triu()}, ValueError, "k_train_train must be symmetric, .* of the norm"),
        (
            {"k_train_train": -K},
            ValueError,
            "k_train_train must be positive semi-definite, but its eigenvalues, with diag_reg=0, go from -1 to -1",
        ),
        ({"y_train": [1.0]}, TypeError, "y_train must be a tensor of real numbers, got list"),
        ({"y_train": torch.ones(4).int()}, TypeError, "y_train must be a tensor of real numbers, got torch.int32"),
        ({"diag_reg": -0.1}, ValueError, "diag_reg must be at least 0 and finite, got -0.1"),
        ({"diag_reg": "1"}, TypeError, "diag_reg must be a number, got str"),
        ({"diag_reg": math.inf}, ValueError, "diag_reg must be at least 0 and finite, got inf"),
    ],
)
def test_bad_training_sets(factory, arguments, error, message):
    arguments = {"k_train_train": K, "y_train": Y, **arguments}
    with pytest.raises(error, match=message):
        factory(arguments.pop("k_train_train"), arguments.pop("y_train"), **arguments)


@pytest.mark.parametrize(
    ("factory", "arguments", "error", "message"),
    [
        (gradient_flow_mse, {"learning_rate": 0.0}, ValueError, "learning_rate must be above 0 and finite, got 0.0"),
        (gradient_flow_mse, {"learning_rate": None}, TypeError, "learning_rate must be a number, got NoneType"),
        (gradient_descent_mse, {"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        (gradient_descent_mse, {"learning_rate": -1}, ValueError, "learning_rate must be above 0 and finite, got -1"),
    ],
)
def test_bad_rates(factory, arguments, error, message):
    with pytest.raises(error, match=message):
        factory(K, Y, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t": -1.0}, ValueError, "t must not be negative and be a number, got -1.0"),
        ({"t": [0.0, math.nan]}, ValueError, "t must not be negative and be a number"),
        ({"t": "soon"}, TypeError, "t must be a number or an array of numbers, got str"),
        ({"f_train_0": Y[:3]}, ValueError, r"f_train_0 (must have|of) shape \[[34], 2\], got "),
        ({"f_train_0": [0.0]}, TypeError, "f_train_0 must be a tensor of real numbers, got list"),
        ({"f_test_0": Y[:3]}, ValueError, "k_test_train must be given beside f_test_0"),
        ({"k_test_train": K[:3]}, ValueError, "f_test_0 must be given beside k_test_train"),
        ({"f_test_0": Y, "k_test_train": K[:3]}, ValueError, r"f_test_0 must have shape \[3, 2\], got \[4, 2\]"),
        ({"f_test_0": Y, "k_test_train": K[:, :3]}, ValueError, r"k_test_train must have shape \[4, 4\], got \[4, 3\]"),
        ({"f_test_0": Y, "k_test_train": 3}, TypeError, "k_test_train must be a tensor of real numbers, got int"),
    ],
)
@pytest.mark.parametrize("factory", [gradient_flow_mse, lambda k, y: gradient_flow(half_mse, k, y)], ids=["mse", "any"])
def test_bad_predictions(factory, arguments, error, message):
    arguments = {"t": 1.0, "f_train_0": Y, **arguments}
    with pytest.raises(error, match=message):
        factory(K, Y)(**arguments)


def test_bad_steps():
    for predictor in (gradient_descent_mse(K, Y), gradient_descent(half_mse, K, Y)):
        for steps in (1.5, [1.0], True, None, "two", math.inf):
            with pytest.raises(TypeError, match="steps must be an integer or an array of integers, got "):
                predictor(steps, Y)
        with pytest.raises(ValueError, match="steps must not be negative, got -1"):
            predictor(-1, Y)


def test_bad_arguments_of_any_loss(monkeypatch):
    with pytest.raises(TypeError, match=r"loss must be a callable loss\(f, y_train\), got str"):
        gradient_flow("mse", K, Y)
    with pytest.raises(TypeError, match="y_train must be a tensor, got list"):
        gradient_flow(half_mse, K, [1.0])
    with pytest.raises(ValueError, match="tolerance must be above 0 and below 1, got 0"):
        gradient_flow(half_mse, K, Y, tolerance=0)
    for factory in (gradient_flow, gradient_descent):
        with pytest.raises(ValueError, match="learning_rate must be above 0"):
            factory(half_mse, K, Y, learning_rate=0)
        with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
            factory(half_mse, K, Y, momentum=1)
    for t in (math.inf, None):
        with pytest.raises(ValueError, match="t must be finite: the flow of a general loss has no closed form"):
            gradient_flow(half_mse, K, Y)(t, Y)
    with pytest.raises(TypeError, match=r"f_train_0 must be a tensor \[N, \*out\]: y_train, which holds classes"):
        gradient_flow(half_mse, K, torch.arange(4))(1.0)
    with pytest.raises(ValueError, match=r"\[5, 5, 2\] or \[5, 5\] for f_train_0 of shape \[5, 2\], got \[4, 4\]"):
        gradient_flow(half_mse, K, Y)(1.0, torch.ones(5, 2))
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=r"gradient_flow needs SciPy: pip install ggn-ntk\[dynamics\]"):
        gradient_flow(half_mse, K, Y)(1.0, Y)


@pytest.mark.filterwarnings("ignore:lsoda", "ignore:Excess")
def test_a_solver_that_fails_says_so():
    with pytest.raises(RuntimeError, match="The ODE solver found no finite solution: "):
        gradient_flow(lambda f, y: (f * math.nan).sum(), K, Y)(10.0, Y)


def test_bad_kernels_of_posteriors():
    posterior = nngp_posterior(K, Y)
    with pytest.raises(ValueError, match=r"k_test_test must have shape \[3, 3\] to fit k_test_train, got \[4, 4\]"):
        posterior(K[:3], K)
    with pytest.raises(ValueError, match="k_test_test must be symmetric"):
        posterior(K, torch.ones(4, 4).triu())
    kernels = EmpiricalKernels(K, K)
    with pytest.raises(TypeError, match=r"k_train_train must be EmpiricalKernels\(ntk=..., nngp=...\), got Tensor"):
        ntk_ensemble(K, Y)
    with pytest.raises(TypeError, match=r"k_test_train must be EmpiricalKernels"):
        ntk_ensemble(kernels, Y)((K, K), K)
    with pytest.raises(ValueError, match=r"k_train_train.nngp must have shape \[4, 4\], got \[3, 3\]"):
        ntk_ensemble(EmpiricalKernels(K, torch.eye(3)), Y)
    with pytest.raises(ValueError, match=r"k_train_train.ntk must have shape"):
        ntk_ensemble(EmpiricalKernels(torch.eye(3), K), Y)
    with pytest.raises(ValueError, match=r"k_test_train.nngp must have shape \[3, 4\], got \[4, 4\]"):
        ntk_ensemble(kernels, Y)(EmpiricalKernels(K[:3], K), K[:3, :3])


def test_bad_axes():
    for factory in (
        gradient_flow_mse,
        gradient_descent_mse,
        kernel_ridge_regression,
        nngp_posterior,
        lambda k, y, **axes: gradient_flow(half_mse, k, y, **axes)(1.0),
        lambda k, y, **axes: gradient_descent(half_mse, k, y, **axes)(1),
        lambda k, y, **axes: ntk_ensemble(EmpiricalKernels(k, k), y, **axes),
        lambda k, y, **axes: max_learning_rate(k, y_train=y, **axes),
    ):
        with pytest.raises(
            ValueError, match=r"must have shape \[4, 4, 2\] for y_train of shape \[4, 2\], got \[4, 4\]\.$"
        ):
            factory(K, Y, diagonal_axes=0)
        with pytest.raises(ValueError, match="trace_axes names output axis 1"):
            factory(K, Y, trace_axes=1)
        with pytest.raises(ValueError, match="trace_axes and diagonal_axes both name output axis 0"):
            factory(K, Y, trace_axes=0, diagonal_axes=-1)
        with pytest.raises(TypeError, match="trace_axes must be an integer, an iterable of integers or None"):
            factory(K, Y, trace_axes="0")
    with pytest.raises(ValueError, match="y_train must be given beside trace_axes and diagonal_axes"):
        max_learning_rate(K, trace_axes=0)


def test_kernels_with_errors_take_a_larger_ridge():
    kernel = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.01]))
    with pytest.raises(ValueError, match="If its entries have errors, a larger diag_reg makes up for them"):
        gradient_flow_mse(kernel, Y, diag_reg=0.001)
    gradient_flow_mse(kernel, Y, diag_reg=0.1)
    with pytest.raises(ValueError, match="momentum must be at least 0"):
        max_learning_rate(K, momentum=-0.1)
