"""Whole batches as one input: BatchNorm in train mode, attention across samples, contrastive heads, on every route."""

import pytest
import torch
from conftest import COMPUTES, ROLES, assert_close, axes_of, call, limit_memory, reduce_axes
from torch import nn

from ggn_ntk import (
    NotFiniteWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_fn,
    explain,
    nngp,
    shared,
)
from ggn_ntk.contraction import contract
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

ROUTES = ["structured", "jacobian_contraction", "ntk_vector_products"]


class AcrossSamples(nn.Module):
    """Attention of each sample to all others."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x).unsqueeze(0)
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])[0]


class Contrastive(nn.Module):
    """The logarithm of the softmax over similarities to all samples, at the sample itself."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        a, b = (nn.functional.normalize(part(x), dim=-1) for part in (self.left, self.right))
        return (a @ b.T / 0.5).log_softmax(-1).diagonal()


class Cell(nn.Module):
    """A small convolutional net with a branch, BatchNorm in its middle and mean pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.branch = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.stem(x)
        return self.head((nn.functional.avg_pool2d(h, 3, 1, 1) + self.branch(h)).mean((2, 3)))


class Nested(nn.Module):
    """Samples in a dict, and a scale that all share."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, inputs, scale):
        return self.norm(self.layer(inputs["x"][0] * scale) + inputs["y"]).tanh()


MODELS = {
    "batch_norm1d": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "batch_norm2d": (Cell, (2, 5, 5)),
    "no_running_statistics": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)),
        (5,),
    ),
    "attention": (AcrossSamples, (5,)),
    "contrastive": (Contrastive, (5,)),
    "group_norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)),
        (2, 5, 5),
    ),
}


def build(name, n1=4, n2=3, device="cpu", dtype=torch.float64):
    make, shape = MODELS[name]
    model = make().to(device, dtype)
    return model, torch.randn(n1, *shape, dtype=dtype).to(device), torch.randn(n2, *shape, dtype=dtype).to(device)


