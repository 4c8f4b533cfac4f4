"""The oracle: chunks, outputs, fallbacks, and what it does not compute twice."""

import pytest
import torch
from backpack import extend
from cases import BY_NAME, mlp
from conftest import COMPUTES, assert_close, kernel_of, loop_jacobians, oracle_sum
from torch import nn
from torch.nn import functional as F
from zoo import Residual

from ggn_ntk import RouteWarning
from ggn_ntk.methods import reference, sample_jacobians
from ggn_ntk.models.comparison import KINKS, TOLERANCES, relative_error
from ggn_ntk.process.torch_internals import is_wrapped_tensor
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products

each_function = pytest.mark.parametrize("function", [jacobian_contraction, ntk_vector_products])
each_compute = pytest.mark.parametrize("compute", COMPUTES)


@pytest.fixture
def forbid(monkeypatch):
    """Make a function of the module unavailable."""

    def forbidden(*args, **kwargs):
        raise AssertionError("not to be called")

    return lambda name: monkeypatch.setattr(sample_jacobians, name, forbidden)


def replace_evaluations_of_samples(monkeypatch, function):
    """Have both routes call another function where they evaluate a sample inside of ``vmap``."""
    for module in (sample_jacobians, reference):
        monkeypatch.setattr(module, "sample_output", function)


@each_function
@each_compute
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["mlp_Tanh", "tied_transformer", "output_image", "tuple_inputs"])
def test_chunks(function, compute, chunk_size, symmetric, name):
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    kernel = function(model, x1, None if symmetric else x2, compute=compute, chunk_size=chunk_size)
    assert_close(kernel, oracle_sum(case, symmetric, compute))


@each_function
def test_output_picks_a_tensor(function):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return {"logits": self.layer(x), "hidden": x}

    model, x = Returns(), torch.randn(3, 5)
    kernel = function(model, x, output=lambda out: out["logits"].reshape(-1, 3, 1))
    assert kernel.shape == (3, 3, 3, 1, 3, 1)
    assert_close(kernel.squeeze(), jacobian_contraction(model.layer, x))


@each_function
def test_derivatives_inside_of_the_model_are_mapped_over_samples(function, forbid):
    forbid("jacobians_by_loop")
    torch.manual_seed(0)
    model, x1, x2 = Residual().double(), torch.randn(3, 2).double(), torch.randn(2, 2).double()
    first, second = (loop_jacobians(model, x) for x in (x1, x2))
    expected = sum(torch.einsum("ncp,mdp->nmcd", first[name].flatten(2), second[name].flatten(2)) for name in first)
    assert_close(function(model, x1, x2), expected)


@each_function
@each_compute
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["recurrent", "data_dependent"])
def test_plain_autograd_takes_over_where_vmap_fails(function, compute, symmetric, name, monkeypatch):
    loops = []
    original = sample_jacobians._autograd_jacobian
    monkeypatch.setattr(sample_jacobians, "_autograd_jacobian", lambda *args: loops.append(0) or original(*args))
    case = BY_NAME[name]
    model, x1, x2 = case.build()
    kernel = function(model, x1, None if symmetric else x2, compute=compute)
    assert_close(kernel, oracle_sum(case, symmetric, compute))
    assert len(loops) == (3 if symmetric else 5)


@pytest.mark.parametrize("name", ["recurrent", "data_dependent", "tied_transformer", "custom_parameter"])
def test_params_and_per_parameter_where_vmap_fails(name, monkeypatch):
    replace_evaluations_of_samples(monkeypatch, lambda *args: 1 / 0)
    model, x, _ = BY_NAME[name].build()
    jacobians = loop_jacobians(model, x)
    name = list(jacobians)[-1]
    for function in (jacobian_contraction, ntk_vector_products):
        kernels = function(model, x, per_parameter=True)
        assert list(kernels) == list(jacobians)
        expected = torch.einsum("ncp,mdp->nmcd", jacobians[name], jacobians[name])
        assert_close(kernels[name].reshape(expected.shape), expected)
        assert_close(function(model, x, params=[name]).reshape(expected.shape), expected)


