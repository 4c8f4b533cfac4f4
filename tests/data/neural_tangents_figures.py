"""Writes neural_tangents.json: what neural-tangents predicts, for tests/training/test_predictions.py.

Run once with neural-tangents 0.6.5 from PyPI, on Python 3.11, in an environment of its own:

    pip install neural-tangents==0.6.5 jax==0.4.23 jaxlib==0.4.23 "numpy<2" "scipy<1.13"
    python tests/data/neural_tangents_figures.py
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import neural_tangents as nt  # noqa: E402

N, M, C, P = 4, 3, 2, 20
TIMES = [0.0, 0.5, 1.0, 10.0, 300.0, 1e4]
REG = 0.05


class Kernels(NamedTuple):
    """Both kernels of one pair of sets, as nt.predict.gp_inference takes them."""

    ntk: jax.Array
    nngp: jax.Array


def kernel(first, second):
    """[N, C, P] and [M, C, P] -> [N, M, C, C]."""
    return jnp.einsum("ncp,mdp->nmcd", first, second)


def flow(k_train_train, k_test_train, y, f_train, f_test, trace_axes, diag_reg):
    """nt.predict.gradient_descent_mse at all times, and at infinity."""
    predict = nt.predict.gradient_descent_mse(
        k_train_train, y, learning_rate=0.7, diag_reg=diag_reg, trace_axes=trace_axes
    )
    train, test = predict(jnp.array(TIMES), f_train, f_test, k_test_train)
    _, test_infinite = predict(None, f_train, f_test, k_test_train)
    return {"train": train, "test": test, "test_infinite": test_infinite}


def any_loss(k_train_train, k_test_train, y, f_train, f_test, trace_axes):
    """nt.predict.gradient_descent for the mean cross-entropy, with targets as probabilities."""

    def cross_entropy(f, y):
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(f), axis=-1))

    predict = nt.predict.gradient_descent(cross_entropy, k_train_train, y, learning_rate=0.7, trace_axes=trace_axes)
    train, test = predict(jnp.array(TIMES[:4]), f_train, f_test, k_test_train)
    return {"train": train, "test": test}


def inference(train_train, test_train, test_test, y, trace_axes):
    """nt.predict.gp_inference: NNGP posterior and ensemble of trained networks."""
    predict = nt.predict.gp_inference(train_train, y, diag_reg=REG, trace_axes=trace_axes)
    found = predict(("nngp", "ntk"), test_train, test_test)
    return {name: {"mean": g.mean, "covariance": g.covariance} for name, g in found._asdict().items()}


def ensemble(train_train, test_train, test_test, y, trace_axes):
    """nt.predict.gradient_descent_mse_ensemble at all times, for a kernel function that knows sets by their sizes."""

    def kernel_fn(x1, x2=None, get=None):
        first, second = len(x1), len(x1 if x2 is None else x2)
        kernels = {(N, N): train_train, (M, N): test_train, (M, M): test_test}[first, second]
        return kernels if get is None or isinstance(get, tuple) else getattr(kernels, get)

    predict = nt.predict.gradient_descent_mse_ensemble(
        kernel_fn, np.zeros((N, 1)), y, learning_rate=0.7, diag_reg=REG, trace_axes=trace_axes
    )
    found = predict(jnp.array(TIMES), np.ones((M, 1)), "ntk", compute_cov=True)
    return {"mean": found.mean, "covariance": found.covariance}


def figures(trace_axes, of_trace):
    """All figures for one style of kernel."""
    random = np.random.RandomState(0)
    j_train, j_test = random.randn(N, C, P), random.randn(M, C, P)
    g_train, g_test = random.randn(N, C, P), random.randn(M, C, P)
    y, f_train, f_test = random.randn(N, C), random.randn(N, C), random.randn(M, C)
    probabilities = np.array(jax.nn.softmax(random.randn(N, C)))

    def reduced(k):
        return jnp.einsum("nmcc->nm", k) / C if of_trace else k

    ntk = [reduced(kernel(a, b)) for a, b in ((j_train, j_train), (j_test, j_train))]
    nngp = [reduced(kernel(a, b)) for a, b in ((g_train, g_train), (g_test, g_train), (g_test, g_test))]
    return {
        "y": y, "f_train": f_train, "f_test": f_test, "probabilities": probabilities,
        "ntk_train_train": ntk[0], "ntk_test_train": ntk[1],
        "nngp_train_train": nngp[0], "nngp_test_train": nngp[1], "nngp_test_test": nngp[2],
        "flow": flow(*ntk, y, f_train, f_test, trace_axes, 0.0),
        "flow_regularised": flow(*ntk, y, f_train, f_test, trace_axes, REG),
        "cross_entropy": any_loss(*ntk, probabilities, f_train, f_test, trace_axes),
        "inference": inference(
            Kernels(ntk[0], nngp[0]), Kernels(ntk[1], nngp[1]), Kernels(None, nngp[2]), y, trace_axes
        ),
        "ensemble": ensemble(
            Kernels(ntk[0], nngp[0]), Kernels(ntk[1], nngp[1]), Kernels(None, nngp[2]), y, trace_axes
        ),
        "max_learning_rate": nt.predict.max_learning_rate(ntk[0], y.size),
        "max_learning_rate_momentum": nt.predict.max_learning_rate(ntk[0], y.size, momentum=0.9),
    }  # fmt: skip


def main():
    """Write the file."""
    found = {
        "neural_tangents": nt.__version__, "learning_rate": 0.7, "times": TIMES, "diag_reg": REG,
        "full": figures((), of_trace=False), "one_for_all_outputs": figures((-1,), of_trace=True),
    }  # fmt: skip
    plain = jax.tree_util.tree_map(lambda x: np.asarray(x).tolist() if hasattr(x, "shape") else x, found)
    Path(__file__).with_name("neural_tangents.json").write_text(json.dumps(plain) + "\n")


if __name__ == "__main__":
    main()
