"""A bias is the weight of one more input, which is always one.

Where ``s`` of a layer is summed over positions, the kernels of its weight and bias share nothing but ``s``:
``sum_pq s[p] s[q] x[p] x[q]`` and ``sum_pq s[p] s[q]``. As one parameter they are ``sum_pq s[p] s[q] (x[p] x[q] + 1)``,
for the price of the first.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ggn_ntk.contraction.einsum import memory_of
from ggn_ntk.contraction.factored import Factored


def join_biases(jacobians: Iterable[Factored]) -> list[Factored]:
    """Join the Jacobians of biases with those of their weights, as far as this saves work."""
    found: list[Factored] = []
    for jacobian in sorted(jacobians, key=lambda jacobian: -len(jacobian.operands)):
        weights = ((place, joined) for place, weight in enumerate(found) if (joined := _joined(weight, jacobian)))
        place, joined = next(weights, (len(found), jacobian))
        found[place : place + 1] = [joined]
    return found


def _joined(weight: Factored, bias: Factored) -> Factored | None:
    """Write the Jacobians of a weight and a bias as that of a weight with one more input."""
    inputs = [letter for letter in weight.result if letter not in bias.result]
    if len(weight.operands) != 2 or len(bias.operands) != 1 or len(inputs) != 1:
        return None
    (s, x), (own,), (s_term, x_term), (i,) = weight.operands, bias.operands, weight.terms, inputs
    if not (isinstance(s, Tensor) and isinstance(x, Tensor) and isinstance(own, Tensor)):
        return None
    positions = set(x_term) - set(weight.result)
    same = [s_term] == bias.terms and weight.result.replace(i, "") == bias.result and memory_of(s) == memory_of(own)
    fits = same and i in x_term and set(x_term) - {i} <= set(s_term) - {"c"} and i not in s_term
    if not (fits and positions and 0 not in x.stride() and x.numel() <= s.numel()):
        return None
    axis = x_term.index(i)
    return Factored(weight.equation, (s, torch.cat([x, torch.ones_like(x.narrow(axis, 0, 1))], axis)))
