"""The demo."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import METHODS

from ggn_ntk import __main__ as demo
from ggn_ntk import empirical_ntk

FAST = ["--n1", "3", "--n2", "2", "--repeats", "1", "--device", "cpu"]


def test_all_routes_agree(capsys, tmp_path):
    output, picture = tmp_path / "kernel.npy", tmp_path / "trace.png"
    assert demo.main([*FAST, "--output", str(output), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    routes = [method for method in METHODS if method != "auto"]
    for method in routes:
        assert method in printed
    assert printed.count("yes") == len(routes)
    assert picture.stat().st_size > 0
    kernel = np.load(output)
    torch.manual_seed(0)
    model, x1, x2 = demo.cnn(), torch.randn(3, 3, 32, 32), torch.randn(2, 3, 32, 32)
    assert np.allclose(kernel, empirical_ntk(model, x1, x2), rtol=1e-4, atol=1e-2)


def test_chosen_methods_and_dtype(capsys, tmp_path):
    options = ["--method", "vivit", "--method", "jacobian_contraction", "--dtype", "float64"]
    assert demo.main([*FAST, *options, "--picture", str(tmp_path / "trace.png")]) == 0
    printed = capsys.readouterr().out
    assert "float64" in printed
    assert "ntk_vector_products" not in printed


def test_disagreement_is_an_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "empirical_ntk", lambda *args, **kwargs: 1.001 * empirical_ntk(*args, **kwargs))
    options = [*FAST, "--method", "vivit", "--picture", str(tmp_path / "trace.png")]
    assert demo.main(options) == 1
    captured = capsys.readouterr()
    assert "NO" in captured.out
    assert "Not within 1e-05 of the float64 oracle: vivit" in captured.err


@pytest.mark.parametrize("options", [["--n1", "0"], ["--device", "nowhere"], ["--method", "fast"]])
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as info:
        demo.main(options)
    assert info.value.code == 2
    assert f"argument {options[0]}" in capsys.readouterr().err


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert demo.main([*FAST, "--method", "jacobian_contraction", "--picture", str(tmp_path / "no.png")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "ggn_ntk", *FAST, "--method", "vivit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "vivit" in done.stdout
    assert (tmp_path / "ggn_ntk_demo.png").exists()


@pytest.mark.parametrize("option", ["--output", "--picture"])
@pytest.mark.parametrize("place", ["folder", "missing/file", "file/file"])
def test_the_demo_looks_where_it_may_write_before_it_works(option, place, tmp_path, capsys, monkeypatch):
    def working(*args, **kwargs):
        raise AssertionError("it works first")

    monkeypatch.setattr(demo, "empirical_ntk", working)
    monkeypatch.setattr(demo, "cnn", working)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as info:
        demo.main([option, str(tmp_path / place)])
    assert info.value.code == 2
    assert f"argument {option}: cannot write to" in capsys.readouterr().err
