"""Private parts of torch, BackPACK and ViViT on which the package relies: each is there, and does what is expected.

A release that drops or changes one fails here first, with a message that names what relies on it.
"""

import ast
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import backpack
import pytest
import torch
from backpack import extend
from backpack.extensions.saved_quantities import SavedQuantities
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from vivit.extensions.secondorder.vivit import ViViTGGNExact

import ggn_ntk
from ggn_ntk.extensions import backpack_internals
from ggn_ntk.process import torch_internals

PACKAGE = Path(ggn_ntk.__file__).parent
READERS = [Path(module.__file__) for module in (torch_internals, backpack_internals)]


class Part(NamedTuple):
    """Names that belong together, the modules of the package that need them, and a check of what they do."""

    names: tuple[str, ...]
    used_by: str
    check: Callable[[], None]


PARTS: list[Part] = []


def part(*names, used_by):
    return lambda check: PARTS.append(Part(names, used_by, check))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, in jvp
@pytest.mark.parametrize("relied_on", PARTS, ids=lambda part: part.names[0])
def test_private_part(relied_on):
    try:
        relied_on.check()
    except Exception as error:
        names = " or ".join(relied_on.names)
        raise AssertionError(
            f"{names} is not what {relied_on.used_by} relies on (torch {torch.__version__})"
        ) from error


def private_names(path: Path, *, attributes: bool) -> set[str]:
    """Private names that a file gives as text, or also reads or imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            found |= set(node.value.split("."))
        elif attributes and isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif attributes and isinstance(node, ast.ImportFrom):
            found |= {*node.module.split("."), *(alias.name for alias in node.names)}
        elif attributes and isinstance(node, ast.ClassDef):  # what a class overrides
            found |= {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def test_each_private_part_has_a_check():
    checked = {name for part in PARTS for path in part.names for name in path.split(".") if name.startswith("_")}
    assert checked == set().union(*(private_names(path, attributes=True) for path in READERS))


def test_no_other_file_names_a_private_part():
    """Ruff's SLF001 and PLC2701 see to attributes and imports, but not to ``getattr`` and ``vars``."""
    private = set().union(*(private_names(path, attributes=True) for path in READERS))
    for path in set(PACKAGE.rglob("*.py")) - set(READERS):
        assert not private & private_names(path, attributes=False), path


# What modules hold.

MEMBERS = ("torch.nn.Module._parameters", "torch.nn.Module._buffers", "torch.nn.Module._modules")


@part(*MEMBERS, used_by="models/isolation.py, models/state.py, jacobians/, methods/vivit.py, extensions/extension.py")
def _():
    norm = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"one": norm, "again": norm})
    assert torch_internals.children_of(model) == {"one": norm, "again": norm}
    assert torch_internals.parameters_of(nn.Linear(2, 3, bias=False))["bias"] is None
    for stores, names in (
        (torch_internals.parameters_of, {"weight", "bias"}),
        (torch_internals.buffers_of, {"running_mean", "running_var", "num_batches_tracked"}),
    ):
        assert stores(norm).keys() == names
        for name in names:
            stores(norm)[name] = other = torch.zeros(2)
            assert getattr(norm, name) is other


FORWARD_HOOKS = ("torch.nn.Module._forward_hooks", "torch.nn.Module._forward_pre_hooks")
BACKWARD_HOOKS = ("torch.nn.Module._backward_hooks", "torch.nn.Module._backward_pre_hooks")


@part(*FORWARD_HOOKS, used_by="models/isolation.py")
def _():
    layer, calls = nn.Linear(2, 2), []
    layer.register_forward_hook(after := lambda *args: calls.append(args))
    layer.register_forward_pre_hook(before := lambda *args: calls.append(args))
    hooks = torch_internals.forward_hooks(layer)
    assert [list(h.values()) for h in hooks] == [[after], [before]]
    expect_cleared_hooks_to_be_silent(layer, hooks, calls)


