"""What becomes of each axis of outputs in a kernel: kept for both inputs, taken at equal indices, or summed there.

A kernel pairs two outputs of shape ``[*out]``; where all axes are kept, x2's may have another shape than x1's.
``compute="diagonal"`` takes all output axes at equal indices, and ``compute="trace"`` sums over them; ``diagonal_axes``
and ``trace_axes`` do so for single axes. A kernel has the shape
``[N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]``. ``paired=True`` takes the samples, too,
at equal indices: then ``[N]`` stands for ``[N1, N2]`` here and everywhere. With ``interacting=True`` a batch is one
input, whose outputs are ``[N, *out]``: inside there is one sample on each side, and the axis of those that are counted
is a free output axis; a diagonal one, if they are paired.

Inside, the axes of each role are merged to one: of the C = E F T outputs, E diagonal ones are outermost, then come F
free and T traced ones, and a kernel is ``[N1, N2, E, F1, F2]``. What ``compute`` offers are the three cases where two
of the sizes are one. Letters: ``e`` diagonal outputs; ``c``, ``d`` free outputs of x1, x2; ``f`` traced outputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

COMPUTES = ("full", "diagonal", "trace")


class Roles(NamedTuple):
    """The number of outputs in each role, outermost first."""

    diagonal: int = 1  # E, along the axes that are taken at equal indices
    free: int = 1  # F, along the axes that are kept for both inputs
    traced: int = 1  # T, along the axes that are summed at equal indices

    def among(self, outputs: int) -> "Roles":
        """Count free ones among so many outputs, of x2 say, that has others."""
        return self._replace(free=outputs // (self.diagonal * self.traced))


@dataclass(frozen=True)
class OutputAxes:
    """The role of each output axis of x1, or of x2, in a kernel."""

    out_shape: Size  # ``[*out]``, the shape of one sample's output; ``[N, *out]`` of a batch that is one input
    traced: tuple[int, ...] = ()  # the axes that are summed at equal indices, ascending
    diagonal: tuple[int, ...] = ()  # the axes that are taken at equal indices, ascending
    paired: bool = False  # whether samples are taken at equal indices
    interacting: bool = False  # whether the first axis is that of samples in a batch

    @property
    def kept(self) -> tuple[int, ...]:
        """x1's axes in the result: those not traced."""
        return tuple(axis for axis in range(len(self.out_shape)) if axis not in self.traced)

    @property
    def free(self) -> tuple[int, ...]:
        """x2's axes in the result: those neither traced nor diagonal."""
        return tuple(axis for axis in self.kept if axis not in self.diagonal)

    @cached_property
    def roles(self) -> Roles:
        """The number of outputs in each role."""
        return Roles(*(prod(self.out_shape[axis] for axis in axes) for axes in (self.diagonal, self.free, self.traced)))

    @property
    def numbers(self) -> Tensor:
        """The places of outputs in ``[*out]``, flattened, by their roles: ``[E, F, T]``."""
        return self.arrange(torch.arange(self.out_shape.numel()).unsqueeze(0)).squeeze(0)

    def arrange(self, x: Tensor) -> Tensor:
        """Split the axis of outputs into one axis for each role."""
        # x [N, C, ...] -> [N, E, F, T, ...]
        axes = x.reshape(len(x), *self.out_shape, *x.shape[2:])
        order = [0, *(1 + axis for axis in (*self.diagonal, *self.free, *self.traced))]
        return axes.permute(*order, *range(len(order), axes.ndim)).reshape(len(x), *self.roles, *x.shape[2:])


class KernelAxes(NamedTuple):
    """The roles of the output axes of x1 and of x2, which may differ in size where axes are free."""

    first: OutputAxes  # of x1
    second: OutputAxes  # of x2

    @property
    def kernel_shape(self) -> Size:
        """The shape of a kernel behind its two sample axes."""
        first, second = self
        kept = [first.out_shape[axis] for axis in first.kept]
        return Size([*kept, *(second.out_shape[axis] for axis in second.free)])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The same with the axes of each role merged to one, ``[E, F1, F2]``."""
        return self.first.roles.diagonal, self.first.roles.free, self.second.roles.free

    def separate(self, kernel: Tensor) -> Tensor:
        """Give each output axis an axis of its own."""
        # kernel [N1, N2, E, F1, F2] -> [N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]
        first, second = self
        sizes = [first.out_shape[axis] for axis in (*first.diagonal, *first.free)]
        sizes += [second.out_shape[axis] for axis in second.free]
        n = self._samples
        kernel = kernel.reshape(*kernel.shape[:n], *sizes).permute(*range(n), *(n + axis for axis in self._order))
        return self._with_samples_in_front(kernel[0, 0]) if first.interacting else kernel

    def _with_samples_in_front(self, kernel: Tensor) -> Tensor:
        """Put the samples of two batches in front."""
        # kernel [N1, *(x1's axes not traced), N2, ...] -> [N1, N2, ...]; [N, ...] of paired samples
        return kernel if 0 in self.first.diagonal else kernel.movedim(len(self.first.kept), 1)

    def merge(self, kernel: Tensor) -> Tensor:
        """Undo :meth:`separate`."""
        # kernel [N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)] -> [N1, N2, E, F1, F2]
        n, places = self._samples, [self._order.index(axis) for axis in range(len(self._order))]
        return kernel.permute(*range(n), *(n + axis for axis in places)).reshape(*kernel.shape[:n], *self.shape)

    @property
    def agree(self) -> bool:
        """Whether axes of x1 and x2 that are taken at equal indices have the same sizes."""
        first, second = (
            [[side.out_shape[axis] for axis in axes] for axes in (side.traced, side.diagonal)] for side in self
        )
        return first == second

    @property
    def paired(self) -> bool:
        """Whether samples are taken at equal indices."""
        return self.first.paired

    @property
    def _samples(self) -> int:
        """The number of sample axes of a kernel."""
        return 1 if self.paired else 2

    @property
    def _order(self) -> list[int]:
        """The places of a kernel's output axes among the merged ones, diagonal, free of x1 and free of x2."""
        first, second = self
        merged = [*first.diagonal, *first.free]
        return [*(merged.index(axis) for axis in first.kept), *range(len(merged), len(merged) + len(second.free))]


