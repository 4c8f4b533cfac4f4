"""Rules, tried on few samples: is each right, and is every use of a parameter found?

Both sides come from one forward pass, so that they differ by rounding alone.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.vector_products import norm_of_sketch, sketched, sketched_sum
from ggn_ntk.jacobians.autograd import pass_back, sums_of
from ggn_ntk.jacobians.backward import FAILS
from ggn_ntk.jacobians.layer_call import LayerCall, Recording
from ggn_ntk.jacobians.uses import Use
from ggn_ntk.models.autograd_graph import dense
from ggn_ntk.models.comparison import all_finite, coarsest, differing, norms, read
from ggn_ntk.models.gradients import gradients
from ggn_ntk.models.rounding import rounding_of
from ggn_ntk.problem.errors import NotFiniteError
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request

#: What is said of a parameter whose rule is wrong.
DIFFERS = "its Jacobian by its rule differs from autograd's"

# A sum over positions and uses cancels where the square of its norm is below this share of the sum of squares of its
# terms' norms: then products of terms round to so many times as much of the kernel.
_CANCELS = 1 / 30


class Trial(NamedTuple):
    """What rules make of few samples, beside autograd."""

    # Autograd's gradient of ``sum v f`` for each wanted parameter, by name (see :func:`sketched`)
    expected: dict[str, Tensor]
    failures: dict[str, str]  # why rules do not give the gradient of a parameter, by name
    cancelling: set[str]  # parameters whose gradient is far smaller than the terms that rules add up for it


def try_rules(
    request: Request,
    recording: Recording,
    calls: Sequence[LayerCall | Use],
    v: Tensor,
    tolerance: float,
    problems: dict[str, str],
    *,
    compare: bool,
) -> Trial:
    """Have rules write Jacobians, and compare them with autograd; ``problems`` are known beforehand."""
    # v [N, *out]; without a comparison, what rules write of the same samples is to be compared later
    failures = problems.copy()
    passed, expected = _gradients(request, recording, calls, v)
    if not all_finite(expected.values()):
        raise NotFiniteError
    sums = sums_of(calls, request.params, failures)
    jacobians: Jacobians = {}
    for call, s in zip(calls, passed, strict=True):
        if s is not None:
            jacobians |= call.add_to(sums, s.unsqueeze(0))
    for name, parts in jacobians.items():
        over = {part.sizes["n"] for part in parts}
        if over != {len(v)}:
            failures[name] = f"{FAILS} (its Jacobian is over {min(over)} samples instead of {len(v)})"
    written = {name: parts for name, parts in jacobians.items() if name not in failures}
    if compare:
        # Both sides are made of the same ``s``: of the whole graph's precisions, only those from there on count.
        dtypes = {v.dtype}.union(*(call.precisions for call in calls))
        tolerance, digit = min(tolerance, coarsest(dtypes)), max(torch.finfo(dtype).eps for dtype in dtypes)
        rounding = rounding_of(request, recording.inputs, v, sketched, digit=digit)
        actual = _weighted_sums(request, written, v) | {name: expected[name] for name in failures}
        for name, size in differing(actual, expected, tolerance, rounding).items():
            failures[name] = f"{DIFFERS} (relative error {size:.1e})"
    terms = {
        name: reduce(torch.add, map(Factored.squared_terms, parts))
        for name, parts in written.items()
        if len(parts) > 1 or parts[0].adds_up
    }
    return Trial(expected, failures, _cancelling(request, recording.inputs, v, expected, terms))


def _weighted_sums(request: Request, jacobians: Jacobians, v: Tensor) -> dict[str, Tensor]:
    """Compute the gradient of ``sum v f`` from Jacobians of ``sum_c v[n, c] f[n, c]``, :func:`sketched`."""
    weights = v.new_ones(1, len(v))
    return {
        name: reduce(torch.add, (sketched_sum(part, weights, request.params[name]) for part in parts))
        for name, parts in jacobians.items()
    }


def _cancelling(
    request: Request, inputs: Inputs, v: Tensor, expected: dict[str, Tensor], terms: dict[str, Tensor]
) -> set[str]:
    """Find the parameters for which the terms that rules add up cancel."""
    numbers = read([*(norm_of_sketch(expected[name], request.params[name]) for name in terms), *terms.values()])
    least = {name: _CANCELS * square for name, square in zip(terms, numbers[len(terms) :], strict=True)}
    found = [name for name, size in zip(terms, numbers, strict=False) if size**2 < least[name]]
    if not found:
        return set()
    # A sketch of few vectors may be short by chance, and to form a Jacobian for that would take long.
    _, exact = gradients(request, inputs, v)
    sizes = norms(exact[name] for name in found)
    return {name for name, size in zip(found, sizes, strict=True) if size**2 < least[name]}


def _gradients(
    request: Request, recording: Recording, calls: Sequence[LayerCall | Use], v: Tensor
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Compute gradients in a graph that is kept."""
    passed, found = pass_back(recording.output, calls, v, list(request.params.values()))
    gradients = zip(request.params.items(), found, strict=True)
    return passed, {name: sketched(torch.zeros_like(p) if g is None else dense(g), p) for (name, p), g in gradients}
