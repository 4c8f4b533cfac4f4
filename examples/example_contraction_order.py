r"""
How the order of contraction is chosen
======================================

**Why does one order of products cost far more than another, and which is taken?**

The structured route never asks how large a Jacobian is before it asks whether one is needed. For each parameter, a rule
writes the Jacobian as an einsum that is not evaluated. Two of them, one for each set of samples, make the kernel's
einsum, and any order of its products gives the same kernel. What they cost differs by orders of magnitude, and which is
cheapest depends on the shapes alone.

This example counts the operations of one layer by hand, finds where one order overtakes another, and reads off what
:func:`ggn_ntk.explain` chose for a whole network.
"""

import matplotlib.pyplot as plt
import opt_einsum
import torch
from torch import nn

from ggn_ntk import explain
from ggn_ntk.plots import COLORS

torch.manual_seed(0)

# %%
# One layer
# ---------
#
# A linear layer with input :math:`x_{n,i}` adds :math:`\sum_i W_{o,i} \, x_{n,i}` to its output :math:`o`. With the
# Jacobian :math:`s_{c,n,o}` of the network's output :math:`c` with respect to the layer's output, the chain rule gives
#
# .. math::
#     \frac{\partial f_c(x_n)}{\partial W_{o,i}} = s_{c,n,o} \, x_{n,i} ,
#
# in letters ``cno,ni->cnoi``. The layer's part of the kernel is the product of two of these, summed over the weight's
# axes ``o`` and ``i``:
#
# .. math::
#     \Theta_{n,m,c,d} = \sum_{o,i} s_{c,n,o} \, x_{n,i} \, s'_{d,m,o} \, x'_{m,i} .
#
# There are two extremes. Multiply :math:`s` with :math:`x` first, and there are two Jacobians, each as large as the
# weight for every sample and output. Or multiply :math:`s` with :math:`s'` and :math:`x` with :math:`x'` first, and
# there are two Gram matrices, which know nothing of the weight's size any more. The second is what ViViT does for all
# pairs of a batch. Between the two, the Gram matrix of :math:`x` can meet one :math:`s` after the other.

JACOBIANS, GRAMS, ONE_BY_ONE = "Jacobians first", "Gram matrices first", "one by one"
ORDERS = {  # which two operands to multiply; the product goes to the end of the list
    JACOBIANS: [(0, 1), (0, 1), (0, 1)],
    GRAMS: [(0, 2), (0, 1), (0, 1)],
    ONE_BY_ONE: [(1, 3), (0, 2), (0, 1)],
}


def cost(equation, sizes, order):
    """Operations of an einsum, a multiplication and an addition counted as two."""
    shapes = [[sizes[letter] for letter in term] for term in equation.split("->")[0].split(",")]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=order)
    return float(info.opt_cost)


def costs(equation, sizes):
    """Operations by order, and those of the cheapest of all orders."""
    found = {name: cost(equation, sizes, order) for name, order in ORDERS.items()}
    return {**found, "cheapest": cost(equation, sizes, "optimal")}


# %%
# A linear layer of 512 to 512 units, 16 samples in each set, and a growing number of outputs of the network:

LINEAR = "cno,ni,dmo,mi->nmcd"
print(f"{'outputs':>8}" + "".join(f"{name:>20}" for name in [*ORDERS, "cheapest"]) + "  (MFLOP)")
for outputs in (1, 10, 100):
    sizes = {"n": 16, "m": 16, "c": outputs, "d": outputs, "o": 512, "i": 512}
    row = costs(LINEAR, sizes)
    print(f"{outputs:>8}" + "".join(f"{value / 1e6:>20.4g}" for value in row.values()))
    if row["cheapest"] > min(row[name] for name in ORDERS):
        raise ValueError("the cheapest order should not be above these")

# %%
# The Gram matrices win by about the number of inputs: the last product of the Jacobians sums over ``o`` and ``i`` for
# each pair of samples and outputs, while that of the Gram matrices sums over nothing.
#
# All orders give the same kernel:

