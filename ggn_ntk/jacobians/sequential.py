"""Capture by a walk through a Sequential model: ``s`` passes back through one layer after the other.

What belongs to a layer is freed before the next, so the memory peak is one layer's. Up to the last nonlinearity ``s``
is the same for all samples, and is kept once. Layers and their transposed Jacobians are those of
:mod:`ggn_ntk.rules`, as in the BackPACK extension :class:`ggn_ntk.EmpiricalNTK`.
"""

import string
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.products import Part, contract_into
from ggn_ntk.memory.blocks import SIZE_ELSEWHERE, SIZES, WAITING, Joined, split
from ggn_ntk.memory.chunks import Piece, split_outputs
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import eager, hidden_computation
from ggn_ntk.problem.errors import NotCapturedError, Problem, UnsupportedRouteError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import OutputAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.rules.registry import acts_on_each_sample, backpropagation_for, rule_for

_REMEDY = "Use capture='autograd' ('auto' does)"


#: What is said of a parameter whose rule raises an error.
FAILS = "the rule of its layer fails"

#: Takes a parameter's name, its Jacobian of some samples and the number of all; groups the operands by what can
#: be contracted for these samples by themselves (``None`` where nothing can).
Parts = Callable[[str, Factored, int], list[Part] | None]


class Use(NamedTuple):
    """One call of a layer."""

    module: Module  # the layer
    x: Any  # its input ``[N, ...]``; a tuple where it takes several
    params: dict[str, str]  # its wanted parameters: their names on the layer, and those users know them by

    def restrict(self, samples: slice) -> "Use":
        """Select samples."""
        x = tuple(x[samples] for x in self.x) if isinstance(self.x, tuple) else self.x[samples]
        return self._replace(x=x)


class Walk:
    """A forward pass through a Sequential model, layer by layer, and the way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        counts: How often each wanted parameter is used, by name.
        failures: Why the rule of a parameter's layer failed on the way, by name.
    """

    kind = "backpack"

    def __init__(self, request: Request, inputs: Inputs) -> None:
        """Evaluate the model on all samples and record the input of each layer."""
        with isolated(request.model) as session, session.evaluation({}, inspect=session.foreign):
            self._uses, self.output = _forward(request, inputs)
        if any(use.params and len(x) != len(inputs) for use in self._uses for x in _tensors(use.x)):
            what = "the leading axis of a layer's input is not that of the samples"
            raise UnsupportedRouteError([Problem("", what, _REMEDY)])
        self.counts = Counter(name for use in self._uses for name in use.params.values())
        self.failures: dict[str, str] = {}

    def pieces(self, axes: OutputAxes) -> list[Piece]:
        """Split the outputs: here they pass back together."""
        return split_outputs(axes, self.output[0].numel())

    def jacobians(self, outputs: Tensor, parts: Parts) -> Iterator[dict[str, Factored]]:
        """Pass ``s`` back and write Jacobians on the way. Recorded inputs are freed, so this works once."""
        # outputs [*out]
        s = identity(self.output, outputs)
        while _any_wanted(self._uses):
            blocks = _blocks(self._uses, s)
            s = yield from (self._in_blocks(s, blocks, parts) if len(blocks) > 1 else self._all(s))

    def _all(self, s: Tensor) -> Generator[dict[str, Factored], None, Tensor]:
        """Pass ``s`` of all samples back through the last layer."""
        # s [C, N, *layer output] -> [C, N, *layer input]
        use = self._uses.pop()
        if use.params:
            yield written(lambda: jacobians(use, s), use.module, use.params, self.failures)
        if not _any_wanted(self._uses):
            return s
        waits = any(self.counts[name] > 1 for name in use.params.values()) and s.stride(1) != 0
        return backpropagate(use, s.clone() if waits else s)  # which may overwrite it

    def _in_blocks(self, s: Tensor, blocks: list[slice], parts: Parts) -> Generator[dict[str, Factored], None, Tensor]:
        """Pass ``s`` of one block of samples after the other back through a chain of layers."""
        # How many layers the chain has turns out at the first block: as many as let no more wait for the other blocks
        # than there is room for.
        # s [C, N, *layer output] -> [C, N, *layer input]
        uses, n = self._uses, s.shape[1]
        chain: list[_Link] = []
        passed = Joined(n)
        for block in blocks:
            part = s[:, block]
            for link in chain:
                part = link.pass_back(block, part)
            while block is blocks[0] and _any_wanted(uses) and sum(link.waiting for link in chain) <= WAITING:
                chain.append(_Link(uses.pop(), parts, self.failures, passes_on=_any_wanted(uses), n=n))
                part = chain[-1].pass_back(block, part)
            if _any_wanted(uses):
                passed.put(block, _axes(part), part)
        while chain:
            found = chain.pop(0).jacobians()
            if found:
                yield found
            del found
        return passed.ordered(_axes(passed.tensor)) if _any_wanted(uses) else s


