"""Whatever state a model keeps, every evaluation starts from it as it was found, and it is put back."""

import array
import functools
import itertools
import random
import sys
import threading
import types
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import assert_close, loop_kernel, seeded
from torch import nn
from torch.nn.utils import parametrizations

from ggn_ntk import UnsupportedModelError, UnsupportedRouteError, empirical_ntk, explain, linearize, nngp
from ggn_ntk.models.inspection import Inspection, without_draws
from ggn_ntk.models.state import State

METHODS = ["structured", "jacobian_contraction", "ntk_vector_products"]


class Plain:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("unset", "value")

    def __init__(self, value):
        self.value = value


class Private:
    __slots__ = ("__value",)

    def __init__(self, value):
        self.__value = value

    def next(self):
        self.__value += 1
        return self.__value


class Both(Slotted):
    """Has slots and a dictionary."""


@dataclass(frozen=True, slots=True)
class Frozen:
    values: list = field(default_factory=lambda: [1.0])
    number: float = 1.0


class Refusing(dict):
    def _refuse(self, *args, **kwargs):
        raise TypeError("refused")

    update = clear = pop = __setitem__ = __delitem__ = setdefault = _refuse


class Lazy:
    @functools.cached_property
    def value(self):
        return 2.0


def nested(depth, value):
    for _ in range(depth):
        value = Plain(value)
    return value


def innermost(value):
    while isinstance(value, Plain):
        value = value.value
    return value


def add(state, key="value"):
    setattr(state, key, getattr(state, key, 0.0) + 1)
    return getattr(state, key)


def append(state):
    state.append(state[-1] + 1)
    return state[-1]


def count(state, key=0):
    state[key] += 1
    return float(state[key])


def to_end(state):
    state.move_to_end(next(iter(state)))
    return next(iter(state.values()))


# States, and what changes one and returns a number that depends on it.
KINDS = {
    "list": (lambda: [1.0], append), "emptied_list": (lambda: [1.0, 2.0], lambda s: s.pop() if s else 7.0),
    "deque": (lambda: deque([1.0, 2.0], maxlen=2), append), "dict": (lambda: {0: 1.0}, count),
    "defaultdict": (lambda: defaultdict(float), count), "counter": (Counter, count),
    "ordered_dict": (lambda: OrderedDict(a=1.0, b=2.0, c=4.0), to_end),
    "user_dict": (lambda: UserDict({0: 1.0}), count),
    "refusing_dict": (lambda: Refusing({0: 1.0}), lambda s: dict.__setitem__(s, 0, s[0] + 1) or s[0]),
    "set": (set, lambda s: s.add(object()) or float(len(s))),
    "tuple_of_lists": (lambda: ((), ([1.0],)), lambda s: append(s[1][0])), "array": (lambda: np.ones(3), count),
    "array_in_fortran_order": (lambda: np.ones((2, 3), order="F"), lambda s: count(s, (1, 1))),
    "array_with_strides": (lambda: np.ones((4, 6))[:3, ::2], lambda s: count(s, (1, 1))),
    "array_of_no_axis": (lambda: np.array(1.0), lambda s: count(s, ())),
    "array_of_objects": (lambda: np.array([1.0, None], dtype=object), count),
    "array_of_lists": (lambda: np.array([[1.0], None], dtype=object), lambda s: append(s[0])),
    "array_with_fields": (lambda: np.ones(2, dtype=[("a", "f8"), ("b", "i4")]), lambda s: count(s["a"])),
    "masked_array": (lambda: np.ma.masked_array([1.0, 2.0], [False, True]), count),
    "tensor": (lambda: torch.ones(2), count), "view_of_tensor": (lambda: torch.ones(4)[1::2], count),
    "data_of_tensor": (lambda: torch.ones(2), lambda t: count(t.data)),
    "resized_tensor": (lambda: torch.ones(2), lambda t: t.resize_(t.numel() + 1).fill_(t.numel()).sum()),
    "numpy_of_tensor": (lambda: torch.ones(2), lambda t: count(t.numpy())), "object": (lambda: Plain(1.0), add),
    "new_attribute": (lambda: Plain(1.0), lambda s: add(s, "other")), "cached_property": (Lazy, add),
    "slots": (lambda: Slotted(1.0), add), "unset_slot": (lambda: Slotted(1.0), lambda s: add(s, "unset")),
    "private_slot": (lambda: Private(1.0), lambda s: s.next()), "slots_and_dict": (lambda: Both(1.0), add),
    "frozen_dataclass": (Frozen, lambda s: append(s.values)),
    "written_dataclass": (Frozen, lambda s: object.__setattr__(s, "number", s.number + 1) or s.number),
    "deep": (lambda: nested(4, [1.0]), lambda s: append(innermost(s))),
    "module": (lambda: [nn.BatchNorm1d(1)], lambda s: count(s[0].running_mean)),
}  # fmt: skip

