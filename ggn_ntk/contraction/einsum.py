"""Einsums of two or more operands, contracted in the cheapest order as they lie in memory.

``opt_einsum`` finds the order from the shapes alone. Each step is a matrix product, or a product entry by entry, of
views: letters are merged and ordered so that nothing is copied that does not have to be.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from math import ceil, inf, prod
from types import MappingProxyType
from typing import NamedTuple

import opt_einsum
import torch
from opt_einsum.contract import PathInfo
from torch import Tensor

# Up to how many operands all orders are compared; the search among more takes seconds.
_EXHAUSTIVE = 6

# How many terms of a sum are added up in one go. Beyond it, partial sums are added in pairs, so that rounding does not
# grow with their number; as long as these hold no more than so many numbers.
_LONG, _PARTIAL = 2**14, 2**22


class Operand(NamedTuple):
    """A tensor with a letter for each axis."""

    letters: str  # the letters
    tensor: Tensor  # the tensor
    key: Hashable  # what it was computed from: operands of equal keys hold equal numbers
    hot: str = ""  # where the tensor holds the places of ones in one-hot vectors: the letter of the vectors' own axis
    size: int = 0  # the length of these vectors


def memory_of(tensor: Tensor) -> Hashable:
    """Tell which entries of which memory a tensor holds."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def as_operand(letters: str, tensor: Tensor) -> Operand:
    """Give a tensor letters, without the axes along which it has one value."""
    key = memory_of(tensor)
    for axis in reversed(range(tensor.ndim)):
        same_for_samples = letters[axis] in "nm" and tensor.stride(axis) == 0 and tensor.shape[axis] > 1
        if same_for_samples:
            tensor, letters = tensor.select(axis, 0), letters[:axis] + letters[axis + 1 :]
    return Operand(letters, tensor, key)


class Memo:
    """Intermediate results, kept for as long as something may use them again.

    Results are known by the addresses of the tensors they were computed from, so a memo must not outlive these.

    Attributes:
        symmetric: Whether x1 and x2 are the same samples, so that what depends on one serves for the other.
        keep_copies: Whether to keep operands that were copied to put letters together.
    """

    def __init__(self, symmetric: bool = False, keep_copies: bool = False, most: float = inf) -> None:
        """Keep at most so many bytes from one block of x1 to the next."""
        self.symmetric, self.keep_copies, self._most = symmetric, keep_copies, most
        self._of_pair: dict[Hashable, Tensor] = {}
        self._of_rows: dict[Hashable, Tensor] = {}
        self._of_samples: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, letters: str, compute: Callable[[], Tensor]) -> Tensor:
        """Look a result up, or compute it."""
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
    path = _path_apart(equation, shapes, apart) if apart else _search(equation, shapes)
    return opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=path)[1]


