"""Kernels on disk as operators, against the kernels themselves."""

import threading
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import KernelStore, empirical_ntk, tiled_ntk
from ggn_ntk.large import StoreError
from ggn_ntk.models.comparison import relative_error
from ggn_ntk.operators import NTKOperator, StoreOperator, as_matrix
from ggn_ntk.spectrum import eigenvectors
from ggn_ntk.training import kernel_ridge_regression, max_learning_rate

pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")


def network(*outputs):
    torch.manual_seed(0)
    c = torch.Size(outputs).numel()
    last = nn.Unflatten(1, outputs) if outputs else nn.Flatten(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, c), last).double()


def samples(*shape):
    return torch.randn(*shape).double()


class Two(nn.Module):
    """Two outputs with different numbers of axes."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(4, 1)

    def forward(self, x):
        z = torch.tanh(self.body(x))
        return {"mean": self.mean(z).unflatten(1, (3, 2)), "scale": self.scale(z).squeeze(1)}


def check(operator, matrix):
    """Products of an operator and its adjoint, with one and several vectors, and its diagonal."""
    assert operator.shape == matrix.shape
    for a, b in ((operator, matrix), (operator.adjoint(), matrix.T)):
        v = samples(b.shape[1], 2)
        found = a @ v.to(a.device)
        assert found.device == a.device
        assert relative_error(found.cpu(), b @ v) < 1e-12
        assert relative_error((a @ v[:, 0].to(a.device)).cpu(), b @ v[:, 0]) < 1e-12
    if matrix.shape[0] == matrix.shape[1]:
        assert relative_error(operator.diagonal().cpu(), matrix.diagonal()) < 1e-12


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outputs", [(), (2,), (3, 2)])
def test_full_kernels(outputs, symmetric, tmp_path):
    model, x1, x2 = network(*outputs), samples(5, 3), None if symmetric else samples(4, 3)
    store = tiled_ntk(model, x1, x2, store=tmp_path / "k", tile=2 if symmetric else (2, 3))
    operator = StoreOperator(store)
    assert symmetric == operator.SELF_ADJOINT
    assert (operator.adjoint() is operator) == symmetric
    check(operator, as_matrix(store))
    v = samples(5 if symmetric else 4, *outputs, 2)
    assert (operator @ v).allclose(NTKOperator(model, x1, x2) @ v, rtol=1e-10)
    assert (operator @ v[..., 0]).shape == (5, *outputs)


def test_two_sides_of_one_size_have_a_diagonal(tmp_path):
    model, x1, x2 = network(2), samples(7, 3), samples(7, 3)
    check(
        StoreOperator(tiled_ntk(model, x1, x2, store=tmp_path / "k", tile=(2, 3))),
        as_matrix(KernelStore(tmp_path / "k")),
    )
    other = StoreOperator(tiled_ntk(model, x1, x2[:3], store=tmp_path / "other", tile=2))
    with pytest.raises(ValueError, match=r"Only a square operator has a diagonal.*\[7, 2\] and \[3, 2\]"):
        other.diagonal()


ROLES = {
    "trace": ({"compute": "trace"}, ("traced", "traced")),
    "diagonal": ({"compute": "diagonal"}, ("diagonal", "diagonal")),
    "trace_axes": ({"trace_axes": -1}, ("kept", "traced")),
    "diagonal_axes": ({"diagonal_axes": 0}, ("diagonal", "kept")),
    "both": ({"trace_axes": 0, "diagonal_axes": -1}, ("traced", "diagonal")),
}


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_roles_of_outputs(name, symmetric, tmp_path):
    keywords, roles = ROLES[name]
    model, x1, x2 = network(3, 2), samples(4, 3), None if symmetric else samples(3, 3)
    store = tiled_ntk(model, x1, x2, store=tmp_path / "k", tile=3, **keywords)
    kernel = empirical_ntk(model, x1, x2, **keywords)
    check(StoreOperator(store), dense(kernel, roles))


def dense(kernel, roles):
    """The matrix of a kernel of outputs [3, 2], entry by entry."""
    kept = [axis for axis, role in enumerate(roles) if role != "traced"]
    out = [(3, 2)[axis] for axis in kept]
    matrix = torch.zeros(kernel.shape[0], *out, kernel.shape[1], *out).double()
    for c in np.ndindex(*out):
        for d in np.ndindex(*out):
            if all(roles[axis] == "kept" or c[i] == d[i] for i, axis in enumerate(kept)):
                of_second = [d[i] for i, axis in enumerate(kept) if roles[axis] == "kept"]
                entries = kernel[(slice(None), slice(None), *c, *of_second)]
                matrix[(slice(None), *c, slice(None), *d)] = entries
    n = len(out) + 1
    return matrix.flatten(n).flatten(0, n - 1)


def test_several_kernels(tmp_path):
    model, x1 = Two().double(), samples(5, 3)
    for x2, name in ((None, "one"), (samples(3, 3), "two")):
        store = tiled_ntk(model, x1, x2, store=tmp_path / name, tile=2)
        n2 = 5 if x2 is None else 3
        for (a, c), (b, d) in ((p, q) for p in (("mean", 6), ("scale", 1)) for q in (("mean", 6), ("scale", 1))):
            kernel = store[a, b].to_torch()
            matrix = kernel.movedim(1, 3 if a == "mean" else 1).reshape(5 * c, n2 * d)
            operator = StoreOperator(store[a, b])
            assert (x2 is None and a == b) == operator.SELF_ADJOINT
            check(operator, matrix)
        with pytest.raises(TypeError, match=r"holds several kernels: choose one by its key, store\[key\], of \('mean"):
            StoreOperator(store)


PICKS = {
    "0 and 2 axes": (lambda y: y[:, 0, 0], lambda y: y),
    "2 and 0 axes": (lambda y: y, lambda y: y[:, 0, 0]),
    "0 and 1 axes": (lambda y: y[:, 0, 0], lambda y: y[:, 0]),
    "2 and 1 axes": (lambda y: y, lambda y: y[:, 1]),
}


@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("other", [False, True], ids=["one_set", "two_sets"])
def test_outputs_of_different_numbers_of_axes(picks, other, tmp_path):
    """The store says which axes are of x1: sizes alone would not."""
    model, x1, x2 = network(3, 2), samples(5, 3), samples(4, 3) if other else None
    first, second = PICKS[picks]
    store = tiled_ntk(model, x1, x2, store=tmp_path / "k", tile=2, output=PICKS[picks])
    flat = [lambda y, pick=pick: pick(y).reshape(len(y), -1) for pick in (first, second)]
    expected = as_matrix(empirical_ntk(model, x1, x2, output=tuple(flat)))
    for found in (store, KernelStore(tmp_path / "k")):
        check(StoreOperator(found), expected)
        assert relative_error(as_matrix(found), expected) < 1e-12


def test_roles_of_outputs_of_different_numbers_of_axes(tmp_path):
    """Roles are counted from the last axis, of which one output has two and the other one."""
    model, x1, x2, picks = network(3, 2), samples(5, 3), samples(4, 3), (lambda y: y, lambda y: y[:, 1])
    traced = {"output": picks, "trace_axes": -1}
    store = tiled_ntk(model, x1, x2, store=tmp_path / "traced", tile=2, **traced)
    check(StoreOperator(store), empirical_ntk(model, x1, x2, **traced).movedim(1, 2).reshape(15, 4))
    diagonal = {"output": picks, "diagonal_axes": -1}
    store = tiled_ntk(model, x1, x2, store=tmp_path / "diagonal", tile=2, **diagonal)
    matrix = torch.diag_embed(empirical_ntk(model, x1, x2, **diagonal))  # [5, 4, 3, 2, 2]
    check(StoreOperator(store), matrix.permute(0, 2, 3, 1, 4).reshape(30, 8))


def test_several_outputs_of_different_numbers_of_axes(tmp_path):
    """Outputs of one key, with other axes for x1 than for x2."""
    model, x = network(3, 2), samples(5, 3)
    picks = (lambda y: {"a": y[:, 0, 0], "b": y}, lambda y: {"a": y, "b": y[:, 0]})
    store = tiled_ntk(model, x, store=tmp_path / "k", tile=2, output=picks)
    full, chosen = as_matrix(empirical_ntk(model, x)).reshape(5, 6, 5, 6), {1: [0], 2: [0, 1], 6: list(range(6))}
    for a, c in (("a", 1), ("b", 6)):
        for b, d in (("a", 6), ("b", 2)):
            expected = full[:, chosen[c]][..., chosen[d]].reshape(5 * c, 5 * d)
            check(StoreOperator(store[a, b]), expected)


def test_kernels_of_parameters(tmp_path):
    store = tiled_ntk(network(2), samples(5, 3), store=tmp_path / "k", tile=2, per_parameter=True)
    keys = store.keys()
    for key in keys:
        check(StoreOperator(store[key]), as_matrix(store[key]))
    total = StoreOperator(store["0.weight"]) + 2.0 * StoreOperator(store["2.bias"])
    v = samples(10)
    assert (total @ v).allclose((as_matrix(store["0.weight"]) + 2 * as_matrix(store["2.bias"])) @ v)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel of seven samples, three of them in a tile."""
    return tiled_ntk(network(2), samples(7, 3), store=tmp_path_factory.mktemp("store") / "k", tile=3)


