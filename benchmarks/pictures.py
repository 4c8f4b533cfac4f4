"""The pictures of the README, light and dark: a kernel that learns, and times beside peers.

``python -m benchmarks.pictures`` draws the kernel, for which a network is trained. ``python -m benchmarks.figures``
draws the times, from committed results.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import plan
from benchmarks.environment import title
from benchmarks.plots import STYLES, contenders_in
from benchmarks.process import ROOT
from benchmarks.results import Results
from benchmarks.workloads import SWEEPS

_FOLDER = ROOT / "docs" / "_static"
_THEMES = {"light": ("#1f2328", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}  # of text and of lines
_SIZE = (6, 4)
_SHOWN = 100  # images


def speed_picture(theme: str) -> Path:
    """Name the picture of times.

    Args:
        theme: ``"light"`` or ``"dark"``.

    Returns:
        Its file.
    """
    return _FOLDER / f"speed-{theme}.svg"


def speed_data(results: Results) -> str:
    """Say what the picture of times shows, which it holds as its description.

    Args:
        results: A run.

    Returns:
        Where the run was and the times by contender and number of samples, as JSON.
    """
    sweep = results.sweeps["N"]
    found = {
        name: {n: round(s, 4) for n, r in sweep.items() if (s := r.seconds(name))} for name in contenders_in(sweep)
    }
    return json.dumps({"on": title(results.environment), "seconds": {k: v for k, v in found.items() if v}})


def draw_speed(results: Results) -> None:
    """Draw times against the number of samples, in both themes.

    Args:
        results: A run.
    """
    data = speed_data(results)
    times = json.loads(data)["seconds"]
    for theme in _THEMES:
        with _in_colours(theme) as text:
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.subplots()
            for name, by_n in times.items():
                colour, marker = STYLES[name]
                colour, wide = text if colour == "#000000" else colour, 3.0 if name == plan.GGN_NTK else 1.5
                axes.plot([int(n) for n in by_n], list(by_n.values()), marker=marker, color=colour, lw=wide, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(list(results.sweeps["N"]), [str(n) for n in results.sweeps["N"]])
            axes.set(xlabel="N, samples in each of two sets", ylabel="seconds")
            axes.legend(frameon=False)
            axes.set_title(f"{SWEEPS['N'].network}\n{json.loads(data)['on'].rsplit(', ', 1)[0]}", fontsize=10)
            figure.savefig(speed_picture(theme), metadata={"Date": None, "Description": data})


def draw_kernel() -> None:
    """Draw the kernel of a small network before and after it learned to read digits, in both themes."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn import functional as F

    from ggn_ntk import empirical_ntk
    from ggn_ntk.plots import plot_kernel

    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))[:1000]
    x, labels = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16, torch.tensor(digits.target)[order]
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    kernels: dict[str, Any] = {"at initialisation": empirical_ntk(model, x[:_SHOWN], compute="trace")}
    for _ in range(300):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        (model(x[batch]) - F.one_hot(labels[batch], 10)).square().mean().backward()
        optimizer.step()
    kernels["after it learned to read digits"] = empirical_ntk(model, x[:_SHOWN], compute="trace")
    for theme in _THEMES:
        with _in_colours(theme):
            figure = Figure(figsize=_SIZE, layout="constrained")
            for axes, (when, kernel) in zip(figure.subplots(1, 2), kernels.items(), strict=True):
                plot_kernel(kernel, labels[:_SHOWN], ax=axes)
                axes.set(title=when, xlabel="", ylabel="")
                axes.images[0].colorbar.remove()
                axes.images[0].set_interpolation("none")  # one pixel an entry, in the file
                axes.grid(visible=False)
            figure.supxlabel(f"{_SHOWN} images, sorted by digit", fontsize=10)
            figure.savefig(_FOLDER / f"kernel-{theme}.svg", metadata={"Date": None})


@contextmanager
def _in_colours(theme: str) -> Iterator[str]:
    """Draw on nothing, in the colours of a theme; yields that of text."""
    text, lines = _THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    colours = dict.fromkeys(names, text) | dict.fromkeys(("axes.edgecolor", "grid.color"), lines)
    blank = {
        "savefig.transparent": True,
        "svg.hashsalt": "ggn_ntk",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context({**colours, **blank, "axes.grid": True, "font.size": 11}):
        yield text


if __name__ == "__main__":
    draw_kernel()
