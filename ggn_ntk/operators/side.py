"""x1 or x2, with its samples in blocks: products of its Jacobian with vectors, from both sides.

Everything is looked at when a side is made. In each block, samples must leave one another alone, as for kernels. That
also gives the gradient ``J^T v`` by plain autograd, for random numbers ``v``: for random ``u``, ``v^T (J u)`` must be
``(J^T v)^T u``. A few samples are looked at in the finest precision first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Size, Tensor

from ggn_ntk.linearization.derivatives import slope_agrees
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget, room
from ggn_ntk.methods.computation import infinite_samples
from ggn_ntk.methods.sample_jacobians import first_line
from ggn_ntk.models.comparison import all_finite, cotangent, differing
from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.models.gradients import gradients, gradients_of, gradients_of_several
from ggn_ntk.models.independence import Checked, check_samples
from ggn_ntk.models.rounding import finest, rounding_of
from ggn_ntk.models.sizes import bytes_per_sample
from ggn_ntk.operators.pushforwards import WAYS, Pushforward, Vectors
from ggn_ntk.problem.errors import (
    NotFiniteError,
    Problem,
    RouteWarning,
    UnsupportedModelError,
    is_bug,
    is_out_of_memory,
    listed,
    warn,
)
from ggn_ntk.problem.request import Request

# How many vectors a way is looked at with, since it takes several at once.
_PROBES = 2


@dataclass(frozen=True)
class Sizes:
    """How much is computed at once."""

    blocks: list[slice]  # samples that are evaluated together
    vectors: int  # how many vectors pass through a block together
    fixed: bool  # whether the caller chose the blocks

    @staticmethod
    def of(request: Request, batch_size: int | None) -> "Sizes":
        """Choose sizes that keep to the memory that may be taken."""
        params = list(request.params.values())
        device, of_sample = params[0].device, bytes_per_sample(request)
        budget = MemoryBudget.of(device).products
        blocks = split(len(request.x1), batch_size or budget // of_sample)
        # A vector is held in the parameters' shape, and pulled back to it, beside what it makes of outputs on its way.
        of_block = of_sample * (blocks[-1].stop - blocks[-1].start)
        of_vector = 2 * sum(p.numel() * p.element_size() for p in params) + of_block
        return Sizes(blocks, max(1, int(min(8 * budget, room(device) / 2) / of_vector)), batch_size is not None)

    def blocks_for(self, vectors: int) -> list[slice]:
        """Split blocks further where several vectors pass through them: each holds what an evaluation does."""
        parts = 1 if self.fixed else ceil((1 + vectors) / 2)
        within = ((b.start, split(b.stop - b.start, ceil((b.stop - b.start) / parts))) for b in self.blocks)
        return [slice(start + part.start, start + part.stop) for start, split_up in within for part in split_up]


class Side:
    """x1 or x2.

    Attributes:
        request: What is asked for, of its samples alone.
        sizes: How much is computed at once.
        shape: The shape ``[N, *out]`` of all outputs.
    """

    def __init__(self, request: Request, few: Tensor, batch_size: int | None) -> None:
        """Look at all samples, given outputs of a few."""
        # few [few, *out]
        self.request, self.shape, self._dtype = request, Size([len(request.x1), *few.shape[1:]]), few.dtype
        self.sizes = Sizes.of(request, batch_size)
        self._batched = True  # whether a batched backward pass gets all samples right
        self._pushforward = self._found()

    def pull(self, v: Tensor) -> Vectors:
        """Multiply the transposed Jacobian by vectors."""
        # v [K, N, *out] -> [K, *parameter]
        params, v = self.request.params, v.to(self._dtype)
        found = {name: p.new_zeros(len(v), *p.shape) for name, p in params.items()}
        for block in self.sizes.blocks_for(len(v)):
            for k, some in self._pulled(block, v[:, block]):
                for name, g in some.items():
                    found[name][k] += g
        return found

    def _pulled(self, block: slice, v: Tensor) -> Iterator[tuple[int | slice, Vectors]]:
        """Multiply the transposed Jacobian of a block by vectors, together or one by one, with their places."""
        # v [K, n, *out]
        params, count = self.request.params, len(v)
        with torch.enable_grad():
            output = evaluate(self.request, None, self.request.x1[block])
        if self._batched and count > 1:
            yield slice(count), gradients_of_several(output, v, params)
        else:
            for k, of_vector in enumerate(v):
                yield k, gradients_of(output, of_vector, params, retain_graph=k + 1 < count)

    def push(self, u: Vectors) -> Tensor:
        """Multiply the Jacobian by vectors."""
        # u [K, *parameter] -> [K, N, *out]
        u = {name: u[name].to(p.dtype) for name, p in self.request.params.items()}
        blocks = self.sizes.blocks_for(len(next(iter(u.values()))))
        return torch.cat([self._pushforward(self.request, self.request.x1[b], u) for b in blocks], 1)

    def _found(self) -> Pushforward:
        """Find the fastest way to multiply the Jacobian by vectors that gets all samples right."""
        reason = ""
        for name, way in WAYS.items():
            wrong = self._what_is_wrong_with(way)
            if not wrong:
                if reason:
                    what = f"Products with the Jacobian of {self.request.names[0]} come from {name}: exact, but slower"
                    warn(f"{what}, since torch.func does not go through the model ({reason}).", RouteWarning)
                return way
            reason = reason or wrong
        what = f"its Jacobian cannot be multiplied by vectors as autograd passes gradients back ({reason})"
        raise UnsupportedModelError([Problem("", what, "Look for custom autograd functions and fused operations")])

    def _what_is_wrong_with(self, way: Pushforward) -> str:
        """Say what is wrong with a way to multiply by vectors; empty where it gets all samples right."""
        finer, tolerance = finest(self.request)
        few = finer.of_others(lambda x: x[[0, len(x) - 1]])
        like = torch.empty((), dtype=torch.float64 if finer.widened else self._dtype, device=self.request.device)
        v = cotangent(like, 0, Size([2, *self.shape[1:]]))
        _, gradient = gradients(few, few.x1, v)
        # Samples whose Jacobians are not finite are named below.
        wrong = _what_is_wrong(few, way, v, gradient, tolerance) if all_finite(gradient.values()) else ""
        for block in self.sizes.blocks if not wrong else ():
            part = self.request.part(block)
            checked = self._checked(part)
            wrong = _what_is_wrong(part, way, checked.v, checked.gradient, checked.tolerance)
            self._batched = self._batched and _right_if_batched(part, checked)
            if wrong:
                break
        return wrong

    def _checked(self, part: Request) -> Checked:
        """Raise unless the samples of a block leave one another alone, and have Jacobians of finite numbers."""
        try:
            return check_samples(part, self.shape[1:])
        except NotFiniteError:
            labels = part.labels([infinite_samples(part)])
            what = f"Jacobians of {listed(labels)} are not finite" if labels else "its gradients are not finite"
            remedy = "Leave these samples out" if labels else "Look for overflow in its weights and inputs"
            raise UnsupportedModelError([Problem("", what, remedy)]) from None


def _what_is_wrong(request: Request, way: Pushforward, v: Tensor, gradient: dict[str, Tensor], tolerance: float) -> str:
    """Say what is wrong with products of some samples, given the gradient ``J^T v``; empty where they are right."""
    # v [N, *out]
    u = {name: cotangent(g, 1, Size([_PROBES, *g.shape])) for name, g in gradient.items()}
    try:
        slopes = way(request, request.x1, u)  # [K, N, *out]
    except UnsupportedModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_bug(error):
            raise
        return first_line(error)
    for k, slope in enumerate(slopes):
        direction = {name: x[k] for name, x in u.items()}
        if not slope_agrees(request, request.x1, v, slope, direction, gradient, tolerance):
            return "it gets products with vectors wrong"
    return ""


def _right_if_batched(request: Request, checked: Checked) -> bool:
    """Tell whether a batched backward pass gets the gradient of some samples right."""
    try:
        with torch.enable_grad():
            output = evaluate(request, None, request.x1)
        found = gradients_of_several(output, checked.v.unsqueeze(0), request.params)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    rounding = rounding_of(request, request.x1, checked.v)
    return not differing({name: g[0] for name, g in found.items()}, checked.gradient, checked.tolerance, rounding)
