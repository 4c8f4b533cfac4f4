"""Outputs as columns that kernels multiply, and kernels as the matrices that multiply them."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.spectrum.matrix import check_kernel, flatten, symmetric_matrix, unflatten


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
    """How outputs and kernels of one problem become matrices."""

    out: Size  # ``[*out]``, the shape of one sample's output
    n: int  # the number of training samples N
    full: bool  # whether kernels are full. If so, outputs are one column of N C numbers, else C columns of N.
    dtype: torch.dtype  # the dtype of results
    device: torch.device  # where everything is

    @classmethod
    def parse(cls, k_train_train: Any, argument: str, f: Any, kernel: str = "k_train_train") -> "Layout":
        """Find the layout that a kernel and outputs at the training samples have."""
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
        """Bring outputs to the form of columns that kernels multiply."""
        # f [samples, *out] -> [samples C, 1]
        samples = self.n if samples is None else samples
        if not isinstance(f, Tensor) or not f.is_floating_point():
            kind = f.dtype if isinstance(f, Tensor) else type(f).__name__
            raise TypeError(f"{argument} must be a tensor of real numbers, got {kind}.")
        check_shape(argument, f, Size([samples, *self.out]))
        self._check_device(argument, f)
        return f.detach().double().reshape((-1, 1) if self.full else (samples, -1))

    def outputs(self, columns: Tensor) -> Tensor:
        """Undo :meth:`columns`."""
        # columns [..., samples C, 1] -> [..., samples, *out]
        samples = columns.shape[-2] // (math.prod(self.out) if self.full else 1)
        return columns.reshape(*columns.shape[:-2], samples, *self.out).to(self.dtype)

    def cross(self, argument: str, kernel: Any) -> Tensor:
        """Check and flatten a kernel of test and training samples."""
        # kernel [M, N, *out, *out] -> [M C, N C]
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
        """Bring a distribution to the layout that users get."""
        # covariance [M C, M C], shape [M, M, *out, *out]
        covariance = unflatten((covariance + covariance.T) / 2, shape)
        return Gaussian(self.outputs(mean), covariance.to(self.dtype))

    @property
    def _kernel_axes(self) -> Size:
        """The axes of kernels behind those of samples."""
        return self.out + self.out if self.full else Size()

    def _check_device(self, argument: str, tensor: Tensor) -> None:
        """Check where a tensor is."""
        if tensor.device != self.device:
            raise ValueError(f"{argument} is on {tensor.device}, the training set's kernel on {self.device}: move one.")


def check_shape(argument: str, tensor: Tensor, shape: Size, why: str = "") -> None:
    """Check the shape of a tensor."""
    if tensor.shape != shape:
        raise ValueError(f"{argument} must have shape {list(shape)}{why}, got {list(tensor.shape)}.")


def check_kernels(argument: str, kernels: Any) -> None:
    """Check that a value holds both kernels."""
    if not isinstance(kernels, EmpiricalKernels):
        raise TypeError(f"{argument} must be EmpiricalKernels(ntk=..., nngp=...), got {type(kernels).__name__}.")


def parse_test(layout: Layout, f_test_0: Any, k_test_train: Any) -> tuple[Tensor, Tensor] | None:
    """Check what is given of the test samples."""
    if f_test_0 is None and k_test_train is None:
        return None
    if f_test_0 is None or k_test_train is None:
        given, missing = ("f_test_0", "k_test_train") if k_test_train is None else ("k_test_train", "f_test_0")
        raise ValueError(f"{missing} must be given beside {given}: test outputs take both.")
    cross = layout.cross("k_test_train", k_test_train)
    return layout.columns("f_test_0", f_test_0, len(k_test_train)), cross