@each_function
def test_running_out_of_memory_is_not_a_reason_to_loop(function, monkeypatch, forbid):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    replace_evaluations_of_samples(monkeypatch, out_of_memory)
    forbid("_autograd_jacobian")
    with pytest.raises(torch.OutOfMemoryError):
        function(mlp(nn.Tanh)(), torch.randn(3, 5))


@each_function
def test_parameters_that_the_output_does_not_depend_on(function, monkeypatch):
    model = nn.Module()
    model.forward = lambda x: x.sin()
    model.unused = nn.Parameter(torch.randn(3))
    assert torch.equal(function(model, torch.randn(2, 4)), torch.zeros(2, 2, 4, 4))
    replace_evaluations_of_samples(monkeypatch, lambda *args: 1 / 0)
    assert torch.equal(function(model, torch.randn(2, 4)), torch.zeros(2, 2, 4, 4))


def test_jacobian_is_computed_once_for_one_set(monkeypatch):
    calls = []
    original = sample_jacobians.jacobians_by_vmap
    monkeypatch.setattr(sample_jacobians, "jacobians_by_vmap", lambda *args: calls.append(0) or original(*args))
    model, x = mlp(nn.Tanh)(), torch.randn(3, 5)
    jacobian_contraction(model, x)
    assert len(calls) == 1
    jacobian_contraction(model, x, x)
    assert len(calls) == 3


def test_products_mirror_the_pairs_of_one_set(monkeypatch):
    sizes = []
    original = reference._column
    monkeypatch.setattr(reference, "_column", lambda x1, x2, m: sizes.append(len(x1.inputs)) or original(x1, x2, m))
    ntk_vector_products(mlp(nn.Tanh)(), torch.randn(4, 5))
    assert sizes == [4, 3, 2, 1]


@each_function
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_models_that_backpack_has_extended(function, forbid):
    forbid("_autograd_jacobian")
    model, x = mlp(nn.Tanh)().double(), torch.randn(3, 5).double()
    expected = function(model, x)
    assert torch.equal(function(extend(model), x), expected)


@each_function
def test_custom_function_without_forward_mode(function):
    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    class Cubes(nn.Linear):
        def forward(self, x):
            return Cube.apply(super().forward(x))

    model, x = Cubes(5, 3).double(), torch.randn(3, 5).double()
    jacobian = torch.cat(list(loop_jacobians(model, x).values()), dim=2)
    assert_close(function(model, x), torch.einsum("ncp,mdp->nmcd", jacobian, jacobian))


