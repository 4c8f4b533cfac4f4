"""What is computed: networks, sizes and random numbers, for every framework alike."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt

import numpy as np
from numpy.typing import NDArray

#: ``("conv", inputs, outputs, padding)`` with a kernel of 3x3, ``("linear", inputs, outputs)``, ``("relu",)``,
#: ``("maxpool",)`` with windows of 2x2, ``("flatten",)``.
Layer = tuple[str | int, ...]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Workload:
    """A network and two sets of samples.

    Attributes:
        name: Its name.
        layers: The network.
        shape: Shape of a sample.
        n1: The number of samples x1.
        n2: The number of samples x2.
        compute: ``"full"`` or ``"trace"``.
        symmetric: Whether x2 is x1.
        trace_axes: Output axes to sum over, of those behind the first.
        architecture: A network that is no sequence of layers, by its name in :mod:`benchmarks.network`; then ``layers``
            holds the last one alone.
    """

    name: str
    layers: tuple[Layer, ...]
    shape: tuple[int, ...]
    n1: int
    n2: int
    compute: str = "full"
    symmetric: bool = False
    architecture: str = ""
    trace_axes: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """The number of outputs of the network, at each position where it has several."""
        return int(self.layers[-1][2])

    def shapes(self) -> list[tuple[int, ...]]:
        """Follow the shape of a sample through the network.

        Returns:
            The shape of a sample before each layer, and at the end.
        """
        shapes = [self.shape]
        for kind, *sizes in self.layers:
            last = shapes[-1]
            if kind == "conv":
                last = (int(sizes[1]), *(size - 2 + 2 * int(sizes[2]) for size in last[1:]))
            elif kind == "maxpool":
                last = (last[0], *(size // 2 for size in last[1:]))
            elif kind == "flatten":
                last = (prod(last),)
            elif kind == "linear":
                last = (int(sizes[1]),)
            shapes.append(last)
        return shapes

    def parameters(self) -> list[tuple[Array, Array] | None]:
        """Draw weights and biases.

        Returns:
            For each layer, weight ``[O, I]`` or ``[O, I, 3, 3]`` and bias ``[O]`` in float32, or ``None``.
        """
        rng = np.random.default_rng(0)
        drawn: list[tuple[Array, Array] | None] = []
        for kind, *sizes in self.layers:
            if kind not in ("conv", "linear"):
                drawn.append(None)
                continue
            inputs, outputs = int(sizes[0]), int(sizes[1])
            shape = (outputs, inputs, 3, 3) if kind == "conv" else (outputs, inputs)
            weight = rng.standard_normal(shape, np.float32) * sqrt(2 / prod(shape[1:]))
            drawn.append((weight.astype(np.float32), 0.1 * rng.standard_normal(outputs, np.float32)))
        return drawn

    def inputs(self, seed: int) -> tuple[Array, Array]:
        """Draw samples.

        Args:
            seed: Decides on them.

        Returns:
            x1 ``[N1, *shape]`` and x2 ``[N2, *shape]`` in float32.
        """
        rng = np.random.default_rng(seed)
        x1, x2 = (rng.standard_normal((n, *self.shape), np.float32) for n in (self.n1, self.n2))
        return x1, x1.copy() if self.symmetric else x2


def _mlp(*sizes: int) -> tuple[Layer, ...]:
    """Build a fully-connected network.

    Args:
        *sizes: Its widths, from input to output.

    Returns:
        Its layers.
    """
    layers: list[Layer] = []
    for inputs, outputs in pairwise(sizes):
        layers += [("linear", inputs, outputs), ("relu",)]
    return tuple(layers[:-1])


_RELU, _POOL, _FLATTEN = ("relu",), ("maxpool",), ("flatten",)

# The CNN of the PyTorch tutorial "Neural Tangent Kernels".
_CNN: tuple[Layer, ...] = (
    *(("conv", 3, 32, 0), _RELU, ("conv", 32, 32, 0), _RELU, ("conv", 32, 32, 0)),
    *(_FLATTEN, ("linear", 21632, 10)),
)
_VGG: tuple[Layer, ...] = (
    *(("conv", 3, 64, 1), _RELU, ("conv", 64, 64, 1), _RELU, _POOL),
    *(("conv", 64, 128, 1), _RELU, ("conv", 128, 128, 1), _RELU, _POOL),
    *(_FLATTEN, ("linear", 8192, 10)),
)
_IMAGE = (3, 32, 32)

FULL = (
    Workload("cnn", _CNN, _IMAGE, 20, 5),
    Workload("vgg", _VGG, _IMAGE, 16, 16),
    Workload("fcn", _mlp(3072, 1024, 1024, 10), (3072,), 64, 64),
    Workload("fcn_wideout", _mlp(784, 512, 512, 100), (784,), 16, 16),
)
TRACE = tuple(Workload(f"{w.name} trace", w.layers, w.shape, w.n1, w.n2, "trace") for w in FULL)
_RESNET, _TRANSFORMER = (("linear", 512, 10),), (("linear", 128, 16),)
ANY_MODULE = tuple(
    Workload(name + " symmetric" * symmetric, last, shape, 8, 8, symmetric=symmetric, architecture=name)
    for name, last, shape in (("resnet18", _RESNET, _IMAGE), ("transformer", _TRANSFORMER, (32, 128)))
    for symmetric in (False, True)
)
SMALL = (Workload("fcn_wideout 4x4", FULL[3].layers, FULL[3].shape, 4, 4),)
# A small segmentation network: 512 outputs for a sample, of which the kernel keeps 8 classes.
AXES = (
    Workload(
        "segmentation",
        (("conv", 3, 32, 1), _RELU, ("conv", 32, 32, 1), _RELU, ("conv", 32, 8, 1)),
        (3, 8, 8),
        8,
        8,
        trace_axes=(1, 2),
    ),
)
SYMMETRIC = tuple(Workload(f"{w.name} symmetric", w.layers, w.shape, 20, 20, symmetric=True) for w in FULL[:2])

#: Loads the code of a contender; in no table.
TINY = Workload("tiny", (("conv", 1, 2, 0), _RELU, _POOL, _FLATTEN, ("linear", 8, 2)), (1, 6, 6), 2, 2)

#: To try the command: one of each kind, in a second or so.
QUICK = (
    Workload("quick cnn", _CNN, _IMAGE, 3, 2),
    Workload("quick mlp", _mlp(784, 64, 64, 10), (784,), 4, 3),
    Workload("quick mlp trace", _mlp(784, 64, 64, 10), (784,), 4, 3, "trace"),
    Workload("quick cnn symmetric", _CNN, _IMAGE, 3, 3, symmetric=True),
)

#: For plots: the quantity on the axis, and the workload of each of its values.
SWEEPS = {
    "N": {n: Workload(f"cnn N={n}", _CNN, _IMAGE, n, n) for n in (4, 8, 16, 32, 64, 128)},
    "O": {
        o: Workload(f"mlp O={o}", _mlp(784, 512, 512, o), (784,), 16, 16) for o in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    },
    "width": {
        w: Workload(f"mlp width={w}", _mlp(784, w, w, 10), (784,), 16, 16)
        for w in (64, 128, 256, 512, 1024, 2048, 4096)
    },
}

WORKLOADS = {
    w.name: w
    for w in (
        *FULL,
        *TRACE,
        *SMALL,
        *SYMMETRIC,
        *AXES,
        *ANY_MODULE,
        *QUICK,
        *(w for sweep in SWEEPS.values() for w in sweep.values()),
    )
}
