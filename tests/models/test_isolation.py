"""A call leaves the model and the process as it found them."""

import copy
from collections import Counter, deque
from contextlib import suppress

import pytest
import torch
from backpack import backpack, disable, extend
from backpack.extensions import BatchGrad
from cases import BY_NAME, CASES, TiedTransformer, mlp, tied_mlp, twice_called
from conftest import COMPUTES, METHODS, assert_close, call
from covering import covers
from torch import nn
from unchanged import unchanged

from ggn_ntk import UnsupportedModelError, empirical_ntk
from ggn_ntk.kernels import ntk
from ggn_ntk.models.isolation import isolated
from ggn_ntk.reference import jacobian_contraction

each_method = pytest.mark.parametrize("method", METHODS)


@covers({"case": CASES, "method": lambda case: [m for m in METHODS if case.supports(m)], "compute": COMPUTES})
def test_a_call_changes_nothing(case, method, compute):
    model, x1, x2 = case.build()
    model.get_parameter(next(iter(dict(model.named_parameters())))).grad = None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with unchanged(model):
        empirical_ntk(model, x1, x2, compute=compute, method=method, check=True)


def test_a_refusal_changes_nothing(case):
    model, x1, x2 = case.build()
    model.train()
    model.append(nn.BatchNorm1d(3)) if isinstance(model, nn.Sequential) else model.add_module("extra", nn.Dropout())
    with unchanged(model), pytest.raises(UnsupportedModelError):
        empirical_ntk(model, x1, x2)


class Failing(nn.Module):
    """Raises at its n-th call."""

    calls = 0

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.history = []

    def forward(self, x):
        Failing.calls += 1
        self.history.append(Failing.calls)
        self.latest = Failing.calls
        if Failing.calls == self.n:
            raise ArithmeticError("half-way")
        return x.sin()


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("method", ["jacobian_contraction", "ntk_vector_products"])
def test_an_exception_half_way_changes_nothing(method, n):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), Failing(n), nn.Linear(4, 2)).eval()
    nn.init.normal_(model[1].running_mean)
    x1, x2 = torch.randn(3, 5), torch.randn(2, 5)
    Failing.calls = 0
    with unchanged(model), suppress(ArithmeticError):  # in torch.func's share of calls, plain autograd takes over
        empirical_ntk(model, x1, x2, method=method)
    assert Failing.calls >= n


@pytest.mark.parametrize("n", range(1, 12))
def test_an_exception_half_way_in_vivit_changes_nothing(n, monkeypatch):
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    calls = 0

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == n:
            raise torch.OutOfMemoryError("half-way")
        return original(*args)

    from vivit.extensions.secondorder.vivit.linear import pairwise_dot as original

    monkeypatch.setattr(
        "vivit.extensions.secondorder.vivit.linear.pairwise_dot", lambda t, **k: failing(t, *k.values())
    )
    torch.set_default_dtype(torch.float32)
    with unchanged(model):
        try:
            empirical_ntk(model, x, compute="trace", method="vivit")
        except torch.OutOfMemoryError:
            raised = True
        else:
            raised = False
    assert raised


def test_an_exception_while_summing_changes_nothing(monkeypatch):
    def failing(*args, **kwargs):
        raise MemoryError

    model, x = mlp(nn.Tanh)().double(), torch.randn(3, 5).double()
    monkeypatch.setattr(ntk.Request, "assemble", failing)
    for method in METHODS:
        with unchanged(model), pytest.raises(MemoryError):
            empirical_ntk(model, x, method=method)


@each_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_grad_mode(method, mode):
    model = mlp(nn.Tanh)()
    x1, x2 = torch.randn(3, 5), torch.randn(2, 5)
    expected = empirical_ntk(model, x1, x2, method=method)
    with mode(), unchanged(model):
        inside = empirical_ntk(model, x1 + 0, x2 + 0, method=method, check=True)
    assert not inside.requires_grad
    assert torch.equal(inside, expected)


@each_method
def test_model_that_the_user_extended_stays_extended(method):
    model, x = extend(mlp(nn.Tanh)().double()), torch.randn(3, 5).double()
    loss_func = extend(nn.MSELoss(reduction="sum"))
    seen = []
    model[0].register_full_backward_hook(lambda *args: seen.append("backward"))
    if method != "vivit":  # which refuses the forward hooks of users
        model[0].register_forward_hook(lambda *args: seen.append("forward"))
    expected = jacobian_contraction(model, x)
    model(x[:1])  # leaves BackPACK's input0 and output behind
    with backpack(BatchGrad()):
        loss = loss_func(model(x), torch.zeros(3, 3).double())
        with unchanged(model):  # between the user's forward and backward pass
            assert_close(empirical_ntk(model, x, method=method), expected)
        seen.clear()
        loss.backward()
    assert seen == ["backward"]
    assert [p.grad_batch.shape for p in model.parameters()] == [(3, *p.shape) for p in model.parameters()]


