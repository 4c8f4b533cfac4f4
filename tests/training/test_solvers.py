"""Regression and posteriors by Cholesky, by iterative solvers, and from operators: against eigenvectors."""

import math
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, gmres, lsmr, minres
from torch import nn

from ggn_ntk import empirical_ntk, tiled_ntk
from ggn_ntk.spectrum import as_matrix, decompositions, eigenvectors, lanczos, matrix
from ggn_ntk.training import (
    IllConditionedWarning,
    gradient_flow_mse,
    kernel_ridge_regression,
    max_learning_rate,
    nngp_posterior,
)

# linear_operator, which curvlinops imports, with torch 2.14
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def kernels(n=6, m=3, out=(2,), seed=0):
    """Random kernels of training and test samples."""
    generator = torch.Generator().manual_seed(seed)
    c = math.prod(out)
    j = torch.randn(n + m, c, 3 * (n + m) * c, dtype=torch.float64, generator=generator)
    full = torch.einsum("ncp,mdp->nmcd", j, j).reshape(n + m, n + m, *out, *out)
    return full[:n, :n], full[n:, :n], full[n:, n:]


def by_eigenvectors(k_train_train, y, k_test_train, diag_reg):
    """Kernel regression by its definition, with an eigendecomposition."""
    train, cross = as_matrix(k_train_train).double(), as_matrix(k_test_train).double()
    values, vectors = torch.linalg.eigh(train)
    values = values + diag_reg * train.diagonal().mean()
    weights = vectors @ ((vectors.T @ y.double().flatten()) / values)
    return (cross @ weights).reshape(len(k_test_train), *y.shape[1:])


def scipy_operator(kernel):
    operator = aslinearoperator(as_matrix(kernel).numpy())
    operator.diagonal = as_matrix(kernel).diagonal().numpy
    return operator


def torch_operator(kernel):
    """An operator of curvlinops' kind."""
    from curvlinops.examples import TensorLinearOperator

    operator = TensorLinearOperator(as_matrix(kernel).contiguous())
    operator.diagonal = as_matrix(kernel).diagonal
    return operator


class Store:
    """A kernel on disk, say."""

    def __init__(self, kernel):
        self.kernel, self.shape, self.dtype = kernel, tuple(kernel.shape), "float64"

    def to_torch(self, device=None):
        return self.kernel.to(device or "cpu")


# ---------------------------------------------------------------- Cholesky


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 5),
    out=st.sampled_from([(), (1,), (3,), (2, 2)]),
    reg=st.sampled_from([0.0, 1e-6, 0.1]),
    seed=st.integers(0, 99),
    symmetric_up_to_rounding=st.booleans(),
)
def test_cholesky_is_the_eigendecomposition(n, out, reg, seed, symmetric_up_to_rounding):
    torch.manual_seed(seed)
    train, cross, _ = kernels(n, 2, out, seed)
    if symmetric_up_to_rounding:
        train = train * (1 + 1e-15 * torch.randn_like(train))
    y = torch.randn(n, *out).double()
    expected = by_eigenvectors(train, y, cross, reg)
    actual = kernel_ridge_regression(train, y, diag_reg=reg)(cross)
    assert (actual - expected).norm() <= 1e-8 * expected.norm()


def test_kernels_of_several_tiles(monkeypatch):
    """Their symmetric part is taken tile by tile, of a copy."""
    monkeypatch.setattr(matrix, "_TILE", 4)
    train, cross, _ = kernels(5, 3, (2,))
    kept, y = train.clone(), torch.randn(5, 2).double()
    expected = by_eigenvectors(train, y, cross, 0.0)
    assert torch.allclose(kernel_ridge_regression(train, y, diag_reg=0.0)(cross), expected, rtol=1e-8)
    plain = train[..., 0, 0].contiguous()  # which is a matrix as it stands
    kernel_ridge_regression(plain, y, diag_reg=0.5)
    nngp_posterior(plain, y, diag_reg=0.5)
    assert torch.equal(train, kept)
    assert torch.equal(plain, kept[..., 0, 0])
    with pytest.raises(ValueError, match="k_train_train must be symmetric"):
        kernel_ridge_regression(train + torch.ones(5, 5).triu(1)[..., None, None], y)
    for bad in (math.nan, math.inf):
        kept[4, 1, 0, 1] = bad
        with pytest.raises(ValueError, match="k_train_train holds numbers that are not finite"):
            kernel_ridge_regression(kept, y)
    large = torch.full((3, 3), 3e38) + 1e37 * torch.eye(3)  # a sum that overflows
    with warnings.catch_warnings(action="error"):
        kernel_ridge_regression(large, y[:3], diag_reg=1.0)


