"""Contractions, recorded once and played again.

How Jacobians are contracted depends on shapes and strides alone. For large ones it takes no time to find out; for a
network of a hundred units it takes several times as long as the products themselves. So the operations that a
contraction has carried out are written down, and carried out again on other tensors of the same form: the same ones, in
the same order, so that results are the same to the last bit. Whole kernels of small networks are repeated so, too.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.process.torch_internals import OperationMode, schema_of, tree_leaves

# How many steps are kept, of how many forms.
_STEPS, _FORMS = 1024, 512

# Operations with results of a shape that depends on numbers, or of random ones: what was done next may depend, too.
_DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}

_Kernels = dict[str, Tensor]


class _View(NamedTuple):
    """Entries of a tensor, however many steps led there."""

    of: int  # the number of the tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # behind the first entry of the tensor
    result: int
    writes: bool = False

    @property
    def results(self) -> list[int]:
        """The numbers of what it makes."""
        return [self.result]

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
    several: list[tuple[int, list[int | None]]]  # which are lists of tensors, and of ``None``
    keywords: dict[str, Any]
    named: list[tuple[str, int]]  # which keywords are tensors
    results: list[int]
    writes: bool  # whether it writes to what it is given

    @property
    def touched(self) -> set[int]:
        """The numbers of all tensors that take part."""
        lists = (n for _, numbers in self.several for n in numbers if n is not None)
        return {*(n for _, n in self.single), *lists, *(n for _, n in self.named), *self.results}

    def carry_out(self, tensors: list[Any]) -> None:
        """Carry the operation out."""
        call, given, single, several, keywords, named, results, _ = self
        arguments = given.copy()
        for place, number in single:
            arguments[place] = tensors[number]
        for place, numbers in several:
            arguments[place] = [None if number is None else tensors[number] for number in numbers]
        if named:
            keywords = keywords | {name: tensors[number] for name, number in named}
        found = call(*arguments, **keywords)
        if len(results) == 1:
            tensors[results[0]] = found
        else:
            for number, tensor in zip(results, found, strict=True):
                tensors[number] = tensor


class Tape(NamedTuple):
    """What a contraction does."""

    steps: list[tuple[_View | _Operation, list[int]]]  # with the numbers of tensors that are not needed any more
    size: int  # how many tensors there are
    constants: dict[int, Tensor]  # those that are the same whatever the inputs
    results: list[tuple[str, int]]  # the numbers of kernels

    def play(self, inputs: Sequence[Tensor], kernels: _Kernels) -> None:
        """Carry the steps out."""
        tensors: list[Any] = [*inputs, *kernels.values()]
        tensors += [None] * (self.size - len(tensors))
        for number, constant in self.constants.items():
            tensors[number] = constant
        for step, done in self.steps:
            step.carry_out(tensors)
            for number in done:
                tensors[number] = None
        for name, number in self.results:
            kernels[name] = tensors[number]


class _Recording(OperationMode):
    """Writes down the operations that are carried out."""

    def __init__(self, inputs: Sequence[Tensor], limit: int) -> None:
        """Number the inputs; intermediate results hold at most so many bytes together."""
        super().__init__()
        self._limit = limit
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
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = tuple(result) if isinstance(result, list | tuple) else (result,)
        if any(isinstance(x, Tensor) and x.is_meta for x in results) or not (given or isinstance(result, Tensor)):
            return True  # about shapes and dtypes alone
        known = all(id(x) in self._numbers for x in given)
        if not known or not all(isinstance(x, Tensor) for x in results) or _depends(func, args):
            return False
        if any(isinstance(x, list | tuple | dict) for x in _nested(args, kwargs)):
            return False
        aliases = [a.alias_info for a in schema_of(func).arguments if a.alias_info is not None]
        writes = any(alias.is_write for alias in aliases)
        for x in results:
            if id(x) not in self._numbers:
                self._numbers[id(x)] = len(self._tensors)
                self._tensors.append(x)
                self._total += x.nbytes if writes or not aliases else 0
        if aliases and not writes:
            return all(self._take_view(given[0], x) for x in results)
        self._steps.append(self._operation(func, args, kwargs, results, writes=writes))
        return self._total <= self._limit and len(self._steps) <= _STEPS

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
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: tuple[Tensor, ...], *, writes: bool
    ) -> _Operation:
        """Put the numbers of tensors in the places of tensors."""
        numbers = self._numbers
        single = [(i, numbers[id(x)]) for i, x in enumerate(args) if isinstance(x, Tensor)]
        several = [
            (i, [numbers[id(x)] if isinstance(x, Tensor) else None for x in xs])
            for i, xs in enumerate(args)
            if isinstance(xs, list | tuple) and any(isinstance(x, Tensor) for x in xs)
        ]
        held = {i for i, _ in (*single, *several)}
        return _Operation(
            func,
            [None if i in held else x for i, x in enumerate(args)],
            single,
            several,
            {name: x for name, x in kwargs.items() if not isinstance(x, Tensor)},
            [(name, numbers[id(x)]) for name, x in kwargs.items() if isinstance(x, Tensor)],
            [numbers[id(x)] for x in results],
            writes,
        )

    def tape(self, kernels: _Kernels) -> "Tape | None":
        """Put together what is needed for the kernels; ``None`` where something cannot be done again."""
        if not self._whole or any(id(kernel) not in self._numbers for kernel in kernels.values()):
            return None
        results = [(name, self._numbers[id(kernel)]) for name, kernel in kernels.items()]
        constants = self._constants({number for _, number in results})
        needed = {number for _, number in results}
        last = needed | constants  # what is needed further on
        steps: list[tuple[_View | _Operation, list[int]]] = []
        for step in reversed(self._steps):
            if (step.writes or not needed.isdisjoint(step.results)) and not constants.issuperset(step.results):
                needed |= step.touched
                steps.append((step, [number for number in step.touched - last if number >= self._inputs]))
                last |= step.touched
        held = {number: self._tensors[number] for number in constants & needed}
        return Tape(steps[::-1], len(self._tensors), held, results)

    def _constants(self, results: set[int]) -> set[int]:
        """Find what depends on no input, and stays as it is."""
        written = set(results)
        for step in self._steps:
            written |= step.touched if step.writes else set()
        roots = {self._roots.get(number, number) for number in written}
        constants = set[int]()
        for step in self._steps:
            new = set(step.results)
            free = roots.isdisjoint(self._roots.get(number, number) for number in new)
            if free and not step.writes and constants.issuperset(step.touched - new):
                constants |= new
        return constants


def _nested(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """List the entries of arguments in which no tensors are expected: of lists by position, and keywords."""
    for x in args:
        if isinstance(x, list | tuple):
            yield from x
    for x in kwargs.values():
        yield x if any(isinstance(y, Tensor) for y in tree_leaves(x)) else None


def _depends(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether what an operation returns, apart from numbers, depends on numbers."""
    indexes = func is torch.ops.aten.index.Tensor  # which has so many results as a mask has ones, but places have none
    by_places = indexes and all(x is None or x.dtype == torch.long for x in args[1])
    return not by_places and not _DEPENDS.isdisjoint(func.tags)


