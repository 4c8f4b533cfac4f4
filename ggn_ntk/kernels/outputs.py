"""The empirical NNGP kernel ``f(x1) f(x2)^T``: how alike a network's outputs are at two inputs.

Its mean over initialisations is the covariance of the outputs, and in the limit of infinite width the kernel of the
Gaussian process that the network is (Lee, Bahri, Novak, Schoenholz, Pennington, Sohl-Dickstein: "Deep Neural Networks
as Gaussian Processes", ICLR 2018, section 2).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, einsum
from torch.nn import Module

from ggn_ntk.kernels.ntk import compute_kernels, parse_method
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import resolve_axes
from ggn_ntk.methods.computation import samples_at_once, session
from ggn_ntk.models.evaluation import evaluate_checked
from ggn_ntk.models.independence import compare_alone, look
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import configuration_problems, warn_of_statistics
from ggn_ntk.models.several import of_all_outputs
from ggn_ntk.problem.errors import NotFiniteWarning, Problem, UnsupportedModelError, listed, warn, without
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.result import EmpiricalKernels, finish
from ggn_ntk.process.progress import Progress, Wanted, counting
from ggn_ntk.process.transforms import outside_of_transforms

_KIND = "empirical NNGP kernel"


def nngp(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    params: Mapping[str, Any] | None = None,
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    memory: int | str | None = None,
    progress: Wanted = None,
) -> Tensor | dict[Any, Tensor]:
    """Compute the empirical NNGP kernel of a model.

    K[n, m, c, d] = f(x1_n)_c f(x2_m)_d. With outputs flattened, that of one network has rank one: average it over
    initialisations to estimate the covariance of the outputs. The model and all global settings are left as found.

    Args:
        model: Any module whose samples do not influence one another, in float32 or float64. It needs no parameter.
            Or a function, as for :func:`ggn_ntk.empirical_ntk`.
        x1: N1 samples ``[N1, ...]``, as for :func:`ggn_ntk.empirical_ntk`.
        x2: N2 samples like x1. ``None`` means x1, with a kernel that is exactly symmetric under
            ``(n, c) <-> (m, d)``.
        compute: ``"full"``, ``"diagonal"`` (entries with c = d) or ``"trace"`` (their sum over c).
        params: For a function the mapping of names to tensors that is its first argument; for a module, of which the
            kernel has no sum over parameters, ``None``.
        output: Turns what the model returns into the tensor ``[N, *out]`` to multiply, say ``lambda out: out.logits``;
            a pair, one for x1 and one for x2.
        trace_axes: Output axes to sum at equal indices, counted without the sample axis; negative ones count from
            the last.
        diagonal_axes: Output axes to take at equal indices.
        paired: Take x1[n] with x2[n] alone, or with itself where ``x2`` is ``None``: ``[N]`` stands for ``[N1, N2]``.
        interacting: Take the whole batch for one input, as for :func:`ggn_ntk.empirical_ntk`.
        memory: Bytes that the call may take beyond what is there, or text such as ``"8GiB"``; ``None`` for what the
            device has free, less a fifth. Samples are evaluated in blocks where all at once would take more than half.
        progress: A bar, for ``None`` on a terminal where it is expected to take over ten seconds; ``True``, ``False``,
            or a callable that is called with the numbers of blocks that are done and of all.

    Returns:
        ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]`` for a model with outputs ``[N, *out]``; with
        axes, ``[N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]``; of several outputs
        a dict of such kernels, as of :func:`ggn_ntk.empirical_ntk`. In the dtype of the model's output on its device,
        without a graph.

    Raises:
        UnsupportedModelError: If samples influence one another, or the output is random or no tensor.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    if isinstance(model, Module) and params is not None:
        raise TypeError("params goes with functions alone: the NNGP kernel of a module has no sum over parameters.")
    axes = AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired, interacting=interacting)
    request = Request.parse(
        model, x1, x2, axes, params=params, per_parameter=False, output=output, memory=memory, progress=progress
    )
    with without(_KIND):
        return of_all_outputs(request, _multiply_outputs)


