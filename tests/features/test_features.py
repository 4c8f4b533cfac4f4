"""Projected features: exactly J times directions that are drawn, which estimate kernels without bias."""

import pytest
import torch
from cases import BY_NAME, CASES, mlp
from conftest import DEVICES, assert_close, limit_memory, loop_jacobians
from torch import nn
from torch.func import functional_call
from unchanged import unchanged

from ggn_ntk import KernelMemoryError, NotFiniteWarning, RouteWarning, UnsupportedModelError, empirical_ntk
from ggn_ntk.features import projected_features
from ggn_ntk.features.projection import Drawing

KINDS = ["kronecker", "dense"]
# Without those that differ in layers that have no parameters.
ALL = [case for case in CASES if not case.name.startswith(("linear_map", "hidden"))]


def directions_of(projection, params, preconditioner=None):
    """The directions of a projection, formed: [dim, P] by name, in float64."""
    params = {name: p.detach().double().cpu() for name, p in params.items()}
    found = {}
    for name, p in params.items():
        (drawn,) = Drawing(projection, params, {}).directions(name, p.shape, p)
        first, *others = drawn.vectors
        for second in others:
            first = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        d = 1 if preconditioner is None else preconditioner[name].double().sqrt().flatten()
        found[name] = first * d / projection.dim**0.5
    return found


def expected_features(found, model, x, output=None, preconditioner=None):
    """J times the directions, from Jacobians by a loop."""
    jacobians = loop_jacobians(model, x, output)
    directions = directions_of(found.projection, dict(model.named_parameters()), preconditioner)
    names = [name for name, _ in found.projection.shapes]
    total = sum(jacobians[name].cpu().double() @ directions[name].T for name in names)
    return total.reshape(found.features.shape)


@pytest.mark.parametrize(("case", "kind"), [(c, KINDS[i % 2]) for i, c in enumerate(ALL)], ids=str)
def test_features_are_jacobians_times_directions(case, kind):
    model, x, _ = case.build()
    found = projected_features(model, x, dim=3, projection=kind, output=case.output)
    assert_close(found.features, expected_features(found, model, x, case.output))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv2d_options", "embedding", "tied_transformer", "layer_norm_gelu", "recurrent"])
def test_with_preconditioner(name, kind):
    case = BY_NAME[name]
    model, x, _ = case.build()
    d = {key: torch.rand_like(p) for key, p in model.named_parameters()}
    d[next(iter(d))].flatten()[0] = 0
    found = projected_features(model, x, dim=3, projection=kind, preconditioner=d)
    assert_close(found.features, expected_features(found, model, x, preconditioner=d))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tutorial_cnn_small", "tied_transformer", "data_dependent"])
def test_every_device_and_dtype_has_the_same_directions(name, kind, device):
    case = BY_NAME[name]
    model, x, _ = case.build(torch.float32, device)
    d = {key: torch.full_like(p, 0.5) for key, p in model.named_parameters()}
    found = projected_features(model, x, dim=4, projection=kind, preconditioner=d)
    assert found.features.dtype == torch.float32
    assert found.features.device == next(model.parameters()).device
    model, x, _ = case.build()
    d = {key: p.cpu() for key, p in d.items()}
    assert_close(found.features.cpu(), projected_features(model, x, dim=4, projection=kind, preconditioner=d).features)


