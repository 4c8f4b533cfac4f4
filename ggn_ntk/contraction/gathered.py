"""Jacobians of blocks of samples, put together as those of all of them, without what they were computed in."""

from collections.abc import Hashable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.operand import Operand, memory_of
from ggn_ntk.problem.errors import NotCapturedError


class Gathered:
    """Jacobians of N samples, by the steps of the way back."""

    def __init__(self, n: int) -> None:
        """Set up."""
        self._n = n
        self._steps: list[dict[str, list[_Use]]] = []
        self._tensors: list[_Tensor] = []
        self._closed = False  # whether a block was put in its place

    def put(self, block: slice, steps: Iterable[Jacobians]) -> None:
        """Copy the Jacobians of a block to their place."""
        shared: dict[Hashable, _Tensor] = {}
        place = -1
        for place, jacobians in enumerate(steps):
            # The pass goes on in the memory of ``s``, but what a layer was given stays as it is.
            shared = {key: tensor for key, tensor in shared.items() if not tensor.has_outputs}
            if not self._closed:
                self._steps.append({})
            uses = self._steps[place] if place < len(self._steps) else {}
            if self._closed and uses.keys() != jacobians.keys():
                raise _other_form()
            for name, several in jacobians.items():
                if not self._closed:
                    uses[name] = [self._new(jacobian, shared) for jacobian in several]
                if len(uses[name]) != len(several):
                    raise _other_form()
                for use, jacobian in zip(uses[name], several, strict=True):
                    use.put(block, jacobian)
        if place + 1 != len(self._steps):
            raise _other_form()
        self._closed = True
        for tensor in self._tensors:
            tensor.end_block()

    def steps(self) -> list[Jacobians]:
        """List the Jacobians of all samples."""
        return [{name: [use.jacobian() for use in uses] for name, uses in step.items()} for step in self._steps]

    def nbytes(self, *, of_outputs: bool) -> int:
        """Count the bytes of tensors that differ from output to output, or of those that all outputs share."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor.has_outputs == of_outputs)

    def _new(self, jacobian: Factored, shared: dict[Hashable, "_Tensor"]) -> "_Use":
        """Set up for the Jacobians of a use: as they are, or formed where that holds fewer numbers."""
        formed = _is_smaller_formed(jacobian)
        tensors = []
        for operand in _form(jacobian).labelled if formed else jacobian.labelled:
            key = memory_of(operand.tensor), operand.letters
            if formed or key not in shared:
                self._tensors.append(_Tensor(operand, self._n))
                tensors.append(self._tensors[-1])
            else:
                tensors.append(shared[key])
                shared[key].users += 1
            if not formed:
                shared[key] = tensors[-1]
        return _Use(tensors, formed, jacobian)


def _other_form() -> NotCapturedError:
    """Say that Jacobians of some samples differ from those of others in more than numbers."""
    return NotCapturedError("the graph of some samples is not that of others")


def _is_smaller_formed(jacobian: Factored) -> bool:
    """Tell whether a Jacobian holds fewer numbers than its factors."""
    if len(jacobian.labelled) == 1 and not jacobian.adds_up:
        return False
    return prod(jacobian.sizes[letter] for letter in jacobian.result) < sum(map(_extent, jacobian.labelled))


def _extent(operand: Operand) -> int:
    """Count the numbers in memory that an operand is a view of: windows overlap."""
    steps = list(zip(operand.tensor.shape, operand.tensor.stride(), strict=True))
    return min(prod(size for size, step in steps if step), 1 + sum((size - 1) * step for size, step in steps))


def _form(jacobian: Factored) -> Factored:
    """Form a Jacobian."""
    c, n, *sizes = (jacobian.sizes[letter] for letter in jacobian.result)
    return Factored(f"{jacobian.result}->{jacobian.result}", (jacobian.formed().reshape(c, n, *sizes),))


class _Use:
    """The Jacobians of one use of a parameter."""

    def __init__(self, tensors: list["_Tensor"], formed: bool, jacobian: Factored) -> None:
        """Set up for Jacobians like this one, of a block."""
        self._tensors, self._formed = tensors, formed
        self._equation, self._terms = jacobian.equation, jacobian.terms
        self._hot = [(o.hot, o.size) for o in jacobian.labelled]

    def put(self, block: slice, jacobian: Factored) -> None:
        """Copy those of a block."""
        if jacobian.equation != self._equation or [(o.hot, o.size) for o in jacobian.labelled] != self._hot:
            raise _other_form()
        jacobian = _form(jacobian) if self._formed else jacobian
        for tensor, operand in zip(self._tensors, jacobian.labelled, strict=True):
            tensor.put(block, operand)

    def jacobian(self) -> Factored:
        """Put them together."""
        result = self._equation.split("->")[1]
        return Factored.of([tensor.operand for tensor in self._tensors], result)


class _Tensor:
    """An operand, over all samples."""

    def __init__(self, operand: Operand, n: int) -> None:
        """Set up for operands like this one, of a block."""
        # Without its numbers: these are a view of what the evaluation of the first block has kept.
        self._like, self._n, self._axis = operand.without_data(), n, operand.letters.find("n")
        self.users = 1  # how many uses have it as an operand
        tensor = operand.tensor
        self._shape, self._stride = tensor.shape, tensor.stride()
        # The same for all samples, which is kept once
        self._same = self._axis < 0 or (tensor.stride(self._axis) == 0 and tensor.shape[self._axis] > 1)
        # The numbers in memory of a sample, where its entries are several times as many: windows overlap
        self._windows = 0
        self._tensor: Tensor | None = None
        self._given: tuple[slice, Tensor | None] | None = None  # the block that was copied last
        if not self._same:
            others = list(zip(self._others(self._shape), self._others(self._stride), strict=True))
            extent = 1 + sum((size - 1) * stride for size, stride in others)
            apart = self._shape[self._axis] == 1 or tensor.stride(self._axis) >= extent
            if apart and extent < prod(size for size, _ in others):
                self._windows = extent

    @property
    def has_outputs(self) -> bool:
        """Whether it differs from output to output."""
        return "c" in self._like.letters

    def _others(self, of_axes: Sequence[int]) -> list[int]:
        """Leave the axis of the samples out."""
        return [x for i, x in enumerate(of_axes) if i != self._axis]

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return 0 if self._tensor is None else self._tensor.nbytes

    def put(self, block: slice, operand: Operand) -> None:
        """Copy a block to its place."""
        tensor, axis = operand.tensor, self._axis
        if operand.letters != self._like.letters or self._others(tensor.shape) != self._others(self._shape):
            raise _other_form()
        if self._given is not None and self._given[0] == block:
            before = self._given[1]
            if before is None or memory_of(before) != memory_of(tensor):
                raise _other_form()  # several uses had one operand in the first block
            return
        # Kept where others may have it as an operand, too: in the first block it turns out which do.
        self._given = block, tensor if self.users > 1 or self._tensor is None else None
        if self._same:
            self._keep(tensor)
        elif self._windows:
            if self._others(tensor.stride()) != self._others(self._stride):
                raise _other_form()
            if self._tensor is None:
                self._tensor = tensor.new_empty(self._n, self._windows)
            count = tensor.shape[axis]
            step = tensor.stride(axis) if count > 1 else self._windows
            self._tensor[block] = tensor.as_strided((count, self._windows), (step, 1), tensor.storage_offset())
        else:
            if self._tensor is None:
                self._tensor = tensor.new_empty([self._n if i == axis else self._shape[i] for i in self._order])
            self._tensor[block] = tensor.permute(self._order)

    def end_block(self) -> None:
        """Let go of what was copied: a view of what the evaluation of a block has kept."""
        self._given = None

    def _keep(self, tensor: Tensor) -> None:
        """Keep what is the same for all samples, or compare it with what is kept."""
        axis = self._axis
        if axis >= 0:
            if tensor.stride(axis) and tensor.shape[axis] > 1:
                raise _other_form()
            tensor = tensor.narrow(axis, 0, 1)
        if self._tensor is None:
            self._tensor = tensor.clone()
        elif not torch.equal(self._tensor, tensor):
            raise _other_form()

    @property
    def _order(self) -> list[int]:
        """The axes in memory: samples are outermost, so that each block is one run, and others as they were."""
        others = (i for i in range(len(self._shape)) if i != self._axis)
        return [self._axis, *sorted(others, key=lambda i: -self._stride[i])]

    @property
    def operand(self) -> Operand:
        """The operand of all samples."""
        assert self._tensor is not None
        if self._same:
            shape = [self._n if i == self._axis else size for i, size in enumerate(self._tensor.shape)]
            return self._like._replace(tensor=self._tensor.expand(shape), key=None)
        if self._windows:
            shape = [self._n if i == self._axis else size for i, size in enumerate(self._shape)]
            stride = [self._windows if i == self._axis else step for i, step in enumerate(self._stride)]
            return self._like._replace(tensor=self._tensor.as_strided(shape, stride), key=None)
        axes = [self._order.index(i) for i in range(len(self._shape))]
        return self._like._replace(tensor=self._tensor.permute(axes), key=None)
