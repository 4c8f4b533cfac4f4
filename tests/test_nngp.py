"""The NNGP kernel, both kernels at once, and the semantics of output axes."""

from itertools import product

import pytest
import torch
from cases import BY_NAME, mlp
from conftest import COMPUTES, METHODS, assert_close, call, loop_jacobians, oracle_sum
from torch import nn

from ggn_ntk import EmpiricalKernels, UnsupportedModelError, empirical_kernels, nngp
from ggn_ntk.axes import AxesRequest, OutputAxes

ROLES = ("kept", "traced", "diagonal")


def slow_kernel(f1, f2, compute):
    """Pairs of outputs, one entry at a time."""
    f1, f2 = f1.reshape(len(f1), -1), f2.reshape(len(f2), -1)
    full = torch.empty(len(f1), len(f2), f1.shape[1], f2.shape[1], dtype=f1.dtype)
    for n, m, c, d in product(*map(range, full.shape)):
        full[n, m, c, d] = f1[n, c] * f2[m, d]
    if compute == "full":
        return full
    diagonal = full.diagonal(dim1=2, dim2=3)
    return diagonal if compute == "diagonal" else diagonal.sum(-1)


def slow_axes(full, ndim, traced, diagonal):
    """The kernel with axes summed or taken at equal indices, from [N1, N2, *out, *out], one axis after the other."""
    first, second = list(range(ndim)), list(range(ndim))
    for axis in reversed(range(ndim)):
        if axis not in traced + diagonal:
            continue
        at, other = 2 + first.index(axis), 2 + len(first) + second.index(axis)
        full = full.diagonal(dim1=at, dim2=other)  # behind all others
        second.remove(axis)
        if axis in traced:
            full, _ = full.sum(-1), first.remove(axis)
        else:
            full = full.movedim(-1, at)
    return full


def network():
    """A fully convolutional network with outputs [N, 2, 3, 2]."""
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2)).double()


def test_every_case(case, compute, dtype):
    model, x1, x2 = case.build(dtype)
    with torch.no_grad():
        f1, f2 = call(model, x1), call(model, x2)
    kernel = nngp(model, x1, x2, compute=compute)
    out = {"full": f1.shape[1:] * 2, "diagonal": f1.shape[1:], "trace": ()}[compute]
    assert kernel.shape == (len(f1), len(f2), *out)
    assert kernel.dtype == dtype
    assert_close(kernel.reshape(slow_kernel(f1, f2, compute).shape), slow_kernel(f1.double(), f2.double(), compute))


def test_devices(device):
    model, x1, x2 = BY_NAME["output_image"].build(device=device)
    kernel = nngp(model, x1, x2, trace_axes=0)
    assert kernel.device == x1.device
    assert_close(kernel, torch.einsum("nchw,mcij->nmhwij", model(x1), model(x2)).detach())


def test_one_set_is_exactly_symmetric(case, compute):
    model, x, _ = case.build(torch.float32)
    kernel = nngp(model, x, compute=compute)
    half = (kernel.ndim - 2) // 2
    swapped = list(range(2, kernel.ndim))
    if compute == "full":
        swapped = swapped[half:] + swapped[:half]
    assert torch.equal(kernel, kernel.permute(1, 0, *swapped))
    assert_close(kernel, nngp(model.double(), *_double(x), compute=compute))


def _double(x):
    if isinstance(x, dict):
        return ({k: v.double() if v.is_floating_point() else v for k, v in x.items()},)
    return (tuple(t.double() for t in x) if isinstance(x, tuple) else x.double() if x.is_floating_point() else x,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compute", COMPUTES)
def test_both_kernels(method, compute):
    case = BY_NAME["output_image"]
    model, x1, x2 = case.build()
    kernels = empirical_kernels(model, x1, x2, compute=compute, method=method, check=True)
    assert isinstance(kernels, EmpiricalKernels)
    assert_close(kernels.ntk, oracle_sum(case, compute=compute))
    assert torch.equal(kernels.nngp, nngp(model, x1, x2, compute=compute))
    assert kernels.ntk.shape == kernels.nngp.shape
    one_set = empirical_kernels(model, x1, compute=compute, params=["0.weight"])
    assert one_set.ntk.shape[:2] == one_set.nngp.shape[:2] == (len(x1), len(x1))


def test_model_without_trainable_parameters():
    x = torch.randn(4, 3)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert_close(nngp(frozen, x, compute="trace"), frozen(x) @ frozen(x).T)
    assert_close(nngp(nn.Tanh(), x, compute="trace"), x.tanh() @ x.tanh().T)


def test_under_no_grad_and_inference_mode():
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    expected = nngp(model, x)
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(nngp(model, x), expected)
    with torch.inference_mode():
        kernel = nngp(model, x.clone())
    assert torch.equal(kernel, expected)
    assert not kernel.is_inference()


def test_the_model_is_left_as_found():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval(), torch.randn(3, 5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    nngp(model, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.BatchNorm1d(5), "normalises by batch statistics"),
        (lambda: nn.Dropout(), "drops activations at random"),
        (lambda: nn.Softmax(0), "samples influence one another"),
        (lambda: nn.Flatten(0, 1), "its output for 3 samples has shape"),
        (lambda: Squeezed(), "its output for one sample alone has another shape than in a batch"),
        (lambda: Overflows(), "its outputs are not finite"),
    ],
)
def test_refused_models(model, message):
    with pytest.raises(UnsupportedModelError, match=f"No empirical NNGP kernel of this model:\n.*{message}"):
        nngp(model(), torch.randn(2, 5), torch.randn(2, 5))


