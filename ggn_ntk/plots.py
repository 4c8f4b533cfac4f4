"""Pictures of kernels, spectra and training.

Each function draws into ``ax``, or the current axes if it is ``None``, and returns it. Matplotlib is imported when one
is called. Colours are told apart with any colour vision, and on light and dark backgrounds: those of Okabe and Ito
("Color Universal Design", 2008) that stand out from both; curves differ in their markers or dashes besides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ggn_ntk.spectrum.matrix import check_kernel, symmetric_matrix

__all__ = ["COLORS", "plot_alignment", "plot_kernel", "plot_spectrum", "plot_training"]

#: Blue, vermilion, bluish green, reddish purple, orange and sky blue.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv*"


def plot_kernel(kernel: Tensor, labels: Tensor | Sequence[int] | None = None, ax: Any = None) -> Any:
    """Draw a kernel as a heat map, with samples sorted by class.

    Args:
        kernel: ``[N1, N2]``, or ``[N1, N2, *out, *out]``, of which the trace over outputs is drawn.
        labels: Classes of the samples ``[N]`` of a kernel with N1 = N2 = N; ``None`` to leave samples in order. Lines
            divide the classes.
        ax: Matplotlib axes.

    Returns:
        The axes, with a colour bar beside them.

    Raises:
        TypeError: If the kernel is not a real tensor.
        ValueError: If a shape does not fit.
    """
    ax = _axes(ax)
    values = _trace(check_kernel(kernel, "kernel")).double().cpu()
    if labels is not None:
        classes = torch.as_tensor(labels).cpu()
        if classes.shape != (len(values),) or values.shape[0] != values.shape[1]:
            raise ValueError(
                f"labels must have shape [N] for a kernel [N, N, ...], got {list(classes.shape)} for "
                f"{list(kernel.shape)}."
            )
        order = classes.argsort(stable=True)
        values = values[order][:, order]
        _divide_classes(ax, classes[order])
    else:
        ax.set(xlabel="sample of x2", ylabel="sample of x1")
        ax.locator_params(integer=True)
    image = ax.imshow(values.numpy(), cmap="cividis", aspect="equal" if values.shape[0] == values.shape[1] else "auto")
    ax.figure.colorbar(image, ax=ax)
    return ax


def plot_spectrum(kernel: Tensor | Mapping[str, Tensor], ax: Any = None) -> Any:
    """Draw eigenvalues against their rank, on logarithmic axes.

    Eigenvalues that are not positive have no place there and are left out.

    Args:
        kernel: A kernel ``[N, N, *out, *out]`` or ``[N, N]``, its eigenvalues ``[n]``, or a mapping from names, for the
            legend, to these.
        ax: Matplotlib axes.

    Returns:
        The axes.

    Raises:
        TypeError: If a kernel is not a real tensor.
        ValueError: If it has not the shape of a kernel of a set with itself, or is not symmetric.
    """
    ax = _axes(ax)
    spectra = kernel if isinstance(kernel, Mapping) else {"": kernel}
    for i, (name, entry) in enumerate(spectra.items()):
        if isinstance(entry, Tensor) and entry.ndim == 1:
            values = entry.detach()
        else:
            values = torch.linalg.eigvalsh(symmetric_matrix(entry, name or "kernel"))
        values = values[values > 0].sort(descending=True).values.double().cpu()
        ax.plot(
            range(1, len(values) + 1), values.numpy(), label=name or None, **_line(i, _evenly_on_log_axis(len(values)))
        )
    ax.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="eigenvalue")
    if isinstance(kernel, Mapping):
        ax.legend()
    return ax


def plot_alignment(steps: Any, alignments: Mapping[str, Any] | Any, ax: Any = None) -> Any:
    """Draw alignments, or other numbers that are usually between 0 and 1, over training.

    Args:
        steps: Steps or times ``[T]``.
        alignments: Numbers ``[T]``, or a mapping from names, for the legend, to these.
        ax: Matplotlib axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there are not as many numbers as steps.
    """
    ax = _axes(ax)
    x = _numbers(steps)
    curves = alignments if isinstance(alignments, Mapping) else {"": alignments}
    for i, (name, values) in enumerate(curves.items()):
        y = _matching(name or "alignments", values, x)
        ax.plot(x, y, label=name or None, **_line(i, max(len(x) // 12, 1)))
    low, high = ax.dataLim.intervaly  # alignments of centred kernels may be negative
    ax.set(xlabel="step", ylabel="alignment", ylim=(min(low, 0) - 0.02, max(high, 1) + 0.02))
    if isinstance(alignments, Mapping):
        ax.legend()
    return ax


def plot_training(
    steps: Any, predicted: Mapping[str, Any], real_steps: Any, real: Mapping[str, Any], ax: Any = None
) -> Any:
    """Draw predicted training curves over real ones.

    Args:
        steps: Steps or times ``[T]`` of the predictions, drawn as lines.
        predicted: A mapping from names, for the legend, to numbers ``[T]``.
        real_steps: Steps ``[S]`` of what was measured, drawn as open markers.
        real: A mapping from names to numbers ``[S]``. Those of one name have one colour.
        ax: Matplotlib axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there are not as many numbers as steps.
    """
    ax = _axes(ax)
    x, real_x = _numbers(steps), _numbers(real_steps)
    names = list(dict.fromkeys([*real, *predicted]))
    for name, values in predicted.items():
        style = {"color": COLORS[names.index(name) % len(COLORS)], "linewidth": 1.8}
        ax.plot(x, _matching(f"predicted[{name!r}]", values, x), label=f"{name}, predicted", **style)
    for name, values in real.items():
        style = _line(names.index(name), 1) | {"linestyle": "none", "markerfacecolor": "none"}
        ax.plot(real_x, _matching(f"real[{name!r}]", values, real_x), label=f"{name}, real", **style)
    ax.set(xlabel="step")
    ax.legend()
    return ax


def _axes(ax: Any) -> Any:
    """Import matplotlib, and find the axes to draw into."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise ImportError("ggn_ntk.plots needs matplotlib: pip install ggn-ntk[plots].") from None
    return plt.gca() if ax is None else ax


