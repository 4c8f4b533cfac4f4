"""Operations that put entries in another order, or take some of them."""

import torch
from torch import Tensor

from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.rules.linear_map import LinearMap, Operation, letter_of, register_operation


@register_operation("t", "transpose", "permute")
def permute(op: Operation) -> LinearMap:
    """Write axes in another order."""
    axes = list(range(len(op.shape)))
    if op.kind == "permute":
        axes = [axis % len(axes) for axis in op["dims"]]
    elif len(axes) > 1:
        i, j = (0, 1) if op.kind == "t" else (axis % len(axes) for axis in (op["dim0"], op["dim1"]))
        axes[i], axes[j] = axes[j], axes[i]
    letters = tuple(letter_of(axis) * (size > 1) for axis, size in enumerate(op.shape))
    return LinearMap(tuple(letters[axis] for axis in axes), letters)


@register_operation("reshape")
def reshape(op: Operation) -> LinearMap:
    """Write entries in the same order, in another shape."""
    return LinearMap((), (), keeps_order=True)


@register_operation("slice")
def slice_(op: Operation) -> LinearMap:
    """Write entries at equal distances along an axis."""
    axis = _axis(op)
    start, stop, step = slice(op["start"], op["end"], op["step"]).indices(op.shape[axis])
    return _taken(op, axis, torch.arange(start, stop, step))


@register_operation("split", "split_with_sizes")
def split(op: Operation) -> LinearMap:
    """Write one of several parts along an axis."""
    axis = _axis(op)
    sizes = op["split_sizes"] if op.kind == "split_with_sizes" else (op["split_size"],) * op.number
    start = sum(sizes[: op.number])
    return _taken(op, axis, torch.arange(start, start + op.output[axis]))


@register_operation("select", "unbind")
def select(op: Operation) -> LinearMap:
    """Write the entries at one place along an axis."""
    axis = _axis(op)
    place = op["index"] if op.kind == "select" else op.number
    taken = _taken(op, axis, torch.tensor([place % op.shape[axis]]))
    return taken._replace(output=(*taken.output[:axis], *taken.output[axis + 1 :]))


@register_operation("index_select")
def index_select(op: Operation) -> LinearMap:
    """Write entries along an axis."""
    return _taken(op, _axis(op), op["index"])


@register_operation("index")
def index(op: Operation) -> LinearMap | None:
    """Write rows of a table."""
    places, *others = op["indices"]
    if places is None or any(other is not None for other in others) or places.dtype in (torch.bool, torch.uint8):
        return None
    places = torch.where(places < 0, places + op.shape[0], places)
    own = tuple(letter_of(axis) for axis in range(places.ndim))
    rest = tuple(letter_of(places.ndim + axis) for axis in range(1, len(op.shape)))
    return LinearMap((*own, *rest), ("z", *rest), (("".join(own) + "z", OneHot(places, op.shape[0])),))


def _taken(op: Operation, axis: int, places: Tensor) -> LinearMap:
    """Write the entries at some places along an axis."""
    places = places.to(op.device)
    letters = [letter_of(i) for i in range(len(op.shape))]
    argument = (*letters[:axis], "z", *letters[axis + 1 :])
    return LinearMap(tuple(letters), argument, ((f"{letters[axis]}z", OneHot(places, op.shape[axis])),))


def _axis(op: Operation) -> int:
    """Look up the axis along which entries are taken."""
    axis: int = op["dim"] % len(op.shape)
    return axis
