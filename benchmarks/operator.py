"""``python -m benchmarks.operator [--out FOLDER] [NAME ...]``: products of a kernel with vectors, without the kernel.

One product of the symmetric kernel by ``NTKOperator``; by a vjp and a jvp of ``torch.func`` as one would write them, of
all samples at once and of batches of a thousand, without any checks; and by curvlinops' ``J @ J.adjoint()``, in batches
of a thousand. They take turns; times are medians, and memory is the peak over what the process held before. What it
takes to make the operator, which looks at all samples, is the first column. Where so named, ten vectors are multiplied
at once. The kernel that is not formed would take the memory in the last column, in float32.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from benchmarks.meters import ProcessMeter
from benchmarks.page import write_page
from ggn_ntk.operators import NTKOperator
from ggn_ntk.reference import relative_error

_OURS, _AT_ONCE, _BATCHED, _CURVLINOPS = "NTKOperator", "vjp and jvp", "vjp and jvp, batches", "curvlinops"
_COLUMNS = [_OURS, _AT_ONCE, _BATCHED, _CURVLINOPS]

_BATCH = 1000


class Case(NamedTuple):
    """A model, its samples, and how many vectors are multiplied."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    vectors: int = 1


def _mlp(*sizes: int) -> nn.Sequential:
    """Build a fully-connected network."""
    layers = [m for pair in pairwise(sizes) for m in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _cnn() -> nn.Sequential:
    """Build a small convolutional network."""
    convolutions = (nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1))
    layers = [m for convolution in convolutions for m in (convolution, nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


CASES = {
    "mlp, N = 20,000": Case(lambda: _mlp(784, 512, 512, 10), lambda: torch.randn(20_000, 784)),
    "mlp, N = 5,000, 10 vectors": Case(lambda: _mlp(784, 512, 512, 10), lambda: torch.randn(5_000, 784), 10),
    "cnn, N = 5,000": Case(_cnn, lambda: torch.randn(5_000, 3, 32, 32)),
    "small mlp, N = 300": Case(lambda: _mlp(2, 32, 32, 1), lambda: torch.randn(300, 2)),
}


def _by_hand(model: nn.Module, x: Tensor, v: Tensor, batch: int) -> Tensor:
    """Multiply by a vjp and a jvp."""
    # x [N, ...], v [N, C, K] -> [N, C, K]
    params = {name: p.detach() for name, p in model.named_parameters()}
    several = v.shape[-1] > 1

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        value: Tensor = functional_call(model, params, (x,))
        return value

    def pulled(x: Tensor, v: Tensor) -> dict[str, Tensor]:
        _, pullback, *_ = vjp(lambda p: output(p, x), params)
        found: dict[str, Tensor] = vmap(pullback, -1)(v)[0] if several else pullback(v[..., 0])[0]
        return found

    def pushed(x: Tensor, u: dict[str, Tensor]) -> Tensor:
        def along(u: dict[str, Tensor]) -> Tensor:
            slope: Tensor = jvp(lambda p: output(p, x), (params,), (u,))[1]
            return slope

        return vmap(along, out_dims=-1)(u) if several else along(u).unsqueeze(-1)

    total: dict[str, Tensor] = {}
    for part, of_part in zip(x.split(batch), v.split(batch), strict=True):
        found = pulled(part, of_part)
        total = {name: total[name].add_(g) for name, g in found.items()} if total else found
    return torch.cat([pushed(part, total) for part in x.split(batch)])


def _by_curvlinops(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Multiply by the operators of the Jacobian and its adjoint."""
    from curvlinops import JacobianLinearOperator

    data = [(part, part[:, 0]) for part in x.split(_BATCH)]
    options: dict[str, Any] = {"check_deterministic": False, "num_data": len(x)}
    jacobian = JacobianLinearOperator(model, list(model.parameters()), data, **options)
    (product,) = jacobian @ jacobian.adjoint() @ [v]
    found: Tensor = product
    return found


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time the contenders of a case.

    Args:
        name: The case.
        rounds: How often each is timed, after one round to warm up.

    Returns:
        Seconds and megabytes by contender, what it takes to make the operator, the error of its product, and the bytes
        of the kernel.
    """
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.build().eval(), case.inputs()
    with torch.no_grad():
        outputs = model(x[:1]).shape[1]
    v = torch.randn(len(x), outputs, case.vectors)
    start = time.perf_counter()
    kernel = NTKOperator(model, x)
    making = time.perf_counter() - start
    contenders: dict[str, Callable[[], Tensor]] = {
        _OURS: lambda: kernel @ v,
        _AT_ONCE: partial(_by_hand, model, x, v, len(x)),
        _BATCHED: partial(_by_hand, model, x, v, _BATCH),
        _CURVLINOPS: partial(_by_curvlinops, model, x, v),
    }
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    megabytes: dict[str, float] = {}
    products: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for contender in list(contenders)[:: 1 if number % 2 else -1]:
            meter = ProcessMeter()
            meter.start()
            start = time.perf_counter()
            products[contender] = contenders[contender]()
            if number:
                seconds[contender].append(time.perf_counter() - start)
                megabytes[contender] = max(megabytes.get(contender, 0.0), meter.peak())
    return {
        "seconds": seconds,
        "megabytes": megabytes,
        "making": making,
        "error": relative_error(products[_OURS], products[_AT_ONCE]),
        "kernel": 4 * (len(x) * outputs) ** 2,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write results as a table.

    Args:
        results: What :func:`measure` returns, by case.

    Returns:
        The table, in Markdown.
    """
    lines = ["| model | making it | " + " | ".join(_COLUMNS) + " | kernel |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, result in results.items():
        times = {c: statistics.median(s) for c, s in result["seconds"].items()}
        cells = [f"{1e3 * times[c]:.3g} ms, {result['megabytes'][c]:.0f} MB" for c in _COLUMNS]
        size = result["kernel"] / 1e9
        lines.append(f"| {name} | {1e3 * result['making']:.3g} ms | {' | '.join(cells)} | {size:.3g} GB |")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/operator"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {name: measure(name, options.rounds) for name in options.names or CASES}
    write_page(options.out, "operator", "Products without the kernel", __doc__, results, table(results))


if __name__ == "__main__":
    main()