def empirical_kernels(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Params | None = None,
    check: bool = False,
    capture: str = "auto",
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    memory: int | str | None = None,
    progress: Wanted = None,
) -> EmpiricalKernels:
    """Compute the empirical NTK and the empirical NNGP kernel of a model.

    The NNGP kernel is made of the outputs that the route to the NTK has evaluated, where these are all samples'.

    Args:
        model: See :func:`ggn_ntk.empirical_ntk`, as for all arguments here.
        x1: N1 samples.
        x2: N2 samples; ``None`` for x1.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``, of both kernels.
        method: The route to the NTK.
        params: The parameters that the NTK sums over.
        check: Compare a block of the NTK with an independent computation.
        capture: How the structured route takes the model apart.
        output: Turns what the model returns into the tensor ``[N, *out]`` of which both kernels are; a pair, one for x1
            and one for x2.
        trace_axes: Output axes to sum at equal indices, in both kernels.
        diagonal_axes: Output axes to take at equal indices, in both kernels.
        paired: Take x1[n] with x2[n] alone, or with itself where ``x2`` is ``None``: ``[N]`` stands for ``[N1, N2]``.
        interacting: Take the whole batch for one input, as for :func:`ggn_ntk.empirical_ntk`.
        memory: Bytes that the call may take beyond what is there and the NNGP kernel, which is as large as the NTK.
        progress: How to show what is done.

    Returns:
        Both kernels, each ``[N1, N2, *out, *out]``, ``[N1, N2, *out]`` or ``[N1, N2]``, or as the axes say; of several
        outputs, a dict of such kernels each.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        NTKMismatchError: If ``check`` finds a difference above rounding.
        KernelMemoryError: If memory does not suffice, before work starts where that is known.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted.
    """
    axes = AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired, interacting=interacting)
    request = Request.parse(
        model,
        x1,
        x2,
        axes,
        params=params,
        per_parameter=False,
        capture=capture,
        output=output,
        memory=memory,
        progress=progress,
    )
    wanted = parse_method(method, check, capture)

    def both(request: Request) -> EmpiricalKernels:
        with outside_of_transforms(), isolated(request.model):
            ntk, computed = compute_kernels(request, wanted, check)
            evaluated = list(map(len, computed.outputs)) == [len(batch.inputs) for batch in request.batches]
            return EmpiricalKernels(ntk, _multiply_outputs(request, computed.outputs if evaluated else None))

    return of_all_outputs(request, both)


def outputs_and_nngp(model: Model, x: Any, *, params: Params | None, output: Pick, **axes: Any) -> tuple[Tensor, Any]:
    """Evaluate a model, and compute the NNGP kernel of the same outputs."""
    # -> [N, *out], [N, N, ...]
    request = Request.parse(
        model, x, None, AxesRequest.parse(**axes), params=params, per_parameter=False, output=output
    )
    with outside_of_transforms(), isolated(request.model), torch.no_grad(), without(_KIND):
        (outputs,) = _checked_outputs(request)
        return outputs, _multiply_outputs(request, [outputs])


def _multiply_outputs(request: Request, outputs: Sequence[Tensor] | None = None) -> Tensor | dict[Any, Tensor]:
    """Compute an NNGP kernel, from outputs of each batch where they have been evaluated."""
    # outputs [N, *out]
    described = f"the NNGP kernel of {sum(request.sizes)} samples"
    with session(request, described), torch.no_grad(), without(_KIND):
        if outputs is None:
            outputs = _checked_outputs(request)
            warn_of_statistics(request.model)
        axes = request.resolve(outputs[0].shape[1:], outputs[-1].shape[1:])
        pairs = zip(axes, request.sides(outputs), strict=True)
        first, second = (side.arrange(f.reshape(len(f), -1)) for side, f in pairs)  # [N, E, F, T]
        kernel = einsum("necf,nedf->necd" if axes.paired else "necf,medf->nmecd", first, second)
        infinite = [~f.isfinite().reshape(len(f), -1).all(1) for f in outputs]
        if any(map(torch.any, infinite)):
            _fill(kernel, request, infinite)
        return request.by_key(finish(kernel, axes, request.symmetric))


def _fill(kernel: Tensor, request: Request, infinite: Sequence[Tensor]) -> None:
    """Put NaN into the rows and columns of samples whose outputs are not finite."""
    # infinite [N] of each batch
    rows, columns = request.sides(infinite)
    kernel[rows] = torch.nan
    kernel.movedim(len(request.sample_axes) - 1, 0)[columns] = torch.nan
    names = listed(request.labels(infinite))
    warn(f"Outputs of {names} are not finite: their rows and columns of the kernel are NaN.", NotFiniteWarning)


def _checked_outputs(request: Request) -> list[Tensor]:
    """Evaluate a model, and raise unless its outputs are a function of one sample each."""
    # -> [N, *out] of each batch
    # The check wants something to differentiate, and an NNGP kernel needs no parameter: let it have the inputs.
    problems = configuration_problems(replace(request, params=request.x1.tensors))
    if problems:
        raise UnsupportedModelError(problems)
    few = [look(batch) for batch in request.batches]
    resolve_axes(replace(request, params={"": few[0]}), few)  # a kernel that cannot fit is refused
    parts = list(map(_parts, request.batches))
    with counting(sum(map(len, parts))) as progress:
        outputs = [_checked_parts(of, f.shape[1:], progress) for of, f in zip(parts, few, strict=True)]
    if not any(output.isfinite().any() for output in outputs):
        raise UnsupportedModelError(
            [Problem("", "its outputs are not finite", "Look for overflow in its weights and inputs")]
        )
    return outputs


def _parts(request: Request) -> list[Request]:
    """Divide the samples of a batch into blocks, where the evaluation of all may take more memory than there is."""
    size = samples_at_once(request)
    if size >= len(request.inputs):
        return [request]
    return [side.part(block) for side in request.apart for block in split(len(side.x1), size)]


def _checked_parts(parts: Sequence[Request], shape: Size, progress: Progress) -> Tensor:
    """Evaluate blocks of samples, and compare each sample with itself alone."""
    # shape [*out] -> [N, *out]
    outputs = []
    for part in parts:
        outputs.append(evaluate_checked(part, part.inputs, shape))
        compare_alone(part, part.inputs, outputs[-1])
        progress.add()
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
