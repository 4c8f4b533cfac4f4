"""Models that write to inputs and parameters, or use layers past their rules: right kernels, all left as found."""

from contextlib import contextmanager, suppress

import pytest
import torch
from conftest import METHODS as ALL_METHODS
from conftest import assert_close, loop_kernel, mapped, seeded
from torch import nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from ggn_ntk import RouteWarning, UnsupportedModelError, empirical_ntk, explain, linearize, nngp, register_rule
from ggn_ntk.rules.linear import linear

METHODS = [method for method in ALL_METHODS if method not in ("vivit", "auto")]


def found_state(model, inputs):
    tensors = []
    for x in inputs:
        mapped(tensors.append, x)
    params = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(id(t), t._version, t.shape, t.tolist()) for t in tensors],
        [(name, id(t), t.data_ptr(), t.requires_grad, t.tolist(), sorted(vars(t).items())) for name, t in params],
        [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [len(hooks or ()) for p in model.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)],
        [(id(m), m.training, list(vars(m)), list(m._modules), list(m._parameters)) for m in model.modules()],
    )


@contextmanager
def left_as_found(model, *inputs):
    before = found_state(model, inputs)
    yield
    assert found_state(model, inputs) == before


def check_routes(build, x1, x2=None, methods=METHODS):
    model = build()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    expected = loop_kernel(build, x1, x2)
    for i, method in enumerate(methods):
        with left_as_found(model, x1, *([] if x2 is None else [x2])):
            found = empirical_ntk(model, x1, x2, method=method, check=not i)
        assert_close(found, expected)
    return model


def one_of_many(n=200, special=3):
    x = torch.randn(n, 4).double().clamp(max=2.5)
    x[torch.randperm(n)[:special], 0] = 3.0
    return x