@settings(deadline=None, max_examples=10)
@given(
    n1=st.integers(1, 5),
    n2=st.integers(1, 5),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    k=st.integers(0, 3),
)
def test_sizes(n1, n2, tile, k, tmp_path_factory):
    store = tiled_ntk(network(2), samples(n1, 3), samples(n2, 3), store=tmp_path_factory.mktemp("s") / "k", tile=tile)
    v = samples(2 * n2, k)
    torch.testing.assert_close(StoreOperator(store) @ v, as_matrix(store) @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"], indirect=True)
def test_on_a_device(kernel, device):
    operator = StoreOperator(kernel, device=device)
    assert operator.device.type == torch.device(device).type
    check(operator, as_matrix(kernel))


def test_each_tile_is_read_once(kernel):
    """However many vectors; of a symmetric kernel, six of nine; and for its diagonal, three."""
    operator = StoreOperator(kernel)
    with mock.patch.object(KernelStore, "read", autospec=True, side_effect=KernelStore.read) as read:
        operator @ samples(14, 5)
        assert [tuple(call.args[1]) for call in read.call_args_list] == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
        read.reset_mock()
        operator.diagonal()
        assert [tuple(call.args[1]) for call in read.call_args_list] == [(0, 0), (1, 1), (2, 2)]


def test_the_next_tile_is_read_while_one_is_multiplied(kernel):
    """One thread reads, and is never more than a tile ahead."""
    operator, events, read, einsum = StoreOperator(kernel), [], KernelStore.read, torch.einsum
    second = threading.Event()

    def reading(store, tile):
        assert threading.current_thread() is not threading.main_thread()
        events.append("read")
        if events.count("read") == 2:
            second.set()
        return read(store, tile)

    def multiplying(*args):
        assert second.wait(10)  # before the first product is made
        events.append("multiply")
        return einsum(*args)

    with mock.patch.object(KernelStore, "read", reading), mock.patch.object(torch, "einsum", multiplying):
        operator @ samples(14)
    assert events.count("read") == 6
    assert events.count("multiply") == 9
    for place, event in enumerate(events):
        if event == "read":
            assert events[:place].count("read") <= 1 + events[:place].count("multiply")


def test_sums_scalings_and_shifts(kernel):
    operator, matrix, v = StoreOperator(kernel), as_matrix(kernel), samples(14)
    total = 2.0 * operator - 0.5 * operator.identity()
    assert total.SELF_ADJOINT
    assert (total @ v).allclose(2 * matrix @ v - 0.5 * v)
    assert ((operator @ operator) @ v).allclose(matrix @ (matrix @ v))


def test_solvers(kernel):
    from curvlinops import CGInverseLinearOperator
    from scipy.sparse.linalg import cg, eigsh

    operator, matrix, y = StoreOperator(kernel), as_matrix(kernel), samples(14)
    shifted = operator + 0.1 * operator.identity()
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(14).double(), y)
    inverse = CGInverseLinearOperator(shifted, tolerance=1e-10, eps=0, max_iter=100)
    assert relative_error(inverse @ y, expected) < 1e-8
    found, failed = cg(shifted.to_scipy(), y.numpy(), rtol=1e-12)
    assert not failed
    assert relative_error(torch.as_tensor(found), expected) < 1e-8
    values = eigsh(operator.to_scipy(), 3, return_eigenvectors=False)
    assert np.allclose(np.sort(values), torch.linalg.eigvalsh(matrix)[-3:])


