"""Models on several devices, wrapped for several processes, and what switches of devices a call sets."""

import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from backpack import backpack, extend
from cases import mlp, moved
from conftest import METHODS, PRETENDS, assert_close, kernel_of
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ggn_ntk import (
    EmpiricalNTK,
    UnsupportedModelError,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_vivit,
    explain,
    linearize,
    nngp,
)
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

FUNCTIONS = {method: partial(empirical_ntk, method=method) for method in METHODS}
FUNCTIONS |= {f.__name__: f for f in (empirical_ntk_vivit, jacobian_contraction, ntk_vector_products, explain)}
FUNCTIONS |= {"kernels": empirical_kernels, "autograd": partial(empirical_ntk, capture="autograd")}
EACH = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
ON_PRETEND = pytest.mark.skipif(not PRETENDS, reason="stands in for a GPU, with torch 2.9 or later")


def model_of(seed=0):
    torch.manual_seed(seed)
    return mlp(nn.Tanh)().double()


# ---------------------------------------------------------------- several devices


class Across(nn.Module):
    """Its second half on another device, to which it takes what the first half makes."""

    def __init__(self, frozen=False):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), moved(nn.Linear(4, 2), "pretend").requires_grad_(not frozen)

    def forward(self, x):
        return self.second(self.first(x).tanh().to("pretend"))


SEVERAL = (
    r"its parameters are on several devices \(cpu, pretend:0\), and a kernel sums over all of them\. Move it to one"
)


@ON_PRETEND
@EACH
@pytest.mark.parametrize("frozen", [False, True])
def test_models_on_several_devices_are_refused_by_name(function, frozen):
    model, x = Across(frozen), torch.randn(3, 5)
    with torch.autograd.set_multithreading_enabled(False):
        for sets in ((x,), (x, x[:2])):
            with pytest.raises(UnsupportedModelError, match=SEVERAL):
                function(model, *sets)
        with pytest.raises(UnsupportedModelError, match=SEVERAL):
            function(nn.Sequential(nn.Linear(5, 4), moved(nn.Linear(4, 2), "pretend")), x)
        with pytest.raises(UnsupportedModelError, match=SEVERAL):
            function(model, x, params=["first.weight"])


@ON_PRETEND
def test_kernels_without_parameters_need_no_common_device():
    model, x = Across(), torch.randn(3, 5)
    with torch.autograd.set_multithreading_enabled(False):
        kernel = nngp(model, x, x[:2])
        features = model(x).detach().cpu()
    assert kernel.device.type == "pretend"
    assert_close(kernel, nngp(nn.Identity(), features, features[:2]))


@ON_PRETEND
@EACH
def test_inputs_elsewhere_are_refused_by_name(function):
    model = moved(nn.Sequential(nn.Linear(5, 2)), "pretend")
    with pytest.raises(ValueError, match=r"x1 is on cpu, the model's parameters on pretend:0\. Move one: x1\.to\(dev"):
        function(model, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"x1 is on pretend:0, the model's parameters on cpu"):
        function(model_of().float(), torch.randn(3, 5).to("pretend"))


# ---------------------------------------------------------------- several processes


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def replica(group):
    return DistributedDataParallel(model_of())


X1, X2 = torch.randn(3, 5).double(), torch.randn(2, 5).double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x2", [None, X2], ids=["symmetric", "pair"])
def test_replicas_work_as_their_module(replica, method, x2):
    sets = [X1] if x2 is None else [X1, x2]
    assert_close(empirical_ntk(replica, X1, x2, method=method, check=True), kernel_of(replica.module, *sets))
    assert all(p.grad is None for p in replica.parameters())
    replica(X1).sum().backward()  # it trains on
    assert all(p.grad is not None for p in replica.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_names_of_parameters_of_replicas(replica, method):
    """Those that the replica has, and those of its module."""
    expected = empirical_ntk(replica.module, X1, method=method, per_parameter=True)
    found = empirical_ntk(replica, X1, method=method, per_parameter=True)
    assert list(found) == [name for name, _ in replica.named_parameters()]
    for name, kernel in expected.items():
        assert_close(found[f"module.{name}"], kernel)
        for given in (f"module.{name}", name):
            assert_close(empirical_ntk(replica, X1, method=method, params=[given]), kernel)
    with pytest.raises(ValueError, match=r"close are: .*0\.weight"):
        empirical_ntk(replica, X1, method=method, params=["module.0.wieght"])


def test_other_functions_of_replicas(replica):
    module = replica.module
    assert_close(nngp(replica, X1, X2), nngp(module, X1, X2))
    for function in (jacobian_contraction, ntk_vector_products, empirical_ntk_vivit):
        assert_close(function(replica, X1, X2), kernel_of(module, X1, X2))
    for found, expected in zip(
        empirical_kernels(replica, X1, X2)[:2], empirical_kernels(module, X1, X2)[:2], strict=True
    ):
        assert_close(found, expected)
    of_both = (explain(x, X1) for x in (replica, module))
    in_replica, alone = ([c.order for c in found.contractions] for found in of_both)
    assert in_replica == alone
    new = {name: p.detach() + 0.1 for name, p in module.named_parameters()}
    expected = linearize(module)(new, X1).detach()
    assert_close(linearize(replica)({f"module.{name}": p for name, p in new.items()}, X1).detach(), expected)


@pytest.mark.parametrize("n1", [None, 3])
def test_the_extension_on_a_replicas_module(group, n1):
    model = extend(model_of())
    replica, loss, x = DistributedDataParallel(model), extend(nn.MSELoss()), torch.cat([X1, X2])
    for runs in (replica, model):
        with backpack(extension := EmpiricalNTK(n1)):
            loss(runs(x), torch.zeros(5, 3).double()).backward()
        sets = [x] if n1 is None else [X1, X2]
        assert_close(extension.ntk(), kernel_of(model_of(), *sets))


# ---------------------------------------------------------------- wrappers whose parameters cannot be exchanged


def script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, X1)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's class, which needs an accelerator."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


