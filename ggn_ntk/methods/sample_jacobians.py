"""Jacobians sample by sample, by ``torch.func`` or plain autograd, of which the oracle makes kernels.

Letters in shapes: N samples, C outputs, P entries of a parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jacrev

from ggn_ntk.methods.second_derivatives import check_derivatives, have_right_derivatives
from ggn_ntk.models.comparison import KINKS, difference, differing, is_coarse
from ggn_ntk.models.evaluation import evaluate, leaves_of, primals_of, with_graph
from ggn_ntk.models.gradients import Parts, gradients, gradients_of
from ggn_ntk.models.independence import Checked, compare_gradients
from ggn_ntk.models.rounding import finest, rounding_of
from ggn_ntk.problem.errors import (
    RouteWarning,
    UnsupportedModelError,
    is_bug,
    is_out_of_memory,
    listed,
    warn,
)
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request


def all_jacobians(request: Request, checked: Sequence[Checked]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the Jacobians of x1 and x2, given what is known of each batch."""
    # -> [N, C, P]
    found = [j for batch, known in zip(request.batches, checked, strict=True) for j in _of_batch(batch, known)]
    return found[0], found[-1]


def _of_batch(request: Request, checked: Checked) -> list[dict[str, Tensor]]:
    """Compute the Jacobians of a batch's x1 and x2, by ``vmap`` where it gets all samples right."""
    # -> [N, C, P]
    sets, plain = request.sets, request.detached()
    try:
        found = [jacobians_by_vmap(request, x) for x in sets]
        # They are wrong where the model keeps references to parameters elsewhere than in its modules, and for some
        # layers in some releases (PReLU in torch 2.6).
        why = "" if _hold_for_all(plain, _detached(found), checked) else "it gets some samples wrong"
        if request.graph is not None and not why and not have_right_derivatives(plain, jacobians_by_vmap, checked):
            why = "it gets second derivatives wrong"
    except UnsupportedModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_bug(error):
            raise
        why = first_line(error)
    if why:
        what = f"Jacobians of {listed(request.params)} come from a loop over samples and outputs: exact, but slower"
        warn(f"{what}, since torch.func does not go through the model ({why}).", RouteWarning)
        found = [jacobians_by_loop(request, x) for x in sets]
        _compare_with_batch(plain, _detached(found), checked)
        if request.graph is not None:
            check_derivatives(plain, jacobians_by_loop, checked)
    return found


def _detached(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Take Jacobians out of their graphs."""
    return [{name: jacobian.detach() for name, jacobian in jacobians.items()} for jacobians in found]


def first_line(error: Exception) -> str:
    """Name an error's type, with the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def sample_output(request: Request, primals: dict[str, Tensor], sample: Inputs) -> Tensor:
    """Evaluate the model on one sample, without a sample axis."""
    # sample [...] -> [C]
    output: Tensor = evaluate(request, primals, sample.map(lambda x: x.unsqueeze(0)))
    return output.flatten()


def jacobians_by_vmap(request: Request, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the Jacobians of all samples by ``vmap``, by name."""
    # -> [N, C, P]
    jacobian = jacrev(lambda primals, sample: sample_output(request, primals, sample))
    primals = primals_of(request)
    jacobians = inputs.over_samples(lambda x: jacobian(primals, x), chunk_size=request.chunk_size)
    return {name: j.reshape(*j.shape[:2], -1) for name, j in jacobians.items()}


def _hold_for_all(request: Request, found: list[dict[str, Tensor]], checked: Checked) -> bool:
    """Tell whether Jacobians of all samples add up to the gradient by plain autograd."""
    # found [N, C, P]
    inputs = request.inputs
    rounding, expected = rounding_of(request, inputs, checked.v), {name: checked.gradient[name] for name in found[0]}
    if not differing(_summed(request, found, checked), expected, checked.tolerance, rounding):
        return True
    if not is_coarse(checked.tolerance):
        return False
    # Rounding may have taken a unit of a sample to the other side of a kink. So each sample is looked at by itself, at
    # which an error of a few samples is far larger than what kinks do.
    finer, tolerance = finest(request)
    each = [(jacobians, n) for jacobians in found for n in range(_length(jacobians))]
    for i, (jacobians, n) in enumerate(each):
        sample, v = inputs[[i]], checked.v[[i]]
        of_sample = {name: j[n : n + 1] for name, j in jacobians.items()}
        if not _agrees(request, of_sample, sample, v, KINKS):
            return False
        if not _agrees(finer, jacobians_by_vmap(finer, sample), sample, v, tolerance):
            return False
    _compare_with_batch(request, found, checked)
    return True


def _agrees(request: Request, jacobians: dict[str, Tensor], sample: Inputs, v: Tensor, tolerance: float) -> bool:
    """Tell whether the Jacobian of one sample gives the gradient by plain autograd."""
    # jacobians [1, C, P], v [1, *out]
    v = v.double() if request.widened else v
    _, expected = gradients(request, sample, v)
    products = {name: (v.flatten().to(j.dtype) @ j[0]).view_as(expected[name]) for name, j in jacobians.items()}
    return difference(products, expected).within(tolerance)


def _summed(request: Request, found: list[dict[str, Tensor]], checked: Checked) -> dict[str, Tensor]:
    """Compute ``sum v J`` over all samples from their Jacobians, by name."""
    # -> [*parameter]
    v = checked.v.reshape(len(checked.v), -1)
    of_sets = v.split(list(map(_length, found)))
    sums = {name: torch.zeros_like(p.detach()).flatten() for name, p in request.params.items()}
    for w, jacobians in zip(of_sets, found, strict=True):
        sums = {name: total + w.flatten().to(total) @ jacobians[name].flatten(0, 1) for name, total in sums.items()}
    return {name: total.view(request.params[name].shape) for name, total in sums.items()}


def _length(jacobians: dict[str, Tensor]) -> int:
    """Count the samples of Jacobians."""
    return len(next(iter(jacobians.values())))


def _compare_with_batch(request: Request, found: list[dict[str, Tensor]], checked: Checked) -> None:
    """Raise unless Jacobians of samples by themselves add up to the gradient in one batch."""
    alone = Parts([[i] for i in range(len(checked.v))], checked.outputs, _summed(request, found, checked))
    expected = {name: checked.gradient[name] for name in request.params}
    compare_gradients(request, request.inputs, checked.v, expected, alone, checked.tolerance)


def jacobians_by_loop(request: Request, inputs: Inputs) -> dict[str, Tensor]:
    """Compute the Jacobians of all samples with plain autograd, one after the other."""
    # -> [N, C, P]
    rows = [_autograd_jacobian(request, inputs[i : i + 1]) for i in range(len(inputs))]
    return {name: torch.stack([row[name] for row in rows]) for name in request.params}


def _autograd_jacobian(request: Request, sample: Inputs) -> dict[str, Tensor]:
    """Compute one sample's Jacobian with plain autograd, output by output."""
    # -> [C, P]
    leaves, again = leaves_of(request) if request.widened else None, request.graph
    output, params = evaluate(request, leaves, sample).flatten(), leaves or with_graph(request, request.params)
    rows = [
        gradients_of(entry, torch.ones_like(entry), params, retain_graph=True, create_graph=again is not None)
        for entry in output
    ]
    return {name: torch.stack([row[name].flatten() for row in rows]) for name in request.params}
