"""What a call asks for: its arguments, checked and brought to one form."""

import operator
from collections import defaultdict
from collections.abc import Callable, ItemsView, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, SupportsIndex

import torch
from torch import Size, Tensor
from torch.jit import ScriptModule
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from ggn_ntk.problem.errors import kind_of, listed
from ggn_ntk.problem.functions import FunctionModule, Model, Params, as_module, given_with_graph, own_parameters
from ggn_ntk.problem.inputs import Inputs, check_alike, parse_inputs, parts_of
from ggn_ntk.problem.output_axes import AxesRequest, KernelAxes
from ggn_ntk.problem.result import Kernels, finish, sum_kernels
from ggn_ntk.problem.selection import selected
from ggn_ntk.problem.several import Pick, Several, split
from ggn_ntk.problem.sizes import parse_bytes
from ggn_ntk.process.progress import Wanted, check_progress
from ggn_ntk.process.torch_internals import parameters_of
from ggn_ntk.process.transforms import is_wrapped, outside_of_transforms
from ggn_ntk.process.turns import alone_with

CAPTURES = ("auto", "sequential", "autograd")


@dataclass(frozen=True, eq=False)
class Request:
    """A kernel to compute."""

    model: Module  # the model f
    x1: Inputs  # N1 samples
    x2: Inputs | None  # N2 samples, or ``None`` for those of x1
    axes: AxesRequest  # what is asked for about output axes
    params: dict[str, Tensor]  # the parameters the kernel sums over, by the name the user knows them by
    # Whether one kernel for each parameter, or each ``"module"``, is wanted instead of the sum
    per_parameter: bool | str
    # Turn what the model returns for x1, and for x2, into the tensor ``[N, *out]``; ``None`` where it is that tensor.
    # Several tensors are joined to one, and kernels taken apart again
    outputs: tuple[Pick, Pick] = (None, None)
    chunk_size: int | None = None  # how many samples or vectors ``vmap`` takes at once; ``None`` for all
    # How the structured route takes the model apart: ``"auto"``, ``"sequential"`` or ``"autograd"``
    capture: str = "auto"
    # Whether the structured route forms Jacobians before x1 meets x2, whatever is cheapest
    jacobians_first: bool = False
    thorough: bool = False  # whether samples are compared in as many halves as separate every pair of them
    # Whether the model is evaluated in float64, whatever its dtype: to tell rounding from other errors
    widened: bool = False
    # Where a graph leads from kernels to the user's tensors: those that parameters of a function stand for, by id
    graph: dict[int, Tensor] | None = None
    names: tuple[str, str] = ("x1", "x2")  # what the user calls x1 and x2
    start: int = 0  # the place of the first sample among those that the user gave
    memory: int | None = None  # bytes that may be taken; ``None`` for what the device has
    progress: Wanted = False  # how to show what is done

    @classmethod
    def parse(
        cls,
        model: Model,
        x1: Any,
        x2: Any,
        axes: AxesRequest,
        *,
        params: Params | None,
        per_parameter: bool | str,
        output: Pick | tuple[Pick, Pick] = None,
        chunk_size: int | None = None,
        capture: str = "auto",
        memory: Any = None,
        progress: Any = False,
        transforms: bool = False,
        create_graph: bool = False,
        names: tuple[str, str] = ("x1", "x2"),
    ) -> "Request":
        """Check the arguments of a call and bring them to one form; ``transforms`` may be under way if so stated."""
        module, entries = (model, params) if isinstance(model, Module) else (as_module(model, params), None)
        capture = "sequential" if capture == "backpack" else capture  # another name, though it uses no BackPACK
        if capture not in CAPTURES:
            raise ValueError(f"capture must be one of {', '.join(map(repr, CAPTURES))}, got {capture!r}.")
        check_progress(progress)
        outputs = _parse_outputs(output)
        check_per_parameter(per_parameter)
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}.")
        if not isinstance(create_graph, bool):
            raise TypeError(f"create_graph must be True or False, got {kind_of(create_graph)}.")
        with nullcontext() if transforms else outside_of_transforms(), alone_with(module):
            if not transforms and any(
                map(is_wrapped, (*(part for _, part, _ in parts_of((x1, x2))), *module.parameters()))
            ):
                raise ValueError(
                    "x1, x2 or a parameter is what a torch.func transform makes of a tensor: compute kernels outside."
                )
            check_wrappers(module)
            wanted = _parse_params(module, entries)
            if isinstance(module, DistributedDataParallel):
                module = module.module  # the same function, without communication
            first = parse_inputs(x1, names[0], module, graph=create_graph)
            second = None if x2 is None else parse_inputs(x2, names[1], module, graph=create_graph)
            graph = given_with_graph(module, params) if create_graph else None
        if second is not None:
            check_alike(first, second)
            if axes.paired and len(first) != len(second):
                raise ValueError(
                    "paired=True takes x1[n] with x2[n] alone, so x1 and x2 must hold the same number of samples, "
                    f"got {len(first)} and {len(second)}."
                )
        if axes.interacting:
            first, second = first.as_one(), None if second is None else second.as_one()
        return cls(
            module,
            first,
            second,
            axes,
            wanted,
            per_parameter,
            outputs,
            chunk_size,
            capture,
            graph=graph,
            names=names,
            memory=parse_bytes(memory),
            progress=progress,
        )

    @property
    def symmetric(self) -> bool:
        """Whether x1 and x2 are the same samples, with the same outputs."""
        return self.x2 is None and self.outputs[0] == self.outputs[1]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.params.values())).device

    @property
    def n1(self) -> int | None:
        """How many of the samples that are evaluated together are x1; ``None`` where all are x1, x2 or both."""
        return None if self.x2 is None or len(self.batches) > 1 else len(self.x1)

    @property
    def batches(self) -> "list[Request]":
        """What is evaluated together: all samples, which is faster; or x1 and x2 apart, where they differ in form."""
        together = self.outputs[0] == self.outputs[1] and (self.x2 is None or self.x1.fits(self.x2))
        return [self] if together else self.apart

    @property
    def apart(self) -> "list[Request]":
        """The two sets by themselves, each with its output; one where they are the same."""
        if self.symmetric:
            return [self]
        names = self.names if self.x2 is not None else self.names[:1] * 2
        return [
            replace(self, x1=x, x2=None, outputs=(output, output), names=(name, name))
            for x, output, name in zip((self.x1, self.second), self.outputs, names, strict=True)
        ]

    @property
    def exchanged(self) -> "Request":
        """The same with x1 and x2 exchanged."""
        x2 = None if self.x2 is None else self.x1
        return replace(self, x1=self.second, x2=x2, outputs=self.outputs[::-1], names=self.names[::-1])

    @property
    def inputs(self) -> Inputs:
        """The samples of a batch, x2's behind x1's."""
        return self.x1.stack(self.x2)

    @property
    def output(self) -> Pick:
        """What turns the results of a batch into a tensor."""
        return self.outputs[0]

    @property
    def several(self) -> tuple[Several, Several] | None:
        """The outputs of x1 and of x2, where there are several."""
        first, second = self.outputs
        return (first, second) if isinstance(first, Several) and isinstance(second, Several) else None

    @property
    def second(self) -> Inputs:
        """x2, or x1 where they are the same."""
        return self.x1 if self.x2 is None else self.x2

    @property
    def sets(self) -> list[Inputs]:
        """x1, and x2 if it is another set."""
        return [x for x in (self.x1, self.x2) if x is not None]

    @property
    def sizes(self) -> list[int]:
        """How many samples there are in x1, and in x2 if it is another set."""
        return [len(x) for x in self.sets]

    @property
    def sample_axes(self) -> tuple[int, ...]:
        """The sizes of the sample axes of a kernel: N1 and N2, or N of paired samples."""
        return (len(self.x1),) if self.axes.pairs else (len(self.x1), len(self.second))

    @cached_property
    def groups(self) -> dict[str, str]:
        """The kernel that each parameter counts for, by names: its own, its module's, or ``""`` for the one of all."""
        if self.per_parameter != "module":
            return {name: name if self.per_parameter else "" for name in self.params}
        if isinstance(self.model, FunctionModule):
            return {name: name.rpartition(".")[0] for name in self.params}
        modules = reversed(list(self.model.named_modules()))  # of several owners the first counts
        owners = {id(p): name for name, module in modules for p in module.parameters(recurse=False)}
        return {name: owners[id(p)] for name, p in self.params.items()}

    def grouped(self) -> ItemsView[str, dict[str, Tensor]]:
        """List the kernels that are wanted, each with the parameters that it is summed over."""
        found = defaultdict[str, dict[str, Tensor]](dict)
        for name, p in self.params.items():
            found[self.groups[name]][name] = p
        return found.items()

    def few(self) -> "Request":
        """Ask the same of one sample."""
        return self.of_others(Inputs.first)

    def part(self, samples: slice) -> "Request":
        """Ask the same of some samples of a single set."""
        return replace(self, x1=self.x1[samples], start=self.start + samples.start)

    def label(self, sample: int) -> str:
        """Name a sample of a batch in a message, by its place among those of x1 and x2."""
        first, second = self.names
        if self.x1.whole:
            return first
        return f"{first}[{self.start + sample}]" if sample < len(self.x1) else f"{second}[{sample - len(self.x1)}]"

    def labels(self, chosen: Iterable[Tensor]) -> list[str]:
        """Name the samples that are chosen in each batch."""
        # chosen [N]
        places = ((batch, of_batch.nonzero().flatten()) for batch, of_batch in zip(self.batches, chosen, strict=True))
        return [batch.label(sample) for batch, samples in places for sample in samples.tolist()]

    def sides(self, of_batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Tell x1's rows from x2's in what there is of the samples of each batch."""
        # [N, ...] of each batch -> [N1, ...] and [N2, ...]
        parts = [p for batch, rows in zip(self.batches, of_batches, strict=True) for p in rows.split(batch.sizes)]
        return parts[0], parts[-1]

    def detached(self) -> "Request":
        """Ask the same of tensors without graphs."""
        return replace(self.of_others(Inputs.detached), graph=None)

    def of_others(self, make: Callable[[Inputs], Inputs]) -> "Request":
        """Ask the same of what is made of x1 and of x2."""
        return replace(self, x1=make(self.x1), x2=None if self.x2 is None else make(self.x2))

    def of_all_parameters(self) -> "Request":
        """Ask the same for all parameters that require a gradient."""
        wanted = {id(p) for p in self.params.values()}
        known = own_parameters(self.model)
        others = {name: p for name, p in known.items() if p.requires_grad and id(p) not in wanted}
        return replace(self, params=self.params | others)

    def resolve(self, first: Size, second: Size) -> KernelAxes:
        """Find the role of each output axis, given the shapes of outputs of x1 and x2."""
        # first [*out1], second [*out2]
        if self.several is None:
            return self.axes.resolve(first, second)
        ours, theirs = (list(outputs.shapes) for outputs in self.several)
        if self.axes.trace_axes or self.axes.diagonal_axes:
            raise ValueError(
                f"trace_axes and diagonal_axes count the axes of one output, but there are several, {listed(ours)}: "
                "pick one (output=), or ask for compute='diagonal' or 'trace'."
            )
        if self.axes.compute == "full":
            return self.axes.resolve(first, second)
        if self.several[0].shapes != self.several[1].shapes:
            raise ValueError(
                f"compute={self.axes.compute!r} pairs each output of x1 with that of x2 at the same key, but keys or "
                f"shapes differ: {listed(ours)} for x1, {listed(theirs)} for x2. Ask for compute='full', or pick "
                "others (output=)."
            )
        # For a trace, the diagonal is what is summed by key in the end.
        return replace(self.axes, compute="diagonal").resolve(first, second)

    def assemble(self, kernels: Iterable[tuple[str, Tensor]], axes: KernelAxes) -> Kernels:
        """Bring what a route computed to the layout of the public API."""
        return self.by_name(self.finished(kernels, axes))

    def finished(self, kernels: Iterable[tuple[str, Tensor]], axes: KernelAxes) -> dict[str, Tensor]:
        """Add up what a route computed, by names of kernels."""
        # kernels [N1, N2, E, F1, F2] -> [N1, N2, *(x1's axes not traced), *(x2's axes neither traced nor diagonal)]
        sums = sum_kernels(kernels)
        dtypes = {
            group: reduce(torch.promote_types, (p.dtype for p in params.values())) for group, params in self.grouped()
        }
        return {group: finish(sums[group], axes, self.symmetric).to(dtype) for group, dtype in dtypes.items()}

    def by_name(self, finished: dict[str, Tensor]) -> Kernels:
        """Return kernels by name where they are kept apart."""
        found = {group: self.by_key(kernel) for group, kernel in finished.items()}
        return found if self.per_parameter else found[""]

    def by_key(self, finished: Tensor) -> Tensor | dict[Any, Tensor]:
        """Take a kernel of several outputs apart: one for each pair of them, or for each."""
        return finished if self.several is None else split(finished, self.axes.compute, *self.several)


def _parse_outputs(output: Any) -> tuple[Pick, Pick]:
    """Bring what picks a tensor to the form of a pair, for x1 and for x2."""
    pair = output if isinstance(output, tuple) else (output, output)
    if len(pair) != 2 or not all(pick is None or callable(pick) for pick in pair):
        given = f"({', '.join(map(kind_of, pair))})" if isinstance(output, tuple) else kind_of(output)
        raise TypeError(f"output must be a callable or None, or a pair of these for x1 and x2, got {given}.")
    return pair


def check_picks(output: Any) -> None:
    """Refuse what cannot pick a tensor from what a model returns."""
    if output is not None and not callable(output):
        raise TypeError(f"output must be a callable or None, got {kind_of(output)}.")


def check_per_parameter(per_parameter: Any) -> None:
    """Refuse what does not say which kernels are kept apart."""
    if not isinstance(per_parameter, bool) and per_parameter != "module":
        got = repr(per_parameter) if isinstance(per_parameter, str) else kind_of(per_parameter)
        error = ValueError if isinstance(per_parameter, str) else TypeError
        raise error(f"per_parameter must be True, False or 'module', got {got}.")


def check_wrappers(model: Module) -> None:
    """Refuse modules whose parameters cannot be exchanged, or do not hold their numbers."""
    for name, module in model.named_modules():
        where = f" holds a {kind_of(module)} at {name!r}" if name else f" is a {kind_of(module)}"
        if isinstance(module, ScriptModule | DataParallel) or (name and isinstance(module, DistributedDataParallel)):
            raise TypeError(f"model{where}, whose parameters cannot be exchanged: use the module it was made from.")
        sharded = any(type(p).__name__ == "DTensor" for p in parameters_of(module).values())
        if sharded or any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise TypeError(
                f"model{where}, whose parameters are sharded over processes: gather them in a module of its own "
                "(with a full state dict), and use that."
            )


def _parse_params(model: Module, entries: Params | None) -> dict[str, Tensor]:
    """Look up the parameters a kernel sums over."""
    if entries is None:
        return {name: p for name, p in own_parameters(model).items() if p.requires_grad}
    if isinstance(entries, Mapping):
        raise TypeError(
            "params must be names of parameters where model is a module. For a kernel at the values of a mapping, make "
            "it a function: lambda params, *args: torch.func.functional_call(model, params, args)."
        )
    known = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(model, DistributedDataParallel):
        known |= dict(model.module.named_parameters(remove_duplicate=False))
    params = dict[int, tuple[str, Tensor]]()  # by identity: a tied parameter counts once
    for entry, names in selected(entries, known):
        wanted = [name for name in names if known[name].requires_grad]
        if not wanted:
            what = "which is frozen" if names == [entry] else "of which all parameters are frozen"
            raise ValueError(f"params names {entry!r}, {what}. Call requires_grad_() on it, or leave it out.")
        for name in wanted:
            params.setdefault(id(known[name]), (name, known[name]))
    if not params:
        raise ValueError("params is empty: name at least one parameter, or pass None for all that require a gradient.")
    return dict(params.values())


def check_integer(n1: Any) -> None:
    """Check that ``n1`` is an integer or ``None``."""
    if n1 is not None and (isinstance(n1, bool) or not isinstance(n1, SupportsIndex)):
        raise TypeError(f"n1 must be an integer or None, got {type(n1).__name__}.")


def check_split(n1: int, n: int) -> None:
    """Check that a batch is split into two parts with samples."""
    try:
        operator.index(n1)
    except TypeError:
        raise TypeError(f"n1 must be an integer or None, got {type(n1).__name__}.") from None
    if not 0 < n1 < n:
        raise ValueError(f"n1 must be between 1 and {n - 1} for a batch of {n} samples, got {n1}.")