def _any_wanted(uses: list[Use]) -> bool:
    """Tell whether ``s`` has to pass further back."""
    return any(use.params for use in uses)


def _blocks(uses: list[Use], s: Tensor) -> list[slice]:
    """Split samples for the way back through the last layers."""
    # s [C, N, *layer output]
    n, use = s.shape[1], uses[-1]
    if s.stride(1) == 0 and (use.params or backpropagation_for(use.module).linear):
        return split(n, n)
    first = next(i for i, use in enumerate(uses) if use.params)
    entries = [s[0, 0].numel(), *(x[0].numel() for use in uses[first + 1 :] for x in _tensors(use.x))]
    block = SIZES.get(s.device.type, SIZE_ELSEWHERE) // (len(s) * max(entries))
    threads = torch.get_num_threads()  # each takes as many products of a batch
    return split(n, ceil(block / threads) * threads)


def _axes(s: Tensor) -> str:
    """Name the axes of ``s``."""
    # s [C, N, ...]
    return "cn" + string.ascii_uppercase[: s.ndim - 2]


class _Link:
    """A layer in a chain, through which blocks of samples pass."""

    def __init__(self, use: Use, parts: Parts, failures: dict[str, str], *, passes_on: bool, n: int) -> None:
        """Set up."""
        self._use, self._parts, self._passes_on, self._n = use, parts, passes_on, n
        self._failures = failures
        self._s = Joined(n)
        self._joined: dict[str, tuple[str, list[Joined]]] = {}

    @property
    def waiting(self) -> int:
        """Numbers that wait for other blocks."""
        wholes = [self._s, *(whole for _, wholes in self._joined.values() for whole in wholes)]
        return sum(whole.numel for whole in wholes)

    def pass_back(self, block: slice, s: Tensor) -> Tensor:
        """Keep what the Jacobians need of a block, and pass ``s`` back."""
        # s [C, block, *layer output] -> [C, block, *layer input]
        use = self._use.restrict(block)
        if use.params:
            self._keep(block, s, self._written(use, s))
        return backpropagate(use, s) if self._passes_on else s

    def _keep(self, block: slice, s: Tensor, factored: dict[str, Factored]) -> None:
        """Keep the Jacobians of a block as far as the order of contraction forms them, else ``s``."""
        # s [C, block, *layer output]
        split_up = {name: self._parts(name, jacobian, self._n) for name, jacobian in factored.items()}
        if any(found is None for found in split_up.values()):
            self._s.put(block, _axes(s), s)
            return
        for name, found in split_up.items():
            assert found is not None
            new = (factored[name].result, [Joined(self._n) for _ in found])
            for part, whole in zip(found, self._joined.setdefault(name, new)[1], strict=True):
                contract_into(part, whole, block)

    def _written(self, use: Use, s: Tensor) -> dict[str, Factored]:
        """Write the Jacobians of some samples; none where the rule failed for any."""
        found = written(lambda: jacobians(use, s), use.module, use.params, self._failures)
        return {name: jacobian for name, jacobian in found.items() if name not in self._failures}

    def jacobians(self) -> dict[str, Factored]:
        """Put the blocks together."""
        if self._s.numel > 0:
            return self._written(self._use, self._s.ordered(_axes(self._s.tensor)))
        return {
            name: Factored(f"{','.join(w.letters for w in wholes)}->{result}", tuple(w.tensor for w in wholes))
            for name, (result, wholes) in self._joined.items()
            if name not in self._failures
        }


