"""Einsums of two or more operands, contracted in the cheapest order as they lie in memory.

``opt_einsum`` finds the order from the shapes alone. Each step takes two operands: it is a product entry by entry, or a
batch of matrix products, of views. ``torch.einsum`` would do, but copies operands to an order of axes of its own; here
letters are merged as they lie in memory, so that windows and transposed tensors are copied only where they must be.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from math import ceil, inf, prod
from types import MappingProxyType
from typing import NamedTuple

import opt_einsum
import torch
from opt_einsum.contract import PathInfo
from torch import Tensor

from ggn_ntk.contraction.operand import Operand

# Up to how many operands all orders are compared; the search among more takes seconds.
_EXHAUSTIVE = 6

# Rounding grows with the number of terms that a matrix product adds up one after the other. Sums of more than _LONG
# terms are split: partial sums come from matrix products, and torch adds these in pairs. Together they hold at most
# _PARTIAL numbers, so that large results are split less.
_LONG, _PARTIAL = 2**14, 2**22

# Letters of a kernel: its samples and outputs.
_RESULT = "nmecd"


class Memo:
    """Intermediate results, kept for as long as something may use them again."""

    # Weight and bias share the Gram matrix of ``s``; x1 and x2, where they are the same samples, share Jacobians. A key
    # names the memory that a result was computed from (:attr:`Operand.key`) and the steps in between. Memory that is
    # freed may be given to another tensor, so a memo must not outlive the operands.

    def __init__(self, symmetric: bool = False, keep_copies: bool = False, most: float = inf) -> None:
        """Keep at most so many bytes from one block of x1 to the next."""
        self._most = most
        self.symmetric = symmetric  # whether x1 and x2 are the same samples, and share what depends on one of them
        self.keep_copies = keep_copies  # whether to keep operands that were copied to merge their letters
        # Blocks of x2 are the outer loop, of x1 the inner one, and of each pair the columns come a few at a time.
        self._of_pair: dict[Hashable, Tensor] = {}  # depends on these few samples of x2 and the block of x1
        self._of_rows: dict[Hashable, Tensor] = {}  # depends on the block of x1 alone
        self._of_samples: dict[Hashable, Tensor] = {}  # serves all blocks: of x2, or of either if they are the same

    def get(self, key: Hashable, letters: str, compute: Callable[[], Tensor]) -> Tensor:
        """Look a result up, or compute it."""
        # What has neither letter, say a product of a rule's constants, is kept with x2's.
        of_one = self._of_samples if self.symmetric or "n" not in letters else self._of_rows
        kept = self._of_pair if "n" in letters and "m" in letters else of_one
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def end_pair(self) -> None:
        """Forget what depends on both a block of x1 and one of x2."""
        self._of_pair.clear()

    def end_rows(self) -> None:
        """Forget what depends on a block of x1, and the rest if it has grown too large."""
        self._of_rows.clear()
        if sum(tensor.numel() * tensor.element_size() for tensor in self._of_samples.values()) > self._most:
            self._of_samples.clear()


@lru_cache(maxsize=4096)
def path_info(equation: str, shapes: tuple[tuple[int, ...], ...], apart: int = 0) -> PathInfo:
    """Find the order of contraction with the fewest operations."""
    # A path is opt_einsum's: for each step the places of the operands it takes out of the list; the result is appended.
    path = _path_apart(equation, shapes, apart) if apart else _search(equation, shapes)
    return opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=path)[1]


def _search(equation: str, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Find the cheapest order: among all of them, or of many operands among those without outer products."""
    optimize = "optimal" if len(shapes) <= _EXHAUSTIVE else "dp"
    path: list[tuple[int, ...]] = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)[0]
    return path


