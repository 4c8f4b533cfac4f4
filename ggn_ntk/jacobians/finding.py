"""Finding the uses of parameters, in the graphs of some samples and of more, say of two and of three."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ggn_ntk.jacobians.backward import why_not
from ggn_ntk.jacobians.layer_call import CallAxes, LayerCall, Recording, shape_of
from ggn_ntk.jacobians.uses import Path, Site, Step, Uses, before
from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.models.comparison import cotangent
from ggn_ntk.problem.errors import NotCapturedError
from ggn_ntk.process.torch_internals import output_metadata
from ggn_ntk.rules.flow import Flow, SampleAxis
from ggn_ntk.rules.linear_map import Operation

# On how many paths a weight may lead to a parameter: all pairs of them are contracted.
_PATHS = 4

# Of how many samples gradients tell how these take turns along an axis.
_FEW = 3

# Operations that only rearrange: a model that takes one sample at a time does not show where samples enter.
_VIEWS = {"reshape", "t", "transpose", "permute", "same"}


def find_uses(few: Sequence[Recording], params: Mapping[str, Tensor]) -> Uses:
    """Find the uses of parameters in the graphs of some samples and of more; or of a single one."""
    # Some should be two at least. Torch computes some things otherwise for one: its axis never lies between others.
    some, more = few[0], few[-1]
    pairs = enumerate(zip(some.calls, more.calls, strict=False))
    if some is more:  # an axis of length one may be that of the sample
        calls = tuple((place, _in_front(call)) for place, (call, _) in pairs if call.shape[:1] == (1,))
    else:
        calls = tuple(
            (place, _axes(a, b, (some.n, more.n)))
            for place, (a, b) in pairs
            if a.module is b.module and a.shape != b.shape
        )
    return _Finding(some, more, calls, params).uses()


class _Finding:
    """The graphs of some samples and of more, side by side."""

    def __init__(
        self,
        some: Recording,
        more: Recording,
        calls: tuple[tuple[int, CallAxes], ...],
        params: Mapping[str, Tensor],
    ) -> None:
        """Walk through both graphs."""
        self._some, self._more, self._alone = some, more, some is more
        self._n = (some.n, more.n)
        self._names = {id(p): name for name, p in params.items()}
        self._called = {recording.calls[place].edge.node for recording in (some, more) for place, _ in calls}
        sources = {c.edge.node: c.sources for recording in (some, more) for c in (recording.calls[p] for p, _ in calls)}
        self._nodes: list[tuple[Node, Node]] = []
        self._opaque = set[int]()
        self._flows: dict[Path, list[Flow]] = {}  # of the site that is looked at, along paths that were tried
        self._places: dict[Node, int] = {}
        self._before: list[list[int]] = []
        waiting = [(get_gradient_edge(some.output).node, get_gradient_edge(more.output).node)]
        following: list[list[Node]] = []
        while waiting:
            a, b = waiting.pop()
            if a in self._places:
                continue
            self._places[a] = len(self._nodes)
            ours, theirs = before(a, sources), before(b, sources)
            if a.name() != b.name() or len(ours) != len(theirs):
                self._opaque.add(len(self._nodes))
                ours = theirs = []
            self._nodes.append((a, b))
            following.append(ours)
            waiting += reversed(list(zip(ours, theirs, strict=True)))
        self._before = [[self._places[node] for node in nodes] for nodes in following]
        # The model's output does not depend on each call.
        self._calls = tuple(call for call in calls if some.calls[call[0]].edge.node in self._places)

    def uses(self) -> Uses:
        """Find the uses."""
        problems: dict[str, tuple[str, int]] = {}  # what is wrong, and the node
        reach = self._weights()
        for place in self._opaque:
            what = f"the graph of more samples differs at {self._nodes[place][0].name()}"
            leaves = (
                id(getattr(node, "variable", None)) for node in graph_nodes(GradientEdge(self._nodes[place][0], 0))
            )
            problems |= {self._names[leaf]: (what, place) for leaf in leaves if leaf in self._names}
        sites = list[Site]()
        for place, (a, _) in enumerate(self._nodes):
            if place in reach or place in self._opaque or a in self._called or _is_empty(a):
                continue
            entering = [
                (Step(place, i), self._places[node], number)
                for i, (node, number) in enumerate(a.next_functions)
                if node is not None and reach.get(self._places[node])
            ]
            if entering:
                sites += self._site(place, entering, reach, problems)
        names = tuple("" if i in self._opaque else a.name() for i, (a, _) in enumerate(self._nodes))
        whys = {name: why for name, (why, _) in problems.items()}
        refused = {name: place for name, (_, place) in problems.items()}
        return Uses(names, self._calls, tuple(self._with_rows(sites)), whys, refused)

    def _weights(self) -> dict[int, frozenset[str]]:
        """Find the nodes that depend on no sample, with the parameters that each is computed from."""
        reach: dict[int, frozenset[str]] = {}
        for place in self._in_order():
            a, b = self._nodes[place]
            if place in self._opaque or a in self._called or any(i not in reach for i in self._before[place]):
                continue
            leaf = getattr(a, "variable", None)
            if _is_empty(a):
                reach[place] = frozenset()  # no Jacobian passes through it
            elif leaf is not None:
                reach[place] = frozenset([self._names[id(leaf)]] if id(leaf) in self._names else [])
            elif Operation(a, 0).kind in _VIEWS if self._alone else not _grows(a, b):
                reach[place] = frozenset().union(*(reach[i] for i in self._before[place]))
        return reach

    def _in_order(self) -> Iterator[int]:
        """List nodes behind those they are computed from."""
        done, waiting = set[int](), [(0, False)]
        while waiting:
            place, last = waiting.pop()
            if last:
                yield place
            elif place not in done:
                done.add(place)
                waiting.append((place, True))
                waiting += [(i, False) for i in self._before[place] if i not in done]

    def _site(
        self,
        place: int,
        entering: Sequence[tuple[Step, int, int]],
        reach: Mapping[int, frozenset[str]],
        problems: dict[str, tuple[str, int]],
    ) -> Iterator[Site]:
        """Look at an operation in which weights meet the samples."""
        operation, samples = Operation(self._nodes[place][0], 0).label, self._samples(place)
        self._flows.clear()
        paths, weights = list[tuple[str, Path]](), list[tuple[Path, tuple[str, ...]]]()
        for step, weight, number in entering:
            names = reach[weight]
            try:
                if samples is None:
                    what = f"an output {list(self._shape(place))} of {operation}"
                    raise NotCapturedError(f"samples are not told apart in {what}")
                self._try((step,), samples)
                ways = {name: self._paths(step, samples, (weight, number), name, reach) for name in sorted(names)}
            except Exception as error:
                problems |= dict.fromkeys(names, (why_not(error, operation), place))
                continue
            paths += [(name, path) for name, found in ways.items() for path in found]
            passed = tuple(name for name, found in ways.items() if not found)
            weights += [(self._extended((step,), samples, (weight, number), passed, reach), passed)] if passed else []
        if samples is not None and (paths or weights):
            yield Site(place, samples, tuple(paths), tuple(weights))

    def _paths(
        self,
        step: Step,
        samples: SampleAxis,
        weight: tuple[int, int],
        name: str,
        reach: Mapping[int, frozenset[str]],
    ) -> list[Path]:
        """List the paths from a use to a parameter, if there are few, and all steps are einsums."""
        found = list[Path]()
        waiting: list[tuple[Path, int, int]] = [((step,), *weight)]
        while waiting:
            path, place, output = waiting.pop()
            node = self._nodes[place][0]
            if getattr(node, "variable", None) is not None:
                found.append(path)
            for i, (other, k) in enumerate(node.next_functions):
                if other is not None and name in reach[self._places[other]]:
                    waiting.append(((*path, Step(place, i, output)), self._places[other], k))
            if len(found) + len(waiting) > _PATHS:
                return []
        try:
            for path in found:
                self._try(path, samples)
        except NotCapturedError:
            return []
        return found

    def _extended(
        self,
        path: Path,
        samples: SampleAxis,
        weight: tuple[int, int],
        names: Sequence[str],
        reach: Mapping[int, frozenset[str]],
    ) -> Path:
        """Follow a weight back as far as steps are einsums, to where its uses meet: each may have a view of its own."""
        place, output = weight
        while True:
            node = self._nodes[place][0]
            following = [
                (i, self._places[other], k) for i, (other, k) in enumerate(node.next_functions) if other is not None
            ]
            following = [(i, other, k) for i, other, k in following if not reach[other].isdisjoint(names)]
            if len(following) != 1 or self._shape(*following[0][1:]).numel() > self._shape(place, output).numel():
                return path
            ((i, place, k),) = following
            path, last = (*path, Step(self._places[node], i, output)), path
            try:
                self._try(path, samples)
            except NotCapturedError:
                return last
            output = k

    def _try(self, path: Path, samples: SampleAxis) -> None:
        """Try whether all steps of a path are einsums, those alone that were not tried before."""
        for i, step in enumerate(path, 1):
            if path[:i] in self._flows:
                continue
            operation = Operation(self._nodes[step.node][0], step.place, step.number)
            if i == 1:
                s = torch.zeros((), dtype=operation.dtype, device=operation.device).expand(1, *operation.output)
                self._flows[path[:i]] = Flow.entering(operation, s, samples)
            else:
                self._flows[path[:i]] = Flow.passed(self._flows[path[: i - 1]], operation)

    def _located(self) -> dict[int, SampleAxis]:
        """Find samples in axes of several entries of each, where a view gives them an axis of their own."""
        found: dict[int, SampleAxis] = {}
        for place in reversed(list(self._in_order())):  # a view before what it is a view of, which may be one itself
            view, samples = self._nodes[place][0], found.get(place, self._samples(place))
            if samples is None or (samples.inner > 1 and place not in found):
                continue
            if Operation(view, 0).kind != "reshape" or view in self._called:
                continue
            ((node, number),) = view.next_functions
            whole = self._places.get(node, 0) if node is not None else 0  # 0: the output
            viewed = self._samples(whole)
            if not whole or number or viewed is None or viewed.inner == 1:
                continue
            outer, rest = divmod(self._leading(place, samples), self._leading(whole, viewed))
            if not rest and viewed.inner % outer == 0:
                found[whole] = _split(viewed, outer)
        return found

    def _leading(self, place: int, samples: SampleAxis) -> int:
        """Count how often all samples follow one another in a tensor."""
        return self._shape(place)[: samples.axis].numel() * samples.outer

    def _shape(self, place: int, number: int = 0) -> Size:
        """Look up the shape of an output."""
        return Size(output_metadata(self._nodes[place][0])[number].shape)

    def _samples(self, place: int) -> SampleAxis | None:
        """Find the samples in an output; they may turn out to take turns along their axis."""
        more = Size(output_metadata(self._nodes[place][1])[0].shape)
        return SampleAxis(None) if self._alone else _samples(self._shape(place), more, self._n)

    def _with_rows(self, sites: Sequence[Site]) -> list[Site]:
        """Find out how samples lie in axes that hold several entries of each."""
        located = self._located() if any(site.samples.inner > 1 for site in sites) else {}
        possible = {
            site.node: [located[site.node].outer] if site.node in located else _divisors(site.samples.inner)
            for site in sites
        }
        # Where few entries reach the output (others are masked), two samples may leave it open.
        for which, recording in enumerate((self._some, self._more)):
            left = [site for site in sites if len(possible[site.node]) > 1]
            possible |= self._turns(which, recording, left, possible) if left else {}
        return [replace(site, samples=_split(site.samples, next(iter(possible[site.node]), 1))) for site in sites]

    def _turns(
        self, which: int, recording: Recording, sites: Sequence[Site], possible: Mapping[int, Sequence[int]]
    ) -> dict[int, list[int]]:
        """Find how often samples may take turns along an axis, from the entries that pass a gradient to each."""
        edges = [GradientEdge(self._nodes[site.node][which], 0) for site in sites]
        output: Tensor = recording.output
        v = cotangent(output, 0, output.shape)
        samples = sorted({*range(min(recording.n, _FEW)), recording.n - 1})
        touched = list[Tensor]()  # by one sample after the other: which entries along the axis
        for sample in samples:
            chosen = torch.zeros_like(v)
            chosen[sample] = v[sample]
            found = torch.autograd.grad(output, edges, chosen, retain_graph=True, allow_unused=True)
            touched += [_touched(s, site.samples, v) for s, site in zip(found, sites, strict=True)]
        read = iter(torch.cat(touched).tolist())
        marks = [[place for place in range(len(mask)) if next(read)] for mask in touched]

        def fits(site: int, outer: int) -> bool:
            inner = sites[site].samples.inner // outer
            of_samples = zip(samples, marks[site :: len(sites)], strict=True)
            return all(place // inner % recording.n == sample for sample, places in of_samples for place in places)

        return {site.node: [d for d in possible[site.node] if fits(i, d)] for i, site in enumerate(sites)}


def _grows(some: Node, more: Node) -> bool:
    """Tell whether what an operation computes is larger for more samples."""
    outputs = zip(output_metadata(some), output_metadata(more), strict=True)
    return any(a.shape != b.shape for a, b in outputs)


def _is_empty(node: Node) -> bool:
    """Tell whether an operation computes no numbers: Jacobians do not pass through it."""
    return not any(Size(output.shape).numel() for output in output_metadata(node))


def _samples(some: Size, more: Size, n: tuple[int, int]) -> SampleAxis | None:
    """Find the axis along which a tensor is longer for more samples."""
    axes = [axis for axis, (a, b) in enumerate(zip(some, more, strict=False)) if a != b]
    if len(some) != len(more) or len(axes) != 1:
        return None
    (axis,) = axes
    entries = some[axis] // n[0]
    return SampleAxis(axis, inner=entries) if (some[axis], more[axis]) == (n[0] * entries, n[1] * entries) else None


def _axes(some: LayerCall, more: LayerCall, n: tuple[int, int]) -> CallAxes:
    """Find the samples in a call of a layer, and in its arguments."""
    samples = _samples(some.shape, more.shape, n)
    if samples is None or (samples.inner > 1 and samples.axis):
        return CallAxes(None)
    shapes = zip_longest(map(shape_of, some.args), map(shape_of, more.args), fillvalue=Size())
    args = (_samples(a, b, n) for a, b in shapes)
    return CallAxes(samples.axis, samples.inner, tuple(None if found is None else found.axis for found in args))


def _in_front(call: LayerCall) -> CallAxes:
    """Take the leading axis for that of a single sample."""
    return CallAxes(0, args=tuple(0 if shape_of(x)[:1] == (1,) else None for x in call.args))


def _touched(s: Tensor | None, samples: SampleAxis, like: Tensor) -> Tensor:
    """Mark the entries along the axis of the samples that one of them has."""
    # s [*output], like [N, *out] -> [N * entries of a sample]
    if s is None:
        return torch.zeros(len(like) * samples.inner, dtype=torch.bool, device=like.device)
    assert samples.axis is not None
    touched = (s != 0).movedim(samples.axis, 0)
    return touched.reshape(len(touched), -1).any(1)


def _divisors(entries: int) -> list[int]:
    """List how often samples may take turns along an axis with so many entries of each."""
    return [d for d in range(1, entries + 1) if entries % d == 0]


def _split(samples: SampleAxis, outer: int) -> SampleAxis:
    """Split the entries of each sample along its axis."""
    return samples._replace(outer=outer, inner=samples.inner // outer)
