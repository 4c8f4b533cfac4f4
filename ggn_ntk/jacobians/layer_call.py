"""One call of a layer: what its rule writes Jacobians from."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Module

from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.jacobians.backward import Writer
from ggn_ntk.jacobians.sums import Sums
from ggn_ntk.models.autograd_graph import precisions
from ggn_ntk.problem.errors import NotCapturedError
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.process.torch_internals import version_of
from ggn_ntk.rules.registry import Rule


class CallAxes(NamedTuple):
    """Where the samples are in one call of a layer."""

    axis: int | None  # their axis in the output; ``None`` if there is none
    rows: int = 1  # how many entries of that axis belong to a sample
    args: tuple[int | None, ...] = ()  # their axes in the arguments; ``None`` where there is none


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer that has a rule."""

    module: Module  # the layer
    rule: Rule  # its rule
    args: tuple[Any, ...]  # its arguments; once the samples are found, they are in front
    edge: GradientEdge  # where its output is in the graph of the model's output
    shape: Size  # shape of its output
    params: dict[str, str]  # its wanted parameters: their names on the layer, and those users know them by
    sources: tuple[Node, ...]  # nodes of the graph that its inputs come from, in their order
    # The arguments that were not copied, and how often each had been written to
    versions: tuple[tuple[Tensor, int], ...] = ()
    axis: int | None = None  # the axis of the samples in the output; ``None`` where it is not known
    rows: int = 1  # how many entries of that axis, one behind the other, belong to a sample

    def located(self, axes: CallAxes, n: int) -> "LayerCall":
        """Find N samples, and put them in front of its arguments."""
        if axes.axis is None or self.shape[axes.axis : axes.axis + 1] != (n * axes.rows,):
            return self
        places = zip_longest(self.args, axes.args)
        moved = (x.movedim(axis, 0) if axis else x for x, axis in places)
        return replace(self, args=tuple(moved), axis=axes.axis, rows=axes.rows)

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return type(self.module).__name__

    @property
    def precisions(self) -> set[torch.dtype]:
        """The dtypes in which gradients pass from its output to its parameters."""
        return precisions(self.edge, self.sources)

    @property
    def weights(self) -> tuple[()]:
        """Weights whose Jacobians pass through their own graphs: none."""
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters whose Jacobians it writes."""
        return tuple(self.params.values())

    def without(self, names: Container[str]) -> "LayerCall":
        """Leave parameters out."""
        return replace(self, params={key: name for key, name in self.params.items() if name not in names})

    def add_to(self, sums: Sums, s: Tensor) -> Jacobians:
        """Write Jacobians: those of parameters whose last use it is."""
        # s [C, *output]
        return sums.add(Writer(self.label, self.names, partial(self.jacobians, s)))

    @property
    def x(self) -> Any:
        """Its input; a tuple where it took several arguments."""
        return self.args[0] if len(self.args) == 1 else self.args

    def jacobians(self, s: Tensor) -> Jacobians:
        """Write the Jacobians of the layer's wanted parameters."""
        # s [C, *output]
        if any(version_of(tensor) != version for tensor, version in self.versions):
            raise NotCapturedError("an argument of a call of its layer was changed in place later")
        if self.axis is None:
            raise NotCapturedError(f"samples are not told apart in an output {list(self.shape)} of its layer")
        factored = self.rule(self.module, self.x, s.movedim(1 + self.axis, 1))
        present = {key: name for key, name in self.params.items() if key in factored}
        return {name: [factored[key].split_samples(self.rows)] for key, name in present.items()}


@dataclass(frozen=True, eq=False)
class Recording:
    """A forward pass."""

    calls: list[LayerCall]  # the calls of layers that have rules and wanted parameters, in their order
    output: Any  # the model's output, in a graph
    inputs: Inputs  # the N samples

    @property
    def n(self) -> int:
        """The number of samples N."""
        return len(self.inputs)


def kept(argument: Tensor) -> Tensor:
    """Keep an argument as it was: a copy of tokens and masks, which autograd does not guard against being changed."""
    return argument.detach() if argument.is_floating_point() else argument.clone()


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to the tensors among a layer's arguments."""
    if isinstance(x, tuple):
        return tuple(map_tensors(function, entry) for entry in x)
    return function(x) if isinstance(x, Tensor) and x.ndim else x


def tensors_among(x: Any) -> Iterator[Tensor]:
    """List the tensors among a layer's arguments."""
    for entry in x if isinstance(x, tuple) else ():
        yield from tensors_among(entry)
    if isinstance(x, Tensor):
        yield x


def shape_of(x: Any) -> Size:
    """Look up the shape of an argument."""
    return x.shape if isinstance(x, Tensor) else Size()