def _path_apart(equation: str, shapes: Sequence[tuple[int, ...]], first: int) -> list[tuple[int, ...]]:
    """Contract the first operands, and the others, each in the cheapest order, and then the two results."""
    # Operands and results are numbered from 0 in the order of their appearance; a path counts places among those left.
    inputs, result = equation.split("->")
    terms = inputs.split(",")
    remaining, path = list(range(len(terms))), list[tuple[int, ...]]()
    for places in (range(first), range(first, len(terms))):
        needed = {*result, *"".join(term for i, term in enumerate(terms) if i not in places)}
        own = [terms[i] for i in places]
        kept = "".join(letter for letter in dict.fromkeys("".join(own)) if letter in needed)
        names = list(places)  # the numbers of what is left of this group, in the order of its own path
        for step_ in _search(f"{','.join(own)}->{kept}", [shapes[i] for i in places]) if len(own) > 1 else ():
            taken = [names[i] for i in step_]
            path.append(tuple(sorted(remaining.index(name) for name in taken)))
            new = len(terms) + len(path)
            names = [name for name in names if name not in taken] + [new]
            remaining = [name for name in remaining if name not in taken] + [new]
    return [*path, tuple(range(len(remaining)))]


def path_of(
    operands: Sequence[Operand], result: str, sizes: Mapping[str, int] = MappingProxyType({}), apart: int = 0
) -> PathInfo:
    """Find the order in which to contract operands, as if the letters in ``sizes`` had these sizes."""
    # The sizes of all samples are given where operands hold a block of them: every block is contracted in one order.
    present = set().union(*(o.letters for o in operands))
    kept = "".join(letter for letter in result if letter in present)
    equation = ",".join(o.letters for o in operands) + "->" + kept
    shapes = (zip(o.letters, o.tensor.shape, strict=True) for o in operands)
    known = tuple(tuple(sizes.get(letter, size) for letter, size in shape) for shape in shapes)
    return path_info(equation, known, apart)


def sum_private(operands: Sequence[Operand], result: str) -> list[Operand]:
    """Sum over the letters of one operand alone, which no product sums, unless the result has them."""
    counts = Counter("".join(o.term for o in operands))
    private = {letter for letter, count in counts.items() if count == 1}.difference(result)
    # A sum of one-hot vectors is none, and is left to :func:`ggn_ntk.contraction.one_hot.looked_up`.
    return [o if o.hot or private.isdisjoint(o.letters) else _summed(o, private) for o in operands]


def _summed(operand: Operand, letters: set[str]) -> Operand:
    """Sum an operand over letters, for one sample only where all have the same values."""
    axes = [axis for axis, letter in enumerate(operand.letters) if letter in letters]
    kept = "".join(letter for letter in operand.letters if letter not in letters)
    tensor, n = operand.tensor, operand.letters.find("n")
    if n >= 0 and n not in axes and tensor.stride(n) == 0:
        shape = [size for axis, size in enumerate(tensor.shape) if axis not in axes]
        total = tensor.narrow(n, 0, 1).sum(axes).expand(shape)
    else:
        total = tensor.sum(axes)
    return Operand(kept, total, ("sum", operand.key, *axes))


def contract(operands: Sequence[Operand], result: str, memo: Memo) -> Operand:
    """Contract operands in the cheapest order."""
    return step(contract_to_last(operands, result, memo), set(result), memo)


def contract_to_last(
    operands: Sequence[Operand],
    result: str,
    memo: Memo,
    sizes: Mapping[str, int] = MappingProxyType({}),
    apart: int = 0,
) -> list[Operand]:
    """Contract operands in the cheapest order, up to the last product: its one or two factors."""
    # The last product may be left to the caller, to write it to its place in one pass.
    remaining = list(operands)
    for places in path_of(operands, result, sizes, apart).path:
        taken = [remaining.pop(i) for i in sorted(places, reverse=True)][::-1]
        if not remaining:
            return taken
        needed = set(result).union(*(o.letters for o in remaining))
        remaining.append(step(taken, needed, memo))
    return remaining


