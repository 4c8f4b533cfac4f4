"""Arguments combined at random: each combination gives the kernel of a loop over samples and outputs, or is refused."""

from collections import defaultdict
from functools import cache
from typing import NamedTuple

import torch
from conftest import ROLES, assert_close, axes_of, reduce_axes, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from ggn_ntk import UnsupportedRouteError, empirical_ntk, empirical_ntk_fn, shared


class Mixer(nn.Module):
    """Tokens and a gate, evaluated at points that samples share: with a tied, a frozen and an own parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.again = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight, self.scale = self.inner.weight, nn.Parameter(torch.rand(3))
        self.again.bias.requires_grad_(False)

    def forward(self, x, gate=None, *, points=None, negate=False):
        # x [N, L, 2], gate [N, 3], points [Q, 3] -> [N, 3] or [N, Q, 3]
        h = torch.tanh(self.embed(x)).mean(1)
        h = h if gate is None else h * gate
        h = self.again(torch.tanh(self.inner(h))) * self.scale
        h = h if points is None else torch.sin(h.unsqueeze(1) * points)
        return -h if negate else h


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2))  # [N, 1, H, W] -> [N, 2, H - 2, W - 2]


MODELS = {"mixer": seeded(Mixer), "convolutions": seeded(convolutions)}

# What is asked for, and the names that are to be found; those of a tied parameter may be others than the oracle's.
MIXER = ["scale", "embed.weight", "embed.bias", "inner.weight", "inner.bias"]
PARAMS = {
    "mixer": [
        (None, MIXER),
        ("scale", ["scale"]),
        (["inner.bias", "embed"], ["inner.bias", "embed.weight", "embed.bias"]),
        ("*bias", ["embed.bias", "inner.bias"]),
        (["again.weight", "scale"], ["again.weight", "scale"]),
    ],
    "convolutions": [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("0.weight", ["0.weight"]),
        ("2", ["2.weight", "2.bias"]),
        ("*.bias", ["0.bias", "2.bias"]),
        (["*.bias", "0"], ["0.bias", "2.bias", "0.weight"]),
    ],
}
TIED = {"again.weight": "inner.weight"}
OUTPUTS = {
    "returned": None,
    "picked": torch.square,
    "first": lambda out: out[:, 0],
    "pair": (None, torch.sin),
    "unequal pair": (lambda out: out[:, :1], None),
    "several": lambda out: {key: part(out) for key, part in PARTS.items()},
}
KINDS = ["module", "function"]
ROUTES = [{}, {"capture": "autograd"}, {"method": "structured"}, {"method": "jacobian_contraction"}]
ROUTES += [{"method": "ntk_vector_products"}, {"method": "vivit"}, {"capture": "sequential"}]
ROUTES += [{"method": "jacobian_contraction", "capture": "autograd"}]


class Combination(NamedTuple):
    """What is asked for, in names."""

    model: str
    form: str  # of samples
    other: str  # x2
    n1: int
    n2: int
    kind: str  # of model
    params: int  # a place in PARAMS
    output: str
    compute: str | tuple[str, ...]  # or the roles of output axes
    per_parameter: bool | str
    route: int  # a place in ROUTES
    paired: bool
    prepared: bool
    interacting: bool

    @property
    def sets(self):
        """What ``samples`` takes for x1 and for x2."""
        first = self.model, self.form, self.n1, 1, False, 0.0
        if self.other == "none":
            return first, first
        return first, (*first[:2], self.n2, 2, self.other == "longer", float(self.other == "other constants"))


def take_most(c):
    """Change most of what would be refused, so that there are kernels to compare."""
    if c.n1 == 1:
        return c
    differ = (c.model == "convolutions" and c.other == "longer") or c.output == "unequal pair"
    compute = "full" if (differ, c.output == "several")[isinstance(c.compute, tuple)] else c.compute
    kind = c.kind if c.kind in KINDS else "module"
    return c._replace(n2=c.n1 if c.paired else c.n2, compute=compute, kind=kind)


combinations = st.builds(
    Combination,
    model=st.sampled_from(list(MODELS)),
    form=st.sampled_from(["tensor", "tuple", "mapping"]),
    other=st.sampled_from(["none", "alike", "longer", "other constants"]),
    n1=st.integers(1, 3),
    n2=st.integers(1, 3),
    kind=st.sampled_from(KINDS) | st.sampled_from([*KINDS, "names for a function", "mapping for a module"]),
    params=st.integers(0, 4),
    output=st.sampled_from(list(OUTPUTS)),
    compute=st.sampled_from(["full", "diagonal", "trace"]) | st.sampled_from(ROLES),
    per_parameter=st.sampled_from([False, True, "module"]),
    route=st.integers(0, 4) | st.integers(0, len(ROUTES) - 1),
    paired=st.booleans(),
    prepared=st.booleans(),
    interacting=st.sampled_from([False, False, False, True]),  # the same kernel, since samples do not
).map(take_most)


def samples(model, form, n, seed, longer, constant):
    """Samples in one of the forms that a model takes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n, 2 + longer, 2) if model == "mixer" else normal(n, 1, 3, 3 + longer)
    if form == "tensor":
        return x
    if form == "tuple":
        return (x, normal(n, 3)) if model == "mixer" else (x,)
    if model == "convolutions":
        return {"input": x}
    return {"x": x, "points": shared(torch.linspace(0, 1, 6).double().view(2, 3) + constant), "negate": bool(constant)}


def arguments(x, sample):
    """The arguments of a call with one sample."""

    def of_sample(part):
        return part[sample : sample + 1] if isinstance(part, Tensor) else getattr(part, "value", part)

    if isinstance(x, dict):
        return (), {key: of_sample(part) for key, part in x.items()}
    return tuple(map(of_sample, x if isinstance(x, tuple) else (x,))), {}


