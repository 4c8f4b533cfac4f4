"""The way back through autograd's graph, divided wherever all of it passes through one tensor.

Where a residual block ends, or a layer of a sequence, all that lies before is reached through one tensor. There the way
back is divided: the cotangents of all outputs pass one stage, its uses of parameters are contracted, and from where it
ends they pass the next. So ``s`` of one stage is in memory at a time, not that of all uses.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ggn_ntk.jacobians.layer_call import LayerCall
from ggn_ntk.jacobians.uses import Use
from ggn_ntk.process.torch_internals import output_metadata


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of the way back."""

    start: GradientEdge  # where it starts in the graph
    calls: tuple[LayerCall | Use, ...]  # on the way, those first that it passes last
    end: tuple[GradientEdge, ...]  # where the next stage starts; empty for the last stage

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of its calls holds for one output."""
        return sum(call.shape.numel() for call in self.calls)


def stages(output: Tensor, calls: Sequence[LayerCall | Use]) -> list[Stage]:
    """Divide the way back wherever all of it passes through one tensor."""
    if not calls:
        return []
    nodes = _sorted_nodes(output, {call.edge.node for call in calls})
    places = {node: place for place, node in enumerate(nodes)}
    waiting = sorted(calls, key=lambda call: places.get(call.edge.node, len(nodes)), reverse=True)
    found: list[Stage] = []
    start, passed, reached = get_gradient_edge(output), list[LayerCall | Use](), 0
    for place, node in enumerate(nodes):
        while waiting and waiting[-1].edge.node is node:
            passed.append(waiting.pop())
        around = reached > place  # an edge leads past this node
        if passed and waiting and not around and len(output_metadata(node)) == 1:
            end = GradientEdge(node, 0)
            found.append(Stage(start, tuple(reversed(passed)), (end,)))
            start, passed = end, []
        reached = max([reached, *(places[before] for before, _ in node.next_functions if before in places)])
    return [*found, Stage(start, (*waiting, *reversed(passed)), ())]


def _sorted_nodes(output: Tensor, ends: Collection[Node]) -> list[Node]:
    """Sort the nodes of a graph, as far as they lead to some of them, so that each comes before those it leads to."""
    leads: dict[Node, bool] = {}
    found: list[Node] = []
    waiting = [(get_gradient_edge(output).node, False)]
    while waiting:
        node, done = waiting.pop()
        following = [before for before, _ in node.next_functions if before is not None]
        if done:
            leads[node] = node in ends or any(leads[before] for before in following)
            found += [node] * leads[node]
        elif node not in leads:
            leads[node] = False
            waiting.append((node, True))
            waiting += [(before, False) for before in following]
    return found[::-1]


def merged(parts: Sequence[Stage], size: int) -> list[Stage]:
    """Join stages, for fewer calls of functions."""
    found: list[Stage] = []
    for stage in parts:
        if found and found[-1].numel + stage.numel <= size:
            last = found.pop()
            stage = Stage(last.start, stage.calls + last.calls, stage.end)
        found.append(stage)
    return found
