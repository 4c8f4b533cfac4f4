"""Multi-head attention, whose projections are no modules of their own.

The projections to queries, keys and values and that of the result are linear layers; what lies in between is left to
autograd. In self-attention, autograd meets the projection to queries, keys and values on its way through the model
(:class:`ggn_ntk.rules.registry.Inner`); else the rule passes ``s`` back through the heads once more.

Letters: ``o``, ``i`` output and input features; ``g`` query, key and value; ``p`` positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.rules.registry import Inner, register_inner, register_rule


@register_rule(nn.MultiheadAttention)
def multihead_attention(module: nn.MultiheadAttention, x: tuple[Any, ...], s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of the projections."""
    # x (query [N, T, I], key [N, S, I], value [N, S, I], masks), s [C, N, T, O]
    if _adds_keys(module):
        return {}
    inputs = x[:3]
    queries = [t.requires_grad_() for t in _project(module, inputs)]
    with torch.enable_grad():
        attended = _attend(module, queries, *x[3:])
    # s at the queries, keys and values: each [C, N, positions, O]
    passed = torch.autograd.grad(attended, queries, s @ module.out_proj.weight, is_grads_batched=True)
    jacobians = _out_projection(attended.detach(), s)
    jacobians["in_proj_bias"] = Factored("cngpo->cngo", (_stack(passed, 2),))
    if module.in_proj_weight is None:
        for key, own, t in zip("qkv", passed, inputs, strict=True):
            jacobians[f"{key}_proj_weight"] = Factored("cnpo,npi->cnoi", (own, t))
    else:
        operands = (_stack(passed, 2), _stack(inputs, 1))
        jacobians["in_proj_weight"] = Factored("cngpo,ngpi->cngoi", operands)
    return jacobians


@register_inner(multihead_attention)
def self_attention(module: nn.MultiheadAttention, x: tuple[Any, ...]) -> Inner | None:
    """State where the queries, keys and values of self-attention come from: a single product."""
    # torch computes it with positions in front, [T, N, 3 O].
    same = all(t.data_ptr() == x[0].data_ptr() and t.shape == x[0].shape for t in x[:3])
    if _adds_keys(module) or module.in_proj_weight is None or not same:
        return None
    n, positions = x[0].shape[:2]
    shape = Size([positions, n, len(module.in_proj_weight)])
    return Inner(("in_proj_weight", "in_proj_bias"), shape, 1, packed_projection, projection_out)


def packed_projection(module: nn.MultiheadAttention, x: tuple[Any, ...], s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of the projection to queries, keys and values."""
    # x[0] [N, T, I], s [C, N, T, 3 O]
    return {"in_proj_weight": Factored("cnpo,npi->cnoi", (s, x[0])), "in_proj_bias": Factored("cnpo->cno", (s,))}


def projection_out(module: nn.MultiheadAttention, x: tuple[Any, ...], s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of the projection of what the heads return."""
    # s [C, N, T, O]
    return _out_projection(_attend(module, _project(module, x[:3]), *x[3:]), s)


def _out_projection(attended: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of the projection of what the heads return."""
    # attended [N, T, O], s [C, N, T, O]
    weight = Factored("cnpo,npi->cnoi", (s, attended))
    return {"out_proj.weight": weight, "out_proj.bias": Factored("cnpo->cno", (s,))}


def _adds_keys(module: nn.MultiheadAttention) -> bool:
    """Tell whether a layer attends to keys and values of its own, for which there is no rule."""
    return module.bias_k is not None or module.add_zero_attn


def _project(module: nn.MultiheadAttention, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute queries, keys and values."""
    # inputs, each [N, positions, I] -> each [N, positions, O]
    weights: Sequence[Any] = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(t, w, b) for t, w, b in zip(inputs, weights, biases, strict=True)]


def _attend(
    module: nn.MultiheadAttention,
    projected: Sequence[Tensor],
    padding: Tensor | None = None,
    need_weights: bool = True,
    mask: Tensor | None = None,
    *options: bool,
) -> Tensor:
    """Compute what the heads return."""
    # projected [N, positions, O], padding [N, S], mask [T, S] or [N * heads, T, S] -> [N, T, O]
    # heads, each [N, heads, positions, O / heads]
    heads = [t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in projected]
    total = projected[0].new_zeros(())  # what masks add to the scores [N, heads, T, S]
    if mask is not None:
        added = _additive(mask, total)
        total = total + (added.unflatten(0, (-1, module.num_heads)) if mask.ndim == 3 else added)
    if padding is not None:
        total = total + _additive(padding, total)[:, None, None]
    weights = (heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[-1] ** 0.5 + total).softmax(-1)
    attended: Tensor = (weights @ heads[2]).transpose(1, 2).flatten(2)
    return attended


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Write a mask as what is added to the scores."""
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _stack(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Stack tensors of queries, keys and values, with zeros for positions that one lacks."""
    # tensors [..., positions, features]
    length = max(t.shape[-2] for t in tensors)
    return torch.stack([F.pad(t, (0, 0, 0, length - t.shape[-2])) for t in tensors], axis)
