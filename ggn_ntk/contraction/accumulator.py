"""Kernels, added up from the Jacobians of one layer after the other."""

from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.contraction.accumulate import Counts, add_products, counts
from ggn_ntk.contraction.bias import join_biases
from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.one_hot import cost
from ggn_ntk.contraction.operand import memory_of
from ggn_ntk.contraction.products import KernelEinsum, NamedEinsum, Part, kernel_einsum, parts
from ggn_ntk.contraction.tape import CONTRACTIONS
from ggn_ntk.contraction.uses import added_up
from ggn_ntk.memory.budget import MemoryBudget
from ggn_ntk.problem.output_axes import Roles

# How many numbers Jacobians may hold that are formed because it is cheaper.
_LARGEST = 2**26


class Accumulator:
    """Sums kernels over parameters, by the name of the group that they belong to."""

    def __init__(
        self,
        roles: Roles,
        n1: int | None,
        group: Callable[[str], str],
        formed: Container[str] = (),
        paired: bool = False,
    ) -> None:
        """Set up for Jacobians of N1 samples and those behind them; of one set, with itself, if N1 is ``None``."""
        self.roles, self.n1, self._group, self.paired = roles, n1, group, paired
        self._formed = formed  # whose Jacobians are formed before x1 meets x2: products of their terms would round
        self.kernels: dict[str, Tensor] = {}

    def parts(self, name: str, jacobian: Factored, n: int) -> list[Part] | None:
        """Group the operands of a Jacobian by what can be contracted for some of N samples by themselves."""
        n1 = n if self.n1 is None else self.n1
        m, formed = n1 if self.n1 is None else n - n1, name in self._formed
        return parts(jacobian, n1, m, self.roles, formed=formed, paired=self.paired)

    def add(self, first: Jacobians, second: Jacobians | None = None) -> None:
        """Add Jacobians of some parameters, and of the same ones those of x2 if it was evaluated by itself."""
        form, inputs = self._form(first, second)
        CONTRACTIONS.run(form, inputs, self.kernels, lambda: self._add(first, second))

    def _form(self, first: Jacobians, second: Jacobians | None) -> tuple[Hashable, list[Tensor]]:
        """Describe all that decides how Jacobians are contracted, and list their tensors."""
        places: dict[Hashable, int] = {}
        inputs: list[Tensor] = []
        described: list[Hashable] = []
        for jacobians in (first, second or {}):
            for name, several in jacobians.items():
                described.append((self._group(name), name in self._formed, len(several)))
                for jacobian in several:
                    described += [jacobian.equation, places.setdefault(("jacobian", id(jacobian)), len(places))]
                    for given in jacobian.operands:
                        x = given if isinstance(given, Tensor) else given.places
                        described += [
                            x.shape,
                            x.stride(),
                            x.dtype,
                            x.device,
                            places.setdefault(memory_of(x), len(places)),
                        ]
                        described.append(0 if isinstance(given, Tensor) else given.size)
                        inputs.append(x)
        kernels = tuple((name, kernel.dtype) for name, kernel in self.kernels.items())
        budget = MemoryBudget.of(inputs[0].device) if inputs else None
        return (self.roles, self.n1, self.paired, second is None, budget, kernels, *described), inputs

    def _add(self, first: Jacobians, second: Jacobians | None) -> None:
        """Contract Jacobians."""
        once, products = defaultdict[str, list[tuple[Factored, Factored]]](list), list[NamedEinsum]()
        for name, ours in first.items():
            theirs = ours if second is None else second[name]
            key, formed = self._group(name), name in self._formed
            if len(ours) == len(theirs) == 1 and not formed:
                once[key].append((ours[0], theirs[0]))  # may be joined with another, whose kernels are added up anyway
                continue
            if formed:  # what cancels between several is to do so before it is squared
                ours, theirs = _on_both_sides(_one, ours, theirs)
            pairs = [self._product(a, b, formed=formed) for a in ours for b in theirs]
            if len(pairs) > 1 and self._are_cheaper_as_one(ours, theirs, pairs):
                ours, theirs = _on_both_sides(_one, ours, theirs)
                pairs = [self._product(ours[0], theirs[0])]
            products += [(key, pair) for pair in pairs]
        for key, uses in once.items():
            ours, theirs = _on_both_sides(join_biases, [a for a, _ in uses], [b for _, b in uses])
            if [a.equation for a in ours] != [b.equation for b in theirs]:  # it pays for one of the two sets alone
                ours, theirs = ([use[side] for use in uses] for side in (0, 1))
            products += [(key, self._product(a, b)) for a, b in zip(ours, theirs, strict=True)]
        if products:
            sets = [next(iter(jacobians.values()))[0].sizes for jacobians in (first, second) if jacobians]
            self._contract(products, sets)

    def _product(self, first: Factored, second: Factored, *, formed: bool = False) -> KernelEinsum:
        """Write the product of two Jacobians of one parameter as one einsum."""
        return kernel_einsum(first, second, self.roles, formed=formed, paired=self.paired)

    def _are_cheaper_as_one(
        self, ours: Sequence[Factored], theirs: Sequence[Factored], pairs: Sequence[KernelEinsum]
    ) -> bool:
        """Tell whether it takes fewer operations to form the sum of several Jacobians than to contract all pairs."""
        ours_as_one, theirs_as_one = _shape_of_one(ours), _shape_of_one(theirs)
        if max(one.operands[0].shape.numel() for one in (ours_as_one, theirs_as_one)) > _LARGEST:
            return False
        together = self._product(ours_as_one, theirs_as_one)
        forming = sum(cost(jacobian.labelled, jacobian.result) for jacobian in {*ours, *theirs})
        return forming + cost(together.operands, together.result) < sum(cost(p.operands, p.result) for p in pairs)

    def _contract(self, products: list[NamedEinsum], sets: Sequence[Mapping[str, int]]) -> None:
        """Contract products of Jacobians, of one set with itself or of two, given the sizes of their letters."""
        n, m = self._numbers(sets)
        free = (self.roles.among(sizes["c"]).free for sizes in (sets[0], sets[-1]))
        shape = (*((n,) if self.paired else (n, m)), self.roles.diagonal, *free)
        symmetric = len(sets) == 1 and self.n1 is None
        offset = self.n1 if len(sets) == 1 and self.n1 else 0
        add_products(self.kernels, products, shape, offset=offset, symmetric=symmetric)

    def _numbers(self, sets: Sequence[Mapping[str, int]]) -> tuple[int, int]:
        """Count the samples of x1 and of x2."""
        n, m = sets[0]["n"], sets[-1]["n"]
        return (n, m) if len(sets) > 1 or self.n1 is None else (self.n1, n - self.n1)


