"""Max pooling: a selection that differs between samples."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk.rules.registry import register_backpropagation

_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


@register_backpropagation(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Send each entry back to where the maximum was."""
    # x [N, K, *spatial], s [C, N, K, *positions] -> [C, N, K, *spatial]
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    _, places = _MAX_POOL[x.ndim](x, **{name: getattr(module, name) for name in names}, return_indices=True)
    c, (n, k, *spatial) = s.shape[0], x.shape  # places [N, K, *positions] count entries of the flat spatial axes
    # Channels come last in memory, as in convolutions: an entry of a sample is in place ``k + K * place``.
    flat = (k * places.flatten(2) + torch.arange(k, device=x.device).unsqueeze(1)).transpose(1, 2).reshape(n, 1, -1)
    entries = s.transpose(0, 1).flatten(3).transpose(2, 3).reshape(n, c, -1)
    product = s.new_zeros(n, c, k * prod(spatial))
    # An entry that is the maximum of several windows gets the sum of what they send back.
    put = product.scatter_ if _tiles(module, spatial) else product.scatter_add_
    put(2, flat.expand(-1, c, -1), entries)
    return product.reshape(n, c, *spatial, k).movedim(-1, 2).transpose(0, 1)


def _tiles(module: Any, spatial: list[int]) -> bool:
    """Tell whether each entry of the input lies in exactly one window."""

    def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(spatial)

    sizes = each(module.kernel_size)
    plain = not any(each(module.padding)) and all(d == 1 for d in each(module.dilation))
    return plain and sizes == each(module.stride) and not any(n % k for n, k in zip(spatial, sizes, strict=True))
