"""What x1 and x2 may be, and what of the process a call relies on."""

import re
import sys
import textwrap
from functools import partial

import pytest
import torch
from backpack import backpack, extend
from conftest import METHODS, assert_close, kernel_of, loop_jacobians
from torch import Tensor, nn

from ggn_ntk import (
    EmpiricalNTK,
    UnsupportedModelError,
    empirical_kernels,
    empirical_ntk,
    explain,
    linearize,
    nngp,
)
from ggn_ntk.methods.structured import recorded_products
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

ROUTES = [method for method in METHODS if method != "vivit"]
FUNCTIONS = [empirical_ntk, jacobian_contraction, ntk_vector_products, explain, nngp, empirical_kernels]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Taking(nn.Module):
    """A layer on an input of any structure, scaled by what else is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x, grid=None, flag=True, scale=1):
        while not isinstance(x, Tensor):
            x = x["a"] if isinstance(x, dict) else x[0]
        h = self.layer(x) * (2 if flag else 1) * (3 if scale == "three" else scale)
        return h if grid is None else h + h * grid.sum()


# ---------------------------------------------------------------- structures

# What is given, the call that the message shows, and what the wrapper's constants are where it shows ellipses.
REFUSED = [
    ((X, False), "self.model(x, False)"),
    ((X, None), "self.model(x, None)"),
    ({"x": X, "flag": False}, "self.model(x, flag=False)"),
    ({"x": X, "grid": None}, "self.model(x, grid=None)"),
    ({"x": X, "scale": 2.5}, "self.model(x, scale=2.5)"),
    ({"x": X, "scale": "three"}, "self.model(x, scale='three')"),
    (([X, X],), "self.model([x, x])"),
    (((X,),), "self.model([x])"),
    (({"a": X},), "self.model({'a': x})"),
    ([X], "self.model([x])"),
]


def wrapper_in(message):
    """Run the wrapper that a message shows."""
    code = textwrap.dedent(message.partition("say:\n\n")[2])
    scope = {"torch": torch}
    exec(code.partition("empirical_ntk(")[0], scope)
    return scope["Wrapper"], code


@pytest.mark.parametrize(("x", "called"), REFUSED, ids=[called for _, called in REFUSED])
@pytest.mark.parametrize("second", [False, True], ids=["x1", "x2"])
def test_what_is_no_tensor_is_refused_with_a_wrapper_that_works(x, called, second):
    model = Taking()
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=re.escape(called)) as info:
            function(model, *((X, x) if second else (x,)))
    wrapper, code = wrapper_in(str(info.value))
    assert str(info.value).startswith("x2" if second else "x1")
    assert re.fullmatch(r"empirical_ntk\(Wrapper\(model\), x[12](, x2)?\)", code.splitlines()[-1])
    given = {"flag": x.get("flag", True), "scale": x.get("scale", 1)} if isinstance(x, dict) else {}
    given |= {"grid": x[1]} if isinstance(x, tuple) and len(x) == 2 and x[1] is not None else {}
    wrapped = wrapper(model)
    if "grid" not in given:
        assert torch.equal(wrapped(X), model(X, **given))
        assert_close(empirical_ntk(wrapped, X), kernel_of(wrapped, X))


@pytest.mark.parametrize("x", [(X, torch.randn(9, 1)), {"x": X, "grid": torch.randn(9, 1)}], ids=["tuple", "mapping"])
def test_constants_that_samples_share_are_refused_with_a_wrapper(x):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="must share their leading axis, the samples") as info:
            function(Taking(), x)
    wrapper, _ = wrapper_in(str(info.value))
    assert issubclass(wrapper, nn.Module)
    assert "shared" in str(info.value)


def test_the_wrapper_of_a_shared_constant():
    """Written as the message has it."""

    class Wrapper(nn.Module):
        def __init__(self, model, shared):
            super().__init__()
            self.model = model
            self.register_buffer("shared", shared)

        def forward(self, x):
            return self.model(x, self.shared)

    model = Wrapper(Taking(), torch.randn(9, 1).double())
    for method in ROUTES:
        assert_close(empirical_ntk(model, X, X[:2], method=method), kernel_of(model, X, X[:2]))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (
            lambda: X.to_sparse(),
            ValueError,
            r"x1 is of layout torch\.sparse_coo: pass a dense tensor, x1\.to_dense\(\)",
        ),
        (lambda: X.to_sparse_csr(), ValueError, r"x1 is of layout torch\.sparse_csr: .*x1\.to_dense\(\)"),
        (lambda: (X, X.to_sparse()), ValueError, r"x1\[1\] is of layout torch\.sparse_coo"),
        (lambda: {"x": X.to_sparse()}, ValueError, r"x1\['x'\] is of layout torch\.sparse_coo"),
        (lambda: torch.nested.nested_tensor([X[0], X[1]]), ValueError, "x1 is .*padded samples with a mask"),
        (lambda: X.numpy(), TypeError, r"x1 must be a tensor \[N, \.\.\.\].*got ndarray"),
        (
            lambda: X.float(),
            ValueError,
            r"x1 is torch\.float32, the model's parameters torch\.float64.*x1\.to\(dtype\)",
        ),
        (lambda: X.half(), ValueError, r"x1 is torch\.float16, the model's parameters torch\.float64"),
        (lambda: X.to("meta"), ValueError, r"x1 is on meta, the model's parameters on cpu.*x1\.to\(device\)"),
        (lambda: (X, X.to("meta")), ValueError, r"x1\[1\] is on meta"),
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:.*nested tensors")
def test_bad_tensors(made, error, message):
    for function in FUNCTIONS:
        with pytest.raises(error, match=message):
            function(Taking(), made())
    with pytest.raises(error, match=message):
        linearize(Taking())(dict(Taking().named_parameters()), made())


# ---------------------------------------------------------------- models that take one sample at a time


class Set(nn.Module):
    """Takes one set of points at a time, whose points lie along the leading axis behind the sample's."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.head(self.body(x.squeeze(0)).tanh().mean(0)).unsqueeze(0)