class Squeezed(nn.Module):
    def forward(self, x):
        return x.sum(1, keepdim=True).squeeze()


class Overflows(nn.Module):
    def forward(self, x):
        return x / 0


# ---------------------------------------------------------------- output axes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("roles", list(product(ROLES, repeat=3)), ids="-".join)
def test_every_combination_of_axes(roles, symmetric):
    model, x1, x2 = network(), torch.randn(3, 1, 5, 4).double(), torch.randn(2, 1, 5, 4).double()
    traced, diagonal = ([axis for axis in range(3) if roles[axis] == role] for role in ROLES[1:])
    kernel = nngp(model, x1, None if symmetric else x2, trace_axes=traced, diagonal_axes=diagonal)
    with torch.no_grad():
        f1, f2 = model(x1), model(x1 if symmetric else x2)
    expected = slow_axes(torch.einsum("nchw,mdij->nmchwdij", f1, f2), 3, traced, diagonal)
    assert_close(kernel, expected)
    if symmetric:
        axes = AxesRequest.parse("full", traced, diagonal).resolve(3)
        assert torch.equal(kernel, axes.transpose(kernel))


@pytest.mark.parametrize("roles", list(product(ROLES, repeat=3)), ids="-".join)
def test_letters_and_shape_serve_the_ntk(roles):
    """An einsum of Jacobians with these letters, against the full kernel reduced axis by axis."""
    model, x1, x2 = network(), torch.randn(2, 1, 3, 4).double(), torch.randn(3, 1, 3, 4).double()
    first, second = (torch.cat(list(loop_jacobians(model, x).values()), dim=2) for x in (x1, x2))
    out = model(x1).shape[1:]
    first, second = (j.reshape(len(j), *out, -1) for j in (first, second))
    full = torch.einsum("nchwp,mdijp->nmchwdij", first, second)
    traced, diagonal = ([axis for axis in range(3) if roles[axis] == role] for role in ROLES[1:])
    axes = AxesRequest.parse("full", traced, diagonal).resolve(3)
    letters = axes.letters()
    kernel = torch.einsum(f"n{letters.first}z,m{letters.second}z->nm{letters.result}", first, second)
    assert_close(kernel, slow_axes(full, 3, traced, diagonal))
    assert kernel.shape[2:] == axes.shape(out)


def test_shape_follows_the_contract():
    model, x1, x2 = network(), torch.randn(3, 1, 5, 4).double(), torch.randn(2, 1, 5, 4).double()
    assert model(x1).shape[1:] == (2, 3, 2)
    assert nngp(model, x1, x2, trace_axes=(1, 2)).shape == (3, 2, 2, 2)
    assert nngp(model, x1, x2, trace_axes=0).shape == (3, 2, 3, 2, 3, 2)
    assert nngp(model, x1, x2, diagonal_axes=0).shape == (3, 2, 2, 3, 2, 3, 2)
    assert nngp(model, x1, x2, diagonal_axes=(-1,), trace_axes=-3).shape == (3, 2, 3, 2, 3)


def test_compute_is_all_axes_in_one_role():
    model, x = network(), torch.randn(3, 1, 5, 4).double()
    assert torch.equal(nngp(model, x, trace_axes=(0, 1, 2)), nngp(model, x, compute="trace"))
    assert torch.equal(nngp(model, x, diagonal_axes=(0, 1, 2)), nngp(model, x, compute="diagonal"))
    assert torch.equal(nngp(model, x, trace_axes=(), diagonal_axes=[]), nngp(model, x))


def test_negative_axes_count_from_the_last_output_axis():
    model, x = network(), torch.randn(3, 1, 5, 4).double()
    assert torch.equal(nngp(model, x, trace_axes=(-1, -2)), nngp(model, x, trace_axes=iter([1, 2])))
    assert torch.equal(nngp(model, x, diagonal_axes=-3), nngp(model, x, diagonal_axes=0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trace_axes": 3}, ValueError, "trace_axes names output axis 3. Accepted, .* sample axis: from -3 to 2"),
        ({"diagonal_axes": (0, -4)}, ValueError, "diagonal_axes names output axis -4. Accepted, .*: from -3 to 2"),
        ({"trace_axes": (0, -3)}, ValueError, r"trace_axes must name each output axis once, got \(0, -3\) for 3 axes"),
        ({"trace_axes": 1, "diagonal_axes": (0, -2)}, ValueError, "trace_axes and diagonal_axes both name output axis"),
        ({"trace_axes": 0, "compute": "trace"}, ValueError, "trace_axes goes with compute='full' alone, got comp"),
        ({"diagonal_axes": (), "compute": "diagonal"}, ValueError, "diagonal_axes goes with compute='full' alone"),
        ({"trace_axes": "0"}, TypeError, "trace_axes must be an integer, an iterable of integers or None, got '0'"),
        ({"trace_axes": 1.0}, TypeError, r"trace_axes must be an integer, .* got 1\.0"),
        ({"diagonal_axes": [0, True]}, TypeError, "diagonal_axes must be an integer"),
        ({"compute": "sum"}, ValueError, "compute must be one of 'full', 'diagonal', 'trace', got 'sum'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        nngp(network(), torch.randn(2, 1, 5, 4).double(), **arguments)


def test_outputs_without_axes():
    model, x = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), torch.randn(3, 5)
    assert nngp(model, x).shape == (3, 3)
    with pytest.raises(ValueError, match="Accepted, counted without the sample axis: none"):
        nngp(model, x, trace_axes=0)
    assert OutputAxes(0).letters().result == ""
