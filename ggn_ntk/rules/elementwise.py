"""Operations entry by entry, with broadcasting: sums and products, scales, gates, masks."""

import torch
from torch import Tensor

from ggn_ntk.rules.linear_map import LinearMap, Operation, letter_of, register_operation


@register_operation("add", "sub")
def add(op: Operation) -> LinearMap:
    """Write ``self + alpha * other``, or a difference."""
    sign = -1 if op.kind == "sub" else 1
    return op.entrywise(factor=1 if op.argument == "self" else sign * op["alpha"])


@register_operation("rsub")
def rsub(op: Operation) -> LinearMap:
    """Write a number less ``alpha * self``."""
    return op.entrywise(factor=-op["alpha"])


@register_operation("mul")
def mul(op: Operation) -> LinearMap:
    """Write ``self * other``."""
    return op.entrywise(op["other" if op.argument == "self" else "self"])


@register_operation("div")
def div(op: Operation) -> LinearMap:
    """Write ``self / other``."""
    other: Tensor = op["other"].to(op.dtype)  # which may be a whole number
    return op.entrywise(other.reciprocal() if op.argument == "self" else -op["self"] / other.square())


@register_operation("addcmul")
def addcmul(op: Operation) -> LinearMap:
    """Write ``self + value * tensor1 * tensor2``."""
    if op.argument == "self":
        return op.entrywise()
    return op.entrywise(op["tensor2" if op.argument == "tensor1" else "tensor1"], factor=op["value"])


@register_operation("where")
def where(op: Operation) -> LinearMap:
    """Write a choice between two arguments."""
    chosen = op["condition"] if op.argument == "self" else ~op["condition"]
    return op.entrywise(chosen.to(op.dtype))


@register_operation("masked_fill")
def masked_fill(op: Operation) -> LinearMap:
    """Write what is kept where no other value is filled in."""
    return op.entrywise((~op["mask"]).to(op.dtype))


@register_operation("same", "expand")
def same(op: Operation) -> LinearMap:
    """Write a copy, along new axes too."""
    return op.entrywise()


@register_operation("entrywise")
def entrywise(op: Operation) -> LinearMap:
    """Write a function of each entry: its derivative is what autograd makes of ones."""
    with torch.no_grad():
        return op.entrywise(op.passed(torch.ones(op.output, dtype=op.dtype, device=op.device)))


@register_operation("reduction", "reduction_of_all")
def reduction(op: Operation) -> LinearMap:
    """Write a number of several entries each, say a sum or a norm: its derivative is what autograd makes of ones."""
    every = tuple(range(len(op.shape)))
    axes = op["dim"] if op.kind == "reduction" else every
    reduced = {axis % len(every) for axis in axes or every}
    letters = tuple(map(letter_of, every))
    with torch.no_grad():
        derivative = op.passed(torch.ones(op.output, dtype=op.dtype, device=op.device))
    keeps = len(op.output) == len(every)
    output = ("" if axis in reduced else letter for axis, letter in enumerate(letters) if keeps or axis not in reduced)
    return LinearMap(tuple(output), letters, (("".join(letters), derivative),))


@register_operation("prelu")
def prelu(op: Operation) -> LinearMap | None:
    """Write ``self where self > 0 else weight * self``."""
    return op.entrywise(op["self"].clamp(max=0)) if op.argument == "weight" else None


@register_operation("repeat")
def repeat(op: Operation) -> LinearMap:
    """Write copies behind one another."""
    letters = [letter_of(axis) for axis in range(len(op.output))]
    new = len(op.output) - len(op.shape)
    repeats = [letter.upper() * (count > 1) for letter, count in zip(letters, op["repeats"], strict=True)]
    own = [letter * (size > 1) for letter, size in zip(letters, (1,) * new + op.shape, strict=True)]
    sizes = [*zip(repeats, op["repeats"], strict=True), *zip(own, (1,) * new + op.shape, strict=True)]
    output = tuple(r + letter for r, letter in zip(repeats, own, strict=True))
    return LinearMap(output, tuple(own[new:]), sizes=tuple(sizes))
