"""Gradient flow and gradient descent on the squared loss, in closed form."""

import math
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import check_number, symmetric_matrix
from ggn_ntk.training.arguments import Predict, parse_rate, parse_steps, parse_times
from ggn_ntk.training.eigenmodes import Descent, Flow, Training


def gradient_flow_mse(
    k_train_train: Tensor, y_train: Tensor, *, learning_rate: float = 1.0, diag_reg: float = 0.0
) -> Predict:
    """Predict gradient flow on the squared loss ½ mean (f - y)², in closed form.

    With τ = η t / (N C) and K = Θ + diag_reg mean(diag Θ) I,

    | f_train(t) = f_train(0) + (exp(-K τ) - I) (f_train(0) - y)
    | f_test(t) = f_test(0) + Θ_test,train K⁻¹ (exp(-K τ) - I) (f_train(0) - y)

    (Lee et al. 2019, section 2.2), by one eigendecomposition of K for all calls. For so long a time that eigenvalues
    which cannot be told from zero matter, a jitter keeps rounding from growing large in test outputs; after infinite
    time, training outputs stay as they are in these directions. An :class:`IllConditionedWarning` says so.

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
    training = Training.parse(k_train_train, y_train, diag_reg)
    rate = parse_rate(learning_rate, y_train)

    def predict(t: Any, f_train_0: Tensor, f_test_0: Tensor | None = None, k_test_train: Tensor | None = None) -> Any:
        times = parse_times(t, y_train)
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

    The steps are those of ``torch.optim.SGD`` on the linearized network (Lee et al. 2019), v ← μ v + dL/dθ and
    θ ← θ - η v from v = 0. In each eigendirection they are an affine map of two numbers, whose power by repeated
    squaring is the result. Above :func:`max_learning_rate` the prediction grows until it overflows, as the training
    would.

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
    training = Training.parse(k_train_train, y_train, diag_reg)
    rate = parse_rate(learning_rate, y_train)
    check_number("momentum", momentum, 0.0, 1.0)

    def predict(
        steps: Any, f_train_0: Tensor, f_test_0: Tensor | None = None, k_test_train: Tensor | None = None
    ) -> Any:
        counts = parse_steps(steps, y_train)
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
