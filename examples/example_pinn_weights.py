r"""
Loss weights of physics-informed networks, from traces of kernels
=================================================================

**By what weights do the losses of a physics-informed network train equally fast?**

A physics-informed network :math:`u_\theta` solves a differential equation by several losses at once: that of its values
:math:`u` at points of the boundary, and that of the residual :math:`r` of the equation at points inside. In gradient
flow, both follow one kernel,

.. math::
    \frac{d}{dt} \begin{pmatrix} u(x_b) \\ r(x_r) \end{pmatrix}
    = - \begin{pmatrix} K_{uu} & K_{ur} \\ K_{ru} & K_{rr} \end{pmatrix}
    \begin{pmatrix} u(x_b) - g(x_b) \\ r(x_r) \end{pmatrix} .

Where the eigenvalues of :math:`K_{rr}` are far above those of :math:`K_{uu}`, the residual is learned and the boundary
is not. S. Wang, X. Yu, P. Perdikaris ("When and why PINNs fail to train: A neural tangent kernel perspective", Journal
of Computational Physics 449, 2022, algorithm 1) weigh each loss by

.. math::
    \lambda_u = \frac{\operatorname{Tr} K}{\operatorname{Tr} K_{uu}} , \qquad
    \lambda_r = \frac{\operatorname{Tr} K}{\operatorname{Tr} K_{rr}} .

This example computes the blocks, traces and weights for a Poisson equation and for the wave equation of that paper,
beside the same by hand with ``torch.func``, and trains with weights that follow the kernel.
"""

import os
from functools import partial
from itertools import combinations_with_replacement
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.quasirandom import SobolEngine

from ggn_ntk import empirical_ntk, empirical_ntk_fn
from ggn_ntk.plots import COLORS
from ggn_ntk.reference import relative_error

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
N, WIDTH, STEPS, EVERY = (8, 16, 20, 10) if REDUCED else (80, 96, 200, 10)

torch.manual_seed(0)

# %%
# The network and its operators
# -----------------------------
#
# The network returns its points beside its values, and an operator makes a derivative of both, by
# ``torch.autograd.grad``, as one would for training. Operators are what ``output`` takes: here the value, the
# derivative in time, and the residuals of two equations in the plane,
#
# .. math::
#     \Delta u = f \quad\text{with}\quad u = \sin(2 \pi x) \sin(2 \pi y) ,
#     \qquad u_{tt} = 4 \, u_{xx} \quad\text{with}\quad
#     u = \sin(\pi x) \cos(2 \pi t) + \tfrac{1}{2} \sin(4 \pi x) \cos(8 \pi t) .


