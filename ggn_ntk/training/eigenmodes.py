"""Training under the squared loss in the kernel's eigenbasis, where f - y evolves in each direction by itself."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from ggn_ntk.spectrum.matrix import Decomposition, decompose
from ggn_ntk.training.arguments import Layout, parse_test


class Schedule(Protocol):
    """A training of T lengths, in eigendirections of the kernel, where f - y starts as 1."""

    @property
    def reach(self) -> Tensor:
        """How far training of a direction with eigenvalue zero moves test outputs, per unit of kernel: ``[T]``."""

    def change(self, values: Tensor) -> Tensor:
        """Compute by how much training outputs change."""
        # eigenvalues [n] -> [T, n]

    def response(self, values: Tensor) -> Tensor:
        """Compute by how much test outputs change, per unit of kernel: the change over the eigenvalue."""
        # eigenvalues [n] -> [T, n]


@dataclass(frozen=True, eq=False)
class Flow:
    """Gradient flow, du/dτ = -w u for u = f - y at eigenvalue w."""

    reach: Tensor  # the times τ ``[T]``, scaled by the rate

    def change(self, values: Tensor) -> Tensor:
        """Compute u(τ) - u(0) = exp(-w τ) - 1."""
        # values [n] -> [T, n]; where w is zero, w τ may be zero times infinity
        return torch.where(values > 0, torch.expm1(-values * self.reach[:, None]), 0.0)

    def response(self, values: Tensor) -> Tensor:
        """Compute (exp(-w τ) - 1) / w, which goes to -τ with w."""
        # values [n] -> [T, n]
        return torch.where(values > 0, self.change(values) / values, -self.reach[:, None])


@dataclass(frozen=True, eq=False)
class Descent:
    """Gradient descent with momentum, as torch.optim.SGD has it."""

    steps: Tensor  # numbers of steps ``[T]``
    rate: float  # the rate of the outputs, η / (N C)
    momentum: float  # the momentum μ

    @property
    def reach(self) -> Tensor:
        """How far training of a direction with eigenvalue zero moves test outputs, per unit of kernel: ``[T]``."""
        return self.steps.double() * self.rate / (1 - self.momentum)

    def change(self, values: Tensor) -> Tensor:
        """Multiply the response by the eigenvalue."""
        # values [n] -> [T, n]
        return values * self.response(values)

    def response(self, values: Tensor) -> Tensor:
        """Take the power of the affine map of one step."""
        # values [n] -> [T, n]
        # With w the eigenvalue times the rate and a the response over the rate, f - y is 1 + w a, and a step is
        # v ← μ v + 1 + w a, a ← a - v.
        w = values * self.rate
        zero, one, mu = torch.zeros_like(w), torch.ones_like(w), torch.full_like(w, self.momentum)
        rows = [[1 - w, -mu, -one], [w, mu, one], [zero, zero, one]]  # of (a, v, 1)
        step = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        powers = [torch.linalg.matrix_power(step, count)[:, 0, 2] for count in self.steps.tolist()]
        return self.rate * torch.stack(powers)


@dataclass(frozen=True, eq=False)
class Training:
    """A training set under the squared loss, with its kernel decomposed."""

    layout: Layout
    kernel: Decomposition
    targets: Tensor  # y in columns, [N C, 1] or [N, C]

    @classmethod
    def parse(cls, kernel: Any, y_train: Any, diag_reg: Any, argument: str = "k_train_train") -> "Training":
        """Check the arguments and decompose the kernel."""
        layout = Layout.parse(kernel, "y_train", y_train, argument)
        return cls(layout, decompose(kernel, argument, diag_reg), layout.columns("y_train", y_train))

    def predict(
        self, schedule: Schedule, shape: Size, f_train_0: Any, f_test_0: Any, k_test_train: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict training outputs, and test outputs where they are given."""
        # -> [*shape, N, *out], [*shape, M, *out]
        start = self.layout.columns("f_train_0", f_train_0)
        test = parse_test(self.layout, f_test_0, k_test_train)
        residual = self.kernel.vectors.T @ (start - self.targets)  # f - y at time 0 in the eigenbasis, [n, columns]
        undetermined = self._undetermined(schedule)  # warns, also where test outputs are not wanted
        change = self._change(schedule)[..., None] * residual  # [T, n, columns]
        train = self._finish(shape, start + self.kernel.vectors @ change)
        if test is None:
            return train
        # Θ_test,train K⁻¹ times the change, with 1 / w in the schedule's response, so that nothing is divided by zero.
        test_start, cross = test
        response = schedule.response(self.kernel.values)
        if undetermined.any():
            bounded = schedule.response(self.kernel.values + self.kernel.jitter)
            response = torch.where(undetermined[:, None], bounded, response)
        return train, self._finish(shape, test_start + (cross @ self.kernel.vectors) @ (response[..., None] * residual))

    def _undetermined(self, schedule: Schedule) -> Tensor:
        """Find lengths of training at which eigenvalues below rounding matter, and warn of them."""
        # -> [T]
        rounding = self.kernel.rounding
        long = schedule.reach > (1 / rounding if rounding else torch.finfo(torch.float64).max)
        if not self.kernel.singular or not long.any():
            return torch.zeros_like(long)
        self.kernel.warn(
            f"for so long a training, a jitter of {self.kernel.jitter:.1e} is added to its diagonal for test outputs, "
            "and after infinite time, training outputs are left as they are in directions that it cannot tell from zero"
        )
        return long

    def _change(self, schedule: Schedule) -> Tensor:
        """Compute by how much training outputs change; after infinite time, in directions that are not rounding."""
        # -> [T, n]
        change, infinite = schedule.change(self.kernel.values), schedule.reach.isinf()
        if infinite.any():
            certain = schedule.change(self.kernel.certain_values)
            change = torch.where(infinite[:, None], certain, change)
        return change

    def _finish(self, shape: Size, columns: Tensor) -> Tensor:
        """Bring predictions to the shape of outputs and of the times asked for."""
        # columns [T, ...] -> [*shape, samples, *out]
        outputs = self.layout.outputs(columns)
        return outputs.reshape(*shape, *outputs.shape[1:])
