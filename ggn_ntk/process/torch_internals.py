"""The only reader of torch's private parts: whatever begins with an underscore there, or lives in a module that does.

Each is named here by what it is for, so that a release of torch that drops one shows in this file, and first in
``tests/process/test_internals.py``. Attributes that are read in loops over nodes or tensors are ``attrgetter``s, which
cost no call of a Python function.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms, pyfunctorch
from torch.autograd.graph import Node
from torch.nn import Module
from torch.nn.modules import batchnorm, conv, dropout, loss
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch, _pytree, checkpoint

# Layers of torch's with any number of axes.
AnyBatchNorm = batchnorm._BatchNorm
AnyConv = conv._ConvNd
AnyDropout = dropout._DropoutNd
AnyLoss = loss._Loss
AnyTransposedConv = conv._ConvTransposeNd

# What modules hold.

#: The parameters of a module itself, by name; ``None`` for those that are switched off.
parameters_of: Callable[[Module], dict[str, Any]] = attrgetter("_parameters")

#: The buffers of a module itself, by name.
buffers_of: Callable[[Module], dict[str, Any]] = attrgetter("_buffers")

#: The children of a module, also under further names.
children_of: Callable[[Module], dict[str, Module | None]] = attrgetter("_modules")

#: The dicts of a module's forward hooks and of those before them.
forward_hooks: Callable[[Module], tuple[dict[int, Any], dict[int, Any]]] = attrgetter(
    "_forward_hooks", "_forward_pre_hooks"
)

#: The dicts of a module's backward hooks and of those before them.
backward_hooks: Callable[[Module], tuple[dict[int, Any], dict[int, Any]]] = attrgetter(
    "_backward_hooks", "_backward_pre_hooks"
)

#: Where a compiled module keeps its call, which a twin that is not compiled must not have.
COMPILED_CALL = "_compiled_call_impl"

# Where torch.compile keeps the module it was given, and what that puts before the names of parameters.
_COMPILED = "_orig_mod"
COMPILED_PREFIX = f"{_COMPILED}."


def has_global_hooks() -> bool:
    """Tell whether forward hooks run at the calls of all modules."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def uncompiled(module: Module) -> Module:
    """Unwrap a compiled module."""
    return getattr(module, _COMPILED, module)


def padding_of(convolution: Any) -> list[int]:
    """Look up the padding of a convolution as ``F.pad`` takes it, also for ``padding="same"``."""
    padding: list[int] = convolution._reversed_padding_repeated_twice
    return padding


# What tensors hold.

#: How often a tensor was written to; not to be read in inference mode.
version_of: Callable[[Tensor], int] = attrgetter("_version")

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

#: The hooks of a leaf on its gradient, before and after it is accumulated; ``None`` where there are none.
tensor_hooks: Callable[[Tensor], tuple[Any, Any]] = attrgetter(*_TENSOR_HOOKS)


def take_hooks_off(tensor: Tensor, found: tuple[Any, Any]) -> None:
    """Take all hooks off a leaf, and give it the dicts, or ``None``, that held them when it was found."""
    for key, store in zip(_TENSOR_HOOKS, found, strict=True):
        present = getattr(tensor, key)
        if present:
            present.clear()  # torch goes on calling hooks of accumulated gradients where None takes their dict's place
        if present is not store:
            setattr(tensor, key, store)


