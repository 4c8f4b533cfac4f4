"""What runs on the CPU runs on a device apart from it: on the pretend one, where there is no GPU.

Kernels of all cases are in test_routes and test_capture.
"""

import pytest
import torch
from backpack import backpack, extend
from cases import CASES, PLAIN, _randomize_norm, moved
from conftest import DEVICES, PRETENDS, ROUNDED_ON_CUDA, assert_close, oracle_sum
from models import MODELS, Recurrent, each
from torch import nn
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk import AccumulateGramHook, EmpiricalNTK, empirical_ntk, empirical_ntk_fn, explain, linearize, nngp
from ggn_ntk.models.comparison import relative_error
from ggn_ntk.process.switches import full_precision

ALL = [*(pytest.param(case, id=case.name) for case in CASES), *each(MODELS)]
TENSORS = [*(pytest.param(case, id=case.name) for case in CASES), *each(m for m in MODELS if m.output is None)]

on_others = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)


def built(case, device):
    """The case on the CPU and elsewhere."""
    rounds = getattr(case, "rounds", False) or (device == "cuda" and case.name in ROUNDED_ON_CUDA)
    dtype = torch.float32 if rounds else torch.float64
    return case.build(dtype), case.build(dtype, device)


def fused_biases(model):
    """The biases that CUDA adds inside of a step of a recurrent layer: rules see no operation that adds them."""
    kinds = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    return {f"{name}.{key}".strip(".") for name, m in layers for key, _ in m.named_parameters() if "bias" in key}


@on_others
@pytest.mark.parametrize("case", TENSORS)
def test_nngp(case, device):
    here, there = built(case, device)
    kernel = nngp(*there)
    assert kernel.device.type == device
    assert_close(kernel, nngp(*here))


@on_others
@pytest.mark.parametrize("case", ALL)
def test_explain(case, device):
    # Devices may reach one result by other operations, say a bias that is added by itself, in another layout.
    models = built(case, device)
    here, there = (explain(*model, output=case.output) for model in models)
    fused = fused_biases(models[1][0]) if device == "cuda" else set()
    assert set(there.fallback) == set(here.fallback) | fused
    assert fused or there.fallback == here.fallback
    if fused:  # these layers do as much in other steps
        assert {c.parameter for c in there.contractions} == {c.parameter for c in here.contractions} - fused
        return
    ours, theirs = (sorted((c.parameter, c.module, c.flops, c.memory) for c in e.contractions) for e in (here, there))
    assert theirs == ours


