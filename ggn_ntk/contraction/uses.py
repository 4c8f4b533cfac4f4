"""The uses of one parameter, put together before they meet those of the other samples.

A parameter's Jacobian is the sum over its uses, and its kernel the sum over all pairs of uses: their number squared.
But several uses of a weight are further positions of one: ``sum_u s_u x_u`` is ``cnpo,npi->cnoi`` with the positions of
all uses behind one another. The cheapest order may then form the Jacobian, at a cost that is linear in the number of
uses, and what cancels between them can be made to do so before it is squared.
"""

import string
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored, OneHot
from ggn_ntk.contraction.products import expand, sum_private_letters

# Numbers that uses may hold when they are put together, if their operands are views of less memory (windows).
_ROOM = 2**26

# The letter of positions, all in one.
_POSITION = "P"


class _Form(NamedTuple):
    """What uses have in common that can be put together."""

    # The letters of each operand: those of the result in its order, then the position, then one-hot vectors
    terms: tuple[str, ...]
    result: str  # the letters of the Jacobian, by their place
    sizes: tuple[int, ...]  # their sizes


def put_together(uses: Iterable[Factored]) -> list[Factored]:
    """Write Jacobians of several uses of a parameter as those of fewer."""
    formed, apart = list[Factored](), list[Factored]()
    groups: dict[_Form, list[Factored]] = defaultdict(list)
    for use in map(sum_private_letters, uses):
        form = _form(use)
        if len(use.operands) == 1 and isinstance(use.operands[0], Tensor):
            formed.append(use)
        elif form is None:
            apart.append(use)
        else:
            groups[form].append(use)
    stacked = (_stacked(form, group) if len(group) > 1 else group[0] for form, group in groups.items())
    return [*apart, *stacked, *([_added(formed)] if formed else [])]


def _form(use: Factored) -> _Form | None:
    """Find the form of a use; ``None`` for one that cannot be put together with others."""
    summed, sizes = _summed(use), use.sizes
    letters = "cn" + string.ascii_lowercase.replace("c", "").replace("n", "")
    names = dict(zip(use.result, letters, strict=False)) | {_POSITION: _POSITION}
    for term, operand in zip(use.terms, use.operands, strict=True):
        if not set(summed) <= set(term) or (isinstance(operand, Tensor) and _grows(operand)):
            return None
    terms = tuple("".join(names[letter] for letter in _order(use, place)) for place in range(len(use.terms)))
    result = "".join(names[letter] for letter in use.result)
    return _Form(terms, result, tuple(sizes[letter] for letter in use.result))


def _grows(operand: Tensor) -> bool:
    """Tell whether a copy of an operand takes far more memory than it does itself: windows that overlap."""
    held = operand.untyped_storage().nbytes() // operand.element_size()
    return operand.numel() > max(held, _ROOM) and 0 not in operand.stride()


def _summed(use: Factored) -> list[str]:
    """List the letters that are summed."""
    return [letter for letter in dict.fromkeys("".join(use.terms)) if letter not in use.result]


def _order(use: Factored, place: int) -> str:
    """Order the letters of an operand as those of the result; the position comes behind, and one-hot vectors last."""
    term, operand = use.terms[place], use.operands[place]
    hot = term[-1] if isinstance(operand, OneHot) else ""
    return "".join(letter for letter in use.result if letter in term and letter != hot) + _POSITION + hot


def _stacked(form: _Form, uses: Sequence[Factored]) -> Factored:
    """Put the positions of several uses behind one another."""
    operands: list[Tensor | OneHot] = []
    for place in range(len(form.terms)):
        parts = [_in_order(use, place) for use in uses]
        first = uses[0].operands[place]
        operands.append(OneHot(_joined(parts), first.size) if isinstance(first, OneHot) else _joined(parts))
    return Factored(f"{','.join(form.terms)}->{form.result}", tuple(operands))


def _in_order(use: Factored, place: int) -> Tensor:
    """Order the axes of an operand, and make one axis, the last, of all positions."""
    operand, term = use.operands[place], use.terms[place]
    tensor, letters = (operand.places, term[:-1]) if isinstance(operand, OneHot) else (operand, term)
    summed = _summed(use)
    kept = [letter for letter in _order(use, place) if letter in letters]
    ordered = tensor.permute([letters.index(letter) for letter in [*kept, *summed]])
    return ordered.reshape(*ordered.shape[: len(kept)], prod(ordered.shape[len(kept) :]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors behind one another along their last axis, kept once along axes where all have one value."""
    once = [axis for axis in range(parts[0].ndim - 1) if all(p.stride(axis) == 0 for p in parts)]
    shape = parts[0].shape[:-1]
    for axis in once:
        parts = [part.narrow(axis, 0, 1) for part in parts]
    joined = torch.cat(list(parts), -1)
    return joined.expand(*shape, joined.shape[-1])


def _added(formed: Sequence[Factored]) -> Factored:
    """Add up Jacobians that are formed, whose axes may be split in different ways."""
    first, *others = formed
    if all(use.equation == first.equation and use.sizes == first.sizes for use in others):
        tensors = [use.operands[0] for use in formed]
        return Factored(first.equation, (torch.stack([t for t in tensors if isinstance(t, Tensor)]).sum(0),))
    flat = [expand(use).operands[0] for use in formed]
    return Factored("cnk->cnk", (torch.stack([t for t in flat if isinstance(t, Tensor)]).sum(0),))
