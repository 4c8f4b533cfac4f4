"""The hook beside ViViT: in a user's own pipeline, and where BackPACK passes back something else than the Jacobian."""

import pytest
import torch
from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.secondorder.base import SecondOrderBackpropExtension
from cases import mlp, tied_mlp
from conftest import assert_close
from extended import VIEWS, Between, Branches, NotExtended, between, image_net, itself, run, samples, zeros_then
from torch import nn
from torch.nn import functional as F
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk import AccumulateGramHook, UnsupportedModelError
from ggn_ntk.reference import jacobian_contraction

# ---------------------------------------------------------------- in a user's own pipeline


@pytest.fixture
def model():
    return mlp(nn.Tanh)().double()


def backward(model, x, hook, *extensions, loss_func=None, targets=None):
    """An ordinary training step of a BackPACK user."""
    loss_func = extend(nn.MSELoss(reduction="sum") if loss_func is None else loss_func)
    with backpack(ViViTGGNExact(), *extensions, extension_hook=hook):
        output = extend(model)(x)
        loss_func(output, torch.randn_like(output) if targets is None else targets).backward()
    return loss_func


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_hook_beside_other_extensions(model, reduction):
    x, y = torch.randn(5, 5).double(), torch.randn(5, 3).double()
    with torch.enable_grad():
        loss_func = nn.MSELoss(reduction=reduction)
        rows = [torch.autograd.grad(loss_func(model(x), y), model.parameters())]
        per_sample = [
            torch.autograd.grad(((model(x[i]) - y[i]) ** 2).sum(), list(model.parameters())) for i in range(5)
        ]
    scale = 1 if reduction == "sum" else 1 / y.numel()
    expected = jacobian_contraction(model, x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p, s: torch.func.functional_call(model, p, (s,))), (None, 0))(
        {name: p.detach() for name, p in model.named_parameters()}, x
    )

    hook = AccumulateGramHook()
    loss_func = backward(model, x, hook, BatchGrad(), DiagGGNExact(), loss_func=loss_func, targets=y)

    assert hook.gram.shape == (3, 5, 3, 5)
    assert_close(hook.ntk(loss=loss_func), expected)
    assert_close(hook.ntk(2, loss=loss_func), expected[:2, 2:])
    assert torch.equal(hook.ntk(loss=loss_func), hook.ntk(loss=loss_func).permute(1, 0, 3, 2))
    for i, (name, p) in enumerate(model.named_parameters()):
        assert_close(p.grad, rows[0][i])
        assert_close(p.grad_batch, scale * torch.stack([sample[i] for sample in per_sample]))
        assert_close(p.diag_ggn_exact, 2 * scale * jacobian[name].square().sum((0, 1)))
        assert not hasattr(p, "vivit_ggn_exact")


def test_hook_is_reusable_and_starts_afresh(model):
    hook = AccumulateGramHook()
    for n in (4, 2):
        x = torch.randn(n, 5).double()
        loss_func = backward(model, x, hook)
        assert_close(hook.ntk(loss=loss_func), jacobian_contraction(model, x))


def test_hook_skips_frozen_parameters(model):
    model[0].weight.requires_grad_(False)
    model[4].requires_grad_(False)
    x, hook = torch.randn(3, 5).double(), AccumulateGramHook()
    loss_func = backward(model, x, hook)
    assert_close(hook.ntk(loss=loss_func), jacobian_contraction(model, x))


def test_hook_keeps_buffers_when_asked(model):
    hook = AccumulateGramHook(delete_buffers=False)
    backward(model, torch.randn(3, 5).double(), hook)
    grams = [p.vivit_ggn_exact["gram_mat"]() for p in model.parameters()]
    assert_close(hook.gram, sum(grams))


def test_hook_counts_the_whole_batch_when_vivit_subsamples(model):
    x, hook, loss_func = torch.randn(5, 5).double(), AccumulateGramHook(), extend(nn.MSELoss())
    with backpack(ViViTGGNExact(subsampling=[0, 3]), extension_hook=hook):
        loss_func(extend(model)(x), torch.zeros(5, 3).double()).backward()
    assert_close(hook.ntk(loss=loss_func), jacobian_contraction(model, x[[0, 3]]))


def test_hook_has_no_graph_when_the_pass_creates_one(model):
    hook, loss_func = AccumulateGramHook(), extend(nn.MSELoss(reduction="sum"))
    with backpack(ViViTGGNExact(), extension_hook=hook):
        loss = loss_func(extend(model)(torch.randn(2, 5).double()), torch.zeros(2, 3).double())
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    assert not hook.ntk(loss=loss_func).requires_grad


