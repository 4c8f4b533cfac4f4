"""Models with a frozen base in a low precision, and with complex numbers inside."""

import copy
import math

import pytest
import torch
from conftest import DEVICES, assert_close, kernel_of
from torch import nn

from ggn_ntk import Factored, RouteWarning, UnsupportedModelError, empirical_ntk, explain, nngp, register_rule
from ggn_ntk.reference import relative_error

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

routes = pytest.mark.parametrize("method", ["structured", "jacobian_contraction", "ntk_vector_products"])


class Adapted(nn.Module):
    """A frozen layer, and a float32 adapter beside it, which may be used in the precision of the layer."""

    def __init__(self, inputs, outputs, dtype=torch.bfloat16, cast=False):
        super().__init__()
        self.base, self.cast = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False), cast
        self.a, self.b = nn.Parameter(torch.randn(2, inputs) / 3), nn.Parameter(torch.randn(outputs, 2) / 3)

    def forward(self, x):
        low = x.to(self.base.weight.dtype)
        if self.cast:
            return (self.base(low) + low @ self.a.to(low).T @ self.b.to(low).T).to(x.dtype)
        return self.base(low).to(x.dtype) + x @ self.a.T @ self.b.T


class Quantised(Adapted):
    """A frozen layer of eight bits, which computes in float16."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, torch.float32)
        drawn = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8)
        self.base, self.weight = None, nn.Parameter(drawn, requires_grad=False)

    def forward(self, x):
        return (x.half() @ (self.weight.half() / 100).T).to(x.dtype) + x @ self.a.T @ self.b.T


class Backbone(nn.Module):
    """Frozen features, and a float32 head."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        layers = (nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh())
        self.body = nn.Sequential(*layers).to(dtype).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def features(self, x):
        return self.body(x.to(self.body[0].weight.dtype))

    def forward(self, x):
        return self.head(self.features(x).to(self.head.weight.dtype))


class Wrapped(Backbone):
    """The same, with something between features and head."""

    def __init__(self, function, dtype=torch.bfloat16):
        super().__init__(dtype)
        self.function = function

    def features(self, x):
        return self.function(super().features(x))


class Buffered(Backbone):
    """A layer that is scaled by a buffer."""

    def __init__(self):
        super().__init__(torch.float32)
        self.register_buffer("scale", torch.rand(8, dtype=torch.bfloat16))

    def features(self, x):
        return super().features(x * self.scale)


def stack(layer):
    return nn.Sequential(layer(8, 12), nn.Tanh(), layer(12, 12), nn.Tanh(), layer(12, 3))


FROZEN = {
    "bfloat16": (lambda: stack(Adapted), torch.bfloat16),
    "float16": (lambda: stack(lambda i, o: Adapted(i, o, torch.float16)), torch.float16),
    "used in bfloat16": (lambda: stack(lambda i, o: Adapted(i, o, cast=True)), torch.bfloat16),
    "int8": (lambda: stack(Quantised), torch.float16),
    "backbone": (Backbone, torch.bfloat16),
    "buffer": (Buffered, torch.float32),
}


@routes
@pytest.mark.parametrize(("build", "low"), FROZEN.values(), ids=FROZEN.keys())
def test_a_frozen_base_of_low_precision(build, low, method):
    """Within the rounding of the model itself, of the same model in a loop, and of the one in float64."""
    model, tolerance = build(), 1e-5 if low == torch.float32 else math.sqrt(torch.finfo(low).eps)
    kernel = empirical_ntk(model, X[:4], X[4:], method=method, check=True)
    assert kernel.dtype == torch.float32
    assert relative_error(kernel, kernel_of(model, X[:4], X[4:])) < tolerance
    if all(p.is_floating_point() for p in model.parameters()):
        wide = copy.deepcopy(model).double()
        assert relative_error(kernel, kernel_of(wide, X[:4].double(), X[4:].double())) < tolerance


