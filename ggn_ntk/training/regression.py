"""Kernel regression, and the Gaussian processes that wide networks are.

Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington: "Wide Neural Networks of Any Depth Evolve as Linear
Models Under Gradient Descent", NeurIPS 2019, section 2.3.
"""

from torch import Tensor

from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.spectrum.matrix import symmetric_matrix
from ggn_ntk.training.arguments import Gaussian, Predict, check_kernels, check_shape
from ggn_ntk.training.eigenmodes import Training


def kernel_ridge_regression(k_train_train: Tensor, y_train: Tensor, *, diag_reg: float = 0.0) -> Predict:
    """Fit kernel ridge regression.

    f_test = K_test,train (K + diag_reg mean(diag K) I)⁻¹ y. With the NTK, it is where gradient flow takes a linearized
    network that starts from zero. A kernel that is singular up to rounding gets a jitter, and an
    :class:`IllConditionedWarning` says so.

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
    training = Training.parse(k_train_train, y_train, diag_reg)
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
    training = Training.parse(k_train_train, y_train, diag_reg)
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
    training = Training.parse(k_train_train.ntk, y_train, diag_reg, "k_train_train.ntk")
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
