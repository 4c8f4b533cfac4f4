"""Single output axes summed or taken at equal indices, on every route, against the full kernel in float64."""

from functools import cache
from itertools import product
from math import prod

import pytest
import torch
from cases import BY_NAME, CustomParameter
from conftest import (
    BAD_AXES,
    DTYPES,
    METHODS,
    ROLES,
    assert_close,
    axes_of,
    batch_sizes,
    exchanged,
    fully_convolutional,
    limit_memory,
    loop_jacobians,
    reduce_axes,
)
from covering import covers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, nn

from ggn_ntk import empirical_ntk, empirical_ntk_vivit, explain
from ggn_ntk.contraction import contract
from ggn_ntk.memory.chunks import split_outputs
from ggn_ntk.problem.output_axes import KernelAxes, OutputAxes
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

# Every way to compute a kernel.
ROUTES = [
    {"capture": "sequential"},
    {"capture": "autograd"},
    *({"method": method} for method in METHODS if method not in ("structured", "auto")),
    {},
]

# The functions that are one route each.
FUNCTIONS = [empirical_ntk_vivit, jacobian_contraction, ntk_vector_products]


def tied():
    """A convolution that is called twice."""
    twice = nn.Conv2d(1, 1, 2)
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), nn.Conv2d(1, 2, 1))


class Shifted(nn.Module):
    """A layer without a rule behind one with, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Conv2d(1, 2, 2), nn.Parameter(torch.rand(2, 1, 1))
        self.unused = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return (self.layer(x) * self.shift).tanh()


NETWORKS = {
    "convolutional": (fully_convolutional, (1, 4, 3)),
    "one_channel": (lambda: fully_convolutional(channels=1), (1, 4, 3)),
    "one_output": (lambda: fully_convolutional(channels=1), (1, 3, 3)),
    "tied": (tied, (1, 4, 3)),
    "fallback": (Shifted, (1, 3, 3)),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]
    return model().to(dtype), torch.randn(3, *shape).to(dtype), torch.randn(2, *shape).to(dtype)


@cache
def full(name, symmetric):
    """Each parameter's full kernel [N1, N2, C, H, W, C, H, W] from Jacobians in float64."""
    torch.manual_seed(0)
    model, x1, x2 = build(name)
    if name in ("convolutional", "one_channel"):  # the numbers of float32, so that both dtypes compute the same
        model, x1, x2 = model.float().double(), x1.float().double(), x2.float().double()
    out = model(x1).shape[1:]
    first, second = loop_jacobians(model, x1), loop_jacobians(model, x1 if symmetric else x2)
    return {
        key: torch.einsum("ncp,mdp->nmcd", first[key], second[key]).reshape(len(first[key]), -1, *out, *out)
        for key in first
    }


def check(name, roles, symmetric, dtype=torch.float64, **options):
    """Compare a kernel with the full one, reduced."""
    model, x1, x2 = build(name, dtype)
    kernel = empirical_ntk(model, x1, None if symmetric else x2, **axes_of(roles), **options)
    assert_close(kernel, reduce_axes(sum(full(name, symmetric).values()), roles))
    if symmetric:
        assert torch.equal(kernel, exchanged(kernel, roles))


@covers({"route, roles": list(product(ROUTES, ROLES)), "symmetric": [False, True], "dtype": DTYPES})
def test_every_combination_of_axes(route, roles, symmetric, dtype):
    check("convolutional", roles, symmetric, dtype, **route)


@covers(
    {
        "name, roles": list(product(["one_channel", "one_output", "tied", "fallback"], ROLES)),
        "symmetric": [False, True],
        "options": [{"capture": "autograd"}, {"check": True}],
    }
)
def test_other_networks(name, roles, symmetric, options):
    check(name, roles, symmetric, **options)


@covers(
    {
        "roles": [(roles,) for roles in ROLES],
        "name": ["convolutional", "tied", "fallback"],
        "route": [{}, {"capture": "autograd"}, {"method": "jacobian_contraction"}],
    }
)
def test_per_parameter(name, roles, route):
    model, x1, x2 = build(name)
    expected = full(name, False)
    kernels = empirical_ntk(model, x1, x2, per_parameter=True, check=True, **axes_of(roles), **route)
    assert list(kernels) == list(expected)
    for key, kernel in kernels.items():
        scale = reduce_axes(sum(expected.values()), roles)
        assert_close(kernel, reduce_axes(expected[key], roles), scale=scale)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_parameters_and_check(route):
    model, x1, x2 = build("convolutional")
    roles = ("kept", "traced", "diagonal")
    kernel = empirical_ntk(model, x1, x2, params=["2.weight", "0.bias"], check=True, **axes_of(roles), **route)
    expected = full("convolutional", False)
    assert_close(kernel, reduce_axes(expected["2.weight"] + expected["0.bias"], roles))


