"""Nonlinearities that act on each entry by itself."""

from typing import Any

import torch
from torch import Tensor, nn

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.rules.registry import register_backpropagation, register_rule


@register_backpropagation(
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
def elementwise_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by the derivative of each entry, which one backward pass yields for all of them."""
    # x [N, ...], s [C, N, ...] -> [C, N, ...]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        entries = torch.func.functional_call(module, {}, (x.clone(),))  # a clone, for layers that work in place
        (derivative,) = torch.autograd.grad(entries.sum(), x)
    return multiply_entries(s, derivative)


@register_backpropagation(nn.ReLU)
def relu_transposed(module: nn.ReLU, x: Tensor, s: Tensor) -> Tensor:
    """Keep entries where the input is positive, as :func:`elementwise_transposed` does in more passes."""
    # x [N, ...], s [C, N, ...] -> [C, N, ...]
    # By the function that autograd calls: one pass, where a mask takes three.
    operation, of_samples = torch.ops.aten.threshold_backward, s.transpose(0, 1)
    x = x.unsqueeze(1).expand_as(of_samples)
    if s.stride(1) == 0:  # all samples share it
        passed: Tensor = operation(of_samples, x, 0)
        return passed.transpose(0, 1)
    operation.grad_input(of_samples, x, 0, grad_input=of_samples)
    return s


def active_rrelu(module: nn.RReLU, x: Tensor, y: Tensor, g_inp: Tensor, g_out: Tensor) -> tuple[Tensor, Tensor]:
    """Recover the slope drawn for each entry from a batch's output and its gradient; also, where it is unknown."""
    # input x, output y, gradient at the input g_inp, at the output g_out, each [N, ...] -> [N, ...], [N, ...]
    told = g_out.isfinite() & (g_out != 0)  # elsewhere the output tells the slope, unless the input is zero
    unknown = ~told & (x == 0)
    derivative = torch.where(told, g_inp, y) / torch.where(told, g_out, x)
    return derivative.masked_fill(unknown, 1), unknown


def multiply_entries(s: Tensor, derivative: Tensor) -> Tensor:
    """Multiply each entry by the derivative of its nonlinearity."""
    # s [C, N, ...], derivative [N, ...] -> [C, N, ...]
    # An ``s`` that all samples share cannot be overwritten. The result has samples outermost in memory, so that a block
    # of them is one run.
    if s.stride(1) == 0:
        return (s.transpose(0, 1) * derivative.unsqueeze(1)).transpose(0, 1)
    return s.mul_(derivative)


@register_rule(nn.PReLU)
def prelu(module: nn.PReLU, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobian of ``y = x where x > 0 else weight * x``."""
    # x [N, K, *positions], s [C, N, K, *positions] -> [K], or [1] for a weight that all channels share
    channels = module.num_parameters
    negative = x.clamp(max=0).reshape(len(x), channels, -1)  # [N, K, P]
    s = s.reshape(*s.shape[:2], channels, -1)  # [C, N, K, P]
    return {"weight": Factored("cnkp,nkp->cnk", (s, negative))}
