"""Reading the graph that autograd has recorded."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ggn_ntk.process.torch_internals import output_metadata


def graph_nodes(output: Tensor | GradientEdge, sources: Mapping[Any, Iterable[Node]] | None = None) -> Iterator[Node]:
    """Walk through the graph of a tensor, from the tensor back to the leaves."""
    if isinstance(output, Tensor):
        waiting = [get_gradient_edge(output).node] if output.requires_grad else []
    else:
        waiting = [output.node]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if sources is not None and node in sources:  # a node to jump over, together with all up to its sources
            waiting += sources[node]
        else:
            yield node
            waiting += [before for before, _ in node.next_functions if before is not None]


def precisions(output: Tensor | GradientEdge, ends: Iterable[Node] = ()) -> set[torch.dtype]:
    """List the dtypes of numbers, or of their parts, that take part in a tensor's graph and are the tensor's own."""
    found = {output.dtype} if isinstance(output, Tensor) else set()
    for node in graph_nodes(output, dict.fromkeys(ends, ())):
        found.update(entry.dtype for entry in output_metadata(node))
    return {dtype.to_real() for dtype in found if dtype.is_floating_point or dtype.is_complex}


def dense(gradient: Tensor) -> Tensor:
    """Make a gradient dense: that of an embedding may be sparse."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def results_in_graph(output: Tensor) -> list[tuple[Size, int]]:
    """List the shapes and bytes of all that was computed on the way to a tensor, of which its graph keeps a part."""
    found = (m for node in graph_nodes(output) for m in output_metadata(node))
    return [(Size(m.shape), prod(m.shape) * m.dtype.itemsize) for m in found]