def storage_id(tensor: Tensor) -> int:
    """Identify the memory that a dense tensor shares with its views."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


# The graph of autograd, and backward passes.

#: The shapes, dtypes and devices of what a node computed in the forward pass.
output_metadata: Callable[[Node], tuple[Any, ...]] = attrgetter("_input_metadata")

# Operations that rules know, by their nodes: a name for each, and its arguments in the order of the node's edges.
_OPERATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Matrix products
    "AddmmBackward0": ("addmm", ("self", "mat1", "mat2")),
    "AddmvBackward0": ("addmv", ("self", "mat", "vec")),
    "BaddbmmBackward0": ("baddbmm", ("self", "batch1", "batch2")),
    "BmmBackward0": ("bmm", ("self", "mat2")),
    "DotBackward0": ("dot", ("self", "tensor")),
    "MmBackward0": ("mm", ("self", "mat2")),
    "MvBackward0": ("mv", ("self", "vec")),
    "TrilinearBackward0": ("trilinear", ("i1", "i2", "i3")),
    "VdotBackward0": ("vdot", ("self", "other")),
    # Layers
    "ConvolutionBackward0": ("convolution", ("input", "weight", "bias")),
    "EmbeddingBackward0": ("embedding", ("weight",)),
    "EmbeddingBagBackward0": ("embedding_bag", ("weight", "per_sample_weights")),
    "FusedRmsNormBackward0": ("rms_norm", ("input", "weight")),
    **{
        f"{library}BatchNormBackward0": ("batch_norm", ("input", "weight", "bias"))
        for library in ("Native", "Cudnn", "Miopen")
    },
    "NativeGroupNormBackward0": ("group_norm", ("input", "weight", "bias")),
    "NativeLayerNormBackward0": ("layer_norm", ("input", "weight", "bias")),
    "PreluKernelBackward0": ("prelu", ("self", "weight")),
    "WeightNormInterfaceBackward0": ("weight_norm", ("v", "g")),
    # Entry by entry, with broadcasting
    "AddBackward0": ("add", ("self", "other")),
    "AddcmulBackward0": ("addcmul", ("self", "tensor1", "tensor2")),
    "DivBackward0": ("div", ("self", "other")),
    "ExpandBackward0": ("expand", ("self",)),
    "MaskedFillBackward0": ("masked_fill", ("self",)),
    "MulBackward0": ("mul", ("self", "other")),
    "RepeatBackward0": ("repeat", ("self",)),
    "RsubBackward1": ("rsub", ("self",)),
    "SubBackward0": ("sub", ("self", "other")),
    "WhereBackward0": ("where", ("self", "other")),
    # Entry by entry, of one argument
    **dict.fromkeys(("CloneBackward0", "ToCopyBackward0", "AliasBackward0"), ("same", ("self",))),
    **{
        f"{name}Backward0": ("entrywise", ("self",))
        for name in ("Abs", "Cos", "Exp", "Expm1", "Log", "Neg", "Pow", "Reciprocal", "Relu", "Rsqrt", "Sigmoid", "Sin")
    },
    **{f"{name}Backward0": ("entrywise", ("self",)) for name in ("ClampMax", "ClampMin", "Softplus", "Sqrt", "Tanh")},
    "ClampBackward1": ("entrywise", ("self",)),  # between numbers
    # Entries that become one
    **{
        f"{name}Backward{number}": ("reduction", ("self",))
        for name, number in (("LinalgVectorNorm", 0), ("Mean", 1), ("Std", 0), ("Sum", 1), ("Var", 0))
    },
    **dict.fromkeys(("MeanBackward0", "SumBackward0"), ("reduction_of_all", ("self",))),
    # Entries in another order, and parts
    "IndexBackward0": ("index", ("self",)),
    "IndexSelectBackward0": ("index_select", ("self",)),
    "PermuteBackward0": ("permute", ("self",)),
    "SelectBackward0": ("select", ("self",)),
    "SliceBackward0": ("slice", ("self",)),
    "SplitBackward0": ("split", ("self",)),
    "SplitWithSizesBackward0": ("split_with_sizes", ("self",)),
    "TBackward0": ("t", ("self",)),
    "TransposeBackward0": ("transpose", ("self",)),
    "UnbindBackward0": ("unbind", ("self",)),
    "UnsafeSplitBackward0": ("split", ("self",)),
    "UnsafeSplitWithSizesBackward0": ("split_with_sizes", ("self",)),
    **{f"{name}Backward0": ("reshape", ("self",)) for name in ("ReshapeAlias", "UnsafeView", "Unsqueeze", "View")},
    **{
        f"SqueezeBackward{i}": ("reshape", ("self",)) for i in range(3)
    },  # of all axes of length one, of one, of several
}


# What nodes of other libraries save under other names than torch's own of the same operation.
_SAVED_AS = {(f"{library}BatchNormBackward0", "eps"): "epsilon" for library in ("Cudnn", "Miopen")}


def operation_of(node: Node) -> tuple[str, tuple[str, ...]]:
    """Look up the name of an operation, and its arguments in the order of the node's edges; no name if unknown."""
    return _OPERATIONS.get(node.name(), ("", ()))


def saved(node: Node, name: str) -> Any:
    """Look up what a node has saved of an operation's arguments and results."""
    value = _signed(getattr(node, f"_saved_{_SAVED_AS.get((node.name(), name), name)}"))
    # A number that torch has made a tensor of would give way to other dtypes: a view of it does not.
    return value.view(()) if isinstance(value, Tensor) and not value.ndim else value


def _signed(value: Any) -> Any:
    """Undo that nodes hold negative integers as unsigned ones."""
    if isinstance(value, tuple):
        return tuple(map(_signed, value))
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


