"""The front door: a kernel in tiles, on disk."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path as FilePath
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn import Module

from ggn_ntk.kernels.strips import foreseen
from ggn_ntk.large import fingerprint
from ggn_ntk.large.axes import count_axes, output_axes
from ggn_ntk.large.compute import Job, Kernels
from ggn_ntk.large.executors import find_workers, run
from ggn_ntk.large.plan import Cost, Footprint, Form, Path, Plan, check_tile, choose_tile
from ggn_ntk.large.samples import Samples, parse_samples
from ggn_ntk.large.store import KernelStore, create, remove, sweep
from ggn_ntk.memory.budget import MemoryBudget, room
from ggn_ntk.methods.estimate import Tile
from ggn_ntk.models.evaluation import evaluate
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.sizes import kept_by
from ggn_ntk.problem.errors import KernelMemoryError, listed
from ggn_ntk.problem.functions import Model, Params
from ggn_ntk.problem.inputs import parts_of
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Pick, Request
from ggn_ntk.problem.sizes import parse_bytes, shown
from ggn_ntk.process.progress import Wanted, check_progress
from ggn_ntk.process.torch_internals import tree_leaves

_KINDS = ("ntk", "nngp")
_DTYPES = ("float32", "float64")


def tiled_ntk(
    model: Model,
    x1: Any,
    x2: Any = None,
    *,
    store: str | os.PathLike[str],
    kernel: str = "ntk",
    compute: str = "full",
    method: str = "auto",
    params: Params | None = None,
    per_parameter: bool | str = False,
    check: bool = False,
    capture: str = "auto",
    output: Pick | tuple[Pick, Pick] = None,
    trace_axes: int | Iterable[int] | None = None,
    diagonal_axes: int | Iterable[int] | None = None,
    paired: bool = False,
    interacting: bool = False,
    tile: int | tuple[int, int] | None = None,
    memory: int | str | None = None,
    executor: Any = None,
    devices: Sequence[torch.device | str] | None = None,
    progress: Wanted = None,
    dtype: torch.dtype | str | None = None,
    input: Callable[[Any], Any] | None = None,
    part: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> KernelStore:
    """Compute a kernel of any size in tiles, on disk.

    One of 60,000 x 50,000 samples, as in Wei, Hu, Steinhardt: "More than a toy: random matrix models predict how
    real-world neural representations generalize", ICML 2022, takes 12 GB, and hours. Each tile is written by itself,
    and is there as a whole or not at all. When the process is stopped, at any moment, the same call goes on with the
    tiles that are missing, and the result is the same to the last bit.

    Args:
        model: The model, as for :func:`ggn_ntk.empirical_ntk`.
        x1: N1 samples, as for :func:`ggn_ntk.empirical_ntk`, on any device; or anything with ``len(x1)`` and ``x1[i]``,
            such as a ``torch.utils.data.Dataset``, of which nothing is loaded before its strip of tiles.
        x2: N2 samples like x1; ``None`` for x1: tiles below the diagonal are then those above it, transposed.
        store: The folder that the kernel is written to: a Zarr array whose chunks are the tiles, or a group of arrays
            where there are several kernels. If it is there, it is gone on with, where it was made of the same.
        kernel: ``"ntk"``, or ``"nngp"`` for the kernel of :func:`ggn_ntk.nngp`.
        compute: ``"full"``, ``"diagonal"`` or ``"trace"``.
        method: The route, as for :func:`ggn_ntk.empirical_ntk`.
        params: The parameters to sum over.
        per_parameter: Keep kernels of parameters, or modules, apart.
        check: Compare blocks with an independent computation.
        capture: How the structured route takes the model apart.
        output: Turns what the model returns into the tensor ``[N, *out]``, or a pair, one for x1 and one for x2.
        trace_axes: Output axes to sum at equal indices.
        diagonal_axes: Output axes to take at equal indices.
        paired: Take x1[n] with x2[n] alone.
        interacting: Refused if true: a whole batch that is one input has no tiles.
        tile: How many samples make a tile, of x1 and of x2; ``None`` for as many as are worth it and fit.
        memory: Bytes that a worker may take to compute a tile, or text such as ``"8GiB"``; ``None`` for what the device
            has free, less a reserve.
        executor: What computes strips of tiles: ``None`` for this process, any ``concurrent.futures.Executor``
            (threads, processes, ``mpi4py.futures.MPIPoolExecutor``), or a Dask ``Client``. Its workers write to
            ``store``, and find the model, which they load once, beside it.
        devices: Instead of ``executor``: devices such as ``["cuda:0", "cuda:1"]``, with a process for each.
        progress: A bar, for ``None`` on a terminal after ten seconds; ``True``, with the plan before it, ``False``, or
            a callable that is called with the numbers of tiles that are done and of all.
        dtype: ``torch.float32`` or ``torch.float64``, of what is stored; ``None`` for that of the kernel. Kernels of
            parameters in a narrower one are summed in this one.
        input: Picks the model's input of an item of a data set, say ``lambda item: item[0]``.
        part: ``(i, n)`` for the i-th of n shares of the strips, counted from 0: n processes that have nothing in common
            but the folder compute a kernel together, say those of a job array.
        overwrite: Remove what is in ``store`` and start anew.

    Returns:
        The store, of shape ``[N1, N2, ...]`` as :func:`ggn_ntk.empirical_ntk` has it.

    Raises:
        UnsupportedModelError: If the model has no exact kernel.
        KernelMemoryError: If a tile does not fit into ``memory``, or the kernel onto the disk.
        StoreError: If the store cannot be written or is damaged.
        StripError: If strips failed twice; others are computed nevertheless.
        ImportError: If packages are missing that the extra ``large`` installs.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has a value that is not accepted, or the store was made of something else.
    """
    if kernel not in _KINDS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, _KINDS))}, got {kernel!r}.")
    if kernel == "nngp" and (method, per_parameter, check, capture) != ("auto", False, False, "auto"):
        raise ValueError("method, per_parameter, check and capture go with kernel='ntk' alone: leave them out.")
    if interacting:
        raise ValueError("interacting=True takes a whole batch for one input, which has no tiles: call empirical_ntk.")
    check_progress(progress)
    lanes = find_workers(executor, devices)
    share, limit = _parse_part(part), parse_bytes(memory)
    stored = _parse_dtype(dtype)
    if overwrite and part is not None:
        raise ValueError("overwrite=True would remove what other parts have written: remove the folder before.")
    axes = AxesRequest.parse(compute, trace_axes, diagonal_axes, paired=paired)
    first = parse_samples(x1, "x1", input)
    second = first if x2 is None else parse_samples(x2, "x2", input)
    if paired and len(first) != len(second):
        raise ValueError(
            f"paired=True takes x1[n] with x2[n] alone: they must be of one size, got {len(first)} and {len(second)}."
        )
    params = list(params) if isinstance(params, Iterator) else params
    keywords: dict[str, Any] = {"compute": compute, "params": params, "output": output, "paired": paired}
    keywords |= {"trace_axes": trace_axes, "diagonal_axes": diagonal_axes, "memory": limit}
    if kernel == "ntk":
        keywords |= {"method": method, "per_parameter": per_parameter, "check": check, "capture": capture}
    device = _device_of(model, params)
    few = [x.take(slice(0, 1), device) for x in ((first,) if x2 is None else (first, second))]
    last = few[1] if len(few) > 1 else None
    request = Request.parse(
        model,
        few[0],
        last,
        axes,
        params=params,
        per_parameter=per_parameter,
        output=output,
        capture=capture,
        memory=limit,
    )
    kernels = Kernels(model, keywords, kernel, _groups(request, stored) if kernel == "ntk" else None)
    path, samples = FilePath(store), (len(first), len(second))
    sizes = _parse_tile(tile, samples)
    if overwrite:
        remove(path)
    made_of = _made_of(request, kernels, first, None if x2 is None else second, stored, input)
    found = _opened(path)
    if found is None:
        plan = _plan(request, kernels, few, samples, stored, sizes, limit)
        _check_disk(path, plan)
        found = create(path, made_of, plan)
    _compare(found, made_of, sizes)
    job = Job(kernels, first, second, found.plan, path.absolute(), device)
    run(job, found, found.plan.strips[share], lanes, progress)
    if found.complete:
        sweep(path)
    return found


def _parse_part(part: Any) -> slice:
    """Find which strips a part has."""
    if part is None:
        return slice(None)
    if not isinstance(part, tuple) or len(part) != 2 or not all(isinstance(number, SupportsIndex) for number in part):
        raise TypeError(f"part must be (i, n), two integers, or None, got {part!r}.")
    i, n = map(index, part)
    if not 0 <= i < n:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part!r}.")
    return slice(i, None, n)


def _parse_tile(tile: Any, samples: tuple[int, int]) -> tuple[int, int] | None:
    """Bring the sizes of a tile to the form of a pair."""
    if tile is None:
        return None
    sizes = tile if isinstance(tile, tuple) else (tile, tile)
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"tile must be a positive integer, a pair of these, or None, got {tile!r}.")
    return min(sizes[0], samples[0]), min(sizes[1], samples[1])


def _parse_dtype(dtype: Any) -> str | None:
    """Name the dtype of what is stored."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {dtype!r}.")
    return None if dtype is None else name


