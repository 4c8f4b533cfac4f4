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
def batch_norm_map(op: Operation) -> LinearMap | list[LinearMap] | None:
    """Write a normalisation of channels, by running statistics or those of its input."""
    return _normalized_input(op) if op.argument == "input" else _scaled(op, lambda: _normalized(op), channels=True)


def _normalized(op: Operation) -> Tensor:
    """Normalise channels."""
    shape = (1, -1, *[1] * (len(op.output) - 2))
    mean, scale = (t.reshape(shape) for t in _statistics(op))
    normalized: Tensor = (op["input"] - mean) * scale
    return normalized


def _statistics(op: Operation) -> tuple[Tensor, Tensor]:
    """Look up the mean of each channel, and one over its standard deviation."""
    if op["training"]:
        return op["result1"], op["result2"]
    return op["running_mean"], (op["running_var"] + op["eps"]).rsqrt()


@register_operation("weight_norm")
def weight_norm(op: Operation) -> LinearMap | list[LinearMap]:
    """Write ``v g / norm of v``, the norm over all axes but one."""
    v, scale = op["v"], op["g"] / op["result1"]
    unit = v / op["result1"]
    if op.argument == "g":
        return op.entrywise(unit)
    return [op.entrywise(scale), _across(op, op["dim"], -scale, unit, unit)]


def _normalized_input(op: Operation) -> LinearMap | list[LinearMap]:
    """Write a normalisation of channels in what is normalised: their mean and their norm do not pass."""
    x: Tensor = op["input"]
    shape = (1, -1, *[1] * (x.ndim - 2))
    weight = x.new_ones(x.shape[1]) if op["weight"] is None else op["weight"]
    scale = (weight * _statistics(op)[1]).reshape(shape)
    if not op["training"]:
        return op.entrywise(scale)
    mean = -scale * x.shape[1] / x.numel()
    ones, normalized = x.new_ones(()).expand(x.shape), _normalized(op)
    return [
        op.entrywise(scale),
        _across(op, 1, mean, None, ones),
        _across(op, 1, mean, normalized, normalized),
    ]


def _across(op: Operation, axis: int, factor: Tensor, output: Tensor | None, argument: Tensor) -> LinearMap:
    """Write a product of the output and one of the argument, which have but one axis in common."""
    # factor has this axis alone, others of length one
    letters = [letter_of(i) for i in range(len(op.shape))]
    others = [letter if i == axis else letter.upper() for i, letter in enumerate(letters)]
    operands = [(letters[axis], factor.flatten()), ("".join(others), argument)]
    operands += [] if output is None else [("".join(letters), output)]
    return LinearMap(tuple(letters), tuple(others), tuple(operands))


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
