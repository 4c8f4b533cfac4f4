"""Normalisation and attention written out in elementary operations, for derivatives of second and higher order.

Torch's layer, batch and instance normalisation keep a mean and a standard deviation that it does not differentiate
further. Nested forward-mode derivatives through them are wrong without a word (seen: off by more than half on torch
2.15), and so are those by nested reverse mode. Transformer layers have a fused path without derivatives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def differentiable(degree: int) -> Iterator[None]:
    """Have models compute in operations that can be differentiated in forward mode.

    Args:
        degree: How often they will be. Normalisations are written out from the second derivative on.

    Yields:
        Nothing.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if degree < 2:
            yield
        else:
            with _Composite():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Composite(TorchFunctionMode):
    """Replaces calls of torch's normalisations by the functions below."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or what replaces it.

        Args:
            func: The function.
            types: Types that override it.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            Its result.
        """
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _normalize(x: Tensor, axes: list[int], eps: float) -> Tensor:
    """Shift and scale to mean 0 and variance 1.

    Args:
        x: Any tensor.
        axes: The axes over which mean and variance are taken.
        eps: Added to the variance.

    Returns:
        The normalised tensor.
    """
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def _scale_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply an affine map to each channel.

    Args:
        x: ``[N, C, ...]``.
        weight: ``[C]`` or ``None``.
        bias: ``[C]`` or ``None``.

    Returns:
        A tensor like ``x``.
    """
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
    """Normalise over the last axes, like ``torch.nn.functional.layer_norm``.

    Args:
        input: ``[..., *normalized_shape]``.
        normalized_shape: The shape of the last axes.
        weight: Of that shape, or ``None``.
        bias: Of that shape, or ``None``.
        eps: Added to the variance.

    Returns:
        A tensor like ``input``.
    """
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
    """Normalise over the batch, like ``torch.nn.functional.batch_norm``, but leave running statistics alone.

    Args:
        input: ``[N, C, ...]``.
        running_mean: ``[C]`` or ``None``.
        running_var: ``[C]`` or ``None``.
        weight: ``[C]`` or ``None``.
        bias: ``[C]`` or ``None``.
        training: Whether to use the statistics of the batch instead of the running ones.
        momentum: Not used.
        eps: Added to the variance.

    Returns:
        A tensor like ``input``.
    """
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
    """Normalise each image, like ``torch.nn.functional.instance_norm``, but leave running statistics alone.

    Args:
        input: ``[N, C, ...]``.
        running_mean: ``[C]`` or ``None``.
        running_var: ``[C]`` or ``None``.
        weight: ``[C]`` or ``None``.
        bias: ``[C]`` or ``None``.
        use_input_stats: Whether to use the statistics of the image instead of the running ones.
        momentum: Not used.
        eps: Added to the variance.

    Returns:
        A tensor like ``input``.
    """
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scale_channels(_normalize(input, [*range(2, input.ndim)], eps), weight, bias)


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
