"""The capture by autograd, for models that are no sequence of layers: exact, or by the fallback, or refused."""

import ctypes

import pytest
import torch
from cases import BY_NAME, CASES
from conftest import COMPUTES, NAMED, assert_close, first_samples, limit_memory, oracle, oracle_sum, places
from covering import covers
from models import LARGE, MODELS, Scaled, each
from torch import nn
from unchanged import unchanged

from ggn_ntk import Factored, UnsupportedModelError, empirical_ntk, explain, register_rule
from ggn_ntk.contraction import contract, vector_products
from ggn_ntk.jacobians import autograd
from ggn_ntk.jacobians.backward import identity
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.stages import stages
from ggn_ntk.memory.buffers import Buffer
from ggn_ntk.models.comparison import differing
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.rules.flow import Flow
from ggn_ntk.rules.registry import _RULES


@covers({"case": each(MODELS), "compute": COMPUTES, "dtype, device": places})
def test_exact(case, compute, dtype, device):
    model, x1, x2 = case.build(dtype, device)
    options = {"compute": compute, "method": "structured", "output": case.output}
    for x, symmetric in ((x2, False), (None, True)):
        assert_close(empirical_ntk(model, x1, x, **options), oracle_sum(case, symmetric, compute, device))


@pytest.mark.parametrize("case", each(MODELS))
def test_explain_names_the_fallback(case):
    model, x1, x2 = case.build()
    with unchanged(model):
        explanation = explain(model, x1, x2, output=case.output)
    assert explanation.method == "structured"
    assert set(explanation.fallback) == set(case.missed)
    if case.needs == "transformers" or case.name == "transformer_encoder":
        assert explanation.covered >= 0.9 * explanation.entries
    for name in case.missed:
        assert name in str(explanation)
    assert set(explain(model, x1, output=case.output).fallback) == set(case.missed)


@pytest.fixture
def memory_given_back():
    """Return the memory of large models to the system: the C library would keep it for the process."""
    yield
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize("case", each(LARGE))
def test_torchvision(case):
    model, x1, x2 = case.build()
    assert_close(empirical_ntk(model, x1, x2, method="structured"), oracle_sum(case))
    model.float()
    x1, x2 = x1.float(), x2.float()
    assert_close(
        empirical_ntk(model, x1, compute="trace", method="structured"),
        oracle_sum(case, symmetric=True, compute="trace"),
    )
    assert_close(
        empirical_ntk(model, x1, x2, compute="diagonal", method="structured"), oracle_sum(case, compute="diagonal")
    )


@covers({"case": CASES, "compute": COMPUTES, "symmetric": [False, True], "dtype, device": places})
def test_sequential_models(case, compute, symmetric, dtype, device):
    model, x1, x2 = case.build(dtype, device)
    kernel = empirical_ntk(model, x1, None if symmetric else x2, compute=compute, capture="autograd")
    assert_close(kernel, oracle_sum(case, symmetric, compute, device))


@pytest.mark.parametrize("name", ["tied_transformer", "custom_parameter", "residual", "tied", "mapping_inputs"])
def test_per_parameter(name, compute):
    model, x1, x2 = BY_NAME[name].build()
    kernels = empirical_ntk(model, x1, x2, compute=compute, capture="autograd", per_parameter=True)
    assert list(kernels) == list(oracle(name))
    for key, kernel in kernels.items():
        assert_close(kernel, oracle(name, compute=compute)[key], scale=oracle_sum(BY_NAME[name], compute=compute))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("budget", [1, 1000, 10**4])
def test_outputs_in_chunks(symmetric, budget, compute, monkeypatch):
    limit_memory(monkeypatch, backpropagated=8 * budget)
    monkeypatch.setattr(contract, "available", lambda device: None)
    for name in ("output_sequence", "tied_embedding", "output_scalar", "mlp_one_output"):
        model, x1, x2 = BY_NAME[name].build()
        kernel = empirical_ntk(model, x1, None if symmetric else x2, compute=compute, capture="autograd")
        assert_close(kernel, oracle_sum(BY_NAME[name], symmetric, compute))


@pytest.mark.parametrize("case", each(MODELS))
def test_rules_cover_no_less_of_one_sample_than_of_several(case):
    model, x1, x2 = case.build(torch.float32)
    one, several = (explain(model, *x, output=case.output) for x in ((first_samples(x1, slice(1)),), (x1, x2)))
    assert set(one.fallback) <= set(several.fallback)