#: How many nodes this thread had recorded before a node: of those that are recorded later, more. Leaves have none.
place_of: Callable[[Node], int] = methodcaller("_sequence_nr")

#: How many nodes this thread has recorded.
nodes_recorded: Callable[[], int] = torch._C._autograd._get_sequence_nr

#: Nodes whose gradients the ``vmap`` of ``torch.func`` gets wrong, in torch 2.14.
WRONG_IF_BATCHED = {"CdistBackward0"}

#: What the node of average pooling over one and two axes is called.
AVERAGE_POOLING = "AvgPool2DBackward0"

#: What the node is called that torch puts around modules with full backward hooks, such as BackPACK's.
BACKWARD_HOOK = "BackwardHookFunctionBackward"

#: The number of the backward pass under way in this thread; -1 outside of one.
current_backward_pass: Callable[[], int] = torch._C._current_graph_task_id

#: The node at which the backward pass under way in this thread is.
current_node: Callable[[], Node] = torch._C._current_autograd_node


def after_backward_pass(callback: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass under way, if that does not fail."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# Operations, and what changes them for a thread or the process.

#: The function behind ``weight_norm``, as modes of torch functions see it.
weight_norm: Callable[..., Tensor] = torch._weight_norm

#: The norms of several tensors, in one operation.
norms_of: Callable[..., tuple[Tensor, ...]] = torch._foreach_norm

#: The name, arguments and results of an operation of ``torch.ops``.
schema_of: Callable[[Any], Any] = attrgetter("_schema")


class OperationMode(_python_dispatch.TorchDispatchMode):
    """A mode that sees each operation before it is carried out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave torch's compiler alone: to tell it what to skip is to import it, which takes seconds."""
        return False


# Nested lists, tuples and dicts: their entries, and a function applied to each.
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_unflatten = _pytree.tree_unflatten


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """List the entries of a tree, each by its keys on all levels, joined by dots; and the tree's structure."""
    entries, structure = _pytree.tree_flatten_with_path(tree)
    return [(".".join(map(_name_of, path)), leaf) for path, leaf in entries], structure


def _name_of(key: Any) -> str:
    """Name one level of a tree by the one field that its key has: a key of a dict, a place, or an attribute."""
    return str(getattr(key, fields(key)[0].name))


#: The level of the transforms of ``torch.func`` under way; ``None`` outside of them.
transform_level: Callable[[], int | None] = torch._C._functorch.maybe_current_level

#: Whether a tensor stands for another inside of a transform.
is_wrapped_tensor: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

#: A context outside of the transforms of ``torch.func`` that are under way; there have to be some.
without_transforms = pyfunctorch.temporarily_clear_interpreter_stack

#: A context outside of the innermost of them.
without_innermost = pyfunctorch.temporarily_pop_interpreter_stack

#: A context in which ``requires_grad_()`` may be called inside of a transform that differentiates.
may_require_gradients = eager_transforms.enable_inplace_requires_grad

# Tensors that stand for one sample inside of ``vmap``: whether one is such a tensor, that of all samples behind it, the
# place of their axis in that, and the way back, with the level of the transform.
is_sample: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
samples_behind: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
sample_axis: Callable[[Tensor], int] = torch._C._functorch.maybe_get_bdim
as_sample: Callable[[Tensor, int, int], Tensor] = torch._C._functorch._add_batch_dim

#: Whether a tensor is followed by a transform that differentiates.
is_differentiated: Callable[[Tensor], bool] = torch._C._functorch.is_gradtrackingtensor

# What a checkpoint that is not reentrant calls around its function, in torch 2.6 and 2.14.
_CHECKPOINT_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


def may_compile() -> bool:
    """Tell whether torch's compiler is loaded: importing it takes seconds, and without it nothing is compiled."""
    return "torch._dynamo" in sys.modules


def checkpoint_generators() -> dict[str, Callable[..., Iterator[None]]]:
    """Look up what checkpoints call around their functions, by name in ``torch.utils.checkpoint``."""
    return {name: vars(checkpoint)[name] for name in _CHECKPOINT_GENERATORS if name in vars(checkpoint)}


def jvp_nesting() -> Callable[[], AbstractContextManager[Any]]:
    """Look up the context in which ``torch.func.jvp`` computes."""
    return eager_transforms.jvp_increment_nesting


def set_jvp_nesting(context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Set the context in which ``torch.func.jvp`` computes, in all threads."""
    module: Any = eager_transforms
    module.jvp_increment_nesting = context
