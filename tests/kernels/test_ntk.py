"""The front door: properties of the kernel, the choice of a route, and check=True."""

from itertools import product

import pytest
import torch
from cases import BY_NAME, Residual, mlp
from conftest import COMPUTES, DTYPES, METHODS, assert_close
from covering import covers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ggn_ntk
from ggn_ntk import NTKMismatchError, empirical_ntk, empirical_ntk_vivit, reference
from ggn_ntk.kernels import ntk
from ggn_ntk.kernels.ntk import Method

sizes = st.integers(1, 5)
methods = st.sampled_from(METHODS)


def network(inputs, width, outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


@settings(deadline=None, max_examples=30)
@given(method=methods, n1=sizes, n2=sizes, inputs=sizes, width=sizes, outputs=sizes)
def test_transpose_exchanges_the_inputs(method, n1, n2, inputs, width, outputs):
    model = network(inputs, width, outputs)
    x1, x2 = torch.randn(n1, inputs).double(), torch.randn(n2, inputs).double()
    kernel, swapped = empirical_ntk(model, x1, x2, method=method), empirical_ntk(model, x2, x1, method=method)
    assert_close(kernel, swapped.permute(1, 0, 3, 2))


@settings(deadline=None, max_examples=30)
@given(method=methods, n=sizes, inputs=sizes, width=sizes, outputs=sizes)
def test_one_set_is_two_equal_ones(method, n, inputs, width, outputs):
    model, x = network(inputs, width, outputs), torch.randn(n, inputs).double()
    kernel = empirical_ntk(model, x, method=method)
    assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))
    assert_close(kernel, empirical_ntk(model, x, x.clone(), method=method))
    for compute in ("diagonal", "trace"):
        reduced = empirical_ntk(model, x, method=method, compute=compute)
        assert torch.equal(reduced, reduced.transpose(0, 1))


@settings(deadline=None, max_examples=30)
@given(method=methods, n=sizes, inputs=sizes, width=sizes, outputs=sizes)
def test_positive_semi_definite(method, n, inputs, width, outputs):
    model, x = network(inputs, width, outputs), torch.randn(n, inputs).double()
    matrix = empirical_ntk(model, x, method=method).permute(0, 2, 1, 3).reshape(n * outputs, n * outputs)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() >= -1e-13 * eigenvalues.max()


@settings(deadline=None, max_examples=30)
@given(method=methods, n1=sizes, n2=sizes, inputs=sizes, width=sizes, outputs=sizes)
def test_sums(method, n1, n2, inputs, width, outputs):
    model = network(inputs, width, outputs)
    x1, x2 = torch.randn(n1, inputs).double(), torch.randn(n2, inputs).double()
    full = empirical_ntk(model, x1, x2, method=method)
    diagonal = empirical_ntk(model, x1, x2, method=method, compute="diagonal")
    assert_close(diagonal, full.diagonal(dim1=2, dim2=3))
    assert_close(empirical_ntk(model, x1, x2, method=method, compute="trace"), diagonal.sum(-1))
    for compute in ("full", "diagonal", "trace"):
        each = empirical_ntk(model, x1, x2, method=method, compute=compute, per_parameter=True)
        assert_close(sum(each.values()), empirical_ntk(model, x1, x2, method=method, compute=compute))


def test_twice_in_a_row():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    for method in METHODS:
        assert torch.equal(empirical_ntk(model, x, method=method), empirical_ntk(model, x, method=method))


def test_direct_functions_are_the_methods():
    model, x1, x2 = mlp(nn.Tanh)(), torch.randn(3, 5), torch.randn(2, 5)
    for method, function in {
        "vivit": empirical_ntk_vivit,
        "jacobian_contraction": reference.jacobian_contraction,
        "ntk_vector_products": reference.ntk_vector_products,
    }.items():
        for compute in ("full", "trace"):
            kernel = empirical_ntk(model, x1, x2, method=method, compute=compute)
            assert torch.equal(kernel, function(model, x1, x2, compute=compute))


def test_auto_takes_the_structured_route_where_it_can(monkeypatch):
    taken = []
    for method, route in list(ntk._ROUTES.items()):
        monkeypatch.setitem(ntk._ROUTES, method, lambda r, m=method, route=route: taken.append(m) or route(r))
    empirical_ntk(mlp(nn.Tanh)(), torch.randn(3, 5))
    assert taken == [Method.STRUCTURED]
    empirical_ntk(Residual(), torch.randn(3, 5))
    assert taken[1:] == [Method.STRUCTURED]


def test_methods_are_routes():
    assert {m.value for m in Method} == {*METHODS}
    assert set(ntk._ROUTES) == set(Method) - {Method.AUTO}


@covers(
    {
        "name, method": list(
            product(["tutorial_cnn_small", "output_sequence", "mlp_one_sample", "mlp_frozen_middle"], METHODS)
        ),
        "compute": COMPUTES,
        "per_parameter": [False, True],
        "dtype": DTYPES,
    }
)
def test_check_passes_on_right_kernels(name, method, compute, per_parameter, dtype):
    model, x1, x2 = BY_NAME[name].build(dtype)
    empirical_ntk(model, x1, x2, method=method, compute=compute, per_parameter=per_parameter, check=True)
    empirical_ntk(model, x1, method=method, compute=compute, per_parameter=per_parameter, check=True)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("method", list(ntk._ROUTES))
def test_check_raises_on_wrong_kernels(method, per_parameter, monkeypatch, dtype):
    def slightly_wrong(request):
        computed, factor = right(request), 1 + 20 * ggn_ntk.models.comparison.TOLERANCES[dtype]
        return computed._replace(kernels=[(name, kernel * factor) for name, kernel in computed.kernels])

    right = ntk._ROUTES[method]
    monkeypatch.setitem(ntk._ROUTES, method, slightly_wrong)
    model, x = mlp(nn.Tanh)().to(dtype), torch.randn(3, 5).to(dtype)
    empirical_ntk(model, x, method=method, per_parameter=per_parameter)
    message = rf"The kernel.* by method='{method.value}' differs from the oracle's on samples .* relative error \d"
    with pytest.raises(NTKMismatchError, match=message):
        empirical_ntk(model, x, method=method, per_parameter=per_parameter, check=True)


def test_tutorial_cnn_to_one_in_a_million(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(21632, 10)).to(device)
    x_train, x_test = torch.randn(20, 3, 32, 32, device=device), torch.randn(5, 3, 32, 32, device=device)
    kernel = empirical_ntk(model, x_train, x_test).double().cpu()
    model, x_train, x_test = (value.cpu().double() for value in (model, x_train, x_test))
    expected = reference.jacobian_contraction(model, x_train, x_test)
    assert (kernel - expected).norm() <= 1e-6 * expected.norm()


def test_public_names():
    assert ggn_ntk.__all__ == sorted(ggn_ntk.__all__)
    for name in ggn_ntk.__all__:
        assert getattr(ggn_ntk, name).__doc__
