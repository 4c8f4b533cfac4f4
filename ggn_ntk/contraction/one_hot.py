"""One-hot vectors in einsums: comparisons and look-ups instead of products.

A sum over the vocabulary ``v`` with a one-hot factor ``npv`` needs no product. Against another one-hot factor ``mqv``
it leaves a mask ``npmq``: where the tokens are the same. Against any other factor it leaves the entries at the tokens.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ggn_ntk.contraction.einsum import path_of, sum_private
from ggn_ntk.contraction.operand import Operand


def looked_up(operands: Sequence[Operand], result: str) -> list[Operand]:
    """Multiply one-hot vectors with all that shares their axis, and sum over it unless the result has it."""
    # One-hot vectors whose axis is in the result come last in what is returned; there are no others.
    if not any(o.hot for o in operands):
        return list(operands)
    # Only entries are looked up: a one-hot factor that runs over the places of another is formed.
    of_places = {letter for o in operands if o.hot for letter in o.letters}
    remaining = [_dense(o, dtype_of(operands)) if o.hot and o.hot in of_places else o for o in operands]
    kept = list[Operand]()
    while (hot := next((o for o in remaining if o.hot), None)) is not None:
        dtype = dtype_of(remaining)
        others = [o for o in remaining if o is not hot]
        remaining = [
            _match(hot, o, dtype) if o.hot == hot.hot else _look_up(o, hot) if hot.hot in o.letters else o
            for o in others
        ]
        if hot.hot in result:
            kept.append(hot)
        elif not any(hot.hot in o.term for o in others):
            remaining.append(_sum(hot, dtype))
    # A letter that only a one-hot factor and its table had is left with one operand.
    return sum_private([*remaining, *kept], result)


def dtype_of(operands: Sequence[Operand]) -> torch.dtype:
    """Look up the dtype of the first operand that holds entries instead of places."""
    return next(o.tensor.dtype for o in operands if not o.hot)


def _match(a: Operand, b: Operand, dtype: torch.dtype) -> Operand:
    """Multiply one-hot vectors with one another: one where they are the same, and not both of zeros."""
    letters = a.letters + "".join(letter for letter in b.letters if letter not in a.letters)
    first, second = a.aligned(letters), b.aligned(letters)
    return Operand(letters, ((first == second) & (first >= 0)).to(dtype), ("match", a.key, b.key))


def _look_up(table: Operand, hot: Operand) -> Operand:
    """Multiply one-hot vectors with something else: its entries at their places."""
    # Letters that both have are a batch of tables, each with rows of its own to look up.
    sizes = hot.sizes | table.sizes
    batch = "".join(letter for letter in hot.letters if letter in table.letters)
    own = "".join(letter for letter in hot.letters if letter not in table.letters)
    rest = "".join(letter for letter in table.letters if letter not in batch + hot.hot)
    count = prod(sizes[letter] for letter in batch)
    rows = table.aligned(batch + hot.hot + rest).reshape(count, hot.size, -1)  # [B, V, R]
    places = hot.aligned(batch + own).reshape(count, -1)  # [B, K]
    each = torch.arange(len(rows), device=rows.device).unsqueeze(1)  # [B, 1]
    # A negative place stands for a vector of zeros: any row is read for it, and multiplied by zero.
    entries = rows[each, places.clamp(min=0)] * (places >= 0).unsqueeze(2)  # [B, K, R]
    letters = batch + own + rest
    return Operand(letters, entries.reshape([sizes[letter] for letter in letters]), ("look up", table.key, hot.key))


def _sum(hot: Operand, dtype: torch.dtype) -> Operand:
    """Sum one-hot vectors over their own axis: one, or zero for a vector of zeros."""
    return Operand(hot.letters, (hot.tensor >= 0).to(dtype), ("sum", hot.key))


def scattered(values: Operand, hot: Sequence[Operand], result: str) -> Tensor:
    """Multiply with one-hot vectors, and sum over all letters that the result lacks: add each value up at its place."""
    # -> [P], all letters of the result merged
    places = {o.hot: o for o in hot}
    sizes = dict(values.sizes)
    for o in hot:
        sizes |= o.sizes
    letters = "".join(letter for letter in sizes if letter not in places)
    terms = values.aligned(letters).expand([sizes[letter] for letter in letters])
    index = torch.zeros_like(terms, dtype=torch.long)  # of each value in the flat result
    for letter in result:
        if letter in places:
            along = places[letter].aligned(letters).clamp(min=0)
        else:
            along = torch.arange(sizes[letter], device=index.device)
            along = along.view([-1 if other == letter else 1 for other in letters])
        index = index * sizes[letter] + along
    for o in hot:
        terms = terms * (o.aligned(letters) >= 0)
    flat = terms.new_zeros(prod(sizes[letter] for letter in result))
    return flat.index_add_(0, index.flatten(), terms.flatten())


def dense(operands: Sequence[Operand], result: str) -> list[Operand]:
    """Form one-hot vectors."""
    if not any(o.hot for o in operands):
        return list(operands)
    dtype = dtype_of(operands)
    return sum_private([_dense(o, dtype) if o.hot else o for o in operands], result)


def _dense(hot: Operand, dtype: torch.dtype) -> Operand:
    """Form one-hot vectors."""
    vectors = hot.tensor.unsqueeze(-1) == torch.arange(hot.size, device=hot.tensor.device)
    return Operand(hot.term, vectors.to(dtype), ("dense", hot.key))


def cost(operands: Sequence[Operand], result: str) -> float:
    """Count the operations of an einsum, and the numbers that look-ups and comparisons write."""
    resolved = looked_up([o.without_data() for o in operands], result)
    known = {o.key for o in operands if not o.hot}
    written = sum(o.tensor.numel() for o in resolved if o.key not in known)
    return float(path_of(resolved, result).opt_cost) + written
