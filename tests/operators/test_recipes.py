"""What other libraries compute with operators, against what follows from the matrix; more of it runs in the guide."""

import pytest
import torch
from cases import mlp
from torch import nn

from ggn_ntk import empirical_ntk
from ggn_ntk.models.comparison import relative_error
from ggn_ntk.operators import NTKOperator, as_matrix

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # linear_operator, with torch 2.14
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gpytorch"),
]


def setting(n=30, n_test=4):
    torch.manual_seed(0)
    model = mlp(nn.Tanh)().double()
    x, x_test, y = torch.randn(n, 5).double(), torch.randn(n_test, 5).double(), torch.randn(n, 3).double()
    return model, x, x_test, y


def dense_posterior(model, x, x_test, y, noise):
    """The mean [M C] and the covariance [M C, M C] of a Gaussian process."""
    train, cross = as_matrix(empirical_ntk(model, x)), as_matrix(empirical_ntk(model, x_test, x))
    inverse = torch.linalg.inv(train + noise * torch.eye(len(train)))
    return cross @ inverse @ y.flatten(), as_matrix(empirical_ntk(model, x_test)) - cross @ inverse @ cross.T


def test_gaussian_process():
    from curvlinops import CGInverseLinearOperator

    model, x, x_test, y = setting()
    train, test = NTKOperator(model, x, batch_size=8), NTKOperator(model, x_test, x)
    noise = 0.1
    inverse = CGInverseLinearOperator(train + noise * train.identity(), tolerance=1e-10, eps=0, max_iter=500)
    mean, covariance = dense_posterior(model, x, x_test, y, noise)
    assert relative_error(test @ (inverse @ y.flatten()), mean) < 1e-6
    columns = as_matrix(empirical_ntk(model, x, x_test))
    variance = NTKOperator(model, x_test).diagonal() - (columns * (inverse @ columns)).sum(0)
    assert relative_error(variance, covariance.diagonal()) < 1e-6


def test_natural_gradient_step():
    from curvlinops import CGInverseLinearOperator

    model, x, _, y = setting(n=8)
    kernel, damping = NTKOperator(model, x), 0.01
    r = (model(x) - y).detach().flatten()
    inverse = CGInverseLinearOperator(kernel + damping * kernel.identity(), tolerance=1e-9, eps=0, max_iter=500)
    step = kernel.jacobian().adjoint() @ (inverse @ r)
    rows = [torch.autograd.grad(f, list(model.parameters()), retain_graph=True) for f in model(x).flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = jacobian.T @ torch.linalg.solve(jacobian @ jacobian.T + damping * torch.eye(len(r)), r)
    assert relative_error(step, expected) < 1e-6
    # It is the damped Gauss-Newton step.
    gauss_newton = jacobian.T @ jacobian + damping * torch.eye(jacobian.shape[1])
    assert relative_error(step, torch.linalg.solve(gauss_newton, jacobian.T @ r)) < 1e-6


def test_gpytorch():
    gpytorch = pytest.importorskip("gpytorch")
    from linear_operator.operators import LinearOperator

    class Covariance(LinearOperator):
        def __init__(self, like, *, operator):
            super().__init__(like, operator=operator)
            self.operator = operator

        def _matmul(self, rhs):
            return self.operator @ rhs

        def _diagonal(self):
            return self.operator.diagonal()

        def _size(self):
            return torch.Size(self.operator.shape)

        def _transpose_nonbatch(self):
            return Covariance(*self._args, operator=self.operator.adjoint())

    class NTK(gpytorch.kernels.Kernel):
        def __init__(self, model):
            super().__init__()
            self.net = [model]

        def forward(self, x1, x2, diag=False, **_):
            operator = NTKOperator(self.net[0], x1, None if x1.equal(x2) else x2)
            return operator.diagonal() if diag else Covariance(x1.new_zeros(1), operator=operator)

    class Process(gpytorch.models.ExactGP):
        def __init__(self, x, y, likelihood, model):
            super().__init__(x, y, likelihood)
            self.mean_module, self.covariance = gpytorch.means.ZeroMean(), NTK(model)

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covariance(x))

    net, x, x_test, y = setting()
    model = nn.Sequential(net, nn.Linear(3, 1).double(), nn.Flatten(0))
    likelihood, noise = gpytorch.likelihoods.GaussianLikelihood().double(), 0.1
    likelihood.noise = noise
    process = Process(x, y[:, 0], likelihood, model).double().eval()
    mean, covariance = dense_posterior(model, x, x_test, y[:, 0], noise)
    settings = gpytorch.settings
    with torch.no_grad(), settings.max_cholesky_size(0), settings.cg_tolerance(1e-8), settings.max_cg_iterations(200):
        found = process(x_test)
    assert relative_error(found.mean, mean) < 1e-5
    assert relative_error(found.variance, covariance.diagonal()) < 1e-4
