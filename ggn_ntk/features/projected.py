"""Ask for projected features, and for what they tell of a kernel."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, einsum

from ggn_ntk.features.forming import features_of
from ggn_ntk.features.projection import PROJECTIONS, Drawing, Projection
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget, check_result, explained, room
from ggn_ntk.methods.computation import carry_out
from ggn_ntk.models.independence import look
from ggn_ntk.models.requirements import configuration_problems
from ggn_ntk.models.sizes import bytes_per_sample
from ggn_ntk.problem.errors import KernelMemoryError, UnsupportedModelError, kind_of, listed
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.output_axes import AxesRequest, KernelAxes
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.result import Computed, finish
from ggn_ntk.problem.sizes import shown

# In how many groups of directions the spread of a kernel's estimates is looked at: their variance is then known to a
# share of sqrt(2 / 63), 18 %, whatever the number of directions.
_GROUPS = 64

_HELP = "What helps: a smaller dim, fewer outputs (output=), and blocks of samples: those of x[a:b] are these rows."


@dataclass(frozen=True, eq=False)
class ProjectedFeatures:
    """Features of samples whose inner products estimate the kernel: what :func:`projected_features` returns.

    Attributes:
        features: ``[N, *out, dim]``.
        projection: What features must have in common to be compared: they are of one projection if these are equal.
    """

    features: Tensor
    projection: Projection

    def kernel(
        self,
        other: "ProjectedFeatures | None" = None,
        *,
        compute: str = "full",
        trace_axes: int | Iterable[int] | None = None,
        diagonal_axes: int | Iterable[int] | None = None,
        paired: bool = False,
    ) -> Tensor:
        """Estimate the kernel: the inner products of features, whose mean over seeds is the kernel.

        Args:
            other: Features of N2 other samples, or of other values of the parameters, of the same projection; ``None``
                for these, and a kernel that is exactly symmetric.
            compute: ``"full"``, ``"diagonal"`` or ``"trace"``, as for :func:`ggn_ntk.empirical_ntk`.
            trace_axes: Output axes to sum at equal indices.
            diagonal_axes: Output axes to take at equal indices.
            paired: Take sample n with sample n of the other alone.

        Returns:
            What :func:`ggn_ntk.empirical_ntk` would, up to an error that falls with the square root of ``dim``:
            ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``.

        Raises:
            KernelMemoryError: If memory does not suffice.
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted, or the projections differ.
        """
        pair = _Pair.of(self, other, AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired))
        return pair.finished(pair.product(slice(None)))

    def standard_error(
        self,
        other: "ProjectedFeatures | None" = None,
        *,
        compute: str = "full",
        trace_axes: int | Iterable[int] | None = None,
        diagonal_axes: int | Iterable[int] | None = None,
        paired: bool = False,
    ) -> Tensor:
        """Estimate the standard deviation, over seeds, of each entry of :meth:`kernel`.

        Directions are independent, so that the kernel's estimates by each of 64 groups of them (or by each direction,
        of fewer) spread around their mean by as much as tells the variance of that mean. Its square is an unbiased
        estimate of the variance.

        Args:
            other: As for :meth:`kernel`.
            compute: As for :meth:`kernel`.
            trace_axes: As for :meth:`kernel`.
            diagonal_axes: As for :meth:`kernel`.
            paired: As for :meth:`kernel`.

        Returns:
            A number for each entry of the kernel.

        Raises:
            KernelMemoryError: If memory does not suffice.
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted, or the projections differ.
        """
        pair, dim = _Pair.of(self, other, AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired)), 0
        groups = split(self.projection.dim, -(-self.projection.dim // _GROUPS))
        squares = total = torch.zeros((), dtype=self.features.dtype, device=self.features.device)
        for group in groups:
            product, size = pair.product(group), group.stop - group.start
            squares, total, dim = squares + product.square() / size, total + product, dim + size
        variance = (squares - total.square() / dim) * dim / (len(groups) - 1)
        return pair.finished(variance.clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False)
class _Pair:
    """Features of two sets, with their outputs by roles."""

    first: Tensor  # [N1, E, F1, T, dim]
    second: Tensor  # [N2, E, F2, T, dim]
    axes: KernelAxes
    symmetric: bool

    @staticmethod
    def of(first: ProjectedFeatures, other: Any, asked: AxesRequest) -> "_Pair":
        """Check that two sets of features can be compared, and arrange their outputs."""
        if not isinstance(other, ProjectedFeatures | None):
            raise TypeError(f"other must be ProjectedFeatures or None, got {kind_of(other)}.")
        second = first if other is None else other
        if first.projection != second.projection:
            raise ValueError(f"other is of another projection: {_differences(first.projection, second.projection)}.")
        a, b = first.features, second.features
        if (a.dtype, a.device) != (b.dtype, b.device):
            raise ValueError(
                f"other holds {b.dtype} on {b.device}, and these features {a.dtype} on {a.device}: bring them to one."
            )
        if asked.paired and len(a) != len(b):
            raise ValueError(f"paired=True takes as many samples of other as of these, got {len(b)} and {len(a)}.")
        axes = asked.resolve(a.shape[1:-1], b.shape[1:-1])
        check_result((*([len(a)] if asked.paired else [len(a), len(b)]), *axes.shape), [a], 1)
        sides = [side.arrange(f.reshape(len(f), -1, f.shape[-1])) for side, f in zip(axes, (a, b), strict=True)]
        return _Pair(sides[0], sides[1], axes, second is first)

    def product(self, directions: slice) -> Tensor:
        """Multiply what features are along some directions."""
        # -> [N1, N2, E, F1, F2], or [N, E, F1, F2] of paired samples
        equation = "necfj,nedfj->necd" if self.axes.paired else "necfj,medfj->nmecd"
        with explained(lambda: "inner products of features"):
            return einsum(equation, self.first[..., directions], self.second[..., directions])

    def finished(self, kernel: Tensor) -> Tensor:
        """Give each output axis its place."""
        return finish(kernel, self.axes, self.symmetric)


def _differences(first: Projection, second: Projection) -> str:
    """Say in what two projections differ."""
    names = ("kind", "dim", "seed", "shapes", "preconditioner")
    differ = [name for name in names if getattr(first, name) != getattr(second, name)]
    said = {"shapes": "its parameters differ in names or shapes", "preconditioner": "its preconditioner differs"}
    return ", ".join(
        said.get(name, f"{name} is {getattr(second, name)!r} instead of {getattr(first, name)!r}") for name in differ
    )


def projected_features(
    model: Model,
    x: Any,
    *,
    dim: int,
    projection: str = "kronecker",
    seed: int = 0,
    params: Params | None = None,
    output: Pick = None,
    preconditioner: Mapping[str, Tensor] | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
) -> ProjectedFeatures:
    """Project the Jacobian of each output of each sample on random directions.

    ``phi[n, c, j] = sum_p J[n, c, p] r[j, p] / sqrt(dim)``, with independent directions ``r[j]`` of uncorrelated
    entries, of variance one: inner products ``sum_j phi[n, c, j] phi[m, d, j]`` have the kernel as their mean, and an
    error that falls with the square root of ``dim``. Beside the exact kernel, they take N C dim numbers, whatever the
    number of parameters. TRAK (Park, Georgiev, Ilyas, Leclerc, Madry: "TRAK: Attributing Model Behavior at Scale",
    ICML 2023, section 3) attributes predictions to training data by such features.

    Jacobians are the exact ones of :func:`ggn_ntk.empirical_ntk`, verified alike, and are not formed where that is
    dearer: by ``"kronecker"``, each direction for a parameter is a product of a vector for its first axis and one for
    all others, and meets what a layer's Jacobian is the product of, its inputs and the derivatives of its outputs (as
    in LoGra: Choe et al.: "What is Your Data Worth to GPT?", 2024, section 3; there all pairs of a few vectors are
    taken, here each direction has vectors of its own, so that errors are independent: Rakhshan, Rabusseau: "Tensorized
    Random Projections", AISTATS 2020, section 4). Parameters without rules are projected from Jacobians of each sample.

    Calls with the same seed, for parameters of the same names and shapes, share directions, on every device and for
    every dtype. The model, its gradients, generators and all global settings are left as found.

    Args:
        model: The model, or a function, as for :func:`ggn_ntk.empirical_ntk`.
        x: N samples ``[N, ...]``, as for :func:`ggn_ntk.empirical_ntk`.
        dim: The number of directions, two at least.
        projection: ``"kronecker"``, or ``"dense"``: directions of independent signs. Errors of ``"kronecker"`` are
            larger, up to twice (the same for parameters with a single axis), and its cost far lower: it grows with the
            inputs and outputs of a layer instead of their product.
        seed: What directions are drawn from.
        params: The parameters to project, as for :func:`ggn_ntk.empirical_ntk`.
        output: Turns what the model returns into the tensor ``[N, *out]`` to differentiate.
        preconditioner: For each of these parameters, by name, a tensor of its shape of numbers ``d >= 0``: the kernel
            is then ``J diag(d) J^T``, say with the ``1 / (sqrt(v) + eps)`` of Adam. It is exact for either projection;
            with ``"kronecker"``, Jacobians or directions of parameters with several axes have to be formed.
        batch_size: How many samples to evaluate at once; ``None`` for what memory allows.
        memory: Bytes that the call may take beyond what is there, or text such as ``"8GiB"``; ``None`` for what the
            device has free.

    Returns:
        The features ``[N, *out, dim]``, in the widest dtype of the parameters, on their device, without a graph.

    Warns:
        RouteWarning: If a slower way is taken, with the reason.
        NotFiniteWarning: If Jacobians of some samples are infinite or NaN: their features are NaN.

    Raises:
        UnsupportedModelError: If the model has no exact kernel; lists every problem.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    _check_counts(dim=(dim, 2), batch_size=(1 if batch_size is None else batch_size, 1))
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(map(repr, PROJECTIONS))}, got {projection!r}.")
    if type(seed) is not int:
        raise TypeError(f"seed must be an integer, got {kind_of(seed)}.")
    if output is not None and not callable(output):
        raise TypeError(f"output must be a callable or None, got {kind_of(output)}.")
    # Each sample by itself, as in a diagonal of paired ones: what holds for their kernels holds for features.
    axes = AxesRequest.parse("diagonal", paired=True)
    request = Request.parse(
        model, x, None, axes, params=params, per_parameter=False, output=output, memory=memory, names=("x", "x")
    )
    roots, digest = _parse_preconditioner(preconditioner, request.params)
    shapes = tuple((name, p.shape) for name, p in request.params.items())
    described = Projection(projection, dim, seed, shapes, digest)

    def features(request: Request) -> tuple[Tensor, Computed]:
        with explained(lambda: f"features of {len(request.x1)} samples along {dim} directions", _HELP):
            return _features(request, described, roots, batch_size)

    found, _ = carry_out(request, features)
    assert isinstance(found, Tensor)
    return ProjectedFeatures(found, described)


