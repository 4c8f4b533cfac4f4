"""Max pooling: a selection that differs between samples."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk.rules.registry import channels_last, register_backpropagation, stack_outputs, unstack_outputs

_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


@register_backpropagation(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Send each entry back to where the maximum was."""
    # x [N, K, *spatial], s [C, N, K, *positions] -> [C, N, K, *spatial]
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    _, places = _MAX_POOL[x.ndim](x, **{name: getattr(module, name) for name in names}, return_indices=True)
    c, (n, k, *spatial) = s.shape[0], x.shape  # places [N, K, *positions] count entries of the flat spatial axes
    if _tiles(module, spatial):
        is_maximum = channels_last(torch.zeros_like(x).flatten(2).scatter_(2, places.flatten(2), 1).reshape(x.shape))
        return _spread(is_maximum, s)
    # An entry that is the maximum of several windows gets the sum of what they send back.
    product = s.new_zeros(n, c, k, prod(spatial))
    product.scatter_add_(3, places.flatten(2).unsqueeze(1).expand(-1, c, -1, -1), s.transpose(0, 1).flatten(3))
    return product.reshape(n, c, k, *spatial).transpose(0, 1)


def _tiles(module: Any, spatial: list[int]) -> bool:
    """Tell whether each entry of the input lies in exactly one window."""

    def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(spatial)

    sizes = each(module.kernel_size)
    plain = not any(each(module.padding)) and all(d == 1 for d in each(module.dilation))
    return plain and sizes == each(module.stride) and not any(n % k for n, k in zip(spatial, sizes, strict=True))


def _spread(is_maximum: Tensor, s: Tensor) -> Tensor:
    """Copy each entry of ``s`` to its window, and keep it where the maximum was: one pass over the result."""
    # is_maximum [N, K, *spatial], s [C, N, K, *positions] -> [C, N, K, *spatial]
    few = s[:, :1] if s.stride(1) == 0 else s  # one sample for all, where they share s
    entries = unstack_outputs(channels_last(stack_outputs(few)), like=few).expand_as(s).transpose(0, 1)
    windows = is_maximum.unsqueeze(1)
    # entries [N, C, K, *positions], windows [N, 1, K, *spatial]: each spatial axis is split into position and place in
    # the window, and entries have one value for all places.
    for axis in range(s.ndim - 1, 2, -1):
        windows = windows.unflatten(axis, (s.shape[axis], -1))
        entries = entries.unsqueeze(axis + 1)
    return (entries * windows).reshape(s.shape[1], s.shape[0], *is_maximum.shape[1:]).transpose(0, 1)
