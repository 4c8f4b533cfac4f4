"""A device named "pretend": it computes on the CPU, and refuses what CUDA refuses.

After ``model.to("pretend")``, what would fail on a GPU fails on a machine that has none: a CPU tensor among those on
the device (but where CUDA takes one), ``.numpy()``, a generator of another device. ``COUNTS`` says what takes time.

Unlike CUDA, it has no fused recurrent layers, moving a model breaks its ties, and an error inside of a backward pass
may abort the process: wrap calls in ``torch.autograd.set_multithreading_enabled(False)``, and keep to what succeeds.
"""

from functools import cache

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"

# Operations that a GPU starts (each takes some microseconds), numbers read from it (for each, it finishes all work
# first), and tensors copied between it and the CPU.
COUNTS = {"launches": 0, "syncs": 0, "copies": 0}

_aten = torch.ops.aten

# Where CUDA takes CPU tensors with axes: copies, and CPU indices of its tensors.
_MIXED = {
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
    _aten._unsafe_index_put.default,
}
_SYNCS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default}
_VIEWS = {"alias", "as_strided", "detach", "expand", "narrow", "permute", "select", "slice", "split", "squeeze", "t"}
_VIEWS |= {"transpose", "unfold", "unsafe_view", "unsqueeze", "view"}
# Memory without numbers: nothing is started for it.
_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _Backend(_DummyBackendModule):
    """What torch asks the module of a device."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def is_autocast_enabled(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def get_rng_state(self, device=0):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=0):
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the device; its numbers are on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        outer = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, dtype=inner.dtype, device=DEVICE)
        outer._inner = inner
        return outer

    def __repr__(self):
        return f"PretendTensor({self._inner})"

    @property
    def data(self):
        with no_dispatch():  # one operation of the device at most is seen, none of the CPU
            inner = self._inner.data
        return PretendTensor(inner)

    @data.setter
    def data(self, other):
        self._inner.data = _inner(other)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = PretendTensor(self._inner.detach().clone())
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return memo[id(self)]

    def data_ptr(self):
        return self._inner.data_ptr()

    def tolist(self):
        COUNTS["syncs"] += 1
        return self._inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def reset():
    """Start counting afresh."""
    COUNTS.update(dict.fromkeys(COUNTS, 0))


def _inner(value):
    return value._inner if isinstance(value, PretendTensor) else value


def _mapped(function, value):
    """Apply a function to each tensor that an operation takes or returns: in lists at most, and so without pytrees."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(_mapped(function, entry) for entry in value) if isinstance(value, list | tuple) else value


@cache
def _facts(func):
    """Whether an operation is waited for, whether it starts anything, and what it does to its first tensor."""
    launches = func.__name__.split(".")[0].strip("_") not in _VIEWS | _ROOM
    in_place = func._schema.is_mutable and func._schema.name.endswith("_")
    return func in _SYNCS, launches, torch.Tag.inplace_view in func.tags, in_place


def _compute(func, args, kwargs):
    """Compute an operation on the numbers inside, where CUDA would."""
    tensors = []
    _mapped(tensors.append, (*args, *kwargs.values()))
    on_device = any(isinstance(t, PretendTensor) for t in tensors)
    mixed = on_device and any(not isinstance(t, PretendTensor) and t.ndim for t in tensors)
    if mixed and func not in _MIXED:
        devices = f"at least two devices, {DEVICE} and cpu!"
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {devices} ({func})")
    wanted, to_device = kwargs.get("device"), on_device
    if wanted is not None:
        to_device = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    generator = kwargs.get("generator")
    if to_device and generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    syncs, launches, changes_shape, in_place = _facts(func)
    COUNTS["copies"] += mixed or (bool(tensors) and to_device != on_device)
    COUNTS["syncs"] += syncs
    COUNTS["launches"] += launches
    result = func(*_mapped(_inner, args), **{key: _mapped(_inner, value) for key, value in kwargs.items()})
    if changes_shape:
        with no_dispatch():  # what the outer tensor shows of its shape changes as well
            func(*args, **kwargs)
    if in_place:
        return args[0]
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"]
    return _mapped(PretendTensor, result) if to_device else result


def _making(func):
    """What makes a tensor when none is given."""
    return lambda *args, **kwargs: _compute(func, args, kwargs)


def _copy_from(source, target, non_blocking=False):
    COUNTS["copies"] += 1
    _inner(target).copy_(_inner(source))
    return target


_library = torch.library.Library("aten", "IMPL")
for _name, _func in (
    ("empty.memory_format", _aten.empty.memory_format),
    ("empty_strided", _aten.empty_strided.default),
    ("_efficientzerotensor", _aten.zeros.default),
):
    _library.impl(_name, _making(_func), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_copy_from_and_resize", _copy_from, "PrivateUse1")
