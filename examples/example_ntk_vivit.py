r"""
The empirical NTK from a GGN Gram matrix
========================================

**Is the NTK of a network really the Gram matrix of its generalized Gauss-Newton?**

The empirical neural tangent kernel (NTK) of a network :math:`f_\theta` with :math:`C` outputs compares two
inputs by how the network's outputs at them move with the parameters. With the Jacobian
:math:`\mathbf{J}(x) = \partial f_\theta(x) / \partial \theta \in \mathbb{R}^{C \times P}`, it is

.. math::
    \Theta(x_1, x_2) = \mathbf{J}(x_1) \, \mathbf{J}(x_2)^\top \in \mathbb{R}^{C \times C} .

This example computes it in three ways: twice with ``torch.func``, following the `PyTorch tutorial on neural
tangent kernels <https://pytorch.org/tutorials/intermediate/neural_tangent_kernels.html>`_, and once from the
generalized Gauss-Newton (GGN) matrix with `ViViT <https://arxiv.org/abs/2106.02624>`_, a
`BackPACK <https://backpack.pt>`_ extension.
"""

import os
import statistics
import time

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from torch import nn
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk import AccumulateGramHook, empirical_ntk_vivit
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products, relative_error

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
SIZE, REPEATS = (12, 1) if REDUCED else (32, 3)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# %%
# Set-up
# ------
#
# The tutorial's convolutional network, as a ``Sequential`` that BackPACK can follow, and two sets of images
# :math:`\mathbf{X}_1`, :math:`\mathbf{X}_2`.

net = nn.Sequential(
    nn.Conv2d(3, 32, 3),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3),
    nn.Flatten(),
    nn.Linear(32 * (SIZE - 6) ** 2, 10),
).to(device)
x_train = torch.randn(20, 3, SIZE, SIZE, device=device)
x_test = torch.randn(5, 3, SIZE, SIZE, device=device)

# %%
# Two ways with ``torch.func``
# ----------------------------
#
# **Jacobian contraction** builds the Jacobians of all samples and multiplies them. **NTK-vector products** never
# hold a Jacobian: the column :math:`\Theta(x_1, x_2) e_d` is the vector-Jacobian product
# :math:`\mathbf{J}(x_2)^\top e_d`, pushed through a Jacobian-vector product with :math:`\mathbf{J}(x_1)`.

ntk_contraction = jacobian_contraction(net, x_train, x_test)
ntk_products = ntk_vector_products(net, x_train, x_test)
print(f"Shape [N1, N2, C, C]: {list(ntk_contraction.shape)}")

# %%
# From the GGN to the NTK
# -----------------------
#
# For a loss :math:`\ell(f, y)`, convex in :math:`f`, and stacked inputs :math:`\mathbf{X} = (\mathbf{X}_1,
# \mathbf{X}_2)` with :math:`N = N_1 + N_2` samples, the GGN is
#
# .. math::
#     \mathbf{G} = \sum_n \mathbf{J}(x_n)^\top \, \mathbf{H}_n \, \mathbf{J}(x_n) = \mathbf{V} \mathbf{V}^\top ,
#     \qquad
#     \mathbf{V} = \left( \mathbf{J}(x_1)^\top \sqrt{\mathbf{H}_1}, \ldots, \mathbf{J}(x_N)^\top
#     \sqrt{\mathbf{H}_N} \right) \in \mathbb{R}^{P \times NC} ,
#
# with the loss Hessian :math:`\mathbf{H}_n = \nabla^2_f \ell(f_\theta(x_n), y_n)`. ViViT computes the other
# product, the Gram matrix :math:`\mathbf{V}^\top \mathbf{V} \in \mathbb{R}^{NC \times NC}`, as a sum over
# layers. Its blocks are :math:`\sqrt{\mathbf{H}_n} \, \Theta(x_n, x_m) \, \sqrt{\mathbf{H}_m}`.
#
# For ``MSELoss(reduction="sum")``, :math:`\ell(f, y) = \|f - y\|^2` has the Hessian :math:`\mathbf{H} = 2
# \mathbf{I}`, so
#
# .. math::
#     \sqrt{\mathbf{H}} = \sqrt{2} \, \mathbf{I}
#     \qquad \text{and} \qquad
#     \Theta(x_n, x_m) = \tfrac{1}{2} \left[ \mathbf{V}^\top \mathbf{V} \right]_{nm} .
#
# (The text of ViViT's published example has :math:`\sqrt{\mathbf{H}} = 2 \mathbf{I}`. Its code, which halves the
# Gram matrix, is right.) The target plays no part: it does not enter the Hessian. What remains is to reorder the
# axes from ``[C, N, C, N]`` to ``[N, N, C, C]`` and to cut out the block of :math:`\mathbf{X}_1` against
# :math:`\mathbf{X}_2`.

