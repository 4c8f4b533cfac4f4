"""What training does, read off kernels: gradient flow and descent, kernel regression, ensembles and posteriors.

Notation: N training samples, outputs ``[*out]`` of C numbers, the kernel Θ of the training set, functions f of shape
``[N, *out]``, targets y. A kernel is

- full, ``[N1, N2, *out, *out]``: what :func:`ggn_ntk.empirical_ntk` computes. It describes the linearized network.
- one for all outputs, ``[N1, N2]``: each output evolves by it, and none influences another, as if the full kernel were
  ``K[n, m] δ[c, d]``. It is used as it is given. ``compute="trace"`` sums over outputs, so pass it divided by C to put
  their mean in place of each.

The squared loss is ½ mean (f - y)² over all N C entries, as in neural-tangents. Under gradient flow dθ/dt = -η dL/dθ
with learning rate η, the outputs of the linearized network follow

    df/dt = -η / (N C) Θ (f - y)

(Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington: "Wide Neural Networks of Any Depth Evolve as Linear
Models Under Gradient Descent", NeurIPS 2019, section 2.2), so a step of gradient descent takes a time of about one.

``diag_reg`` adds that multiple of the mean diagonal to the diagonal of the training kernel. For the dynamics, it is as
if each output of each training sample had a parameter of its own that no test sample sees.

Everything is computed in float64 on the kernel's device. Results have the wider of the dtypes of kernel and targets,
and no graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.spectrum.matrix import Decomposition, check_number, decompose, flatten, symmetric_matrix
from ggn_ntk.training.arguments import Gaussian, Layout, check_kernels, check_shape, parse_test
from ggn_ntk.training.schedules import Descent, Flow, Schedule

Predict = Callable[..., Any]


# ---------------------------------------------------------------- training under the squared loss


def gradient_flow_mse(
    k_train_train: Tensor, y_train: Tensor, *, learning_rate: float = 1.0, diag_reg: float = 0.0
) -> Predict:
    """Predict gradient flow on the squared loss ½ mean (f - y)², in closed form.

    With τ = η t / (N C) and K = Θ + diag_reg mean(diag Θ) I,

    | f_train(t) = f_train(0) + (exp(-K τ) - I) (f_train(0) - y)
    | f_test(t) = f_test(0) + Θ_test,train K⁻¹ (exp(-K τ) - I) (f_train(0) - y)

    (Lee et al. 2019, section 2.2), by one eigendecomposition of K for all calls. For so long a time that eigenvalues
    which cannot be told from zero matter, a jitter keeps rounding from growing large in test outputs; after infinite
    time, training outputs stay as they are in these directions. An :class:`ggn_ntk.IllConditionedWarning` says so.

    Args:
        k_train_train: ``[N, N, *out, *out]`` or ``[N, N]``.
        y_train: Targets ``[N, *out]``.
        learning_rate: The learning rate η.
        diag_reg: What to add to the kernel's diagonal, as a multiple of its mean.

    Returns:
        ``predict(t, f_train_0, f_test_0=None, k_test_train=None)``. ``t`` is a time or an array of times, which may be
        infinite; ``f_train_0`` ``[N, *out]`` and ``f_test_0`` ``[M, *out]`` are the outputs at time 0;
        ``k_test_train`` is ``[M, N, *out, *out]`` or ``[M, N]``. It returns the outputs ``f_train`` ``[*t, N, *out]``,
        or the tuple ``(f_train, f_test)`` where ``f_test_0`` is given.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = _Training.parse(k_train_train, y_train, diag_reg)
    rate = _rate(learning_rate, y_train)

    def predict(t: Any, f_train_0: Tensor, f_test_0: Tensor | None = None, k_test_train: Tensor | None = None) -> Any:
        times = _parse_times(t, y_train)
        return training.predict(Flow(times.flatten() * rate), times.shape, f_train_0, f_test_0, k_test_train)

    return predict


