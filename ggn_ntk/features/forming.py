"""Features of samples: Jacobians, as rules write them, contracted with random directions.

What verifies Jacobians for kernels verifies them here. Of parameters that fall back, Jacobians of each sample are
formed, and contracted with the same directions.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ggn_ntk.contraction.accumulator import Accumulator
from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.features.projection import Drawing, with_first_axis
from ggn_ntk.jacobians.plan import Plans
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.methods.blocks import warn_of_wrong_rules
from ggn_ntk.methods.sample_jacobians import all_jacobians
from ggn_ntk.methods.structured import fallback_requests, in_groups, verified
from ggn_ntk.models.requirements import check_model
from ggn_ntk.problem.errors import RouteWarning, UnsupportedRouteError, warn
from ggn_ntk.problem.output_axes import AxesRequest, Roles
from ggn_ntk.problem.request import Request


class _Sum:
    """Features of some samples, added up over parameters."""

    def __init__(self, drawing: Drawing, request: Request, outputs: int) -> None:
        """Set up for so many outputs."""
        self._drawing, self._request, self._outputs = drawing, request, outputs
        self._parts = [Accumulator(Roles(free=outputs), None, lambda name: "") for _ in drawing.chunks]

    def add(self, jacobians: Jacobians) -> None:
        """Add the features of some parameters."""
        for name, uses in jacobians.items():
            shape = self._request.params[name].shape
            uses = [with_first_axis(use, shape) for use in uses]
            like = next(o.tensor for o in uses[0].labelled if not o.hot)
            for part, directions in zip(self._parts, self._drawing.directions(name, shape, like), strict=True):
                for use in uses:
                    part.add({name: [use]}, {name: [directions.like(use)]})

    def features(self, like: Tensor) -> Tensor:
        """Put the features along all directions together."""
        # like [N, ...] -> [N, C, dim]
        found = [part.kernels[""][:, :, 0, :, 0].transpose(1, 2) for part in self._parts if part.kernels]
        if not found:  # no parameter has any effect
            return like.new_zeros(len(like), self._outputs, self._drawing.projection.dim)
        return torch.cat(found, 2)


def features_of(request: Request, drawing: Drawing, blocks: list[slice]) -> Tensor:
    """Compute features in blocks of samples. Call it inside ``isolated(request.model)``."""
    # -> [N, C, dim]
    wrong: dict[str, str] = {}
    whole: Tensor | None = None
    for block in blocks:
        # of all kernels, the one that takes least: none is computed
        part = replace(request.part(block), axes=AxesRequest.parse("trace"))
        features = _of_block(part, drawing, wrong)
        if whole is None:
            whole = features.new_empty(len(request.x1), *features.shape[1:])
        whole[block] = features
    warn_of_wrong_rules(wrong)
    assert whole is not None
    return whole


def _of_block(request: Request, drawing: Drawing, wrong: dict[str, str]) -> Tensor:
    """Compute the features of samples that are evaluated together, and take down which rules are wrong."""
    # -> [N, C, dim]
    try:
        found = verified(request, partial(_by_rules, drawing), few=True)
    except UnsupportedRouteError as error:
        warn(f"Features come from Jacobians of each sample, which are slower to form. {error}", RouteWarning)
        _, checked = check_model(request)
        outputs = [known.outputs for known in checked]
        parts = [(part, checked) for part in in_groups(request, request.params, outputs)]
        features = None
    else:
        assert found is not None
        plans, features = found
        wrong |= plans.fallback
        outputs = [side.output for side in plans.sides]
        parts = list(fallback_requests(plans, outputs))
    (output,) = outputs
    for part, checked in parts:
        sums = _Sum(drawing, request, output[0].numel())
        for name, jacobian in all_jacobians(part, checked)[0].items():  # [N, C, P]
            sums.add({name: [Factored("nck->cnk", (jacobian,))]})
        features = sums.features(output) if features is None else features + sums.features(output)
    assert features is not None
    return features


def _by_rules(drawing: Drawing, plans: Plans) -> Tensor:
    """Pass a side back, some outputs at a time, and project what rules write."""
    # -> [N, C, dim]
    (side,) = plans.sides
    output = side.output
    budget = MemoryBudget.of(output.device).backpropagated
    chunks = torch.arange(output[0].numel()).split(max(1, budget // (side.numel * output.element_size())))
    found = []
    for number, chosen in enumerate(chunks, 1):
        sums = _Sum(drawing, plans.request, len(chosen))
        for step in side.steps(chosen, lambda *_: None, again=number < len(chunks)):
            sums.add(step.jacobians())
        found.append(sums.features(output))
    return torch.cat(found, 1)
