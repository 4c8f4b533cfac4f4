"""Memory that runs out: recognised on every device, never answered by something that needs more, and explained."""

import re
from typing import ClassVar

import pytest
import torch
from cases import mlp
from conftest import METHODS, assert_close
from torch import nn

from ggn_ntk import KernelMemoryError, empirical_kernels, empirical_ntk, explain, linearize, nngp
from ggn_ntk.memory import budget
from ggn_ntk.problem.errors import bytes_asked_for, is_out_of_memory
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

DEFAULT = "[enforce fail at alloc_cpu.cpp:121] {}. DefaultCPUAllocator: {} memory: you tried to allocate {} bytes."

CANNOT = "can't allocate"

# What is raised, and the size that the message has.
OUT_OF_MEMORY = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of 8.00 GiB"),
        "2.50 GiB",
    ),
    (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 512.00 MiB (GPU 0; 15.9 GiB total)"), "512.00 MiB"),
    (torch.OutOfMemoryError("XPU out of memory. Tried to allocate 20.00 MiB."), "20.00 MiB"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB). Tried to allocate 256.50 MB on"), "256.50 MB"),
    (RuntimeError(f"{DEFAULT.format('err == 0', CANNOT, 123456)} Error code 12 (Cannot allocate memory)"), "0.1 MiB"),
    (RuntimeError(DEFAULT.format("data", "not enough", 123456000000)), "114.98 GiB"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), None),
    (RuntimeError("CUDA driver error: out of memory"), None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None),
    (RuntimeError("CUDA error: CUSOLVER_STATUS_ALLOC_FAILED when calling `cusolverDnCreate`"), None),
    (RuntimeError("std::bad_alloc"), None),
    (MemoryError(), None),
    (MemoryError("Unable to allocate 3.00 GiB for an array"), None),
]

OTHER = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x5 and 4x2)"),
    ValueError("not enough memory slots in this model"),
    ArithmeticError("half-way"),
]

each_error = pytest.mark.parametrize(("error", "size"), OUT_OF_MEMORY, ids=lambda x: re.sub(r"\W+", " ", str(x))[:40])


class Greedy(nn.Module):
    """Raises where it is given so many samples, or at its n-th evaluation."""

    evaluations: ClassVar = []

    def __init__(self, error, samples=1, at=1):
        super().__init__()
        self.error, self.samples, self.at = error, samples, at
        self.evaluations.clear()

    def forward(self, x):
        self.evaluations.append(len(x))
        if self.error is not None and len(x) >= self.samples and len(self.evaluations) >= self.at:
            # Tests share errors: each raise would add to the traceback, which Dask has copies of a model's errors copy.
            raise self.error.with_traceback(None)
        return x.tanh()


class Net(nn.Module):
    def __init__(self, greedy):
        super().__init__()
        self.first, self.greedy, self.last = nn.Linear(5, 4), greedy, nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.greedy(self.first(x)))


HELP = r"What helps: compute='trace'.*params=.*blocks of samples"


def runs_out(size, what=""):
    asked = f" when {re.escape(size)} were asked for" if size else ""
    return pytest.raises(KernelMemoryError, match=rf"^Memory ran out{asked}, for the {what}.*\. {HELP}")


@each_error
def test_recognised(error, size):
    assert is_out_of_memory(error)
    if size and "bytes" not in str(error):
        assert bytes_asked_for(error) == size


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


@each_error
@pytest.mark.parametrize("method", [m for m in METHODS if m != "vivit"])
def test_at_the_first_evaluation(error, size, method):
    greedy = Greedy(error)
    with runs_out(size, "full kernel of 6 x 6 samples and 4 parameters") as info:
        empirical_ntk(Net(greedy), torch.randn(6, 5), method=method)
    assert info.value.__cause__ is error
    assert isinstance(info.value, torch.OutOfMemoryError | MemoryError)
    assert len(greedy.evaluations) == 1


