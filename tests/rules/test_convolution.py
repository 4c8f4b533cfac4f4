"""Convolutions of any geometry."""

import pytest
import torch
from conftest import COMPUTES, assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import empirical_ntk
from ggn_ntk.reference import jacobian_contraction


@st.composite
def convolutions(draw):
    """A convolution of any dimension and the spatial shape of its input."""
    dim, transpose = draw(st.integers(1, 3)), draw(st.booleans())

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dim))

    groups, spatial, stride, dilation = draw(st.integers(1, 2)), each(1, 6 if dim < 3 else 4), each(1, 3), each(1, 2)
    options = {"kernel_size": each(1, 3), "stride": stride, "dilation": dilation, "groups": groups}
    options |= {"bias": draw(st.booleans()), "padding": each(0, 2)}
    if transpose:
        padded = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        options["output_padding"] = padded
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if all(s == 1 for s in stride) and draw(st.booleans()):
            options["padding"] = "same"
    layer = getattr(nn, f"Conv{'Transpose' if transpose else ''}{dim}d")
    return lambda i, o: layer(i * groups, o * groups, **options), groups, spatial


@settings(deadline=None, max_examples=80)
@given(
    drawn=convolutions(),
    compute=st.sampled_from(COMPUTES),
    symmetric=st.booleans(),
    capture=st.sampled_from(["sequential", "autograd"]),
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolutions_of_any_geometry(drawn, compute, symmetric, capture):
    layer, groups, spatial = drawn
    torch.manual_seed(0)
    model = nn.Sequential(layer(1, 2), nn.Tanh(), nn.Flatten()).double()
    x1, x2 = torch.randn(2, groups, *spatial).double(), torch.randn(3, groups, *spatial).double()
    try:
        outputs = model(x1).shape[1]
    except (RuntimeError, ValueError):  # no such convolution
        assume(False)
    assume(0 < outputs <= 200)
    model.append(nn.Linear(outputs, 2).double())
    x2 = None if symmetric else x2
    kernel = empirical_ntk(model, x1, x2, compute=compute, method="structured", capture=capture)
    assert_close(kernel, jacobian_contraction(model, x1, x2, compute=compute))
