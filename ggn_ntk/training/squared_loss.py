"""Gradient flow and gradient descent on the squared loss, in closed form."""

import math
from typing import Any

from torch import Tensor

from ggn_ntk.spectrum.lanczos import largest_eigenvalue, leading
from ggn_ntk.spectrum.matrix import Axes, check_number, symmetric_matrices, symmetric_matrix
from ggn_ntk.spectrum.operator import Operator, parse_kernel
from ggn_ntk.training.arguments import Layout, Outputs, Predict, parse_rate, parse_steps, parse_times
from ggn_ntk.training.eigenmodes import Descent, Flow, Training


def gradient_flow_mse(
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    diag_reg: float = 0.0,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Predict gradient flow on the squared loss ½ mean (f - y)², in closed form.

    With τ = η t / (N C) and K = Θ + diag_reg mean(diag Θ) I,

    | f_train(t) = f_train(0) + (exp(-K τ) - I) (f_train(0) - y)
    | f_test(t) = f_test(0) + Θ_test,train K⁻¹ (exp(-K τ) - I) (f_train(0) - y)

    (Lee et al. 2019, section 2.2), by one eigendecomposition of K for all calls. For so long a time that eigenvalues
    which cannot be told from zero matter, a jitter keeps rounding from growing large in test outputs; after infinite
    time, training outputs stay as they are in these directions. An :class:`IllConditionedWarning` says so.

    Args:
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated.
        y_train: Targets ``[N, *out]``.
        learning_rate: The learning rate η.
        diag_reg: What to add to the kernel's diagonal, as a multiple of its mean.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(t=None, f_train_0=0.0, f_test_0=None, k_test_train=None)``. ``t`` is a time or an array of times; it
        may be infinite, as ``None`` is. ``f_train_0`` ``[N, *out]`` and ``f_test_0`` ``[M, *out]`` are the outputs at
        time 0; a number stands for outputs that all have this value, and ``None`` for zero. ``f_test_0`` may be left
        out where ``f_train_0`` is no tensor, and is the same then. ``k_test_train`` is ``[M, N, ...]``, with the output
        axes of ``k_train_train``. It returns the outputs ``f_train`` ``[*t, N, *out]``, or the tuple
        ``(f_train, f_test)`` where ``k_test_train`` is given.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = Training.parse(k_train_train, y_train, diag_reg, trace_axes, diagonal_axes)
    rate = parse_rate(learning_rate, y_train)

    def predict(
        t: Any = None, f_train_0: Outputs = 0.0, f_test_0: Outputs = None, k_test_train: Tensor | None = None
    ) -> Any:
        return training.predict(Flow(parse_times(t, y_train) * rate), f_train_0, f_test_0, k_test_train)

    return predict


def gradient_descent_mse(
    k_train_train: Tensor,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    diag_reg: float = 0.0,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Predict gradient descent on the squared loss ½ mean (f - y)², step by step, in closed form.

    The steps are those of ``torch.optim.SGD`` on the linearized network (Lee et al. 2019), v ← μ v + dL/dθ and
    θ ← θ - η v from v = 0. In each eigendirection they are an affine map of two numbers, whose power by repeated
    squaring is the result. Above :func:`max_learning_rate` the prediction grows until it overflows, as the training
    would.

    Args:
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated.
        y_train: Targets ``[N, *out]``.
        learning_rate: The learning rate η.
        momentum: The momentum μ.
        diag_reg: What to add to the kernel's diagonal, as a multiple of its mean.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(steps, f_train_0=0.0, f_test_0=None, k_test_train=None)``, as :func:`gradient_flow_mse` returns, with
        a number of steps or an array of them in place of the time.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    training = Training.parse(k_train_train, y_train, diag_reg, trace_axes, diagonal_axes)
    rate = parse_rate(learning_rate, y_train)
    check_number("momentum", momentum, 0.0, 1.0)

    def predict(
        steps: Any, f_train_0: Outputs = 0.0, f_test_0: Outputs = None, k_test_train: Tensor | None = None
    ) -> Any:
        schedule = Descent(parse_steps(steps, y_train), rate, momentum)
        return training.predict(schedule, f_train_0, f_test_0, k_test_train)

    return predict


def max_learning_rate(
    k_train_train: Any,
    momentum: float = 0.0,
    *,
    y_train: Tensor | None = None,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> float:
    """Compute the learning rate above which gradient descent on the squared loss diverges.

    2 (1 + μ) N C / λ_max(Θ), for the steps of :func:`gradient_descent_mse`: in each eigendirection they contract if and
    only if η λ / (N C) is below 2 (1 + μ) (Goh: "Why Momentum Really Works", Distill 2017). The largest eigenvalue of a
    large kernel or of an operator comes from Lanczos iterations, to all digits.

    Args:
        k_train_train: ``[N, N, *out, *out]``, or any other kernel together with ``y_train``. Or an operator of SciPy's
            or curvlinops' kind, ``[N C, N C]``.
        momentum: The momentum μ.
        y_train: Targets ``[N, *out]``, for their shape alone. Without them, the kernel counts as full: ``[N, N]`` for
            all of C outputs does not tell C, by which the result has to be multiplied.
        trace_axes: The output axes that the kernel is traced along, as :func:`gradient_flow_mse` takes them.
        diagonal_axes: The output axes that the kernel is diagonal along.

    Returns:
        The learning rate; infinite for the zero kernel.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    check_number("momentum", momentum, 0.0, 1.0)
    kernel = parse_kernel(k_train_train, "k_train_train")
    layout = None
    if y_train is not None:
        layout = Layout.parse(kernel, "y_train", y_train, trace_axes, diagonal_axes)
    elif trace_axes is not None or diagonal_axes is not None:
        raise ValueError("y_train must be given beside trace_axes and diagonal_axes: it tells the shape of outputs.")
    if isinstance(kernel, Operator):
        kernel.check_symmetric()
        largest, outputs = leading(kernel.products, 1)[0].item(), kernel.shape[0]
    else:
        matrices = (
            symmetric_matrix(kernel, "k_train_train")[None]
            if layout is None
            else symmetric_matrices(kernel, "k_train_train", layout.axes)
        )
        largest, outputs = largest_eigenvalue(matrices), matrices.shape[1]
    outputs = outputs if y_train is None else y_train.numel()
    return 2 * (1 + momentum) * outputs / largest if largest > 0 else math.inf