def gradient_descent_mse(
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    diag_reg: float = 0.0,
) -> Predict:
    """Predict gradient descent on the squared loss ½ mean (f - y)², step by step, in closed form.

    The steps are those of ``torch.optim.SGD`` on the linearized network, v ← μ v + dL/dθ and θ ← θ - η v from v = 0.
    In each eigendirection they are an affine map of two numbers, whose power by repeated squaring is the result. Above
    :func:`max_learning_rate` the prediction grows until it overflows, as the training would.

    Args:
        k_train_train: ``[N, N, *out, *out]`` or ``[N, N]``.
        y_train: Targets ``[N, *out]``.
        learning_rate: The learning rate η.
        momentum: The momentum μ.
        diag_reg: What to add to the kernel's diagonal, as a multiple of its mean.

    Returns:
        ``predict(steps, f_train_0, f_test_0=None, k_test_train=None)``, as :func:`gradient_flow_mse` returns, with a
        number of steps or an array of them in place of the time.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = _Training.parse(k_train_train, y_train, diag_reg)
    rate = _rate(learning_rate, y_train)
    check_number("momentum", momentum, 0.0, 1.0)

    def predict(
        steps: Any, f_train_0: Tensor, f_test_0: Tensor | None = None, k_test_train: Tensor | None = None
    ) -> Any:
        counts = _parse_steps(steps, y_train)
        schedule = Descent(counts.flatten(), rate, momentum)
        return training.predict(schedule, counts.shape, f_train_0, f_test_0, k_test_train)

    return predict


def max_learning_rate(k_train_train: Tensor, momentum: float = 0.0) -> float:
    """Compute the learning rate above which gradient descent on the squared loss diverges.

    2 (1 + μ) N C / λ_max(Θ), for the steps of :func:`gradient_descent_mse`: in each eigendirection they contract if and
    only if η λ / (N C) is below 2 (1 + μ) (Goh: "Why Momentum Really Works", Distill 2017).

    Args:
        k_train_train: ``[N, N, *out, *out]``. A kernel ``[N, N]`` for all of C outputs does not tell C: multiply the
            result by it.
        momentum: The momentum μ.

    Returns:
        The learning rate; infinite for the zero kernel.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    check_number("momentum", momentum, 0.0, 1.0)
    values = torch.linalg.eigvalsh(symmetric_matrix(k_train_train, "k_train_train"))
    largest = values[-1].item()
    return 2 * (1 + momentum) * len(values) / largest if largest > 0 else math.inf


# ---------------------------------------------------------------- training under any loss


def gradient_flow(
    loss: Callable[[Tensor, Tensor], Tensor],
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    tolerance: float = 1e-8,
) -> Predict:
    """Predict gradient flow on any loss of the outputs, by SciPy's LSODA solver.

    df/dt = -η Θ ∂loss/∂f, for training and test samples at once (Lee et al. 2019, section 2.2). LSODA switches between
    stiff and non-stiff methods by itself (Petzold, SIAM J. Sci. Stat. Comput. 1983).

    Args:
        loss: ``loss(f, y_train)``: takes outputs ``[N, *out]`` in float64, returns a scalar. It normalises by itself:
            ``lambda f, y: (f - y).square().mean() / 2`` is the loss of :func:`gradient_flow_mse`.
        k_train_train: ``[N, N, *out, *out]`` or ``[N, N]``.
        y_train: Targets of any shape and dtype, passed on to the loss; floating-point ones in float64.
        learning_rate: The learning rate η.
        tolerance: The solver's relative tolerance, and its absolute one in units of the largest initial output or 1.

    Returns:
        ``predict(t, f_train_0, f_test_0=None, k_test_train=None)``, as :func:`gradient_flow_mse` returns, but for
        finite times.

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
    symmetric_matrix(k_train_train, "k_train_train")
    targets = y_train.detach()
    targets = targets.double() if targets.is_floating_point() else targets

    def slope(f: Tensor) -> Tensor:
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(f, targets), f)
        return -learning_rate * gradient

    def predict(t: Any, f_train_0: Tensor, f_test_0: Tensor | None = None, k_test_train: Tensor | None = None) -> Any:
        layout = Layout.parse(k_train_train, "f_train_0", f_train_0)
        times = _parse_times(t, f_train_0)
        if times.isinf().any():
            raise ValueError("t must be finite: the flow of a general loss has no closed form, and may have no limit.")
        flow = _AnyFlow(layout, slope, k_train_train, f_train_0, f_test_0, k_test_train)
        return flow.solve(times, tolerance)

    return predict


# ---------------------------------------------------------------- kernel regression and Gaussian processes


def kernel_ridge_regression(k_train_train: Tensor, y_train: Tensor, *, diag_reg: float = 0.0) -> Predict:
    """Fit kernel ridge regression.

    f_test = K_test,train (K + diag_reg mean(diag K) I)⁻¹ y. With the NTK, it is where gradient flow takes a linearized
    network that starts from zero. A kernel that is singular up to rounding gets a jitter, and an
    :class:`ggn_ntk.IllConditionedWarning` says so.

    Args:
        k_train_train: ``[N, N, *out, *out]`` or ``[N, N]``.
        y_train: Targets ``[N, *out]``.
        diag_reg: The ridge, as a multiple of the mean diagonal.

    Returns:
        ``predict(k_test_train)``, which takes ``[M, N, *out, *out]`` or ``[M, N]`` and returns ``[M, *out]``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = _Training.parse(k_train_train, y_train, diag_reg)
    weights = training.kernel.inverse() @ training.targets

    def predict(k_test_train: Tensor) -> Tensor:
        return training.layout.outputs(training.layout.cross("k_test_train", k_test_train) @ weights)

    return predict


