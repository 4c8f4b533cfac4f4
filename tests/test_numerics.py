"""Rounding: sums that cancel, gradients of zero, lower precision, masks of attention, samples that few checks see."""

import copy
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from conftest import COMPUTES, DTYPES, assert_close, call, kernel_of, loop_jacobians
from covering import covers
from models import ENCODER, hugging_face, ids, logits
from torch import nn
from torch.utils.checkpoint import checkpoint

from ggn_ntk import RouteWarning, UnsupportedModelError, empirical_ntk, explain, linearize
from ggn_ntk.methods import structured
from ggn_ntk.models.comparison import TOLERANCES, relative_error

ROUTES = ["structured", "jacobian_contraction", "ntk_vector_products"]
each_route = pytest.mark.parametrize("method", ROUTES)


@pytest.fixture(autouse=True)
def _few_attempts(monkeypatch):
    """Fail where the structured route evaluates a model again and again, instead of hanging."""
    attempts, make_plans = [], structured.make_plans

    def counted(request, *args, **kwargs):
        attempts[:] = [*attempts, request] if not attempts or attempts[-1] is request else [request]
        assert len(attempts) <= 8, "no end to it"
        return make_plans(request, *args, **kwargs)

    monkeypatch.setattr(structured, "make_plans", counted)


def cast(x, dtype):
    """Convert what is real; a tuple in any case."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in (x if isinstance(x, tuple) else (x,)))


def kernels_of(model, x1, x2=None, output=None):
    """Each parameter's kernel by a loop over samples and outputs, [N1, N2, *out, *out]."""
    first = loop_jacobians(model, x1, output)
    second = first if x2 is None else loop_jacobians(model, x2, output)
    found = call(model, x1)
    out = (found if output is None else output(found)).shape[1:]
    kernels = {name: torch.einsum("ncp,mdp->nmcd", j, second[name]) for name, j in first.items()}
    return {name: k.reshape(*k.shape[:2], *out, *out) for name, k in kernels.items()}


def reduced(kernel, compute):
    """A kernel [N1, N2, C, C] as ``compute`` has it."""
    if compute == "full":
        return kernel
    diagonal = kernel.diagonal(dim1=2, dim2=3)
    return diagonal if compute == "diagonal" else diagonal.sum(-1)


def quiet(function, *args, **kwargs):
    """Call without a word about what gives way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RouteWarning)
        return function(*args, **kwargs)


# ---------------------------------------------------------------- sums that cancel


class Of(nn.Module):
    """A network, and what a function makes of it and of the input."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, *x):
        return self.function(self.net, *x)


def tanh_net(i, o=1):
    return nn.Sequential(nn.Linear(i, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, o))


def near(*shape):
    """Pairs of points near one another."""

    def draw(n):
        x = torch.randn(n, *shape)
        return x, x + 0.005 * torch.randn(n, *shape)

    return draw


def difference(net, a, b):
    return net(a) - 0.99 * net(b)


def recur(net, x):
    h = x.new_zeros(len(x), 16)
    for t in range(x.shape[1]):
        h = torch.tanh(net["i"](x[:, t]) + net["h"](h))
    return net["o"](h)


def recurrent(i=4, o=2):
    return nn.ModuleDict({"i": nn.Linear(i, 16), "h": nn.Linear(16, 16), "o": nn.Linear(16, o)})


def second_difference(net, x, h=0.1):
    return (net(x + h) - 2 * net(x) + net(x - h)) / h**2


def tied_difference():
    """Two branches with tied weights, on the halves of the input."""
    first, second = tanh_net(6, 2), tanh_net(6, 2)
    for a, b in zip(first[::2], second[::2], strict=True):
        b.weight = a.weight
    return Of(nn.ModuleList([first, second]), lambda nets, a, b: nets[0](a) - nets[1](b))


def conv(o=2):
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, o))


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 2))


def long_sum():
    """A sum over positions that cancels but for the mean."""
    return nn.Sequential(nn.Conv1d(2, 8, 1), nn.Tanh(), nn.Conv1d(8, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten())


def tokens_of_two(n):
    x = torch.randint(20, (n, 6))
    return x, torch.where(torch.rand(n, 6) < 0.2, torch.randint(20, (n, 6)), x)


def bag():
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(48, 2))