def test_hook_before_the_backward_pass():
    hook = AccumulateGramHook()
    assert hook.gram is None
    with pytest.raises(RuntimeError, match="No Gram matrix yet: run a backward pass"):
        hook.ntk(loss=nn.MSELoss())


def test_hook_refuses_cross_entropy(model):
    hook = AccumulateGramHook()
    targets = torch.tensor([0, 2])
    loss_func = backward(model, torch.randn(2, 5).double(), hook, loss_func=nn.CrossEntropyLoss(), targets=targets)
    with pytest.raises(ValueError, match=r"loss must be MSELoss .* weighted by the loss Hessian"):
        hook.ntk(loss=loss_func)
    with pytest.raises(ValueError, match=r"loss must be that of the backward pass, CrossEntropyLoss"):
        hook.ntk(loss=nn.MSELoss())


def test_hook_refuses_another_reduction_than_the_pass_had(model):
    hook = AccumulateGramHook()
    backward(model, torch.randn(2, 5).double(), hook)
    with pytest.raises(ValueError, match="MSELoss with reduction 'sum', got"):
        hook.ntk(loss=nn.MSELoss(reduction="mean"))
    with pytest.raises(ValueError, match="reduction 'sum' or 'mean'"):
        hook.ntk(loss=nn.MSELoss(reduction="none"))


@pytest.mark.parametrize("n1", [0, 3, -1])
def test_hook_checks_n1(model, n1):
    hook = AccumulateGramHook()
    loss_func = backward(model, torch.randn(3, 5).double(), hook)
    with pytest.raises(ValueError, match=f"n1 must be between 1 and 2 for a batch of 3 samples, got {n1}"):
        hook.ntk(n1, loss=loss_func)
    with pytest.raises(TypeError, match="n1 must be an integer or None, got float"):
        hook.ntk(1.0, loss=loss_func)


def test_hook_refuses_two_losses_in_a_pass(model):
    hook, first, second = AccumulateGramHook(), extend(nn.MSELoss()), extend(nn.MSELoss())
    output = extend(model)(torch.randn(3, 5).double())
    loss = first(output, torch.zeros_like(output)) + second(output, torch.ones_like(output))
    error = pytest.raises(RuntimeError, match="More than one extended loss in a backward pass")
    with backpack(ViViTGGNExact(), extension_hook=hook), error:
        loss.backward()
    assert hook.gram is None


def test_hook_refuses_batch_statistics():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    hook = AccumulateGramHook()
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d normalises by batch statistics"):
        backward(model, torch.randn(3, 5), hook)
    assert hook.gram is None


def test_hook_refuses_a_second_use_of_a_parameter():
    with pytest.raises(UnsupportedModelError, match=r"Linear.weight: it is used more than once"):
        backward(tied_mlp(), torch.randn(3, 5), AccumulateGramHook())


def test_hook_refuses_options_that_backpack_ignores():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(UnsupportedModelError, match="Conv2d has a padding_mode other than 'zeros'"):
        backward(model, torch.randn(3, 2, 4, 4), AccumulateGramHook())


def test_hook_without_vivit(model):
    loss_func = extend(nn.MSELoss())
    with (
        backpack(BatchGrad(), extension_hook=AccumulateGramHook()),
        pytest.raises(RuntimeError, match=r"ViViT is not active. Activate it beside this hook"),
    ):
        loss_func(extend(model)(torch.randn(3, 5).double()), torch.zeros(3, 3).double()).backward()


def test_hook_publishes_no_partial_sum():
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    hook = AccumulateGramHook()
    with pytest.raises(NotImplementedError):
        backward(model, torch.randn(3, 5), hook)
    assert hook.gram is None
    with pytest.raises(RuntimeError, match="No Gram matrix yet"):
        hook.ntk(loss=nn.MSELoss(reduction="sum"))


def test_hook_with_one_extension_over_many_passes():
    body, head = nn.Linear(5, 4).double(), extend(nn.Sequential(nn.Linear(4, 3)).double())
    extension, hook, loss_func = ViViTGGNExact(), AccumulateGramHook(), extend(nn.MSELoss(reduction="sum"))
    for _ in range(20):
        features = body(torch.randn(3, 5).double())  # require a gradient, so BackPACK saves a quantity for them
        with backpack(extension, extension_hook=hook):
            loss_func(head(features), torch.zeros(3, 3).double()).backward()
        assert_close(hook.ntk(loss=loss_func), jacobian_contraction(head, features.detach()))


