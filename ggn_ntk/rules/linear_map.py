"""Operations as linear maps: how the output of one depends on one of its arguments.

Autograd's graph names each operation in which a parameter takes part, and holds what it has saved. In one argument, all
that matter are linear, or entry by entry::

    @register_operation("mm")
    def mm(op):
        return op.product(self="ak", mat2="kb", output="ab")

An operation is one function, which writes the output as an einsum of the argument and of what was saved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Size, Tensor
from torch.autograd.graph import Node

from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.problem.errors import NotCapturedError
from ggn_ntk.process.torch_internals import operation_of, output_metadata, saved

_F = TypeVar("_F", bound=Callable[..., Any])


class LinearMap(NamedTuple):
    """An einsum ``output = sum operands * argument``, with the letters of each axis.

    An axis has several letters where it is to be split, and none where it is of length one or entries are repeated
    along it.
    """

    output: tuple[str, ...]
    argument: tuple[str, ...]
    operands: tuple[tuple[str, Tensor | OneHot], ...] = ()
    factor: float | Tensor = 1
    keeps_order: bool = False  # whether it only reshapes its argument, and no letters are given
    sizes: tuple[tuple[str, int], ...] = ()  # of letters that no operand has, where an axis has several
    # What is made of ``s [C, *output]`` before: then ``output`` are the letters of its axes but the first.
    spread: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Operation:
    """A node of autograd's graph, with the argument in which it is looked at."""

    node: Node
    place: int  # of the argument among the node's edges
    number: int = 0  # of the output among several

    @property
    def kind(self) -> str:
        """What the operation is called; empty if no rule knows it."""
        return operation_of(self.node)[0]

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.kind or self.node.name()

    @property
    def argument(self) -> str:
        """The name of the argument."""
        return operation_of(self.node)[1][self.place]

    @cached_property
    def output(self) -> Size:
        """Shape of the output."""
        return Size(output_metadata(self.node)[self.number].shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output."""
        dtype: torch.dtype = output_metadata(self.node)[self.number].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the output."""
        device: torch.device = output_metadata(self.node)[self.number].device
        return device

    @cached_property
    def shape(self) -> Size:
        """Shape of the argument."""
        return Size(self._given.shape)

    @property
    def is_complex(self) -> bool:
        """Whether the argument or the output holds complex numbers."""
        return bool(self.dtype.is_complex or self._given.dtype.is_complex)

    @property
    def _given(self) -> Any:
        """Shape and dtype of the argument."""
        node, number = self.node.next_functions[self.place]
        assert node is not None
        return output_metadata(node)[number]

    def __getitem__(self, name: str) -> Any:
        """Look up what was saved."""
        try:
            return saved(self.node, name)
        except (AttributeError, RuntimeError) as error:  # in another release; or it was changed in place
            raise NotCapturedError(f"autograd does not hold {name} of {self.kind}") from error

    def passed(self, cotangent: Tensor) -> Tensor:
        """Pass a cotangent from the output to the argument, as autograd does."""
        try:
            node: Any = self.node
            found = node(cotangent)
        except RuntimeError as error:  # what it needs was changed in place
            raise NotCapturedError(f"autograd does not pass {self.kind}") from error
        gradient: Tensor = found[self.place] if isinstance(found, tuple) else found
        return gradient

    def product(self, /, **terms: str) -> LinearMap:
        """Write a product of two arguments, given their letters by name, and those of the ``output``."""
        output = terms.pop("output")
        argument = terms.pop(self.argument)
        ((other, letters),) = terms.items()
        return LinearMap(tuple(output), tuple(argument), ((letters, self[other]),))

    def entrywise(self, *factors: Tensor, factor: float | Tensor = 1) -> LinearMap:
        """Write a product entry by entry, with broadcasting of the argument and of the factors."""
        letters = tuple(map(letter_of, range(len(self.output))))
        operands = []
        for tensor in factors:
            if tensor.numel() == 1:
                factor = factor * tensor.reshape(())
                continue
            axes = _broadcast(letters, tensor.shape)
            kept = [axis for axis, letter in enumerate(axes) if letter]
            operands.append(("".join(axes), tensor.reshape([tensor.shape[axis] for axis in kept])))
        return LinearMap(letters, _broadcast(letters, self.shape), tuple(operands), factor)

    def maps(self) -> list[LinearMap]:
        """Write the operation as a sum of linear maps."""
        if self.is_complex:  # an einsum conjugates nothing
            raise NotCapturedError(f"{self.label} computes in complex numbers")
        rule = _OPERATIONS.get(self.kind)
        found = None if rule is None else rule(self)
        if found is None:
            raise NotCapturedError(f"there is no rule for {self}")
        return [found] if isinstance(found, LinearMap) else found

    def __str__(self) -> str:
        """Name the operation, and the argument."""
        return f"{self.argument} of {self.label}" if self.kind else self.label


def letter_of(axis: int) -> str:
    """Name an axis."""
    return chr(ord("a") + axis)


def _broadcast(letters: tuple[str, ...], shape: Size) -> tuple[str, ...]:
    """Give the axes of a tensor the letters of those they are broadcast along; none where they are of length one."""
    return tuple(
        letter if size > 1 else "" for letter, size in zip(letters[len(letters) - len(shape) :], shape, strict=True)
    )


_OPERATIONS: dict[str, Callable[[Operation], LinearMap | list[LinearMap] | None]] = {}


def register_operation(*kinds: str) -> Callable[[_F], _F]:
    """Register how operations are written as linear maps."""

    def register(rule: _F) -> _F:
        _OPERATIONS.update(dict.fromkeys(kinds, rule))
        return rule

    return register
