"""The kernel as an operator, against the kernel itself."""

import inspect
import subprocess
import sys
import threading
from copy import deepcopy
from itertools import pairwise
from unittest import mock

import pytest
import torch
from cases import BY_NAME, CASES, mlp
from conftest import DEVICES, kernel_of, oracle_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, each
from torch import nn
from torch.func import functional_call, vmap
from unchanged import unchanged

import ggn_ntk
from ggn_ntk import KernelMemoryError, RouteWarning, UnsupportedModelError, empirical_ntk
from ggn_ntk.models.comparison import relative_error
from ggn_ntk.operators import JacobianOperator, NTKOperator, TransposedJacobianOperator, as_matrix, pushforwards, side
from ggn_ntk.operators.side import Side

# Attention and positions of these compute in float32, whatever their dtype.
ROUNDED = {"llama", "gemma"}

ALL = [*(pytest.param(case, id=case.name) for case in CASES), *each(MODELS)]


def build(case, device="cpu"):
    dtype = torch.float32 if getattr(case, "rounds", False) else torch.float64
    return case.build(dtype, device)


def assert_right(found, expected, case):
    """Compare with a product or a part of the oracle's kernel."""
    tolerance = 1e-10 if found.dtype == torch.float64 and case.name not in ROUNDED else 1e-5
    assert not found.requires_grad
    assert relative_error(found.cpu(), expected) < tolerance


def numbers(*shape, like):
    return torch.randn(shape, dtype=torch.float64).to(like)


def check_products(operator, matrix, case, like):
    """An operator and its adjoint, on a vector and on several."""
    assert operator.shape == matrix.shape
    for a, b in ((operator, matrix), (operator.adjoint(), matrix.T)):
        v = numbers(b.shape[1], 2, like=like)
        expected = b @ v.cpu().double()
        assert_right(a @ v, expected, case)
        assert_right(a @ v[:, 0], expected[:, 0], case)


@pytest.mark.parametrize("case", ALL)
def test_products(case):
    model, x1, x2 = build(case)
    like = next(model.parameters())
    operator = NTKOperator(model, x1, x2, output=case.output, batch_size=2)
    check_products(operator, as_matrix(oracle_sum(case)), case, like)


@pytest.mark.parametrize("case", ALL[::6])  # of all others: test_paired
def test_diagonals(case):
    model, x1, _ = build(case)
    operator = NTKOperator(model, x1, output=case.output)
    full = oracle_sum(case, symmetric=True)
    matrix = as_matrix(full)
    assert operator.adjoint() is operator
    assert_right(operator.diagonal(), matrix.diagonal(), case)
    assert_right(operator.diagonal().sum(), matrix.trace(), case)
    n, c = len(full), len(matrix) // len(full)
    blocks = matrix.reshape(n, c, n, c).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert_right(operator.block_diagonal(), blocks, case)


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "cpu"], indirect=True)
@pytest.mark.parametrize("case", ALL[::12])
def test_on_a_device(case, device):
    model, x1, x2 = build(case, device)
    like = next(model.parameters())
    operator = NTKOperator(model, x1, x2, output=case.output, batch_size=2)
    assert operator.device == like.device
    check_products(operator, as_matrix(oracle_sum(case, device=device)), case, like)


def network(*sizes, outputs=()):
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    return nn.Sequential(*layers, *([nn.Unflatten(1, outputs)] if outputs else [])).double()


def samples(*shape):
    return torch.randn(*shape).double()


sizes = st.integers(1, 5)


