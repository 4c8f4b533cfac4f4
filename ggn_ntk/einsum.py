"""Einsums of two or more operands, contracted in the cheapest order as they lie in memory.

``opt_einsum`` finds the order from the shapes alone. Each step is a matrix product, or a product entry by entry, of
views: letters are merged and ordered so that nothing is copied that does not have to be.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import opt_einsum
import torch
from opt_einsum.contract import PathInfo
from torch import Tensor

#: Numbers that the intermediate results of x2 may hold, which are kept while blocks of x1 pass.
KEPT = 2**26


class Operand(NamedTuple):
    """A tensor with a letter for each axis.

    Attributes:
        letters: The letters.
        tensor: The tensor.
        key: What it was computed from: operands of equal keys hold equal numbers.
        hot: Where the tensor holds the places of ones in one-hot vectors: the letter of the vectors' own axis.
        size: The length of these vectors.
    """

    letters: str
    tensor: Tensor
    key: Hashable
    hot: str = ""
    size: int = 0


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


class Memo:
    """Intermediate results, kept for as long as something may use them again.

    Results are known by the addresses of the tensors they were computed from, so a memo must not outlive these.

    Attributes:
        symmetric: Whether x1 and x2 are the same samples, so that what depends on one serves for the other.
        keep_copies: Whether to keep operands that were copied to put letters together.
    """

    def __init__(self, symmetric: bool = False, keep_copies: bool = False) -> None:
        """Set up.

        Args:
            symmetric: Whether x1 and x2 are the same samples.
            keep_copies: Whether to keep operands that were copied to put letters together: where several blocks of x2
                meet the same of x1.
        """
        self.symmetric, self.keep_copies = symmetric, keep_copies
        self._of_pair: dict[Hashable, Tensor] = {}
        self._of_rows: dict[Hashable, Tensor] = {}
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
        if sum(tensor.numel() for tensor in self._of_samples.values()) > KEPT:
            self._of_samples.clear()


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


def contract(operands: Sequence[Operand], result: str, memo: Memo) -> Operand:
    """Contract operands in the cheapest order.

    Args:
        operands: The operands.
        result: The letters to keep.
        memo: Keeps intermediate results.

    Returns:
        The result, its letters in any order; those that no operand has are left out.
    """
    return step(contract_to_last(operands, result, memo), set(result), memo)


def contract_to_last(operands: Sequence[Operand], result: str, memo: Memo) -> list[Operand]:
    """Contract operands in the cheapest order, up to the last product.

    Args:
        operands: The operands.
        result: The letters to keep.
        memo: Keeps intermediate results.

    Returns:
        One or two operands, whose product is the result.
    """
    remaining = list(operands)
    for places in path_of(operands, result).path:
        taken = [remaining.pop(i) for i in sorted(places, reverse=True)][::-1]
        if not remaining:
            return taken
        needed = set(result).union(*(o.letters for o in remaining))
        remaining.append(step(taken, needed, memo))
    return remaining


def step(taken: list[Operand], needed: set[str], memo: Memo) -> Operand:
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
    letters = result_letters(a, b, needed)
    names: dict[str, int] = {}
    pattern = tuple(
        tuple(names.setdefault(letter, len(names)) for letter in t) for t in (a.letters, b.letters, letters)
    )
    key = (a.key, b.key, pattern)
    return Operand(letters, memo.get(key, letters, lambda: multiply(a, b, letters, needed, memo)), key)


def result_letters(a: Operand, b: Operand, needed: set[str]) -> str:
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


def multiply(a: Operand, b: Operand, letters: str, needed: set[str], memo: Memo, out: Tensor | None = None) -> Tensor:
    """Multiply two operands: entry by entry where no letter is summed, else as matrices.

    Args:
        a: The left factor.
        b: The right factor.
        letters: The letters of the result, from :func:`result_letters`.
        needed: Letters that must remain.
        memo: Keeps copies of operands.
        out: Where to put the product.

    Returns:
        The product.
    """
    if out is not None and not out.is_contiguous():
        return out.copy_(multiply(a, b, letters, needed, memo))
    larger, smaller = (a, b) if a.tensor.numel() >= b.tensor.numel() else (b, a)
    order = _by_stride(larger)
    summed = [letter for letter in order if letter in smaller.letters and letter not in needed]
    if not summed:
        return torch.mul(aligned(a, letters), aligned(b, letters), out=out)
    batch = [letter for letter in letters if letter in a.letters and letter in b.letters]
    if order[-1] in batch and set(smaller.letters) <= set(larger.letters):  # vectors, that no matrix product runs along
        terms = torch.mul(aligned(larger, "".join(order)), aligned(smaller, "".join(order)))
        kept = "".join(letter for letter in order if letter not in summed)
        total = Operand(kept, terms.sum([order.index(letter) for letter in summed]), key=None)
        return aligned(total, letters) if out is None else out.copy_(aligned(total, letters))
    sizes = dict(zip(a.letters + b.letters, a.tensor.shape + b.tensor.shape, strict=True))
    left = [letter for letter in letters if letter not in b.letters]
    right = [letter for letter in letters if letter not in a.letters]
    first, second = _matrices(a, (batch, left, summed), memo), _matrices(b, (batch, summed, right), memo)
    product = torch.bmm(first, second, out=None if out is None else out.view(*first.shape[:2], second.shape[2]))
    return product.reshape([sizes[letter] for letter in letters])


def _matrices(operand: Operand, groups: tuple[list[str], ...], memo: Memo) -> Tensor:
    """Merge groups of letters to one axis each, without a copy where the operand's memory allows.

    Args:
        operand: The operand.
        groups: Letters of the batch of matrices, of their rows, and of their columns.
        memo: Keeps copies.

    Returns:
        ``[batch, rows, columns]``. A copy keeps innermost in memory what was, to be made in long runs.
    """
    if not memo.keep_copies:
        return _merged(operand, groups)
    key = (operand.key, tuple(tuple(operand.letters.index(letter) for letter in group) for group in groups))
    return memo.get(key, operand.letters, lambda: _merged(operand, groups))


def _merged(operand: Operand, groups: tuple[list[str], ...]) -> Tensor:
    """Merge groups of letters; see :func:`_matrices`.

    Args:
        operand: The operand.
        groups: The groups.

    Returns:
        ``[batch, rows, columns]``.
    """
    batch, rows, columns = groups
    transposed = _by_stride(operand)[-1] in rows
    order = (batch, columns, rows) if transposed else groups
    tensor = operand.tensor.permute([operand.letters.index(letter) for group in order for letter in group])
    sizes = dict(zip(operand.letters, operand.tensor.shape, strict=True))
    merged = tensor.reshape([prod(sizes[letter] for letter in group) for group in order])
    if merged.stride(2) != 1 and merged.stride(1) != 1:  # bmm would copy one matrix after the other
        merged = merged.contiguous()
    return merged.transpose(1, 2) if transposed else merged


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
