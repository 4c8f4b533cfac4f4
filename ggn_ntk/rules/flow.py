"""Jacobians on their way from an operation's output to a parameter, through one linear map after the other."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import Operand
from ggn_ntk.problem.errors import NotCapturedError
from ggn_ntk.rules.linear_map import LinearMap, Operation

_LETTERS = [letter for letter in string.ascii_letters if letter not in "cn"]


class SampleAxis(NamedTuple):
    """Where the samples are in a tensor: an axis of ``outer * N * inner`` entries."""

    axis: int | None = 0  # ``None`` for a tensor that is all about a single sample
    outer: int = 1
    inner: int = 1

    def sizes(self, total: int) -> tuple[int, int, int]:
        """Split the entries of the axis."""
        return self.outer, total // (self.outer * self.inner), self.inner


@dataclass(frozen=True, eq=False)
class Flow:
    """The Jacobian with respect to a tensor on the way, as an einsum."""

    operands: tuple[Operand, ...]
    axes: tuple[str, ...]  # the letters of each axis of the tensor; none for axes of length one
    factor: float | Tensor = 1

    @classmethod
    def start(cls, s: Tensor, samples: SampleAxis, *, apart: bool = False) -> "Flow":
        """Start at the output of an operation that the samples enter."""
        # s [C, *output], or with the axis of the samples split to [outer, N, inner] where it is taken apart
        axis = samples.axis
        if axis is None:
            flow = cls.start(s.unsqueeze(1), SampleAxis())
            return replace(flow, axes=flow.axes[1:])
        if not apart:
            s = s.unflatten(1 + axis, samples.sizes(s.shape[1 + axis]))
        letters = list(_LETTERS[: s.ndim - 1])
        letters[axis + 1] = "n"
        kept = [place for place, size in enumerate(s.shape[1:]) if size > 1 or place == axis + 1]
        tensor = s.reshape([s.shape[0], *(s.shape[1 + place] for place in kept)])
        named = [letter if place in kept else "" for place, letter in enumerate(letters)]
        axes = (*named[:axis], "".join(named[axis : axis + 3]), *named[axis + 3 :])
        return cls((Operand("c" + "".join(letters[place] for place in kept), tensor),), axes)

    @classmethod
    def along(cls, path: Sequence[Operation], s: Tensor, samples: SampleAxis) -> "list[Flow]":
        """Pass ``s`` from the output of an operation that the samples enter along a path, to the last argument."""
        # s [C, *output], or with the axis of the samples apart -> Jacobians that are to be added up
        flows = cls.entering(path[0], s, samples)
        for operation in path[1:]:
            flows = cls.passed(flows, operation)
        return flows

    @classmethod
    def entering(cls, operation: Operation, s: Tensor, samples: SampleAxis) -> "list[Flow]":
        """Pass ``s`` from the output of an operation that the samples enter to its argument."""
        # s [C, *output], or with the axis of the samples apart
        apart = s.ndim > 1 + len(operation.output)

        def start(linear: LinearMap) -> Flow:
            if linear.spread is None:
                return cls.start(s, samples, apart=apart)
            whole = s.flatten(1 + samples.axis, 3 + samples.axis) if apart and samples.axis is not None else s
            return cls.start(linear.spread(whole), samples)

        return [start(linear).through(linear) for linear in operation.maps()]

    @staticmethod
    def passed(flows: "Sequence[Flow]", operation: Operation) -> "list[Flow]":
        """Pass further back, through an operation on parameters alone."""
        maps = operation.maps()
        if any(linear.spread is not None for linear in maps):
            raise NotCapturedError(f"{operation.kind} of parameters alone has no rule")
        return [
            flow.reshaped(operation.shape) if linear.keeps_order else flow.through(linear)
            for flow in flows
            for linear in maps
        ]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        return {letter: size for o in self.operands for letter, size in o.sizes.items()}

    def reshaped(self, shape: Size) -> "Flow":
        """Pass to a tensor with the same entries in the same order, in another shape."""
        flow, groups = self._grouped("".join(self.axes), shape)
        return replace(flow, axes=tuple(groups))

    def through(self, linear: LinearMap) -> "Flow":
        """Pass from the output of a linear map to its argument."""
        known = dict(linear.sizes) | {
            letter: size for term, operand in linear.operands for letter, size in zip(term, operand.shape, strict=True)
        }
        flow, names = self, dict[str, str]()  # the letters here that stand for each of the map's
        for place, own in enumerate(linear.output):
            here = flow.axes[place]
            if len(own) > 1:
                flow, groups = flow._grouped(here, _filled([known.get(letter, 0) for letter in own], flow._size(here)))
                names |= dict(zip(own, groups, strict=True))
            elif own:
                names[own] = here
        used = {letter for o in flow.operands for letter in o.term} | set("".join(flow.axes))
        fresh = (letter for letter in _LETTERS if letter not in used)
        operands = list(flow.operands)
        sizes = flow.sizes
        for term, given in linear.operands:
            operand = Operand.of(term, given)
            for letter in term:
                if letter not in names:
                    names[letter] = next(fresh) if known[letter] > 1 or letter == operand.hot else ""
            operands.append(_renamed(operand, names, sizes))
        axes = tuple("".join(names[letter] for letter in letters) for letters in linear.argument)
        return Flow(tuple(operands), axes, self.factor * linear.factor)

    def samples_first(self) -> "Flow":
        """Copy what samples take turns in, so that each has memory of its own; not ``s``, which is large."""
        return replace(self, operands=tuple(_samples_first(o) if "c" not in o.letters else o for o in self.operands))

    def jacobian(self, dtype: torch.dtype) -> Factored:
        """Write the Jacobian with respect to the tensor that was reached, in a parameter's dtype."""
        operands = [
            o if o.hot or o.tensor.dtype == dtype else o._replace(tensor=o.tensor.to(dtype)) for o in self.operands
        ]
        if isinstance(self.factor, Tensor) or self.factor != 1:
            given = [i for i, o in enumerate(operands) if not o.hot and "c" not in o.letters]
            if given:
                place = min(given, key=lambda i: operands[i].tensor.numel())
                operands[place] = operands[place]._replace(tensor=operands[place].tensor * self.factor)
            else:  # a copy of ``s`` would share no products with other uses of ``s``, say by the weight of this bias
                one = operands[0].tensor.new_ones((), dtype=dtype)
                operands.append(Operand("", one * self.factor))
        return Factored.of(operands, "cn" + "".join(self.axes))

    def _split(self, letter: str, sizes: Sequence[int]) -> tuple["Flow", list[str]]:
        """Split a letter in several, of given sizes."""
        if letter == "n" or any(o.hot == letter for o in self.operands):
            raise _unsplit()
        used = {own for o in self.operands for own in o.term}
        new = [letter, *(other for other in _LETTERS if other not in used)][: len(sizes)]
        operands = tuple(_unflattened(o, letter, "".join(new), sizes) for o in self.operands)
        axes = tuple(axis.replace(letter, "".join(new)) for axis in self.axes)
        return replace(self, operands=operands, axes=axes), new

    def _size(self, letters: str) -> int:
        """Count the entries along an axis."""
        sizes = self.sizes
        return prod(sizes[letter] for letter in letters)

    def _grouped(self, letters: str, sizes: Sequence[int]) -> tuple["Flow", list[str]]:
        """Group letters, one behind the other, to axes of given sizes, and split them where they are longer."""
        flow, remaining, groups = self, list(letters), list[str]()
        for size in sizes:
            group = ""
            while size > 1 or (not group and remaining[:1] == ["n"] and flow.sizes["n"] == size):
                if not remaining:
                    raise _unsplit()
                letter = remaining.pop(0)
                length = flow.sizes[letter]
                if length > size and length % size == 0:
                    flow, (letter, rest) = flow._split(letter, (size, length // size))
                    remaining.insert(0, rest)
                    length = size
                if size % length:
                    raise _unsplit()
                group, size = group + letter, size // length
            groups.append(group)
        return flow, groups


def jacobian(linear: LinearMap, s: Tensor) -> Factored:
    """Write the Jacobian with respect to the argument of a linear map, of samples that are in front."""
    # s [C, N, *output]
    return Flow.start(s if linear.spread is None else linear.spread(s), SampleAxis()).through(linear).jacobian(s.dtype)


def _filled(sizes: Sequence[int], total: int) -> list[int]:
    """Fill in the one size that is not known (0)."""
    known = prod(size for size in sizes if size)
    return [size or total // known for size in sizes]


def _renamed(operand: Operand, names: dict[str, str], sizes: dict[str, int]) -> Operand:
    """Give the axes of a map's operand the letters that stand for them here."""
    letters, tensor = "", operand.tensor
    for letter in operand.letters:
        axis, here = len(letters), names[letter]
        if len(here) == 1:
            letters += here
        elif here:
            tensor = tensor.unflatten(axis, [sizes[own] for own in here])
            letters += here
        else:
            tensor = tensor.squeeze(axis)
    return operand._replace(letters=letters, tensor=tensor, hot=operand.hot and names[operand.hot])


def _samples_first(operand: Operand) -> Operand:
    """Put samples outermost in memory."""
    n = operand.letters.find("n")
    if n < 0:
        return operand
    letters = "n" + operand.letters.replace("n", "")
    return operand._replace(letters=letters, tensor=operand.tensor.movedim(n, 0).contiguous())


def _unflattened(operand: Operand, letter: str, new: str, sizes: Sequence[int]) -> Operand:
    """Split an axis of an operand, if it has it."""
    if letter not in operand.letters:
        return operand
    axis = operand.letters.index(letter)
    letters = operand.letters[:axis] + new + operand.letters[axis + 1 :]
    return operand._replace(letters=letters, tensor=operand.tensor.unflatten(axis, tuple(sizes)))


def _unsplit() -> NotCapturedError:
    """Say that axes of one shape are not parts of those of another."""
    return NotCapturedError("the axes of an operation are not split as those of the next")
