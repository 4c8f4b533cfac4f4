"""One-hot vectors in einsums: comparisons and look-ups instead of products.

A sum over the vocabulary ``v`` with a one-hot factor ``npv`` needs no product. Against another one-hot factor ``mqv``
it leaves a mask ``npmq``: where the tokens are the same. Against any other factor it leaves the entries at the tokens.
"""

from collections.abc import Sequence
from math import prod

import torch

from ggn_ntk.contraction.einsum import Operand, aligned, path_of


def looked_up(operands: Sequence[Operand]) -> list[Operand]:
    """Sum over the axes of one-hot vectors."""
    remaining = list(operands)
    while (hot := next((o for o in remaining if o.hot), None)) is not None:
        dtype = next(o.tensor.dtype for o in remaining if not o.hot)
        others = [o for o in remaining if o is not hot]
        remaining = [
            _match(hot, o, dtype) if o.hot == hot.hot else _look_up(o, hot) if hot.hot in o.letters else o
            for o in others
        ]
    return remaining


def _match(a: Operand, b: Operand, dtype: torch.dtype) -> Operand:
    """Multiply one-hot vectors with one another."""
    letters = a.letters + "".join(letter for letter in b.letters if letter not in a.letters)
    first, second = aligned(a, letters), aligned(b, letters)
    return Operand(letters, ((first == second) & (first >= 0)).to(dtype), ("match", a.key, b.key))


def _look_up(table: Operand, hot: Operand) -> Operand:
    """Multiply one-hot vectors with something else."""
    sizes = dict(zip(hot.letters + table.letters, hot.tensor.shape + table.tensor.shape, strict=True))
    batch = "".join(letter for letter in hot.letters if letter in table.letters)
    own = "".join(letter for letter in hot.letters if letter not in table.letters)
    rest = "".join(letter for letter in table.letters if letter not in batch + hot.hot)
    count = prod(sizes[letter] for letter in batch)
    rows = aligned(table, batch + hot.hot + rest).reshape(count, hot.size, -1)
    places = aligned(hot, batch + own).reshape(count, -1)
    each = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    entries = rows[each, places.clamp(min=0)] * (places >= 0).unsqueeze(2)
    letters = batch + own + rest
    return Operand(letters, entries.reshape([sizes[letter] for letter in letters]), ("look up", table.key, hot.key))


def dense(operands: Sequence[Operand]) -> list[Operand]:
    """Form one-hot vectors."""
    dtype = next(o.tensor.dtype for o in operands if not o.hot)
    return [_dense(o, dtype) if o.hot else o for o in operands]


def _dense(hot: Operand, dtype: torch.dtype) -> Operand:
    """Form one-hot vectors."""
    vectors = hot.tensor.unsqueeze(-1) == torch.arange(hot.size, device=hot.tensor.device)
    return Operand(hot.letters + hot.hot, vectors.to(dtype), ("dense", hot.key))


def without_data(operands: Sequence[Operand]) -> list[Operand]:
    """Keep the shapes of operands alone."""
    return [
        o._replace(tensor=torch.empty_strided(o.tensor.shape, o.tensor.stride(), dtype=o.tensor.dtype, device="meta"))
        for o in operands
    ]


def cost(operands: Sequence[Operand], result: str) -> float:
    """Compute what an einsum costs."""
    resolved = looked_up(without_data(operands))
    known = {o.key for o in operands if not o.hot}
    formed = sum(o.tensor.numel() for o in resolved if o.key not in known)
    return float(path_of(resolved, result).opt_cost) + formed
