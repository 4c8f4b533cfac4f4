"""Outputs that are derivatives of a network, by ``torch.autograd.grad`` and by ``torch.func``, on every route."""

from functools import wraps

import pytest
import torch
from conftest import assert_close, loop_jacobians, seeded
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from ggn_ntk import empirical_ntk, explain

# torch's own, in jvp
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def slope(u, x):
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]


# ---------------------------------------------------------------- by autograd: u of all samples, at tensors [N]


def first(u, t, x):
    return torch.stack(torch.autograd.grad(u(t, x).sum(), (t, x), create_graph=True), 1)


def burgers(u, t, x):
    y = u(t, x)
    dx = slope(y, x)
    return slope(y, t) + y * dx - 0.1 * slope(dx, x)


def korteweg_de_vries(u, t, x):
    y = u(t, x)
    dx = slope(y, x)
    return slope(y, t) + 6 * y * dx + slope(slope(dx, x), x)


def of_several_vectors(u, t, x):
    point = torch.stack([t, x], 1)
    first = slope(u(*point.unbind(1)), point)
    basis = torch.eye(2, dtype=x.dtype, device=x.device).unsqueeze(1).expand(2, len(x), 2)
    (second,) = torch.autograd.grad(first, point, basis, create_graph=True, is_grads_batched=True)
    return second.movedim(0, 1)


# ---------------------------------------------------------------- by torch.func


def of_points(function):
    """Map over samples what is a function of u and of one point [2]."""

    @wraps(function)
    def mapped(u, t, x):
        return vmap(lambda point: function(lambda p: u(*p), point))(torch.stack([t, x], 1))

    return mapped


def twice_reverse(u, point):
    return jacrev(jacrev(u))(point)


def laplacian(u, point):
    return hessian(u)(point).trace() + u(point)


def forward_over_reverse(u, point):
    return jvp(grad(u), (point,), (torch.ones_like(point),))[1]


def third(u, point):
    def along(f):
        return lambda p: grad(f)(p)[1]

    return grad(u)(point)[0] + 6 * u(point) * grad(u)(point)[1] + along(along(along(u)))(point)


def twice_forward(u, t, x):
    def along(f):
        return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]

    return along(along(lambda x: u(t, x)))(x)


def of_a_sum(u, t, x):
    return grad(lambda x: u(t, x).sum())(x)


BY_AUTOGRAD = [first, burgers, korteweg_de_vries, of_several_vectors]
BY_FUNC = [twice_forward, of_a_sum]
BY_FUNC += [of_points(f) for f in (twice_reverse, laplacian, forward_over_reverse, third)]


# ---------------------------------------------------------------- models


class Field(nn.Module):
    """Values [N] of a network in time and place, and what is made of its derivatives."""

    def __init__(self, residual, activation):
        super().__init__()
        layers = [nn.Linear(2, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 1)]
        self.net, self.residual = nn.Sequential(*layers), residual

    def forward(self, t, x):
        t, x = (x.detach().requires_grad_() for x in (t, x))
        return {"u": self.u(t, x), "r": self.residual(self.u, t, x)}

    def u(self, t, x):
        return self.net(torch.stack([t, x], -1)).squeeze(-1)


def pick(key):
    return lambda found: found[key]


U, R = pick("u"), pick("r")
ROUTES = ["structured", "jacobian_contraction", "ntk_vector_products"]


@pytest.mark.parametrize("kind", [*BY_AUTOGRAD, *BY_FUNC], ids=lambda kind: kind.__name__)
def test_every_route(kind):
    number = [*BY_AUTOGRAD, *BY_FUNC].index(kind)
    model = seeded(Field, kind, (nn.Tanh, Sine, nn.GELU)[number % 3])()
    x1, x2 = ((torch.randn(2).double(), torch.randn(2).double()) for _ in range(2))
    u, r = loop_jacobians(model, x1, U), loop_jacobians(model, x2, R)
    expected = sum(torch.einsum("ncp,mdp->nmcd", j, r[name]) for name, j in u.items()).squeeze(2)
    of_pairs = expected.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    of_residuals = sum(torch.einsum("ncp,mdp->nmcd", j, j) for j in r.values())

    def function(params, t, x):
        return functional_call(model, params, (t, x))

    params = dict(model.named_parameters())
    for place, method in enumerate(ROUTES):
        paired = place == number % 2
        kernel = empirical_ntk(model, x1, x2, method=method, output=(U, R), paired=paired)
        assert_close(kernel.reshape((of_pairs if paired else expected).shape), of_pairs if paired else expected)
    kernel = empirical_ntk(function, x2, params=params, method=ROUTES[number % 3], output=R)
    assert_close(kernel.reshape(of_residuals.shape), of_residuals)
    explanation = explain(model, x1, x2, output=(U, R))
    assert explanation.covered == explanation.entries, explanation.fallback
