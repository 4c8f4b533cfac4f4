"""Nonlinearities: what passes back through them."""

import pytest
import torch
from torch import nn

from ggn_ntk.rules.activation import relu_transposed


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_relu_passes_back_what_autograd_does(n, shared):
    x = torch.tensor([[-1.0, 0.0, 2.0, -0.0, torch.nan, 3.0]]).repeat(n, 1).requires_grad_()
    s = torch.randn(1 if shared else n, 4, 6)
    s[..., 0] = torch.inf  # where the input is negative
    s = s.transpose(0, 1).expand(4, n, 6)
    before, place = s.clone(), s.data_ptr()
    passed = relu_transposed(nn.ReLU(), x.detach(), s)
    for cotangent, found in zip(before, passed, strict=True):
        (expected,) = torch.autograd.grad(x.relu(), x, cotangent)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if shared and n > 1:
        torch.testing.assert_close(s, before, equal_nan=True)  # all samples share it
    elif not shared:
        assert passed.data_ptr() == place
