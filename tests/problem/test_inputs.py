"""What x1 and x2 may be, and what of the process a call relies on."""

import importlib
import re
import sys
import textwrap
from collections import OrderedDict, UserDict
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from backpack import backpack, extend
from conftest import METHODS, assert_close, call, kernel_of, loop_jacobians
from torch import Tensor, nn

from ggn_ntk import (
    EmpiricalNTK,
    UnsupportedModelError,
    empirical_kernels,
    empirical_ntk,
    explain,
    linearize,
    nngp,
    shared,
    taylor_expand,
)
from ggn_ntk.methods.structured import recorded_products
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

ROUTES = [method for method in METHODS if method != "vivit"]
FUNCTIONS = [empirical_ntk, jacobian_contraction, ntk_vector_products, explain, nngp, empirical_kernels]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Operator(nn.Module):
    """Multiplies features of samples with features of points, which come in any structure."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk = nn.Linear(3, 4), nn.Linear(1, 4)

    def forward(self, x, grid=None, scale=1, flag=True, mode=None):
        if grid is None and not isinstance(x, Tensor):
            x, grid = x.values() if isinstance(x, Mapping) else vars(x).values() if is_dataclass(x) else x
        while not isinstance(x, Tensor):
            x = x["x"] if isinstance(x, dict) else x[0]
        grid = grid["points"][0] if isinstance(grid, dict) else grid
        h = self.branch(x).tanh() * (2 if flag else 1) * (3 if mode == "three" else scale)
        return h[:, :2] if grid is None else h @ self.trunk(grid).tanh().T


@dataclass(frozen=True)
class Batch:
    x: Tensor
    grid: Any


class Pair(NamedTuple):
    x: Tensor
    grid: Any


# ---------------------------------------------------------------- structures

GRID = torch.linspace(-1, 1, 7, dtype=torch.float64).unsqueeze(1)

# Inputs of samples x, with something that marks what they share.
FORMS = {
    "flag": lambda x, mark: {"x": x, "flag": False},
    "none": lambda x, mark: (x, None),
    "text": lambda x, mark: {"x": x, "scale": 2.5, "mode": "three"},
    "tuple": lambda x, mark: (x, mark(GRID), 2.5, False, "three"),
    "mapping": lambda x, mark: {"grid": mark(GRID), "x": x, "mode": None},
    "mapping_in_tuple": lambda x, mark: ({"x": x, "grid": mark(GRID)},),
    "list": lambda x, mark: ([x, mark(GRID)],),
    "tuple_in_tuple": lambda x, mark: ((x, mark(GRID)), None, 2.5),
    "named_tuple": lambda x, mark: (Pair(x, mark(GRID)),),
    "dataclass": lambda x, mark: {"x": Batch(x, mark(GRID))},
    "ordered": lambda x, mark: (OrderedDict(x=x, grid=mark(GRID)),),
    "user_dict": lambda x, mark: UserDict(x=x, grid=mark(GRID)),
    "nested": lambda x, mark: {"x": [{"x": (x,)}], "grid": mark(GRID)},
    "shared_structure": lambda x, mark: (x, mark({"points": [GRID]})),
}


def unmarked(value):
    return value


class Plain(nn.Module):
    """The model on a tensor of samples."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, x):
        return call(self.model, self.form(x, unmarked))


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.mark.parametrize("method", [method for method in ROUTES if method != "auto"])
def test_structures(form, method):
    model = Operator().double()
    kernel = empirical_ntk(model, form(X, shared), form(X[:2] + 1, shared), method=method, check=True)
    assert_close(kernel, kernel_of(Plain(model, form), X, X[:2] + 1))
    symmetric = empirical_ntk(model, form(X, shared), compute="trace", method=method)
    assert_close(symmetric, kernel_of(Plain(model, form), X).diagonal(dim1=2, dim2=3).sum(-1))


