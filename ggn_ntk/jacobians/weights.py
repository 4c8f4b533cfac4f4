"""Weights that are computed from parameters in ways that are no einsums: their Jacobians pass through their graphs."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.uses import added_up
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.problem.errors import is_out_of_memory
from ggn_ntk.process.torch_internals import output_metadata
from ggn_ntk.process.transforms import batched_gradients


class Weight(NamedTuple):
    """A tensor that is computed from parameters alone."""

    edge: GradientEdge  # where it is in the graph
    names: tuple[str, ...]  # the parameters it is computed from

    @property
    def key(self) -> tuple[Any, int]:
        """Tell it from others."""
        return self.edge.node, self.edge.output_nr

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.edge.node.name()

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""
        shape: Sequence[int] = output_metadata(self.edge.node)[self.edge.output_nr].shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        dtype: torch.dtype = output_metadata(self.edge.node)[self.edge.output_nr].dtype
        return dtype

    def numel(self, params: dict[str, Tensor]) -> int:
        """Count its entries and those of its parameters."""
        return prod(self.shape) + sum(params[name].numel() for name in self.names)

    def pass_back(self, uses: Sequence[Factored], params: dict[str, Tensor]) -> Jacobians:
        """Write the Jacobians of its parameters, given its own of each use."""
        wanted = [params[name] for name in self.names]
        formed = added_up(uses)  # [C, N, entries of the weight]
        c, n, _ = formed.shape
        cotangents = formed.reshape(c * n, *self.shape).to(self.dtype)
        size = self.numel(params) * formed.element_size()
        found = [p.new_empty(c * n, p.numel()) for p in wanted]
        for block in split(c * n, max(1, MemoryBudget.of(formed.device).columns // size)):
            for whole, part in zip(found, self._gradients(wanted, cotangents[block]), strict=True):
                whole[block] = part.flatten(1)
        passed = zip(self.names, found, strict=True)
        return {name: [Factored("cnk->cnk", (jacobian.reshape(c, n, -1),))] for name, jacobian in passed}

    def _gradients(self, params: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
        """Pass several cotangents through its graph, at once or, where ``vmap`` fails, one by one."""
        # cotangents [K, *weight] -> each [K, *parameter]
        try:
            return list(self._grad(params, cotangents, batched=True))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
        rows = [self._grad(params, cotangent) for cotangent in cotangents]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _grad(self, params: Sequence[Tensor], cotangents: Tensor, *, batched: bool = False) -> tuple[Tensor, ...]:
        """Pass a cotangent, or a batch of them, through its graph."""
        start: Any = self.edge
        if batched:
            return batched_gradients(start, params, cotangents)
        return torch.autograd.grad(start, params, cotangents, retain_graph=True)
