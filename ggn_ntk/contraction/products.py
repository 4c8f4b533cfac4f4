"""The kernel of a parameter as one einsum: the product of two factored Jacobians.

``cno,ni->cnoi`` with itself becomes ``cno,ni,dmo,mi->nmcd``. The letter of the outputs is split by their roles
(:mod:`ggn_ntk.problem.output_axes`): both Jacobians share those of diagonal and traced outputs, and of these the latter
are summed, so that ``ecfno,ni,edfmo,mi->nmecd`` is the general case. Roles with a single output
leave no letter. Paired samples are taken at equal indices as diagonal outputs are: ``n`` stands for ``m``, too, in
``ecfno,ni,edfno,ni->necd``.

Letters: ``c``, ``d`` free, ``e`` diagonal and ``f`` traced outputs; ``n``, ``m`` samples of x1 and x2; all others are
renamed so that a letter means the same everywhere in an einsum.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ggn_ntk.contraction.einsum import Memo, as_matrices, contract_to_last, multiply, path_of
from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.one_hot import cost, dense
from ggn_ntk.contraction.operand import Operand
from ggn_ntk.memory.buffers import Joined
from ggn_ntk.problem.output_axes import Roles


@dataclass(frozen=True, eq=False)
class KernelEinsum:
    """The product of two Jacobians of a parameter, as one einsum."""

    first: tuple[Operand, ...]  # operands of the Jacobian of x1, over all samples; letter ``n``
    second: tuple[Operand, ...]  # operands of the Jacobian of x2, over all samples; letter ``m``, or ``n`` if paired
    paired: bool = False  # whether samples are taken at equal indices
    formed: bool = False  # whether each Jacobian is to be formed before the two meet, whatever is cheapest

    @property
    def result(self) -> str:
        """Letters of the kernel, of which operands may lack some."""
        return "necd" if self.paired else "nmecd"

    @property
    def operands(self) -> list[Operand]:
        """All operands, those of x1 first."""
        return [*self.first, *self.second]

    @property
    def apart(self) -> int:
        """How many leading operands are contracted by themselves; 0 for any order."""
        return len(self.first) if self.formed else 0

    def restrict(self, rows: slice, columns: slice) -> list[Operand]:
        """Select a block of x1 and one of x2."""
        m = "n" if self.paired else "m"
        return [*(o.narrow("n", rows) for o in self.first), *(o.narrow(m, columns) for o in self.second)]

    def part(self, letter: str, block: slice) -> "KernelEinsum":
        """Restrict a letter that is summed: the product is the sum of its parts."""
        first, second = (tuple(o.narrow(letter, block) for o in operands) for operands in (self.first, self.second))
        return replace(self, first=first, second=second)

    def without_data(self) -> "KernelEinsum":
        """Keep the shapes of operands alone."""
        first, second = (tuple(o.without_data() for o in operands) for operands in (self.first, self.second))
        return replace(self, first=first, second=second)


#: The name of the kernel that it is added to, and the einsum.
NamedEinsum = tuple[str, KernelEinsum]

# What forming Jacobians from one-hot vectors, say of a vocabulary, may cost in operations.
_LARGEST = 2**30


def kernel_einsum(
    first: Factored, second: Factored, roles: Roles, *, formed: bool = False, paired: bool = False
) -> KernelEinsum:
    """Write the product of two Jacobians of one parameter as one einsum."""
    # The letters of the parameter's axes are matched by position. Where the two split these axes differently, both
    # Jacobians are formed first.
    if first.parameter_sizes != second.parameter_sizes:
        first, second = (Factored("cnk->cnk", (jacobian.formed(),)) for jacobian in (first, second))
    # A Jacobian with itself is summed once, so that x1 and x2 share the memory that intermediate results are known by.
    same, first = second is first, first.sum_private_letters()
    second = first if same else second.sum_private_letters()
    names = iter(letter for letter in string.ascii_letters if letter not in "cdefnm")
    axes, m = [next(names) for _ in first.result[2:]], "n" if paired else "m"
    product = KernelEinsum(
        tuple(_rename(first, roles, dict(zip(first.result, ["ecf", "n", *axes], strict=True)), names)),
        tuple(_rename(second, roles, dict(zip(second.result, ["edf", m, *axes], strict=True)), names)),
        paired,
    )
    if not any(o.hot for o in product.operands):
        return replace(product, formed=formed)
    # One-hot vectors are formed where that is cheaper; and for Jacobians that are to be formed, unless it costs much.
    dense_cost = _cost_of_dense(product)
    formed = formed and dense_cost <= _LARGEST
    if formed or dense_cost < cost(product.operands, product.result):
        operands, half = dense(product.operands, product.result), len(product.first)
        product = replace(product, first=tuple(operands[:half]), second=tuple(operands[half:]))
    return replace(product, formed=formed)


def _cost_of_dense(product: KernelEinsum) -> float:
    """Count the operations of a product with its one-hot vectors formed, and the numbers that these hold."""
    formed = dense(product.without_data().operands, product.result)
    written = sum(o.tensor.numel() for o, given in zip(formed, product.operands, strict=True) if given.hot)
    return cost(formed, product.result) + written


class Part(NamedTuple):
    """Operands of a Jacobian that the cheapest order contracts before x1 meets x2."""

    operands: tuple[Operand, ...]
    letters: str  # of their product


def parts(
    jacobian: Factored, n: int, m: int, roles: Roles, *, formed: bool = False, paired: bool = False
) -> list[Part] | None:
    """Group the operands of a Jacobian by what the cheapest order does with them before x1 meets x2."""
    # The Jacobian is one of a block of samples, n and m are the numbers of all. ``None`` where nothing is contracted
    # before the two meet, so that the block has to wait as it is.
    summed = jacobian.sum_private_letters()
    if any(o.hot for o in summed.labelled):
        return None
    groups = _groups_before_meeting(kernel_einsum(summed, summed, roles, formed=formed, paired=paired), n, m)
    if groups is None or (summed.terms == jacobian.terms and len(groups) == len(summed.terms)):
        return None
    operands = [o._replace(key=i) for i, o in enumerate(summed.labelled)]
    found = []
    for group in groups:
        needed = {*summed.result, *"".join(o.letters for i, o in enumerate(operands) if i not in group)}
        members = tuple(operands[i] for i in group)
        letters = dict.fromkeys("".join(o.letters for o in members))
        found.append(Part(members, "".join(letter for letter in letters if letter in needed)))
    return found


def contracted(jacobian: Factored, found: Sequence[Part]) -> Factored:
    """Contract the parts of a Jacobian."""
    n, made = jacobian.sizes["n"], list[tuple[str, Tensor]]()
    for part in found:
        whole = Joined(n)
        contract_into(part, whole, slice(n))
        made.append((whole.letters, whole.tensor))
    return Factored(f"{','.join(letters for letters, _ in made)}->{jacobian.result}", tuple(x for _, x in made))


def contract_into(part: Part, whole: Joined, block: slice) -> None:
    """Contract a part of the Jacobian of a block of samples, and write it to its place among all of them."""
    taken = contract_to_last(part.operands, part.letters, Memo())
    if len(taken) == 1:
        whole.put(block, taken[0].letters, taken[0].tensor)
    else:
        a, b = taken
        product = as_matrices(a, b, set(part.letters))
        multiply(product, Memo(), whole.room(block, product.letters, a.sizes | b.sizes, a.tensor))


def _groups_before_meeting(product: KernelEinsum, n: int, m: int) -> list[list[int]] | None:
    """Find which operands of one Jacobian the cheapest order contracts with one another alone."""
    # Groups of places among x1's operands; ``None`` where the order treats x1 and x2 in different ways.
    operands, half = product.operands, len(product.first)
    info = path_of(operands, product.result, {"n": n, "m": m}, product.apart)
    remaining = [{i} for i in range(len(operands))]  # what each operand on the way was made of
    found = list(remaining)
    for step in info.path:
        merged = set().union(*(remaining.pop(i) for i in sorted(step, reverse=True)))
        remaining.append(merged)
        if max(merged) < half or min(merged) >= half:  # of x1 alone, or of x2 alone
            found = [group for group in found if not group <= merged] + [merged]
    first = sorted(sorted(group) for group in found if max(group) < half)
    second = sorted(sorted(i - half for i in group) for group in found if min(group) >= half)
    return first if first == second else None


def _rename(factored: Factored, roles: Roles, names: dict[str, str], fresh: Iterator[str]) -> Iterator[Operand]:
    """Rename the letters of a Jacobian, and split that of the outputs by their roles."""
    # c of size E F T becomes the three letters that ``names`` has for it, without those of size one.
    counts = roles.among(factored.sizes["c"])
    sizes = {letter: size for letter, size in zip(names["c"], counts, strict=True) if size > 1}
    names["c"] = "".join(sizes)
    for o in factored.labelled:
        for letter in o.term:
            if letter not in names:
                names[letter] = next(fresh)
        axis, tensor = o.letters.find("c"), o.tensor
        if axis >= 0:
            tensor = tensor.reshape([*tensor.shape[:axis], *sizes.values(), *tensor.shape[axis + 1 :]])
        letters = "".join(names[letter] for letter in o.letters)
        yield Operand(letters, tensor, hot=o.hot and names[o.hot], size=o.size).ready("nm")
