"""A forward pass is watched as it runs: for random numbers, low precision, and parameters that it writes to."""

import random
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.models.entries import generator_of_numpy, generators_of_torch, global_generators, storage_of
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, listed
from ggn_ntk.process.torch_internals import OperationMode, schema_of, tree_leaves
from ggn_ntk.process.turns import GENERATOR_STATE

_T = TypeVar("_T")

# Operations that make a tensor in the likeness of another, whose numbers they do not use.
_MAKES = re.compile(r"aten::(new_\w+|\w+_like)$")

# Methods that set a generator of torch.
_SETS = ("manual_seed", "seed", "set_state")

_REMEDY = "Call eval(), or make its forward pass deterministic"
DRAWS = Problem("", "its forward pass draws random numbers", _REMEDY)
UNSTEADY = Problem(
    "",
    "it returns something else when it is evaluated again: it draws random numbers, or keeps state out of reach",
    _REMEDY,
)


class Inspection(OperationMode):
    """Looks at each operation of a forward pass before it is carried out.

    Attributes:
        low: Dtypes of low precision in which it computes.
    """

    def __init__(self, params: Mapping[Tensor, Tensor | None], written: dict[Tensor, Tensor]) -> None:
        """Take parameters with their values, where these are known, and where to list those that are written to."""
        super().__init__()
        self._written, self._params = written, defaultdict[int, list[tuple[Tensor, Tensor | None]]](list)
        for p, values in params.items():  # several of them may be parts of the same memory
            self._params[storage_of(p)].append((p, values))
        self.low = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, unless it draws random numbers."""
        kwargs = kwargs or {}
        draws, written = _effects(func)
        if draws and _draws(func, args, kwargs):
            raise UnsupportedModelError([DRAWS])
        # Parameters are backed up before they are written to, also through a view.
        for i, name in written:
            self._back_up(args[i] if i < len(args) else kwargs.get(name))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in TOLERANCES:
            return result
        low = _dtypes(result) - TOLERANCES.keys()
        # Without arguments of real numbers it makes a constant; those of the same precision were seen before.
        if low and not _MAKES.match(schema_of(func).name) and _dtypes((args, kwargs)) - low:
            self.low |= low
        return result

    def _back_up(self, argument: Any) -> None:
        """Take down the values of parameters that share memory with what an operation writes to."""
        for tensor in _leaves(argument):
            for param, values in self._params.get(storage_of(tensor), ()) if isinstance(tensor, Tensor) else ():
                if param not in self._written:
                    self._written[param] = param.detach().clone() if values is None else values


def in_low_precision(dtypes: Iterable[torch.dtype]) -> Problem:
    """Say that a model computes in dtypes that are too coarse."""
    remedy = "Kernels are exact in float32 and float64 only: switch autocast and conversions in its forward pass off"
    return Problem("", f"it computes in {listed(sorted(map(str, dtypes)))} inside", remedy)


def _dtypes(values: Any) -> set[torch.dtype]:
    """List the dtypes of the real numbers in tensors."""
    tensors = (x for x in _leaves(values) if isinstance(x, Tensor))
    return {x.dtype.to_real() for x in tensors if x.is_floating_point() or x.is_complex()}


def _leaves(values: Any) -> Iterable[Any]:
    """List the entries of nested containers; of a tensor, and of none, without a walk."""
    return (values,) if isinstance(values, Tensor) else tree_leaves(values) if values else ()


class OwnGenerator(OperationMode):
    """Lets operations draw random numbers from new generators, and leaves those of the process alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation."""
        kwargs = kwargs or {}
        draws, _ = _effects(func)
        if not draws or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        # An operation may have a form that takes a generator. Otherwise those of the process are put back afterwards.
        device = next((x.device for x in args if isinstance(x, Tensor)), kwargs.get("device") or "cpu")
        takes_one = _with_generator(func)
        if takes_one is not None:
            return takes_one(*args, **kwargs | {"generator": torch.Generator(device)})
        with GENERATOR_STATE, torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
            return func(*args, **kwargs)


@cache
def _with_generator(func: Any) -> Any:
    """Look up the overload of an operation that takes a generator as well; ``None`` where there is none."""
    names = {a.name for a in schema_of(func).arguments} | {"generator"}
    forms = [func, *(getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())]
    return next((form for form in forms if {a.name for a in schema_of(form).arguments} == names), None)


@cache
def _effects(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Tell whether an operation may draw random numbers, and which of its arguments it writes to."""
    infos = [(i, a.name, a.alias_info) for i, a in enumerate(schema_of(func).arguments)]
    writes = ((i, name) for i, name, alias in infos if alias is not None and alias.is_write)
    return torch.Tag.nondeterministic_seeded in func.tags, tuple(writes)


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of an operation that may draw does so, from a generator of the process."""
    given = {a.name: a.default_value for a in schema_of(func).arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    off = any(given.get(name) is False for name in ("train", "training")) or given.get("dropout_p") == 0
    return not off and given.get("generator") is None


def without_draws(call: Callable[..., _T], *args: Any) -> _T:
    """Evaluate a model, and raise if it draws from generators of NumPy or Python, or seeds one of torch."""
    generators = global_generators()
    try:
        result = call(*args)
        # Another thread may have moved them: so the call is made once more, under watch.
        if any(generator.changed() for generator in generators) and _calls_a_generator(call):
            raise UnsupportedModelError([DRAWS])
    except BaseException:
        # With other threads at work generators stay where they are: these would draw the same numbers once more.
        others = (thread for thread in threading.enumerate() if thread is not threading.current_thread())
        if all(thread.daemon for thread in others):
            for generator in generators:
                generator.put_back()
        raise
    return result


def _calls_a_generator(call: Callable[[], Any]) -> bool:
    """Tell whether a call draws from the generators of Python or NumPy in this thread, or seeds one of torch."""
    of_python: Any = vars(random)["_inst"]
    of_torch = generators_of_torch()
    drawn = False

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal drawn
        if event == "c_call" and not drawn:
            owner = getattr(argument, "__self__", None)
            drawn = owner is of_python or (argument.__name__ in _SETS and any(owner is g for g in of_torch))

    before, kept = sys.getprofile(), of_python.gauss_next
    with _numpy_moved_on() as moved:
        of_python.gauss_next = None  # the second of a pair of normal numbers would be returned without a call
        sys.setprofile(watch)
        try:
            call()
        finally:
            sys.setprofile(before)
            of_python.gauss_next = kept
        return drawn or moved()


@contextmanager
def _numpy_moved_on() -> Iterator[Callable[[], bool]]:
    """Set NumPy's generator to a state of its own, for this thread alone, and tell whether it has moved from there."""
    lock = np.random.mtrand._rand._bit_generator.lock  # noqa: SLF001 - NumPy 1.24 has get_bit_generator, others not
    # Since NumPy 2 this thread can hold the lock and draw; before, the generator stays where other threads use it.
    alone = isinstance(lock, type(threading.RLock()))
    with lock if alone else nullcontext():
        found = generator_of_numpy()
        if alone:
            np.random.set_state(np.random.RandomState(0).get_state(legacy=False))
        try:
            yield generator_of_numpy().changed
        finally:
            if alone:
                found.put_back()
