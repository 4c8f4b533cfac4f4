"""Kernels, added up from the Jacobians of one use of a layer after the other."""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from torch import Tensor

from ggn_ntk.contraction.accumulate import add_products
from ggn_ntk.contraction.bias import join_biases
from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.products import NamedEinsum, Part, kernel_einsum, parts
from ggn_ntk.contraction.uses import grouped, put_together
from ggn_ntk.problem.output_axes import Roles


class Accumulator:
    """Sums kernels over the uses of parameters."""

    # A parameter that is used once is contracted at once. The uses of one that is used several times wait for the last
    # of them, and are put together. Kernels are known by the parameter's name, or ``""`` for their sum.

    def __init__(
        self,
        roles: Roles,
        n1: int | None,
        per_parameter: bool,
        counts: Counter[str] | None = None,
        formed: Container[str] = (),
    ) -> None:
        """Set up for Jacobians of N1 samples and those behind them; of one set, with itself, if N1 is ``None``."""
        self.roles, self.n1, self.per_parameter = roles, n1, per_parameter
        self._counts = Counter() if counts is None else counts  # how often each parameter is used
        self._formed = formed  # whose Jacobians are formed before x1 meets x2: products of their terms would round
        self.kernels: dict[str, Tensor] = {}
        self._waiting: dict[str, list[tuple[Factored, Factored]]] = defaultdict(list)

    def parts(self, name: str, jacobian: Factored, n: int) -> list[Part] | None:
        """Group the operands of a Jacobian by what can be contracted for some of N samples by themselves."""
        if self._counts[name] > 1:
            return None
        n1 = n if self.n1 is None else self.n1
        return parts(jacobian, n1, n1 if self.n1 is None else n - n1, self.roles, formed=name in self._formed)

    def add(self, first: dict[str, Factored], second: dict[str, Factored] | None = None) -> None:
        """Add one use of a layer: its Jacobians by name, and those of x2 if it was evaluated by itself."""
        once, products = list[tuple[Factored, Factored]](), list[NamedEinsum]()
        for name, a in first.items():
            if second is not None and name not in second:  # its rule failed there: the parameter falls back
                continue
            self._waiting[name].append((a, a if second is None else second[name]))
            if len(self._waiting[name]) < self._counts[name]:
                continue
            key, uses, formed = name if self.per_parameter else "", self._waiting.pop(name), name in self._formed
            if len(uses) == 1 and not (formed or self.per_parameter):
                once += uses  # may be joined with others of this layer, whose kernels are added up anyway
                continue
            ours, theirs = _on_both_sides(put_together, uses) if len(uses) > 1 else zip(*uses, strict=True)
            products += [(key, kernel_einsum(a, b, self.roles, formed=formed)) for a in ours for b in theirs]
        ours, theirs = _on_both_sides(join_biases, once)
        if [a.equation for a in ours] != [b.equation for b in theirs]:  # it pays for one of the two sets alone
            ours, theirs = ([use[side] for use in once] for side in (0, 1))
        products += [("", kernel_einsum(a, b, self.roles)) for a, b in zip(ours, theirs, strict=True)]
        if products:
            sets = [next(iter(jacobians.values())).sizes["n"] for jacobians in (first, second) if jacobians]
            self._contract(products, *sets)

    def _contract(self, products: list[NamedEinsum], n: int, m: int | None = None) -> None:
        """Contract products of Jacobians of N samples with themselves, or with those of M others."""
        if m is not None:
            add_products(self.kernels, products, (n, m, *self.roles.kernel))
        elif self.n1 is None:
            add_products(self.kernels, products, (n, n, *self.roles.kernel), symmetric=True)
        else:
            add_products(self.kernels, products, (self.n1, n - self.n1, *self.roles.kernel), offset=self.n1)


def _on_both_sides(
    rewrite: Callable[[Iterable[Factored]], list[Factored]], uses: Sequence[tuple[Factored, Factored]]
) -> tuple[list[Factored], list[Factored]]:
    """Rewrite Jacobians of x1, and those of x2, which may be the same."""
    ours = rewrite(a for a, _ in uses)
    return ours, ours if all(a is b for a, b in uses) else rewrite(b for _, b in uses)


class Recorder(Accumulator):
    """Takes products of Jacobians down, with the shapes of their operands alone, instead of contracting them."""

    def __init__(self, products: list[NamedEinsum], met: list[tuple[int, ...]], *args: Any) -> None:
        """Set up, to append to a list, and to one of which uses of the parameter meet in each product."""
        super().__init__(*args)
        self._products, self._met = products, met
        self._seen: dict[str, list[Factored]] = defaultdict(list)

    def add(self, first: dict[str, Factored], second: dict[str, Factored] | None = None) -> None:
        """Add one use of a layer."""
        for name, jacobian in first.items():
            self._seen[name].append(jacobian)
            if len(self._seen[name]) >= self._counts[name]:
                groups = grouped(self._seen.pop(name))
                self._met += [tuple(sorted({*ours, *theirs})) for ours in groups for theirs in groups]
        super().add(first, second)

    def parts(self, name: str, jacobian: Factored, n: int) -> None:
        """Keep operands apart: products of whole Jacobians are to be taken down."""

    def _contract(self, products: list[NamedEinsum], n: int, m: int | None = None) -> None:
        """Take products down."""
        self._products += [(name, product.without_data()) for name, product in products]