@covers({"function, roles": list(product(FUNCTIONS, ROLES)), "symmetric": [False, True]})
def test_functions_of_one_route(function, roles, symmetric):
    model, x1, x2 = build("convolutional")
    expected = full("convolutional", symmetric)
    whole = reduce_axes(sum(expected.values()), roles)
    assert_close(function(model, x1, None if symmetric else x2, **axes_of(roles)), whole)
    kernels = function(model, x1, None if symmetric else x2, params=["0.bias"], per_parameter=True, **axes_of(roles))
    assert list(kernels) == ["0.bias"]
    assert_close(kernels["0.bias"], reduce_axes(expected["0.bias"], roles), scale=whole)


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products", "auto"])
def test_what_output_picks_has_the_axes(method):
    model, x1, x2 = build("convolutional")
    roles = ("kept", "traced", "kept")
    options = {"method": method, "output": lambda y: y.movedim(2, 1), **axes_of(roles)}
    kernel = empirical_ntk(model, x1, x2, **options)
    whole = sum(full("convolutional", False).values()).movedim((3, 6), (2, 5))
    assert_close(kernel, reduce_axes(whole, roles))


def test_devices(device):
    model, x1, x2 = build("convolutional")
    model, x1, x2 = model.to(device), x1.to(device), x2.to(device)
    for route in ROUTES:
        kernel = empirical_ntk(model, x1, x2, trace_axes=(1,), diagonal_axes=0, **route)
        assert kernel.device == x1.device
        assert_close(kernel, reduce_axes(sum(full("convolutional", False).values()), ("diagonal", "traced", "kept")))


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_compute_is_all_axes_in_one_role(route):
    model, x, _ = build("convolutional")
    for compute, axes in [("trace", {"trace_axes": (0, 1, 2)}), ("diagonal", {"diagonal_axes": [0, -1, 1]})]:
        kernel = empirical_ntk(model, x, compute=compute, **route)
        assert torch.equal(empirical_ntk(model, x, **axes, **route), kernel)
    assert torch.equal(empirical_ntk(model, x, trace_axes=(), **route), empirical_ntk(model, x, **route))


def test_negative_axes_count_from_the_last_output_axis():
    model, x, _ = build("convolutional")
    first, second = empirical_ntk(model, x, trace_axes=(-1, -2)), empirical_ntk(model, x, trace_axes=iter([1, 2]))
    assert torch.equal(first, second)
    assert first.shape == (3, 3, 2, 2)
    assert torch.equal(empirical_ntk(model, x, diagonal_axes=-3), empirical_ntk(model, x, diagonal_axes=0))


# ---------------------------------------------------------------- a few outputs or samples at a time


@covers(
    {
        "roles, capture": list(product(ROLES, ["autograd", "auto"])),
        "budget": [1, 300, 600],
        "name": ["convolutional", "tied", "fallback"],
        "symmetric": [False, True],
    }
)
def test_outputs_in_chunks(roles, capture, budget, name, symmetric, monkeypatch):
    limit_memory(monkeypatch, backpropagated=8 * budget)
    monkeypatch.setattr(contract, "available", lambda device: None)
    check(name, roles, symmetric, capture=capture)


@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_merging_undoes_separating(roles):
    axes = axes_of(roles)
    axes = OutputAxes(Size(range(2, 2 + len(roles))), tuple(axes["trace_axes"]), tuple(axes["diagonal_axes"]))
    check_merging(KernelAxes(axes, axes))


def test_merging_undoes_separating_two_shapes():
    check_merging(KernelAxes(OutputAxes(Size([2, 3])), OutputAxes(Size([4]))))


def check_merging(axes):
    kernel = torch.randn(3, 2, *axes.shape)
    separated = axes.separate(kernel)
    assert separated.shape[2:] == axes.kernel_shape
    assert torch.equal(axes.merge(separated), kernel)


