"""From two factored Jacobians to a block of the kernel.

*Doubling* writes the product of two Jacobians as one einsum: ``cno,ni->cnoi`` with itself becomes
``cno,ni,dmo,mi->nmcd``. The order in which its operands are contracted is the algorithm: form both Jacobians, or both
Gram matrices, or anything between. ``opt_einsum`` finds the order with the fewest operations from the shapes alone
(Novak, Sohl-Dickstein, Schoenholz: "Fast Finite Width Neural Tangent Kernel", ICML 2022, section 3, compare some
orders by hand).

Letters: ``c``, ``d`` outputs; ``n``, ``m`` samples of x1 and x2; all others are renamed so that a letter
means the same everywhere in an einsum.
"""

import string
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from types import MappingProxyType
from typing import NamedTuple

import opt_einsum
import torch
from opt_einsum.contract import PathInfo
from torch import Tensor

from ggn_ntk.blocks import Joined, split
from ggn_ntk.layout import transpose
from ggn_ntk.rules import Factored

#: Numbers that an intermediate result of x1 may hold before x1 is taken in blocks.
BUDGET = 2**24

#: Numbers that the intermediate results of x2 may hold, which are kept while blocks of x1 pass.
KEPT = 2**26

RESULTS = {"full": "nmcd", "diagonal": "nmc", "trace": "nm"}


class Operand(NamedTuple):
    """A tensor with a letter for each axis.

    Attributes:
        letters: The letters.
        tensor: The tensor.
        key: What it was computed from: operands of equal keys hold equal numbers.
    """

    letters: str
    tensor: Tensor
    key: Hashable


@dataclass(frozen=True)
class Doubled:
    """The product of two Jacobians of a parameter, as one einsum.

    Attributes:
        first: Operands of the Jacobian of x1, over all samples; letter ``n``.
        second: Operands of the Jacobian of x2, over all samples; letter ``m``.
        result: Letters of the kernel.
    """

    first: tuple[Operand, ...]
    second: tuple[Operand, ...]
    result: str


def double(first: Factored, second: Factored, compute: str) -> Doubled:
    """Write the product of two Jacobians of one parameter as one einsum.

    The letters of the parameter's axes are matched by position. Where the two split these axes differently,
    both Jacobians are formed first.

    Args:
        first: The Jacobian of x1.
        second: The Jacobian of x2.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.

    Returns:
        The einsum and its operands.
    """
    if _parameter_sizes(first) != _parameter_sizes(second):
        first, second = expand(first), expand(second)
    same, first = second is first, sum_private_letters(first)
    second = first if same else sum_private_letters(second)
    names = iter(letter for letter in string.ascii_letters if letter not in "cdnm")
    axes = [next(names) for _ in first.result[2:]]
    output = "d" if compute == "full" else "c"
    return Doubled(
        tuple(_rename(first, dict(zip(first.result, ["c", "n", *axes], strict=True)), names)),
        tuple(_rename(second, dict(zip(second.result, [output, "m", *axes], strict=True)), names)),
        RESULTS[compute],
    )


def sum_private_letters(factored: Factored) -> Factored:
    """Sum over the letters that only one operand has, say over positions for a bias.

    Args:
        factored: The Jacobian.

    Returns:
        The same Jacobian.
    """
    terms, operands = [], []
    for i, (term, tensor) in enumerate(zip(factored.terms, factored.operands, strict=True)):
        needed = {*factored.result, *"".join(factored.terms[:i] + factored.terms[i + 1 :])}
        axes = [axis for axis, letter in enumerate(term) if letter not in needed]
        if axes:
            term, tensor = "".join(letter for letter in term if letter in needed), _sum_once(term, tensor, axes)
        terms.append(term)
        operands.append(tensor)
    return Factored(f"{','.join(terms)}->{factored.result}", tuple(operands))


