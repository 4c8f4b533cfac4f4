"""From products of factored Jacobians to blocks of the kernel.

The order in which the operands of a product are contracted is the algorithm: form both Jacobians, or both Gram
matrices, or anything between (Novak, Sohl-Dickstein, Schoenholz: "Fast Finite Width Neural Tangent Kernel", ICML 2022,
section 3, compare some orders by hand). It is chosen by cost alone (:mod:`ggn_ntk.contraction.einsum`); here samples
are taken in blocks, so that what the order forms on the way keeps to a budget.
"""

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

# Into how many blocks the samples of a symmetric kernel may be divided, and how many operations take as long as a call.
_DIVISIONS, _CALL = range(1, 5), 2**22


def add_products(
    kernels: dict[str, Tensor],
    products: Sequence[NamedEinsum],
    shape: Sequence[int],
    *,
    offset: int = 0,
    symmetric: bool = False,
) -> None:
    """Add products of Jacobians to kernels by name, in blocks of samples that keep intermediate results small."""
    # Products are taken together, so that they share intermediate results: the weight and bias of a layer the Gram
    # matrix of ``s``, and x1 and x2 the Jacobian where they are the same samples. Of the second Jacobian, x2 starts at
    # the offset. A symmetric kernel is computed on and above the diagonal of blocks, and mirrored.
    # Of paired samples, a block of x1 meets that of x2 alone, and is the whole of what it is the transpose of.
    # shape [N1, N2, E, F, F], or [N, E, F, F] of paired samples
    n, m, paired = shape[0], shape[-4], len(shape) == 4
    symmetric = symmetric and not paired
    some = next(o.tensor for _, product in products for o in product.first if not o.hot)
    new = {name: some.new_empty(*shape) for name, _ in products if name not in kernels}
    kernels.update(new)
    budget = MemoryBudget.of(some.device)
    sizes = {"n": n, "m": m}
    size = _block_size(products, sizes, budget)
    rows, columns = split(n, size.rows), split(m, size.columns)
    if symmetric:
        rows = columns = split(n, min(ceil(n / _divisions(products)), size.rows, size.columns))
    memo = Memo(symmetric, keep_copies=size.pairs < size.columns, most=budget.columns)
    for column in columns:
        for row in [column] if paired else rows:
            if symmetric and row.start > column.start:
                break  # the transpose of a block that is computed
            for part in split(column.stop - column.start, size.pairs):
                chosen = slice(column.start + part.start, column.start + part.stop)
                place = chosen if paired else (row, chosen)
                shifted = slice(chosen.start + offset, chosen.stop + offset)
                empty = set(new)  # kernels with no numbers in this block yet: it is written instead of added to
                for name, large, other in _summed(products, row, shifted, memo, sizes):
                    put = _write if name in empty else _accumulate
                    put(kernels[name][place], large, other)
                    if symmetric and row.start < column.start:
                        put(transpose(kernels[name][chosen, row]), large, other)
                    empty.discard(name)
                memo.end_pair()
            memo.end_rows()


class Counts(NamedTuple):
    """What :func:`add_products` takes: operations, a multiplication and an addition as two, and bytes."""

    flops: float
    calls: float  # as many operations as take the time of all calls
    given: float  # of operands that have outputs: ``s``, mostly
    passed: float  # of as many gradients with respect to the others: ``s`` behind the layer
    alone: float  # of what all samples of x1, and of x2, make before the two meet
    rows: float  # of that, what blocks of x1 and all of x2 have at the same time
    pairs: float  # of what is made of a block of x1 and one of x2

    def of_outputs(self, share: float) -> "Counts":
        """Count the bytes of what is there where a share of the outputs passes back at a time."""
        given, passed, alone, rows, pairs = (share * bytes_ for bytes_ in self[2:])
        return self._replace(given=given, passed=passed, alone=alone, rows=rows, pairs=pairs)


def counts(
    products: Sequence[NamedEinsum], sizes: Mapping[str, int], *, budget: MemoryBudget, symmetric: bool
) -> Counts:
    """Count what :func:`add_products` takes."""
    # sizes of n and m; what is found in the memo is counted once
    size, paired = _block_size(products, sizes, budget), products[0][1].paired
    divisions, again = 1, ceil(sizes["m"] / size.columns)
    if symmetric and not paired:
        block = min(ceil(sizes["n"] / _divisions(products)), size.rows, size.columns)
        divisions = ceil(sizes["n"] / block)
        size = size._replace(rows=block, pairs=min(block, size.pairs))
    # of what depends on both, on x1 alone, on x2 alone
    share, rows = (divisions + 1) / (2 * divisions), 1 if symmetric else again
    seen: set[Hashable] = set()
    total, made = 0.0, {frozenset("n"): 0.0, frozenset("m"): 0.0, frozenset("nm"): 0.0, frozenset(): 0.0}
    for _, product in products:
        given = product.operands
        if not symmetric:  # x1 and x2 may be parts of one tensor
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
            total += factor * prod(lengths[letter] for letter in found) * (1 if len(found) == len(kept) else 2)
            if len(found) > len(kept) or not set(kept) <= set(product.result):  # else it is added to the kernel at once
                numbers_of_one = prod(lengths[letter] for letter in kept if letter not in "nm")
                made[of_sets[-1]] += numbers_of_one * _itemsize(product)
    # What is made of x2, or of a set that is both, is kept for the next rows, up to a limit; what is of x1, for these.
    n, m = made[frozenset("n")], made[frozenset("m")]
    rows_of_x1 = budget.columns if symmetric else n * size.rows
    whole = {o.key: o for _, product in products for o in product.operands}.values()
    with_outputs, others = ([o for o in whole if has is not {*"cdef"}.isdisjoint(o.letters)] for has in (True, False))
    outputs = max((prod(o.sizes[letter] for letter in o.letters if letter in "cdef") for o in with_outputs), default=1)
    return Counts(
        flops=total,
        calls=len(seen) * _CALL * (divisions * (divisions + 1) / 2),
        given=sum(o.tensor.nbytes for o in with_outputs),
        passed=outputs * sum(o.tensor.untyped_storage().nbytes() for o in others),
        alone=n * sizes["n"] + m * sizes["m"],
        rows=min(n * sizes["n"], rows_of_x1) + min(m * sizes["m"], budget.columns),
        pairs=made[frozenset()] + made[frozenset("nm")] * size.rows * (1 if paired else size.pairs),
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


def _block_size(products: Sequence[NamedEinsum], sizes: Mapping[str, int], budget: MemoryBudget) -> _BlockSize:
    """Choose blocks of samples for which intermediate results keep to their budgets."""
    # What depends on both x1 and x2 is to stay in a processor's cache. It is made of many samples of x1 and few of x2:
    # with a single one, the letter ``m`` does not keep others, which are to be merged, apart in memory.
    # Of paired samples, everything depends on both.
    largest = {"n": 1, "m": 1, "nm": 1}  # bytes a sample, or a pair, by the samples that a result depends on
    paired = products[0][1].paired
    for _, product in products:
        for letters, size in _intermediates(product, sizes):
            samples = "nm" if paired else "".join(letter for letter in "nm" if letter in letters)
            largest[samples] = max(largest.get(samples, 1), size * _itemsize(product))
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