# States that need not be put back: then models that depend on them are refused.
BEYOND = {
    "sparse_tensor": (lambda: torch.eye(2).to_sparse(), lambda t: t.mul_(2).to_dense().sum()),
    "bound_method": (lambda: [1.0].append, lambda s: s(len(s.__self__)) or float(s.__self__[-1])),
    "partial": (lambda: functools.partial(append, [1.0]), lambda s: s()),
    "bytes": (lambda: bytearray(b"\1\2"), count),
    "numbers": (lambda: array.array("d", [1.0]), count),
    "of_the_thread": (threading.local, add),
    "deeper": (lambda: nested(12, [1.0]), lambda s: append(innermost(s))),
    "many": (lambda: [[1.0] for _ in range(3000)], lambda s: append(s[2000])),
    "iterator": (lambda: itertools.count(1), lambda s: float(next(s))),
    "every_other_time": (lambda: itertools.cycle([1.0, 2.0]), next),
}


class Keeps(nn.Module):
    """Scales by what it keeps, which changes at every call."""

    def __init__(self, state, step):
        super().__init__()
        self.layer, self.scale, self.head = nn.Linear(4, 5), nn.Parameter(torch.rand(5)), nn.Linear(5, 2)
        self.state, self.step = state(), step

    def forward(self, x):
        return self.head((self.layer(x) * self.scale * self.step(self.state)).tanh())


def described(value, seen):
    """What an object holds, down to the identity of objects; these are kept alive in ``seen``."""
    if id(value) in seen or isinstance(value, Hostile):
        return id(value)
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        numbers = value.to_dense() if value.is_sparse else value
        return id(value), value.requires_grad, str(numbers.tolist()), described(vars(value), seen)
    if isinstance(value, np.ndarray):
        entries = np.asarray(value).flat
        return id(value), value.dtype, [described(x, seen) if value.dtype == object else str(x) for x in entries]
    if isinstance(value, GENERATORS):
        return str(STATES[type(value)](value))
    if isinstance(value, dict):
        return id(value), list(value), [described(x, seen) for x in value.values()]
    if isinstance(value, list | tuple | deque | bytearray | array.array):
        return id(value), [described(x, seen) for x in value]
    if isinstance(value, functools.partial):
        return id(value), described(value.args, seen)
    if isinstance(value, types.BuiltinMethodType):
        return described(value.__self__, seen)
    if isinstance(value, set):
        return id(value), sorted(map(id, value))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    slots = [name.replace("__", "_Private__") for name in slots]
    held = [described(getattr(value, name, None), seen) for name in slots]
    return id(value), described(getattr(value, "__dict__", ()), seen), held


STATES = {
    torch.Generator: lambda g: g.get_state().tolist(),
    np.random.Generator: lambda g: g.bit_generator.state,
    np.random.RandomState: lambda g: g.get_state(),
    np.random.PCG64: lambda g: g.state,
    random.Random: lambda g: g.getstate(),
}
GENERATORS = tuple(STATES)