@pytest.mark.parametrize("name", ["bfloat16", "used in bfloat16", "int8"])
def test_rules_cover_adapters(name):
    model = FROZEN[name][0]()
    found = explain(model, X)
    assert (found.covered, found.fallback) == (found.entries, {})
    assert list(empirical_ntk(model, X, per_parameter="module")) == ["0", "2", "4"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_base_on_a_device(device):
    model = stack(Adapted)
    expected = empirical_ntk(model, X)
    kernel = empirical_ntk(copy.deepcopy(model).to(device), X.to(device))
    assert relative_error(kernel.cpu(), expected) < 0.03


def test_inputs_may_be_of_any_dtype_of_the_parameters():
    model = Backbone()
    assert torch.equal(empirical_ntk(model, X.bfloat16()), empirical_ntk(model, X.bfloat16().float()))
    with pytest.raises(ValueError, match=r"x1 is torch.float16, the model's parameters torch.bfloat16, torch.float32"):
        empirical_ntk(model, X.half())
    quantised = stack(Quantised)
    with pytest.raises(ValueError, match=r"x1 is torch.float64, the model's parameters torch.float32\."):
        empirical_ntk(quantised, X.double())


@routes
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Wrapped(lambda h: h * 1.5, torch.float32), None),
        (lambda: Wrapped(lambda h: h.half().float(), torch.float32), "it computes in torch.float16 inside"),
        (lambda: Wrapped(torch.Tensor.half), None),
        (lambda: Wrapped(torch.Tensor.bfloat16, torch.float16), "it computes in torch.bfloat16 inside"),
        (lambda: Wrapped(lambda h: h - h.mean(0)), "samples influence one another"),
        (lambda: Backbone().requires_grad_(), "body.0.weight: is torch.bfloat16, as are 5 others. .* leave such param"),
    ],
    ids=["float32", "float16 in float32", "float16 in bfloat16", "bfloat16 in float16", "mixed", "wanted"],
)
def test_a_model_computes_as_coarsely_as_its_base_and_no_coarser(build, message, method):
    model = build()
    if message is None:
        assert relative_error(empirical_ntk(model, X, method=method), kernel_of(model, X)) < 0.03
        return
    with pytest.raises(UnsupportedModelError, match=message):
        empirical_ntk(model, X, method=method)


def test_outputs_of_low_precision_are_refused_and_can_be_converted():
    low = Backbone().body
    with pytest.raises(UnsupportedModelError, match=r"its output is torch.bfloat16\. .* output= may convert them"):
        nngp(low, X.bfloat16())
    outputs = low(X.bfloat16()).double()
    assert_close(nngp(low, X.bfloat16(), output=torch.Tensor.float), torch.einsum("nc,md->nmcd", outputs, outputs))


def test_parameters_that_are_not_wanted_may_be_of_low_precision():
    model = Backbone().requires_grad_()
    assert_close(
        empirical_ntk(model, X, params="head"), empirical_ntk(model.requires_grad_(), X, params="head*").double()
    )


class Scaled(nn.Module):
    """A scale, with a rule of its own, in front of frozen features."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 1)

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("factor", [1, 1.01])
def test_a_rule_is_told_from_rounding_of_the_base(factor):
    """The rule and autograd make of the same ``s`` what differs by float32's rounding alone."""

    @register_rule(Scaled)
    def scaled(module, x, s):
        return {"scale": Factored("cni,ni->cni", (s, factor * x))}

    model = nn.Sequential(Scaled(), Backbone())
    if factor == 1:
        assert explain(model, X).fallback == {}
        return
    with pytest.warns(RouteWarning, match="0.scale: its Jacobian by its rule differs from autograd's .*e-0"):
        kernel = empirical_ntk(model, X)
    assert relative_error(kernel, kernel_of(model, X)) < 0.05


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)).eval()
    wide = copy.deepcopy(model).double()
    expected = kernel_of(wide, X.bfloat16().double())
    for method in ("structured", "jacobian_contraction", "ntk_vector_products"):
        kernel = empirical_ntk(
            model, X.bfloat16(), method=method, params="*lora*", output=torch.Tensor.float, check=True
        )
        assert kernel.dtype == torch.float32
        assert relative_error(kernel, expected) < 0.03
    found = explain(model, X.bfloat16(), output=torch.Tensor.float)
    assert found.fallback == {}
    assert {c.operation for c in found.contractions} == {"mm"}


