"""Models that return several tensors: all of them are outputs, with kernels of each pair."""

from collections import OrderedDict

import pytest
import torch
from conftest import COMPUTES, assert_close, call, loop_jacobians, seeded
from torch import nn

from ggn_ntk import (
    NotFiniteWarning,
    UnsupportedModelError,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_fn,
    explain,
    linearize,
    nngp,
)
from ggn_ntk.problem.errors import NoTensorError, UnsupportedRouteError
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

ROUTES = [{"capture": "autograd"}, {"method": "auto"}, {"method": "jacobian_contraction"}]
ROUTES += [{"method": "ntk_vector_products"}]


class Returns(nn.Module):
    """Returns what is made of two layers, of which one is shared."""

    def __init__(self, make):
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 6)
        self.make = make

    def forward(self, x):
        h = self.trunk(x).tanh()
        return self.make(self.first(h), self.second(h).unflatten(1, (3, 2)))


class Solution(nn.Module):
    """A function, and the residual of a differential equation, by autograd inside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.layers(x).squeeze(1)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return {"u": u, "r": slope + u.unsqueeze(1) ** 2}


FORMS = {
    "dict": seeded(Returns, lambda a, b: {"a": a, "b": b}),
    "ordered": seeded(Returns, lambda a, b: OrderedDict(b=b, a=a)),
    "tuple": seeded(Returns, lambda a, b: (a, b)),
    "list": seeded(Returns, lambda a, b: [b, a, a * b[:, 0]]),
    "one": seeded(Returns, lambda a, b: (b,)),
    "derivatives": seeded(Solution),
}


def entries(found):
    return dict(found) if isinstance(found, dict) else dict(enumerate(found))


def expected_kernels(model, x1, x2):
    """The kernel of each pair of keys, and of each parameter, by a loop over samples and outputs."""
    found = entries(call(model, x1))
    jacobians = {
        key: [loop_jacobians(model, x, lambda found, key=key: entries(found)[key]) for x in (x1, x2)] for key in found
    }
    return {
        (a, b): {
            name: torch.einsum("ncp,mdp->nmcd", j, second[name]).reshape(
                len(j), len(second[name]), *found[a].shape[1:], *found[b].shape[1:]
            )
            for name, j in first.items()
        }
        for a, (first, _) in jacobians.items()
        for b, (_, second) in jacobians.items()
    }


def reduced(expected, compute):
    """The kernels that a call returns, of each parameter."""
    if compute == "full":
        return expected
    found = {}
    for (a, b), kernels in expected.items():
        if a == b:
            k = (next(iter(kernels.values())).ndim - 2) // 2
            diagonals = {
                name: kernel.flatten(2, 1 + k).flatten(3).diagonal(dim1=2, dim2=3) if k else kernel.unsqueeze(2)
                for name, kernel in kernels.items()
            }
            found[a] = {
                name: d.sum(-1) if compute == "trace" else d.reshape(kernels[name].shape[: 2 + k])
                for name, d in diagonals.items()
            }
    return found


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("form", "route"),
    [
        *((form, {}) for form in FORMS),
        *((form, route) for form in ("dict", "derivatives") for route in ROUTES[:1] + ROUTES[2:]),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x.values()), "auto"),
)
def test_kernels_of_all_pairs(form, route, symmetric, compute):
    model, x1 = FORMS[form](), torch.randn(3, 3).double()
    x2 = None if symmetric else torch.randn(2, 3).double()
    expected = reduced(expected_kernels(model, x1, x1 if symmetric else x2), compute)
    kernels = empirical_ntk(model, x1, x2, compute=compute, check=True, **route)
    assert list(kernels) == list(expected)
    for key, kernel in kernels.items():
        assert_close(kernel, sum(expected[key].values()))
    if symmetric and compute == "full":
        for (a, b), kernel in kernels.items():
            k, n = kernels[a, a].ndim // 2 - 1, kernel.ndim
            assert torch.equal(kernel, kernels[b, a].permute(1, 0, *range(n - k, n), *range(2, n - k)))
    apart = empirical_ntk(model, x1, x2, compute=compute, per_parameter=True, **route)
    assert list(apart) == [name for name, _ in model.named_parameters()]
    for name, by_key in apart.items():
        assert list(by_key) == list(expected)
        for key, kernel in by_key.items():
            assert_close(kernel, expected[key][name], scale=sum(expected[key].values()))


def test_other_functions():
    model, x1, x2 = FORMS["dict"](), torch.randn(3, 3).double(), torch.randn(2, 3).double()
    found = [{key: f.detach() for key, f in model(x).items()} for x in (x1, x2)]
    kernels = empirical_ntk(model, x1, x2)
    both = empirical_kernels(model, x1, x2)
    products = nngp(model, x1, x2)
    assert list(products) == list(both.nngp) == list(both.ntk) == list(kernels)
    for (a, b), kernel in products.items():
        expected = torch.tensordot(found[0][a], found[1][b], 0).movedim(found[0][a].ndim, 1)
        assert_close(kernel, expected)
        assert_close(both.nngp[a, b], expected)
        assert torch.equal(both.ntk[a, b], kernels[a, b])
    traces = nngp(model, x1, compute="trace")
    assert_close(traces["b"], torch.einsum("nij,mij->nm", found[0]["b"], found[0]["b"]))
    assert {row.parameter for row in explain(model, x1, x2).contractions} == {n for n, _ in model.named_parameters()}
    for function in (jacobian_contraction, ntk_vector_products):
        assert_close(function(model, x1, x2)["a", "b"], kernels["a", "b"])


def test_a_model_without_parameters_has_an_nngp_kernel():
    x = torch.randn(3, 2)
    assert_close(nngp(Pair(), x)[0, 1], torch.einsum("ni,mj->nmij", x, x.exp()))


class Pair(nn.Module):
    def forward(self, x):
        return x, x.exp()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("route", ROUTES[1:3], ids=lambda route: next(iter(route.values())))
def test_on_two_sides(route, compute):
    """Several outputs of each side, in an order of its own."""
    model, x1, x2 = FORMS["dict"](), torch.randn(3, 3).double(), torch.randn(2, 3).double()
    pair = (lambda y: {"a": y["a"].exp(), "b": y["b"][:, 0]}, lambda y: {"b": y["b"][:, 1], "a": y["a"]})
    kernels = empirical_ntk(model, x1, x2, output=pair, compute=compute, check=True, **route)
    full = {
        (a, b): empirical_ntk(model, x1, x2, output=(lambda y, a=a: pair[0](y)[a], lambda y, b=b: pair[1](y)[b]))
        for a in "ab"
        for b in "ba"
    }
    if compute == "full":
        assert list(kernels) == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    for key, kernel in kernels.items():
        expected = full[key] if compute == "full" else full[key, key].diagonal(dim1=2, dim2=3)
        assert_close(kernel, expected.sum(2) if compute == "trace" else expected)


def test_keys_and_shapes_differ():
    model, x1, x2 = FORMS["dict"](), torch.randn(3, 3).double(), torch.randn(2, 3).double()
    picks = (None, lambda y: {"c": y["a"][:, 0]})
    kernels = empirical_ntk(model, x1, x2, output=picks)
    assert {key: kernel.shape[2:] for key, kernel in kernels.items()} == {("a", "c"): (2,), ("b", "c"): (3, 2)}
    for compute in ("diagonal", "trace"):
        message = f"compute='{compute}' pairs each output .* shapes differ: a, b for x1, c for x2"
        with pytest.raises(ValueError, match=message):
            empirical_ntk(model, x1, x2, output=picks, compute=compute)
    with pytest.raises(ValueError, match="a tensor for both x1 and x2, or several for both, got dict and Tensor"):
        empirical_ntk(model, x1, x2, output=(None, lambda y: y["a"]))
    for axes in ({"trace_axes": 0}, {"diagonal_axes": (0,)}):
        with pytest.raises(ValueError, match="count the axes of one output, but there are several, a, b: pick one"):
            empirical_ntk(model, x1, x2, **axes)


@pytest.mark.parametrize("compute", COMPUTES)
def test_paired_samples(compute):
    model, x1, x2 = FORMS["dict"](), torch.randn(3, 3).double(), torch.randn(3, 3).double()
    kernels = empirical_ntk(model, x1, x2, compute=compute)
    for route in ROUTES:
        for key, kernel in empirical_ntk(model, x1, x2, compute=compute, paired=True, **route).items():
            assert_close(kernel, torch.stack([kernels[key][n, n] for n in range(3)]))


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("compute", COMPUTES)
def test_prepared_kernels(compute, per_parameter):
    model, x1, x2 = FORMS["dict"](), torch.randn(3, 3).double(), torch.randn(2, 3).double()
    options = {"compute": compute, "per_parameter": per_parameter}
    prepared = empirical_ntk_fn(model, **options)
    for _ in range(4):
        for given in ((x1,), (x1, x2)):
            found, expected = prepared(*given), empirical_ntk(model, *given, **options)
            for name in model.state_dict() if per_parameter else [""]:
                pairs = (found[name], expected[name]) if per_parameter else (found, expected)
                assert list(pairs[0]) == list(pairs[1])
                assert all(torch.equal(kernel, pairs[1][key]) for key, kernel in pairs[0].items())
        with torch.no_grad():
            model.trunk.weight.mul_(1.1)
    model.make = lambda a, b: (a, b)
    assert len(prepared(x1)) == (len(model.state_dict()) if per_parameter else {"full": 4}.get(compute, 2))


def test_samples_that_are_not_finite():
    model, x1, x2 = FORMS["dict"](), torch.randn(3, 3).double(), torch.randn(2, 3).double()
    expected = empirical_ntk(model, x1, x2, per_parameter=True)
    x1[1] = torch.nan
    with pytest.warns(NotFiniteWarning, match=r"Jacobians of x1\[1\] are not finite"):
        kernels = empirical_ntk(model, x1, x2, per_parameter=True)
    for name, by_key in kernels.items():
        for key, kernel in by_key.items():
            assert kernel[1].isnan().all()
            assert_close(kernel[[0, 2]], expected[name][key][[0, 2]])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda a, b: (a, None), "the one at 1 is a NoneType"),
        (lambda a, b: {"a": a, "top": a.argmax(1)}, "the one at 'top' is torch.int64"),
        (lambda a, b: (a, b.transpose(0, 1)), r"the one at 1 has shape \[3, 2, 2\] for 2 samples"),
        (lambda a, b: (a, b.sum()), r"the one at 1 has shape \[\] for 2 samples"),
        (lambda a, b: (a, [b]), "the one at 1 is a list"),
        (lambda a, b: (a, b.detach()), "the one at 1 depends on no parameter"),
        (lambda a, b: (a.float(), b), "the one at 0 is torch.float32, and another is not"),
        (lambda a, b: (), "to differentiate."),
        (lambda a, b: {"a"}, "to differentiate."),
    ],
)
@pytest.mark.parametrize("function", [empirical_ntk, nngp, explain, empirical_kernels, jacobian_contraction])
def test_what_is_no_output(function, make, why):
    model = Returns(make).double()
    message = rf"it returns \w+, not a tensor. Pass output=, a function that picks .*{why}"
    for n in (1, 3):
        with pytest.raises(NoTensorError, match=message) as caught:
            function(model, torch.randn(n, 3).double())
        assert str(caught.value).startswith(
            f"No empirical {'NNGP kernel' if function is nngp else 'NTK'} of this model"
        )


@pytest.mark.parametrize("method", ["auto", "jacobian_contraction", "ntk_vector_products"])
def test_small_outputs_beside_large_ones(method):
    """They have kernels of their own accuracy, and what samples do to them is found."""
    build = seeded(Returns, lambda a, b: {"small": 1e-6 * a, "large": 1e6 * b})
    x = torch.randn(4, 3)
    expected = empirical_ntk(build(), x.double())
    for key, kernel in empirical_ntk(build().float(), x, method=method, check=True).items():
        assert_close(kernel, expected[key])
    mixed = seeded(Returns, lambda a, b: {"small": a - 0.5 * a.mean(0), "large": 1e6 * b})().float()
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(mixed, x, method=method)


def test_keys_that_come_and_go():
    model = seeded(Returns, lambda a, b: {"a": a} | ({"b": b} if len(a) == 2 else {}))()
    with pytest.raises(
        NoTensorError, match=r"it returns dict, .* keys or shapes change from one evaluation to another"
    ):
        empirical_ntk(model, torch.randn(3, 3).double())


def test_expansions_and_vivit_take_one():
    model, x = FORMS["tuple"](), torch.randn(3, 3).double()
    with pytest.raises(UnsupportedModelError, match=r"it returns tuple, not a tensor\. Pass output="):
        linearize(model)(dict(model.named_parameters()), x)
    with pytest.raises(UnsupportedRouteError, match="Returns may compute between its modules"):
        empirical_ntk(model, x, method="vivit")


def test_a_sequential_model_that_ends_in_several():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), Split()).double(), torch.randn(3, 3).double()
    kernels = empirical_ntk(model, x)
    assert_close(kernels[1, 0], empirical_ntk(model[:-1], x)[:, :, 1:, :1])
    with pytest.raises(UnsupportedRouteError, match="Split is not a layer of torch's"):
        empirical_ntk(model, x, capture="sequential")


class Split(nn.Module):
    def forward(self, x):
        return x.split(1, 1)


def test_on_other_devices(device):
    model, x = FORMS["dict"](), torch.randn(3, 3).double()
    expected = empirical_ntk(model, x)
    for key, kernel in empirical_ntk(model.to(device), x.to(device)).items():
        assert_close(kernel, expected[key])