def nngp_posterior(k_train_train: Tensor, y_train: Tensor, *, diag_reg: float = 0.0) -> Predict:
    """Condition the Gaussian process with a given covariance, the NNGP, on training data.

    mean = K_*X K⁻¹ y and covariance = K_** - K_*X K⁻¹ K_X*, with K = K_XX + diag_reg mean(diag K_XX) I, where the
    second term is the variance of observation noise (Rasmussen, Williams: "Gaussian Processes for Machine Learning",
    2006, section 2.2). With the NNGP kernel, it is the posterior of an infinitely wide Bayesian network. The kernel of
    one finite network, :func:`ggn_ntk.nngp`, has rank one: average it over initialisations.

    Args:
        k_train_train: ``[N, N, *out, *out]`` or ``[N, N]``.
        y_train: Targets ``[N, *out]``.
        diag_reg: The noise, as a multiple of the mean diagonal.

    Returns:
        ``predict(k_test_train, k_test_test)``, which takes kernels ``[M, N, *out, *out]`` and ``[M, M, *out, *out]``,
        or ``[M, N]`` and ``[M, M]``, and returns a :class:`Gaussian`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = _Training.parse(k_train_train, y_train, diag_reg)
    inverse = training.kernel.inverse()

    def predict(k_test_train: Tensor, k_test_test: Tensor) -> Gaussian:
        cross = training.layout.cross("k_test_train", k_test_train)
        prior = training.layout.prior("k_test_test", k_test_test, "k_test_train", k_test_train)
        hat = cross @ inverse
        return training.layout.gaussian(hat @ training.targets, prior - hat @ cross.T, k_test_test.shape)

    return predict


def ntk_ensemble(k_train_train: EmpiricalKernels, y_train: Tensor, *, diag_reg: float = 0.0) -> Predict:
    """Predict an infinite ensemble of wide networks, each trained by gradient flow for infinite time.

    The networks start as draws from a Gaussian process with mean 0 and the NNGP kernel K as covariance, and the NTK Θ
    is the same for all. With A = Θ_*X (Θ_XX + diag_reg mean(diag Θ_XX) I)⁻¹,

        mean = A y,   covariance = K_** + A K_XX Aᵀ - A K_X* - K_*X Aᵀ

    (Lee et al. 2019, section 2.3.1).

    Args:
        k_train_train: NTK and NNGP kernel of the training set, each ``[N, N, *out, *out]`` or ``[N, N]``, as
            :func:`ggn_ntk.empirical_kernels` returns them; averaged over initialisations, or else the covariance is
            that of ensembles whose members all start as multiples of one function.
        y_train: Targets ``[N, *out]``.
        diag_reg: What to add to the NTK's diagonal, as a multiple of its mean.

    Returns:
        ``predict(k_test_train, nngp_test_test)``, which takes the two kernels of test and training samples and the NNGP
        kernel of the test samples, and returns a :class:`Gaussian`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    check_kernels("k_train_train", k_train_train)
    training = _Training.parse(k_train_train.ntk, y_train, diag_reg, "k_train_train.ntk")
    start = symmetric_matrix(k_train_train.nngp, "k_train_train.nngp")
    check_shape("k_train_train.nngp", k_train_train.nngp, k_train_train.ntk.shape)
    inverse = training.kernel.inverse()

    def predict(k_test_train: EmpiricalKernels, nngp_test_test: Tensor) -> Gaussian:
        check_kernels("k_test_train", k_test_train)
        layout = training.layout
        hat = layout.cross("k_test_train.ntk", k_test_train.ntk) @ inverse
        mixed = hat @ layout.cross("k_test_train.nngp", k_test_train.nngp).T
        check_shape("k_test_train.nngp", k_test_train.nngp, k_test_train.ntk.shape)
        prior = layout.prior("nngp_test_test", nngp_test_test, "k_test_train", k_test_train.ntk)
        covariance = prior + hat @ start @ hat.T - mixed - mixed.T
        return layout.gaussian(hat @ training.targets, covariance, nngp_test_test.shape)

    return predict


# ---------------------------------------------------------------- arguments


def _rate(learning_rate: Any, y_train: Tensor) -> float:
    """Turn a learning rate into the rate of the outputs."""
    check_number("learning_rate", learning_rate, 0.0, above=True)
    return float(learning_rate / y_train.numel())


def _parse_times(t: Any, like: Tensor) -> Tensor:
    """Bring times to one form."""
    try:
        times = torch.as_tensor(t, dtype=torch.float64, device=like.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"t must be a number or an array of numbers, got {type(t).__name__}.") from None
    if not (times >= 0).all():
        raise ValueError(f"t must not be negative and be a number, got {t}.")
    return times


