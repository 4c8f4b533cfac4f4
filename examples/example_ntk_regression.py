r"""
Regression with the NTK against the network itself
==================================================

**How good is regression with the kernel, compared with the network trained for real?**

A network that stayed linear in its parameters would end, after infinite training from outputs :math:`f_0`, at

.. math::
    f(x) = f_0(x) + \Theta(x, \mathbf{X}) \, \Theta(\mathbf{X}, \mathbf{X})^{-1} \, (y - f_0(\mathbf{X})) ,

which is kernel regression with the NTK on what is left to learn. How good is that, against the network trained for
real? This example compares the two on scikit-learn's digits, for growing training sets, and shows what the predictive
distribution of an ensemble adds.
"""

import math
import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ggn_ntk import EmpiricalKernels, empirical_ntk, ensemble
from ggn_ntk.plots import COLORS
from ggn_ntk.training import gradient_flow_mse, kernel_ridge_regression, ntk_ensemble

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
SIZES, TESTS, STEPS, NETWORKS = ([20, 60], 100, 100, 5) if REDUCED else ([25, 50, 100, 200, 400], 500, 500, 10)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# %%
# Data and network
# ----------------

digits = load_digits()
order = torch.randperm(len(digits.target))
x = torch.tensor(digits.images, dtype=torch.float32)[order, None].to(device) / 16
labels = torch.tensor(digits.target)[order].to(device)
y = F.one_hot(labels, 10).float() - 0.1
x_test, labels_test = x[-TESTS:], labels[-TESTS:]


def network():
    """A small convolutional network."""
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)).to(device)


def accuracy(outputs):
    """The share of test samples whose largest output is their class."""
    return (outputs.argmax(-1) == labels_test).double().mean().item()


# %%
# Kernels
# -------
#
# The mean over outputs of the NTK takes the place of the full kernel: one matrix for all ten outputs, a hundred times
# smaller. It is exact in the limit of infinite width. All kernels of training samples are blocks of one.

model = network()
with torch.no_grad():
    f_all, f_test = model(x[: max(SIZES)]), model(x_test)
k_all = empirical_ntk(model, x[: max(SIZES)], compute="trace") / 10
k_test = empirical_ntk(model, x_test, x[: max(SIZES)], compute="trace") / 10

# %%
# Regression and training
# -----------------------


def train(model, n):
    """Train a network on n samples with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        batch = torch.randint(n, (min(n, 128),), device=device)
        optimizer.zero_grad()
        (model(x[batch]) - y[batch]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model(x_test)


results = {"kernel regression": [], "linearized network": [], "trained network": []}
for n in SIZES:
    regression = kernel_ridge_regression(k_all[:n, :n], y[:n], diag_reg=1e-4)
    results["kernel regression"].append(accuracy(regression(k_test[:, :n])))
    flow = gradient_flow_mse(k_all[:n, :n], y[:n], diag_reg=1e-4)
    _, limit = flow(math.inf, f_all[:n], f_test, k_test[:, :n])
    results["linearized network"].append(accuracy(limit))
    results["trained network"].append(accuracy(train(network(), n)))

print(f"{'samples':>20}" + "".join(f"{n:>8}" for n in SIZES))
for name, values in results.items():
    print(f"{name:>20}" + "".join(f"{value:>8.1%}" for value in values))

# %%
# An ensemble
# -----------
#
# Networks that start from different initialisations end at different functions. Of infinitely many wide ones, mean and
# covariance follow from the NTK and the NNGP kernel, both averaged over some initialisations here. Where the ensemble
# disagrees with itself, its predictions should be worse.

n = SIZES[1]
average = ensemble((network() for _ in range(NETWORKS)), x[:n], x_test, compute="trace").mean
train, cross = (EmpiricalKernels(*(k / 10 for k in pair)) for pair in (average.k_train_train, average.k_test_train))
predict = ntk_ensemble(train, y[:n], diag_reg=1e-4)
mean, covariance = predict(cross, average.nngp_test_test / 10)
deviation = covariance.diagonal().clamp(min=0).sqrt()
right = mean.argmax(-1) == labels_test
print(f"Ensemble on {n} samples: accuracy {accuracy(mean):.1%}")
print(f"Standard deviation where it is right {deviation[right].mean():.3f}, wrong {deviation[~right].mean():.3f}")

# %%
# Pictures
# --------
#
# Left: accuracy on test samples. Right: the accuracy of the ensemble on the test samples that it is most certain of.

figure, (left, right_ax) = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for (name, values), color, marker in zip(results.items(), COLORS, "os^", strict=False):
    left.plot(SIZES, values, marker=marker, color=color, label=name)
left.set(xscale="log", xlabel="training samples", ylabel="accuracy", title="Digits, test samples")
left.set_xticks(SIZES, [str(n) for n in SIZES])
left.minorticks_off()
left.legend()
certain_first = right[deviation.argsort()].double().cpu()
kept = torch.arange(1, TESTS + 1)
start = TESTS // 10
right_ax.plot((kept / TESTS)[start:], (certain_first.cumsum(0) / kept)[start:], color=COLORS[0])
right_ax.axhline(accuracy(mean), color="gray", linestyle="--", label="all test samples")
right_ax.set(xlabel="share of test samples, most certain first", ylabel="accuracy")
right_ax.set(title=f"Ensemble of networks, {n} training samples")
right_ax.legend()
plt.show()
