r"""
The kernel learns too: spectrum and alignment through training
==============================================================

**What does a kernel learn while its network does?**

In the limit of infinite width, the neural tangent kernel stays what it was at initialisation. A real network's does
not: as it trains, its kernel grows, more of its eigenvalues come to matter, and it aligns with the targets. This
example follows the kernel of a small convolutional network through training on scikit-learn's digits.
"""

import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ggn_ntk import empirical_ntk
from ggn_ntk.plots import plot_alignment, plot_kernel, plot_spectrum
from ggn_ntk.spectrum import (
    centered_kernel_alignment,
    effective_rank,
    eigenvalues,
    kernel_target_alignment,
    relative_kernel_change,
)

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
SAMPLES, STEPS = (40, 60) if REDUCED else (150, 300)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# %%
# Set-up
# ------
#
# Images of 8 x 8 pixels, and one-hot targets. The kernels are those of a part of the training set, in double precision,
# so that small eigenvalues are exact.

digits = load_digits()
order = torch.randperm(len(digits.target))[:1000]
x = torch.tensor(digits.images, dtype=torch.float32)[order, None].to(device) / 16
labels = torch.tensor(digits.target)[order].to(device)
y = F.one_hot(labels, 10).float()
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
).to(device)


def trace_kernel():
    """The mean over outputs of the kernel at some training samples."""
    kernel = empirical_ntk(model.double(), x[:SAMPLES].double(), compute="trace") / 10
    model.float()
    return kernel


# %%
# Training
# --------
#
# Kernels are kept at steps that grow geometrically: most happens early.

checkpoints = sorted({0, STEPS} | {round(STEPS ** (i / 12)) for i in range(12)})
kernels = {0: trace_kernel()}
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(1, STEPS + 1):
    batch = torch.randint(len(x), (128,), device=device)
    optimizer.zero_grad()
    (model(x[batch]) - y[batch]).square().mean().backward()
    optimizer.step()
    if step in checkpoints:
        kernels[step] = trace_kernel()
first, last = kernels[0], kernels[STEPS]
with torch.no_grad():
    accuracy = (model(x).argmax(1) == labels).double().mean().item()
print(f"Accuracy on the training set: {accuracy:.1%}")

# %%
# Before and after
# ----------------
#
# Sorted by class, the kernel after training shows what training was about: it is large within classes.

figure, axes = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
for ax, kernel, when in zip(axes, (first, last), ("before", "after"), strict=True):
    plot_kernel(kernel, labels[:SAMPLES], ax=ax)
    ax.set_title(f"The kernel {when} training")
plt.show()

# %%
# Spectrum and alignment
# ----------------------
#
# Left: eigenvalues. Right: alignment with the targets rises, and alignment with the kernel before training falls. The
# largest eigenvalue belongs to functions that are almost constant, which the centred alignment of two kernels leaves
# out.

targets = y[:SAMPLES].double() - y[:SAMPLES].double().mean(0)
target_kernel = targets @ targets.T
steps = torch.tensor(list(kernels))
alignments = {
    "with the targets, centred": [centered_kernel_alignment(kernel, target_kernel) for kernel in kernels.values()],
    "with the targets": [kernel_target_alignment(kernel, targets) for kernel in kernels.values()],
    "with the first kernel, centred": [centered_kernel_alignment(kernel, first) for kernel in kernels.values()],
}

figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
spectra = {f"step {step}": eigenvalues(kernels[step]) for step in (0, checkpoints[len(checkpoints) // 2], STEPS)}
plot_spectrum(spectra, ax=left)
left.set_title("Eigenvalues")
plot_alignment(steps, alignments, ax=right)
right.set_title("Alignment")
right.set_xscale("symlog", linthresh=1)
right.set_xlim(0, STEPS)
right.legend(loc=(0.02, 0.2))
plt.show()

# %%
# In numbers
# ----------
#
# The effective rank by either definition tells how many directions of function space train at a comparable speed.

print(f"{'step':>5} {'change':>8} {'rank (entropy)':>15} {'rank (participation)':>21}")
for step, kernel in kernels.items():
    ranks = effective_rank(kernel), effective_rank(kernel, "participation")
    print(f"{step:>5} {relative_kernel_change(first, kernel):>8.2f} {ranks[0]:>15.1f} {ranks[1]:>21.2f}")

if not alignments["with the targets"][-1] > alignments["with the targets"][0]:
    raise ValueError("The kernel should align with the targets")