def _features(
    request: Request, projection: Projection, roots: Mapping[str, Tensor], batch_size: int | None
) -> tuple[Tensor, Computed]:
    """Compute features, once it is known that there is room for them. Call it inside ``isolated(request.model)``."""
    # -> [N, *out, dim]
    problems = configuration_problems(request)
    if problems:
        raise UnsupportedModelError(problems)
    few = look(request)  # [few, *out]
    params, n = list(request.params.values()), len(request.x1)
    dtype = reduce(torch.promote_types, (p.dtype for p in params))
    size = n * few[0].numel() * projection.dim * dtype.itemsize
    if size > room(few.device):
        raise KernelMemoryError(f"Features alone take {shown(size)}, of {shown(room(few.device))}. {_HELP}")
    if batch_size is None and n > 1:  # a model may take one sample at a time
        batch_size = MemoryBudget.of(few.device).backpropagated // bytes_per_sample(request)
    blocks = split(n, batch_size or 1)
    found = features_of(request, Drawing(projection, request.params, roots), blocks)
    features = found.reshape(n, *few.shape[1:], projection.dim).to(dtype) / projection.dim**0.5
    return features, Computed(request.resolve(few.shape[1:], few.shape[1:]), ())


def _check_counts(**counts: tuple[Any, int]) -> None:
    """Refuse what is no integer, or below the least that is accepted."""
    for argument, (value, least) in counts.items():
        if type(value) is not int:
            raise TypeError(f"{argument} must be an integer, got {kind_of(value)}.")
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}.")