class Field(nn.Module):
    """A network in the plane: points [N, 2], and its values [N]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
        )
        nn.init.normal_(self.net[0].weight, std=1.5)  # for solutions that oscillate

    def forward(self, points):
        points = points.detach().requires_grad_()
        return points, self.net(points).squeeze(-1)


def gradient(u, points):
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0]


def second_derivatives(points, u):
    """Those with respect to each coordinate, [N] each."""
    return [gradient(slope, points)[:, i] for i, slope in enumerate(gradient(u, points).unbind(1))]


def value(found):
    return found[1]


def velocity(found):
    points, u = found
    return gradient(u, points)[:, 1]


def poisson(found):
    u_xx, u_yy = second_derivatives(*found)
    return u_xx + u_yy


def wave(found):
    u_xx, u_tt = second_derivatives(*found)
    return u_tt - 4 * u_xx


def sines(points):
    x, y = (2 * torch.pi * points).unbind(-1)
    return x.sin() * y.sin()


def standing(points):
    x, t = (torch.pi * points).unbind(-1)
    return x.sin() * (2 * t).cos() + (4 * x).sin() * (8 * t).cos() / 2


# %%
# Each equation is a list of losses, an operator, points and what it should be there, with as many points for each. The
# wave has a third one, its velocity at the start.

evenly = SobolEngine(8, scramble=True, seed=0).draw(N, dtype=torch.float64)
inside, sides, floor, start = evenly.split(2, 1)
sides[:, 0] = torch.arange(N) % 2  # left and right
floor[:, 1] = torch.arange(N) % 2  # below and above
start[:, 1] = 0
square = torch.cat([sides[: N // 2], floor[: N // 2]])
edges = torch.cat([sides[: N // 2], start[: N // 2]])
zero = torch.zeros(N, dtype=torch.float64)

EQUATIONS = {
    "Poisson": {
        "u": (value, square, sines(square)),
        "r": (poisson, inside, -8 * torch.pi**2 * sines(inside)),
    },
    "wave": {
        "u": (value, edges, standing(edges)),
        "u_t": (velocity, start, zero),
        "r": (wave, inside, zero),
    },
}
model = Field().double()

# %%
# The same by hand
# ----------------
#
# Functions of parameters and one point, whose gradients with respect to parameters are mapped over points. A trace is
# the sum of their squared norms; a block, their products.

params = {name: p.detach() for name, p in model.net.named_parameters()}


def u(params, point):
    return functional_call(model.net, params, (point,)).squeeze(-1)


def u_t(params, point):
    return grad(u, argnums=1)(params, point)[1]


def u_xx_plus_u_yy(params, point):
    return jacrev(grad(u, argnums=1), argnums=1)(params, point).trace()


def u_tt_minus_4_u_xx(params, point):
    second = jacrev(grad(u, argnums=1), argnums=1)(params, point)
    return second[1, 1] - 4 * second[0, 0]


BY_HAND = {value: u, velocity: u_t, poisson: u_xx_plus_u_yy, wave: u_tt_minus_4_u_xx}


def gradients(operator, points):
    found = vmap(grad(BY_HAND[operator]), (None, 0))(params, points)
    return torch.cat([g.flatten(1) for g in found.values()], 1)  # [N, P]


def norms(operator, points):
    return gradients(operator, points).square().sum(1)


def products(one, other):
    return gradients(*one) @ gradients(*other).T


# %%
# Blocks and their diagonals
# --------------------------
#
# Traces need each point with itself alone: ``paired=True``, a kernel ``[N]``. A block takes one operator of x1 and
# another of x2: ``output=(value, poisson)``. A kernel that ``empirical_ntk_fn`` has prepared verifies the model at its
# first call, and takes a part of that later.


def timed(function, *args):
    start = perf_counter()
    found = function(*args)
    return found, 1e3 * (perf_counter() - start)


def compare(label, expected, x, **keywords):
    """Print a line of the table, by hand and by a kernel that is prepared, and return the kernel."""
    expected()  # once, for torch to start up
    by_hand, hand = timed(expected)
    kernel_of = empirical_ntk_fn(model, **keywords)
    found, first = timed(kernel_of, *x)
    for _ in range(3):
        again, later = timed(kernel_of, *x)
    error = relative_error(found, by_hand)
    print(f"{label:24}{error:8.0e}{hand:10.1f}{first:10.1f}{later:10.1f}")
    if not (error < 1e-10 and torch.equal(found, again)):
        raise ValueError("All should be the same numbers")
    return found


print(f"{'milliseconds':24}{'error':>8}{'by hand':>10}{'1st call':>10}{'later':>10}")
for equation, losses in EQUATIONS.items():
    (residual, interior, _), traces = losses["r"], {}
    for name, (operator, points, _) in losses.items():
        own, other = (operator, points), (residual, interior)
        label = f"{equation}, diag K_{name},{name}"
        traces[name] = compare(label, partial(norms, *own), (points,), output=operator, paired=True).sum()
        pair = {"output": (operator, residual)}
        compare(f"{equation}, K_{name},r", partial(products, own, other), (points, interior), **pair)
    print(f"{equation}: " + ", ".join(f"lambda_{k} = {sum(traces.values()) / v:.2f}" for k, v in traces.items()))

# %%
# Eigenvalues
# -----------
#
# The residual takes second derivatives, and its kernel has by far the largest eigenvalues. The whole kernel has these,
# too: it does not show that the boundary is slow.


def block(one, other):
    if one is other:
        return empirical_ntk(model, one[1], output=one[0])
    return empirical_ntk(model, one[1], other[1], output=(one[0], other[0]))


figure, axes = plt.subplots(ncols=2, figsize=(10, 4), sharey=True, layout="constrained")
for ax, (equation, losses) in zip(axes, EQUATIONS.items(), strict=True):
    blocks = {(a, b): block(losses[a], losses[b]) for a, b in combinations_with_replacement(losses, 2)}
    blocks |= {(b, a): found.T for (a, b), found in blocks.items()}
    kernels = {rf"$K_{{{name},{name}}}$": blocks[name, name] for name in losses}
    kernels["$K$"] = torch.cat([torch.cat([blocks[a, b] for b in losses], 1) for a in losses])
    for color, (label, kernel) in zip(COLORS, kernels.items(), strict=False):
        eigenvalues = torch.linalg.eigvalsh(kernel).flip(0)
        ax.loglog(range(1, len(kernel) + 1), eigenvalues, label=label, color=color)
    ax.set(title=equation, xlabel="number", ylim=(1e-4, None))
    ax.legend()
axes[0].set_ylabel("eigenvalue")
plt.show()

# %%
# Training
# --------
#
# The Poisson equation by Adam, with the two losses as they are and with weights from traces of the kernel at every
# tenth step.

grid = torch.cartesian_prod(*[torch.linspace(0, 1, 33).double()] * 2)
losses = EQUATIONS["Poisson"]


def train(weighted):
    """The weights of u and r, and the relative error of the solution, at every tenth step."""
    torch.manual_seed(1)
    model, weights, errors = Field().double(), [], []
    diagonals = {name: empirical_ntk_fn(model, output=operator, paired=True) for name, (operator, *_) in losses.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            traces = torch.stack([diagonals[name](points).sum() for name, (_, points, _) in losses.items()])
            weights.append(traces.sum() / traces)
            errors.append(relative_error(model(grid)[1].detach(), sines(grid)))
        found = [(operator(model(points)) - wanted).square().mean() for operator, points, wanted in losses.values()]
        loss = weights[-1] @ torch.stack(found) if weighted else sum(found)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(weights), errors


runs = {"not weighted": train(False), "weighted": train(True)}
for label, (weights, errors) in runs.items():
    print(f"{label:14} weights at the end {weights[-1, 0]:.0f} and {weights[-1, 1]:.2f}, error {errors[-1]:.1%}")

# %%
# The kernel of the residual grows in training. Without weights, the boundary is left behind, and with it the solution.

steps = range(0, STEPS + 1, EVERY)
figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for color, (label, (weights, errors)) in zip(COLORS, runs.items(), strict=False):
    left.semilogy(steps, weights[:, 0], color=color, label=rf"$\lambda_u$, {label}")
    left.semilogy(steps, weights[:, 1], "--", color=color, label=rf"$\lambda_r$, {label}")
    right.semilogy(steps, errors, color=color, label=label)
left.set(xlabel="step", title="Weights that the kernel asks for")
right.set(xlabel="step", title="Relative error of the solution")
left.legend()
right.legend()
plt.show()

if not (REDUCED or runs["weighted"][1][-1] < runs["not weighted"][1][-1] / 2):
    raise ValueError("Weights should help")