def _parse_steps(steps: Any, like: Tensor) -> Tensor:
    """Bring numbers of steps to one form."""
    try:
        counts = torch.as_tensor(steps, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        counts = torch.empty(0)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"steps must be an integer or an array of integers, got {steps!r}.")
    if (counts < 0).any():
        raise ValueError(f"steps must not be negative, got {steps}.")
    return counts


# ---------------------------------------------------------------- the squared loss, in the eigenbasis


@dataclass(frozen=True, eq=False)
class _Training:
    """A training set under the squared loss."""

    layout: Layout  # the shapes
    kernel: Decomposition  # the kernel, decomposed
    targets: Tensor  # the targets, in columns

    @classmethod
    def parse(cls, kernel: Any, y_train: Any, diag_reg: Any, argument: str = "k_train_train") -> "_Training":
        """Check the arguments and decompose the kernel."""
        layout = Layout.parse(kernel, "y_train", y_train, argument)
        return cls(layout, decompose(kernel, argument, diag_reg), layout.columns("y_train", y_train))

    def predict(
        self, schedule: Schedule, shape: Size, f_train_0: Any, f_test_0: Any, k_test_train: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict outputs."""
        # -> [*shape, N, *out]
        start = self.layout.columns("f_train_0", f_train_0)
        test = parse_test(self.layout, f_test_0, k_test_train)
        residual = self.kernel.vectors.T @ (start - self.targets)
        undetermined = self._undetermined(schedule)
        change = self._change(schedule)[..., None] * residual  # [T, n, columns]
        train = self._finish(shape, start + self.kernel.vectors @ change)
        if test is None:
            return train
        test_start, cross = test
        response = schedule.response(self.kernel.values)
        if undetermined.any():
            bounded = schedule.response(self.kernel.values + self.kernel.jitter)
            response = torch.where(undetermined[:, None], bounded, response)
        return train, self._finish(shape, test_start + (cross @ self.kernel.vectors) @ (response[..., None] * residual))

    def _undetermined(self, schedule: Schedule) -> Tensor:
        """Find the trainings so long that the eigenvalues that are rounding matter, and warn of them."""
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
        """Compute what happens to training outputs; after infinite time, by certain eigenvalues alone."""
        # -> [T, n]
        change, infinite = schedule.change(self.kernel.values), schedule.reach.isinf()
        if infinite.any():
            certain = schedule.change(self.kernel.certain_values)
            change = torch.where(infinite[:, None], certain, change)
        return change

    def _finish(self, shape: Size, columns: Tensor) -> Tensor:
        """Bring predictions to the layout that users get."""
        # columns [T, ...] -> [*shape, samples, *out]
        outputs = self.layout.outputs(columns)
        return outputs.reshape(*shape, *outputs.shape[1:])


# ---------------------------------------------------------------- any loss, by an ODE solver


class _AnyFlow:
    """Gradient flow on any loss, from given outputs."""

    def __init__(
        self,
        layout: Layout,
        slope: Callable[[Tensor], Tensor],
        k_train_train: Tensor,
        f_train_0: Tensor,
        f_test_0: Tensor | None,
        k_test_train: Tensor | None,
    ) -> None:
        """Check the arguments."""
        self._layout, self._slope = layout, slope
        train = layout.columns("f_train_0", f_train_0)
        test = parse_test(layout, f_test_0, k_test_train)
        kernels = [flatten(k_train_train)] + ([] if test is None else [test[1]])
        starts = [train] + ([] if test is None else [test[0]])
        self._kernel, self._start = torch.cat(kernels), torch.cat(starts)
        self._rows = [len(start) for start in starts]

    def solve(self, times: Tensor, tolerance: float) -> Tensor | tuple[Tensor, Tensor]:
        """Integrate."""
        # -> [*times, N, *out]
        wanted, places = times.flatten().unique(return_inverse=True)
        states = self._integrate(wanted, tolerance) if (wanted > 0).any() else self._start[None]
        parts = [self._layout.outputs(part) for part in states[places].split(self._rows, dim=1)]
        results = [part.reshape(*times.shape, *part.shape[1:]) for part in parts]
        return results[0] if len(results) == 1 else (results[0], results[1])

    def _integrate(self, times: Tensor, tolerance: float) -> Tensor:
        """Call the solver."""
        # times [T] -> [T, ...]
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
        """Compute df/dt."""
        columns = torch.from_numpy(state).to(self._start.device).reshape(self._start.shape)[: self._rows[0]]
        f = columns.reshape(self._layout.n, *self._layout.out)
        return (self._kernel @ self._slope(f).reshape(columns.shape)).flatten().cpu().numpy()
