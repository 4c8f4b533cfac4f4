"""From products of factored Jacobians to blocks of the kernel.

The order in which the operands of a product are contracted is the algorithm: form both Jacobians, or both Gram
matrices, or anything between (Novak, Sohl-Dickstein, Schoenholz: "Fast Finite Width Neural Tangent Kernel", ICML 2022,
section 3, compare some orders by hand). It is chosen by cost alone (:mod:`ggn_ntk.contraction.einsum`); here samples
are taken in blocks, or a parameter in parts, so that what the order forms on the way keeps to a budget.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.contraction.einsum import Memo, contract_to_last, path_of, step
from ggn_ntk.contraction.one_hot import cost, looked_up
from ggn_ntk.contraction.operand import Operand
from ggn_ntk.contraction.products import KernelEinsum, NamedEinsum
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.problem.result import transpose

# Into how many blocks the samples of a symmetric kernel may be divided.
_DIVISIONS = range(1, 5)

# How many operations take as long as a call, and as it takes to copy a number and read it.
_CALL, _MOVED = 2**22, 96


def add_products(
    kernels: dict[str, Tensor],
    products: Sequence[NamedEinsum],
    shape: Sequence[int],
    *,
    offset: int = 0,
    symmetric: bool = False,
) -> None:
    """Add products of Jacobians to kernels by name, in blocks of samples that keep intermediate results small."""
    # Of the second Jacobian, x2 starts at the offset. A symmetric kernel is computed on and above the diagonal of
    # blocks, and mirrored. Of paired samples, a block of x1 meets that of x2 alone, and is the whole of what it is the
    # transpose of.
    # shape [N1, N2, E, F, F], or [N, E, F, F] of paired samples
    n, m, paired = shape[0], shape[-4], len(shape) == 4
    some = next(o.tensor for _, product in products for o in product.first if not o.hot)
    new = {name: some.new_empty(*shape) for name, _ in products if name not in kernels}
    kernels.update(new)
    budget, sizes = MemoryBudget.of(some.device), {"n": n, "m": m}
    for group in _groups(products, sizes, budget, symmetric=symmetric and not paired):
        for part in group.parts:
            for name, rows, columns, large, other, first in _in_blocks(group, part, sizes, budget, offset):
                put = _write if first and name in new else _accumulate
                put(kernels[name][columns if paired else (rows, columns)], large, other)
                if group.divided and rows.stop <= columns.start:
                    put(transpose(kernels[name][columns, rows]), large, other)
            for name, _ in group.products:
                new.pop(name, None)


def _in_blocks(
    group: "_Group", part: slice, sizes: Mapping[str, int], budget: MemoryBudget, offset: int
) -> Iterator[tuple[str, slice, slice, Tensor, Tensor | int, bool]]:
    """Compute products in blocks: a kernel, samples of x1 and x2, two factors, and whether they are its first there."""
    size, products, divided = group.size, group.part(part), group.divided
    memo = Memo(divided > 0, keep_copies=size.pairs < size.columns, most=budget.columns)
    for columns in split(sizes["m"], divided or size.columns):
        for rows in [columns] if products[0][1].paired else split(sizes["n"], divided or size.rows):
            if divided and rows.start > columns.start:
                break  # the transpose of a block that is computed
            for few in split(columns.stop - columns.start, size.pairs):
                chosen = slice(columns.start + few.start, columns.start + few.stop)
                shifted = slice(chosen.start + offset, chosen.stop + offset)
                met = set[str]()
                for name, large, other in _summed(products, rows, shifted, memo, sizes):
                    yield name, rows, chosen, large, other, name not in met
                    met.add(name)
                memo.end_pair()
            memo.end_rows()


class Counts(NamedTuple):
    """What :func:`add_products` takes: operations, a multiplication and an addition as two, and bytes."""

    flops: float
    waiting: float  # as many operations as take the time of all calls, and that by which memory is slower
    given: float  # of operands that have outputs: ``s``, mostly
    inputs: float  # of the others: what layers were given; of a single output ``s``, too
    passed: float  # of as many gradients with respect to these: ``s`` behind the layer
    alone: float  # of what all samples of x1, and of x2, make before the two meet
    rows: float  # of that, what blocks of x1 and all of x2 have at the same time
    pairs: float  # of what is made of a block of x1 and one of x2

    def of_outputs(self, share: float) -> "Counts":
        """Count the bytes of what is there where a share of the outputs passes back at a time."""
        given, passed, alone, rows, pairs = (share * x for x in (self.given, *self[4:]))
        return self._replace(given=given, passed=passed, alone=alone, rows=rows, pairs=pairs)


def counts(
    products: Sequence[NamedEinsum], sizes: Mapping[str, int], *, budget: MemoryBudget, symmetric: bool
) -> Counts:
    """Count what :func:`add_products` takes."""
    # sizes of n and m
    found = list[tuple[float, ...]]()
    for group in _groups(products, sizes, budget, symmetric=symmetric and not products[0][1].paired):
        for length, times in Counter(part.stop - part.start for part in group.parts).items():
            *added, rows, pairs = _counts_of_part(group, slice(0, length), sizes, budget)
            found.append((*(times * count for count in added), rows, pairs))
    flops, waiting, alone, *largest = zip(*found, strict=True)
    whole = {o.key: o for _, product in products for o in product.operands}.values()
    with_outputs, others = ([o for o in whole if has is not {*"cdef"}.isdisjoint(o.letters)] for has in (True, False))
    outputs = max((prod(o.sizes[letter] for letter in o.letters if letter in "cdef") for o in with_outputs), default=1)
    inputs = sum(o.tensor.untyped_storage().nbytes() for o in others)
    return Counts(
        flops=sum(flops),
        waiting=sum(waiting),
        given=sum(o.tensor.nbytes for o in with_outputs),
        inputs=inputs,
        passed=outputs * inputs,
        alone=sum(alone),
        rows=max(largest[0]),
        pairs=max(largest[1]),
    )


def _counts_of_part(
    group: "_Group", part: slice, sizes: Mapping[str, int], budget: MemoryBudget
) -> tuple[float, float, float, float, float]:
    """Count what products take that are taken together: :class:`Counts`, less what they are given."""
    # What is found in the memo is counted once.
    size, products, divided = group.size, group.part(part), group.divided
    paired, again = products[0][1].paired, ceil(sizes["m"] / size.columns)
    divisions = ceil(sizes["n"] / divided) if divided else 1
    if divided:
        size = size._replace(rows=divided, pairs=min(divided, size.pairs))
    # of what depends on both, on x1 alone, on x2 alone
    share, rows = (divisions + 1) / (2 * divisions), 1 if divided else again
    seen: set[Hashable] = set()
    total, waiting, made = 0.0, 0.0, {frozenset("n"): 0.0, frozenset("m"): 0.0, frozenset("nm"): 0.0, frozenset(): 0.0}
    for _, product in products:
        given = product.operands
        if not divided:  # x1 and x2 may be parts of one tensor
            given = [o._replace(key=(o.key, place < len(product.first))) for place, o in enumerate(given)]
        operands = looked_up(given, product.result)
        lengths = {letter: sizes.get(letter, length) for o in operands for letter, length in o.sizes.items()}
        known = [(o.key, o.letters) for o in operands]
        of_sets = _sets(operands, product)
        for numbers, found, kept in _steps(operands, product, sizes):
            key = _pattern([known[number] for number in numbers], kept)
            known.append((key, kept))
            of_sets.append(frozenset().union(*(of_sets[number] for number in numbers)))
            if len(numbers) < 2 or key in seen:
                continue
            seen.add(key)
            both = paired or {"n", "m"} <= set(found)
            factor = share if both else rows if "n" in found else 1
            flops = prod(lengths[letter] for letter in found) * (1 if len(found) == len(kept) else 2)
            moved = sum(prod(lengths[x] for x in own) for own in (kept, *(known[number][1] for number in numbers)))
            total += factor * flops
            waiting += factor * max(0, _MOVED * moved - flops)
            if len(found) > len(kept) or not set(kept) <= set(product.result):  # else it is added to the kernel at once
                numbers_of_one = prod(lengths[letter] for letter in kept if letter not in "nm")
                made[of_sets[-1]] += numbers_of_one * _itemsize(product)
    # What is made of x2, or of a set that is both, is kept for the next rows, up to a limit; what is of x1, for these.
    n, m = made[frozenset("n")], made[frozenset("m")]
    rows_of_x1 = budget.columns if divided else n * size.rows
    return (
        total,
        waiting + len(seen) * _CALL * (divisions * (divisions + 1) / 2),
        n * sizes["n"] + m * sizes["m"],
        min(n * sizes["n"], rows_of_x1) + min(m * sizes["m"], budget.columns),
        made[frozenset()] + made[frozenset("nm")] * size.rows * (1 if paired else size.pairs),
    )


def _sets(operands: Sequence[Operand], product: KernelEinsum) -> list[frozenset[str]]:
    """Tell of which samples each operand is, those of x1 (``n``) or of x2 (``m``)."""
    if not product.paired:
        return [frozenset({*"nm"} & {*o.letters}) for o in operands]
    if len(operands) != len(product.operands):  # some were looked up
        return [frozenset("nm")] * len(operands)
    return [frozenset("n" if place < len(product.first) else "m") for place in range(len(operands))]


def _pattern(taken: Sequence[tuple[Hashable, str]], letters: str) -> Hashable:
    """Name a product by what it is made of; that of x2's operands, which differ in letters alone, as that of x1's."""
    ordered = sorted(taken, key=lambda of_one: repr(of_one[0]))
    names: dict[str, int] = {}
    pattern = [tuple(names.setdefault(letter, len(names)) for letter in own) for _, own in ordered]
    return (*(key for key, _ in ordered), *pattern, frozenset(names[letter] for letter in letters))


def _summed(
    products: Sequence[NamedEinsum], rows: slice, columns: slice, memo: Memo, sizes: Mapping[str, int]
) -> Iterator[tuple[str, Tensor, Tensor | int]]:
    """Compute a block of products of Jacobians: the name of a kernel, and two factors that broadcast to its shape."""
    # The last product is left to whoever writes it to the kernel, if it is one entry by entry: one pass less. Kernels
    # of a weight and a bias that share a factor, say the Gram matrix G of ``s``, are added up before it: their sum is
    # G * (X + 1), with the Gram matrix X of the inputs.
    sums: dict[Hashable, tuple[str, Tensor, Tensor | int]] = {}
    for name, product in products:
        operands = looked_up(product.restrict(rows, columns), product.result)
        factors = contract_to_last(operands, product.result, memo, sizes, product.apart)
        if not set(product.result).issuperset("".join(o.letters for o in factors)):
            by_size = sorted(factors, key=lambda o: -o.tensor.numel())  # many rows and few columns are faster
            factors = [step(by_size, set(product.result), memo)]
        large, *others = sorted(factors, key=lambda o: -o.tensor.numel())
        other: Tensor | int = others[0].aligned(product.result) if others else 1
        key = (name, large.key, large.letters)
        if key in sums:
            other = sums[key][2] + other
        sums[key] = (name, large.aligned(product.result), other)
    yield from sums.values()


def _accumulate(block: Tensor, large: Tensor, other: Tensor | int) -> None:
    """Add a product to a block of a kernel, in one pass."""
    if isinstance(other, int):
        block.add_(large, alpha=other)
    else:
        block.addcmul_(large, other)


def _write(block: Tensor, large: Tensor, other: Tensor | int) -> None:
    """Write a product to a block of a kernel that holds no numbers yet."""
    torch.mul(large.expand(block.shape), other, out=block)


def _divisions(products: Sequence[NamedEinsum]) -> int:
    """Choose into how many blocks the samples of a symmetric kernel are divided."""
    # The more blocks, the fewer pairs are computed twice: of k times k blocks k (k + 1) / 2 are. But each step of each
    # is a call.
    operations = sum(cost(product.operands, product.result) for _, product in products)
    calls = sum(len(product.operands) - 1 for _, product in products)
    return min(_DIVISIONS, key=lambda k: operations * (k + 1) / (2 * k) + calls * _CALL * k * (k + 1) / 2)


class _BlockSize(NamedTuple):
    """How many samples are taken at a time."""

    rows: int  # of x1
    columns: int  # of x2, for what depends on x2 alone
    pairs: int  # of x2, for what depends on both


class _Group(NamedTuple):
    """Products that are taken together, so that they share intermediate results; or one, in parts."""

    products: Sequence[NamedEinsum]
    size: _BlockSize
    divided: int  # how many samples of a symmetric kernel are taken at a time; 0 of others
    letter: str  # which is divided; empty where everything is taken at once
    parts: Sequence[slice]  # of it

    def part(self, block: slice) -> Sequence[NamedEinsum]:
        """Restrict the letter."""
        return _part(self.products, self.letter, block)


def _part(products: Sequence[NamedEinsum], letter: str, block: slice) -> Sequence[NamedEinsum]:
    """Restrict a letter, if one is given."""
    return [(name, product.part(letter, block)) for name, product in products] if letter else products


def _groups(
    products: Sequence[NamedEinsum], sizes: Mapping[str, int], budget: MemoryBudget, *, symmetric: bool
) -> Iterator[_Group]:
    """Group products, and take those apart whose Jacobians are large."""
    # A weight and its bias share the Gram matrix of ``s``, and x1 and x2, where they are the same samples, Jacobians.
    # But in blocks of samples, Jacobians that do not fit would be formed anew for each block that they meet. Of a part
    # of the parameter, that of all samples is formed once, and all samples meet in one product.
    together, largest = list[NamedEinsum](), dict[str, int]()
    for name, product in products:
        of_one = _largest(product, sizes)
        letter, parts = _division(product, of_one, sizes, budget)
        if letter:
            of_part = _largest(product.part(letter, parts[-1]), sizes)  # none is longer
            yield _group([(name, product)], letter, parts, of_part, sizes, budget, symmetric=symmetric)
        else:
            together.append((name, product))
            largest = {samples: max(size, largest.get(samples, 1)) for samples, size in of_one.items()}
    if together:
        yield _group(together, "", [slice(0, 0)], largest, sizes, budget, symmetric=symmetric)


def _group(
    products: Sequence[NamedEinsum],
    letter: str,
    parts: Sequence[slice],
    largest: Mapping[str, int],
    sizes: Mapping[str, int],
    budget: MemoryBudget,
    *,
    symmetric: bool,
) -> _Group:
    """Choose blocks of samples for products that are taken together."""
    size = _block_size(largest, sizes, budget, paired=products[0][1].paired)
    divided = 0
    if symmetric:
        divisions = _divisions(_part(products, letter, parts[-1]))
        divided = min(ceil(sizes["n"] / divisions), size.rows, size.columns)
    return _Group(products, size, divided, letter, parts)


def _division(
    product: KernelEinsum, largest: Mapping[str, int], sizes: Mapping[str, int], budget: MemoryBudget
) -> tuple[str, list[slice]]:
    """Choose the letter of a product of which a part is taken at a time, if not everything, and these parts."""
    needed = max(sizes["n"] * largest["n"] / budget.rows, sizes["m"] * largest["m"] / budget.columns)
    if needed <= 1 or product.paired:
        return "", []
    # A letter that all steps have, so that none is taken twice: then what lacks it is read once for each part.
    operands = looked_up(product.without_data().operands, product.result)
    steps = [set(found) for numbers, found, _ in _steps(operands, product, sizes) if len(numbers) > 1]
    letters = set.intersection(*steps).difference(product.result, *(o.hot for o in operands)) if steps else set()
    lengths = {letter: size for o in operands for letter, size in o.sizes.items()}
    read = {x: sum(o.tensor.numel() for o in operands if x not in o.letters) for x in letters if lengths[x] > 1}
    if not read:
        return "", []
    letter = min(sorted(read), key=lambda x: read[x])
    return letter, split(lengths[letter], max(1, int(lengths[letter] / needed)))


def _largest(product: KernelEinsum, sizes: Mapping[str, int]) -> dict[str, int]:
    """Find the largest intermediate results: bytes for a sample, or a pair, by the samples that they depend on."""
    # Of paired samples, everything depends on both.
    largest = {"n": 1, "m": 1, "nm": 1, "": 1}
    for letters, size in _intermediates(product, sizes):
        samples = "nm" if product.paired else "".join(letter for letter in "nm" if letter in letters)
        largest[samples] = max(largest[samples], size * _itemsize(product))
    return largest


def _block_size(
    largest: Mapping[str, int], sizes: Mapping[str, int], budget: MemoryBudget, *, paired: bool
) -> _BlockSize:
    """Choose blocks of samples for which intermediate results keep to their budgets."""
    # What depends on both x1 and x2 is to stay in a processor's cache. It is made of many samples of x1 and few of x2:
    # with a single one, the letter ``m`` does not keep others, which are to be merged, apart in memory.
    rows = max(1, min(sizes["n"], budget.rows // largest["n"], budget.passing // largest["nm"]))
    if paired:
        return _BlockSize(rows, rows, rows)
    columns = max(1, min(sizes["m"], budget.columns // largest["m"]))
    return _BlockSize(rows, columns, max(1, min(columns, budget.passing // (rows * largest["nm"]))))


def _itemsize(product: KernelEinsum) -> int:
    """Count the bytes of a number."""
    return next(o.tensor.element_size() for o in product.first if not o.hot)


def _intermediates(product: KernelEinsum, samples: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """List the intermediate results on the way to a product: their letters, and their size for one sample or pair."""
    given = product.without_data().operands
    operands = looked_up(given, product.result)
    sizes = {letter: size for o in operands for letter, size in o.sizes.items()}
    found = [o.letters for o in operands if o.key not in {g.key for g in given}]  # what look-ups write
    found += [kept for _, _, kept in _steps(operands, product, samples)]
    for letters in found:
        yield letters, prod(sizes[letter] for letter in letters if letter not in "nm")


def _steps(
    operands: Sequence[Operand], product: KernelEinsum, samples: Mapping[str, int]
) -> Iterator[tuple[list[int], str, str]]:
    """Follow the order of contraction: the numbers of what is taken, its letters, and those of the result."""
    # Operands are numbered first, and then results as they come.
    remaining = [(number, o.letters) for number, o in enumerate(operands)]
    for new, places in enumerate(path_of(operands, product.result, samples, product.apart).path, len(operands)):
        taken = [remaining.pop(i) for i in sorted(places, reverse=True)]
        found = set().union(*(letters for _, letters in taken))
        kept = "".join(sorted(found & set(product.result).union(*(letters for _, letters in remaining))))
        remaining.append((new, kept))
        yield [number for number, _ in taken], "".join(sorted(found)), kept
