r"""
Projected features beside the exact kernel
==========================================

**How many random directions does it take until features stand for the kernel?**

An entry of the kernel is an inner product of Jacobians, which are as long as the network has parameters. Random
directions :math:`r_1, \ldots, r_k` make it one of :math:`k` numbers,

.. math::
    \Theta(x, x') \approx \phi(x)^\top \phi(x') ,
    \qquad \phi_j(x) = \frac{1}{\sqrt{k}} J(x) \, r_j ,

right in the mean, with an error that falls with :math:`\sqrt{k}`. Methods for data attribution keep such features of
millions of samples. Here the exact kernel is at hand, so that the error shows, and what it does to regression.
"""

import os
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ggn_ntk import empirical_ntk
from ggn_ntk.features import projected_features
from ggn_ntk.plots import COLORS
from ggn_ntk.training import kernel_ridge_regression

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
TRAIN, TEST, DIMS, SEEDS = (40, 20, [8, 32], 2) if REDUCED else (200, 200, [16, 64, 256, 1024], 4)

torch.manual_seed(0)

# %%
# The exact kernel
# ----------------
#
# Of a convolutional network at images of digits: the trace over its ten outputs, between test and training images and
# of the latter among themselves.

digits = load_digits()
chosen = torch.randperm(len(digits.target))[: TRAIN + TEST]
x = torch.tensor(digits.images, dtype=torch.float32)[chosen].unsqueeze(1) / 16
labels = torch.tensor(digits.target)[chosen]
x_train, x_test, y_train = x[:TRAIN], x[TRAIN:], F.one_hot(labels[:TRAIN], 10).float() - 0.1

net = nn.Sequential(
    nn.Conv2d(1, 32, 3),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
start = time.perf_counter()
exact, exact_train = empirical_ntk(net, x_test, x_train, compute="trace"), empirical_ntk(net, x_train, compute="trace")
print(
    f"{sum(p.numel() for p in net.parameters()):,} parameters; exact kernels took {time.perf_counter() - start:.1f} s"
)


def accuracy(test, train):
    """The share of test images that regression with a kernel puts into their class."""
    mean = kernel_ridge_regression(train, y_train, diag_reg=1e-2)(test)
    return (mean.argmax(1) == labels[TRAIN:]).float().mean().item()


# %%
# Error against dimension
# -----------------------
#
# By ``"kronecker"``, a direction for a layer is a product of a vector for its outputs and one for its inputs, and no
# Jacobian is formed. By ``"dense"``, all its entries are independent, which costs more and errs less.
# ``standard_error`` of :class:`~ggn_ntk.features.ProjectedFeatures` knows nothing of the exact kernel.


def relative(error):
    """Compare errors of all entries with the kernel."""
    return (error.norm() / exact.norm()).item()


found = {}
print(f"{'projection':>10} {'dim':>5} {'seconds':>8} {'error':>7} {'estimated':>9} {'accuracy':>9}")
for kind in ("kronecker", "dense"):
    for dim in DIMS:
        runs = []
        for seed in range(SEEDS):
            start = time.perf_counter()
            train, test = (projected_features(net, x, dim=dim, projection=kind, seed=seed) for x in (x_train, x_test))
            kernel = test.kernel(train, compute="trace")
            seconds = time.perf_counter() - start
            estimated = test.standard_error(train, compute="trace")
            scores = accuracy(kernel, train.kernel(compute="trace"))
            runs.append((seconds, relative(kernel - exact), relative(estimated), scores))
        found[kind, dim] = torch.tensor(runs).mean(0).tolist()
        seconds, error, estimated, scores = found[kind, dim]
        print(f"{kind:>10} {dim:5} {seconds:8.2f} {error:7.1%} {estimated:9.1%} {scores:9.1%}")

# %%
# Four times as many directions halve the error, and what is estimated of it without the kernel agrees. For regression,
# a few hundred are as good as the kernel, and its features take a small part of the memory of Jacobians.

best = accuracy(exact, exact_train)
figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for kind, color, marker in (("kronecker", COLORS[0], "o"), ("dense", COLORS[1], "s")):
    columns = list(zip(*(found[kind, dim] for dim in DIMS), strict=True))
    left.loglog(DIMS, columns[1], marker, color=color, label=f"{kind}: error")
    left.loglog(DIMS, columns[2], "-", color=color, label=f"{kind}: estimated without the kernel")
    right.semilogx(DIMS, columns[3], f"{marker}-", color=color, label=kind)
left.set(xlabel="directions", title="Relative error of the kernel")
left.legend(loc="upper right")
right.axhline(best, color="0.5", linestyle="--", label="exact kernel")
right.set(xlabel="directions", title="Share of test images that regression gets right")
right.legend()
plt.show()

kinds, last = ("kronecker", "dense"), DIMS[-1]
if not (REDUCED or all(0.4 < found[kind, dim][1] / found[kind, dim][2] < 2.5 for kind in kinds for dim in DIMS)):
    raise ValueError("The error that is estimated should be the error")
if not all(found[kind, last][1] < 0.6 * found[kind, DIMS[0]][1] for kind in kinds):
    raise ValueError("More directions should err less")
