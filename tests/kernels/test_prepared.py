"""Prepared kernels: equal to ``empirical_ntk`` at each call, and verified anew where something has changed."""

import gc
import threading
import weakref
from itertools import pairwise

import pytest
import torch
from cases import BY_NAME
from conftest import COMPUTES, DEVICES
from covering import covers
from models import MODELS
from torch import nn
from torch.func import functional_call
from zoo import Residual

from ggn_ntk import Factored, NotFiniteWarning, UnsupportedModelError, empirical_ntk, empirical_ntk_fn, register_rule
from ggn_ntk.contraction.tape import Tape
from ggn_ntk.kernels import prepared


def _mlp(*sizes, dtype=torch.float32):
    layers = [m for pair in pairwise(sizes) for m in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


@pytest.fixture
def verified(monkeypatch):
    """The number of times that everything was verified."""
    calls = []
    whole = prepared.compute_kernels
    monkeypatch.setattr(prepared, "compute_kernels", lambda *args: calls.append(1) or whole(*args))
    return calls


def _change(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def _equal(a, b):
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
    return torch.equal(a, b)


@pytest.mark.parametrize("case", [*BY_NAME.values(), *MODELS], ids=str)
def test_equal_to_the_last_bit_and_follows_parameters(case, verified):
    model, x1, x2 = case.build()
    kernel = empirical_ntk_fn(model, output=case.output)
    for _ in range(4):  # the first verifies, the third writes down what the fourth plays again
        assert torch.equal(kernel(x1, x2), empirical_ntk(model, x1, x2, output=case.output))
        _change(model)
    # Its graph for all samples differs each time from that of the first ones.
    assert len(verified) == (4 if case.name == "branches" else 1)


@covers(
    {
        "name": ["mlp_Tanh", "conv2d_options", "batch_norm1d", "max_pool2d", "tied_transformer"],
        "compute": COMPUTES,
        "device": DEVICES,
    }
)
def test_on_devices(name, compute, device, verified):
    model, x1, _ = BY_NAME[name].build()
    model, x1 = model.to(device), x1.to(device)
    kernel = empirical_ntk_fn(model, compute=compute, per_parameter=True)
    for _ in range(4):
        assert _equal(kernel(x1), empirical_ntk(model, x1, compute=compute, per_parameter=True))
        _change(model)
    assert len(verified) == 1
    if device == "cpu" and name != "tied_transformer":
        assert all(isinstance(tape, Tape) for tape in kernel._tapes._tapes.values())


def _freeze(model):
    model[0].weight.requires_grad_(False)


def _hook(model):
    model[2].register_forward_hook(lambda module, args, output: 2 * output)


def _global_hook(model):
    nn.modules.module.register_module_forward_hook(lambda module, args, output: output.sin())


def _forward(model):
    model[1].forward = torch.cos


def _replace(model):
    model[1] = nn.Sigmoid()


def _option(model):
    model[3].negative_slope = 0.9


def _evaluate(model):
    model.eval()


def _tie(model):
    model[2].weight = model[4].weight


def _grow(model):
    model[4] = nn.Linear(4, 7).double()


def _rule(model):
    @register_rule(nn.Linear)
    def _(module, x, s):
        return {"weight": Factored("cno,ni->cnoi", (s, x)), "bias": Factored("cno->cno", (s,))}


@pytest.fixture
def _no_global_hooks():
    yield
    nn.modules.module._global_forward_hooks.clear()


@pytest.mark.usefixtures("_no_global_hooks")
@pytest.mark.parametrize(
    "change",
    [_freeze, _hook, _global_hook, _forward, _replace, _option, _evaluate, _tie, _grow, _rule],
    ids=lambda f: f.__name__,
)
def test_what_verification_depends_on_is_compared(change, verified):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 4)).double()
    x = torch.randn(3, 5).double()
    kernel = empirical_ntk_fn(model)
    for _ in range(4):
        kernel(x)
    assert len(verified) == 1
    change(model)
    for _ in range(4):
        assert torch.equal(kernel(x), empirical_ntk(model, x))
    assert len(verified) == 2


