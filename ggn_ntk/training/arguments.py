"""Outputs as columns that kernels multiply, and kernels as the matrices that multiply them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggn_ntk.problem.output_axes import KernelAxes
from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.spectrum.matrix import (
    Axes,
    check_entries,
    check_number,
    check_real,
    find_axes,
    flatten,
    from_columns,
    symmetric_matrices,
    to_columns,
    unflatten,
)
from ggn_ntk.spectrum.operator import Operator, is_operator

#: Outputs at time 0: a number stands for all of them, and ``None`` for zero.
Outputs = Tensor | float | None

#: What the functions of this package return: it predicts outputs from times, steps or kernels.
Predict = Callable[..., Any]


class Gaussian(NamedTuple):
    """A Gaussian distribution of functions, at M samples.

    Attributes:
        mean: ``[M, *out]``; behind the axes of times, where an array of times was asked for.
        covariance: Like the kernels it was computed from: ``[M, M, *out, *out]``, or ``[M, M]`` of each output; behind
            the same axes of times.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Layout:
    """How outputs become columns, and kernels the matrices that multiply them."""

    axes: KernelAxes  # the roles of output axes in kernels
    n: int  # the number of training samples N
    dtype: torch.dtype  # of results
    device: torch.device  # of kernels, outputs and results

    @classmethod
    def parse(
        cls,
        k_train_train: Tensor | Operator,
        argument: str,
        f: Any,
        trace_axes: Axes,
        diagonal_axes: Axes,
        kernel: str = "k_train_train",
    ) -> "Layout":
        """Find the layout from the training set's kernel, which is checked already, and outputs."""
        f = check_real(f, argument)
        axes = find_axes(k_train_train, kernel, f, argument, trace_axes, diagonal_axes)
        if f.device != k_train_train.device:
            raise ValueError(f"{argument} is on {f.device} and {kernel} on {k_train_train.device}: move one.")
        return cls(axes, len(f), torch.promote_types(f.dtype, k_train_train.dtype), f.device)

    def columns(self, argument: str, f: Any, samples: int | None = None) -> Tensor:
        """Check outputs and bring them to columns in float64."""
        # f [samples, *out] -> [E, samples F, T]
        samples = self.n if samples is None else samples
        f = check_real(f, argument)
        self._check(argument, f, [samples, *self.axes.first.out_shape])
        return to_columns(f, self.axes)

    def start(self, argument: str, f: Any, samples: int | None = None) -> Tensor:
        """Bring outputs at time 0 to columns, where a number stands for all of them, and ``None`` for zero."""
        # -> [E, samples F, T]
        if f is None or (isinstance(f, int | float) and not isinstance(f, bool)):
            samples = self.n if samples is None else samples
            f = torch.full([samples, *self.axes.first.out_shape], f or 0.0, dtype=torch.float64, device=self.device)
        return self.columns(argument, f, samples)

    def outputs(self, columns: Tensor) -> Tensor:
        """Undo :meth:`columns`."""
        # columns [..., E, samples F, T] -> [..., samples, *out]
        return from_columns(columns, self.axes).to(self.dtype)

    def cross(self, argument: str, kernel: Any, samples: int | None = None) -> Tensor:
        """Check and flatten a kernel of test and training samples."""
        # kernel [M, N, *axes.kernel_shape], or an operator [M F, N F] -> [E, M F, N F]
        if is_operator(kernel):
            return self._operator(argument, kernel, samples).dense()[None]
        kernel = check_entries(kernel, argument)
        samples = len(kernel) if samples is None else samples
        self._check(argument, kernel, [samples, self.n, *self.axes.kernel_shape])
        return flatten(kernel, self.axes)

    def product(self, argument: str, kernel: Any, columns: Tensor) -> Tensor:
        """Multiply columns by a kernel of test and training samples."""
        # columns [E, N F, T], kernel [M, N, *axes.kernel_shape] or an operator [M F, N F] -> [E, M F, T]
        if is_operator(kernel):
            return (self._operator(argument, kernel) @ columns[0])[None]
        return self.cross(argument, kernel) @ columns

    def symmetric(self, argument: str, kernel: Any, samples: int, why: str = "") -> Tensor:
        """Check and flatten a kernel of a set with itself."""
        # kernel [samples, samples, *axes.kernel_shape] -> [E, samples F, samples F]
        kernel = check_entries(kernel, argument)
        self._check(argument, kernel, [samples, samples, *self.axes.kernel_shape], why)
        return symmetric_matrices(kernel, argument, self.axes)

    def gaussian(self, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Bring mean and covariance to the shapes of outputs and kernels."""
        # mean [..., E, M F, T], covariance [..., E, M F, M F] -> [..., M, *out], [..., M, M, *axes.kernel_shape]
        kernel = unflatten((covariance + covariance.mT) / 2, self.axes)
        return Gaussian(self.outputs(mean), kernel.to(self.dtype))

    def _operator(self, argument: str, kernel: Any, samples: int | None = None) -> Operator:
        """Check an operator of test and training samples."""
        operator, free = Operator.parse(kernel, argument), self.axes.first.roles.free
        rows = operator.shape[0] // free * free if samples is None else samples * free
        if self.axes.first.roles.diagonal > 1:
            raise ValueError(f"{argument} must be a tensor like the training set's kernel, which is several matrices.")
        self._check(argument, operator, [rows, self.n * free])
        return operator

    def _check(self, argument: str, tensor: Tensor | Operator, shape: list[int], why: str = "") -> None:
        """Refuse a tensor of another shape, or on another device than the training set's kernel."""
        if list(tensor.shape) != shape:
            raise ValueError(f"{argument} must have shape {shape}{why}, got {list(tensor.shape)}.")
        if tensor.device != self.device:
            raise ValueError(f"{argument} is on {tensor.device}, the training set's kernel on {self.device}: move one.")


def check_kernels(argument: str, kernels: Any) -> None:
    """Refuse what is not a pair of kernels."""
    if not isinstance(kernels, EmpiricalKernels):
        raise TypeError(f"{argument} must be EmpiricalKernels(ntk=..., nngp=...), got {type(kernels).__name__}.")


def parse_test(layout: Layout, f_train_0: Any, f_test_0: Any, k_test_train: Any) -> tuple[Tensor, Tensor] | None:
    """Check the test samples' outputs and kernel; the outputs may be left out where a number stands for all."""
    # -> outputs in columns and the kernel as matrices
    if k_test_train is None:
        if f_test_0 is not None:
            raise ValueError("k_test_train must be given beside f_test_0: test outputs take both.")
        return None
    if f_test_0 is None and isinstance(f_train_0, Tensor):
        raise ValueError("f_test_0 must be given beside k_test_train, as f_train_0 is: 0.0 for outputs that are zero.")
    f_test_0 = f_train_0 if f_test_0 is None else f_test_0
    k_test_train = check_entries(k_test_train, "k_test_train")
    cross = layout.cross("k_test_train", k_test_train)
    return layout.start("f_test_0", f_test_0, len(k_test_train)), cross


def parse_rate(learning_rate: Any, y_train: Tensor) -> float:
    """Turn the learning rate η into the rate of the outputs, η / (N C)."""
    check_number("learning_rate", learning_rate, 0.0, above=True)
    return float(learning_rate / y_train.numel())


def parse_times(t: Any, like: Tensor) -> Tensor:
    """Check times, ``None`` for infinity, and bring them to the device of the outputs."""
    try:
        times = torch.as_tensor(math.inf if t is None else t, dtype=torch.float64, device=like.device).detach()
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
