"""``python -m ggn_ntk``: the NTK of a small CNN by every route, their agreement and their times; kernels on disk."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ggn_ntk.kernels.ntk import Method, empirical_ntk
from ggn_ntk.large import command
from ggn_ntk.methods.reference import jacobian_contraction
from ggn_ntk.models.comparison import TOLERANCES, relative_error

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_METHODS = [method.value for method in Method if method is not Method.AUTO]


def cnn() -> nn.Sequential:
    """Build the CNN of the PyTorch tutorial "Neural Tangent Kernels", for 3x32x32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.Flatten(),
        nn.Linear(21632, 10),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command, or else the demo."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in command.COMMANDS:
        return command.main(arguments)
    options = _parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _DTYPES[options.dtype]
    torch.manual_seed(0)
    model = cnn().to(device, dtype)
    x_train, x_test = (torch.randn(n, 3, 32, 32).to(device, dtype) for n in (options.n1, options.n2))
    where = f"{_describe(device)}, {options.dtype}, torch {torch.__version__}"
    print(f"Kernel of {options.n1} x {options.n2} images on {where}")

    # The oracle computes in float64, whatever the routes compute in.
    oracle = cast(Tensor, jacobian_contraction(model.double(), x_train.double(), x_test.double()))
    model.to(dtype)
    runs: dict[str, Callable[[], Any]] = {
        method: partial(empirical_ntk, model, x_train, x_test, method=method) for method in options.method or _METHODS
    }
    kernels: dict[str, Tensor] = {method: run() for method, run in runs.items()}
    errors = {method: relative_error(kernel, oracle) for method, kernel in kernels.items()}
    print(_table(errors, _median_seconds(runs, options.repeats), TOLERANCES[dtype]))

    method, kernel = list(kernels.items())[-1]
    if options.output:
        np.save(options.output, kernel.cpu().numpy())
        print(f"Kernel of shape {list(kernel.shape)} by {method} saved to {options.output}")
    _save_picture(kernel.diagonal(dim1=2, dim2=3).sum(-1).cpu(), options.picture)
    wrong = [method for method, error in errors.items() if not error <= TOLERANCES[dtype]]
    if wrong:
        print(f"Not within {TOLERANCES[dtype]:.0e} of the float64 oracle: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    description = "The NTK of a small CNN by every route, their agreement and their times."
    others = "; ".join(f"`python -m ggn_ntk {name} STORE`: {what}" for name, what in command.COMMANDS.items())
    parser = argparse.ArgumentParser(prog="python -m ggn_ntk", description=description, epilog=others)
    parser.add_argument("--n1", type=_positive, default=20, help="samples in x1 (default: %(default)s)")
    parser.add_argument("--n2", type=_positive, default=5, help="samples in x2 (default: %(default)s)")
    parser.add_argument("--device", type=_device, help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--method", choices=_METHODS, action="append", help="one route; repeatable (default: all)")
    parser.add_argument("--repeats", type=_positive, default=5, help="timed runs of each route (default: %(default)s)")
    parser.add_argument("--output", type=_file, metavar="FILE", help="save the kernel of the last route as .npy")
    parser.add_argument(
        "--picture",
        type=_file,
        metavar="FILE",
        default="ggn_ntk_demo.png",
        help="where to draw the trace kernel (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    """Read a positive integer."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _device(text: str) -> str:
    """Read a device, and make sure that it can be used."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None
    return text


def _file(text: str) -> Path:
    """Read the path of a file, and make sure that it can be written."""
    path = Path(text)
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission"
    if reason is not None:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {reason}")
    return path


def _describe(device: str) -> str:
    """Name a device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"


def _median_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Time computations that have run once before."""
    # In each round one after the other, so that a slow moment of the machine does not fall on one of them alone.
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    """Wait for what the GPU still has to do, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _table(errors: dict[str, float], seconds: dict[str, float], tolerance: float) -> str:
    """Format errors and times as a table."""
    fastest = min(seconds.values())
    lines = [f"{'method':<22}{'relative error':>16}{'agrees':>8}{'seconds':>11}{'ratio':>8}"]
    for method, error in errors.items():
        agrees, ratio = "yes" if error <= tolerance else "NO", seconds[method] / fastest
        lines.append(f"{method:<22}{error:>16.1e}{agrees:>8}{seconds[method]:>11.4f}{ratio:>7.1f}x")
    return "\n".join(lines)


def _save_picture(trace: Tensor, path: Path) -> None:
    """Draw a trace kernel."""
    # trace [N1, N2]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: matplotlib is not installed (pip install ggn-ntk[plots]).")
        return
    width, height = (min(max(low, 1.5 + 0.3 * n), 12) for low, n in zip((6, 3), trace.shape, strict=True))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(trace.T.numpy())
    axes.set(xlabel="sample of x1", ylabel="sample of x2", title="Trace of the NTK")
    axes.locator_params(integer=True)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    print(f"Trace kernel drawn in {path}")


if __name__ == "__main__":
    sys.exit(main())
