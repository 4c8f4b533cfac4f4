"""Jacobians as einsums that are not evaluated, and what can be computed from them as they are."""

import string
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from ggn_ntk.contraction.einsum import Memo, contract, sum_private
from ggn_ntk.contraction.one_hot import dense, dtype_of, looked_up, scattered
from ggn_ntk.contraction.operand import OneHot, Operand, memory_of
from ggn_ntk.memory.budget import MemoryBudget


@lru_cache(maxsize=4096)
def _parsed(equation: str) -> tuple[tuple[str, ...], str]:
    """Split an equation into the letters of its operands and of its result."""
    return tuple(equation.split("->")[0].split(",")), equation.split("->")[1]


@lru_cache(maxsize=4096)
def _fits(equation: str, axes: tuple[int, ...]) -> bool:
    """Tell whether an equation is one of a Jacobian, of operands with so many axes."""
    terms, result = _parsed(equation)
    return tuple(map(len, terms)) == axes and result.startswith("cn") and set(result) <= {"n", *"".join(terms)}


@dataclass(frozen=True, eq=False)
class Factored:
    """A parameter Jacobian as an unevaluated einsum.

    Attributes:
        equation: Say ``"cno,ni->cnoi"``. The result starts with ``cn`` (output, sample), in this order; its
            other letters stand, in order, for the parameter's axes, of which adjacent ones may be merged or
            split.
        operands: One tensor (or :class:`ggn_ntk.rules.OneHot`) for each term on the left. Each letter has one size
            everywhere.
    """

    equation: str
    operands: tuple[Tensor | OneHot, ...]

    def __post_init__(self) -> None:
        """Check that the equation fits the operands."""
        if not _fits(self.equation, tuple(o.ndim for o in self.operands)):
            shapes = [list(o.shape) for o in self.operands]
            raise ValueError(
                f"Factored('{self.equation}') with operands of shapes {shapes}: the equation needs one letter for each "
                "axis of each operand, and a result that starts with 'cn' and has no letters of its own."
            )
        if not any(isinstance(o, Tensor) for o in self.operands):
            raise ValueError(f"Factored('{self.equation}') has no tensor among its operands: where does s enter?")

    @classmethod
    def of(cls, operands: Iterable[Operand], result: str) -> "Factored":
        """Write labelled operands as a Jacobian with the letters ``result``."""
        operands = tuple(operands)
        return cls(f"{','.join(o.term for o in operands)}->{result}", tuple(o.unlabelled for o in operands))

    @property
    def terms(self) -> list[str]:
        """The letters of each operand."""
        return list(_parsed(self.equation)[0])

    @property
    def result(self) -> str:
        """The letters of the Jacobian."""
        return _parsed(self.equation)[1]

    @property
    def adds_up(self) -> bool:
        """Whether an entry is a sum, say over positions."""
        return not set("".join(self.terms)) <= set(self.result)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        return {letter: size for o in self.labelled for letter, size in o.sizes.items()}

    @cached_property
    def labelled(self) -> tuple[Operand, ...]:
        """The operands with their letters; one-hot vectors by their places."""
        return tuple(map(Operand.of, _parsed(self.equation)[0], self.operands))

    @property
    def parameter_sizes(self) -> list[int]:
        """The sizes of the parameter's axes, as the equation splits them."""
        return [self.sizes[letter] for letter in self.result[2:]]

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "Factored":
        """Apply a function of letters and tensor to each operand; of one-hot vectors, to their places."""
        mapped = (o._replace(tensor=function(o.letters, o.tensor)) for o in self.labelled)
        return Factored(self.equation, tuple(o.unlabelled for o in mapped))

    def select_samples(self, samples: Sequence[int]) -> "Factored":
        """Restrict to some samples."""

        # To views, or to copies of these samples alone: index_select copies some layouts, such as windows, as a whole.
        def selected(letters: str, tensor: Tensor) -> Tensor:
            if "n" not in letters:
                return tensor
            n = letters.index("n")
            if isinstance(samples, range) and samples.step == 1:
                return tensor.narrow(n, samples.start, len(samples))
            views = [tensor.narrow(n, sample, 1) for sample in samples]
            return torch.cat(views, n) if len(views) > 1 else views[0]

        return self.map(selected)

    def of_size(self, n: int, made: dict[Hashable, Tensor]) -> "Factored":
        """Keep the shapes alone, of as many samples; what shares memory does so among all that are ``made``."""

        def sized(letters: str, tensor: Tensor) -> Tensor:
            key = memory_of(tensor), letters.find("n"), n
            if key not in made:
                shape = [n if letter == "n" else size for letter, size in zip(letters, tensor.shape, strict=True)]
                made[key] = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            return made[key]

        return self.map(sized)

    def pick(self, outputs: Tensor, samples: Tensor) -> "Factored":
        """Take one output of each of some samples: a Jacobian of a single output."""

        # outputs [M], samples [M] -> [1, M, ...]
        def picked(o: Operand) -> Operand:
            rest = "".join(letter for letter in o.letters if letter not in "cn")
            if "c" in o.letters:
                leading = [letter for letter in "cn" if letter in o.letters]
                tensor = o.tensor.permute([o.letters.index(letter) for letter in (*leading, *rest)])
                tensor = tensor[outputs, samples] if "n" in leading else tensor[outputs]  # [M, *rest]
                return o._replace(letters=f"cn{rest}", tensor=tensor.unsqueeze(0))
            if "n" in o.letters:
                return o._replace(tensor=o.tensor.index_select(o.letters.index("n"), samples))
            return o

        return Factored.of(map(picked, self.labelled), self.result)

    def split_samples(self, rows: int) -> "Factored":
        """Sum over rows, one behind the other, that belong to a sample."""
        # [C, N * rows, ...] -> [C, N, ...]
        if rows == 1:
            return self
        row = next(letter for letter in string.ascii_uppercase if letter not in self.equation)

        def split(o: Operand) -> Operand:
            if "n" not in o.letters:
                return o
            tensor = o.tensor.unflatten(o.letters.index("n"), (-1, rows))
            return o._replace(letters=o.letters.replace("n", f"n{row}"), tensor=tensor)

        return Factored.of(map(split, self.labelled), self.result)

    def sum_private_letters(self) -> "Factored":
        """Sum over the letters that only one operand has, say over positions for a bias."""
        summed = sum_private(self.labelled, self.result)
        changed = any(new is not old for new, old in zip(summed, self.labelled, strict=True))
        return Factored.of(summed, self.result) if changed else self

    def formed(self) -> Tensor:
        """Evaluate the einsum."""
        # -> [C, N, P], the parameter's axes merged
        c, n, *sizes = (self.sizes[letter] for letter in self.result)
        blocks = self._blocks(n)
        if len(blocks) > 1:  # windows are copied for a product
            whole = self._some.new_empty(c, n, prod(sizes))
            for block in blocks:
                whole[:, block.start : block.stop] = self.select_samples(block).formed()
            return whole
        operands = [o.ready() for o in self.sum_private_letters().labelled]
        jacobian = contract(dense(operands, self.result), self.result, Memo())
        return jacobian.aligned(self.result).expand(c, n, *sizes).reshape(c, n, prod(sizes))

    def weighted_sum(self, weights: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Compute ``sum_cn v[c, n] J[c, n]``; with vectors, their products with its rows of R entries."""
        # weights [C, N], vectors [V, R] -> [P], or [V * P / R]
        blocks = self._blocks(weights.shape[1])
        if len(blocks) > 1:
            parts = (self.select_samples(b).weighted_sum(weights[:, b.start : b.stop], vectors) for b in blocks)
            return torch.stack(list(parts)).sum(0)
        shorter = None if vectors is None else self._with_rows_multiplied(vectors)
        if shorter is not None:
            return shorter.weighted_sum(weights)
        total = self._weighted_sum(weights)
        return total if vectors is None else multiply_rows(total, vectors)

    def times(self, u: Tensor) -> Tensor:
        """Multiply with a vector of the parameter's shape: ``sum_p J[c, n, p] u[p]``."""
        # u [*parameter] -> [C, N]
        c, n = self.sizes["c"], self.sizes["n"]
        blocks = self._blocks(n)
        if len(blocks) > 1:
            return torch.cat([self.select_samples(b).times(u) for b in blocks], 1)
        operands = self.sum_private_letters().labelled
        vector = Operand(self.result[2:], u.reshape(self.parameter_sizes).to(dtype_of(operands)))
        factors = looked_up([o.ready() for o in (*operands, vector)], "cn")
        return contract(factors, "cn", Memo()).aligned("cn").expand(c, n)

    def squared_terms(self) -> Tensor:
        """Sum the squared norms of the terms that a Jacobian adds up, one for each position."""
        # A one-hot vector is its own square.
        squares = [o if o.hot else o._replace(tensor=o.tensor.square()) for o in self.labelled]
        factors = looked_up(squares, "")
        dtype = min((o.tensor.dtype for o in factors), key=lambda dtype: torch.finfo(dtype).bits)
        return torch.einsum(f"{','.join(o.letters for o in factors)}->", *(o.tensor.to(dtype) for o in factors))

    @property
    def _some(self) -> Tensor:
        """An operand that is a tensor."""
        return next(o.tensor for o in self.labelled if not o.hot)

    def _blocks(self, n: int) -> list[range]:
        """Split N samples so that no operand of a block holds many numbers."""
        largest = max(prod(operand.shape) for operand in self.operands) * self._some.element_size()
        count = max(1, min(n, -(-largest // MemoryBudget.of(self._some.device).rows)))
        return [range(n * i // count, n * (i + 1) // count) for i in range(count)]

    def _with_rows_multiplied(self, vectors: Tensor) -> "Factored | None":
        """Multiply the rows of the parameter's Jacobian with vectors, if a single operand has them and no outputs."""
        # vectors [V, R] -> a Jacobian with an axis of V in place of the letters of a row, the last ones of the result.
        # It is much cheaper than to form a gradient first: ``x @ vectors.T`` for a Linear layer.
        row, sizes = self.result, self.sizes
        while row and prod(sizes[letter] for letter in row[1:]) >= vectors.shape[1]:
            row = row[1:]
        places = [i for i, o in enumerate(self.labelled) if set(o.term) & set(row)]
        if len(places) != 1 or prod(sizes[letter] for letter in row) != vectors.shape[1]:
            return None
        (place,), operands = places, list(self.labelled)
        owner = operands[place]
        if "c" in owner.letters or owner.hot or not set(row) <= set(owner.letters):
            return None
        new = next(letter for letter in string.ascii_letters if letter not in self.equation)
        kept = new + "".join(letter for letter in owner.letters if letter not in row)
        shaped = vectors.to(owner.tensor.dtype).reshape(-1, *(sizes[letter] for letter in row))
        product = torch.einsum(f"{owner.letters},{new}{row}->{kept}", owner.tensor, shaped)
        operands[place] = Operand(kept, product)
        return Factored.of(operands, f"cn{new}{self.result[2 : -len(row)]}")

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        """Compute ``sum_cn v[c, n] J[c, n]`` of all samples at once."""
        # weights [C, N] -> [P]
        operands, result = looked_up(self.labelled, self.result), self.result[2:]
        factors, hot = [o for o in operands if not o.hot], [o for o in operands if o.hot]
        v = Operand("cn", weights.to(dtype_of(factors)))
        with_outputs = [o for o in operands if "c" in o.letters]
        if len(with_outputs) == 1 and not with_outputs[0].hot:
            # The weights meet ``s`` first: what is left has no outputs.
            (s,) = with_outputs
            others = [o for o in operands if o is not s]
            n = "n" if any("n" in o.letters for o in others) else ""
            kept = "".join(letter for letter in s.letters if letter not in "cn") + n
            weighted = torch.einsum(f"{s.letters},cn->{kept}", s.tensor, v.tensor)
            factors = [Operand(kept, weighted), *(o for o in factors if o is not s)]
        else:
            factors.append(v)
        if not hot:
            return _einsum(factors, result).flatten()
        # One-hot vectors whose axis is the parameter's: what stands at their places is added up there.
        given = dict.fromkeys("".join(o.letters for o in hot) + result)
        letters = "".join(letter for letter in given if any(letter in o.letters for o in factors))
        return scattered(Operand(letters, _einsum(factors, letters)), hot, result)


#: Jacobians by the names of parameters: each is the sum of several.
Jacobians = dict[str, list[Factored]]


def _einsum(operands: Sequence[Operand], result: str) -> Tensor:
    """Contract tensors, in their order."""
    if len(operands) == 1 and operands[0].letters == result:
        return operands[0].tensor
    return torch.einsum(f"{','.join(o.letters for o in operands)}->{result}", *(o.tensor for o in operands))


def multiply_rows(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Multiply the rows of a gradient, of R entries each, with vectors."""
    # gradient [P], vectors [V, R] -> [V * P / R]; faster than its transpose
    return (vectors.to(gradient) @ gradient.reshape(-1, vectors.shape[1]).T).flatten()
