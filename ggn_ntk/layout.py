"""The output convention: from kernels over flattened outputs to the tensors users get.

Routes work with outputs flattened to one axis of length C. Letters: ``n``, ``m`` samples of x1, x2;
``c``, ``d`` outputs.
"""

from collections.abc import Iterable

from torch import Size, Tensor

COMPUTES = ("full", "diagonal", "trace")


def check_compute(compute: str) -> None:
    """Check what is to be computed.

    Args:
        compute: The argument of that name.

    Raises:
        ValueError: If it is none of the accepted values.
    """
    if compute not in COMPUTES:
        raise ValueError(f"compute must be one of {', '.join(map(repr, COMPUTES))}, got {compute!r}.")


def transpose(kernel: Tensor) -> Tensor:
    """Exchange the two sets of inputs: ``(n, c) <-> (m, d)``.

    Args:
        kernel: ``[N1, N2, C, C]``, ``[N1, N2, C]`` or ``[N1, N2]``.

    Returns:
        The kernel of (x2, x1), a view.
    """
    swapped = kernel.transpose(0, 1)
    return swapped.transpose(2, 3) if kernel.ndim == 4 else swapped


def sum_kernels(kernels: Iterable[tuple[str, Tensor]], per_parameter: bool) -> dict[str, Tensor]:
    """Sum kernels in place, by name or all of them.

    Args:
        kernels: Names of parameters and kernels of one shape. A name may come several times.
        per_parameter: Whether to keep names apart.

    Returns:
        The sums by name; under the empty name where names are not kept apart.
    """
    sums: dict[str, Tensor] = {}
    for name, kernel in kernels:
        key = name if per_parameter else ""
        sums[key] = sums[key].add_(kernel) if key in sums else kernel
    return sums


def finish(kernel: Tensor, out_shape: Size, symmetric: bool) -> Tensor:
    """Give a kernel exact symmetry, where it has it up to rounding, and the model's output axes.

    Args:
        kernel: ``[N1, N2, C, C]``, ``[N1, N2, C]`` or ``[N1, N2]``.
        out_shape: ``[*out]``, the shape of one sample's output, C in all.
        symmetric: Whether x1 and x2 are the same samples.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``.
    """
    if symmetric:
        kernel = (kernel + transpose(kernel)) / 2
    return kernel.reshape(*kernel.shape[:2], *(out_shape * (kernel.ndim - 2)))