class Model(nn.Module):
    """Lets a function do something with the model and its inputs, and goes on with what that returns."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.scale, self.position, self.change = nn.Parameter(torch.rand(5)), nn.Parameter(torch.randn(4)), change

    def forward(self, *args, **kwargs):
        x = self.change(self, *args, **kwargs)
        return self.head((self.layer(x + self.position.sin()) * self.scale).tanh())


def written_where_large(m, x):
    x[x > 0.5] = 0.0
    return x


def added(m, x):
    x += m.position
    return x


def assigned(m, x):
    x[:, 1:3] = x[:, :2].clone() * m.scale[:2]
    return x


INPUT_WRITES = [
    added, assigned, written_where_large, lambda m, x: x.sub_(0.5).div_(0.25), lambda m, x: x.relu_(),
    lambda m, x: x.T.add_(1).T, lambda m, x: x.data.mul_(3), lambda m, x: x[:, ::2].mul_(2).repeat(1, 2) + x,
    lambda m, x: torch.mul(x, 2, out=x), lambda m, x: x.detach().neg_(), lambda m, x: x.copy_(x.flip(1)),
    lambda m, x: x.unsqueeze_(1).mul_(2).squeeze_(1), lambda m, x: F.dropout(x, 0.5, False, inplace=True).sigmoid_(),
    lambda m, x: x.view(-1, 2, 2).transpose(1, 2).add_(x[:, :2, None].clone()).flatten(1),
    lambda m, x: torch._foreach_add([x], 1)[0].add_(x.mul_(2)), lambda m, x: x.index_fill_(1, torch.tensor([2]), 1.0),
]  # fmt: skip


@pytest.mark.parametrize("write", INPUT_WRITES)
def test_inputs_that_a_model_writes_to(write):
    base = torch.randn(9, 8).double()
    check_routes(seeded(Model, write), base[:3, ::2], base[2:4, ::2])
    check_routes(seeded(Model, write), torch.randn(4).double().expand(3, 4), methods=["auto"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_in_place_layers_in_front(capture, dtype):
    def build():
        return nn.Sequential(nn.Hardtanh(inplace=True), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))

    model, x1, x2 = seeded(build)().to(dtype), torch.randn(5, 4, dtype=dtype), torch.randn(200, 4, dtype=dtype)
    expected = loop_kernel(seeded(build), x1.double(), x2.double())
    with left_as_found(model, x1, x2):
        assert_close(empirical_ntk(model, x1, x2, capture=capture, check=True), expected)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda m, a, b: a.mul_(b.add_(1)), lambda m, a, b: a.add_(b).add_(b.zero_()), lambda m, a, b: b.copy_(a).sin_(),
        lambda m, a, b: a.copy_(torch._foreach_mul([a, b], 2)[1]) * b,
    ],
)  # fmt: skip
def test_several_inputs_that_a_model_writes_to(write, named):
    x1, x2 = (tuple(torch.randn(n, 4).double() for _ in range(2)) for n in (3, 2))
    if named:
        x1, x2 = ({"b": b, "a": a} for a, b in (x1, x2))
    check_routes(seeded(Model, write), x1, x2)


def test_tokens_that_a_model_writes_to():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x):
            x[:, 0] = 1
            return self.head(self.embedding(x.remainder_(7)).sum(1).tanh())

    check_routes(seeded(Tokens), torch.randint(9, (3, 5)), torch.randint(9, (2, 5)))


def under_no_grad(write):
    def change(m, x):
        with torch.no_grad():
            write(m)
        return x

    return change


def with_flags(m):
    m.position.requires_grad_(False).requires_grad_(True)
    m.scale.requires_grad_()


def written_as_numpy(m):
    m.position.detach().numpy()[:] *= 2


PARAMETER_WRITES = [
    lambda m: m.head.weight.div_(m.head.weight.norm(dim=1, keepdim=True)), lambda m: m.position.mul_(2),
    lambda m: m.head.weight.data.clamp_(-0.1, 0.1), lambda m: m.scale[1:].fill_(0.3),
    lambda m: torch._foreach_mul_(list(m.parameters()), 1.5), lambda m: m.layer.weight.T.data[0].zero_(),
    lambda m: setattr(m.layer.weight, "data", m.layer.weight.data * 2), lambda m: nn.init.ones_(m.layer.bias),
    lambda m: nn.utils.vector_to_parameters(torch.linspace(-1, 1, 46).double(), m.parameters()),
    lambda m: m.layer.weight.set_(m.layer.weight * 3),
    lambda m: m.layer.load_state_dict({"weight": m.layer.weight * 2, "bias": m.layer.bias + 1}),
    lambda m: torch.renorm(m.layer.weight, 2, 0, 1.0, out=m.layer.weight),
]  # fmt: skip


@pytest.mark.parametrize("write", PARAMETER_WRITES)
@pytest.mark.filterwarnings("ignore:method='auto' takes 'jacobian_contraction'")
def test_parameters_that_a_model_writes_to(write):
    """The structured route refuses."""
    build, methods = seeded(Model, under_no_grad(write)), ["auto", *METHODS[1:]]
    check_routes(build, torch.randn(3, 4).double(), torch.randn(2, 4).double(), methods)
    model = build()
    with left_as_found(model), suppress(UnsupportedModelError):
        empirical_ntk(model, torch.randn(3, 4).double(), method="structured")


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_refusals_leave_parameters(method):
    x, tokens = torch.randn(3, 4).double(), torch.arange(9)
    model = seeded(lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Tanh(), nn.Linear(4, 2)))()
    with left_as_found(model, tokens), pytest.raises(UnsupportedModelError, match=r"0: Embedding rewrites .* max_norm"):
        empirical_ntk(model, tokens, method=method)
    model = seeded(Model, under_no_grad(written_as_numpy))()
    with left_as_found(model, x), pytest.raises(UnsupportedModelError):
        empirical_ntk(model, x, method=method)


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize(
    "when",
    [lambda x: bool((x[:, 0] > 2.9).any()), lambda x: not torch.is_grad_enabled(), lambda x: len(x) in (2, 20)],
    ids=["samples", "no_grad", "size"],
)
@pytest.mark.filterwarnings("ignore:method='auto' takes 'jacobian_contraction'")
def test_parameters_that_a_model_writes_to_at_times(when, method):
    """Where the kernel is that of a function, it is right; else the model is refused."""

    def change(m, x):
        if when(x):
            m.position.data.mul_(2)
        return x

    model, x = seeded(Model, change)(), one_of_many(40)
    expected = loop_kernel(seeded(Model, lambda m, x: x), x).diagonal(dim1=2, dim2=3).sum(-1)
    with left_as_found(model, x), suppress(UnsupportedModelError):
        assert_close(empirical_ntk(model, x, method=method, compute="trace"), expected)


OTHER_CHANGES = {
    "attribute": lambda m: setattr(m.position, "calls", getattr(m.position, "calls", 0) + 1), "flags": with_flags,
    "hook": lambda m: m.position.register_hook(lambda g: g), "zero_grad": lambda m: m.zero_grad(),
    "gradient_hook": lambda m: m.scale.register_post_accumulate_grad_hook(lambda p: None),
    "backward_hook": lambda m: m.head.register_full_backward_hook(lambda *args: None),
    "forward_hook": lambda m: m.layer.register_forward_hook(lambda *args: None),
    "training": lambda m: m.train(not m.training), "note": lambda m: m.layer.__dict__.update(note=1),
    "parameter": lambda m: m.register_parameter("late", nn.Parameter(torch.ones(2))),
    "module": lambda m: m.add_module("late", nn.Linear(1, 1).requires_grad_(False)),
    "buffer": lambda m: m.register_buffer("late", torch.ones(2)), "deleted": lambda m: vars(m).pop("kept", None),
    "exchanged": lambda m: setattr(m, "scale", nn.Parameter(m.scale.detach() * 2)),
    "exchanged_module": lambda m: setattr(m, "head", nn.Linear(5, 2).double().requires_grad_(False)),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHER_CHANGES)
def test_other_changes(change):
    def apply(m, x):
        OTHER_CHANGES[change](m)
        return x

    model, x = seeded(Model, apply)(), torch.randn(3, 4).double()
    model.position.grad, model.layer.bias.requires_grad, model.kept = torch.ones(4).double(), False, [1]
    for method in METHODS:
        with left_as_found(model, x), suppress(UnsupportedModelError):
            empirical_ntk(model, x, method=method)


class Watched(dict):
    """Takes down what is done to it."""

    def __init__(self):
        super().__init__(a=1)
        object.__setattr__(self, "log", [])

    def _log(self, *args):
        self.log.append(args)

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = update = clear = pop = setdefault = _log


def test_what_does_not_change_is_not_touched():
    model, x = seeded(Model, lambda m, x: x)(), torch.randn(3, 4).double()
    model.config, model.nested = Watched(), [{"a": Watched()}]
    check = [model.config, model.nested[0]["a"]]
    for method in METHODS:
        with left_as_found(model, x):
            empirical_ntk(model, x, method=method, check=True)
    assert [(watched, watched.log) for watched in check] == [({"a": 1}, [])] * 2


class Rotates(nn.Module):
    """Rotary phases as language models have them, in a buffer or a frozen parameter."""

    def __init__(self, frozen=False, writes=False):
        super().__init__()
        self.layer, self.scale, self.writes = nn.Linear(4, 4), nn.Parameter(torch.rand(4)), writes
        phases = torch.polar(torch.ones(2), torch.arange(1.0, 3))
        if frozen:
            self.phases = nn.Parameter(phases, requires_grad=False)
        else:
            self.register_buffer("phases", phases)

    def forward(self, x):
        if self.writes:
            self.phases *= 1j
        h = torch.view_as_complex(self.layer(x).view(-1, 2, 2)) * self.phases
        return torch.view_as_real(torch.fft.ifft(torch.fft.fft(h) * (1 + 0.5j))).flatten(1) * self.scale


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"writes": True}], ids=str)
def test_complex_constants(options):
    x1, x2 = torch.randn(5, 4).double(), torch.randn(2, 4).double()
    model = check_routes(seeded(Rotates, **options), x1, x2)
    assert_close(linearize(model)(model, x1).detach(), seeded(Rotates, **options)()(x1).detach())
    with left_as_found(model, x1):
        assert nngp(model, x1).isfinite().all()
    single = Rotates(**options)
    with left_as_found(single):
        assert empirical_ntk(single, x1.float(), x2.float(), check=True).dtype == torch.float32


class Reversible(torch.autograd.Function):
    """Evaluates layers again in the backward pass, and leaves their gradients to them."""

    @staticmethod
    def forward(ctx, x, layer, where):
        ctx.save_for_backward(x)
        ctx.layer, ctx.where = layer, where
        return layer(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            rows = ctx.where(x)
            torch.autograd.backward(ctx.layer(x)[rows], g[rows])
        return x.grad if rows.all() else g @ ctx.layer.weight, None, None


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("n", [1, 200])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_reversible_layers(method, n, given):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    layer, x = model[1], torch.randn(n, 4).double()
    least = model[0](x)[:, 0].sort()[0][-4].item() if n == 200 else -torch.inf

    def where(h):
        return h[:, 0] > least

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            h = self.layers[0](x)
            return self.layers[2:](Reversible.apply(h, layer, where))

    blocks = Blocks()
    if given:
        layer.weight.grad = torch.ones(3, 5).double()
    with left_as_found(blocks, x), pytest.raises(UnsupportedModelError, match=r"layers\.1\.weight.* its .grad was"):
        empirical_ntk(blocks, x, compute="trace", method=method)


class Physics(nn.Module):
    """A network whose derivatives are the output."""

    def __init__(self, operator):
        super().__init__()
        self.net, self.operator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)), operator
        self.speed = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return self.operator(self, x) * self.speed


def function_of(m):
    params = dict(m.net.named_parameters())
    return lambda x: functional_call(m.net, params, (x,))[0]


def forces(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.net(x).sum(), x, create_graph=True)[0]


OPERATORS = [
    lambda m, x: vmap(hessian(function_of(m)))(x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True),
    lambda m, x: vmap(jacrev(lambda x: m.net(x).sin()))(x).flatten(1), forces,
    lambda m, x: jvp(m.net, (x,), (torch.ones_like(x),))[1] + m.net(x),
    lambda m, x: vmap(lambda x: torch.func.vjp(m.net, x)[1](torch.ones_like(x[:1]))[0])(x),
    lambda m, x: vmap(torch.func.grad(lambda x: jvp(function_of(m), (x,), (x,))[1]))(x),
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func_inside(operator):
    build, x1, x2 = seeded(Physics, operator), torch.rand(4, 2).double(), torch.rand(2, 2).double()
    model = check_routes(build, x1, x2, ["auto", *METHODS])
    check_routes(build, x1[:1], methods=["auto"])
    with left_as_found(model, x1):
        assert set(explain(model, x1).fallback) <= dict(model.named_parameters()).keys()
        nngp(model, x1)
    wrapped = seeded(lambda: nn.Sequential(nn.Linear(3, 2), Physics(operator)))
    check_routes(wrapped, torch.randn(3, 3).double(), methods=["structured"])


def test_ensembles_inside():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

        def forward(self, x):
            params = {name: torch.stack([getattr(net, name) for net in self.nets]) for name in ("weight", "bias")}
            return vmap(lambda p: functional_call(self.nets[0], p, (x,)))(params).tanh().sum(0)

    check_routes(seeded(Ensemble), torch.randn(4, 4).double(), torch.randn(2, 4).double())


class Special(nn.Module):
    """Uses a layer in its own way and, for samples that are told by a large entry, in another."""

    def __init__(self, other):
        super().__init__()
        self.layer, self.second, self.head, self.other = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2), other

    def forward(self, x):
        special = x[:, :1] > 2.9
        return self.head(torch.where(special, self.other(self, x), self.layer(x)).tanh() + self.second(x))


def with_forward(m, x):
    m.layer.forward = lambda x: F.linear(x, m.layer.weight).sin()
    try:
        return m.layer(x)
    finally:
        del m.layer.forward


def with_hook(register):
    def other(m, x):
        def hook(module, args, output):
            return output * 2 if module is m.layer else None

        handle = register(m)(hook)
        try:
            return m.layer(x)
        finally:
            handle.remove()

    return other


def with_weight(make):
    def other(m, x):
        found = m.layer._parameters.pop("weight")
        try:
            m.layer.weight = make(found)
            return m.layer(x)
        finally:
            vars(m.layer).pop("weight", None)
            m.layer._parameters["weight"] = found

    return other


OTHERS = {
    "functional_call": lambda m, x: functional_call(m.layer, {"weight": 2 * m.layer.weight}, (x,)),
    "exchanged": lambda m, x: functional_call(m.layer, {"weight": m.second.weight, "bias": m.layer.bias}, (x,)),
    "detached": lambda m, x: functional_call(m.layer, {"weight": m.layer.weight.detach()}, (x,)),
    "function": lambda m, x: F.linear(x, m.layer.weight * 2), "past_the_call": lambda m, x: m.layer.forward(x) * 2,
    "unbound": lambda m, x: nn.Linear.forward(m.layer, x * 2), "forward": with_forward,
    "hook": with_hook(lambda m: m.layer.register_forward_hook),
    "global_hook": with_hook(lambda m: register_module_forward_hook),
    "computed_weight": with_weight(lambda w: w * w), "constant_weight": with_weight(lambda w: w.detach() * 3),
    "of_another_layer": lambda m, x: functional_call(m.second, dict(m.layer.named_parameters()), (x,)) * 2,
    "stacked": lambda m, x: torch.baddbmm(m.layer.bias, x[None], m.layer.weight.T[None])[0].sin(),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore::ggn_ntk.RouteWarning")
def test_layers_used_otherwise_for_few_samples(other):
    build, x = seeded(Special, OTHERS[other]), one_of_many()
    model, expected = build(), loop_kernel(build, x)
    for kwargs in ({}, {"capture": "autograd", "compute": "trace"}, {"method": METHODS[1]}):
        wanted = expected.diagonal(dim1=2, dim2=3).sum(-1) if "compute" in kwargs else expected
        with left_as_found(model, x):
            found = empirical_ntk(model, x, **kwargs)
        assert_close(found, wanted)


def body():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("capture", ["auto", "sequential", "autograd"])
def test_global_hooks_that_change_outputs(capture):
    def hook(module, args, output):
        if isinstance(module, nn.Linear):
            return torch.where(args[0][:, :1] > 2.9, 2 * output, output)
        return None

    x, handle = one_of_many(), register_module_forward_hook(hook)
    try:
        expected = loop_kernel(seeded(body), x)
        with suppress(UnsupportedModelError) if capture == "sequential" else left_as_found(body()):
            assert_close(empirical_ntk(seeded(body)(), x, capture=capture), expected)
    finally:
        handle.remove()


class Doubled(nn.Linear):
    """Has a rule that knows nothing of the samples that it doubles."""

    def forward(self, x):
        return super().forward(x) * (1 + (x[:, :1] > 2.9))


@pytest.mark.parametrize("capture", ["auto", "sequential", "autograd"])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_rule_wrong_for_nine_of_200_samples(per_parameter, capture):
    register_rule(Doubled)(linear)
    build = seeded(lambda: nn.Sequential(Doubled(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    x1, x2 = one_of_many(special=9), torch.randn(2, 4).double()
    expected = loop_kernel(build, x1, x2)
    with pytest.warns(RouteWarning, match="0.weight.*its Jacobian by its rule"):
        found = empirical_ntk(build(), x1, x2, capture=capture, per_parameter=per_parameter)
    assert_close(torch.stack(list(found.values())).sum(0) if per_parameter else found, expected)


def test_no_kernels_of_what_a_transform_makes_of_samples():
    model, x = seeded(nn.Linear, 4, 2)(), torch.randn(3, 4).double()
    for function in (empirical_ntk, nngp, explain):
        with pytest.raises(ValueError, match=r"is what a torch\.func transform makes of a tensor"):
            vmap(lambda x, function=function: function(model, x))(x[None])


def test_kernels_inside_of_a_transform():
    model, x = seeded(body)(), torch.randn(3, 4).double()
    expected = empirical_ntk(model, x)
    for method in ("structured", *METHODS[1:]):
        found = []

        def weighted(w, found=found, method=method):
            found.append(empirical_ntk(model, x, method=method))
            return (w * found[-1][0, 0]).sum()

        gradient = torch.func.grad(weighted)(torch.ones(2, 2).double())
        assert_close(found[0], expected)
        assert_close(gradient, expected[0, 0])


class OtherInDouble(nn.Module):
    """Mixes samples in float32 alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.first(x)
        return self.second(h + h.mean(0) if h.dtype == torch.float32 else h)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 12])
def test_another_function_in_double_tells_nothing(n, method):
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(OtherInDouble(), torch.randn(n, 4), method=method)


def test_models_that_differentiate_inside():
    """Without enabling gradients themselves."""

    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = body()

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    check_routes(seeded(Forces), torch.randn(3, 4).double(), torch.randn(2, 4).double())
