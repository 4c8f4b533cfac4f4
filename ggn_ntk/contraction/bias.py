"""A bias is the weight of one more input, which is always one.

Where ``s`` of a layer is summed over positions, the kernels of its weight and bias have only ``s`` in common:
``sum_pq s[p] s[q] x[p] x[q]`` and ``sum_pq s[p] s[q]``. As one parameter they are ``sum_pq s[p] s[q] (x[p] x[q] + 1)``,
for the price of the first.
"""

from collections.abc import Iterable
from math import prod

import torch

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import memory_of


def join_biases(jacobians: Iterable[Factored]) -> list[Factored]:
    """Join the Jacobians of biases with those of their weights, as far as this saves work."""
    # Weights, which have more operands, come first; each bias takes the place of the first weight that it belongs to.
    found: list[Factored] = []
    for jacobian in sorted(jacobians, key=lambda jacobian: -sum(map(bool, jacobian.terms))):
        weights = ((place, joined) for place, weight in enumerate(found) if (joined := _joined(weight, jacobian)))
        place, joined = next(weights, (len(found), jacobian))
        found[place : place + 1] = [joined]
    return found


def _joined(weight: Factored, bias: Factored) -> Factored | None:
    """Write the Jacobians of a weight and a bias as that of a weight with one more input; else ``None``."""
    inputs = [letter for letter in weight.result if letter not in bias.result]
    numbers = [o.tensor for o in bias.labelled if not o.term]  # a bias may be scaled
    if len(weight.operands) != 2 or len(bias.operands) != 1 + len(numbers) or len(inputs) != 1:
        return None
    (s, x), (own, *_), (i,) = weight.labelled, bias.labelled, inputs
    if s.hot or x.hot or own.hot or s.letters != own.letters or memory_of(s.tensor) != memory_of(own.tensor):
        return None
    # Of the letters of x only that of the inputs is new beside s; without positions, the kernel of the bias is cheap.
    positions = set(x.letters) - set(weight.result)
    same = weight.result.replace(i, "") == bias.result
    fits = same and i in x.letters and set(x.letters) - {i} <= set(s.letters) - {"c"} and i not in s.letters
    # The copy of x with one more input must not cost more than it saves.
    if not (fits and positions and 0 not in x.tensor.stride() and x.tensor.numel() <= s.tensor.numel()):
        return None
    axis = x.letters.index(i)
    one = prod(numbers, start=torch.ones_like(x.tensor.narrow(axis, 0, 1)))
    inputs_and_one = torch.cat([x.tensor, one], axis)
    return Factored(weight.equation, (s.tensor, inputs_and_one))