def test_in_the_place_of_kernels(kernel, tmp_path):
    model = network(2)
    x_test = samples(3, 3)
    x = samples(7, 3)
    train = tiled_ntk(model, x, store=tmp_path / "train", tile=3)
    cross = tiled_ntk(model, x_test, x, store=tmp_path / "cross", tile=3)
    y = samples(7, 2)
    expected = kernel_ridge_regression(train, y, diag_reg=0.01)(cross)
    found = kernel_ridge_regression(StoreOperator(train), y, diag_reg=0.01)(StoreOperator(cross))
    assert relative_error(found, expected) < 1e-8
    assert max_learning_rate(StoreOperator(train)) == pytest.approx(max_learning_rate(train), rel=1e-10)
    values, _ = eigenvectors(StoreOperator(train), 2)
    assert relative_error(values, torch.linalg.eigvalsh(as_matrix(train))[-2:]) < 1e-10


def test_dtypes_and_settings_of_the_caller(tmp_path):
    store = tiled_ntk(network(2).float(), samples(5, 3).float(), store=tmp_path / "k", tile=2)
    operator, v = StoreOperator(store), torch.randn(10)
    assert operator.dtype == torch.float32
    expected = operator @ v
    assert relative_error(expected, as_matrix(store) @ v) < 1e-6
    with torch.autocast("cpu"), torch.inference_mode():
        assert torch.equal(operator @ v, expected)
    with pytest.raises(ValueError, match=r"must have the dtype of the store, torch.float32, got torch.float64"):
        operator @ v.double()
    with pytest.raises(ValueError, match="requires a gradient"):
        operator @ v.requires_grad_()