def structure_problems(request: Request) -> Iterator[Problem]:
    """Find what keeps a model from being taken apart into layers."""
    if request.x1.kwargs:
        yield Problem("", "it is called with keyword arguments, which layers do not pass on", _REMEDY)
    if request.output is not None:
        yield Problem("", "what it returns is not its last layer's output (output=)", _REMEDY)
    wanted = {id(p) for p in request.params.values()}
    for name, module in _named_layers(eager(request.model)):
        yield from hidden_computation(module, name)
        has_wanted = any(id(p) in wanted for p in module.parameters(recurse=_is_layer(module)))
        kind = type(module).__name__
        if not _is_layer(module):
            if has_wanted:
                yield Problem(name, f"{kind} has a parameter of its own", _REMEDY)
        elif rule_for(module) is not None:
            continue
        elif has_wanted and any(True for _ in module.children()):
            yield Problem(name, f"{kind} may compute between its modules what a walk cannot see", _REMEDY)
        elif has_wanted:
            yield Problem(name, f"no rule is registered for {kind}", f"Write one with register_rule({kind})")
        elif not type(module).__module__.startswith("torch.nn."):
            yield Problem(name, f"{kind} is not a layer of torch's", _REMEDY)


def _is_layer(module: Module) -> bool:
    """Tell layers from containers that call their children one after the other."""
    return not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward


def _named_layers(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """List a model's containers and layers, these in the order of their calls."""
    yield name, module
    if not _is_layer(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from _named_layers(child, f"{name}.{key}".lstrip("."))


def _tensors(x: Any) -> tuple[Tensor, ...]:
    """List the inputs of a layer."""
    return x if isinstance(x, tuple) else (x,)


def is_known(request: Request) -> bool:
    """Tell whether nothing but layers acts on samples of which the library knows that they act on each by itself."""
    layers = (layer for _, layer in _named_layers(eager(request.model)) if _is_layer(layer))
    return all(acts_on_each_sample(layer) for layer in layers)


@torch.no_grad()
def _forward(request: Request, inputs: Inputs) -> tuple[list[Use], Any]:
    """Evaluate the model on all samples and record the input of each layer."""
    names = {id(p): name for name, p in request.params.items()}
    args = inputs.args
    uses: list[Use] = []
    for name, layer in _named_layers(eager(request.model)):
        if not _is_layer(layer):
            continue
        if not all(isinstance(x, Tensor) for x in args):
            what = f"{type(layer).__name__} takes {type(args[0]).__name__}, not a tensor, from the layer before"
            raise UnsupportedRouteError([Problem(name, what, _REMEDY)])
        params = layer.named_parameters(recurse=False, remove_duplicate=False)
        wanted = {key: names[id(p)] for key, p in params if id(p) in names}
        uses.append(Use(layer, args[0] if len(args) == 1 else args, wanted))
        args = (layer(*(x.clone() if _may_overwrite(layer) else x for x in args)),)
    return uses, args[0]


def _may_overwrite(layer: Module) -> bool:
    """Tell whether a layer may work in place, on the recorded output of the layer before."""
    return getattr(layer, "inplace", False) or not type(layer).__module__.startswith("torch.nn.")


def written(
    write: Callable[[], dict[str, Factored]], module: Module, params: dict[str, str], failures: dict[str, str]
) -> dict[str, Factored]:
    """Write the Jacobians of a layer, or take down that its rule fails."""
    try:
        return write()
    except Exception as error:
        failures.update(dict.fromkeys(params.values(), why_not(error, module)))
        return {}


def why_not(error: Exception, module: Module) -> str:
    """Say why the rule of a layer gives no Jacobians; where memory ran out, that is no reason to go on."""
    if is_out_of_memory(error):
        raise error
    return str(error) if isinstance(error, NotCapturedError) else f"{FAILS} ({type(module).__name__}: {error})"


def jacobians(use: Use, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of a layer's wanted parameters."""
    # s [C, N, *layer output]
    rule = rule_for(use.module)
    assert rule is not None
    factored = rule(use.module, use.x, s)
    return {name: factored[key] for key, name in use.params.items()}


def identity(output: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Start ``s`` at the output."""
    # output [N, *out], outputs [*out] -> [C, N, *out]
    n, *out = output.shape
    if outputs is None:
        rows = torch.eye(output[0].numel(), dtype=output.dtype, device=output.device)
    else:
        rows = torch.zeros(len(outputs), output[0].numel(), dtype=output.dtype, device=output.device)
        rows.scatter_(1, outputs.to(output.device).unsqueeze(1), 1)
    return rows.reshape(-1, 1, *out).expand(-1, n, *out)


def backpropagate(use: Use, s: Tensor) -> Tensor:
    """Pass ``s`` back through a layer."""
    # s [C, N, *layer output] -> [C, N, *layer input]
    function, linear = backpropagation_for(use.module)
    if linear and s.stride(1) == 0:
        return function(use.module, use.x[:1], s[:, :1]).expand(-1, s.shape[1], *use.x.shape[1:])
    return function(use.module, use.x, s)
