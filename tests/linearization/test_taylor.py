"""Taylor polynomials in the parameters: orders of the error, the snapshot, gradients, and what is refused."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from backpack import extend
from cases import BY_NAME, CASES, mlp, tied_mlp
from conftest import assert_close, call
from torch import nn
from torch.nn import functional as F

from ggn_ntk import TaylorExpansion, UnsupportedModelError, empirical_ntk, linearize, taylor_expand

X = torch.zeros(3, 5)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def direction(model):
    step = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            step[f"{name}.weight"][module.padding_idx] = 0  # of which autograd takes no gradient
    return step


def moved(point, step, h=1.0):
    return {name: p + h * step[name] for name, p in point.items()}


def autograd_linearization(model, x, step, pick=lambda found: found):
    """f(θ0, x) + J(x) step by plain autograd, one output at a time."""
    output = pick(call(model.requires_grad_(), x))
    params = dict(model.named_parameters())
    rows = []
    for entry in output.flatten():
        grads = torch.autograd.grad(
            entry, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(sum((g * step[n]).sum() for n, g in zip(params, grads, strict=True)))
    return (output + torch.stack(rows).reshape(output.shape)).detach()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linearization_of_every_case(case, dtype):
    model, x, _ = case.build(dtype)
    step = direction(model)
    expected = autograd_linearization(*kernel_einsum(model, x), {n: t.double() for n, t in step.items()})
    assert_close(linearize(model)(moved(parameters(model), step), x).detach(), expected, scale=None)


def kernel_einsum(model, x):
    model = copy.deepcopy(model).double()
    if isinstance(x, dict):
        return model, {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    return model, tuple(t.double() for t in x) if isinstance(x, tuple) else x.double() if x.is_floating_point() else x


@pytest.mark.parametrize(
    "name", ["mlp_Tanh", "conv2d", "tied_transformer", "layer_norm_gelu", "recurrent", "instance_norm1d"]
)
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_error_falls_as_a_power_of_the_step(name, degree):
    """By differences to the model itself, in float64: halving the step divides the error by 2^(degree + 1)."""
    model, x, _ = BY_NAME[name].build()
    if name == "tied_transformer":
        model.block.activation, model.block.activation_relu_or_gelu = F.gelu, 2  # no kinks
    point, step = parameters(model), direction(model)
    expansion = taylor_expand(model, degree)
    errors = []
    for h in (0.004, 0.002, 0.001):
        new = moved(point, step, h)
        true = torch.func.functional_call(model, new, x)
        errors.append((expansion(new, x) - true).norm().item())
    orders = [torch.tensor(a / b).log2().item() for a, b in pairwise(errors)]
    assert orders == pytest.approx([degree + 1] * 2, abs=0.15)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_derivatives_by_finite_differences(degree):
    """The term of each degree is the coefficient of a polynomial through values of the model along the step."""
    model, x, _ = BY_NAME["mlp_Tanh"].build()
    point, step = parameters(model), direction(model)
    h = torch.linspace(-0.05, 0.05, 13).double()
    values = torch.stack([torch.func.functional_call(model, moved(point, step, s), x).detach() for s in h.tolist()])
    vandermonde = torch.stack([(h / h[-1]) ** j for j in range(len(h))], dim=1)
    coefficients = torch.linalg.solve(vandermonde, values.flatten(1)).reshape(values.shape)
    new = moved(point, step)
    term = taylor_expand(model, degree)(new, x) - taylor_expand(model, degree - 1)(new, x)
    expected = coefficients[degree] / h[-1] ** degree
    assert (term - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.BatchNorm2d(4, track_running_stats=False), lambda: nn.InstanceNorm2d(4, affine=True), nn.Identity],
)
def test_second_derivatives_of_normalisations_in_train_mode(layer):
    """By differences of the first derivative: what torch's own operations get wrong without a word."""
    layers = [nn.Conv2d(2, 4, 3), layer(), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)]
    model, x, h = nn.Sequential(*layers).double(), torch.randn(3, 2, 4, 4).double(), 1e-5
    point, step = parameters(model), direction(model)

    def slope(s):
        return torch.func.jvp(lambda p: torch.func.functional_call(model, p, x), (moved(point, step, s),), (step,))[1]

    new = moved(point, step)
    second = taylor_expand(model, 2)(new, x) - taylor_expand(model, 1)(new, x)
    expected = (slope(h) - slope(-h)).detach() / (4 * h)
    assert (second - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_keep_their_values(mode):
    """Of bags that are padded wholly or in part, and with weights of their own, to the last bit or two."""
    tokens = torch.tensor([[0, 1, 2], [2, 2, 2], [4, 2, 4]])
    weights = torch.randn(3, 3).double() if mode == "sum" else None
    for padding in (None, 2):
        model = nn.EmbeddingBag(5, 4, mode=mode, padding_idx=padding).double()
        x = tokens if weights is None else {"input": tokens, "per_sample_weights": weights}
        assert_close(linearize(model)(parameters(model), x), call(model, x).detach())


def test_degree_one_is_the_linearization():
    for name in ("mlp_Tanh", "conv2d", "tied_transformer"):
        model, x, _ = BY_NAME[name].build()
        new = moved(parameters(model), direction(model))
        assert torch.equal(taylor_expand(model, 1)(new, x), linearize(model)(new, x))
        assert isinstance(linearize(model), TaylorExpansion)


def test_a_polynomial_is_its_own_expansion():
    """A network of two linear layers is of degree two in its parameters."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, new = torch.randn(3, 5).double(), moved(parameters(model), direction(model))
    for degree in (2, 3):
        assert_close(taylor_expand(model, degree)(new, x).detach(), torch.func.functional_call(model, new, x).detach())


def test_the_expansion_point_is_a_snapshot():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    x, point = torch.randn(6, 5), parameters(model)
    new = moved(point, direction(model))
    expansion = taylor_expand(model, 2)
    before, at_point = expansion(new, x), model(x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(model[1].running_mean, torch.zeros(4))
    assert torch.equal(expansion(new, x), before)
    assert torch.equal(expansion(point, x), at_point)
    assert all(torch.equal(expansion.point[name], p) for name, p in point.items())


def test_the_model_is_left_as_found():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).train()
    model[0].bias.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    seen = []
    handle = model.register_full_backward_hook(lambda *args: seen.append(0))
    linearize(model)(moved(parameters(model), direction(model)), torch.randn(6, 5))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model[0].bias.requires_grad
    assert handle.id in model._backward_hooks
    assert not seen


def test_batch_statistics_belong_to_the_function():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()).double().train(), torch.randn(6, 5).double()
    step = direction(model)
    actual = linearize(model)(moved(parameters(model), step), x)
    assert_close(actual.detach(), autograd_linearization(model, x, step))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_gradients_with_respect_to_the_new_parameters(degree):
    model, x, _ = BY_NAME["mlp_Tanh"].build()
    expansion, names = taylor_expand(model, degree), list(parameters(model))
    new = [p.requires_grad_() for p in moved(parameters(model), direction(model)).values()]
    assert torch.autograd.gradcheck(lambda *values: expansion(dict(zip(names, values, strict=True)), x), new)


def test_training_the_linearization():
    """Gradients at the expansion point are the model's, and training a linear model on few samples fits them."""
    model, x, y = mlp(nn.Tanh)().double(), torch.randn(4, 5).double(), torch.randn(4, 3).double()
    f_lin = linearize(model)
    student = copy.deepcopy(model)
    (f_lin(student, x) - y).square().mean().backward()
    (model(x) - y).square().mean().backward()
    for p, q in zip(student.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (f_lin(student, x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_inside_torch_func_transforms():
    model, x = mlp(nn.Tanh)().double(), torch.randn(4, 5).double()
    new = moved(parameters(model), direction(model))
    for expansion in (linearize(model), taylor_expand(model, 2)):
        by_func = torch.func.grad(lambda p, f=expansion: f(p, x).sum())(new)
        leaves = {name: p.clone().requires_grad_() for name, p in new.items()}
        by_autograd = torch.autograd.grad(expansion(leaves, x).sum(), list(leaves.values()))
        for actual, expected in zip(by_func.values(), by_autograd, strict=True):
            assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-13)
        steps = torch.linspace(-1, 1, 3).double()
        point, step = expansion.point, direction(model)
        together = torch.func.vmap(lambda h, f=expansion: f(moved(point, step, h), x))(steps)
        assert torch.allclose(together, torch.stack([expansion(moved(point, step, h), x) for h in steps]))


def test_the_kernel_is_that_of_the_linearization():
    model, x = mlp(nn.Tanh)().double(), torch.randn(4, 5).double()
    f_lin, jacobians = linearize(model), []
    new = {name: p.requires_grad_() for name, p in moved(parameters(model), direction(model)).items()}
    for entry in f_lin(new, x).flatten():
        grads = torch.autograd.grad(entry, list(new.values()), retain_graph=True)
        jacobians.append(torch.cat([g.flatten() for g in grads]))
    kernel = torch.stack(jacobians) @ torch.stack(jacobians).T
    assert_close(kernel, empirical_ntk(model, x).permute(0, 2, 1, 3).reshape(12, 12))


def test_new_parameters_as_a_model_or_a_mapping():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    other = mlp(nn.Tanh)()
    f_lin = linearize(model)
    expected = f_lin(dict(other.named_parameters()), x)
    assert torch.equal(f_lin(other, x), expected)
    from collections import UserDict

    assert torch.equal(f_lin(UserDict(other.named_parameters()), x), expected)


def test_parameters_left_out_stay():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    other = mlp(nn.Tanh)()
    mixed = parameters(model) | {"2.bias": other[2].bias}
    assert torch.allclose(linearize(model)({"2.bias": other[2].bias}, x), linearize(model)(mixed, x))


def test_params_chooses_what_to_expand_in():
    model, x, other = mlp(nn.Tanh)(), torch.randn(3, 5), mlp(nn.Tanh)()
    some = taylor_expand(model, 2, params=["0.weight", "2.bias"])
    assert list(some.point) == ["0.weight", "2.bias"]
    alone = {name: other.get_parameter(name) for name in ("0.weight", "2.bias")}
    assert torch.allclose(some(other, x), taylor_expand(model, 2)(alone, x))


@pytest.mark.parametrize("params", ["0", "0.*", ["0.bias", "[02].weight", "0"]])
def test_params_chooses_by_glob_and_module(params):
    model = tied_mlp().requires_grad_(False)
    assert taylor_expand(model, 1, params).point.keys() == {"0.weight", "0.bias"}


def test_params_as_a_mapping_is_the_point():
    model, x, other = mlp(nn.Tanh)(), torch.randn(3, 5), mlp(nn.Tanh)()
    new, point = moved(parameters(model), direction(model)), parameters(other)
    assert torch.equal(linearize(model, point)(new, x), linearize(other)(new, x))
    assert not torch.equal(model[0].weight, other[0].weight)


def test_frozen_parameters_count():
    model, x = mlp(nn.Tanh)().requires_grad_(False).double(), torch.randn(3, 5).double()
    step = direction(model)
    actual = linearize(model)(moved(parameters(model), step), x)
    assert_close(actual, autograd_linearization(model.requires_grad_(), x, step))


def test_tied_parameters_move_together():
    model, x = tied_mlp().double(), torch.randn(3, 5).double()
    step = direction(model)
    new = moved(parameters(model), step)
    expected = autograd_linearization(model, x, step)
    f_lin = linearize(model)
    assert_close(f_lin(new, x), expected)
    assert_close(f_lin(new | {"2.weight": new["0.weight"]}, x), expected)
    by_second = {("2.weight" if name == "0.weight" else name): p for name, p in new.items()}
    assert_close(f_lin(by_second, x), expected)
    with pytest.raises(
        ValueError, match=r"new_params gives '2\.weight' twice, also as '0\.weight', which is tied to it"
    ):
        f_lin(new | {"2.weight": new["0.weight"].clone()}, x)


def test_grad_mode_is_the_callers():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    f_lin = linearize(model)
    expected = f_lin(dict(model.named_parameters()), x)
    assert expected.requires_grad
    assert not f_lin(parameters(model), x).requires_grad
    with torch.no_grad():
        assert not f_lin(model, x).requires_grad
    with torch.inference_mode():
        inside = linearize(model)(model, x)
    assert torch.equal(inside, expected.detach())


def test_lower_precision():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    new = moved(parameters(model), direction(model), 0.1)
    expected = linearize(model)(new, x)
    half = {name: p.bfloat16() for name, p in new.items()}
    actual = linearize(copy.deepcopy(model).bfloat16())(half, x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert torch.allclose(actual.float(), expected, atol=0.05)


def test_devices(device):
    model, x, _ = BY_NAME["conv2d"].build(device=device)
    step = direction(model)
    actual = taylor_expand(model, 1)(moved(parameters(model), step), x)
    assert actual.device == x.device
    assert_close(actual, autograd_linearization(model, x, step))


def test_models_that_backpack_has_extended():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    new = moved(parameters(model), direction(model))
    expected = linearize(model)(new, x)
    extended = extend(model)
    extended(x).sum()
    assert extended[0].output.grad_fn is not None  # which deepcopy alone refuses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(linearize(extended)(new, x), expected)


def test_compiled_models_are_the_models_behind_them():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    compiled, new = torch.compile(model), mlp(nn.Tanh)()
    expected = linearize(model)(new, x)
    assert torch.equal(linearize(compiled)(new, x), expected)
    assert torch.equal(linearize(model)(torch.compile(new), x), expected)
    assert torch.equal(linearize(compiled)(dict(torch.compile(new).named_parameters()), x), expected)
    assert list(linearize(compiled).point) == [name for name, _ in model.named_parameters()]


class Gated(nn.Linear):
    """Holds part of itself constant, which forward mode does not see."""

    def forward(self, x):
        with torch.no_grad():
            gate = super().forward(x).sigmoid()
        return super().forward(x) * gate


def test_derivatives_are_those_of_autograd():
    model, x = Gated(5, 3).double(), torch.randn(3, 5).double()
    step = direction(model)
    assert_close(linearize(model)(moved(parameters(model), step), x), autograd_linearization(model, x, step))


class KeepsReference(nn.Module):
    """Uses a parameter past the module that holds it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.weights = [self.layer.weight]

    def forward(self, x):
        return self.layer(x).tanh() @ self.weights[0]


class Returns(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Named(nn.Module):
    """Returns the output of a model among others."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"hidden": x, "logits": self.model(x)}


def pick(found):
    return found["logits"].flatten(1).tanh()


@pytest.mark.parametrize("name", ["mlp_Tanh", "conv2d", "tied_transformer", "recurrent"])
def test_output_picks_a_tensor(name, dtype):
    inner, x, _ = BY_NAME[name].build(dtype)
    model = Named(inner)
    step = direction(model)
    expected = autograd_linearization(*kernel_einsum(model, x), {n: t.double() for n, t in step.items()}, pick)
    new = moved(parameters(model), step)
    assert_close(linearize(model, output=pick)(new, x).detach(), expected)
    assert_close(taylor_expand(model, 1, output=pick)(new, x).detach(), expected)


def test_output_of_a_polynomial():
    """The square of a linear network is of degree two in its parameters."""
    model = Named(nn.Linear(5, 3)).double()
    x, new = torch.randn(3, 5).double(), moved(parameters(model), direction(model))
    with torch.no_grad():
        expected = torch.func.functional_call(model, new, x)["logits"].square()
    for degree in (2, 3):
        expansion = taylor_expand(model, degree, output=lambda found: found["logits"].square())
        assert_close(expansion(new, x).detach(), expected)


class FusedNorm(nn.Linear):
    """Its second derivatives by nested jvps are wrong: torch does not differentiate the mean it keeps."""

    def forward(self, x):
        return torch.native_layer_norm(super().forward(x), (3,), None, None, 1e-5)[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (KeepsReference, r"torch.func does not get its derivatives right. Look for parameters that its forward pass"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), "its forward pass draws random numbers"),
        (lambda: Returns(5, 3), "it returns dict, not a tensor. Pass output=, a function that picks"),
        (lambda: FusedNorm(5, 3), "torch.func does not get its derivatives right"),
    ],
)
def test_refused_models(model, message):
    model = model()
    with pytest.raises(UnsupportedModelError, match=f"No Taylor expansion of this model:\n  - the model: {message}"):
        taylor_expand(model, 2)(model, torch.randn(3, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear}, TypeError, r"model must be a torch.nn.Module or a function .*, got the class Linear"),
        ({"degree": 1.0}, TypeError, "degree must be an integer, got float"),
        ({"degree": True}, TypeError, "degree must be an integer, got bool"),
        ({"degree": -1}, ValueError, "degree must not be negative, got -1"),
        ({"output": "logits"}, TypeError, "output must be a callable or None, got str"),
        ({"params": 3}, TypeError, "params must hold names of parameters, globs or names of modules, .*, got int"),
        ({"params": []}, ValueError, "params is empty"),
        ({"params": ["7.weight"]}, ValueError, "params names '7.weight', which the model does not have. It has: 0.we"),
        ({"params": {"0.bias": 1.0}}, TypeError, r"params\['0.bias'\] must be a tensor, got float"),
        ({"params": {"0.bias": X}}, ValueError, r"params\['0.bias'\] must have the shape .*: \[6\], got \[3, 5\]"),
        ({"model": nn.Tanh()}, ValueError, "model has no parameters to expand in"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        taylor_expand(**{"model": mlp(nn.Tanh)(), "degree": 1, **arguments})


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        ([X], TypeError, r"new_params must be a mapping .*, or a model of the same architecture, got list"),
        ({}, ValueError, "new_params holds none of the parameters expanded in: 0.weight, "),
        ({"7.weight": X}, ValueError, "new_params names '7.weight', which the model does not have. It has: 0.weight"),
        ({"0.bias": 3.0}, TypeError, r"new_params\['0.bias'\] must be a tensor, got float"),
        ({"0.bias": X}, ValueError, r"new_params\['0.bias'\] must have the shape .*: \[6\], got \[3, 5\]"),
        ({"0.bias": torch.zeros(6).double()}, ValueError, r"must have the dtype of the parameter: torch.float32, got"),
        (nn.Linear(5, 3), ValueError, "new_params names 'weight', which the model does not have"),
    ],
)
def test_bad_new_parameters(new, error, message):
    with pytest.raises(error, match=message):
        linearize(mlp(nn.Tanh)())(new, X)


def test_bad_samples():
    model = mlp(nn.Tanh)()
    with pytest.raises(ValueError, match=r"x1 is torch.float64, the model's parameters torch.float32"):
        linearize(model)(model, X.double())
