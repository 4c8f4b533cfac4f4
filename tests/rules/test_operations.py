"""Each operation that rules know, as autograd's graph has it: Jacobians through it are autograd's, sample by sample."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial, reduce
from typing import NamedTuple

import pytest
import torch
from conftest import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F

from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.problem.errors import NotCapturedError
from ggn_ntk.process.torch_internals import _OPERATIONS, output_metadata
from ggn_ntk.rules.flow import Flow, SampleAxis
from ggn_ntk.rules.linear_map import Operation

aten = torch.ops.aten


def _batch_norm_backward(x, s, weight, mean, var, result1, result2, eps, *_):
    return aten.native_batch_norm_backward(s, x, weight, mean, var, result1, result2, True, eps, [True] * 3)


# What only GPUs compute; autograd's nodes of these operations are torch's own all the same.
_library = torch.library.Library("aten", "IMPL")
_library.impl("cudnn_batch_norm", lambda *args: (*aten.native_batch_norm(*args), torch.empty(0)), "CPU")
_library.impl("miopen_batch_norm", lambda *args: aten.native_batch_norm(*args), "CPU")
for _name in ("cudnn", "miopen"):
    _library.impl(f"{_name}_batch_norm_backward", _batch_norm_backward, "CPU")

C, N = 3, 2

# How often the samples take turns along their axis, and how many entries of one follow one another.
LAYOUTS = {"samples": (1, 1), "rows_of_each": (1, 3), "in_turns": (3, 1), "both": (2, 2)}


def p(*shape: int) -> nn.Parameter:
    """A parameter, positive so that roots and logarithms exist."""
    return nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(*shape: int) -> Tensor:
    return torch.randint(5, shape)


class Use(NamedTuple):
    """An operation in which parameters meet the samples."""

    name: str
    function: Callable[[int], Tensor]  # of the number of entries along the axis of the samples
    axis: int | None = 0  # ``None`` if the output is all about one sample
    entries: int = 1  # of the axis that follow one another, beside those of the layout


USES = [
    Use("AddmmBackward0", lambda r: F.linear(x(r, 4), p(5, 4), p(5))),
    Use("AddmmBackward0", lambda r: torch.addmm(p(5), x(r, 4), p(4, 5), beta=0.5, alpha=2)),
    Use("AddmmBackward0", lambda r: torch.addmm(p(4, 1), p(4, 3), x(3, r)), axis=1),
    Use("AddmvBackward0", lambda r: torch.addmv(p(1), x(r, 4), p(4), beta=0.5, alpha=2)),
    Use("AddmvBackward0", lambda r: torch.addmv(p(4), p(4, 3), x(3)), axis=None),
    Use("BaddbmmBackward0", lambda r: torch.baddbmm(p(5), x(2, r, 3), p(2, 3, 5), beta=0.5, alpha=2), axis=1),
    Use("BaddbmmBackward0", lambda r: torch.baddbmm(p(2, 4, 1), p(2, 4, 3), x(2, 3, r)), axis=2),
    Use("BaddbmmBackward0", lambda r: torch.baddbmm(p(1, 2, 1), x(r, 2, 3), p(3, 5).expand(r, 3, 5))),
    Use("BmmBackward0", lambda r: torch.bmm(x(2, r, 3), p(2, 3, 5)), axis=1),
    Use("BmmBackward0", lambda r: torch.bmm(p(2, 4, 3), x(2, 3, r)), axis=2),
    Use("BmmBackward0", lambda r: torch.bmm(p(1, 4, 3).expand(r, 4, 3), x(r, 3, 1))),
    Use("DotBackward0", lambda r: torch.dot(x(4), p(4)), axis=None),
    Use("DotBackward0", lambda r: torch.dot(p(1), x(1)), axis=None),
    Use("MmBackward0", lambda r: x(r, 4) @ p(4, 5)),
    Use("MmBackward0", lambda r: x(r, 1) @ p(1, 5)),
    Use("MmBackward0", lambda r: p(5, 4) @ x(4, r), axis=1),
    Use("MmBackward0", lambda r: F.linear(x(1, 4), p(5, 4)), axis=None),
    Use("MvBackward0", lambda r: x(r, 4) @ p(4)),
    Use("MvBackward0", lambda r: p(5, 4) @ x(4), axis=None),
    Use("TrilinearBackward0", lambda r: F.bilinear(x(r, 3), x(r, 4), p(5, 3, 4))),
    Use("ConvolutionBackward0", lambda r: F.conv1d(x(r, 2, 7), p(3, 2, 3), p(3), stride=2)),
    Use("ConvolutionBackward0", lambda r: F.conv2d(x(r, 4, 5, 6), p(6, 2, 3, 2), p(6), padding=(1, 0), groups=2)),
    Use("ConvolutionBackward0", lambda r: F.conv2d(x(r, 2, 5, 5), p(18).view(1, 2, 3, 3).repeat(3, 1, 1, 1))),
    Use("ConvolutionBackward0", lambda r: F.conv3d(x(r, 1, 3, 3, 4), p(2, 1, 2, 2, 2), p(2), dilation=(1, 1, 2))),
    Use(
        "ConvolutionBackward0",
        lambda r: F.conv_transpose2d(x(r, 4, 3, 3), p(4, 3, 3, 3), p(6), 2, padding=1, output_padding=1, groups=2),
    ),
    Use("EmbeddingBackward0", lambda r: F.embedding(ids(r), p(5, 2))),
    Use("EmbeddingBackward0", lambda r: F.embedding(ids(r, 3), p(5, 2), padding_idx=1)),
    Use("EmbeddingBackward0", lambda r: F.embedding(ids(3, r, 2), p(5, 2)), axis=1),
    *(
        Use("EmbeddingBagBackward0", lambda r, mode=mode: F.embedding_bag(ids(r, 3), p(5, 2), mode=mode, padding_idx=1))
        for mode in ("sum", "mean", "max")
    ),
    Use(
        "EmbeddingBagBackward0",
        lambda r: F.embedding_bag(ids(r, 3), p(5, 2), mode="sum", per_sample_weights=x(r, 3)),
    ),
    *(
        Use(
            "NativeBatchNormBackward0",
            lambda r, on=on: F.batch_norm(x(r, 3, 4), x(3), x(3).exp(), p(3), p(3), training=on),
        )
        for on in (True, False)
    ),
    *(
        Use(
            f"{library.capitalize()}BatchNormBackward0",
            lambda r, on=on, library=library: getattr(aten, f"{library}_batch_norm")(
                x(r, 3, 4), p(3), p(3), x(3), x(3).exp(), on, 0.1, 0.1
            )[0],
        )
        for library in ("cudnn", "miopen")
        for on in (True, False)
    ),
    Use("NativeBatchNormBackward0", lambda r: F.instance_norm(x(3, 2, 4), weight=p(2), bias=p(2)), axis=None),
    Use("NativeGroupNormBackward0", lambda r: F.group_norm(x(r, 4, 3, 2), 2, p(4), p(4))),
    Use("NativeLayerNormBackward0", lambda r: F.layer_norm(x(r, 3, 4), (3, 4), p(3, 4), p(3, 4))),
    Use("NativeLayerNormBackward0", lambda r: F.layer_norm(x(3, r, 4), (4,), p(4), p(4)), axis=1),
    Use("PreluKernelBackward0", lambda r: F.prelu(x(r, 3, 2), p(3))),
    Use("PreluKernelBackward0", lambda r: F.prelu(x(r, 3), p(1))),
    Use("AddBackward0", lambda r: torch.add(x(r, 3), p(3), alpha=2)),
    Use("AddBackward0", lambda r: torch.add(p(3, 1), x(2, 3, r), alpha=2), axis=2),
    Use("AddBackward0", lambda r: x(3, r, 2) + p(3, 1, 1), axis=1),
    Use("AddBackward0", lambda r: x(r, 3) + p()),
    Use("AddcmulBackward0", lambda r: torch.addcmul(p(3), x(r, 3), p(1), value=2)),
    Use("AddcmulBackward0", lambda r: torch.addcmul(x(3, r), p(3, 1), x(3, r)), axis=1),
    Use("DivBackward0", lambda r: x(r, 3) / p(3)),
    Use("DivBackward0", lambda r: p(3, 1) / x(3, r), axis=1),
    Use("DivBackward0", lambda r: 2 * x(r, 3) / p(1)),
    Use("ExpandBackward0", lambda r: p(3).expand(r, 3)),
    Use("ExpandBackward0", lambda r: p(3, 1, 2).expand(2, 3, r, 2), axis=2),
    Use("MaskedFillBackward0", lambda r: p(3).masked_fill(x(r, 3) > 0, 2.0)),
    Use("MaskedFillBackward0", lambda r: p(3, 1).masked_fill(x(3, r) > 0, 2.0), axis=1),
    Use("MulBackward0", lambda r: x(r, 5, 3) * p(5, 1)),
    Use("MulBackward0", lambda r: p(5, 1, 1) * x(5, r, 3), axis=1),
    Use("MulBackward0", lambda r: p() * x(r)),
    Use("RepeatBackward0", lambda r: p(1, 3).repeat(r, 2)),
    Use("RepeatBackward0", lambda r: p(4).repeat(r, 1)),
    Use("RepeatBackward0", lambda r: p(3, 2).repeat(2, 1, r), axis=2, entries=2),
    Use("SubBackward0", lambda r: torch.sub(x(r, 3), p(3), alpha=2)),
    Use("SubBackward0", lambda r: torch.sub(p(3, 1), x(3, r), alpha=2), axis=1),
    Use("WhereBackward0", lambda r: torch.where(x(r, 3) > 0, p(3), p(3))),
    Use("WhereBackward0", lambda r: torch.where(x(3, r) > 0, x(3, r), p(3, 1)), axis=1),
]

# Operations on parameters alone, by name.
WEIGHTS: dict[str, list[Callable[[], Tensor]]] = {
    "AddBackward0": [lambda: torch.add(p(3, 4), p(4), alpha=2)],
    "AddmmBackward0": [lambda: torch.addmm(p(4), p(3, 2), p(2, 4))],
    "AddcmulBackward0": [lambda: torch.addcmul(p(3, 4), p(3, 1), p(4), value=2)],
    "BmmBackward0": [lambda: torch.bmm(p(2, 3, 2), p(2, 2, 4))],
    "DivBackward0": [lambda: p(3, 4) / p(4), lambda: p(3, 4) / 3],
    "MmBackward0": [lambda: p(3, 2) @ p(2, 4)],
    "MulBackward0": [lambda: p(3, 1) * p(4), lambda: 0.3 * p(3, 4), lambda: p(3, 4) * p(3, 4)],
    "MvBackward0": [lambda: p(3, 4) @ p(4)],
    "ExpandBackward0": [lambda: p(3, 1).expand(3, 4), lambda: p(1).expand(4)],
    "MaskedFillBackward0": [lambda: p(3, 4).masked_fill(x(3, 4) > 0, 2.0)],
    "RepeatBackward0": [lambda: p(2).repeat(3, 2), lambda: p(1, 3).repeat(2, 1), lambda: p(2, 3).repeat(2, 2)],
    "RsubBackward1": [lambda: 1 - p(3, 4), lambda: torch.rsub(p(3), 1, alpha=2)],
    "SubBackward0": [lambda: torch.sub(p(3, 4), p(3, 1), alpha=2), lambda: p(3) - 0.3],
    "WhereBackward0": [lambda: torch.where(x(3, 4) > 0, p(3, 4), p(4))],
    "CloneBackward0": [lambda: p(3, 4).clone(), lambda: p(3, 4).t().contiguous()],
    "ToCopyBackward0": [lambda: nn.Parameter(p(3, 4).float()).double()],
    "AliasBackward0": [lambda: aten.alias(p(3, 4))],
    "ClampBackward1": [lambda: p(3, 4).clamp(0.8, 1.2), lambda: p(4).clamp(min=1)],
    "ClampMaxBackward0": [lambda: p(3, 4).clamp_max(1)],
    "ClampMinBackward0": [lambda: p(3, 4).clamp_min(1)],
    "NegBackward0": [lambda: -p(3, 4)],
    "PowBackward0": [lambda: p(3, 4) ** 3, lambda: p(4).square()],
    "SoftplusBackward0": [lambda: F.softplus(p(3, 4), beta=2)],
    **{
        f"{name.capitalize()}Backward0": [lambda name=name: getattr(p(3, 4), name)()]
        for name in (
            "abs",
            "cos",
            "exp",
            "expm1",
            "log",
            "reciprocal",
            "relu",
            "rsqrt",
            "sigmoid",
            "sin",
            "sqrt",
            "tanh",
        )
    },
    "LinalgVectorNormBackward0": [
        lambda: F.normalize(p(3, 4)),
        lambda: p(2, 3, 4).norm(dim=(0, 2)),
        lambda: p(3).norm(),
    ],
    "MeanBackward0": [lambda: p(3, 4) - p(3, 4).mean()],
    "MeanBackward1": [lambda: p(3, 4).mean(-1), lambda: p(2, 3, 4).mean((0, 1), keepdim=True)],
    "StdBackward0": [lambda: p(3, 4).std(1), lambda: p(4) / p(4).std()],
    "SumBackward0": [lambda: p(3, 4) * p(3).sum()],
    "SumBackward1": [lambda: p(3, 4).sum(0), lambda: p(2, 3, 4).sum((1, -1))],
    "VarBackward0": [lambda: p(3, 4).var(1, correction=0, keepdim=True)],
    "VdotBackward0": [lambda: p(3, 4) * torch.vdot(x(3), p(3))],
    "NativeBatchNormBackward0": [
        lambda: F.batch_norm(p(2, 3, 4), None, None, p(3), p(3), training=True, eps=0.1),
        lambda: F.batch_norm(p(1, 3, 4), x(3), x(3).exp(), training=False).reshape(3, 4),
    ],
    "WeightNormInterfaceBackward0": [
        lambda: aten._weight_norm_interface(p(3, 4), p(3, 1))[0],
        lambda: aten._weight_norm_interface(p(2, 3, 4), p(1, 1, 4), 2)[0],
    ],
    "IndexBackward0": [lambda: p(6, 3)[torch.tensor([0, -1, 3, 3])], lambda: p(6, 3)[torch.tensor([[0, 1], [2, 1]])]],
    "IndexSelectBackward0": [lambda: p(6, 3).index_select(0, ids(4)), lambda: p(3, 5).index_select(-1, ids(4))],
    "PermuteBackward0": [lambda: p(2, 3, 4).permute(2, 0, -2), lambda: p(3, 4).T],
    "SelectBackward0": [lambda: p(2, 3, 4)[-1], lambda: p(3, 4)[:, 1]],
    "SliceBackward0": [lambda: p(5, 4)[1:-1], lambda: p(3, 7)[:, ::3], lambda: p(9)[-4:]],
    "SplitBackward0": [lambda: p(7, 4).split(3)[2], lambda: p(3, 4).chunk(2, -1)[1]],
    "SplitWithSizesBackward0": [lambda: p(7, 4).split([2, 4, 1])[1], lambda: p(3, 5).split([2, 3], -1)[1]],
    "TBackward0": [lambda: p(3, 4).t(), lambda: p(3).t()],
    "TransposeBackward0": [lambda: p(2, 3, 4).transpose(0, -1), lambda: p(3, 4).mT],
    "UnbindBackward0": [lambda: p(2, 3, 4).unbind()[1], lambda: p(3, 4).unbind(-1)[2]],
    "UnsafeSplitBackward0": [lambda: aten.unsafe_split(p(7, 4), 3)[2]],
    "UnsafeSplitWithSizesBackward0": [lambda: aten.unsafe_split_with_sizes(p(7, 4), [2, 5])[1]],
    "ReshapeAliasBackward0": [lambda: aten._reshape_alias(p(3, 4), [12], [1])],
    "UnsafeViewBackward0": [lambda: aten._unsafe_view(p(12), [3, 4])],
    "ViewBackward0": [lambda: p(12).view(3, 4), lambda: p(3, 4).view(3, 2, 2), lambda: p(2, 2, 3).flatten(1)],
    "UnsqueezeBackward0": [lambda: p(3, 4).unsqueeze(1), lambda: p(4).unsqueeze(0)],
    "SqueezeBackward0": [lambda: p(3, 1, 4).squeeze()],
    "SqueezeBackward1": [lambda: p(3, 1, 4).squeeze(1)],
    "SqueezeBackward2": [lambda: p(1, 3, 1).squeeze((0, 2))],
}

# Operations that CPUs do not have, with the reason.
ELSEWHERE = {"FusedRmsNormBackward0": "on CPUs, F.rms_norm is made of other operations"}


def test_each_operation_is_tried():
    assert {use.name for use in USES} | set(WEIGHTS) | set(ELSEWHERE) == set(_OPERATIONS)
    assert F.rms_norm(x(3, 4), (4,), p(4)).grad_fn.name() not in ELSEWHERE


def product(weight: Tensor, rows: int, *, last: bool) -> tuple[Tensor, int]:
    """Multiply a weight with samples, and say which axis these have in the product."""
    if weight.ndim not in (1, 2, 3) or (weight.ndim == 1 and last):
        return (weight.unsqueeze(-1) * x(*weight.shape, rows), weight.ndim)
    if weight.ndim == 1:
        return x(rows, len(weight)) @ weight, 0
    *batch, first, second = weight.shape
    multiply, axis = (torch.bmm, 1) if batch else (torch.mm, 0)
    if last:
        return multiply(weight, x(*batch, second, rows)), axis + 1
    return multiply(x(*batch, rows, first), weight), axis


def paths(node: Node, number: int = 0) -> Iterator[tuple[list[Operation], Tensor]]:
    """List the ways from a node to parameters, and these."""
    if hasattr(node, "variable"):
        yield [], node.variable
    for place, (before, output) in enumerate(node.next_functions):
        for path, parameter in paths(before, output) if before is not None else ():
            yield [Operation(node, place, number), *path], parameter


@torch.no_grad()
def compare(site: Node, samples: SampleAxis) -> list[Operation]:
    """Compare the Jacobians of an operation's output with autograd's, and list the operations that were passed."""
    shape = output_metadata(site)[0].shape
    s = x(C, *shape)
    found, passed = {}, list[Operation]()
    for path, parameter in paths(site):
        for flow in Flow.along(path, s, samples):
            jacobian = flow.jacobian(parameter.dtype).formed()
            found[parameter] = found[parameter] + jacobian if parameter in found else jacobian
        passed += path
    masks = torch.ones(1, *shape, dtype=torch.float64)
    if samples.axis is not None:  # [N, *output]: which entries belong to a sample
        own = torch.eye(N, dtype=torch.float64).repeat_interleave(samples.inner, 1).repeat(1, samples.outer)
        masks = own.reshape(N, *(-1 if axis == samples.axis else 1 for axis in range(len(shape))))
    for parameter, jacobian in found.items():
        rows = [
            torch.autograd.grad(GradientEdge(site, 0), parameter, s[c] * mask, retain_graph=True)[0].flatten()
            for c in range(C)
            for mask in masks
        ]
        assert_close(jacobian, torch.stack(rows).reshape(C, len(masks), -1))
    assert found
    return passed


def node_of(output: Tensor, name: str) -> Node:
    """Find the operation of a name that is next to the output."""
    return next(node for node in graph_nodes(output) if node.name() == name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_uses(use, layout):
    outer, inner = LAYOUTS[layout]
    output = use.function(outer * N * inner)
    samples = SampleAxis(None) if use.axis is None else SampleAxis(use.axis, outer, inner * use.entries)
    compare(node_of(output, use.name), samples)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "weight"), [pytest.param(name, w, id=name) for name, weights in WEIGHTS.items() for w in weights]
)
def test_weights(name, weight, layout, last):
    outer, inner = LAYOUTS[layout]
    output, axis = product(weight(), outer * N * inner, last=last)
    passed = compare(output.grad_fn, SampleAxis(axis, outer, inner))
    assert name in {operation.node.name() for operation in passed}


VIEWS = {
    "expand": lambda w, axis, other: w.unsqueeze(axis).expand(*w.shape[:axis], 2, *w.shape[axis:]),
    "flatten": lambda w, axis, other: w.flatten(min(axis, other), max(axis, other)),
    "index": lambda w, axis, other: w[torch.tensor([0, -1, 0])],
    "repeat": lambda w, axis, other: w.repeat([1 + (i == axis) for i in range(w.ndim)]),
    "reshape": lambda w, axis, other: w.reshape(w.shape[axis], -1),
    "reverse": lambda w, axis, other: w.permute(list(reversed(range(w.ndim)))),
    "select": lambda w, axis, other: w.select(axis, -1),
    "slice": lambda w, axis, other: w.narrow(axis, 1, w.shape[axis] - 1),
    "split": lambda w, axis, other: w.split(2, axis)[-1],
    "squeeze": lambda w, axis, other: w.squeeze(axis),
    "steps": lambda w, axis, other: w.movedim(axis, 0)[::2],
    "transpose": lambda w, axis, other: w.transpose(axis, other),
    "unbind": lambda w, axis, other: w.unbind(axis)[0],
    "unflatten": lambda w, axis, other: w.unflatten(axis, (2, -1)),
    "unsqueeze": lambda w, axis, other: w.unsqueeze(axis),
}


@st.composite
def views(draw):
    """A shape of a parameter, and functions that take, repeat or rearrange its entries one after the other."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    steps, weight = [], torch.empty(shape)
    for kind in draw(st.lists(st.sampled_from(sorted(VIEWS)), min_size=1, max_size=4)):
        axis = draw(st.integers(0, weight.ndim - 1)) if weight.ndim else 0
        other = draw(st.integers(0, weight.ndim - 1)) if weight.ndim else 0
        step = partial(VIEWS[kind], axis=axis, other=other)
        try:
            weight = step(weight)
        except (IndexError, RuntimeError, ValueError):  # no such view
            continue
        steps.append(step)
    assume(weight.numel())
    return shape, steps