def test_each_form_of_samples_is_verified_once(verified):
    model, x = _mlp(5, 4, 2, dtype=torch.float64), torch.randn(6, 5).double()
    kernel = empirical_ntk_fn(model)
    for _ in range(2):
        for given in ((x,), (x[:4],), (x, x[:4]), (x[:1], x)):
            assert torch.equal(kernel(*given), empirical_ntk(model, *given))
    assert len(verified) == 4
    model.float()
    assert torch.equal(kernel(x.float()), empirical_ntk(model, x.float()))
    assert len(verified) == 5


def test_another_graph_is_verified(verified):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.times = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.0), requires_grad=False)

        def forward(self, x):
            for _ in range(int(self.times)):
                x = self.layer(x).tanh()
            return x

    model, x = Loop().double(), torch.randn(4, 4).double()
    kernel = empirical_ntk_fn(model)
    for times in (1, 2, 2, 3):
        model.times.fill_(times)
        assert torch.equal(kernel(x), empirical_ntk(model, x))
    assert len(verified) == 3


class Threshold(nn.Module):
    """Samples that interact beyond a threshold of the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        y = x * self.weight
        return y - y.mean(0) * (self.weight.detach()[0] > 2)


def test_verify_looks_once_more():
    model, x = Threshold(), torch.randn(4, 3).double()
    kernel = empirical_ntk_fn(model)
    kernel(x)
    with torch.no_grad():
        model.weight.fill_(3)
    with pytest.raises(UnsupportedModelError, match="influence one another"):
        kernel(x, verify=True)
    with pytest.raises(UnsupportedModelError, match="influence one another"):
        kernel(x)  # what was learnt before is forgotten


def test_not_finite(verified):
    model, x = _mlp(3, 4, 2, dtype=torch.float64), torch.randn(4, 3).double()
    kernel = empirical_ntk_fn(model)
    for _ in range(3):
        kernel(x)
    bad = x.clone()
    bad[1, 0] = torch.nan
    with pytest.warns(NotFiniteWarning, match=r"x1\[1\]"):
        found = kernel(bad)
    assert found[1].isnan().all()
    assert torch.equal(kernel(x), empirical_ntk(model, x))


def test_keywords():
    model, x = _mlp(3, 4, 2, dtype=torch.float64), torch.randn(4, 3).double()
    keywords = {"params": ["0.*"], "per_parameter": "module", "diagonal_axes": 0}
    kernel = empirical_ntk_fn(model, **keywords)
    for _ in range(4):
        assert _equal(kernel(x), empirical_ntk(model, x, **keywords))
    kernel = empirical_ntk_fn(model, paired=True)
    for _ in range(4):
        assert torch.equal(kernel(x), empirical_ntk(model, x, paired=True))
    kernel = empirical_ntk_fn(model, params=iter(["0.weight"]))
    assert torch.equal(kernel(x), kernel(x))
    with pytest.raises(TypeError, match="takes the keywords of empirical_ntk, got parameters"):
        empirical_ntk_fn(model, parameters=["0.weight"])
    with pytest.raises(ValueError, match="compute must be one of"):
        empirical_ntk_fn(model, compute="sum")
    with pytest.raises(ValueError, match="method must be one of"):
        empirical_ntk_fn(model, method="fast")
    with pytest.raises(TypeError, match="verify must be True or False, got int"):
        kernel(x, verify=1)


@pytest.mark.parametrize("method", ["jacobian_contraction", "ntk_vector_products", "vivit"])
def test_other_methods_check_at_each_call(method, verified):
    model, x = _mlp(3, 4, 2, dtype=torch.float64), torch.randn(4, 3).double()
    kernel = empirical_ntk_fn(model, method=method)
    for _ in range(2):
        assert torch.equal(kernel(x), empirical_ntk(model, x, method=method))
    assert len(verified) == 2


def test_functions_and_derivatives(verified):
    net = Residual().double()
    params, x = dict(net.named_parameters()), torch.randn(5, 2).double()

    def residual(params, x):
        return functional_call(net, params, (x,))

    kernel = empirical_ntk_fn(residual, params=params)
    for _ in range(3):
        assert torch.equal(kernel(x), empirical_ntk(residual, x, params=params))
        _change(net)
    assert len(verified) == 1


def test_no_samples_are_held():
    model, x = _mlp(3, 4, 2), torch.randn(4, 3)
    kernel, held = empirical_ntk_fn(model), weakref.ref(x.untyped_storage())
    for _ in range(4):
        kernel(x)
    del x
    gc.collect()
    assert held() is None


def test_left_as_found_and_no_graph():
    model, x = _mlp(3, 4, 2), torch.randn(4, 3)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    kernel = empirical_ntk_fn(model)
    with torch.inference_mode():
        results = [kernel(x) for _ in range(4)]
    assert not any(result.requires_grad or result.is_inference() for result in results)
    results[2].zero_()  # a result belongs to the caller
    assert torch.equal(kernel(x), results[0])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel(x), results[0])


def test_threads():
    model, xs = _mlp(3, 4, 2, dtype=torch.float64), [torch.randn(n, 3).double() for n in (3, 4, 5, 3)]
    kernel = empirical_ntk_fn(model)
    expected, found = [empirical_ntk(model, x) for x in xs], [[] for _ in xs]
    threads = [
        threading.Thread(target=lambda i: found[i].extend(kernel(xs[i]) for _ in range(10)), args=(i,))
        for i in range(len(xs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(f) == 10 and all(torch.equal(k, e) for k in f) for f, e in zip(found, expected, strict=True))


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(prepared, "_FORMS", 3)
    model = _mlp(3, 4, 2)
    kernel = empirical_ntk_fn(model)
    for n in range(1, 8):
        kernel(torch.randn(n, 3))
    assert len(kernel._known) <= 3


def test_options_in_lists_are_compared(verified):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d([3, 3], 1, [1, 1]), nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.randn(3, 2, 6, 6).double()
    kernel = empirical_ntk_fn(model)
    for _ in range(4):
        kernel(x)
    model[1].kernel_size[:], model[1].padding[:] = [1, 1], [0, 0]  # of the same output shape
    assert torch.equal(kernel(x), empirical_ntk(model, x))
    assert len(verified) == 2


class Failing(nn.Module):
    """Raises at some calls, in the middle of what it does to itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.seen = []

    def forward(self, x):
        h = self.norm(self.layer(x)).tanh()
        self.seen.append(len(x))
        if torch.is_grad_enabled() and x.sum() > 1e3:
            raise ArithmeticError("half-way")
        return h


