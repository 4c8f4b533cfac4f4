"""neural-tangents' structured derivatives, in an environment of its own with jax.

Images have their channels last, as in jax's own layers; the kernel does not depend on it.
"""

from collections.abc import Callable
from typing import Any

import jax
import neural_tangents as nt
import numpy as np
from jax import lax
from jax import numpy as jnp

from benchmarks.workloads import Array, Workload


def prepare(workload: Workload) -> tuple[Callable[[Array], Any], Callable[[Any, Any], Any]]:
    """Build the network and its kernel function.

    Args:
        workload: The workload.

    Returns:
        A function that loads samples, and one that computes the kernel from them.
    """
    params = _parameters(workload)
    axes = (-1,) if workload.compute == "trace" else ()
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            lambda params, x: _apply(workload, params, x),
            trace_axes=axes,
            diagonal_axes=(0,) if workload.paired else (),
            vmap_axes=0,
            implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
        )
    )
    scale = workload.outputs if workload.compute == "trace" else 1  # it takes the mean over outputs

    def load(x: Array) -> Any:
        return jax.device_put(np.moveaxis(x, 1, -1) if x.ndim == 4 else x).block_until_ready()

    def run(x1: Any, x2: Any) -> Any:
        return (scale * kernel(x1, None if workload.symmetric else x2, params)).block_until_ready()

    return load, run


def _parameters(workload: Workload) -> list[Any]:
    """Bring parameters to jax's layout.

    Args:
        workload: The workload.

    Returns:
        Weight and bias of each layer, or nothing.
    """
    params: list[Any] = []
    spatial: tuple[int, ...] = ()
    for (kind, *_), drawn, shape in zip(workload.layers, workload.parameters(), workload.shapes(), strict=False):
        spatial = shape[1:] if kind == "flatten" else spatial
        if drawn is None:
            params.append(())
            continue
        weight, bias = drawn
        if kind == "conv":
            weight = weight.transpose(2, 3, 1, 0)
        elif spatial:  # its input features were channels, height, width
            weight = weight.reshape(len(weight), -1, *spatial).transpose(2, 3, 1, 0).reshape(-1, len(weight))
            spatial = ()
        else:
            weight = weight.T
        params.append((jnp.asarray(weight), jnp.asarray(bias)))
    return params


def _apply(workload: Workload, params: Any, x: Any) -> Any:
    """Evaluate the network.

    Args:
        workload: The workload.
        params: Weight and bias of each layer.
        x: Samples.

    Returns:
        ``[N, O]``.
    """
    for (kind, *sizes), param in zip(workload.layers, params, strict=True):
        if kind == "conv":
            padding = [(sizes[2], sizes[2])] * 2
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, param[0], (1, 1), padding, dimension_numbers=numbers) + param[1]
        elif kind == "linear":
            x = x @ param[0] + param[1]
        elif kind == "relu":
            x = jax.nn.relu(x)
        elif kind == "maxpool":
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        else:
            x = x.reshape(len(x), -1)
    return x
