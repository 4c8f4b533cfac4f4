"""Bad arguments are refused by name, with what is accepted."""

from inspect import signature

import pytest
import torch
from cases import TiedTransformer, TwoInputs, mlp, tied_mlp
from torch import nn

from ggn_ntk import (
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_vivit,
    explain,
    linearize,
    nngp,
    taylor_expand,
)
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

X = torch.zeros(3, 5)


@pytest.fixture
def model():
    return mlp(nn.Tanh)()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compute": "sum"}, ValueError, "compute must be one of 'full', 'diagonal', 'trace', got 'sum'"),
        ({"method": "fast"}, ValueError, "method must be one of 'auto', 'structured', 'vivit', .*, got 'fast'"),
        ({"method": None}, ValueError, "method must be one of"),
        ({"params": 3}, TypeError, "params must hold names of parameters, globs or .*, got int"),
        ({"params": [3]}, TypeError, "params must hold names of parameters, got int"),
        ({"per_parameter": "no"}, ValueError, "per_parameter must be True, False or 'module', got 'no'"),
        ({"per_parameter": 1}, TypeError, "per_parameter must be True, False or 'module', got int"),
        ({"check": 1}, TypeError, "check must be True or False, got int"),
        ({"paired": 1}, TypeError, "paired must be True or False, got int"),
        ({"paired": True, "x2": X[:2]}, ValueError, r"paired=True takes x1\[n\] with x2\[n\] .* got 3 and 2"),
        ({"interacting": 1}, TypeError, "interacting must be True or False, got int"),
        (
            {"interacting": True, "paired": True, "x2": X[:2]},
            ValueError,
            "paired=True .* same number of samples, got 3 and 2",
        ),
        ({"interacting": True, "capture": "sequential"}, ValueError, "its layers see the whole batch"),
        ({"x1": {1: X}}, TypeError, "The keys of x1 must be strings"),
        ({"params": []}, ValueError, "params is empty"),
        (
            {"params": ["7.weight"]},
            ValueError,
            "params names '7.weight', which the model does not have. It has: 0.weight",
        ),
        ({"params": "weights.*"}, ValueError, r"params names 'weights.\*', which the model does not have. It has: 0.w"),
        ({"params": "1"}, ValueError, "params names '1', which the model does not have. It has: 0.weight"),
        ({"params": ["0.weights"]}, ValueError, "params names '0.weights', .* close are: 0.weight"),
        ({"x1": [1.0]}, TypeError, r"x1 must be a tensor \[N, ...\], a tuple .* or a mapping .*, got list"),
        ({"x1": None}, TypeError, "x1 must be a tensor .*, got NoneType"),
        ({"x1": (X, X.numpy())}, TypeError, r"x1\[1\] must be a tensor, got ndarray\. Pass torch\.as_tensor\(x1\[1\]"),
        ({"x1": ()}, ValueError, "x1 has no samples: it must hold at least one tensor"),
        ({"x1": {}}, ValueError, "x1 has no samples"),
        ({"x1": torch.tensor(1.0)}, ValueError, "x1 has no axes: its leading axis must hold the samples"),
        ({"x1": X[:0]}, ValueError, "x1 has no samples: its leading axis is empty"),
        ({"x2": X[:0]}, ValueError, "x2 has no samples"),
        ({"x1": (X, X[:2])}, ValueError, r"The tensors of x1 must share their leading axis, .* x1\[0\]: 3, x1\[1\]: 2"),
        ({"x1": X.double()}, ValueError, "x1 is torch.float64, the model's parameters torch.float32"),
        ({"x1": X.to("meta")}, ValueError, "x1 is on meta, the model's parameters on cpu"),
        ({"x2": X.int()}, ValueError, "x2 must have the dtype of x1: torch.float32, got torch.int32"),
        ({"x2": (X, X)}, ValueError, r"x2 must hold the same entries as x1, .*got \[0\], \[1\] .*against a tensor"),
        ({"x2": {"input": X}}, ValueError, r"x2 must hold the same entries as x1, .*got \['input'\]"),
    ],
    ids=str,
)
def test_bad_arguments(model, arguments, error, message):
    arguments = {"x1": X, **arguments}
    with pytest.raises(error, match=message):
        empirical_ntk(model, arguments.pop("x1"), arguments.pop("x2", None), **arguments)