def step(taken: list[Operand], needed: set[str], memo: Memo) -> Operand:
    """Contract one or two operands, unless it was done before."""
    if len(taken) == 1:
        return taken[0]
    a, b = taken
    product = as_matrices(a, b, needed)
    letters = product.letters
    # Letters are numbered in the key, so that the same product of x1's operands and of x2's, which differ in letters
    # alone, is found again.
    names: dict[str, int] = {}
    pattern = tuple(
        tuple(names.setdefault(letter, len(names)) for letter in t) for t in (a.letters, b.letters, letters)
    )
    key = (a.key, b.key, pattern)
    return Operand(letters, memo.get(key, letters, lambda: multiply(product, memo)), key)


class Matrices(NamedTuple):
    """How two operands are multiplied as a batch of matrices: each list of letters is merged to one axis."""

    first: Operand  # the factor that gives the rows
    second: Operand  # the factor that gives the columns
    batch: list[str]  # letters of the batch; the first factor is repeated along those that it lacks
    rows: list[str]  # letters of the first factor alone
    summed: list[str]  # letters that are summed
    columns: list[str]  # letters of the second factor alone

    @property
    def letters(self) -> str:
        """The letters of the product, as it lies in memory."""
        return "".join(self.batch + self.rows + self.columns)


def as_matrices(a: Operand, b: Operand, needed: set[str]) -> Matrices:
    """Order the letters of a product of two operands."""
    # Lists follow the strides of a factor, so that to merge their letters takes no copy where no others lie in between:
    # what both have, of the larger one. A letter of one factor alone is a row or a column.
    larger, smaller = (a, b) if a.tensor.numel() >= b.tensor.numel() else (b, a)
    summed = [letter for letter in larger.by_stride() if letter in smaller.letters and letter not in needed]
    outer = _outer_rows(larger, smaller, summed)
    first, second = (smaller, larger) if outer else (a, b)
    shared = needed.intersection(a.letters, b.letters).union(outer)
    batch = [letter for letter in (larger if outer else a).by_stride() if letter in shared]
    rows = [letter for letter in first.by_stride() if letter not in second.letters]
    columns = [letter for letter in second.by_stride() if letter not in (*first.letters, *outer)]
    later = _summed_later(first, second, rows, columns)
    rows, columns = ([letter for letter in side if letter not in later] for side in (rows, columns))
    return Matrices(first, second, [*later, *batch], rows, summed, columns)


def _summed_later(first: Operand, second: Operand, rows: list[str], columns: list[str]) -> list[str]:
    """Find letters of a product of x1 with x2 that had better be a batch: positions, over which it is summed later."""
    # That sum is one of products entry by entry, with another such product. It is fastest outside of all samples. To
    # have positions there both factors are repeated; that must not be more than what the product holds.
    if not {"n", "m"} <= {*rows, *columns}:
        return []
    later = [letter for letter in (*rows, *columns) if letter not in _RESULT]
    sizes = first.sizes | second.sizes
    repeated = sum(f.tensor.numel() * prod(sizes[x] for x in later if x not in f.letters) for f in (first, second))
    return later if repeated <= prod(sizes[letter] for letter in (*rows, *columns)) else []


def _outer_rows(larger: Operand, smaller: Operand, summed: list[str]) -> list[str]:
    """Find rows of the larger factor that had better be a batch: outside of what is summed, with others inside."""
    # Where ``npk`` is summed over ``p``, a matrix [n k, p] takes a copy of it. A batch over ``n`` of matrices [k, p]
    # takes none, but repeats the smaller factor along ``n``; that must not be more than the copy would have been.
    sizes = larger.sizes
    order = [letter for letter in larger.by_stride() if sizes[letter] > 1]  # the others may lie anywhere
    first = next((place for place, letter in enumerate(order) if letter in summed), len(order))
    if all(letter in smaller.letters for letter in order[first:]):
        return []
    outer = [letter for letter in order[:first] if letter not in smaller.letters]
    repeated = smaller.tensor.numel() * prod(sizes[letter] for letter in outer)
    return outer if repeated <= larger.tensor.numel() else []


