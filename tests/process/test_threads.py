"""Any number of calls at once, beside anything else that the process does."""

import random
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
import torch._dynamo  # torch.func imports it at its first use, and it filters warnings
from backpack import backpack, disable, extend
from backpack.context import CTX
from backpack.extensions import BatchGrad
from conftest import assert_close, loop_jacobians
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from unchanged import precision

from ggn_ntk import UnsupportedModelError, empirical_kernels, empirical_ntk, explain, linearize, nngp
from ggn_ntk.models.comparison import relative_error
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

THREADS, CALLS = 8, 500


@pytest.fixture(autouse=True)
def _often():
    """Switch between threads far more often than Python does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def normalised():
    norm = nn.BatchNorm1d(6)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return nn.Sequential(nn.Linear(8, 6), norm, nn.Tanh(), nn.Linear(6, 2)).eval()


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):  # [N, 8]
        h = x.unflatten(1, (2, 4))
        return self.head(self.layer(h, h, h)[0].mean(1))


class Scaled(nn.Module):
    """Has parameters with a rule and one without, and keeps state."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.head = nn.Linear(8, 5), nn.Parameter(torch.rand(5)), nn.Linear(5, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        return self.head((self.layer(x) * self.scale).tanh())


def jobs_of(model, vivit=False):
    """Calls of all kinds."""
    dtype = next(model.parameters()).dtype
    x1, x2 = torch.randn(2, 8, dtype=dtype), torch.randn(1, 8, dtype=dtype)
    moved = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    ntk = partial(empirical_ntk, model)
    jobs = [
        partial(ntk, x1),
        partial(ntk, x1, x2, compute="trace"),
        partial(ntk, x1, x2, compute="diagonal", capture="autograd"),
        partial(ntk, x1, x2, method="structured", check=True),
        partial(ntk, x1, method="jacobian_contraction", compute="trace"),
        partial(ntk, x1, x2, method="ntk_vector_products", compute="diagonal"),
        partial(jacobian_contraction, model, x1, x2, chunk_size=1),
        partial(ntk_vector_products, model, x1, compute="trace"),
        partial(nngp, model, x1, x2),
        lambda: empirical_kernels(model, x1, x2).ntk,
        lambda: torch.stack(list(ntk(x1, compute="trace", per_parameter=True).values())),
        lambda: linearize(model)(moved, x1).detach(),
        lambda: torch.tensor(float(explain(model, x1, x2).covered)),
    ]
    return jobs + [partial(ntk, x1, x2, method="vivit", compute=kind) for kind in ("full", "trace") if vivit]


def modes():
    """What each thread has for itself."""
    graph = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return *graph, torch.get_default_device(), torch.autograd.is_multithreading_enabled()


def process_state():
    b = torch.backends
    return {
        "precision": precision(),
        "attention": (b.cuda.flash_sdp_enabled(), b.cuda.mem_efficient_sdp_enabled(), b.cuda.math_sdp_enabled()),
        "fast path": b.mha.get_fastpath_enabled(),
        "fused recurrence": (b.cudnn.enabled, b.mkldnn.enabled),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "filters": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "modes": modes(),
        "checkpoint": (sys.modules["torch.utils.checkpoint"].CheckpointFunction, sys.getprofile()),
        "backpack": (CTX.active_exts, CTX.debug, CTX.extension_hook, CTX.retain_graph, list(CTX.hook_handles)),
        "store_io": disable.store_io,
    }


def model_state(model):
    state = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else []
            state.append((name, key, id(value), entries, list(map(id, value)) if isinstance(value, list) else []))
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        hooks = (t._backward_hooks, getattr(t, "_post_accumulate_grad_hooks", None))
        state.append((name, id(t), t.requires_grad, t._version, t.tolist(), [dict(h) for h in hooks if h]))
        state.append((None if t.grad is None else (id(t.grad), t.grad.tolist()), sorted(vars(t))))
    return state


@contextmanager
def left_as_found(*models):
    before = process_state(), [model_state(model) for model in models]
    yield
    assert process_state() == before[0]
    assert [model_state(model) for model in models] == before[1]


def draw():
    return torch.rand(()).item(), float(np.random.rand()), random.random()


@contextmanager
def another_thread_draws():
    """Draws from the generators of the process in another thread; it must draw what it draws alone."""

    def seed():
        torch.manual_seed(5), np.random.seed(5), random.seed(5)

    done, drawn = threading.Event(), []

    def run():
        while not done.wait(5e-4):
            drawn.append(draw())

    seed()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    seed()
    assert len(drawn) > 10
    assert drawn == [draw() for _ in drawn]