def _sum_once(term: str, tensor: Tensor, axes: list[int]) -> Tensor:
    """Sum over axes, for one sample only where all have the same values.

    Args:
        term: A letter for each axis.
        tensor: The tensor.
        axes: The axes to sum over.

    Returns:
        The sum, the same for all samples where the tensor was.
    """
    n = term.find("n")
    if n < 0 or tensor.stride(n) != 0:
        return tensor.sum(axes)
    kept = [size for axis, size in enumerate(tensor.shape) if axis not in axes]
    return tensor.narrow(n, 0, 1).sum(axes).expand(kept)


def _parameter_sizes(factored: Factored) -> list[int]:
    """Read how a Jacobian splits the parameter's axes.

    Args:
        factored: The Jacobian.

    Returns:
        The sizes of its letters behind ``cn``.
    """
    return [factored.sizes[letter] for letter in factored.result[2:]]


def expand(factored: Factored) -> Factored:
    """Form a Jacobian.

    Args:
        factored: The Jacobian.

    Returns:
        The same Jacobian as one operand ``[C, N, P]``.
    """
    factored, n = sum_private_letters(factored), factored.sizes["n"]
    operands = [as_operand(term, tensor) for term, tensor in zip(factored.terms, factored.operands, strict=True)]
    jacobian = contract(operands, factored.result, Memo(symmetric=False))
    tensor = aligned(jacobian, factored.result)
    shape = [factored.sizes[letter] for letter in factored.result]
    return Factored("cnk->cnk", (tensor.expand(shape).reshape(shape[0], n, -1),))


class Part(NamedTuple):
    """Operands of a Jacobian that the cheapest order contracts before x1 meets x2.

    Attributes:
        operands: The operands.
        letters: The letters of their product.
    """

    operands: tuple[Operand, ...]
    letters: str


def parts(jacobian: Factored, n: int, m: int, compute: str) -> list[Part] | None:
    """Group the operands of a Jacobian by what the cheapest order does with them before x1 meets x2.

    Args:
        jacobian: The Jacobian of some samples.
        n: The number of samples x1 in all.
        m: The number of samples x2 in all.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.

    Returns:
        The groups, or ``None`` where each is an operand by itself, or they are not the same for x1 and x2.
    """
    summed = sum_private_letters(jacobian)
    groups = _groups_before_meeting(double(summed, summed, compute), n, m)
    if groups is None or (summed.terms == jacobian.terms and len(groups) == len(summed.terms)):
        return None
    terms = zip(summed.terms, summed.operands, strict=True)
    operands = [Operand(term, tensor, key=i) for i, (term, tensor) in enumerate(terms)]
    found = []
    for group in groups:
        needed = {*summed.result, *"".join(o.letters for i, o in enumerate(operands) if i not in group)}
        members = tuple(operands[i] for i in group)
        letters = dict.fromkeys("".join(o.letters for o in members))
        found.append(Part(members, "".join(letter for letter in letters if letter in needed)))
    return found


def contract_into(part: Part, whole: Joined, block: slice) -> None:
    """Contract a part of the Jacobian of a block of samples.

    Args:
        part: The part.
        whole: Takes the result, by its letters.
        block: The samples.
    """
    taken = _contract_to_last(part.operands, part.letters, Memo(symmetric=False))
    if len(taken) == 1:
        whole.put(block, taken[0].letters, taken[0].tensor)
    else:
        a, b = taken
        sizes = {letter: size for o in taken for letter, size in zip(o.letters, o.tensor.shape, strict=True)}
        letters = _result_letters(a, b, set(part.letters))
        _multiply(a, b, letters, set(part.letters), whole.room(block, letters, sizes, a.tensor))


def _groups_before_meeting(product: Doubled, n: int, m: int) -> list[list[int]] | None:
    """Find which operands of one Jacobian the cheapest order contracts with one another alone.

    Args:
        product: The product of a Jacobian with itself.
        n: The number of samples x1.
        m: The number of samples x2.

    Returns:
        Groups of places among the operands, or ``None`` if they are not the same for x1 and x2.
    """
    operands, half = [*product.first, *product.second], len(product.first)
    info = path_of(operands, product.result, {"n": n, "m": m})
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


