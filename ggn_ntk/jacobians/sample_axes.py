"""Where the samples are in each call of a layer.

A layer's leading axis need not hold the samples. Their axis is the one that grows from one sample to several: in
front, further back (sequence first), or in front with several rows for each sample (windows). An output that does not
grow is the same for all samples (position embeddings), and is repeated for each. Whether this holds for all samples,
and whether the rules are right, is for :mod:`ggn_ntk.jacobians.verification` to find out.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Size
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from ggn_ntk.jacobians.layer_call import LayerCall, Recording, map_tensors, shape_of
from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.process.torch_internals import output_metadata
from ggn_ntk.rules.registry import inner_of

# The node of a graph that transposes a weight.
_TRANSPOSED = "TBackward0"


class SampleAxes(NamedTuple):
    """Where the samples are in one call of a layer."""

    module: Module  # the layer
    axis: int | None  # their axis in the output; ``None`` if there is none
    rows: int  # how many entries of that axis belong to a sample
    args: list[int | None]  # their axes in the arguments; ``None`` where there is none
    same: bool  # whether the output is the same for all samples, since it does not grow
    shape: Size  # shape of the output for one sample


def axes_of_all(shape: Size) -> int:
    """Count the axes that stand for the samples in an output that is the same for all."""
    return 1 if shape[:1] == (1,) else 0


def of_same_layer(module: Module, entries: Sequence[LayerCall] | Sequence[SampleAxes], place: int) -> Any:
    """Look up what is known of a call from another pass."""
    return entries[place] if place < len(entries) and entries[place].module is module else None


def learn_sample_axes(one: Recording, several: Recording) -> list[SampleAxes]:
    """Find out where the samples are in each call of a layer."""
    sample_axes = []
    for place, call in enumerate(several.calls):
        axis, rows, args = None, 1, list[int | None]()
        alone = of_same_layer(call.module, one.calls, place)
        shape = call.shape if alone is None else alone.shape
        same = alone is not None and (call.repeated or call.shape == alone.shape)
        if alone is not None and len(alone.args) == len(call.args) and not same:
            axis = _grown(alone.shape, call.shape, several.n)
            rows = 1 if axis is None else alone.shape[axis]
            args = [_grown(shape_of(x), shape_of(y), several.n) for x, y in zip(alone.args, call.args, strict=True)]
        sample_axes.append(SampleAxes(call.module, axis if rows == 1 or axis == 0 else None, rows, args, same, shape))
    return sample_axes


def locate(recording: Recording, sample_axes: Sequence[SampleAxes] | None) -> Recording:
    """Find the samples in recorded calls, and tell products inside of layers from the rest of these."""
    calls: list[LayerCall] = []
    for place, call in enumerate(recording.calls):
        if sample_axes is None:
            located = replace(call, axis=0, rows=call.shape[0] // recording.n)
        else:
            located = _locate(call, of_same_layer(call.module, sample_axes, place), recording.n)
        calls += _split_call(located)
    return replace(recording, calls=calls)


def not_located(recording: Recording) -> dict[str, str]:
    """Find the parameters of calls in whose outputs samples are not told apart, with the reason, by name."""
    calls = [call for call in recording.calls if call.axis is None]
    reached = set(graph_nodes(recording.output)) if calls else set()
    return {
        name: f"samples are not told apart in an output {list(call.shape)} of its layer"
        for call in calls
        if call.edge.node in reached
        for name in call.params.values()
    }


def _locate(call: LayerCall, axes: SampleAxes | None, n: int) -> LayerCall:
    """Find the samples in a call."""
    if axes is not None and axes.same and n == 1:
        return _repeat_for_one(call)
    if axes is None or axes.axis is None or call.shape[axes.axis : axes.axis + 1] != (n * axes.rows,):
        return call
    moved = (x.movedim(axis, 0) if axis else x for x, axis in zip(call.args, axes.args, strict=False))
    return replace(call, args=tuple(moved), axis=axes.axis, rows=axes.rows)


def _repeat_for_one(call: LayerCall) -> LayerCall:
    """Give an output that is the same for all samples an axis of samples."""
    kept = axes_of_all(call.shape)
    args = call.args if kept else map_tensors(lambda t: t.unsqueeze(0), call.args)
    strides = (0, *call.strides[kept:])
    return replace(call, args=args, shape=Size([1, *call.shape[kept:]]), strides=strides, axis=0, repeated=True)


def _split_call(call: LayerCall) -> list[LayerCall]:
    """Tell a product with a parameter inside of a layer from the rest of the layer."""
    inner = None
    if call.axis is not None and call.rows == 1 and not call.repeated:
        inner = inner_of(call.rule, call.module, call.x)
    if inner is None:
        return [call]
    own = {id(p) for name in inner.params if (p := getattr(call.module, name)) is not None}
    inside = graph_nodes(call.edge, dict.fromkeys(call.sources, ()))
    nodes = (n for n in inside if n.name() != _TRANSPOSED and any(id(_leaf(m)) in own for m, _ in n.next_functions))
    node = next(nodes, None)  # the nearest to the output: a bias may be added by a node of its own
    if node is None or math.prod(output_metadata(node)[0].shape) != inner.shape.numel():
        return [call]
    names = [{k: v for k, v in call.params.items() if (k in inner.params) == enters} for enters in (True, False)]
    strides = torch.empty(inner.shape, device="meta").stride()
    place = GradientEdge(node, 0), inner.shape, strides
    product = replace(call, rule=inner.rule, params=names[0], axis=inner.axis).at(*place)
    return [part for part in (replace(call, rule=inner.outer_rule, params=names[1]), product) if part.params]


def _leaf(node: Node | None) -> Any:
    """Look up the parameter that a node of a graph accumulates the gradient of, itself or behind a transposition."""
    while node is not None and node.name() == _TRANSPOSED:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _grown(one: Size, several: Size, n: int) -> int | None:
    """Find the axis along which a tensor for several samples is longer than for one."""
    if len(one) != len(several):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(one, several, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and several[axes[0]] == n * one[axes[0]] else None
