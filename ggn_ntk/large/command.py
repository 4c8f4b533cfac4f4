"""``python -m ggn_ntk info STORE`` and ``verify STORE``: what a store holds, and whether it is whole."""

import argparse
import sys
from math import prod

from ggn_ntk.large.store import KernelStore
from ggn_ntk.problem.errors import listed
from ggn_ntk.problem.sizes import shown

COMMANDS = {
    "info": "shape, tiles that are there, and what the kernel was made of",
    "verify": "read every tile, and list those that are missing, damaged or hold NaN",
}


def main(arguments: list[str]) -> int:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m ggn_ntk", description="Kernels on disk.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, description=what).add_argument("store", help="the folder")
    options = parser.parse_args(arguments)
    try:
        store = KernelStore(options.store)
        return _verify(store) if options.command == "verify" else _info(store)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _info(store: KernelStore) -> int:
    """Say what a store holds."""
    info, plan = store.info, store.plan
    total, missing = prod(plan.grid), len(store.missing())
    on_disk = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    given = {name: value for name, value in info["keywords"].items() if name not in ("output", "input")}
    lines = [
        store.path,
        *(f"{_named(keys)}shape {_shape(store, keys)}, {form.dtype}" for keys, form in plan.forms.items()),
        plan,
        f"{total - missing} of {total} tiles are there, {shown(on_disk)} on disk",
        f"{info['kernel']} of {len(info['parameters'])} parameters: {listed(info['parameters'])}",
        "keywords: " + ", ".join(f"{name}={value!r}" for name, value in given.items()),
        "made by " + ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        "fingerprints: " + ", ".join(f"{name} {value}" for name, value in info["samples"].items() if value),
    ]
    print(*lines, sep="\n")
    return 0


def _verify(store: KernelStore) -> int:
    """Read every tile."""
    problems, total = store.verify(), prod(store.plan.grid)
    for tile, what in problems.items():
        print(f"tile {tuple(tile)}: {what}")
    print(f"{total - len(problems)} of {total} tiles are whole")
    return 1 if problems else 0


def _named(keys: tuple[object, ...]) -> str:
    """Name one of several kernels."""
    return f"{', '.join(map(repr, keys))}: " if keys else ""


def _shape(store: KernelStore, keys: tuple[object, ...]) -> tuple[int, ...]:
    """Look up the shape of one kernel."""
    for key in keys:
        store = store[key]
    shape: tuple[int, ...] = store.shape
    return shape