EXCHANGE = "whose parameters cannot be exchanged: use the module it was made from"
GATHER = r"whose parameters are sharded over processes: gather them in a module of its own \(with a full state dict\)"
WRAPPED = {
    "data parallel": (DataParallel, "DataParallel", EXCHANGE),
    "script": (script, "TopLevelTracedModule", EXCHANGE),
    "sharded": (FullyShardedDataParallel, "FullyShardedDataParallel", GATHER),
    "fully_shard": (sharded, "Linear|FSDPSequential", GATHER),
}


@EACH
@pytest.mark.parametrize("name", WRAPPED)
def test_other_wrappers_are_refused_by_name(group, function, name):
    wrap, kind, message = WRAPPED[name]
    for model, place in ((wrap(model_of()), ""), (nn.Sequential(nn.Identity(), wrap(model_of())), "1")):
        with pytest.raises(TypeError, match=rf"model (is|holds) an? ({kind}).*{message}") as info:
            function(model, X1)
        assert f"at '{place}" in str(info.value) or not place


@EACH
def test_replicas_inside_of_models_are_refused_by_name(group, function):
    for model, place in (
        (nn.Sequential(nn.Tanh(), DistributedDataParallel(model_of())), "1"),
        (DistributedDataParallel(nn.Sequential(DistributedDataParallel(model_of()))), "module.0"),
        (DistributedDataParallel(DistributedDataParallel(model_of())), "module"),
    ):
        with pytest.raises(TypeError, match=f"model holds a DistributedDataParallel at '{place}', {EXCHANGE}"):
            function(model, X1)


@pytest.mark.parametrize("name", WRAPPED)
def test_other_functions_refuse_wrappers(group, name):
    wrap, _, message = WRAPPED[name]
    model = wrap(model_of())
    with pytest.raises(TypeError, match=message):
        nngp(model, X1)
    with pytest.raises((TypeError, UnsupportedModelError), match=message):
        linearize(model)({key: p.detach() for key, p in model.named_parameters()}, X1)


# ---------------------------------------------------------------- cuDNN


def fused():
    return torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled


class Noting(nn.Module):
    """Takes down whether cuDNN and oneDNN are on when it is evaluated."""

    seen: ClassVar[set[tuple[bool, bool]]] = set()

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x):
        Noting.seen.add(fused())
        h = self.layer(x)
        return self.head((h[0] if isinstance(h, tuple) else h)[:, -1])


LAYERS = {kind.__name__: partial(kind, 3, 4, batch_first=True) for kind in (nn.LSTM, nn.GRU, nn.RNN)}
LAYERS |= {"Linear": partial(nn.Linear, 3, 4)}
SESSIONS = [nngp, explain, empirical_kernels, lambda model, x: linearize(model)(model, x)]
SESSIONS += [partial(empirical_ntk, method=method, check=True) for method in METHODS if method != "vivit"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("before", [(True, True), (False, True), (True, False)])
@pytest.mark.filterwarnings("ignore::ggn_ntk.RouteWarning")
def test_fused_recurrent_layers_are_off_for_these_alone(layer, before, monkeypatch):
    for backend, enabled in zip((torch.backends.cudnn, torch.backends.mkldnn), before, strict=True):
        monkeypatch.setattr(backend, "enabled", enabled)
    model, x = Noting(LAYERS[layer]()).double(), torch.randn(3, 2, 3).double()
    expected = kernel_of(model, x)
    for function in SESSIONS:
        Noting.seen.clear()
        found = function(model, x)
        assert Noting.seen == {before if layer == "Linear" else (False, False)}
        assert fused() == before
        if getattr(function, "func", None) is empirical_ntk:
            assert_close(found, expected)
    model.head.register_forward_pre_hook(lambda *_: exec("raise ArithmeticError"))
    for function in SESSIONS:
        with pytest.raises(ArithmeticError):
            function(model, x)
        assert fused() == before
