"""Spectra and alignments: by definition, by matrices with known spectra, and against ViViT's GGN eigenvalues."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from backpack import backpack, extend
from cases import BY_NAME, mlp
from scipy.sparse.linalg import aslinearoperator
from torch import nn
from torch.nn import functional as F
from vivit.linalg.eigh import EighComputation

from ggn_ntk import empirical_ntk
from ggn_ntk.spectrum import (
    as_matrix,
    centered_kernel_alignment,
    condition_number,
    effective_rank,
    eigenvalues,
    eigenvectors,
    ggn_eigenvalues,
    kernel_target_alignment,
    lanczos,
    relative_kernel_change,
)

# linear_operator, which curvlinops imports, with torch 2.14
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def with_spectrum(values, out=(), seed=0):
    """A kernel with given eigenvalues: [N, N, *out, *out]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    c = math.prod(out)
    n = len(values) // c
    kernel = ((basis * values) @ basis.T).reshape(n, c, n, c).transpose(1, 2)
    return kernel.reshape(n, n, *out, *out)


def random_kernel(n, out=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, math.prod(out), 50, dtype=torch.float64, generator=generator)
    return torch.einsum("ncp,mdp->nmcd", features, features).reshape(n, n, *out, *out)


@pytest.mark.parametrize("out", [(), (2,), (2, 2), (1, 4)], ids=str)
def test_eigenvalues_are_those_of_the_flattened_kernel(out):
    expected = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0]
    values = eigenvalues(with_spectrum(expected, out))
    assert values.tolist() == pytest.approx(expected)
    assert values.dtype == torch.float64


