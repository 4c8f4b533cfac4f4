"""A set of samples that is evaluated a block at a time."""

import operator
from functools import reduce

import torch
from torch import Tensor

from ggn_ntk.jacobians.plan import Plan, Side
from ggn_ntk.jacobians.verification import Verification
from ggn_ntk.problem.request import Request


class Samples:
    """A set of samples, and what its blocks are compared with."""

    def __init__(self, plan: Plan, request: Request, verification: Verification | None) -> None:
        """Set up; each block is verified as other samples were, if they were."""
        self._plan, self._request, self._like = plan, request, verification
        self._verifications: dict[int, Verification] = {}
        self._outputs: dict[int, Tensor] = {}
        self._failures: list[dict[str, str]] = []
        self.as_planned = True  # whether parameters were used where the plan says, in all blocks

    @property
    def verifications(self) -> list[Verification]:
        """What the blocks are compared with that were evaluated."""
        return list(self._verifications.values())

    @property
    def failures(self) -> dict[str, str]:
        """Why the rule of a parameter failed on the way back of any, by name."""
        return reduce(operator.or_, self._failures, {})

    @property
    def output(self) -> Tensor:
        """The outputs ``[N, *out]``, once all blocks were evaluated."""
        return torch.cat([self._outputs[start] for start in sorted(self._outputs)])

    def side(self, block: slice) -> Side:
        """Evaluate the model on a block; blocks do not overlap."""
        part, new = self._request.part(block), block.start not in self._outputs
        if self._like is not None and new:
            self._verifications[block.start] = self._like.of_block(
                part, self._plan.suited(part.x1), len(self._request.x1)
            )
        side, verification = self._plan.evaluate(part.x1), self._verifications.get(block.start)
        if new:
            self._outputs[block.start] = side.output
            if verification is not None:
                verification.see(side.output)
        if verification is not None and not verification.done:
            side.verification = verification
        self._failures.append(side.failures)
        self.as_planned &= side.as_planned
        return side
