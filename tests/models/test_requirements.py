"""Every problem of a model is found and named."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from cases import mlp
from torch import nn
from torch.nn import functional as F

from ggn_ntk import StatisticsWarning, UnsupportedModelError, empirical_ntk, empirical_ntk_vivit, nngp
from ggn_ntk.reference import jacobian_contraction, ntk_vector_products, relative_error

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

each_function = pytest.mark.parametrize(
    "function", [empirical_ntk, empirical_ntk_vivit, jacobian_contraction, ntk_vector_products]
)


class Wrapped(nn.Module):
    """A linear layer, then a function."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(5, 3), function

    def forward(self, x):
        return self.function(self.layer(x))


class Attention(nn.Module):
    """Attends across samples, by reading the sample axis as the sequence."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(5, 1, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@each_function
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), "1: BatchNorm1d normalises by batch statistics"),
        (
            lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
            r"1: BatchNorm1d normalises by batch statistics.* give it running statistics",
        ),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1))), r"0.1: Dropout drops activations"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.AlphaDropout(0.1)), "1: AlphaDropout drops activations at random"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.RReLU()), "1: RReLU draws its slopes at random"),
        (lambda: nn.Sequential(nn.FractionalMaxPool2d(2, 1)), "0: FractionalMaxPool2d draws its windows at random"),
        (lambda: nn.LSTM(5, 3, 2, dropout=0.1), "the model: LSTM drops activations at random"),
        (lambda: nn.MultiheadAttention(5, 1, dropout=0.1), "MultiheadAttention drops activations at random"),
        (lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), r"0: Embedding rewrites its weight .*max_norm"),
        (lambda: nn.EmbeddingBag(4, 3, scale_grad_by_freq=True), "EmbeddingBag scales gradients by the batch"),
        (lambda: nn.Sequential(nn.Linear(5, 3)).requires_grad_(False), "the model: it has no trainable parameter"),
        (lambda: nn.Sequential(nn.Tanh()), "the model: it has no trainable parameter"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight: has no shape yet, as are 1 others. Run one forward"),
    ],
)
def test_configuration(function, build, message):
    with pytest.raises(UnsupportedModelError, match=message):
        function(build(), X)


@pytest.mark.parametrize("function", [empirical_ntk, jacobian_contraction, ntk_vector_products])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Wrapped(lambda h: h - h.mean(0)), "the model: samples influence one another"),
        (lambda: Attention(), "the model: samples influence one another"),
        (lambda: Wrapped(lambda h: h.cumsum(0)), "the model: samples influence one another"),
        (lambda: Wrapped(F.dropout), "the model: its forward pass draws random numbers"),
        (lambda: Wrapped(lambda h: h + torch.randn_like(h)), "the model: its forward pass draws random numbers"),
        (lambda: Wrapped(lambda h: (h, None)), "the model: it returns tuple, not a tensor"),
        (lambda: Wrapped(lambda h: h.argmax(1)), "the model: its output is torch.int64"),
        (lambda: Wrapped(lambda h: torch.complex(h, h)), "the model: its output is torch.complex64"),
        (lambda: Wrapped(lambda h: h.bfloat16()), "the model: its output is torch.bfloat16"),
        (lambda: Wrapped(lambda h: h[:, :0]), r"the model: its output for 3 samples has shape \[3, 0\]"),
        (lambda: Wrapped(lambda h: h * random.random()), "the model: its forward pass draws random numbers"),
        (lambda: Wrapped(lambda h: h * np.random.rand()), "the model: its forward pass draws random numbers"),
        (lambda: Wrapped(lambda h: h / 0), "the model: its gradients are not finite"),
        (lambda: Wrapped(lambda h: h.sum()), r"the model: its output for 3 samples has shape \[\]"),
        (lambda: Wrapped(lambda h: h.T), r"1 of the samples alone has shape \[3, 1\], not \[1, 3\]"),
        (lambda: Wrapped(lambda h: h.flatten()), r"the model: its output for 3 samples has shape \[9\]"),
        (lambda: Wrapped(lambda h: h[:, :1].squeeze()), r"of the samples alone has shape \[.*\], not \[\d\]"),
    ],
)
def test_forward_pass(function, build, message):
    with pytest.raises(UnsupportedModelError, match=message):
        function(build(), X)


@each_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(function, dtype):
    with pytest.raises(UnsupportedModelError, match=rf"0.weight: is {dtype}, as are 5 others. .* convert with model"):
        function(mlp(nn.Tanh)().to(dtype), X.to(dtype))


@each_function
def test_meta_device(function):
    with pytest.raises(UnsupportedModelError, match="weight: holds no data"):
        function(nn.Linear(5, 3, device="meta"), X.to("meta"))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(5, 3)
    with pytest.raises(UnsupportedModelError, match="weight: was created in inference mode, as are 1 others"):
        empirical_ntk(model, X)


def test_all_problems_are_listed_with_their_places():
    model = nn.Sequential(
        nn.Linear(5, 3), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)), nn.Linear(3, 2).bfloat16(), nn.RReLU()
    )
    with pytest.raises(UnsupportedModelError) as info:
        empirical_ntk(model, X)
    assert [problem.where for problem in info.value.problems] == ["1.0", "1.1", "3", "2.weight"]
    assert str(info.value).splitlines()[0] == "No empirical NTK of this model:"
    assert len(str(info.value).splitlines()) == 5
    assert isinstance(info.value, ValueError)


def test_train_mode_without_randomness_is_fine():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0), nn.LayerNorm(3)).train()
    assert empirical_ntk(model, X).shape == (4, 4, 3, 3)


def test_outputs_masked_by_infinity_are_fine():
    model = Wrapped(lambda h: h.masked_fill(torch.tensor([True, False, False]), -torch.inf))
    kernel = empirical_ntk(model, X)
    assert kernel[:, :, 0].count_nonzero() == 0
    assert kernel.isfinite().all()


class Centred(nn.Module):
    """Centres hidden units over the batch, in front of a head that starts at zero."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        h = self.body(x)
        return self.head(h - h.mean(0))


