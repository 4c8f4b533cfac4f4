"""Uses of parameters, read off autograd's graph.

A *use* is an operation in which a parameter meets the samples, or a *weight*: what is computed from parameters alone
(masked, scaled, transposed, normalised). Which tensors depend on the samples shows in their shapes: these grow from two
samples to three. From a use leads a path of operations to the parameter, all but the first on parameters alone. Where
each is linear, or acts entry by entry, the parameter's Jacobian stays an einsum (:class:`ggn_ntk.rules.flow.Flow`).
Otherwise that of the weight is formed, and passes through the weight's own graph.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.jacobians.backward import Writer
from ggn_ntk.jacobians.layer_call import CallAxes, LayerCall, Recording
from ggn_ntk.jacobians.sums import Sums
from ggn_ntk.jacobians.weights import Weight
from ggn_ntk.models.autograd_graph import precisions
from ggn_ntk.problem.errors import NotCapturedError
from ggn_ntk.process.torch_internals import output_metadata
from ggn_ntk.rules.flow import Flow, SampleAxis
from ggn_ntk.rules.linear_map import Operation


class Step(NamedTuple):
    """An operation on a path: places in the order of the walk, of the argument, and of the output among several."""

    node: int
    place: int
    number: int = 0


#: From a use to a parameter.
Path = tuple[Step, ...]


@dataclass(frozen=True)
class Site:
    """An operation in which weights meet the samples."""

    node: int  # its place in the order of the walk
    samples: SampleAxis  # where the samples are in its output
    paths: tuple[tuple[str, Path], ...]  # to parameters, by name
    weights: tuple[tuple[Path, tuple[str, ...]], ...]  # to tensors whose own graph leads to parameters, by name


@dataclass(frozen=True)
class Uses:
    """Where parameters are used, as found in the graphs of two samples and of three."""

    names: tuple[str, ...]  # of nodes, in the order of the walk; empty where the graphs differ from there on
    calls: tuple[tuple[int, CallAxes], ...]  # which recorded calls of layers depend on samples, and where these are
    sites: tuple[Site, ...]
    problems: dict[str, str]  # why rules do not give the Jacobians of a parameter, by name
    refused: dict[str, int]  # the node at which that shows: its place in the order of the walk


@dataclass(frozen=True, eq=False)
class Use:
    """A site in the graph of some samples."""

    site: Site
    nodes: Sequence[Node]  # of the graph, in the order of the walk

    @property
    def edge(self) -> GradientEdge:
        """Where its output is in the graph."""
        return GradientEdge(self.nodes[self.site.node], 0)

    @property
    def shape(self) -> Size:
        """Shape of its output; samples that share an axis with others have one of their own, and memory with it."""
        shape, axis = self._output, self._shared_axis
        if axis is None:
            return shape
        return Size([*shape[:axis], *self.site.samples.sizes(shape[axis]), *shape[axis + 1 :]])

    @property
    def _shared_axis(self) -> int | None:
        """The axis of its output that the samples share with others; ``None`` if they have one of their own."""
        axis, outer, inner = self.site.samples
        return axis if outer * inner > 1 else None

    @property
    def _output(self) -> Size:
        """Shape of its output, as it is in the graph."""
        return Size(output_metadata(self.nodes[self.site.node])[0].shape)

    @property
    def n(self) -> int | None:
        """The number of samples; ``None`` if its output is all about one."""
        axis = self.site.samples.axis
        return None if axis is None else self.site.samples.sizes(self._output[axis])[1]

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return Operation(self.nodes[self.site.node], 0).label

    @property
    def axis(self) -> int | None:
        """The axis of the samples in :attr:`shape`."""
        shared = self._shared_axis
        return self.site.samples.axis if shared is None else shared + 1

    @property
    def rows(self) -> int:
        """How many entries of that axis belong to a sample: it is one of samples alone."""
        return 1

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters whose Jacobians it writes, those of weights apart."""
        return tuple(dict.fromkeys(name for name, _ in self.site.paths))

    @property
    def precisions(self) -> set[torch.dtype]:
        """The dtypes in which gradients pass from its output to its parameters."""
        paths = [path for _, path in self.site.paths] + [path for path, _ in self.site.weights]
        found = {output_metadata(self.nodes[step.node])[step.number].dtype for path in paths for step in path}
        return found.union(*(precisions(weight.edge) for weight in self.weights))

    @property
    def weights(self) -> list[Weight]:
        """The weights whose Jacobians pass through their own graphs."""
        found = []
        for (*_, step), names in self.site.weights:
            node, number = self.nodes[step.node].next_functions[step.place]
            assert node is not None
            found.append(Weight(GradientEdge(node, number), names))
        return found

    def without(self, names: Container[str]) -> "Use":
        """Leave parameters out."""
        paths = tuple((name, path) for name, path in self.site.paths if name not in names)
        weights = [(path, tuple(n for n in own if n not in names)) for path, own in self.site.weights]
        return replace(self, site=replace(self.site, paths=paths, weights=tuple(w for w in weights if w[1])))

    def add_to(self, sums: Sums, s: Tensor) -> Jacobians:
        """Write Jacobians: those of parameters whose last use it is."""
        # s [C, *shape]
        complete = sums.add(Writer(self.label, self.names, partial(self._written, s))) if self.site.paths else {}
        for (path, _), weight in zip(self.site.weights, self.weights, strict=True):
            complete |= sums.add_weight(weight, partial(self._jacobians, path, s))
        return complete

    def _written(self, s: Tensor) -> Jacobians:
        """Write the Jacobians of parameters by name."""
        written: Jacobians = {name: [] for name in self.names}
        for name, path in self.site.paths:
            written[name] += self._jacobians(path, s)
        return written

    def _jacobians(self, path: Path, s: Tensor) -> list[Factored]:
        """Write the Jacobian with respect to what a path leads to, as a sum."""
        operations = [Operation(self.nodes[step.node], step.place, step.number) for step in path]
        dtype = torch.promote_types(s.dtype, torch.float32)  # of lower ones, no products are formed
        flows = Flow.along(operations, s, self.site.samples)
        flows = [flow.samples_first() for flow in flows] if self.site.samples.outer > 1 else flows
        return [flow.jacobian(dtype) for flow in flows]


