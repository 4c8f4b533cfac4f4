"""Normalisation layers with a learned scale. Letters: ``k`` features or channels; ``p`` positions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.rules.linear_map import LinearMap, Operation, letter_of, register_operation
from ggn_ntk.rules.registry import register_backpropagation, register_rule


@register_operation("layer_norm")
def layer_norm_map(op: Operation) -> LinearMap | None:
    """Write a normalisation over trailing axes, in its scale or shift."""
    return _scaled(op, lambda: (op["input"] - op["result1"]) * op["result2"])


@register_operation("rms_norm")
def rms_norm_map(op: Operation) -> LinearMap | None:
    """Write a division by the root mean square over trailing axes, in its scale."""
    return _scaled(op, lambda: op["input"] * op["result1"])


@register_operation("group_norm")
def group_norm_map(op: Operation) -> LinearMap | None:
    """Write a normalisation over groups of channels, in its scale or shift."""

    def normalized() -> Tensor:
        x: Tensor = op["input"]
        mean, scale = (op[name].unsqueeze(2) for name in ("result1", "result2"))
        normalized: Tensor = ((x.reshape(op["N"], op["group"], -1) - mean) * scale).reshape(x.shape)
        return normalized

    return _scaled(op, normalized, channels=True)


@register_operation("batch_norm")
def batch_norm_map(op: Operation) -> LinearMap | None:
    """Write a normalisation of channels, by running statistics or the batch's, in its scale or shift."""

    def normalized() -> Tensor:
        if op["training"]:
            mean, scale = op["result1"], op["result2"]
        else:
            mean, scale = op["running_mean"], (op["running_var"] + op["eps"]).rsqrt()
        shape = (1, -1, *[1] * (len(op.output) - 2))
        normalized: Tensor = (op["input"] - mean.reshape(shape)) * scale.reshape(shape)
        return normalized

    return _scaled(op, normalized, channels=True)


def _scaled(op: Operation, normalized: Callable[[], Tensor], *, channels: bool = False) -> LinearMap | None:
    """Write ``weight * normalized + bias``, along the trailing axes or that of channels."""
    if op.argument == "input":
        return None
    factors = [normalized()] if op.argument == "weight" else []
    written = op.entrywise(*factors)
    return written._replace(argument=(letter_of(1),)) if channels else written


def _scale_and_shift(normalized: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of ``y = weight * normalized + bias``."""
    # normalized [N, P, K], s [C, N, P, K] -> [K]
    return {"weight": Factored("cnpk,npk->cnk", (s, normalized)), "bias": Factored("cnpk->cnk", (s,))}


def _bare(module: Any, x: Tensor) -> Tensor:
    """Normalise without scaling and shifting: the layer itself, with neutral parameters."""
    # x [N, ...] -> [N, ...]
    neutral = {"weight": torch.ones_like(module.weight)}
    if getattr(module, "bias", None) is not None:
        neutral["bias"] = torch.zeros_like(module.bias)
    normalized: Tensor = torch.func.functional_call(module, neutral, (x,))
    return normalized


@register_rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a layer that scales trailing axes."""
    # x [N, ..., *features], s [C, N, ..., *features] -> [*features]
    if module.weight is None:
        return {}
    c, n, features = *s.shape[:2], module.weight.numel()
    return _scale_and_shift(_bare(module, x).reshape(n, -1, features), s.reshape(c, n, -1, features))


@register_rule(
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
def channel_norm(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a layer that scales channels."""
    # x [N, K, *positions], s [C, N, K, *positions] -> [K]
    if module.weight is None:
        return {}
    normalized = _bare(module, x).reshape(*x.shape[:2], -1)
    s = s.reshape(*s.shape[:3], -1)
    return _scale_and_shift(normalized.transpose(1, 2), s.transpose(2, 3))


@register_backpropagation(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, linear=True)
def batch_norm_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by the scale of each channel."""
    # s [C, N, K, *positions] -> [C, N, K, *positions]
    # Statistics are the running ones: in train mode samples would interact, which is refused before.
    scale = torch.rsqrt(module.running_var + module.eps)
    scale = scale if module.weight is None else scale * module.weight
    return s * scale.reshape(-1, *[1] * (s.ndim - 3))