@pytest.mark.parametrize("method", [m for m in METHODS if m != "vivit"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("x2", [None, torch.randn(4, 5)])
def test_at_any_evaluation(method, plain, x2):
    """Nothing is evaluated after memory ran out."""
    for error, size in (OUT_OF_MEMORY[0], OUT_OF_MEMORY[4], OUT_OF_MEMORY[8]):
        for at in range(1, 100):
            greedy = Greedy(error, at=at)
            model = nn.Sequential(nn.Linear(5, 4), greedy, nn.Linear(4, 3)) if plain else Net(greedy)
            try:
                empirical_ntk(model, torch.randn(6, 5), x2, method=method, check=at % 2 == 0)
            except KernelMemoryError as found:
                assert size is None or size in str(found)  # noqa: PT017
                assert len(greedy.evaluations) == at
            else:
                break
        assert at > 3


@pytest.mark.parametrize("method", [m for m in METHODS if m != "vivit"])
@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_come_through(method, error):
    model = Net(Greedy(error))
    with pytest.raises(type(error)) as info:
        empirical_ntk(model, torch.randn(6, 5), method=method)
    assert info.value is error


@pytest.mark.parametrize(
    "seam", ["contraction.accumulator.add_products", "jacobians.plan.AutogradPass", "jacobians.plan.record"]
)
@each_error
def test_the_structured_route_gives_way_to_none(seam, error, size, monkeypatch):
    calls = []

    def fails(*args, **options):
        calls.append(0)
        raise error

    monkeypatch.setattr(f"ggn_ntk.{seam}", fails)
    monkeypatch.setattr("ggn_ntk.kernels.ntk.jacobian_kernels", None)
    with runs_out(size):
        empirical_ntk(Net(Greedy(None)), torch.randn(6, 5))
    assert len(calls) == 1


class Doubles(torch.autograd.Function):
    """Runs out of memory on the way back."""

    error = RuntimeError()
    passes = 0

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        Doubles.passes += 1
        raise Doubles.error


@each_error
@pytest.mark.parametrize("method", ["auto", "structured", "jacobian_contraction", "ntk_vector_products"])
def test_on_the_way_back(error, size, method, monkeypatch):
    monkeypatch.setattr(Doubles, "error", error)
    monkeypatch.setattr(Doubles, "passes", 0)
    greedy = Greedy(None)
    greedy.forward = Doubles.apply
    with runs_out(size):
        empirical_ntk(Net(greedy), torch.randn(6, 5), method=method)
    assert Doubles.passes == 1


@each_error
def test_vivit(error, size, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("vivit.extensions.secondorder.vivit.linear.pairwise_dot", fails)
    with runs_out(size, "trace kernel of 6 x 6"):
        empirical_ntk(mlp(nn.Tanh)(), torch.randn(6, 5), method="vivit", compute="trace")


@each_error
def test_nngp(error, size):
    for function in (nngp, empirical_kernels):
        greedy = Greedy(error)
        with runs_out(size):
            function(Net(greedy), torch.randn(6, 5))
        assert len(greedy.evaluations) == 1


@pytest.mark.parametrize(
    "function",
    [lambda model, x: linearize(model)(dict(model.named_parameters()), x), explain],
    ids=["linearize", "explain"],
)
@pytest.mark.parametrize("error", [error for error, _ in OUT_OF_MEMORY[::4]], ids=str)
def test_what_uses_kernels(function, error):
    model, x = Net(Greedy(error)), torch.randn(6, 5)
    with pytest.raises((torch.OutOfMemoryError, MemoryError, RuntimeError)) as info:
        function(model, x)
    assert is_out_of_memory(info.value)
    assert len(Greedy.evaluations) == 1


def call(method, model, x, **options):
    functions = {"reference": jacobian_contraction, "products": ntk_vector_products, "nngp": nngp}
    if method in functions:
        return functions[method](model, x, **options)
    return empirical_ntk(model, x, method=method, **options)


LARGE = torch.zeros(1, 5).expand(3000, 5)  # a full kernel of 3000^2 3^2 numbers: 309 MiB


@pytest.mark.parametrize("method", [*METHODS, "reference", "products", "nngp"])
def test_a_result_that_cannot_fit_is_refused_at_once(method, monkeypatch):
    monkeypatch.setattr(budget, "available", lambda device: 2**28)
    model, seen = mlp(nn.Tanh)(), []
    if method != "vivit":
        model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    message = r"The kernel alone takes 309\.0 MiB, and cpu has 256\.0 MiB left\. What helps: compute='trace'"
    with pytest.raises(KernelMemoryError, match=message):
        call(method, model, LARGE)
    assert sum(seen) < 100


@pytest.mark.parametrize("free", [2**28, 2**29, None])
@pytest.mark.parametrize(
    "options", [{"compute": "trace"}, {"compute": "diagonal"}, {"trace_axes": 0}, {"params": ["0.bias"]}]
)
def test_only_a_result_that_cannot_fit_is(options, free, monkeypatch):
    monkeypatch.setattr(budget, "available", lambda device: free)
    x = torch.randn(7, 5)
    expected = empirical_ntk(mlp(nn.Tanh)(), x, **options).shape
    assert empirical_ntk(mlp(nn.Tanh)(), x, **options).shape == expected
    shape = (3000, 3000) if options.get("compute") == "trace" else (3000, 3000, 3)
    params = list(mlp(nn.Tanh)().parameters())
    budget.check_result(shape, params, 1)
    if free == 2**28:
        with pytest.raises(KernelMemoryError, match=r"takes 618\.0 MiB"):
            budget.check_result((3000, 3000, 3), params, 6)


def test_a_kernel_for_each_parameter_and_float64_take_more(monkeypatch):
    monkeypatch.setattr(budget, "available", lambda device: 2**29)
    budget.check_result((3000, 3000, 3, 3), list(mlp(nn.Tanh)().parameters()), 1)
    for options, model, size in (
        ({"per_parameter": True}, mlp(nn.Tanh)(), r"1\.81 GiB"),
        ({}, mlp(nn.Tanh)().double(), "618"),
    ):
        with pytest.raises(KernelMemoryError, match=f"The kernel alone takes {size}"):
            empirical_ntk(model, LARGE.to(model[0].weight), **options)


def test_what_is_available():
    free = budget.available(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert budget.available(torch.device("meta")) is None


def test_the_model_is_right_after_memory_ran_out():
    greedy = Greedy(OUT_OF_MEMORY[0][0], samples=4)
    model, x = Net(greedy), torch.randn(6, 5)
    with runs_out("2.50 GiB"):
        empirical_ntk(model, x)
    assert_close(empirical_ntk(model, x[:3]), empirical_ntk(model, x[:3], method="jacobian_contraction"))


def test_a_large_gpu_forms_jacobians_of_more_samples_at_once(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(budget, "_total", lambda device: 0)
    small = budget.MemoryBudget.of(device)
    assert small == budget.ELSEWHERE
    monkeypatch.setattr(budget, "_total", lambda device: 80 * 2**30)
    large = budget.MemoryBudget.of(device)
    assert (large.rows, large.columns) == (80 * 2**30 // 32, 80 * 2**30 // 16)
    assert large.passing == small.passing
    with budget.limited(2**30):  # what a call may take comes first
        assert budget.MemoryBudget.of(device).rows <= 2**30 // 32
    assert budget.MemoryBudget.of(torch.device("cpu")) == budget.LIMITS["cpu"]
