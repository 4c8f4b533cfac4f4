"""What runs on the CPU runs on a device apart from it: on the pretend one, where there is no GPU.

Kernels of all cases are in test_routes and test_capture.
"""

import pytest
import torch
from backpack import backpack, extend
from cases import CASES
from conftest import DEVICES, PRETENDS, assert_close, oracle_sum
from models import MODELS
from test_capture import each
from test_extension import PLAIN
from torch import nn
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk import AccumulateGramHook, EmpiricalNTK, empirical_ntk, explain, linearize, nngp

ALL = [*(pytest.param(case, id=case.name) for case in CASES), *each(MODELS)]
TENSORS = [*(pytest.param(case, id=case.name) for case in CASES), *each(m for m in MODELS if m.output is None)]

on_others = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)


def built(case, device):
    """The case on the CPU and elsewhere."""
    dtype = torch.float32 if getattr(case, "rounds", False) else torch.float64
    return case.build(dtype), case.build(dtype, device)


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
    here, there = built(case, device)
    assert str(explain(*there, output=case.output)) == str(explain(*here, output=case.output))


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


@on_others
@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("kind", ["extension", "hook"])
def test_training_step(case, kind, device):
    if kind == "hook" and (not case.vivit or case.name.startswith("output_")):
        pytest.skip("not for ViViT")
    model, x1, x2 = case.build(torch.float32, device)  # what BackPACK makes of average pooling is in float32
    model, loss_func = extend(model), extend(nn.MSELoss(reduction="sum"))
    extension, hook = (EmpiricalNTK(len(x1)), None) if kind == "extension" else (ViViTGGNExact(), AccumulateGramHook())
    with backpack(extension, extension_hook=hook):
        output = model(torch.cat([x1, x2]))
        loss_func(output, torch.zeros_like(output)).backward()
    kernel = extension.ntk() if hook is None else hook.ntk(len(x1), loss=loss_func)
    assert kernel.device.type == device
    assert_close(kernel, oracle_sum(case))


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