STAGES = ["one by one", "at once"]


@pytest.fixture(params=STAGES)
def stage_by_stage(request, monkeypatch):
    """Divides the way back wherever it can be, and passes outputs one by one, or where they can be at once."""
    limit_memory(monkeypatch, passing=1, one_by_one=0 if request.param == "one by one" else 2**33)


@covers({"case": CASES, "compute": COMPUTES, "stage_by_stage": STAGES}, indirect=["stage_by_stage"])
def test_way_back_in_stages(case, compute, stage_by_stage):
    model, x1, x2 = case.build()
    kernel = empirical_ntk(model, x1, x2, compute=compute, capture="autograd")
    assert_close(kernel, oracle_sum(case, compute=compute))


@pytest.mark.usefixtures("stage_by_stage")
@pytest.mark.parametrize("case", each(MODELS))
def test_way_back_in_stages_through_any_model(case):
    model, x1, x2 = case.build(torch.float32)
    assert_close(empirical_ntk(model, x1, x2, method="structured", output=case.output), oracle_sum(case))


@pytest.mark.parametrize("time_first", [True, False])
def test_samples_of_a_set_are_one_run_of_s(time_first, monkeypatch):
    """Where samples and time share an axis: x1's part of ``s`` is taken out of it without a copy."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            x = x.transpose(0, 1) if time_first else x
            hidden = torch.tanh(x.reshape(-1, 4) @ self.w.T).reshape(*x.shape[:2], 5)
            return (hidden @ self.v.T).mean(0 if time_first else 1)

    found, entering = [], Flow.entering

    def entered(operation, s, samples):
        found.append((s, samples))
        return entering(operation, s, samples)

    monkeypatch.setattr(Flow, "entering", entered)
    limit_memory(monkeypatch, one_by_one=0)
    model, x1, x2 = Positions().double(), torch.randn(7, 6, 4).double(), torch.randn(8, 6, 4).double()
    assert_close(empirical_ntk(model, x1, x2), jacobian_contraction(model, x1, x2))
    whole = [s for s, samples in found if samples.outer * samples.inner == 6 and 15 in s.shape]
    assert whole
    assert all(s.shape[2] == 15 and s.stride(2) == s.numel() // 15 for s in whole)


@pytest.mark.parametrize("kind", ["torch.compile", "compile()", "inner"])
def test_compiled(kind):
    model, x1, x2 = BY_NAME["residual"].build()
    if kind == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif kind == "compile()":
        model.compile(backend="eager")
    else:
        model.first.compile(backend="eager")
    model(x1)
    with unchanged(model):
        assert_close(empirical_ntk(model, x1, x2, method="structured"), oracle_sum(BY_NAME["residual"]))
    assert not explain(model, x1, x2).fallback


@pytest.mark.parametrize("method", ["structured", "jacobian_contraction"])
def test_reentrant_checkpoints(method, compute):
    """Which neither torch.func nor autograd.grad supports."""
    model, x1, x2 = NAMED["checkpointed"].build()
    model.use_reentrant = True
    with unchanged(model):
        kernel = empirical_ntk(model, x1, x2, compute=compute, method=method)
        assert not explain(model, x1, x2).fallback
    assert_close(kernel, oracle_sum(NAMED["checkpointed"], compute=compute))


def test_inference_mode():
    model, x1, x2 = BY_NAME["tied_transformer"].build()
    with torch.inference_mode(), unchanged(model):
        kernel = empirical_ntk(model, x1 + 0, x2 + 0, method="structured")
    assert_close(kernel, oracle_sum(BY_NAME["tied_transformer"]))


def test_views_that_ask_for_a_layout_in_memory():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(27, 2)

        def forward(self, x):
            return self.head(self.conv(x.view(len(x), -1).view(x.shape)).contiguous().view(len(x), -1))

    model, x = Viewed().double(), torch.randn(3, 2, 4, 4).double()
    assert not explain(model, x).fallback
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_hooks_of_the_user():
    model, x = Scaled().double(), torch.randn(3, 5).double()
    model.layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.layer.register_forward_hook(lambda module, args, output: output.sin())
    with unchanged(model):
        kernel = empirical_ntk(model, x, method="structured")
        assert not explain(model, x).fallback
    assert_close(kernel, jacobian_contraction(model, x))


@pytest.mark.parametrize("n", range(1, 10))
def test_an_exception_half_way_changes_nothing(n):
    calls = 0

    class Failing(nn.Module):
        def forward(self, x):
            nonlocal calls
            calls += 1
            if calls == n:
                raise ArithmeticError("half-way")
            return x.sin()

    model = nn.Sequential(nn.Linear(5, 4), Failing(), nn.Linear(4, 2))
    x = torch.randn(20, 5)
    with unchanged(model):
        try:
            empirical_ntk(model, x, method="structured")
        except ArithmeticError:
            assert calls == n
        else:
            assert calls < n or n == 6  # vmap need not go through the model


# ---------------------------------------------------------------- refusals


class AcrossSamples(nn.Module):
    """Attention whose sequence axis is that of the samples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x).sum(1))


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.norm(self.layer(x))) + x


