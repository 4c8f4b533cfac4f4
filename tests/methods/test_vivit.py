"""The ViViT route: what it refuses, and what it keeps."""

import gc

import pytest
import torch
from cases import BY_NAME, CASES, mlp
from conftest import assert_close, oracle_sum
from torch import nn

from ggn_ntk import UnsupportedModelError, empirical_ntk, empirical_ntk_vivit
from ggn_ntk.extensions import gram_hook, limits
from ggn_ntk.reference import jacobian_contraction


@pytest.fixture
def model():
    return mlp(nn.Tanh)().double()


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