def _trace(kernel: Tensor) -> Tensor:
    """Sum a kernel over outputs."""
    # kernel [N1, N2, *out, *out] -> [N1, N2]
    if kernel.ndim == 2:
        return kernel
    half = (kernel.ndim - 2) // 2
    # [N1, N2, C, C], of which the diagonal is summed
    return kernel.flatten(2 + half).flatten(2, 1 + half).diagonal(dim1=2, dim2=3).sum(-1)


def _divide_classes(ax: Any, classes: Tensor) -> None:
    """Draw lines between classes, and name classes on the axes."""
    # sorted classes [N]
    names, counts = classes.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)  # pixels lie at integers, so that the lines between them are half a pixel off
    for end in ends[:-1].tolist():
        ax.axhline(end - 0.5, color="white", linewidth=0.8)
        ax.axvline(end - 0.5, color="white", linewidth=0.8)
    middles = (ends - counts / 2 - 0.5).tolist()
    ax.set(xlabel="class of x2", ylabel="class of x1")
    ax.set_xticks(middles, [str(name) for name in names.tolist()])
    ax.set_yticks(middles, [str(name) for name in names.tolist()])
    ax.tick_params(length=0)


def _evenly_on_log_axis(n: int) -> list[int]:
    """Choose up to eight of n points for markers, evenly spaced on a logarithmic axis."""
    return sorted({round(n ** (i / 7)) - 1 for i in range(8)} if n else [])


def _line(index: int, every: int | list[int]) -> dict[str, Any]:
    """Choose the style of a curve by its place among the curves."""
    style = {"color": COLORS[index % len(COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}
    return style | {"markersize": 5, "markevery": every, "linewidth": 1.5}


def _numbers(values: Any) -> Any:
    """Turn numbers into an array, which matplotlib takes."""
    tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    return tensor.double().numpy()


def _matching(argument: str, values: Any, x: Any) -> Any:
    """Turn the numbers of a curve into an array, with one for each step."""
    y = _numbers(values)
    if y.shape != x.shape or y.ndim != 1:
        raise ValueError(f"{argument} must hold one number for each step, got shapes {y.shape} and {x.shape}.")
    return y