operands = [torch.randn(3, 4, 8), torch.randn(4, 6), torch.randn(3, 5, 8), torch.randn(5, 6)]
kernels = [opt_einsum.contract(LINEAR, *operands, optimize=order) for order in ORDERS.values()]
for kernel in kernels[1:]:
    torch.testing.assert_close(kernel, kernels[0], atol=1e-4, rtol=1e-4)

# %%
# A convolution
# -------------
#
# The weight of a convolution is used at each position ``p`` of the image, and its Jacobian sums over them:
# ``cnop,nip->cnoi``, where ``i`` runs over channels and window. The positions of two images have to be paired before
# they are summed, so the Gram matrices now have :math:`P^2` entries for each pair of samples. On large images, it is
# cheaper to sum over the positions first, which is to form the Jacobians. Here are 64 channels, a 3 x 3 window, 16 x 16
# samples, 10 outputs, and images of growing size:

CONVOLUTION = "cnop,nip,dmoq,miq->nmcd"
SIDES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
curves = {name: [] for name in [*ORDERS, "cheapest"]}
for side in SIDES:
    sizes = {"n": 16, "m": 16, "c": 10, "d": 10, "o": 64, "i": 64 * 9, "p": side**2, "q": side**2}
    for name, value in costs(CONVOLUTION, sizes).items():
        curves[name].append(value / 1e9)

figure, ax = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
ax.plot(SIDES, curves["cheapest"], color="0.8", linewidth=8, label="cheapest order")
for (name, color), marker in zip(zip(ORDERS, COLORS, strict=False), "os^", strict=True):
    ax.plot(SIDES, curves[name], marker=marker, color=color, label=name)
ax.set(xscale="log", yscale="log", xlabel="side of the image", ylabel="GFLOP of one layer's kernel")
ax.set_xticks(SIDES, [str(side) for side in SIDES])
ax.minorticks_off()
ax.set(title="A convolution of 64 to 64 channels")
ax.legend()
plt.show()

if curves["cheapest"][0] == curves[JACOBIANS][0] or curves["cheapest"][-1] != curves[JACOBIANS][-1]:
    raise ValueError("Gram matrices should win on small images, and Jacobians on large ones")

# %%
# No order is best everywhere. A library that always forms Jacobians pays on the left, and one that always forms Gram
# matrices pays on the right.
#
# A network
# ---------
#
# :func:`ggn_ntk.explain` shows the order that was found for each parameter of a network, without contracting anything.
# Each step is an einsum, in which ``n`` and ``m`` stand for samples and ``c`` and ``d`` for outputs, as above. In front
# of them are the layer that uses the parameter, and what all steps cost; ``sort="flops"`` would put the most costly
# parameters first. The first convolution sees 32 x 32 pixels, the second 8 x 8 and the third 2 x 2.

net = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(4),
    nn.Conv2d(64, 128, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(4),
    nn.Conv2d(128, 256, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(1024, 10),
)
x1, x2 = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
explanation = explain(net, x1, x2)
print(explanation)

# %%
# The kernel of the first convolution multiplies Jacobians, steps ``na..,cn..`` and ``ma..,dm..``, which pair no two
# samples. Those of the others begin with a Gram matrix of inputs, a step from ``n`` and ``m``. The last layer is the
# same for all samples up to its input (there is no nonlinearity behind it), so its ``s`` carries no letter for samples.
#
# Three outputs from one rule
# ---------------------------
#
# A diagonal sets ``d`` to ``c``, and a trace sums over it as well. These are other einsums with other cheapest orders,
# and none of them forms the full kernel first.

for compute in ("full", "diagonal", "trace"):
    total = sum(c.flops for c in explain(net, x1, x2, compute=compute).contractions)
    print(f"{compute:>9}: {total / 1e9:.2f} GFLOP")

# %%
# What is counted here is the arithmetic of the contractions. How it is turned into matrix products that read memory in
# long runs, and into blocks of samples that fit into a cache, is described in :doc:`/architecture`. Costs of this kind
# are the subject of Novak, Sohl-Dickstein, Schoenholz, `Fast Finite Width Neural Tangent Kernel
# <https://arxiv.org/abs/2206.08720>`_, ICML 2022, section 3.
