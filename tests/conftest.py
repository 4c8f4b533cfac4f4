"""Fixtures, the oracle and the comparison that all tests share."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack.context import CTX
from cases import CASES, Case
from models import LARGE, MODELS
from torch import Tensor, nn
from torch.utils import backend_registration as backends
from zoo import ZOO

from ggn_ntk.contraction import tape
from ggn_ntk.memory import budget
from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.rules import registry

PRETENDS = not torch.cuda.is_available() and hasattr(backends, "_setup_privateuseone_for_python_backend")
if PRETENDS:
    importlib.import_module("pretend_device")

torch.set_num_threads(1)  # the models are tiny, and test processes run side by side

DTYPES = [torch.float32, torch.float64]
METHODS = ["structured", "vivit", "jacobian_contraction", "ntk_vector_products", "auto"]
COMPUTES = ["full", "diagonal", "trace"]

# Torch's CUDA kernels of these compute in float32 whatever the dtype, as do rotary positions.
ROUNDED_ON_CUDA = {"weight_norm", "hidden_Hardsigmoid", "hidden_Hardswish", "llama"}

DATA = Path(__file__).parent / "data"

NAMED = {case.name: case for case in (*CASES, *MODELS, *LARGE, *ZOO)}

# What may become of the axes of an output [N, C, H, W].
ROLES = list(product(("kept", "traced", "diagonal"), repeat=3))

# What is refused about these axes, with what is said.
BAD_AXES = [
    ({"trace_axes": 3}, ValueError, "trace_axes names output axis 3. Accepted, .* sample axis: from -3 to 2"),
    ({"diagonal_axes": (0, -4)}, ValueError, "diagonal_axes names output axis -4. Accepted, .*: from -3 to 2"),
    ({"trace_axes": (0, -3)}, ValueError, r"trace_axes must name each output axis once, got \(0, -3\) for 3 axes"),
    ({"trace_axes": 1, "diagonal_axes": (0, -2)}, ValueError, "trace_axes and diagonal_axes both name output axis"),
    ({"trace_axes": 0, "compute": "trace"}, ValueError, "trace_axes goes with compute='full' alone, got comp"),
    ({"diagonal_axes": (), "compute": "diagonal"}, ValueError, "diagonal_axes goes with compute='full' alone"),
    ({"trace_axes": "0"}, TypeError, "trace_axes must be an integer, an iterable of integers or None, got '0'"),
    ({"trace_axes": 1.0}, TypeError, r"trace_axes must be an integer, .* got 1\.0"),
    ({"diagonal_axes": [0, True]}, TypeError, "diagonal_axes must be an integer"),
    ({"compute": "sum"}, ValueError, "compute must be one of 'full', 'diagonal', 'trace', got 'sum'"),
]


@pytest.fixture(autouse=True)
def _seed():
    """Fix the random numbers; forget the rules that the test registered and the hooks of modules that it extended."""
    torch.manual_seed(0)
    tape.CONTRACTIONS.forget()  # so that a test computes what others have computed before
    handles, rules, ways = list(CTX.hook_handles), dict(registry._RULES), dict(registry._BACKPROPAGATIONS)
    yield
    CTX.hook_handles[:] = handles
    for registered, before in ((registry._RULES, rules), (registry._BACKPROPAGATIONS, ways)):
        registered.clear()
        registered.update(before)


# The pretend device stands in for a GPU where there is none, with torch 2.9 or later.
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available(), *["pretend"] * PRETENDS]


def places(case: Case, method: str = "structured", *_: Any) -> list[tuple[torch.dtype, str]]:
    """The dtypes and devices in which a case can be computed by a method."""
    if getattr(case, "rounds", False):
        return [(torch.float32, device) for device in DEVICES]
    found = [(dtype, device) for device in DEVICES for dtype in DTYPES]
    fused = case.name == "recurrent" or case.name.endswith(("LSTM", "GRU"))  # layers that the pretend device lacks
    by_vmap = method in ("jacobian_contraction", "ntk_vector_products")  # which raises there behind PReLU
    refused = DTYPES if fused or (by_vmap and "prelu" in case.name.lower()) else [torch.float32]
    return [place for place in found if place not in product(refused, ["pretend"])]  # float64 tells more


def pytest_report_header() -> str:
    """Say which devices are under test."""
    return f"devices: {', '.join(DEVICES)}"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device there is; what its test asks for beside it, the pretend one may not be able to do."""
    if request.param != "pretend":
        yield request.param
        return
    asked = request.node.callspec.params
    if asked.get("dtype") == torch.float32 and not getattr(asked.get("case"), "rounds", False):
        pytest.skip("float64 tells more")
    with torch.autograd.set_multithreading_enabled(False):
        yield request.param


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=COMPUTES)
def compute(request: pytest.FixtureRequest) -> str:
    return request.param