def squared_norm(terms: Sequence[Factored], weights: Tensor) -> Tensor:
    """Compute ``|sum_cn v[c, n] J[c, n]|^2`` for a Jacobian that is the sum of terms.

    Args:
        terms: The terms.
        weights: The numbers v, ``[C, N]``.

    Returns:
        The squared norm, a scalar.
    """
    total = weights.new_zeros(())
    first, second = Operand("cn", weights, "first"), Operand("dm", weights, "second")
    for a in terms:
        for b in terms:
            product = double(a, b, "full")
            operands = [*product.first, first, *product.second, second]
            total += contract(operands, "", Memo(symmetric=False)).tensor
    return total


def select_samples(factored: Factored, samples: Sequence[int]) -> Factored:
    """Restrict a Jacobian to some samples.

    Args:
        factored: The Jacobian.
        samples: Which samples.

    Returns:
        The Jacobian of these samples.
    """
    operands = (
        torch.stack([tensor.select(term.index("n"), i) for i in samples], term.index("n")) if "n" in term else tensor
        for term, tensor in zip(factored.terms, factored.operands, strict=True)
    )
    return Factored(factored.equation, tuple(operands))


def _rename(factored: Factored, names: dict[str, str], fresh: Iterator[str]) -> Iterator[Operand]:
    """Rename the letters of a Jacobian.

    Args:
        factored: The Jacobian.
        names: The new letters of its result.
        fresh: New letters for those that are summed.

    Yields:
        Its operands.
    """
    for term, tensor in zip(factored.terms, factored.operands, strict=True):
        for letter in term:
            if letter not in names:
                names[letter] = next(fresh)
        yield as_operand("".join(names[letter] for letter in term), tensor)


def as_operand(letters: str, tensor: Tensor) -> Operand:
    """Give a tensor letters, without the axes along which it has one value.

    Args:
        letters: A letter for each axis.
        tensor: The tensor.

    Returns:
        The operand; it lacks the letter of samples where the tensor is the same for all of them.
    """
    key = (tensor.data_ptr(), tensor.shape, tensor.stride())
    for axis in reversed(range(tensor.ndim)):
        same_for_samples = letters[axis] in "nm" and tensor.stride(axis) == 0 and tensor.shape[axis] > 1
        if same_for_samples:
            tensor, letters = tensor.select(axis, 0), letters[:axis] + letters[axis + 1 :]
    return Operand(letters, tensor, key)


@lru_cache(maxsize=4096)
def path_info(equation: str, shapes: tuple[tuple[int, ...], ...]) -> PathInfo:
    """Find the order of contraction with the fewest operations.

    Args:
        equation: The einsum.
        shapes: The shapes of its operands.

    Returns:
        The order, with its cost.
    """
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return info


def path_of(operands: Sequence[Operand], result: str, sizes: Mapping[str, int] = MappingProxyType({})) -> PathInfo:
    """Find the order in which to contract operands.

    Args:
        operands: The operands.
        result: The letters to keep, of which operands may lack some.
        sizes: The sizes of letters where they shall not be those of the operands.

    Returns:
        The order, with its cost.
    """
    present = set().union(*(o.letters for o in operands))
    kept = "".join(letter for letter in result if letter in present)
    equation = ",".join(o.letters for o in operands) + "->" + kept
    shapes = (zip(o.letters, o.tensor.shape, strict=True) for o in operands)
    return path_info(equation, tuple(tuple(sizes.get(letter, size) for letter, size in shape) for shape in shapes))


def contract(operands: Sequence[Operand], result: str, memo: "Memo") -> Operand:
    """Contract operands in the cheapest order.

    Args:
        operands: The operands.
        result: The letters to keep.
        memo: Keeps intermediate results.

    Returns:
        The result, its letters in any order; those that no operand has are left out.
    """
    return _step(_contract_to_last(operands, result, memo), set(result), memo)