@pytest.mark.parametrize("method", ["structured", "auto"])
@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (lambda: AcrossSamples().eval(), (5, 3, 4), "samples influence one another"),
        (lambda: AcrossSamples().eval(), (2, 3, 4), "samples influence one another"),
        (lambda: WithDropout(), (5, 4), "norm: BatchNorm1d normalises by batch statistics"),
        (lambda: WithDropout(), (5, 4), "dropout: Dropout drops activations at random"),
    ],
)
def test_refused_by_name(build, shape, message, method):
    model, x = build(), torch.randn(shape)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        empirical_ntk(model, x, method=method)


@pytest.mark.parametrize("wanted", [None, ["head.weight"], ["body.weight"]])
@pytest.mark.parametrize("n", [2, 3, 40])
def test_samples_that_interact_in_front_of_or_behind_a_layer(wanted, n):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x)
            return self.head(h - h.mean(0))

    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(Centred(), torch.randn(n, 5), method="structured", params=wanted)


@pytest.mark.parametrize("n", range(2, 20))
@pytest.mark.parametrize("special", [slice(None, 1), slice(-1, None)], ids=["first", "last"])
def test_a_single_sample_that_enters_the_output_of_all(special, n):
    class Special(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aside = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            return self.body(x).tanh() + self.aside(x[special])

    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(Special(), torch.randn(n, 5), method="structured")


def test_samples_that_interact_in_large_batches_alone():
    class Large(Scaled):
        def forward(self, x):
            return super().forward(x - (x.mean(0) if len(x) > 4 else 0)) * self.layer(x).mean(0)[:2] ** (len(x) > 4)

    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(Large(), torch.randn(6, 5), method="structured")


# ---------------------------------------------------------------- rules that are wrong


class Wave(nn.Module):
    """A layer of a user, whose rule is wrong."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.weight * x


class WithWave(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.wave, self.last = nn.Linear(5, 4), Wave(), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.wave(h).tanh() + h)


@pytest.mark.parametrize("kind", ["scaled", "negated", "permuted", "zero", "shape", "raises", "silent", "batch"])
def test_a_wrong_rule_is_caught(kind):
    @register_rule(Wave)
    def wave(module, x, s):
        if kind == "raises":
            raise ArithmeticError("no idea")
        if kind == "silent":
            return {}
        if kind == "shape":
            return {"weight": Factored("cnk->cnk", (s.flatten(2)[..., :3],))}
        factor = {"scaled": 1.001, "negated": -1.0, "zero": 0.0}.get(kind, 1.0)
        if kind == "permuted":
            s, x = s.flip(-1), x.flip(-1)
        if kind == "batch" and len(x) > 1:
            factor = 1.1
        return {"weight": Factored("cnk,nk->cnk", (factor * s, x))}

    torch.manual_seed(0)
    model, x1, x2 = WithWave().double(), torch.randn(3, 5).double(), torch.randn(2, 5).double()
    sequential = nn.Sequential(model.first, model.wave, nn.Tanh(), model.last)
    for net, name in ((model, "wave.weight"), (sequential, "1.weight")):
        for options in ({}, {"compute": "trace"}):
            kernel = empirical_ntk(net, x1, x2, method="structured", **options)
            assert_close(kernel, jacobian_contraction(net, x1, x2, **options))
        assert list(explain(net, x1, x2).fallback) == [name]


class Unknown(torch.autograd.Function):
    """An operation of a user, for which there is no rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, s):
        x, weight = ctx.saved_tensors
        return s * weight, (s * x).sum(0)


class WithUnknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x):
        return Unknown.apply(x, self.weight)