@part(*BACKWARD_HOOKS, used_by="models/isolation.py and linearization/taylor.py")
def _():
    layer, calls = nn.Linear(2, 2), []
    layer.register_full_backward_hook(after := lambda *args: calls.append(args))
    layer.register_full_backward_pre_hook(before := lambda *args: calls.append(args))
    hooks = torch_internals.backward_hooks(layer)
    assert [list(h.values()) for h in hooks] == [[after], [before]]
    expect_cleared_hooks_to_be_silent(layer, hooks, calls)


def expect_cleared_hooks_to_be_silent(layer, hooks, calls):
    x = torch.ones(1, 2, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 2
    for h in hooks:
        h.clear()
    layer(x).sum().backward()
    assert len(calls) == 2


GLOBAL_HOOKS = [f"torch.nn.modules.module._global_{kind}hooks" for kind in ("forward_", "forward_pre_")]


@part(*GLOBAL_HOOKS, used_by="models/isolation.py, models/requirements.py and jacobians/recording.py")
def _():
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *args: None)
        try:
            assert torch_internals.has_global_hooks()
        finally:
            handle.remove()
        assert not torch_internals.has_global_hooks()


@part("torch.nn.Module._compiled_call_impl", used_by="methods/vivit.py")
def _():
    layer = nn.Identity()
    assert torch_internals.COMPILED_CALL not in vars(layer)
    setattr(layer, torch_internals.COMPILED_CALL, lambda x: "compiled")
    assert layer(1) == "compiled"


@part(
    "torch._dynamo", "torch._dynamo.OptimizedModule._orig_mod", used_by="process/switches.py, models/, linearization/"
)
def _():
    layer = nn.Linear(2, 2)
    assert torch_internals.uncompiled(layer) is layer
    compiled = torch.compile(layer)
    assert torch_internals.may_compile()
    assert torch_internals.uncompiled(compiled) is layer
    assert {name for name, _ in compiled.named_parameters()} == {
        torch_internals.COMPILED_PREFIX + name for name in ("weight", "bias")
    }


@part("torch.nn.modules.conv._ConvNd._reversed_padding_repeated_twice", used_by="rules/convolution.py")
def _():
    x = torch.randn(1, 1, 5, 6)
    for padding in ((2, 1), "same"):
        layer = nn.Conv2d(1, 1, (5, 3), padding=padding)
        alone = F.conv2d(F.pad(x, torch_internals.padding_of(layer)), layer.weight, layer.bias)
        torch.testing.assert_close(alone, layer(x))


BASES = {
    "torch.nn.modules.batchnorm._BatchNorm": [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm],
    "torch.nn.modules.conv._ConvNd": [nn.Conv1d, nn.Conv2d, nn.Conv3d],
    "torch.nn.modules.conv._ConvTransposeNd": [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d],
    "torch.nn.modules.dropout._DropoutNd": [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout],
    "torch.nn.modules.loss._Loss": [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss],
}


@part(*BASES, used_by="models/requirements.py and extensions/")
def _():
    bases = (
        torch_internals.AnyBatchNorm,
        torch_internals.AnyConv,
        torch_internals.AnyTransposedConv,
        torch_internals.AnyDropout,
        torch_internals.AnyLoss,
    )
    for base, layers in zip(bases, BASES.values(), strict=True):
        assert all(issubclass(layer, base) for layer in layers)
        assert not issubclass(nn.Linear, base)


# What tensors hold.


@part("torch.Tensor._version", used_by="models/isolation.py, models/state.py and jacobians/recording.py")
def _():
    x = torch.ones(2)
    before = torch_internals.version_of(x)
    x[:1].mul_(2)
    assert torch_internals.version_of(x) > before


@part("torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks", used_by="models/isolation.py")
def _():
    x, calls = torch.ones(2, requires_grad=True), []
    found = torch_internals.tensor_hooks(x)
    assert found == (None, None)
    x.register_hook(lambda g: calls.append("before"))
    x.register_post_accumulate_grad_hook(lambda t: calls.append("after"))
    assert all(torch_internals.tensor_hooks(x))
    x.sum().backward()
    assert calls == ["before", "after"]
    torch_internals.take_hooks_off(x, found)
    assert torch_internals.tensor_hooks(x) == found
    x.sum().backward()
    assert calls == ["before", "after"]