def _contract_to_last(operands: Sequence[Operand], result: str, memo: "Memo") -> list[Operand]:
    """Contract operands in the cheapest order, up to the last product.

    Args:
        operands: The operands.
        result: The letters to keep.
        memo: Keeps intermediate results.

    Returns:
        One or two operands, whose product is the result.
    """
    remaining = list(operands)
    for step in path_of(operands, result).path:
        taken = [remaining.pop(i) for i in sorted(step, reverse=True)][::-1]
        if not remaining:
            return taken
        needed = set(result).union(*(o.letters for o in remaining))
        remaining.append(_step(taken, needed, memo))
    return remaining


def _step(taken: list[Operand], needed: set[str], memo: "Memo") -> Operand:
    """Contract one or two operands, unless it was done before.

    Args:
        taken: The operands.
        needed: Letters that must remain.
        memo: Intermediate results.

    Returns:
        The result.
    """
    if len(taken) == 1:
        return taken[0]
    a, b = taken
    letters = _result_letters(a, b, needed)
    names: dict[str, int] = {}
    pattern = tuple(
        tuple(names.setdefault(letter, len(names)) for letter in t) for t in (a.letters, b.letters, letters)
    )
    key = (a.key, b.key, pattern)
    return Operand(letters, memo.get(key, letters, lambda: _multiply(a, b, letters, needed)), key)


def _result_letters(a: Operand, b: Operand, needed: set[str]) -> str:
    """Order the letters of a product as matrix products leave them in memory.

    Args:
        a: The left factor.
        b: The right factor.
        needed: Letters that must remain.

    Returns:
        Letters of both, then of the left, then of the right, each as they lie in memory.
    """
    batch = [letter for letter in _by_stride(a) if letter in b.letters and letter in needed]
    left = [letter for letter in _by_stride(a) if letter not in b.letters]
    right = [letter for letter in _by_stride(b) if letter not in a.letters]
    return "".join(batch + left + right)


def _by_stride(operand: Operand) -> list[str]:
    """List an operand's letters as they lie in memory.

    Args:
        operand: The operand.

    Returns:
        Its letters, outermost first.
    """
    strides = dict(zip(operand.letters, operand.tensor.stride(), strict=True))
    return sorted(operand.letters, key=lambda letter: -strides[letter])


def _multiply(a: Operand, b: Operand, letters: str, needed: set[str], out: Tensor | None = None) -> Tensor:
    """Multiply two operands: entry by entry where no letter is summed, else as matrices.

    Args:
        a: The left factor.
        b: The right factor.
        letters: The letters of the result, from :func:`_result_letters`.
        needed: Letters that must remain.
        out: Where to put the product.

    Returns:
        The product.
    """
    if out is not None and not out.is_contiguous():
        return out.copy_(_multiply(a, b, letters, needed))
    shared = [letter for letter in _by_stride(max(a, b, key=lambda o: o.tensor.numel())) if letter in a.letters]
    summed = [letter for letter in shared if letter in b.letters and letter not in needed]
    if not summed:
        return torch.mul(aligned(a, letters), aligned(b, letters), out=out)
    sizes = dict(zip(a.letters + b.letters, a.tensor.shape + b.tensor.shape, strict=True))
    batch = [letter for letter in letters if letter in a.letters and letter in b.letters]
    left = [letter for letter in letters if letter not in b.letters]
    right = [letter for letter in letters if letter not in a.letters]
    strides = dict(zip(a.letters, a.tensor.stride(), strict=True))
    outermost = max(strides[letter] for letter in summed)
    outer = [letter for letter in left if strides[letter] > outermost]
    inner = [letter for letter in left if letter not in outer]
    if not inner:
        outer, inner = [], outer
    first, second = _merged(a, batch, outer, inner, summed), _merged(b, batch, summed, right)
    shape = [*first.shape[:3], second.shape[2]]
    product = first.new_empty(shape) if out is None else out.view(shape)
    if not outer:
        torch.bmm(first.squeeze(1), second, out=product.squeeze(1))
    else:  # say outputs outside, channels inside of positions: no copy is needed that would put them together
        for matrices, matrix, out in zip(first, second, product, strict=True):
            torch.bmm(matrices, matrix.expand(len(matrices), -1, -1), out=out)
    return product.reshape([sizes[letter] for letter in letters])


