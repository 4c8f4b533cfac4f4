"""``memory=`` and ``progress=`` at front doors other than those of the structured route."""

import inspect

import pytest
import torch
from conftest import assert_close
from torch import nn

from ggn_ntk import (
    KernelMemoryError,
    NotFiniteWarning,
    empirical_kernels,
    empirical_ntk,
    empirical_ntk_vivit,
    nngp,
    reference,
)
from ggn_ntk.kernels import outputs
from ggn_ntk.methods import computation
from ggn_ntk.methods import reference as methods
from ggn_ntk.problem import inputs

DOORS = {
    "nngp": nngp,
    "kernels": empirical_kernels,
    "vivit": empirical_ntk_vivit,
    "jacobians": reference.jacobian_contraction,
    "products": reference.ntk_vector_products,
}


def network():
    """More activations than parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 50), *(nn.ELU() for _ in range(20)), nn.Linear(50, 2)).double()


def samples(n):
    return torch.randn(n, 3).double()


def first(y):
    return y[:, :1]


@pytest.mark.parametrize("name", DOORS)
def test_bad_values(name):
    model, x = network(), samples(3)
    with pytest.raises((ValueError, TypeError), match="memory must be a positive number of bytes"):
        DOORS[name](model, x, memory="8 apples")
    if "progress" in inspect.signature(DOORS[name]).parameters:
        with pytest.raises(TypeError, match="progress must be True, False, None or a callable"):
            DOORS[name](model, x, progress=3)


@pytest.mark.parametrize("name", DOORS)
def test_what_cannot_fit_is_refused(name):
    with pytest.raises(KernelMemoryError, match=r"The kernel alone takes .* more than memory="):
        DOORS[name](network(), samples(30), memory="20 kB")


def test_jacobians_that_cannot_fit_are_refused():
    model, x = network(), samples(30)
    with pytest.raises(KernelMemoryError, match=r"Jacobians of all samples take .* more than memory="):
        reference.jacobian_contraction(model, x, compute="trace", memory="100 kB")
    paired = {"compute": "trace", "paired": True}
    assert_close(reference.jacobian_contraction(model, x, memory="100 kB", **paired), empirical_ntk(model, x, **paired))


OPTIONS = {
    "full": {},
    "trace": {"compute": "trace"},
    "paired": {"paired": True},
    "two outputs": {"output": (None, first)},
}
MEMORY = {"nngp": "100 kB", "kernels": "200 kB", "jacobians": "500 kB", "products": "100 kB"}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("two", [False, True], ids=["one_set", "two_sets"])
def test_the_same_in_little_memory(name, options, two, monkeypatch, device):
    """Blocks of few samples, and chunks of few vectors, give the same kernels."""
    model, x1, x2 = network().to(device), samples(12).to(device), samples(12).to(device) if two else None
    largest, alone, mapped = [], outputs.compare_alone, inputs.vmap

    def compare_alone(request, x, y):
        largest.append(len(x))
        alone(request, x, y)

    def vmap(function, chunk_size=None):
        largest.append(chunk_size or 10**6)
        return mapped(function, chunk_size=chunk_size)

    expected = DOORS[name](model, x1, x2, **OPTIONS[options])
    if name == "nngp":
        monkeypatch.setattr(outputs, "compare_alone", compare_alone)
    elif name != "kernels" and options != "paired":
        monkeypatch.setattr(inputs, "vmap", vmap)
    found = DOORS[name](model, x1, x2, **OPTIONS[options], memory=MEMORY[name])
    for a, b in zip(found, expected, strict=True) if name == "kernels" else [(found, expected)]:
        assert_close(a.cpu(), b.cpu())
    if largest and not (name == "products" and "cpu" not in str(device)):  # vmap has no chunks there: it falls back
        assert min(largest) < 12


def test_samples_that_are_not_finite_are_found_in_little_memory(monkeypatch):
    model, x = network(), samples(30)
    x[[4, 17]] = torch.inf
    sizes, gradients = [], computation.gradients

    def recorded(request, some, v):
        sizes.append(len(some))
        return gradients(request, some, v)

    monkeypatch.setattr(computation, "gradients", recorded)
    with pytest.warns(NotFiniteWarning, match=r"Jacobians of x1\[4\], x1\[17\] are not finite"):
        kernel = empirical_ntk(model, x, compute="trace", memory="100 kB")
    assert max(sizes) < 10
    rows = kernel.isnan().all(1).nonzero().flatten().tolist()
    assert rows == [4, 17]


@pytest.mark.parametrize("interacting", [False, True])
def test_few_vectors_at_once(interacting, monkeypatch):
    model, x = network(), samples(12)
    expected = reference.ntk_vector_products(model, x, interacting=interacting)
    sizes, mapped = [], methods.vmap

    def vmap(function, chunk_size=None):
        sizes.append(chunk_size)
        return mapped(function, chunk_size=chunk_size)

    monkeypatch.setattr(methods, "vmap", vmap)
    assert_close(reference.ntk_vector_products(model, x, interacting=interacting, memory="10 kB"), expected)
    assert set(sizes) == {1}


@pytest.mark.parametrize("name", ["nngp", "kernels", "vivit", "products"])
def test_progress(name):
    seen = []
    DOORS[name](network(), samples(6), samples(4), progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert total == {"nngp": 1, "vivit": 1, "products": 4}.get(name, total)
