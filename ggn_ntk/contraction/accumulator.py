"""Kernels, added up from the Jacobians of one use of a layer after the other."""

from collections import Counter, defaultdict
from collections.abc import Container

from torch import Tensor

from ggn_ntk.contraction.accumulate import add_products
from ggn_ntk.contraction.bias import join_biases
from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.products import Doubled, Part, double, parts
from ggn_ntk.contraction.uses import put_together
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
        """Set up."""
        self.roles, self.n1, self.per_parameter = roles, n1, per_parameter
        self._counts = Counter() if counts is None else counts  # how often each parameter is used
        self._formed = (
            formed  # parameters whose Jacobians are formed before x1 meets x2: products of their terms would round
        )
        self.kernels: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Factored]] = defaultdict(list)

    def is_reused(self, name: str) -> bool:
        """Tell whether Jacobians of a parameter wait for others."""
        return self._counts[name] > 1

    def parts(self, name: str, jacobian: Factored, n: int) -> list[Part] | None:
        """Group the operands of a Jacobian by what can be contracted for some samples by themselves."""
        # The Jacobian is one of some of the N samples of x1 and x2 together.
        if self.is_reused(name):
            return None
        n1 = n if self.n1 is None else self.n1
        return parts(jacobian, n1, n1 if self.n1 is None else n - n1, self.roles, formed=name in self._formed)

    def add(self, jacobians: dict[str, Factored]) -> None:
        """Add one use of a layer."""
        once, products = list[Factored](), list[tuple[str, Doubled]]()
        for name, jacobian in jacobians.items():
            self._waiting[name].append(jacobian)
            if len(self._waiting[name]) < self._counts[name]:
                continue
            key, uses, formed = name if self.per_parameter else "", self._waiting.pop(name), name in self._formed
            if len(uses) == 1 and not (formed or self.per_parameter):
                once += uses  # may be joined with others of this layer, whose kernels are added up anyway
                continue
            uses = put_together(uses) if len(uses) > 1 else uses
            # The kernel of a sum of uses has a product for each pair of them.
            products += [(key, double(a, b, self.roles, formed=formed)) for a in uses for b in uses]
        products += [("", double(jacobian, jacobian, self.roles)) for jacobian in join_biases(once)]
        if products:
            self._contract(products, jacobian.sizes["n"])

    def _contract(self, products: list[tuple[str, Doubled]], n: int) -> None:
        """Contract products of Jacobians."""
        samples = (n, n) if self.n1 is None else (self.n1, n - self.n1)
        add_products(self.kernels, products, (*samples, *self.roles.kernel), self.n1)


class Recorder(Accumulator):
    """Takes products of Jacobians down, with the shapes of their operands alone, instead of contracting them."""

    def __init__(
        self,
        products: list[tuple[str, Doubled]],
        roles: Roles,
        n1: int | None,
        per_parameter: bool,
        counts: Counter[str],
        formed: Container[str],
    ) -> None:
        """Set up."""
        super().__init__(roles, n1, per_parameter, counts, formed)
        self._products = products

    def parts(self, name: str, jacobian: Factored, n: int) -> None:
        """Keep operands apart: products of whole Jacobians are to be taken down."""

    def _contract(self, products: list[tuple[str, Doubled]], n: int) -> None:
        """Take products down."""
        self._products += [(name, product.without_data()) for name, product in products]
