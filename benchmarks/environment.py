"""What a run depends on besides the code. ``python -m benchmarks.environment`` prints an interpreter's part in JSON."""

import json
import os
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.process import JAX_PYTHON, ROOT

_PACKAGES = ("torch", "numpy", "backpack-for-pytorch", "vivit-for-pytorch", "opt_einsum", "nngeometry", "asdfghjkl")
_JAX_PACKAGES = ("jax", "jaxlib", "neural-tangents", "numpy")


def describe_environment(device: str) -> dict[str, str]:
    """Describe the environment.

    Args:
        device: Where to compute.

    Returns:
        What a report says of it, by what it is called.
    """
    import torch

    from ggn_ntk import __version__

    on_gpu = {"GPU": torch.cuda.get_device_name(device)} if device != "cpu" else {}
    return {
        "date": date.today().isoformat(),
        **on_gpu,
        "CPU": _processor(),
        "cores": str(_cores()),
        "threads of torch": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "operating system": _operating_system(),
        "ggn_ntk": __version__,
        **_software(_PACKAGES),
        **{f"{name} (of neural-tangents)": number for name, number in _jax_software().items()},
    }


def title(environment: dict[str, str]) -> str:
    """Name a run by device, torch version and date.

    Args:
        environment: Its environment.

    Returns:
        The name.
    """
    device = environment.get("GPU") or f"{environment['CPU']}, {environment['cores']} cores"
    return f"{device}, torch {environment['torch']}, {environment['date']}"


def slug(environment: dict[str, str]) -> str:
    """Name a folder like :func:`title`.

    Args:
        environment: Its environment.

    Returns:
        The name, of small letters, digits, dots and hyphens.
    """
    return re.sub(r"[^a-z0-9.]+", "-", title(environment).lower())


def _software(packages: tuple[str, ...]) -> dict[str, str]:
    """Look up versions in this interpreter.

    Args:
        packages: Names of packages.

    Returns:
        The versions of Python and of those that are installed.
    """
    found = {"Python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _jax_software() -> dict[str, str]:
    """Look up versions in the interpreter of neural-tangents.

    Returns:
        The versions; none if it is not installed.
    """
    command = [str(JAX_PYTHON), "-m", "benchmarks.environment"]
    try:
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    found: dict[str, str] = json.loads(printed)
    return found


def _processor() -> str:
    """Name the processor.

    Returns:
        Its name.
    """
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return str(names[0]).strip() if names else platform.machine()


def _cores() -> int:
    """Count the cores that this process may use.

    Returns:
        Their number.
    """
    return len(os.sched_getaffinity(0))


def _operating_system() -> str:
    """Name the operating system.

    Returns:
        Its name.
    """
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


if __name__ == "__main__":
    print(json.dumps(_software(_JAX_PACKAGES)))
