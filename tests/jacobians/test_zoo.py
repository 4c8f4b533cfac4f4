"""Models as they are found in papers and packages: rules cover them, and give the oracle's kernel."""

import pytest
import torch
from conftest import DEVICES, DTYPES, NAMED, assert_close, oracle_sum
from covering import covers
from models import each
from zoo import ZOO

from ggn_ntk import empirical_ntk, explain
from ggn_ntk.reference import jacobian_contraction

COVERED = 0.99

# Models that stand under other tests, too.
OTHERS = ["spectral_norm", "LSTM", "GRU", "RNN", "transformer_encoder"]
OTHERS += ["cross_attention", "cross_attention_widths", "cross_attention_added_keys", "attention_weights_used"]
OTHERS += ["torchvision_vit", "gpt2", "gpt2_lm_tied", "bert", "hugging_face_vit", "llama", "gemma"]
ALL = [*ZOO, *(NAMED[name] for name in OTHERS)]

# What packages say when they are imported or their models are made, which no kernel has to do with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("error::ggn_ntk.RouteWarning"),
]


@pytest.mark.parametrize("case", each(ALL))
def test_rules_cover(case, dtype):
    explanation = explain(*case.build(dtype), output=case.output)
    assert explanation.covered >= COVERED * explanation.entries, explanation.fallback
    assert explanation.method == "structured"


@covers(
    {
        "case": each(ALL),
        "symmetric": [False, True],
        "dtype": lambda case: [torch.float32] if case.rounds else DTYPES,
        "compute": ["full", "trace"],
    }
)
def test_kernels(case, symmetric, dtype, compute):
    model, x1, x2 = case.build(dtype)
    kernel = empirical_ntk(model, x1, None if symmetric else x2, compute=compute, output=case.output)
    assert_close(kernel, oracle_sum(case, symmetric, compute))


@pytest.mark.parametrize("case", each([NAMED["resnet18"]]))
def test_a_sample_of_layers(case, dtype):
    model, x1, x2 = case.build(dtype)
    explanation = explain(model, x1, x2)
    assert explanation.covered >= COVERED * explanation.entries
    params = ["conv1.weight", "bn1.bias", "layer2.0.downsample.0.weight", "layer3.1.bn2.weight", "fc.weight", "fc.bias"]
    kernel = empirical_ntk(model, x1, x2, params=params, compute="trace")
    assert_close(kernel, jacobian_contraction(model.double(), x1.double(), x2.double(), params=params, compute="trace"))


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("case", each(ZOO))
def test_other_devices(case, device):
    if case.name == "peft_dora" and device == "pretend":
        pytest.skip("torch.eye has no shape there")
    dtype = torch.float32 if case.rounds or device == "cuda" else torch.float64
    model, x1, x2 = case.build(dtype, device)
    kernel = empirical_ntk(model, x1, x2, compute="trace", output=case.output)
    assert kernel.device.type == device
    assert_close(kernel, oracle_sum(case, False, "trace"))
