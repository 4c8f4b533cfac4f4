r"""
Predicting the training of a wide network
=========================================

**How wide must a network be for its kernel to predict how it trains?**

Near its initialisation :math:`\theta_0`, a network is almost linear in its parameters,

.. math::
    f_\theta(x) \approx f_{\theta_0}(x) + \mathbf{J}(x) \, (\theta - \theta_0) ,

and the wider it is, the less its parameters have to move to fit the data. How the linearization trains can be read off
the empirical NTK :math:`\Theta` at :math:`\theta_0`, without training anything. Under the loss :math:`\tfrac{1}{2}
\operatorname{mean} (f - y)^2` over all :math:`NC` entries, a step of gradient descent with learning rate :math:`\eta`
takes the outputs at the training samples from :math:`f` to

.. math::
    f - \tfrac{\eta}{NC} \, \Theta \, (f - y) .

This example predicts the training of fully-connected networks on scikit-learn's digits, and compares it with the
training itself, for one width over time and for many widths after training.
"""

import os

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ggn_ntk import empirical_ntk, linearize
from ggn_ntk.plots import plot_training
from ggn_ntk.training import gradient_descent_mse, max_learning_rate

REDUCED = os.environ.get("GGN_NTK_GALLERY") == "reduced"  # a smaller run, for tests
SAMPLES, STEPS, SEEDS = (30, 60, 2) if REDUCED else (80, 200, 3)
WIDTHS = [64, 256, 512] if REDUCED else [64, 128, 256, 512, 1024, 2048]

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# %%
# Data
# ----
#
# Images of 8 x 8 pixels, and one-hot targets with mean zero.

digits = load_digits()
order = torch.randperm(len(digits.target))[: 2 * SAMPLES]
x = torch.tensor(digits.data, dtype=torch.float32)[order].to(device) / 16
y = F.one_hot(torch.tensor(digits.target)[order], 10).float().to(device) - 0.1
x_train, x_test, y_train, y_test = x[:SAMPLES], x[SAMPLES:], y[:SAMPLES], y[SAMPLES:]


def network(width):
    """Two hidden layers."""
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).to(device)


def outputs(model):
    """The network's outputs at all samples."""
    with torch.no_grad():
        return model(x_train), model(x_test)


# %%
# Prediction
# ----------
#
# Two kernels and the outputs before training are all it takes. The learning rate is a quarter of the largest at which
# the linearization converges.


def predict(model, steps):
    """The learning rate, and the outputs after some steps by the linearization."""
    k_train_train = empirical_ntk(model, x_train)
    k_test_train = empirical_ntk(model, x_test, x_train)
    learning_rate = max_learning_rate(k_train_train) / 4
    predictor = gradient_descent_mse(k_train_train, y_train, learning_rate=learning_rate)
    return learning_rate, predictor(steps, *outputs(model), k_test_train)


# %%
# Training
# --------
#
# Plain gradient descent on the network itself.


def train(model, learning_rate, record):
    """The outputs at steps that are multiples of ``record``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    history = [outputs(model)]
    for step in range(STEPS):
        optimizer.zero_grad()
        ((model(x_train) - y_train).square().mean() / 2).backward()
        optimizer.step()
        if (step + 1) % record == 0:
            history.append(outputs(model))
    return [torch.stack(parts) for parts in zip(*history, strict=True)]


# %%
# Curves
# ------
#
# The lines are the predictions, from the network before training. The markers are what training did. The prediction is
# not only that of the loss: to the right are the outputs for one test image.


def losses(train_outputs, test_outputs):
    """The loss over time."""
    return {
        "training": (train_outputs - y_train).square().mean((1, 2)) / 2,
        "test": (test_outputs - y_test).square().mean((1, 2)) / 2,
    }


model, record, steps = network(WIDTHS[-1]), STEPS // 20, torch.arange(STEPS + 1)
learning_rate, predicted = predict(model, steps)
f_lin = linearize(model)  # keeps the network as it is now
real = train(model, learning_rate, record)

figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
plot_training(steps, losses(*predicted), steps[::record], losses(*real), ax=left)
left.set(ylim=(0, None), ylabel="loss", title=f"Width {WIDTHS[-1]}: the loss")
one_predicted = {f"output {c}": predicted[1][:, 0, c] for c in (0, 1, 2)}
one_real = {f"output {c}": real[1][:, 0, c] for c in (0, 1, 2)}
plot_training(steps, one_predicted, steps[::record], one_real, ax=right)
right.legend(loc="center right", ncols=2, fontsize="small")
right.set(ylabel="output", title=f"Width {WIDTHS[-1]}: outputs for one test image")
plt.show()

# %%
# How far is the network from its linearization at the parameters it has now? :func:`ggn_ntk.linearize` took a snapshot
# before training, and evaluates at any parameters.

moved = (real[1][-1] - real[1][0]).norm()
with torch.no_grad():
    difference = (f_lin(model, x_test) - model(x_test)).norm()
print(f"Linearized at first, evaluated at the trained parameters: {difference / moved:.1%} of the way off")

# %%
# Width
# -----
#
# The wider the network, the better the prediction: the distance between the outputs after training and their
# prediction, relative to how far training took them, on test samples. It is known to fall as one over the square root
# of the width (`Lee et al., 2019 <https://arxiv.org/abs/1902.06720>`_, theorem 2.1).


def distance(width):
    """Relative distance of the real and the predicted outputs after training."""
    model = network(width)
    _, start = outputs(model)
    learning_rate, (_, predicted) = predict(model, STEPS)
    _, real = train(model, learning_rate, STEPS)
    return ((real[-1] - predicted).norm() / (real[-1] - start).norm()).item()


distances = torch.tensor([[distance(width) for width in WIDTHS] for _ in range(SEEDS)])
for width, value in zip(WIDTHS, distances.mean(0).tolist(), strict=True):
    print(f"width {width:>4}: distance {value:.3f}")

figure, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
ax.plot(WIDTHS, distances.T, "o", color="#56B4E9", markersize=4, label=None)
ax.plot(WIDTHS, distances.mean(0), "o-", color="#0072B2", label="mean over initialisations")
reference = distances.mean(0)[0] * (torch.tensor(WIDTHS) / WIDTHS[0]) ** -0.5
ax.plot(WIDTHS, reference, "--", color="gray", label="one over the square root of the width")
ax.set(xscale="log", yscale="log", xlabel="width", ylabel="relative distance after training")
ax.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
ax.set_yticks([0.1, 0.2, 0.4, 0.8], ["10 %", "20 %", "40 %", "80 %"])
ax.minorticks_off()
ax.set(title="Real and linearized training, test samples")
ax.legend()
plt.show()

if not (distances.mean(0).diff() < 0).all():
    raise ValueError("The distance should fall as the width grows")