def multiply(product: Matrices, memo: Memo, out: Tensor | None = None) -> Tensor:
    """Multiply two operands: entry by entry where no letter is summed, else as matrices."""
    # -> [*batch, *rows, *columns], each with its letters
    if out is not None and not out.is_contiguous():
        return out.copy_(multiply(product, memo))
    first, second, letters = product.first, product.second, product.letters
    if not product.summed:
        return torch.mul(first.aligned(letters), second.aligned(letters), out=out)
    larger, smaller = (first, second) if first.tensor.numel() >= second.tensor.numel() else (second, first)
    order = larger.by_stride()
    # Where the innermost axis belongs to the batch, matrices would be strided views, which bmm copies. If there are no
    # columns either, products entry by entry are added up as they lie.
    if order[-1] in product.batch and set(smaller.letters) <= set(larger.letters):
        terms = torch.mul(larger.aligned("".join(order)), smaller.aligned("".join(order)))
        kept = "".join(letter for letter in order if letter not in product.summed)
        total = Operand(kept, terms.sum([order.index(letter) for letter in product.summed]), key=None)
        return total.aligned(letters) if out is None else out.copy_(total.aligned(letters))
    sizes = first.sizes | second.sizes
    left = _matrices(first, (product.batch, product.rows, product.summed), sizes, memo)
    right = _matrices(second, (product.batch, product.summed, product.columns), sizes, memo)
    if left.shape[2] >= 2 * _LONG:
        found = _long_products(left, right)
        return found.reshape([sizes[letter] for letter in letters]) if out is None else out.copy_(found.view_as(out))
    found = torch.bmm(left, right, out=None if out is None else out.view(*left.shape[:2], right.shape[2]))
    return found.reshape([sizes[letter] for letter in letters])


def _long_products(left: Tensor, right: Tensor) -> Tensor:
    """Multiply a batch of matrices, adding up few terms at a time, and these sums in pairs."""
    # left [B, R, S], right [B, S, C] -> [B, R, C]
    (batch, rows, summed), columns = left.shape, right.shape[2]
    length = max(_LONG, ceil(summed * batch * rows * columns / _PARTIAL))
    count, whole = summed // length, summed - summed % length
    parts = torch.matmul(  # [B, count, R, C]
        left[:, :, :whole].reshape(batch, rows, count, length).transpose(1, 2),  # [B, count, R, length]
        right[:, :whole].reshape(batch, count, length, columns),  # [B, count, length, C]
    )
    found = parts.sum(1)
    return found if whole == summed else found.baddbmm_(left[:, :, whole:], right[:, whole:])


def _matrices(operand: Operand, groups: tuple[list[str], ...], sizes: Mapping[str, int], memo: Memo) -> Tensor:
    """Merge groups of letters to one axis each, without a copy where the operand's memory allows."""
    # -> [batch, rows, columns]
    if not memo.keep_copies:
        return _merged(operand, groups, sizes)
    # An operand of x2 that meets block after block of x1 is copied once: its copy is known by the order of its axes.
    names = {letter: operand.letters.find(letter) for group in groups for letter in group}
    key = (operand.key, tuple(tuple((names[letter], sizes[letter]) for letter in group) for group in groups))
    return memo.get(key, operand.letters, lambda: _merged(operand, groups, sizes))


def _merged(operand: Operand, groups: tuple[list[str], ...], sizes: Mapping[str, int]) -> Tensor:
    """Merge groups of letters; see :func:`_matrices`."""
    # -> [batch, rows, columns]
    # Where rows lie innermost, the transposed matrices are merged and transposed back: bmm takes either as it is.
    batch, rows, columns = groups
    transposed = operand.by_stride()[-1] in rows
    order = (batch, columns, rows) if transposed else groups
    letters = [letter for group in order for letter in group]
    tensor = operand.aligned("".join(letters)).expand([sizes[letter] for letter in letters])
    merged = tensor.reshape([prod(sizes[letter] for letter in group) for group in order])
    if merged.stride(2) != 1 and merged.stride(1) != 1:  # bmm would copy one matrix after the other
        merged = merged.contiguous()
    return merged.transpose(1, 2) if transposed else merged
