"""Every route against the float64 oracle, over all cases."""

import pytest
import torch
from cases import CASES
from conftest import METHODS, assert_close, oracle, oracle_sum

from ggn_ntk import empirical_ntk

# What a route does not support is refused: see test_vivit and test_structured.
pytestmark = pytest.mark.parametrize(
    ("case", "method"), [(c, m) for c in CASES for m in METHODS if c.supports(m)], ids=str
)


def test_kernel(case, method, compute, dtype, device):
    model, x1, x2 = case.build(dtype, device)
    kernel = empirical_ntk(model, x1, x2, compute=compute, method=method)
    assert_close(kernel, oracle_sum(case, compute=compute, device=device))


def test_symmetric_kernel(case, method, compute, dtype, device):
    model, x1, _ = case.build(dtype, device)
    kernel = empirical_ntk(model, x1, compute=compute, method=method)
    assert_close(kernel, oracle_sum(case, symmetric=True, compute=compute, device=device))
    transposed = kernel.transpose(0, 1)
    if compute == "full" and kernel.ndim > 2:
        k = (kernel.ndim - 2) // 2
        transposed = transposed.permute(0, 1, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
    assert torch.equal(kernel, transposed)


def test_per_parameter(case, method, compute, dtype, device):
    model, x1, x2 = case.build(dtype, device)
    kernels = empirical_ntk(model, x1, x2, compute=compute, method=method, per_parameter=True)
    expected = oracle(case.name, compute=compute, device=device)
    assert list(kernels) == list(expected)
    for name, kernel in kernels.items():
        assert_close(kernel, expected[name], scale=oracle_sum(case, compute=compute, device=device))
