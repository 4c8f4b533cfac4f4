"""The BackPACK extension, in a user's own training step."""

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.extensions.module_extension import ModuleExtension
from cases import CASES, Residual, mlp, tied_mlp
from conftest import COMPUTES, assert_close, oracle, oracle_sum
from torch import nn

from ggn_ntk import EmpiricalNTK, Factored, UnsupportedModelError
from ggn_ntk.reference import jacobian_contraction

PLAIN = [c for c in CASES if c.sequential and not c.name.startswith(("tied", "twice", "reused", "bilinear", "inplace"))]


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
        assert_close(extension.ntk(), jacobian_contraction(model, x))
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
