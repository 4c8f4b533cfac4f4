"""Functions of parameters, on every route and through every front door."""

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from cases import tied_mlp
from conftest import PRETENDS, assert_close, call, first_samples, kernel_of, num_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from unchanged import process_state, unchanged

from ggn_ntk import (
    RouteWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_vivit,
    explain,
    linearize,
    nngp,
    taylor_expand,
)
from ggn_ntk.problem.functions import as_module, own_parameters
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

ROUTES = ["structured", "jacobian_contraction", "ntk_vector_products"]


def jacobians(function, params, x):
    """The Jacobian [N, C, P] of a function, one sample and one output at a time; equal objects are one parameter."""
    leaves, structure = tree_flatten(dict(params))
    copies = {id(t): t.detach().clone().requires_grad_(t.is_floating_point()) for t in leaves}
    wanted = [t for t in copies.values() if t.requires_grad]
    bound = partial(function, tree_unflatten([copies[id(t)] for t in leaves], structure))
    rows = []
    for n in range(num_samples(x)):
        outputs = call(bound, first_samples(x, slice(n, n + 1))).flatten()
        rows.append(
            [
                torch.autograd.grad(y, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
                for y in outputs
            ]
        )
    return torch.stack([torch.stack([torch.cat([g.flatten() for g in row]) for row in sample]) for sample in rows])


def expected(function, params, x1, x2=None):
    """The kernel [N1, N2, C, C]."""
    first = jacobians(function, params, x1)
    return torch.einsum("ncp,mdp->nmcd", first, first if x2 is None else jacobians(function, params, x2))


def weights(*sizes):
    return {f"w{i}": torch.randn(n, m).double() for i, (n, m) in enumerate(pairwise(sizes))}


def mlp(params, x):
    return torch.tanh(x @ params["w0"] + params.get("b0", 0)) @ params["w1"]


def normalised():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    nn.init.normal_(net[1].running_mean)
    return net


class Case(NamedTuple):
    function: object
    params: object
    x1: object
    x2: object


def dictionary():
    params = {**weights(5, 4, 2), "b0": torch.randn(4).double()}
    return Case(mlp, params, torch.randn(3, 5).double(), torch.randn(2, 5).double())


def of_a_module():
    net = normalised()
    return Case(
        lambda params, x: functional_call(net, params, (x,)),
        dict(net.named_parameters()),
        torch.randn(3, 5).double(),
        torch.randn(2, 5).double(),
    )


def of_a_tied_module():
    net = tied_mlp().double()
    return Case(
        lambda params, x: functional_call(net, params, (x,)),
        {name: p.detach() for name, p in net.named_parameters()},
        torch.randn(3, 5).double(),
        torch.randn(2, 5).double(),
    )


def of_a_shell():
    """The module that says how to compute is empty, as where many are stacked."""
    nets = [normalised() for _ in range(2)]
    shell = normalised().to("meta")
    params, buffers = stack_module_state(nets)
    buffers = {name: b[1] for name, b in buffers.items()}
    return Case(
        lambda params, x: functional_call(shell, (params, buffers), (x,)),
        {name: p[1] for name, p in params.items()},
        torch.randn(3, 5).double(),
        torch.randn(2, 5).double(),
    )


def heat(params, t, x):
    """The residual u_t - u_xx of a network, [N]."""

    def u(t, x):
        return mlp(params, torch.stack([t, x]))[0]

    u_t, u_xx = jacrev(u, 0), jacrev(jacrev(u, 1), 1)
    return vmap(lambda t, x: u_t(t, x) - u_xx(t, x))(t, x)


def of_a_part():
    """A module of the user's as the function of the weight alone, elsewhere for three of the samples."""
    layer, x1 = nn.Linear(5, 4).double(), torch.randn(5, 5).double()

    def function(params, x):
        other = functional_call(layer, {"weight": 2 * params["w"]}, (x,))
        return torch.tanh(torch.where(x[:, :1] > 1.5, other, functional_call(layer, {"weight": params["w"]}, (x,))))

    x1[:, 0].clamp_(max=1.4)
    x1[[1, 3, 4], 0] = 2.0
    return Case(function, {"w": layer.weight}, x1, torch.randn(2, 5).double())


def residual():
    x1, x2 = (torch.randn(2, n).double() for n in (3, 2))
    return Case(heat, weights(2, 4, 1), tuple(x1), tuple(x2))


def nested():
    """Values of all kinds, at several levels, some of them integers."""

    def function(params, x):
        h = x
        for layer in params["layers"]:
            h = torch.tanh(h @ layer["w"] + layer["b"])
        return h[:, params["order"]] * params["scale"][0]

    layers = [{"w": torch.randn(5, 4).double(), "b": torch.randn(4).double()} for _ in range(1)]
    layers += [OrderedDict(w=torch.randn(4, 3).double(), b=torch.randn(3).double())]
    params = {"layers": layers, "scale": (torch.randn(3).double(),), "order": torch.tensor([2, 0, 1])}
    return Case(function, MappingProxyType(params), torch.randn(3, 5).double(), torch.randn(2, 5).double())


def views():
    """Parts of one vector, with a graph."""
    theta = torch.randn(28).double().requires_grad_() * 1
    w0, w1 = theta.split((20, 8))
    return Case(mlp, {"w0": w0.view(5, 4), "w1": w1.view(4, 2)}, torch.randn(3, 5).double(), torch.randn(2, 5).double())


def tied():
    w = torch.randn(4, 4).double()
    return Case(mlp, {"w0": w, "w1": w}, torch.randn(3, 4).double(), torch.randn(2, 4).double())


def by_keyword():
    def function(params, *, x, mask):
        return mlp(params, x * mask)

    x1, x2 = ({"x": torch.randn(n, 5).double(), "mask": torch.randint(2, (n, 5))} for n in (3, 2))
    return Case(function, weights(5, 4, 2), x1, x2)


def of_places_in_a_data_set():
    data = torch.randn(9, 5).double()
    return Case(lambda params, i: mlp(params, data[i]), weights(5, 4, 2), torch.tensor([3, 7, 7]), torch.tensor([1, 3]))


def of_single_samples():
    return Case(vmap(mlp, (None, 0)), weights(5, 4, 2), torch.randn(3, 5).double(), torch.randn(2, 5).double())


def of_any_names():
    names = ["", "forward", "_parameters", "a.b.", "training"]
    params = {name: torch.randn(5).double() for name in names}
    return Case(
        lambda params, x: torch.stack([x @ p for p in params.values()], -1).sin(),
        params,
        torch.randn(3, 5).double(),
        torch.randn(2, 5).double(),
    )


class Scaled:
    """Something else that can be called, with a module of its own."""

    def __init__(self):
        self.features, self.calls = normalised(), 0

    def __call__(self, params, x):
        self.calls += 1
        return mlp(params, self.features(x).detach())

    def method(self, params, x, power):
        return self(params, x) ** power


def callable_object():
    return Case(Scaled(), weights(2, 4, 2), torch.randn(3, 5).double(), torch.randn(2, 5).double())


def method_with_arguments():
    return Case(
        partial(Scaled().method, power=2), weights(2, 4, 2), torch.randn(3, 5).double(), torch.randn(2, 5).double()
    )


def on_a_frozen_module():
    """A module that the function calls as it is: its parameters are constants, whatever they require."""
    net = normalised()
    return Case(
        lambda params, x: mlp(params, net(x)),
        weights(2, 4, 2),
        torch.randn(3, 5).double(),
        torch.randn(2, 5).double(),
    )


CASES = [
    dictionary,
    of_a_module,
    of_a_tied_module,
    of_a_shell,
    of_a_part,
    residual,
    nested,
    views,
    tied,
    by_keyword,
    of_places_in_a_data_set,
    of_single_samples,
    of_any_names,
    callable_object,
    method_with_arguments,
    on_a_frozen_module,
]


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_kernel(build, method):
    f, params, x1, x2 = build()
    full = expected(f, params, x1, x2)
    found = empirical_ntk(f, x1, x2, params=params, method=method, check=True)
    assert_close(found.reshape(full.shape), full)
    found = empirical_ntk(f, x1, params=params, method=method, compute="trace")
    assert_close(found, expected(f, params, x1).diagonal(dim1=2, dim2=3).sum(-1))


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_rules_cover_functions_and_nothing_is_changed(build):
    f, params, x1, x2 = build()
    tensors = [t for t in tree_flatten(dict(params))[0] if isinstance(t, torch.Tensor)]
    before = [(t.requires_grad, t._version, t.tolist(), t.grad_fn) for t in tensors]
    for t in tensors:
        if t.is_leaf and t.requires_grad:
            t.grad = torch.ones_like(t)
    state = process_state()
    explanation = explain(f, x1, x2, params=params)
    assert process_state() == state
    assert not explanation.fallback
    assert explanation.entries == sum({id(t): t.numel() for t in tensors if t.is_floating_point()}.values())
    assert [(t.requires_grad, t._version, t.tolist(), t.grad_fn) for t in tensors] == before
    assert all((t.grad == 1).all() for t in tensors if t.is_leaf and t.requires_grad)


@pytest.mark.skipif(not PRETENDS, reason="stands in for a GPU, with torch 2.9 or later")
@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("build", [dictionary, residual, nested, by_keyword], ids=lambda build: build.__name__)
def test_devices(build, method):
    f, params, x1, x2 = build()
    full = expected(f, params, x1, x2)
    there, y1, y2 = tree_map(lambda t: t.to("pretend"), (dict(params), x1, x2))
    with torch.autograd.set_multithreading_enabled(False):
        found = empirical_ntk(f, y1, y2, params=there, method=method)
    assert found.device.type == "pretend"
    assert_close(found.reshape(full.shape), full)


def test_every_front_door(dtype):
    net = normalised().to(dtype)
    x1, x2 = torch.randn(3, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    f, params = lambda params, x: {"y": functional_call(net, params, (x,))}, dict(net.named_parameters())
    picked = {"params": params, "output": lambda out: out["y"]}
    kernel, outputs = kernel_of(net, x1, x2), net(x1).detach()
    for function in (empirical_ntk, jacobian_contraction, ntk_vector_products):
        assert_close(function(f, x1, x2, **picked), kernel)
        found = function(f, x1, x2, **picked, per_parameter=True)
        assert list(found) == list(params)
        assert_close(sum(found.values()), kernel)
    product = torch.einsum("nc,md->nmcd", outputs, net(x2).detach())
    assert_close(nngp(f, x1, x2, **picked), product)
    both = empirical_kernels(f, x1, x2, **picked)
    assert_close(both.ntk, kernel)
    assert_close(both.nngp, product)
    assert {c.module for c in explain(f, x1, x2, **picked).contractions} == {"net.0", "net.1", "net.3"}
    new = {name: p.detach() + 0.1 for name, p in params.items()}
    for degree, expansion in ((1, linearize(f, **picked)), (2, taylor_expand(f, 2, **picked))):
        assert_close(expansion(new, x1), taylor_expand(net, degree)(new, x1).detach())
        assert list(expansion.point) == list(params)
    with pytest.raises(UnsupportedRouteError, match=r"it is a function, and ViViT takes nn.Sequential models of its"):
        empirical_ntk_vivit(f, x1, x2, params=params)
    with pytest.raises(UnsupportedRouteError, match=r"it is a function, which shows no layers. Use capture='autograd'"):
        empirical_ntk(f, x1, capture="sequential", **picked)


def test_expansions_of_nested_parameters():
    f, params, x, _ = nested()
    params = dict(params)
    expansion = taylor_expand(f, 1, params)
    start = tree_map(lambda t: t.clone(), params)
    at = f(start, x)
    assert_close(expansion(params, x), at)
    names = ["layers.0.w", "layers.0.b", "layers.1.w", "layers.1.b", "scale.0"]
    assert list(expansion.point) == names
    params["scale"][0].add_(1.0)  # a snapshot does not follow
    assert_close(expansion(start, x), at)
    step = params["scale"][0].requires_grad_()
    moved = expansion(params, x)
    assert_close(moved.detach(), f(params, x).detach())  # linear in the scale
    moved.sum().backward()
    assert step.grad is not None
    assert_close(expansion({"scale.0": step.detach()}, x), moved.detach())


def test_modules_that_a_function_refers_to_are_left_as_found():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.layer = nn.Linear(5, 2).double()
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            return self.layer(x).tanh()

    net, seen, held = Counts(), [], {"net": [Counts()]}
    net.layer.register_full_backward_hook(lambda *_: None)
    net.layer.weight.grad = torch.ones(2, 5).double()

    def f(params, x, other=held):
        seen.append(x)
        return functional_call(net, params, (x,)) + other["net"][0](x)

    params, x = dict(net.named_parameters()), torch.randn(3, 5).double()
    for method in ROUTES:
        with unchanged(nn.ModuleList([net, *held["net"]])):
            found = empirical_ntk(f, x, params=params, method=method)
        assert_close(found, expected(f, params, x))
        seen.clear()
        net.seen.clear()
        held["net"][0].seen.clear()
        empirical_ntk(f, x, params=params, method=method)
        assert not seen
        assert not net.seen


def test_random_numbers_and_interactions_are_named():
    net, x, generator = normalised().train(), torch.randn(3, 5).double(), torch.Generator()
    params = dict(net.named_parameters())
    with pytest.raises(UnsupportedModelError, match=r"net\.1: BatchNorm1d normalises by batch statistics"):
        empirical_ntk(lambda params, x: functional_call(net, params, (x,)), x, params=params)
    for function in (
        lambda p, x: F.dropout(mlp(p, x)),
        lambda p, x: mlp(p, x) + torch.rand(1, generator=generator),
    ):
        with pytest.raises(UnsupportedModelError, match="it"):
            empirical_ntk(function, x, params=weights(5, 4, 2))
    with pytest.raises(UnsupportedModelError, match="sample"):
        empirical_ntk(lambda p, x: mlp(p, x - x.mean(0)), x, params=weights(5, 4, 2))


def test_tensors_of_inference_mode():
    f, params, x, _ = dictionary()
    with torch.inference_mode():
        copies = {name: p.clone() for name, p in params.items()}
        found = empirical_ntk(f, x, params=copies)
    assert_close(found, expected(f, params, x))
    assert_close(empirical_ntk(f, x, params=copies), expected(f, params, x))


def test_threads_that_use_one_function_take_turns():
    net = normalised()
    params, x = dict(net.named_parameters()), torch.randn(3, 5).double()
    running, most, lock = [0], [0], threading.Lock()

    def f(params, x):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        y = functional_call(net, params, (x,))
        with lock:
            running[0] -= 1
        return y

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(empirical_ntk, f, x, params=params, method=method) for method in ROUTES * 2]
        jobs += [pool.submit(empirical_ntk, net, x), pool.submit(empirical_ntk, lambda *a: f(*a), x, params=params)] * 2
    for job in jobs:
        assert_close(job.result(), kernel_of(net, x))
    assert all(p is params[name] for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": None}, TypeError, "model must be .*, got function without params. Pass params=, a mapping of"),
        (
            {"params": ["w0"]},
            TypeError,
            "params must be a mapping of names to tensors where model is a function, .*list",
        ),
        ({"params": {"w0": None}}, TypeError, r"params\['w0'\] must be a tensor, .*, got NoneType"),
        ({"params": {"a": {"b": [1.0]}}}, TypeError, r"params\['a\.b\.0'\] must be a tensor, .*, got float"),
        (
            {"params": {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}},
            ValueError,
            r"params holds two .*'a\.b': rename",
        ),
        ({"params": {"w": torch.eye(5).to_sparse()}}, ValueError, r"params\['w'\] is of layout torch\.sparse_coo"),
        ({"params": {}}, ValueError, "it has no trainable parameter. .*; of a function, pass them as params"),
        ({"params": {"w": torch.arange(3)}}, ValueError, "it has no trainable parameter"),
        ({"params": weights(5, 4, 2)}, ValueError, "x1 is torch.float32, the model's parameters torch.float64"),
        ({"params": {"w": torch.ones(5, device="meta")}}, ValueError, "x1 is on cpu, the model's parameters on meta"),
        ({"params": {"w": torch.ones(5).half()}}, ValueError, "x1 is torch.float32, the model's parameters torch.floa"),
        (
            {"model": 3, "params": {}},
            TypeError,
            r"model must be a torch\.nn\.Module or a function f\(params, .* got int",
        ),
        (
            {"model": nn.Linear(5, 2), "params": weights(5, 4)},
            TypeError,
            r"params must be names .* of a mapping, make it",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    for function in (empirical_ntk, jacobian_contraction, explain, empirical_kernels):
        with pytest.raises(error, match=message):
            function(arguments.get("model", mlp), torch.randn(3, 5), params=arguments["params"])


def test_bad_arguments_of_kernels_of_outputs_and_of_expansions():
    x, net = torch.randn(3, 5).double(), normalised()
    with pytest.raises(TypeError, match=r"got function without params. Pass params="):
        nngp(mlp, x)
    for params in (dict(net.named_parameters()), ["0.weight"]):
        with pytest.raises(TypeError, match="params goes with functions alone: the NNGP kernel of a module"):
            nngp(net, x, params=params)
    assert_close(nngp(lambda params, x: x, x, params={}), torch.einsum("nc,md->nmcd", x, x))
    with pytest.raises(TypeError, match=r"got function without params"):
        linearize(mlp)
    with pytest.raises(TypeError, match=r"params must be a mapping of names to tensors where model is a function"):
        taylor_expand(mlp, 2, ["w0"])
    with pytest.raises(ValueError, match=r"new_params names 'w7', which the model does not have. It has: w0, w1"):
        linearize(mlp, weights(5, 4, 2))({"w7": x}, x)


def test_kernels_are_computed_outside_of_transforms():
    x = torch.randn(3, 5).double()
    with pytest.raises(ValueError, match=r"params\['w0'\] is what a torch.func transform makes of a tensor"):
        vmap(lambda w: empirical_ntk(mlp, x, params={"w0": w, "w1": torch.ones(4, 2).double()}))(torch.ones(2, 5, 4))


def test_kernels_of_modules_go_by_names():
    f, params, x, _ = nested()
    each = empirical_ntk(f, x, params=params, per_parameter=True)
    found = empirical_ntk(f, x, params=params, per_parameter="module")
    assert list(found) == ["layers.0", "layers.1", "scale"]
    assert_close(found["layers.0"], each["layers.0.w"] + each["layers.0.b"])


def divided(params, x):
    """Writes to a parameter at each call."""
    with torch.no_grad():
        params["w0"].div_(params["w0"].norm())
    return mlp(params, x)


def test_parameters_that_are_written_to():
    """Parts of one vector in memory are backed up each by itself."""
    theta, x = torch.randn(28).double(), torch.randn(3, 5).double()
    w0, w1 = theta.split((20, 8))
    params, before = {"w0": w0.view(5, 4), "w1": w1.view(4, 2)}, theta.tolist()
    full = expected(mlp, {"w0": params["w0"] / w0.norm(), "w1": params["w1"]}, x)
    for method in ("jacobian_contraction", "auto"):
        with pytest.warns(RouteWarning):
            found = empirical_ntk(divided, x, params=params, method=method)
        assert_close(found, full)
        assert theta.tolist() == before
    with pytest.raises(UnsupportedRouteError, match="w0, w1: its forward pass writes to it"):
        empirical_ntk(divided, x, params=params, method="structured")
    assert theta.tolist() == before


class UsesNone(nn.Linear):
    def forward(self, x):
        return x


@pytest.mark.parametrize("method", ROUTES)
def test_kernels_of_what_no_parameter_takes_part_in_are_zero(method):
    x, net = torch.randn(3, 5).double(), normalised()
    for f in (lambda params, x: x, lambda params, x: net(x)):
        assert not empirical_ntk(f, x, params=dict(net.named_parameters()), method=method).any()
    assert not empirical_ntk(UsesNone(5, 5).double(), x, method=method).any()


@pytest.mark.parametrize("method", ROUTES)
def test_a_module_that_is_held_twice_keeps_its_parameter(method):
    layer = nn.Linear(5, 5).double()
    net, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 5).double()
    weight = layer.weight
    found = empirical_ntk(
        lambda p, x: functional_call(net, p, (x,)), x, params=dict(net.named_parameters()), method=method
    )
    assert layer.weight is weight
    assert_close(found, kernel_of(net, x))


trees = st.recursive(
    st.integers(1, 3),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=30)
@given(tree=st.dictionaries(st.sampled_from("xyz"), trees, min_size=1))
def test_structures_reach_the_function_as_they_are(tree):
    params = tree_map(torch.ones, tree)
    module = as_module(lambda params, x: params, params)
    found = module(None)
    assert tree_flatten(found)[1] == tree_flatten(params)[1]
    for one, other in zip(tree_flatten(found)[0], tree_flatten(params)[0], strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() == other.data_ptr()
    assert len(own_parameters(module)) == len(tree_flatten(params)[0])
