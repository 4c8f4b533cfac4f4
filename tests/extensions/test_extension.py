"""The BackPACK extension, in a user's own training step."""

import random

import numpy as np
import pytest
import torch
from backpack import backpack, extend
from backpack.context import CTX
from backpack.custom_module.branching import SumModule
from backpack.extensions import BatchGrad
from backpack.extensions.module_extension import ModuleExtension
from cases import PLAIN, Residual, mlp, tied_mlp
from conftest import COMPUTES, assert_close, oracle, oracle_sum
from extended import (
    VIEWS,
    Between,
    Branches,
    NotExtended,
    between,
    image_net,
    itself,
    kernel_as_it_ran,
    run,
    samples,
    zeros,
    zeros_then,
)
from torch import nn
from torch.nn import functional as F
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk import AccumulateGramHook, EmpiricalNTK, Factored, UnsupportedModelError, register_rule
from ggn_ntk.reference import jacobian_contraction


def step(model, x, extension, *others, loss_func=None):
    """A training step on random targets."""
    loss_func = extend(nn.MSELoss() if loss_func is None else loss_func)
    with backpack(extension, *others):
        output = extend(model)(x)
        if isinstance(loss_func, nn.CrossEntropyLoss):
            target = torch.randint(output.shape[1], output.shape[:1])
        else:
            target = torch.rand_like(output)
        loss_func(output, target).backward()


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_kernel_of_two_parts_of_the_batch(case):
    model, x1, x2 = case.build()
    for compute in COMPUTES:
        extension = EmpiricalNTK(len(x1), compute=compute)
        step(model, torch.cat([x1, x2]), extension)
        assert_close(extension.ntk(), oracle_sum(case, compute=compute))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_kernel_of_the_batch(case):
    model, x1, _ = case.build()
    extension = EmpiricalNTK(per_parameter=True)
    step(model, x1, extension)
    assert_close(extension.ntk(), oracle_sum(case, symmetric=True))
    for name, kernel in oracle(case.name, symmetric=True).items():
        assert_close(model.get_parameter(name).empirical_ntk, kernel, scale=oracle_sum(case, symmetric=True))


LOSSES = [
    *(nn.MSELoss(reduction=r) for r in ("sum", "mean")),
    *(nn.CrossEntropyLoss(reduction=r) for r in ("sum", "mean")),
    nn.BCEWithLogitsLoss(),
    nn.L1Loss(),
]