@each_method
def test_under_backpacks_disable(method):
    model, x = mlp(nn.Tanh)().double(), torch.randn(3, 5).double()
    expected = jacobian_contraction(model, x)
    with disable(), unchanged(model):
        assert_close(empirical_ntk(model, x, method=method), expected)


@each_method
def test_no_hook_of_the_users_parameters_fires(method):
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    for p in model.parameters():
        p.register_hook(lambda grad: pytest.fail("tensor hook"))
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("accumulate hook"))
    empirical_ntk(model, x, method=method, check=True)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "vivit"])  # which refuses the layer
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("before", [False, True])
def test_no_hook_that_a_forward_pass_registers_on_a_parameter_outlives_the_call(method, register, before):
    class Registers(nn.Linear):
        def forward(self, x):
            getattr(self.weight, register)(lambda *args: fired.append("of the forward pass"))
            return super().forward(x)

    model, x, fired = Registers(5, 3), torch.randn(3, 5), []
    if before:
        getattr(model.weight, register)(lambda *args: fired.append("of the user"))
    with unchanged(model):
        empirical_ntk(model, x, method=method)
    fired.clear()
    model.weight.sum().backward()
    assert fired == (["of the user"] if before else [])


@each_method
def test_compiled_models(method):
    model, x1, x2 = mlp(nn.Tanh)(), torch.randn(3, 5), torch.randn(2, 5)
    expected = empirical_ntk(model, x1, x2, method=method)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(x1)
    with unchanged(compiled):
        assert torch.equal(empirical_ntk(compiled, x1, x2, method=method), expected)
        kernels = empirical_ntk(compiled, x1, x2, method=method, per_parameter=True, params=["_orig_mod.0.bias"])
    assert list(kernels) == ["_orig_mod.0.bias"]
    model.compile(backend="eager")
    model(x1)
    with unchanged(model):
        assert torch.equal(empirical_ntk(model, x1, x2, method=method), expected)


@each_method
def test_autocast_of_the_caller_is_off(method):
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    expected = empirical_ntk(model, x, method=method)
    with torch.autocast("cpu", torch.bfloat16), unchanged(model):
        assert torch.equal(empirical_ntk(model, x, method=method), expected)


@each_method
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_of_the_caller_is_off(method, precision):
    model, x = nn.Linear(64, 64), torch.randn(8, 64)
    expected = empirical_ntk(model, x, compute="trace", method=method)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with unchanged(model):
            assert torch.equal(empirical_ntk(model, x, compute="trace", method=method), expected)
    finally:
        torch.set_float32_matmul_precision(before)


class Counting(nn.Module):
    """Keeps state of all kinds in its forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.by_name, self.names, self.count = [], {}, set(), 0
        self.recent, self.counter = deque(), Counter()

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(x)
        self.by_name[str(self.count)] = x
        self.names.add(str(self.count))
        self.recent.append(x)
        self.counter[self.count] += 1
        self.cached = x
        return self.layer(x)


@each_method
def test_state_that_a_forward_pass_keeps(method):
    if method == "vivit":
        pytest.skip("refused")
    model, x = Counting(), torch.randn(3, 5)
    with unchanged(model):
        empirical_ntk(model, x, method=method, check=True)
    assert model.calls == 0


def test_running_statistics_of_instance_norm_in_train_mode():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(12, 2)
    )
    x = torch.randn(3, 2, 4, 4)
    for method in ("auto", "ntk_vector_products"):
        with unchanged(model):
            empirical_ntk(model, x, method=method, check=True)


@pytest.mark.parametrize("build", [tied_mlp, twice_called, TiedTransformer])
def test_parameters_stay_the_same_objects(build):
    model = build().eval()
    x = torch.randint(7, (3, 4)) if build is TiedTransformer else torch.randn(3, 5)
    owners = [(m, dict(m._parameters)) for m in model.modules()]
    empirical_ntk(model, x)
    for module, parameters in owners:
        assert all(module._parameters[name] is p for name, p in parameters.items())


def test_the_model_still_trains_afterwards():
    model, x1, _ = BY_NAME["custom_parameter"].build()
    empirical_ntk(model, x1)
    call(model, x1).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "unused")


def test_nested_isolation():
    model = extend(mlp(nn.Tanh)())
    with unchanged(model), isolated(model), isolated(model):
        assert not any(module._backward_hooks for module in model.modules())
