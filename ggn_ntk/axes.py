"""What becomes of each output axis in a kernel: kept for both inputs, taken at equal indices, or summed there.

A kernel pairs two outputs of shape ``[*out]``. ``compute="diagonal"`` takes all output axes at equal indices, and
``compute="trace"`` sums over them; ``diagonal_axes`` and ``trace_axes`` do so for single axes. A kernel has the shape
``[N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, NamedTuple

from torch import Size, Tensor

# One letter for each output axis; n and m stand for samples.
_LETTERS = [letter for letter in ascii_lowercase if letter not in "nm"]


class EinsumLetters(NamedTuple):
    """Letters for an einsum over output axes; see :meth:`OutputAxes.letters`.

    Attributes:
        first: One for each output axis of x1.
        second: One for each output axis of x2: that of x1 for a traced or diagonal axis.
        result: Those of the kernel's output axes.
    """

    first: str
    second: str
    result: str


@dataclass(frozen=True)
class OutputAxes:
    """The role of each output axis in a kernel.

    Attributes:
        ndim: The number of output axes, without the sample axis.
        traced: The axes that are summed at equal indices, ascending.
        diagonal: The axes that are taken at equal indices, ascending.
    """

    ndim: int
    traced: tuple[int, ...] = ()
    diagonal: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """x1's axes in the result: those not traced."""
        return tuple(axis for axis in range(self.ndim) if axis not in self.traced)

    @property
    def free(self) -> tuple[int, ...]:
        """x2's axes in the result: those neither traced nor diagonal."""
        return tuple(axis for axis in self.kept if axis not in self.diagonal)

    def letters(self) -> EinsumLetters:
        """Write the output axes of an einsum that pairs two outputs.

        Returns:
            The letters, none of them ``n`` or ``m``: ``f"n{first},m{second}->nm{result}"`` is the kernel of outputs.
        """
        first = _LETTERS[: self.ndim]
        second = [letter.upper() if axis in self.free else letter for axis, letter in enumerate(first)]
        result = [first[axis] for axis in self.kept] + [second[axis] for axis in self.free]
        return EinsumLetters("".join(first), "".join(second), "".join(result))

    def shape(self, out_shape: Size) -> Size:
        """Give the shape of a kernel behind its two sample axes.

        Args:
            out_shape: ``[*out]``, the shape of one sample's output.

        Returns:
            ``[*(x1's axes not traced), *(x2's axes neither traced nor diagonal)]``.
        """
        return Size([out_shape[axis] for axis in (*self.kept, *self.free)])

    def transpose(self, kernel: Tensor) -> Tensor:
        """Exchange the two sets of inputs.

        Args:
            kernel: ``[N1, N2, *kept, *free]``.

        Returns:
            The kernel of (x2, x1), a view.
        """
        position = {axis: 2 + i for i, axis in enumerate(self.kept)}
        partner = {axis: 2 + len(self.kept) + i for i, axis in enumerate(self.free)}
        swapped = [partner.get(axis, position[axis]) for axis in self.kept] + [position[axis] for axis in self.free]
        return kernel.permute(1, 0, *swapped)


@dataclass(frozen=True)
class AxesRequest:
    """What a call asks for about output axes, before the number of axes is known.

    Attributes:
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        trace_axes: The axes to sum, as given.
        diagonal_axes: The axes to take at equal indices, as given.
    """

    compute: str
    trace_axes: tuple[int, ...]
    diagonal_axes: tuple[int, ...]

    @classmethod
    def parse(
        cls,
        compute: str,
        trace_axes: int | Iterable[int] | None,
        diagonal_axes: int | Iterable[int] | None,
    ) -> "AxesRequest":
        """Check the arguments of a call as far as that is possible before the model runs.

        Args:
            compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
            trace_axes: An axis or several; ``None`` for none. Negative ones count from the last output axis.
            diagonal_axes: The same.

        Returns:
            The checked request.

        Raises:
            ValueError: If axes are given beside ``compute="diagonal"`` or ``"trace"``.
        """
        given = {"trace_axes": trace_axes, "diagonal_axes": diagonal_axes}
        parsed = {argument: _parse_axes(argument, axes) for argument, axes in given.items()}
        for argument, axes in given.items():
            if axes is not None and compute != "full":
                raise ValueError(f"{argument} goes with compute='full' alone, got compute={compute!r}: leave one out.")
        return cls(compute, **parsed)

    def resolve(self, ndim: int) -> OutputAxes:
        """Find the role of each output axis.

        Args:
            ndim: The number of output axes, without the sample axis.

        Returns:
            The roles.

        Raises:
            ValueError: If an axis does not exist, comes twice, or is in both arguments.
        """
        if self.compute == "diagonal":
            return OutputAxes(ndim, diagonal=tuple(range(ndim)))
        if self.compute == "trace":
            return OutputAxes(ndim, traced=tuple(range(ndim)))
        traced = _resolve("trace_axes", self.trace_axes, ndim)
        diagonal = _resolve("diagonal_axes", self.diagonal_axes, ndim)
        if both := sorted(set(traced) & set(diagonal)):
            raise ValueError(f"trace_axes and diagonal_axes both name output axis {both[0]}: name it in one of them.")
        return OutputAxes(ndim, traced, diagonal)


def _parse_axes(argument: str, axes: Any) -> tuple[int, ...]:
    """Bring axes to one form.

    Args:
        argument: The argument's name.
        axes: An integer, an iterable of integers, or ``None``.

    Returns:
        The axes.

    Raises:
        TypeError: If they are anything else.
    """
    listed = () if axes is None else (axes,) if isinstance(axes, int) else axes
    if isinstance(listed, Iterable) and not isinstance(listed, str):
        listed = tuple(listed)
        if all(isinstance(axis, int) and not isinstance(axis, bool) for axis in listed):
            return listed
    raise TypeError(f"{argument} must be an integer, an iterable of integers or None, got {axes!r}.")


def _resolve(argument: str, axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Count axes from the first output axis.

    Args:
        argument: The argument's name.
        axes: The axes, where negative ones count from the last.
        ndim: The number of output axes.

    Returns:
        The axes, ascending.

    Raises:
        ValueError: If one does not exist or comes twice.
    """
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
