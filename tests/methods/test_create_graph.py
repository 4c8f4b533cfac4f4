"""Kernels that can be differentiated, in parameters and inputs, against differences of kernels."""

import copy

import pytest
import torch
from cases import BY_NAME, mlp
from conftest import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ggn_ntk import RouteWarning, UnsupportedModelError, empirical_ntk
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.spectrum import condition_number

X = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def model():
    return mlp(nn.Tanh)().double()


def assert_slope(f, tensors, gradients, rtol=1e-5):
    """The gradient of a number agrees with its central difference along a random direction."""
    steps = [torch.randn_like(t) * 1e-6 for t in tensors]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for t, step in zip(tensors, steps, strict=True):
                t.data += sign * step
        values.append(f().item())
        with torch.no_grad():
            for t, step in zip(tensors, steps, strict=True):
                t.data -= sign * step
    slope = sum((g * step).sum() for g, step in zip(gradients, steps, strict=True)).item()
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=rtol)


def slopes(model, x1, x2=None, **options):
    """Differentiate a random sum of a kernel, in all that requires a gradient, beside differences of it."""
    inputs = [x for x in (x1, x2) if x is not None and x.requires_grad]
    weights = None

    def total(graph):
        nonlocal weights
        given = (x1, x2) if graph else (x1.detach(), None if x2 is None else x2.detach())
        kernel = jacobian_contraction(model, *given, create_graph=graph, **options)
        weights = torch.randn_like(kernel) if weights is None else weights
        return (weights * kernel).sum()

    tensors = [*(p for p in model.parameters() if p.requires_grad), *inputs]
    gradients = torch.autograd.grad(total(True), tensors, materialize_grads=True)
    assert_slope(lambda: total(False), tensors, gradients)


THROUGH = ["mlp_Tanh", "conv2d", "batch_norm1d", "mlp_frozen_middle", "tied", "custom_parameter"]
LOOPED = ["tied_transformer", "layer_norm_gelu", "recurrent"]


@pytest.mark.parametrize("name", [*THROUGH, *LOOPED])
def test_derivatives_of_cases(name):
    model, x1, x2 = BY_NAME[name].build()
    if name == "tied_transformer":
        model.block.activation, model.block.activation_relu_or_gelu = F.gelu, 2  # no kinks
    else:
        x1.requires_grad_(), x2.requires_grad_()
    if name in LOOPED:
        with pytest.warns(RouteWarning, match="come from a loop over samples and outputs"):
            slopes(model, x1, x2)
    else:
        slopes(model, x1, x2)