def _merged(operand: Operand, *groups: list[str]) -> Tensor:
    """Merge groups of letters to one axis each, without a copy where the operand's memory allows.

    Args:
        operand: The operand.
        *groups: Its letters.

    Returns:
        A tensor with an axis for each group.
    """
    tensor = operand.tensor.permute([operand.letters.index(letter) for group in groups for letter in group])
    sizes = dict(zip(operand.letters, operand.tensor.shape, strict=True))
    return tensor.reshape([prod(sizes[letter] for letter in group) for group in groups])


def aligned(operand: Operand, letters: str) -> Tensor:
    """Order an operand's axes, with an axis of length one for each letter it lacks.

    Args:
        operand: The operand.
        letters: The wanted letters.

    Returns:
        A view that broadcasts.
    """
    tensor = operand.tensor.permute([operand.letters.index(letter) for letter in letters if letter in operand.letters])
    for axis, letter in enumerate(letters):
        if letter not in operand.letters:
            tensor = tensor.unsqueeze(axis)
    return tensor


# ---------------------------------------------------------------- blocks of the kernel


class Memo:
    """Intermediate results, kept for as long as something may use them again.

    Results are known by the addresses of the tensors they were computed from, so a memo must not outlive these.

    Attributes:
        symmetric: Whether x1 and x2 are the same samples, so that what depends on one serves for the other.
    """

    def __init__(self, symmetric: bool) -> None:
        """Set up.

        Args:
            symmetric: Whether x1 and x2 are the same samples.
        """
        self.symmetric = symmetric
        self._of_block: dict[Hashable, Tensor] = {}
        self._of_samples: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, letters: str, compute: Callable[[], Tensor]) -> Tensor:
        """Look a result up, or compute it.

        Args:
            key: Its key.
            letters: Its letters.
            compute: Computes it.

        Returns:
            The result.
        """
        short_lived = "n" in letters and ("m" in letters or not self.symmetric)
        kept = self._of_block if short_lived else self._of_samples
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def end_block(self) -> None:
        """Forget what depends on the pair of blocks, and the rest if it has grown too large."""
        self._of_block.clear()
        if sum(tensor.numel() for tensor in self._of_samples.values()) > KEPT:
            self._of_samples.clear()


def add_products(kernels: dict[str, Tensor], products: Sequence[tuple[str, Doubled]], n1: int | None) -> None:
    """Add products of Jacobians to kernels, in blocks of samples that keep intermediate results small.

    Products are taken together, so that they share intermediate results: the weight and bias of a layer the Gram
    matrix of ``s``, and x1 and x2 the Jacobian where they are the same samples.

    Args:
        kernels: The kernels, by name; changed in place.
        products: Which product to add to which kernel. Operands are over all samples.
        n1: How many samples are x1, the others x2; ``None`` where all are both: then only pairs of blocks on and
            above the diagonal are computed, and mirrored.
    """
    n, m = next(iter(kernels.values())).shape[:2]
    symmetric, offset = n1 is None, n1 or 0
    rows = _blocks(n, "n", BUDGET, products)
    if symmetric:  # the more blocks, the fewer pairs are computed twice; but small products are slow
        most = max(ceil(n / 4), ceil(64 / prod(next(iter(kernels.values())).shape[3:])))
        rows = split(n, min(most, rows[0].stop))
    columns = rows if symmetric else _blocks(m, "m", KEPT, products)
    memo = Memo(symmetric)
    for column in columns:
        shifted = slice(column.start + offset, column.stop + offset)
        for row in rows:
            if symmetric and row.start > column.start:
                break
            for name, large, other in _summed(products, row, shifted, memo):
                _accumulate(kernels[name][row, column], large, other)
                if symmetric and row.start < column.start:
                    _accumulate(transpose(kernels[name][column, row]), large, other)
            memo.end_block()