def jacobians(model, x, output=None):
    """The Jacobians [N, C, P] of a batch by name, by a loop over its outputs, and the shape of these."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found = call(model, x)
    found = found if output is None else output(found)
    rows = [
        torch.autograd.grad(entry, list(params.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in found.flatten()
    ]
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    columns = zip(params, zip(*rows, strict=True), strict=True)
    return {
        k: torch.stack([g.flatten() for g in c]).view(len(found), -1, c[0].numel()) for k, c in columns
    }, found.shape[1:]


def kernels_of(model, x1, x2=None, output=None):
    """The kernel [N1, N2, *out, *out] of each parameter."""
    first, out1 = jacobians(model, x1, output)
    second, out2 = (first, out1) if x2 is None else jacobians(model, x2, output)
    found = {name: torch.einsum("ncp,mdp->nmcd", j, second[name]) for name, j in first.items()}
    return {name: kernel.reshape(*kernel.shape[:2], *out1, *out2) for name, kernel in found.items()}


def kernel_of(*args, **kwargs):
    return sum(kernels_of(*args, **kwargs).values())


def reduced(kernel, compute):
    ndim = (kernel.ndim - 2) // 2
    role = {"full": "kept", "diagonal": "diagonal", "trace": "traced"}[compute]
    return reduce_axes(kernel, (role,) * ndim)


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_kernels(name, method):
    model, x1, x2 = build(name)
    expected = kernels_of(model, x1, x2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = empirical_ntk(model, x1, x2, method=method, interacting=True, per_parameter=True)
    for key, kernel in found.items():
        assert_close(kernel, expected[key], scale=sum(expected.values()))
    symmetric = empirical_ntk(model, x1, method=method, interacting=True, check=True)
    assert_close(symmetric, kernel_of(model, x1))
    for compute in COMPUTES[1:]:
        kernel = empirical_ntk(model, x1, x2, method=method, compute=compute, interacting=True)
        assert_close(kernel, reduced(sum(expected.values()), compute))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def convolutional():
    """A network with outputs of several axes, [N, 2, 3, 2] for images [N, 1, 5, 4], normalised over the batch."""
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2)).double()


@pytest.mark.parametrize("roles", ROLES, ids=str)
def test_axes(roles):
    model, x1, x2 = convolutional(), torch.randn(2, 1, 5, 4).double(), torch.randn(3, 1, 5, 4).double()
    expected = reduce_axes(kernel_of(model, x1, x2), roles)
    method = ROUTES[ROLES.index(roles) % 3]
    assert_close(empirical_ntk(model, x1, x2, method=method, interacting=True, **axes_of(roles)), expected)


@pytest.mark.parametrize("method", ROUTES)
def test_paired(method, compute):
    model, x1, x2 = build("batch_norm1d", 3, 3)
    for second in (x2, None):
        full = reduced(kernel_of(model, x1, second), compute)
        expected = torch.stack([full[n, n] for n in range(3)])
        assert_close(
            empirical_ntk(model, x1, second, method=method, compute=compute, paired=True, interacting=True), expected
        )


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("name", ["batch_norm2d", "attention", "contrastive", "group_norm"])
def test_one_sample(name, method):
    model, x1, x2 = build(name, 1, 2)
    assert_close(empirical_ntk(model, x1, method=method, interacting=True), kernel_of(model, x1))
    assert_close(empirical_ntk(model, x2, x1, method=method, interacting=True), kernel_of(model, x2, x1))


def test_one_set_is_exactly_symmetric():
    model, x, _ = build("batch_norm1d")
    kernel = empirical_ntk(model, x, interacting=True)
    assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))


@pytest.mark.parametrize("method", ROUTES)
def test_samples_that_leave_one_another_alone(method):
    model, x1, x2 = build("group_norm")
    kernel = empirical_ntk(model, x1, x2, method=method, interacting=True)
    assert_close(kernel, empirical_ntk(model, x1, x2, method=method))


@pytest.mark.parametrize("name", ["batch_norm2d", "attention"])
@pytest.mark.parametrize("route", ROUTES)
def test_on_devices(name, route, device):
    model, x1, x2 = build(name)
    expected = kernel_of(model, x1, x2)
    found = empirical_ntk(model.to(device), x1.to(device), x2.to(device), method=route, interacting=True)
    assert_close(found, expected)


@pytest.mark.parametrize("method", ROUTES)
def test_nested_and_shared_inputs(method):
    model, shared_scale = Nested().double(), torch.randn(5).double()
    x1, x2 = ({"x": [torch.randn(n, 5).double()], "y": torch.randn(n, 3).double()} for n in (3, 2))
    kernels = [
        empirical_ntk(model, (x1, shared(shared_scale)), second, method=method, interacting=True)
        for second in (None, (x2, shared(shared_scale)))
    ]
    assert_close(kernels[0], kernel_of(model, (x1, shared_scale)))
    assert_close(kernels[1], kernel_of(model, (x1, shared_scale), (x2, shared_scale)))


@pytest.mark.parametrize("method", ROUTES)
def test_functions(method):
    model, x1, x2 = build("attention")
    params = dict(model.named_parameters())
    found = empirical_ntk(
        lambda params, x: torch.func.functional_call(model, params, (x,)),
        x1,
        x2,
        params=params,
        method=method,
        interacting=True,
    )
    assert_close(found, kernel_of(model, x1, x2))


@pytest.mark.parametrize("method", ROUTES)
def test_outputs(method):
    model, x1, x2 = build("batch_norm1d")
    kernel = empirical_ntk(model, x1, x2, method=method, interacting=True, output=lambda out: out.sum(1))
    assert_close(kernel, kernel_of(model, x1, x2).sum((2, 3)))
    kernel = empirical_ntk(model, x1, method=method, interacting=True, output=(None, lambda out: out[:, :2]))
    assert_close(kernel, kernel_of(model, x1)[..., :2])
    found = empirical_ntk(
        model, x1, x2, method=method, interacting=True, output=lambda out: {"a": out[:, 0], "b": out[:, 1:]}
    )
    assert_close(found["a", "b"], kernel_of(model, x1, x2)[:, :, 0, 1:])
    each = empirical_ntk(
        model, x1, x2, method=method, interacting=True, compute="trace", output=lambda out: (out[:, 0], out[:, 1:])
    )
    assert_close(each[1], kernel_of(model, x1, x2)[:, :, 1:, 1:].diagonal(dim1=2, dim2=3).sum(-1))


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize("name", ["batch_norm1d", "group_norm"])
def test_not_a_number(name, method):
    model, x1, x2 = build(name)
    x1[1] = torch.nan
    for first, second in ((x1, None), (x1, x2), (x2, x1)):
        with pytest.warns(NotFiniteWarning, match=r"Jacobians of (x1|x2) are not finite: NaN in the kernel"):
            kernel = empirical_ntk(model, first, second, method=method, interacting=True)
        assert kernel.shape == kernel_of(model, first, second).shape
        assert kernel.isnan().all()


def test_outputs_a_few_at_a_time(monkeypatch, compute):
    model, x1, x2 = build("batch_norm2d")
    expected = reduced(kernel_of(model, x1, x2), compute), reduced(kernel_of(model, x1), compute)
    limit_memory(monkeypatch, backpropagated=8 * 1600)
    monkeypatch.setattr(contract, "available", lambda device: None)
    assert_close(empirical_ntk(model, x1, x2, compute=compute, interacting=True), expected[0])
    assert_close(empirical_ntk(model, x1, compute=compute, interacting=True), expected[1])


def test_prepared_kernels():
    model, x1, x2 = build("batch_norm2d")
    kernel = empirical_ntk_fn(model, interacting=True)
    for _ in range(3):
        assert torch.equal(kernel(x1, x2), empirical_ntk(model, x1, x2, interacting=True))
        assert torch.equal(kernel(x2), empirical_ntk(model, x2, interacting=True))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) / 10)
    assert_close(kernel(x1[:2], x2), kernel_of(model, x1[:2], x2))


def test_kernels_of_outputs(compute):
    model, x1, x2 = build("batch_norm1d")
    both = empirical_kernels(model, x1, x2, compute=compute, interacting=True)
    assert_close(both.ntk, reduced(kernel_of(model, x1, x2), compute))
    expected = torch.einsum("nc,md->nmcd", *(model(x).detach() for x in (x1, x2)))
    assert_close(both.nngp, reduced(expected, compute))
    assert_close(nngp(model, x1, x2, compute=compute, interacting=True), reduced(expected, compute))


def test_the_oracle():
    model, x1, x2 = build("contrastive")
    for route in (jacobian_contraction, ntk_vector_products):
        assert_close(route(model, x1, x2, interacting=True), kernel_of(model, x1, x2))
    graph = jacobian_contraction(model, x1, x2, interacting=True, create_graph=True)
    assert graph.requires_grad
    assert_close(graph.detach(), kernel_of(model, x1, x2))


def test_rules_cover_all():
    for name in MODELS:
        model, x1, x2 = build(name)
        for second in (None, x2):
            found = explain(model, x1, second, interacting=True)
            assert (found.capture, found.fallback) == ("autograd", {}), name


def test_messages():
    model, x, _ = build("batch_norm1d")
    keyword = "if the whole batch is one input, pass interacting=True"
    with pytest.raises(UnsupportedModelError, match=f"1: BatchNorm1d normalises by batch statistics.*; or, {keyword}"):
        empirical_ntk(model, x)
    model, x, _ = build("attention")
    keyword = "pass interacting=True, if the whole batch is one input"
    with pytest.raises(UnsupportedModelError, match=f"samples influence one another .*; or {keyword}"):
        empirical_ntk(model, x)
    with pytest.raises(UnsupportedModelError, match=rf"has shape \[3, 3\], not \[3, 2\].*; or {keyword}"):
        empirical_ntk(nn.Linear(5, 2).double(), x, output=lambda out: out @ out.T)
    with pytest.raises(UnsupportedModelError, match=r"its output for 4 samples has shape \[2\]\. Its leading axis"):
        empirical_ntk(model, x, interacting=True, output=lambda out: out[:2, 0])


def test_what_stays_refused():
    model, x, _ = build("batch_norm1d")
    with pytest.raises(UnsupportedModelError, match="2: Dropout drops activations at random"):
        empirical_ntk(nn.Sequential(*model[:2], nn.Dropout(), model[3]), x, interacting=True)
    with pytest.raises(UnsupportedRouteError, match=r"interacting=True the whole batch\. Use another method"):
        empirical_ntk(model, x, interacting=True, method="vivit")
