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

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import Operand
from ggn_ntk.memory.budget import MemoryBudget

# The letter of positions: all letters that are summed, merged.
_POSITION = "P"


class _Form(NamedTuple):
    """What uses have in common that can be put together."""

    # The letters of each operand: those of the result in its order, then the position, then that of one-hot vectors.
    # They are named by their place in the result, since rules may differ in letters.
    terms: tuple[str, ...]
    result: str  # the letters of the Jacobian
    sizes: tuple[int, ...]  # their sizes


def put_together(uses: Iterable[Factored]) -> list[Factored]:
    """Write Jacobians of several uses of a parameter as those of fewer."""
    summed = [use.sum_private_letters() for use in uses]
    groups = ([summed[place] for place in places] for places in grouped(summed))
    return [
        group[0] if len(group) == 1 else _added(group) if _is_formed(group[0]) else _stacked(group) for group in groups
    ]


def grouped(uses: Sequence[Factored]) -> list[list[int]]:
    """Group Jacobians of several uses by what is put together: their places."""
    # Jacobians that are formed are added up; uses of one form become one; others stay apart.
    formed, apart = list[int](), list[list[int]]()
    groups: dict[_Form, list[int]] = defaultdict(list)
    for place, use in enumerate(use.sum_private_letters() for use in uses):
        form = _form(use)
        if _is_formed(use):
            formed.append(place)
        elif form is None:
            apart.append([place])
        else:
            groups[form].append(place)
    return [*apart, *groups.values(), *([formed] if formed else [])]


def _is_formed(use: Factored) -> bool:
    """Tell whether a Jacobian is a single tensor."""
    return len(use.labelled) == 1 and not use.labelled[0].hot


def _form(use: Factored) -> _Form | None:
    """Find the form of a use; ``None`` for one that cannot be put together with others."""
    summed, sizes = _summed(use), use.sizes
    letters = "cn" + string.ascii_lowercase.replace("c", "").replace("n", "")
    names = dict(zip(use.result, letters, strict=False)) | {_POSITION: _POSITION}
    # Every operand must have all positions, or they cannot be merged to one axis.
    if any(not set(summed) <= set(o.letters) or _grows(o) for o in use.labelled):
        return None
    terms = tuple("".join(names[letter] for letter in _order(use, o)) for o in use.labelled)
    result = "".join(names[letter] for letter in use.result)
    return _Form(terms, result, tuple(sizes[letter] for letter in use.result))


def _grows(operand: Operand) -> bool:
    """Tell whether a copy of an operand takes far more memory than it does itself: windows that overlap."""
    tensor = operand.tensor
    most = max(tensor.untyped_storage().nbytes(), MemoryBudget.of(tensor.device).columns)
    return not operand.hot and tensor.nbytes > most and 0 not in tensor.stride()


def _summed(use: Factored) -> list[str]:
    """List the letters that are summed."""
    return [letter for letter in dict.fromkeys("".join(use.terms)) if letter not in use.result]


def _order(use: Factored, operand: Operand) -> str:
    """Order the letters of an operand as those of the result; the position comes behind, and one-hot vectors last."""
    return "".join(letter for letter in use.result if letter in operand.letters) + _POSITION + operand.hot


def _stacked(uses: Sequence[Factored]) -> Factored:
    """Put the positions of several uses of one form behind one another."""
    form = _form(uses[0])
    assert form is not None
    operands: list[Operand] = []
    for place, term in enumerate(form.terms):
        tensor = _joined([_in_order(use, use.labelled[place]) for use in uses])
        letters, position, hot = term.partition(_POSITION)
        operands.append(Operand(letters + position, tensor, hot=hot, size=uses[0].labelled[place].size))
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
        return Factored(first.equation, (torch.stack([use.labelled[0].tensor for use in formed]).sum(0),))
    return Factored("cnk->cnk", (torch.stack([use.formed() for use in formed]).sum(0),))