@dataclass(frozen=True)
class AxesRequest:
    """What a call asks for about axes, before the number of those of outputs is known."""

    compute: str  # ``"full"``, ``"diagonal"`` or ``"trace"``
    trace_axes: tuple[int, ...]  # the axes to sum, as given
    diagonal_axes: tuple[int, ...]  # the axes to take at equal indices, as given
    paired: bool  # whether samples are taken at equal indices
    interacting: bool = False  # whether a batch is one input, whose outputs are ``[N, *out]``

    @property
    def pairs(self) -> bool:
        """Whether inputs of the model are taken at equal indices."""
        return self.paired and not self.interacting

    @classmethod
    def parse(
        cls,
        compute: str,
        trace_axes: int | Iterable[int] | None = None,
        diagonal_axes: int | Iterable[int] | None = None,
        *,
        paired: bool = False,
        interacting: bool = False,
    ) -> "AxesRequest":
        """Check the arguments of a call, as far as possible before the model runs."""
        if compute not in COMPUTES:
            raise ValueError(f"compute must be one of {', '.join(map(repr, COMPUTES))}, got {compute!r}.")
        given = {"trace_axes": trace_axes, "diagonal_axes": diagonal_axes}
        parsed = {argument: _parse_axes(argument, axes) for argument, axes in given.items()}
        for argument, axes in given.items():
            if axes is not None and compute != "full":
                raise ValueError(f"{argument} goes with compute='full' alone, got compute={compute!r}: leave one out.")
        for argument, value in {"paired": paired, "interacting": interacting}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{argument} must be True or False, got {type(value).__name__}.")
        return cls(compute, **parsed, paired=paired, interacting=interacting)

    def resolve(self, first: Size, second: Size | None = None) -> KernelAxes:
        """Find the role of each output axis of x1 and of x2; without a shape of its own, x2 has that of x1."""
        # first [*out1], second [*out2]
        axes = KernelAxes(self._resolve(first), self._resolve(first if second is None else second))
        if second is not None and not axes.agree:
            what = "trace_axes and diagonal_axes" if self.compute == "full" else f"compute={self.compute!r}"
            shapes = " and ".join(str(list(shape[self.interacting :])) for shape in (first, second))
            raise ValueError(
                f"{what} pair each output of x1 with the same output of x2, but their shapes differ: {shapes}, without "
                "the sample axis. Ask for compute='full' without axes, or pick outputs of one shape (output=)."
            )
        return axes

    def _resolve(self, shape: Size) -> OutputAxes:
        """Find the role of each output axis of one shape."""
        # shape [*out], or [N, *out] of a batch that is one input
        leading = int(self.interacting)
        ndim = len(shape) - leading
        everything = tuple(range(ndim))
        traced = everything if self.compute == "trace" else _resolve("trace_axes", self.trace_axes, ndim)
        diagonal = everything if self.compute == "diagonal" else _resolve("diagonal_axes", self.diagonal_axes, ndim)
        if both := sorted(set(traced) & set(diagonal)):
            raise ValueError(f"trace_axes and diagonal_axes both name output axis {both[0]}: name it in one of them.")
        of_samples = (0,) if self.interacting and self.paired else ()
        return OutputAxes(
            shape,
            traced=tuple(leading + axis for axis in traced),
            diagonal=(*of_samples, *(leading + axis for axis in diagonal)),
            paired=self.pairs,
            interacting=self.interacting,
        )


def _parse_axes(argument: str, axes: Any) -> tuple[int, ...]:
    """Bring axes to the form of a tuple."""
    listed = () if axes is None else (axes,) if isinstance(axes, int) else axes
    if isinstance(listed, Iterable) and not isinstance(listed, str):
        listed = tuple(listed)
        if all(isinstance(axis, int) and not isinstance(axis, bool) for axis in listed):
            return listed
    raise TypeError(f"{argument} must be an integer, an iterable of integers or None, got {axes!r}.")


def _resolve(argument: str, axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Count axes from the first output axis."""
    for axis in axes:
        if not -ndim <= axis < ndim:
            accepted = f"from {-ndim} to {ndim - 1}" if ndim else "none, since there is no axis but that of samples"
            raise ValueError(
                f"{argument} names output axis {axis}. Accepted, counted without the sample axis: {accepted}."
            )
    resolved = sorted(axis % ndim for axis in axes)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{argument} must name each output axis once, got {axes} for {ndim} axes.")
    return tuple(resolved)
