"""Training under the squared loss in the kernel's eigenbasis, where f - y evolves in each direction by itself."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ggn_ntk.spectrum.decompositions import Decomposition, decompose
from ggn_ntk.spectrum.matrix import Axes, check_entries
from ggn_ntk.training.arguments import Layout, parse_test


class Schedule(Protocol):
    """Trainings of some lengths ``[*t]``, in eigendirections of the kernel, where f - y starts as 1."""

    @property
    def reach(self) -> Tensor:
        """How far training of a direction with eigenvalue zero moves test outputs, per unit of kernel: ``[*t]``."""

    def change(self, values: Tensor) -> Tensor:
        """Compute by how much training outputs change."""
        # eigenvalues [E, n] -> [*t, E, n]

    def response(self, values: Tensor) -> Tensor:
        """Compute by how much test outputs change, per unit of kernel: the change over the eigenvalue."""
        # eigenvalues [E, n] -> [*t, E, n]


@dataclass(frozen=True, eq=False)
class Flow:
    """Gradient flow, du/dτ = -w u for u = f - y at eigenvalue w."""

    reach: Tensor  # the times τ ``[*t]``, scaled by the rate

    def change(self, values: Tensor) -> Tensor:
        """Compute u(τ) - u(0) = exp(-w τ) - 1."""
        # values [E, n] -> [*t, E, n]; where w is zero, w τ may be zero times infinity
        return torch.where(values > 0, torch.expm1(-values * self.reach[..., None, None]), 0.0)

    def response(self, values: Tensor) -> Tensor:
        """Compute (exp(-w τ) - 1) / w, which goes to -τ with w."""
        # values [E, n] -> [*t, E, n]
        return torch.where(values > 0, self.change(values) / values, -self.reach[..., None, None])


@dataclass(frozen=True, eq=False)
class Descent:
    """Gradient descent with momentum, as torch.optim.SGD has it."""

    steps: Tensor  # numbers of steps ``[*t]``
    rate: float  # the rate of the outputs, η / (N C)
    momentum: float  # the momentum μ

    @property
    def reach(self) -> Tensor:
        """How far training of a direction with eigenvalue zero moves test outputs, per unit of kernel: ``[*t]``."""
        return self.steps.double() * self.rate / (1 - self.momentum)

    def change(self, values: Tensor) -> Tensor:
        """Multiply the response by the eigenvalue."""
        # values [E, n] -> [*t, E, n]
        return values * self.response(values)

    def response(self, values: Tensor) -> Tensor:
        """Take the power of the affine map of one step."""
        # values [E, n] -> [*t, E, n]
        # With w the eigenvalue times the rate and a the response over the rate, f - y is 1 + w a, and a step is
        # v ← μ v + 1 + w a, a ← a - v.
        w = values * self.rate
        zero, one, mu = torch.zeros_like(w), torch.ones_like(w), torch.full_like(w, self.momentum)
        rows = [[1 - w, -mu, -one], [w, mu, one], [zero, zero, one]]  # of (a, v, 1)
        step = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        powers = [torch.linalg.matrix_power(step, count)[..., 0, 2] for count in self.steps.flatten().tolist()]
        return self.rate * torch.stack(powers).reshape(*self.steps.shape, *values.shape)


@dataclass(frozen=True, eq=False)
class Training:
    """A training set under the squared loss, with its kernel decomposed."""

    layout: Layout
    kernel: Decomposition
    targets: Tensor  # y in columns, [E, N F, T]

    @classmethod
    def parse(
        cls,
        kernel: Any,
        y_train: Any,
        diag_reg: Any,
        trace_axes: Axes,
        diagonal_axes: Axes,
        argument: str = "k_train_train",
    ) -> "Training":
        """Check the arguments and decompose the kernel."""
        kernel = check_entries(kernel, argument)
        layout = Layout.parse(kernel, "y_train", y_train, trace_axes, diagonal_axes, argument)
        return cls(layout, decompose(kernel, argument, layout.axes, diag_reg), layout.columns("y_train", y_train))

    def predict(
        self, schedule: Schedule, f_train_0: Any, f_test_0: Any, k_test_train: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict training outputs, and test outputs where their kernel is given."""
        # -> [*t, N, *out], [*t, M, *out]
        start = self.layout.start("f_train_0", f_train_0)
        test = parse_test(self.layout, f_train_0, f_test_0, k_test_train)
        residual = self.kernel.vectors.mT @ (start - self.targets)  # f - y at time 0 in the eigenbasis, [E, n, T]
        response = self._response(schedule)  # warns, also where test outputs are not wanted
        change = self._change(schedule)[..., None] * residual  # [*t, E, n, T]
        train = self.layout.outputs(start + self.kernel.vectors @ change)
        if test is None:
            return train
        test_start, cross = test
        change = (cross @ self.kernel.vectors) @ (response[..., None] * residual)
        return train, self.layout.outputs(test_start + change)

    def hat(self, schedule: Schedule, cross: Tensor) -> Tensor:
        """Compute by how much test outputs change for each unit of y - f at training samples, at time 0."""
        # cross [E, m, n] -> [*t, E, m, n]
        response = self._response(schedule)[..., None, :]
        return (cross @ self.kernel.vectors * -response) @ self.kernel.vectors.mT

    def _response(self, schedule: Schedule) -> Tensor:
        """Compute Θ_test,train K⁻¹ times the change, without Θ_test,train; warn where rounding matters to it."""
        # -> [*t, E, n]; the schedule's response has the 1 / w, so that nothing is divided by zero
        response, undetermined = schedule.response(self.kernel.values), self._undetermined(schedule)
        if undetermined.any():
            bounded = schedule.response(self.kernel.values + self.kernel.ridged.jitter)
            response = torch.where(undetermined[..., None, None], bounded, response)
        return response

    def _undetermined(self, schedule: Schedule) -> Tensor:
        """Find lengths of training at which eigenvalues below rounding matter, and warn of them."""
        # -> [*t]
        rounding = self.kernel.ridged.rounding
        long = schedule.reach > (1 / rounding if rounding else torch.finfo(torch.float64).max)
        if not self.kernel.singular or not long.any():
            return torch.zeros_like(long)
        jitter = self.kernel.ridged.jitter
        self.kernel.warn(
            f"for so long a training, a jitter of {jitter:.1e} is added to its diagonal for test outputs, "
            "and after infinite time, training outputs are left as they are in directions that it cannot tell from zero"
        )
        return long

    def _change(self, schedule: Schedule) -> Tensor:
        """Compute by how much training outputs change; after infinite time, in directions that are not rounding."""
        # -> [*t, E, n]
        change, infinite = schedule.change(self.kernel.values), schedule.reach.isinf()
        if infinite.any():
            certain = schedule.change(self.kernel.certain_values)
            change = torch.where(infinite[..., None, None], certain, change)
        return change