def test_hook_refuses_an_extension_left_over_from_a_failed_pass():
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    extension, loss_func, hook = ViViTGGNExact(), extend(nn.MSELoss()), AccumulateGramHook()
    with backpack(extension, extension_hook=hook), pytest.raises(NotImplementedError):
        loss_func(extend(model)(torch.randn(3, 5)), torch.zeros(3, 3)).backward()
    extension.saved_quantities._saved_quantities[-1] = torch.zeros(1)  # what a failed pass may leave
    with (
        backpack(extension, extension_hook=hook),
        pytest.raises(RuntimeError, match="holds quantities of another pass"),
    ):
        loss_func(extend(nn.Sequential(nn.Linear(5, 3)))(torch.randn(3, 5)), torch.zeros(3, 3)).backward()


def test_hook_does_not_take_buffers_of_an_earlier_pass_for_its_own(model):
    x, hook = torch.randn(3, 5).double(), AccumulateGramHook(delete_buffers=False)
    loss_func = backward(model, x, hook)
    with backpack(BatchGrad(), extension_hook=hook), pytest.raises(RuntimeError, match="ViViT is not active"):
        loss_func(model(x), torch.zeros(3, 3).double()).backward()
    assert hook.gram is None


def test_hook_and_a_parameter_without_a_gram_matrix(model):
    model[0].register_parameter("extra", nn.Parameter(torch.ones(1).double()))
    with pytest.raises(RuntimeError, match=r"ViViT has no Gram matrix for Linear.extra"):
        backward(model, torch.randn(3, 5).double(), AccumulateGramHook())


# ---------------------------------------------------------------- the network as it ran


def assert_right(model, x, **options):
    hook = AccumulateGramHook()
    expected, loss_func = run(model, x, ViViTGGNExact(), hook=hook, **options)
    assert_close(hook.ntk(loss=loss_func), expected)


def assert_refused(message, model, x, **options):
    hook = AccumulateGramHook()
    with pytest.raises(UnsupportedModelError, match=message):
        run(model, x, ViViTGGNExact(), hook=hook, oracle=False, **options)
    assert hook.gram is None
    assert CTX.get_active_exts() == ()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "layers", [(nn.Dropout,), (nn.ReLU, nn.Dropout), (nn.Dropout, nn.ReLU), (nn.Tanh, nn.Dropout, nn.Identity)]
)
def test_active_dropout(layers, reduction):
    model = between(*(layer() for layer in layers))
    assert_right(model, samples(6, 5), loss_func=nn.MSELoss(reduction=reduction))


def test_active_dropout_in_float32_behind_convolutions():
    model, x = image_net(2, nn.ReLU(), nn.Dropout(0.2)).float(), torch.randn(6, 1, 3, 3)
    assert_right(model, x)


def test_zeros_that_dropout_keeps_are_dropped_by_backpack():
    message = r"Linear: what Dropout passed back to its output does not fit the gradient there"
    assert_refused(message, zeros_then(nn.Dropout(), nn.Tanh()), samples(6, 5))
    assert_right(zeros_then(nn.Dropout(), nn.Tanh()).eval(), samples(6, 5))
    assert_right(zeros_then(nn.ReLU(), nn.Dropout()), samples(6, 5))


def test_zeros_with_zero_gradients_do_not_tell_whether_they_were_dropped():
    model, x = between(nn.Dropout(), nn.Tanh()), samples(4, 5)
    for p in (model[0].bias, model[3].bias):
        torch.nn.init.zeros_(p)
    x[2] = 0  # and so are its output and its gradient
    assert_refused(r"Dropout: what it drew .* cannot be told .*1 of 4 samples", model, x)


@pytest.mark.parametrize("target", [torch.zeros_like, itself], ids=["", "without_gradient"])
@pytest.mark.parametrize("name", VIEWS)
def test_what_is_no_extended_module_is_noticed(name, target):
    model = VIEWS[name]()
    x = samples(4, 1, 4, 4) if isinstance(model.first, nn.Conv2d) else samples(4, 5)
    message = r"(Linear|Conv2d): .*something b.* is not an extended module \(\w+"
    options = {"modules": model.layers, "target": target}
    if name == "reshape":  # an output with positions, to which BackPACK knows no MSELoss
        model.second, function = nn.Sequential(model.second, nn.Flatten()).double(), model.function
        options["modules"], model.function = [model.first, model.second], function
    assert_refused(message, model, x, **options)


