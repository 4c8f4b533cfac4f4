"""One list of small models and inputs that every test walks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ggn_ntk import Factored, register_rule


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and whether ViViT and a walk through Sequential models support it.

    ``inputs(n)`` returns n samples. Both callables draw from the global generator, seeded by the test. ``output``
    is what empirical_ntk takes.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    vivit: bool = True
    sequential: bool = True
    n1: int = 3
    n2: int = 2
    output: Any = None

    def build(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[nn.Module, Any, Any]:
        """Return the model in eval mode, x1 and x2."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.model().eval()
            for module in model.modules():
                _randomize_norm(module)
            x1, x2 = self.inputs(self.n1), self.inputs(self.n2)
        if device == "pretend" and any(isinstance(m, (nn.LSTM, nn.GRU)) for m in model.modules()):
            pytest.skip("the device has no fused recurrent layers")
        return moved(model, device, dtype), cast(x1, dtype, device), cast(x2, dtype, device)

    def supports(self, method: str) -> bool:
        """Whether a method does not refuse the model."""
        return getattr(self, method, True)

    def __str__(self) -> str:
        return self.name


def moved(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Move a model, and tie what was tied: to move it to the pretend device makes new parameters."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    model.to(device, dtype)
    for first, *others in names.values():
        for other in others:
            path, _, key = other.rpartition(".")
            setattr(model.get_submodule(path), key, model.get_parameter(first))
    return model


def _randomize_norm(module: nn.Module) -> None:
    """Give normalisation layers weights and statistics that a trained network could have."""
    if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
        nn.init.uniform_(module.weight, 0.5, 1.5)
    if "Norm" in type(module).__name__ and getattr(module, "bias", None) is not None:
        nn.init.normal_(module.bias)
    if getattr(module, "running_mean", None) is not None:
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.5, 2.0)


def cast(x: Any, dtype: torch.dtype, device: str) -> Any:
    """Move inputs to a device, and those that are real to a dtype."""
    if isinstance(x, Tensor):
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)
    if isinstance(x, tuple):
        return tuple(cast(t, dtype, device) for t in x)
    return {key: cast(t, dtype, device) for key, t in x.items()}


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Normal samples of a shape."""
    return lambda n: torch.randn(n, *shape)


def tokens(length: int, vocabulary: int = 7) -> Callable[[int], Tensor]:
    """Token sequences."""
    return lambda n: torch.randint(vocabulary, (n, length))


def sequential(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build a Sequential when called, so that weights are drawn under the case's seed."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


def conv_net(dim: int, features: int, head: int, transpose: bool = False, **options: Any) -> Callable[[], nn.Module]:
    """A convolution on two channels of an image, a nonlinearity and a linear layer on ``head`` features."""
    layer = getattr(nn, f"Conv{'Transpose' if transpose else ''}{dim}d")
    kernel = options.pop("kernel_size", 3)
    return sequential(lambda: layer(2, features, kernel, **options), nn.Tanh, nn.Flatten, lambda: nn.Linear(head, 3))


def pool_net(pool: nn.Module, head: int, dim: int = 2) -> Callable[[], nn.Module]:
    """A convolution to three channels, pooling and a linear layer on ``head`` features."""
    layer = getattr(nn, f"Conv{dim}d")
    # A copy: what extends a model would extend that of all others.
    return sequential(
        lambda: layer(2, 3, 3), nn.ReLU, lambda: copy.deepcopy(pool), nn.Flatten, lambda: nn.Linear(head, 3)
    )


def mlp(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Two hidden layers."""
    return sequential(lambda: nn.Linear(5, 6), activation, lambda: nn.Linear(6, 4), activation, lambda: nn.Linear(4, 3))


