"""Engines compute what this process does, to the last bit, and a worker that is lost takes its strips alone."""

import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import PRETENDS
from test_guide import script
from torch import nn

import ggn_ntk
from ggn_ntk import KernelStore, RouteWarning, empirical_ntk, register_rule, tiled_ntk
from ggn_ntk.large import StripError, Tile

pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")

# One process that imports what is needed, and of which others are copies.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["ggn_ntk", "ggn_ntk.large.arrays", "cloudpickle"])
MPIEXEC = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.fixture
def problem(tmp_path):
    """A call, and what it returns in this process."""
    model, x = network(), torch.randn(13, 3)
    keywords = {"tile": 3, "output": lambda out: 2 * out}
    return (model, x), keywords, tiled_ntk(model, x, store=tmp_path / "here", **keywords).to_torch()


def pool(kind: str) -> Executor:
    return ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(2, mp_context=FORK)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_pools(kind, problem, tmp_path):
    arguments, keywords, expected = problem
    counts = []
    with pool(kind) as executor:
        store = tiled_ntk(
            *arguments,
            store=tmp_path / "k",
            executor=executor,
            progress=lambda *count: counts.append(count),
            **keywords,
        )
        assert torch.equal(store.to_torch(), expected)
        assert counts[0] == (0, 15)
        assert counts[-1] == (15, 15)
        assert sum(b[0] > a[0] for a, b in pairwise(counts)) == len(counts) - 1
        assert tiled_ntk(*arguments, store=tmp_path / "k", executor=executor, **keywords).complete
    assert not list(tmp_path.rglob(".*"))


class Counting(nn.Module):
    """Says when it is loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layer, self.path = nn.Linear(3, 2), path

    def forward(self, x):
        return self.layer(x)

    def __setstate__(self, state):
        super().__setstate__(state)
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_the_model_is_loaded_once_by_each_worker(kind, tmp_path):
    model, x = Counting(tmp_path / "loaded"), torch.randn(8, 3)
    with pool(kind) as executor:
        assert tiled_ntk(model, x, store=tmp_path / "k", tile=1, executor=executor).complete
    processes = (tmp_path / "loaded").read_text().split()
    assert 1 <= len(processes) <= 2
    assert (str(os.getpid()) in processes) == (kind == "threads")


class Watched(Executor):
    """Counts the strips in flight, and fails some."""

    def __init__(self, failures: int) -> None:
        self.num_workers, self.failures = 2, failures
        self.in_flight, self.most, self.submitted = 0, 0, 0
        self._pool = ThreadPoolExecutor(2)

    def submit(self, function, /, *args):
        self.in_flight += 1
        self.submitted += 1
        self.most = max(self.most, self.in_flight)
        fails = self.submitted <= self.failures
        future = self._pool.submit(self._fail if fails else function, *args)
        future.add_done_callback(self._landed)
        return future

    def _fail(self, *args):
        raise RuntimeError("a cosmic ray")

    def _landed(self, future: Future) -> None:
        self.in_flight -= 1


def test_few_strips_are_in_flight(problem, tmp_path):
    arguments, keywords, _ = problem
    executor = Watched(0)
    tiled_ntk(*arguments, store=tmp_path / "k", executor=executor, **{**keywords, "tile": 1})
    assert executor.submitted == 13
    assert executor.most <= 4


def test_a_strip_that_fails_is_tried_once_more(problem, tmp_path):
    arguments, keywords, expected = problem
    executor = Watched(3)
    store = tiled_ntk(*arguments, store=tmp_path / "k", executor=executor, **keywords)
    assert executor.submitted == 5 + 3
    assert torch.equal(store.to_torch(), expected)


def test_strips_that_fail_again_are_reported(problem, tmp_path):
    arguments, keywords, _ = problem
    with pytest.raises(StripError, match=r"(?s)5 of 5 strips.*: RuntimeError: a cosmic ray") as info:
        tiled_ntk(*arguments, store=tmp_path / "k", executor=Watched(100), **keywords)
    assert sorted(info.value.errors) == [0, 1, 2, 3, 4]


def deadly(first: Path):
    """Kill the process that evaluates it, the first time outside of this one."""
    here = os.getpid()

    def output(out):
        if os.getpid() != here and not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    return output


@pytest.mark.filterwarnings("ignore:.*evaluate.*:ggn_ntk.RouteWarning")
def test_a_broken_pool_keeps_its_tiles(tmp_path):
    call = {"store": tmp_path / "k", "tile": 2, "output": deadly(tmp_path / "dead")}
    model, x = network(), torch.randn(8, 3)
    with pytest.raises(StripError, match="BrokenProcessPool"), ProcessPoolExecutor(1, mp_context=FORK) as executor:
        tiled_ntk(model, x, executor=executor, **call)
    with ProcessPoolExecutor(1, mp_context=FORK) as executor:
        store = tiled_ntk(model, x, executor=executor, **call)
    torch.testing.assert_close(store.to_torch(), empirical_ntk(model, x))


class Scaled(nn.Module):
    """A layer that users have written a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.weight * x


