"""The NNGP kernel, both kernels at once, and the semantics of output axes."""

from itertools import product

import pytest
import torch
from cases import BY_NAME, CASES, mlp
from conftest import (
    BAD_AXES,
    COMPUTES,
    DTYPES,
    METHODS,
    ROLES,
    assert_close,
    axes_of,
    batch_sizes,
    call,
    exchanged,
    fully_convolutional,
    kernel_of,
    loop_jacobians,
    oracle_sum,
    reduce_axes,
)
from covering import covers
from torch import nn

from ggn_ntk import EmpiricalKernels, UnsupportedModelError, empirical_kernels, empirical_ntk, nngp


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


@covers({"case": CASES, "compute": COMPUTES, "dtype": DTYPES})
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
    assert_close(kernels.nngp, nngp(model, x1, x2, compute=compute))
    assert kernels.ntk.shape == kernels.nngp.shape
    one_set = empirical_kernels(model, x1, compute=compute, params=["0.weight"])
    assert one_set.ntk.shape[:2] == one_set.nngp.shape[:2] == (len(x1), len(x1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_both_kernels_with_axes(roles, method):
    model, x = fully_convolutional(), torch.randn(3, 1, 3, 3).double()
    kernels = empirical_kernels(model, x, method=method, check=True, **axes_of(roles))
    assert_close(kernels.nngp, nngp(model, x, **axes_of(roles)))
    assert_close(kernels.ntk, empirical_ntk(model, x, method="jacobian_contraction", **axes_of(roles)))
    assert kernels.ntk.shape == kernels.nngp.shape
    for kernel in kernels:
        assert torch.equal(kernel, exchanged(kernel, roles))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("wrapped", "method"), [(False, "structured"), (True, "structured"), (False, "vivit")])
def test_one_forward_pass_of_all_samples_for_both_kernels(wrapped, method, symmetric, monkeypatch):
    class Doubled(nn.Sequential):  # not to be walked through
        def forward(self, x):
            return 2 * super().forward(x)

    network = fully_convolutional()
    model = Doubled(*network) if wrapped else network
    x1, x2 = torch.randn(20, 1, 3, 3).double(), None if symmetric else torch.randn(10, 1, 3, 3).double()
    sizes = batch_sizes(monkeypatch)
    kernels = empirical_kernels(model, x1, x2, method=method)
    large = [size for size in sizes if size > 15]  # more than are looked at by themselves, or in halves
    assert large == [20 if symmetric else 30] * 2  # in each convolution once
    assert_close(kernels.nngp, nngp(model, x1, x2))


def test_outputs_that_depend_on_the_batch_are_refused_though_their_jacobians_do_not():
    class Centred(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0, keepdim=True).detach()

    x = torch.randn(5, 4)
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_kernels(Centred(4, 2), x)


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


# ---------------------------------------------------------------- what output picks


class Named(nn.Module):
    """Returns the output of a model among others."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"hidden": x, "logits": self.model(x)}


def pick(found):
    return found["logits"].movedim(2, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_output_picks_a_tensor(roles, symmetric):
    model, x1 = Named(fully_convolutional()), torch.randn(3, 1, 5, 4).double()
    x2 = None if symmetric else torch.randn(2, 1, 5, 4).double()
    with torch.no_grad():
        f1, f2 = pick(model(x1)), pick(model(x1 if symmetric else x2))
    outputs = reduce_axes(torch.einsum("nchw,mdij->nmchwdij", f1, f2), roles)
    assert_close(nngp(model, x1, x2, output=pick, **axes_of(roles)), outputs)
    kernels = empirical_kernels(model, x1, x2, output=pick, **axes_of(roles))
    assert_close(kernels.nngp, outputs)
    first, second = (loop_jacobians(model, x, pick) for x in (x1, x1 if symmetric else x2))
    ntk = sum(torch.einsum("ncp,mdp->nmcd", first[name], second[name]) for name in first)
    assert_close(kernels.ntk, reduce_axes(ntk.reshape(*ntk.shape[:2], *f1.shape[1:] * 2), roles))


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products"])
def test_output_on_every_route(method):
    model, x1, x2 = fully_convolutional(), torch.randn(3, 1, 5, 4).double(), torch.randn(2, 1, 5, 4).double()
    expected = empirical_kernels(model, x1, x2)
    picked = empirical_kernels(Named(model), x1, x2, method=method, check=True, output=lambda found: found["logits"])
    for actual, kernel in zip(picked, expected, strict=True):
        assert_close(actual, kernel)


def test_both_kernels_by_a_capture():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(3, 5).double()
    for capture in ("sequential", "autograd"):
        assert_close(empirical_kernels(model, x, capture=capture).ntk, kernel_of(model, x))
    with pytest.raises(ValueError, match="capture is for method='structured' alone, got method='vivit'"):
        empirical_kernels(model, x, method="vivit", capture="autograd")


# ---------------------------------------------------------------- output axes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_every_combination_of_axes(roles, symmetric):
    model, x1, x2 = fully_convolutional(), torch.randn(3, 1, 5, 4).double(), torch.randn(2, 1, 5, 4).double()
    kernel = nngp(model, x1, None if symmetric else x2, **axes_of(roles))
    with torch.no_grad():
        f1, f2 = model(x1), model(x1 if symmetric else x2)
    assert_close(kernel, reduce_axes(torch.einsum("nchw,mdij->nmchwdij", f1, f2), roles))
    if symmetric:
        assert torch.equal(kernel, exchanged(kernel, roles))


def test_shape_follows_the_contract():
    model, x1, x2 = fully_convolutional(), torch.randn(3, 1, 5, 4).double(), torch.randn(2, 1, 5, 4).double()
    assert model(x1).shape[1:] == (2, 3, 2)
    assert nngp(model, x1, x2, trace_axes=(1, 2)).shape == (3, 2, 2, 2)
    assert nngp(model, x1, x2, trace_axes=0).shape == (3, 2, 3, 2, 3, 2)
    assert nngp(model, x1, x2, diagonal_axes=0).shape == (3, 2, 2, 3, 2, 3, 2)
    assert nngp(model, x1, x2, diagonal_axes=(-1,), trace_axes=-3).shape == (3, 2, 3, 2, 3)


def test_compute_is_all_axes_in_one_role():
    model, x = fully_convolutional(), torch.randn(3, 1, 5, 4).double()
    assert torch.equal(nngp(model, x, trace_axes=(0, 1, 2)), nngp(model, x, compute="trace"))
    assert torch.equal(nngp(model, x, diagonal_axes=(0, 1, 2)), nngp(model, x, compute="diagonal"))
    assert torch.equal(nngp(model, x, trace_axes=(), diagonal_axes=[]), nngp(model, x))


def test_negative_axes_count_from_the_last_output_axis():
    model, x = fully_convolutional(), torch.randn(3, 1, 5, 4).double()
    assert torch.equal(nngp(model, x, trace_axes=(-1, -2)), nngp(model, x, trace_axes=iter([1, 2])))
    assert torch.equal(nngp(model, x, diagonal_axes=-3), nngp(model, x, diagonal_axes=0))


def test_missing_axes_are_found_before_all_samples_are_evaluated(monkeypatch):
    sizes = batch_sizes(monkeypatch)
    with pytest.raises(ValueError, match="trace_axes names output axis 3"):
        nngp(fully_convolutional(), torch.randn(90, 1, 5, 4).double(), trace_axes=3)
    assert 0 < max(sizes) < 90


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_AXES)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        nngp(fully_convolutional(), torch.randn(2, 1, 5, 4).double(), **arguments)


def test_outputs_without_axes():
    model, x = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), torch.randn(3, 5)
    assert nngp(model, x).shape == (3, 3)
    with pytest.raises(ValueError, match="Accepted, counted without the sample axis: none"):
        nngp(model, x, trace_axes=0)