def small(kind=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), kind(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_kernel_is_unbiased_and_its_error_known(kind, compute):
    """Over seeds: the mean is the kernel, and the mean of estimated variances the variance, within their errors."""
    model, x1, x2, seeds = small(), torch.randn(3, 3).double(), torch.randn(2, 3).double(), 200
    kernel = empirical_ntk(model, x1, x2, compute=compute)
    jacobians = [loop_jacobians(model, x) for x in (x1, x2)]
    first = projected_features(model, x1, dim=80, projection=kind)
    second = projected_features(model, x2, dim=80, projection=kind)
    assert_close(second.features, expected_features(second, model, x2))
    estimates, variances = [], []
    for seed in range(seeds):
        projection = type(first.projection)(**{**vars(first.projection), "seed": seed})
        directions = directions_of(projection, dict(model.named_parameters()))
        pair = [type(first)(sum(j[name] @ r.T for name, r in directions.items()), projection) for j in jacobians]
        estimates.append(pair[0].kernel(pair[1], compute=compute))
        variances.append(pair[0].standard_error(pair[1], compute=compute).square())
    estimates, variances = torch.stack(estimates), torch.stack(variances)
    of_mean = estimates.std(0) / seeds**0.5
    assert ((estimates.mean(0) - kernel).abs() < 4 * of_mean).all()
    squares = (estimates - kernel).square()
    off = (variances.mean(0) - squares.mean(0)).abs()
    assert (off < 4 * ((squares - variances).std(0) / seeds**0.5)).all()


def test_calls_with_one_seed_share_directions():
    model, x1, x2 = small(), torch.randn(4, 3).double(), torch.randn(3, 3).double()
    a, b = (projected_features(model, x, dim=5) for x in (x1, x2))
    both = projected_features(model, torch.cat([x1, x2]), dim=5)
    assert_close(torch.cat([a.features, b.features]), both.features)
    assert a.features.equal(projected_features(model, x1, dim=5, seed=0).features)
    assert not a.features.allclose(projected_features(model, x1, dim=5, seed=1).features)
    assert a.projection == b.projection
    kernel = a.kernel(b)
    assert_close(kernel, torch.einsum("ncj,mdj->nmcd", a.features, b.features))
    assert a.kernel(a).equal(a.kernel())
    assert a.kernel().equal(a.kernel().permute(1, 0, 3, 2))
    assert a.standard_error().equal(a.standard_error().permute(1, 0, 3, 2))


def test_parameters_add_up():
    """Directions of a parameter follow from its name, whichever others there are."""
    model, x = small(), torch.randn(4, 3).double()
    whole = projected_features(model, x, dim=5).features
    parts = [projected_features(model, x, dim=5, params=names).features for names in ("0", ["2.weight"], "2.bias")]
    assert_close(sum(parts), whole)
    model[0].requires_grad_(False)
    assert_close(projected_features(model, x, dim=5).features, parts[1] + parts[2])
    with pytest.raises(ValueError, match=r"'0\.bias', which is frozen"):
        projected_features(model, x, dim=5, params="0.bias")


def test_of_a_function():
    model, x = small(), torch.randn(4, 3).double()
    params = dict(model.named_parameters())
    found = projected_features(lambda p, x: functional_call(model, p, (x,)), x, dim=5, params=params)
    assert_close(found.features, projected_features(model, x, dim=5).features)


def test_output_with_two_axes():
    model, x = mlp(nn.Tanh)().double(), torch.randn(4, 5).double()
    found = projected_features(model, x, dim=7, output=lambda f: torch.stack([f, f.square()], 1))
    assert found.features.shape == (4, 2, 3, 7)
    full = torch.einsum("nabj,mcdj->nmabcd", found.features, found.features)
    assert_close(found.kernel(), full)
    assert_close(
        found.kernel(compute="diagonal"), full.flatten(2, 3).flatten(3).diagonal(dim1=2, dim2=3).unflatten(2, (2, 3))
    )
    assert_close(found.kernel(compute="trace"), torch.einsum("nmabab->nm", full))
    assert_close(found.kernel(trace_axes=0, diagonal_axes=1), torch.einsum("nmabab->nmb", full))
    assert_close(found.kernel(paired=True), torch.einsum("nnabcd->nabcd", full))
    assert found.standard_error(trace_axes=1).shape == (4, 4, 2, 2)
    assert found.standard_error(paired=True, compute="trace").shape == (4,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tutorial_cnn_small", "tied_transformer"])
def test_blocks_change_nothing(name, kind, monkeypatch):
    """Of samples, of outputs and of directions."""
    model, x, _ = BY_NAME[name].build()
    options = {"dim": 20, "projection": kind}
    whole = projected_features(model, x, **options)
    d = {key: torch.rand_like(p) for key, p in model.named_parameters()}
    preconditioned = projected_features(model, x, preconditioner=d, **options)
    limit_memory(monkeypatch, columns=2**16, backpropagated=2**14, passing=2**14)
    assert_close(projected_features(model, x, batch_size=2, **options).features, whole.features)
    assert_close(projected_features(model, x, memory="64MiB", **options).features, whole.features)
    assert_close(projected_features(model, x, preconditioner=d, **options).features, preconditioned.features)


@pytest.mark.parametrize("name", ["tutorial_cnn_small", "tied_transformer", "weight_norm"])
def test_left_as_found(name):
    model, x, _ = BY_NAME[name].build()
    with unchanged(model):
        found = projected_features(model, x, dim=3)
        found.standard_error()
    assert not found.features.requires_grad


def test_a_route_that_is_refused():
    """A model whose forward pass writes to its weight is projected from Jacobians of each sample."""

    class Renormed(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight /= self.weight.norm()
            return super().forward(x)

    model, x = Renormed(3, 2).double(), torch.randn(3, 3).double()
    plain = nn.Linear(3, 2).double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.weight /= plain.weight.norm()
    before = model.weight.tolist()
    with pytest.warns(RouteWarning, match="Features come from Jacobians of each sample"):
        found = projected_features(model, x, dim=4)
    assert model.weight.tolist() == before
    assert_close(found.features, projected_features(plain, x, dim=4).features)


def test_a_model_that_takes_one_sample_at_a_time():
    model, x = small(), torch.randn(1, 3).double()
    alone = nn.Sequential(nn.Unflatten(0, (1, 1)), nn.Flatten(0, 1), *model)
    found = projected_features(alone, x, dim=4, batch_size=None)
    assert_close(found.features, expected_features(found, alone, x))


def test_samples_without_finite_jacobians():
    model, x = small(), torch.randn(4, 3).double()
    whole = projected_features(model, x, dim=4).features
    x[2] = torch.inf
    with pytest.warns(NotFiniteWarning, match=r"Jacobians of x\[2\] are not finite"):
        found = projected_features(model, x, dim=4).features
    assert found[2].isnan().all()
    assert_close(found[[0, 1, 3]], whole[[0, 1, 3]])


def test_samples_that_interact_are_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d"):
        projected_features(model, torch.randn(4, 3), dim=4)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "dim must be at least 2, got 1", {"dim": 1}),
        (TypeError, "dim must be an integer, got float", {"dim": 8.0}),
        (TypeError, "batch_size must be an integer, got bool", {"batch_size": True}),
        (ValueError, "batch_size must be at least 1, got 0", {"batch_size": 0}),
        (ValueError, "projection must be one of 'kronecker', 'dense', got 'sparse'", {"projection": "sparse"}),
        (TypeError, "seed must be an integer, got NoneType", {"seed": None}),
        (TypeError, "output must be a callable or None, got tuple", {"output": (None, None)}),
        (TypeError, "preconditioner must be a mapping", {"preconditioner": [1]}),
        (ValueError, "preconditioner .* it lacks 2.bias", {"preconditioner": "lacks"}),
        (ValueError, "preconditioner .* it also has other", {"preconditioner": "other"}),
        (ValueError, r"'0.weight'\] must have shape \[4, 3\], got \[3, 4\]", {"preconditioner": "shape"}),
        (ValueError, r"preconditioner\['0.bias'\] must hold finite numbers", {"preconditioner": "negative"}),
        (TypeError, r"'0.bias'\] must be a tensor of real numbers, got float", {"preconditioner": "kind"}),
        (KernelMemoryError, "Features alone take .* a smaller dim", {"dim": 10**6, "memory": "1MiB"}),
        (ValueError, "memory must be", {"memory": "much"}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, options):
    model = small()
    d = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    wrong = {
        "lacks": {name: x for name, x in d.items() if name != "2.bias"},
        "other": d | {"other": torch.ones(1)},
        "shape": d | {"0.weight": torch.ones(3, 4)},
        "negative": d | {"0.bias": -torch.ones(4)},
        "kind": d | {"0.bias": 1.0},
    }
    given = options.get("preconditioner")
    options = options | ({"preconditioner": wrong[given]} if isinstance(given, str) else {})
    with pytest.raises(error, match=message):
        projected_features(model, torch.randn(4, 3).double(), **{"dim": 4, **options})


def test_wrong_samples_are_named():
    with pytest.raises(ValueError, match=r"^x "):
        projected_features(small(), torch.randn(0, 3).double(), dim=4)


def test_what_cannot_be_compared():
    model, x = small(), torch.randn(4, 3).double()
    found = projected_features(model, x, dim=4)
    with pytest.raises(TypeError, match="other must be ProjectedFeatures or None, got Tensor"):
        found.kernel(found.features)
    d = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for message, options in (
        ("seed is 1 instead of 0", {"seed": 1}),
        ("dim is 5 instead of 4", {"dim": 5}),
        ("kind is 'dense' instead of 'kronecker'", {"projection": "dense"}),
        ("its parameters differ", {"params": "0"}),
        ("its preconditioner differs", {"preconditioner": d}),
    ):
        with pytest.raises(ValueError, match=f"other is of another projection: {message}"):
            found.kernel(projected_features(model, x, **{"dim": 4, **options}))
    with pytest.raises(ValueError, match=r"other holds torch.float32 on cpu, and these features torch.float64 on cpu"):
        found.standard_error(projected_features(model.float(), x.float(), dim=4))
    model.double()
    with pytest.raises(ValueError, match="paired=True takes as many samples"):
        found.kernel(projected_features(model, x[:3], dim=4), paired=True)


def test_against_adam():
    """The preconditioner of Adam, J diag(d) J^T, in the mean over seeds."""
    model, x = small(), torch.randn(3, 3).double()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    d = {n: 1 / (optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-2) for n, p in model.named_parameters()}
    jacobians = loop_jacobians(model, x)
    expected = sum(torch.einsum("ncp,p,mdp->nmcd", j, d[name].flatten(), j) for name, j in jacobians.items())
    kernels = torch.stack(
        [projected_features(model, x, dim=2000, preconditioner=d, seed=seed).kernel() for seed in range(8)]
    )
    assert ((kernels.mean(0) - expected).abs() < 5 * kernels.std(0) / 8**0.5).all()