def _opened(path: FilePath) -> KernelStore | None:
    """Open a store; there is none where there is no folder, or an empty one."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    return KernelStore(path)


def _device_of(model: Any, params: Any) -> torch.device:
    """Find the device on which a model computes."""
    if isinstance(model, Module):
        tensors: Iterable[Any] = (*model.parameters(), *model.buffers())
    else:
        tensors = (part for _, part, _ in parts_of(dict(params) if isinstance(params, Mapping) else ()))
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _groups(request: Request, stored: str | None) -> dict[str, Path] | None:
    """Find the kernels that parameters' kernels are summed to in a wider dtype, where that is asked for."""
    if stored != "float64" or all(p.dtype == torch.float64 for p in request.params.values()):
        return None
    return {name: (group,) if request.per_parameter else () for name, group in request.groups.items()}


def _made_of(
    request: Request, kernels: Kernels, x1: Samples, x2: Samples | None, stored: str | None, pick: Any
) -> dict[str, Any]:
    """Describe what a kernel is made of, as JSON has it."""
    from ggn_ntk import __version__

    axes, keywords = request.axes, kernels.keywords
    described = {
        name: keywords[name]
        for name in ("compute", "method", "per_parameter", "check", "capture", "paired")
        if name in keywords
    }
    return {
        "versions": {"ggn_ntk": __version__, "torch": torch.__version__},
        "kernel": kernels.kind,
        "keywords": {
            **described,
            "trace_axes": list(axes.trace_axes),
            "diagonal_axes": list(axes.diagonal_axes),
            "dtype": stored,
            "output": fingerprint.fingerprint(keywords["output"]),
            "input": fingerprint.fingerprint(pick),
        },
        "parameters": list(request.params),
        "model": fingerprint.of_structure(request.model),
        "state": fingerprint.of_state(request.model),
        "samples": {"x1": x1.fingerprint(), "x2": None if x2 is None else x2.fingerprint()},
    }