@pytest.mark.parametrize("smallest", [10 ** (-power / 4) for power in range(20, 80)], ids="{:.3g}".format)
def test_kernels_are_singular_where_eigenvalues_say_so(smallest):
    """Cholesky factors tell in each case, whether they do so at once or not."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    values = torch.cat([torch.tensor([smallest]).double(), torch.linspace(0.1, 1, 11).double()])
    kernel, y = (basis * values) @ basis.T, basis.sum(1)
    kernel = (kernel + kernel.T) / 2
    rounding = 10 * torch.finfo(torch.float64).eps * kernel.norm().item()
    assert abs(smallest - rounding) > 0.1 * rounding  # or else it is neither
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = kernel_ridge_regression(kernel, y)(kernel)
    assert [w.category for w in caught] == [IllConditionedWarning] * (smallest < rounding)
    assert torch.allclose(actual, y, atol=10 * math.sqrt(torch.finfo(torch.float64).eps) + 1e-15 / smallest) or caught


def test_a_second_factorisation_is_for_doubtful_kernels(monkeypatch):
    counted = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: counted.append(1) or original(a))
    y = torch.ones(3).double()
    for smallest, factorisations in ((1.0, 1), (1e-5, 1), (1e-13, 2)):
        counted.clear()
        kernel_ridge_regression(torch.diag(torch.tensor([1.0, 2.0, smallest]).double()), y)
        assert len(counted) == factorisations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_negative_eigenvalues_count_as_zero(dtype):
    """Also where they are larger than the jitter, which is that of the mean."""
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    kernel = torch.diag(torch.tensor([1.0, 1e-3, -0.9 * tolerance], dtype=dtype))
    y = torch.ones(3, dtype=dtype)
    with pytest.warns(IllConditionedWarning, match="k_train_train is singular up to rounding") as caught:
        regression = kernel_ridge_regression(kernel, y)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name]
    jitter = tolerance * kernel.double().diagonal().mean().item()
    expected = torch.tensor([1 / (1 + jitter), 1 / (1e-3 + jitter), 1 / jitter]).double()
    assert torch.allclose(regression(torch.eye(3, dtype=dtype)).double(), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="must be positive semi-definite, but its eigenvalues, with diag_reg=0, go"):
        kernel_ridge_regression(kernel - 2 * tolerance * torch.eye(3, dtype=dtype), y)


def test_large_singular_kernels_say_how_singular(monkeypatch):
    monkeypatch.setattr(lanczos, "_SMALL", 10)
    features = torch.randn(30, 4).double()
    kernel = features @ features.T
    largest = torch.linalg.eigvalsh(kernel)[-1].item()
    condition = largest / (10 * torch.finfo(torch.float64).eps * kernel.norm().item())
    with pytest.warns(IllConditionedWarning, match=rf"a condition number above {condition:.1e}".replace("+", r"\+")):
        kernel_ridge_regression(kernel, torch.randn(30, 2).double())


def test_posterior_of_several_matrices():
    """A kernel of its own for each output."""
    train, cross, prior = (k.diagonal(dim1=2, dim2=3) for k in kernels(5, 2, (3,)))
    y = torch.randn(5, 3).double()
    mean, covariance = nngp_posterior(train, y, diag_reg=0.1)(cross, prior)
    for c in range(3):
        one = nngp_posterior(train[..., c], y[:, c], diag_reg=0.0)
        ridge = 0.1 * train.diagonal(dim1=0, dim2=1).mean() * torch.eye(5)
        one = nngp_posterior(train[..., c] + ridge, y[:, c])(cross[..., c], prior[..., c])
        assert torch.allclose(mean[:, c], one.mean)
        assert torch.allclose(covariance[..., c], one.covariance)


# ---------------------------------------------------------------- solvers and operators


@pytest.mark.parametrize("make", [scipy_operator, torch_operator], ids=["scipy", "curvlinops"])
@pytest.mark.parametrize("out", [(), (2,), (2, 2)], ids=str)
@pytest.mark.parametrize("reg", [0.0, 0.1])
def test_operators_are_the_kernels_that_they_stand_for(make, out, reg):
    train, cross, prior = kernels(6, 3, out)
    y = torch.randn(6, *out).double()
    expected = kernel_ridge_regression(train, y, diag_reg=reg)(cross)
    regression = kernel_ridge_regression(make(train), y, diag_reg=reg)
    for k_test_train in (cross, make(cross), Store(cross)):
        actual = regression(k_test_train)
        assert actual.shape == expected.shape
        assert actual.dtype == torch.float64
        assert (actual - expected).norm() <= 1e-8 * expected.norm()
    expected = nngp_posterior(train, y, diag_reg=reg)(cross, prior)
    for actual in (
        nngp_posterior(make(train), y, diag_reg=reg)(make(cross), prior),
        nngp_posterior(train, y, diag_reg=reg)(make(cross), Store(prior)),
    ):
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            assert (a - b).norm() <= 1e-8 * prior.norm()
    assert max_learning_rate(make(train)) == pytest.approx(max_learning_rate(train), rel=1e-10)


def test_operators_of_kernels_that_outputs_share():
    train, cross, prior = (k[..., 0, 0].contiguous() for k in kernels())
    y = torch.randn(6, 4).double()
    expected = kernel_ridge_regression(train, y, diag_reg=0.1)(cross)
    actual = kernel_ridge_regression(scipy_operator(train), y, diag_reg=0.1)(scipy_operator(cross))
    assert torch.allclose(actual, expected)
    expected = nngp_posterior(train, y, diag_reg=0.1)(cross, prior)
    actual = nngp_posterior(scipy_operator(train), y, diag_reg=0.1)(cross, prior)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    full, _, _ = kernels()
    places, columns = full[..., 0, 0], torch.randn(6, 2, 3).double()
    pairs = torch.einsum("nm,ab->nmab", places, torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    expected = kernel_ridge_regression(pairs, columns, trace_axes=1)(pairs[:2])
    actual = kernel_ridge_regression(torch_operator(pairs), columns, trace_axes=1)(torch_operator(pairs[:2]))
    assert torch.allclose(actual, expected)
    assert max_learning_rate(torch_operator(pairs), y_train=columns, trace_axes=1) == pytest.approx(
        max_learning_rate(pairs, y_train=columns, trace_axes=1)
    )


@pytest.mark.parametrize(
    "solver",
    [
        partial(cg, rtol=1e-12),
        partial(minres, rtol=1e-12),
        partial(gmres, rtol=1e-12, atol=0.0),
        lambda a, b: np.linalg.solve(a @ np.eye(len(b)), b),
    ],
    ids=["cg", "minres", "gmres", "dense"],
)
def test_any_solver(solver):
    train, cross, prior = (k.diagonal(dim1=2, dim2=3) for k in kernels(5, 2, (3,)))
    y = torch.randn(5, 3).double()
    for k, k_cross, k_prior in ((train, cross, prior), kernels(5, 2, (3,))):
        expected = kernel_ridge_regression(k, y, diag_reg=0.01)(k_cross)
        actual = kernel_ridge_regression(k, y, diag_reg=0.01, solver=solver)(k_cross)
        assert torch.allclose(actual, expected, rtol=1e-8)
        expected = nngp_posterior(k, y, diag_reg=0.01)(k_cross, k_prior).covariance
        actual = nngp_posterior(k, y, diag_reg=0.01, solver=solver)(k_cross, k_prior).covariance
        assert torch.allclose(actual, expected, atol=1e-8 * k_prior.norm().item())


def test_operators_of_networks():
    """Regression with a network's kernel that is never formed."""
    from ggn_ntk.operators import NTKOperator

    model = mlp(nn.Tanh)().double()
    x, x_test, y = torch.randn(6, 5).double(), torch.randn(2, 5).double(), torch.randn(6, 3).double()
    kernel, cross, prior = empirical_ntk(model, x), empirical_ntk(model, x_test, x), empirical_ntk(model, x_test)
    operator, cross_operator = NTKOperator(model, x), NTKOperator(model, x_test, x)
    expected = kernel_ridge_regression(kernel, y, diag_reg=0.01)(cross)
    assert torch.allclose(kernel_ridge_regression(operator, y, diag_reg=0.01)(cross_operator), expected, rtol=1e-8)
    expected = nngp_posterior(kernel, y, diag_reg=0.01)(cross, prior).covariance
    actual = nngp_posterior(operator, y, diag_reg=0.01)(cross_operator, prior).covariance
    assert torch.allclose(actual, expected, atol=1e-9 * prior.norm().item())
    assert max_learning_rate(operator) == pytest.approx(max_learning_rate(kernel), rel=1e-10)
    values, vectors = eigenvectors(operator, 3)
    assert torch.allclose(values, eigenvectors(kernel, 3).values)
    assert torch.allclose(as_matrix(kernel) @ vectors, vectors * values, atol=1e-9)


