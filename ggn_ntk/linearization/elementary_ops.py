"""Operations written out in elementary ones, where torch gets derivatives of its own wrong, or has none.

Torch's layer, batch and instance normalisation keep a mean and a standard deviation that it does not differentiate
further. Nested derivatives through them, in forward and in reverse mode, are wrong without an error (off by more than
half on torch 2.15). Embedding bags have no derivative in forward mode, nor a second one in reverse mode, and neither
has the fused weight normalisation of GPUs. Sparse gradients cannot be differentiated. Transformer layers have a fused
path without derivatives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ggn_ntk.process.torch_internals import weight_norm


@contextmanager
def differentiable(degree: int) -> Iterator[None]:
    """Have models compute in operations that can be differentiated in forward mode, ``degree`` times."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with _Composite(_ALWAYS if degree < 2 else _ALWAYS | _NESTED):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Composite(TorchFunctionMode):
    """Replaces functions of torch by others."""

    def __init__(self, replacements: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        """Take the other functions, by those that they replace."""
        super().__init__()
        self.replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call what replaces a function of torch, or else itself."""
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


def _normalize(x: Tensor, axes: list[int], eps: float) -> Tensor:
    """Shift and scale to mean 0 and variance 1."""
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def _scale_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply an affine map to each channel."""
    # x [N, C, ...], weight [C], bias [C]
    shape = (1, -1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the last axes, like ``torch.nn.functional.layer_norm``."""
    # input [..., *normalized_shape]
    x = _normalize(input, [*range(-len(normalized_shape), 0)], eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the batch, like ``torch.nn.functional.batch_norm``, but leave running statistics alone."""
    # input [N, C, ...], running_mean [C], running_var [C], weight [C], bias [C]
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scale_channels(_normalize(input, [0, *range(2, input.ndim)], eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each image, like ``torch.nn.functional.instance_norm``, but leave running statistics alone."""
    # input [N, C, ...], running_mean [C], running_var [C], weight [C], bias [C]
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scale_channels(_normalize(input, [*range(2, input.ndim)], eps), weight, bias)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Reduce bags of rows of a table, like ``torch.nn.functional.embedding_bag``."""
    # input [N, L], weight [V, K], per_sample_weights [N, L] -> [N, K]
    if input.ndim != 2 or max_norm is not None:
        options = (norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx)
        return F.embedding_bag(input, weight, offsets, max_norm, *options)
    rows = F.embedding(input, weight)
    counts = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % len(weight)
    if mode == "max":
        # bags that hold nothing but padding are zero
        largest = rows.masked_fill(~counts[..., None], -torch.inf).max(dim=1).values
        return largest.masked_fill(~counts.any(1, keepdim=True), 0)
    factors = counts.to(rows.dtype) if per_sample_weights is None else counts * per_sample_weights
    total = (rows * factors[..., None]).sum(1)
    return total / counts.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows of a table, like ``torch.nn.functional.embedding``, with dense gradients, none for padding."""
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), rows.detach(), rows)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Scale to a norm, like ``torch._weight_norm``: over all axes but one, or over all for ``dim=-1``."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


_ALWAYS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    weight_norm: _weight_norm,
}
_NESTED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