def frozen(model: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    """Freeze some parameters of a model."""

    def build() -> nn.Module:
        built = model()
        for name in names:
            built.get_parameter(name).requires_grad_(False)
        return built

    return build


class Residual(nn.Module):
    """A skip connection, added outside of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h + F.relu(self.second(h)))


class TiedTransformer(nn.Module):
    """A language model whose embedding is its output layer. Returns logits for each position."""

    def __init__(self, vocabulary: int = 7, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(4, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.block(h, src_key_padding_mask=mask))


class TwoInputs(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a(a).sigmoid() * self.b(b)


class Recurrent(nn.Module):
    """An LSTM classifier, which vmap does not go through."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class DataDependent(nn.Module):
    """Control flow that depends on the data, which vmap does not go through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.layer(row) if row.sum() > 0 else self.layer(-row).relu() for row in x]
        return self.head(torch.stack(rows))


class CustomParameter(nn.Module):
    """A scale that is no layer, one that is unused, and one that is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.rand(3))
        self.unused = nn.Parameter(torch.rand(2, 2))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() * self.scale / self.temperature


def tied_mlp() -> nn.Module:
    """Two layers that share their weight."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


def twice_called() -> nn.Module:
    """A module that is called twice."""
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))


def weight_norm() -> nn.Module:
    """A parametrized layer."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 2))


ACTIVATIONS = [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU, nn.Identity]


def only_structured(name: str, *layers: Callable[[], nn.Module], inputs: Callable[[int], Any]) -> "Case":
    """A Sequential model with a layer that the structured route knows and ViViT does not."""
    return Case(name, sequential(*layers), inputs, vivit=False)


def image_net(layer: Callable[[], nn.Module], head: int) -> tuple[Callable[[], nn.Module], ...]:
    """A convolution to four channels, a layer, a nonlinearity and a linear layer on ``head`` features."""
    return lambda: nn.Conv2d(2, 4, 3), layer, nn.Tanh, nn.Flatten, lambda: nn.Linear(head, 2)


def hidden_net(layer: Callable[[], nn.Module]) -> tuple[Callable[[], nn.Module], ...]:
    """A layer on six hidden units, between linear ones."""
    return lambda: nn.Linear(5, 6), layer, lambda: nn.Linear(6, 3)


# Elementwise nonlinearities that ViViT does not know.
OTHER_ACTIVATIONS = [
    nn.CELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Mish, nn.PReLU, nn.ReLU6, nn.RReLU,
    nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink,
]  # fmt: skip


# Layers without parameters whose Jacobian is the same for all samples, by the number of spatial axes of their input.
LINEAR_MAPS = {
    1: [
        lambda: nn.ZeroPad1d(1), lambda: nn.ConstantPad1d((0, 2), 0.5), lambda: nn.ReflectionPad1d(1),
        lambda: nn.ReplicationPad1d((2, 0)), lambda: nn.CircularPad1d(1), lambda: nn.AdaptiveAvgPool1d(2),
        nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout, lambda: nn.AvgPool1d(2, ceil_mode=True),
    ],
    2: [
        lambda: nn.ZeroPad2d((1, 0, 2, -1)), lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.5), lambda: nn.ReflectionPad2d(1),
        lambda: nn.ReplicationPad2d(1), lambda: nn.CircularPad2d(1), lambda: nn.AdaptiveAvgPool2d((2, 1)),
        nn.Dropout2d, lambda: nn.PixelShuffle(2), lambda: nn.PixelUnshuffle(2), lambda: nn.ChannelShuffle(2),
    ],
    3: [
        lambda: nn.ZeroPad3d(1), lambda: nn.ConstantPad3d(1, 0.5), lambda: nn.ReflectionPad3d(1),
        lambda: nn.ReplicationPad3d(1), lambda: nn.CircularPad3d(1), lambda: nn.AdaptiveAvgPool3d(1), nn.Dropout3d,
    ],
}  # fmt: skip


def between(layer: Callable[[], nn.Module], dim: int) -> Callable[[], nn.Module]:
    """A layer between a convolution to four channels and a nonlinearity, on inputs of two channels and size 4."""

    def build() -> nn.Module:
        body = nn.Sequential(getattr(nn, f"Conv{dim}d")(2, 4, 3, padding=1), layer(), nn.Tanh(), nn.Flatten()).eval()
        return nn.Sequential(*body, nn.Linear(body(torch.zeros(1, 2, *[4] * dim)).shape[1], 2))

    return build