@pytest.mark.parametrize("small", [1000, 5], ids=["eigh", "lanczos"])
@pytest.mark.parametrize("out", [(), (2,), (5, 2)], ids=str)
def test_eigenvectors(out, small, monkeypatch, device):
    monkeypatch.setattr(lanczos, "_SMALL", small)
    expected = [1.05**i for i in range(50)]
    kernel = with_spectrum(expected, out).to(device)
    matrix = as_matrix(kernel)
    for k in (1, 3, 50, None):
        values, vectors = eigenvectors(kernel, k)
        assert values.shape == (k or 50,)
        assert vectors.shape == (50 // math.prod(out), *out, k or 50)
        assert values.dtype == vectors.dtype == torch.float64
        assert values.device == vectors.device == kernel.device
        assert values.tolist() == pytest.approx(expected[-(k or 50) :], abs=1e-12)
        columns = vectors.reshape(50, -1)
        assert torch.allclose(matrix @ columns, columns * values, atol=1e-10)
        assert torch.allclose((columns.T @ columns).cpu(), torch.eye(k or 50).double(), atol=1e-12)
        if k:
            assert eigenvalues(kernel, k).tolist() == pytest.approx(values.tolist(), abs=1e-12)
    assert torch.equal(eigenvalues(kernel, 2), eigenvalues(kernel, 2))
    assert eigenvalues(kernel.float(), 2).dtype == torch.float32
    assert not eigenvectors(kernel.requires_grad_(), 2).vectors.requires_grad


@pytest.mark.parametrize("kind", ["scipy", "curvlinops"])
def test_eigenpairs_of_operators(kind):
    from curvlinops.examples import TensorLinearOperator

    kernel = with_spectrum([1.1**i for i in range(30)], (2,))
    matrix = as_matrix(kernel)
    operator = aslinearoperator(matrix.numpy()) if kind == "scipy" else TensorLinearOperator(matrix)
    for k in (1, 4, 30):
        values, vectors = eigenvectors(operator, k)
        assert torch.allclose(values, eigenvalues(kernel)[-k:])
        assert vectors.shape == (30, k)
        assert torch.allclose(matrix @ vectors, vectors * values, atol=1e-9)
    assert torch.equal(eigenvalues(operator, 4), eigenvectors(operator, 4).values)
    assert eigenvalues(aslinearoperator(np.zeros((9, 9))), 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match="k must be given for an operator: how many of its 30 eigenvalues to compute"):
        eigenvalues(operator)
    with pytest.raises(ValueError, match="kernel must be symmetric, the kernel of a set with itself: u K v and v K u"):
        eigenvectors(aslinearoperator(matrix.triu().numpy()), 1)


def test_eigenpairs_of_a_store():
    class Store:
        def to_torch(self, device=None):
            return with_spectrum([1.0, 2.0, 3.0, 4.0], (2,))

    for values in (eigenvalues(Store()), eigenvectors(Store()).values):
        assert values.tolist() == pytest.approx([1, 2, 3, 4])
    assert as_matrix(Store()).shape == (4, 4)
    assert condition_number(Store()) == pytest.approx(4)
    assert centered_kernel_alignment(Store(), Store()) == pytest.approx(1)
    assert relative_kernel_change(Store(), Store()) == 0
    assert ggn_eigenvalues(Store(), reduction="sum").tolist() == pytest.approx([2, 4, 6, 8])
    assert ggn_eigenvalues(Store(), k=2).tolist() == pytest.approx([1.5, 2])
    assert kernel_target_alignment(Store(), torch.ones(2, 2)) > 0


def test_eigenvalues_keep_dtype_and_device(device):
    kernel = with_spectrum([1.0, 2.0, 3.0, 4.0], (2,)).to(device, torch.float32).requires_grad_()
    values = eigenvalues(kernel)
    assert values.dtype == torch.float32
    assert values.device == kernel.device
    assert not values.requires_grad
    assert values.tolist() == pytest.approx([1, 2, 3, 4], rel=1e-5)
    assert condition_number(kernel) == pytest.approx(4, rel=1e-5)
    assert eigenvalues(kernel.bfloat16()).dtype == torch.bfloat16


def test_negative_eigenvalues_are_reported_relative_to_rounding():
    kernel = torch.diag(torch.tensor([-1e-15, 1.0, 2.0, 3.0]).double())
    message = (
        r"1 of 4 eigenvalues are negative, down to -1\.00e-15, 0\.12 times the rounding of a torch.float64 kernel, "
        r"10 eps \|K\| = 8\.31e-15: zero up to rounding\."
    )
    with pytest.warns(UserWarning, match=message) as caught:
        values = eigenvalues(kernel)
    assert values[0] < 0
    assert Path(caught[0].filename).name == Path(__file__).name
    with pytest.warns(UserWarning, match=r"2 of 4 .* -1\.00e\+00, .* so the kernel is not positive semi-definite"):
        eigenvalues(with_spectrum([-1.0, -0.5, 2.0, 3.0]))


def test_condition_number():
    assert condition_number(with_spectrum([0.5, 1.0, 2.0, 8.0], (2,))) == pytest.approx(16)
    assert condition_number(with_spectrum([0.5, 1.0, 2.0, 8.0]).float()) == pytest.approx(16, rel=1e-5)
    assert condition_number(torch.diag(torch.tensor([0.0, 1.0]))) == math.inf
    assert condition_number(torch.ones(3, 3)) > 1e15


@pytest.mark.parametrize("definition", ["entropy", "participation"])
def test_effective_rank_of_flat_spectra_is_the_rank(definition):
    for rank in (1, 3, 8):
        kernel = with_spectrum([0.0] * (8 - rank) + [2.5] * rank, (2,))
        assert effective_rank(kernel, definition) == pytest.approx(rank)
    kernel = random_kernel(5, (2,))
    assert effective_rank(3 * kernel, definition) == pytest.approx(effective_rank(kernel, definition))


def test_effective_rank_by_definition():
    kernel = with_spectrum([1.0, 2.0, 5.0])
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert effective_rank(kernel) == pytest.approx(math.exp(entropy))
    assert effective_rank(kernel, "participation") == pytest.approx(64 / 30)
    assert effective_rank(kernel, "participation") < effective_rank(kernel, "entropy")


def test_target_alignment_by_definition():
    torch.manual_seed(0)
    y = torch.randn(4, 3).double()
    full, one = random_kernel(4, (3,)), random_kernel(4)
    target = torch.einsum("nc,md->nmcd", y, y)
    expected = (full * target).sum() / (full.norm() * target.norm())
    assert kernel_target_alignment(full, y) == pytest.approx(expected.item())
    expected = (one * (y @ y.T)).sum() / (one.norm() * (y @ y.T).norm())
    assert kernel_target_alignment(one, y) == pytest.approx(expected.item())
    assert kernel_target_alignment(target, y) == pytest.approx(1)
    assert kernel_target_alignment(7 * (y @ y.T), -2 * y) == pytest.approx(1)
    assert kernel_target_alignment(y[:, :1] @ y[:, :1].T, y[:, 0]) == pytest.approx(1)
    orthogonal = torch.linalg.qr(y[:, :2])[0]
    assert kernel_target_alignment(orthogonal[:, :1] @ orthogonal[:, :1].T, orthogonal[:, 1]) == pytest.approx(
        0, abs=1e-12
    )


def test_target_alignment_with_some_axes():
    """Targets are traced and diagonal where the kernel is."""
    torch.manual_seed(0)
    y, full = torch.randn(4, 2, 3).double(), random_kernel(4, (2, 3))
    for keywords, equation in (
        ({}, "nmabab->nm"),
        ({}, "nmabab->nmab"),
        ({"trace_axes": 1}, "nmabxb->nmax"),
        ({"diagonal_axes": [-1]}, "nmabxb->nmabx"),
        ({"trace_axes": (0,), "diagonal_axes": 1}, "nmabab->nmb"),
    ):
        kernel, target = (torch.einsum(equation, k) for k in (full, torch.einsum("nab,mxy->nmabxy", y, y)))
        expected = (kernel * target).sum() / kernel.norm() / target.norm()
        assert kernel_target_alignment(kernel, y, **keywords) == pytest.approx(expected.item())
        assert relative_kernel_change(kernel, 1.5 * kernel) == pytest.approx(0.5)


def test_centred_alignment_by_definition():
    torch.manual_seed(0)
    n, c = 4, 3
    first, second = random_kernel(n, (c,)), random_kernel(n, (c,), seed=1)
    centring = torch.kron(torch.eye(n) - torch.ones(n, n) / n, torch.eye(c)).double()
    a, b = (centring @ k.permute(0, 2, 1, 3).reshape(n * c, n * c) @ centring for k in (first, second))
    expected = ((a * b).sum() / (a.norm() * b.norm())).item()
    assert centered_kernel_alignment(first, second) == pytest.approx(expected)
    assert centered_kernel_alignment(second, first) == pytest.approx(expected)
    assert centered_kernel_alignment(first, 3 * first) == pytest.approx(1)


def test_centred_alignment_ignores_the_mean():
    """A kernel of features does not change its centred alignment when the features are shifted."""
    torch.manual_seed(0)
    features, other = torch.randn(6, 4).double(), random_kernel(6)
    shifted = features + torch.randn(4).double()
    expected = centered_kernel_alignment(features @ features.T, other)
    assert centered_kernel_alignment(shifted @ shifted.T, other) == pytest.approx(expected)


def test_relative_change():
    before = random_kernel(4, (2,))
    assert relative_kernel_change(before, before) == 0
    assert relative_kernel_change(before, 1.5 * before) == pytest.approx(0.5)
    after = random_kernel(4, (2,), seed=1)
    assert relative_kernel_change(before, after) == pytest.approx(((after - before).norm() / before.norm()).item())
    assert relative_kernel_change(torch.ones(2, 3), torch.zeros(2, 3)) == 1
    assert relative_kernel_change(before.float(), before) < 1e-7


def test_the_kernel_moves_when_the_network_learns():
    torch.manual_seed(0)
    model, x, y = mlp(nn.Tanh)().double(), torch.randn(8, 5).double(), F.one_hot(torch.arange(8) % 3).double()
    before = empirical_ntk(model, x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    after = empirical_ntk(model, x)
    assert relative_kernel_change(before, after) > 0.1
    assert kernel_target_alignment(after, y) > kernel_target_alignment(before, y)


# ---------------------------------------------------------------- the GGN


@pytest.mark.parametrize("name", ["mlp_Tanh", "conv2d", "tutorial_cnn_small", "mlp_one_output", "linear"])
def test_eigenvalues_of_the_ggn_against_vivit(name, monkeypatch):
    """The loss is MSELoss with reduction "mean", as ViViT asks for. It calls a method that torch no longer has."""
    monkeypatch.setattr(torch.Tensor, "symeig", lambda matrix, eigenvectors: torch.linalg.eigh(matrix))
    model, x, _ = BY_NAME[name].build()
    kernel = empirical_ntk(model, x)
    computation = EighComputation(warn_small_eigvals=0)
    group = {"params": list(model.parameters()), "criterion": lambda values: list(range(len(values)))}
    extended, loss_func = extend(model), extend(nn.MSELoss(reduction="mean"))
    output = extended(x)
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook([group])):
        loss_func(output, torch.zeros_like(output)).backward()
    expected, _ = computation.get_result(group)
    actual = ggn_eigenvalues(kernel)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12 * expected.max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["mlp_Tanh", "output_sequence", "output_scalar"])
