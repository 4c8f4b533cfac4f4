"""Contractions of small tensors, recorded once and played again.

How Jacobians are contracted depends on shapes and strides alone. For large ones it takes no time to find out; for a
network of a hundred units it takes several times as long as the products themselves. So the operations that a
contraction has carried out are written down, and carried out again on other tensors of the same form: the same ones, in
the same order, so that results are the same to the last bit.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggn_ntk.process.torch_internals import TorchDispatchMode, schema_of, tree_leaves

# Up to how many numbers inputs and intermediate results hold together, and how many steps are kept; of how many forms.
_NUMBERS, _STEPS, _FORMS = 2**22, 1024, 512

# Operations whose results are no tensors, or of a shape that depends on numbers: what was done next may, too.
_DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}

_Kernels = dict[str, Tensor]


def taped(form: Hashable, inputs: Sequence[Tensor], kernels: _Kernels, contract: Callable[[], None]) -> None:
    """Add to kernels by a function that takes its tensors from inputs, or do what it did at inputs of the same form."""
    found = _tapes.get(form)
    if isinstance(found, _Tape):
        found.play(inputs, kernels)
    elif found is False or sum(x.numel() for x in inputs) > _NUMBERS:
        contract()
    elif found is None:  # most forms are seen once
        if len(_tapes) >= _FORMS:
            _tapes.clear()
        _tapes[form] = True
        contract()
    else:
        recording = _Recording([*inputs, *kernels.values()])
        with recording:
            contract()
        _tapes[form] = recording.tape(kernels) or False


def forget() -> None:
    """Forget all contractions."""
    _tapes.clear()


class _View(NamedTuple):
    """Entries of a tensor, however many steps led there."""

    of: int  # the number of the tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # behind the first entry of the tensor
    result: int
    writes: bool = False

    @property
    def touched(self) -> set[int]:
        """The numbers of all tensors that take part."""
        return {self.of, self.result}

    def carry_out(self, tensors: list[Any]) -> None:
        """Look at the entries."""
        x = tensors[self.of]
        tensors[self.result] = x.as_strided(self.size, self.stride, x.storage_offset() + self.offset)


class _Operation(NamedTuple):
    """An operation, with the numbers of tensors in the places of tensors."""

    call: Callable[..., Any]
    arguments: list[Any]  # positional ones, with a placeholder for each tensor
    single: list[tuple[int, int]]  # which of them are tensors: the place, and the number
    several: list[tuple[int, list[int]]]  # which are lists of tensors
    keywords: dict[str, Any]
    named: list[tuple[str, int]]  # which keywords are tensors
    result: int
    writes: bool  # whether it writes to what it is given

    @property
    def touched(self) -> set[int]:
        """The numbers of all tensors that take part."""
        lists = chain.from_iterable(numbers for _, numbers in self.several)
        return {*(n for _, n in self.single), *lists, *(n for _, n in self.named), self.result}

    def carry_out(self, tensors: list[Any]) -> None:
        """Carry the operation out."""
        call, given, single, several, keywords, named, result, _ = self
        arguments = given.copy()
        for place, number in single:
            arguments[place] = tensors[number]
        for place, numbers in several:
            arguments[place] = [tensors[number] for number in numbers]
        if named:
            keywords = keywords | {name: tensors[number] for name, number in named}
        tensors[result] = call(*arguments, **keywords)


class _Tape(NamedTuple):
    """What a contraction does."""

    steps: list[tuple[_View | _Operation, list[int]]]  # with the numbers of tensors that are not needed any more
    size: int  # how many tensors there are
    results: list[tuple[str, int]]  # the numbers of kernels

    def play(self, inputs: Sequence[Tensor], kernels: _Kernels) -> None:
        """Carry the steps out."""
        tensors: list[Any] = [*inputs, *kernels.values()]
        tensors += [None] * (self.size - len(tensors))
        for step, done in self.steps:
            step.carry_out(tensors)
            for number in done:
                tensors[number] = None
        for name, number in self.results:
            kernels[name] = tensors[number]


class _Recording(TorchDispatchMode):
    """Writes down the operations that are carried out."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        """Number the inputs."""
        super().__init__()
        self._tensors = list(inputs)  # kept, so that no other gets the identity of one
        self._numbers = {id(x): number for number, x in enumerate(self._tensors)}
        self._inputs = len(self._tensors)
        self._steps: list[_View | _Operation] = []
        self._roots: dict[int, int] = {}  # which tensors views are of
        self._total, self._whole = 0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and write it down."""
        result = func(*args, **(kwargs or {}))
        if self._whole:
            self._whole = self._take(func, args, kwargs or {}, result)
            if not self._whole:
                self._tensors.clear()
        return result

    def _take(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Write an operation down; tell whether it can be carried out again on other tensors."""
        if not isinstance(result, Tensor) or not _DEPENDS.isdisjoint(func.tags):
            return False
        if result.is_meta:  # shapes alone
            return True
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(id(x) not in self._numbers for x in given):
            return False
        aliases = [a.alias_info for a in schema_of(func).arguments if a.alias_info is not None]
        writes = any(alias.is_write for alias in aliases)
        new = id(result) not in self._numbers
        if new:
            self._numbers[id(result)] = len(self._tensors)
            self._tensors.append(result)
        if aliases and not writes:
            return self._take_view(given[0], result)
        self._steps.append(self._operation(func, args, kwargs, result, writes=writes))
        self._total += result.numel() if new else 0
        return self._total <= _NUMBERS and len(self._steps) <= _STEPS

    def _take_view(self, x: Tensor, result: Tensor) -> bool:
        """Write a view down."""
        number = self._numbers[id(x)]
        root = self._roots.get(number, number)
        of, place = self._tensors[root], self._numbers[id(result)]
        self._roots[place] = root
        offset = result.storage_offset() - of.storage_offset()
        self._steps.append(_View(root, tuple(result.shape), result.stride(), int(offset), place))
        return result.dtype == of.dtype and not (result.is_conj() or result.is_neg())

    def _operation(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, *, writes: bool
    ) -> _Operation:
        """Put the numbers of tensors in the places of tensors."""
        numbers = self._numbers
        single = [(i, numbers[id(x)]) for i, x in enumerate(args) if isinstance(x, Tensor)]
        several = [
            (i, [numbers[id(x)] for x in xs])
            for i, xs in enumerate(args)
            if isinstance(xs, list | tuple) and xs and all(isinstance(x, Tensor) for x in xs)
        ]
        held = {i for i, _ in (*single, *several)}
        return _Operation(
            func,
            [None if i in held else x for i, x in enumerate(args)],
            single,
            several,
            {name: x for name, x in kwargs.items() if not isinstance(x, Tensor)},
            [(name, numbers[id(x)]) for name, x in kwargs.items() if isinstance(x, Tensor)],
            numbers[id(result)],
            writes,
        )

    def tape(self, kernels: _Kernels) -> _Tape | None:
        """Put together what is needed for the kernels; ``None`` where something cannot be done again."""
        if not self._whole or any(id(kernel) not in self._numbers for kernel in kernels.values()):
            return None
        results = [(name, self._numbers[id(kernel)]) for name, kernel in kernels.items()]
        needed = {number for _, number in results}
        last = set(needed)  # what is needed further on
        steps: list[tuple[_View | _Operation, list[int]]] = []
        for step in reversed(self._steps):
            if step.writes or step.result in needed:
                needed |= step.touched
                steps.append((step, [number for number in step.touched - last if number >= self._inputs]))
                last |= step.touched
        return _Tape(steps[::-1], len(self._tensors), results)


# What is known of a form: that it was seen, that it cannot be taped, or the tape.
_tapes: dict[Hashable, _Tape | bool] = {}
