"""Embeddings: products of a table with one-hot vectors of tokens.

Letters: ``v`` rows of the vocabulary; ``k`` features; ``p`` positions.
"""

import torch
from torch import Tensor, nn

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.rules.registry import register_rule


@register_rule(nn.Embedding)
def embedding(module: nn.Embedding, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobian of a table look-up: the product with a one-hot vector of each token."""
    # x [N, ...], s [C, N, ..., K] -> [V, K]
    s = s.reshape(*s.shape[:2], -1, s.shape[-1])
    return {"weight": Factored("cnpk,npv->cnvk", (s, _one_hot(module, x.reshape(len(x), -1))))}


@register_rule(nn.EmbeddingBag)
def embedding_bag(module: nn.EmbeddingBag, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobian of sums, means or maxima over the rows of a bag of tokens."""
    # x [N, P], s [C, N, K] -> [V, K]
    tokens = _one_hot(module, x)  # [N, P, V]
    if module.mode == "max":
        return {"weight": Factored("cnk,nkv->cnvk", (s, tokens._replace(places=_maxima(module, tokens.places))))}
    # A mean is over the tokens of a bag without its padding.
    counts = (tokens.places >= 0).sum(1, keepdim=True).clamp(min=1) if module.mode == "mean" else 1
    weights = torch.ones_like(x, dtype=s.dtype) / counts
    return {"weight": Factored("cnk,np,npv->cnvk", (s, weights, tokens))}


def _one_hot(module: nn.Embedding | nn.EmbeddingBag, tokens: Tensor) -> OneHot:
    """Turn tokens into one-hot vectors; padding, which has no gradient, into zeros."""
    # tokens [N, P] -> [N, P, V]
    if module.padding_idx is not None:
        tokens = tokens.masked_fill(tokens == module.padding_idx, -1)
    return OneHot(tokens, module.num_embeddings)


def _maxima(module: nn.EmbeddingBag, tokens: Tensor) -> Tensor:
    """Find the token that each feature of a bag's maximum comes from, the first of several."""
    # tokens [N, P], negative for padding -> [N, K]
    rows = module.weight[tokens.clamp(min=0)].masked_fill((tokens < 0).unsqueeze(2), -torch.inf)
    return tokens.gather(1, rows.argmax(1))