@settings(deadline=None, max_examples=20)
@given(n1=sizes, n2=sizes, out=st.sampled_from([(), (1,), (3,), (2, 3)]), k=st.integers(0, 3), batch_size=sizes)
def test_forms_of_vectors(n1, n2, out, k, batch_size):
    c = torch.Size(out).numel()
    model = network(4, 5, c, outputs=out) if out else nn.Sequential(network(4, 5, 1), nn.Flatten(0))
    x1, x2 = samples(n1, 4), samples(n2, 4)
    operator = NTKOperator(model, x1, x2, batch_size=batch_size)
    kernel = as_matrix(empirical_ntk(model, x1, x2))
    assert operator.to_dense().allclose(kernel)
    v = samples(n2, *out, k)
    expected = kernel @ v.reshape(n2 * c, k)
    for given_, wanted in (
        (v.reshape(n2 * c, k), expected),
        (v, expected.reshape(n1, *out, k)),
        *((v[..., i], (kernel @ v[..., i].flatten()).reshape(n1, *out)) for i in range(k)),
        *((v[..., i].flatten(), kernel @ v[..., i].flatten()) for i in range(k)),
    ):
        found = operator @ given_
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    v = samples(n2, *out, 2)
    (several,) = operator @ [v]
    (single,) = operator @ [v[..., 0]]
    assert several.allclose(operator @ v)
    assert single.allclose(several[..., 0])


def test_symmetric_operator_is_its_adjoint():
    model, x = network(4, 5, 3), samples(6, 4)
    operator = NTKOperator(model, x)
    assert operator.SELF_ADJOINT
    assert operator.adjoint() is operator
    of_two = NTKOperator(model, x, samples(2, 4))
    assert not of_two.SELF_ADJOINT
    assert of_two.adjoint().shape == (6, 18)
    assert of_two.adjoint().adjoint().shape == of_two.shape
    assert of_two.adjoint().to_dense().allclose(of_two.to_dense().T)