def test_stores_are_read(tmp_path):
    model = mlp(nn.Tanh)().double()
    x, y = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    kernel, store = empirical_ntk(model, x), tiled_ntk(model, x, store=tmp_path / "kernel", tile=3)
    expected = kernel_ridge_regression(kernel, y, diag_reg=0.1)(kernel[:2])
    actual = kernel_ridge_regression(store, y, diag_reg=0.1)(Store(kernel[:2]))
    assert torch.allclose(actual, expected, rtol=1e-10)
    assert max_learning_rate(store) == pytest.approx(max_learning_rate(kernel))
    assert torch.allclose(as_matrix(store), as_matrix(kernel))
    expected = gradient_flow_mse(kernel, y)(3.0, y.sin(), y.sin()[:2], kernel[:2])
    for actual, other in zip(
        gradient_flow_mse(store, y)(3.0, y.sin(), y.sin()[:2], torch.from_numpy(store[:2])), expected, strict=True
    ):
        assert torch.allclose(actual, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_keep_dtype_and_device(dtype, device):
    train, cross, _ = (k.to(device, dtype) for k in kernels())
    y = torch.randn(6, 2, dtype=dtype).to(device)
    operator = torch_operator(train)
    predicted = kernel_ridge_regression(operator, y, diag_reg=0.1)(torch_operator(cross))
    expected = kernel_ridge_regression(train, y, diag_reg=0.1)(cross)
    assert predicted.dtype == dtype
    assert predicted.device == expected.device
    assert torch.allclose(predicted, expected, rtol=100 * torch.finfo(dtype).eps ** 0.75)
    with pytest.raises(ValueError, match=r"y_train is on .* and k_train_train on .*: move one"):
        kernel_ridge_regression(operator, y.to("meta"), diag_reg=0.1)


def test_the_largest_eigenvalue_of_large_kernels(monkeypatch, device):
    train = kernels(20, 3, (3,))[0].to(device)
    expected = max_learning_rate(train)
    by_output = max_learning_rate(train.diagonal(dim1=2, dim2=3), y_train=torch.ones(20, 3).to(device))
    monkeypatch.setattr(lanczos, "_SMALL", 10)
    assert max_learning_rate(train) == pytest.approx(expected, rel=1e-12)
    assert max_learning_rate(train) == max_learning_rate(train)
    y = torch.ones(20, 3).to(device)
    assert max_learning_rate(train.diagonal(dim1=2, dim2=3), y_train=y) == pytest.approx(by_output, rel=1e-12)
    assert max_learning_rate(0 * train) == math.inf
    assert max_learning_rate(aslinearoperator(np.zeros((4, 4)))) == math.inf
    assert max_learning_rate(aslinearoperator(np.array([[3.0]]))) == pytest.approx(2 / 3)


# ---------------------------------------------------------------- bad arguments

K, Y = torch.eye(4).double(), torch.randn(4, 1).double()


def operator_of(entries):
    return aslinearoperator(np.asarray(entries))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "cg"}, TypeError, r"solver must be a callable solver\(operator, vector\), .*, got 'cg'"),
        ({"solver": lsmr}, TypeError, r"solver must return a NumPy vector of shape \[4\], or the pair .*, got tuple"),
        ({"solver": lambda a, b: b[:2]}, TypeError, r"solver must return a NumPy vector of shape \[4\].*, got ndarray"),
        ({"solver": lambda a, b: (b, 7)}, RuntimeError, r"its flag is 7, and the residual .* Pass a larger diag_reg"),
        ({"solver": lambda a, b: b * math.nan}, RuntimeError, "solver has not solved the system: its flag is 0"),
        (
            {"k_train_train": operator_of(np.eye(4)[:3])},
            ValueError,
            r"must have shape \[4, 4\] for y_train .* \[3, 4\]",
        ),
        ({"k_train_train": operator_of(np.eye(3))}, ValueError, r"k_train_train must have shape \[4, 4\] for y_train"),
        ({"k_train_train": operator_of(1j * np.eye(4))}, TypeError, "k_train_train must be an operator of real numb"),
        ({"k_train_train": operator_of(np.zeros((0, 0)))}, ValueError, r"an operator \[N1 C, N2 C\] and not empty"),
        ({"k_train_train": operator_of(np.triu(np.ones((4, 4))))}, ValueError, "k_train_train must be symmetric, the "),
        ({"k_train_train": operator_of(np.eye(4) * math.nan)}, ValueError, "k_train_train has products that are not f"),
        ({"k_train_train": operator_of(np.eye(4)), "diag_reg": 0.1}, ValueError, r"an operator without diagonal\(\)"),
        ({"k_train_train": operator_of(np.eye(4)), "diag_reg": -1}, ValueError, "diag_reg must be at least 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    arguments = {"k_train_train": K, "y_train": Y, **arguments}
    for function in (kernel_ridge_regression, nngp_posterior):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_bad_operators_of_other_functions():
    with pytest.raises(ValueError, match=r"k_train_train must be the kernel of a set with itself, \[N C, N C\], got"):
        max_learning_rate(operator_of(np.eye(4)[:3]))
    with pytest.raises(ValueError, match="k_train_train must be a tensor for diagonal_axes: it is a matrix for each"):
        kernel_ridge_regression(operator_of(np.eye(8)), Y.expand(4, 2), diagonal_axes=0)
    regression = kernel_ridge_regression(operator_of(np.eye(8)), Y.expand(4, 2))
    with pytest.raises(ValueError, match=r"k_test_train must have shape \[2, 8\], got \[3, 8\]"):
        regression(operator_of(np.ones((3, 8))))
    with pytest.raises(ValueError, match=r"k_test_train must have shape \[4, 8\], got \[4, 4\]"):
        regression(operator_of(np.ones((4, 4))))
    diagonal = kernel_ridge_regression(K[..., None].expand(4, 4, 2), Y.expand(4, 2))
    with pytest.raises(ValueError, match="k_test_train must be a tensor like the training set's kernel"):
        diagonal(operator_of(np.ones((8, 8))))


def test_operators_that_are_not_symmetric_need_no_adjoint():
    """A training set's kernel is its own."""
    numbers = as_matrix(kernels()[0]).numpy()
    operator = LinearOperator((12, 12), matvec=lambda v: numbers @ v, dtype=np.float64)
    y = torch.randn(6, 2).double()
    expected = kernel_ridge_regression(kernels()[0], y)(kernels()[1])
    actual = kernel_ridge_regression(operator, y, solver=partial(gmres, rtol=1e-12))(kernels()[1])
    assert torch.allclose(actual, expected)


def test_the_default_solver_says_when_it_fails():
    features = torch.randn(40, 3).double()
    kernel = as_matrix(features @ features.T)
    with pytest.raises(RuntimeError, match="solver has not solved the system"):
        kernel_ridge_regression(scipy_operator(kernel), torch.randn(40, 1).double())


def test_factors_are_lower_triangles():
    train = kernels()[0]
    axes = matrix.find_axes(train, "k", torch.ones(6, 2), "y", None, None)
    factors = decompositions.factorize(train, "k", axes, 0.0)[0]
    assert torch.equal(factors, factors.tril())
    assert torch.allclose(factors @ factors.T, as_matrix(train))
