"""Samples whose Jacobians or outputs are not finite: NaN in their rows and columns, a warning, and nothing else."""

import warnings

import pytest
import torch
from cases import TiedTransformer, mlp
from conftest import COMPUTES, METHODS, assert_close, first_samples
from torch import nn

from ggn_ntk import NotFiniteWarning, UnsupportedModelError, empirical_kernels, empirical_ntk, nngp
from ggn_ntk.reference import jacobian_contraction

NAN, INF = float("nan"), float("inf")

each_method = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """A network of 4 features, with a function of its hidden units."""

    def __init__(self, function=torch.tanh):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Head(Net):
    """The function is of the outputs."""

    def forward(self, x):
        return self.function(self.last(self.first(x).tanh()))


def kernel_with_warnings(function, *args, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        kernel = function(*args, **options)
    assert all(w.category is NotFiniteWarning and w.filename == __file__ for w in found), [
        str(w.message) for w in found
    ]
    return kernel, [str(w.message) for w in found]


def good(n, bad):
    return [i for i in range(n) if i not in bad]


def assert_nan_alone(kernel, expected, rows, columns):
    """NaN at rows and columns, and what is expected of the kernel of the others."""
    isnan = torch.zeros(kernel.shape[:2], dtype=torch.bool)
    isnan[rows], isnan[:, columns] = True, True
    assert kernel[isnan].isnan().all()
    kept, others = good(len(kernel), rows), good(kernel.shape[1], columns)
    assert_close(kernel[kept][:, others], expected)


def check(model, x, rows, columns=None, *, x2=None, **options):
    """Compare a kernel with that of the samples that are finite."""
    columns = rows if x2 is None else columns
    kernel, messages = kernel_with_warnings(empirical_ntk, model, x, x2, **options)
    assert len(messages) == 1
    names = [f"x1[{i}]" for i in rows] + ([] if x2 is None else [f"x2[{i}]" for i in columns])
    assert messages[0].startswith("Jacobians of " + ", ".join(names[:7]))
    left = first_samples(x, good(len(x), rows))
    right = None if x2 is None else first_samples(x2, good(len(x2), columns))
    shape = {key: options[key] for key in ("compute", "trace_axes", "diagonal_axes", "per_parameter") if key in options}
    expected = empirical_ntk(model, left, right, method="jacobian_contraction", **shape)
    kernels, expecteds = (k if isinstance(k, dict) else {"": k} for k in (kernel, expected))
    for name, one in expecteds.items():
        assert_nan_alone(kernels[name], one, rows, columns)


@each_method
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("bad", [[4], [0, 1, 3]])
@pytest.mark.parametrize("plain", [True, False])
def test_inputs(method, value, bad, plain, dtype):
    if method == "vivit" and not plain:
        pytest.skip("for Sequential models")
    model = (nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)) if plain else Net()).to(dtype)
    x = torch.randn(5, 4, dtype=dtype)
    x[bad, 1] = value
    check(model, x, bad, method=method)


OPTIONS = [
    *({"compute": compute} for compute in COMPUTES),
    *(
        {key: value}
        for key, value in [("trace_axes", 0), ("diagonal_axes", 0), ("per_parameter", True), ("check", True)]
    ),
]


@each_method
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [([2], []), ([3], [0, 1]), ([0, 1, 2, 3], [2])])
def test_both_sets_and_every_result(method, options, rows, columns):
    model, x1, x2 = mlp(nn.Tanh)().double(), torch.randn(4, 5).double(), torch.randn(3, 5).double()
    x1[rows, 0], x2[columns, 4] = NAN, INF
    kept = good(4, rows), good(3, columns)
    if all(kept):
        check(model, x1, rows, columns, x2=x2, method=method, **options)
        return
    kernel, messages = kernel_with_warnings(empirical_ntk, model, x1, x2, method=method, **options)
    assert len(messages) == 1
    for one in kernel.values() if isinstance(kernel, dict) else [kernel]:
        assert one.shape[:2] == (4, 3)
        assert one.isnan().all()


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("bad", [[20], [0, 31, 59], [*range(0, 60, 2)]])
def test_few_of_60_in_each_capture(capture, compute, bad, dtype):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype), torch.randn(60, 4, dtype=dtype)
    x[bad, 3] = NAN
    check(model, x, bad, capture=capture, compute=compute)


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction"])
def test_any_place(method):
    for i in range(1, 59, 8):
        x = torch.randn(60, 4)
        x[i, 0] = NAN
        check(Net(), x, [i], method=method, compute="trace")


def test_symmetry():
    x = torch.randn(7, 4)
    x[[1, 5], 2] = INF
    for model in (Net(), nn.Sequential(nn.Linear(4, 3))):
        kernel, _ = kernel_with_warnings(empirical_ntk, model, x)
        assert torch.equal(kernel.nan_to_num(7.0), kernel.permute(1, 0, 3, 2).nan_to_num(7.0))