def test_structures_in_all_other_functions(form):
    model, plain = Operator().double(), Plain(Operator().double(), form)
    plain.model = model
    given, outputs = form(X, shared), plain(X).detach()
    assert_close(nngp(model, given, form(X[:2], shared)), torch.einsum("nc,md->nmcd", outputs, outputs[:2]))
    assert_close(empirical_kernels(model, given).ntk, kernel_of(plain, X))
    assert explain(model, given).covered == explain(plain, X).covered
    new = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    for expand in (linearize, partial(taylor_expand, degree=2)):
        expected = expand(plain)({f"model.{name}": p for name, p in new.items()}, X)
        assert_close(expand(model)(new, given), expected)


def test_structures_on_devices(form, device):
    model = Operator().double()
    expected = kernel_of(Plain(model, form), X, X[:2])
    on_device = [form(x.to(device), lambda value: shared(moved(value, device))) for x in (X, X[:2])]
    for method in ("structured", "jacobian_contraction"):
        assert_close(empirical_ntk(model.to(device), *on_device, method=method).cpu(), expected)


def moved(value, device):
    return value.to(device) if isinstance(value, Tensor) else {"points": [value["points"][0].to(device)]}


def test_batches_of_hugging_face():
    """As a tokenizer returns them, and as models do."""
    transformers = pytest.importorskip("transformers")
    outputs = importlib.import_module("transformers.modeling_outputs")
    model = Operator().double()
    expected = kernel_of(Plain(model, FORMS["tuple_in_tuple"]), X) / 2.5**2
    for given in (
        transformers.BatchEncoding({"x": X, "grid": shared(GRID)}),
        (transformers.BatchEncoding({"x": X, "grid": shared(GRID)}),),
        (outputs.BaseModelOutput(last_hidden_state=X, hidden_states=shared(GRID)),),
    ):
        assert_close(empirical_ntk(model, given), expected)


class Mapped:
    """Neither a dict nor registered as a mapping, but what ``**`` takes."""

    def __init__(self, **entries):
        self.entries = entries

    def keys(self):
        return self.entries.keys()

    def __getitem__(self, key):
        return self.entries[key]


def test_anything_that_is_taken_apart_like_a_mapping():
    model = Operator().double()
    kernel = empirical_ntk(model, Mapped(x=X, grid=shared(GRID)), {"grid": shared(GRID.clone()), "x": X[:2]})
    assert_close(kernel, kernel_of(Plain(model, FORMS["mapping"]), X, X[:2]))


class Careless(Operator):
    """Writes to what it is given."""

    def forward(self, batch, names):
        grid = batch.pop("grid")
        names.append(str(batch))
        return super().forward(batch["x"].mul_(2), grid.add_(1))


@pytest.mark.parametrize("method", ROUTES)
def test_what_a_model_writes_to_is_a_copy(method):
    class Careful(Operator):
        def forward(self, x):
            return super().forward(2 * x, GRID + 1)

    model, x, grid, names = Careless().double(), X.clone(), GRID.clone(), ["a"]
    batch = {"x": x, "grid": shared(grid)}
    careful = Careful().double()
    careful.load_state_dict(model.state_dict())
    assert_close(empirical_ntk(model, (batch, names), method=method), kernel_of(careful, X))
    assert list(batch) == ["x", "grid"]
    assert names == ["a"]
    assert torch.equal(x, X)
    assert torch.equal(grid, GRID)


def test_layers_one_by_one_take_tensors_by_position_alone():
    """Where a Sequential model takes anything else, it is taken apart in the graph."""

    class First(nn.Module):
        def forward(self, batch):
            return batch["x"]

    model = nn.Sequential(First(), nn.Linear(3, 2), nn.Tanh()).double()
    given = ({"x": X},)
    assert_close(empirical_ntk(model, given), kernel_of(model[1:], X))
    for options in ({"capture": "sequential"}, {"method": "vivit"}):
        with pytest.raises(UnsupportedModelError, match=r"something else than tensors|ViViT takes one input tensor"):
            empirical_ntk(model, given, **options)