ntk_vivit = empirical_ntk_vivit(net, x_train, x_test)

# %%
# In a pipeline of your own
# -------------------------
#
# ``empirical_ntk_vivit`` cleans up after itself. Where BackPACK runs anyway, the same kernel comes for little
# extra from a hook, beside whatever other extensions are active:

net_extended, loss_func = extend(net), extend(nn.MSELoss(reduction="sum"))
hook = AccumulateGramHook()
with backpack(ViViTGGNExact(), extension_hook=hook):
    output = net_extended(torch.cat([x_train, x_test]))
    loss_func(output, torch.zeros_like(output)).backward()
ntk_hook = hook.ntk(len(x_train), loss=loss_func)

# %%
# Check
# -----
#
# All kernels agree with the one in double precision up to rounding.

kernels = {
    "Jacobian contraction": ntk_contraction,
    "NTK-vector products": ntk_products,
    "ViViT": ntk_vivit,
    "ViViT, by the hook": ntk_hook,
}
oracle = jacobian_contraction(net.double(), x_train.double(), x_test.double())
net.float()
for name, kernel in kernels.items():
    error = relative_error(kernel, oracle)
    print(f"{name:<22} relative error {error:.1e}")
    if error > 1e-6:
        raise ValueError(f"{name} does not match")

# %%
# Run time
# --------
#
# The median of several runs, after one to warm up (the kernels above), taking turns.

runs = {
    "Jacobian contraction": jacobian_contraction,
    "NTK-vector products": ntk_vector_products,
    "ViViT": empirical_ntk_vivit,
}
times = {name: [] for name in runs}
for _ in range(REPEATS):
    for name, run in runs.items():
        start = time.perf_counter()
        run(net, x_train, x_test).sum().item()  # item() waits for a GPU
        times[name].append(time.perf_counter() - start)
medians = {name: statistics.median(values) for name, values in times.items()}
for name, seconds in medians.items():
    print(f"{name:<22} {seconds:.3f} s ({seconds / min(medians.values()):.1f}x)")

# %%
# ViViT contracts all :math:`(N_1 + N_2)^2` pairs of samples to use :math:`N_1 N_2` of them, and backpropagates
# through convolutions with generic code. It pays off where its Gram matrices come for free, as in the pipeline
# above, and in fully-connected networks, where it never builds a Jacobian.

# %%
# A picture
# ---------
#
# Each pair of samples has a :math:`10 \times 10` kernel. Left: the one of the first pair. Right: the trace over
# outputs, for all pairs.

figure, (left, right) = plt.subplots(ncols=2, figsize=(9, 3), layout="constrained", width_ratios=(1, 2))
image = left.imshow(ntk_vivit[0, 0].cpu().numpy())
left.set(title="One pair of samples", xlabel="output of x2", ylabel="output of x1")
figure.colorbar(image)
image = right.imshow(ntk_vivit.diagonal(dim1=2, dim2=3).sum(-1).T.cpu().numpy())
right.set(title="Trace, all pairs", xlabel="sample of x1", ylabel="sample of x2")
right.locator_params(integer=True)
figure.colorbar(image)
plt.show()