def test_stores_that_are_not_complete(tmp_path):
    model, x = network(2), samples(7, 3)
    store = tiled_ntk(model, x, store=tmp_path / "k", tile=2, part=(0, 2))
    with pytest.raises(ValueError, match=r"6 of 16 tiles of .* are missing. The call of tiled_ntk that made"):
        StoreOperator(store)
    operator = StoreOperator(tiled_ntk(model, x, store=tmp_path / "k"))
    (tmp_path / "k" / "c" / "1" / "2" / "0" / "0").unlink()
    with pytest.raises(StoreError, match="2/0/0 is missing: the call that made the store computes it anew"):
        operator @ samples(14)


def test_a_damaged_tile(tmp_path):
    operator = StoreOperator(tiled_ntk(network(2), samples(4, 3), store=tmp_path / "k", tile=2))
    file = tmp_path / "k" / "c" / "0" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged: its checksum is not that of its numbers"):
        operator @ samples(8)


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"store must be a KernelStore, got str. KernelStore\(path\) opens one"):
        StoreOperator("kernel.zarr")
    model, x = network(2), samples(4, 3)
    with pytest.raises(ValueError, match=r"holds pairs of samples alone \(paired=True\), which are no operator"):
        StoreOperator(tiled_ntk(model, x, store=tmp_path / "paired", paired=True))
    store = tiled_ntk(model, x, store=tmp_path / "diagonal", compute="diagonal")
    with pytest.raises(ValueError, match="kernel takes outputs or samples at equal indices, so that it is no matrix"):
        as_matrix(store)
