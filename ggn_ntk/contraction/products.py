"""Doubling: the product of two factored Jacobians as one einsum.

``cno,ni->cnoi`` with itself becomes ``cno,ni,dmo,mi->nmcd``. The letter of the outputs is split by their roles
(:mod:`ggn_ntk.problem.output_axes`): both Jacobians share those of diagonal and traced outputs, and of these the latter
are summed, so that ``ecfno,ni,edfmo,mi->nmecd`` is the general case. Roles without outputs of their own leave no
letter.

Letters: ``c``, ``d`` free, ``e`` diagonal and ``f`` traced outputs; ``n``, ``m`` samples of x1 and x2; all others are
renamed so that a letter means the same everywhere in an einsum.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ggn_ntk.contraction.einsum import (
    Memo,
    Operand,
    aligned,
    as_matrices,
    as_operand,
    contract,
    contract_to_last,
    multiply,
    path_of,
)
from ggn_ntk.contraction.factored import Factored, OneHot
from ggn_ntk.contraction.one_hot import cost, dense, without_data
from ggn_ntk.memory.buffers import Joined
from ggn_ntk.problem.output_axes import Roles

#: Letters of a kernel; operands lack those of size one.
RESULT = "nmecd"


@dataclass(frozen=True, eq=False)
class Doubled:
    """The product of two Jacobians of a parameter, as one einsum."""

    first: tuple[Operand, ...]  # operands of the Jacobian of x1, over all samples; letter ``n``
    second: tuple[Operand, ...]  # operands of the Jacobian of x2, over all samples; letter ``m``
    result: str = RESULT  # letters of the kernel, of which operands may lack some
    formed: bool = False  # whether each Jacobian is to be formed before the two meet, whatever is cheapest

    @property
    def apart(self) -> int:
        """How many leading operands are contracted by themselves; 0 for any order."""
        return len(self.first) if self.formed else 0


# What forming Jacobians from one-hot vectors, say of a vocabulary, may cost in operations.
_LARGEST = 2**30


def double(first: Factored, second: Factored, roles: Roles, *, formed: bool = False) -> Doubled:
    """Write the product of two Jacobians of one parameter as one einsum."""
    # The letters of the parameter's axes are matched by position. Where the two split these axes differently, both
    # Jacobians are formed first.
    if _parameter_sizes(first) != _parameter_sizes(second):
        first, second = expand(first), expand(second)
    same, first = second is first, sum_private_letters(first)
    second = first if same else sum_private_letters(second)
    names = iter(letter for letter in string.ascii_letters if letter not in "cdefnm")
    axes = [next(names) for _ in first.result[2:]]
    product = Doubled(
        tuple(_rename(first, roles, dict(zip(first.result, ["ecf", "n", *axes], strict=True)), names)),
        tuple(_rename(second, roles, dict(zip(second.result, ["edf", "m", *axes], strict=True)), names)),
    )
    operands = [*product.first, *product.second]
    hot = any(o.hot for o in operands)
    dense_cost = _cost_of_dense(operands, product.result) if hot else 0
    formed = formed and dense_cost <= _LARGEST
    if hot and (formed or dense_cost < cost(operands, product.result)):
        product = replace(product, first=tuple(dense(product.first)), second=tuple(dense(product.second)))
    return replace(product, formed=formed)


def _cost_of_dense(operands: list[Operand], result: str) -> float:
    """Compute what an einsum costs with its one-hot vectors in full."""
    formed = dense(without_data(operands))
    return cost(formed, result) + sum(o.tensor.numel() for o, given in zip(formed, operands, strict=True) if given.hot)


def sum_private_letters(factored: Factored) -> Factored:
    """Sum over the letters that only one operand has, say over positions for a bias."""
    terms, operands = [], []
    for i, (term, tensor) in enumerate(zip(factored.terms, factored.operands, strict=True)):
        needed = {*factored.result, *"".join(factored.terms[:i] + factored.terms[i + 1 :])}
        axes = [axis for axis, letter in enumerate(term) if letter not in needed]
        if axes and isinstance(tensor, Tensor):
            term, tensor = "".join(letter for letter in term if letter in needed), _sum_once(term, tensor, axes)
        terms.append(term)
        operands.append(tensor)
    return Factored(f"{','.join(terms)}->{factored.result}", tuple(operands))


def _sum_once(term: str, tensor: Tensor, axes: list[int]) -> Tensor:
    """Sum over axes, for one sample only where all have the same values."""
    n = term.find("n")
    if n < 0 or tensor.stride(n) != 0:
        return tensor.sum(axes)
    kept = [size for axis, size in enumerate(tensor.shape) if axis not in axes]
    return tensor.narrow(n, 0, 1).sum(axes).expand(kept)


def _parameter_sizes(factored: Factored) -> list[int]:
    """Read how a Jacobian splits the parameter's axes."""
    return [factored.sizes[letter] for letter in factored.result[2:]]


