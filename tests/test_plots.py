"""The plots draw what they are given, where they are told."""

import math
import subprocess
import sys

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

from ggn_ntk import plots
from ggn_ntk.plots import plot_alignment, plot_kernel, plot_spectrum, plot_training

mpl.use("agg")

STEPS = torch.arange(4)
EACH = [
    lambda **options: plot_kernel(torch.eye(4), **options),
    lambda **options: plot_spectrum(torch.eye(4), **options),
    lambda **options: plot_alignment(STEPS, STEPS / 4, **options),
    lambda **options: plot_training(STEPS, {"a": STEPS}, STEPS, {"a": STEPS}, **options),
]


@pytest.fixture
def ax():
    return Figure(layout="constrained").subplots()


@pytest.fixture(autouse=True)
def _close():
    from matplotlib import pyplot as plt

    yield
    plt.close("all")


def drawn(ax):
    """What is drawn is drawn without a warning."""
    ax.figure.canvas.draw()
    return ax


@pytest.mark.parametrize("plot", EACH)
def test_axes_are_those_given_or_the_current_ones(plot, ax):
    from matplotlib import pyplot as plt

    assert plot(ax=ax) is ax
    drawn(ax)
    current = plt.figure().subplots()
    assert plot() is current
    drawn(current)


def test_kernel_is_sorted_by_class(ax):
    kernel = torch.randn(4, 4, requires_grad=True)
    drawn(plot_kernel(kernel, labels=[1, 0, 1, 0], ax=ax))
    order = [1, 3, 0, 2]
    assert torch.equal(torch.from_numpy(ax.images[0].get_array().data), kernel.detach().double()[order][:, order])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
    assert ax.get_xticks().tolist() == [0.5, 2.5]
    assert [line.get_ydata()[0] for line in ax.lines[:1]] == [1.5]
    assert ax.get_xlabel() == "class of x2"


@pytest.mark.parametrize("out", [(), (2,), (2, 3)], ids=str)
def test_kernel_is_summed_over_outputs(out, ax):
    kernel = torch.randn(3, 2, *out, *out)
    c = math.prod(out)
    expected = kernel.reshape(3, 2, c, c).diagonal(dim1=2, dim2=3).sum(-1)
    drawn(plot_kernel(kernel, ax=ax))
    assert torch.allclose(torch.from_numpy(ax.images[0].get_array().data), expected.double())
    assert len(ax.figure.axes) == 2  # with the colour bar


def test_spectrum_takes_kernels_and_eigenvalues(ax):
    kernel = torch.diag(torch.tensor([1.0, 4.0, 0.0, 2.0]))
    drawn(
        plot_spectrum({"kernel": kernel, "values": torch.tensor([3.0, -1e-9, 5.0]), "full": torch.ones(1, 1, 2, 2)}, ax)
    )
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[4, 2, 1], [5, 3]]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["kernel", "values", "full"]


def test_alignment(ax):
    drawn(plot_alignment([0, 1, 2], {"targets": [0.1, 0.2, 0.3], "first kernel": torch.ones(3)}, ax))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.1, 0.2, 0.3], [1, 1, 1]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["targets", "first kernel"]


def test_training_curves_share_the_colour_of_their_name(ax):
    predicted, real = {"train": [3.0, 2, 1], "test": [3.0, 3, 3]}, {"train": [3.0, 1]}
    drawn(plot_training([0, 1, 2], predicted, [0, 2], real, ax))
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["train, predicted", "test, predicted", "train, real"]
    assert lines["train, predicted"].get_color() == lines["train, real"].get_color()
    assert lines["train, predicted"].get_color() != lines["test, predicted"].get_color()
    assert lines["train, real"].get_linestyle() == "None"
    assert lines["train, real"].get_xdata().tolist() == [0, 2]


def test_tensors_on_any_device(device):
    kernel = torch.eye(4, dtype=torch.bfloat16).to(device)
    drawn(plot_kernel(kernel, torch.arange(4, device=device)))
    drawn(plot_alignment(torch.arange(4, device=device), torch.ones(4, device=device)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ax: plot_kernel(torch.ones(3, 3), [0, 1], ax),
            r"labels must have shape \[N\] .*, got \[2\] for \[3, 3\]",
        ),
        (
            lambda ax: plot_kernel(torch.ones(3, 2), [0, 1, 2], ax),
            r"labels must have shape \[N\] for a kernel \[N, N, ",
        ),
        (lambda ax: plot_kernel(torch.ones(3), ax=ax), "kernel must have shape"),
        (
            lambda ax: plot_alignment([0, 1], {"a": [1.0]}, ax),
            r"a must hold one number for each step, got shapes \(1,\)",
        ),
        (
            lambda ax: plot_training([0, 1], {}, [0], {"a": [1, 2]}, ax),
            r"real\['a'\] must hold one number for each step",
        ),
        (lambda ax: plot_training([0, 1], {"a": [1]}, [0], {}, ax), r"predicted\['a'\] must hold one number for each"),
    ],
)
def test_bad_arguments(call, message, ax):
    with pytest.raises(ValueError, match=message):
        call(ax)


def test_matplotlib_is_imported_when_a_plot_is_drawn(monkeypatch):
    code = "import sys, ggn_ntk; ggn_ntk.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"ggn_ntk.plots needs matplotlib: pip install ggn-ntk\[plots\]"):
        plots.plot_kernel(torch.eye(3))


@pytest.mark.parametrize("values", [[-0.4, 0.2, 1.3], [-2.0, -1.5, -1.0], [1.5, 3.0, 2.0], [0.1, 0.2, 0.3]], ids=str)
def test_plots_of_alignments_do_not_clip(values):
    figure = pytest.importorskip("matplotlib.figure")
    ax = figure.Figure().subplots()
    plot_alignment([0, 1, 2], {"one": values, "other": torch.tensor([0.4, 0.5, 0.6])}, ax)
    low, high = ax.get_ylim()
    assert low < min(0, *values)
    assert high > max(1, *values)
    assert all(low < y < high for line in ax.lines for y in line.get_ydata())
