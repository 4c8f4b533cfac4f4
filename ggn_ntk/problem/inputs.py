"""The samples of a call, checked and brought to one form."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

_WRAPPER = """
Values that all samples share, and inputs in other structures, go into a wrapper that takes tensors [N, ...] alone, say:

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model({call})

    {function}(Wrapper(model), x1)"""


@dataclass(frozen=True, eq=False)
class Inputs:
    """N samples, as the arguments of a model: it is called as ``model(*args, **kwargs)``."""

    args: tuple[Tensor, ...]  # positional arguments, each ``[N, ...]``
    kwargs: dict[str, Tensor]  # keyword arguments, each ``[N, ...]``

    def __len__(self) -> int:
        """Return the number of samples N."""
        return len(next(iter(self.tensors.values())))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their label in a message: ``""``, ``"[1]"`` or ``"['mask']"``."""
        if len(self.args) == 1:
            return {"": self.args[0]}
        return {f"[{i}]": x for i, x in enumerate(self.args)} | {f"[{k!r}]": x for k, x in self.kwargs.items()}

    def map(self, function: Callable[..., Tensor], *others: "Inputs") -> "Inputs":
        """Apply a function to each tensor, together with those in its place in other inputs."""
        args = tuple(function(*xs) for xs in zip(self.args, *(o.args for o in others), strict=True))
        return Inputs(args, {k: function(x, *(o.kwargs[k] for o in others)) for k, x in self.kwargs.items()})

    def __getitem__(self, index: slice | list[int] | Tensor) -> "Inputs":
        """Select samples."""
        if isinstance(index, slice):
            return self.map(lambda x: x[index])
        # One copy of the list to each device; indexing with a list would make one for each tensor.
        places = {x.device: torch.as_tensor(index, device=x.device) for x in self.tensors.values()}
        return self.map(lambda x: x[places[x.device]])

    def stack(self, other: "Inputs | None") -> "Inputs":
        """Put the samples of another set behind these: N1 + N2 samples."""
        return self if other is None else self.map(lambda a, b: torch.cat([a, b]), other)


def kind_of(value: Any) -> str:
    """Name a value's type for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def parse_inputs(x: Any, argument: str, model: Module) -> Inputs:
    """Bring one set of inputs to the form of positional and keyword arguments, and check it against the model."""
    if isinstance(x, Tensor):
        inputs = Inputs((x,), {})
    elif isinstance(x, tuple):
        inputs = Inputs(x, {})
    elif isinstance(x, Mapping):
        inputs = Inputs((), dict(x))
    else:
        raise TypeError(
            f"{argument} must be a tensor [N, ...], a tuple of tensors (called as model(*{argument})) or a mapping "
            f"of tensors (called as model(**{argument})), got {kind_of(x)}.{_wrapper('[x]')}"
        )
    _check_tensors(inputs, argument, model)
    with torch.inference_mode(False):  # tensors of inference mode take no part in a graph: copies do
        return inputs.map(lambda t: t.clone() if t.is_inference() else t.detach())


def _wrapper(call: str) -> str:
    """Show how to wrap a model that takes something else than tensors of samples."""
    return _WRAPPER.format(call=call, function="empirical_ntk")


def _check_tensors(inputs: Inputs, argument: str, model: Module) -> None:
    """Check that inputs are tensors with one common leading axis, of the model's dtype and device."""
    if not all(isinstance(key, str) for key in inputs.kwargs):
        raise TypeError(f"The keys of {argument} must be strings, the names of the model's arguments.")
    if not inputs.args and not inputs.kwargs:
        raise ValueError(f"{argument} is empty: it must hold at least one tensor.")
    for label, tensor in inputs.tensors.items():
        if not isinstance(tensor, Tensor):
            call = _call_with(label, tensor)
            raise TypeError(f"{argument}{label} must be a tensor, got {kind_of(tensor)}.{_wrapper(call)}")
        if tensor.is_nested:
            raise ValueError(f"{argument}{label} is a nested tensor: pass padded samples with a mask.")
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"{argument}{label} is of layout {tensor.layout}: pass a dense tensor, {argument}{label}.to_dense()."
            )
        if tensor.ndim == 0:
            raise ValueError(f"{argument}{label} has no axes: its leading axis must hold the samples.")
    sizes = {label: len(tensor) for label, tensor in inputs.tensors.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{argument}{label}: {size}" for label, size in sizes.items())
        raise ValueError(
            f"The tensors of {argument} must share their leading axis, the samples, got {listed}."
            f"{_wrapper('x, shared')}"
        )
    if 0 in sizes.values():
        raise ValueError(f"{argument} has no samples: its leading axis is empty.")
    _check_like_model(inputs, argument, model)


def _call_with(label: str, value: Any) -> str:
    """Write the arguments of a call with a tensor x and a value that is no tensor, if it is short."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: x" for key in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join("x" for _ in value) + "]"
    name = label.strip("[]'")
    shown = repr(value) if isinstance(value, bool | int | float | str | None) else "..."
    return f"x, {name}={shown}" if name.isidentifier() else f"x, {shown}"


def _check_like_model(inputs: Inputs, argument: str, model: Module) -> None:
    """Check that inputs are on the model's device and, where real, of its dtype."""
    params = list(model.parameters())
    devices, dtypes = {p.device for p in params}, {p.dtype for p in params if not p.is_complex()}
    for label, tensor in inputs.tensors.items():
        if devices and tensor.device not in devices:
            raise ValueError(
                f"{argument}{label} is on {tensor.device}, the model's parameters on {_sorted(devices)}. "
                f"Move one: {argument}.to(device) or model.to(device)."
            )
        if dtypes and tensor.is_floating_point() and tensor.dtype not in dtypes:
            raise ValueError(
                f"{argument}{label} is {tensor.dtype}, the model's parameters {_sorted(dtypes)}. "
                f"Convert one: {argument}.to(dtype) or model.to(dtype)."
            )


def _sorted(values: Iterable[Any]) -> str:
    """Join values for a message."""
    return ", ".join(sorted(map(str, values)))


def check_alike(x1: Inputs, x2: Inputs) -> None:
    """Check that two sets of inputs differ in nothing but the number of samples."""
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
