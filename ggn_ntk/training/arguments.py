"""Outputs as columns that kernels multiply, and kernels as the matrices that multiply them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.spectrum.matrix import check_kernel, check_number, flatten, symmetric_matrix, unflatten

#: What the functions of this package return: it predicts outputs from times, steps or kernels.
Predict = Callable[..., Any]


class Gaussian(NamedTuple):
    """A Gaussian distribution of functions, at M samples.

    Attributes:
        mean: ``[M, *out]``.
        covariance: Like the kernels it was computed from: ``[M, M, *out, *out]``, or ``[M, M]`` of each output.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Layout:
    """How outputs become columns, and kernels the matrices that multiply them."""

    out: Size  # ``[*out]``, the shape of one sample's output
    n: int  # the number of training samples N
    full: bool  # whether kernels are full, so that outputs are one column of N C numbers; else C columns of N
    dtype: torch.dtype  # of results
    device: torch.device  # of kernels, outputs and results

    @classmethod
    def parse(cls, k_train_train: Any, argument: str, f: Any, kernel: str = "k_train_train") -> "Layout":
        """Find the layout from the training set's kernel and outputs."""
        check_kernel(k_train_train, kernel)
        if not isinstance(f, Tensor) or not f.is_floating_point():
            kind = f.dtype if isinstance(f, Tensor) else type(f).__name__
            raise TypeError(f"{argument} must be a tensor of real numbers [N, *out], got {kind}.")
        one, full = f.shape[:1] * 2, f.shape[:1] * 2 + f.shape[1:] * 2
        if f.ndim == 0 or k_train_train.shape not in (one, full):
            raise ValueError(
                f"{kernel} must have shape {list(full)} or {list(one)} for {argument} of shape {list(f.shape)}, got "
                f"{list(k_train_train.shape)}."
            )
        if f.device != k_train_train.device:
            raise ValueError(f"{argument} is on {f.device} and {kernel} on {k_train_train.device}: move one.")
        dtype = torch.promote_types(f.dtype, k_train_train.dtype)
        return cls(f.shape[1:], len(f), k_train_train.shape == full, dtype, f.device)

    def columns(self, argument: str, f: Any, samples: int | None = None) -> Tensor:
        """Check outputs and bring them to columns in float64."""
        # f [samples, *out] -> [samples C, 1], or [samples, C] where the kernel is one for all outputs
        samples = self.n if samples is None else samples
        if not isinstance(f, Tensor) or not f.is_floating_point():
            kind = f.dtype if isinstance(f, Tensor) else type(f).__name__
            raise TypeError(f"{argument} must be a tensor of real numbers, got {kind}.")
        check_shape(argument, f, Size([samples, *self.out]))
        self._check_device(argument, f)
        return f.detach().double().reshape((-1, 1) if self.full else (samples, -1))

    def outputs(self, columns: Tensor) -> Tensor:
        """Undo :meth:`columns`."""
        # columns [..., samples C, 1] or [..., samples, C] -> [..., samples, *out]
        samples = columns.shape[-2] // (math.prod(self.out) if self.full else 1)
        return columns.reshape(*columns.shape[:-2], samples, *self.out).to(self.dtype)

    def cross(self, argument: str, kernel: Any) -> Tensor:
        """Check and flatten a kernel of test and training samples."""
        # kernel [M, N, *out, *out] -> [M C, N C]; [M, N] as it is
        kernel = check_kernel(kernel, argument)
        check_shape(argument, kernel, Size([len(kernel), self.n, *self._kernel_axes]))
        self._check_device(argument, kernel)
        return flatten(kernel)

    def prior(self, argument: str, kernel: Any, other: str, k_test_train: Tensor) -> Tensor:
        """Check and flatten a kernel of the test samples."""
        # kernel [M, M, *out, *out] -> [M C, M C]
        matrix = symmetric_matrix(kernel, argument)
        check_shape(argument, kernel, Size([len(k_test_train)] * 2 + [*self._kernel_axes]), f" to fit {other}")
        self._check_device(argument, kernel)
        return matrix

    def gaussian(self, mean: Tensor, covariance: Tensor, shape: Size) -> Gaussian:
        """Bring mean and covariance to the shapes of outputs and kernels."""
        # covariance [M C, M C], shape [M, M, *out, *out]
        covariance = unflatten((covariance + covariance.T) / 2, shape)
        return Gaussian(self.outputs(mean), covariance.to(self.dtype))

    @property
    def _kernel_axes(self) -> Size:
        """The axes of kernels behind the two of samples."""
        return self.out + self.out if self.full else Size()

    def _check_device(self, argument: str, tensor: Tensor) -> None:
        """Refuse a tensor on another device than the training set's kernel."""
        if tensor.device != self.device:
            raise ValueError(f"{argument} is on {tensor.device}, the training set's kernel on {self.device}: move one.")


def check_shape(argument: str, tensor: Tensor, shape: Size, why: str = "") -> None:
    """Refuse a tensor of another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{argument} must have shape {list(shape)}{why}, got {list(tensor.shape)}.")


def check_kernels(argument: str, kernels: Any) -> None:
    """Refuse what is not a pair of kernels."""
    if not isinstance(kernels, EmpiricalKernels):
        raise TypeError(f"{argument} must be EmpiricalKernels(ntk=..., nngp=...), got {type(kernels).__name__}.")


def parse_test(layout: Layout, f_test_0: Any, k_test_train: Any) -> tuple[Tensor, Tensor] | None:
    """Check the test samples' outputs and kernel, which come together or not at all."""
    # -> outputs in columns and the kernel as a matrix
    if f_test_0 is None and k_test_train is None:
        return None
    if f_test_0 is None or k_test_train is None:
        given, missing = ("f_test_0", "k_test_train") if k_test_train is None else ("k_test_train", "f_test_0")
        raise ValueError(f"{missing} must be given beside {given}: test outputs take both.")
    cross = layout.cross("k_test_train", k_test_train)
    return layout.columns("f_test_0", f_test_0, len(k_test_train)), cross


def parse_rate(learning_rate: Any, y_train: Tensor) -> float:
    """Turn the learning rate η into the rate of the outputs, η / (N C)."""
    check_number("learning_rate", learning_rate, 0.0, above=True)
    return float(learning_rate / y_train.numel())


def parse_times(t: Any, like: Tensor) -> Tensor:
    """Check times and bring them to the device of the outputs."""
    try:
        times = torch.as_tensor(t, dtype=torch.float64, device=like.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"t must be a number or an array of numbers, got {type(t).__name__}.") from None
    if not (times >= 0).all():
        raise ValueError(f"t must not be negative and be a number, got {t}.")
    return times


def parse_steps(steps: Any, like: Tensor) -> Tensor:
    """Check numbers of steps and bring them to the device of the outputs."""
    try:
        counts = torch.as_tensor(steps, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        counts = torch.empty(0)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"steps must be an integer or an array of integers, got {steps!r}.")
    if (counts < 0).any():
        raise ValueError(f"steps must not be negative, got {steps}.")
    return counts
