"""Eigenvalues of the GGN under any loss: against curvlinops, ViViT, and the matrix itself."""

import math

import pytest
import torch
from backpack import backpack, extend
from cases import BY_NAME
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from vivit.linalg.eigh import EighComputation

from ggn_ntk import empirical_ntk
from ggn_ntk.spectrum import as_matrix, ggn_eigenvalues

# linear_operator, which curvlinops imports, with torch 2.14
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

MODELS = [
    "linear",
    "mlp_ReLU",
    "mlp_Sigmoid",
    "mlp_Tanh",
    "mlp_ELU",
    "mlp_SELU",
    "mlp_no_bias",
    "mlp_one_sample",
    "mlp_image_input",
    "nested",
    "conv1d",
    "conv1d_options",
    "conv2d",
    "conv2d_options",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "max_pool2d",
    "max_pool1d",
    "zero_pad2d",
    "tutorial_cnn_small",
]
# which ViViT does not know
OTHERS = ["layer_norm_gelu", "tied", "residual", "twice_called", "recurrent", "batch_norm2d"]


def built(name):
    """A model, its inputs, outputs and kernel."""
    model, x, _ = BY_NAME[name].build()
    f = model(x).detach()
    return model, x, f, empirical_ntk(model, x)


def classes(f):
    return torch.arange(len(f)) % f.shape[1]


def assert_same(actual, expected):
    """The largest agree, of which there may be more on one side, where others are zero."""
    rank = min(len(actual), len(expected))
    tolerance = {"rtol": 1e-8, "atol": 1e-11 * expected.max().item()}
    assert torch.allclose(actual[-rank:], expected[-rank:], **tolerance)
    for zeros in (actual[:-rank], expected[:-rank]):
        assert zeros.abs().sum() <= 1e-10 * expected.max()


@pytest.mark.parametrize("name", MODELS + OTHERS)
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(), classes),
        (nn.BCEWithLogitsLoss(), lambda f: (f > 0.1).double()),
        (nn.MSELoss(), torch.zeros_like),
    ],
    ids=["cross_entropy", "bce", "mse"],
)
def test_against_curvlinops(name, loss, targets):
    from curvlinops import GGNLinearOperator

    model, x, f, kernel = built(name)
    data = [(x, targets(f))]
    ggn = GGNLinearOperator(model, loss, list(model.parameters()), data, check_deterministic=False)
    dense = ggn @ torch.eye(ggn.shape[1]).double()
    assert_same(ggn_eigenvalues(kernel, loss, f, targets(f)), torch.linalg.eigvalsh((dense + dense.T) / 2))


@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy_against_vivit(name, monkeypatch):
    """It calls a method that torch no longer has."""
    monkeypatch.setattr(torch.Tensor, "symeig", lambda matrix, eigenvectors: torch.linalg.eigh(matrix))
    model, x, f, kernel = built(name)
    computation = EighComputation(warn_small_eigvals=0)
    group = {"params": list(model.parameters()), "criterion": lambda values: list(range(len(values)))}
    extended, loss = extend(model), extend(nn.CrossEntropyLoss())
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook([group])):
        loss(extended(x), classes(f)).backward()
    expected, _ = computation.get_result(group)
    actual = ggn_eigenvalues(kernel, nn.CrossEntropyLoss(), f, classes(f))
    assert actual.shape == expected.shape
    assert_same(actual, expected)


LOSSES = {
    "weights, smoothing and samples left out": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0]).double(), ignore_index=1, label_smoothing=0.2),
        classes,
    ),
    "probabilities": (nn.CrossEntropyLoss(), lambda f: f.softmax(1).roll(1, 0)),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), lambda f: f.softmax(1)),
    "float32 targets": (nn.MSELoss(), lambda f: f.float()),
    "counts": (nn.PoissonNLLLoss(), lambda f: f.abs().round()),
    "a loss of one's own": (lambda f, y: (f.exp() - y * f).sum() + (f[:, 0] * f[:, 1]).square().sum() * 0, torch.sin),
    "linear": (lambda f, y: f.sum(), torch.zeros_like),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["mlp_Tanh", "output_sequence"])
