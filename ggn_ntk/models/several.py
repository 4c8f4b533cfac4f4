"""What a model returns, looked at: is it a tensor, or several that can all be outputs?"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ggn_ntk.models.comparison import TOLERANCES, cotangent, total_norm
from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.models.gradients import gradients_of
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.errors import NoTensorError, kind_of
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.several import Output, Several, entries_by_key
from ggn_ntk.process.transforms import outside_of_transforms

_T = TypeVar("_T")

# No output is multiplied by more than two to this power, for the range of float32.
_MOST = 40


def of_all_outputs(request: Request, answer: Callable[[Request], _T]) -> _T:
    """Answer a request; for a model that returns several tensors, with all of them as outputs."""
    try:
        return answer(request)
    except NoTensorError as error:
        joined = _joined(request, error)
    return answer(joined)


def _joined(request: Request, error: NoTensorError) -> Request:
    """Let outputs of a model be joined; raise the error that it is no tensor which it returns, where they cannot be."""
    with outside_of_transforms(), isolated(request.model), torch.enable_grad():
        few = [b.inputs if b.inputs.whole else b.inputs[[0, len(b.inputs) - 1]] for b in request.batches]  # two
        returned = [evaluate(b, None, x) for b, x in zip(request.batches, few, strict=True)]
    tensors = [isinstance(found, Tensor) for found in returned]
    if any(tensors) and not all(tensors):
        first, second = map(kind_of, returned)
        raise ValueError(
            f"What is returned must be a tensor for both x1 and x2, or several for both, got {first} and {second}: "
            "pass output=."
        )
    entries = [entries_by_key(found) for found in returned]
    for found, inputs in zip(entries, few, strict=True):
        if not found:
            raise error
        for key, x in found.items():
            why = _why_not(x, found, inputs.count)
            if why:
                raise NoTensorError.of(returned[0], f"the one at {key!r} {why}")
    outputs = [_outputs(batch, found) for batch, found in zip(request.batches, entries, strict=True)]
    if outputs[0].keys() == outputs[-1].keys():
        outputs[-1] = {key: outputs[-1][key] for key in outputs[0]}  # in one order
    picks = [Several(batch.output, found) for batch, found in zip(request.batches, outputs, strict=True)]
    return replace(request, outputs=(picks[0], picks[-1]))


def _outputs(request: Request, entries: dict[Any, Tensor]) -> dict[Any, Output]:
    """Take down the shapes of outputs, and what brings their gradients to one size, where these are finite."""
    # A difference is looked for among the numbers of all outputs: in one far smaller than others it would not show.
    gradients = {key: gradients_of(x, cotangent(x, 0), request.params, retain_graph=True) for key, x in entries.items()}
    sizes = {key: total_norm(found.values()) for key, found in gradients.items()}
    usual = {key: size for key, size in sizes.items() if 0 < size < math.inf}
    largest = max(usual.values(), default=1.0)
    powers = {key: round(math.log2(largest / usual.get(key, largest))) for key in entries}
    return {key: Output(x.shape[1:], 2.0 ** min(_MOST, powers[key])) for key, x in entries.items()}


def _why_not(x: Any, entries: dict[Any, Any], n: int) -> str:
    """Say why something that a model returns for N samples is no output; empty where it is one."""
    if not isinstance(x, Tensor):
        return f"is a {kind_of(x)}"
    if x.dtype not in TOLERANCES:
        return f"is {x.dtype}"
    if x.shape[:1] != (n,) or not x.numel():
        return f"has shape {list(x.shape)} for {n} samples"
    others = [y for y in entries.values() if isinstance(y, Tensor)]
    if not x.requires_grad and any(y.requires_grad for y in others):
        return "depends on no parameter"
    dtypes = {y.dtype for y in others if y.dtype in TOLERANCES}
    return f"is {x.dtype}, and another is not" if len(dtypes) > 1 else ""