def read(uses: Uses | None, recording: Recording) -> list[LayerCall | Use]:
    """Find the uses of parameters in the graph of some samples; ``None``: all are calls with samples in front."""
    if uses is None:
        return [call.located(CallAxes(0, call.shape[0] // recording.n), recording.n) for call in recording.calls]
    if any(place >= len(recording.calls) for place, _ in uses.calls):
        raise other_graph()
    calls = [recording.calls[place].located(axes, recording.n) for place, axes in uses.calls]
    nodes = list(walk(recording.output, calls, uses.names))
    found = [Use(site, nodes) for site in uses.sites]
    if len(nodes) != len(uses.names) or any(use.n not in (None, recording.n) for use in found):
        raise other_graph()
    return [*calls, *found]


def walk(output: Tensor, calls: Sequence[LayerCall], names: Sequence[str]) -> Iterator[Node]:
    """Walk through the graph of some samples as through those it was learnt from."""
    sources = {call.edge.node: call.sources for call in calls}
    seen, waiting, place = set[Node](), [get_gradient_edge(output).node], 0
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if place >= len(names) or names[place] not in ("", node.name()):
            raise other_graph()
        if names[place]:
            waiting += reversed(before(node, sources))
        place += 1
        yield node


def before(node: Node, sources: dict[Node, tuple[Node, ...]]) -> list[Node]:
    """List the nodes before a node; those before a call of a layer, which is taken as a whole."""
    if node in sources:
        return list(sources[node])
    return [other for other, _ in node.next_functions if other is not None]


def other_graph() -> NotCapturedError:
    """Say that a model computes something else for other samples."""
    return NotCapturedError("the graph of these samples is not that of those in which uses were found")