@pytest.mark.parametrize(
    "options", [{"compute": "trace"}, {"diagonal_axes": 0}, {"params": "2"}, {"chunk_size": 2}], ids=str
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_of_any_kernel(model, options, symmetric):
    """Also in parameters that the kernel does not sum over."""
    x1, x2 = X[:3].clone().requires_grad_(), None if symmetric else X[3:].clone().requires_grad_()
    slopes(model, x1, x2, **options)


def test_derivatives_of_pairs_and_of_sides_that_differ_in_shape(model):
    slopes(model, X[:2].clone().requires_grad_(), X[2:4].clone().requires_grad_(), paired=True)
    sequences = nn.Sequential(model, nn.Flatten(1))
    pooled = lambda out: out.unflatten(1, (-1, 3)).mean(1)  # noqa: E731
    longer, shorter = torch.randn(2, 4, 5).double().requires_grad_(), torch.randn(3, 2, 5).double().requires_grad_()
    slopes(sequences, longer, shorter, output=(pooled, lambda out: out[:, :2]))


def test_the_values_are_those_without_a_graph(model):
    kernel = jacobian_contraction(model, X, create_graph=True)
    assert kernel.requires_grad
    assert not jacobian_contraction(model, X).requires_grad
    assert_close(kernel.detach(), jacobian_contraction(model, X))
    assert_close(empirical_ntk(model, X), kernel.detach())
    with torch.no_grad():
        assert jacobian_contraction(model, X, create_graph=True).requires_grad
    kernels = jacobian_contraction(model, X, create_graph=True, per_parameter="module")
    assert_close(sum(kernels.values()).detach(), kernel.detach())
    assert all(k.requires_grad for k in kernels.values())


def test_condition_number_can_be_lowered(model):
    """A step down its gradient."""
    condition = lambda k: torch.linalg.cond(k.permute(0, 2, 1, 3).flatten(2).flatten(0, 1))  # noqa: E731
    before = condition(jacobian_contraction(model, X[:2], create_graph=True))
    before.backward()
    params = [p for p in model.parameters() if p.grad is not None]
    assert_slope(lambda: condition(jacobian_contraction(model, X[:2])), params, [p.grad for p in params], rtol=1e-4)
    norm = sum(p.grad.square().sum() for p in params)
    with torch.no_grad():
        for p in params:
            p -= 1e-3 * before.detach() / norm * p.grad
    after = condition_number(jacobian_contraction(model, X[:2]))
    assert after < before.item()


def test_graphs_reach_beyond_inputs_and_through_parts_of_the_model(model):
    """Inputs are computed from other tensors, also from the model's own parameters."""
    start = X[:3].clone().requires_grad_()

    def total(graph):
        x = (start + model[0].bias.mean()).sin()
        return jacobian_contraction(model, x if graph else x.detach(), create_graph=graph).square().sum()

    tensors = [start, *model.parameters()]
    assert_slope(lambda: total(False), tensors, torch.autograd.grad(total(True), tensors, materialize_grads=True))


def test_everything_is_left_as_found(model):
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x, before = X.clone().requires_grad_(), copy.deepcopy(model.state_dict())
    jacobian_contraction(model, x, create_graph=True)
    assert x.grad is None
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(vars(m).get("_forward_hooks") for m in model.modules())


def test_functions(model):
    """The graph leads to the tensors that were given, also where these were computed."""
    raw = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def function(params, x):
        return torch.func.functional_call(model, params, (x,))

    def total(graph):
        params = {name: p * 2 if name == "0.weight" else p for name, p in raw.items()}
        return jacobian_contraction(function, X, params=params, create_graph=graph).square().sum()

    tensors = list(raw.values())
    assert_slope(lambda: total(False), tensors, torch.autograd.grad(total(True), tensors, materialize_grads=True))


def test_single_precision_and_kinks():
    model, x = mlp(nn.ReLU)(), X.float().requires_grad_()
    kernel = jacobian_contraction(model, x, create_graph=True)
    gradients = torch.autograd.grad(kernel.square().sum(), [x, *model.parameters()], materialize_grads=True)
    wide, y = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    kernel = jacobian_contraction(wide, y, create_graph=True)
    expected = torch.autograd.grad(kernel.square().sum(), [y, *wide.parameters()], materialize_grads=True)
    for actual, right in zip(gradients, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.linalg.vector_norm(actual - right) <= 1e-4 * torch.linalg.vector_norm(right)


class Checkpointed(nn.Module):
    """Evaluates a part of itself again in a backward pass."""

    def __init__(self, part):
        super().__init__()
        self.part, self.calls = part, [0]

    def forward(self, x):
        return checkpoint(self._counted, x, use_reentrant=False)

    def _counted(self, x):
        self.calls[0] += 1
        return self.part(x)


def test_what_was_computed_is_not_evaluated_again(model):
    model = Checkpointed(model)
    slopes(model, X[:2].clone().requires_grad_())
    kernel = jacobian_contraction(model, X[:2], create_graph=True)
    calls = model.calls[0]
    kernel.sum().backward()
    assert model.calls[0] == calls


def test_second_derivatives_that_torch_gets_wrong_are_refused():
    """Those of weight normalisation."""
    model, x, _ = BY_NAME["weight_norm"].build()
    with (
        pytest.warns(RouteWarning, match="second derivatives wrong"),
        pytest.raises(UnsupportedModelError, match="autograd does not get its second derivatives right"),
    ):
        jacobian_contraction(model, x, create_graph=True)


class Once(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class With(nn.Module):
    """A layer, and a function."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(5, 3).double(), function
        self.register_buffer("state", torch.zeros(1).double())

    def forward(self, x):
        return self.function(self, self.layer(x))


def _write(model, h):
    with torch.no_grad():
        model.layer.weight.mul_(1.0)
    return h.tanh()


@pytest.mark.filterwarnings("ignore::ggn_ntk.RouteWarning")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, h: Once.apply(h), "autograd does not get its second derivatives right"),
        (lambda model, h: h - h.mean(0), "samples influence one another"),
        (lambda model, h: F.dropout(h), "draws random numbers"),
        (_write, "its forward pass writes to parameters or buffers"),
    ],
    ids=["once", "interacting", "random", "writing"],
)
def test_what_is_refused(function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        jacobian_contraction(With(function), X, create_graph=True)


def test_arguments(model):
    with pytest.raises(TypeError, match="create_graph must be True or False, got int"):
        jacobian_contraction(model, X, create_graph=1)
    with pytest.raises(
        ValueError, match=r"x1 requires a gradient, .*jacobian_contraction\(\.\.\., create_graph=True\)"
    ):
        jacobian_contraction(model, X.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"x2 is torch\.float32"):
        jacobian_contraction(model, X, X.float().requires_grad_(), create_graph=True)
