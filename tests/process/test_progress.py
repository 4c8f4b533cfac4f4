"""Progress of a kernel: a callable sees parts done and all; a bar is shown to those who ask, or wait long."""

import pytest
import torch
from torch import nn

from ggn_ntk import empirical_ntk, empirical_ntk_fn
from ggn_ntk.jacobians import plan
from ggn_ntk.memory.layout import Layout
from ggn_ntk.methods import blocks
from ggn_ntk.process import progress


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(7, 3)


def test_a_callable_sees_what_is_done():
    model, x = network()
    for kernel in (empirical_ntk, lambda model, x, **keywords: empirical_ntk_fn(model, **keywords)(x)):
        seen = []
        kernel(model, x, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(0, 4), (2, 4), (4, 4)]


def test_blocks_are_counted(monkeypatch):
    model, x = network()
    monkeypatch.setattr(plan, "fits", lambda size, device: False)
    monkeypatch.setattr(blocks, "choose", lambda *_, **__: Layout((7, 7), True, 0, 4, 2, 2))
    seen = []
    empirical_ntk(model, x, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 6), (2, 6), (3, 6), (4, 6), (6, 6)]  # strips of two blocks; the first meets two others


def test_a_bar_is_shown_to_those_who_ask(capsys):
    model, x = network()
    empirical_ntk(model, x, progress=True)
    assert "4/4" in capsys.readouterr().err
    empirical_ntk(model, x)
    empirical_ntk(model, x, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds", [0.5, 2])
def test_a_bar_is_shown_where_it_takes_long(seconds, monkeypatch, capsys):
    times = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds * next(times))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(None, 10) as shown:
        for _ in range(10):
            shown.add()
    assert ("10/10" in capsys.readouterr().err) == (seconds > 1)


def test_a_bar_needs_tqdm(monkeypatch):
    model, x = network()
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        empirical_ntk(model, x, progress=True)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    empirical_ntk(model, x)


@pytest.mark.parametrize("wanted", [1, "yes"])
def test_progress_that_is_none_is_an_error(wanted):
    model, x = network()
    with pytest.raises(TypeError, match="progress must be True, False, None or a callable"):
        empirical_ntk(model, x, progress=wanted)