CANCELLING = {
    "second difference": (lambda: Of(tanh_net(1), second_difference), lambda n: torch.rand(n, 1)),
    "siamese outputs": (lambda: Of(tanh_net(20, 3), difference), near(20)),
    "tied": (tied_difference, near(6)),
    "convolution": (lambda: Of(conv(), difference), near(2, 8, 8)),
    "attention": (lambda: Of(encoder(), difference), near(4, 8)),
    "tokens": (lambda: Of(bag(), difference), tokens_of_two),
    "recurrence": (lambda: Of(recurrent(), lambda net, a, b: recur(net, a) - recur(net, b)), near(12, 4)),
    "long sum": (long_sum, lambda n: torch.randn(n, 2, 3000)),
}


@pytest.mark.parametrize("name", CANCELLING)
@pytest.mark.parametrize("sizes", [(10, None), (8, 3), (1, None)], ids=str)
def test_what_cancels(name, sizes):
    """As accurate in float32 as Jacobian contraction is, whatever is asked for."""
    build, inputs = CANCELLING[name]
    model, x1, x2 = build(), *(None if n is None else inputs(n) for n in sizes)
    wide = [None if x is None else cast(x, torch.float64) for x in (x1, x2)]
    full = empirical_ntk(model.double(), *wide, method="jacobian_contraction")
    assert_close(empirical_ntk(model, *wide), full)
    model.float()
    for compute in COMPUTES:
        expected = reduced(full, compute)
        reached = relative_error(empirical_ntk(model, x1, x2, compute=compute, method="jacobian_contraction"), expected)
        kernel = empirical_ntk(model, x1, x2, compute=compute)
        assert relative_error(kernel, expected) <= max(TOLERANCES[torch.float32], 2 * reached)


TRACED = {
    "autoencoder": (lambda: nn.Sequential(*conv()[:4], nn.ConvTranspose2d(4, 1, 4, 2, 1)), (2, 2, 20, 20)),
    "wide": (lambda: nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 1024)), (2, 30)),
    "signal": (lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.GELU(), nn.Conv1d(8, 2, 3)), (2, 2, 500)),
    "sequence": (lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)), (2, 100, 8)),
}


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_traces_over_many_outputs(name, capture):
    build, shape = TRACED[name]
    model, x1, x2 = build(), torch.randn(shape), torch.randn(1, *shape[1:])
    expected = empirical_ntk(model.double(), x1.double(), x2.double(), compute="trace", method="jacobian_contraction")
    assert_close(empirical_ntk(model.float(), x1, x2, compute="trace", capture=capture), expected)
    if name == "sequence":
        assert_close(empirical_ntk(model, x1, x2, compute="trace", capture=capture, check=True), expected)


# ---------------------------------------------------------------- layers that are called many times


def recur_norm(net, x):
    return net["o"](sum(net["i"](x[:, t] + t).tanh() for t in range(x.shape[1])))


REPEATED = {
    "linear": (lambda: Of(recurrent(), recur), lambda n, t: torch.randn(n, t, 4), "net.h"),
    "norm": (
        lambda: Of(nn.ModuleDict({"i": nn.LayerNorm(4), "o": nn.Linear(4, 2)}), recur_norm),
        lambda n, t: torch.randn(n, t, 4),
        "net.i",
    ),
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_a_layer_called_many_times_takes_time_in_proportion(name, compute):
    """Contractions do not grow in number, and their operations in proportion."""
    build, inputs, layer = REPEATED[name]
    model = build().double()

    def of_layer(calls):
        explanation = explain(model, inputs(8, calls).double(), inputs(6, calls).double(), compute=compute)
        assert not explanation.fallback
        own = [c for c in explanation.contractions if c.parameter.startswith(layer)]
        return len(own), sum(c.flops for c in own)

    counts, flops = zip(*map(of_layer, (8, 16, 32)), strict=True)
    assert len(set(counts)) == 1
    assert flops[2] - flops[1] <= 2.2 * (flops[1] - flops[0])
    x = inputs(3, 12).double()
    assert_close(empirical_ntk(model, x, compute=compute), reduced(kernel_of(model, x), compute))


# ---------------------------------------------------------------- attention under masks


class Encoder(nn.Module):
    """A transformer layer under masks."""

    def __init__(self, **options):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)
        self.head, self.masks, self.pool = nn.Linear(4, 2), {}, lambda h: h.mean(1)

    def forward(self, x, padding):
        x = x if self.block.self_attn.batch_first else x.transpose(0, 1)
        h = self.block(x, src_key_padding_mask=padding, **self.masks)
        return self.head(self.pool(h if self.block.self_attn.batch_first else h.transpose(0, 1)))


