"""The samples of a call, checked and brought to one form: tensors ``[N, ...]`` by label, and what goes around them."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import Module

from ggn_ntk.problem.errors import kind_of
from ggn_ntk.problem.functions import own_parameters
from ggn_ntk.process.torch_internals import tree_map

_WRAPPER = """
What is in another form goes into a wrapper that takes tensors [N, ...] and makes it of them, say:

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model({call})

    empirical_ntk(Wrapper(model), x1)"""


@dataclass(frozen=True, eq=False)
class Shared:
    """What :func:`shared` has marked."""

    value: Any  # the same for every sample


def shared(value: Any) -> Shared:
    """Mark a part of a model's inputs as the same for every sample.

    Say the points at which a DeepONet evaluates all functions (Lu, Jin, Pang, Zhang, Karniadakis: "Learning nonlinear
    operators via DeepONet based on the universal approximation theorem of operators", Nature Machine Intelligence,
    2021), as in ``empirical_ntk(model, {"u": u, "points": shared(points)})``: the model is called with ``points`` as
    they are, however many samples it is called with.

    Args:
        value: A tensor ``[...]`` of any shape, on the model's device and of its dtype where real; or lists, tuples,
            mappings and dataclasses of such tensors.

    Returns:
        The value, marked: to be put in the place of a tensor ``[N, ...]`` in ``x1`` and ``x2``.

    Raises:
        TypeError: If there is no tensor in the value: anything else is shared without a mark.
    """
    if not any(isinstance(part, Tensor) for _, part, _ in parts_of(value)):
        raise TypeError(f"value must be a tensor or hold tensors, got {kind_of(value)}: pass it on without shared().")
    return Shared(value)


@dataclass(frozen=True, eq=False)
class Inputs:
    """N samples, as the arguments of a model."""

    tensors: dict[str, Tensor]  # of samples, each ``[N, ...]``, by the label in a message: ``""`` or ``"['mask'][0]"``
    constants: dict[str, Any]  # what all samples share: tensors, and entries that are none, by label
    kinds: dict[str, type]  # of the structures that hold these, by label
    structure: Any  # as it was given: a tensor, or a tuple or dict of arguments
    whole: bool = False  # whether a batch ``[1, N, ...]`` is a single sample, and all of it one input of the model

    def __len__(self) -> int:
        """Return the number of samples N."""
        return next(iter(self.tensors.values())).shape[0]  # torch's len() takes longer, and this is asked often

    @property
    def positional(self) -> tuple[Tensor, ...] | None:
        """The arguments, if they are tensors of samples, all of them positional."""
        positional = len(self.tensors) == 1 if not self.kinds else self.kinds == {"": tuple}
        return None if self.constants or not positional else tuple(self.tensors.values())

    def arguments(self, copied: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make positional and keyword arguments for one call of the model, with copies of all tensors."""
        entries = {**(self.only() if self.whole else self.tensors), **self.constants}
        made = _made(self.structure, {k: copied(x) if isinstance(x, Tensor) else x for k, x in entries.items()})
        if isinstance(self.structure, dict):
            return (), made
        return (made if isinstance(self.structure, tuple) else (made,)), {}

    def map(self, function: Callable[..., Tensor], *others: "Inputs") -> "Inputs":
        """Apply a function to each tensor of samples, together with those in its place in other inputs."""
        return self._with({k: function(x, *(o.tensors[k] for o in others)) for k, x in self.tensors.items()})

    def over_samples(self, function: Callable[..., Any], *others: "Inputs", chunk_size: int | None = None) -> Any:
        """Map a function over samples with ``vmap``, together with those in their place in other inputs."""
        sets = (self, *others)
        if self.whole:
            found = function(*(replace(x, tensors=x.only()) for x in sets))
            return tree_map(lambda y: y.unsqueeze(0), found)

        def of_sample(*tensors: dict[str, Tensor]) -> Any:
            return function(*(replace(x, tensors=one) for x, one in zip(sets, tensors, strict=True)))

        return vmap(of_sample, chunk_size=chunk_size)(*(x.tensors for x in sets))

    def as_one(self) -> "Inputs":
        """Take all samples for one."""
        return replace(self.map(lambda x: x.unsqueeze(0)), whole=True)

    @property
    def count(self) -> int:
        """The number of samples as they were given."""
        return next(iter(self.tensors.values())).shape[1 if self.whole else 0]

    def only(self) -> dict[str, Tensor]:
        """Take the tensors of a single sample."""
        if len(self) > 1:
            raise ValueError(f"A model that sees whole batches takes one at a time, not {len(self)}.")
        return {label: x.squeeze(0) for label, x in self.tensors.items()}

    def _with(self, tensors: dict[str, Tensor]) -> "Inputs":
        """Put other tensors in the places of those of samples."""
        return replace(self, tensors=tensors)

    def __getitem__(self, index: slice | list[int] | Tensor) -> "Inputs":
        """Select samples."""
        if isinstance(index, slice):
            return self.map(lambda x: x[index])
        # One copy of the list to each device; indexing with a list would make one for each tensor.
        places = {x.device: torch.as_tensor(index, device=x.device) for x in self.tensors.values()}
        return self.map(lambda x: x[places[x.device]])

    def first(self) -> "Inputs":
        """Copy the first sample, and keep none of the others, nor the structure that they were given in."""
        few = self[[0]]
        return replace(few, structure=_made(self.structure, few.tensors | few.constants))

    def fits(self, other: "Inputs") -> bool:
        """Tell whether a set that is alike can be evaluated together with this one: shapes, and what samples share."""
        if self.whole:
            return False
        same_shapes = all(x.shape[1:] == other.tensors[label].shape[1:] for label, x in self.tensors.items())
        return same_shapes and all(_equal(x, other.constants[label]) for label, x in self.constants.items())

    def detached(self) -> "Inputs":
        """Take all tensors out of their graphs."""
        return self.each(Tensor.detach)

    def exchanged(self, tensors: dict[str, Tensor]) -> "Inputs":
        """Put other tensors in the places of some, also of those that samples share."""
        return replace(
            self,
            tensors={k: tensors.get(k, t) for k, t in self.tensors.items()},
            constants={k: tensors.get(k, c) for k, c in self.constants.items()},
        )

    def with_graphs(self) -> dict[str, Tensor]:
        """List the tensors that require a gradient, also those that samples share."""
        return {k: t for k, t in (self.tensors | self.constants).items() if isinstance(t, Tensor) and t.requires_grad}

    def each(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """Apply a function to each tensor, also to those that samples share."""
        constants = {k: function(c) if isinstance(c, Tensor) else c for k, c in self.constants.items()}
        return replace(self.map(function), constants=constants)

    def stack(self, other: "Inputs | None") -> "Inputs":
        """Put the samples of another set behind these: N1 + N2 samples."""
        return self if other is None else self.map(lambda a, b: torch.cat([a, b]), other)


def parse_inputs(x: Any, argument: str, model: Module, *, graph: bool = False) -> Inputs:
    """Bring one set of inputs to the form of positional and keyword arguments, and check it against the model."""
    inputs = _read(x, argument)
    _check_tensors(inputs, argument)
    _check_like_model(inputs, argument, model)
    if not graph:
        _refuse_graphs(inputs, argument)
    with torch.inference_mode(False):  # tensors of inference mode take no part in a graph: copies do
        inputs = inputs.each(lambda t: t.clone() if t.is_inference() else t)
        return inputs if graph else inputs.detached()


def count_samples(x: Any, argument: str) -> int:
    """Count the samples of one set of inputs, checked but for what the model says to them."""
    inputs = _read(x, argument)
    _check_tensors(inputs, argument)
    _refuse_graphs(inputs, argument)
    return len(inputs)


def select(x: Any, index: slice, device: torch.device) -> Any:
    """Take some samples of one set of inputs, in the structure in which it was given, on a device."""
    x = dict(x) if _is_mapping(x) else x
    return _each(x, lambda tensor, is_shared: (tensor if is_shared else tensor[index]).to(device))


def _each(x: Any, function: Callable[[Tensor, bool], Tensor], *, is_shared: bool = False) -> Any:
    """Make a structure like another, of what a function makes of each tensor and of whether it is marked as shared."""
    if isinstance(x, Shared):
        return replace(x, value=_each(x.value, function, is_shared=True))
    parts = _parts(x)
    if parts is None:
        return function(x, is_shared) if isinstance(x, Tensor) else x
    return _with_parts(x, [_each(part, function, is_shared=is_shared) for part in parts.values()])


def stack_samples(samples: list[Any], argument: str) -> Any:
    """Put inputs of the model for one sample each, of one structure, together to a set."""
    first, parts = samples[0], [_parts(sample) or {} for sample in samples]
    if any(type(sample) is not type(first) for sample in samples) or any(p.keys() != parts[0].keys() for p in parts):
        raise ValueError(f"Samples of {argument} must have one structure, got {kind_of(first)} and others.")
    if isinstance(first, Tensor):
        if len({(tuple(sample.shape), sample.dtype) for sample in samples}) > 1:
            raise ValueError(f"Samples of {argument} must have one shape and dtype: pad them, or make a set of each.")
        return torch.stack(samples)
    if not parts[0]:
        if not all(_equal(first, sample) for sample in samples):
            raise ValueError(
                f"What is no tensor must be the same in all samples of {argument}, got {first!r} and others."
            )
        return first
    return _with_parts(first, [stack_samples([p[label] for p in parts], argument + label) for label in parts[0]])


def _refuse_graphs(inputs: Inputs, argument: str) -> None:
    """Refuse inputs that require a gradient."""
    for label in inputs.with_graphs():
        raise ValueError(
            f"{argument}{label} requires a gradient, but what is computed carries no graph to inputs: pass "
            f"{argument}{label}.detach(). For kernels that are differentiable in inputs and parameters, call "
            "ggn_ntk.reference.jacobian_contraction(..., create_graph=True)."
        )


def parts_of(x: Any, label: str = "", *, is_shared: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """List a structure, its parts and theirs, with labels and whether they are marked as shared."""
    if isinstance(x, Shared):
        yield from parts_of(x.value, label, is_shared=True)
        return
    yield label, x, is_shared
    for suffix, part in (_parts(x) or {}).items():
        yield from parts_of(part, label + suffix, is_shared=is_shared)


def _parts(x: Any) -> dict[str, Any] | None:
    """List the parts of a structure by what their labels end with; ``None`` for an entry."""
    if isinstance(x, Tensor | type):
        return None
    if isinstance(x, list | tuple):
        return {f"[{i}]": part for i, part in enumerate(x)}
    if _is_mapping(x):
        return {f"[{key!r}]": part for key, part in dict(x).items()}
    if dataclasses.is_dataclass(x):
        parts = {f".{f.name}": getattr(x, f.name) for f in dataclasses.fields(x) if hasattr(x, f.name)}
        # Settings are passed on as they are, whatever else they hold.
        return parts if any(isinstance(part, Tensor) for _, part, _ in parts_of([*parts.values()])) else None
    return None


def _is_mapping(x: Any) -> bool:
    """Tell whether ``**`` takes a value apart."""
    return hasattr(x, "keys") and hasattr(x, "__getitem__")


def _made(x: Any, entries: dict[str, Any], label: str = "") -> Any:
    """Make a structure like another, of other entries, by label."""
    if isinstance(x, Shared):
        return _made(x.value, entries, label)
    parts = _parts(x)
    if parts is None:
        return entries[label]
    return _with_parts(x, [_made(part, entries, label + suffix) for suffix, part in parts.items()])


def _with_parts(x: Any, parts: list[Any]) -> Any:
    """Make a structure like another, of other parts."""
    if isinstance(x, tuple):
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if dataclasses.is_dataclass(x) and not _is_mapping(x):
        # What it holds besides its fields may come of these: a copy would keep what came of others.
        new = object.__new__(type(x))
        for field, part in zip((f for f in dataclasses.fields(x) if hasattr(x, f.name)), parts, strict=True):
            object.__setattr__(new, field.name, part)
        return new
    new = copy.copy(x)
    for key, part in zip(dict(x) if _is_mapping(x) else range(len(x)), parts, strict=True):
        new[key] = part
    return new


def _read(x: Any, argument: str) -> Inputs:
    """Take the entries out of a set of inputs."""
    if isinstance(x, tuple):
        x = tuple(x)
    elif _is_mapping(x) and not isinstance(x, type):
        x = dict(x)
        if not all(isinstance(key, str) for key in x):
            raise TypeError(f"The keys of {argument} must be strings, the names of the model's arguments.")
    elif not isinstance(x, Tensor | Shared):
        raise TypeError(
            f"{argument} must be a tensor [N, ...], a tuple (called as model(*{argument})) or a mapping (called as "
            f"model(**{argument})), got {kind_of(x)}.{_remedy(x, argument)}"
        )
    inputs = Inputs({}, {}, {}, x)
    for label, part, is_shared in parts_of(x):
        if (parts := _parts(part)) is not None:
            inputs.kinds[label] = type(part)
            try:
                _with_parts(part, [*parts.values()])
            except Exception as error:
                what = f"{argument}{label} is of the type {kind_of(part)}, which cannot be made anew of other tensors"
                raise TypeError(f"{what} ({error}): pass a tuple, a list or a dict.") from error
        elif isinstance(part, Tensor) and not is_shared:
            inputs.tensors[label] = part
        else:
            inputs.constants[label] = part
    return inputs


def _remedy(x: Any, argument: str) -> str:
    """Show how to pass what is neither a tensor nor a tuple nor a mapping."""
    if isinstance(x, list):
        return f" Pass ({argument},) for model({argument}), or tuple({argument}) for model(*{argument})."
    if _parts(x) is not None:
        return f" Pass ({argument},) for model({argument})."
    if _is_array(x):
        return f" Pass torch.as_tensor({argument})."
    return "" if isinstance(x, bool | int | float | str | type | None) else _WRAPPER.format(call=f"{kind_of(x)}(x)")


def _is_array(x: Any) -> bool:
    """Tell whether a value holds numbers along axes, as tensors do, but is none."""
    return not isinstance(x, Tensor | type) and getattr(x, "ndim", 0) != 0


def _check_tensors(inputs: Inputs, argument: str) -> None:
    """Check that inputs are tensors with one common leading axis."""
    for label, entry in inputs.constants.items():
        if _is_array(entry):
            what = f"{argument}{label}"
            raise TypeError(f"{what} must be a tensor, got {kind_of(entry)}. Pass torch.as_tensor({what}).")
    if not inputs.tensors:
        raise ValueError(f"{argument} has no samples: it must hold at least one tensor [N, ...] that is not shared.")
    for label, tensor in inputs.tensors.items():
        if tensor.is_nested:
            raise ValueError(f"{argument}{label} is a nested tensor: pass padded samples with a mask.")
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"{argument}{label} is of layout {tensor.layout}: pass a dense tensor, {argument}{label}.to_dense()."
            )
        if tensor.ndim == 0:
            remedy = f"Is it the same for all? Pass shared({argument}{label})." if len(inputs.tensors) > 1 else ""
            raise ValueError(f"{argument}{label} has no axes: its leading axis must hold the samples. {remedy}".strip())
    sizes = {label: len(tensor) for label, tensor in inputs.tensors.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{argument}{label}: {size}" for label, size in sizes.items())
        ((usual, _),) = Counter(sizes.values()).most_common(1)
        others = " and ".join(f"shared({argument}{label})" for label, size in sizes.items() if size != usual)
        raise ValueError(
            f"The tensors of {argument} must share their leading axis, the samples, got {listed}. What is the same for "
            f"all samples is passed as such, say {others}, with `from ggn_ntk import shared`."
        )
    if 0 in sizes.values():
        raise ValueError(f"{argument} has no samples: its leading axis is empty.")


def _check_like_model(inputs: Inputs, argument: str, model: Module) -> None:
    """Check that inputs are on the model's device and, where real, of a dtype of its parameters."""
    params = own_parameters(model).values()
    devices, dtypes = {p.device for p in params}, {p.dtype for p in params if p.is_floating_point()}
    for label, tensor in (inputs.tensors | inputs.constants).items():
        if not isinstance(tensor, Tensor):
            continue
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
    """Check that two sets of inputs are arguments of one form: shapes may differ, and what samples share."""
    if x1.tensors.keys() != x2.tensors.keys() or x1.constants.keys() != x2.constants.keys() or x1.kinds != x2.kinds:
        raise ValueError(
            f"x2 must hold the same entries as x1, in the same structure and shared alike, got {_described(x2)} "
            f"against {_described(x1)}."
        )
    for label, a in x1.tensors.items():
        b = x2.tensors[label]
        for what, first, second in [("dtype", a.dtype, b.dtype), ("device", a.device, b.device)]:
            if first != second:
                raise ValueError(f"x2{label} must have the {what} of x1{label}: {first}, got {second}.")


def _described(inputs: Inputs) -> str:
    """List what inputs hold."""
    tensors = [label or "a tensor" for label in inputs.tensors]
    constants = [f"{label} (shared)" for label in inputs.constants]
    structures = [f"{label} ({kind.__name__})" for label, kind in inputs.kinds.items() if label]
    return ", ".join([*tensors, *constants, *structures])


def _equal(a: Any, b: Any) -> bool:
    """Tell whether two constants are known to be the same."""
    if a is b or type(a) is not type(b):
        return a is b
    try:
        if isinstance(a, Tensor):
            return (a.dtype, a.device, a.layout) == (b.dtype, b.device, b.layout) and torch.equal(a, b)
        return bool(a == b)
    except Exception:  # not all tensors and objects can be compared
        return False
