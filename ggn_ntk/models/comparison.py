"""What counts as equal up to rounding: tolerances, and how outputs, gradients and kernels are compared.

A difference is the norm of an error beside the norm that it is relative to. It is rounding where it is within a
tolerance, or where rounding was seen to do nearly as much: that takes several passes to measure, so it is measured only
for what would fail otherwise.

Norms are computed on the device and read together: a comparison of any number of parameters waits for the device once.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.models.autograd_graph import precisions
from ggn_ntk.problem.errors import NotFiniteError
from ggn_ntk.process.torch_internals import norms_of

#: Largest relative Frobenius error of a kernel against the oracle, by dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}

#: The same for gradients on a few samples, where rounding does not average out.
GRADIENT_TOLERANCES = {dtype: 10 * tolerance for dtype, tolerance in TOLERANCES.items()}

#: The largest relative difference of gradients that rounding makes by taking units to the other side of a kink: the
#: square root of the share of such units, and a share of 1e-4 is large.
KINKS = 1e-2

#: Rounding may do up to so many times what it was seen to do in a single measurement.
SEEN = 30.0

# A gradient that is zero but for rounding (say of a bias in front of a normalisation) is off by rounding of the others'
# size: errors are relative to at least this share of all parameters' gradient.
_SHARE_OF_ALL = 0.01


class Difference(NamedTuple):
    """The size of an error, beside the size that it is relative to."""

    error: float  # the norm of what differs
    scale: float  # the norm of what is right, or of what it is a part of

    @property
    def relative(self) -> float:
        """The relative error; infinite where anything but zero should be zero."""
        return 0.0 if self.error == 0 else self.error / self.scale if self.scale else math.inf

    def within(self, tolerance: float) -> bool:
        """Tell whether the relative error is at most a tolerance; NaN is within none."""
        return self.error <= tolerance * self.scale

    def explained_by(self, seen: float) -> bool:
        """Tell whether rounding, which was seen to move the same numbers by this much, may be all there is."""
        return self.error <= SEEN * seen


# Nothing explains a gradient that is not of its parameter's shape.
_MISSHAPEN = Difference(math.inf, 0.0)


def gradient_tolerance(output: Tensor) -> float:
    """Choose the tolerance of gradients: that of the lowest precision which takes part in the output's graph."""
    # Some normalisation layers of Hugging Face convert to float32 inside, even if all parameters are in float64. Frozen
    # parameters may be of lower precisions, in which gradients pass through them.
    return coarsest(precisions(output))


def kernel_tolerance(output: Tensor) -> float:
    """Choose the tolerance of kernels in the same way."""
    return coarsest(precisions(output), TOLERANCES)


def coarsest(dtypes: Iterable[torch.dtype], tolerances: Mapping[torch.dtype, float] = GRADIENT_TOLERANCES) -> float:
    """Choose the largest of the tolerances of some dtypes; single gradients in lower ones hardly average out."""
    return max(tolerances.get(dtype, math.sqrt(torch.finfo(dtype).eps)) for dtype in dtypes)


def is_coarse(tolerance: float) -> bool:
    """Tell whether a tolerance is that of float32 or lower, where rounding may take units past a kink."""
    return tolerance >= GRADIENT_TOLERANCES[torch.float32]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Measure the relative error in the Frobenius norm.

    As in Higham: "Accuracy and Stability of Numerical Algorithms", SIAM, 2002, chapter 6.

    Args:
        actual: A tensor ``[...]``.
        expected: What it should be, ``[...]`` of the same shape. It may have a wider dtype.

    Returns:
        ``|actual - expected| / |expected|`` in float64; zero where both are zero.

    Raises:
        ValueError: If the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual has shape {list(actual.shape)}, and expected {list(expected.shape)}.")
    actual, expected = actual.double(), expected.double()
    error, scale = read([torch.linalg.vector_norm(actual - expected), torch.linalg.vector_norm(expected)])
    return Difference(error, scale).relative