@contextmanager
def beside(work):
    """Do some work again and again in another thread."""
    done, times = threading.Event(), []

    def run():
        while not done.is_set() or not times:
            work()
            times.append(1)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        try:
            yield
        finally:
            done.set()
        future.result()


def in_threads(function, arguments, threads=THREADS):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, arguments))


def three_models():
    """One without, two with what a call sets aside: hooks and gradients."""
    models = [normalised().double(), Attends(), Scaled().double()]
    for model in models[1:]:
        model.head.register_forward_hook(lambda module, args, output: 2 * output)
        model.head.register_full_backward_hook(lambda *args: pytest.fail("backward hook"))
        model.head.weight.register_hook(lambda gradient: pytest.fail("hook of a parameter"))
        model.head.weight.register_post_accumulate_grad_hook(lambda p: pytest.fail("hook of a gradient"))
        model.head.bias.grad = torch.ones_like(model.head.bias)
    return models


def test_many_calls_at_once():
    models = three_models()
    jobs = [job for model in models for job in jobs_of(model, vivit=model is models[0])]
    expected = [job() for job in jobs]
    chosen = [i % len(jobs) for i in range(CALLS)]
    random.Random(0).shuffle(chosen)
    with left_as_found(*models), another_thread_draws():
        found = in_threads(lambda i: jobs[i](), chosen)
    for i, kernel in zip(chosen, found, strict=True):
        assert_close(kernel, expected[i])


class Failing(nn.Module):
    """Raises at an evaluation, in threads that ask for it."""

    asked = threading.local()

    def forward(self, x):
        left = getattr(self.asked, "left", None)
        if left is not None:
            self.asked.left = left - 1
            if not left:
                raise ArithmeticError("half-way")
        return x.sin()


def test_many_calls_at_once_some_of_which_raise():
    models = [nn.Sequential(model, Failing()) for model in three_models()]
    jobs = [job for model in models for job in jobs_of(model)]
    expected = [job() for job in jobs]
    chosen = [i % len(jobs) for i in range(CALLS)]
    random.Random(1).shuffle(chosen)

    def run(number):
        Failing.asked.left = number % 7 if number % 3 == 0 else None
        try:
            return jobs[chosen[number]]()
        except ArithmeticError as error:
            return error
        finally:
            Failing.asked.left = None

    with left_as_found(*models), another_thread_draws():
        found = in_threads(run, range(CALLS))
    for number, kernel in enumerate(found):
        if number % 3 or not isinstance(kernel, ArithmeticError):  # which torch.func's share of a call survives
            assert_close(kernel, expected[chosen[number]])
    assert sum(isinstance(kernel, ArithmeticError) for kernel in found) > CALLS / 6


READ_WHILE_GARBAGE_IS_COLLECTED = """
import gc, threading, time
import torch
from ggn_ntk.models.entries import entries_of

def read():
    (taken,) = entries_of(torch.default_generator)
    kept = []
    for _ in range(300):  # little else is made, so that many collections begin as a state is read
        kept.append(taken._read())

gc.collect()
gc.freeze()  # what is there is left alone, so that collections are short and many
gc.callbacks.append(lambda phase, info: time.sleep(1e-3))  # lets another thread go on
for threshold in range(2, 20):  # of some, none begins there
    gc.set_threshold(threshold, 10, 10)
    threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
"""


def test_generators_are_read_while_garbage_is_collected():
    """Torch would have one thread wait for a generator with Python's lock in its hands, and no thread could go on."""
    subprocess.run([sys.executable, "-c", READ_WHILE_GARBAGE_IS_COLLECTED], check=True, timeout=120)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double()


@pytest.mark.parametrize("linearized", [True, False])
def test_forward_mode_of_different_models(linearized):
    """Torch keeps the level of forward-mode differentiation for the process."""
    models, x = [mlp() for _ in range(4)], torch.randn(4, 8).double()
    moved = {name: p.detach() + 0.1 for name, p in models[0].named_parameters()}

    def run(model):
        if linearized:
            return linearize(model)(moved, x).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return ntk_vector_products(model, x)

    expected = [run(model) for model in models]
    for number, found in enumerate(in_threads(run, models * 8, threads=4)):
        assert_close(found, expected[number % 4])


def test_forward_mode_inside_of_models():
    models, x = [Derivative() for _ in range(4)], torch.randn(3, 8).double()
    expected = [jacobian_contraction(model, x) for model in models]
    for number, found in enumerate(in_threads(lambda model: empirical_ntk(model, x), models * 8, threads=4)):
        assert_close(found, expected[number % 4])


