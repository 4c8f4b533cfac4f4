"""Max pooling: a selection that differs between samples."""

from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk.rules.registry import register_backpropagation

_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


@register_backpropagation(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Send each entry back to where the maximum was.

    Args:
        module: The layer.
        x: Its input ``[N, K, *spatial]``.
        s: ``[C, N, K, *positions]``.

    Returns:
        ``[C, N, K, *spatial]``.
    """
    options = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
    _, places = _MAX_POOL[x.ndim](x, **options, return_indices=True)
    c, (n, k, *spatial) = s.shape[0], x.shape
    product = s.new_zeros(n, c, k, prod(spatial))
    product.scatter_add_(3, places.flatten(2).unsqueeze(1).expand(-1, c, -1, -1), s.transpose(0, 1).flatten(3))
    return product.reshape(n, c, k, *spatial).transpose(0, 1)