def first_samples(x: Any, index: slice) -> Any:
    if isinstance(x, Tensor):
        return x[index]
    return tuple(t[index] for t in x) if isinstance(x, tuple) else {key: t[index] for key, t in x.items()}


def num_samples(x: Any) -> int:
    return len(x if isinstance(x, Tensor) else x[0] if isinstance(x, tuple) else next(iter(x.values())))


def call(model: torch.nn.Module, x: Any) -> Any:
    if isinstance(x, Tensor):
        return model(x)
    return model(*x) if isinstance(x, tuple) else model(**x)


def loop_jacobians(model: torch.nn.Module, x: Any, output: Any = None) -> dict[str, Tensor]:
    """The Jacobians [N, C, P] as nobody can get them wrong: one sample and one output at a time."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for n in range(num_samples(x)):
        found = call(model, first_samples(x, slice(n, n + 1)))
        for entry in (found if output is None else output(found)).flatten():
            gradients = torch.autograd.grad(
                entry, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(params, gradients, strict=True):
                rows[name].append(gradient.flatten())
    del found, gradients  # of large models, nothing is held twice
    return {name: torch.stack(rows.pop(name)).unflatten(0, (num_samples(x), -1)) for name in params}


def kernel_of(model: torch.nn.Module, x1: Any, x2: Any = None) -> Tensor:
    """The kernel [N1, N2, *out, *out] by a loop over samples and outputs."""
    first = loop_jacobians(model, x1)
    second = first if x2 is None else loop_jacobians(model, x2)
    kernel = sum(torch.einsum("ncp,mdp->nmcd", j, second[name]) for name, j in first.items())
    out = call(model, x1).shape[1:]
    return kernel.reshape(*kernel.shape[:2], *out, *out)


def mapped(f, x):
    """Apply a function to each tensor of an input."""
    if isinstance(x, Tensor):
        return f(x)
    return tuple(map(f, x)) if isinstance(x, tuple) else {key: f(t) for key, t in x.items()}


def seeded(function, *args, **kwargs):
    """Make a function that builds the same model at each call."""

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return function(*args, **kwargs).double()

    return build


def _jacobians_of_new_models(build, x):
    """Build the model anew for each sample, since it may write to itself."""
    rows = []
    for n in range(num_samples(x)):
        model = build()
        params = [p for p in model.parameters() if p.requires_grad]
        output = call(model, mapped(torch.clone, first_samples(x, slice(n, n + 1)))).flatten()
        grads = [
            torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            for entry in output
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]))
    return torch.stack(rows)


def loop_kernel(build, x1, x2=None):
    """The kernel [N1, N2, C, C] of a model that writes to itself or to its inputs, by a loop over samples."""
    j1 = _jacobians_of_new_models(build, x1)
    return torch.einsum("ncp,mdp->nmcd", j1, j1 if x2 is None else _jacobians_of_new_models(build, x2))


@cache
def full_kernels(name: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each parameter's float64 kernel of x1 and x2, and of x1 alone, of a case."""
    case = NAMED[name]
    model, x1, x2 = case.build(device=device)
    found = call(model, x1)
    out = (found if case.output is None else case.output(found)).shape[1:]
    first, second = loop_jacobians(model, x1, case.output), loop_jacobians(model, x2, case.output)
    of_two, of_one = (
        {name: torch.einsum("ncp,mdp->nmcd", j, other[name]) for name, j in first.items()} for other in (second, first)
    )
    return tuple({name: k.reshape(*k.shape[:2], *out, *out) for name, k in ks.items()} for ks in (of_two, of_one))


