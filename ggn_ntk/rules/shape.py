"""Layers that move entries and change none."""

from typing import Any

from torch import Tensor, nn

from ggn_ntk.rules.registry import batched_vjp, register_backpropagation, stack_outputs, unstack_outputs


@register_backpropagation(
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, linear=True,
)  # fmt: skip
def reshape_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Give ``s`` the shape of the layer's input.

    Args:
        module: The layer; dropout inactive.
        x: Its input ``[N, ...]``.
        s: ``[C, N, ...]``.

    Returns:
        ``[C, N, *layer input]``.
    """
    return s.reshape(*s.shape[:2], *x.shape[1:])


@register_backpropagation(
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    linear=True,
)  # fmt: skip
def linear_map_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by the transposed Jacobian of a linear layer without parameters, for outputs and samples at once.

    Args:
        module: The layer.
        x: Its input ``[N, ...]``.
        s: ``[C, N, ...]``.

    Returns:
        ``[C, N, *layer input]``.
    """
    stacked = stack_outputs(s)
    anywhere = x.new_zeros(()).expand(len(stacked), *x.shape[1:])
    return unstack_outputs(batched_vjp(module, anywhere, stacked.unsqueeze(0))[0], like=s)
