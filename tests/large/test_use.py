"""What is done with kernels on disk: the command line, progress, regression and spectra."""

import pytest
import torch
from torch import nn

from ggn_ntk import __main__ as command_line
from ggn_ntk import empirical_ntk, tiled_ntk
from ggn_ntk.spectrum import eigenvalues, kernel_target_alignment
from ggn_ntk.training import kernel_ridge_regression

pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")


@pytest.fixture
def call(tmp_path):
    """The arguments of a small call."""
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(7, 3)
    return {"model": model, "x1": x, "store": tmp_path / "k", "tile": 3}


def stop(done, total):
    if done == 4:
        raise KeyboardInterrupt


def test_info_and_verify(call, capsys):
    with pytest.raises(KeyboardInterrupt):
        tiled_ntk(**call, compute="trace", progress=stop)
    capsys.readouterr()
    assert command_line.main(["info", str(call["store"])]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "shape (7, 7), float32",
        "kernel of 7 x 7 samples",
        "6 of 9 tiles are there",
        "ntk of 4 parameters: 0.weight, 0.bias, 2.weight, 2.bias",
        "compute='trace'",
        f"torch {torch.__version__}",
        "fingerprints: x1 ",
    ):
        assert expected in printed
    assert command_line.main(["verify", str(call["store"])]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "tile (1, 2): missing",
        "tile (2, 1): missing",
        "tile (2, 2): missing",
        "6 of 9 tiles are whole",
    ]
    tiled_ntk(**call, compute="trace")
    assert command_line.main(["verify", str(call["store"])]) == 0
    assert capsys.readouterr().out == "9 of 9 tiles are whole\n"


def test_info_of_several(call, capsys):
    tiled_ntk(**call, per_parameter=True)
    assert command_line.main(["info", str(call["store"])]) == 0
    assert "'0.weight': shape (7, 7, 2, 2), float32" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Jacobians of .* are not finite:ggn_ntk.NotFiniteWarning")
def test_verify_finds_nan(call, capsys):
    call["x1"][4] = torch.nan
    tiled_ntk(**call)
    assert command_line.main(["verify", str(call["store"])]) == 1
    printed = capsys.readouterr().out
    assert "tile (0, 1): 12 NaN" in printed
    assert "4 of 9 tiles are whole" in printed


def test_commands_that_find_no_store(tmp_path, capsys):
    assert command_line.main(["info", str(tmp_path / "k")]) == 1
    assert "There is no store" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["verify"])


def test_a_bar(call, capsys):
    tiled_ntk(**call, progress=True)
    printed = capsys.readouterr().err
    assert printed.startswith("kernel of 7 x 7 samples")
    assert "6/6" in printed
    tiled_ntk(**{**call, "store": call["store"].with_name("other")})
    tiled_ntk(**{**call, "store": call["store"].with_name("none")}, progress=False)
    assert not capsys.readouterr().err


def test_regression_and_spectra_take_a_store(call):
    store, kernel, y = tiled_ntk(**call), empirical_ntk(call["model"], call["x1"]), torch.randn(7, 2)
    cross = tiled_ntk(**{**call, "x1": call["x1"][:4] + 1, "x2": call["x1"], "store": call["store"].with_name("cross")})
    torch.testing.assert_close(eigenvalues(store), eigenvalues(kernel), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernel_target_alignment(store, y), kernel_target_alignment(kernel, y))
    found = kernel_ridge_regression(store, y, diag_reg=1e-2)(cross)
    expected = kernel_ridge_regression(kernel, y, diag_reg=1e-2)(cross.to_torch())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