def _on_both_sides(
    rewrite: Callable[[Sequence[Factored]], list[Factored]], ours: Sequence[Factored], theirs: Sequence[Factored]
) -> tuple[list[Factored], list[Factored]]:
    """Rewrite Jacobians of x1, and those of x2, which may be the same."""
    same = all(a is b for a, b in zip(ours, theirs, strict=False)) and len(ours) == len(theirs)
    rewritten = rewrite(ours)
    return rewritten, rewritten if same else rewrite(theirs)


def _shape_of_one(jacobians: Sequence[Factored]) -> Factored:
    """Write the sum of Jacobians as one, without its numbers."""
    some = jacobians[0]
    return Factored(
        "cnk->cnk", (torch.empty(some.sizes["c"], some.sizes["n"], prod(some.parameter_sizes), device="meta"),)
    )


def _one(jacobians: Sequence[Factored]) -> list[Factored]:
    """Write a sum of Jacobians as one."""
    return list(jacobians) if len(jacobians) == 1 else [Factored("cnk->cnk", (added_up(jacobians),))]


@dataclass
class Taken:
    """What a recorder takes down.

    Attributes:
        products: Products of Jacobians, by the names of groups.
        counts: What contracting those of each layer takes, where all parameters are summed.
    """

    products: list[NamedEinsum] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """The operations of all layers."""
        return sum(found.flops for found in self.counts)

    @property
    def waiting(self) -> float:
        """As many operations as take the time of all calls, and that by which memory is slower."""
        return sum(found.waiting for found in self.counts)


class Recorder(Accumulator):
    """Takes products of Jacobians down, with the shapes of their operands alone, instead of contracting them."""

    def __init__(self, taken: Taken, sizes: Sequence[int], *args: Any) -> None:
        """Set up; as if there were N1 and N2 samples."""
        super().__init__(*args)
        self._taken, self._sizes = taken, sizes
        self.n1 = None if self.n1 is None else sizes[0]

    def parts(self, name: str, jacobian: Factored, n: int) -> None:
        """Keep operands apart: products of whole Jacobians are to be taken down."""

    def add(self, first: Jacobians, second: Jacobians | None = None) -> None:
        """Take products of Jacobians down."""
        made: dict[Hashable, Tensor] = {}
        ours = _of_size(first, self._sizes[0] if self.n1 is None else sum(self._sizes), made)
        theirs = None if second is None else _of_size(second, self._sizes[-1], made)
        self._add(ours, theirs)
        device = next(
            (o.device for several in first.values() for o in several[0].operands if isinstance(o, Tensor)), None
        )
        if device is not None:
            budget, of_all = MemoryBudget.of(device), (self.roles, self.n1, lambda _: "", self._formed, self.paired)
            _Counter(self._taken, budget, *of_all).count(ours, theirs)

    def _contract(self, products: list[NamedEinsum], sets: Sequence[Mapping[str, int]]) -> None:
        """Take products down."""
        self._taken.products += [(name, product.without_data()) for name, product in products]


class _Counter(Accumulator):
    """Counts the operations of contractions, and what they hold."""

    def __init__(self, taken: Taken, budget: MemoryBudget, *args: Any) -> None:
        """Set up for a device with this budget."""
        super().__init__(*args)
        self._taken, self._budget = taken, budget

    def count(self, first: Jacobians, second: Jacobians | None) -> None:
        """Count those of some parameters."""
        self._add(first, second)

    def _contract(self, products: list[NamedEinsum], sets: Sequence[Mapping[str, int]]) -> None:
        """Count."""
        n, m = self._numbers(sets)
        symmetric = len(sets) == 1 and self.n1 is None
        self._taken.counts.append(counts(products, {"n": n, "m": m}, budget=self._budget, symmetric=symmetric))


def _of_size(jacobians: Jacobians, n: int, made: dict[Hashable, Tensor]) -> Jacobians:
    """Keep the shapes of Jacobians alone, of as many samples."""
    return {name: [jacobian.of_size(n, made) for jacobian in several] for name, several in jacobians.items()}
