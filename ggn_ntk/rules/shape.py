"""Layers that move entries and change none."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ggn_ntk.rules.registry import batched_vjp, register_backpropagation, stack_outputs, unstack_outputs


@register_backpropagation(
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, linear=True,
)  # fmt: skip
def reshape_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Give ``s`` the shape of the layer's input."""
    # x [N, ...], s [C, N, ...] -> [C, N, *layer input]
    return s.reshape(*s.shape[:2], *x.shape[1:])


def active_dropout(module: Any, x: Tensor, y: Tensor, g_inp: Tensor, g_out: Tensor) -> tuple[Tensor, Tensor]:
    """Recover the derivative of active dropout from a batch's output and its gradient; also, where it is unknown."""
    # Kept entries are multiplied by a factor, and shifted by alpha dropout ("Self-Normalizing Neural Networks", NeurIPS
    # 2017, appendix); all dropped ones become the same number. Gradients tell them apart unless they are zero.
    # input x, output y, gradient at the input g_inp, at the output g_out, each [N, ...] -> [N, ...], [N, ...]
    p, alpha = module.p, 0.0
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    factor = 1 / (1 - p)
    if isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
        alpha = 1.7580993408473766  # SELU's scale times its alpha
        factor = 1 / sqrt((alpha**2 * p + 1) * (1 - p))
    shift, dropped = factor * alpha * p, -factor * alpha * (1 - p)
    # Where the gradient is zero, outputs tell; an entry whose kept value would look dropped, too, stays unknown.
    rounding = 16 * torch.finfo(x.dtype).eps * abs(dropped)
    looks_dropped, kept_looks_dropped = ((t - dropped).abs() <= rounding for t in (y, factor * x + shift))
    told = g_out.isfinite() & (g_out != 0)
    kept = torch.where(told, g_inp.abs() > factor / 2 * g_out.abs(), ~looks_dropped)
    return factor * kept.to(x.dtype), ~told & looks_dropped & kept_looks_dropped


@register_backpropagation(
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    linear=True,
)  # fmt: skip
def linear_map_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by the transposed Jacobian of a linear layer without parameters, for outputs and samples at once."""
    # x [N, ...], s [C, N, ...] -> [C, N, *layer input]
    # A linear layer has the same Jacobian at any input: outputs and samples pass back as one batch of N C samples.
    stacked = stack_outputs(s)
    anywhere = x.new_zeros(()).expand(len(stacked), *x.shape[1:])
    return unstack_outputs(batched_vjp(module, anywhere, stacked.unsqueeze(0))[0], like=s)
