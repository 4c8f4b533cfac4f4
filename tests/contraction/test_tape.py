"""Contractions that are played again, and those that cannot be."""

import pytest
import torch
from cases import BY_NAME
from conftest import COMPUTES, DEVICES
from covering import covers
from torch import nn

from ggn_ntk import empirical_ntk
from ggn_ntk.contraction import tape


def _play_again(model, x1, x2, compute):
    for _ in range(2):  # the form is seen, and recorded
        empirical_ntk(model, x1, x2, compute=compute)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    played = empirical_ntk(model, x1, x2, compute=compute)
    tape.CONTRACTIONS.forget()
    assert torch.equal(played, empirical_ntk(model, x1, x2, compute=compute))


def test_played_again_on_other_numbers(case):
    _play_again(*case.build(), "full")


@covers({"name": ["mlp_Tanh", "conv2d_options", "tied_transformer"], "compute": COMPUTES, "device": DEVICES})
def test_played_again_on_devices(name, compute, device):
    model, x1, x2 = BY_NAME[name].build()
    _play_again(model.to(device), x1.to(device), x2.to(device), compute)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_decides_is_part_of_the_form(symmetric):
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    shapes = [x, x[:4], x.T.clone().T, x[:1].expand(6, 5), x.double()]
    for given in (*shapes, *shapes, *shapes):
        net = model.to(given.dtype)
        kernel = empirical_ntk(net, given, None if symmetric else given.clone())
        known = dict(tape.CONTRACTIONS._tapes)
        tape.CONTRACTIONS.forget()
        assert torch.equal(kernel, empirical_ntk(net, given, None if symmetric else given.clone()))
        tape.CONTRACTIONS._tapes.update(known)


def _record(contract, *inputs):
    kernels = {}
    for _ in range(2):
        tape.CONTRACTIONS.run("form", inputs, kernels, lambda: kernels.update({"": contract(*inputs)}))
    return tape.CONTRACTIONS._tapes["form"]


def test_intermediate_results_and_what_is_not_needed_are_dropped():
    def contract(a, b):
        (a * 2).sum()  # not needed
        product = (a.T[1:] @ b).view(-1)
        torch.empty(3, device="meta").add(1)
        return torch.cat([product, product[:1]]).add_(1)

    a, b = torch.randn(4, 3), torch.randn(4, 2)
    found = _record(contract, a, b)
    assert [step.call.name() for step, _ in found.steps if hasattr(step, "call")] == [
        "aten::mm",
        "aten::cat",
        "aten::add_.Tensor",
    ]
    kernels = {}
    other = torch.randn(10, 3)[3:7]  # its first entry is not the first of its memory
    found.play([other, b], kernels)
    assert torch.equal(kernels[""], contract(other, b))


@pytest.mark.parametrize(
    "contract",
    [
        lambda a: a * a.sum().item(),  # a number decides
        lambda a: a[a > 0],  # numbers decide on a shape
        lambda a: a + torch.tensor([1.0, 2.0, 3.0, 4.0]),  # a tensor that is no input
        lambda a: a + torch.rand(4),
        lambda a: torch.ops.aten.index.Tensor(a, [a > 0]),
        lambda a: a.repeat(2**21),  # many numbers
    ],
)
def test_what_is_not_taped(contract):
    assert _record(contract, torch.randn(4)) is False


def test_lists_places_and_constants():
    def contract(a):
        places = torch.arange(2) + 1
        rows = torch.stack(a.unbind()[::-1])[:, places]
        rows[places[:1], :] += torch.ones(2).cumsum(0)
        return torch.cat([rows, torch.zeros(1, 2)])

    found = _record(contract, torch.randn(3, 4))
    for _ in range(2):
        kernels, other = {}, torch.randn(3, 4)
        found.play([other], kernels)
        assert torch.equal(kernels[""], contract(other))
        kernels[""].zero_()


def test_forms_are_forgotten_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(tape, "_FORMS", 3)
    for form in range(5):
        tape.CONTRACTIONS.run(form, [torch.ones(1)], {}, lambda: None)
    assert set(tape.CONTRACTIONS._tapes) == {3, 4}