@pytest.mark.parametrize("loss_func", [nn.MSELoss(), nn.CrossEntropyLoss()], ids=str)
@pytest.mark.parametrize("branch", [torch.sin, lambda h: h * (h[:, :1] >= h[:, 0].sort().values[-3])])
def test_a_branch_that_is_no_extended_module(branch, loss_func):
    model, x = Branches(nn.Linear(3, 3), nn.Tanh()), samples(200, 5)
    model._modules["second"] = NotExtended(branch)
    message = "Linear: something between its output and the modules behind it is not an extended module"
    target = (lambda output: output.argmax(1)) if isinstance(loss_func, nn.CrossEntropyLoss) else torch.zeros_like
    options = {"modules": [model.stem, model.first, model.sum], "loss_func": loss_func, "target": target}
    assert_refused(message, model, x, **options)


def test_branches_of_modules():
    model = Branches(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Tanh())
    assert_right(model, samples(6, 5), modules=list(model.children()))


def test_a_weight_that_a_function_uses_again():
    model = Branches(nn.Linear(3, 3), nn.Tanh())
    model.forward = lambda x: model.sum(model.second(model.stem(x)), F.linear(x, model.stem.weight))
    message = "Linear.weight: it is used more than once"
    assert_refused(message, model, samples(6, 5), modules=[model.stem, model.second, model.sum])


def test_a_derivative_that_backpack_gets_wrong():
    class Wrong(ViViTGGNExact):
        """ViViT, off by a percent at three samples."""

        def __call__(self, module, g_inp, g_out):
            super().__call__(module, g_inp, g_out)
            if isinstance(module, nn.Tanh):
                key = module.input0.data_ptr()
                s = self.saved_quantities._saved_quantities[key].clone()
                s[:, :3] *= 1.01
                self.saved_quantities._saved_quantities[key] = s

    hook, model = AccumulateGramHook(), between(nn.Tanh(), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"Linear: what Tanh passed back .* 3 of 200 samples"):
        run(model, samples(200, 5), Wrong(), hook=hook, oracle=False)
    assert hook.gram is None


def test_other_terms_of_the_loss_and_hooks():
    model, x = between(nn.Tanh()), samples(4, 5)
    assert_right(model, x, terms=lambda model, output: output.square().sum())
    kept = []
    keeping = Between(lambda h, f: kept.append(h) or f(h))
    message = "Linear: what Linear passed back to its output does not fit the gradient there .*another term of the loss"
    assert_refused(message, keeping, x, modules=keeping.layers, terms=lambda model, output: kept[-1].square().sum())
    doubled = Between(lambda h, f: f(h) if h.register_hook(lambda g: 2 * g) else None)
    assert_refused("Linear: what Linear passed back", doubled, x, modules=doubled.layers)


def test_a_scaled_loss_and_a_loss_at_its_minimum():
    model, x = between(nn.Tanh()), samples(4, 5)
    loss_func, hook = extend(nn.MSELoss()), AccumulateGramHook()
    for scale in (1e-3, 0.0, 3.0):
        warning = pytest.warns(UserWarning, match="output of MSELoss.* seems to have been modified")
        with backpack(ViViTGGNExact(), extension_hook=hook), warning:
            (scale * loss_func(extend(model)(x), torch.ones(4, 3).double())).backward()
        assert_close(hook.ntk(loss=loss_func), jacobian_contraction(model, x))
    assert_right(model, x, target=itself)


def test_a_sample_that_is_not_finite_hides_no_other():
    x, hook, model = samples(20, 5), AccumulateGramHook(), between(nn.Tanh())
    x[7] = torch.nan
    _, loss_func = run(model, x, ViViTGGNExact(), hook=hook, oracle=False)
    finite = [n for n in range(20) if n != 7]
    assert_close(hook.ntk(loss=loss_func)[finite][:, finite], jacobian_contraction(model, x[finite]))
    assert_refused("Linear: what Dropout passed back .* of 20 samples", zeros_then(nn.Dropout(), nn.Tanh()), x)