class Branching(Set):
    """Reads a number off its input, which is one sample's."""

    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else x.sin())


@pytest.mark.parametrize("build", [Set, Branching])
@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.filterwarnings("ignore::ggn_ntk.RouteWarning")
def test_models_that_take_one_sample(build, method):
    """Of one sample there is a kernel; for two there is one, or an error that says what to do."""
    model, x1, x2 = build(), torch.randn(1, 5, 3).double(), torch.randn(1, 5, 3).double()
    assert_close(empirical_ntk(model, x1, method=method, check=True), kernel_of(model, x1))
    try:
        kernel = empirical_ntk(model, x1, x2, method=method)
    except (UnsupportedModelError, ValueError) as error:
        assert re.search("not the same|shape|samples", str(error))  # noqa: PT017
    else:
        assert_close(kernel, kernel_of(model, x1, x2))


@pytest.mark.parametrize("method", ROUTES)
def test_one_sample(method):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for x1, x2 in ((X[:1], None), (X[:1], X[1:2]), (X[:1], X), (X, X[:1])):
        sets = [x for x in (x1, x2) if x is not None]
        assert_close(empirical_ntk(model, x1, x2, method=method, check=True), kernel_of(model, *sets))


# ---------------------------------------------------------------- settings of the process


@pytest.fixture(params=["meta", "half", "double"])
def defaults(request):
    """Another default device or dtype."""
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


def network():
    layers = nn.Conv1d(1, 2, 2), nn.LayerNorm(2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers)


def embedded():
    return nn.Sequential(nn.Embedding(5, 4), nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten())


KINDS = [
    (network, lambda n: torch.randn(n, 3)),
    (embedded, lambda n: torch.randint(5, (n, 3))),
]
CALLS = {name: partial(empirical_ntk, method=name, check=True) for name in ROUTES}
CALLS |= {"nngp": nngp, "autograd": partial(empirical_ntk, capture="autograd")}