def test_eigenvalues_of_the_ggn_by_its_matrix(case, reduction):
    """J^T H J, with the Hessian H of the loss by autograd."""
    model, x, _ = BY_NAME[case].build()
    output = model(x)
    jacobian = []
    for entry in output.flatten():
        grads = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)
        jacobian.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(jacobian)
    loss = nn.MSELoss(reduction=reduction)
    flat = output.detach().flatten()
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, torch.zeros_like(f)), flat)
    ggn = jacobian.T @ hessian @ jacobian
    values = ggn_eigenvalues(empirical_ntk(model, x), reduction=reduction)
    rank = min(len(values), len(ggn))
    assert torch.allclose(values[-rank:], torch.linalg.eigvalsh(ggn)[-rank:], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- bad arguments

K = torch.eye(4)


@pytest.mark.parametrize(
    "function",
    [
        eigenvalues,
        eigenvectors,
        condition_number,
        effective_rank,
        ggn_eigenvalues,
        lambda k: kernel_target_alignment(k, K),
    ],
)
@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ([[1.0]], TypeError, "kernel must be a tensor of real numbers, got list"),
        (K.int(), TypeError, "kernel must be a tensor of real numbers, got torch.int32"),
        (K[:3], ValueError, r"kernel must (be the kernel of a set with itself|have shape).*, got \[3, 4\]"),
        (
            torch.ones(4, 4, 2),
            ValueError,
            r"kernel must have shape (\[N1, N2\] or \[N1, N2, \*out, \*out\]|.* for y .*), got \[4, 4, 2\]",
        ),
        (torch.ones(4, 4, 2, 3), ValueError, r"kernel must have shape .*, got \[4, 4, 2, 3\]"),
        (torch.ones(0, 0), ValueError, r"kernel must have shape .* and not be empty, got \[0, 0\]"),
        (
            K.triu() + torch.ones(4, 4).triu(),
            ValueError,
            "kernel must be symmetric, the kernel of a set with itself: K",
        ),
        (K * math.nan, ValueError, "kernel holds numbers that are not finite"),
    ],
)
def test_bad_kernels(function, kernel, error, message):
    with pytest.raises(error, match=message):
        function(kernel)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: effective_rank(K, "stable"), ValueError, "definition must be 'entropy' or 'participation', got 'stab"),
        (lambda: effective_rank(0 * K), ValueError, "kernel has no positive eigenvalue, and so no effective rank"),
        (lambda: kernel_target_alignment(K, torch.arange(4)), TypeError, r"y must be .*; for classes, .*one_hot\(y\)"),
        (
            lambda: kernel_target_alignment(K, K[:3]),
            ValueError,
            r"kernel must have shape \[3, 3, 4, 4\] or \[3, 3, 4\] or \[3, 3\] for y of shape \[3, 4\], got \[4, 4\]",
        ),
        (lambda: kernel_target_alignment(K, 0 * K), ValueError, "kernel and y must not be zero"),
        (lambda: kernel_target_alignment(K, torch.tensor(1.0)), ValueError, r"y must have shape \[N, \*out\]"),
        (
            lambda: centered_kernel_alignment(K, torch.eye(3)),
            ValueError,
            r"kernel1 and kernel2 must have the same shape",
        ),
        (
            lambda: centered_kernel_alignment(K, torch.ones(4, 4)),
            ValueError,
            "centred kernel1 and kernel2 must not be 0|z",
        ),
        (
            lambda: relative_kernel_change(K, K[:3]),
            ValueError,
            r"before and after must .* shape, got \[4, 4\] and \[3, 4\]",
        ),
        (lambda: relative_kernel_change(0 * K, K), ValueError, "before is zero, so there is no relative change"),
        (lambda: eigenvalues(K, 0), ValueError, "k must be from 1 to 4, the number of eigenvalues, got 0"),
        (lambda: eigenvalues(K, 5), ValueError, "k must be from 1 to 4, the number of eigenvalues, got 5"),
        (lambda: eigenvectors(K, True), TypeError, "k must be an integer or None, got bool"),
        (lambda: eigenvectors(K, 1.0), TypeError, "k must be an integer or None, got float"),
        (lambda: ggn_eigenvalues(K, reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
