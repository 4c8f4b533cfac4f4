"""What a call asks for: its arguments, checked and brought to one form."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import DataParallel, Module

from ggn_ntk.axes import AxesRequest, OutputAxes
from ggn_ntk.layout import finish, sum_kernels

CAPTURES = ("auto", "backpack", "autograd")


@dataclass(frozen=True)
class Inputs:
    """N samples, as the arguments of a model: it is called as ``model(*args, **kwargs)``.

    Attributes:
        args: Positional arguments, each ``[N, ...]``.
        kwargs: Keyword arguments, each ``[N, ...]``.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    def __len__(self) -> int:
        """Return the number of samples N."""
        return len(next(iter(self.tensors.values())))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by what to call them in a message: ``""``, ``"[1]"`` or ``"['mask']"``."""
        if len(self.args) == 1:
            return {"": self.args[0]}
        return {f"[{i}]": x for i, x in enumerate(self.args)} | {f"[{k!r}]": x for k, x in self.kwargs.items()}

    def map(self, function: Callable[..., Tensor], *others: "Inputs") -> "Inputs":
        """Apply a function to each tensor.

        Args:
            function: Takes one tensor of these inputs, and the tensor in its place of each of ``others``.
            *others: Inputs of the same structure.

        Returns:
            The inputs made of the function's results.
        """
        args = tuple(function(*xs) for xs in zip(self.args, *(o.args for o in others), strict=True))
        return Inputs(args, {k: function(x, *(o.kwargs[k] for o in others)) for k, x in self.kwargs.items()})

    def __getitem__(self, index: Any) -> "Inputs":
        """Select samples.

        Args:
            index: Anything that indexes the leading axis and keeps it: a slice or a list of integers.

        Returns:
            The selected samples.
        """
        return self.map(lambda x: x[index])

    def stack(self, other: "Inputs | None") -> "Inputs":
        """Put the samples of another set behind these.

        Args:
            other: Inputs of the same structure, or ``None`` for none.

        Returns:
            N1 + N2 samples.
        """
        return self if other is None else self.map(lambda a, b: torch.cat([a, b]), other)


@dataclass(frozen=True)
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

        Returns:
            The checked request.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {_kind(model)}.")
        for name, module in model.named_modules():
            if isinstance(module, ScriptModule | DataParallel):
                where = f" holds a {_kind(module)} at {name!r}" if name else f" is a {_kind(module)}"
                raise TypeError(f"model{where}, whose parameters cannot be exchanged: use the module it was made from.")
        if capture not in CAPTURES:
            raise ValueError(f"capture must be one of {', '.join(map(repr, CAPTURES))}, got {capture!r}.")
        if output is not None and not callable(output):
            raise TypeError(f"output must be a callable or None, got {_kind(output)}.")
        if not isinstance(per_parameter, bool):
            raise TypeError(f"per_parameter must be True or False, got {_kind(per_parameter)}.")
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}.")
        first = _parse_inputs(x1, "x1", model)
        second = None if x2 is None else _parse_inputs(x2, "x2", model)
        if second is not None:
            _check_alike(first, second)
        wanted = _parse_params(model, params)
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
    def primals(self) -> dict[str, Tensor]:
        """The wanted parameters as plain tensors without a graph: where derivatives are taken."""
        return {name: p.detach() for name, p in self.params.items()}

    def evaluate(self, primals: dict[str, Tensor] | None, inputs: Inputs) -> Tensor:
        """Evaluate the model as a pure function of the wanted parameters and the inputs.

        The other parameters are constants, and buffers are passed as copies, so that a layer that
        updates them in its forward pass leaves the model's own alone.

        Args:
            primals: Values of the wanted parameters; ``None`` for the parameters themselves, which also
                reaches a model that keeps references to them elsewhere than in its modules.
            inputs: N samples.

        Returns:
            Outputs ``[N, *out]``.
        """
        values = {id(b): b.detach().clone() for b in self.model.buffers()}
        if primals is not None:
            values |= {id(p): p.detach() for p in self.model.parameters()}
            values |= {id(self.params[name]): value for name, value in primals.items()}
        with _exchanged(self.model, values):
            result = self.model(*inputs.args, **inputs.kwargs)
        return result if self.output is None else self.output(result)

    def assemble(self, kernels: Iterable[tuple[str, Tensor]], axes: OutputAxes) -> Tensor | dict[str, Tensor]:
        """Bring what a route computed to the layout of the public API.

        Args:
            kernels: Names of parameters and kernels ``[N1, N2, E, F, F]``.
            axes: The role of each output axis.

        Returns:
            The kernel, or one kernel for each parameter by name.
        """
        sums = sum_kernels(kernels, self.per_parameter)
        if not self.per_parameter:
            return finish(sums[""], axes, self.symmetric)
        return {name: finish(sums[name], axes, self.symmetric) for name in self.params}


@contextmanager
def _exchanged(model: Module, values: dict[int, Tensor]) -> Iterator[None]:
    """Exchange parameters and buffers of a model, wherever its modules hold them.

    ``torch.func.functional_call`` does the same, but leaves a plain tensor where the parameter was if a module is held
    in two places.

    Args:
        model: The model.
        values: The tensors to put in, by the id of those they replace.

    Yields:
        Nothing.
    """
    stores: list[dict[str, Any]] = [
        store for module in model.modules() for store in (module._parameters, module._buffers)
    ]
    places = [(store, key, t) for store in stores for key, t in store.items() if id(t) in values]
    try:
        for store, key, tensor in places:
            store[key] = values[id(tensor)]
        yield
    finally:
        for store, key, tensor in places:
            store[key] = tensor


def _kind(value: Any) -> str:
    """Name a value's type for a message.

    Args:
        value: Anything.

    Returns:
        The name of its type.
    """
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _parse_inputs(x: Any, argument: str, model: Module) -> Inputs:
    """Bring one set of inputs to one form and check it against the model.

    Args:
        x: A tensor, tuple or mapping of tensors.
        argument: The argument's name.
        model: The model it is for.

    Returns:
        The inputs, detached, and cloned where they were made in inference mode.

    Raises:
        TypeError: If ``x`` is not of an accepted type.
    """
    if isinstance(x, Tensor):
        inputs = Inputs((x,), {})
    elif isinstance(x, tuple):
        inputs = Inputs(x, {})
    elif isinstance(x, Mapping):
        inputs = Inputs((), dict(x))
    else:
        raise TypeError(
            f"{argument} must be a tensor [N, ...], a tuple of tensors (called as model(*{argument})) or a mapping "
            f"of tensors (called as model(**{argument})), got {_kind(x)}."
        )
    _check_tensors(inputs, argument, model)
    with torch.inference_mode(False):
        return inputs.map(lambda t: t.clone() if t.is_inference() else t.detach())


def _check_tensors(inputs: Inputs, argument: str, model: Module) -> None:
    """Check that inputs are tensors with one common leading axis, of the model's dtype and device.

    Args:
        inputs: The inputs.
        argument: Their argument's name.
        model: The model they are for.

    Raises:
        TypeError: If one is not a tensor, or a key not a string.
        ValueError: If there is none, one has no sample axis, the leading axes differ or are empty, or
            a dtype or device is not the model's.
    """
    if not all(isinstance(key, str) for key in inputs.kwargs):
        raise TypeError(f"The keys of {argument} must be strings, the names of the model's arguments.")
    if not inputs.args and not inputs.kwargs:
        raise ValueError(f"{argument} is empty: it must hold at least one tensor.")
    for label, tensor in inputs.tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}{label} must be a tensor, got {_kind(tensor)}.")
        if tensor.ndim == 0:
            raise ValueError(f"{argument}{label} has no axes: its leading axis must hold the samples.")
    sizes = {label: len(tensor) for label, tensor in inputs.tensors.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{argument}{label}: {size}" for label, size in sizes.items())
        raise ValueError(f"The tensors of {argument} must share their leading axis, the samples, got {listed}.")
    if 0 in sizes.values():
        raise ValueError(f"{argument} has no samples: its leading axis is empty.")
    dtypes, devices = ({getattr(p, what) for p in model.parameters()} for what in ("dtype", "device"))
    for label, tensor in inputs.tensors.items():
        if devices and tensor.device not in devices:
            raise ValueError(
                f"{argument}{label} is on {tensor.device}, the model's parameters on {_listed(devices)}. "
                f"Move one: {argument}.to(device) or model.to(device)."
            )
        if dtypes and tensor.is_floating_point() and tensor.dtype not in dtypes:
            raise ValueError(
                f"{argument}{label} is {tensor.dtype}, the model's parameters {_listed(dtypes)}. "
                f"Convert one: {argument}.to(dtype) or model.to(dtype)."
            )


def _listed(values: Iterable[Any]) -> str:
    """Join values for a message.

    Args:
        values: Anything with a string form.

    Returns:
        Their string forms, sorted, separated by commas.
    """
    return ", ".join(sorted(map(str, values)))


def _check_alike(x1: Inputs, x2: Inputs) -> None:
    """Check that two sets of inputs differ in nothing but the number of samples.

    Args:
        x1: The first set.
        x2: The second set.

    Raises:
        ValueError: If their structure, or a tensor's shape behind the sample axis, dtype or device differs.
    """
    if len(x1.args) != len(x2.args) or x1.kwargs.keys() != x2.kwargs.keys():
        raise ValueError(
            f"x2 must hold the same tensors as x1, got {len(x2.args)} positional and keys {sorted(x2.kwargs)} "
            f"against {len(x1.args)} positional and keys {sorted(x1.kwargs)}."
        )
    for (label, a), b in zip(x1.tensors.items(), x2.tensors.values(), strict=True):
        for what, first, second in [
            ("shape behind the sample axis", list(a.shape[1:]), list(b.shape[1:])),
            ("dtype", a.dtype, b.dtype),
            ("device", a.device, b.device),
        ]:
            if first != second:
                raise ValueError(f"x2{label} must have the {what} of x1{label}: {first}, got {second}.")


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
        raise TypeError(f"params must be an iterable of parameter names, e.g. ['0.weight'], got {_kind(names)}.")
    known = dict(model.named_parameters(remove_duplicate=False))
    params: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"params must hold names of parameters, got {_kind(name)}.")
        if name not in known:
            raise ValueError(f"params names {name!r}, which the model does not have. It has: {', '.join(known)}.")
        if not known[name].requires_grad:
            raise ValueError(f"params names {name!r}, which is frozen. Call requires_grad_() on it, or leave it out.")
        if not any(known[name] is p for p in params.values()):
            params[name] = known[name]
    if not params:
        raise ValueError("params is empty: name at least one parameter, or pass None for all that require a gradient.")
    return params


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