class KeepsReference(nn.Module):
    """Uses a parameter past the module that holds it, where functional_call does not reach."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.weights = [self.layer.weight]

    def forward(self, x):
        return self.layer(x).tanh() @ self.weights[0]


@each_function
def test_parameters_that_are_used_past_their_module(function):
    model, x = KeepsReference().double(), torch.randn(3, 5).double()
    jacobian = torch.cat(list(loop_jacobians(model, x).values()), dim=2)
    assert_close(function(model, x), torch.einsum("ncp,mdp->nmcd", jacobian, jacobian))


@each_function
def test_no_grad_in_the_forward_pass(function):
    class Gated(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                gate = super().forward(x).sigmoid()
            return super().forward(x) * gate

    model, x = Gated(5, 3).double(), torch.randn(3, 5).double()
    jacobian = torch.cat(list(loop_jacobians(model, x).values()), dim=2)
    assert_close(function(model, x), torch.einsum("ncp,mdp->nmcd", jacobian, jacobian))


def test_jacobians_that_vmap_gets_wrong_in_a_batch_alone(monkeypatch):
    """As of PReLU on some GPUs: then a single sample, in whatever precision, tells nothing of the batch."""
    model, x = mlp(nn.Tanh)(), torch.randn(4, 5)
    expected = jacobian_contraction(model, x)
    right = sample_jacobians.jacobians_by_vmap

    def wrong(request, inputs):
        found = right(request, inputs)
        if len(inputs) > 1:
            found["0.weight"][2] *= 1.5
        return found

    monkeypatch.setattr(sample_jacobians, "jacobians_by_vmap", wrong)
    with pytest.warns(RouteWarning, match="gets some samples wrong"):
        assert_close(jacobian_contraction(model, x), expected)


def test_products_that_are_wrong_in_a_batch_alone(monkeypatch):
    model, x = mlp(nn.Tanh)(), torch.randn(4, 5)
    expected = jacobian_contraction(model, x)
    right = reference._kernel_from_products

    def wrong(request, axes, progress):
        kernel = right(request, axes, progress)
        kernel[2, 1] *= 1.5
        return kernel

    monkeypatch.setattr(reference, "_kernel_from_products", wrong)
    with pytest.warns(RouteWarning, match="instead of products"):
        assert_close(ntk_vector_products(model, x), expected)


class AtAKink(nn.Module):
    """Units of the samples with x[0] > 0 are at a kink, which torch.func takes to its other side in some dtypes."""

    def __init__(self, size, *dtypes):
        super().__init__()
        self.layer, self.head, self.size, self.dtypes = nn.Linear(4, 16), nn.Linear(16, 2), size, dtypes

    def forward(self, x):
        h = self.layer(x)
        other_side = x.dtype in self.dtypes and is_wrapped_tensor(self.layer.weight)
        at_kink = F.leaky_relu(h - h.detach() + (-1e-9 if other_side else 1e-9), 1 - self.size)
        return self.head(torch.cat([torch.where(x[:, :1] > 0, at_kink, h)[:, :8], h[:, 8:].tanh()], 1))


def samples_at_a_kink():
    x = torch.randn(5, 4)
    x[:, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0])  # not at the first, which products are tried with
    return x


@each_function
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.filterwarnings("error::ggn_ntk.RouteWarning")
def test_what_kinks_explain_is_no_reason_to_loop(function, symmetric):
    model, x = AtAKink(0.01, torch.float32), samples_at_a_kink()
    x1, x2 = (x, None) if symmetric else (x[:3], x[3:])
    found = function(model, x1, x2)
    expected = kernel_of(model.double(), x1.double(), None if symmetric else x2.double())
    assert TOLERANCES[torch.float32] < relative_error(found, expected) < KINKS


@each_function
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("size", "dtypes"), [(1.0, [torch.float32]), (0.01, [torch.float32, torch.float64])], ids=["large", "in_float64"]
)
def test_what_kinks_do_not_explain_is_announced_and_right(function, symmetric, size, dtypes):
    model, x = AtAKink(size, *dtypes), samples_at_a_kink()
    x1, x2 = (x, None) if symmetric else (x[:3], x[3:])
    with pytest.warns(RouteWarning, match="gets some samples wrong") as warned:
        found = function(model, x1, x2)
    assert any("gets products with vectors wrong" in str(w.message) for w in warned) == (
        function is ntk_vector_products
    )
    assert_close(found, kernel_of(model.double(), x1.double(), None if symmetric else x2.double()))


@pytest.mark.parametrize(
    ("function", "module", "name"),
    [(jacobian_contraction, sample_jacobians, "jacrev"), (ntk_vector_products, reference, "vjp")],
)
@pytest.mark.parametrize(
    "replaced", [None, torch.ones(2), lambda: None], ids=["missing", "a_tensor", "without_arguments"]
)
def test_a_mistake_of_this_package_comes_through(function, module, name, replaced, monkeypatch):
    if replaced is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, replaced)
    with pytest.raises(NameError if replaced is None else TypeError):
        function(mlp(nn.Tanh)(), torch.randn(3, 5))


@each_function
@pytest.mark.parametrize("error", [NameError, TypeError, AttributeError, AssertionError, ValueError, RuntimeError])
def test_an_error_that_torch_func_makes_the_model_raise_does_not(function, error):
    class Raises(nn.Linear):
        def forward(self, x):
            if is_wrapped_tensor(self.weight):
                raise error("inside of torch.func")
            return super().forward(x)

    model, x = Raises(5, 3).double(), torch.randn(3, 5).double()
    with pytest.warns(RouteWarning, match=f"does not go through the model .{error.__name__}: inside of torch.func"):
        found = function(model, x)
    assert_close(found, kernel_of(model, x))
