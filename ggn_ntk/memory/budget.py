"""How much memory there is, how much a computation holds at once, and what to say where it does not suffice."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import inf, prod
from pathlib import Path

import torch
from torch import Tensor

from ggn_ntk.problem.errors import KernelMemoryError, bytes_asked_for, is_out_of_memory
from ggn_ntk.problem.output_axes import KernelAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.problem.sizes import shown

_HELP = (
    "What helps: compute='trace' or 'diagonal' (or trace_axes=) instead of the full kernel, fewer parameters at a time "
    "(params=), and blocks of samples: the kernel of x1[a:b] and x2[c:d] is that block of the whole."
)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that a computation holds at once on a device: they decide on chunks of outputs and blocks of samples."""

    # ``s`` of all outputs that pass back together, where it is largest.
    backpropagated: int = 2**29
    # What x1 alone makes on the way to a kernel, before x1 is taken in blocks.
    rows: int = 2**26
    # What x2 alone makes, and all that is kept of it for the next block of x1.
    columns: int = 2**28
    # ``s`` of a block of samples, and what x1 and x2 make together: layer after layer reads and writes them, which is
    # fast as long as they stay in a processor's cache.
    passing: int = 2**30
    # What waits for other blocks of samples, before these are put together.
    waiting: int = 2**26
    # Jacobians of parameters without a rule.
    jacobians: int = 2**26
    # What a forward pass makes of a block of samples, in products of the kernel with vectors.
    products: int = 2**30
    # What a contraction holds that is written down, to be carried out again without asking how: all at once, that time.
    recorded: int = 2**29
    # The output of a layer, on average, from which on the model's outputs pass back one by one: several at once save
    # calls of functions, but read and write more than a processor's cache holds.
    one_by_one: float = inf

    @staticmethod
    def of(device: torch.device) -> "MemoryBudget":
        """Look up the budget of a device, within what the call may take."""
        budget, limit = LIMITS.get(device.type) or _grown(ELSEWHERE, _total(device)), _LIMIT.get()
        return budget if limit is None else _within(budget, limit)


#: Budgets by type of device: of a CPU, 8 MiB fit its last-level cache. On other devices launches cost more than memory.
LIMITS = {"cpu": MemoryBudget(passing=2**23, products=2**25, recorded=2**24, one_by_one=2**18)}
ELSEWHERE = MemoryBudget()

# The shares of a GPU's memory that Jacobians may take on the way to a kernel: of few samples at a time, each sample of
# the other set is passed, or formed, again and again, in many small products.
_SHARES = {"rows": 32, "columns": 16}


@cache
def _total(device: torch.device) -> int:
    """Look up how much memory a GPU has; 0 of other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


@cache
def _grown(budget: MemoryBudget, total: int) -> MemoryBudget:
    """Let a budget grow with the device."""
    return replace(budget, **{name: max(getattr(budget, name), total // share) for name, share in _SHARES.items()})


# Bytes that this thread's call may take; ``None`` for what the device has.
_LIMIT: ContextVar[int | None] = ContextVar("limit", default=None)

#: Autograd frees a graph as a whole, and makes much beside it on the way back: a process takes about so many times the
#: memory that the graph keeps (ResNet-18 on 192 images of CIFAR-10: 2.5 GB, of which 1 GB is kept).
IN_GRAPH = 2

# The share of what a device has free that is left alone, and so many bytes as are not worth asking for.
_RESERVE, _SMALL = 0.2, 2**27


@lru_cache
def _within(budget: MemoryBudget, limit: int) -> MemoryBudget:
    """Shrink a budget to what a call may take."""
    shares = {
        "backpropagated": 4,
        "rows": 32,
        "columns": 8,
        "passing": 16,
        "waiting": 32,
        "jacobians": 16,
        "products": 4,
        "recorded": 16,
    }
    return replace(budget, **{name: min(getattr(budget, name), limit // share) for name, share in shares.items()})


@contextmanager
def limited(limit: int | None) -> Iterator[None]:
    """Let what is computed inside take so many bytes; ``None`` leaves it as it is."""
    token = _LIMIT.set(_LIMIT.get() if limit is None else limit)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def room(device: torch.device) -> float:
    """Find out how many bytes a call may take: what it was given, or what the device has, less a reserve."""
    limit, free = _LIMIT.get(), available(device)
    if limit is None:
        return inf if free is None else (1 - _RESERVE) * free
    return limit


def fits(size: float, device: torch.device) -> bool:
    """Tell whether something is small beside what a call may take."""
    limit = _LIMIT.get()
    return (limit is None and size <= _SMALL) or size <= room(device) / 2


def available(device: torch.device) -> int | None:
    """Find out how many bytes can still be had on a device; ``None`` where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [limit for read in (_of_system, _of_control_group, _of_process) if (limit := read()) is not None]
    return min(limits, default=None)


def _of_system() -> int | None:
    """Read what Linux says is available, swap included."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    sizes = {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}
    return sizes["MemAvailable"] + sizes.get("SwapFree", 0) if "MemAvailable" in sizes else None


def _of_control_group() -> int | None:
    """Read what the process's container leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + int(counts.get("inactive_file", 0))


def _of_process() -> int | None:
    """Read what limits of the process leave of its address space."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return None
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    finite = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    if not finite:
        return None
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    return min(finite) - pages * resource.getpagesize()


def resolve_axes(request: Request, outputs: Sequence[Tensor]) -> KernelAxes:
    """Find the roles of output axes, given outputs of each batch, and refuse a kernel that cannot fit into memory."""
    # outputs [N, *out]
    check_dtypes(outputs)
    first, second = outputs[0], outputs[-1]
    axes = request.resolve(first.shape[1:], second.shape[1:])
    check_result((*request.sample_axes, *axes.shape), list(request.params.values()), len(request.grouped()))
    return axes


def check_dtypes(outputs: Sequence[Tensor]) -> None:
    """Refuse outputs of x1 and of x2 that are of different dtypes."""
    first, second = outputs[0].dtype, outputs[-1].dtype
    if first != second:
        raise ValueError(f"Outputs of x1 are {first}, and of x2 {second}: bring them to one dtype, say in output=.")


def check_result(shape: Sequence[int], params: Sequence[Tensor], count: int) -> None:
    """Refuse kernels that cannot fit into memory, before any work."""
    if not params:
        return
    size = prod(shape) * max(p.element_size() for p in params) * count
    check_size(size, params[0].device, "The kernel alone takes")


def check_size(size: int, device: torch.device, what: str) -> None:
    """Refuse what cannot fit into memory, as a whole."""
    limit = _LIMIT.get()
    if limit is not None and size > limit:
        raise KernelMemoryError(f"{what} {shown(size)}, more than memory={shown(limit)}. {_HELP}")
    free = available(device) if size > 2**26 else None  # asking takes longer than such a size matters
    if free is not None and size > free:
        raise KernelMemoryError(f"{what} {shown(size)}, and {device} has {shown(free)} left. {_HELP}")


@contextmanager
def explained(what: Callable[[], str], helps: str = _HELP) -> Iterator[None]:
    """Say what helps where memory runs out."""
    try:
        yield
    except KernelMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = bytes_asked_for(error)
        size = f" when {_readable(asked)} were asked for" if asked else ""
        raise KernelMemoryError(f"Memory ran out{size}, for {what()}. {helps}") from error


def _readable(size: str) -> str:
    """Write a size, a number of bytes or one with its unit, for a message."""
    number, *unit = size.split()
    return shown(int(number)) if unit in ([], ["bytes"]) and number.isdigit() else size