@pytest.mark.parametrize("loss_func", LOSSES, ids=str)
def test_beside_batch_grad_on_any_loss(loss_func):
    model, x = mlp(nn.ReLU)().double(), torch.randn(6, 5).double()
    expected = jacobian_contraction(model, x[:4], x[4:])
    extension = EmpiricalNTK(4)
    others = () if isinstance(loss_func, nn.L1Loss) else (BatchGrad(),)
    torch.manual_seed(1)
    step(model, x, extension, *others, loss_func=loss_func)
    assert_close(extension.ntk(), expected)
    with_extension = [p.grad.clone() for p in model.parameters()]
    if others:
        assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)
    model.zero_grad()
    torch.manual_seed(1)
    with backpack():
        output = model(x)
        is_classification = isinstance(loss_func, nn.CrossEntropyLoss)
        target = torch.randint(3, (6,)) if is_classification else torch.rand_like(output)
        loss_func(output, target).backward()
    for gradient, p in zip(with_extension, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


def test_every_pass_starts_afresh_and_the_hooks_stay():
    model, extension = mlp(nn.Tanh)().double(), EmpiricalNTK()
    for n in (3, 5, 2):
        x = torch.randn(n, 5).double().requires_grad_()
        step(model, x, extension)
        assert_close(extension.ntk(), jacobian_contraction(model, x.detach()))
    assert all(module._backward_hooks for module in model)


def test_frozen_parameters_and_nothing_below_them():
    model, x = mlp(nn.Tanh)().double(), torch.randn(3, 5).double()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    extension = EmpiricalNTK(per_parameter=True)
    step(model, x, extension)
    assert_close(extension.ntk(), jacobian_contraction(model, x))
    assert [hasattr(p, "empirical_ntk") for p in model.parameters()] == [False, False, False, True, True, True]


class SkipNet(nn.Module):
    """A residual net that BackPACK's converter can follow."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.tanh, self.relu = nn.Tanh(), nn.ReLU()

    def forward(self, x):
        h = self.tanh(self.first(x))
        return self.head(h + self.relu(self.second(h)))


def test_residual_net_through_the_converter():
    model, x = SkipNet().double(), torch.randn(5, 5).double()
    expected = jacobian_contraction(model, x[:2], x[2:])
    converted, loss_func = extend(model, use_converter=True), extend(nn.MSELoss())
    extension = EmpiricalNTK(2)
    with backpack(extension):
        output = converted(x)
        loss_func(output, torch.zeros_like(output)).backward()
    assert_close(extension.ntk(), expected)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.weight * x


class ScaleExtension(ModuleExtension):
    def __init__(self):
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, s):
        return Factored("cnk,nk->cnk", (s, module.input0))

    def backpropagate(self, ext, module, g_inp, g_out, s):
        return s * module.weight


def test_module_extension_of_the_user():
    model, x = nn.Sequential(nn.Linear(5, 4), Scale(), nn.Linear(4, 2)).double(), torch.randn(3, 5).double()
    expected = jacobian_contraction(model, x)
    with pytest.raises(UnsupportedModelError, match="Scale: no rule is registered for Scale"):
        step(model, x, EmpiricalNTK())
    extension = EmpiricalNTK()
    extension.set_module_extension(Scale, ScaleExtension())
    step(model, x, extension)
    assert_close(extension.ntk(), expected)
    assert not hasattr(model[1].weight, "empirical_ntk")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tied_mlp, r"Linear.weight: it is used more than once"),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), "BatchNorm1d normalises by batch statistics"),
        (Residual, "Residual may compute between its modules|something behind it is not an extended module"),
    ],
)
def test_refused(build, message):
    extension = EmpiricalNTK()
    with pytest.raises(UnsupportedModelError, match=message):
        step(build(), torch.randn(3, 5), extension)
    with pytest.raises(RuntimeError, match="No kernel yet"):
        extension.ntk()


def test_a_forward_hook_of_the_user_is_refused():
    model = mlp(nn.Tanh)()
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="Tanh has forward hooks"):
        step(model, torch.randn(3, 5), EmpiricalNTK())


def test_a_head_that_is_not_extended_is_noticed():
    body, head, loss_func = extend(mlp(nn.Tanh)()), nn.Linear(3, 2), extend(nn.MSELoss())
    with backpack(EmpiricalNTK()), pytest.raises(UnsupportedModelError, match="nothing was passed back to its output"):
        loss_func(head(body(torch.randn(3, 5))), torch.zeros(3, 2)).backward()


def test_two_losses_in_a_pass():
    output = extend(mlp(nn.Tanh)())(torch.randn(3, 5))
    loss = extend(nn.MSELoss())(output, torch.zeros(3, 3)) + extend(nn.MSELoss())(output, torch.ones(3, 3))
    with backpack(EmpiricalNTK()), pytest.raises(RuntimeError, match="More than one extended loss"):
        loss.backward()


def test_arguments():
    with pytest.raises(ValueError, match="compute must be one of 'full'"):
        EmpiricalNTK(compute="all")
    with pytest.raises(ValueError, match="n1 must be between 1 and 2 for a batch of 3 samples, got 3"):
        step(mlp(nn.Tanh)(), torch.randn(3, 5), EmpiricalNTK(3))
    extension = EmpiricalNTK()
    with pytest.raises(RuntimeError, match="No kernel yet: run a backward pass"):
        extension.ntk()


# ---------------------------------------------------------------- the network as it ran


def assert_right(model, x, extension=None, **options):
    extension = EmpiricalNTK() if extension is None else extension
    expected, _ = run(model, x, extension, **options)
    assert_close(extension.ntk(), expected)


def assert_refused(message, model, x, extension=None, **options):
    extension = EmpiricalNTK() if extension is None else extension
    with pytest.raises(UnsupportedModelError, match=message):
        run(model, x, extension, oracle=False, **options)
    with pytest.raises(RuntimeError, match="No kernel yet"):
        extension.ntk()


NOISY = {
    "dropout": lambda: (between(nn.Dropout(), nn.Tanh()), samples(4, 5)),
    "dropout_behind_relu": lambda: (between(nn.ReLU(), nn.Dropout()), samples(4, 5)),
    "dropout_before_relu": lambda: (between(nn.Dropout(0.2), nn.ReLU()), samples(4, 5)),
    "dropout_of_zeros": lambda: (zeros_then(nn.Dropout(), nn.Tanh()), samples(4, 5)),
    "dropout_of_all": lambda: (between(nn.Tanh(), nn.Dropout(1.0)), samples(4, 5)),
    "dropout_of_none": lambda: (between(nn.Tanh(), nn.Dropout(0.0)), samples(4, 5)),
    "dropout_twice": lambda: (between(nn.Dropout(), nn.Dropout()), samples(4, 5)),
    "dropout_of_the_input": lambda: (nn.Sequential(nn.Dropout(), nn.Linear(5, 3)).double(), samples(4, 5)),
    "dropout_in_place": lambda: (nn.Sequential(nn.Dropout(0.0, inplace=True), nn.Linear(5, 3)).double(), samples(4, 5)),
    "dropout1d": lambda: (image_net(1, nn.ReLU(), nn.Dropout1d()), samples(4, 1, 3)),
    "dropout2d": lambda: (image_net(2, nn.ReLU(), nn.Dropout2d()), samples(4, 1, 3, 3)),
    "dropout3d": lambda: (image_net(3, nn.Tanh(), nn.Dropout3d()), samples(4, 1, 3, 3, 3)),
    "alpha_dropout": lambda: (between(nn.AlphaDropout()), samples(4, 5)),
    "alpha_dropout_of_zeros": lambda: (zeros_then(nn.AlphaDropout(0.3), nn.Tanh()), samples(4, 5)),
    "alpha_dropout_behind_selu": lambda: (between(nn.SELU(), nn.AlphaDropout()), 100 * samples(4, 5)),
    "feature_alpha_dropout": lambda: (image_net(2, nn.SELU(), nn.FeatureAlphaDropout()), samples(4, 1, 3, 3)),
    "rrelu": lambda: (between(nn.RReLU()), samples(4, 5)),
    "rrelu_of_zeros": lambda: (zeros_then(nn.RReLU()), samples(4, 5)),
    "rrelu_and_dropout": lambda: (between(nn.RReLU(), nn.Dropout()), samples(4, 5)),
}


@pytest.mark.parametrize("name", NOISY)
def test_active_noise_is_followed(name):
    model, x = NOISY[name]()
    assert_right(model, x)


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout", "rrelu"])
def test_active_noise_where_the_gradient_is_zero_shows_in_what_it_made_of_its_input(name):
    model, x = NOISY[name]()
    assert_right(model, x, target=itself)


def test_zeros_with_zero_gradients_do_not_tell_whether_they_were_dropped():
    model, x = between(nn.Dropout(), nn.Tanh()), samples(4, 5)
    for p in (model[0].bias, model[3].bias):
        torch.nn.init.zeros_(p)
    x[2] = 0  # and so are its output and its gradient
    message = r"Dropout: what it drew for entries that are zero, .*, cannot be told .*1 of 4 samples"
    assert_refused(message, model, x)
    assert_right(model.eval(), x)
    behind_relu = between(nn.ReLU(), nn.Dropout())
    torch.nn.init.zeros_(behind_relu[3].bias)
    x[2] = 0
    assert_right(behind_relu, x, target=lambda output: torch.where(x.any(1, keepdim=True), 0, output.detach()))


def test_active_noise_in_float32_and_beside_batch_grad():
    model, x, extension = between(nn.ReLU(), nn.Dropout()).float(), torch.randn(6, 5), EmpiricalNTK(per_parameter=True)
    expected, _ = run(model, x, extension, BatchGrad())
    assert_close(extension.ntk(), expected)
    assert_close(sum(p.empirical_ntk for p in model.parameters()), expected)
    assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)


@pytest.mark.parametrize("n1", [None, 2])
def test_with_the_hook_beside_it(n1):
    model, x, extension, hook = between(nn.ReLU(), nn.Dropout()), samples(5, 5), EmpiricalNTK(n1), AccumulateGramHook()
    expected, loss_func = run(model, x, extension, ViViTGGNExact(), hook=hook)
    block = expected if n1 is None else expected[:n1, n1:]
    assert_close(extension.ntk(), block)
    assert_close(hook.ntk(n1, loss=loss_func), block)


class Noise(nn.Module):
    """Multiplies the first samples by random numbers."""

    def __init__(self, count, draw=torch.rand_like):
        super().__init__()
        self.count, self.draw = count, draw

    def forward(self, x):
        drawn = torch.ones_like(x)
        drawn[: self.count] = self.draw(x[: self.count])
        return x * drawn


@pytest.mark.parametrize(
    "draw",
    [torch.rand_like, lambda x: x.new_tensor(np.random.rand(*x.shape)), lambda x: random.random() * torch.ones_like(x)],
    ids=["torch", "numpy", "python"],
)
@pytest.mark.parametrize("target", [zeros, itself], ids=["", "without_gradient"])
@pytest.mark.parametrize("count", [3, 200])
def test_noise_of_a_module_of_the_user_is_noticed(count, target, draw):
    message = rf"Noise: it returns something else when it is evaluated again .*{count} of 200 samples"
    assert_refused(message, between(nn.Tanh(), Noise(count, draw)), samples(200, 5), target=target)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, self.training)


class AddedNoise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_noise_by_what_it_does_to_the_jacobian():
    model, x = between(FunctionalDropout(), nn.Tanh()), samples(6, 5)
    assert_refused("FunctionalDropout: it returns something else", model, x)
    assert_right(model.eval(), x)
    assert_right(between(AddedNoise(), nn.Tanh()), x)


@pytest.mark.parametrize("name", ["fractional_max_pool", "lstm"])
def test_noise_of_other_layers_of_torch(name):
    if name == "lstm":
        frozen = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True).requires_grad_(False)
        model, x = nn.Sequential(nn.Linear(5, 4), First(frozen), nn.Flatten(), nn.Linear(6, 2)), samples(4, 2, 5)
        modules = [model[0], frozen, *model[2:]]
    else:
        pool = nn.FractionalMaxPool2d(2, output_size=3)
        model, x = nn.Sequential(nn.Conv2d(1, 2, 2), pool, nn.Flatten(), nn.Linear(18, 2)), samples(4, 1, 10, 10)
        modules = [model]
    assert_refused("it returns something else when it is evaluated again", model.double(), x, modules=modules)


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


def test_a_layer_with_several_results():
    frozen = nn.LSTM(4, 3, batch_first=True).requires_grad_(False)
    model, x = nn.Sequential(nn.Linear(5, 4), First(frozen), nn.Flatten(), nn.Linear(6, 2)).double(), samples(4, 2, 5)
    modules = [model[0], frozen, *model[2:]]
    assert_right(model, x, modules=modules)


# ---------------------------------------------------------------- what lies between extended modules


@pytest.mark.parametrize("target", [zeros, itself], ids=["", "without_gradient"])
@pytest.mark.parametrize("name", VIEWS)
def test_what_is_no_extended_module_is_noticed(name, target):
    model = VIEWS[name]()
    x = samples(4, 1, 4, 4) if isinstance(model.first, nn.Conv2d) else samples(4, 5)
    message = r"(Linear|Conv2d): .*something b.* is not an extended module \(\w+"
    assert_refused(message, model, x, modules=model.layers, target=target)


class Rarely(nn.Module):
    """Passes three samples on."""

    def forward(self, h):
        return h * (h[:, :1] >= h[:, 0].sort().values[-3])


@pytest.mark.parametrize("branch", [nn.Tanh(), Rarely(), nn.Identity()], ids=lambda branch: type(branch).__name__)
def test_branches(branch):
    model, x = Branches(nn.Linear(3, 3), branch), samples(30, 5)
    assert_right(model, x, modules=list(model.children()))


@pytest.mark.parametrize("branch", [torch.sin, Rarely(), lambda h: h.flip(1)], ids=["sin", "three_samples", "flip"])
def test_a_branch_that_is_no_extended_module(branch):
    model, x = Branches(nn.Linear(3, 3), nn.Tanh()), samples(200, 5)
    model._modules["second"] = NotExtended(branch)
    message = "Linear: something between its output and the modules behind it is not an extended module"
    assert_refused(message, model, x, modules=[model.stem, model.first, model.sum])


def test_the_same_tensor_twice():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.sum, self.tanh = nn.Linear(5, 3), SumModule(), nn.Tanh()

        def forward(self, x):
            h = self.linear(x)
            return self.tanh(self.sum(h, h))

    model = Doubled().double()
    assert_right(model, samples(4, 5), modules=list(model.children()))


@pytest.mark.parametrize("target", [lambda output: torch.randint(4, (8, 4)), lambda output: torch.full((8, 4), -100)])
def test_logits_transposed_for_the_loss(target):
    model = Between(lambda h, f: f(h).transpose(1, 2), nn.Linear(5, 6), nn.Linear(6, 4))
    message = r"Linear: nothing was passed back .* is not an extended module \((Transpose|Permute)\)"
    options = {"modules": model.layers, "loss_func": nn.CrossEntropyLoss(reduction="sum"), "target": target}
    assert_refused(message, model, samples(8, 4, 5), **options)


def test_a_weight_that_a_function_uses_again():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.tanh, self.sum = nn.Linear(5, 3), nn.Tanh(), SumModule()

        def forward(self, x):
            return self.sum(self.tanh(self.linear(x)), F.linear(x, self.linear.weight))

    model = Tied().double()
    assert_refused("Linear.weight: it is used more than once", model, samples(4, 5), modules=list(model.children()))


def test_full_backward_hooks_of_the_user_are_in_no_way():
    model, x, seen = between(nn.Tanh()), samples(4, 5), []
    model.register_full_backward_hook(lambda module, g_inp, g_out: seen.append(g_out))
    model[1].register_full_backward_hook(lambda module, g_inp, g_out: seen.append(g_out))
    assert_right(model, x)
    assert seen


class MixedSamples(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("layer", [MixedSamples(), nn.Softmax(0)], ids=lambda layer: type(layer).__name__)
def test_samples_that_influence_one_another_though_their_gradients_are_the_same(layer):
    options = {"loss_func": nn.L1Loss(), "target": lambda output: torch.full_like(output, 100)}
    message = f"{type(layer).__name__}: samples influence one another in it"
    assert_refused(message, between(nn.Tanh(), layer), samples(8, 5), **options)
    assert_right(between(nn.Tanh(), nn.Softmax(1)), samples(8, 5), **options)


@pytest.mark.parametrize("layer", [nn.Flatten(0, 1), nn.Unflatten(0, (2, 2))], ids=["flatten", "unflatten"])
def test_samples_must_stay_in_front(layer):
    model, x = between(layer), samples(4, 2, 5)
    assert_refused(r"the samples must stay in front", model, x)


def test_samples_behind_another_axis():
    class LastOfSequence(nn.Module):
        def forward(self, x):
            return x[-1]

    for positions in (3, 4):
        model, x = between(nn.Tanh(), LastOfSequence()), samples(positions, 4, 5)
        message = "the samples must stay in front|does not fit the gradient|influence one another"
        assert_refused(message, model, x)


# ---------------------------------------------------------------- the gradients of the pass


def test_other_terms_of_the_loss():
    model, x = between(nn.Tanh()), samples(4, 5)
    assert_right(model, x, terms=lambda model, output: output.square().sum() + output.detach().sum())
    assert_right(model, x, terms=lambda model, output: sum(p.square().sum() for p in model.parameters()))
    kept = []
    keeping = Between(lambda h, f: kept.append(h) or f(h))
    message = "Linear: what Linear passed back to its output does not fit the gradient there .*another term of the loss"
    assert_refused(message, keeping, x, modules=keeping.layers, terms=lambda model, output: kept[-1].square().sum())


def test_a_hook_that_changes_gradients():
    model, x = Between(lambda h, f: f(h) if h.register_hook(lambda g: 2 * g) else None), samples(4, 5)
    message = "Linear: what Linear passed back to its output does not fit the gradient"
    assert_refused(message, model, x, modules=model.layers)


def test_a_scaled_loss_and_gradients_of_any_size():
    class Scaled(nn.MSELoss):
        def forward(self, output, target):
            weights = torch.logspace(-30, 10, len(output)).unsqueeze(1)
            return (weights * (output - target)).square().sum()

    model, x = between(nn.ReLU(), nn.Dropout()).float(), torch.randn(30, 5)
    assert_right(model, x, loss_func=Scaled())
    assert_refused("Noise: it returns", between(Noise(30)).float(), x, loss_func=Scaled())


def test_a_sample_that_is_not_finite_hides_no_other():
    x, extension, model = samples(40, 5), EmpiricalNTK(), between(nn.Tanh(), nn.LayerNorm(6))
    x[7], x[8, 1] = torch.nan, torch.inf
    run(model, x, extension, oracle=False)
    finite = [n for n in range(40) if n not in (7, 8)]
    assert_close(extension.ntk()[finite][:, finite], jacobian_contraction(model, x[finite]))
    assert extension.ntk()[7].isnan().all()
    assert_refused(r"Noise: it returns .* 3 of 40 samples", between(nn.Tanh(), Noise(3)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.GroupNorm(3, 6)],
        lambda: [nn.LayerNorm(6), nn.Softmax(1)],
        lambda: [nn.Linear(6, 2), nn.LayerNorm(2), nn.Linear(2, 6)],
        lambda: [nn.BatchNorm1d(6).eval(), nn.GELU()],
        lambda: [nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Flatten()],
    ],
    ids=["groups_of_two", "softmax", "two_features", "batch_norm", "instance_norm"],
)
def test_rounding_of_badly_conditioned_layers_is_no_error(layers, dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        model, x, extension = between(*layers()).to(dtype), samples(20, 5).to(dtype), EmpiricalNTK()
        run(model, x, extension, oracle=False)
        expected = kernel_as_it_ran(model.double()(x.double()), list(model.parameters()))
        error = (extension.ntk() - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-11)


def test_where_the_gradient_of_the_loss_is_zero():
    for model in (mlp(nn.Tanh)().double(), between(nn.LayerNorm(6), nn.GELU())):
        assert_right(model, samples(4, 5), target=itself)
    half = lambda output: torch.where(torch.arange(4).unsqueeze(1) < 2, output.detach(), 0)  # noqa: E731
    assert_right(between(nn.LayerNorm(6), nn.GELU()), samples(4, 5), target=half)


def test_one_sample():
    assert_right(between(nn.ReLU(), nn.Dropout(), nn.LayerNorm(6)), samples(1, 5))


def test_lower_precision_is_refused():
    model, x = between(nn.Tanh()), samples(4, 5)
    assert_refused(
        r"the model: torch.bfloat16 takes part in it. Run the pass in float32", model.bfloat16(), x.bfloat16()
    )

    class Autocast(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(x, torch.eye(6)).float()

    assert_refused("torch.bfloat16 takes part in it", between(Autocast()).float(), x.float())


def test_products_that_torch_may_round():
    model, x = between(nn.Tanh()).float(), torch.randn(4, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        extension = EmpiricalNTK()
        run(model, x, extension)
    finally:
        torch.set_float32_matmul_precision(before)
    assert extension.ntk().shape == (4, 4, 3, 3)


# ---------------------------------------------------------------- a training step as without it


class Counting(nn.Module):
    """Keeps count of its calls, in all ways that modules have."""

    def __init__(self):
        super().__init__()
        self.calls, self.called, self.counts, self.total = 0, [], {"calls": [0]}, torch.zeros(1)
        self.generator = torch.Generator()
        self.register_buffer("buffer", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.called.append(x.shape)
        self.counts["calls"][0] += 1
        self.total += 1
        self.buffer += 1
        return x.sin() + torch.rand(1) + torch.rand(1, generator=self.generator) + random.random() + np.random.rand()


class Scaled(nn.Module):
    """A layer of the user with a parameter, whose rule evaluates it."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.rand(6)), 0

    def forward(self, x):
        self.calls += 1
        return self.weight * x + torch.rand(1)


def scaled(module, x, s):
    with torch.no_grad():
        assert module(x).shape == x.shape
    return {"weight": Factored("cnk,nk->cnk", (s, x))}


TRAINED = {
    "instance_norm": lambda: nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.RReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "instance_norm_without_parameters": lambda: nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(16, 3)
    ),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)),
    "modules_of_the_user": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(5, 6), Counting(), Scaled(), nn.LayerNorm(6), nn.Linear(6, 3)
    ),
}  # fmt: skip