def _search(equation: str, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Find the cheapest order: among all of them, or of many operands among those without outer products."""
    optimize = "optimal" if len(shapes) <= _EXHAUSTIVE else "dp"
    path: list[tuple[int, ...]] = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)[0]
    return path


def _path_apart(equation: str, shapes: Sequence[tuple[int, ...]], first: int) -> list[tuple[int, ...]]:
    """Contract the first operands, and the others, each in the cheapest order, and then the two results."""
    inputs, result = equation.split("->")
    terms = inputs.split(",")
    remaining, path = list(range(len(terms))), list[tuple[int, ...]]()
    for places in (range(first), range(first, len(terms))):
        needed = {*result, *"".join(term for i, term in enumerate(terms) if i not in places)}
        own = [terms[i] for i in places]
        kept = "".join(letter for letter in dict.fromkeys("".join(own)) if letter in needed)
        names = list(places)  # of what is still to be contracted, new ones behind those given
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
    """Find the order in which to contract operands."""
    present = set().union(*(o.letters for o in operands))
    kept = "".join(letter for letter in result if letter in present)
    equation = ",".join(o.letters for o in operands) + "->" + kept
    shapes = (zip(o.letters, o.tensor.shape, strict=True) for o in operands)
    known = tuple(tuple(sizes.get(letter, size) for letter, size in shape) for shape in shapes)
    return path_info(equation, known, apart)


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
    """Contract operands in the cheapest order, up to the last product."""
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
    names: dict[str, int] = {}
    pattern = tuple(
        tuple(names.setdefault(letter, len(names)) for letter in t) for t in (a.letters, b.letters, letters)
    )
    key = (a.key, b.key, pattern)
    return Operand(letters, memo.get(key, letters, lambda: multiply(product, memo)), key)


class Matrices(NamedTuple):
    """How two operands are multiplied as matrices."""

    first: Operand  # the factor that gives the rows
    second: Operand  # the factor that gives the columns
    # Letters of the batch of matrices, of which the first factor may lack some: it is repeated along these
    batch: list[str]
    rows: list[str]  # letters of the first factor alone
    summed: list[str]  # letters that are summed
    columns: list[str]  # letters of the second factor alone

    @property
    def letters(self) -> str:
        """The letters of the product, as it lies in memory."""
        return "".join(self.batch + self.rows + self.columns)


def as_matrices(a: Operand, b: Operand, needed: set[str]) -> Matrices:
    """Order the letters of a product of two operands."""
    larger, smaller = (a, b) if a.tensor.numel() >= b.tensor.numel() else (b, a)
    summed = [letter for letter in _by_stride(larger) if letter in smaller.letters and letter not in needed]
    outer = _outer_rows(larger, smaller, summed)
    first, second = (smaller, larger) if outer else (a, b)
    shared = needed.intersection(a.letters, b.letters).union(outer)
    batch = [letter for letter in _by_stride(larger if outer else a) if letter in shared]
    rows = [letter for letter in _by_stride(first) if letter not in second.letters]
    columns = [letter for letter in _by_stride(second) if letter not in (*first.letters, *outer)]
    return Matrices(first, second, batch, rows, summed, columns)


def _outer_rows(larger: Operand, smaller: Operand, summed: list[str]) -> list[str]:
    """Find rows of the larger factor that lie outside of what is summed, others lying inside."""
    sizes = dict(zip(larger.letters, larger.tensor.shape, strict=True))
    order = [letter for letter in _by_stride(larger) if sizes[letter] > 1]  # the others may lie anywhere
    first = next((place for place, letter in enumerate(order) if letter in summed), len(order))
    if all(letter in smaller.letters for letter in order[first:]):
        return []
    outer = [letter for letter in order[:first] if letter not in smaller.letters]
    repeated = smaller.tensor.numel() * prod(sizes[letter] for letter in outer)
    return outer if repeated <= larger.tensor.numel() else []


def _by_stride(operand: Operand) -> list[str]:
    """List an operand's letters as they lie in memory."""
    strides = dict(zip(operand.letters, operand.tensor.stride(), strict=True))
    return sorted(operand.letters, key=lambda letter: -strides[letter])


def multiply(product: Matrices, memo: Memo, out: Tensor | None = None) -> Tensor:
    """Multiply two operands: entry by entry where no letter is summed, else as matrices."""
    if out is not None and not out.is_contiguous():
        return out.copy_(multiply(product, memo))
    first, second, letters = product.first, product.second, product.letters
    if not product.summed:
        return torch.mul(aligned(first, letters), aligned(second, letters), out=out)
    larger, smaller = (first, second) if first.tensor.numel() >= second.tensor.numel() else (second, first)
    order = _by_stride(larger)
    if order[-1] in product.batch and set(smaller.letters) <= set(
        larger.letters
    ):  # vectors, along which no matrix lies
        terms = torch.mul(aligned(larger, "".join(order)), aligned(smaller, "".join(order)))
        kept = "".join(letter for letter in order if letter not in product.summed)
        total = Operand(kept, terms.sum([order.index(letter) for letter in product.summed]), key=None)
        return aligned(total, letters) if out is None else out.copy_(aligned(total, letters))
    sizes = dict(zip(first.letters + second.letters, first.tensor.shape + second.tensor.shape, strict=True))
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
    parts = torch.matmul(
        left[:, :, :whole].reshape(batch, rows, count, length).transpose(1, 2),
        right[:, :whole].reshape(batch, count, length, columns),
    )
    found = parts.sum(1)
    return found if whole == summed else found.baddbmm_(left[:, :, whole:], right[:, whole:])


def _matrices(operand: Operand, groups: tuple[list[str], ...], sizes: Mapping[str, int], memo: Memo) -> Tensor:
    """Merge groups of letters to one axis each, without a copy where the operand's memory allows."""
    # -> [batch, rows, columns]
    if not memo.keep_copies:
        return _merged(operand, groups, sizes)
    names = {letter: operand.letters.find(letter) for group in groups for letter in group}
    key = (operand.key, tuple(tuple((names[letter], sizes[letter]) for letter in group) for group in groups))
    return memo.get(key, operand.letters, lambda: _merged(operand, groups, sizes))


def _merged(operand: Operand, groups: tuple[list[str], ...], sizes: Mapping[str, int]) -> Tensor:
    """Merge groups of letters; see :func:`_matrices`."""
    # -> [batch, rows, columns]
    batch, rows, columns = groups
    transposed = _by_stride(operand)[-1] in rows
    order = (batch, columns, rows) if transposed else groups
    letters = [letter for group in order for letter in group]
    tensor = aligned(operand, "".join(letters)).expand([sizes[letter] for letter in letters])
    merged = tensor.reshape([prod(sizes[letter] for letter in group) for group in order])
    if merged.stride(2) != 1 and merged.stride(1) != 1:  # bmm would copy one matrix after the other
        merged = merged.contiguous()
    return merged.transpose(1, 2) if transposed else merged


def aligned(operand: Operand, letters: str) -> Tensor:
    """Order an operand's axes, with an axis of length one for each letter it lacks."""
    tensor = operand.tensor.permute([operand.letters.index(letter) for letter in letters if letter in operand.letters])
    for axis, letter in enumerate(letters):
        if letter not in operand.letters:
            tensor = tensor.unsqueeze(axis)
    return tensor