def read(numbers: Sequence[Tensor]) -> list[float]:
    """Read several numbers off a device at once."""
    if not numbers:
        return []
    if len({(number.device, number.dtype) for number in numbers}) > 1:
        numbers = [number.to(numbers[0].device, torch.float64) for number in numbers]
    values: list[float] = (torch.stack(list(numbers)) if len(numbers) > 1 else numbers[0].unsqueeze(0)).tolist()
    return values


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """Compute the norm of each of several tensors."""
    given = list(tensors)
    return read(norms_of(given)) if given else []


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Compute the norm over several tensors."""
    return math.hypot(*norms(tensors))


def cotangent(like: Tensor, seed: int, shape: Size | None = None) -> Tensor:
    """Draw normal numbers like a tensor, or of another shape, from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(like.shape if shape is None else shape, dtype=like.dtype, device="cpu", generator=generator)
    return drawn.to(like.device)


def row_norms(x: Tensor) -> Tensor:
    """Compute the norm of each sample's numbers."""
    # x [N, ...] -> [N]
    found: Tensor = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
    return found


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Compare tensors by name, all of them as one vector."""
    values = norms([*(actual[name] - tensor for name, tensor in expected.items()), *expected.values()])
    return Difference(math.hypot(*values[: len(expected)]), math.hypot(*values[len(expected) :]))


def differing(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    rounding: Callable[[], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Find gradients that differ by more than rounding: their relative errors by name."""
    differences = _by_parameter(actual, expected)
    found = {name: differs for name, differs in differences.items() if not differs.within(tolerance)}
    if rounding is not None and any(differs is not _MISSHAPEN for differs in found.values()):
        seen = rounding()
        found = {
            n: differs for n, differs in found.items() if differs is _MISSHAPEN or not differs.explained_by(seen[n])
        }
    return {name: differs.relative for name, differs in found.items()}


def _by_parameter(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Difference]:
    """Compare gradients, each by itself; one that is missing counts as zero."""
    given = {name: actual[name] if name in actual else torch.zeros_like(g) for name, g in expected.items()}
    compared = [name for name, g in expected.items() if given[name].shape == g.shape]
    values = norms([*(given[name] - expected[name] for name in compared), *(expected[name] for name in compared)])
    errors, sizes = values[: len(compared)], values[len(compared) :]
    least = _SHARE_OF_ALL * math.hypot(*sizes)
    found = dict.fromkeys(expected, _MISSHAPEN)
    return found | {n: Difference(e, max(size, least)) for n, e, size in zip(compared, errors, sizes, strict=True)}


def rows_differing(actual: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """Find samples at which outputs differ by more than rounding."""
    # actual [N, ...], expected [N, ...] -> [N]
    a, b = (x.reshape(len(x), -1).double() for x in (actual, expected))
    same = (a == b) | (a.isnan() & b.isnan())  # also where both are infinite
    error, size = row_norms((a - b).masked_fill(same, 0)), row_norms(b.masked_fill(~b.isfinite(), 0))
    # Outputs of one sample may nearly cancel: its error is relative to the median norm of all where that is larger.
    usual = size.masked_fill(size == 0, torch.nan).nanmedian().nan_to_num(0)
    differ: Tensor = ~(error <= tolerance * torch.maximum(size, usual))
    return differ


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no number is infinite or NaN, waiting for the device once."""
    given = [tensor for tensor in tensors if tensor.numel()]
    if all(map(math.isfinite, read([tensor.sum() for tensor in given]))):
        return True
    return all(map(math.isfinite, read([tensor.abs().max() for tensor in given])))  # a sum may overflow by itself


def check_finite(gradients: Iterable[Tensor]) -> None:
    """Raise where a gradient is infinite or NaN: samples that make it so are then left out of the kernel."""
    if not all_finite(gradients):
        raise NotFiniteError