class Attending(nn.Module):
    """Attention by itself, with a mask for each sample and head."""

    def __init__(self, need_weights=False, per_head=None, float_mask=False, change=False):
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.head, self.per_head, self.float_mask, self.change = nn.Linear(4, 2), per_head, float_mask, change
        self.need_weights = need_weights

    def forward(self, x, padding):
        mask = padding.clone()
        if self.float_mask:
            mask = torch.zeros_like(x[..., 0]).masked_fill(mask, -torch.inf)
        options = {"key_padding_mask": mask, "need_weights": self.need_weights}
        if self.per_head:
            options["attn_mask"] = self.per_head(x)
        h, weights = self.first(x, x, x, **options)
        h = x + h
        if self.change:  # behind the layer, in place
            mask[:, 0], mask[:, 1] = True, False
        h = (h + self.second(h, h, h, **options)[0]).mean(1)
        return self.head(h if weights is None else h * (1 + weights[:, :1, :1].squeeze(1)))


def causal(n):
    return torch.triu(torch.ones(n, n, dtype=torch.bool), 1)


def banded(x):
    """A mask of three axes, [N * heads, L, L], which depends on the sample."""
    mask = causal(x.shape[1]).expand(len(x), 2, -1, -1).clone()
    mask[:, 1, :, 0] |= (x[:, :1, 0] > 0) & (torch.arange(x.shape[1]) > 0)
    return mask.flatten(0, 1)


def with_masks(**masks):
    model = Encoder(batch_first=True)
    model.masks, model.pool = masks, lambda h: h[:, -1]
    return model


MASKED = {
    "padding": partial(Encoder, batch_first=True),
    "sequence first, norm first": partial(Encoder, norm_first=True),
    "causal": lambda: with_masks(src_mask=causal(3)),
    "causal hint": lambda: with_masks(src_mask=causal(3), is_causal=True),
    "weights": partial(Attending, need_weights=True),
    "float": partial(Attending, float_mask=True),
    "per head": partial(Attending, per_head=banded),
    "changed": partial(Attending, change=True),
    "causal and weights": partial(Attending, need_weights=True, per_head=lambda x: causal(x.shape[1])),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("padded", [[1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]], ids=str)
def test_attention_masks(name, padded):
    """Of one padded sample among others: where torch has numbers, so do all routes; where it has NaN, so do they."""
    model, x = MASKED[name]().double(), torch.randn(6, 3, 4).double()
    padding = torch.zeros(6, 3, dtype=torch.bool)
    padding[3] = torch.tensor(padded)
    expected = kernel_of(model, (x, padding))
    good = [n for n in range(6) if expected[n, n].isfinite().all()]
    assert {0, 1, 2, 4, 5} <= set(good)
    for method in ROUTES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel = empirical_ntk(model, (x, padding), method=method)
        assert_close(kernel[good][:, good], expected[good][:, good])
        assert torch.equal(kernel.isnan(), expected.isnan())


@pytest.mark.parametrize("flagged", [[50], [10, 40, 77]], ids=len)
@pytest.mark.parametrize("change", [False, True], ids=["left padded", "changed"])
def test_few_masked_samples_among_many(flagged, change):
    model, x = with_masks(src_mask=causal(3)), torch.randn(100, 3, 4).double()
    padding = torch.zeros(100, 3, dtype=torch.bool)
    padding[flagged, 0] = True
    if change:
        model, padding = Attending(change=True), padding.roll(1, 1)
    model = model.double()
    expected = quiet(
        empirical_ntk, model, (x, padding), x2=(x[flagged], padding[flagged]), method="jacobian_contraction"
    )
    assert_close(empirical_ntk(model, (x, padding))[:, flagged], expected)


# ---------------------------------------------------------------- every sample is under a check


class NoGrad(nn.Module):
    """Computes flagged samples without a graph, which forward mode ignores."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            other = 2 * torch.tanh(self.body(x))
        return self.head(torch.where(x[:, :1] > 1, other, torch.tanh(self.body(x))))


class WrongForward(torch.autograd.Function):
    """The sine; its jvp is half as large for flagged numbers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * torch.where(x > 3, x.cos() / 2, x.cos())


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        with torch.no_grad():
            self.body.weight[:, 0], self.body.weight[:, 1:] = 4, self.body.weight[:, 1:] / 4

    def forward(self, x):
        return self.head(WrongForward.apply(self.body(x)))


FEW = {"no_grad": NoGrad, "function": Sine}


def flagged_inputs(n, flagged, dtype):
    x = torch.randn(n, 5, dtype=torch.float64)
    x[:, 0] = -x[:, 0].abs().clamp(max=0.5)
    x[flagged, 0] = 1.5
    return x.to(dtype)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("flagged", [[3], [17, 30, 36]], ids=len)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "pair"])