def test_settings_are_passed_on_as_they_are():
    """Also where they are dataclasses that hold more than their fields."""

    @dataclass
    class Settings:
        scale: float

        def __post_init__(self):
            self.doubled = 2 * self.scale

    class Configured(Operator):
        def forward(self, x, settings):
            return super().forward(x, scale=settings.doubled)

    model, settings = Configured().double(), Settings(1.5)
    expected = kernel_of(Plain(model, lambda x, mark: (x, settings)), X)
    assert_close(empirical_ntk(model, (X, settings), (X, Settings(1.5))), expected)


# ---------------------------------------------------------------- what is refused


class Points:
    """Of no structure that is known."""

    def __init__(self, x):
        self.x = x


class OfPoints(Operator):
    def forward(self, points):
        return super().forward(points.x)


def test_what_is_of_no_known_structure_is_refused_with_a_wrapper_that_works():
    model = OfPoints().double()
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=r"x1 must be a tensor .*, got Points") as info:
            function(model, Points(X))
    code = textwrap.dedent(str(info.value).partition("say:\n\n")[2])
    scope = {"torch": torch, "Points": Points, "empirical_ntk": lambda model, x: model(x), "model": model, "x1": X}
    exec(code.replace("empirical_ntk(", "result = empirical_ntk("), scope)
    assert torch.equal(scope["result"], model(Points(X)))
    assert_close(empirical_ntk(scope["Wrapper"](model), X), kernel_of(scope["Wrapper"](model), X))


REFUSED = [
    ([X], TypeError, r"got list\. Pass \(x1,\) for model\(x1\), or tuple\(x1\) for model\(\*x1\)\.$"),
    (Batch(X, None), TypeError, r"got Batch\. Pass \(x1,\) for model\(x1\)\.$"),
    (X.numpy(), TypeError, r"got ndarray\. Pass torch\.as_tensor\(x1\)\.$"),
    (3.0, TypeError, r"got float\.$"),
    (dict, TypeError, r"got the class dict\.$"),
    ((X, {"mask": X.numpy()}), TypeError, r"x1\[1\]\['mask'\] must be .* got ndarray\. Pass torch\.as_tensor"),
    ((MappingProxyType({"x": X}),), TypeError, r"x1\[0\] is of the type mappingproxy.*pass a tuple, a list or a dict"),
    (shared(X), ValueError, r"x1 has no samples: .* one tensor \[N, \.\.\.\] that is not shared"),
    ({"x": None, "flag": True}, ValueError, "x1 has no samples"),
    ((X, GRID), ValueError, r"got x1\[0\]: 6, x1\[1\]: 7\..*shared\(x1\[1\]\)"),
    ({"x": [GRID, X, X]}, ValueError, r"shared\(x1\['x'\]\[0\]\)"),
    ((X, torch.tensor(2.0)), ValueError, r"x1\[1\] has no axes.*shared\(x1\[1\]\)"),
    ((X, shared(GRID.float())), ValueError, r"x1\[1\] is torch\.float32, the model's"),
    ((X, shared(GRID.to("meta"))), ValueError, r"x1\[1\] is on meta"),
    (X.clone().requires_grad_(), ValueError, r"x1 requires a gradient.*x1\.detach\(\).*create_graph=True"),
    ((X, shared([GRID.clone().requires_grad_()])), ValueError, r"x1\[1\]\[0\] requires a gradient"),
]