def tied_embedding() -> nn.Module:
    """A language model on single tokens whose embedding is its output layer."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    return model


def tied_embedding_bag() -> nn.Module:
    """A bag of tokens whose maxima and scores come from one table."""
    model = nn.Sequential(nn.EmbeddingBag(7, 4, mode="max", padding_idx=2), nn.Tanh(), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    return model


class Shift(nn.Module):
    """A layer whose transposed Jacobian is the identity, so that s passes through as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@register_rule(Shift)
def shift(module: Shift, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """The Jacobian of the shift."""
    return {"shift": Factored("cnk->cnk", (s,))}


def reused(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer that is called twice, behind a nonlinearity that could overwrite what passes back through it."""

    def build() -> nn.Module:
        twice = layer()
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(5, 2))

    return build


def tied_convolutions() -> nn.Module:
    """A weight shared by a convolution in one group, one in two groups, and a transposed one."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    model[2].weight = model[4].weight = model[0].weight
    return model


CASES = [
    # fully-connected
    Case("linear", lambda: nn.Linear(5, 3), normal(5)),
    *(Case(f"mlp_{a.__name__}", mlp(a), normal(5)) for a in ACTIVATIONS),
    Case("mlp_no_bias", sequential(lambda: nn.Linear(5, 4, bias=False), nn.Tanh, lambda: nn.Linear(4, 3)), normal(5)),
    Case("mlp_frozen_first", frozen(mlp(nn.Tanh), "0.weight", "0.bias"), normal(5)),
    Case("mlp_frozen_middle", frozen(mlp(nn.Tanh), "2.weight", "4.bias"), normal(5)),
    Case("mlp_one_sample", mlp(nn.Tanh), normal(5), n1=1, n2=1),
    Case("mlp_one_against_many", mlp(nn.Tanh), normal(5), n1=1, n2=6),
    Case("mlp_one_output", sequential(lambda: nn.Linear(5, 4), nn.Tanh, lambda: nn.Linear(4, 1)), normal(5)),
    Case("mlp_dropout_eval", sequential(lambda: nn.Linear(5, 4), nn.Dropout, lambda: nn.Linear(4, 3)), normal(5)),
    Case("mlp_image_input", sequential(nn.Flatten, lambda: nn.Linear(12, 4), nn.ReLU), normal(3, 4)),
    Case(
        "nested", sequential(mlp(nn.Tanh), nn.ReLU, lambda: nn.Sequential(nn.Linear(3, 2), nn.Sequential())), normal(5)
    ),
    Case("linear_3d", sequential(lambda: nn.Linear(4, 5), nn.Tanh, nn.Flatten, lambda: nn.Linear(10, 3)), normal(2, 4)),
    # convolutions
    Case("conv1d", conv_net(1, 4, 16, stride=2, padding=1), normal(2, 8)),
    Case("conv1d_options", conv_net(1, 4, 28, dilation=2, groups=2, padding=1), normal(2, 9)),
    Case("conv2d", conv_net(2, 4, 64), normal(2, 6, 6)),
    Case("conv2d_options", conv_net(2, 4, 32, stride=2, padding=(2, 1), dilation=2, groups=2), normal(2, 7, 5)),
    Case("conv2d_rectangular", conv_net(2, 3, 36, kernel_size=(1, 3), bias=False), normal(2, 3, 6)),
    Case("conv3d", conv_net(3, 2, 16, kernel_size=2, stride=(1, 2, 1)), normal(2, 3, 4, 3)),
    Case("conv3d_options", conv_net(3, 4, 128, kernel_size=2, padding=1, dilation=2, groups=2), normal(2, 2, 4, 4)),
    Case("conv_transpose1d", conv_net(1, 2, 22, transpose=True, stride=2, dilation=2), normal(2, 4)),
    Case("conv_transpose1d_options", conv_net(1, 4, 28, transpose=True, padding=1, groups=2, stride=2), normal(2, 4)),
    Case("conv_transpose2d", conv_net(2, 4, 100, transpose=True, stride=2, padding=1, groups=2), normal(2, 3, 3)),
    Case("conv_transpose3d", conv_net(3, 2, 54, transpose=True, kernel_size=2, bias=False), normal(2, 2, 2, 2)),
    Case(
        "conv_transpose3d_options",
        conv_net(3, 4, 180, transpose=True, kernel_size=2, stride=(2, 1, 1), padding=(0, 1, 0), dilation=2, groups=2),
        normal(2, 1, 3, 3),
    ),
    Case(
        "tutorial_cnn_small",
        sequential(
            lambda: nn.Conv2d(3, 4, 3),
            nn.ReLU,
            lambda: nn.Conv2d(4, 4, 3),
            nn.ReLU,
            lambda: nn.Conv2d(4, 4, 3),
            nn.Flatten,
            lambda: nn.Linear(16, 10),
        ),
        normal(3, 8, 8),
        n1=4,
        n2=3,
    ),
    # pooling, padding, normalisation
    Case("max_pool1d", pool_net(nn.MaxPool1d(2), 9, dim=1), normal(2, 8)),
    Case("max_pool2d", pool_net(nn.MaxPool2d(3, 2, padding=1), 27), normal(2, 7, 7)),
    Case("max_pool2d_ceil", pool_net(nn.MaxPool2d(2, ceil_mode=True), 27), normal(2, 7, 7)),
    Case("max_pool3d", pool_net(nn.MaxPool3d(2), 3, dim=3), normal(2, 4, 4, 4)),
    Case("avg_pool1d", pool_net(nn.AvgPool1d(2), 9, dim=1), normal(2, 8)),
    Case("avg_pool2d", pool_net(nn.AvgPool2d(3, 2, padding=1), 27), normal(2, 7, 7)),
    Case("avg_pool3d", pool_net(nn.AvgPool3d(2), 3, dim=3), normal(2, 4, 4, 4)),
    Case(
        "zero_pad2d",
        sequential(
            nn.Identity, lambda: nn.ZeroPad2d(1), lambda: nn.Conv2d(2, 3, 3), nn.Flatten, lambda: nn.Linear(48, 2)
        ),
        normal(2, 4, 4),
    ),
    Case("batch_norm1d", sequential(lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4), nn.ReLU), normal(5)),
    Case(
        "batch_norm2d",
        sequential(
            lambda: nn.Conv2d(2, 3, 3), lambda: nn.BatchNorm2d(3), nn.ReLU, nn.Flatten, lambda: nn.Linear(12, 3)
        ),
        normal(2, 4, 4),
    ),
    Case(
        "batch_norm3d",
        sequential(lambda: nn.Conv3d(1, 2, 2), lambda: nn.BatchNorm3d(2), nn.Flatten),
        normal(1, 2, 2, 3),
    ),
    # outputs with several axes, or none
    Case("output_sequence", sequential(lambda: nn.Linear(4, 3), nn.Tanh, lambda: nn.Linear(3, 2)), normal(3, 4)),
    Case("output_image", sequential(lambda: nn.Conv2d(2, 3, 2), nn.ReLU, lambda: nn.Conv2d(3, 2, 2)), normal(2, 4, 3)),
    Case("output_scalar", sequential(lambda: nn.Linear(5, 1), lambda: nn.Flatten(0)), normal(5), vivit=False),
    # what ViViT gets wrong without a word
    Case("tied", tied_mlp, normal(5), vivit=False),
    Case("padding_reflect", conv_net(2, 4, 64, padding=1, padding_mode="reflect"), normal(2, 4, 4), vivit=False),
    Case("padding_same", conv_net(2, 4, 64, padding="same"), normal(2, 4, 4), vivit=False),
    Case("divisor_override", pool_net(nn.AvgPool2d(2, divisor_override=3), 12), normal(2, 6, 6), vivit=False),
    # what it refuses
    Case("twice_called", twice_called, normal(5), vivit=False),
    Case("avg_pool_ceil", pool_net(nn.AvgPool2d(2, ceil_mode=True), 27), normal(2, 7, 7), vivit=False),
    Case("avg_pool_pad", pool_net(nn.AvgPool2d(3, 2, 1, count_include_pad=False), 27), normal(2, 7, 7), vivit=False),
    Case(
        "conv_transpose_output_padding",
        conv_net(2, 3, 192, transpose=True, stride=2, output_padding=1),
        normal(2, 3, 3),
        vivit=False,
    ),
    Case(
        "batch_norm_no_affine",
        sequential(lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4, affine=False), lambda: nn.Linear(4, 2)),
        normal(5),
        vivit=False,
    ),
    Case(
        "inplace",
        sequential(lambda: nn.Linear(5, 4), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(4, 2)),
        normal(5),
        vivit=False,
    ),
    Case(
        "layer_norm_gelu",
        sequential(lambda: nn.Linear(5, 4), lambda: nn.LayerNorm(4), nn.GELU, lambda: nn.Linear(4, 2)),
        normal(5),
        vivit=False,
    ),
    Case(
        "group_norm_silu",
        sequential(
            lambda: nn.Conv2d(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.SiLU, nn.Flatten, lambda: nn.Linear(16, 2)
        ),
        normal(2, 4, 4),
        vivit=False,
    ),
    Case(
        "adaptive_pool",
        sequential(lambda: nn.Conv2d(2, 4, 3), lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(4, 2)),
        normal(2, 4, 4),
        vivit=False,
    ),
    Case("residual", Residual, normal(5), vivit=False, sequential=False),
    Case("tied_transformer", TiedTransformer, tokens(4), vivit=False, sequential=False),
    Case(
        "mapping_inputs",
        TiedTransformer,
        lambda n: {"tokens": tokens(4)(n), "mask": torch.arange(4).expand(n, 4) > 2},
        vivit=False,
        sequential=False,
    ),
    Case("tuple_inputs", TwoInputs, lambda n: (torch.randn(n, 5), torch.randn(n, 3)), vivit=False, sequential=False),
    Case("recurrent", Recurrent, normal(3, 4), vivit=False, sequential=False),
    Case("data_dependent", DataDependent, normal(4), vivit=False, sequential=False),
    Case("custom_parameter", CustomParameter, normal(5), vivit=False, sequential=False),
    Case("weight_norm", weight_norm, normal(5), vivit=False, sequential=False),
    # what the structured route knows besides
    *(only_structured(f"hidden_{a.__name__}", *hidden_net(a), inputs=normal(5)) for a in OTHER_ACTIVATIONS),
    only_structured("threshold", *hidden_net(lambda: nn.Threshold(0.1, 2.0)), inputs=normal(5)),
    only_structured("softmax", *hidden_net(lambda: nn.Softmax(-1)), inputs=normal(5)),
    only_structured("prelu_channels", *image_net(lambda: nn.PReLU(4), 16), inputs=normal(2, 4, 4)),
    only_structured("rms_norm", *hidden_net(lambda: nn.RMSNorm(6)), inputs=normal(5)),
    only_structured("layer_norm_2d", *image_net(lambda: nn.LayerNorm((2, 2)), 16), inputs=normal(2, 4, 4)),
    only_structured(
        "layer_norm_no_affine", *hidden_net(lambda: nn.LayerNorm(6, elementwise_affine=False)), inputs=normal(5)
    ),
    only_structured(
        "instance_norm1d",
        lambda: nn.Conv1d(2, 4, 3),
        lambda: nn.InstanceNorm1d(4, affine=True),
        nn.Flatten,
        lambda: nn.Linear(12, 2),
        inputs=normal(2, 5),
    ),
    only_structured(
        "instance_norm2d", *image_net(lambda: nn.InstanceNorm2d(4, affine=True), 16), inputs=normal(2, 4, 4)
    ),
    only_structured(
        "instance_norm3d",
        lambda: nn.Conv3d(2, 4, 2),
        lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
        nn.Flatten,
        lambda: nn.Linear(32, 2),
        inputs=normal(2, 3, 3, 3),
    ),
    only_structured(
        "embedding",
        lambda: nn.Embedding(7, 4, padding_idx=2),
        nn.Tanh,
        nn.Flatten,
        lambda: nn.Linear(12, 3),
        inputs=tokens(3),
    ),
    only_structured(
        "embedding_single",
        lambda: nn.Embedding(7, 4),
        nn.Tanh,
        lambda: nn.Linear(4, 3),
        inputs=lambda n: torch.randint(7, (n,)),
    ),
    only_structured(  # as many positions as make one-hot vectors cheaper than comparing tokens
        "embedding_tiny_vocabulary",
        lambda: nn.Embedding(2, 2),
        nn.Tanh,
        nn.Flatten,
        lambda: nn.Linear(40, 2),
        inputs=lambda n: torch.randint(2, (n, 20)),
    ),
    *(
        only_structured(
            f"embedding_bag_{mode}{'_padded' * (padding is not None)}",
            lambda mode=mode, padding=padding: nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding),
            nn.Tanh,
            lambda: nn.Linear(4, 3),
            inputs=tokens(3),
        )
        for mode in ("sum", "mean", "max")
        for padding in (None, 2)
    ),
    Case("tied_embedding_bag", tied_embedding_bag, tokens(3), vivit=False),
    Case("bilinear", lambda: nn.Bilinear(5, 4, 3), lambda n: (torch.randn(n, 5), torch.randn(n, 4)), vivit=False),
    Case(
        "bilinear_3d", lambda: nn.Bilinear(5, 4, 3), lambda n: (torch.randn(n, 2, 5), torch.randn(n, 2, 4)), vivit=False
    ),
    Case("tied_embedding", tied_embedding, lambda n: torch.randint(7, (n,)), vivit=False),
    Case("reused_prelu", reused(nn.PReLU), normal(5), vivit=False),
    Case("reused_shift", reused(Shift), normal(5), vivit=False),
    Case("reused_layer_norm", reused(lambda: nn.LayerNorm(5)), normal(5), vivit=False),
    Case("tied_convolutions", tied_convolutions, normal(2, 5, 5), vivit=False),
    only_structured(
        "reshaping",
        lambda: nn.Linear(6, 8),
        lambda: nn.Unflatten(1, (2, 2, 2)),
        lambda: nn.PixelShuffle(1),
        lambda: nn.Conv2d(2, 3, 2),
        nn.Flatten,
        inputs=normal(6),
    ),
    only_structured("upsample", *image_net(lambda: nn.Upsample(scale_factor=2), 64), inputs=normal(2, 4, 4)),
    only_structured("adaptive_max_pool", *image_net(lambda: nn.AdaptiveMaxPool2d(1), 4), inputs=normal(2, 5, 5)),
    *(
        only_structured(
            f"conv2d_{mode}",
            *image_net(lambda mode=mode: nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode=mode), 96),
            inputs=normal(2, 6, 6),
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    only_structured("pad_reflect", *image_net(lambda: nn.ReflectionPad2d(1), 64), inputs=normal(2, 4, 4)),
    only_structured(
        "pad_constant", *image_net(lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.5), 60), inputs=normal(2, 4, 4)
    ),
    Case("conv1d_same_dilated", conv_net(1, 3, 24, padding="same", dilation=2), normal(2, 8), vivit=False),
    Case(
        "frozen_first_block", frozen(mlp(nn.GELU), "0.weight", "0.bias", "2.weight", "2.bias"), normal(5), vivit=False
    ),
    Case(
        "max_pool_shared_s",
        sequential(lambda: nn.Conv2d(2, 4, 3), lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Linear(16, 2)),
        normal(2, 6, 6),
    ),
    *(
        Case(f"linear_map_{dim}_{i}", between(layer, dim), normal(2, *[4] * dim), vivit=False)
        for dim, layers in LINEAR_MAPS.items()
        for i, layer in enumerate(layers)
    ),
]

BY_NAME = {case.name: case for case in CASES}

# Those that the BackPACK extension takes
PLAIN = [c for c in CASES if c.sequential and not c.name.startswith(("tied", "twice", "reused", "bilinear", "inplace"))]