def test_a_part_of_the_samples_behind_dropout():
    model, x, hook, loss_func = between(nn.ReLU(), nn.Dropout()), samples(5, 5), AccumulateGramHook(), nn.MSELoss()
    expected, _ = run(model, x, ViViTGGNExact(subsampling=[0, 3]), hook=hook, loss_func=loss_func)
    assert_close(hook.ntk(loss=loss_func), expected[[0, 3]][:, [0, 3]])


@pytest.mark.parametrize("retain_graph", [False, True])
def test_one_module_used_twice(retain_graph):
    tanh, loss_func, hook = nn.Tanh(), extend(nn.MSELoss()), AccumulateGramHook()
    model = extend(nn.Sequential(nn.Linear(4, 4), tanh, nn.Linear(4, 4), tanh, nn.Linear(4, 2)))
    error = pytest.raises(UnsupportedModelError, match="Tanh: this Tanh is called more than once")
    with backpack(ViViTGGNExact(), extension_hook=hook, retain_graph=retain_graph), error:
        loss_func(model(torch.randn(6, 4)), torch.zeros(6, 2)).backward()
    assert hook.gram is None


def test_n1_is_an_integer():
    hook, model = AccumulateGramHook(), between(nn.Tanh())
    _, loss_func = run(model, samples(4, 5), ViViTGGNExact(), hook=hook)
    with pytest.raises(TypeError, match="n1 must be an integer or None, got bool"):
        hook.ntk(True, loss=loss_func)


# ---------------------------------------------------------------- what others notice


class Names(SecondOrderBackpropExtension):
    """Takes down which extensions are active at which module."""

    def __init__(self):
        super().__init__(savefield="", module_exts={})
        self.called = []

    def __call__(self, module, g_inp, g_out):
        self.called.append(type(module).__name__)


def trained(*extensions, hook=None):
    """Weights, gradients and the next random number after two steps."""
    torch.manual_seed(0)
    model, loss_func = extend(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))), nn.MSELoss()
    optimizer, names = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), Names()
    extend(loss_func)
    for _ in range(2):
        optimizer.zero_grad()
        with backpack(*extensions, names, BatchGrad(), extension_hook=hook):
            loss_func(model(torch.randn(8, 5)), torch.randn(8, 3)).backward()
        optimizer.step()
    tensors = [t for p in model.parameters() for t in (p.detach(), p.grad, p.grad_batch)]
    attributes = [[name for name in sorted(vars(module)) if name != "vivit_ggn_exact"] for module in model]
    hooks = [(len(module._forward_hooks), len(module._backward_hooks)) for module in model]
    return [*tensors, torch.rand(1)], [names.called, attributes, hooks]


def test_training_is_the_same_bit_for_bit():
    hook = AccumulateGramHook()
    (expected, others), (found, seen) = trained(), trained(ViViTGGNExact(), hook=hook)
    assert hook.gram.shape == (3, 8, 3, 8)
    assert seen == others
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_extensions_and_later_passes_find_what_they_left():
    model, x, loss_func = extend(between(nn.Tanh())), samples(4, 5), extend(nn.MSELoss())
    hook, bad, expected = AccumulateGramHook(), between(nn.Tanh()), jacobian_contraction(model, x)
    active = (ViViTGGNExact(), BatchGrad())
    with backpack(*active, extension_hook=hook):
        for _ in range(2):
            loss_func(model(x), torch.zeros(4, 3).double()).backward()
            assert CTX.get_active_exts() == active
            assert_close(hook.ntk(loss=loss_func), expected)
        with pytest.raises(UnsupportedModelError, match="Linear: nothing was passed back"):
            loss_func(extend(bad)(x).flip(1), torch.zeros(4, 3).double()).backward()
        assert hook.gram is None
        active[0].saved_quantities._saved_quantities.clear()  # or the hook refuses what the pass that failed has left
        loss_func(model(x), torch.zeros(4, 3).double()).backward()
        assert_close(hook.ntk(loss=loss_func), expected)
        assert CTX.get_active_exts() == active


def test_a_model_that_was_called_again_before_the_pass():
    model, x, loss_func = extend(between(nn.Tanh())), samples(4, 5), extend(nn.MSELoss())
    loss, hook = loss_func(model(x), torch.zeros(4, 3).double()), AccumulateGramHook()
    loss_func(model(samples(4, 5)), torch.zeros(4, 3).double())
    error = pytest.raises(RuntimeError, match="BackPACK has not kept the inputs of this call of MSELoss")
    with backpack(ViViTGGNExact(), extension_hook=hook), error:
        loss.backward()
    assert hook.gram is None
