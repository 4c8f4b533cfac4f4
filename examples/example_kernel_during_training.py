r"""
A kernel at every step: what training does to the network that it trains
========================================================================

**What does the kernel at every step say of training that the kernel at the start does not?**

A step of gradient descent on the loss :math:`\tfrac{1}{2} \operatorname{mean} (f - y)^2` moves the outputs of a network
by

.. math::
    f_{s+1} - f_s \approx - \frac{\eta}{N} \, \Theta_s \, (f_s - y) ,

with the kernel :math:`\Theta_s` of that very step. The kernel at initialisation says where training would lead if it
stayed; the kernel at every step says why it does not lead there. This example computes it at each of a hundred steps of
a small network, and looks at how it aligns with the targets, and at its largest eigenvalue.
"""

import os

import matplotlib.pyplot as plt
import torch
from torch import nn

from ggn_ntk import empirical_ntk_fn
from ggn_ntk.plots import COLORS, plot_alignment
from ggn_ntk.spectrum import centered_kernel_alignment, relative_kernel_change
from ggn_ntk.training import gradient_descent_mse, max_learning_rate

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
STEPS = 20 if REDUCED else 100

torch.manual_seed(0)

# %%
# Set-up
# ------
#
# Points in the plane, whose class is the sign of the product of their coordinates: no linear function of the points
# tells the classes apart. The learning rate is a quarter of the largest at which the linearized network would converge.

N = 40
x = torch.randn(N, 2, dtype=torch.float64)
y = (x[:, :1] * x[:, 1:]).sign()
x, y = x[y[:, 0].argsort()], y.sort(0).values
model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).double()
kernel_of = empirical_ntk_fn(model)
first = kernel_of(x)  # [N, N, 1, 1]
rate = max_learning_rate(first) / 4

# %%
# Training
# --------
#
# The loop that one would write anyway, with one line for the kernel. The model was looked at once, above: what a kernel
# takes at each step is a small part of that.

kernels, outputs = [], []
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
for _ in range(STEPS + 1):
    kernels.append(kernel_of(x))
    f = model(x)
    outputs.append(f.detach())
    optimizer.zero_grad()
    ((f - y).square().mean() / 2).backward()
    optimizer.step()
f = torch.stack(outputs)  # [STEPS + 1, N, 1]
losses = (f - y).square().mean((1, 2)) / 2

# %%
# One step ahead, and all steps ahead
# -----------------------------------
#
# From the outputs of a step and its kernel, the outputs of the next follow up to the curvature of the network.
# From the first kernel alone, the whole curve follows for the linearized network, which learns more slowly.

next_outputs = [
    gradient_descent_mse(kernel, y, learning_rate=rate)(1, before) for kernel, before in zip(kernels, f, strict=True)
]
one_ahead = (torch.stack(next_outputs)[:-1] - y).square().mean((1, 2)) / 2
linearized = gradient_descent_mse(first, y, learning_rate=rate)(range(STEPS + 1), f[0])
all_ahead = (linearized - y).square().mean((1, 2)) / 2
error = (one_ahead - losses[1:]).abs().mean() / (losses[1:] - losses[:-1]).abs().mean()
print(f"Loss: from {losses[0]:.3f} to {losses[-1]:.3f}; of the linearized network, to {all_ahead[-1]:.3f}")
print(f"Error of one step ahead, of the change of the loss in a step: {error:.1%}")

# %%
# What happens to the kernel
# --------------------------
#
# Left: losses. Middle: the kernel turns away from what it was, towards the targets. Right: its largest eigenvalue, in
# units of N over the learning rate, grows until it comes close to 2, above which a step overshoots, and stays there
# (Cohen, Kaur, Li, Kolter, Talwalkar: "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
# ICLR 2021). The learning rate was small for the first kernel; it is not for the last.

steps = range(STEPS + 1)
target_kernel = (y @ y.T)[..., None, None]
alignments = {
    "with the targets": [centered_kernel_alignment(kernel, target_kernel) for kernel in kernels],
    "with the first kernel": [centered_kernel_alignment(kernel, first) for kernel in kernels],
}
largest = [2 * rate / max_learning_rate(kernel) for kernel in kernels]

figure, (left, middle, right) = plt.subplots(ncols=3, figsize=(13, 4), layout="constrained")
left.plot(steps, losses, color=COLORS[0], label="trained")
left.plot(range(1, STEPS + 1), one_ahead, ".", color=COLORS[0], markersize=4, label="a step ahead, by its kernel")
left.plot(steps, all_ahead, "--", color=COLORS[1], label="all steps ahead, by the first kernel")
left.set(xlabel="step", ylabel="loss", ylim=(0, None), title="Training")
left.legend()
plot_alignment(steps, alignments, ax=middle)
middle.set_title("Alignment, centred")
right.plot(steps, largest, color=COLORS[0])
right.axhline(2, color="gray", linestyle="--", label="a step overshoots")
right.set(xlabel="step", ylabel=r"$\eta \, \lambda_{\max} / N$", title="Largest eigenvalue", ylim=(0, None))
right.legend()
plt.show()
print(f"The kernel has changed by {relative_kernel_change(first, kernels[-1]):.0%}")

if not alignments["with the targets"][-1] > alignments["with the targets"][0]:
    raise ValueError("The kernel should align with the targets")
