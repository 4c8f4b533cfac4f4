"""Kernels and predictions of several initialisations of a network, a network at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from ggn_ntk.kernels.outputs import empirical_kernels, outputs_and_nngp
from ggn_ntk.problem.functions import Params
from ggn_ntk.problem.request import Pick
from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.process.torch_internals import tree_map


class Member(NamedTuple):
    """What one network has to say of training and test samples; or the mean over some networks, or their deviation.

    Attributes:
        k_train_train: Both kernels of the training set, ``[N, N, ...]``.
        k_test_train: Both kernels of test and training samples, ``[M, N, ...]``; ``None`` without test samples.
        nngp_test_test: The NNGP kernel of the test set, ``[M, M, ...]``; ``None`` without test samples.
        f_train: Outputs ``[N, *out]``.
        f_test: Outputs ``[M, *out]``; ``None`` without test samples.
        prediction: What ``predict`` makes of the rest; ``None`` without it.
    """

    k_train_train: EmpiricalKernels
    k_test_train: EmpiricalKernels | None
    nngp_test_test: Tensor | None
    f_train: Tensor
    f_test: Tensor | None
    prediction: Any = None


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several networks, of one architecture say.

    Attributes:
        count: The number R of networks.
        mean: The mean over networks of each entry, whose standard error is ``std / R**0.5``.
        std: The standard deviation of each entry, with R - 1 in the denominator; NaN for one network.
    """

    count: int
    mean: Member
    std: Member


def ensemble(
    models: Iterable[Any],
    x_train: Any,
    x_test: Any = None,
    *,
    predict: Callable[[Member], Any] | None = None,
    compute: str = "full",
    method: str = "auto",
    params: Params | None = None,
    output: Pick = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
) -> Ensemble:
    """Average kernels, outputs and predictions over several initialisations of a network.

    Means of kernels over R networks are Monte Carlo estimates of those of infinite width, and of the covariance of the
    outputs (Novak, Xiao, Hron, Lee, Alemi, Sohl-Dickstein, Schoenholz: "Neural Tangents", ICLR 2020, section 3.2).
    Means and deviations are updated with each network (Welford: "Note on a Method for Calculating Corrected Sums of
    Squares and Products", Technometrics 1962), so that one network at a time is held where ``models`` makes them one by
    one.

    >>> networks = (torch.nn.Linear(3, 1) for _ in range(10))
    >>> ensemble(networks, torch.ones(5, 3)).mean.k_train_train.ntk.shape
    torch.Size([5, 5, 1, 1])

    Args:
        models: The networks: modules, or pairs ``(f, params)`` of a function as for :func:`ggn_ntk.empirical_ntk` and a
            mapping of its own.
        x_train: N training samples, as ``x1`` of :func:`ggn_ntk.empirical_ntk`.
        x_test: M test samples, or ``None``.
        predict: Turns the kernels and outputs of each network, a :class:`ggn_ntk.kernels.Member`, into a tensor, or a
            tuple of tensors, to average as well: what that network predicts after training, say by
            :func:`ggn_ntk.training.gradient_flow_mse`.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``, of all kernels.
        method: The route to the NTK.
        params: The parameters that the NTKs of modules sum over, by name.
        output: Turns what a network returns into the tensor ``[N, *out]``.
        trace_axes: Output axes to sum at equal indices, in all kernels.
        diagonal_axes: Output axes to take at equal indices, in all kernels.

    Returns:
        Means and standard deviations, in the dtypes of what is averaged.

    Raises:
        UnsupportedModelError: If a network has no exact kernel.
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no network, or networks have results of different shapes.
    """
    if isinstance(models, Module) and not isinstance(models, ModuleList):
        raise TypeError("models must be several networks, got one: pass a list of them, or a generator.")
    if not isinstance(models, Iterable):
        raise TypeError(f"models must be several networks, got {type(models).__name__}.")
    if predict is not None and not callable(predict):
        raise TypeError(f"predict must be a callable predict(member), got {type(predict).__name__}.")
    axes: dict[str, Any] = {"compute": compute, "trace_axes": trace_axes, "diagonal_axes": diagonal_axes}
    of_outputs = {"output": output, **axes}
    moments = _Moments()
    for entry in models:
        model, own = entry if isinstance(entry, tuple) else (entry, None)
        of_kernels: dict[str, Any] = {"params": params if own is None else own, "method": method, **of_outputs}
        f_train, _ = outputs_and_nngp(model, x_train, params=own, **of_outputs)
        train, cross, f_test, nngp_test_test = empirical_kernels(model, x_train, **of_kernels), None, None, None
        if x_test is not None:
            cross = empirical_kernels(model, x_test, x_train, **of_kernels)
            f_test, nngp_test_test = outputs_and_nngp(model, x_test, params=own, **of_outputs)
        member = Member(train, cross, nngp_test_test, f_train, f_test)
        moments.add(member if predict is None else member._replace(prediction=predict(member)))
    if not moments.count:
        raise ValueError("models must hold at least one network.")
    return moments.result()


class _Moments:
    """The mean and the squared deviations from it of what has come so far, entry by entry, in float64."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.count = 0
        self._last: Any = None
        self._mean: Any = None
        self._squares: Any = None

    def add(self, member: Member) -> None:
        """Take in one more."""
        _map(_check_tensor, member)
        if not self.count:
            self._mean = self._squares = _map(lambda x: torch.zeros_like(x, dtype=torch.float64), member)
        elif _map(lambda x: x.shape, member) != _map(lambda x: x.shape, self._last):
            raise ValueError(f"models must have results of one shape, but those of network {self.count} differ.")
        self.count, self._last = self.count + 1, member
        before = _map(lambda x, mean: x - mean, member, self._mean)
        self._mean = _map(lambda mean, change: mean + change / self.count, self._mean, before)
        self._squares = _map(lambda s, b, x, mean: s + b * (x - mean), self._squares, before, member, self._mean)

    def result(self) -> Ensemble:
        """Round to the dtypes of what has come."""
        mean = _map(lambda mean, x: mean.to(x.dtype), self._mean, self._last)
        count = self.count - 1 or torch.nan
        std = _map(lambda squares, x: (squares / count).sqrt().to(x.dtype), self._squares, self._last)
        return Ensemble(self.count, mean, std)


def _map(function: Callable[..., Any], *members: Any) -> Any:
    """Call a function with each tensor of several members of one structure."""
    return tree_map(lambda x, *others: None if x is None else function(x, *others), *members)


def _check_tensor(x: Any) -> None:
    """Refuse predictions that cannot be averaged."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"predict must return a tensor of real numbers, or a tuple of these, got {type(x).__name__}.")