@pytest.mark.parametrize("model", [Head, Net])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "vivit"])
def test_gradients_alone(model, method, dtype):
    """The root of zero has an infinite slope."""
    model, x = model(lambda h: h + h.square().sum(1, keepdim=True).sqrt()), torch.randn(9, 4, dtype=dtype)
    model = model.to(dtype)
    with torch.no_grad():
        for p in (model.first.bias, model.last.bias):
            p.zero_()
    x[[2, 6]] = 0
    check(model, x, [2, 6], method=method)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "vivit"])
def test_overflow(method):
    x = torch.randn(9, 4)
    model = Net(lambda h: (h.abs() * 3).exp())
    with torch.no_grad():
        model.first.weight.fill_(0.5)
    x[5] = 1e3
    check(model, x, [5], method=method)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "vivit"])
def test_outputs_alone(method):
    """Constants that are not finite have no part in a Jacobian."""
    x = torch.randn(9, 4).double()
    x[:, 0], x[[0, 4], 0] = 1, -1
    for model in (Masked(INF), Masked(NAN), Masked(-INF)):
        model = model.double()
        kernel, messages = kernel_with_warnings(empirical_ntk, model, x, method=method)
        assert not messages
        expected = jacobian_contraction(model.net, x).clone()
        expected[[0, 4], :, 1], expected[:, [0, 4], :, 1] = 0, 0
        assert_close(kernel, expected)


class Masked(nn.Module):
    """Some samples have a constant for an output."""

    def __init__(self, value):
        super().__init__()
        self.net, self.value = Net(), value

    def forward(self, x):
        h = self.net(x)
        return h.masked_fill((x[:, :1] < 0) & torch.tensor([False, True, False]), self.value)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("model", [Net, lambda: Head(torch.log), lambda: Masked(NAN)])
def test_nngp(model, compute, dtype):
    model, x1, x2 = model().to(dtype), torch.randn(8, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    x1[3, 0], x2[[0, 4], 1] = NAN, INF
    with torch.no_grad():
        infinite = [(~model(x).isfinite()).any(1).nonzero().flatten().tolist() for x in (x1, x2)]
    if not all(len(bad) < len(x) for bad, x in zip(infinite, (x1, x2), strict=True)):
        pytest.skip("none is left")
    for second, columns in ((x2, infinite[1]), (None, infinite[0])):
        kernel, messages = kernel_with_warnings(nngp, model, x1, second, compute=compute)
        assert len(messages) == 1
        assert messages[0].startswith("Outputs of " + ", ".join(f"x1[{i}]" for i in infinite[0]))
        kept = good(8, infinite[0])
        others = None if second is None else x2[good(5, columns)]
        assert_nan_alone(kernel, nngp(model, x1[kept], others, compute=compute), infinite[0], columns)


@pytest.mark.parametrize("method", ["auto", "structured", "jacobian_contraction"])
def test_both_kernels(method):
    model, x = Net().double(), torch.randn(6, 4).double()
    x[2, 0] = NAN
    kernels, messages = kernel_with_warnings(empirical_kernels, model, x, method=method)
    assert sorted(message.split()[0] for message in messages) == ["Jacobians", "Outputs"]
    kept = good(6, [2])
    expected = empirical_kernels(model, x[kept])
    assert_nan_alone(kernels.ntk, expected.ntk, [2], [2])
    assert_nan_alone(kernels.nngp, expected.nngp, [2], [2])


@each_method
def test_none_left(method):
    with pytest.raises(UnsupportedModelError, match=r"its gradients are not finite\. Look for overflow"):
        empirical_ntk(mlp(nn.Tanh)(), torch.full((3, 5), NAN), method=method)


@each_method
def test_a_parameter_that_is_not_finite(method):
    model = mlp(nn.Tanh)()
    with torch.no_grad():
        model[0].weight[0, 0] = NAN
    with pytest.raises(UnsupportedModelError, match="its gradients are not finite"):
        empirical_ntk(model, torch.randn(3, 5), method=method)


class Weighed(nn.Module):
    """A transformer whose samples are scaled."""

    def __init__(self):
        super().__init__()
        self.net = TiedTransformer()

    def forward(self, tokens, scale):
        return self.net(tokens) * scale[:, None, None]


@pytest.mark.parametrize("method", ["auto", "jacobian_contraction"])
def test_a_transformer(method):
    model, tokens, scale = Weighed().double().eval(), torch.randint(7, (5, 4)), torch.ones(5).double()
    scale[3] = INF
    kernel, messages = kernel_with_warnings(empirical_ntk, model, (tokens, scale), method=method, compute="trace")
    assert messages == ["Jacobians of x1[3] are not finite: NaN in the kernel."]
    kept = good(5, [3])
    assert_nan_alone(kernel, empirical_ntk(model, (tokens[kept], scale[kept]), compute="trace"), [3], [3])