def _compare(store: KernelStore, made_of: Mapping[str, Any], tile: tuple[int, int] | None) -> None:
    """Refuse a store that was made of something else."""
    found, different = store.info, list[str]()
    for what, others in (("versions", "version"), ("keywords", "keyword")):
        different += [
            f"{others} {name}: {found[what].get(name)!r} there, {value!r} here"
            for name, value in made_of[what].items()
            if found[what].get(name) != value
        ]
    if found["kernel"] != made_of["kernel"]:
        different.append(f"kernel: {found['kernel']!r} there, {made_of['kernel']!r} here")
    if found["parameters"] != made_of["parameters"]:
        changed = set(found["parameters"]) ^ set(made_of["parameters"])
        different.append(f"other parameters are summed over: {listed(sorted(changed))}")
    if found["model"] != made_of["model"]:
        different.append("another model, in its layers, their options, hooks or training flags")
    names = {name for name, value in made_of["state"].items() if found["state"].get(name) != value}
    names |= found["state"].keys() - made_of["state"].keys()
    if names:
        different.append(f"other weights: {listed(sorted(names))}")
    different += [f"other data: {x}" for x, value in made_of["samples"].items() if found["samples"][x] != value]
    if tile is not None and tile != store.plan.tile:
        different.append(f"tile: {store.plan.tile} there, {tile} here")
    if different:
        what = "".join(f"\n  - {line}" for line in different)
        raise ValueError(
            f"{store.path} was made of something else:{what}\nPass what it was made of, another store=, or "
            "overwrite=True to start anew."
        )


