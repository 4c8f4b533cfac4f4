r"""
A large kernel in tiles, killed and resumed
===========================================

**What happens to a kernel of hours when its process is killed?**

Nothing: each tile of it is on disk as soon as it is computed, and the same call goes on with those that are missing.
This example computes the kernel of a small convolutional network at all 1,797 of scikit-learn's digits, kills the
process half-way, and goes on. A kernel of 60,000 x 50,000 images takes the same calls and more time.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from ggn_ntk import KernelStore
from ggn_ntk.training import kernel_ridge_regression

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
SAMPLES, TILE = (60, 12) if REDUCED else (1797, 128)

# %%
# One call
# --------
#
# A script, as it would be run on a cluster. The call names a folder; all else is as for ``empirical_ntk``. The digits
# are sorted by their label, so that the kernel shows classes as blocks.

path = Path(tempfile.mkdtemp()) / "digits.zarr"
SCRIPT = f"""
import torch
from sklearn.datasets import load_digits
from torch import nn
from ggn_ntk import tiled_ntk

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(512, 10),
)
digits = load_digits()
order = torch.tensor(digits.target[:{SAMPLES}]).argsort(stable=True)
x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
store = tiled_ntk(model, x, store={str(path)!r}, compute="trace", tile={TILE})
"""

# %%
# Killed
# ------
#
# Another process runs it. ``SIGKILL`` stops a process at whatever it does, without a chance to put anything in order.

tiles = (-(-SAMPLES // TILE)) ** 2
process = subprocess.Popen([sys.executable, "-c", SCRIPT])
while process.poll() is None:
    if (path / "zarr.json").exists() and len(KernelStore(path).missing()) < tiles / 2:
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
stopped = KernelStore(path)
partly = stopped[...]  # what is missing reads as NaN
print(stopped)

# %%
# Resumed
# -------
#
# The same script goes on, here in this process. It finds a store that was made of the same model, weights, samples and
# keywords, which it compares by content, and computes what is missing.

exec(SCRIPT, {})
store = KernelStore(path)
kernel = store[...]
print(store, store.plan, sep="\n")

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for ax, values, title in zip(axes, (partly, kernel), ("as it was killed", "in the end"), strict=True):
    image = ax.imshow(values, vmin=0, vmax=float(kernel.max()))
    ax.set(title=title, xlabel="digit, sorted by label")
axes[0].set(ylabel="digit, sorted by label")
figure.colorbar(image, ax=axes, label="trace of the NTK")
plt.show()

# %%
# Used
# ----
#
# A store is read like an array, and what takes kernels takes stores. Here is regression with the kernel, trained on
# three quarters of the digits.

digits = load_digits()
order = torch.tensor(digits.target[:SAMPLES]).argsort(stable=True)
labels = torch.tensor(digits.target)[order]
shuffled = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
train, test = shuffled[: SAMPLES * 3 // 4], shuffled[SAMPLES * 3 // 4 :]
k = store.to_torch().double() / 10  # the mean over outputs
predict = kernel_ridge_regression(k[train][:, train], F.one_hot(labels[train], 10).double(), diag_reg=1e-3)
accuracy = (predict(k[test][:, train]).argmax(1) == labels[test]).double().mean().item()
print(f"{accuracy:.1%} of {len(test)} digits are recognised, by a network that was never trained")