@part("torch.UntypedStorage._cdata", used_by="models/state.py")
def _():
    x = torch.ones(4)
    assert torch_internals.storage_id(x) == torch_internals.storage_id(x[2:]) != torch_internals.storage_id(x.clone())


# The graph of autograd, and backward passes.


@part("torch.autograd.graph.Node._input_metadata", used_by="models/autograd_graph.py and jacobians/")
def _():
    y = torch.ones(2, 3, dtype=torch.float64, requires_grad=True).mm(torch.ones(3, 4, dtype=torch.float64))
    (metadata,) = torch_internals.output_metadata(y.grad_fn)
    assert ([*metadata.shape], metadata.dtype) == ([2, 4], torch.float64)
    assert len(torch_internals.output_metadata(torch.ones(2, requires_grad=True).unbind()[0].grad_fn)) == 2


NUMBERS = ("torch.autograd.graph.Node._sequence_nr", "torch._C._autograd._get_sequence_nr")


@part(*NUMBERS, used_by="models/spans.py")
def _():
    x = torch.ones(2, requires_grad=True)
    first = torch_internals.nodes_recorded()
    y = x * 2
    second = torch_internals.nodes_recorded()
    z = Recorded.apply(y, []).exp()
    third = torch_internals.nodes_recorded()
    before, _ = z.grad_fn.next_functions[0]
    assert first <= torch_internals.place_of(y.grad_fn) < second
    assert second <= torch_internals.place_of(before) < torch_internals.place_of(z.grad_fn) < third


@part("torch.autograd.graph.Node._saved_", used_by="rules/")
def _():
    x, w = torch.ones(4, 3), torch.ones(2, 3, requires_grad=True)
    sliced = w[:, -2:].grad_fn
    assert torch_internals.operation_of(sliced) == ("slice", ("self",))
    # A negative integer is held as an unsigned one.
    assert [torch_internals.saved(sliced, name) for name in ("dim", "start", "step")] == [1, -2, 1]
    added = torch.addmm(torch.ones(2, requires_grad=True), x, w.t(), alpha=3).grad_fn
    kind, arguments = torch_internals.operation_of(added)
    assert (kind, arguments) == ("addmm", ("self", "mat1", "mat2"))
    assert [node and node.name() for node, _ in added.next_functions] == [
        "torch::autograd::AccumulateGrad",
        None,
        "TBackward0",
    ]
    assert torch_internals.saved(added, "alpha") == 3
    assert torch.equal(torch_internals.saved(added, "mat1"), x)
    assert torch_internals.operation_of(w.erfinv().grad_fn) == ("", ())
    quotient = w.double().div(2.5).grad_fn  # what torch makes of a number gives way to other dtypes
    assert torch_internals.saved(quotient, "other").reciprocal().dtype == torch.float64


@part("BackwardHookFunctionBackward", used_by="extensions/pass_check.py")
def _():
    layers, inputs = [nn.Linear(2, 2), nn.ReLU()], []
    for layer in layers:
        layer.register_full_backward_hook(lambda *args: None)
        layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    y = nn.Sequential(*layers)(torch.ones(1, 2))
    node = inputs[1].grad_fn  # around the ReLU, and then around the layer before
    before, _ = node.next_functions[0]
    assert {node.name(), before.name(), y.grad_fn.name()} == {torch_internals.BACKWARD_HOOK}
    assert before.next_functions[0][0].name() != torch_internals.BACKWARD_HOOK