def _plan(
    request: Request,
    kernels: Kernels,
    few: Sequence[Any],
    samples: tuple[int, int],
    stored: str | None,
    tile: tuple[int, int] | None,
    limit: int | None,
) -> Plan:
    """Compute the kernel of one sample, and plan that of all."""
    numbers = kernels(*few)
    for keys in numbers:
        for key in keys:
            if not all(isinstance(k, str | int) for k in (key if isinstance(key, tuple) else (key,))):
                raise TypeError(
                    f"Keys of outputs are stored as strings or integers, got {key!r}: rename them (output=)."
                )
    paired = request.axes.paired
    counts = count_axes(request)
    forms = {
        keys: Form(
            tuple(kernel.shape[1 if paired else 2 :]),
            *output_axes(keys, counts, request.axes),
            stored or str(kernel.dtype).removeprefix("torch."),
        )
        for keys, kernel in numbers.items()
    }
    memory = limit or int(min(room(_device_of(request.model, None)), 2**40))
    footprint = _footprint(request, forms)
    if tile is None:
        tile = choose_tile(samples, footprint, memory, symmetric=request.symmetric)
    else:
        if (request.symmetric or paired) and tile[0] != tile[1]:
            raise ValueError(
                f"tile must be as many samples of x1 as of x2 where these are the same, or paired, got {tile}."
            )
        check_tile(tile, footprint, memory)
    plan = Plan(samples, tile, request.symmetric, paired, forms)
    by_layers = kernels.kind == "ntk" and kernels.keywords["method"] in ("auto", "structured")
    found = foreseen(request, tile) if by_layers and not paired and not kernels.keywords["check"] else None
    return plan if found is None else _with_cost(plan, found)


def _with_cost(plan: Plan, tile: Tile) -> Plan:
    """Sum up what tiles take, with samples of x1 kept where they fit."""
    plan = replace(plan, block=None if tile.block is None else min(tile.block, max(plan.tile)))
    evaluated, met = plan.evaluated(), ((tile.contraction, False), (tile.diagonal, True))
    flops, seconds = (
        sum(n * getattr(work, what) for n, work in zip(evaluated, tile.evaluations, strict=True))
        for what in ("flops", "seconds")
    )
    contraction, contracting = (
        sum(plan.pairs(diagonal=diagonal) * getattr(work, what) for work, diagonal in met)
        for what in ("flops", "seconds")
    )
    return replace(plan, cost=Cost(contraction, flops, seconds + contracting))


def _footprint(request: Request, forms: Mapping[Path, Form]) -> Footprint:
    """Measure what autograd keeps of one sample's evaluation: ``s`` is as large for each output."""
    batch = request.batches[0].few()
    model = batch.model
    with isolated(model), torch.enable_grad():
        output, forward = kept_by(lambda: evaluate(batch, None, batch.x1), (*model.parameters(), *model.buffers()))
    device = next(iter(batch.x1.tensors.values())).device
    most = MemoryBudget.of(device).backpropagated
    outputs = sum(x.numel() for x in tree_leaves(output) if isinstance(x, Tensor))
    return Footprint(forms, request.axes.paired, forward, forward * outputs, most)


def _check_disk(path: FilePath, plan: Plan) -> None:
    """Refuse a kernel that the disk has no room for."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if plan.bytes > free:
        raise KernelMemoryError(f"The kernel takes {shown(plan.bytes)}, and the disk of {path} has {shown(free)} left.")
