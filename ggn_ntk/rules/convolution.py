"""Convolutions and transposed convolutions of any dimension.

At each position, a convolution is a linear layer on the window of its input there (einconv: Dangel, "Convolutions and
More as Einsum", NeurIPS 2024, section 3). Windows are views of the padded input, which overlap in memory: they are
copied (unfolded) only where a contraction needs a matrix of them, and then for a few samples at a time.

Letters: ``g`` groups; ``o``, ``i`` output and input channels of a group; ``x``, ``y``, ``z`` positions;
``u``, ``v``, ``w`` places in the kernel.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.process.torch_internals import padding_of
from ggn_ntk.rules.flow import jacobian
from ggn_ntk.rules.linear_map import LinearMap, Operation, register_operation
from ggn_ntk.rules.registry import (
    channels_last,
    register_backpropagation,
    register_rule,
    stack_outputs,
    unstack_outputs,
)

_POSITIONS, _KERNEL = "xyz", "uvw"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _Options(NamedTuple):
    """What a convolution slides over its input, and how."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@register_operation("convolution")
def convolution_map(op: Operation) -> LinearMap | None:
    """Write a convolution, transposed or not, in its weight or bias."""
    if op.argument == "input":
        return None
    if op.argument == "bias":
        return _in_bias(op["groups"], len(op.output) - 2)
    options = _Options(op.shape[2:], op["stride"], op["dilation"], op["groups"])
    padding = [pad for amount in reversed(op["padding"]) for pad in (amount, amount)]
    if op["transposed"]:
        return _transposed_in_weight(options, op["input"], padding)
    return _in_weight(options, F.pad(op["input"], padding), op.output[2:])


def _in_weight(options: Any, x: Tensor, positions: Any) -> LinearMap:
    """Write a convolution of a padded input in its weight."""
    # x [N, I, *spatial]
    p, k = _POSITIONS[: x.ndim - 2], _KERNEL[: x.ndim - 2]
    windows = _windows(x, options, positions)  # [N, G, I / G, *kernel, *positions]
    return LinearMap(("n", "go", *p), ("go", "i", *k), ((f"ngi{k}{p}", windows),))


def _transposed_in_weight(options: Any, x: Tensor, padding: list[int]) -> LinearMap:
    """Write a transposed convolution in its weight: input and output change places."""
    # x [N, I, *positions]
    # Each entry of the input is spread over a window of the output: here windows are views of the padded ``s``.
    p, k = _POSITIONS[: x.ndim - 2], _KERNEL[: x.ndim - 2]

    def spread(s: Tensor) -> Tensor:
        # [C, N, O, *spatial] -> [C, N, G, O / G, *kernel, *positions]
        windows = _windows(F.pad(stack_outputs(s), padding), options, x.shape[2:])
        return unstack_outputs(windows, like=s)

    operand = (f"ngi{p}", x.unflatten(1, (options.groups, -1)))
    return LinearMap(("n", "g", "o", *k, *p), ("gi", "o", *k), (operand,), spread=spread)


@register_rule(*_CONVOLUTIONS)
def convolution(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a convolution."""
    # x [N, I, *spatial], s [C, N, O, *positions] -> [O, I / groups, *kernel]
    bias = jacobian(_in_bias(module.groups, s.ndim - 3), s)
    return {"weight": jacobian(_in_weight(module, _pad(module, x), s.shape[3:]), s), "bias": bias}


@register_rule(*_TRANSPOSED)
def transposed_convolution(module: Any, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a transposed convolution."""
    # x [N, I, *positions], s [C, N, O, *spatial] -> [I, O / groups, *kernel]
    padding = [pad for amount in reversed(module.padding) for pad in (amount, amount)]
    bias = jacobian(_in_bias(module.groups, s.ndim - 3), s)
    return {"weight": jacobian(_transposed_in_weight(module, x, padding), s), "bias": bias}


def _in_bias(groups: int, dimensions: int) -> LinearMap:
    """Write a convolution in its bias, with channels split as for the weight."""
    return LinearMap(("n", "go", *_POSITIONS[:dimensions]), ("go",), sizes=(("g", groups),))


def _pad(module: Any, x: Tensor) -> Tensor:
    """Pad an input as a convolution does."""
    padding = padding_of(module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, padding, mode=mode) if any(padding) else x


def _windows(x: Tensor, module: Any, positions: Any) -> Tensor:
    """View an input as the windows a kernel slides over."""
    # x [N, I, *spatial] -> [N, G, I / G, *kernel, *positions]
    # Channels come last in memory, so that what a contraction copies out of it are long runs.
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x = x.unflatten(1, (module.groups, -1))
    spatial = x.stride()[3:]
    # A spatial axis becomes two: one place further in the kernel is ``dilation`` entries on, one position ``stride``.
    kernel = [step * dilation for step, dilation in zip(spatial, module.dilation, strict=True)]
    position = [step * stride for step, stride in zip(spatial, module.stride, strict=True)]
    shape = (*x.shape[:3], *module.kernel_size, *positions)
    return x.as_strided(shape, (*x.stride()[:3], *kernel, *position))


@register_backpropagation(*_CONVOLUTIONS, linear=True)
def convolution_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by a convolution's transposed Jacobian: a transposed convolution, and the padding undone."""
    # x [N, I, *spatial], s [C, N, O, *positions] -> [C, N, I, *spatial]
    # Zeros around the input are an option of the transposed convolution; other padding, and "same", is undone after it.
    dim = s.ndim - 3
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        padding, padded = module.padding, x.shape[2:]
    else:
        padding, padded = (0,) * dim, _pad(module, x[:1]).shape[2:]
    # A stride may leave out the last entries of the input, which a transposed convolution then has to be told of.
    full = [
        (p - 1) * stride - 2 * pad + dilation * (k - 1) + 1
        for p, stride, pad, dilation, k in zip(
            s.shape[3:], module.stride, padding, module.dilation, module.kernel_size, strict=True
        )
    ]
    missing = [wanted - size for wanted, size in zip(padded, full, strict=True)]
    product: Tensor = _CONV_TRANSPOSE[dim](
        channels_last(stack_outputs(s)),
        module.weight,
        stride=module.stride,
        padding=padding,
        output_padding=missing,
        groups=module.groups,
        dilation=module.dilation,
    )
    if padded != x.shape[2:]:
        product = _unpad(module, x, product)
    return unstack_outputs(product, like=s)


def _unpad(module: Any, x: Tensor, product: Tensor) -> Tensor:
    """Multiply by the transposed Jacobian of a padding."""
    # x [N, I, *spatial], product [M, I, *padded] -> [M, I, *spatial]
    with torch.enable_grad():
        inputs = x.new_zeros(len(product), *x.shape[1:]).requires_grad_()
        (unpadded,) = torch.autograd.grad(_pad(module, inputs), inputs, product)
    return unpadded


@register_backpropagation(*_TRANSPOSED, linear=True)
def transposed_convolution_transposed(module: Any, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by a transposed convolution's transposed Jacobian: a convolution."""
    # x [N, I, *positions], s [C, N, O, *spatial] -> [C, N, I, *positions]
    options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
    product: Tensor = _CONV[s.ndim - 3](channels_last(stack_outputs(s)), module.weight, **options)
    for axis, size in enumerate(x.shape[2:], start=2):
        product = product.narrow(axis, 0, size)  # output_padding adds no positions
    return unstack_outputs(product, like=s)
