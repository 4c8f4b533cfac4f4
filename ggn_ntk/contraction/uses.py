"""The uses of one parameter, put together before they meet those of the other samples.

A parameter's Jacobian is the sum over its uses, and its kernel the sum over all pairs of uses: their number squared.
But several uses of a weight are further positions of one: ``sum_u s_u x_u`` is ``cnpo,npi->cnoi`` with the positions of
all uses behind one another. The cheapest order may then form the Jacobian, at a cost that is linear in the number of
uses, and what cancels between them can be made to do so before it is squared.
"""

import string
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import Operand, memory_of
from ggn_ntk.memory.budget import MemoryBudget

# The letter of positions: all letters that are summed, merged.
_POSITION = "P"


class _Form(NamedTuple):
    """What uses have in common that can be put together."""

    # The letters of each operand: those of the result in its order, then the position, then that of one-hot vectors.
    # They are named by their place in the result, since rules may differ in letters. An operand of the weight's alone
    # has no position.
    terms: tuple[str, ...]
    same: tuple[Hashable, ...]  # which numbers operands of the weight's alone hold; ``None`` for others
    result: str  # the letters of the Jacobian
    sizes: tuple[int, ...]  # their sizes


def put_together(uses: Iterable[Factored]) -> list[Factored]:
    """Write Jacobians of several uses of a parameter as those of fewer."""
    # Jacobians that are formed are added up; uses of one form become one; others stay apart.
    formed, apart = list[Factored](), list[Factored]()
    groups: dict[_Form, list[Factored]] = defaultdict(list)
    for use in (_multiplied(use).sum_private_letters() for use in uses):
        form = _form(use)
        if len(use.labelled) == 1 and not use.labelled[0].hot:
            formed.append(use)
        elif form is None:
            apart.append(use)
        else:
            groups[form].append(use)
    stacked = (_stacked(form, group) if len(group) > 1 else group[0] for form, group in groups.items())
    return [*apart, *stacked, *([_added(formed)] if formed else [])]


def added_up(uses: Iterable[Factored]) -> Tensor:
    """Form the sum of several Jacobians."""
    # -> [C, N, P]
    return _total([use.formed() for use in put_together(uses)])


def _multiplied(use: Factored) -> Factored:
    """Multiply the smallest operand by those that are one number, which each use has for itself."""
    numbers = [o.tensor for o in use.labelled if not o.term]
    if not numbers:
        return use
    operands = [o for o in use.labelled if o.term]
    place = min((i for i, o in enumerate(operands) if not o.hot), key=lambda i: operands[i].tensor.numel())
    operands[place] = operands[place]._replace(tensor=prod(numbers, start=operands[place].tensor))
    return Factored.of(operands, use.result)


def _form(use: Factored) -> _Form | None:
    """Find the form of a use; ``None`` for one that cannot be put together with others."""
    named = _named(tuple((o.letters, o.hot) for o in use.labelled), use.result)
    if named is None or any(_POSITION in term and _grows(o) for term, o in zip(named[0], use.labelled, strict=True)):
        return None
    terms, result = named
    return _Form(
        terms=terms,
        same=tuple(
            None if _POSITION in term else memory_of(o.tensor) for term, o in zip(terms, use.labelled, strict=True)
        ),
        result=result,
        sizes=tuple(use.sizes[letter] for letter in use.result),
    )


@lru_cache(maxsize=4096)  # a recurrent network has hundreds of uses alike
def _named(operands: tuple[tuple[str, str], ...], result: str) -> tuple[tuple[str, ...], str] | None:
    """Name letters by their place in the result: the letters of each operand, and those of the result."""
    letters = "cn" + string.ascii_lowercase.replace("c", "").replace("n", "")
    names = dict(zip(result, letters, strict=False)) | {_POSITION: _POSITION}
    summed = {*"".join(own + hot for own, hot in operands)}.difference(result)
    terms = []
    for own, hot in operands:
        alone = {*own, *hot}.isdisjoint({*summed, "c", "n"})
        # Every operand of the samples must have all positions, or they cannot be merged to one axis.
        if not alone and not summed <= set(own):
            return None
        terms.append("".join(names[letter] for letter in _order(result, own, hot, "" if alone else _POSITION)))
    return tuple(terms), "".join(names[letter] for letter in result)


def _grows(operand: Operand) -> bool:
    """Tell whether a copy of an operand takes far more memory than it does itself: windows that overlap."""
    tensor = operand.tensor
    most = max(tensor.untyped_storage().nbytes(), MemoryBudget.of(tensor.device).columns)
    return not operand.hot and tensor.nbytes > most and 0 not in tensor.stride()


def _summed(use: Factored) -> list[str]:
    """List the letters that are summed."""
    return [letter for letter in dict.fromkeys("".join(use.terms)) if letter not in use.result]


def _order(result: str, letters: str, hot: str, position: str) -> str:
    """Order the letters of an operand as those of the result; the position comes behind, and one-hot vectors last."""
    return "".join(letter for letter in result if letter in letters) + position + hot


def _stacked(form: _Form, uses: Sequence[Factored]) -> Factored:
    """Put the positions of several uses behind one another."""
    operands: list[Operand] = []
    for place, term in enumerate(form.terms):
        of_first = uses[0].labelled[place]
        letters = term[: len(term) - len(of_first.hot)]
        if _POSITION in term:
            tensor = _joined([_in_order(use, use.labelled[place]) for use in uses])
        else:
            tensor = of_first.aligned("".join(letter for letter in uses[0].result if letter in of_first.letters))
        operands.append(Operand(letters, tensor, hot=term[len(letters) :], size=of_first.size))
    return Factored.of(operands, form.result)


def _in_order(use: Factored, operand: Operand) -> Tensor:
    """Order the axes of an operand, and make one axis, the last, of all positions."""
    # -> [*letters of the result, positions]; a use without positions has one
    kept = [letter for letter in use.result if letter in operand.letters]
    ordered = operand.aligned("".join([*kept, *_summed(use)]))
    return ordered.reshape(*ordered.shape[: len(kept)], prod(ordered.shape[len(kept) :]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors behind one another along their last axis, kept once along axes where all have one value."""
    # torch.cat would write out an axis of stride 0, such as that of samples that share an input.
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
        return Factored(first.equation, (_total([use.labelled[0].tensor for use in formed]),))
    return Factored("cnk->cnk", (_total([use.formed() for use in formed]),))


def _total(terms: Sequence[Tensor]) -> Tensor:
    """Add tensors up, without a copy of all of them."""
    if len(terms) == 1:
        return terms[0]
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total
