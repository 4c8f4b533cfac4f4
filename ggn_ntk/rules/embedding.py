"""Embeddings. Letters: ``v`` rows of the vocabulary; ``k`` features; ``p`` positions."""

from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk.rules.registry import Factored, register_rule


@register_rule(nn.Embedding)
def embedding(module: nn.Embedding, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobian of a table look-up: the product with a one-hot vector of each token.

    Args:
        module: The layer.
        x: Tokens ``[N, ...]``.
        s: ``[C, N, ..., K]``.

    Returns:
        The Jacobian of weight ``[V, K]``.
    """
    one_hot = F.one_hot(x.flatten(1) if x.ndim > 1 else x.unsqueeze(1), module.num_embeddings).to(s.dtype)
    if module.padding_idx is not None:
        one_hot[..., module.padding_idx] = 0
    s = s.reshape(*s.shape[:2], -1, s.shape[-1])
    return {"weight": Factored("cnpk,npv->cnvk", (s, one_hot))}
