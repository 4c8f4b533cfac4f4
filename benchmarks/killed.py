"""A kernel in tiles whose process is killed at random moments of one run: what is left each time, and in the end.

``python -m benchmarks.killed`` runs the same call again after each ``SIGKILL``. It checks that no tile is computed
twice, that what another process reads all the while is each time a tile of the kernel or missing, and that the kernel
is that of a call that was never stopped, to the last bit.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.large import digits_cnn
from ggn_ntk import KernelStore, tiled_ntk


def _call(path: Path, samples: int, tile: int) -> KernelStore:
    """Compute the kernel, or what is missing of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = digits_cnn(), torch.randn(samples, 1, 8, 8)
    return tiled_ntk(model, x, store=path, compute="trace", tile=tile, progress=False)


def _read(path: Path, whole: Path, stop: Any, found: Any) -> None:
    """Read whatever is there, all the while."""
    expected, reads = KernelStore(whole)[...], 0
    while not stop.is_set():
        if (path / "zarr.json").exists():
            now = KernelStore(path)[...]
            if not ((now == expected) | np.isnan(now)).all():
                found.put("a reader saw numbers that are none of the kernel")
                return
            reads += 1
    found.put(f"{reads} reads saw nothing else than tiles that are whole or missing")


def _times(path: Path) -> dict[Path, int]:
    """List when files of tiles were written."""
    return {file: file.stat().st_mtime_ns for file in path.glob("c/*/*")} if path.exists() else {}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--tile", type=int, default=64)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.large", "ggn_ntk.large.arrays"])
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / "killed", Path(folder) / "whole"
        start = time.perf_counter()
        expected = _call(whole, options.samples, options.tile)[...]
        taken = time.perf_counter() - start
        for _ in range(2):  # the first also starts the server of forks
            start = time.perf_counter()
            idle = context.Process(target=_call, args=(whole, options.samples, options.tile))
            idle.start()
            idle.join()
        longest = time.perf_counter() - start + taken / options.kills
        stop, found = context.Event(), context.Queue()
        reader = context.Process(target=_read, args=(path, whole, stop, found))
        reader.start()
        kills = twice = 0
        while True:
            before = {file: t for file, t in _times(path).items() if _is_done(path, file)}
            worker = context.Process(target=_call, args=(path, options.samples, options.tile))
            worker.start()
            if kills < options.kills:
                worker.join(random.uniform(0, longest))
                kills += worker.is_alive()
                worker.kill()
            worker.join()
            after = _times(path)
            twice += sum(after[file] != t for file, t in before.items())
            if worker.exitcode == 0:
                break
            if worker.exitcode != -9:
                raise RuntimeError(f"the call failed with exit code {worker.exitcode}")
        stop.set()
        print(f"killed {kills} times; {twice} tiles were computed twice; {found.get()}")
        reader.join()
        same = np.array_equal(KernelStore(path)[...], expected)
        left = [str(file) for file in Path(folder).rglob(".*")]
        print(f"to the last bit as a call that was never stopped: {same}; files left over: {left}")


def _is_done(path: Path, file: Path) -> bool:
    """Tell whether a tile's file has its mirror: until then the tile is under way."""
    row, column = file.parent.name, file.name
    return (path / "c" / column / row).exists()


if __name__ == "__main__":
    main()