@contextmanager
def left_as_found(*values):
    torch.rand(()), np.random.rand(), random.random()
    values = [*values, torch.default_generator, np.random.mtrand._rand, random._inst]
    seen = {}
    before = described(values, seen)
    yield
    after = described(values, {})
    assert after == before


def check_routes(build, methods=METHODS, n=3):
    model, x1, x2 = build(), torch.randn(n, 4).double(), torch.randn(2, 4).double()
    expected = loop_kernel(build, x1, x2)
    for i, method in enumerate(methods):
        with left_as_found(model):
            found = empirical_ntk(model, x1, x2, method=method, check=not i)
        assert_close(found, expected)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_all_kinds(kind):
    check_routes(seeded(Keeps, *KINDS[kind]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", BEYOND)
def test_state_that_need_not_be_put_back(kind, method):
    build, x = seeded(Keeps, *BEYOND[kind]), torch.randn(12, 4).double()
    expected = loop_kernel(build, x)
    with suppress(UnsupportedModelError):
        assert_close(empirical_ntk(build(), x, method=method), expected)


@pytest.mark.parametrize("kind", ["list", "dict", "array", "object"])
def test_state_and_other_functions(kind):
    build, x = seeded(Keeps, *KINDS[kind]), torch.randn(3, 4).double()
    model, expected = build(), loop_kernel(build, x)
    output = torch.cat([build()(sample) for sample in x.split(1)]).detach()
    with left_as_found(model), torch.no_grad():
        assert_close(linearize(model)(model, x), output)
        assert not explain(model, x).fallback
        assert nngp(model, x).isfinite().all()
    with left_as_found(model), torch.inference_mode():
        kernels = [empirical_ntk(model, x), empirical_ntk(model, x, compute="trace", capture="autograd")]
    assert_close(kernels[0], expected)
    assert_close(kernels[1], expected.diagonal(dim1=2, dim2=3).sum(-1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["list", "array", "tensor", "slots"])
def test_state_after_an_exception(kind, after, method):
    """In torch.func's share of a call, plain autograd takes over."""
    left, (state, step) = [sys.maxsize], KINDS[kind]

    def raising(state):
        number = step(state)
        left[0] -= 1
        if not left[0]:
            raise ArithmeticError("half-way")
        return number

    build, x = seeded(Keeps, state, raising), torch.randn(3, 4).double()
    model, expected = build(), loop_kernel(build, x)
    left[0] = after
    with left_as_found(model), suppress(ArithmeticError):
        assert_close(empirical_ntk(model, x, method=method), expected)
    assert left[0] <= 0
    assert_close(empirical_ntk(model, x, method=method), expected)


def rand(generator):
    return torch.rand((), generator=generator)


DRAWS = [
    (lambda: torch.Generator().manual_seed(0), rand),
    (lambda: np.random.default_rng(0), lambda g: float(g.random())),
    (lambda: np.random.RandomState(0), lambda g: float(g.rand())),
    (lambda: np.random.PCG64(0), lambda g: float(g.random_raw() % 7)),
    (lambda: random.Random(0), lambda g: g.random()),
    (lambda: Plain([torch.Generator().manual_seed(0)]), lambda s: rand(s.value[0])),
    (lambda: Frozen([np.random.default_rng(0)]), lambda s: float(s.values[0].normal())),
    (int, lambda s: float(np.random.default_rng().random())),
    (int, lambda s: random.SystemRandom().random()),
    (int, lambda s: rand(torch.Generator().manual_seed(random.SystemRandom().getrandbits(9)))),
]  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("method", METHODS)
def test_generators_that_models_hold(method, draw):
    model = seeded(Keeps, *draw)()
    for x in (torch.randn(3, 4).double(), torch.randn(40, 4).double()):
        with left_as_found(model), pytest.raises(UnsupportedModelError, match="draws random numbers"):
            empirical_ntk(model, x, method=method)


@pytest.mark.parametrize(
    "step",
    [
        lambda g: torch.rand((), generator=torch.Generator().manual_seed(3)),
        lambda g: float(np.random.default_rng(3).random()),
        lambda g: random.Random(3).random(),
        lambda g: g.initial_seed() % 3 + 1,
    ],
)
def test_numbers_that_are_the_same_at_every_call(step):
    check_routes(seeded(Keeps, lambda: torch.Generator().manual_seed(1), step))


@pytest.mark.parametrize("seed", [torch.manual_seed, np.random.seed, random.seed, lambda s: torch.seed()])
def test_generators_of_the_process_that_a_model_seeds(seed):
    """They are as before, whether it is refused or not."""
    model, x = Keeps(int, lambda s: 1.0 + 0 * bool(seed(3))).double(), torch.randn(3, 4).double()
    for method in METHODS:
        with left_as_found(model), suppress(UnsupportedModelError):
            empirical_ntk(model, x, method=method)


class Buffered(nn.Module):
    """Scales by a buffer that every call changes, in the way of ``write``."""

    def __init__(self, write):
        super().__init__()
        self.layer, self.scale, self.write = nn.Linear(4, 2), nn.Parameter(torch.rand(2)), write
        self.register_buffer("number", torch.ones(2))
        self.register_buffer("first", self.number[:1])
        self.register_buffer("none", None)
        self.others = {"number": self.number, "view": self.number.view(1, 2)}

    def forward(self, x):
        self.write(self, x)
        return (self.layer(x) * self.scale * self.number.sum() / 5).tanh()


def replaced(m, x):
    m.number = m.number + 1


def grown(m, x):
    m.number = torch.cat([m.number, torch.ones(1, dtype=x.dtype)])


def registered(m, x):
    m.register_buffer("late", torch.ones(2), persistent=False)
    m.number += m.late


def deleted(m, x):
    m.number += m.__dict__.pop("pending", 1)
    del m.none


WRITES = [
    replaced, grown, registered, deleted,
    lambda m, x: m.number.add_(1), lambda m, x: m.number.resize_(3).fill_(2), lambda m, x: m.number.data.mul_(3),
    lambda m, x: m.number.numpy().__iadd__(1), lambda m, x: setattr(m.number, "data", m.number + 1),
    lambda m, x: m.others["number"].add_(1), lambda m, x: m.others["view"].mul_(2), lambda m, x: m.first.add_(3),
    lambda m, x: setattr(m, "none", torch.ones(1)) or m.number.add_(m.none), lambda m, x: m.number.sub_(3).abs_(),
]  # fmt: skip


def aliased(model):
    """Moving a model to another dtype parts views from what they view."""
    model.register_buffer("first", model.number[:1])
    model.others = {"number": model.number, "view": model.number.view(1, 2)}
    return model


@pytest.mark.filterwarnings("ignore:method='auto' takes 'jacobian_contraction'")
@pytest.mark.parametrize("write", WRITES)
def test_buffers_that_a_model_writes_to(write):
    check_routes(lambda: aliased(seeded(Buffered, write)()), ["auto", *METHODS[1:]])


class KeptTwice(nn.Module):
    """Writes to a buffer as something else that it holds."""

    def __init__(self, keep):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("number", torch.ones(2))
        self.kept = keep(self.number)

    def forward(self, x):
        (self.kept if callable(self.kept) else lambda v: innermost_tensor(self.kept).fill_(v))(2)
        return self.layer(x) * self.number


def innermost_tensor(value):
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


@pytest.mark.parametrize("keep", [lambda b: b, lambda b: [b], lambda b: {"k": (b,)}, lambda b: b.detach()])
@pytest.mark.filterwarnings("ignore:method='auto' takes 'jacobian_contraction'")
def test_buffers_that_are_kept_twice(keep):
    model, x = KeptTwice(keep), torch.randn(3, 4)
    with left_as_found(model), pytest.raises(UnsupportedRouteError, match="number: its forward pass writes to it"):
        empirical_ntk(model, x, method="structured")
    for method in ("auto", *METHODS[1:]):
        with left_as_found(model):
            kernel = empirical_ntk(model, x, method=method)
        assert_close(kernel, torch.einsum("nm,cd->nmcd", 4 * (x @ x.T + 1), torch.eye(2)))


@pytest.mark.parametrize("keep", [lambda b: lambda v: b.fill_(v), lambda b: functools.partial(b.fill_)])
def test_buffers_that_something_hidden_writes_to(keep):
    model, x = KeptTwice(keep), torch.randn(3, 4)
    for method in METHODS:
        with left_as_found(model), pytest.raises(UnsupportedModelError, match=r"number: it is a buffer that is writ"):
            empirical_ntk(model, x, method=method)


@pytest.mark.parametrize(
    "step",
    [
        lambda t, x: t.roll(1), lambda t, x: t.flip(0).masked_fill(t > 2, 1), lambda t, x: torch.stack([t, t]).sum(0),
        lambda t, x: torch.zeros_like(x[0], dtype=t.dtype) + t, lambda t, x: x.new_full((4,), 0.5, dtype=t.dtype),
    ],
)  # fmt: skip
def test_constants_of_a_low_precision(step):
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = torch.arange(4).bfloat16(), nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x * step(self.table, x).to(x.dtype))

    check_routes(seeded(Constants))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
def test_power_iterations_in_train_mode(norm):
    def build():
        return nn.Sequential(norm(nn.Linear(4, 4)), nn.Tanh(), norm(nn.Linear(4, 2), n_power_iterations=2))

    model = check_routes(lambda: seeded(build)().train())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("n", [9, 200])
def test_state_that_some_samples_change(n):
    def step(model, x):
        model.number += (x[:, 0] > 2.9).any()

    x = torch.randn(n, 4).double().clamp(max=2.5)
    x[[0, n // 2, n - 1], 0] = 3.0
    for method in METHODS:
        with pytest.raises(UnsupportedModelError):
            empirical_ntk(Buffered(step).double(), x, compute="trace", method=method)


class Cached(nn.Module):
    """Computes its weight from parameters at the first call."""

    def __init__(self):
        super().__init__()
        self.g, self.v, self.w = nn.Parameter(torch.rand(3, 1)), nn.Parameter(torch.randn(3, 4)), None

    def forward(self, x):
        if self.w is None:
            self.w = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        return x @ self.w.T


def test_a_weight_that_is_computed_once():
    model = check_routes(seeded(Cached))
    model(torch.randn(2, 4).double()).sum().backward()
    assert model.g.grad is not None


def test_a_weight_that_an_earlier_call_computed():
    model, x = seeded(Cached)(), torch.randn(3, 4).double()
    output = model(x)
    for method in METHODS:
        with left_as_found(model), pytest.raises(UnsupportedModelError, match="graph from an earlier call, which a"):
            empirical_ntk(model, x, method=method)
    output.sum().backward()
    assert model.g.grad is not None


class Neuron(nn.Module):
    """Keeps a potential of the shape of its input."""

    potential = None

    def forward(self, x):
        self.potential = x if self.potential is None else 0.7 * self.potential + x
        return self.potential.tanh()


@pytest.mark.parametrize("calls", [1, 3])
def test_neurons_that_keep_potentials(calls):
    class Spiking(nn.Sequential):
        def forward(self, x):
            return sum(super(Spiking, self).forward(x * i) for i in range(1, calls + 1))

    check_routes(seeded(lambda: Spiking(nn.Linear(4, 5), Neuron(), nn.Linear(5, 2))), n=9)


class Hostile:
    """Does nothing that is asked of it."""

    def _refuse(self, *args):
        raise RuntimeError("refused")

    __eq__ = __bool__ = __len__ = __iter__ = __deepcopy__ = __hash__ = __setattr__ = __reduce_ex__ = _refuse


class Unreadable(Hostile):
    def __getattribute__(self, name):
        raise RuntimeError("refused")


class Unlisted(Refusing):
    def items(self):
        raise TypeError("refused")

    __iter__ = values = keys = items


HOSTILE = {
    "hostile": Hostile, "in_dict": lambda: {"a": Hostile(), "b": [Hostile()]}, "key": lambda: {Plain(1): Hostile()},
    "unreadable": lambda: [Unreadable()], "unlisted": lambda: Unlisted(a=1),
    "odd": type("Odd", (), {"__module__": None}),
    "objects": lambda: np.array([Hostile()], dtype=object), "masked": lambda: np.ma.masked_array([1.0], [True]),
    "empty": lambda: np.zeros((3, 0)), "read_only": lambda: np.broadcast_to(1.0, (2, 2)), "lock": threading.Lock,
    "sparse": lambda: torch.eye(2).to_sparse(), "mkldnn": lambda: torch.ones(2).to_mkldnn(),
    "meta": lambda: torch.empty(2, device="meta"), "proxy": lambda: types.MappingProxyType({"a": Hostile()}),
    "expanded": lambda: torch.ones(1).expand(3), "bfloat16": lambda: torch.zeros(2, dtype=torch.bfloat16),
    "list": lambda: [0.0] * 10**5, "tuple": lambda: (Hostile(),) * 10**4, "generator": lambda: (x for x in ()),
}  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE)
def test_objects_that_resist(make):
    held = HOSTILE[make]()
    build, x, loop = seeded(Keeps, lambda: held, lambda state: 1.0), torch.randn(3, 4).double(), [held]
    expected, model = loop_kernel(build, x), build()
    loop.append(loop)
    model.loop, model.layer.weight.grad = loop, torch.ones(5, 4).double()
    for method in METHODS:
        assert_close(empirical_ntk(model, x, method=method), expected)
    assert (model.state is held, model.loop is loop, loop[0] is held, loop[1] is loop) == (True,) * 4
    assert torch.equal(model.layer.weight.grad, torch.ones(5, 4).double())


def test_restore_puts_back_in_place():
    model = nn.Sequential(nn.Linear(2, 2))
    model.kept, model.tensor, model.other = {"a": [1]}, torch.ones(2), Plain([2])
    inner, other = model.kept["a"], model.other.value
    state = State(model.modules(), thorough=True)
    state.restore()
    inner.append(2), other.clear(), model.tensor.zero_(), model.kept.update(b=3), model.add_module("new", nn.Tanh())
    model.training, model.extra = False, 1
    del model.other
    state.restore()
    assert (model.kept, inner, other, model.tensor.tolist()) == ({"a": [1]}, [1], [2], [1.0, 1.0])
    assert model.kept["a"] is inner
    assert model.other.value is other
    assert model.training
    assert not hasattr(model, "extra")
    assert len(model) == 1


@pytest.mark.parametrize(
    "draw",
    [
        random.random, lambda: random.choice("abc"), lambda: random.shuffle([1, 2, 3]), lambda: random.gauss(0, 1),
        np.random.rand, lambda: np.random.permutation(5), lambda: np.random.seed(1), lambda: random.seed(1),
    ],
)  # fmt: skip
def test_draws_are_found(draw):
    random.seed(0)
    before = random.getstate(), str(np.random.get_state())
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        without_draws(draw)
    assert (random.getstate(), str(np.random.get_state())) == before
    assert without_draws(lambda: random.Random(1).random()) == random.Random(1).random()


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(2), lambda p: p[0].zero_(), lambda p: p.data.add_(1), lambda p: p.view(-1)[1:].fill_(3.0),
        lambda p: torch.add(p, 1, out=p), lambda p: torch._foreach_mul_([p], 2), lambda p: nn.init.ones_(p),
        lambda p: p.detach().copy_(p + 1), lambda p: p.T.clamp_(max=0), lambda p: p.__setitem__(0, 5.0),
    ],
)  # fmt: skip
def test_writes_are_taken_down(write):
    p, other, written = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2)), {}
    before = p.detach().clone()
    with torch.no_grad(), Inspection({p: None, other: None}, written):
        write(p)
    assert list(written) == [p]
    assert torch.equal(written[p], before)
    assert not torch.equal(p, before)