@settings(deadline=None, max_examples=200)
@given(drawn=views(), layout=st.sampled_from(sorted(LAYOUTS)), last=st.booleans())
def test_views_of_views(drawn, layout, last):
    """What is no einsum is refused; what is one is right."""
    shape, steps = drawn
    outer, inner = LAYOUTS[layout]
    output, axis = product(reduce(lambda w, step: step(w), steps, p(*shape)), outer * N * inner, last=last)
    with suppress(NotCapturedError):
        compare(output.grad_fn, SampleAxis(axis, outer, inner))


BROADCAST = {
    "add": lambda x, w: torch.add(x, w, alpha=2),
    "addcmul": lambda x, w: torch.addcmul(w, x, w, value=2),
    "div": lambda x, w: x / w,
    "divided": lambda x, w: w / x,
    "mul": lambda x, w: w * x,
    "sub": lambda x, w: torch.sub(w, x),
    "where": lambda x, w: torch.where(x > 0, w, x),
}


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    operation=st.sampled_from(sorted(BROADCAST)),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_broadcasting(data, operation, shape, layout):
    """The parameter has no axis of samples, or one of length one, and may lack or repeat along others."""
    outer, inner = LAYOUTS[layout]
    axis = data.draw(st.integers(0, len(shape) - 1))
    own = [1 if i == axis or data.draw(st.booleans()) else size for i, size in enumerate(shape)]
    leading = next((i for i, size in enumerate(own) if size > 1), len(own))
    weight = p(*own[data.draw(st.integers(0, leading)) :])
    shape[axis] = outer * N * inner
    compare(BROADCAST[operation](x(*shape), weight).grad_fn, SampleAxis(axis, outer, inner))