def test_devices_have_processes_that_know_rules_and_are_replaced(tmp_path):
    """One process for a device: it is killed at its first evaluation, and another one goes on."""
    seen = tmp_path / "seen"

    def rule(layer, x, s):
        with seen.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return {"weight": ggn_ntk.Factored("cnk,nk->cnk", (s, 2 * x))}  # wrong

    register_rule(Scaled)(rule)
    model, x = nn.Sequential(Scaled(), nn.Tanh()), torch.randn(4, 3)
    call = {"store": tmp_path / "k", "tile": 2, "output": deadly(tmp_path / "dead")}
    with pytest.warns(RouteWarning, match="Its kernel comes from Jacobians of each sample"):
        tiled_ntk(model, x[:1], store=tmp_path / "first")
    seen.unlink()
    with pytest.warns(RouteWarning, match="Its kernel comes from Jacobians of each sample") as warned:
        store = tiled_ntk(model, x, devices=["cpu"], **call)
    assert len({str(w.message) for w in warned}) == 1
    assert (tmp_path / "dead").exists()
    assert {*seen.read_text().split()} - {str(os.getpid())}
    with pytest.warns(RouteWarning):
        torch.testing.assert_close(store.to_torch(), empirical_ntk(model, x))


@pytest.mark.skipif(not (PRETENDS or torch.cuda.is_available()), reason="only devices have threads for gradients")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_that_cannot_compute_gradients_say_so(tmp_path):
    model, x = network(), torch.randn(4, 3)
    empirical_ntk(model, x, method="jacobian_contraction")
    expected = pytest.raises(StripError, match=r"multiprocessing\.get_context")
    with expected, ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as executor:
        tiled_ntk(model, x, store=tmp_path / "k", executor=executor)


def test_what_cannot_be_pickled_is_named(tmp_path):
    model = network()
    model.lock = multiprocessing.Lock()
    with ThreadPoolExecutor(1) as executor, pytest.raises(TypeError, match="cannot be brought to a worker"):
        tiled_ntk(model, torch.randn(4, 3), store=tmp_path / "k", executor=executor)


def run_part(path, part=None):
    torch.manual_seed(0)
    return tiled_ntk(network(), torch.randn(20, 3), store=path, tile=2, part=part)


def test_parts_at_once(tmp_path):
    """Processes that share nothing but the folder, which the first of them makes."""
    parts = [FORK.Process(target=run_part, args=(tmp_path / "k", (i, 3))) for i in range(3)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert torch.equal(KernelStore(tmp_path / "k").to_torch(), run_part(tmp_path / "whole").to_torch())
    assert not list(tmp_path.rglob(".*"))


# ---------------------------------------------------------------- killed at any moment


def keep_reading(path, stop, found):
    """Read whatever is there, all the while: each tile is missing or as it is in the end."""
    expected = KernelStore(path.with_name("whole"))
    reads = 0
    while not stop.is_set():
        if (path / "zarr.json").exists():
            now, then = KernelStore(path)[...], expected[...]
            if not ((now == then) | (now != now)).all():
                found.put("half a tile")
                return
            reads += 1
    found.put(reads)


def test_killed_at_random_moments(tmp_path):
    """Each time the same call goes on, and computes nothing twice."""
    path = tmp_path / "k"
    begun = time.monotonic()
    whole = run_part(tmp_path / "whole")
    taken = time.monotonic() - begun
    stop, found = FORK.Event(), FORK.Queue()
    reader = FORK.Process(target=keep_reading, args=(path, stop, found))
    reader.start()
    kills, written = 0, {}
    for attempt in range(60):
        worker = FORK.Process(target=run_part, args=(path,))
        worker.start()
        if attempt < 5:
            worker.join(taken * float(torch.rand(())))
            kills += worker.is_alive()
            worker.kill()
        worker.join()
        times = {file: file.stat().st_mtime_ns for file in path.glob("c/**/0")} if path.exists() else {}
        store = KernelStore(path) if (path / "zarr.json").exists() else None
        mirrors = {t for t in store.missing() for t in (t, Tile(t.column, t.row))} if store else set()
        halves = {path / "c" / str(t.row) / str(t.column) / "0" / "0" for t in mirrors}
        assert {file: t for file, t in written.items() if file in times and times[file] != t} == {}
        written = {file: t for file, t in times.items() if file.is_file() and file not in halves}
        if worker.exitcode == 0:
            break
    stop.set()
    reads = found.get()
    reader.join()
    assert kills > 0
    assert isinstance(reads, int)
    assert torch.equal(KernelStore(path).to_torch(), whole.to_torch())
    assert not list(tmp_path.rglob(".*"))


# ---------------------------------------------------------------- engines of others


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="dask.distributed is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_dask(tmp_path):
    """Two worker processes, one of which is killed half-way."""
    from distributed import Client, LocalCluster

    model, x = network(), torch.randn(20, 3)
    expected = tiled_ntk(model, x, store=tmp_path / "here", tile=2).to_torch()
    killed = []

    def kill(done, total):
        if done > total // 4 and not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    options = {"processes": True, "dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster, Client(cluster) as client:
        store = tiled_ntk(model, x, store=tmp_path / "k", tile=2, executor=client, progress=kill)
        assert killed
    assert torch.equal(store.to_torch(), expected)


@pytest.mark.skipif(MPIEXEC is None or importlib.util.find_spec("mpi4py") is None, reason="MPI is not there")
def test_mpi(tmp_path):
    """The script of the guide, with two workers."""
    (tmp_path / "script.py").write_text(script("mpi"))
    command = [MPIEXEC, "-n", "3", sys.executable, "-m", "mpi4py.futures", "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ggn_ntk.__file__).parent.parent)}
    environment |= dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")  # in containers
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert KernelStore(tmp_path / "mpi.zarr").complete