def test_an_exception_half_way_in_a_repeated_call():
    model, x = Failing().double().eval(), torch.randn(4, 3).double()
    model.norm.running_mean.add_(0.1)
    model.norm.num_batches_tracked.add_(1)
    model(x).sum().backward()
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    kernel = empirical_ntk_fn(model)
    expected = [kernel(x) for _ in range(3)][-1]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads, seen, hooks = [p.grad.clone() for p in model.parameters()], list(model.seen), dict(model._forward_hooks)
    flags = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    with pytest.raises(ArithmeticError, match="half-way"):
        kernel(x + 1e4)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert (model.seen, dict(model._forward_hooks), model.training) == (seen, hooks, False)
    assert flags == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision())
    assert torch.equal(kernel(x), expected)
    handle.remove()


def test_three_samples_of_two_hundred_that_interact(verified):
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            y = self.layer(x)
            marked = (x[:, 0] > 50).to(y)[:, None]
            return y + marked * y.mean(0)

    model, x = Rare().double(), torch.randn(200, 3).double()
    kernel = empirical_ntk_fn(model)
    kernel(x)
    x[[20, 111, 180], 0] = 100.0
    with pytest.raises(UnsupportedModelError, match=r"x1\[20\].*x1\[111\].*x1\[180\]"):
        kernel(x, verify=True)