class Derivative(nn.Module):
    """The derivative of a network along its input."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]


CALLS_OF_ONE_MODEL = {
    "structured": lambda model, x: empirical_ntk(model, x, method="structured"),
    "jacobians": lambda model, x: empirical_ntk(model, x, method="jacobian_contraction"),
    "products": lambda model, x: empirical_ntk(model, x, method="ntk_vector_products"),
    "nngp": lambda model, x: nngp(model, x),
    "linearize": lambda model, x: linearize(model)(model, x).detach(),
    "explain": lambda model, x: torch.tensor(float(explain(model, x).covered)),
}

each_call = pytest.mark.parametrize("call", CALLS_OF_ONE_MODEL.values(), ids=CALLS_OF_ONE_MODEL)


@each_call
@pytest.mark.parametrize("method", ["jacobian_contraction", "ntk_vector_products"])
def test_a_call_that_begins_during_another(method, call):
    """While the first evaluates the model, other tensors stand in for its parameters."""
    model, x = Scaled().double(), torch.randn(3, 8).double()
    expected, weight = [empirical_ntk(model, x, method=method), call(model, x)], model.layer.weight
    first, exchanged, go = [], threading.Event(), threading.Event()

    def wait(*args):
        if threading.get_ident() in first and model.layer.weight is not weight and not exchanged.is_set():
            exchanged.set()
            go.wait(10)

    def run():
        first.append(threading.get_ident())
        return empirical_ntk(model, x, method=method)

    model.layer.register_forward_hook(wait)
    with left_as_found(model), ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run)]
        assert exchanged.wait(10)
        futures.append(pool.submit(call, model, x))
        time.sleep(0.05)
        go.set()
        found = [future.result() for future in futures]
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


@each_call
def test_calls_that_share_a_model(call):
    model, x = Scaled().double(), torch.randn(4, 8).double()
    expected = call(model, x)
    with left_as_found(model), beside(lambda: empirical_ntk(model, x, method="jacobian_contraction")):
        for found in in_threads(lambda _: call(model, x), range(16), threads=4):
            assert_close(found, expected)


def test_models_that_share_layers():
    one, other, shared = nn.Linear(8, 6), nn.Linear(6, 2), nn.Linear(6, 6)
    models = [nn.Sequential(one, shared, nn.Tanh(), other).double(), nn.Sequential(shared, nn.Tanh(), shared, other)]
    inputs = [torch.randn(4, 8).double(), torch.randn(4, 6).double()]
    expected = [empirical_ntk(model, x) for model, x in zip(models, inputs, strict=True)]
    with left_as_found(*models):
        found = in_threads(lambda i: empirical_ntk(models[i % 2], inputs[i % 2]), range(40))
    for number, kernel in enumerate(found):
        assert_close(kernel, expected[number % 2])


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second, self.options = mlp(), nn.Linear(2, 2).double(), options

    def forward(self, x):
        return self.second(checkpoint(self.first, x, **self.options).tanh())


@pytest.mark.parametrize("method", ["auto", "jacobian_contraction", "ntk_vector_products"])
def test_checkpointed_models(method):
    models, x = [Checkpointed(use_reentrant=False), Checkpointed(use_reentrant=True)], torch.randn(3, 8).double()
    expected = [empirical_ntk(model, x, method="jacobian_contraction") for model in models]
    with left_as_found(*models):
        found = in_threads(lambda i: empirical_ntk(models[i % 2], x, method=method), range(12), threads=4)
    for number, kernel in enumerate(found):
        assert_close(kernel, expected[number % 2])


class Trained(nn.Module):
    """Draws, keeps statistics, attends and is checkpointed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        h = self.body(x).unflatten(1, (2, 8))
        h = checkpoint(lambda h: self.attention(h, h, h)[0], h, use_reentrant=False)
        return self.head(checkpoint(lambda h: h.sin().mean(1), h, use_reentrant=True))


