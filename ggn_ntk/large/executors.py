"""Who computes strips of tiles: this process, or the workers of an engine, to which the model is brought once."""

import hashlib
import multiprocessing
import os
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ggn_ntk.large.compute import Job, done_in
from ggn_ntk.large.plan import Tile
from ggn_ntk.large.store import JOB, KernelStore, StoreError
from ggn_ntk.problem.errors import collected, kind_of, warn
from ggn_ntk.process.progress import Progress, Wanted
from ggn_ntk.rules.registry import register_entries, users_entries

# How many strips wait at each worker, one of which it computes: so that it need not wait for the next.
_IN_FLIGHT = 2

# How often a strip is tried.
_TRIES = 2

# Seconds between two looks at which tiles have come.
_PAUSE = 1.0


class StripError(RuntimeError):
    """Strips of tiles failed; all others are computed.

    Attributes:
        errors: The last error of each, by its number.
    """

    def __init__(self, errors: dict[int, BaseException], total: int, path: Path) -> None:
        """Name the strips and their errors.

        Args:
            errors: The last error of each, by its number.
            total: How many strips there are.
            path: The store.
        """
        self.errors = errors
        kinds: dict[str, list[int]] = {}
        for row, error in errors.items():
            kinds.setdefault(f"{type(error).__name__}: {error}", []).append(row)
        lines = "".join(f"\n  - {', '.join(map(str, rows))}: {what}" for what, rows in kinds.items())
        super().__init__(
            f"{len(errors)} of {total} strips of tiles failed. All others are in {path}; the same call computes those "
            f"that are missing:{lines}"
        )


@dataclass
class Lane:
    """Workers that take strips from one queue."""

    executor: Executor
    most: Callable[[], int]  # how many it takes at once
    device: torch.device | None = None  # of the worker, if it is not where the model is
    renew: Callable[[], Executor] | None = None  # makes other workers where these are lost
    in_flight: int = 0
    broken: bool = False

    @property
    def has_room(self) -> bool:
        """Whether it takes another strip."""
        return not self.broken and self.in_flight < self.most()

    def lose(self, executor: Executor) -> None:
        """Go on without workers that were lost, with others if these can be made."""
        if executor is not self.executor:  # which is known
            return
        if self.renew is None:
            self.broken = True
        else:
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.executor = self.renew()


class _Attempt(NamedTuple):
    """A strip in flight."""

    lane: Lane
    executor: Executor
    row: int
    tries: int  # this one included


