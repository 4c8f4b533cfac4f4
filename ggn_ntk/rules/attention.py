"""Multi-head attention, whose projections are no modules of their own.

They are linear layers; what lies between them is left to autograd.

Letters: ``o``, ``i`` output and input features; ``g`` query, key and value; ``p`` positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk.rules.registry import Factored, register_rule


@register_rule(nn.MultiheadAttention)
def multihead_attention(module: nn.MultiheadAttention, x: tuple[Any, ...], s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of the projections.

    Args:
        module: The layer.
        x: Its arguments: query ``[N, T, I]``, key and value ``[N, S, I]``, with the samples in front, and options.
        s: ``[C, N, T, O]``, for its first result.

    Returns:
        The Jacobians of weights and biases of the projections in and out; of none for options that add keys.
    """
    if module.bias_k is not None or module.add_zero_attn:
        return {}
    inputs, options = x[:3], dict(zip(("mask", "need_weights", "attn_mask"), x[3:6], strict=False))
    queries = [t.requires_grad_() for t in _project(module, inputs)]
    with torch.enable_grad():
        attended = _attend(module, queries, options.get("mask"), options.get("attn_mask"))
    passed = torch.autograd.grad(attended, queries, s @ module.out_proj.weight, is_grads_batched=True)
    jacobians = {
        "out_proj.weight": Factored("cnpo,npi->cnoi", (s, attended.detach())),
        "out_proj.bias": Factored("cnpo->cno", (s,)),
        "in_proj_bias": Factored("cngpo->cngo", (_stack(passed, 2),)),
    }
    if module.in_proj_weight is None:
        for key, own, t in zip("qkv", passed, inputs, strict=True):
            jacobians[f"{key}_proj_weight"] = Factored("cnpo,npi->cnoi", (own, t))
    elif all(t.data_ptr() == inputs[0].data_ptr() and t.shape == inputs[0].shape for t in inputs):
        jacobians["in_proj_weight"] = Factored("cnpo,npi->cnoi", (torch.cat(passed, -1), inputs[0]))
    else:
        operands = (_stack(passed, 2), _stack(inputs, 1))
        jacobians["in_proj_weight"] = Factored("cngpo,ngpi->cngoi", operands)
    return jacobians


def _project(module: nn.MultiheadAttention, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute queries, keys and values.

    Args:
        module: The layer.
        inputs: ``[N, T, I]``, ``[N, S, I]``, ``[N, S, I]``.

    Returns:
        ``[N, T, O]``, ``[N, S, O]``, ``[N, S, O]``.
    """
    weights: Sequence[Any] = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(t, w, b) for t, w, b in zip(inputs, weights, biases, strict=True)]


def _attend(
    module: nn.MultiheadAttention, projected: Sequence[Tensor], padding: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Compute what the heads return.

    Args:
        module: The layer.
        projected: Queries ``[N, T, O]``, keys and values ``[N, S, O]``.
        padding: ``[N, S]``, which keys to leave out: true, or minus infinity.
        mask: ``[T, S]`` or ``[N * heads, T, S]``, the same for each query.

    Returns:
        ``[N, T, O]``.
    """
    heads = [t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in projected]
    total = projected[0].new_zeros(())
    if mask is not None:
        added = _additive(mask, total)
        total = total + (added.unflatten(0, (-1, module.num_heads)) if mask.ndim == 3 else added)
    if padding is not None:
        total = total + _additive(padding, total)[:, None, None]
    weights = (heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[-1] ** 0.5 + total).softmax(-1)
    attended: Tensor = (weights @ heads[2]).transpose(1, 2).flatten(2)
    return attended


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Write a mask as what is added to the scores.

    Args:
        mask: True where a score is left out, or what to add.
        like: A tensor of the scores' dtype.

    Returns:
        What to add.
    """
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _stack(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Stack tensors of queries, keys and values, with zeros for positions that one lacks.

    Args:
        tensors: ``[..., positions, features]``.
        axis: Where to stack them.

    Returns:
        The stack; features padded too where they differ.
    """
    length = max(t.shape[-2] for t in tensors)
    return torch.stack([F.pad(t, (0, 0, 0, length - t.shape[-2])) for t in tensors], axis)
