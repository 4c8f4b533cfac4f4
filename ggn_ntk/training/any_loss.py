"""Gradient flow on any loss, by an ODE solver, and gradient descent, step by step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import Axes, check_entries, check_number, from_columns, symmetric_matrices, to_columns
from ggn_ntk.training.arguments import Layout, Outputs, Predict, parse_steps, parse_test, parse_times


def gradient_flow(
    loss: Callable[[Tensor, Tensor], Tensor],
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    tolerance: float = 1e-8,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Predict gradient flow on any loss of the outputs, by SciPy's LSODA solver.

    df/dt = -η Θ ∂loss/∂f, for training and test samples at once (Lee et al. 2019, section 2.2). With momentum μ, it is
    the flow that steps of :func:`gradient_descent` follow where they are small,

        df/dt = -η Θ v,   μ dv/dt = ∂loss/∂f - (1 - μ) v,   v(0) = 0,

    a mass that falls with friction (Qian: "On the momentum term in gradient descent learning algorithms", Neural
    Networks 1999, section 2). LSODA switches between stiff and non-stiff methods by itself (Petzold, SIAM J. Sci. Stat.
    Comput. 1983).

    Args:
        loss: ``loss(f, y_train)``: takes outputs ``[N, *out]`` in float64, returns a scalar. It normalises by itself:
            ``lambda f, y: (f - y).square().mean() / 2`` is the loss of :func:`gradient_flow_mse`.
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated.
        y_train: Targets of any shape and dtype, passed on to the loss; floating-point ones in float64.
        learning_rate: The learning rate η.
        momentum: The momentum μ.
        tolerance: The solver's relative tolerance, and its absolute one in units of the largest initial output or 1.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(t, f_train_0=0.0, f_test_0=None, k_test_train=None)``, as :func:`gradient_flow_mse` returns, but for
        finite times. Where ``f_train_0`` is no tensor, the outputs have the shape of ``y_train``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = _Training.parse(loss, k_train_train, y_train, learning_rate, momentum, trace_axes, diagonal_axes)
    check_number("tolerance", tolerance, 0.0, 1.0, above=True)

    def predict(t: Any, f_train_0: Outputs = 0.0, f_test_0: Outputs = None, k_test_train: Tensor | None = None) -> Any:
        state = training.start(f_train_0, f_test_0, k_test_train)
        times = parse_times(t, state.outputs)
        if times.isinf().any():
            raise ValueError("t must be finite: the flow of a general loss has no closed form, and may have no limit.")
        return state.at(times, lambda wanted: state.flow(wanted, tolerance))

    return predict


def gradient_descent(
    loss: Callable[[Tensor, Tensor], Tensor],
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Predict gradient descent on any loss of the outputs, step by step.

    The steps are those of ``torch.optim.SGD`` on the linearized network (Lee et al. 2019), in the outputs of training
    and test samples: v ← μ v + ∂loss/∂f and f ← f - η Θ v from v = 0. They are taken one after the other, each with one
    product with the kernel.

    Args:
        loss: ``loss(f, y_train)``, as for :func:`gradient_flow`.
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated.
        y_train: Targets of any shape and dtype, passed on to the loss; floating-point ones in float64.
        learning_rate: The learning rate η.
        momentum: The momentum μ.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(steps, f_train_0=0.0, f_test_0=None, k_test_train=None)``, as :func:`gradient_flow_mse` returns, with
        a number of steps or an array of them in place of the time. Where ``f_train_0`` is no tensor, the outputs have
        the shape of ``y_train``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = _Training.parse(loss, k_train_train, y_train, learning_rate, momentum, trace_axes, diagonal_axes)

    def predict(
        steps: Any, f_train_0: Outputs = 0.0, f_test_0: Outputs = None, k_test_train: Tensor | None = None
    ) -> Any:
        state = training.start(f_train_0, f_test_0, k_test_train)
        return state.at(parse_steps(steps, state.outputs), state.descend)

    return predict


@dataclass(frozen=True, eq=False)
class _Training:
    """A training set under any loss."""

    loss: Callable[[Tensor, Tensor], Tensor]
    kernel: Tensor
    y_train: Tensor
    rate: float
    momentum: float
    trace_axes: Axes
    diagonal_axes: Axes

    @classmethod
    def parse(
        cls,
        loss: Any,
        k_train_train: Any,
        y_train: Any,
        learning_rate: Any,
        momentum: Any,
        trace_axes: Axes,
        diagonal_axes: Axes,
    ) -> "_Training":
        """Check the arguments."""
        if not callable(loss):
            raise TypeError(f"loss must be a callable loss(f, y_train), got {type(loss).__name__}.")
        if not isinstance(y_train, Tensor):
            raise TypeError(f"y_train must be a tensor, got {type(y_train).__name__}.")
        check_number("learning_rate", learning_rate, 0.0, above=True)
        check_number("momentum", momentum, 0.0, 1.0)
        kernel = check_entries(k_train_train, "k_train_train")
        return cls(loss, kernel, y_train.detach(), learning_rate, momentum, trace_axes, diagonal_axes)

    def slope(self, f: Tensor) -> Tensor:
        """Differentiate the loss in the outputs."""
        # [N, *out] -> [N, *out]
        targets = self.y_train.double() if self.y_train.is_floating_point() else self.y_train
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(f, targets), f)
        return gradient

    def start(self, f_train_0: Outputs, f_test_0: Outputs, k_test_train: Tensor | None) -> "_State":
        """Stack training and test samples at time 0: they move as one."""
        argument, like = ("f_train_0", f_train_0) if isinstance(f_train_0, Tensor) else ("y_train", self.y_train)
        if not like.is_floating_point() and argument == "y_train":
            raise TypeError("f_train_0 must be a tensor [N, *out]: y_train, which holds classes, does not tell *out.")
        layout = Layout.parse(self.kernel, argument, like, self.trace_axes, self.diagonal_axes)
        matrices = symmetric_matrices(self.kernel, "k_train_train", layout.axes)
        parts = [(layout.start("f_train_0", f_train_0), matrices)]
        if (test := parse_test(layout, f_train_0, f_test_0, k_test_train)) is not None:
            parts.append(test)
        rows = [outputs.shape[1] for outputs, _ in parts]
        outputs, kernel = (torch.cat(stacked, dim=1) for stacked in zip(*parts, strict=True))
        return _State(self, layout, outputs, kernel, rows)


@dataclass(frozen=True, eq=False)
class _State:
    """Where a training starts."""

    training: _Training
    layout: Layout
    outputs: Tensor  # of training and test samples in columns, [E, (N + M) F, T]
    kernel: Tensor  # [E, (N + M) F, N F]
    rows: list[int]  # [N F, M F]

    def at(self, lengths: Tensor, train: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Train for some times or numbers of steps."""
        # -> [*lengths, N, *out], [*lengths, M, *out]
        # training goes through ascending lengths, each once
        wanted, places = lengths.flatten().unique(return_inverse=True)
        states = train(wanted) if (wanted > 0).any() else self.outputs[None]
        states = states[places].reshape(*lengths.shape, *self.outputs.shape)
        parts = [self.layout.outputs(part) for part in states.split(self.rows, dim=-2)]
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def descend(self, steps: Tensor) -> Tensor:
        """Take steps one after the other."""
        # ascending numbers of steps [steps] -> [steps, E, (N + M) F, T]
        f, v = self.outputs, torch.zeros_like(self._trained(self.outputs))
        reached, states = 0, []
        for count in steps.tolist():
            for _ in range(reached, count):
                v = self.training.momentum * v + self._slope(f)
                f = f - self.training.rate * (self.kernel @ v)
            reached = count
            states.append(f)
        return torch.stack(states)

    def flow(self, times: Tensor, tolerance: float) -> Tensor:
        """Call SciPy's solver."""
        # ascending times [times] -> [times, E, (N + M) F, T]
        try:
            from scipy.integrate import solve_ivp
        except ImportError:
            raise ImportError("gradient_flow needs SciPy: pip install ggn-ntk[dynamics].") from None
        start = self.outputs.flatten()
        if self.training.momentum:  # v follows the slope, and does not equal it
            start = torch.cat([start, torch.zeros_like(self._trained(self.outputs)).flatten()])
        atol = tolerance * max(float(start.abs().max()), 1.0)
        first, t = start.cpu().numpy(), times.cpu().numpy()
        solution = solve_ivp(self._derivative, (0.0, t[-1]), first, "LSODA", t, rtol=tolerance, atol=atol)
        if not solution.success or not np.isfinite(solution.y).all():
            raise RuntimeError(f"The ODE solver found no finite solution: {solution.message}")
        states = torch.from_numpy(solution.y[: self.outputs.numel()].T.copy()).to(start.device)
        return states.reshape(-1, *self.outputs.shape)

    def _derivative(self, _: float, state: Any) -> Any:
        """Compute df/dt, and dv/dt with momentum."""
        numbers = torch.from_numpy(state).to(self.outputs.device)
        f = numbers[: self.outputs.numel()].reshape(self.outputs.shape)
        slope, mu = self._slope(f), self.training.momentum
        v = numbers[self.outputs.numel() :].reshape(slope.shape) if mu else slope
        changes = [-self.training.rate * (self.kernel @ v)]
        if mu:
            changes.append((slope - (1 - mu) * v) / mu)
        return torch.cat([change.flatten() for change in changes]).cpu().numpy()

    def _trained(self, outputs: Tensor) -> Tensor:
        """Take the outputs of training samples."""
        # [E, (N + M) F, T] -> [E, N F, T]
        return outputs[:, : self.rows[0]]

    def _slope(self, outputs: Tensor) -> Tensor:
        """Differentiate the loss, which training outputs alone determine."""
        # [E, (N + M) F, T] -> [E, N F, T]
        axes = self.layout.axes
        return to_columns(self.training.slope(from_columns(self._trained(outputs), axes)), axes)