@pytest.mark.parametrize(("x", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_with_what_to_do(x, error, message):
    for function in FUNCTIONS:
        with pytest.raises(error, match=message):
            function(Operator().double(), x)
        with pytest.raises(error, match=message.replace("x1", "x2")):
            function(Operator().double(), X, x)
    with pytest.raises(error, match=message):
        linearize(Operator().double())(dict(Operator().double().named_parameters()), x)


@pytest.mark.parametrize("value", [None, 3, [], X.numpy(), Tensor])
def test_what_is_no_tensor_needs_no_mark(value):
    with pytest.raises(TypeError, match=r"value must be a tensor or hold tensors, got .*without shared"):
        shared(value)


DIFFERENT = [
    ({"x": X, "flag": True}, {"x": X}, r"same entries as x1.* got \['x'\] against \['x'\], \['flag'\] \(shared\)"),
    (([X],), ((X,),), r"the same entries as x1.* \[0\] \(tuple\) against .* \[0\] \(list\)"),
    ((X, X), (X, shared(X)), r"\[1\] \(shared\) against \[0\], \[1\]"),
]


@pytest.mark.parametrize(("x1", "x2", "message"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_both_sets_have_one_structure(x1, x2, message):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=message):
            function(Operator().double(), x1, x2)


def test_what_all_samples_share_may_have_as_many_rows():
    """Which is found out, with what to do."""

    class Summed(Operator):
        def forward(self, x, grid):
            return super().forward(x, grid).sum(1, keepdim=True)

    for model, message in ((Operator(), "its output for (one|3)"), (Summed(), "influence one another")):
        for method in ROUTES:
            with pytest.raises(UnsupportedModelError, match=rf"{message}.*all samples share with ggn_ntk\.shared"):
                empirical_ntk(model.double(), (X, GRID[:6]), method=method)
            empirical_ntk(model, (X, shared(GRID[:6])), method=method)
    plain = Plain(model, lambda x, mark: (x, GRID[:6]))
    assert_close(empirical_ntk(model, (X, shared(GRID[:6]))), kernel_of(plain, X))


@pytest.mark.parametrize("method", ROUTES)
def test_a_graph_that_all_samples_share(method):
    """A sparse matrix, which is multiplied from the left."""

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, adjacency):
            h = self.first(x).tanh()
            mixed = torch.sparse.mm(adjacency, h.transpose(0, 1).flatten(1)).view(len(adjacency), *h.shape[::2])
            return self.last(mixed.transpose(0, 1)).sum(1)

    model = Convolution().double()
    adjacency = torch.eye(5, dtype=torch.float64).roll(1, 0)
    adjacency[0, 3] = 0.5
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    plain = Plain(model, lambda x, mark: (x, adjacency))
    given = x, shared(adjacency.to_sparse())
    assert_close(empirical_ntk(model, given, method=method), kernel_of(plain, x))
    other = x[:1], shared(adjacency.to_sparse())  # of which torch does not tell whether it is the same
    assert_close(empirical_ntk(model, given, other, method=method), kernel_of(plain, x, x[:1]))


class Incomparable:
    def __eq__(self, other):
        raise RuntimeError("neither equal nor not")

    __hash__ = None


def test_what_cannot_be_compared():
    class Ignoring(Operator):
        def forward(self, x, settings):
            return super().forward(x)

    model = Ignoring().double()
    plain = Plain(model, lambda x, mark: (x, None))
    assert_close(empirical_ntk(model, (X, Incomparable()), (X[:2], Incomparable())), kernel_of(plain, X, X[:2]))
    linearize(model)({name: p + 0.1 for name, p in model.named_parameters()}, (X, Incomparable()))


def test_expansions_look_at_samples_anew_where_what_they_share_has_changed():
    expansion = linearize(Operator().double())
    new = {name: p + 0.1 for name, p in expansion.point.items()}
    for given in ({"x": X, "flag": True}, {"x": X, "flag": False}, (X, shared(GRID)), (X, shared(GRID + 1)), (X, None)):
        before = len(expansion._verified)
        for _ in range(2):
            expansion(new, given)
            assert len(expansion._verified) == before + 6


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
            function(Operator().double(), made())
    with pytest.raises(error, match=message):
        linearize(Operator().double())(dict(Operator().double().named_parameters()), made())


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

    def recording(request, sizes):
        found = recorded_products(request, sizes)
        recorded.extend(found.taken.products)
        return found

    monkeypatch.setattr(sys.modules["ggn_ntk.kernels.explain"], "recorded_products", recording)
    x = torch.randn(4, 3) if build is network else torch.randint(5, (4, 3))
    explanation = explain(build(), x)
    operands = [o for _, product in recorded for o in (*product.first, *product.second)]
    assert operands
    assert {o.tensor.device.type for o in operands} == {"meta"}
    assert not any(isinstance(value, Tensor) for value in vars(explanation).values())
    assert "Tensor" not in repr(explanation)
