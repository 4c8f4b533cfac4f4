"""What a call asks for: its arguments, checked and brought to one form."""

import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import reduce
from typing import Any, SupportsIndex

import torch
from torch import Size, Tensor
from torch.jit import ScriptModule
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from ggn_ntk.memory.budget import check_result
from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.models.inspection import in_low_precision, without_draws
from ggn_ntk.models.isolation import isolated, outside_of_transforms
from ggn_ntk.models.turns import alone_with
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, listed
from ggn_ntk.problem.inputs import Inputs, check_alike, kind_of, parse_inputs
from ggn_ntk.problem.output_axes import AxesRequest, OutputAxes
from ggn_ntk.problem.result import finish, sum_kernels

CAPTURES = ("auto", "backpack", "autograd")


@dataclass(frozen=True, eq=False)
class Request:
    """A kernel to compute.

    Attributes:
        model: The model f.
        x1: N1 samples.
        x2: N2 samples, or ``None`` for x1 itself.
        axes: What is asked for about output axes.
        params: The parameters the kernel sums over, by the name the user knows them by.
        per_parameter: Whether one kernel per parameter is wanted instead of their sum.
        output: Turns what the model returns into the tensor ``[N, *out]``; ``None`` where it is that tensor.
        chunk_size: How many samples or vectors ``vmap`` takes at once; ``None`` for all.
        capture: How the structured route takes the model apart: ``"auto"``, ``"backpack"`` or ``"autograd"``.
        jacobians_first: Whether the structured route forms Jacobians before x1 meets x2, whatever is cheapest.
        thorough: Whether samples are compared in as many halves as separate every pair of them.
        widened: Whether the model is evaluated in float64, whatever its dtype: to tell rounding from other errors.
    """

    model: Module
    x1: Inputs
    x2: Inputs | None
    axes: AxesRequest
    params: dict[str, Tensor]
    per_parameter: bool
    output: Callable[[Any], Tensor] | None = None
    chunk_size: int | None = None
    capture: str = "auto"
    jacobians_first: bool = False
    thorough: bool = False
    widened: bool = False

    @classmethod
    def parse(
        cls,
        model: Module,
        x1: Any,
        x2: Any,
        axes: AxesRequest,
        *,
        params: Iterable[str] | None,
        per_parameter: bool,
        output: Callable[[Any], Tensor] | None = None,
        chunk_size: int | None = None,
        capture: str = "auto",
        transforms: bool = False,
    ) -> "Request":
        """Check the arguments of a call and bring them to one form.

        Args:
            model: See :func:`ggn_ntk.empirical_ntk`, as for all arguments here.
            x1: A tensor, tuple or mapping.
            x2: The same, or ``None``.
            axes: What is asked for about output axes.
            params: Parameter names, or ``None``.
            per_parameter: One kernel per parameter.
            output: Turns what the model returns into a tensor.
            chunk_size: How much to do at once.
            capture: How the structured route takes the model apart.
            transforms: Whether ``torch.func`` may transform what is computed.

        Returns:
            The checked request.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {kind_of(model)}.")
        if capture not in CAPTURES:
            raise ValueError(f"capture must be one of {', '.join(map(repr, CAPTURES))}, got {capture!r}.")
        if output is not None and not callable(output):
            raise TypeError(f"output must be a callable or None, got {kind_of(output)}.")
        if not isinstance(per_parameter, bool):
            raise TypeError(f"per_parameter must be True or False, got {kind_of(per_parameter)}.")
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}.")
        with nullcontext() if transforms else outside_of_transforms(), alone_with(model):
            if not transforms and any(map(_is_wrapped, (*tree_leaves((x1, x2)), *model.parameters()))):
                raise ValueError(
                    "x1, x2 or a parameter is what a torch.func transform makes of a tensor: compute kernels outside."
                )
            check_wrappers(model)
            wanted = _parse_params(model, params)
            if isinstance(model, DistributedDataParallel):
                model = model.module  # the same function, without communication
            first = parse_inputs(x1, "x1", model)
            second = None if x2 is None else parse_inputs(x2, "x2", model)
        if second is not None:
            check_alike(first, second)
        return cls(model, first, second, axes, wanted, per_parameter, output, chunk_size, capture)

    @property
    def symmetric(self) -> bool:
        """Whether x1 and x2 are the same samples."""
        return self.x2 is None

    @property
    def n1(self) -> int | None:
        """How many of the stacked samples are x1; ``None`` where all are both x1 and x2."""
        return None if self.symmetric else len(self.x1)

    @property
    def second(self) -> Inputs:
        """x2, or x1 where they are the same."""
        return self.x1 if self.x2 is None else self.x2

    @property
    def sizes(self) -> list[int]:
        """How many samples there are in x1, and in x2 if it is another set."""
        return [len(x) for x in (self.x1, self.x2) if x is not None]

    @property
    def foreign(self) -> bool:
        """Whether code that is not torch's own may run between x and the outputs."""
        with isolated(self.model) as session:
            return session.foreign or self.output is not None

    @property
    def primals(self) -> dict[str, Tensor]:
        """The wanted parameters as plain tensors without a graph: where derivatives are taken."""
        with isolated(self.model) as session:
            copy = _widened if self.widened else torch.clone if session.written else torch.Tensor.detach
            return {name: copy(p.detach()) for name, p in self.params.items()}

    def label(self, sample: int) -> str:
        """Name a sample in a message, by its place among those of x1 and x2."""
        return f"x1[{sample}]" if sample < len(self.x1) else f"x2[{sample - len(self.x1)}]"

    def resolve(self, out_shape: Size) -> OutputAxes:
        """Find the role of each output axis, and refuse a kernel that cannot fit into memory.

        Args:
            out_shape: ``[*out]``, the shape of one sample's output.

        Returns:
            The roles.

        Raises:
            ValueError: If an axis that was asked for does not exist.
            KernelMemoryError: If memory does not suffice for the result.
        """
        axes = self.axes.resolve(out_shape)
        check_result(
            (len(self.x1), len(self.second), *axes.roles.kernel), list(self.params.values()), self.per_parameter
        )
        return axes

    def of_all_parameters(self) -> "Request":
        """Make the same request for all parameters that require a gradient."""
        wanted = {id(p) for p in self.params.values()}
        others = {name: p for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in wanted}
        return replace(self, params=self.params | others)

    def leaves(self, jitter: int | None = None) -> dict[str, Tensor]:
        """Copy the wanted parameters, to take derivatives at; changed in the last digit, as a seed decides."""
        copies = {name: (_widened(p) if self.widened else p).detach().clone() for name, p in self.params.items()}
        if jitter is not None:
            copies = {name: _jittered(copy, jitter) for name, copy in copies.items()}
        return {name: copy.requires_grad_() for name, copy in copies.items()}

    def evaluate(
        self,
        primals: dict[str, Tensor] | None,
        inputs: Inputs,
        *,
        inspect: bool = False,
        jitter: int | None = None,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Any:
        """Evaluate the model as a pure function of the wanted parameters and the inputs.

        It starts from the state in which the model was found. The other parameters are constants, and buffers and
        inputs are passed as copies, so that code that writes to them leaves the user's alone.

        Args:
            primals: Values of the wanted parameters; ``None`` for the parameters themselves, which also
                reaches a model that keeps references to them elsewhere than in its modules.
            inputs: N samples.
            inspect: Whether to look for code that draws random numbers or writes to parameters.
            jitter: Change the other parameters and the inputs in the last digit, as this seed decides.
            within: Makes a context to call the model in.

        Returns:
            Outputs ``[N, *out]``, if it is such a model.

        Raises:
            UnsupportedModelError: If it draws random numbers, computes in a low precision inside, or goes on with a
                graph from an earlier call.
        """
        with isolated(self.model) as session:
            values: dict[int, Tensor] = {}
            if self.widened:
                values = {id(t): _widened(t.detach()) for t in (*self.model.parameters(), *self.model.buffers())}
            elif primals is not None:
                values = {id(p): p.detach().clone() if session.written else p.detach() for p in self.model.parameters()}
            if primals is not None:
                if jitter is not None:
                    values = {key: _jittered(value, jitter) for key, value in values.items()}
                values |= {id(self.params[name]): value for name, value in primals.items()}

            def call(within: Callable[[], AbstractContextManager[None]] = nullcontext) -> Any:
                x = inputs.map(torch.clone if jitter is None else lambda t: _jittered(t, jitter))
                x = x.map(_widened) if self.widened else x
                with session.evaluation(values, inspect=inspect), within():
                    result = self.model(*x.args, **x.kwargs)
                    return result if self.output is None else self.output(result)

            def call_with_graph() -> Any:
                """Let a model differentiate something inside where no graph is wanted of it."""
                try:
                    return call()
                except RuntimeError as error:
                    if torch.is_grad_enabled() or "does not require grad" not in str(error):
                        raise
                with torch.enable_grad():
                    return tree_map(lambda y: y.detach() if isinstance(y, Tensor) else y, call())

            if not inspect:
                return call(within) if within is not nullcontext else call_with_graph()
            result = without_draws(call, within)
            if not isinstance(result, Tensor):
                return result
            if session.low and result.dtype in TOLERANCES:
                raise UnsupportedModelError([in_low_precision(session.low)])
            if session.earlier and not session.earlier.isdisjoint(graph_nodes(result)):
                what = "it uses a tensor with a graph from an earlier call, which a module holds"
                raise UnsupportedModelError([Problem("", what, "Compute it in the forward pass, or detach() it")])
            return result

    def assemble(self, kernels: Iterable[tuple[str, Tensor]], axes: OutputAxes) -> Tensor | dict[str, Tensor]:
        """Bring what a route computed to the layout of the public API.

        Args:
            kernels: Names of parameters and kernels ``[N1, N2, E, F, F]``.
            axes: The role of each output axis.

        Returns:
            The kernel in the widest dtype of its parameters, or one for each parameter in its own by name.
        """
        sums = sum_kernels(kernels, self.per_parameter)
        dtypes = {name: p.dtype for name, p in self.params.items()}
        if not self.per_parameter:
            dtype = reduce(torch.promote_types, dtypes.values())
            return finish(sums[""], axes, self.symmetric).to(dtype)
        return {name: finish(sums[name], axes, self.symmetric).to(dtype) for name, dtype in dtypes.items()}


def _is_wrapped(x: Any) -> bool:
    """Tell whether a value stands for another inside of a transform of ``torch.func``."""
    return isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _widened(x: Tensor) -> Tensor:
    """Copy a tensor, real numbers in float64."""
    return x.to(torch.float64, copy=True) if x.is_floating_point() else x.clone()


def _jittered(x: Tensor, seed: int) -> Tensor:
    """Change each number by a unit in its last digit, up or down."""
    if not x.is_floating_point():
        return x.clone()
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, x.shape, generator=generator, device="cpu").to(x.device, x.dtype) * 2 - 1
    return x + x * signs * torch.finfo(x.dtype).eps