@cache
def oracle(name: str, symmetric: bool = False, compute: str = "full", device: str = "cpu") -> dict[str, Tensor]:
    """Each parameter's float64 kernel of a case: from the CPU, where what the device computes is the same function."""
    if device != "cpu" and not (device == "cuda" and name in ROUNDED_ON_CUDA):
        return oracle(name, symmetric, compute)
    kernels = full_kernels(name, device)[symmetric]
    return {name: reduced(kernel, compute) for name, kernel in kernels.items()}


def reduced(kernel: Tensor, compute: str) -> Tensor:
    """A full kernel of outputs of one shape, with entries of equal outputs alone."""
    if compute == "full" or kernel.ndim == 2:
        return kernel
    k = (kernel.ndim - 2) // 2
    diagonal = kernel.flatten(2, 1 + k).flatten(3).diagonal(dim1=2, dim2=3)
    return diagonal.sum(-1) if compute == "trace" else diagonal.reshape(kernel.shape[: 2 + k])


def oracle_sum(case: Case, symmetric: bool = False, compute: str = "full", device: str = "cpu") -> Tensor:
    """The float64 kernel of a case."""
    return sum(oracle(case.name, symmetric, compute, device).values())


def axes_of(roles: tuple[str, ...]) -> dict[str, list[int]]:
    """The arguments that ask for the roles of output axes."""
    names = {"trace_axes": "traced", "diagonal_axes": "diagonal"}
    return {key: [axis for axis, role in enumerate(roles) if role == wanted] for key, wanted in names.items()}


def reduce_axes(full: Tensor, roles: tuple[str, ...]) -> Tensor:
    """A kernel [N1, N2, *out, *out] with axes summed or taken at equal indices, one axis after the other."""
    first, second = list(range(len(roles))), list(range(len(roles)))
    for axis, role in reversed(list(enumerate(roles))):
        if role == "kept":
            continue
        at = 2 + first.index(axis)
        full = full.diagonal(dim1=at, dim2=2 + len(first) + second.index(axis))  # behind all others
        second.remove(axis)
        if role == "traced":
            full, _ = full.sum(-1), first.remove(axis)
        else:
            full = full.movedim(-1, at)
    return full


def exchanged(kernel: Tensor, roles: tuple[str, ...]) -> Tensor:
    """A kernel with axes, x1 and x2 exchanged."""
    first = [axis for axis, role in enumerate(roles) if role != "traced"]
    second = [axis for axis in first if roles[axis] == "kept"]
    order = [("second" if axis in second else "first", axis) for axis in first] + [("first", axis) for axis in second]
    places = [("first", axis) for axis in first] + [("second", axis) for axis in second]
    return kernel.permute(1, 0, *(2 + places.index(entry) for entry in order))


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples pass through two-dimensional convolutions, call by call; the list grows with them."""
    sizes, forward = [], nn.Conv2d._conv_forward

    def counted(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes.append(len(x))
        return forward(module, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    return sizes


def fully_convolutional(channels: int = 2) -> nn.Module:
    """A network with outputs of several axes, [N, 2, 3, 2] for images [N, 1, 5, 4]."""
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, channels, 2)).double()


def assert_close(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Compare by relative Frobenius error with the tolerance of the actual dtype."""
    assert actual.shape == expected.shape
    assert not actual.requires_grad
    norm = torch.linalg.vector_norm
    error = norm(actual.double().cpu() - expected.double().cpu()).item()
    scale = norm(expected if scale is None else scale).item()
    tolerance = TOLERANCES[actual.dtype]
    assert error <= tolerance * scale, f"relative error {error / scale if scale else error:.1e} > {tolerance:.0e}"


def limit_memory(monkeypatch, **limits):
    """Budgets in bytes, on every device; what is not named is as it is."""
    monkeypatch.setattr(budget, "LIMITS", {kind: replace(found, **limits) for kind, found in budget.LIMITS.items()})
    monkeypatch.setattr(budget, "ELSEWHERE", replace(budget.ELSEWHERE, **limits))
