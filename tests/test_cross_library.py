"""Kernels as other libraries compute them: curvlinops' ``J Jᵀ`` and nngeometry's Gram matrix."""

import pytest
import torch
from conftest import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ggn_ntk import empirical_ntk

# linear_operator, which curvlinops imports, with torch 2.14
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()


def cnn():
    convolutions = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 4, 2, bias=False)
    model = nn.Sequential(*convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return model.double(), torch.randn(6, 1, 6, 6).double()


def by_curvlinops(model, x):
    """The kernel [N, N, C, C], assembled from the product of the Jacobian's operator and its adjoint."""
    from curvlinops import JacobianLinearOperator

    data = [(part, model(part)) for part in x.split(4)]
    jacobian = JacobianLinearOperator(model, list(model.parameters()), data)
    operator = jacobian @ jacobian.adjoint()  # [N C, N C]
    dense = operator @ torch.eye(operator.shape[1], dtype=x.dtype)
    return dense.reshape(len(x), -1, len(x), dense.shape[0] // len(x)).movedim(1, 2)


def by_nngeometry(model, x):
    """The kernel [N, N, C, C], from the Gram matrix [C, N, C, N] of the function space."""
    from nngeometry import GramMatrix

    before = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)  # that of its Jacobians of convolutions, whatever the model's
    try:
        gram = GramMatrix(model, DataLoader(TensorDataset(x), batch_size=4))
    finally:
        torch.set_default_dtype(before)
    return gram.to_torch().permute(1, 3, 0, 2)


@pytest.mark.parametrize("compute", ["full", "trace"])
@pytest.mark.parametrize("library", [by_curvlinops, by_nngeometry])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_full_and_trace(build, library, compute):
    model, x = build()
    expected = library(model, x).detach()
    if compute == "trace":
        expected = expected.diagonal(dim1=2, dim2=3).sum(-1)
    assert_close(empirical_ntk(model, x, compute=compute), expected)
    assert_close(empirical_ntk(model, x[:2], x[2:], compute=compute), expected[:2, 2:])