def check_wrappers(model: Module) -> None:
    """Refuse modules whose parameters cannot be exchanged, or do not hold their numbers.

    Args:
        model: The model.

    Raises:
        TypeError: If there is one.
    """
    for name, module in model.named_modules():
        where = f" holds a {kind_of(module)} at {name!r}" if name else f" is a {kind_of(module)}"
        if isinstance(module, ScriptModule | DataParallel) or (name and isinstance(module, DistributedDataParallel)):
            raise TypeError(f"model{where}, whose parameters cannot be exchanged: use the module it was made from.")
        sharded = any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False))
        if sharded or any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise TypeError(
                f"model{where}, whose parameters are sharded over processes: gather them in a module of its own "
                "(with a full state dict), and use that."
            )


def _parse_params(model: Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    """Look up the parameters a kernel sums over.

    Args:
        model: The model.
        names: Names from ``named_parameters(remove_duplicate=False)``, or ``None`` for all that require
            a gradient.

    Returns:
        Each parameter once, by the first of its names.

    Raises:
        TypeError: If ``names`` is not an iterable of strings.
        ValueError: If it is empty, or a name is unknown or that of a frozen parameter.
    """
    if names is None:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"params must be an iterable of parameter names, e.g. ['0.weight'], got {kind_of(names)}.")
    known = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(model, DistributedDataParallel):
        known |= dict(model.module.named_parameters(remove_duplicate=False))
    params: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"params must hold names of parameters, got {kind_of(name)}.")
        if name not in known:
            raise ValueError(f"params names {name!r}, which the model does not have. {_suggestions(name, list(known))}")
        if not known[name].requires_grad:
            raise ValueError(f"params names {name!r}, which is frozen. Call requires_grad_() on it, or leave it out.")
        if not any(known[name] is p for p in params.values()):
            params[name] = known[name]
    if not params:
        raise ValueError("params is empty: name at least one parameter, or pass None for all that require a gradient.")
    return params


def _suggestions(name: str, known: list[str]) -> str:
    """Say which names there are, and which are close to one that does not exist."""
    close = get_close_matches(name, known, n=4, cutoff=0.5)
    return f"It has: {listed(known)}" + (f"; close are: {', '.join(close)}." if close else ".")


def check_integer(n1: Any) -> None:
    """Check that ``n1`` is an integer or ``None``."""
    if n1 is not None and (isinstance(n1, bool) or not isinstance(n1, SupportsIndex)):
        raise TypeError(f"n1 must be an integer or None, got {type(n1).__name__}.")


def check_split(n1: int, n: int) -> None:
    """Check where a batch is to be split.

    Args:
        n1: Size of the first part.
        n: Size of the batch.

    Raises:
        TypeError: If ``n1`` is not an integer.
        ValueError: If a part would be empty.
    """
    try:
        operator.index(n1)
    except TypeError:
        raise TypeError(f"n1 must be an integer or None, got {type(n1).__name__}.") from None
    if not 0 < n1 < n:
        raise ValueError(f"n1 must be between 1 and {n - 1} for a batch of {n} samples, got {n1}.")
