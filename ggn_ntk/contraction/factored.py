"""Jacobians as einsums that are not evaluated."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Size, Tensor


class OneHot(NamedTuple):
    """One-hot vectors as an operand of :class:`ggn_ntk.Factored`, given by the places of their ones.

    They are compared and looked up, and only formed where that is cheaper.

    Attributes:
        places: Integers ``[...]``; negative for a vector of zeros.
        size: The length V of the vectors: as an operand it has the axes ``[..., V]``.
    """

    places: Tensor
    size: int

    @property
    def shape(self) -> Size:
        """Shape of the vectors, ``[..., V]``."""
        return Size([*self.places.shape, self.size])

    @property
    def ndim(self) -> int:
        """Number of axes of the vectors."""
        return self.places.ndim + 1


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
        terms, result = self.terms, self.result
        fits = len(terms) == len(self.operands) and all(
            len(t) == o.ndim for t, o in zip(terms, self.operands, strict=True)
        )
        if not fits or not result.startswith("cn") or not set(result) <= {"n", *"".join(terms)}:
            shapes = [list(o.shape) for o in self.operands]
            raise ValueError(
                f"Factored('{self.equation}') with operands of shapes {shapes}: the equation needs one letter for each "
                "axis of each operand, and a result that starts with 'cn' and has no letters of its own."
            )

    @property
    def terms(self) -> list[str]:
        """The letters of each operand."""
        return self.equation.split("->")[0].split(",")

    @property
    def result(self) -> str:
        """The letters of the Jacobian."""
        return self.equation.split("->")[1]

    @property
    def adds_up(self) -> bool:
        """Whether an entry is a sum, say over positions."""
        return not set("".join(self.terms)) <= set(self.result)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        sizes: dict[str, int] = {}
        for term, operand in zip(self.terms, self.operands, strict=True):
            sizes.update(zip(term, operand.shape, strict=True))
        return sizes
