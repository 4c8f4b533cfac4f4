"""Lengths of training, seen from one eigendirection of the kernel.

Under the squared loss, the distance of outputs and targets in a direction with eigenvalue w evolves by itself.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """A training of some length, T times over. In an eigendirection with eigenvalue w, f - y starts as 1."""

    @property
    def reach(self) -> Tensor:
        """How far a direction with eigenvalue zero pushes test outputs, per unit of kernel: ``[T]``."""

    def change(self, values: Tensor) -> Tensor:
        """Compute what happens to training outputs."""
        # values [n] -> [T, n]

    def response(self, values: Tensor) -> Tensor:
        """Compute what happens to test outputs, per unit of kernel: the change over the eigenvalue."""
        # values [n] -> [T, n]


@dataclass(frozen=True, eq=False)
class Flow:
    """Gradient flow."""

    reach: Tensor  # the times τ ``[T]``, scaled by the rate

    def change(self, values: Tensor) -> Tensor:
        """Solve du/dτ = -w u."""
        # values [n] -> [T, n]
        return torch.where(
            values > 0, torch.expm1(-values * self.reach[:, None]), 0.0
        )  # w τ may be zero times infinity

    def response(self, values: Tensor) -> Tensor:
        """Integrate -u."""
        # values [n] -> [T, n]
        return torch.where(values > 0, self.change(values) / values, -self.reach[:, None])


@dataclass(frozen=True, eq=False)
class Descent:
    """Gradient descent with momentum."""

    steps: Tensor  # numbers of steps ``[T]``
    rate: float  # the rate of the outputs, η / (N C)
    momentum: float  # the momentum μ

    @property
    def reach(self) -> Tensor:
        """How far a direction with eigenvalue zero pushes test outputs, per unit of kernel: ``[T]``."""
        return self.steps.double() * self.rate / (1 - self.momentum)

    def change(self, values: Tensor) -> Tensor:
        """Multiply the response by the kernel."""
        # values [n] -> [T, n]
        return values * self.response(values)

    def response(self, values: Tensor) -> Tensor:
        """Take the power of the map of one step."""
        # With a the response over the rate and w the eigenvalue times it, v ← μ v + (1 + w a) and a ← a - v.
        # values [n] -> [T, n]
        w = values * self.rate
        zero, one, mu = torch.zeros_like(w), torch.ones_like(w), torch.full_like(w, self.momentum)
        rows = [[1 - w, -mu, -one], [w, mu, one], [zero, zero, one]]  # of (a, v, 1)
        step = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        powers = [torch.linalg.matrix_power(step, count)[:, 0, 2] for count in self.steps.tolist()]
        return self.rate * torch.stack(powers)
