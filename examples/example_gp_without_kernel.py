r"""
A Gaussian process on 5,000 digits, without their kernel
========================================================

**How does regression with the full kernel of thousands of images work where that kernel does not fit?**

The linearization of a network with normal parameters is a Gaussian process, whose covariance is the NTK. Its mean and
its variance at test samples are

.. math::
    \mu = \Theta_* (\Theta + \sigma^2)^{-1} y ,
    \qquad v = \operatorname{diag} \bigl( \Theta_{**} - \Theta_* (\Theta + \sigma^2)^{-1} \Theta_*^\top \bigr) .

For 5,000 images and ten classes, :math:`\Theta` has 50,000 rows: 20 GB in double precision. Conjugate gradients need no
more of it than its products with vectors, and :class:`~ggn_ntk.operators.NTKOperator` computes those from the network,
at the price of a forward and two backward passes.
"""

import os
import time
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ggn_ntk import empirical_ntk
from ggn_ntk.operators import NTKOperator, as_matrix
from ggn_ntk.plots import COLORS

with warnings.catch_warnings():  # linear_operator, which curvlinops imports, uses what torch deprecates
    warnings.simplefilter("ignore")
    from curvlinops import CGInverseLinearOperator
    from linear_operator.utils.warnings import NumericalWarning

warnings.simplefilter("ignore", NumericalWarning)  # where rounding keeps a system above the tolerance that is asked for

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
SIZES, DENSE, TESTS, FEW = ([40, 80], 80, 40, 2) if REDUCED else ([100, 200, 500, 1000, 2000, 5000], 500, 500, 6)

torch.manual_seed(0)

# %%
# Data and network
# ----------------
#
# Training images are also shifted by a pixel to either side, which makes 5,000 of them. Test images come as they are.

digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.images)[order] / 16, torch.tensor(digits.target)[order]
x_test, labels_test = images[-TESTS:].flatten(1), labels[-TESTS:]
shifted = [images[:-TESTS].roll(shift, (1, 2)) for shift in ((0, 0), (0, 1), (1, 0), (0, -1))]
x = torch.stack(shifted, 1).flatten(0, 1).flatten(1)
y = F.one_hot(labels[:-TESTS].repeat_interleave(4), 10).double() - 0.1
order = torch.randperm(len(x))
x, y = x[order], y[order]

net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).double()
noise = 0.3 * NTKOperator(net, x[:100]).diagonal().mean().item()

# %%
# The mean, for more and more images
# ----------------------------------


def inverse_of(kernel):
    """The inverse of a kernel with noise, by conjugate gradients."""
    return CGInverseLinearOperator(kernel + noise * kernel.identity(), eps=0, tolerance=1e-4, max_iter=1000)


def accuracy(mean):
    """The share of test samples whose largest output is their class."""
    return (mean.argmax(1) == labels_test).double().mean().item()


print(f"{'N':>5} {'seconds':>8} {'kernel, GB':>11} {'accuracy':>9}")
seconds, accuracies = [], []
for n in SIZES:
    start = time.perf_counter()
    kernel = NTKOperator(net, x[:n])
    weights = inverse_of(kernel) @ y[:n].flatten()
    mean = NTKOperator(net, x_test, x[:n]) @ weights.reshape(n, 10)
    seconds.append(time.perf_counter() - start)
    accuracies.append(accuracy(mean))
    print(f"{n:5} {seconds[-1]:8.1f} {8e-9 * (10 * n) ** 2:11.3f} {accuracies[-1]:9.1%}")

# %%
# With the kernel itself, by Cholesky's factorisation, the numbers are the same.

dense_seconds = []
dense_sizes = [n for n in SIZES if n <= DENSE]
for n in dense_sizes:
    start = time.perf_counter()
    matrix = as_matrix(empirical_ntk(net, x[:n])) + noise * torch.eye(10 * n)
    weights = torch.cholesky_solve(y[:n].reshape(-1, 1), torch.linalg.cholesky(matrix)).flatten()
    dense = as_matrix(empirical_ntk(net, x_test, x[:n])) @ weights
    dense_seconds.append(time.perf_counter() - start)
by_operator = NTKOperator(net, x_test, x[:n]) @ (inverse_of(NTKOperator(net, x[:n])) @ y[:n].flatten())
error = ((by_operator - dense).norm() / dense.norm()).item()
print(f"N = {n}: conjugate gradients are {error:.0e} off the dense solution")
if not error < 1e-3:
    raise ValueError("Both should solve the same system")

# %%
# Uncertainty
# -----------
#
# The variance of an output takes a system of its own, and all of them are solved together. Here from fewer images, for
# those test images whose largest output is the largest of all, and for those where it is the smallest.

n = SIZES[-1] if REDUCED else 1000
mean = (NTKOperator(net, x_test, x[:n]) @ (inverse_of(NTKOperator(net, x[:n])) @ y[:n].flatten())).reshape(-1, 10)
certainty = mean.amax(1)
chosen = torch.cat([certainty.topk(FEW).indices, certainty.topk(FEW, largest=False).indices])
best = mean[chosen].argmax(1)
start = time.perf_counter()
inverse = inverse_of(NTKOperator(net, x[:n]))
rows = torch.arange(len(chosen)) * 10 + best  # of each image, the output of the class that it is taken for
columns = torch.zeros(10 * len(chosen), len(chosen)).double()
columns[rows, torch.arange(len(chosen))] = 1
columns = NTKOperator(net, x[:n], x_test[chosen]) @ columns  # [N C, images], without the kernel of all outputs
prior = NTKOperator(net, x_test[chosen]).diagonal()[rows]
deviation = (prior - (columns * (inverse @ columns)).sum(0)).sqrt()
print(f"{len(chosen)} standard deviations from {n} images in {time.perf_counter() - start:.1f} s")

# %%
# Time grows by N for each product, and memory not at all.

figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
left.loglog(SIZES, seconds, "o-", color=COLORS[0], label="by operator")
left.loglog(dense_sizes, dense_seconds, "s--", color=COLORS[1], label="with the kernel, by Cholesky")
left.set(xlabel="training images N", ylabel="seconds", title="Time to solve for the mean")
left.legend()
right.semilogx(SIZES, [1 - a for a in accuracies], "o-", color=COLORS[0])
right.set(xlabel="training images N", title="Share of test images that the mean gets wrong", ylim=(0, None))
plt.show()

# %%
# Where no class stands out, the digit is often another. Deviations are on the scale of the kernel at the start: they
# are to be compared with one another.

figure, axes = plt.subplots(2, FEW, figsize=(10, 2.9), layout="constrained", squeeze=False)
for ax, i, digit, spread in zip(axes.flat, chosen.tolist(), best.tolist(), deviation.tolist(), strict=True):
    right_class = digit == labels_test[i].item()
    ax.imshow(x_test[i].reshape(8, 8).numpy(), cmap="gray_r")
    ax.set(xticks=[], yticks=[])
    ax.set_title(
        f"{digit}: {mean[i, digit] + 0.1:.2f}\n±{spread:.2f}", fontsize=8, color="black" if right_class else "tab:red"
    )
axes[0, 0].set_ylabel("large", fontsize=9)
axes[1, 0].set_ylabel("small", fontsize=9)
figure.suptitle(
    "Output of the class that is taken, largest and smallest, with its standard deviation (red: wrong class)"
)
plt.show()

if not (REDUCED or accuracies[-1] > 0.95):
    raise ValueError("Thousands of digits should be enough to tell them apart")
