"""Functions ``f(params, *args, **kwargs)``, as ``torch.func`` has them, in the form of modules, as routes take them.

The parameters of such a module share the memory of the tensors in ``params``. Modules that the function refers to are
its children, so that their hooks and buffers are left as found, threads take turns with them, and BatchNorm in train
mode is named. Their parameters are constants.
"""

import dis
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ggn_ntk.problem.errors import kind_of
from ggn_ntk.process.torch_internals import (
    children_of,
    named_leaves,
    parameters_of,
    storage_id,
    tree_unflatten,
)
from ggn_ntk.process.transforms import is_wrapped

#: What front doors take as ``model``, and as ``params``: names, or the parameters of a function.
Model = Module | Callable[..., Any]
Params = str | Iterable[str] | Mapping[str, Any]

_MODEL = "model must be a torch.nn.Module or a function f(params, *args, **kwargs)"

_FUNCTIONS = (FunctionType, MethodType, partial)

# How far to look into what a function refers to for modules, and up to how many entries.
_DEPTH, _ENTRIES = 3, 1000


class FunctionModule(Module):
    """A function with its parameters, called as a module is.

    Attributes:
        function: The function.
        shared: Ids of what other modules of functions may share with this one: the function, and the user's tensors.
        variables: What the function refers to: its state is left as found.
    """

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Any]) -> None:
        """Give each tensor a name: nested ones those of all levels, joined by dots."""
        super().__init__()
        self.function = function
        named, self._structure = named_leaves(dict(params))
        self._names = [name for name, _ in named]
        aliases: dict[Any, Parameter] = {}
        for name, tensor in _checked(named).items():
            # The same place in memory under two names is one parameter, as in a module.
            parameters_of(self)[name] = aliases.setdefault(_place_of(tensor), _alias(tensor))
        self.shared = {id(getattr(function, "__self__", function)), *(id(tensor) for _, tensor in named)}
        variables = list(_variables(function, set()))
        self.variables = [value for _, value in variables]
        for name, module in (found for variable in variables for found in _modules_in(*variable)):
            if all(module is not child for child in self.children()):
                children_of(self)[self._unlike_others(name)] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the parameters that are held now, in the structure in which they were given."""
        held = [parameters_of(self)[name] for name in self._names]
        return self.function(tree_unflatten(held, self._structure), *args, **kwargs)

    def _unlike_others(self, name: str) -> str:
        """Change a child's name until no parameter begins like those of the child."""
        while not name or name in children_of(self) or any(f"{held}.".startswith(f"{name}.") for held in self._names):
            name += "_"
        return name


def as_module(model: Any, params: Any) -> Module:
    """Make a module of a function and its parameters."""
    if isinstance(model, type) or not callable(model):
        raise TypeError(f"{_MODEL}, got {kind_of(model)}.")
    if params is None:
        raise TypeError(
            f"{_MODEL}, got {kind_of(model)} without params. Pass params=, a mapping of names to tensors, which is the "
            "function's first argument."
        )
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be a mapping of names to tensors where model is a function, whose first argument it is, "
            f"got {kind_of(params)}."
        )
    with torch.inference_mode(False):  # tensors of inference mode take no part in a graph: copies do
        return FunctionModule(model, params)


def own_parameters(model: Module, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """List a model's parameters; of a function those that it is given, and none of modules that it refers to."""
    recurse = not isinstance(model, FunctionModule)
    return dict(model.named_parameters(recurse=recurse, remove_duplicate=remove_duplicate))


def given_with_graph(model: Module, params: Any) -> dict[int, Tensor]:
    """List what a function was given that requires a gradient, by the id of the parameter that stands for it."""
    if not isinstance(model, FunctionModule):
        return {}
    named, _ = named_leaves(dict(params))
    return {id(parameters_of(model)[name]): tensor for name, tensor in named if tensor.requires_grad}


def shared_by(model: Module) -> set[int]:
    """List the ids of what a model uses besides its modules and parameters, and others may use, too."""
    return model.shared if isinstance(model, FunctionModule) else set()


def _checked(named: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """Refuse what is no dense tensor, and two tensors of one name."""
    found: dict[str, Tensor] = {}
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"params[{name!r}] must be a tensor, or a dict, list or tuple of tensors, got {kind_of(tensor)}."
            )
        if is_wrapped(tensor):
            raise ValueError(
                f"params[{name!r}] is what a torch.func transform makes of a tensor: compute this outside."
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"params[{name!r}] is of layout {tensor.layout}: pass a dense tensor.")
        if name in found:
            raise ValueError(f"params holds two tensors of the name {name!r}: rename one.")
        found[name] = tensor
    return found


def _place_of(tensor: Tensor) -> Any:
    """Identify the entries in memory that a tensor consists of."""
    return storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _alias(tensor: Tensor) -> Parameter:
    """Make a parameter of a tensor, in the same memory; of integers, by which nothing is differentiated, a constant."""
    alias = tensor.clone() if tensor.is_inference() else tensor.detach()
    return Parameter(alias, requires_grad=alias.is_floating_point() or alias.is_complex())


def _variables(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """List the variables to which a function refers, and those functions to which it refers."""
    for name, value in _referred_to(function).items():
        if id(value) in seen or isinstance(value, type | ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, _FUNCTIONS):
            yield from _variables(value, seen)
        else:
            yield name, value


def _referred_to(function: Any) -> dict[str, Any]:
    """Look up the variables of a function, or what an object holds that is called as one."""
    if isinstance(function, MethodType):
        return {"self": function.__self__, "function": function.__func__}
    if isinstance(function, partial):
        return {"function": function.func, **_numbered(function.args), **function.keywords}
    if not isinstance(function, FunctionType):
        return {"self": function, "function": type(function).__call__}
    code, defaults = function.__code__, function.__defaults__ or ()
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: cell.cell_contents for name, cell in cells if cell != CellType()}  # those that are not empty
    positional = code.co_varnames[: code.co_argcount]
    by_default = dict(zip(reversed(positional), reversed(defaults), strict=False)) | (function.__kwdefaults__ or {})
    return _globals_of(function) | closure | by_default


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """Look up the global variables of a function, without functions of other packages."""
    names, package = function.__globals__, _package(function)
    if package == "torch":
        return {}
    found = {name: names[name] for name in _global_names(function.__code__) if name in names}
    return {k: v for k, v in found.items() if not isinstance(v, FunctionType) or _package(v) == package}


def _package(function: FunctionType) -> str:
    """Name the package in which a function is defined."""
    return str(function.__globals__.get("__name__")).split(".")[0]


def _global_names(code: CodeType) -> Iterator[str]:
    """List the names of global variables in some code, and in functions that it defines."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _numbered(values: Iterable[Any]) -> dict[str, Any]:
    """Name values by their places."""
    return {str(i): value for i, value in enumerate(values)}


def _modules_in(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Module]]:
    """List the modules that a variable holds, in containers and as attributes."""
    if isinstance(value, Module):
        yield name, value
        return
    if isinstance(value, list | tuple):
        held = _numbered(value[:_ENTRIES])
    else:
        held = dict(islice((value if isinstance(value, dict) else getattr(value, "__dict__", {})).items(), _ENTRIES))
    if depth < _DEPTH:
        for key, entry in held.items():
            yield from _modules_in(str(key), entry, depth + 1)