def test_nothing_is_left_for_rules():
    model, x = WithUnknown().double(), torch.randn(3, 5).double()
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))
    assert explain(model, x).fallback == {"weight": "there is no rule for UnknownBackward, in (model)"}


def test_recurrent_layers_alone():
    model, x = nn.LSTM(3, 4, batch_first=True).double(), torch.randn(2, 3, 3).double()
    options = {"output": lambda out: out[0][:, -1]}
    assert_close(empirical_ntk(model, x, method="structured", **options), jacobian_contraction(model, x, **options))
    assert not explain(model, x, **options).fallback


def test_vmap_fails_in_the_backward_pass():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, s):
            assert s.sum().item() != 0  # depends on data
            return 2 * ctx.saved_tensors[0] * s

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(Square.apply(self.a(x)))

    model, x = Net().double(), torch.randn(3, 5).double()
    assert not explain(model, x).fallback
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


# ---------------------------------------------------------------- arguments


def test_captures_and_methods():
    model, x = nn.Linear(5, 3), torch.randn(2, 5)
    with pytest.raises(ValueError, match="capture must be one of 'auto', 'sequential', 'autograd', got 'hooks'"):
        empirical_ntk(model, x, capture="hooks")
    with pytest.raises(ValueError, match="capture is for method='structured' alone, got method='vivit'"):
        empirical_ntk(model, x, method="vivit", capture="autograd")
    with pytest.raises(UnsupportedModelError, match="Scaled may compute between its modules"):
        empirical_ntk(Scaled(), x, capture="sequential")
    assert_close(empirical_ntk(model, x, capture="sequential"), empirical_ntk(model, x, capture="autograd"))
    assert [explain(model, x, capture=kind).capture for kind in ("auto", "autograd")] == ["sequential", "autograd"]
    with pytest.raises(UnsupportedModelError, match=r"it returns tuple, not a tensor\. Pass output="):
        empirical_ntk(nn.LSTM(5, 3), torch.randn(2, 1, 5))


@pytest.mark.parametrize("method", ["auto", "structured", "jacobian_contraction", "ntk_vector_products"])
def test_output_picks_a_tensor(method):
    class Several(Scaled):
        def forward(self, x):
            return {"logits": super().forward(x), "other": x}

    torch.manual_seed(0)
    model, x = Several().double(), torch.randn(3, 5).double()
    plain = Scaled().double()
    plain.load_state_dict(model.state_dict())
    kernel = empirical_ntk(model, x, method=method, output=lambda out: out["logits"], check=True)
    assert_close(kernel, jacobian_contraction(plain, x))
    with pytest.raises(UnsupportedModelError, match="what it returns is not its last layer's output"):
        empirical_ntk(nn.Linear(5, 3), x.float(), method="vivit", output=lambda out: out)


# ---------------------------------------------------------------- layers of other packages


@pytest.mark.parametrize(
    ("name", "build", "shape"),
    [
        ("timm.layers.norm_act.BatchNormAct2d", "batch_norm_act", (3, 4, 2, 2)),
        ("timm.layers.norm.LayerNorm2d", "layer_norm_2d", (3, 4, 2, 2)),
        ("timm.layers.norm.RmsNorm", "rms_norm", (3, 5, 4)),
    ],
)
def test_timm(name, build, shape):
    """Layers of the same names and attributes, since timm itself need not be there."""

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    class LayerNorm2d(nn.LayerNorm):
        def __init__(self):
            super().__init__(4)

        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class RmsNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    kind = {"batch_norm_act": BatchNormAct2d, "layer_norm_2d": LayerNorm2d, "rms_norm": RmsNorm}[build]
    kind.__module__, kind.__qualname__ = name.rsplit(".", 1)
    layer = kind()
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    if build == "batch_norm_act":
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    features = torch.Size(shape[1:]).numel()
    model = nn.Sequential(nn.Unflatten(1, shape[1:]), layer, nn.Flatten(), nn.Linear(features, 2)).eval().double()
    x = torch.randn(shape[0], features).double()
    assert not explain(model, x).fallback
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