def flat_jacobian(model, x):
    """The Jacobian [N C, P], by loops over outputs."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(y, params, retain_graph=True) for y in model(x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_jacobian():
    model, x1, x2 = network(4, 5, 3), samples(6, 4), samples(2, 4)
    operator = NTKOperator(model, x1, x2, batch_size=4)
    for of, x in (("x1", x1), ("x2", x2)):
        jacobian, matrix = operator.jacobian(of), flat_jacobian(model, x)
        transposed = jacobian.adjoint()
        assert isinstance(jacobian, JacobianOperator)
        assert isinstance(transposed, TransposedJacobianOperator)
        assert jacobian.shape == matrix.shape
        u, v = samples(matrix.shape[1], 2), samples(len(x), 3, 2)
        assert (jacobian @ u).allclose(matrix @ u)
        assert (jacobian @ u[:, 0]).allclose(matrix @ u[:, 0])
        assert (transposed @ v).allclose(matrix.T @ v.flatten(0, 1))
        assert (transposed @ v[..., 0]).allclose(matrix.T @ v[..., 0].flatten())
        by_parameter = transposed @ [v]
        assert [g.shape[:-1] for g in by_parameter] == [p.shape for p in model.parameters()]
        assert torch.cat([g.flatten(0, -2) for g in by_parameter]).allclose(transposed @ v)
        assert (jacobian @ by_parameter)[0].flatten(0, 1).allclose(matrix @ matrix.T @ v.flatten(0, 1))
    product = operator.jacobian() @ operator.jacobian("x2").adjoint()
    assert (product @ samples(6)).shape == (18,)
    with pytest.raises(ValueError, match="of must be 'x1' or 'x2', got 'x3'"):
        operator.jacobian("x3")


def test_sums_and_shifts_are_lazy():
    model, x = network(4, 5, 3), samples(6, 4)
    operator = NTKOperator(model, x)
    other = NTKOperator(model, x, params=["0.weight"])
    total, v = 2.0 * operator + other - 0.5 * operator.identity(), samples(18)
    matrix = 2 * operator.to_dense() + other.to_dense() - 0.5 * torch.eye(18)
    assert total.SELF_ADJOINT
    assert (total @ v).allclose(matrix @ v)
    with pytest.raises(ValueError, match=r"Only a square operator can be shifted, and this one is \[18, 6\]"):
        NTKOperator(model, x, samples(2, 4)).identity()


def test_options():
    """Some parameters, an output for each side, and samples of two lengths."""
    model, x1, x2 = network(4, 5, 3), samples(6, 4), samples(2, 4)
    for options in (
        {"params": ["0.weight", "2"]},
        {"output": lambda y: y[:, :2]},
        {"output": (lambda y: y[:, 0], lambda y: y[:, 1:])},
        {"output": (None, lambda y: y.sin())},
    ):
        kernel = empirical_ntk(model, x1, x2, **options)  # [N1, N2, *out1, *out2]
        operator = NTKOperator(model, x1, x2, **options)
        one_axis = kernel.ndim == 3
        dense = kernel.movedim(1, 1 if one_axis else 2).reshape(operator.shape)
        assert operator.to_dense().equal(dense)
        v = samples(dense.shape[1], 2)
        assert (operator @ v).allclose(dense @ v)
        assert (operator.adjoint() @ dense).allclose(dense.T @ dense)


@pytest.mark.parametrize(("compute", "wanted"), [("diagonal", "diagonal"), ("full", "block_diagonal")])
def test_diagonals_of_two_sides(compute, wanted):
    model, x1, x2 = network(4, 5, 3), samples(6, 4), samples(6, 4)
    operator = NTKOperator(model, x1, x2, batch_size=5)
    found = getattr(operator, wanted)()
    assert found.reshape(6, -1).allclose(empirical_ntk(model, x1, x2, compute=compute, paired=True).flatten(1))
    with pytest.raises(ValueError, match=r"Only a square operator has a diagonal.*\[6, 3\] and \[2, 3\]"):
        getattr(NTKOperator(model, x1, x2[:2]), wanted)()


def test_sides_that_differ_in_shape():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    x1, x2 = samples(3, 2, 6), samples(4, 2, 5)
    operator, v = NTKOperator(model, x1, x2), samples(4, 3)
    assert (operator @ v).flatten().allclose(as_matrix(kernel_of(model, x1, x2)) @ v.flatten())


def test_functions():
    net = network(4, 5, 3)
    params, x1, x2 = dict(net.named_parameters()), samples(6, 4), samples(2, 4)

    def f(params, x):
        return functional_call(net, params, (x,))

    operator, v = NTKOperator(f, x1, x2, params=params), samples(6)
    assert (operator @ v).allclose(as_matrix(kernel_of(net, x1, x2)) @ v)


def test_derivatives_as_outputs():
    """The residual of a differential equation, by autograd inside of the forward pass."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.u = network(2, 6, 1)

        def forward(self, x):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                u = self.u(x)
                (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
                (dux,) = torch.autograd.grad(du[:, 1].sum(), x, create_graph=True)
            return du[:, 0] + u[:, 0] * du[:, 1] - 0.1 * dux[:, 1]

    model, x = Residual(), samples(7, 2)
    operator, v = NTKOperator(model, x, batch_size=3), samples(7)
    assert (operator @ v).allclose(kernel_of(model, x) @ v)


class Once(torch.autograd.Function):
    """What neither forward mode nor vmap nor double backward goes through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return Once.apply(self.layer(x))


class Hidden(nn.Module):
    """A layer of which it keeps no module: exchanged parameters do not reach it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.kept = [self.layer.weight]

    def forward(self, x):
        return (self.layer(x) @ self.kept[0]).tanh()


@pytest.mark.parametrize(
    ("build", "width", "way"),
    [
        (BY_NAME["weight_norm"].model, 5, "double backward passes"),
        (BY_NAME["embedding_bag_max"].model, None, "Jacobians of each sample"),
        (Hidden, 4, "double backward passes"),
        (Custom, 4, "a loop over samples and outputs"),
        (mlp(nn.Tanh), 5, None),
    ],
    ids=["weight_norm", "embedding_bag", "hidden", "custom", "mlp"],
)
def test_ways(build, width, way, dtype, recwarn):
    """What torch.func does not go through is computed otherwise, with a warning."""
    torch.manual_seed(0)
    model = build().to(dtype)
    x = torch.randint(7, (6, 3)) if width is None else torch.randn(6, width, dtype=dtype)
    operator = NTKOperator(model, x, batch_size=4)
    said = [str(w.message) for w in recwarn if w.category is RouteWarning]
    assert len(said) == (way is not None)
    assert all(f"Products with the Jacobian of x1 come from {way}: exact, but slower, since" in text for text in said)
    v = torch.randn(operator.shape[1], 2, dtype=dtype)
    matrix = as_matrix(kernel_of(deepcopy(model).double(), x if width is None else x.double()))
    assert relative_error(operator @ v, matrix @ v.double()) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_a_way_that_gets_one_sample_of_many_wrong(monkeypatch):
    """It is not taken."""
    model, x = network(4, 5, 3), samples(40, 4)
    right = pushforwards.forward_mode

    def wrong(request, inputs, vectors):
        products = right(request, inputs, vectors)
        at = (inputs.tensors[""] == x[33]).all(-1)
        return products * (1 + 1e-6 * at.unsqueeze(-1))

    monkeypatch.setitem(pushforwards.WAYS, "forward mode", wrong)
    with pytest.warns(RouteWarning, match="come from double backward passes.*it gets products with vectors wrong"):
        operator = NTKOperator(model, x, batch_size=8)
    v = samples(120)
    assert (operator @ v).allclose(operator.to_dense() @ v, rtol=1e-12)


def test_no_way(monkeypatch):
    monkeypatch.setattr(side, "WAYS", {"nothing": lambda *_: torch.zeros(2, 2, 3).double()})
    with pytest.raises(UnsupportedModelError, match=r"cannot be multiplied by vectors .*gets products with vectors"):
        NTKOperator(network(4, 5, 3), samples(6, 4))


class Mixed(nn.Module):
    """Three samples of many influence one another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        few = x[:, 0] > 100
        return torch.where(few.unsqueeze(1), y - (y * few.unsqueeze(1)).sum(0) / 2, y)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_samples_that_influence_one_another_are_refused(batch_size):
    model, x = Mixed().double(), samples(30, 4)
    NTKOperator(model, x)
    x[[13, 17, 18], 0] = 1000.0
    with pytest.raises(UnsupportedModelError, match=r"samples influence one another \(the outputs of x1\[1[378]\], "):
        NTKOperator(model, x, batch_size=batch_size)


def test_models_that_are_refused():
    x = samples(6, 4)
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d normalises by batch statistics"):
        NTKOperator(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), x)
    with pytest.raises(UnsupportedModelError, match="it has no trainable parameter"):
        NTKOperator(nn.Linear(4, 3).double().requires_grad_(False), x)
    model = network(4, 5, 3)
    with pytest.raises(UnsupportedModelError, match=r"returns tuple, not a tensor. Pass output="):
        NTKOperator(model, x, output=lambda y: (y, y))
    with pytest.raises(ValueError, match=r"Outputs of x1 are torch.float64, and of x2 torch.float32"):
        NTKOperator(model, x, samples(2, 4), output=(None, torch.Tensor.float))
    x[3] = torch.inf
    x[5] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"Jacobians of x1\[3\], x1\[5\] are not finite. Leave"):
        NTKOperator(model, x, batch_size=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer or None, got 0"),
        ({"batch_size": 2.0}, ValueError, r"batch_size must be a positive integer or None, got 2\.0"),
        ({"memory": "much"}, ValueError, "memory must be a positive number of bytes"),
        ({"params": ["3.weight"]}, ValueError, "params names '3.weight', which the model does not have"),
        ({"output": 3}, TypeError, "output must be a callable or None"),
        (
            {"interacting": True},
            TypeError,
            r"params, output, batch_size, memory, got interacting\. interacting: a product",
        ),
        (
            {"compute": "trace", "x": 1},
            TypeError,
            r"got compute, x\. compute: it pairs all outputs; output= picks some",
        ),
        ({"vectors": 3}, TypeError, r"NTKOperator has the keywords params, .*, got vectors\.$"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        NTKOperator(network(4, 5, 3), samples(6, 4), **options)


def test_every_keyword_of_a_kernel_is_taken_or_its_absence_explained():
    keywords = [p.name for p in inspect.signature(empirical_ntk).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in keywords:
        if name not in inspect.signature(NTKOperator).parameters:
            with pytest.raises(TypeError, match=f" {name}: "):
                NTKOperator(network(4, 5, 3), samples(6, 4), **{name: None})


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (torch.ones(17).double(), ValueError, r"shape \[18\] or \[18, K\], or \[6, 3\] with K .*, got \[17\]"),
        (torch.ones(3, 6).double(), ValueError, r"or \[6, 3\] with K behind for several, got \[3, 6\]"),
        (torch.ones(6, 3, 2, 2).double(), ValueError, r"got \[6, 3, 2, 2\]"),
        (torch.tensor(1.0).double(), ValueError, r"got \[\]"),
        (torch.ones(18), ValueError, "must have the dtype of the parameters, torch.float64, got torch.float32"),
        (torch.ones(18, device="meta").double(), ValueError, "must have the device of the parameters, cpu, got meta"),
        (torch.ones(18).double().requires_grad_(), ValueError, r"requires a gradient, but .* pass it with detach\(\)"),
        (3.0, TypeError, "must be a tensor, a list of tensors or an operator, got float"),
        ([3.0], ValueError, "list of tensors"),
    ],
)
def test_vectors_that_are_refused(v, error, message):
    operator = NTKOperator(network(4, 5, 3), samples(6, 4))
    with pytest.raises(error, match=message):
        operator @ v
    if error is ValueError and isinstance(v, torch.Tensor):
        with pytest.raises(ValueError, match=r"shape \[43\] or \[43, K\], got|must have the|requires a"):
            operator.jacobian() @ v


def test_wrapped_vectors_are_refused():
    operator = NTKOperator(network(4, 5, 3), samples(6, 4))
    with pytest.raises(ValueError, match=r"is what a torch.func transform makes of a tensor"):
        vmap(operator.__matmul__)(samples(2, 18))


def test_left_as_found():
    model, x = network(4, 5, 3), samples(6, 4)
    model(x).sum().backward()
    model[0].register_forward_hook(lambda *_: None)
    x2, v, w, u = samples(2, 4), samples(6), samples(18, 2), samples(43)
    with unchanged(model):
        operator = NTKOperator(model, x, x2, batch_size=2)
        operator @ v
        operator.adjoint() @ w
        operator.jacobian() @ u


def test_left_as_found_after_errors():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fails = nn.Linear(4, 3), False

        def forward(self, x):
            if fails:
                raise KeyError("no")
            return self.layer(x)

    model, x, v, fails = Fails().double(), samples(6, 4), samples(18), []
    operator = NTKOperator(model, x)
    fails.append(0)
    with unchanged(model), pytest.raises(KeyError, match="no"):
        operator @ v


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller(mode):
    model, x, v = network(4, 5, 3), samples(6, 4), samples(18)
    expected = as_matrix(kernel_of(model, x)) @ v
    with mode():
        operator = NTKOperator(model, x)
        found = operator @ v.clone()
        assert (operator @ nn.Parameter(v)).equal(found)
    assert found.allclose(expected)
    assert (operator @ v).equal(found)
    assert not found.requires_grad


def test_threads():
    """Several threads multiply by operators of one model, and of others."""
    models = [network(4, 5, 3), network(4, 6, 3)]
    x, v = samples(6, 4), samples(18)
    operators = [NTKOperator(model, x, batch_size=2) for model in (*models, models[0])]
    expected, found = [operator @ v for operator in operators], [None] * 9

    def multiply(i):
        found[i] = operators[i % 3] @ v

    threads = [threading.Thread(target=multiply, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(product.equal(expected[i % 3]) for i, product in enumerate(found))


def test_products_follow_the_parameters_values():
    model, x, v = network(4, 5, 3), samples(6, 4), samples(18)
    operator = NTKOperator(model, x)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    assert (operator @ v).allclose(as_matrix(kernel_of(model, x)) @ v)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(False),
        lambda model: model[0].requires_grad_(False),
        lambda model: model.append(nn.Tanh()),
        lambda model: model[0].register_forward_hook(lambda *_: None),
    ],
)
def test_models_that_change_are_refused(change):
    model, x = network(4, 5, 3), samples(6, 4)
    operator = NTKOperator(model, x)
    change(model)
    with pytest.raises(ValueError, match="The model has changed since the operator was made"):
        operator @ samples(18)


def test_products_are_deterministic():
    """By curvlinops' own check, which its operators go through when they are made."""
    from curvlinops._torch_base import CurvatureLinearOperator

    operator = NTKOperator(network(4, 5, 3), samples(6, 4), batch_size=4)
    check = vars(CurvatureLinearOperator)["_CurvatureLinearOperator__check_deterministic_matvec"]
    check(operator)
    v = samples(18, 3)
    assert (operator @ v).equal(operator @ v)


def test_memory_decides_on_blocks():
    model, x = network(50, 60, 3), samples(400, 50)
    sizes = [NTKOperator(model, x, memory=memory)._rows.sizes for memory in ("100 kB", "1 MB", None)]
    counts = [len(found.blocks) for found in sizes]
    assert counts[0] > counts[1] > counts[2] == 1
    assert sizes[0].vectors == 1 < sizes[2].vectors
    v = samples(400, 3, 5)
    found = [NTKOperator(model, x, memory=memory) @ v for memory in ("100 kB", None)]
    assert found[0].allclose(found[1], rtol=1e-10)


def test_a_product_takes_little_memory():
    """Of 4,000 samples, whose kernel takes 12.8 GB."""
    run = (
        "import resource, torch, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from ggn_ntk.operators import NTKOperator\n"
        "torch.set_num_threads(1)\n"
        "layers = torch.nn.Linear(50, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)\n"
        "model, x, v = torch.nn.Sequential(*layers), torch.randn(4000, 50), torch.randn(4000, 10)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "NTKOperator(model, x[:9]) @ v[:9]\n"
        "before = peak()\n"
        "NTKOperator(model, x) @ v\n"
        "print((peak() - before) / 1024)\n"
    )
    ran = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 200


def test_running_out_of_memory_is_explained(monkeypatch):
    model, x = network(4, 5, 3), samples(6, 4)
    operator = NTKOperator(model, x)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(Side, "pull", mock.Mock(side_effect=error))
    with pytest.raises(
        KernelMemoryError, match=r"Memory ran out when 2.00 GiB .* for products with vectors. What helps"
    ):
        operator @ samples(18)


def test_without_curvlinops():
    """The package and what needs no operator can be imported; the rest says what to install."""
    run = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "sys.modules['curvlinops'] = None\n"
        "from ggn_ntk import *\n"
        "from ggn_ntk.operators import as_matrix\n"
        "import ggn_ntk\n"
        "for module in (ggn_ntk, operators):\n"
        "    try:\n"
        "        module.NTKOperator\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert 'pip install ggn-ntk[operators]' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError\n"
    )
    ran = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_names():
    assert ggn_ntk.NTKOperator is NTKOperator
    with pytest.raises(AttributeError, match="has no attribute 'NTKOperators'"):
        ggn_ntk.operators.NTKOperators  # noqa: B018
