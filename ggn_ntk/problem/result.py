"""The output convention: from kernels over flattened outputs to the tensors users get.

Routes work with outputs merged to one axis for each role, ``[N1, N2, E, F1, F2]`` (:mod:`ggn_ntk.problem.output_axes`);
of paired samples, ``[N, E, F1, F2]``. Letters: ``n``, ``m`` samples of x1, x2; ``e`` diagonal outputs; ``c``, ``d``
free outputs.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggn_ntk.problem.output_axes import KernelAxes

#: A kernel; or kernels by name of the parameter, by keys of several outputs, or the latter for each of the former.
Kernels = Tensor | dict[Any, Any]


class Computed(NamedTuple):
    """The kernels of a route, before they get the layout of the public API."""

    axes: KernelAxes  # the roles of output axes
    # Kernels, or summands of them, by their names in ``Request.groups``, each ``[N1, N2, E, F1, F2]``
    kernels: Iterable[tuple[str, Tensor]]
    # The outputs of each batch of samples that were evaluated together ``[N, ...]``; none where they were not
    outputs: Sequence[Tensor] = ()
    plans: Any = None  # what the structured route has learnt of the model


def transpose(kernel: Tensor) -> Tensor:
    """Exchange the two sets of inputs: ``(n, c) <-> (m, d)``, or ``c <-> d`` of paired samples."""
    # kernel [N1, N2, E, F, F] or [N, E, F, F]
    exchanged = kernel.transpose(-2, -1)
    return exchanged.transpose(0, 1) if kernel.ndim == 5 else exchanged


def sum_kernels(kernels: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Sum kernels by name, in the widest of their dtypes, in place where the dtype allows."""
    sums: dict[str, Tensor] = {}
    for key, kernel in kernels:
        if key in sums and torch.can_cast(kernel.dtype, sums[key].dtype):
            sums[key] += kernel
        else:
            sums[key] = sums[key] + kernel if key in sums else kernel
    return sums


def finish(kernel: Tensor, axes: KernelAxes, symmetric: bool) -> Tensor:
    """Make the kernel of one set exactly symmetric, and give each output axis its place."""
    # kernel [N1, N2, E, F1, F2] -> [N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]
    if symmetric:
        kernel = (kernel + transpose(kernel)).div_(2)  # in place: two kernels at once are enough
    return axes.separate(kernel)


class EmpiricalKernels(NamedTuple):
    """The two kernels of a network, of one shape.

    Attributes:
        ntk: The empirical neural tangent kernel; of several outputs, kernels by their keys.
        nngp: The empirical NNGP kernel, alike.
    """

    ntk: Any
    nngp: Any
