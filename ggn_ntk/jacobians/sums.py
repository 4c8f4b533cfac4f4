"""Jacobians of parameters and weights that are used several times wait for the last of their uses.

They are put together before anything is made of them: verified, or contracted. So the cost is linear in the number of
uses where that is cheaper, and uses that cancel do so before they are squared.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable

from torch import Tensor

from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.uses import put_together
from ggn_ntk.jacobians.backward import Writer
from ggn_ntk.jacobians.weights import Weight


class Sums:
    """The Jacobians of a backward pass."""

    def __init__(
        self,
        names: Iterable[str],
        weights: Iterable[Weight],
        params: dict[str, Tensor],
        failures: dict[str, str],
    ) -> None:
        """Set up for these uses of parameters, by name, and of weights."""
        uses, self._params, self._failures = list(weights), params, failures
        of_weights = (name for weight in {w.key: w for w in uses}.values() for name in weight.names)
        self._uses: Counter[Hashable] = Counter([*names, *of_weights, *(weight.key for weight in uses)])
        self._left = self._uses.copy()
        self._waiting: dict[Hashable, list[Factored]] = defaultdict(list)

    def several(self, names: Iterable[str], weights: Iterable[Weight] = ()) -> bool:
        """Tell whether some parameters or weights, or parameters of these, are used several times."""
        keys: list[Hashable] = [*names, *(key for weight in weights for key in (weight.key, *weight.names))]
        return any(self._uses[key] > 1 for key in keys)

    def add(self, writer: Writer) -> Jacobians:
        """Take a use of some parameters: the Jacobians of those whose last use it is."""
        complete: Jacobians = {}
        written = writer.written(self._failures)
        for name in writer.names:
            if name not in written and name not in self._failures:
                self._failures[name] = f"the rule of {writer.label} does not state its Jacobian"
            uses = self._put(name, written.get(name, []))
            if uses and name not in self._failures:
                complete[name] = put_together(uses) if len(uses) > 1 else uses
        return complete

    def add_weight(self, weight: Weight, write: Callable[[], list[Factored]]) -> Jacobians:
        """Take a use of a weight."""
        own = Writer(weight.label, weight.names, lambda: {"": write()}).written(self._failures)
        uses = self._put(weight.key, own.get("", []))
        if self._left[weight.key]:
            return {}
        return self.add(Writer(weight.label, weight.names, lambda: weight.pass_back(uses, self._params)))

    def _put(self, key: Hashable, jacobians: list[Factored]) -> list[Factored]:
        """Put Jacobians with those that wait: all of them at the last, else none."""
        self._waiting[key] += jacobians
        self._left[key] -= 1
        return [] if self._left[key] else self._waiting.pop(key)
