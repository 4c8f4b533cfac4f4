"""Strips of a large kernel: the samples of x1 in one are evaluated once, and meet one set x2 after the other."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from ggn_ntk.jacobians.plan import Plans
from ggn_ntk.memory.layout import Footprint
from ggn_ntk.methods.blocks import Strip as Held
from ggn_ntk.methods.blocks import footprints_of
from ggn_ntk.methods.computation import is_finite, session
from ggn_ntk.methods.estimate import Tile, estimated_tile
from ggn_ntk.methods.structured import learnt, recorded_products
from ggn_ntk.models.several import of_all_outputs
from ggn_ntk.problem.errors import NotFiniteError, UnsupportedModelError
from ggn_ntk.problem.functions import Model
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.result import Kernels

# As how many samples the first is taken, to find out what one more takes.
_COPIES = 4


class Strips:
    """The strips of a kernel: a few samples tell what is to be known of the model for all of them."""

    def __init__(self, model: Model, few: tuple[Any, Any], block: int, keywords: Mapping[str, Any]) -> None:
        """Look at a few samples of x1 and of x2, which may be ``None`` for those of x1."""
        self._model, self._block = model, block
        of_axes = inspect.signature(AxesRequest.parse).parameters
        self._axes = AxesRequest.parse(**{name: x for name, x in keywords.items() if name in of_axes})
        self._keywords = {name: x for name, x in keywords.items() if name not in (*of_axes, "method", "check")}
        # ``None`` where each tile has to tell for itself why it has no kernel, or a slower one
        self._known: tuple[Plans, list[Footprint]] | None = None
        with suppress(NotFiniteError, UnsupportedModelError):
            self._known = of_all_outputs(self.request(*few), _look)

    def request(self, x1: Any, x2: Any) -> Request:
        """Ask for the kernels of x1 and x2."""
        return Request.parse(self._model, x1, x2, self._axes, **self._keywords)

    def of(self, x1: Any, others: int, *, verified: bool) -> "Strip":
        """Take the samples of a strip, which meet so many of x2; ``verified``: they were, as samples of x2."""
        held = None if self._known is None else Held(*self._known, self._block, others, verified=verified)
        return Strip(self, x1, held)

    def fitting(self, x1: Any, x2: Any) -> Request | None:
        """Ask for the kernels of x1 and x2; ``None`` if they differ in form from what was looked at."""
        if self._known is None:
            return None
        request = self.request(x1, x2)
        known = self._known[0].request
        fits = request.x1.fits(known.x1) and request.second.fits(known.second)
        return replace(request, outputs=known.outputs) if fits else None


class Strip:
    """Samples of x1 that are evaluated once."""

    def __init__(self, strips: Strips, x1: Any, held: Held | None) -> None:
        """Set up."""
        self._strips, self._x1, self._held = strips, x1, held

    def kernels(self, x2: Any, *, verified: bool) -> Kernels | None:
        """Compute what :func:`ggn_ntk.empirical_ntk` returns; ``None`` where only a call of its own gets it right.

        Args:
            x2: The samples of x2, or ``None`` for x1 with itself.
            verified: Whether samples of x2 were verified before, in another strip.

        Returns:
            The kernels, or ``None``.
        """
        request = self._strips.fitting(self._x1, x2)
        if self._held is None or request is None:
            return None
        with session(request):
            try:
                computed = self._held.met(request, verified=verified)
                result = None if computed is None else request.assemble(computed.kernels, computed.axes)
            except (NotFiniteError, UnsupportedModelError):
                return None
        return result if result is not None and is_finite(result) else None


def foreseen(request: Request, tile: tuple[int, int]) -> Tile | None:
    """Estimate what a tile of so many samples takes, from the first of each; ``None`` where rules do not apply."""
    try:
        return of_all_outputs(request.of_others(lambda x: x[[0] * _COPIES]), partial(_foreseen, tile=tile))
    except (NotFiniteError, UnsupportedModelError):
        return None


def _foreseen(request: Request, tile: tuple[int, int]) -> Tile:
    """Estimate what a tile takes."""
    with session(request):
        recorded = recorded_products(request, tile)
        # of a set with itself, the tiles on the diagonal are the symmetric ones
        others = recorded_products(replace(request, x2=request.x1), tile) if request.symmetric else recorded
        return estimated_tile(request, recorded, others.taken.flops, tile)


def _look(request: Request) -> tuple[Plans, list[Footprint]]:
    """Look at a few samples: what is known of the model, and what a sample takes."""
    with session(request):
        known = learnt(request)
        return known, footprints_of(known)