@pytest.mark.parametrize("function", [empirical_ntk, empirical_ntk_vivit, jacobian_contraction, ntk_vector_products])
def test_every_public_function_checks_its_arguments(function, model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or a function .*, got function"):
        function(lambda x: x, X)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or a function .*, got the class Linear"):
        function(nn.Linear, X)
    with pytest.raises(ValueError, match="compute must be one of"):
        function(model, X, compute="all")


@pytest.mark.parametrize("function", [jacobian_contraction, ntk_vector_products])
def test_arguments_of_the_oracle(function, model):
    with pytest.raises(ValueError, match="chunk_size must be a positive integer or None, got 0"):
        function(model, X, chunk_size=0)
    with pytest.raises(TypeError, match=r"output must be a callable or None.*, got str"):
        function(model, X, output="logits")


OF_A_ROUTE = {"method", "check", "capture"}
OF_A_CALL = {"memory", "progress"}
OF_A_KERNEL = {"x1", "x2", "compute", "per_parameter", "trace_axes", "diagonal_axes", "paired", "interacting"}

# What front doors leave out of the arguments of empirical_ntk.
FRONT_DOORS = {
    empirical_ntk_vivit: {"paired", "interacting", *OF_A_ROUTE},
    jacobian_contraction: {"progress", *OF_A_ROUTE},
    ntk_vector_products: OF_A_ROUTE,
    explain: {"per_parameter", "check", "progress"},
    nngp: {"per_parameter", *OF_A_ROUTE},
    empirical_kernels: {"per_parameter"},
    linearize: {*OF_A_ROUTE, *OF_A_CALL, *OF_A_KERNEL},
    taylor_expand: {*OF_A_ROUTE, *OF_A_CALL, *OF_A_KERNEL},
}


@pytest.mark.parametrize("function", FRONT_DOORS)
def test_keywords_are_the_same_everywhere(function, model):
    known, own = signature(empirical_ntk).parameters, signature(function).parameters
    expansion = function in (linearize, taylor_expand)
    assert known.keys() - own.keys() == FRONT_DOORS[function]
    for name in own.keys() & known.keys() - {"params" if expansion else ""}:
        assert own[name] == known[name].replace(annotation=own[name].annotation)
    with pytest.raises(TypeError, match=r"output must be a callable or None.*, got str"):
        function(model, *([1] if function is taylor_expand else [] if expansion else [X]), output="logits")


def test_frozen_parameters_cannot_be_named(model):
    model[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"params names '2.bias', which is frozen. Call requires_grad_\(\)"):
        empirical_ntk(model, X, params=["2.bias"])
    assert "2.bias" not in empirical_ntk(model, X, per_parameter=True)


@pytest.mark.parametrize("method", ["jacobian_contraction", "ntk_vector_products"])
def test_a_tied_parameter_counts_once_by_any_of_its_names(method):
    model, x = tied_mlp().double(), torch.randn(3, 5).double()
    by_first = empirical_ntk(model, x, params=["0.weight"], method=method)
    by_second = empirical_ntk(model, x, params=["2.weight"], method=method, per_parameter=True)
    assert list(by_second) == ["2.weight"]
    assert torch.equal(by_second["2.weight"], by_first)
    by_both = empirical_ntk(model, x, params=["2.weight", "0.weight", "2.weight"], method=method)
    assert torch.equal(by_both, by_first)


@pytest.mark.parametrize("method", ["vivit", "jacobian_contraction", "ntk_vector_products"])
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_params_selects(model, method, compute):
    x = torch.randn(3, 5)
    each = empirical_ntk(model, x, compute=compute, method="jacobian_contraction", per_parameter=True)
    some = ["2.weight", "0.bias"]
    kernel = empirical_ntk(model, x, compute=compute, method=method, params=iter(some))
    torch.testing.assert_close(kernel, each["2.weight"] + each["0.bias"])
    assert list(empirical_ntk(model, x, method=method, params=some, per_parameter=True)) == some


def test_tuple_mapping_and_tensor_inputs_agree():
    model, a, b = TwoInputs(), torch.randn(3, 5), torch.randn(3, 3)
    by_position = empirical_ntk(model, (a, b))
    assert torch.equal(by_position, empirical_ntk(model, {"b": b, "a": a}))
    single = mlp(nn.Tanh)()
    assert torch.equal(empirical_ntk(single, (a,)), empirical_ntk(single, a))
    assert torch.equal(
        empirical_ntk(single, {"input": a}, method="jacobian_contraction"), jacobian_contraction(single, a)
    )


def test_mapping_of_another_type_than_dict():
    from collections import UserDict

    model = TiedTransformer().eval()
    tokens = torch.randint(7, (2, 4))
    assert torch.equal(empirical_ntk(model, UserDict(tokens=tokens)), empirical_ntk(model, tokens))


@pytest.mark.parametrize("method", ["vivit", "jacobian_contraction", "ntk_vector_products"])
def test_inputs_that_are_not_contiguous(model, method):
    x = torch.randn(5, 6).T[::2]
    expected = empirical_ntk(model, x.contiguous(), method=method)
    torch.testing.assert_close(empirical_ntk(model, x, method=method), expected)
