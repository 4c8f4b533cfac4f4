"""Kernel regression, and the Gaussian processes that wide networks are.

Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington: "Wide Neural Networks of Any Depth Evolve as Linear
Models Under Gradient Descent", NeurIPS 2019, section 2.3.
"""

from typing import Any

from torch import Tensor

from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.spectrum.matrix import Axes
from ggn_ntk.training.arguments import Gaussian, Predict, check_kernels, parse_rate, parse_times
from ggn_ntk.training.eigenmodes import Flow, Training
from ggn_ntk.training.solvers import Regression, Solver


def kernel_ridge_regression(
    k_train_train: Any,
    y_train: Tensor,
    *,
    diag_reg: float = 0.0,
    solver: Solver | None = None,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Fit kernel ridge regression.

    f_test = K_test,train (K + diag_reg mean(diag K) I)⁻¹ y. With the NTK, it is where gradient flow takes a linearized
    network that starts from zero. A kernel that is singular up to rounding gets a jitter, and an
    :class:`IllConditionedWarning` says so; with a solver of your own or an operator, what is singular is for the solver
    to find.

    Args:
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated. Or an operator of
            SciPy's or curvlinops' kind, ``[N C, N C]`` for outputs that influence one another, and ``[N F, N F]`` where
            only F outputs are not traced.
        y_train: Targets ``[N, *out]``.
        diag_reg: The ridge, as a multiple of the mean diagonal, for which an operator has to have ``diagonal()``.
        solver: ``None`` for Cholesky's factorisation of a tensor, and for SciPy's conjugate gradients on an operator;
            or a solver like these of SciPy's, called as ``solver(operator, vector)`` for each column, with SciPy's
            operator of the kernel and its ridge, and a vector in float64. It returns the solution, or the pair of it
            and a flag that is zero for success: ``functools.partial(scipy.sparse.linalg.minres, rtol=1e-8)``.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(k_test_train)``, which takes ``[M, N, ...]`` with the output axes of ``k_train_train``, or an operator
        ``[M F, N F]``, and returns ``[M, *out]``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
        RuntimeError: If the solver fails.
    """
    regression = Regression.parse(k_train_train, y_train, diag_reg, solver, trace_axes, diagonal_axes)
    layout = regression.layout

    def predict(k_test_train: Any) -> Tensor:
        return layout.outputs(layout.product("k_test_train", k_test_train, regression.weights))

    return predict


def nngp_posterior(
    k_train_train: Any,
    y_train: Tensor,
    *,
    diag_reg: float = 0.0,
    solver: Solver | None = None,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Condition the Gaussian process with a given covariance, the NNGP, on training data.

    mean = K_*X K⁻¹ y and covariance = K_** - K_*X K⁻¹ K_X*, with K = K_XX + diag_reg mean(diag K_XX) I, where the
    second term is the variance of observation noise (Rasmussen, Williams: "Gaussian Processes for Machine Learning",
    2006, section 2.2). With the NNGP kernel, it is the posterior of an infinitely wide Bayesian network. The kernel of
    one finite network, :func:`ggn_ntk.nngp`, has rank one: average it over initialisations.

    Args:
        k_train_train: ``[N, N, *out, *out]``, ``[N, N, *out]``, ``[N, N]`` or with axes as stated; or an operator, as
            :func:`kernel_ridge_regression` takes it.
        y_train: Targets ``[N, *out]``.
        diag_reg: The noise, as a multiple of the mean diagonal, for which an operator has to have ``diagonal()``.
        solver: As for :func:`kernel_ridge_regression`. The covariance takes a solution for each test output.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(k_test_train, k_test_test)``, which takes kernels ``[M, N, ...]`` and ``[M, M, ...]`` with the output
        axes of ``k_train_train``, the first of which may be an operator, and returns a :class:`Gaussian`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
        RuntimeError: If the solver fails.
    """
    regression = Regression.parse(k_train_train, y_train, diag_reg, solver, trace_axes, diagonal_axes)
    layout = regression.layout

    def predict(k_test_train: Any, k_test_test: Any) -> Gaussian:
        cross = layout.cross("k_test_train", k_test_train)
        samples = cross.shape[1] // layout.axes.first.roles.free
        prior = layout.symmetric("k_test_test", k_test_test, samples, " to fit k_test_train")
        return layout.gaussian(cross @ regression.weights, prior - cross @ regression.solve(cross.mT))

    return predict


def ntk_ensemble(
    k_train_train: EmpiricalKernels,
    y_train: Tensor,
    *,
    learning_rate: float = 1.0,
    diag_reg: float = 0.0,
    trace_axes: Axes = None,
    diagonal_axes: Axes = None,
) -> Predict:
    """Predict an infinite ensemble of wide networks, each trained by the same gradient flow on ½ mean (f - y)².

    The networks start as draws from a Gaussian process with mean 0 and the NNGP kernel K as covariance, and the NTK Θ
    is the same for all. With Θ' = Θ_XX + diag_reg mean(diag Θ_XX) I, τ = η t / (N C) as in :func:`gradient_flow_mse`,
    and A = Θ_*X Θ'⁻¹ (I - exp(-Θ' τ)), which is Θ_*X Θ'⁻¹ after infinite time,

        mean = A y,   covariance = K_** + A K_XX Aᵀ - A K_X* - K_*X Aᵀ

    (Lee et al. 2019, equations 14 and 15; equation 16 after infinite time). With the NNGP kernel for both, it is the
    ensemble of networks whose last layer alone is trained, and the :func:`nngp_posterior` after infinite time.

    Args:
        k_train_train: NTK and NNGP kernel of the training set, each ``[N, N, *out, *out]``, ``[N, N, *out]``,
            ``[N, N]`` or with axes as stated, as :func:`ggn_ntk.empirical_kernels` returns them; averaged over
            initialisations, or else the covariance is that of ensembles whose members all start as multiples of one
            function.
        y_train: Targets ``[N, *out]``.
        learning_rate: The learning rate η.
        diag_reg: What to add to the NTK's diagonal, as a multiple of its mean.
        trace_axes: The output axes that the kernels are traced along, counted as in :func:`ggn_ntk.empirical_ntk`:
            outputs along them share a kernel.
        diagonal_axes: The output axes that the kernels are diagonal along. With both ``None``, the shape tells full,
            diagonal and trace kernels apart.

    Returns:
        ``predict(k_test_train, nngp_test_test, t=None)``, which takes the two kernels of test and training samples, the
        NNGP kernel of the test samples, and a time or an array of times, with ``None`` for infinity. It returns a
        :class:`Gaussian`. For outputs at training samples, pass their kernels as those of test samples.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape does not fit, the kernel is not symmetric, or a number is not accepted.
    """
    check_kernels("k_train_train", k_train_train)
    training = Training.parse(k_train_train.ntk, y_train, diag_reg, trace_axes, diagonal_axes, "k_train_train.ntk")
    rate, layout = parse_rate(learning_rate, y_train), training.layout
    start = layout.symmetric("k_train_train.nngp", k_train_train.nngp, layout.n)

    def predict(k_test_train: EmpiricalKernels, nngp_test_test: Tensor, t: Any = None) -> Gaussian:
        check_kernels("k_test_train", k_test_train)
        cross = layout.cross("k_test_train.ntk", k_test_train.ntk)
        m = cross.shape[1] // layout.axes.first.roles.free
        nngp_cross = layout.cross("k_test_train.nngp", k_test_train.nngp, m)
        prior = layout.symmetric("nngp_test_test", nngp_test_test, m, " to fit k_test_train")
        hat = training.hat(Flow(parse_times(t, y_train) * rate), cross)  # [*t, E, M F, N F]
        mixed = hat @ nngp_cross.mT
        return layout.gaussian(hat @ training.targets, prior + hat @ start @ hat.mT - mixed - mixed.mT)

    return predict