def test_any_loss_by_the_matrix(case, name):
    """J^T H J, with the Hessian H of the loss by autograd."""
    if case == "output_sequence" and "smoothing" in name:
        loss, targets = nn.CrossEntropyLoss(), lambda f: (f[:, 0] > 0).long()
    else:
        loss, targets = LOSSES[name]
    model, x, f, kernel = built(case)
    y = targets(f)
    jacobian = []
    for entry in model(x).flatten():
        row = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)
        jacobian.append(torch.cat([g.flatten() for g in row]))
    jacobian = torch.stack(jacobian)
    wide = y.double() if y.is_floating_point() else y
    hessian = torch.autograd.functional.hessian(lambda flat: loss(flat.reshape(f.shape), wide), f.flatten())
    expected = torch.linalg.eigvalsh(jacobian.T @ hessian @ jacobian)
    actual = ggn_eigenvalues(kernel, loss, f, y)
    rank = min(len(actual), len(expected))
    assert torch.allclose(actual[-rank:], expected[-rank:], rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 4), c=st.integers(1, 4), seed=st.integers(0, 99), reduction=st.sampled_from(["mean", "sum"]))
def test_the_squared_loss_is_the_default(n, c, seed, reduction):
    torch.manual_seed(seed)
    features, f = torch.randn(n, c, 30).double(), torch.randn(n, c).double()
    kernel = torch.einsum("ncp,mdp->nmcd", features, features)
    expected = ggn_eigenvalues(kernel, nn.MSELoss(reduction=reduction), f, torch.zeros_like(f))
    assert torch.allclose(ggn_eigenvalues(kernel, reduction=reduction), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_and_device(dtype, device):
    torch.manual_seed(0)
    features = torch.randn(3, 2, 30).double()
    kernel = torch.einsum("ncp,mdp->nmcd", features, features).to(dtype)
    f, y = torch.randn(3, 2, dtype=dtype), torch.arange(3) % 2
    expected = ggn_eigenvalues(kernel.double(), F.cross_entropy, f, y)
    actual = ggn_eigenvalues(kernel.to(device), F.cross_entropy, f.to(device).requires_grad_(), y.to(device))
    assert actual.dtype == dtype
    assert actual.device.type == torch.device(device).type
    assert not actual.requires_grad
    assert torch.allclose(actual.cpu().double(), expected, atol=10 * torch.finfo(dtype).eps * kernel.norm().item())


@pytest.fixture(scope="module")
def wide():
    """A kernel of more rows than all eigenvalues are computed of, and outputs."""
    torch.manual_seed(0)
    features, f = torch.randn(120, 3, 400).double() * torch.rand(400).double(), torch.randn(120, 3).double()
    return torch.einsum("ncp,mdp->nmcd", features, features), f


K_LOSSES = {
    "squared": lambda f: (),
    "cross-entropy": lambda f: (nn.CrossEntropyLoss(), f, classes(f)),
    "bce": lambda f: (nn.BCEWithLogitsLoss(reduction="sum"), f, (f > 0.1).double()),
}


@pytest.mark.parametrize("loss", K_LOSSES)
def test_the_largest(loss, wide):
    """Of dense kernels, and of operators by their products alone."""
    from scipy.sparse.linalg import aslinearoperator

    kernel, f = wide
    expected = ggn_eigenvalues(kernel, *K_LOSSES[loss](f))
    operator = aslinearoperator(as_matrix(kernel).numpy())
    for k in (1, 7):
        for either in (kernel, operator):
            assert torch.allclose(ggn_eigenvalues(either, *K_LOSSES[loss](f), k=k), expected[-k:], rtol=1e-8, atol=0)
    few, f = kernel[:2, :2], f[:2]
    for either in (few, aslinearoperator(as_matrix(few).numpy())):  # all of them, some of which are zero
        found, all_of_few = ggn_eigenvalues(either, *K_LOSSES[loss](f), k=6), ggn_eigenvalues(few, *K_LOSSES[loss](f))
        assert torch.allclose(found, all_of_few, rtol=1e-8, atol=1e-12)
        assert found.min() >= 0


def test_the_largest_of_an_operator_in_single_precision(device):
    """With no warning of negative eigenvalues, which half of these would be by rounding."""
    from ggn_ntk.operators import NTKOperator

    model, x, _ = BY_NAME["mlp_Tanh"].build()
    model, x = model.float().to(device), x.float().to(device)
    f = model(x).detach()
    expected = ggn_eigenvalues(empirical_ntk(model, x), F.cross_entropy, f, classes(f).to(device))
    found = ggn_eigenvalues(NTKOperator(model, x), F.cross_entropy, f, classes(f).to(device), k=f.numel())
    assert found.dtype == torch.float32
    assert found.device == f.device
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max().item())


