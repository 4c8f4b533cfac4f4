"""Layers of other packages, known by name: none of the packages is imported.

Letters: ``o``, ``i`` output and input features; ``k`` features or channels; ``p`` positions.
"""

from typing import Any

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.rules.embedding import embedding
from ggn_ntk.rules.normalization import channel_norm
from ggn_ntk.rules.registry import register_rule_by_name


@register_rule_by_name("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of ``y = x W + b``."""
    # x [N, ..., I], s [C, N, ..., O] -> [I, O], [O]
    x, s = (x.unsqueeze(1), s.unsqueeze(2)) if x.ndim == 2 else (x.flatten(1, -2), s.flatten(2, -2))
    return {"weight": Factored("cnpo,npi->cnio", (s, x)), "bias": Factored("cnpo->cno", (s,))}


@register_rule_by_name("transformers.models.*RMSNorm", "transformers.models.*.T5LayerNorm", "timm.layers.*.RmsNorm*")
def scaled_features(module: Any, x: Any, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobian of a layer that multiplies features by its weight, or by one plus its weight."""
    # x [N, ..., K], s [C, N, ..., K] -> [K]
    # The difference of its outputs with weights of ones and of zeros is what the weight multiplies, in either case.
    args = x if isinstance(x, tuple) else (x,)
    one, zero = (
        torch.func.functional_call(module, {"weight": torch.full_like(module.weight, value)}, args)
        for value in (1.0, 0.0)
    )
    factor = (one - zero).flatten(1, -2) if one.ndim > 2 else (one - zero).unsqueeze(1)
    return {"weight": Factored("cnpk,npk->cnk", (s.reshape(*s.shape[:2], -1, s.shape[-1]), factor))}


@register_rule_by_name("transformers.models.*ScaledWordEmbedding")
def scaled_embedding(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobian of a table look-up, multiplied by a number."""
    # x [N, ...], s [C, N, ..., K] -> [V, K]
    return embedding(module, x, s * module.embed_scale)


@register_rule_by_name("timm.layers.*.LayerNorm2d", "torchvision.models.convnext.LayerNorm2d")
def layer_norm_of_channels(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a normalisation over the channels of an image."""
    # x [N, K, H, W], s [C, N, K, H, W] -> [K]
    return channel_norm(module, x, s)


@register_rule_by_name("timm.layers.*.BatchNormAct2d")
def batch_norm_with_activation(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a BatchNorm with a nonlinearity behind it, which acts on each entry by itself."""
    # x [N, K, H, W], s [C, N, K, H, W] -> [K]
    shape = (1, -1, 1, 1)
    normalized = (x - module.running_mean.reshape(shape)) * torch.rsqrt(module.running_var + module.eps).reshape(shape)
    with torch.enable_grad():
        scaled = (normalized * module.weight.reshape(shape) + module.bias.reshape(shape)).detach().requires_grad_()
        (derivative,) = torch.autograd.grad(module.act(module.drop(scaled.clone())).sum(), scaled)
    s = (s * derivative).flatten(3)
    return {
        "weight": Factored("cnkp,nkp->cnk", (s, normalized.flatten(2))),
        "bias": Factored("cnkp->cnk", (s,)),
    }