def expand(factored: Factored) -> Factored:
    """Form a Jacobian."""
    # -> [C, N, P]
    factored, n = sum_private_letters(factored), factored.sizes["n"]
    operands = [_as_operand(term, tensor) for term, tensor in zip(factored.terms, factored.operands, strict=True)]
    jacobian = contract(dense(operands), factored.result, Memo())
    tensor = aligned(jacobian, factored.result)
    shape = [factored.sizes[letter] for letter in factored.result]
    return Factored("cnk->cnk", (tensor.expand(shape).reshape(shape[0], n, -1),))


class Part(NamedTuple):
    """Operands of a Jacobian that the cheapest order contracts before x1 meets x2."""

    operands: tuple[Operand, ...]  # the operands
    letters: str  # the letters of their product


def parts(jacobian: Factored, n: int, m: int, roles: Roles, *, formed: bool = False) -> list[Part] | None:
    """Group the operands of a Jacobian by what the cheapest order does with them before x1 meets x2."""
    summed = sum_private_letters(jacobian)
    if any(isinstance(operand, OneHot) for operand in summed.operands):
        return None
    groups = _groups_before_meeting(double(summed, summed, roles, formed=formed), n, m)
    if groups is None or (summed.terms == jacobian.terms and len(groups) == len(summed.terms)):
        return None
    terms = zip(summed.terms, summed.operands, strict=True)
    operands = [Operand(term, tensor, key=i) for i, (term, tensor) in enumerate(terms) if isinstance(tensor, Tensor)]
    found = []
    for group in groups:
        needed = {*summed.result, *"".join(o.letters for i, o in enumerate(operands) if i not in group)}
        members = tuple(operands[i] for i in group)
        letters = dict.fromkeys("".join(o.letters for o in members))
        found.append(Part(members, "".join(letter for letter in letters if letter in needed)))
    return found


def contract_into(part: Part, whole: Joined, block: slice) -> None:
    """Contract a part of the Jacobian of a block of samples."""
    taken = contract_to_last(part.operands, part.letters, Memo())
    if len(taken) == 1:
        whole.put(block, taken[0].letters, taken[0].tensor)
    else:
        a, b = taken
        sizes = {letter: size for o in taken for letter, size in zip(o.letters, o.tensor.shape, strict=True)}
        product = as_matrices(a, b, set(part.letters))
        multiply(product, Memo(), whole.room(block, product.letters, sizes, a.tensor))


def _groups_before_meeting(product: Doubled, n: int, m: int) -> list[list[int]] | None:
    """Find which operands of one Jacobian the cheapest order contracts with one another alone."""
    operands, half = [*product.first, *product.second], len(product.first)
    info = path_of(operands, product.result, {"n": n, "m": m}, product.apart)
    remaining = [{i} for i in range(len(operands))]
    found = list(remaining)
    for step in info.path:
        merged = set().union(*(remaining.pop(i) for i in sorted(step, reverse=True)))
        remaining.append(merged)
        if max(merged) < half or min(merged) >= half:
            found = [group for group in found if not group <= merged] + [merged]
    first = sorted(sorted(group) for group in found if max(group) < half)
    second = sorted(sorted(i - half for i in group) for group in found if min(group) >= half)
    return first if first == second else None


def _rename(factored: Factored, roles: Roles, names: dict[str, str], fresh: Iterator[str]) -> Iterator[Operand]:
    """Rename the letters of a Jacobian, and split that of the outputs."""
    sizes = {letter: size for letter, size in zip(names["c"], roles, strict=True) if size > 1}
    names["c"] = "".join(sizes)
    for term, operand in zip(factored.terms, factored.operands, strict=True):
        for letter in term:
            if letter not in names:
                names[letter] = next(fresh)
        axis = term.find("c")
        if axis >= 0 and isinstance(operand, Tensor):
            operand = operand.reshape(*operand.shape[:axis], *sizes.values(), *operand.shape[axis + 1 :])
        yield _as_operand("".join(names[letter] for letter in term), operand)


def _as_operand(letters: str, operand: Tensor | OneHot) -> Operand:
    """Give an operand letters."""
    if isinstance(operand, Tensor):
        return as_operand(letters, operand)
    return as_operand(letters[:-1], operand.places)._replace(hot=letters[-1], size=operand.size)