def test_samples_that_interact_where_no_output_shows_it():
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(Centred(), X)


class Kink(nn.Module):
    """One of many units is at its kink, and rounding, which depends on how many samples there are, decides its side."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 20_000), nn.Linear(20_000, 2)

    def forward(self, x):
        h = self.body(x)
        rounds_down = x.dtype == torch.float32 and len(x) == 1
        at_kink = (h - h.detach() + (-1e-9 if rounds_down else 1e-9)).relu()
        return self.head(torch.cat([at_kink[:, :1], h[:, 1:].tanh()], 1))


class Weakly(Kink):
    """Samples influence one another, by little."""

    def forward(self, x):
        return super().forward(x + 1e-3 * x.roll(1, 0))


def test_kinks_that_rounding_decides_on_are_no_sign_of_interaction():
    assert empirical_ntk(Kink(), X, method="jacobian_contraction").shape == (4, 4, 2, 2)
    with pytest.raises(UnsupportedModelError, match="samples influence one another"):
        empirical_ntk(Weakly(), X, method="jacobian_contraction")


@pytest.mark.parametrize("seed", range(5))
def test_outputs_that_cancel_are_no_sign_of_interaction(seed):
    """Two copies of a network whose outputs cancel at initialisation, a usual set-up in NTK studies."""
    torch.manual_seed(seed)
    hidden, head = nn.Linear(64, 512), nn.Linear(512, 1)
    with torch.no_grad():
        hidden.weight[256:], hidden.bias[256:] = hidden.weight[:256].clone(), hidden.bias[:256].clone()
        head.weight[:, 256:], head.bias[:] = -head.weight[:, :256], 0
    model, x = nn.Sequential(hidden, nn.ReLU(), head), torch.randn(8, 64)
    expected = jacobian_contraction(model.double(), x.double())
    model.float()
    for method in ("structured", "vivit", "jacobian_contraction", "ntk_vector_products"):
        assert relative_error(empirical_ntk(model, x, method=method), expected) < 1e-5


@pytest.mark.parametrize("wrap", [torch.jit.trace, nn.DataParallel])
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_modules_that_are_no_functions(wrap):
    model = wrap(nn.Linear(5, 3)) if wrap is nn.DataParallel else wrap(nn.Linear(5, 3), X)
    with pytest.raises(TypeError, match=r"model is a .*: use the module it was made from"):
        empirical_ntk(model, X)
    with pytest.raises(TypeError, match=r"model holds a .* at '0'"):
        empirical_ntk(nn.Sequential(model), X)


def test_complex_parameters():
    with pytest.raises(UnsupportedModelError, match=r"weight: is torch.complex64.*real and imaginary parts"):
        empirical_ntk(nn.Linear(5, 3, dtype=torch.complex64), X.to(torch.complex64))


def test_errors_of_the_users_forward_pass_are_left_alone():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        empirical_ntk(nn.Linear(4, 3), X)


def test_relative_error():
    ones = torch.ones(4)
    assert relative_error(ones, ones) == relative_error(0 * ones, 0 * ones) == 0
    assert relative_error(1.5 * ones, ones) == 0.5
    assert relative_error(ones, 0 * ones) == float("inf")


@pytest.mark.parametrize("method", ["auto", "vivit", "jacobian_contraction", "ntk_vector_products", None])
def test_statistics_that_were_never_set(method):
    model, x = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(4, 5)
    kernel = nngp if method is None else partial(empirical_ntk, method=method)
    message = r"1: BatchNorm normalises by running statistics that were never set.* pass interacting=True"
    with pytest.warns(StatisticsWarning, match=message) as found:
        kernel(model.eval(), x)
    assert len(found) == 1
    model.train()(x)
    kernel(model.eval(), x)
    model[1].reset_running_stats()
    model[1].running_mean += 1  # copied from elsewhere
    kernel(model, x)
    model[1].reset_running_stats()
    if method != "vivit":
        kernel(model.train(), x, interacting=True)
