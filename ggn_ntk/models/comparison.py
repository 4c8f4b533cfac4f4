"""What counts as equal up to rounding: tolerances, and the one way in which gradients are compared.

Norms are computed on the device and read together: a comparison of any number of parameters waits for the device once.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Size, Tensor

#: Largest relative Frobenius error of a kernel against the oracle, by dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}

#: The same for gradients on a few samples, where rounding does not average out.
PROBE_TOLERANCES = {dtype: 10 * tolerance for dtype, tolerance in TOLERANCES.items()}

#: The largest relative difference of gradients that rounding makes by taking units to the other side of a kink: the
#: square root of their share, of which 1e-4 would be many.
KINKS = 1e-2

# A gradient that is zero but for rounding (say of a bias in front of a normalisation) is off by rounding of the others'
# size: errors are relative to at least this share of all parameters' gradient.
_SHARE_OF_ALL = 0.01

#: How many times what rounding was seen to do, once, it may do at most.
SEEN = 30.0


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
    return 0.0 if error == 0 else error / scale if scale else math.inf


def read(numbers: Sequence[Tensor]) -> list[float]:
    """Read several numbers off a device at once."""
    if not numbers:
        return []
    if len({(number.device, number.dtype) for number in numbers}) > 1:
        numbers = [number.to(numbers[0].device, torch.float64) for number in numbers]
    values: list[float] = torch.stack(list(numbers)).tolist()
    return values


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """Compute the norm of each of several tensors."""
    return read([torch.linalg.vector_norm(tensor) for tensor in tensors])


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Compute the norm over several tensors."""
    return math.hypot(*norms(tensors))


def cotangent(like: Tensor, seed: int, shape: Size | None = None) -> Tensor:
    """Draw normal numbers like a tensor, or of another shape, from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(like.shape if shape is None else shape, dtype=like.dtype, device="cpu", generator=generator)
    return drawn.to(like.device)


def differing(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    rounding: Callable[[], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Find gradients that differ by more than rounding."""
    given = {name: actual[name] if name in actual else torch.zeros_like(g) for name, g in expected.items()}
    misshapen = {name for name, g in expected.items() if given[name].shape != g.shape}
    compared = [name for name in expected if name not in misshapen]
    values = norms([*(given[name] - expected[name] for name in compared), *(expected[name] for name in compared)])
    errors, sizes = values[: len(compared)], values[len(compared) :]
    least = _SHARE_OF_ALL * math.hypot(*sizes)
    found = dict.fromkeys(misshapen, math.inf)
    for name, error, size in zip(compared, errors, sizes, strict=True):
        scale = max(size, least)
        if not error <= tolerance * scale:
            found[name] = error / scale if scale else math.inf
    if rounding is not None and set(found) & set(compared):
        seen, absolute = rounding(), dict(zip(compared, errors, strict=True))
        found = {n: error for n, error in found.items() if n in misshapen or not absolute[n] <= SEEN * seen[n]}
    return found


def rows_differing(actual: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """Find samples at which outputs differ by more than rounding."""
    # Each sample's error counts relative to its own norm, or to the median of all where that is larger. Entries that
    # are infinite or NaN in both are equal.
    # actual [N, ...], expected [N, ...] -> [N]
    a, b = (x.reshape(len(x), -1).double() for x in (actual, expected))
    same = (a == b) | (a.isnan() & b.isnan())
    difference, b = (a - b).masked_fill(same, 0), b.masked_fill(~b.isfinite(), 0)
    error, size = (torch.linalg.vector_norm(x, dim=1) for x in (difference, b))
    usual = size.masked_fill(size == 0, torch.nan).nanmedian().nan_to_num(0)
    differ: Tensor = ~(error <= tolerance * torch.maximum(size, usual))
    return differ


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no number is infinite or NaN, waiting for the device once."""
    given = [tensor for tensor in tensors if tensor.numel()]
    if all(map(math.isfinite, read([tensor.sum() for tensor in given]))):
        return True
    return all(map(math.isfinite, read([tensor.abs().max() for tensor in given])))  # a sum may overflow by itself
