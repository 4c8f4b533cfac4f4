"""Kernels in tiles, of every form, are those of one call; they go on where they were stopped."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import exchanged, fully_convolutional
from torch import nn
from torch.utils.data import Dataset

from ggn_ntk import (
    KernelMemoryError,
    KernelStore,
    NotFiniteWarning,
    UnsupportedModelError,
    empirical_ntk,
    nngp,
    shared,
    tiled_ntk,
)
from ggn_ntk.contraction import contract
from ggn_ntk.contraction.products import contracted
from ggn_ntk.jacobians.plan import Plan as Planned
from ggn_ntk.large import StoreError, StripError, Tile

pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


class Two(nn.Module):
    """Two outputs, of different shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x):
        z = torch.tanh(self.body(x))
        return {"mean": self.mean(z).unflatten(1, (2, 1)), "scale": self.scale(z).squeeze(1)}


def linear(params, x):
    return torch.tanh(x @ params["w"]) @ params["v"]


def flat(result, keys=()):
    if isinstance(result, torch.Tensor):
        return {keys: result}
    return {k: v for key, part in result.items() for k, v in flat(part, (*keys, key)).items()}


FORMS = {
    **{compute: (network, {"compute": compute}) for compute in ("full", "diagonal", "trace")},
    **{f"paired_{compute}": (network, {"compute": compute, "paired": True}) for compute in ("full", "trace")},
    "parameters": (network, {"per_parameter": True}),
    "modules": (network, {"per_parameter": "module", "compute": "trace"}),
    "params": (network, {"params": "2", "method": "jacobian_contraction"}),
    "picked": (lambda: Two().double(), {"output": lambda out: out["mean"]}),
    "two_picks": (lambda: Two().double(), {"output": (lambda out: out["mean"], lambda out: out["scale"])}),
    "several": (lambda: Two().double(), {}),
    "several_diagonal": (lambda: Two().double(), {"compute": "diagonal"}),
    "several_parameters": (lambda: Two().double(), {"per_parameter": True, "compute": "full"}),
    "function": (lambda: linear, {"params": {"w": torch.ones(3, 2).double(), "v": torch.eye(2).double()}}),
}