def _limit(inputs: Sequence[Tensor]) -> int:
    """Look up how many bytes inputs, or intermediate results, may hold together."""
    return MemoryBudget.of(inputs[0].device).recorded if inputs else 0


class Tapes:
    """What was done at inputs of some forms."""

    def __init__(self) -> None:
        """Start without any."""
        self._tapes: dict[Hashable, Tape | bool] = {}  # a form that was seen, one that cannot be taped, or the tape

    def run(self, form: Hashable, inputs: Sequence[Tensor], kernels: _Kernels, compute: Callable[[], None]) -> None:
        """Add to kernels by a function that takes its tensors from inputs, or do what it did at inputs of the form."""
        found = self._tapes.get(form)
        if isinstance(found, Tape):
            found.play(inputs, kernels)
        elif found is False or sum(x.nbytes for x in inputs) > (limit := _limit(inputs)):
            compute()
        elif found is None:  # most forms are seen once
            if len(self._tapes) >= _FORMS:
                self._tapes.clear()
            self._tapes[form] = True
            compute()
        else:
            recording = _Recording([*inputs, *kernels.values()], limit)
            with recording:
                compute()
            self._tapes[form] = recording.tape(kernels) or False

    def forget(self, form: Hashable | None = None) -> None:
        """Forget what is known of a form, or of all."""
        if form is None:
            self._tapes.clear()
        else:
            self._tapes.pop(form, None)


#: Of contractions.
CONTRACTIONS = Tapes()