def state_of(model):
    """What a training step may have changed: numbers, in all places."""
    modules = [
        {key: value for key, value in vars(module).items() if key in ("calls", "called", "counts", "training")}
        for module in model.modules()
    ]
    hooks = [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    names = [sorted(vars(module)) for module in model.modules()]
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [m.total for m in model.modules() if isinstance(m, Counting)]
    drawn = [torch.rand(1), torch.tensor([random.random(), np.random.rand()])]
    drawn += [torch.rand(1, generator=m.generator) for m in model.modules() if isinstance(m, Counting)]
    return [modules, hooks, names], [t.clone() for t in (*tensors, *drawn)]


def trained(name, *extensions):
    """The state after two steps."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, loss_func = extend(TRAINED[name]()), extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        with backpack(*extensions):
            loss_func(model(torch.randn(8, 1, 5)), torch.randint(3, (8,))).backward()
        optimizer.step()
    return state_of(model)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_bit_for_bit(name, per_parameter):
    register_rule(Scaled)(scaled)
    extension = EmpiricalNTK(3, per_parameter=per_parameter)
    (expected, tensors), (found, others) = trained(name), trained(name, extension)
    assert extension.ntk().shape == (3, 5, 3, 3)
    assert found == expected
    assert all(torch.equal(t, other) for t, other in zip(tensors, others, strict=True))


def test_modules_of_the_user_are_called_once():
    register_rule(Scaled)(scaled)
    model = TRAINED["modules_of_the_user"]().double()
    run(model, samples(4, 1, 5), EmpiricalNTK(), oracle=False)
    assert model[2].calls == len(model[2].called) == model[2].counts["calls"][0] == model[2].buffer.item() == 1
    assert model[3].calls == 1


# ---------------------------------------------------------------- one pass after the other


def test_several_passes_over_a_graph():
    model, x, loss_func, extension = extend(between(nn.Tanh())), samples(4, 5), extend(nn.MSELoss()), EmpiricalNTK()
    expected = jacobian_contraction(model, x)
    with backpack(extension, retain_graph=True):
        loss = loss_func(model(x), torch.zeros(4, 3).double())
        for _ in range(2):
            loss.backward(retain_graph=True)
            assert_close(extension.ntk(), expected)
    loss = loss_func(model(x), torch.zeros(4, 3).double())
    with backpack(extension):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"use `with backpack\(..., retain_graph=True\):`"):
            loss.backward()


def test_a_pass_that_fails_and_one_that_does_not():
    extension, good, x = EmpiricalNTK(per_parameter=True), between(nn.Tanh()), samples(4, 5)
    for bad in (between(nn.Tanh(), Noise(4)), between(First(nn.Tanh()))):
        assert_refused(None, bad, x, extension)
        assert not any(hasattr(p, "empirical_ntk") for p in bad.parameters())
        assert_right(good, x, extension)
    assert not extension.saved_quantities._saved_quantities


def test_an_exception_of_another_extension():
    class Fails(ModuleExtension):
        def __call__(self, *args):
            raise ArithmeticError

    model, x, extension, other = between(nn.Tanh()), samples(4, 5), EmpiricalNTK(), BatchGrad()
    other.set_module_extension(nn.Tanh, Fails(), overwrite=True)
    with pytest.raises(ArithmeticError):
        run(model, x, extension, other)
    with pytest.raises(RuntimeError, match="No kernel yet"):
        extension.ntk()
    assert_right(model, x, extension)


def test_a_model_that_was_called_again_before_the_pass():
    model, x, loss_func = extend(between(nn.Tanh())), samples(4, 5), extend(nn.MSELoss())
    loss = loss_func(model(x), torch.zeros(4, 3).double())
    model(samples(4, 5))
    message = "Linear: this Linear is called more than once, and BackPACK keeps the inputs and output of one call"
    with backpack(EmpiricalNTK()), pytest.raises(UnsupportedModelError, match=message):
        loss.backward()
    loss = loss_func(model(x), torch.zeros(4, 3).double())
    loss_func(model(samples(4, 5)), torch.zeros(4, 3).double())
    with backpack(EmpiricalNTK()), pytest.raises(RuntimeError, match="BackPACK has not kept the inputs of this call"):
        loss.backward()


@pytest.mark.parametrize("retain_graph", [False, True])
def test_one_module_used_twice(retain_graph):
    tanh, loss_func, extension = nn.Tanh(), extend(nn.MSELoss()), EmpiricalNTK()
    model = extend(nn.Sequential(nn.Linear(4, 4), tanh, nn.Linear(4, 4), tanh, nn.Linear(4, 2)))
    error = pytest.raises(
        UnsupportedModelError, match=r"Tanh: this Tanh is called more than once.* Use a Tanh for each"
    )
    with backpack(extension, retain_graph=retain_graph), error:
        loss_func(model(torch.randn(6, 4)), torch.zeros(6, 2)).backward()
    with pytest.raises(RuntimeError, match="No kernel yet"):
        extension.ntk()


def test_arguments_of_the_loss_in_the_other_order():
    model, loss_func = extend(between(nn.Tanh())), extend(nn.MSELoss())
    with backpack(EmpiricalNTK()), pytest.raises(RuntimeError, match=r"Call it as loss\(output, target\)"):
        loss_func(torch.zeros(4, 3).double(), model(samples(4, 5))).backward()


def test_inputs_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(self.first(input=x).tanh())

    model = ByKeyword().double()
    assert_refused("is not an extended module|by keyword", model, samples(4, 5), modules=[model.first, model.second])
    first = First(model.first)
    first.forward = lambda x: model.first(input=x)
    assert_refused("Linear: its inputs are given by keyword", first, samples(4, 5), modules=[model.first])


class TwoResults(nn.Module):
    def forward(self, x):
        return x.sin(), x.cos()


class Leaks(nn.Module):
    """Keeps what it computes inside, for others."""

    def forward(self, x):
        self.inside = x.sin()
        return self.inside + 1, x


class Reads(nn.Module):
    def __init__(self, module, read):
        super().__init__()
        self.linear, self.module, self.tanh, self.sum = nn.Linear(5, 3), module, nn.Tanh(), SumModule()
        self.read = read
        self.double()

    def forward(self, x):
        results = self.module(self.linear(x))
        return self.sum(self.tanh(results[0]), self.read(self.module, results))


@pytest.mark.parametrize("target", [zeros, itself], ids=["", "without_gradient"])
@pytest.mark.parametrize("name", ["result", "inside", "state"])
def test_what_leaves_a_module_in_other_ways_than_its_first_result(name, target):
    read = {
        "result": lambda m, r: r[1],
        "inside": lambda m, r: m.inside * 2,
        "state": lambda m, r: r[1][0].transpose(0, 1),
    }[name]
    module = {
        "result": TwoResults,
        "inside": Leaks,
        "state": lambda: nn.LSTM(3, 3, batch_first=True).requires_grad_(False),
    }[name]()
    model, message = Reads(module, read), r"(TwoResults|Leaks|LSTM): what it computes is read elsewhere \(\w+"
    x = samples(4, 5) if name != "state" else samples(4, 1, 5)
    assert_refused(message, model, x, modules=list(model.children()), target=target)


# ---------------------------------------------------------------- module extensions of the user


class Average(nn.Module):
    def forward(self, x):
        return x.mean(1)


class AverageExtension(ModuleExtension):
    def backpropagate(self, ext, module, g_inp, g_out, s):
        positions = module.input0.shape[1]
        return (s / positions).unsqueeze(2).expand(-1, -1, positions, *[-1] * (s.ndim - 2))


class SumExtension(ModuleExtension):
    def backpropagate(self, ext, module, g_inp, g_out, s):
        return s


class WrongExtension(ModuleExtension):
    def backpropagate(self, ext, module, g_inp, g_out, s):
        s = s.clone()
        s[:, :3] *= 1.01
        return s


def with_module_extension(layer, module_extension):
    extension = EmpiricalNTK()
    extension.set_module_extension(layer, module_extension)
    return extension


def test_what_a_module_extension_passes_back_may_be_shared():
    average = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Linear(5, 6), nn.ReLU(), Average(), nn.Linear(6, 3)).double()
    assert_right(average, samples(4, 5), with_module_extension(Average, AverageExtension()))
    branches = Branches(nn.ReLU(), nn.Tanh())
    extension = with_module_extension(SumModule, SumExtension())
    assert_right(branches, samples(4, 5), extension, modules=list(branches.children()))


def test_a_module_extension_that_is_wrong_for_three_samples():
    model, extension = between(nn.Tanh(), nn.Identity()), with_module_extension(nn.Identity, WrongExtension())
    assert_refused(r"Tanh: what Identity passed back .* 3 of 200 samples", model, samples(200, 5), extension)


def test_n1_is_an_integer():
    for n1, kind in [(True, "bool"), (1.0, "float"), ("1", "str")]:
        with pytest.raises(TypeError, match=f"n1 must be an integer or None, got {kind}"):
            EmpiricalNTK(n1=n1)
    assert EmpiricalNTK(np.int64(2)).n1 == 2


def test_nothing_is_left_behind():
    model, x, extension = between(nn.Tanh(), nn.Dropout()), samples(4, 5), EmpiricalNTK()
    assert_right(model, x, extension)
    assert CTX.get_active_exts() == ()
    assert extension._check is None
    assert not extension.saved_quantities._saved_quantities