@cache
def jacobians(model, form, n, seed, longer, constant, output):
    """The Jacobian [N, C, P] for each parameter, by a loop, and the shape [*out] of an output."""
    module, x = MODELS[model]().requires_grad_(True), samples(model, form, n, seed, longer, constant)
    params, rows = dict(module.named_parameters()), defaultdict(list)
    for sample in range(n):
        args, kwargs = arguments(x, sample)
        found = output(module(*args, **kwargs))
        grads = [torch.autograd.grad(entry, [*params.values()], retain_graph=True) for entry in found.flatten()]
        for name, column in zip(params, zip(*grads, strict=True), strict=True):
            rows[name].append(torch.stack([g.flatten() for g in column]))
    return {name: torch.stack(js) for name, js in rows.items()}, found.shape[1:]


class RefusedError(Exception):
    """No kernel is expected."""


def of_one_output(one, other, c):
    """Each parameter's kernel of two outputs, by the oracle's names."""
    (first, out), (second, out2) = one, other
    ndim = len(out)
    roles = {"full": ("kept",) * ndim, "diagonal": ("diagonal",) * ndim, "trace": ("traced",) * ndim}
    roles = roles.get(c.compute, c.compute[:ndim])
    if any(role != "kept" and size != size2 for role, size, size2 in zip(roles, out, out2, strict=False)):
        raise RefusedError
    kernels = {}
    for name, j in first.items():
        kernel = torch.einsum("ncp,mdp->nmcd", j, second[name])
        kernel = kernel.reshape(*kernel.shape[:2], *out, *out2)
        kernel = reduce_axes(kernel, roles) if {*roles} - {"kept"} else kernel
        kernels[name] = torch.stack([kernel[n, n] for n in range(len(kernel))]) if c.paired else kernel
    return kernels


def expected_kernels(c, names):
    """The kernels of a combination by name and by keys of outputs, and those of all parameters for comparison."""
    if c.paired and c.other != "none" and c.n1 != c.n2:
        raise RefusedError
    picks = OUTPUTS[c.output] if c.output.endswith("pair") else (OUTPUTS[c.output],) * 2
    if c.output == "several":
        if isinstance(c.compute, tuple) and {*c.compute} - {"kept"}:
            raise RefusedError
        found = [{key: jacobians(*x, PARTS[key]) for key in PARTS} for x in c.sets]
        pairs = {(a, b): (found[0][a], found[1][b]) for a in PARTS for b in PARTS}
        if c.compute in ("diagonal", "trace"):
            pairs = {a: pair for (a, b), pair in pairs.items() if a == b}
    else:
        pairs = {"": [jacobians(*x, pick or same) for x, pick in zip(c.sets, picks, strict=True)]}
    by_key = {key: of_one_output(*pair, c) for key, pair in pairs.items()}
    groups = defaultdict(list)
    for name in names:
        owner = (name if c.kind == "function" else TIED.get(name, name)).rpartition(".")[0]
        groups[owner if c.per_parameter == "module" else name if c.per_parameter else ""].append(TIED.get(name, name))
    kernels = {(g, key): sum(found[n] for n in group) for g, group in groups.items() for key, found in by_key.items()}
    return kernels, {key: sum(found.values()) for key, found in by_key.items()}


def computed(c, model, params, x1, x2):
    """The kernels by name and by keys of outputs."""
    axes = axes_of(c.compute) if isinstance(c.compute, tuple) else {"compute": c.compute}
    if isinstance(c.compute, tuple) and c.output != "several":
        ndim = {"mixer": 1 + (c.form == "mapping"), "convolutions": 3}[c.model] - (c.output == "first")
        axes = axes_of(c.compute[:ndim])
    options = axes | ROUTES[c.route] | {"per_parameter": c.per_parameter, "paired": c.paired}
    options |= {"interacting": c.interacting, "params": params, "output": OUTPUTS[c.output]}
    if c.prepared:
        kernel = empirical_ntk_fn(model, **options)
        kernel(x1, x2)
        found = kernel(x1, x2)
    else:
        found = empirical_ntk(model, x1, x2, **options)
    found = found if c.per_parameter else {"": found}
    if c.output == "several":
        return {(name, key): kernel for name, kernels in found.items() for key, kernel in kernels.items()}
    return {(name, ""): kernel for name, kernel in found.items()}


def same(out):
    return out


PARTS = {"all": same, "first": lambda out: out[:, 0].sin()}


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(combinations)
def test_combinations(c):
    module = MODELS[c.model]()
    entries, names = PARAMS[c.model][c.params]
    model, params = module, entries
    if "function" in c.kind:
        model = lambda params, *args, **kwargs: functional_call(module, params, args, kwargs)  # noqa: E731
    if c.kind == "function" or "mapping" in c.kind:
        params = {name: module.get_parameter(name) for name in names}
    x1, x2 = (samples(*x) for x in c.sets)
    route, error = ROUTES[c.route], None
    sequential, vivit = route.get("capture") == "sequential", route.get("method") == "vivit"
    try:
        kernels, scales = expected_kernels(c, names)
    except RefusedError:
        kernels = None
    if " for a " in c.kind or len(route) > 1 or (sequential and (c.model == "mixer" or c.kind == "function")):
        kernels = None
    try:
        found = computed(c, model, params, x1, None if c.other == "none" else x2)
    except (ValueError, TypeError, UnsupportedRouteError) as raised:
        error = raised
    if error is not None:
        assert len(str(error)) > 20
        assert kernels is None or sequential or vivit, error
        return
    assert kernels is not None
    assert list(found) == list(kernels)
    for (name, key), kernel in found.items():
        assert_close(kernel, kernels[name, key], scale=scales[key])