def train(steps=25):
    torch.manual_seed(3)
    model, x, y = Trained(), torch.randn(16, 8), torch.randn(16, 2)
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: fired.append("forward"))
        module.register_full_backward_hook(lambda *args: fired.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())], fired


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_of_another_model():
    expected, fired = train()
    kernels = [Scaled().double(), Attends(), normalised().double()]
    inputs = [torch.randn(3, 8, dtype=model.head.weight.dtype) for model in kernels[:2]] + [torch.randn(3, 8).double()]
    vivit = partial(empirical_ntk, kernels[2], inputs[2], method="vivit", compute="trace")
    right = [empirical_ntk(model, x) for model, x in zip(kernels, inputs, strict=True)]

    def run(number):
        vivit()
        return empirical_ntk(kernels[number % 3], inputs[number % 3])

    with left_as_found(*kernels):
        with ThreadPoolExecutor(4) as pool:
            trained = pool.submit(train)
            found = list(pool.map(run, range(30)))
        values, fired_beside = trained.result()
    assert fired_beside == fired
    for value, wanted in zip(values, expected, strict=True):
        assert relative_error(value, wanted) < 1e-4  # attention by another backend rounds otherwise
    for number, kernel in enumerate(found):
        assert_close(kernel, right[number % 3])


def backpack_steps(model, loss_func, steps=15):
    torch.manual_seed(4)
    x, y = torch.randn(5, 8).double(), torch.randn(5, 2).double()
    found = []
    for _ in range(steps):
        model.zero_grad()
        with backpack(BatchGrad(), extension_hook=lambda module: found.append(type(module).__name__)):
            loss_func(model(x), y).backward()
        found += [p.grad_batch.clone() for p in model.parameters()]
    return found


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products"])
def test_backpack_step_of_another_model(method):
    """BackPACK keeps its extensions, and whether it stores inputs, for the process: ViViT's route cannot run beside."""
    extended = extend(mlp()), extend(nn.MSELoss(reduction="sum"))
    expected = backpack_steps(*extended)
    model, x = normalised().double(), torch.randn(3, 8).double()
    right = empirical_ntk(model, x, method=method)
    with left_as_found(model), beside(lambda: assert_close(empirical_ntk(model, x, method=method), right)):
        found = backpack_steps(*extended)
    assert [type(entry) for entry in found] == [type(entry) for entry in expected]
    for entry, wanted in zip(found, expected, strict=True):
        if isinstance(entry, str):
            assert entry == wanted
        else:
            assert_close(entry, wanted)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(torch.device, "meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)
def test_modes_of_this_thread_and_of_others(mode):
    model, x = Scaled().double(), torch.randn(3, 8).double()
    expected = empirical_ntk(model, x)

    def run(inside):
        with mode() if inside else nullcontext():
            before = modes()
            kernel = empirical_ntk(model, x)
            assert modes() == before
            return kernel

    with left_as_found(model):
        with mode():
            found = in_threads(run, [False, True] * 3, threads=2)
            found.append(empirical_ntk(model, x))
        found += in_threads(run, [False, True] * 3, threads=2)
    for kernel in found:
        assert_close(kernel, expected)


@pytest.mark.parametrize("which", ["another", "submodule", "itself"])
@pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products", "auto"])
def test_a_call_inside_of_a_forward_hook(which, method):
    """The hook of one model, during a call for it, computes the kernel of a model."""
    outer = nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(2, 2)).double()
    inner = {"another": Scaled().double(), "submodule": outer[0], "itself": outer}[which]
    x, y = torch.randn(3, 8).double(), torch.randn(2, 8).double()
    right, expected = empirical_ntk(outer, x), empirical_ntk(inner, y)
    inside, found = [], []

    def hook(*args):
        if not inside:
            inside.append(True)
            try:
                found.append(empirical_ntk(inner, y))
            finally:
                inside.clear()

    outer[1].register_forward_hook(hook)
    with left_as_found(outer, inner):
        assert_close(empirical_ntk(outer, x, method=method), right)
    assert len(found) > 3
    for kernel in found:
        assert_close(kernel, expected)


