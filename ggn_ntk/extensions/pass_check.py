"""What extensions pass back in a user's backward pass is compared with the gradients of the pass.

The BackPACK extension and the hook for ViViT pass ``s``, the Jacobian of the model's outputs, from module to module.
The gradients of the pass, and its graph, show whether it is right. Letters in shapes: C outputs, N samples.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from backpack.extensions.saved_quantities import SavedQuantities
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module

from ggn_ntk.models.autograd_graph import graph_nodes, precisions
from ggn_ntk.models.comparison import GRADIENT_TOLERANCES, SEEN, cotangent, gradient_tolerance, row_norms
from ggn_ntk.problem.errors import Problem, UnsupportedModelError
from ggn_ntk.process.torch_internals import BACKWARD_HOOK, current_node
from ggn_ntk.rules.activation import active_rrelu
from ggn_ntk.rules.shape import active_dropout

ROUTE = "NTK from this backward pass"

REMEDY = "Use ggn_ntk.empirical_ntk"

# Layers that draw a number for each entry in train mode, and how to recover the derivative that they had.
_DERIVATIVES: dict[type[Module], Callable[..., tuple[Tensor, Tensor]]] = {
    nn.Dropout: active_dropout,
    nn.Dropout1d: active_dropout,
    nn.Dropout2d: active_dropout,
    nn.Dropout3d: active_dropout,
    nn.AlphaDropout: active_dropout,
    nn.FeatureAlphaDropout: active_dropout,
    nn.RReLU: active_rrelu,
}

Gradients = tuple[Any, ...]  # tensors, or None

# Largest relative error where products are rounded to 8 bits (bfloat16) or 11 (TF32): ten times that of one product.
_ROUNDED_PRODUCTS = 10 * 2**-8


class ModuleCall:
    """A call of a module that is being differentiated, as BackPACK shows it.

    Attributes:
        module: The module, on which BackPACK has stored the inputs and the output of its last call.
        g_inp: Gradients with respect to its inputs.
        g_out: Gradients with respect to its outputs.
        kind: What to call it in a message.
        params: Its own parameters that require a gradient.
    """

    def __init__(self, module: Any, g_inp: Gradients, g_out: Gradients) -> None:
        """Take the arguments with which BackPACK calls an extension."""
        self.module, self.g_inp, self.g_out = module, g_inp, g_out
        self.kind = type(module).__name__
        self.params = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """Its positional arguments."""
        return tuple(getattr(self.module, f"input{i}") for i in range(len(self.g_inp)))

    @property
    def output(self) -> Tensor:
        """Its output, or the first of several."""
        output: Tensor = self.module.output
        return output

    @property
    def is_stored(self) -> bool:
        """Whether the inputs and output that BackPACK has stored are those of this call, and not of a later one."""
        names = ["output", *(f"input{i}" for i in range(len(self.g_inp)))]
        if not all(hasattr(self.module, name) for name in names):
            return False
        node, place = current_node(), get_gradient_edge(self.output)
        # The node of the module's hook on its inputs runs now; without inputs that require a gradient, that on outputs.
        node, place = current_node(), get_gradient_edge(self.output)
        before = [x.grad_fn for x in self.inputs if is_wanted(x)]
        return node in before if before else (place.node, place.output_nr) in node.next_functions

    @property
    def has_drawn(self) -> bool:
        """Whether it has drawn a number for each entry."""
        return type(self.module) in _DERIVATIVES and self.module.training and getattr(self.module, "p", 1) > 0

    def derivative(self) -> tuple[Tensor, Tensor]:
        """Recover the derivative that it had at each entry, and where it cannot be recovered."""
        # -> [N, *module input] both
        of_type = _DERIVATIVES[type(self.module)]
        return of_type(self.module, self.inputs[0], self.output, self.g_inp[0], self.g_out[0])

    def leads_with_samples(self, x: Tensor) -> bool:
        """Tell whether an input has the leading axis of the output."""
        return x.ndim > 0 and len(x) == len(self.output)


class PassCheck:
    """Compares what is passed back in a backward pass with its gradients.

    With ``v`` ``[N, C]``, the gradient at the model's output, the gradient at the output of a module is
    ``sum_c v[n, c] s[c, n, ...]``. That shows nothing of samples whose ``v`` is zero, so the graph is looked at, too:
    nothing but its output may leave a module, and only modules that have passed ``s`` back may read it. Errors are
    computed on the device, and read together at the end of the pass.

    Attributes:
        v: The gradient, once the first module is reached.
    """

    def __init__(self, loss: Any, scale: float = 1.0) -> None:
        """Begin at an extended loss, at whose input ``s`` is the identity, times ``scale``."""
        if getattr(getattr(loss, "input0", None), "grad_fn", None) is not current_node():
            raise RuntimeError(
                f"BackPACK has not kept the inputs of this call of {type(loss).__name__}. Call it as loss(output, "
                "target), and once before a backward pass. For several passes over a graph use "
                "`with backpack(..., retain_graph=True):`."
            )
        output = loss.input0
        self._scale, self._tolerance = scale, _tolerance(output)
        self.v: Tensor | None = None
        self._measured: list[tuple[str, str, Tensor]] = []  # kinds of modules, what differs, numbers [4, N]
        self._rounding = torch.empty(0)  # [N], the relative error that rounding was seen to make
        # Kinds of modules that have passed back, by the nodes of their inputs
        self._modules = {output.grad_fn: type(loss).__name__}
        # Which output of a node is read by which nodes
        self._readers: dict[Node | None, list[tuple[int, Node]]] = defaultdict(list)
        for node in graph_nodes(output):
            for before, number in node.next_functions:
                self._readers[before].append((number, node))

    def add(self, call: ModuleCall) -> None:
        """Note that a module has passed back to its inputs."""
        self._modules.update((x.grad_fn, call.kind) for x in call.inputs if is_wanted(x))

    def readers(self, tensor: Tensor) -> list[Node]:
        """List the operations that read a tensor on the way to the model's output."""
        edge = get_gradient_edge(tensor)
        found, waiting = [], [(edge.node, edge.output_nr)]
        while waiting:
            place = waiting.pop()
            for node in [node for number, node in self._readers.get(place[0], ()) if number == place[1]]:
                # Hooks change nothing: those of modules that have not passed back are looked through.
                if node.name() == BACKWARD_HOOK and node not in self._modules:
                    waiting += [(node, i) for i, before in enumerate(node.next_functions) if before == place]
                else:
                    found.append(node)
        return found

    def sources(self, output: Tensor) -> tuple[list[str], list[str]]:
        """Name the modules that have passed back to an output, and operations outside of modules that read it."""
        readers = set(self.readers(output))
        modules = {self._modules[node] for node in readers if node in self._modules}
        return sorted(modules), _names(readers - self._modules.keys())

    def read_elsewhere(self, call: ModuleCall) -> tuple[list[str], list[str]]:
        """Name parameters of a module that are read outside of it, too, and what reads what it computes inside."""
        edge = get_gradient_edge(call.output)
        # All nodes from the output back to the inputs, and to the leaves.
        inside: set[Node | None] = {x.grad_fn for x in call.inputs if is_wanted(x)}
        waiting = [edge.node]
        while waiting:
            node = waiting.pop()
            if node not in inside:
                inside.add(node)
                waiting += [before for before, _ in node.next_functions if before is not None]
        known = inside | {node for number, node in self._readers.get(edge.node, ()) if number == edge.output_nr}
        outside = {node: {reader for _, reader in self._readers.get(node, ())} - known for node in inside}
        params = [name for name, p in call.params.items() if outside.pop(get_gradient_edge(p).node, None)]
        return params, _names(set().union(*outside.values()))

    def compare_output(self, call: ModuleCall, s: Tensor, samples: Any = slice(None)) -> None:
        """Compare ``s`` with the gradient at the output of a module, for some samples."""
        g = call.g_out[0][samples]  # [N, *module output], and s [C, N, *module output]
        if self.v is None:  # at the first module, whose output is the model's
            self.v = g.detach().reshape(len(g), -1) / self._scale
            self._rounding = self.v.new_zeros(len(g))
        elif s.shape[1:] != g.shape or len(g) != len(self.v):
            what = f"{list(s.shape)} was passed back to its output {list(g.shape)}, for {len(self.v)} samples"
            raise UnsupportedModelError([Problem(call.kind, what, REMEDY)], ROUTE)
        else:
            what = (
                f"what {' and '.join(self.sources(call.output)[0])} passed back to its output does not fit the "
                "gradient there ({error}): a module behind it draws random numbers, mixes samples or is "
                "differentiated wrongly, or another term of the loss or a hook changes the gradient"
            )
            self._compare(call, what, s, g)

    def compare_input(self, call: ModuleCall, number: int, s: Tensor) -> None:
        """Compare ``s`` with the gradient that a module passes back to an input."""
        # s [C, N, *module input]
        what = "what it passes back does not fit the gradient ({error}): it draws random numbers or mixes samples"
        self._compare(call, what, s, call.g_inp[number])

    def _compare(self, call: ModuleCall, what: str, s: Tensor, g: Tensor) -> None:
        """Note how far ``sum_c v[n, c] s[c, n, ...]`` is from a gradient, for each sample."""
        self._expect_zero(call, what, *self._measure(s, g))

    def _measure(self, s: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Measure for each sample the norms of the error, of the gradient, and of the terms of the sum over outputs."""
        # s [C, N, ...], g [N, ...] -> [N] each
        assert self.v is not None
        v, c, n = self.v.to(s), *s.shape[:2]
        order = sorted(range(2, s.ndim), key=s.stride, reverse=True)  # as in memory: there is no copy
        s, g = s.permute(0, 1, *order).reshape(c, n, -1), g.permute(0, *(i - 1 for i in order)).reshape(n, -1)
        norm = torch.linalg.vector_norm
        if s.stride(1) == 0:  # the same for all samples
            product, terms = v @ s[:, 0], v.abs() @ norm(s[:, 0], dim=1)
        else:
            product, terms = (v.unsqueeze(1) @ s.transpose(0, 1)).squeeze(1), (v.T.abs() * norm(s, dim=2)).sum(0)
        return norm(product - g, dim=1), norm(g, dim=1), terms

    def expect_known(self, call: ModuleCall, unknown: Tensor, s: Tensor) -> None:
        """Note at which samples ``s`` needs a derivative that is unknown."""
        # unknown [N, ...], s [C, N, ...]
        # Entries are unknown where their input and gradient are zero. If a ReLU made the input, it passes nothing to
        # them.
        if _maker(call.inputs[0]) != "ReluBackward0":
            what = "what it drew for entries that are zero, as their gradient is, cannot be told ({samples})"
            needed = (unknown & (s.abs().amax(0) > 0)).flatten(1).any(1).to(s.dtype)
            self._expect_zero(call, what, needed, torch.ones_like(needed), needed)

    def expect_repeated(self, call: ModuleCall, wanted: list[int], output: Tensor, leaves: list[Tensor]) -> None:
        """Note how far another evaluation is from the call: in gradients, or in outputs where these show nothing."""
        assert self.v is not None
        what = "it returns something else when it is evaluated again ({error}): it draws random numbers"
        size, errors = row_norms(output), row_norms(output - call.output)
        self._expect_zero(call, what, errors.masked_fill(self.v.any(1).to(errors.device), 0), size, size)
        for i, gradient in zip(wanted, gradients_at(output, leaves, call.g_out[0]), strict=True):
            size, errors = row_norms(gradient), row_norms(gradient - call.g_inp[i])
            self._expect_zero(call, what, errors, size, size)

    def expect_independence(self, call: ModuleCall, output: Tensor, leaves: list[Tensor]) -> None:
        """Note how much outputs of every second sample depend on the samples between."""
        some = cotangent(output, seed=0)
        some[1::2] = 0  # so the gradient of these must be zero
        for gradient in gradients_at(output, leaves, some):
            found = row_norms(gradient).nan_to_num(0, 0, 0)
            size, errors = found.amax().expand_as(found), found.clone()
            errors[::2] = 0
            self._expect_zero(call, "samples influence one another in it ({error})", errors, size, size)

    def allow_rounding(self, call: ModuleCall, wanted: list[int], passed: list[Tensor]) -> None:
        """Allow, in all modules further back, for rounding where terms cancel, say in a normalisation."""
        # An evaluation has repeated the gradients: so rounding alone makes the sum of ``v s`` differ from them.
        for i, s in zip(wanted, passed, strict=True):
            error, *sizes = self._measure(s, call.g_inp[i])
            relative = (error / torch.maximum(*sizes)).nan_to_num(0, 0, 0)
            self._rounding = torch.maximum(self._rounding.to(relative), relative)

    def _expect_zero(self, call: ModuleCall, what: str, errors: Tensor, sizes: Tensor, terms: Tensor) -> None:
        """Note the error of each sample, the norm of what is right, and that of the terms it sums."""
        # errors [N], sizes [N], terms [N]
        self._measured.append((call.kind, what, torch.stack([errors, sizes, terms, self._rounding.to(errors)])))

    def judge(self) -> None:
        """Raise at the first error that is more than rounding: it has led to those further back."""
        if not self._measured:
            return
        assert self.v is not None
        together = torch.stack([measured.to(self.v.device) for _, _, measured in self._measured], 1)
        errors, sizes, terms, rounding = together.cpu().double()  # [number of comparisons, N] each
        scales, info = torch.maximum(sizes, terms), torch.finfo(self.v.dtype)  # rounding grows with terms that cancel
        # Samples show nothing if their numbers are zero, or too small to compute with, or infinite on both sides.
        left_out = (scales < info.tiny / info.eps) | ~(sizes.isfinite() | terms.isfinite())
        relative = (errors / scales).nan_to_num(nan=torch.inf).masked_fill(left_out, 0)
        differs = relative > self._tolerance + SEEN * rounding
        found = torch.stack([relative.amax(1), differs.sum(1)], 1).tolist()
        for (kind, what, _), (error, count) in zip(self._measured, found, strict=True):
            if count:
                samples = f"{int(count)} of {len(self.v)} samples"
                what = what.format(error=f"relative error {error:.1e}, {samples}", samples=samples)
                raise UnsupportedModelError([Problem(kind, what, REMEDY)], ROUTE)


def call_problems(check: PassCheck | None, call: ModuleCall, saved: SavedQuantities) -> Iterator[Problem]:
    """Find why a module may not have received all that is passed back to it, or cannot pass it on."""
    if not call.is_stored:
        what = f"this {call.kind} is called more than once, and BackPACK keeps the inputs and output of one call"
        yield Problem(call.kind, what, f"Use a {call.kind} for each call, or ggn_ntk.empirical_ntk")
        return
    modules, others = ([], []) if check is None else check.sources(call.output)
    named = f" ({', '.join(others)})" if others else ""
    if not modules or saved.retrieve_quantity(call.output.data_ptr(), delete_old=False) is None:
        what = f"nothing was passed back to its output: something behind it is not an extended module{named}"
        yield Problem(call.kind, what, REMEDY)
    elif others:
        what = f"something between its output and the modules behind it is not an extended module{named}"
        yield Problem(call.kind, what, REMEDY)
    if not call.g_inp:
        yield Problem(call.kind, "its inputs are given by keyword, and BackPACK does not store them", REMEDY)
    for x in call.inputs:
        if is_wanted(x) and is_output(x) and not call.leads_with_samples(x):
            shapes = f"{list(x.shape)}, its output {list(call.output.shape)}"
            yield Problem(call.kind, f"its input has shape {shapes}: the samples must stay in front", REMEDY)
    params, others = ([], []) if check is None else check.read_elsewhere(call)
    for name in params:
        yield Problem(f"{call.kind}.{name}", "it is used more than once, and only this use of it is seen", REMEDY)
    if others:
        what = f"what it computes is read elsewhere ({', '.join(others)}), and only its first output is passed back to"
        yield Problem(call.kind, what, REMEDY)


def is_wanted(x: Any) -> bool:
    """Tell whether BackPACK passes something back to an input."""
    return isinstance(x, Tensor) and x.requires_grad


def _names(nodes: Iterable[Node]) -> list[str]:
    """Name the forward operations of nodes."""
    return sorted({re.sub(r"Backward\d*$", "", node.name()) for node in nodes})


def is_output(x: Tensor) -> bool:
    """Tell whether a module's input is the output of another module with hooks."""
    assert x.grad_fn is not None
    before, _ = x.grad_fn.next_functions[x.output_nr]
    return before is not None and x.grad_fn.name() == before.name() == BACKWARD_HOOK


def _maker(x: Tensor) -> str:
    """Name the operation that made a module's input."""
    node, number = x.grad_fn, x.output_nr
    while node is not None and node.name() == BACKWARD_HOOK:
        node, number = node.next_functions[number]
    return "" if node is None else node.name()


def _tolerance(output: Tensor) -> float:
    """Choose the largest relative error that rounding makes, as precision flags are in the user's pass."""
    dtypes = precisions(output)
    lower = dtypes - GRADIENT_TOLERANCES.keys()
    if lower:
        what = f"{' and '.join(sorted(map(str, lower)))} takes part in it"
        remedy = "Run the pass in float32 or float64, without autocast: kernels are exact in these only"
        raise UnsupportedModelError([Problem("", what, remedy)], ROUTE)
    if torch.float32 in dtypes and _rounds_products(output.device):
        return _ROUNDED_PRODUCTS
    return gradient_tolerance(output)


def _rounds_products(device: torch.device) -> bool:
    """Tell whether products in float32 may be computed in TF32 or bfloat16, as convolutions are on GPUs by default."""
    backends: Any = torch.backends
    cpu = device.type == "cpu"
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest" or (not cpu and backends.cudnn.allow_tf32)
    switches = (backends.mkldnn.matmul, backends.mkldnn.conv) if cpu else (backends.cuda.matmul, backends.cudnn.conv)
    return any(switch.fp32_precision in ("tf32", "bf16") for switch in switches)


def gradients_at(output: Tensor, leaves: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """Pass one gradient back from an output to leaves of its graph, which is kept."""
    return torch.autograd.grad(output, leaves, g, True, allow_unused=True, materialize_grads=True)
