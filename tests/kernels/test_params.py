"""Which parameters kernels sum over, and which of them are kept apart."""

import pytest
import torch
from cases import BY_NAME, CASES, mlp
from conftest import COMPUTES, METHODS, assert_close, oracle, oracle_sum, places
from covering import covers
from torch import nn

from ggn_ntk import EmpiricalNTK, empirical_kernels, empirical_ntk, explain, linearize

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

# With frozen and tied parameters, several uses of a module, and parameters of the model itself.
NAMES = ["conv2d", "mlp_frozen_middle", "tied", "tied_transformer", "custom_parameter", "recurrent", "weight_norm"]

ROUTES = [(BY_NAME[n], m) for n in NAMES for m in METHODS if m != "auto" and BY_NAME[n].supports(m)]


def owners(model):
    """The first module that holds each parameter, by the parameter's first name."""
    return {name: name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@covers({"case, method": ROUTES, "compute": COMPUTES, "dtype, device": places})
def test_kernels_of_modules(case, method, compute, dtype, device):
    model, x1, x2 = case.build(dtype, device)
    kernels = empirical_ntk(model, x1, x2, compute=compute, method=method, per_parameter="module")
    expected = {}
    for name, kernel in oracle(case.name, compute=compute, device=device).items():
        owner = owners(model)[name]
        expected[owner] = expected[owner] + kernel if owner in expected else kernel
    assert list(kernels) == list(expected)
    for name, kernel in kernels.items():
        assert_close(kernel, expected[name], scale=oracle_sum(case, compute=compute, device=device))


def test_kernels_of_modules_go_with_params_x1_alone_and_checks():
    model, x, _ = BY_NAME["conv2d"].build()
    each = empirical_ntk(model, x, per_parameter=True)
    kernels = empirical_ntk(model, x, params=["3.bias", "0"], per_parameter="module", check=True)
    assert list(kernels) == ["3", "0"]
    assert_close(kernels["0"], each["0.weight"] + each["0.bias"])
    assert_close(kernels["3"], each["3.bias"])


@pytest.mark.parametrize("method", METHODS)
def test_kernels_of_modules_are_in_the_widest_dtype_of_each(method):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    if method == "vivit":
        assert {k.dtype for k in empirical_ntk(model, X, method=method, per_parameter="module").values()} == {X.dtype}
        return

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3).double()
            self.second.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.second.weight.mm(self.first(x).double().T).T + self.second.bias

    kernels = empirical_ntk(Mixed(), X, method=method, per_parameter="module")
    assert {name: k.dtype for name, k in kernels.items()} == {"first": torch.float32, "second": torch.float64}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("linear_3d", "tied_transformer")], ids=str)
def test_kernels_of_modules_share_what_weights_and_biases_do(case, monkeypatch):
    """A bias is joined with its weight where that is so for the sum of all."""
    from ggn_ntk.contraction import accumulator

    joined = []
    monkeypatch.setattr(
        accumulator, "join_biases", lambda given, join=accumulator.join_biases: joined.append(join(given)) or joined[-1]
    )
    model, x1, x2 = case.build()
    counts = []
    for per_parameter in (False, "module", True):
        joined.clear()
        empirical_ntk(model, x1, x2, per_parameter=per_parameter)
        counts.append(sum(map(len, joined)))
    assert counts[0] == counts[1] < counts[2]


ENTRIES = {
    "a name": ("2.weight", ["2.weight"]),
    "a module": ("2", ["2.weight", "2.bias"]),
    "a glob": ("*.bias", ["0.bias", "2.bias", "4.bias"]),
    "a set of letters": ("[!0]*", ["2.weight", "2.bias", "4.weight", "4.bias"]),
    "several, that meet": (["4", "?.bias"], ["4.weight", "4.bias", "0.bias", "2.bias"]),
}


@pytest.mark.parametrize(("params", "names"), ENTRIES.values(), ids=ENTRIES.keys())
@pytest.mark.parametrize("method", METHODS)
def test_entries(params, names, method):
    model = mlp(nn.Tanh)()
    kernels = empirical_ntk(model, X, params=params, per_parameter=True, method=method)
    assert list(kernels) == names
    assert_close(empirical_ntk(model, X, params=params, method=method), sum(kernels.values()).double())


def test_front_doors_take_entries():
    model = mlp(nn.Tanh)()
    expected = empirical_ntk(model, X, params=["0.weight", "0.bias"])
    assert torch.equal(empirical_kernels(model, X, params="0").ntk, expected)
    assert {c.parameter for c in explain(model, X, params="0.*").contractions} == {"0.weight", "0.bias"}
    assert linearize(model, "0").point.keys() == {"0.weight", "0.bias"}


def test_globs_and_modules_leave_out_what_is_frozen():
    model = mlp(nn.Tanh)()
    model[2].bias.requires_grad_(False)
    assert list(empirical_ntk(model, X, params="2", per_parameter=True)) == ["2.weight"]
    assert list(empirical_ntk(model, X, params="*.bias", per_parameter=True)) == ["0.bias", "4.bias"]
    with pytest.raises(ValueError, match=r"params names '2.bias', which is frozen. Call requires_grad_\(\)"):
        empirical_ntk(model, X, params=["0", "2.bias"])
    with pytest.raises(ValueError, match=r"params names '2.b\*', of which all parameters are frozen. Call requires_gr"):
        empirical_ntk(model, X, params="2.b*")


def test_a_tied_parameter_counts_once_in_a_glob():
    model, x, _ = BY_NAME["tied"].build()
    assert list(empirical_ntk(model, x, params="*", per_parameter=True)) == list(oracle("tied"))
    assert list(empirical_ntk(model, x, params="2.weight", per_parameter="module")) == ["0"]


def test_passes_of_ones_own_have_no_kernels_of_modules():
    with pytest.raises(TypeError, match="per_parameter must be True or False, got 'module'"):
        EmpiricalNTK(per_parameter="module")