class OfKernels(nn.Module):
    """Predicts from the kernels of a network that it holds and of one that it does not."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.others = mlp(), nn.Linear(4, 2).double(), [mlp()]
        self.anchors = torch.randn(2, 8).double()

    def forward(self, x):
        kernels = [empirical_ntk(model, self.anchors, compute="trace") for model in (self.inner, self.others[0])]
        features = sum(kernels).flatten() / 100
        return self.outer(features * self.inner(x).sum(1, keepdim=True).sin())


def test_kernels_inside_of_a_forward_pass_in_threads():
    model, x = OfKernels(), torch.randn(3, 8).double()
    jacobians = list(loop_jacobians(model, x).values())
    expected = sum(torch.einsum("ncp,mdp->nmcd", j, j) for j in jacobians)
    with left_as_found(model, model.others[0]):
        found = in_threads(lambda _: empirical_ntk(model, x), range(3), threads=3)
        found.append(empirical_ntk(model, x, method="jacobian_contraction"))
    for kernel in found:
        assert_close(kernel, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_compiled_models_run_eagerly_and_the_stance_stays():
    models = [torch.compile(mlp(), backend="eager") for _ in range(2)]
    x = torch.randn(3, 8).double()
    outputs = [model(x) for model in models]
    expected = [empirical_ntk(model._orig_mod, x) for model in models]
    with left_as_found(*models):
        found = in_threads(lambda i: empirical_ntk(models[i % 2], x), range(12), threads=4)
    for number, kernel in enumerate(found):
        assert_close(kernel, expected[number % 2])
    assert all(torch.equal(model(x), output) for model, output in zip(models, outputs, strict=True))


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.layer, self.draw = nn.Linear(8, 2).double(), draw

    def forward(self, x):
        return self.layer(x) * (1 + self.draw())


@pytest.mark.parametrize(
    "drawn",
    [lambda: float(np.random.rand()), random.random, lambda: torch.rand(()).item()],
    ids=["numpy", "python", "torch"],
)
def test_refusals_never_set_the_draws_of_others_back(drawn):
    """Where a model draws and is refused, other threads' random numbers do not come twice."""
    model, x, seen, done = Draws(drawn), torch.randn(3, 8).double(), [], threading.Event()

    def draws():
        while not done.is_set():
            seen.append((float(np.random.rand()), random.random(), torch.rand((), dtype=torch.float64).item()))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(draws)
        try:
            for _ in range(20):
                with pytest.raises(UnsupportedModelError, match="draws random numbers"):
                    empirical_ntk(model, x)
        finally:
            done.set()
        future.result()
    for column in zip(*seen, strict=True):
        assert len(set(column)) == len(column)


def test_numbers_of_threads_come_and_go():
    """Settings of the process are those found by the first call, whatever the order in which calls end."""
    model, x, started = Scaled().double(), torch.randn(3, 8).double(), count()

    def run(n):
        for _ in range(n):
            next(started)
            empirical_ntk(model if n % 2 else normalised().double(), x)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with left_as_found(model):
            threads = [threading.Thread(target=run, args=(n,)) for n in (1, 2, 5, 3, 4, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        torch.set_float32_matmul_precision(before)
    assert next(started) == 16


class Asks(nn.Module):
    """Asks for the kernel of another model, by itself or in another thread."""

    def __init__(self, other, ask):
        super().__init__()
        self.layer, self.others, self.ask = nn.Linear(8, 2).double(), [other], ask

    def forward(self, x):
        kernel = self.ask(self.others[0], torch.ones(2, 8).double())
        return self.layer(x) * kernel[0, 0, 0, 0].sin()


def test_a_forward_pass_that_waits_for_another_thread():
    with ThreadPoolExecutor(1) as pool:
        model = Asks(Scaled().double(), lambda other, x: pool.submit(empirical_ntk, other, x).result())
        x = torch.randn(3, 8).double()
        expected = model.ask(model.others[0], torch.ones(2, 8).double())[0, 0, 0, 0].sin() ** 2
        for method in ("structured", "jacobian_contraction"):
            kernel = empirical_ntk(model, x, method=method)
            assert_close(kernel, torch.einsum("nm,cd->nmcd", (x @ x.T + 1) * expected, torch.eye(2).double()))


def test_models_that_ask_for_each_other_in_two_threads():
    """Either has a kernel or an error; none waits for ever."""
    inner = [Scaled().double(), Scaled().double()]
    models = [Asks(inner[i], empirical_ntk) for i in (0, 1)]
    for model, own in zip(models, inner[::-1], strict=True):
        model.own = own
    x, errors = torch.randn(3, 8).double(), []

    def run(model):
        for _ in range(10):
            try:
                empirical_ntk(model, x)
            except RuntimeError as error:
                errors.append(str(error))

    with left_as_found(*models):
        in_threads(run, models, threads=2)
    assert all("Two threads wait for each other" in error for error in errors)


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction"])
def test_a_model_that_another_holds_in_a_list(method):
    """What it holds while another thread has its parameters exchanged is not put back."""
    inside, begun = threading.Event(), threading.Event()
    teacher, x = nn.Sequential(Scaled().double()), torch.randn(3, 8).double()
    expected = empirical_ntk(teacher, x)

    def wait(*args):
        inside.set()
        assert begun.wait(60)

    teacher.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:

        def ends(*args):
            begun.set()
            return found.result(60)

        holder = Asks(teacher, ends)
        with left_as_found(teacher, holder):
            found = pool.submit(empirical_ntk, teacher, x, method=method)
            assert inside.wait(60)
            empirical_ntk(holder, x, method=method)
    assert_close(found.result(), expected)
