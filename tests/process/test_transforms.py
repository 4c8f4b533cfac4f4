"""Models that differentiate inside of transforms of ``torch.func``."""

import pytest
import torch
from torch.func import jacrev, jvp, vmap

from ggn_ntk.process.transforms import AutogradInside, batched_gradients


def _inside(function):
    def transformed(*args):
        with AutogradInside():
            return function(*args)

    return transformed


def _derivative(x, v=None):
    # x [F] -> [F]: of sum(x^3) or of v^T x^3, and once more
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = (x**3).sum() if v is None else x**3
        (first,) = torch.autograd.grad(y, x, v, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), [x])
    return first + second


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_each_sample(axis, shared):
    x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    given = v[:, 0] if shared else v
    found = vmap(_inside(_derivative), (axis, None if shared else 1))(x if axis == 0 else x.T, given)
    expected = torch.stack([_derivative(row, w) for row, w in zip(x, [given] * 5 if shared else v.T, strict=True)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vmap(_inside(_derivative), axis)(x if axis == 0 else x.T), 3 * x**2 + 6 * x)


def test_in_no_grad_and_in_two_maps():
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        found = vmap(vmap(_inside(_derivative)))(x)
    torch.testing.assert_close(found, 3 * x**2 + 6 * x)
    assert not x.requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_each_sample_along_several_vectors(shared):
    def hessian(x, v):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (first,) = torch.autograd.grad((x**3).sum() * x[0], x, create_graph=True)
            return torch.autograd.grad(first, x, v, is_grads_batched=True)[0]

    x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    given = v[:, 0] if shared else v
    found = vmap(_inside(hessian), (1, None if shared else 1))(x.T, given)
    expected = torch.stack([hessian(row, given if shared else given[:, n]) for n, row in enumerate(x)])
    torch.testing.assert_close(found, expected)


def test_unused_and_shared_inputs():
    shared = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def unused(x):
        x, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        found = torch.autograd.grad((x**2).sum(), (x, other), allow_unused=True)
        assert found[1] is None
        return found[0]

    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(_inside(unused))(x), 2 * x)
    with pytest.raises(RuntimeError, match="what samples share"):
        vmap(_inside(lambda x: torch.autograd.grad((x * shared).sum(), shared)[0]))(x)
    with pytest.raises(RuntimeError, match="scalar outputs"):
        vmap(_inside(lambda x: torch.autograd.grad(x.detach().requires_grad_() * 2, x)[0]))(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, in jvp
def test_inside_of_derivatives():
    def residual(weight, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = torch.tanh(weight @ x).sum()
            (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return dx * y

    def by_hand(weight, x):
        y = torch.tanh(weight @ x)
        return ((1 - y**2) @ weight) * y.sum()

    weight, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    found = vmap(jacrev(_inside(residual)), (None, 0))(weight, x)
    torch.testing.assert_close(found, vmap(jacrev(by_hand), (None, 0))(weight, x))
    tangent = torch.randn_like(weight)
    for row in x:
        pushed = jvp(lambda w: _inside(residual)(w, row), (weight,), (tangent,))[1]
        torch.testing.assert_close(pushed, jvp(lambda w: by_hand(w, row), (weight,), (tangent,))[1])


@pytest.mark.parametrize("batched", [True, False])
def test_batched_gradients(batched):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    output = x.sin().softmax(-1) if batched else torch.cdist(x, torch.randn(4, 5, dtype=torch.float64))
    cotangents = torch.randn(6, *output.shape, dtype=torch.float64)
    if not batched:  # torch's rule for it is wrong
        with pytest.raises(RuntimeError, match="vmap gets gradients of CdistBackward0 wrong"):
            batched_gradients(output, [x], cotangents)
        return
    found, none = batched_gradients(output, [x, unused], cotangents, allow_unused=True)
    expected = [torch.autograd.grad(output, x, v, retain_graph=True)[0] for v in cotangents]
    torch.testing.assert_close(found, torch.stack(expected))
    assert none is None