@pytest.fixture(params=range(len(KINDS)), ids=["images", "tokens"])
def kind(request):
    """Made before other defaults are set: model, x1 and x2."""
    build, inputs = KINDS[request.param]
    return build(), inputs(4), inputs(2)


@pytest.mark.parametrize("name", CALLS)
def test_other_defaults(kind, name, defaults):
    model, x1, x2 = kind
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    found = CALLS[name](model, x1, x2)
    linearize(model)({key: p.detach() for key, p in model.named_parameters()}, x1)
    explain(model, x1, x2)
    assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    expected = CALLS[name](model, x1, x2)
    assert found.dtype == torch.float32
    assert_close(found, expected)


@pytest.mark.parametrize("n1", [True, False, 1.0, "2", 2.5, [1]], ids=repr)
def test_n1_is_an_integer(n1):
    with pytest.raises(TypeError, match="n1 must be an integer or None, got"):
        EmpiricalNTK(n1=n1)


@pytest.mark.parametrize("n1", [0, -1, 6, 7])
def test_n1_leaves_both_sets_a_sample(n1):
    model, loss = extend(nn.Linear(3, 2).double()), extend(nn.MSELoss())
    value = loss(model(X), torch.zeros(6, 2).double())
    with (
        backpack(EmpiricalNTK(n1=n1)),
        pytest.raises(ValueError, match=f"n1 must be between 1 and 5 for a batch of 6 samples, got {n1}"),
    ):
        value.backward()


# ---------------------------------------------------------------- complex numbers beside real parameters


class Spectral(nn.Module):
    """Filters in the frequency domain, by a complex buffer or frozen parameter."""

    def __init__(self, parameter, dtype=torch.complex128):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()
        filters = torch.randn(5, dtype=dtype)
        if parameter:
            self.filters = nn.Parameter(filters, requires_grad=False)
        else:
            self.register_buffer("filters", filters)

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.filters, 8).tanh())


@pytest.mark.parametrize("parameter", [False, True], ids=["buffer", "frozen"])
@pytest.mark.parametrize("method", ROUTES)
def test_complex_buffers_and_frozen_parameters(parameter, method):
    model = Spectral(parameter)
    assert_close(empirical_ntk(model, X, X[:2], method=method, check=True), kernel_of(model, X, X[:2]))
    new = {name: p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}
    assert linearize(model)(new, X).shape == (6, 2)
    assert nngp(nn.Sequential(model), X).shape[:2] == (6, 6)
    assert explain(model, X).covered == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ROUTES)
def test_wanted_complex_parameters_are_refused(method):
    model = Spectral(True)
    model.filters.requires_grad_()
    with pytest.raises(UnsupportedModelError, match=r"filters: is torch\.complex128.*real and imaginary parts"):
        empirical_ntk(model, X, method=method)
    names = [name for name in loop_jacobians(model, X) if name != "filters"]
    jacobians = torch.cat([j for name, j in loop_jacobians(model, X).items() if name in names], 2)
    kernel = empirical_ntk(model, X, method=method, params=names)
    assert_close(kernel, torch.einsum("ncp,mdp->nmcd", jacobians, jacobians))


# ---------------------------------------------------------------- what explain records


@pytest.mark.parametrize("build", [network, embedded])
def test_explanations_hold_no_tensors(build, monkeypatch):
    recorded = []

    def recording(request):
        found = recorded_products(request)
        recorded.extend(found.products)
        return found

    monkeypatch.setattr(sys.modules["ggn_ntk.kernels.explain"], "recorded_products", recording)
    x = torch.randn(4, 3) if build is network else torch.randint(5, (4, 3))
    explanation = explain(build(), x)
    operands = [o for _, product in recorded for o in (*product.first, *product.second)]
    assert operands
    assert {o.tensor.device.type for o in operands} == {"meta"}
    assert not any(isinstance(value, Tensor) for value in vars(explanation).values())
    assert "Tensor" not in repr(explanation)