def _summed(
    products: Sequence[tuple[str, Doubled]], rows: slice, columns: slice, memo: Memo
) -> Iterator[tuple[str, Tensor, Tensor | int]]:
    """Compute products of Jacobians, as few passes over a block of the kernel as they take.

    The kernels of a weight and a bias may share a factor of the block's size, say the Gram matrix G of ``s``: then
    their sum is G * (X + 1), with the Gram matrix X of the inputs.

    Args:
        products: Which product to add to which kernel.
        rows: Samples of x1.
        columns: Samples of x2.
        memo: Keeps intermediate results.

    Yields:
        The kernel's name and two factors that broadcast to the block.
    """
    sums: dict[Hashable, tuple[str, Tensor, Tensor | int]] = {}
    for name, product in products:
        factors = _contract_to_last(restrict(product, rows, columns), product.result, memo)
        if not set(product.result).issuperset("".join(o.letters for o in factors)):
            factors = [_step(factors, set(product.result), memo)]
        large, *others = sorted(factors, key=lambda o: -o.tensor.numel())
        other: Tensor | int = aligned(others[0], product.result) if others else 1
        key = (name, large.key, large.letters)
        if key in sums:
            other = sums[key][2] + other
        sums[key] = (name, aligned(large, product.result), other)
    yield from sums.values()


def _accumulate(block: Tensor, large: Tensor, other: Tensor | int) -> None:
    """Add a product to a block of a kernel, in one pass.

    Args:
        block: The block; changed in place.
        large: One factor.
        other: The other factor.
    """
    if isinstance(other, int):
        block.add_(large, alpha=other)
    else:
        block.addcmul_(large, other)


def restrict(product: Doubled, rows: slice, columns: slice) -> list[Operand]:
    """Select samples of the operands of a product.

    Args:
        product: The product, over all samples.
        rows: Samples of x1.
        columns: Samples of x2.

    Returns:
        The operands.
    """
    first = [_sliced(o, "n", rows) for o in product.first]
    return first + [_sliced(o, "m", columns) for o in product.second]


def _blocks(size: int, letter: str, budget: int, products: Sequence[tuple[str, Doubled]]) -> list[slice]:
    """Split samples so that no intermediate result of one set alone exceeds a budget.

    Args:
        size: The number of samples.
        letter: ``"n"`` or ``"m"``.
        budget: Numbers that a result may hold.
        products: The products to compute.

    Returns:
        The blocks.
    """
    largest = max((_largest_per_sample(product, letter) for _, product in products), default=1)
    return split(size, budget // largest)


def _largest_per_sample(product: Doubled, letter: str) -> int:
    """Find the largest intermediate result on the way to a product, for one sample.

    Args:
        product: The product.
        letter: Consider results with this letter.

    Returns:
        Its number of entries for one sample.
    """
    largest = 1
    for letters, sizes in intermediates(product):
        if letter in letters:
            largest = max(largest, prod(sizes[other] for other in letters if other not in "nm"))
    return largest


def intermediates(product: Doubled) -> Iterator[tuple[str, dict[str, int]]]:
    """List the intermediate results on the way to a product.

    Args:
        product: The product.

    Yields:
        The letters of each, and the size of every letter.
    """
    operands = [*product.first, *product.second]
    sizes = {letter: size for o in operands for letter, size in zip(o.letters, o.tensor.shape, strict=True)}
    remaining = [o.letters for o in operands]
    for step in path_of(operands, product.result).path:
        taken = "".join(remaining.pop(i) for i in sorted(step, reverse=True))
        needed = set("".join(remaining) + product.result)
        letters = "".join(sorted(set(taken) & needed))
        remaining.append(letters)
        yield letters, sizes


def _sliced(operand: Operand, letter: str, samples: slice) -> Operand:
    """Select samples of an operand.

    Args:
        operand: The operand.
        letter: The letter of its samples; it may lack it.
        samples: Which samples.

    Returns:
        The selection.
    """
    if letter not in operand.letters:
        return operand
    tensor = operand.tensor.narrow(operand.letters.index(letter), samples.start, samples.stop - samples.start)
    return operand._replace(tensor=tensor, key=(operand.key, samples.start, samples.stop))