class _Here(Executor):
    """This process, which computes a strip as it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Compute."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def run(job: Job, store: KernelStore, rows: Sequence[int], lanes: list[Lane], wanted: Wanted) -> None:
    """Compute the tiles of strips that are not there."""
    missing = {row: [t for t in _tiles(job, row) if not done_in(store, t)] for row in rows}
    total = sum(len(_tiles(job, row)) for row in rows)
    left = sum(map(len, missing.values()))
    if wanted is True:
        print(store.plan, file=sys.stderr)
    with Progress(wanted, total, done=total - left, unit="tile") as progress:
        if not left:
            return
        strips = [row for row in rows if missing[row]]
        try:
            if isinstance(lanes[0].executor, _Here):
                _run(lanes, strips, lambda lane, row: lane.executor.submit(job.work, row, progress.add), store)
            else:
                counted = _Counted(store, missing, progress)
                with _brought(job) as (path, digest):
                    _run(
                        lanes,
                        strips,
                        lambda lane, row: lane.executor.submit(_work, path, digest, row, lane.device),
                        store,
                        counted,
                    )
        except KeyboardInterrupt:
            print(
                f"\nStopped: {store!r}. Its tiles are kept; the same call, tiled_ntk(..., store={str(store.path)!r}), "
                "goes on with those that are missing.",
                file=sys.stderr,
            )
            raise
        finally:
            stopped = sys.exc_info()[0] is not None  # then nobody waits for tiles under way
            for lane in lanes:
                if lane.renew is not None:
                    lane.executor.shutdown(wait=not stopped, cancel_futures=True)


def _tiles(job: Job, row: int) -> list[Tile]:
    """List the tiles of a strip that are computed."""
    return [Tile(row, column) for column in job.plan.columns(row)]


@dataclass
class _Counted:
    """Tiles that other processes write, counted as they come."""

    store: KernelStore
    missing: dict[int, list[Tile]]
    progress: Progress

    def look(self, rows: Sequence[int]) -> None:
        """Count those of strips that are under way or done."""
        for row in rows:
            left = [tile for tile in self.missing[row] if not done_in(self.store, tile)]
            self.progress.add(len(self.missing[row]) - len(left))
            self.missing[row] = left


def _run(
    lanes: list[Lane],
    strips: list[int],
    submit: Callable[[Lane, int], "Future[Any]"],
    store: KernelStore,
    counted: _Counted | None = None,
) -> None:
    """Have strips computed, each tried twice, with few of them in flight."""
    waiting = deque((row, 1) for row in strips)
    futures: dict[Future[Any], _Attempt] = {}
    errors: dict[int, BaseException] = {}
    said: set[tuple[type[Warning], str]] = set()
    try:
        while waiting or futures:
            for lane in lanes:
                while waiting and lane.has_room:
                    row, tries = waiting.popleft()
                    try:
                        future = submit(lane, row)
                    except BrokenExecutor as error:
                        errors[row] = error
                        waiting.appendleft((row, tries))
                        lane.lose(lane.executor)
                        continue
                    futures[future] = _Attempt(lane, lane.executor, row, tries)
                    lane.in_flight += 1
            if not futures:  # all workers are lost
                break
            finished, _ = wait(futures, timeout=_PAUSE, return_when=FIRST_COMPLETED)
            if counted is not None:
                counted.look([attempt.row for attempt in futures.values()])
            for future in finished:
                lane, used, row, tries = futures.pop(future)
                lane.in_flight -= 1
                failed = CancelledError() if future.cancelled() else future.exception()
                if failed is None:
                    errors.pop(row, None)
                    for category, message in set(future.result() or ()) - said:
                        said.add((category, message))
                        warn(message, category)
                    continue
                if isinstance(failed, StoreError):  # others would fail, too
                    raise failed
                errors[row] = failed
                if isinstance(failed, BrokenExecutor):
                    lane.lose(used)
                if tries < _TRIES:
                    waiting.append((row, tries + 1))
    finally:
        for future in futures:
            future.cancel()
    for row, _ in waiting:
        errors.setdefault(row, BrokenExecutor("all workers were lost"))
    if errors:
        raise StripError(errors, len(strips), store.path) from next(iter(errors.values()))


def find_workers(executor: Any, devices: Sequence[Any] | None) -> list[Lane]:
    """Find the workers."""
    if devices is not None:
        if executor is not None:
            raise ValueError("devices= makes processes of its own, and executor= names others: leave one out.")
        if isinstance(devices, str) or not devices:
            raise ValueError(f"devices must be a list of devices, such as ['cuda:0', 'cuda:1'], got {devices!r}.")
        return [Lane(_process(), lambda: _IN_FLIGHT, torch.device(device), renew=_process) for device in devices]
    if executor is None:
        return [Lane(_Here(), lambda: 1)]
    if hasattr(executor, "get_executor"):  # a Dask client
        client, executor = executor, executor.get_executor(pure=False)
        return [Lane(executor, lambda: _IN_FLIGHT * sum(client.nthreads().values()))]
    if not isinstance(executor, Executor):
        raise TypeError(
            f"executor must be a concurrent.futures.Executor, a Dask Client or None, got {kind_of(executor)}."
        )
    return [Lane(executor, lambda: _IN_FLIGHT * _workers_of(executor))]


def _workers_of(executor: Any) -> int:
    """Find how many workers an executor has."""
    found = (getattr(executor, name, None) for name in ("num_workers", "_max_workers"))
    return next((n for n in found if isinstance(n, int) and n > 0), os.cpu_count() or 1)


def _process() -> Executor:
    """Start a process for a device."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@contextmanager
def _brought(job: Job) -> Iterator[tuple[str, str]]:
    """Put a job where workers find it, beside the store, which all of them write to."""
    try:
        import cloudpickle
    except ImportError as error:
        raise ImportError(f"An executor needs more packages ({error}): pip install 'ggn-ntk[large]'.") from error
    try:
        content = cloudpickle.dumps((os.getpid(), users_entries(), job))
    except Exception as error:
        raise TypeError(
            f"The model, x1, x2, output= or input= cannot be brought to a worker ({error}): make it of what can be "
            "pickled, or compute in this process (executor=None)."
        ) from error
    path = job.path.with_name(f".{job.path.name}.{uuid.uuid4().hex}{JOB}")
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(content)
        yield str(path), hashlib.sha256(content).hexdigest()
    finally:
        path.unlink(missing_ok=True)


class _Forked:
    """Whether this process is a copy of one that has imported this module, by a fork."""

    here = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: setattr(_Forked, "here", True))


class _Kept(threading.local):
    """The job that a thread of a worker has loaded."""

    digest = ""
    job: Job


_KEPT = _Kept()


def _work(path: str, digest: str, row: int, device: torch.device | None) -> list[tuple[type[Warning], str]]:
    """Compute a strip in a worker."""
    with collected() as found, _explained():
        _loaded(path, digest, device).work(row)
    return found


@contextmanager
def _explained() -> Iterator[None]:
    """Say what helps where torch cannot compute, since the process is a fork."""
    try:
        yield
    except RuntimeError as error:
        if not (_Forked.here and "fork" in str(error)):
            raise
        raise RuntimeError(
            f"Torch cannot go on in a fork of a process that has used a device or its threads ({error}). Pass a pool "
            "that starts processes anew: ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('spawn'))."
        ) from error


def _loaded(path: str, digest: str, device: torch.device | None) -> Job:
    """Load a job, unless it is the one that was loaded before."""
    if _KEPT.digest != digest:
        import cloudpickle

        if _Forked.here:  # the threads of its parent are not there, and OpenMP would wait for them
            torch.set_num_threads(1)
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise StoreError(f"{path} is not what was written to it.")
        process, entries, job = cloudpickle.loads(content)
        if process != os.getpid():
            register_entries(entries)
        _KEPT.job = job if device is None else job.on(device)
        _KEPT.digest = digest
    return _KEPT.job
