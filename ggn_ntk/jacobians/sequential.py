"""Backward passes through Sequential models: ``s`` passes back through one layer after the other.

What belongs to a layer is freed before the next, so the memory peak is one layer's. Up to the last nonlinearity ``s``
is the same for all samples, and is kept once. Layers and their transposed Jacobians are those of
:mod:`ggn_ntk.rules`, as in the BackPACK extension :class:`ggn_ntk.EmpiricalNTK`.
"""

import string
from collections.abc import Callable, Generator, Iterator
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.products import Part, contract_into
from ggn_ntk.jacobians.backward import Parts, Step, Writer, identity
from ggn_ntk.jacobians.layers import REMEDY, Use, backpropagate, is_layer, jacobians, named_layers, tensors_of
from ggn_ntk.jacobians.sums import Sums
from ggn_ntk.memory.blocks import split
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.memory.buffers import Joined
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.errors import Problem, UnsupportedRouteError
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import parameters_of, uncompiled
from ggn_ntk.rules.registry import backpropagation_for


class SequentialPass:
    """A forward pass through a Sequential model, layer by layer, and the way back.

    Attributes:
        output: The model's output ``[N, *out]``.
        failures: Why the rule of a parameter failed on the way, by name.
    """

    def __init__(self, request: Request, inputs: Inputs) -> None:
        """Evaluate the model on all samples and record the input of each layer."""
        with isolated(request.model) as session, session.evaluation({}, inspect=session.foreign):
            uses, output = _forward(request, inputs)
        self._uses: list[Use] = uses
        self.output: Tensor = output
        if any(use.params and len(x) != len(inputs) for use in self._uses for x in tensors_of(use.x)):
            what = "the leading axis of a layer's input is not that of the samples"
            raise UnsupportedRouteError([Problem("", what, REMEDY)])
        self.failures: dict[str, str] = {}

    @property
    def kept(self) -> list[Tensor]:
        """What the evaluation keeps: the inputs of layers."""
        return [x for use in self._uses for x in tensors_of(use.x)]

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of one output holds where it is largest."""
        first = next((i for i, use in enumerate(self._uses) if use.params), len(self._uses))
        passed = (x.numel() for use in self._uses[first + 1 :] for x in tensors_of(use.x))
        return max(self.output.numel(), *passed, 1)

    @property
    def total(self) -> int:
        """Numbers that ``s`` of one output holds on the whole way back."""
        return self.output.numel() + sum(x.numel() for use in self._uses for x in tensors_of(use.x))

    def steps(self, outputs: Tensor, parts: Parts, *, again: bool, hold: bool) -> Iterator[Step]:
        """Pass ``s`` of some outputs back, a layer at a time; what is not needed ``again`` is freed on the way."""
        uses = self._uses.copy()
        if not again:
            self._uses.clear()
        s = identity(self.output, outputs)
        sums = Sums((name for use in uses for name in use.params.values()), (), {}, self.failures)

        def parts_once(name: str, jacobian: Factored, n: int) -> list[Part] | None:
            return None if sums.several([name]) else parts(name, jacobian, n)

        while _any_wanted(uses):
            blocks = _blocks(uses, s)
            if len(blocks) > 1:
                s = yield from self._in_blocks(uses, s, blocks, parts_once, sums)
            else:
                s = yield from self._all(uses, s, sums, hold=hold)

    def _all(self, uses: list[Use], s: Tensor, sums: Sums, *, hold: bool) -> Generator[Step, None, Tensor]:
        """Pass ``s`` of all samples back through the last layer."""
        # s [C, N, *layer output] -> [C, N, *layer input]
        use = uses.pop()
        if use.params:
            yield from Step.standing(partial(sums.add, _writer(use, partial(jacobians, use, s))))
        if not _any_wanted(uses):
            return s
        # The Jacobians of a parameter that is used again wait, and keep ``s``: the pass goes on with a copy.
        waits = (hold or sums.several(use.params.values())) and s.stride(1) != 0
        return backpropagate(use, s.clone() if waits else s)

    def _in_blocks(
        self, uses: list[Use], s: Tensor, blocks: list[slice], parts: Parts, sums: Sums
    ) -> Generator[Step, None, Tensor]:
        """Pass ``s`` of one block of samples after the other back through a chain of layers."""
        # How many layers the chain has turns out at the first block: as many as let no more wait for the other blocks
        # than there is room for.
        # s [C, N, *layer output] -> [C, N, *layer input]
        n, most = s.shape[1], MemoryBudget.of(s.device).waiting // s.element_size()
        chain: list[_Link] = []
        passed = Joined(n)
        for block in blocks:
            part = s[:, block]
            for link in chain:
                part = link.pass_back(block, part)
            while block is blocks[0] and _any_wanted(uses) and sum(link.waiting for link in chain) <= most:
                chain.append(_Link(uses.pop(), parts, self.failures, passes_on=_any_wanted(uses), n=n))
                part = chain[-1].pass_back(block, part)
            if _any_wanted(uses):
                passed.put(block, _axes(part), part)
        while chain:
            link = chain.pop(0)
            if link.use.params:
                yield from Step.standing(partial(sums.add, _writer(link.use, link.jacobians)))
        return passed.ordered(_axes(passed.tensor)) if _any_wanted(uses) else s


def _writer(use: Use, write: Callable[[], dict[str, Factored]]) -> Writer:
    """Take what writes the Jacobians of a layer."""
    names = tuple(use.params.values())
    return Writer(type(use.module).__name__, names, lambda: {name: [jacobian] for name, jacobian in write().items()})


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
    entries = [s[0, 0].numel(), *(x[0].numel() for use in uses[first + 1 :] for x in tensors_of(use.x))]
    block = MemoryBudget.of(s.device).passing // (s.element_size() * len(s) * max(entries))
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
        self.use, self._parts, self._passes_on, self._n = use, parts, passes_on, n
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
        use = self.use.restrict(block)
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
        found = _writer(use, partial(jacobians, use, s)).written(self._failures)
        return {name: jacobian for name, (jacobian,) in found.items() if name not in self._failures}

    def jacobians(self) -> dict[str, Factored]:
        """Put the blocks together."""
        if self._s.numel > 0:
            return self._written(self.use, self._s.ordered(_axes(self._s.tensor)))
        return {
            name: Factored(f"{','.join(w.letters for w in wholes)}->{result}", tuple(w.tensor for w in wholes))
            for name, (result, wholes) in self._joined.items()
            if name not in self._failures
        }


@torch.no_grad()
def _forward(request: Request, inputs: Inputs) -> tuple[list[Use], Any]:
    """Evaluate the model on all samples and record the input of each layer."""
    names = {id(p): name for name, p in request.params.items()}
    args = inputs.positional
    assert args is not None
    uses: list[Use] = []
    for name, layer in named_layers(uncompiled(request.model)):
        if not is_layer(layer):
            continue
        if not all(isinstance(x, Tensor) for x in args):
            what = f"{type(layer).__name__} takes {type(args[0]).__name__}, not a tensor, from the layer before"
            raise UnsupportedRouteError([Problem(name, what, REMEDY)])
        wanted = {key: names[id(p)] for key, p in parameters_of(layer).items() if id(p) in names}
        uses.append(Use(layer, args[0] if len(args) == 1 else args, wanted))
        args = (layer(*(x.clone() if _may_overwrite(layer) else x for x in args)),)
    return uses, args[0]


def _may_overwrite(layer: Module) -> bool:
    """Tell whether a layer may work in place, on the recorded output of the layer before."""
    return getattr(layer, "inplace", False) or not type(layer).__module__.startswith("torch.nn.")