class Rotary(nn.Module):
    """Real parameters, and complex phases in a buffer, as in language models."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x):
        turned = torch.view_as_complex(self.layer(x).unflatten(-1, (4, 2))) * self.phases
        return torch.view_as_real(turned).flatten(1).tanh()


class Fourier(nn.Module):
    """A spectral convolution, with complex frozen weights or real ones viewed as complex."""

    def __init__(self, frozen):
        super().__init__()
        self.first, self.last = nn.Linear(1, 3), nn.Linear(3, 1)
        w = torch.randn(3, 3, 4, 2)
        self.w = nn.Parameter(torch.view_as_complex(w) if frozen else w, requires_grad=not frozen)

    def forward(self, x):
        h = self.first(x.unsqueeze(-1)).mT
        modes = torch.fft.rfft(h)
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        kept = torch.einsum("bim,iom->bom", modes[..., :4], w)
        h = torch.fft.irfft(nn.functional.pad(kept, (0, modes.shape[-1] - 4)), n=x.shape[-1]) + h
        return self.last(h.tanh().mT).squeeze(-1)


class Combined(nn.Module):
    """Real parameters that are made complex."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Parameter(torch.rand(8, 3)), nn.Parameter(torch.rand(8, 3)), function

    def forward(self, x):
        w = torch.complex(self.a, self.b)
        return self.function(self, x.to(w.dtype) @ w, w)


COMPLEX = {
    "rotary": Rotary,
    "frozen weights": lambda: Fourier(True),
    "real weights": lambda: Fourier(False),
    "magnitude": lambda: Combined(lambda m, z, w: z.abs()),
    "conjugate": lambda: Combined(lambda m, z, w: (z.conj().tanh() * (1 + 2j) * z).real),
    "scaled": lambda: Combined(lambda m, z, w: (z * m.a[0]).real),
    "shifted": lambda: Combined(lambda m, z, w: ((z + m.b[0]) * (1 - 1j)).imag),
    "used twice": lambda: Combined(lambda m, z, w: torch.view_as_real(nn.functional.linear(z, w[:3])).flatten(1)),
    "polar": lambda: Combined(lambda m, z, w: (torch.polar(m.a, m.b)[0] * z).real),
}


@routes
@pytest.mark.parametrize("build", COMPLEX.values(), ids=COMPLEX.keys())
def test_complex_numbers_inside(build, method, dtype, recwarn):
    model = build()
    wide = copy.deepcopy(model)
    for tensor in [*wide.parameters(), *wide.buffers()]:
        tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
    expected = kernel_of(wide, X[:4].double(), X[4:].double())
    model = wide if dtype == torch.float64 else model
    assert_close(empirical_ntk(model, X[:4].to(dtype), X[4:].to(dtype), method=method, check=True), expected)
    assert not list(recwarn)  # what has no rule is nothing to warn of


def test_complex_parameters_have_no_rule():
    assert explain(Rotary(), X).fallback == {}
    assert explain(Fourier(True), X).fallback == {}
    assert explain(Fourier(False), X).fallback == {"w": "bmm computes in complex numbers, in (model)"}


def test_wanted_complex_parameters_are_refused():
    model = Fourier(True)
    model.w.requires_grad_()
    with pytest.raises(UnsupportedModelError, match=r"w: is torch.complex64. .* real and imaginary parts, or leave it"):
        empirical_ntk(model, X)
    assert torch.equal(
        empirical_ntk(model, X, params=["first", "last"]),
        empirical_ntk(model.requires_grad_(), X, params=["first", "last"]),
    )
