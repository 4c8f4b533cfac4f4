"""What the structured route does for a model, and what it costs."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple

from ggn_ntk.jacobians.places import Place, Places
from ggn_ntk.methods.computation import session
from ggn_ntk.methods.estimate import estimated
from ggn_ntk.methods.structured import Recorded, recorded_products
from ggn_ntk.models.several import of_all_outputs
from ggn_ntk.problem.errors import Problem, UnsupportedRouteError
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.sizes import shown
from ggn_ntk.process.torch_internals import uncompiled

# What rows are sorted by: values of ``sort``.
_SORTS = ("flops", "memory")


@dataclass(frozen=True)
class Contraction:
    """How one parameter's part of the kernel is computed.

    Attributes:
        parameter: Its name.
        layer: The type of the module that it belongs to.
        operation: The operations in which it meets the samples, such as ``addmm``, or the types of layers that are
            taken as a whole.
        module: Dotted names of the modules in whose forward passes these run. Where a parameter is tied or replaced in
            a functional call, they are not the one that it belongs to.
        uses: The number of uses that were put together.
        equation: The einsum of the kernel.
        order: The steps of the contraction, each an einsum.
        flops: Operations of all steps, a multiplication and an addition counted as two.
        memory: Bytes of the largest intermediate result, if samples are not taken in blocks.
    """

    parameter: str
    layer: str
    operation: str
    module: str
    uses: int
    equation: str
    order: tuple[str, ...]
    flops: float
    memory: float


@dataclass(frozen=True)
class Row:
    """What a parameter, or those of a module, cost together.

    Attributes:
        parameters: Their names.
        operation: The operations in which they meet the samples.
        module: Dotted names of the modules in whose forward passes these run, cut at ``depth``.
        uses: The number of uses of all of them.
        flops: Operations of all contractions.
        memory: Bytes of the largest intermediate result.
        orders: The steps of each contraction.
    """

    parameters: tuple[str, ...]
    operation: str
    module: str
    uses: int
    flops: float
    memory: float
    orders: tuple[tuple[str, ...], ...]

    def cells(self) -> tuple[str, ...]:
        """Format the row.

        Returns:
            Its cells.
        """
        several, many = len(self.parameters) > 1, len(self.orders) > 1
        name = f"{len(self.parameters)} parameters" if several else self.parameters[0]
        order = "" if several else f"{len(self.orders)} contractions" if many else "; ".join(self.orders[0])
        return (name, self.operation, self.module, str(self.uses), *_costs(self.flops, self.memory), order)


class Flops(NamedTuple):
    """Operations, a multiplication and an addition counted as two.

    Attributes:
        forward: Of evaluations, those that verify the kernel included.
        backward: Of passes back, those that verify the kernel included.
        contraction: Of the contractions of Jacobians, where what parameters share is counted once, and of a set with
            itself what is not computed is left out.
    """

    forward: float
    backward: float
    contraction: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


@dataclass(frozen=True)
class Explanation:
    """How a kernel is computed; ``print`` shows it as a table.

    Attributes:
        method: The route that is taken.
        contractions: For the structured route, one for each parameter, from the output back; for one whose uses
            differ in form, one for each pair of these.
        problems: Why the structured route is not taken.
        capture: How the structured route takes the model apart, ``"sequential"`` or ``"autograd"``.
        fallback: Why parameters are contracted from Jacobians of each sample, by name, where rules do not give them.
        entries: The number of entries of all parameters.
        covered: The number of entries of those that rules cover.
        places: The operation and the module of each use of a parameter that rules cover, by name, from the output back.
        depth: How many components of a module's name rows are summed by; ``None`` for a row for each parameter.
        sort: What rows are sorted by, the largest first: ``"flops"`` or ``"memory"``; ``None`` for the order of the
            way back.
        sizes: N1 and N2.
        flops: Operations of the whole call, what falls back excepted.
        peak_bytes: Bytes of tensors at the peak, beyond what is there: the kernel, and what is held on the way to it. A
            process takes some tens of megabytes more, for libraries and between tensors.
        seconds: An estimate, from times of a few samples and of a matrix product.
        blocks: How many samples are evaluated together, of how many whose Jacobians are held at a time; ``None`` where
            all samples are evaluated together.
    """

    method: str
    contractions: tuple[Contraction, ...] = ()
    problems: tuple[Problem, ...] = ()
    capture: str = ""
    fallback: dict[str, str] = field(default_factory=dict)
    entries: int = 0
    covered: int = 0
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    depth: int | None = None
    sort: str | None = None
    sizes: tuple[int, int] = (0, 0)
    flops: Flops = field(default=Flops(0, 0, 0), compare=False)
    peak_bytes: float = field(default=0, compare=False)
    seconds: float = field(default=0, compare=False)
    blocks: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the table: contractions, summed by parameter or by module."""
        groups: dict[Any, list[Contraction]] = defaultdict(list)
        for c in self.contractions:
            groups[c.parameter if self.depth is None else frozenset(self._modules(c.parameter))].append(c)
        rows = map(self._row, groups.values())
        return tuple(rows if self.sort is None else sorted(rows, key=attrgetter(self.sort), reverse=True))

    def _row(self, contractions: Sequence[Contraction]) -> Row:
        """Sum contractions."""
        names = tuple(dict.fromkeys(c.parameter for c in contractions))
        return Row(
            names,
            operation=_listed(place.operation for name in names for place in self.places[name]),
            module=_listed(module for name in names for module in self._modules(name)),
            uses=sum(len(self.places[name]) for name in names),
            flops=sum(c.flops for c in contractions),
            memory=max(c.memory for c in contractions),
            orders=tuple(c.order for c in contractions),
        )

    def _costs(self) -> str:
        """Say what the whole call takes."""
        n, m = self.sizes
        flops = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in self.flops._asdict().items())
        how = "all samples at once" if self.blocks is None else "{} samples at a time, {} held".format(*self.blocks)
        return (
            f"{n} x {m} samples: GFLOP: {flops}; {shown(self.peak_bytes)} at the peak, {how}; about "
            f"{self.seconds:.2g} seconds"
        )

    def _modules(self, name: str) -> list[str]:
        """List the modules that use a parameter, cut at the depth."""
        return [".".join(place.module.split(".")[: self.depth]) for place in self.places[name]]

    def __str__(self) -> str:
        """Format as a table.

        Returns:
            The table.
        """
        if self.problems:
            return "\n".join([f"method: {self.method}, since:", *(f"  - {problem}" for problem in self.problems)])
        rows: list[tuple[str, ...]] = [
            ("parameter", "operation", "module", "uses", "GFLOP", "MB", "order of contraction")
        ]
        rows += [row.cells() for row in self.rows]
        total, largest = sum(c.flops for c in self.contractions), max((c.memory for c in self.contractions), default=0)
        rows.append(("total", "", "", "", *_costs(total, largest), ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        covered = f"rules cover {self.covered} of {self.entries} parameter entries ({self.covered / self.entries:.1%})"
        head = [f"method: {self.method}, capture: {self.capture}; {covered}"]
        tail = ["", self._costs()]
        tail += ["", "contracted from Jacobians of each sample:"] if self.fallback else []
        tail += [f"  - {name}: {why}" for name, why in self.fallback.items()]
        return "\n".join([*head, *(line.rstrip() for line in lines), *tail])


def explain(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Params | None = None,
    capture: str = "auto",
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    memory: int | str | None = None,
    n1: int | None = None,
    n2: int | None = None,
    depth: int | None = None,
    sort: str | None = None,
) -> Explanation:
    """Tell how :func:`ggn_ntk.empirical_ntk` computes a kernel, and what that takes, without computing it.

    A few of the samples are looked at, and evaluated a few times, however many there are to be.

    The costs of parameters are those of the contractions alone, each by itself: what parameters share, say the Gram
    matrix of ``s`` for weight and bias, is counted for both, also where their sum is contracted as one, and passing
    ``s`` back is not counted. ``.flops`` has what the whole call takes. opt_einsum counts them (Smith, Gray:
    "opt_einsum - A Python package for optimizing contraction order for einsum-like expressions", Journal of Open Source
    Software, 2018).

    Args:
        model: The model, as for :func:`ggn_ntk.empirical_ntk`.
        x1: N1 samples ``[N1, ...]``, as for :func:`ggn_ntk.empirical_ntk`.
        x2: N2 samples, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        method: ``"structured"``, or ``"auto"``: then a model that the structured route does not support is no error.
        params: The parameters to sum over, as for :func:`ggn_ntk.empirical_ntk`.
        capture: How to take the model apart, as for :func:`ggn_ntk.empirical_ntk`.
        output: Turns what the model returns into a tensor; or a pair, as for :func:`ggn_ntk.empirical_ntk`.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        paired: Take x1[n] with x2[n] alone, or with itself where ``x2`` is ``None``: ``[N]`` stands for ``[N1, N2]``.
        interacting: Take the whole batch for one input, as for :func:`ggn_ntk.empirical_ntk`.
        memory: What the call may take, as for :func:`ggn_ntk.empirical_ntk`.
        n1: The number of samples of x1, which may be more than are given; ``None`` for those.
        n2: The number of samples of x2. With ``x2=None``, x2 is another set of samples like x1 if ``n2`` is given.
        depth: Sums the rows of the table by so many components of the names of modules: 1 for the model's children, 0
            for one row. What several modules use has a row of its own. ``None`` for a row for each parameter.
        sort: Puts first the rows that cost most ``"flops"`` or ``"memory"``; ``None`` for the order from the output
            back.

    Returns:
        The explanation.

    Raises:
        ValueError: If an argument has a value that is not accepted; of ``method``, a route that has no choice to make.
        UnsupportedModelError: If no route supports the model.
        UnsupportedRouteError: For ``method="structured"``, if this one does not.
        TypeError: If an argument is of the wrong type.
    """
    if method not in ("auto", "structured"):
        raise ValueError(f"method must be 'auto' or 'structured', the routes with a choice to explain, got {method!r}.")
    if depth is not None and type(depth) is not int:
        raise TypeError(f"depth must be an integer or None, got {type(depth).__name__}.")
    if depth is not None and depth < 0:
        raise ValueError(f"depth must be 0, 1, 2, ... or None, got {depth}.")
    if sort is not None and sort not in _SORTS:
        raise ValueError(f"sort must be one of {', '.join(map(repr, _SORTS))} or None, got {sort!r}.")
    axes = AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired, interacting=interacting)
    for name, n in (("n1", n1), ("n2", n2)):
        if n is not None and (type(n) is not int or n < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {n!r}.")
        if n is not None and interacting:
            raise ValueError(f"{name} goes with interacting=False alone: a batch that is one input is what is given.")
    x2 = x1 if x2 is None and n2 is not None else x2
    request = Request.parse(
        model, x1, x2, axes, params=params, per_parameter=True, capture=capture, output=output, memory=memory
    )
    sizes = n1 or len(request.x1), n2 or (n1 if request.x2 is None and n1 else len(request.second))
    if paired and sizes[0] != sizes[1]:
        raise ValueError(f"n1 and n2 must be the same with paired=True, got {sizes[0]} and {sizes[1]}.")
    explanation = of_all_outputs(request, lambda request: _explanation(request, method, sizes))
    return replace(explanation, depth=depth, sort=sort)


def _explanation(request: Request, method: str, sizes: tuple[int, int]) -> Explanation:
    """Explain a request, as if there were as many samples."""
    # sizes N1 and N2
    with session(request):
        try:
            recorded = recorded_products(request, sizes)
        except UnsupportedRouteError as error:
            if method == "structured":
                raise
            return Explanation("jacobian_contraction", problems=tuple(error.problems))
        contractions = tuple(_contractions(request, recorded, sizes))
        cost = estimated(request, recorded, sizes)
    plans, places = recorded.plans, recorded.places
    fallback = plans.fallback
    entries = {name: p.numel() for name, p in request.params.items()}
    return Explanation(
        "structured",
        contractions,
        capture=plans.capture,
        fallback={name: _where(name, why, places) for name, why in fallback.items()},
        entries=sum(entries.values()),
        covered=sum(size for name, size in entries.items() if name not in fallback),
        places={name: tuple(found) for name, found in places.used.items() if name not in fallback},
        sizes=sizes,
        flops=Flops(cost.forward, cost.backward, cost.contraction),
        peak_bytes=cost.peak_bytes,
        seconds=cost.seconds,
        blocks=None if cost.layout is None else (cost.layout.block, cost.layout.strip),
    )


def _where(name: str, why: str, places: Places) -> str:
    """Say in which modules a parameter is used for which there is no rule, or not the right one."""
    if name in places.refused:
        return f"{why}, in {_listed([places.refused[name]])}"
    modules = [place.module for place in places.used.get(name, ())]
    return f"{why}, in {_listed(modules)}" if modules else why


def _listed(names: Iterable[str]) -> str:
    """List names once each."""
    return ", ".join(dict.fromkeys(name or "(model)" for name in names))


def _costs(flops: float, memory: float) -> tuple[str, str]:
    """Format operations and bytes."""
    return f"{flops / 1e9:.3g}", f"{memory / 1e6:.3g}"


def _contractions(request: Request, recorded: Recorded, sizes: tuple[int, int]) -> Iterable[Contraction]:
    """Describe how each product of Jacobians is contracted."""
    modules = reversed(list(uncompiled(request.model).modules()))  # of several owners the first gives the name
    owners = {id(p): type(m).__name__ for m in modules for p in m.parameters(recurse=False)}
    for name, operands, info in recorded.paths(request, sizes):
        places = recorded.places.used[name]
        yield Contraction(
            parameter=name,
            layer=owners[id(request.params[name])],
            operation=_listed(place.operation for place in places),
            module=_listed(place.module for place in places),
            uses=len(places),
            equation=info.eq,
            order=tuple(step[2] for step in info.contraction_list),
            flops=float(info.opt_cost),
            memory=float(info.largest_intermediate) * operands[0].tensor.element_size(),
        )
