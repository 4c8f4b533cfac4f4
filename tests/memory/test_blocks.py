"""Samples in blocks: the same kernels, whatever fits, of every model; and every sample is still verified."""

import gc
import warnings
import weakref
from dataclasses import replace
from math import inf

import pytest
import torch
from cases import CASES, normal
from conftest import COMPUTES, assert_close, places
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS
from torch import nn

from ggn_ntk import (
    Factored,
    KernelMemoryError,
    UnsupportedModelError,
    empirical_ntk,
    empirical_ntk_fn,
    explain,
    tiled_ntk,
)
from ggn_ntk.contraction.gathered import Gathered
from ggn_ntk.jacobians import plan
from ggn_ntk.memory.layout import Footprint, Layout, choose
from ggn_ntk.methods import blocks
from ggn_ntk.problem.output_axes import AxesRequest


@pytest.fixture
def in_blocks(monkeypatch):
    """Take samples in blocks of two and strips of four at most, and few outputs at a time."""
    seen = []

    def chosen(sizes, symmetric, axes, footprints, memory, x1_stays=False):
        most = max(side.out_shape.numel() for side in axes)
        stays = int(not symmetric and len(seen) % 2)
        early = 0.0 if len(seen) % 4 < 2 else inf
        seen.append(Layout(sizes, symmetric, stays, strip=4, block=2, outputs=max(1, most // 2), early=early))
        return seen[-1]

    monkeypatch.setattr(plan, "fits", lambda size, device: False)
    monkeypatch.setattr(blocks, "choose", chosen)
    return seen


def several(x, n):
    """Some samples, until there are n."""
    if isinstance(x, torch.Tensor):
        return x[torch.arange(n, device=x.device) % len(x)]
    if isinstance(x, tuple):
        return tuple(several(y, n) for y in x)
    return {key: several(y, n) for key, y in x.items()} if isinstance(x, dict) else x


@pytest.mark.parametrize(("place", "case"), list(enumerate([*CASES, *MODELS])), ids=str)
def test_blocks_are_those_of_the_whole(place, case, in_blocks):
    """Every case, each with some of what may be asked for, on some device."""
    devices = [device for dtype, device in places(case, "jacobian_contraction") if dtype == torch.float64] or ["cpu"]
    model, x1, x2 = case.build(device=devices[place // 6 % len(devices)])
    compute, symmetric, n = COMPUTES[place % 3], place % 2 == 0, 5
    x1, x2 = several(x1, n), None if symmetric else several(x2, 3)
    keywords = {"compute": compute, "output": case.output}
    actual = empirical_ntk(model, x1, x2, method="structured", **keywords)
    assert in_blocks, "samples were not taken in blocks"
    expected = empirical_ntk(model, x1, x2, method="jacobian_contraction", **keywords)
    assert_close(actual, expected, scale=1e5 * expected if case.name == "gemma" else expected)  # in float32 inside
    if symmetric and compute == "full":
        half = (actual.ndim - 2) // 2
        axes = [1, 0, *range(2 + half, 2 + 2 * half), *range(2, 2 + half)]
        assert torch.equal(actual, actual.permute(axes))


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(12, 4)).double()


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    symmetric=st.booleans(),
    stays=st.integers(0, 1),
    strip=st.integers(1, 8),
    block=st.integers(1, 8),
    outputs=st.integers(1, 4),
    compute=st.sampled_from(COMPUTES),
    capture=st.sampled_from(["sequential", "autograd"]),
    paired=st.booleans(),
    early=st.sampled_from([0.0, 300.0, inf]),
)
def test_any_layout_gives_the_same_kernel(
    sizes, symmetric, stays, strip, block, outputs, compute, capture, paired, early
):
    model = convolutions()
    sizes = (sizes[0], sizes[0]) if symmetric or paired else sizes
    layout = Layout(sizes, symmetric, 0 if symmetric else stays, strip, block, outputs, early)
    x1, x2 = torch.randn(sizes[0], 1, 5, 4).double(), None if symmetric else torch.randn(sizes[1], 1, 5, 4).double()
    keywords = {"compute": compute, "capture": capture, "paired": paired}
    expected = empirical_ntk(model, x1, x2, **keywords)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "fits", lambda size, device: False)
        patch.setattr(blocks, "choose", lambda *_, **__: layout)
        assert_close(empirical_ntk(model, x1, x2, **keywords), expected)


def test_memory_decides_on_blocks(monkeypatch):
    model, x = convolutions(), torch.randn(40, 1, 5, 4).double()
    whole = empirical_ntk(model, x, compute="trace", capture="autograd")
    seen = []
    monkeypatch.setattr(blocks, "choose", lambda *args, **kw: seen.append(choose(*args, **kw)) or seen[-1])
    for memory in (10**9, "40 kB", "30 kB"):
        assert_close(empirical_ntk(model, x, compute="trace", capture="autograd", memory=memory), whole)
    assert [layout.block < 40 for layout in seen] == [True, True]
    assert seen[1].block < seen[0].block
    with pytest.raises(KernelMemoryError, match=r"The kernel alone takes .* more than memory="):
        empirical_ntk(model, x, memory="30 kB")


@pytest.mark.parametrize("memory", [0, "8 apples", True, 1.5])
def test_memory_that_is_none_is_an_error(memory):
    with pytest.raises((ValueError, TypeError), match="memory must be a positive number of bytes"):
        empirical_ntk(nn.Linear(2, 2), torch.randn(2, 2), memory=memory)


class Mixed(nn.Module):
    """Lets the last samples see one another."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        y = self.linear(x)
        return y + (x[:, :1] > 5) * y.mean(0)


def test_samples_that_influence_one_another_are_found_in_any_block(in_blocks):
    x = torch.randn(9, 3).double()
    x[7, 0] = 6
    with pytest.raises(UnsupportedModelError, match=r"samples influence one another .*x1\[[67]\]"):
        empirical_ntk(Mixed().double(), x)


class Rule(nn.Linear):
    """Computes something else for some samples, which a rule of the user's does not know."""

    def forward(self, x):
        return super().forward(x) * torch.where(x[:, :1] > 5, 2.0, 1.0)


def test_a_rule_that_is_wrong_for_some_samples_falls_back(in_blocks):
    from ggn_ntk import Factored, register_rule

    @register_rule(Rule)
    def rule(module, x, s):
        return {"weight": Factored("cno,ni->cnoi", (s, x)), "bias": Factored("cno->cno", (s,))}

    model = nn.Sequential(Rule(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(9, 3).double()
    x[7, 0] = 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(empirical_ntk(model, x), empirical_ntk(model, x, method="jacobian_contraction"))


@pytest.mark.parametrize("shapes", [False, True], ids=["alike", "other shapes"])
def test_prepared_kernels_take_blocks_again(shapes, in_blocks):
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(6, 3)
    ).double()
    x1, x2 = normal(2, 5)(7).double(), normal(2, 6 if shapes else 5)(5).double()
    kernel = empirical_ntk_fn(model)
    for _ in range(3):
        assert_close(kernel(x1, x2), empirical_ntk(model, x1, x2, method="jacobian_contraction"))
        with torch.no_grad():
            model[0].weight.mul_(1.1)


def test_samples_that_are_not_finite_are_found_in_blocks(in_blocks):
    model, x = convolutions(), torch.randn(7, 1, 5, 4).double()
    x[5, 0, 0, 0] = torch.nan
    with pytest.warns(match=r"x1\[5\]"):
        kernel = empirical_ntk(model, x)
    assert kernel.isnan()[5].all()
    assert kernel[:5, :5].isfinite().all()


def test_several_outputs_and_kernels_by_name_in_blocks(in_blocks):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x):
            return {"u": self.a(x), "v": self.b(x).tanh() * self.a(x)}

    model, x = Two().double(), torch.randn(5, 3).double()
    actual = empirical_ntk(model, x, per_parameter=True)
    expected = empirical_ntk(model, x, per_parameter=True, method="jacobian_contraction")
    for name, by_key in expected.items():
        for key, kernel in by_key.items():
            assert_close(actual[name][key], kernel)


def test_the_cheapest_layout_within_memory_is_chosen():
    axes = AxesRequest.parse("trace", None, None).resolve(torch.Size([10]), torch.Size([10]))
    footprint = [Footprint(evaluated=100, passing=10, held=10, held_by_output=10, formed=100)]
    everything = choose((50, 50), True, axes, footprint, 10**6)
    assert (everything.outputs, len(everything.strips)) == (10, 1)
    less = choose((50, 50), True, axes, footprint, 4000)
    assert less.strip * footprint[0].kept(less.outputs) <= 4000
    assert less.passes(axes, 100).forward > everything.passes(axes, 100).forward == 50
    assert less.passes(axes, 100).backward >= everything.passes(axes, 100).backward == 500
    # Of two sets the small one stays, and the other streams by once.
    assert choose((500, 20), False, axes, footprint, 10**4).stays == 1


def test_jacobians_are_formed_once_where_that_takes_fewer_passes():
    axes = AxesRequest.parse("trace", None, None).resolve(torch.Size([10]), torch.Size([10]))
    footprint = [Footprint(evaluated=5e6, passing=1e6, held=1.6e6, held_by_output=1.7e6, formed=4.5e7)]
    # Two strips take fewer evaluations, but the Jacobians of one are formed for each block of the other again.
    layout = choose((128, 128), True, axes, footprint, 1e9)
    assert (layout.outputs, len(layout.strips)) == (1, 1)
    assert layout.passes(axes, 4.5e7) == (10 * 128, 10 * 128, 10 * 128)
    twice = replace(layout, outputs=2, strip=104, early=0.0)
    assert len(twice.strips) == 2
    assert sum(twice.passes(axes, 4.5e7)[:2]) < sum(layout.passes(axes, 4.5e7)[:2])
    assert sum(twice.passes(axes, 4.5e7)) > sum(layout.passes(axes, 4.5e7))
    assert choose((128, 128), True, axes, footprint, 2e9).outputs == 4
    # Where the small set's Jacobians fit once they are formed, blocks of the large one do not have them formed again.
    kept = Layout((4, 100), False, 0, strip=4, block=10, outputs=10, early=4 * 10 * 7.0)
    assert kept.passes(axes, 7.0).formed == 10 * (4 + 100)
    assert replace(kept, early=0.0).passes(axes, 7.0).formed == 10 * (10 * 4 + 100)


def test_a_strip_that_meets_several_sets_holds_all_outputs():
    axes = AxesRequest.parse("trace", None, None).resolve(torch.Size([10]), torch.Size([10]))
    footprint = [Footprint(evaluated=1000, passing=100, held=100, held_by_output=100, formed=10**5)]
    free, strip = (choose((50, 40), False, axes, footprint, 10**5, x1_stays=held) for held in (False, True))
    assert free.outputs < 10
    assert (strip.stays, strip.outputs) == (0, 10)
    assert strip.strip >= 50


def test_a_layout_is_found_in_no_memory_and_of_many_outputs():
    axes = AxesRequest.parse("full", None, None).resolve(torch.Size([1000]), torch.Size([1000]))
    layout = choose((50, 50), True, axes, [Footprint(100, 10, 10, 10, 100)], memory=-1.0)
    assert (layout.strip, layout.block) == (2, 2)
    assert len(layout.chunks(axes)) <= 2**10


class Slope(nn.Module):
    """A derivative of a network, which lets no hook see what its graph keeps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda u: self.net(u)[0]))(x)


def test_models_with_transforms_inside_are_measured(tmp_path):
    model, x = Slope().double(), torch.randn(40, 1).double()
    expected = empirical_ntk(model, x, method="jacobian_contraction")
    assert_close(empirical_ntk(model, x, memory="60 kB"), expected)
    assert explain(model, x[:3], n1=4000).peak_bytes > explain(model, x[:3], n1=40).peak_bytes
    pytest.importorskip("zarr")
    assert_close(tiled_ntk(model, x, store=tmp_path / "kernel", tile=15).to_torch("cpu"), expected)


def test_three_of_two_hundred_samples_that_see_others_are_found(in_blocks):
    x = torch.randn(200, 3).double()
    x[[17, 80, 151], 0] = 6
    with pytest.raises(UnsupportedModelError, match=r"samples influence one another .*x1\[\d+\]"):
        empirical_ntk(Mixed().double(), x, compute="trace")


@pytest.mark.parametrize("positions", [1, 6])
def test_what_is_gathered_keeps_nothing_of_its_blocks(positions):
    gathered, freed = Gathered(4), []
    for block in (slice(0, 2), slice(2, 4)):
        s, x = torch.randn(3, 2, positions, 2), torch.randn(2, positions, 4)
        for tensor in (s, x):
            weakref.finalize(tensor.untyped_storage(), freed.append, block)
        weight, bias = Factored("cnpo,npi->cnoi", (s, x)), Factored("cnpo->cno", (s,))
        gathered.put(block, [{"weight": [weight], "bias": [bias]}])
        del s, x, tensor, weight, bias
        gc.collect()
        assert freed.count(block) == 2
    assert gathered.steps()[0]["weight"][0].sizes["n"] == 4