def _parse_preconditioner(given: Any, params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Check a preconditioner: the square roots of its entries by the names of parameters, and a digest."""
    if given is None:
        return {}, ""
    if not isinstance(given, Mapping):
        raise TypeError(f"preconditioner must be a mapping of names to tensors, or None, got {kind_of(given)}.")
    if given.keys() != params.keys():
        missing, others = params.keys() - given.keys(), given.keys() - params.keys()
        what = [
            f"{label} {listed(sorted(map(str, names)))}"
            for label, names in (("lacks", missing), ("also has", others))
            if names
        ]
        raise ValueError(
            f"preconditioner must have a tensor for each parameter that is projected; it {' and '.join(what)}."
        )
    digest = sha256()
    for name, p in params.items():
        d = given[name]
        if not isinstance(d, Tensor) or not d.is_floating_point():
            got = f"{d.dtype}" if isinstance(d, Tensor) else kind_of(d)
            raise TypeError(f"preconditioner[{name!r}] must be a tensor of real numbers, got {got}.")
        if d.shape != p.shape:
            raise ValueError(f"preconditioner[{name!r}] must have shape {list(p.shape)}, got {list(d.shape)}.")
        if not ((d >= 0) & d.isfinite()).all():
            raise ValueError(f"preconditioner[{name!r}] must hold finite numbers that are not negative.")
        digest.update(d.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return {name: given[name].detach().to(p.device).sqrt() for name, p in params.items()}, digest.hexdigest()
