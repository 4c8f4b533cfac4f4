"""The ViViT route: the hook in a user's own pipeline, and what the route refuses."""

import gc

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from cases import BY_NAME, CASES, mlp, tied_mlp
from conftest import assert_close, oracle_sum
from torch import nn
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk import AccumulateGramHook, UnsupportedModelError, empirical_ntk, empirical_ntk_vivit
from ggn_ntk.extensions import gram_hook, limits
from ggn_ntk.reference import jacobian_contraction


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


# ---------------------------------------------------------------- the hook


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


# ---------------------------------------------------------------- what the route refuses


UNSUPPORTED = [case for case in CASES if not case.vivit]


@pytest.mark.parametrize("case", UNSUPPORTED, ids=str)
def test_refused_by_vivit_and_right_by_auto(case):
    model, x1, x2 = case.build()
    with pytest.raises(UnsupportedModelError, match="No empirical NTK through ViViT"):
        empirical_ntk(model, x1, x2, method="vivit")
    with pytest.raises(UnsupportedModelError):
        empirical_ntk_vivit(model, x1, x2)
    assert_close(empirical_ntk(model, x1, x2, method="auto"), oracle_sum(case))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tied", r"0.weight: it is used 2 times \(again as 2.weight\), and ViViT drops the cross-terms"),
        ("twice_called", r"0: it is used 2 times \(again as 2\)"),
        ("padding_reflect", "0: Conv2d has a padding_mode other than 'zeros'"),
        ("padding_same", "0: Conv2d has its padding given as a string"),
        ("divisor_override", "2: AvgPool2d has divisor_override"),
        ("avg_pool_ceil", "2: AvgPool2d has ceil_mode=True"),
        ("avg_pool_pad", "2: AvgPool2d has count_include_pad=False"),
        ("conv_transpose_output_padding", "0: ConvTranspose2d has output_padding"),
        ("batch_norm_no_affine", "1: BatchNorm1d has affine=False"),
        ("inplace", "1: ReLU has inplace=True"),
        ("layer_norm_gelu", "1: ViViT has no extension for LayerNorm"),
        ("layer_norm_gelu", "2: ViViT has no extension for GELU"),
        ("residual", "the model: Residual may compute between its modules what BackPACK cannot see"),
        ("output_scalar", "the model: its output has no axis behind the samples"),
        ("tuple_inputs", "the model: ViViT takes one input tensor"),
        ("weight_norm", "0: ParametrizedLinear may compute between its modules"),
    ],
)
def test_names_what_it_refuses(name, message):
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    with pytest.raises(UnsupportedModelError, match=message):
        empirical_ntk(model, x1, x2, method="vivit")


def test_lists_all_problems_at_once():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding="same"), nn.Sequential(nn.GELU(), nn.Dropout()), nn.Flatten(), nn.Linear(32, 2)
    )
    with pytest.raises(UnsupportedModelError) as info:
        empirical_ntk(model, torch.randn(2, 2, 4, 4), method="vivit")
    assert [problem.where for problem in info.value.problems] == ["1.1", "0", "1.0"]


@pytest.fixture
def warns_always():
    """Has torch warn each time, not once in a process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("warns_always")
@pytest.mark.parametrize("name", ["padding_reflect", "padding_same", "divisor_override"])
def test_the_numeric_probe_stands_behind_the_list(name, monkeypatch):
    monkeypatch.setattr(limits, "VIVIT_CHECKS", [])
    monkeypatch.setattr(gram_hook, "VIVIT_CHECKS", [])
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    with pytest.raises(
        UnsupportedModelError,
        match=r"0(.weight|.weight, 0.bias)?: (its kernel by ViViT differs from autograd's|BackPACK raised UserWarning)",
    ):
        empirical_ntk(model, x1, x2, method="vivit")
    assert_close(empirical_ntk(model, x1, x2), oracle_sum(case))


@pytest.mark.parametrize("name", ["avg_pool_ceil", "avg_pool_pad", "conv_transpose_output_padding"])
def test_errors_of_backpack_are_turned_into_ours(name, monkeypatch):
    monkeypatch.setattr(limits, "VIVIT_CHECKS", [])
    monkeypatch.setattr(gram_hook, "VIVIT_CHECKS", [])
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    with pytest.raises(UnsupportedModelError, match=r"(0|2): BackPACK raised"):
        empirical_ntk(model, x1, x2, method="vivit")


@pytest.mark.parametrize("options", [{"method": "vivit"}, {"capture": "sequential"}], ids=str)
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward"])
def test_computation_that_types_do_not_tell_is_refused(model, options, change):
    x = 50 * torch.randn(3, 5).double()
    if change == "hook":
        model[1].register_forward_hook(lambda module, args, output: output.clamp(max=6))
    elif change == "pre-hook":
        model.register_forward_pre_hook(lambda module, args: (args[0].clamp(-10, 10),))
    else:
        model[3].forward = lambda x: x.relu()
    with pytest.raises(UnsupportedModelError, match="has forward hooks or a forward of its own"):
        empirical_ntk(model, x, **options)
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_a_subclass_of_a_layer_is_not_taken_for_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UnsupportedModelError, match="0: ViViT has no extension for Doubled"):
        empirical_ntk(nn.Sequential(Doubled(5, 2)), torch.randn(2, 5), method="vivit")


def test_a_sequential_with_a_parameter_of_its_own(model):
    model.register_parameter("scale", nn.Parameter(torch.ones(1).double()))
    with pytest.raises(UnsupportedModelError, match="the model: ViViT has no Gram matrix for its parameter 'scale'"):
        empirical_ntk(model, torch.randn(2, 5).double(), method="vivit")


def test_no_memory_is_kept(model):
    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    x = torch.randn(3, 5).double()
    empirical_ntk(model, x, compute="trace", method="vivit")
    before = tensors()
    for compute in ("full", "diagonal", "trace"):
        empirical_ntk(model, x, compute=compute, method="vivit")
    assert tensors() == before


def test_output_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"what it returns is not its last layer's output \(output=\)"):
        empirical_ntk_vivit(model, torch.randn(3, 5).double(), output=lambda y: y[:, :1])
