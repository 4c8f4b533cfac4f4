"""The way back through a model: what all backward passes have in common."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ggn_ntk.contraction.factored import Factored, Jacobians
from ggn_ntk.contraction.products import Part
from ggn_ntk.problem.errors import NotCapturedError, is_out_of_memory

#: What is said of a parameter whose rule raises an error.
FAILS = "its rule fails"

#: What is said of parameters where a model computes something else for some samples than for others.
OTHER_GRAPH = "the graph of some samples is not that of others"

#: Takes a parameter's name, its Jacobian of some samples and the number of all; groups the operands by what can
#: be contracted for these samples by themselves (``None`` where nothing can).
Parts = Callable[[str, Factored, int], list[Part] | None]


class BackwardPass(Protocol):
    """An evaluation of a model, and its way back: once for every chunk of the outputs."""

    output: Tensor  # the model's output ``[N, *out]``
    failures: dict[str, str]  # why the rule of a parameter failed on the way, by name

    @property
    def kept(self) -> Sequence[Tensor]:
        """What the evaluation keeps, beside a graph."""

    @property
    def numel(self) -> int:
        """Numbers that ``s`` of one output holds where it is largest."""

    @property
    def total(self) -> int:
        """Numbers that ``s`` of one output holds on the whole way back."""

    def steps(self, outputs: Tensor, parts: Parts, *, again: bool, hold: bool) -> Iterator["Step"]:
        """Pass ``s`` of some outputs back, a use at a time; what is not needed ``again`` is freed on the way."""
        # hold: ``s`` stays as it is when the pass goes on, and with it all Jacobians that were written


class Step:
    """A use of parameters on the way back, say a layer.

    The pass owns ``s`` and goes on in the same memory: Jacobians can be written until then, and used, unless the pass
    is to hold them.
    """

    def __init__(self, write: Callable[[], Jacobians]) -> None:
        """Set up."""
        self._write: Callable[[], Jacobians] | None = write

    def jacobians(self) -> Jacobians:
        """Write Jacobians, by the names users know parameters by: of those that are not used before it."""
        if self._write is None:
            raise RuntimeError("The backward pass has left this use.")
        return self._write()

    @classmethod
    def standing(cls, write: Callable[[], Jacobians]) -> Iterator["Step"]:
        """Stand at a use until the pass goes on."""
        step = cls(cache(write))
        yield step
        step._write = None


def identity(output: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Start ``s`` at the output."""
    # output [N, *out], outputs [*out] -> [C, N, *out]
    n, *out = output.shape
    numel = output[0].numel()
    if outputs is None or outputs.tolist() == [*range(numel)]:
        rows = torch.eye(numel, dtype=output.dtype, device=output.device)
    else:
        rows = torch.zeros(len(outputs), numel, dtype=output.dtype, device=output.device)
        rows.scatter_(1, outputs.to(output.device).unsqueeze(1), 1)
    return rows.reshape(-1, 1, *out).expand(-1, n, *out)


class Writer(NamedTuple):
    """Something that writes Jacobians."""

    label: str  # what it is called in messages
    names: tuple[str, ...]  # the parameters whose Jacobians it writes
    write: Callable[[], Jacobians]

    def written(self, failures: dict[str, str]) -> Jacobians:
        """Write Jacobians, or take down that a rule fails; an earlier reason stays."""
        try:
            return self.write()
        except Exception as error:
            why = why_not(error, self.label)
            failures.update({name: why for name in self.names if name not in failures})
            return {}


def why_not(error: Exception, label: str) -> str:
    """Say why a rule gives no Jacobians; where memory ran out, that is no reason to go on."""
    if is_out_of_memory(error):
        raise error
    return str(error) if isinstance(error, NotCapturedError) else f"{FAILS} ({label}: {error})"