@pytest.mark.parametrize("largest", [0, 2**16], ids=["one by one", "at once"])
def test_a_call_without_s_is_an_error_and_shifts_no_other(largest, monkeypatch):
    class Aside(nn.Sequential):
        def forward(self, x):
            self[1](x)
            return self[0](x)

    limit_memory(monkeypatch, one_by_one=4 * largest)
    model, x = Aside(nn.Linear(3, 2), nn.Linear(3, 2)), torch.randn(4, 3)
    request = Request.parse(model, x, None, AxesRequest.parse("full"), params=None, per_parameter=False)
    recording = record(request, request.x1, every=True)
    assert len(recording.calls) == 2
    *_, stage = stages(recording.output, recording.calls)
    with pytest.raises(RuntimeError, match="not have been used"):
        autograd.pull_back(stage, identity(recording.output), Buffer(0))
    assert_close(empirical_ntk(model, x, capture="autograd"), jacobian_contraction(model, x))


class Attention(nn.Module):
    """Self-attention, with a layer in front unless its input is to be the model's."""

    def __init__(self, batch_first=True, first=True, again=False, **options):
        super().__init__()
        self.first = nn.Linear(4, 4) if first else nn.Identity()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head, self.batch_first, self.again = nn.Linear(4, 2), batch_first, again

    def attend(self, x, mask=None):
        x = x if self.batch_first else x.transpose(0, 1)
        h, _ = self.attention(x, x, x, need_weights=False, attn_mask=mask)
        return h if self.batch_first else h.transpose(0, 1)

    def forward(self, x):
        h = self.attend(self.first(x), torch.ones(3, 3).triu(1).bool())
        return self.head(self.attend(h).sum(1) if self.again else h.sum(1))


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": False}, {"bias": False}, {"first": False}, {"again": True}, {"again": True, "first": False}],
    ids=str,
)
@pytest.mark.parametrize("wanted", ["", "weight", "in_proj", "in_proj_bias", "out_proj", "out_proj.bias"])
def test_the_projection_of_self_attention_is_found_in_the_graph(options, wanted):
    torch.manual_seed(0)
    model, x1, x2 = Attention(**options).double(), torch.randn(3, 3, 4).double(), torch.randn(2, 3, 4).double()
    names = [name for name, _ in model.named_parameters() if wanted in name]
    if not names:
        pytest.skip("no such parameter")
    kernel = empirical_ntk(model, x1, x2, params=names, method="structured")
    assert_close(kernel, jacobian_contraction(model, x1, x2, params=names))
    assert not explain(model, x1, x2, params=names).fallback


def test_a_rule_of_the_user_for_a_layer_of_torchs_takes_precedence_over_the_graph(monkeypatch):
    monkeypatch.setitem(_RULES, nn.MultiheadAttention, lambda module, x, s: {})
    model, x = Attention().double(), torch.randn(3, 3, 4).double()
    attended = {name for name, _ in model.named_parameters() if "attention" in name}
    assert set(explain(model, x).fallback) == attended
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_importing_takes_no_third_party():
    import subprocess
    import sys

    code = "import sys, ggn_ntk; assert not {'transformers', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.fixture
def few_vectors(monkeypatch):
    """Take every gradient for a large one, of which products with two vectors are compared."""
    monkeypatch.setattr(vector_products, "_LARGE", 0)
    monkeypatch.setattr(vector_products, "_VECTORS", 2)
    vector_products._random_vectors.cache_clear()
    yield
    vector_products._random_vectors.cache_clear()


@pytest.mark.parametrize("name", ["embedding", "tied_embedding", "conv2d_options", "linear_3d", "bilinear", "tied"])
@pytest.mark.parametrize("taken", ["sequential", "autograd"])
def test_large_gradients_are_compared_by_products_with_vectors(name, taken, few_vectors):
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    kernel = empirical_ntk(model, x1, x2, method="structured", capture=taken)
    assert_close(kernel, oracle_sum(case))
    assert not explain(model, x1, x2, capture=taken).fallback


@pytest.mark.parametrize("wrong", [lambda w: 1.001 * w, lambda w: w.flip(-1), lambda w: w.flip(0), lambda w: w.roll(1)])
def test_products_with_vectors_tell_gradients_apart(wrong, few_vectors):
    gradient = torch.randn(6, 4).double()
    assert vector_products.sketched(gradient, gradient).shape == (12,)
    (name,) = differing(
        {"w": vector_products.sketched(wrong(gradient), gradient)},
        {"w": vector_products.sketched(gradient, gradient)},
        1e-8,
    )
    assert name == "w"
    assert not differing(
        {"w": vector_products.sketched(gradient, gradient)}, {"w": vector_products.sketched(gradient, gradient)}, 1e-8
    )