@settings(deadline=None)
@given(
    roles=st.lists(st.sampled_from(["kept", "traced", "diagonal"]), min_size=1, max_size=4),
    size=st.integers(0, 60),
    data=st.data(),
)
def test_chunks_hold_each_pair_once(roles, size, data):
    out = Size(data.draw(st.integers(1, 4)) for _ in roles)
    axes = axes_of(roles)
    axes = OutputAxes(out, tuple(axes["trace_axes"]), tuple(axes["diagonal_axes"]))
    check_chunks(KernelAxes(axes, axes), size, apart=data.draw(st.booleans()))


@settings(deadline=None)
@given(outputs=st.tuples(*[st.lists(st.integers(1, 4), max_size=3)] * 2), size=st.integers(0, 60))
def test_chunks_of_two_shapes(outputs, size):
    check_chunks(KernelAxes(*(OutputAxes(Size(out)) for out in outputs)), size, apart=True)


def check_chunks(axes, size, *, apart):
    """The chunks of some axes put a kernel together."""
    first, second = (torch.randn(side.out_shape.numel()).double() for side in axes)
    if not apart:
        second = first
    kernel = torch.zeros(1, 1, *axes.shape).double()
    for chunk in split_outputs(axes, size, apart=apart):
        assert chunk.outputs[0].numel() == prod(chunk.roles)
        assert max(len(outputs) for outputs in chunk.outputs) <= max(1 if apart else 2, size)
        x, y = (
            values[outputs].reshape(chunk.roles.among(len(outputs)))
            for values, outputs in zip((first, second), chunk.outputs, strict=True)
        )
        chunk.add(kernel, torch.einsum("ecf,edf->ecd", x, y)[None, None])
    x, y = first[axes.first.numbers], second[axes.second.numbers]
    torch.testing.assert_close(kernel[0, 0], torch.einsum("ecf,edf->ecd", x, y))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_blocks_of_samples(roles, symmetric, monkeypatch):
    for rows, columns, passing in [(1, 1, 1), (200, 1, 10**6), (1, 200, 10**6), (10**6, 10**6, 1)]:
        limit_memory(monkeypatch, rows=8 * rows, columns=8 * columns, passing=8 * passing)
        check("convolutional", roles, symmetric, capture="sequential")


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("route", ["sequential", "autograd"])
def test_axes_prune_the_contraction(route):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3))
    x1, x2 = torch.randn(3, 2, 8, 8), torch.randn(2, 2, 8, 8)

    def costs(**axes):
        return {c.parameter: c for c in explain(model, x1, x2, capture=route, **axes).contractions}

    whole, traced, diagonal = costs(), costs(trace_axes=(1, 2)), costs(diagonal_axes=(1, 2))
    assert list(whole) == list(traced) == list(diagonal) == ["2.weight", "2.bias", "0.weight", "0.bias"]
    for name in whole:
        assert traced[name].flops <= diagonal[name].flops < whole[name].flops / 2
        assert traced[name].memory <= diagonal[name].memory <= whole[name].memory


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_AXES)
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_bad_arguments(route, arguments, error, message):
    model, x, _ = build("convolutional")
    with pytest.raises(error, match=message):
        empirical_ntk(model, x, **arguments, **route)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_AXES)
@pytest.mark.parametrize("function", [*FUNCTIONS, explain])
def test_bad_arguments_of_other_functions(function, arguments, error, message):
    model, x, _ = build("convolutional")
    with pytest.raises(error, match=message):
        function(model, x, **arguments)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_missing_axes_are_found_before_all_samples_are_evaluated(route, monkeypatch):
    model, x, _ = build("convolutional")
    sizes = batch_sizes(monkeypatch)
    with pytest.raises(ValueError, match="trace_axes names output axis 3"):
        empirical_ntk(model, x.repeat(30, 1, 1, 1), trace_axes=3, **route)
    assert 0 < max(sizes) < 90


def test_outputs_without_axes():
    model, x, _ = BY_NAME["output_scalar"].build()
    assert empirical_ntk(model, x, trace_axes=()).shape == (3, 3)
    with pytest.raises(ValueError, match="Accepted, counted without the sample axis: none"):
        empirical_ntk(model, x, trace_axes=0)


def test_one_output_axis_beside_a_fallback():
    model, x = CustomParameter().double(), torch.randn(3, 5).double()
    for compute, axes in [("trace", {"trace_axes": 0}), ("diagonal", {"diagonal_axes": 0})]:
        assert torch.equal(empirical_ntk(model, x, **axes), empirical_ntk(model, x, compute=compute))
