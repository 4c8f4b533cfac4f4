"""Transforms of ``torch.func``: those inside of which a call is made, and models that differentiate inside of ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from ggn_ntk.process.switches import WITHOUT_WARNINGS
from ggn_ntk.process.torch_internals import (
    WRONG_IF_BATCHED,
    as_sample,
    is_differentiated,
    is_sample,
    is_wrapped_tensor,
    may_require_gradients,
    sample_axis,
    samples_behind,
    transform_level,
    without_innermost,
    without_transforms,
)


def is_transformed() -> bool:
    """Tell whether a transform is under way, inside of which tensors are wrapped."""
    return transform_level() is not None


def is_wrapped(x: Any) -> bool:
    """Tell whether a value is a tensor that a transform has wrapped."""
    return isinstance(x, Tensor) and is_wrapped_tensor(x)


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Leave transforms that are under way: a model that is being transformed may ask for the kernel of another."""
    with without_transforms() if is_transformed() else nullcontext():
        yield


def batched_gradients(
    outputs: Tensor | GradientEdge, inputs: Sequence[Any], cotangents: Tensor, *, allow_unused: bool = False
) -> tuple[Any, ...]:
    """Pass several cotangents back at once, and keep the graph; raises a RuntimeError where ``vmap`` cannot."""
    # cotangents [K, *output] -> each [K, *input]
    wrong = WRONG_IF_BATCHED.intersection(_names_behind(outputs))
    if wrong:
        raise RuntimeError(f"vmap gets gradients of {', '.join(wrong)} wrong.")
    # is_grads_batched=True would take torch's older vmap, which loops over the cotangents at most operations.
    unused: list[bool] = []

    def passed(cotangent: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True, allow_unused=allow_unused)
        unused[:] = [gradient is None for gradient in found]
        return tuple(gradient for gradient in found if gradient is not None)

    with WITHOUT_WARNINGS:
        found = iter(vmap(passed, randomness="same")(cotangents))
    return tuple(None if is_unused else next(found) for is_unused in unused)


def _names_behind(output: Tensor | GradientEdge) -> set[str]:
    """List the names of all nodes behind an output."""
    start = output.grad_fn if isinstance(output, Tensor) else output.node
    seen, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        new = [] if node is None else [other for other, _ in node.next_functions if other not in seen]
        seen.update(new)
        waiting += new
    return {node.name() for node in seen if node is not None}


class AutogradInside(TorchFunctionMode):
    """Lets a model that is transformed call ``torch.autograd.grad``, say for the residual of a differential equation.

    Torch refuses this inside of its transforms. But a tensor that stands for one sample is one of all samples with a
    graph of its own, and those that ``jacrev`` or ``jvp`` follow have one as well.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out a function."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad and is_transformed():
            return _grad(*args, **kwargs)
        if func is Tensor.requires_grad_:
            return _require_grad(*args, **kwargs)
        return func(*args, **kwargs)


def _require_grad(x: Tensor, requires_grad: bool = True) -> Tensor:
    """Let gradients with respect to a tensor be computed."""
    if is_sample(x):
        with without_innermost():
            _require_grad(samples_behind(x), requires_grad)
        return x
    with may_require_gradients(True) if is_differentiated(x) else nullcontext():
        return x.requires_grad_(requires_grad)


def _grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    is_grads_batched: bool = False,
    **kwargs: Any,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of each sample, as ``torch.autograd.grad`` does."""
    ys, xs = (list((t,) if isinstance(t, Tensor) else t) for t in (outputs, inputs))
    given: Sequence[Tensor | None] = (grad_outputs,) if isinstance(grad_outputs, Tensor) else grad_outputs or ()
    if is_grads_batched:  # torch maps over them by an older vmap, which does not go with transforms
        rows = [
            _grad(ys, xs, vectors, True, create_graph, **kwargs)
            for vectors in zip(*(v.unbind() for v in given if v is not None), strict=True)
        ]
        return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))
    if not any(isinstance(t, Tensor) and is_sample(t) for t in (*ys, *xs)):
        return torch.autograd.grad(ys, xs, grad_outputs, retain_graph, create_graph, **kwargs)
    if not all(map(is_sample, xs)):
        raise RuntimeError("autograd.grad with respect to what samples share cannot be computed inside of vmap.")
    cotangents = [
        _like_all(torch.ones_like(y) if v is None and y.ndim == 0 else v, y)
        for y, v in zip(ys, given or [None] * len(ys), strict=True)
    ]
    level, axes = transform_level(), list(map(sample_axis, xs))
    assert level is not None
    with without_innermost():
        found = _grad(list(map(_behind, ys)), list(map(_behind, xs)), cotangents, retain_graph, create_graph, **kwargs)
    return tuple(None if g is None else as_sample(g, axis, level) for g, axis in zip(found, axes, strict=True))


def _behind(x: Tensor) -> Tensor:
    """Look up the tensor of all samples, if one stands for a sample."""
    return samples_behind(x) if is_sample(x) else x


def _like_all(v: Tensor | None, y: Tensor) -> Tensor | None:
    """Bring the cotangent of an output of one sample to the form of the tensor of all samples."""
    if v is None or not is_sample(y):
        return v
    whole, axis = samples_behind(y), sample_axis(y)
    behind = samples_behind(v).movedim(sample_axis(v), axis) if is_sample(v) else v.unsqueeze(axis)
    return behind.expand_as(whole)
