"""Gradient flow on any loss, by an ODE solver."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import Axes, check_entries, check_number, from_columns, symmetric_matrices, to_columns
from ggn_ntk.training.arguments import Layout, Outputs, Predict, parse_test, parse_times


def gradient_flow(
    loss: Callable[[Tensor, Tensor], Tensor],
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    tolerance: float = 1e-8,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Predict gradient flow on any loss of the outputs, by SciPy's LSODA solver.

    df/dt = -η Θ ∂loss/∂f, for training and test samples at once (Lee et al. 2019, section 2.2). LSODA switches between
    stiff and non-stiff methods by itself (Petzold, SIAM J. Sci. Stat. Comput. 1983).

    Args:
        loss: ``loss(f, y_train)``: takes outputs ``[N, *out]`` in float64, returns a scalar. It normalises by itself:
            ``lambda f, y: (f - y).square().mean() / 2`` is the loss of :func:`gradient_flow_mse`.
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated.
        y_train: Targets of any shape and dtype, passed on to the loss; floating-point ones in float64.
        learning_rate: The learning rate η.
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
    if not callable(loss):
        raise TypeError(f"loss must be a callable loss(f, y_train), got {type(loss).__name__}.")
    if not isinstance(y_train, Tensor):
        raise TypeError(f"y_train must be a tensor, got {type(y_train).__name__}.")
    check_number("learning_rate", learning_rate, 0.0, above=True)
    check_number("tolerance", tolerance, 0.0, 1.0, above=True)
    check_entries(k_train_train, "k_train_train")
    targets = y_train.detach()
    targets = targets.double() if targets.is_floating_point() else targets

    def slope(f: Tensor) -> Tensor:
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(f, targets), f)
        return -learning_rate * gradient

    def predict(t: Any, f_train_0: Outputs = 0.0, f_test_0: Outputs = None, k_test_train: Tensor | None = None) -> Any:
        argument, like = ("f_train_0", f_train_0) if isinstance(f_train_0, Tensor) else ("y_train", y_train)
        if not like.is_floating_point() and argument == "y_train":
            raise TypeError("f_train_0 must be a tensor [N, *out]: y_train, which holds classes, does not tell *out.")
        layout = Layout.parse(k_train_train, argument, like, trace_axes, diagonal_axes)
        times = parse_times(t, like)
        if times.isinf().any():
            raise ValueError("t must be finite: the flow of a general loss has no closed form, and may have no limit.")
        flow = _AnyFlow(layout, slope, k_train_train, f_train_0, f_test_0, k_test_train)
        return flow.solve(times, tolerance)

    return predict


class _AnyFlow:
    """Gradient flow on any loss, from outputs at time 0."""

    def __init__(
        self,
        layout: Layout,
        slope: Callable[[Tensor], Tensor],
        k_train_train: Tensor,
        f_train_0: Outputs,
        f_test_0: Outputs,
        k_test_train: Tensor | None,
    ) -> None:
        """Stack training and test samples: one ODE for both."""
        self._axes, self._outputs, self._slope = layout.axes, layout.outputs, slope
        parts = [
            (layout.start("f_train_0", f_train_0), symmetric_matrices(k_train_train, "k_train_train", layout.axes))
        ]
        if (test := parse_test(layout, f_train_0, f_test_0, k_test_train)) is not None:
            parts.append(test)
        self._rows = [start.shape[1] for start, _ in parts]  # [N F, M F]
        self._start = torch.cat([start for start, _ in parts], dim=1)  # [E, (N + M) F, T]
        self._kernel = torch.cat([kernel for _, kernel in parts], dim=1)  # [E, (N + M) F, N F]

    def solve(self, times: Tensor, tolerance: float) -> Tensor | tuple[Tensor, Tensor]:
        """Integrate to each of some times."""
        # -> [*times, N, *out], [*times, M, *out]
        # the solver wants ascending times, each once
        wanted, places = times.flatten().unique(return_inverse=True)
        states = self._integrate(wanted, tolerance) if (wanted > 0).any() else self._start[None]
        states = states[places].reshape(*times.shape, *self._start.shape)
        parts = [self._outputs(part) for part in states.split(self._rows, dim=-2)]
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def _integrate(self, times: Tensor, tolerance: float) -> Tensor:
        """Call SciPy's solver."""
        # ascending times [times] -> [times, E, (N + M) F, T]
        try:
            from scipy.integrate import solve_ivp
        except ImportError:
            raise ImportError("gradient_flow needs SciPy: pip install ggn-ntk[dynamics].") from None
        start, t = self._start.flatten().cpu().numpy(), times.cpu().numpy()
        atol = tolerance * max(abs(start).max(), 1.0)
        solution = solve_ivp(self._derivative, (0.0, t[-1]), start, "LSODA", t, rtol=tolerance, atol=atol)
        if not solution.success or not np.isfinite(solution.y).all():
            raise RuntimeError(f"The ODE solver found no finite solution: {solution.message}")
        return torch.from_numpy(solution.y.T.copy()).to(self._start.device).reshape(-1, *self._start.shape)

    def _derivative(self, _: float, state: Any) -> Any:
        """Compute df/dt, which training outputs alone determine."""
        states = torch.from_numpy(state).to(self._start.device).reshape(self._start.shape)
        f = from_columns(states[:, : self._rows[0]], self._axes)
        return (self._kernel @ to_columns(self._slope(f), self._axes)).flatten().cpu().numpy()