# ---------------------------------------------------------------- bad arguments


def test_bad_counts(wide):
    from scipy.sparse.linalg import aslinearoperator

    kernel, f = wide
    operator, of = aslinearoperator(as_matrix(kernel).numpy()), (F.cross_entropy, f, classes(f))
    for arguments in ((), of):
        with pytest.raises(ValueError, match="k must be given for an operator: how many of its 360 eigenvalues"):
            ggn_eigenvalues(operator, *arguments)
        with pytest.raises(TypeError, match="k must be an integer or None, got float"):
            ggn_eigenvalues(kernel, *arguments, k=1.0)
        with pytest.raises(ValueError, match="k must be from 1 to 360, the number of eigenvalues, got 361"):
            ggn_eigenvalues(kernel, *arguments, k=361)
    with pytest.raises(ValueError, match=r"f must have 360 numbers to fit kernel, got 2 x 3"):
        ggn_eigenvalues(operator, F.cross_entropy, f[:2], classes(f[:2]), k=1)


K, FZ, Y = torch.eye(6).reshape(3, 2, 3, 2).transpose(1, 2), torch.zeros(3, 2), torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("cross_entropy", FZ, Y), TypeError, r"loss must be a callable loss\(f, y\), got str"),
        ((None, FZ, Y), ValueError, "loss must be given beside f and y"),
        ((F.cross_entropy,), TypeError, "f must be a tensor of real numbers, got NoneType"),
        ((F.cross_entropy, FZ), TypeError, "y must be a tensor, got NoneType"),
        ((F.cross_entropy, FZ[:2], Y[:2]), ValueError, r"f must have shape \[3, 2\] to fit the kernel, got \[2, 2\]"),
        ((nn.CrossEntropyLoss(reduction="none"), FZ, Y), ValueError, "loss must return a scalar: pass one with reduct"),
        ((lambda f, y: 1.0, FZ, Y), ValueError, "loss must return a scalar"),
        ((lambda f, y: f.detach().sum(), FZ, Y), ValueError, "loss must be differentiable in the outputs"),
        ((lambda f, y: f.sum().square(), FZ, Y), ValueError, "loss must be a sum or a mean over samples: its Hessian "),
        ((lambda f, y: -f.square().sum(), FZ, Y), ValueError, "loss must be convex in the outputs, but .* -2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ggn_eigenvalues(K, *arguments)


def test_reduction_is_that_of_the_squared_loss():
    with pytest.raises(
        ValueError, match=r"reduction is that of nn\.MSELoss, got 'sum' beside a loss, which has its own"
    ):
        ggn_eigenvalues(K, F.cross_entropy, FZ, Y, reduction="sum")
    with pytest.raises(ValueError, match="kernel must have shape"):
        ggn_eigenvalues(torch.ones(3, 3, 2), F.cross_entropy, FZ, Y)


def test_matrices_of_kernels():
    torch.manual_seed(0)
    kernel = torch.randn(3, 4, 2, 5, requires_grad=True)
    matrix = as_matrix(kernel)
    assert matrix.shape == (6, 20)
    assert matrix[1 * 2 + 1, 3 * 5 + 2] == kernel[1, 3, 1, 2]
    assert matrix.requires_grad
    several = torch.randn(3, 4, 2, 5, 2, 6)
    assert as_matrix(several)[2 * 10 + 1 * 5 + 3, 3 * 12 + 1 * 6 + 4] == several[2, 3, 1, 3, 1, 4]
    assert torch.equal(as_matrix(kernel[..., 0, 0]), kernel[..., 0, 0])
    assert math.prod(as_matrix(torch.ones(2, 3, 1, 1)).shape) == 6
    for bad in (torch.ones(3), torch.ones(3, 3, 2)):
        with pytest.raises(ValueError, match=r"kernel must have shape \[N1, N2\] or \[N1, N2, \*out, \*out\], got "):
            as_matrix(bad)
    with pytest.raises(TypeError, match="kernel must be a tensor of real numbers, got list"):
        as_matrix([[1.0]])
