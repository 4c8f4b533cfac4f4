"""What the structured route does for a model, and what it costs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from ggn_ntk.contraction.einsum import path_of
from ggn_ntk.contraction.one_hot import looked_up
from ggn_ntk.contraction.products import NamedEinsum
from ggn_ntk.methods.structured import recorded_products
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.errors import Problem, UnsupportedRouteError
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import uncompiled
from ggn_ntk.process.transforms import outside_of_transforms


@dataclass(frozen=True)
class Contraction:
    """How one parameter's part of the kernel is computed.

    Attributes:
        parameter: Its name.
        layer: The type of its layer.
        equation: The einsum of the kernel.
        order: The steps of the contraction, each an einsum.
        flops: Operations of all steps, a multiplication and an addition counted as two.
        memory: Bytes of the largest intermediate result, if samples are not taken in blocks.
    """

    parameter: str
    layer: str
    equation: str
    order: tuple[str, ...]
    flops: float
    memory: float


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
    """

    method: str
    contractions: tuple[Contraction, ...] = ()
    problems: tuple[Problem, ...] = ()
    capture: str = ""
    fallback: dict[str, str] = field(default_factory=dict)
    entries: int = 0
    covered: int = 0

    def __str__(self) -> str:
        """Format as a table.

        Returns:
            The table.
        """
        if self.problems:
            return "\n".join([f"method: {self.method}, since:", *(f"  - {problem}" for problem in self.problems)])
        rows = [("parameter", "layer", "GFLOP", "MB", "order of contraction")]
        rows += [
            (c.parameter, c.layer, f"{c.flops / 1e9:.3g}", f"{c.memory / 1e6:.3g}", "; ".join(c.order))
            for c in self.contractions
        ]
        total, largest = sum(c.flops for c in self.contractions), max((c.memory for c in self.contractions), default=0)
        rows.append(("total", "", f"{total / 1e9:.3g}", f"{largest / 1e6:.3g}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        covered = f"rules cover {self.covered} of {self.entries} parameter entries ({self.covered / self.entries:.1%})"
        head = [f"method: {self.method}, capture: {self.capture}; {covered}"]
        tail = ["", "contracted from Jacobians of each sample:"] if self.fallback else []
        tail += [f"  - {name}: {why}" for name, why in self.fallback.items()]
        return "\n".join([*head, *(line.rstrip() for line in lines), *tail])


def explain(
    model: Module,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Iterable[str] | None = None,
    capture: str = "auto",
    output: Callable[[Any], Tensor] | None = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
) -> Explanation:
    """Tell how :func:`ggn_ntk.empirical_ntk` computes a kernel, without contracting it.

    The costs are those of the contractions alone, each by itself: what parameters share, say the Gram matrix of
    ``s`` for weight and bias, is counted for both, also where their sum is contracted as one, and passing ``s`` back is
    not counted. opt_einsum counts them (Smith, Gray: "opt_einsum - A Python package for optimizing contraction order
    for einsum-like expressions", Journal of Open Source Software, 2018).

    Args:
        model: The model.
        x1: N1 samples ``[N1, ...]``, as for :func:`ggn_ntk.empirical_ntk`.
        x2: N2 samples, or ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        method: ``"structured"``, or ``"auto"``: then a model that the structured route does not support is no error.
        params: Names of the parameters to sum over; ``None`` for all that require a gradient.
        capture: How to take the model apart, as for :func:`ggn_ntk.empirical_ntk`.
        output: Turns what the model returns into a tensor, as for :func:`ggn_ntk.empirical_ntk`.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.

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
    axes = AxesRequest.parse(compute, trace_axes, diagonal_axes)
    request = Request.parse(model, x1, x2, axes, params=params, per_parameter=True, capture=capture, output=output)
    with outside_of_transforms(), isolated(request.model):
        try:
            plan, products = recorded_products(request)
        except UnsupportedRouteError as error:
            if method == "structured":
                raise
            return Explanation("jacobian_contraction", problems=tuple(error.problems))
        contractions = tuple(_contractions(request, products))
    entries = {name: p.numel() for name, p in request.params.items()}
    return Explanation(
        "structured",
        contractions,
        capture=plan.capture,
        fallback=plan.fallback,
        entries=sum(entries.values()),
        covered=sum(size for name, size in entries.items() if name not in plan.fallback),
    )


def _contractions(request: Request, products: Iterable[NamedEinsum]) -> Iterable[Contraction]:
    """Describe how each product of Jacobians is contracted."""
    owners = {id(p): type(m).__name__ for m in uncompiled(request.model).modules() for p in m.parameters(recurse=False)}
    total, n1 = sum(request.sizes), request.n1
    rows, columns = slice(0, n1 or total), slice(n1 or 0, total)  # x1 and x2 among the stacked samples
    for name, product in products:
        operands = looked_up(product.restrict(rows, columns), product.result)
        info = path_of(operands, product.result, apart=product.apart)
        yield Contraction(
            parameter=name,
            layer=owners[id(request.params[name])],
            equation=info.eq,
            order=tuple(step[2] for step in info.contraction_list),
            flops=float(info.opt_cost),
            memory=float(info.largest_intermediate) * operands[0].tensor.element_size(),
        )
