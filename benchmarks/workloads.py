"""What is computed: networks, sizes and random numbers, for every framework alike."""

from dataclasses import dataclass, replace
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
        paired: Whether each sample of x1 meets the one of x2 at its place alone.
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
    paired: bool = False

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


@dataclass(frozen=True)
class Sweep:
    """Workloads of growing size, for a plot.

    Attributes:
        quantity: What grows.
        label: What it is.
        network: What computes, and of how much.
        workloads: The workload of each value.
        patience: After a round in which it takes longer than this many seconds, a contender is left out.
    """

    quantity: str
    label: str
    network: str
    workloads: dict[int, Workload]
    patience: float = 10.0


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
RESNET_CIFAR = Workload("resnet18_cifar", _RESNET, _IMAGE, 32, 32, "trace", True, architecture="resnet18_cifar")
SMALL = (
    Workload("fcn_wideout 4x4", FULL[3].layers, FULL[3].shape, 4, 4),
    Workload("small", _mlp(784, 64, 64, 10), (784,), 16, 16),
)
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
_SMALL_CNN: tuple[Layer, ...] = (
    *(("conv", 3, 16, 1), _RELU, _POOL, ("conv", 16, 32, 1), _RELU, _POOL),
    *(_FLATTEN, ("linear", 512, 10)),
)
PAIRED = (
    Workload("paired mlp", _mlp(784, 256, 256, 1), (784,), 2000, 2000, paired=True),
    Workload("paired cnn", _SMALL_CNN, (3, 16, 16), 2000, 2000, paired=True),
)
SYMMETRIC = tuple(Workload(f"{w.name} symmetric", w.layers, w.shape, 20, 20, symmetric=True) for w in FULL[:2])

# Load the code of a contender; in no table.
_TINY_CNN = Workload("tiny", (("conv", 1, 2, 0), _RELU, _POOL, _FLATTEN, ("linear", 8, 2)), (1, 6, 6), 2, 2)
_TINY_MLP = Workload("tiny", _mlp(8, 4, 4, 2), (8,), 2, 2)

#: To try the command: one of each kind, in a second or so.
QUICK = (
    Workload("quick cnn", _CNN, _IMAGE, 3, 2),
    Workload("quick mlp", _mlp(784, 64, 64, 10), (784,), 4, 3),
    Workload("quick mlp trace", _mlp(784, 64, 64, 10), (784,), 4, 3, "trace"),
    Workload("quick cnn symmetric", _CNN, _IMAGE, 3, 3, symmetric=True),
)

_SAMPLES, _TRACED_SIZES = "N, samples in each of x1 and x2", (8, 32, 128, 512, 2000)

#: By how they are asked for.
SWEEPS = {
    "N": Sweep(
        "N",
        _SAMPLES,
        "CNN of the PyTorch tutorial, full kernel of 10 outputs",
        {n: Workload(f"cnn N={n}", _CNN, _IMAGE, n, n) for n in (4, 8, 16, 32, 64, 128)},
    ),
    "O": Sweep(
        "O",
        "O, outputs",
        "784-512-512-O network, full kernel of 16 x 16 samples",
        {o: Workload(f"mlp O={o}", _mlp(784, 512, 512, o), (784,), 16, 16) for o in (1, 2, 4, 8, 16, 32, 64, 128, 256)},
    ),
    "width": Sweep(
        "width",
        "width of both hidden layers",
        "784-width-width-10 network, full kernel of 16 x 16 samples",
        {
            w: Workload(f"mlp width={w}", _mlp(784, w, w, 10), (784,), 16, 16)
            for w in (64, 128, 256, 512, 1024, 2048, 4096)
        },
    ),
    "N-cnn-trace": Sweep(
        "N",
        _SAMPLES,
        "CNN of the PyTorch tutorial, trace over 10 outputs",
        {n: Workload(f"cnn trace N={n}", _CNN, _IMAGE, n, n, "trace") for n in _TRACED_SIZES},
    ),
    "N-mlp-trace": Sweep(
        "N",
        _SAMPLES,
        "784-512-512-10 network, trace",
        {n: Workload(f"mlp trace N={n}", _mlp(784, 512, 512, 10), (784,), n, n, "trace") for n in _TRACED_SIZES},
    ),
    "N-resnet18_cifar": Sweep(
        "N",
        "N, samples of x1, which is x2",
        "ResNet-18 for CIFAR-10, trace over 10 outputs",
        {n: replace(RESNET_CIFAR, name=f"resnet18_cifar N={n}", n1=n, n2=n) for n in (8, 32, 128, 256)},
        patience=60.0,
    ),
}

#: Those that are compared in tables, by name.
TABLES = {w.name: w for w in (*FULL, *TRACE, *SMALL, *SYMMETRIC, *PAIRED, *AXES, *ANY_MODULE, RESNET_CIFAR)}

WORKLOADS = {
    **TABLES,
    **{w.name: w for w in (*QUICK, *(w for sweep in SWEEPS.values() for w in sweep.workloads.values()))},
}


def tiny(workload: Workload) -> Workload:
    """Take a workload of the same kind that is computed at once.

    Args:
        workload: The workload.

    Returns:
        It, with a tiny network and two samples.
    """
    linear = {"linear", "relu"} >= {layer[0] for layer in workload.layers} and not workload.architecture
    size = _TINY_MLP if linear else _TINY_CNN
    return replace(size, compute=workload.compute, symmetric=workload.symmetric, paired=workload.paired)