class Recorded(torch.autograd.Function):
    """Multiplies by one, and records what is under way when it is passed back through."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.seen.append((torch_internals.current_backward_pass(), torch_internals.current_node()))
        torch_internals.after_backward_pass(lambda: ctx.seen.append("end"))
        return g, None


PASSES = ("torch._C._current_graph_task_id", "torch._C._current_autograd_node")


@part(*PASSES, "torch.autograd.Variable._execution_engine", used_by="extensions/")
def _():
    x, seen = torch.ones(2, requires_grad=True), []
    outputs = [Recorded.apply(x * 2, seen) for _ in range(2)]
    for output in outputs:
        output.sum().backward()
    (first, node), end, (second, other), _ = seen
    assert end == "end"
    assert [node, other] == [output.grad_fn for output in outputs]
    assert len({-1, first, second}) == 3
    assert torch_internals.current_backward_pass() == -1


# Operations, and what changes them for a thread or the process.


@part("torch._foreach_norm", used_by="models/comparison.py")
def _():
    given = [torch.randn(3, 2), torch.zeros(0), torch.tensor([3.0, 4.0]), torch.tensor([torch.nan]).double()]
    found = torch_internals.norms_of(given)
    torch.testing.assert_close(
        torch.stack([norm.double() for norm in found[:3]])[1:], torch.tensor([0.0, 5.0]).double()
    )
    torch.testing.assert_close(found[0], torch.linalg.vector_norm(given[0]))
    assert found[3].isnan()


@part("torch._weight_norm", used_by="linearization/elementary_ops.py")
def _():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with Watch():
        layer(torch.ones(1, 2))
    assert torch_internals.weight_norm in seen


MODE = "torch.utils._python_dispatch.TorchDispatchMode"


@part(
    "torch.ops.OpOverload._schema", f"{MODE}._should_skip_dynamo", used_by="models/inspection.py, contraction/tape.py"
)
def _():
    seen = []

    def watch(self, func, types, args=(), kwargs=None):
        seen.append(torch_internals.schema_of(func))
        return func(*args, **kwargs or {})

    mode = type("Watch", (torch_internals.OperationMode,), {"__torch_dispatch__": watch})
    assert mode.__torch_dispatch__ is watch  # not wrapped in what imports torch's compiler
    with mode():
        torch.ones(2).add_(1)
    schema = next(schema for schema in seen if schema.name == "aten::add_")
    writes = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert writes == {"self"}
    assert {a.name: a.default_value for a in schema.arguments}["alpha"] == 1


@part("torch.utils._pytree", used_by="models/, problem/request.py and linearization/taylor.py")
def _():
    tree = {"a": [1, (2, None)], "b": "text"}
    assert torch_internals.tree_leaves(tree) == [1, 2, None, "text"]
    assert torch_internals.tree_map(str, tree) == {"a": ["1", ("2", "None")], "b": "text"}


TRANSFORMS = ("maybe_current_level", "is_functorch_wrapped_tensor")


@part(*(f"torch._C._functorch.{name}" for name in TRANSFORMS), "torch._functorch", used_by="process/transforms.py")
def _():
    def look(x):
        seen.append((torch_internals.transform_level(), torch_internals.is_wrapped_tensor(x)))
        with torch_internals.without_transforms():
            seen.append((torch_internals.transform_level(), torch_internals.is_wrapped_tensor(torch.ones(2))))
        return x.sum()

    seen = []
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [(1, True), (None, False)] * 2
    assert torch_internals.transform_level() is None


SAMPLES = ("_add_batch_dim", "get_unwrapped", "is_batchedtensor", "is_gradtrackingtensor", "maybe_get_bdim")


@part(*(f"torch._C._functorch.{name}" for name in SAMPLES), used_by="process/transforms.py")
def _():
    def look(x):
        assert torch_internals.is_sample(x)
        assert torch_internals.sample_axis(x) == 1
        assert torch_internals.samples_behind(x) is whole
        with torch_internals.without_innermost():
            assert torch_internals.transform_level() is None
        return torch_internals.as_sample(2 * whole, 1, torch_internals.transform_level())

    whole = torch.randn(2, 3)
    torch.testing.assert_close(torch.func.vmap(look, 1)(whole), 2 * whole.T)

    def differentiate(x):
        assert torch_internals.is_differentiated(x)
        with torch_internals.may_require_gradients(True):
            y = (2 * x).detach().requires_grad_()
        return torch.autograd.grad((y**2).sum(), y, create_graph=True)[0].sum() + x.sum()

    assert torch.func.grad(differentiate)(whole).shape == whole.shape


@part("torch._functorch.eager_transforms.jvp_increment_nesting", used_by="process/switches.py")
def _():
    original, entered = torch_internals.jvp_nesting(), []

    @contextmanager
    def counted():
        entered.append(None)
        with original() as nesting:
            yield nesting

    torch_internals.set_jvp_nesting(counted)
    try:
        torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))
    finally:
        torch_internals.set_jvp_nesting(original)
    assert len(entered) == 1


GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@part(*(f"torch.utils.checkpoint.{name}" for name in GENERATORS), used_by="process/switches.py")
def _():
    generators, entered = torch_internals.checkpoint_generators(), []
    assert generators

    def counted(generator, *args, **kwargs):
        entered.append(None)
        return generator(*args, **kwargs)

    vars(checkpoint).update({name: partial(counted, generator) for name, generator in generators.items()})
    try:
        checkpoint.checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=False)
    finally:
        vars(checkpoint).update(generators)
    assert entered


@part("torch.utils.checkpoint.CheckpointFunction", used_by="process/switches.py")
def _():
    original, applied = checkpoint.CheckpointFunction, []
    checkpoint.CheckpointFunction = type("Replaced", (original,), {"apply": staticmethod(applied.append)})
    try:
        with pytest.raises(TypeError):  # append takes one argument
            checkpoint.checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=True)
    finally:
        checkpoint.CheckpointFunction = original


# BackPACK and ViViT.


@part("backpack.hook_store_io", "torch.nn.Module._backpack_extend", used_by="models/isolation.py and methods/vivit.py")
def _():
    layer = extend(nn.Linear(2, 2))
    assert sys.modules["backpack"].hook_store_io in torch_internals.forward_hooks(layer)[0].values()
    assert backpack_internals.EXTENDED in vars(layer)
    x = torch.ones(1, 2)
    y = layer(x)
    assert layer.input0 is x
    assert torch.equal(layer.output, y)


@part("backpack.context.CTX", used_by="extensions/gram_hook.py and methods/vivit.py")
def _():
    first, second = ViViTGGNExact(), ViViTGGNExact()
    with backpack.backpack(first):
        assert backpack_internals.active_extensions() == (first,)
        backpack_internals.set_active_extensions(e for e in (second, first))
        assert backpack_internals.active_extensions() == (second, first)
    handles = len(backpack_internals.hook_handles())
    extend(nn.Linear(2, 2))
    assert len(backpack_internals.hook_handles()) > handles
    del backpack_internals.hook_handles()[handles:]


PRIVATE_EXTENSIONS = (
    "BackpropExtension._BackpropExtension__module_extensions",
    "ModuleExtension._ModuleExtension__params",
)


@part(*(f"backpack.extensions.{name}" for name in PRIVATE_EXTENSIONS), used_by="extensions/")
def _():
    extensions = backpack_internals.module_extensions(ViViTGGNExact())
    assert set(backpack_internals.params_of(extensions[nn.Linear])) == {"weight", "bias"}
    assert not backpack_internals.params_of(extensions[nn.ReLU])
    extension = ggn_ntk.EmpiricalNTK()
    extension.set_module_extension(nn.Linear, own := extensions[nn.Linear])
    assert backpack_internals.module_extensions(extension) == {nn.Linear: own}


@part("backpack.extensions.saved_quantities.SavedQuantities._saved_quantities", used_by="extensions/")
def _():
    saved, s = SavedQuantities(), torch.ones(2)
    saved.save_quantity(3, s, torch.add)
    assert backpack_internals.quantities_of(saved) == {3: s}
    backpack_internals.quantities_of(saved)[3] = other = torch.zeros(2)
    assert saved.retrieve_quantity(3, delete_old=True) is other


@part("vivit.extensions.secondorder.vivit.ViViTGGNExact", used_by="extensions/gram_hook.py")
def _():
    layer, loss = extend(nn.Linear(3, 2)), extend(nn.MSELoss(reduction="sum"))
    with backpack.backpack(ViViTGGNExact()):
        loss(layer(torch.ones(4, 3)), torch.zeros(4, 2)).backward()
    assert layer.weight.vivit_ggn_exact["gram_mat"]().shape == (2, 4, 2, 4)