@pytest.mark.parametrize("method", ["structured", "ntk_vector_products"])
def test_few_samples_that_forward_mode_gets_wrong(name, flagged, symmetric, method, dtype):
    model = FEW[name]().double()
    x1 = flagged_inputs(40, flagged, dtype)
    x2 = None if symmetric else flagged_inputs(3, [1], dtype)
    expected = kernel_of(model, x1.double(), None if x2 is None else x2.double())
    if method == "ntk_vector_products":
        with pytest.warns(RouteWarning, match="computed by Jacobian contraction instead of products"):
            kernel = empirical_ntk(model.to(dtype), x1, x2, method=method)
    else:
        kernel = quiet(empirical_ntk, model.to(dtype), x1, x2, method=method)
    assert_close(kernel, expected)


@pytest.mark.parametrize("method", [*ROUTES, "auto"])
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_slopes_at_exact_zeros(method, compute, dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 2)).double()
    x = torch.randint(-1, 2, (9, 4)).double()
    x[0] = torch.randn(4)
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.copy_(torch.randint(-1, 2, (6, 4)))
    expected = reduced(kernel_of(model, x), compute)
    kernel = quiet(empirical_ntk, model.to(dtype), x.to(dtype), method=method, compute=compute)
    assert_close(kernel, expected)


def linearization(model, new, x):
    """f + J (new - θ0), by plain autograd."""
    step = torch.cat([(new[name] - p).detach().flatten() for name, p in model.named_parameters()])
    jacobian = torch.cat(list(loop_jacobians(model, x).values()), 2)
    return model(x).detach() + jacobian @ step


def moved(model, size=0.1):
    return {name: (p.detach() + size).requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("first", [slice(0, 1), slice(0, 20)], ids=["one", "many"])
def test_linearizations_look_at_each_new_sample(name, first, dtype):
    model = FEW[name]().double()
    x = flagged_inputs(40, [25, 31], dtype)
    expected = linearization(model, moved(model), x.double())
    function, new = linearize(model.to(dtype)), moved(model)
    for batch in (x[first], x[20:30], x[30:], x, x[31:32]):
        index = [int((x == sample).all(1).nonzero()) for sample in batch]
        assert_close(function(new, batch).detach(), expected[index])


class Checkpointing(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        h = checkpoint(lambda h: self.second(h).tanh(), self.first(x), use_reentrant=self.use_reentrant)
        return self.head(h)


def normed():
    layers = nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*(nn.utils.parametrizations.weight_norm(m) if isinstance(m, nn.Linear) else m for m in layers))


LINEARIZED = {
    "sparse": (lambda: nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)), (20, 3)),
    "sparse bag": (lambda: nn.Sequential(nn.EmbeddingBag(20, 4, mode="sum", sparse=True), nn.Linear(4, 2)), (20, 3)),
    "checkpoint": (partial(Checkpointing, False), None),
    "reentrant": (partial(Checkpointing, True), None),
    "weight norm": (normed, None),
}