@pytest.mark.parametrize(("tile", "symmetric"), [(3, True), (3, False), (1, True)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, tile, symmetric, tmp_path):
    build, keywords = FORMS[form]
    n1 = 3 if tile == 1 else 5
    model, x1 = build(), torch.randn(n1, 3).double()
    x2 = None if symmetric else torch.randn(5 if keywords.get("paired") else 4, 3).double()
    store = tiled_ntk(model, x1, x2, store=tmp_path / "k", tile=tile, **keywords)
    found, expected = flat(store.to_torch()), flat(empirical_ntk(model, x1, x2, **keywords))
    assert store.complete
    assert found.keys() == expected.keys()
    for keys, kernel in expected.items():
        assert found[keys].dtype == kernel.dtype
        torch.testing.assert_close(found[keys], kernel, rtol=1e-12, atol=1e-12)


ROLES = [("kept", "traced", "diagonal"), ("kept", "kept", "traced"), ("diagonal", "kept", "kept"), ("kept",) * 3]


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_axes_of_a_symmetric_kernel_are_exchanged_to_the_last_bit(roles, kind, tmp_path):
    model, x = fully_convolutional(), torch.randn(4, 1, 5, 4).double()
    names = {"trace_axes": "traced", "diagonal_axes": "diagonal"}
    axes = {key: [axis for axis, role in enumerate(roles) if role == wanted] for key, wanted in names.items()}
    found = tiled_ntk(model, x, store=tmp_path / "k", kernel=kind, tile=3, **axes).to_torch()
    assert torch.equal(found, exchanged(found, roles))
    expected = {"ntk": empirical_ntk, "nngp": nngp}[kind](model, x, **axes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_pairs_of_outputs_are_exchanged_to_the_last_bit(tmp_path):
    store = tiled_ntk(Two(), torch.randn(5, 3), store=tmp_path / "k", tile=2)
    assert store.keys() == [(a, b) for a in ("mean", "scale") for b in ("mean", "scale")]
    kernel, other = store["mean", "scale"].to_torch(), store["scale", "mean"].to_torch()
    assert kernel.shape == (5, 5, 2, 1)
    assert torch.equal(kernel, other.permute(1, 0, 2, 3))
    whole = store["mean", "mean"].to_torch()
    assert torch.equal(whole, whole.permute(1, 0, 4, 5, 2, 3))


def test_numbers_do_not_depend_on_the_size_of_tiles(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)), torch.randn(12, 1, 8, 8)
    whole = empirical_ntk(model, x, compute="trace")
    for tile in (1, 5, 6, 12):
        found = tiled_ntk(model, x, store=tmp_path / str(tile), tile=tile, compute="trace").to_torch()
        assert torch.equal(found, found.T)
        assert (found - whole).norm() <= 1e-6 * whole.norm()


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("symmetric", [True, False])
def test_samples_of_a_strip_are_evaluated_once(symmetric, tmp_path, monkeypatch):
    model, x1, x2 = convolutions(), torch.randn(6, 1, 6, 6), None if symmetric else torch.randn(5, 1, 6, 6)
    evaluated, evaluate, here = [], Planned.evaluate, False

    def counted(self, inputs):
        if here:
            evaluated.append(len(inputs))
        return evaluate(self, inputs)

    def progress(done, total):
        nonlocal here
        here = done > 0  # what the first tile takes looks at a few samples, too
        evaluated.append(None)

    monkeypatch.setattr(Planned, "evaluate", counted)
    store = tiled_ntk(model, x1, x2, store=tmp_path / "k", tile=2, progress=progress)
    torch.testing.assert_close(store.to_torch(), empirical_ntk(model, x1, x2))
    assert store.plan.block == 2
    first = [None, None]
    if symmetric:  # a tile alone evaluates its samples as a call does
        assert evaluated[:9] == [*first, 2, None, 2, None, 2, None, 2]
    else:
        assert evaluated == [*first, 2, None, 1, None, *([2, 2, None, 2, None, 1, None] * 2)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_jacobians_of_a_strip_are_formed_once(symmetric, tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(128, 3)).double()
    x1, x2 = torch.randn(20, 1, 12, 12).double(), None if symmetric else torch.randn(15, 1, 12, 12).double()
    formed = []
    monkeypatch.setattr(contract, "contracted", lambda *args: formed.append(contracted(*args)) or formed[-1])
    store = tiled_ntk(model, x1, x2, compute="trace", tile=5, store=tmp_path / "k")
    torch.testing.assert_close(store.to_torch(), empirical_ntk(model, x1, x2, compute="trace"))
    strips = 3 if symmetric else 4  # the last tile of a symmetric kernel is a call of its own
    weights = [jacobian for jacobian in formed if len(jacobian.result) == 6]  # of the second convolution
    assert len(weights) == strips
    assert all(len(jacobian.operands) == 1 for jacobian in weights)


def test_what_is_kept_has_to_fit(tmp_path):
    model, x = convolutions(), torch.randn(60, 1, 6, 6)
    keywords = {"tile": 20, "compute": "trace"}
    kept = tiled_ntk(model, x, store=tmp_path / "kept", **keywords)
    again = tiled_ntk(model, x, store=tmp_path / "again", memory="25 KiB", **keywords)
    assert kept.plan.block == 20
    assert again.plan.block is None
    assert "samples of x1 are kept while x2 streams by" in str(kept.plan)
    assert "each tile evaluates its samples" in str(again.plan)
    # Jacobians are formed once in little memory, too; how a set meets itself may differ
    assert kept.plan.cost.contraction > 0
    assert again.plan.cost.contraction == pytest.approx(kept.plan.cost.contraction, rel=0.1)
    assert again.plan.cost.evaluation > kept.plan.cost.evaluation
    assert KernelStore(tmp_path / "kept").plan == kept.plan
    torch.testing.assert_close(kept.to_torch(), again.to_torch())


class Beyond(nn.Module):
    """Samples see one another where one is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) + (x * (x > 100)).sum()


@pytest.mark.parametrize("of", ["x1", "x2"])
def test_samples_of_every_tile_are_verified(of, tmp_path):
    x1, x2 = torch.randn(6, 3), torch.randn(6, 3)
    {"x1": x1, "x2": x2}[of][5] = 101
    with pytest.raises(StripError, match="samples influence one another") as info:
        tiled_ntk(Beyond(), x1, x2, store=tmp_path / "k", tile=2)
    assert info.value.errors.keys() == ({2} if of == "x1" else {0, 1, 2})
    assert len(KernelStore(tmp_path / "k").missing()) == 3


def test_samples_without_a_jacobian_are_left_out(tmp_path):
    model, x = network(), torch.randn(6, 3).double()
    x[4] = torch.inf
    with pytest.warns(NotFiniteWarning):
        found = tiled_ntk(model, x, store=tmp_path / "k", tile=2).to_torch()
    with pytest.warns(NotFiniteWarning):
        expected = empirical_ntk(model, x)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_wider_sums(tmp_path):
    model, x = network().float(), torch.randn(4, 3)
    options = {"tile": 3, "dtype": torch.float64}
    found = tiled_ntk(model, x, store=tmp_path / "k", **options).to_torch()
    parts = empirical_ntk(model, x, per_parameter=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, sum(part.double() for part in parts.values()), rtol=1e-6, atol=1e-6)
    modules = tiled_ntk(model, x, store=tmp_path / "m", per_parameter="module", **options)
    torch.testing.assert_close(modules["0"].to_torch() + modules["2"].to_torch(), found, rtol=1e-12, atol=0)
    narrow = tiled_ntk(network(), x.double(), store=tmp_path / "n", dtype="float32")
    assert narrow.dtype == np.float32


# ---------------------------------------------------------------- going on


def stop_after(tiles):
    def progress(done, total):
        if done >= tiles:
            raise KeyboardInterrupt

    return progress


def test_what_was_stopped_goes_on(tmp_path, capsys):
    model, x = network(), torch.randn(7, 3).double()
    whole = tiled_ntk(model, x, store=tmp_path / "whole", tile=2).to_torch()
    counts = []
    go_on = partial(tiled_ntk, model, x, store=tmp_path / "k", tile=2)
    for tiles in (1, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            go_on(progress=stop_after(tiles))
    printed = capsys.readouterr().err
    assert "Stopped: KernelStore(" in printed
    assert f"the same call, tiled_ntk(..., store='{tmp_path}/k'), goes on with those that are missing" in printed
    partly = KernelStore(tmp_path / "k")
    assert not partly.complete
    assert partly.missing() == [Tile(2, 2), Tile(2, 3), Tile(3, 2), Tile(3, 3)]
    assert "12 of 16 tiles" in repr(partly)
    assert np.isnan(partly[5:, 6]).all()
    assert torch.equal(partly.to_torch()[:4], whole[:4])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "k").rglob("c/**/0")}
    store = go_on(progress=lambda *count: counts.append(count))
    assert counts == [(7, 10), (8, 10), (9, 10), (10, 10)]
    assert {file: file.stat().st_mtime_ns for file in before} == before  # nothing is computed twice
    assert torch.equal(store.to_torch(), whole)
    assert tiled_ntk(model, x, store=tmp_path / "k").complete  # without tile=, that of the store
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("tiles", [1, 2, 4, 5])
def test_a_strip_that_goes_on_is_the_same_to_the_last_bit(tiles, tmp_path):
    model, x1, x2 = convolutions(), torch.randn(7, 1, 6, 6), torch.randn(8, 1, 6, 6)
    call = partial(tiled_ntk, model, x1, x2, tile=(4, 3))
    with pytest.raises(KeyboardInterrupt):
        call(store=tmp_path / "k", progress=stop_after(tiles))
    assert torch.equal(call(store=tmp_path / "k").to_torch(), call(store=tmp_path / "whole").to_torch())


def test_parts(tmp_path):
    model, x = network(), torch.randn(7, 3).double()
    for i in range(3):
        store = tiled_ntk(model, x, store=tmp_path / "k", tile=2, part=(i, 3))
        assert store.complete == (i == 2)
    assert torch.equal(store.to_torch(), tiled_ntk(model, x, store=tmp_path / "whole", tile=2).to_torch())


def test_overwrite(tmp_path):
    model, x = network(), torch.randn(4, 3).double()
    tiled_ntk(model, x, store=tmp_path / "k", tile=2)
    store = tiled_ntk(model, x + 1, store=tmp_path / "k", tile=3, overwrite=True)
    torch.testing.assert_close(store.to_torch(), empirical_ntk(model, x + 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="is no store of a kernel"):
            tiled_ntk(model, x, store=tmp_path / "other", **options)
    assert (tmp_path / "other" / "thesis.tex").exists()


def other_version(path, **changes):
    text = json.loads((path / "zarr.json").read_text())
    text["attributes"]["ggn_ntk"].update(changes)
    (path / "zarr.json").write_text(json.dumps(text))


def test_what_was_made_of_something_else_is_refused(tmp_path):
    path = tmp_path / "k"
    model, x1, x2 = network(), torch.randn(4, 3).double(), torch.randn(3, 3).double()
    keywords = {"store": path, "tile": 2, "output": lambda out: out[:, :1]}
    tiled_ntk(model, x1, x2, **keywords)

    def refused(match, *args, **others):
        with pytest.raises(ValueError, match="(?s)was made of something else.*" + match):
            tiled_ntk(*(args or (model, x1, x2)), **{**keywords, **others})

    refused("compute: 'full' there, 'trace' here", compute="trace")
    refused("keyword output", output=lambda out: out[:, 1:])
    refused("keyword dtype: None there, 'float32' here", dtype="float32")
    refused("kernel: 'ntk' there, 'nngp' here", kernel="nngp")
    refused("other parameters are summed over: 0.bias, 0.weight", params="2")
    refused(r"tile: \(2, 2\) there, \(1, 1\) here", tile=1)
    refused("other data: x2", model, x1, x2 + 1e-12)
    refused("other data: x1", model, x1.flip(0), x2)
    refused("other data: x2", model, x1)
    refused("another model", nn.Sequential(model[0], nn.Sigmoid(), model[2]), x1, x2)
    with torch.no_grad():
        model[2].bias[0] += 1e-9
    refused(r"other weights: 2\.bias\n")
    with torch.no_grad():
        model[2].bias[0] -= 1e-9
    model.eval()
    refused("another model")
    model.train()
    versions = KernelStore(path).info["versions"]
    other_version(path, versions={**versions, "torch": "1.0"})
    refused("version torch: '1.0' there")
    other_version(path, versions=versions, format=0)
    with pytest.raises(ValueError, match="in format 0, and this one reads format 3"):
        tiled_ntk(model, x1, x2, **keywords)
    other_version(path, format=3)
    assert tiled_ntk(model, x1, x2, **keywords).complete  # nothing is lost


def test_damaged_tiles(tmp_path):
    model, x = network(), torch.randn(4, 3).double()
    store = tiled_ntk(model, x, store=tmp_path / "k", tile=2)
    whole, (file, other) = store.to_torch(), [tmp_path / "k" / "c" / str(i) / "1" / "0" / "0" for i in (0, 1)]
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"verify .* says which. A tile is damaged: its checksum"):
        store[0]
    assert torch.equal(torch.from_numpy(store[2:]), whole[2:])
    other.write_bytes(other.read_bytes()[:7])
    with pytest.raises(StoreError, match="has 7 bytes instead of"):
        tiled_ntk(model, x, store=tmp_path / "k")
    problems = store.verify()
    assert problems.keys() == {Tile(0, 1), Tile(1, 1)}
    assert f"{file} is damaged: its checksum" in problems[Tile(0, 1)]
    file.unlink()
    other.unlink()
    assert store.verify() == {Tile(0, 1): "missing", Tile(1, 1): "missing"}
    assert torch.equal(tiled_ntk(model, x, store=tmp_path / "k").to_torch(), whole)


@pytest.mark.parametrize("number", [28, 30], ids=["disk_full", "read_only"])
def test_what_cannot_be_written_is_an_error_and_nothing_is_lost(number, tmp_path, monkeypatch):
    from ggn_ntk.large import arrays

    model, x = network(), torch.randn(4, 3).double()
    go_on, write = partial(tiled_ntk, model, x, store=tmp_path / "k", tile=2), arrays.os.fsync
    with pytest.raises(KeyboardInterrupt):
        go_on(progress=stop_after(1))

    def fails(descriptor):
        raise OSError(number, arrays.os.strerror(number))

    monkeypatch.setattr(arrays.os, "fsync", fails)
    with pytest.raises(StoreError, match=r"tile \(1, 0\) cannot be written .* the same call goes on") as info:
        go_on()
    assert info.value.errno == number
    monkeypatch.setattr(arrays.os, "fsync", write)
    assert len(KernelStore(tmp_path / "k").missing()) == 3
    assert not list(tmp_path.rglob(".*"))
    assert not np.isnan(go_on()).any()


# ---------------------------------------------------------------- what reads it


def test_others_read_it(tmp_path):
    zarr, dask_array = pytest.importorskip("zarr"), pytest.importorskip("dask.array")
    model, x = network(), torch.randn(5, 3).double()
    store = tiled_ntk(model, x, store=tmp_path / "k", tile=2)
    kernel = empirical_ntk(model, x).numpy()
    array = zarr.open_array(tmp_path / "k", mode="r")
    assert array.metadata.dimension_names == ("x1", "x2", "out0", "out1")
    assert array.chunks == (2, 2, 2, 2)
    for found in (
        array[:],
        np.asarray(store),
        store.to_dask().compute(),
        dask_array.from_zarr(tmp_path / "k").compute(),
    ):
        np.testing.assert_allclose(found, kernel, rtol=1e-12, atol=1e-12)
    assert store.to_dask().chunks[0] == (2, 2, 1)
    assert np.asarray(store, dtype=np.float32).dtype == np.float32
    assert store.shape == (5, 5, 2, 2)
    assert len(store) == 5
    with pytest.raises(IndexError):
        store[7]


def test_several_kernels_are_read_by_key(tmp_path):
    zarr = pytest.importorskip("zarr")
    model, x = Two(), torch.randn(4, 3)
    store = tiled_ntk(model, x, store=tmp_path / "k", per_parameter=True, compute="diagonal")
    assert store["body.weight"].keys() == ["mean", "scale"]
    assert store["body.weight"]["mean"].shape == (4, 4, 2, 1)
    assert store.dtype["mean.bias"] == {"mean": np.float32, "scale": np.float32}
    group = zarr.open_group(tmp_path / "k", mode="r")
    assert group["body.weight;mean"].attrs["keys"] == ["body.weight", "mean"]
    with pytest.raises(KeyError, match=r"has no kernel 'std'. It has: 'mean', 'scale'"):
        store["body.weight"]["std"]
    with pytest.raises(TypeError, match="holds several kernels"):
        np.asarray(store)
    assert KernelStore(tmp_path / "k")["body.bias"]["scale"][:2].shape == (2, 4)


def test_missing_stores(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no store"):
        KernelStore(tmp_path / "k")
    with pytest.raises(ValueError, match="is no store of a kernel"):
        KernelStore(tmp_path)


# ---------------------------------------------------------------- samples


class Images(Dataset):
    """Counts what is loaded."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.loaded = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.loaded.append(i)
        return {"image": self.x[i], "label": i}


def test_a_data_set_is_loaded_strip_by_strip(tmp_path):
    model, x1, x2 = network(), torch.randn(40, 3).double(), torch.randn(5, 3).double()
    rows, columns = Images(x1), Images(x2)
    last, seen = [], []

    def progress(done, total):
        last.append(done)
        seen.append(set(rows.loaded))

    keywords = {"store": tmp_path / "k", "tile": 4, "input": lambda item: item["image"]}
    store = tiled_ntk(model, rows, columns, progress=progress, **keywords)
    np.testing.assert_allclose(store, empirical_ntk(model, x1, x2).numpy(), rtol=1e-12, atol=1e-12)
    looked_at = seen[0]
    assert len(looked_at) == 16
    assert seen[2] == looked_at | set(range(4))
    with pytest.raises(ValueError, match="other data: x1"):
        tiled_ntk(model, Images(x1 + 1), columns, **keywords)


def test_inputs_of_all_kinds(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, scale, power=1):
            return (self.layer(x) * scale) ** power

    model, scale = Model(), shared(torch.tensor([2.0, 3.0]))
    x = torch.randn(5, 3)
    expected = empirical_ntk(model, {"x": x, "scale": scale, "power": 2})
    for name, given in {
        "mapping": {"x": x, "scale": scale, "power": 2},
        "tuple": (x, scale, 2),
    }.items():
        found = tiled_ntk(model, given, store=tmp_path / name, tile=2).to_torch()
        torch.testing.assert_close(found, expected)
    items = [{"x": row, "scale": scale.value, "power": 2} for row in x]
    found = tiled_ntk(model, items, store=tmp_path / "items", tile=2, input=lambda item: item).to_torch()
    torch.testing.assert_close(found, expected)


def test_bad_samples(tmp_path):
    model, x = network(), torch.randn(4, 3).double()

    def refused(error, match, x1, x2=None, **keywords):
        with pytest.raises(error, match=match):
            tiled_ntk(model, x1, x2, store=tmp_path / "k", **keywords)
        assert not (tmp_path / "k").exists()

    refused(TypeError, "x1 must be a tensor", list(x))
    refused(
        TypeError, "input= picks the model's input of an item, so x1 must be a data set", x, input=lambda item: item
    )
    refused(TypeError, "x1 must be a tensor", 3)
    refused(ValueError, "must share their leading axis", (x, x[:2]))
    refused(ValueError, "requires a gradient", x.clone().requires_grad_())
    refused(ValueError, r"len\(x1\) is 0", Images(x[:0]))
    refused(ValueError, "they must be of one size, got 4 and 3", x, x[:3], paired=True)
    refused(ValueError, "is torch.float32, the model's parameters torch.float64", x.float())

    class Random(Images):
        def __getitem__(self, i):
            return self.x[i] + torch.rand(3)

    refused(ValueError, r"x1\[0\] is another each time that it is loaded", Random(x))

    class Pairs(Images):
        def __getitem__(self, i):
            return self.x[i], i

    refused(TypeError, r"x1\[0\] is a tuple: pass input=", Pairs(x))


def test_a_failing_strip_is_tried_twice_and_the_others_are_computed(tmp_path):
    model, x = network(), torch.randn(5, 3).double()
    tried = []

    class Ragged(Images):
        def __getitem__(self, i):
            tried.append(i)
            return self.x[i, : 2 + (i != 3)]

    with pytest.raises(StripError, match=r"(?s)1 of 3 strips .* 1: ValueError: Samples of x1 must have one") as info:
        tiled_ntk(model, Ragged(x), x, store=tmp_path / "k", tile=2)
    assert isinstance(info.value.errors[1], ValueError)
    assert tried.count(3) == 4
    store = KernelStore(tmp_path / "k")
    assert {tile.row for tile in store.missing()} == {1}
    assert not np.isnan(store[4:]).any()


# ---------------------------------------------------------------- what is refused


def test_bad_arguments(tmp_path):
    model, x = network(), torch.randn(4, 3).double()

    def refused(error, match, **keywords):
        with pytest.raises(error, match=match):
            tiled_ntk(model, x, **{"store": tmp_path / "k", **keywords})
        assert not (tmp_path / "k").exists()

    refused(ValueError, "kernel must be one of 'ntk', 'nngp', got 'gp'", kernel="gp")
    refused(ValueError, "go with kernel='ntk' alone", kernel="nngp", check=True)
    refused(ValueError, "interacting=True takes a whole batch", interacting=True)
    refused(ValueError, "compute must be one of", compute="all")
    refused(ValueError, "tile must be a positive integer", tile=0)
    refused(ValueError, "tile must be as many samples of x1 as of x2", tile=(2, 3))
    refused(ValueError, r"part must be \(i, n\) with 0 <= i < n, got \(2, 2\)", part=(2, 2))
    refused(TypeError, r"part must be \(i, n\)", part=1)
    refused(ValueError, "overwrite=True would remove", part=(0, 2), overwrite=True)
    refused(ValueError, "dtype must be torch.float32, torch.float64 or None", dtype=torch.float16)
    refused(ValueError, "memory must be a positive number of bytes", memory="much")
    refused(TypeError, "progress must be True, False, None or a callable", progress=1)
    refused(TypeError, "executor must be a concurrent.futures.Executor", executor=3)
    refused(ValueError, "devices must be a list", devices="cpu")
    refused(KernelMemoryError, "A tile of 4 x 4 samples takes at least .*, and memory= allows", memory=100, tile=4)
    refused(KernelMemoryError, "A tile of 1 x 1 samples takes", memory=100)
    refused(UnsupportedModelError, "returns tuple", output=lambda out: (out, 3))


def test_a_kernel_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(KernelMemoryError, match=r"and the disk of .* has 0.0 MiB left"):
        tiled_ntk(network(), torch.randn(4, 3).double(), store=tmp_path / "k")


def test_memory_decides_on_tiles(tmp_path):
    model, x = nn.Linear(50, 2), torch.randn(64, 50)
    large = tiled_ntk(model, x, store=tmp_path / "large", memory="1GiB")
    small = tiled_ntk(model, x, store=tmp_path / "small", memory="64 KiB")
    assert large.plan.tile == (64, 64)
    assert small.plan.tile[0] < 32
    assert 4 * small.plan.tile_bytes < 2**16
    torch.testing.assert_close(large.to_torch(), small.to_torch())
    lines = str(small.plan).splitlines()
    assert lines[0].startswith("kernel of 64 x 64 samples")
    assert "tiles are computed" in lines[2]
