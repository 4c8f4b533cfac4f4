"""Embeddings: products of a table with one-hot vectors of tokens.

Letters: ``v`` rows of the vocabulary; ``k`` features; ``p`` positions.
"""

import torch
from torch import Tensor, nn

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.rules.linear_map import LinearMap, Operation, letter_of, register_operation
from ggn_ntk.rules.registry import register_rule

# How bags are reduced, as autograd's graph has it.
_MEAN, _MAX = 1, 2


@register_operation("embedding")
def looked_up(op: Operation) -> LinearMap:
    """Write rows of a table."""
    tokens = op["indices"]
    places = OneHot(tokens.masked_fill(tokens == op["padding_idx"], -1), op.shape[0])
    own = tuple(map(letter_of, range(tokens.ndim)))
    return LinearMap((*own, "y"), ("z", "y"), (("".join(own) + "z", places),))


@register_operation("embedding_bag")
def bag(op: Operation) -> LinearMap | None:
    """Write sums, means or maxima over rows of a table, of bags of equal size."""
    bags, size = op.output[0], len(op["indices"]) // max(1, op.output[0])
    if op.argument != "weight" or not torch.equal(
        op["offsets"], torch.arange(bags, device=op["offsets"].device) * size
    ):
        return None
    if op["mode"] == _MAX:  # each feature comes from a row of its own; none where a bag is nothing but padding
        places = op["result3"].masked_fill((op["result2"] == 0).unsqueeze(1), -1)
        return LinearMap(("a", "y"), ("z", "y"), (("ayz", OneHot(places, op.shape[0])),))
    tokens = op["indices"].reshape(bags, size)
    operands = [("abz", OneHot(tokens.masked_fill(tokens == op["padding_idx"], -1), op.shape[0]))]
    if op["mode"] == _MEAN:  # over the tokens of a bag without its padding
        operands.append(("a", op["result2"].clamp(min=1).to(op.dtype).reciprocal()))
    if op["per_sample_weights"] is not None:
        operands.append(("ab", op["per_sample_weights"].reshape(bags, size)))
    return LinearMap(("a", "y"), ("z", "y"), tuple(operands))


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