class Residual(nn.Module):
    """A convolutional net with normalised channels in a branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        h = self.norm(self.stem(x))
        return self.head((h + self.branch(h)).mean((2, 3)))


IMAGES = (5, 2, 4, 4)
NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
    "GroupNorm": lambda: nn.GroupNorm(1, 2),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(2, affine=True),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
}
HAVE_RULES = {
    "Residual": (Residual, IMAGES),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (5, 3, 8)),
    **{kind.__name__: (lambda kind=kind: Recurrent(kind), (5, 3, 3)) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{name: (lambda norm=norm: nn.Sequential(nn.Conv2d(2, 2, 1), norm()), IMAGES) for name, norm in NORMS.items()},
}


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize(
    ("name", "interacting"), [*((name, False) for name in HAVE_RULES), ("Residual", True), ("BatchNorm2d", True)]
)
def test_what_has_rules(name, interacting, device):
    """To fall back is exact and says so, but is slow: here it would be a rule that was lost."""
    build, shape = HAVE_RULES[name]
    if device == "pretend" and name in ("LSTM", "GRU"):
        pytest.skip("the device has no fused recurrent layers")
    model = build().train(interacting)
    for module in model.modules():
        _randomize_norm(module)
    model, x = moved(model, device), torch.randn(shape, device=device)
    explanation = explain(model, x, capture="autograd", interacting=interacting)
    assert set(explanation.fallback) == (fused_biases(model) if device == "cuda" else set())


@on_others
@pytest.mark.parametrize("case", TENSORS)
def test_linearization(case, device):
    (model, x, _), (moved, moved_x, _) = built(case, device)
    steps = {name: torch.randn_like(p) / 10 for name, p in model.named_parameters()}
    here = {name: (p + steps[name]).detach() for name, p in model.named_parameters()}
    there = {name: (p + steps[name].to(device)).detach() for name, p in moved.named_parameters()}
    output = linearize(moved)(there, moved_x)
    assert output.device.type == device
    assert_close(output.detach(), linearize(model)(here, x).detach())


def kernel_of_a_step(kind, model, x1, x2):
    """The kernel that the extension or the hook collects in a training step."""
    model, loss_func = extend(model), extend(nn.MSELoss(reduction="sum"))
    extension, hook = (EmpiricalNTK(len(x1)), None) if kind == "extension" else (ViViTGGNExact(), AccumulateGramHook())
    with backpack(extension, extension_hook=hook):
        output = model(torch.cat([x1, x2]))
        loss_func(output, torch.zeros_like(output)).backward()
    return extension.ntk() if hook is None else hook.ntk(len(x1), loss=loss_func)


@on_others
@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("kind", ["extension", "hook"])
def test_training_step(case, kind, device):
    if kind == "hook" and (not case.vivit or case.name.startswith("output_")):
        pytest.skip("not for ViViT")
    model, x1, x2 = case.build(torch.float32, device)  # what BackPACK makes of average pooling is in float32
    with full_precision():  # the kernel is as exact as the pass
        kernel = kernel_of_a_step(kind, model, x1, x2)
    assert kernel.device.type == device
    assert_close(kernel, oracle_sum(case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["extension", "hook"])
def test_a_training_step_with_rounded_products(kind):
    """In TF32, as convolutions are by default, and matrix products on demand."""
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)).cuda()
    x1, x2 = torch.randn(8, 3, 16, 16, device="cuda"), torch.randn(4, 3, 16, 16, device="cuda")
    expected = empirical_ntk(model, x1, x2)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            assert relative_error(kernel_of_a_step(kind, model, x1, x2), expected) < 5e-3
    finally:
        torch.set_float32_matmul_precision(before)


needs_it = pytest.mark.skipif(not PRETENDS, reason="no pretend device")


@needs_it
def test_it_refuses_what_cuda_refuses():
    x, index = torch.randn(3).to("pretend"), torch.tensor([0, 2])
    for operation in (lambda: x + torch.ones(3), lambda: x.index_fill(0, index, 0), lambda: x.index_select(0, index)):
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError):
        torch.randn(3, device="pretend", generator=torch.Generator("cpu"))
    assert torch.equal((x[index] + 1).cpu(), x.cpu()[index] + 1)


@needs_it
@pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products"])
def test_how_often_the_device_is_waited_for_does_not_depend_on_parameters(method):
    from pretend_device import COUNTS, reset

    counts = []
    for depth in (2, 12):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(5, 5), nn.Tanh())]
        model, x = nn.Sequential(*layers, nn.Linear(5, 2)).double().to("pretend"), torch.randn(4, 5).double()
        empirical_ntk(model, x.to("pretend"), method=method)
        reset()
        empirical_ntk(model, x.to("pretend"), method=method)
        counts.append((COUNTS["syncs"], COUNTS["copies"]))
    assert counts[0] == counts[1]
    assert sum(counts[0]) <= 30


def network(kind):
    """A network, samples, and how many launches and waits a prepared kernel may take."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 5)), (6, 8), 60, 3
    if kind == "cnn":
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(64, 5)), (6, 3, 10, 10), 60, 3
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)), (6, 3, 8), 250, 3


@pytest.mark.skipif(not PRETENDS, reason="counts are those of the pretend device")
@pytest.mark.parametrize("kind", ["mlp", "cnn", "encoder"])
def test_a_prepared_kernel_takes_few_launches(kind):
    import pretend_device

    model, shape, launches, syncs = network(kind)
    model, x = model.to(pretend_device.NAME), torch.randn(shape).to(pretend_device.NAME)
    prepared = empirical_ntk_fn(model)
    for _ in range(4):  # the first verifies, the third writes down what is done
        pretend_device.reset()
        kernel = prepared(x[:4], x[4:])
    assert pretend_device.COUNTS["launches"] <= launches
    assert pretend_device.COUNTS["syncs"] <= syncs
    assert_close(kernel, empirical_ntk(model, x[:4], x[4:]))