def drawn(tokens, n):
    return torch.randn(n, 5).double() if tokens is None else torch.randint(tokens[0], (n, tokens[1]))


@pytest.mark.parametrize("name", LINEARIZED)
def test_sparse_checkpointed_and_computed_weights(name):
    """Their kernels, and values and gradients of linearizations, batch after batch."""
    build, tokens = LINEARIZED[name]
    model = build().double()
    dense = copy.deepcopy(model)
    for module in dense.modules():
        module.sparse = module.use_reentrant = False
    x = drawn(tokens, 4)
    for method in (*ROUTES, "auto"):
        assert_close(quiet(empirical_ntk, model, x, method=method), kernel_of(dense, x))
    function, new = linearize(model), moved(model)
    for n in (1, 4, 6):
        x = drawn(tokens, n)
        value = function(new, x)
        assert_close(value.detach(), linearization(dense, new, x))
        for p in new.values():
            p.grad = None
        (value**2).sum().div(2).backward()
        expected = torch.autograd.grad(dense(x), list(dense.parameters()), value.detach())
        for p, gradient in zip(new.values(), expected, strict=True):
            assert_close(p.grad.to_dense(), gradient)
    x = drawn(tokens, 5)

    def loss(params, sample):
        return function(params, sample.unsqueeze(0)).sum()

    plain = {key: p.detach() for key, p in new.items()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(plain, x)
    for key, jacobian in loop_jacobians(dense, x).items():
        assert_close(each[key].to_dense().flatten(1), jacobian.sum(1))


# ---------------------------------------------------------------- lower precision inside


class Mixed(nn.Module):
    """A network with something between its layers."""

    def __init__(self, inside):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(20, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.inside = inside

    def forward(self, x):
        return self.head(self.norm(self.inside(self.first, x).to(self.head.weight.dtype)))


def under_autocast(layer, x, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        return layer(x).tanh()


def in_dtype(layer, x, dtype=torch.bfloat16):
    return (layer(x).to(dtype) * 2).tanh()


def large_entries(layer, x):
    h = layer(x)
    return torch.where(h > 1, h.bfloat16().to(h.dtype), h)


LOWER = {  # autocast leaves float64 alone
    "autocast": (under_autocast, "bfloat16", True),
    "autocast to half": (partial(under_autocast, dtype=torch.float16), "float16", True),
    "checkpoint": (lambda layer, x: checkpoint(under_autocast, layer, x, use_reentrant=False), "bfloat16", True),
    "bfloat16": (in_dtype, "bfloat16", False),
    "entries": (large_entries, "bfloat16", False),
}


@pytest.mark.parametrize("name", LOWER)
@pytest.mark.parametrize("method", [*ROUTES, "auto"])
def test_lower_precision_inside_is_refused_by_name(name, method, dtype):
    inside, kind, ignores_double = LOWER[name]
    model, x = Mixed(inside).to(dtype), torch.randn(10, 20, dtype=dtype)
    if ignores_double and dtype == torch.float64:
        assert_close(quiet(empirical_ntk, model, x, method=method), kernel_of(model, x))
        return
    for function in (partial(empirical_ntk, method=method), explain):
        with pytest.raises(UnsupportedModelError, match=f"it computes in .*{kind} inside.*autocast"):
            function(model, x)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "detached"])
@pytest.mark.parametrize("inside", [under_autocast, in_dtype], ids=["autocast", "bfloat16"])
@each_route
def test_lower_precision_without_a_graph(inside, frozen, method, dtype):
    """Is refused, or has the kernel that autograd gives."""
    model = Mixed(inside if frozen else lambda layer, x: layer(x) + inside(layer, x).detach().to(x.dtype)).to(dtype)
    model.first.requires_grad_(not frozen)
    x = torch.randn(40, 20, dtype=dtype)
    try:
        kernel = quiet(empirical_ntk, model, x, method=method)
    except UnsupportedModelError as error:
        assert "bfloat16" in str(error)  # noqa: PT017
    else:
        assert_close(kernel, kernel_of(model, x))


# ---------------------------------------------------------------- gradients of zero


def normalised(layer, norm, features):
    return nn.Sequential(layer, norm, nn.Tanh(), nn.Flatten(), nn.Linear(features, 2))


class Shifted(nn.Module):
    """One number added to what is centred or normalised over."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.shift, self.head = nn.Linear(5, 4), nn.Parameter(torch.randn(1)), nn.Linear(4, 2)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.layer(x) + self.shift))


BERT = ENCODER | {"vocab_size": 11, "num_labels": 3, "max_position_embeddings": 8, "num_hidden_layers": 1}
FEATURES = {"centred": lambda h: (h - h.mean(1, keepdim=True)).tanh(), "softmax": lambda h: h.softmax(1)}
ZERO = {
    "bert": (hugging_face("Bert", "ForSequenceClassification", **BERT), ids(), "key.bias", logits),
    "instance": (lambda: normalised(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3), 48), (2, 6, 6), "0.bias", None),
    "group": (lambda: normalised(nn.Conv1d(2, 4, 2), nn.GroupNorm(4, 4), 16), (2, 5), "0.bias", None),
} | {name: (partial(Shifted, function), (5,), "shift", None) for name, function in FEATURES.items()}


@covers(
    {"name, n": [("bert", 2)], "method": ROUTES, "dtype": DTYPES, "check": [True]},
    {"name, n, method": list(product(list(ZERO)[1:], [1, 3], ROUTES)), "dtype": DTYPES, "check": [False, True]},
)
def test_each_parameter_alone(name, n, method, dtype, check):
    """Those of gradient zero too, errors measured against what cancels; and nothing gives way for rounding."""
    build, inputs, zero, output = ZERO[name]
    model = build().eval().double()
    x = inputs(n) if callable(inputs) else torch.randn(n, *inputs).double()
    expected = kernels_of(model, x, output=output)
    scale = torch.stack([k.norm() for k in expected.values()]).norm()
    x = x if isinstance(x, dict) else x.to(dtype)
    model.to(dtype)
    for key, kernel in expected.items():
        if key.endswith(zero) or (name == "bert" and method != "ntk_vector_products"):
            found = empirical_ntk(model, x, params=[key], method=method, check=check, output=output)
            assert_close(found, kernel, scale)
        assert not key.endswith(zero) or kernel.norm() <= 1e-12 * scale


# ---------------------------------------------------------------- the dtype of a kernel


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.second(self.first(x).tanh().double())


class Narrowing(TwoDtypes):
    def forward(self, x):
        return super().forward(x).float()


@pytest.mark.parametrize("build", [TwoDtypes, Narrowing])
@pytest.mark.parametrize("method", [*ROUTES, "auto"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "pair"])
def test_the_dtype_is_that_of_the_parameters(build, method, symmetric):
    model, x1, x2 = build(), torch.randn(3, 5), None if symmetric else torch.randn(2, 5)
    own = {name: p.dtype for name, p in model.named_parameters()}
    first, second = loop_jacobians(model, x1), loop_jacobians(model, x1 if symmetric else x2)
    expected = {n: torch.einsum("ncp,mdp->nmcd", j.double(), second[n].double()) for n, j in first.items()}

    def close(kernel, wanted):
        assert relative_error(kernel, wanted) <= TOLERANCES[torch.float32]

    kernels = quiet(empirical_ntk, model, x1, x2, method=method, per_parameter=True)
    assert {name: kernel.dtype for name, kernel in kernels.items()} == own
    for name, kernel in kernels.items():
        close(kernel, expected[name])
    for names in (None, ["first.weight", "first.bias"], ["first.weight", "second.bias"], ["second.weight"]):
        kernel = quiet(empirical_ntk, model, x1, x2, method=method, params=names)
        wide = torch.float32 if names is not None and names[-1] == "first.bias" else torch.float64
        assert kernel.dtype == wide
        close(kernel, sum(expected[name] for name in names or expected))
