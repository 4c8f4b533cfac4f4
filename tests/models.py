"""Models that are no sequence of layers, for the capture by autograd."""

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, TiedTransformer, normal, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Model(Case):
    """A case that is no sequence of layers.

    Attributes:
        missed: The parameters that no rule covers.
        needs: A package that must be importable.
        rounds: Whether it computes in float32, whatever its dtype.
    """

    missed: tuple[str, ...] = ()
    needs: str = "torch"
    rounds: bool = False


def logits(out: Any) -> Tensor:
    return out.logits


def last_logits(out: Any) -> Tensor:
    return out.logits[:, -1, :3]


def ids(vocabulary: int = 11, length: int = 6) -> Any:
    """Tokens for Hugging Face models, with a mask of the last positions of some."""

    def draw(n: int) -> dict[str, Tensor]:
        mask = torch.ones(n, length, dtype=torch.long)
        mask[1:, -2:] = 0
        return {"input_ids": torch.randint(1, vocabulary, (n, length)), "attention_mask": mask}

    return draw


# ---------------------------------------------------------------- models of other packages, small


def torchvision_model(name: str, **options: Any) -> Any:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, **options)

    return build


def small_vit() -> nn.Module:
    """The class of vit_b_16, small."""
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.heads[0].weight)  # which starts at zero
    return model


def hugging_face(kind: str, model: str, **options: Any) -> Any:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind + model)(getattr(transformers, kind + "Config")(**options))

    return build


GPT2 = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ENCODER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


# ---------------------------------------------------------------- one feature each


class SharedConvolution(nn.Module):
    """One weight in two convolutions of different stride, and transposed in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 2, bias=False)
        self.second = nn.Conv2d(3, 3, 2, stride=2)
        self.third = nn.ConvTranspose2d(3, 3, 2)
        self.second.weight = self.third.weight = self.first.weight
        self.head = nn.Linear(75, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.pad(self.first(x).tanh(), (1, 0, 1, 0))).tanh()
        return self.head(self.third(h).flatten(1))


class CalledThrice(nn.Module):
    """One layer, three calls, on inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4]
        h = self.layer(self.layer(x).tanh())
        return self.head(self.layer(h.sum(1)).tanh())


class UsedFunctionally(nn.Module):
    """A weight used both by its layer and by F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.layer(x).tanh(), self.layer.weight).tanh())


class Scaled(nn.Module):
    """A custom parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.head = nn.Linear(5, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(x) * self.scale).tanh())


def spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 2))


class InPlace(nn.Module):
    """In-place operations of all kinds behind layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        k = self.second(h.clone())
        k += h
        k[:, 2].mul_(3.0)
        return self.third(k.sigmoid_()).mul_(2.0)


class FrozenBackbone(nn.Module):
    """A frozen body, a frozen layer behind a trainable one, and a trainable head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).requires_grad_(False)
        self.adapter, self.between = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(self.between(self.adapter(h).tanh()) + h)


class Masked(nn.Module):
    """A layer on the rows that a mask selects; how many of each sample depends on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4]
        rows = x[..., 0] > 0
        h = torch.zeros_like(x)
        h[rows] = self.layer(x[rows]).tanh()
        return self.head(h.sum(1))


def masked_inputs(*counts: int) -> Any:
    """Samples with so many selected rows."""

    def draw(n: int) -> Tensor:
        x = torch.randn(n, 3, 4)
        for sample, count in zip(x, counts, strict=False):
            sample[:, 0] = -1.0
            sample[:count, 0] = 1.0
        return x

    return draw


class Windows(nn.Module):
    """Layers on windows, whose leading axis is that of the samples times four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 3, 2), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 16]
        windows = self.conv(x.reshape(-1, 1, 4)).tanh()  # [4 N, 3, 3]
        return self.head(self.norm(windows.sum(2)).tanh().reshape(len(x), 4, 3).mean(1))


class SequenceFirst(nn.Module):
    """Layers whose second axis is that of the samples, and positions without one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        position = self.position(torch.arange(tokens.shape[1], device=tokens.device))
        h = self.embedding(tokens.T) + position.unsqueeze(1)
        return self.head(self.block(h).mean(0))


class Positions(nn.Module):
    """A position embedding that is looked up once for all samples, without an axis for them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head((self.embedding(tokens) + self.position(places)).tanh().sum(1))


class UnevenPositions(Positions):
    """The same, with a sum over the positions, which would be one over samples if there were an axis for these."""

    def forward(self, tokens: Tensor) -> Tensor:
        position = self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head((self.embedding(tokens) * position.sum(0)).tanh().sum(1))


class CrossAttention(nn.Module):
    """Attention to a memory of another length and width, with a mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.memory = nn.Linear(3, self.attention.kdim)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        memory = self.memory(memory)
        h, _ = self.attention(x, memory, value=memory, key_padding_mask=mask, need_weights=False)
        return self.head(h.sum(1))


def with_memory(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 2, 4), torch.randn(n, 3, 3), torch.arange(3).expand(n, 3) > torch.arange(n).unsqueeze(1) % 2


class ViewedWeights(CrossAttention):
    """Attention whose weights are returned and used."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        h, weights = self.attention(x, x, x)
        return self.head(h.sum(1)) + weights[:, 0, :2] + self.memory(memory).sum((1, 2))[:, None]


class Checkpointed(nn.Module):
    """A block that is evaluated again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.first(x).tanh(), use_reentrant=self.use_reentrant))


class Recurrent(nn.Module):
    """A recurrent classifier, whose weights are used at each step."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Branches(nn.Module):
    """Some samples take a way on which the weight is used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = self.layer(x), x[:, 0] > 10
        if chosen.any():
            h = torch.where(chosen.unsqueeze(1), F.linear(x, self.layer.weight).sin(), h)
        return self.head(h.tanh())


def one_outlier(n: int) -> Tensor:
    x = torch.randn(n, 4)
    x[0, 0] = 20.0
    return x


class TiedModel(nn.Module):
    """A GPT-2-style language model: all logits, with as many positions as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TiedTransformer()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


MODELS = [
    Model("tied_as_many_positions_as_samples", TiedModel, tokens(4), n1=4, n2=4),
    Model("tied_as_many_positions_as_all_samples", TiedModel, tokens(4), n1=3, n2=1),
    Model("shared_convolution", SharedConvolution, normal(3, 8, 8)),
    Model("called_thrice", CalledThrice, normal(3, 4)),
    Model("used_functionally", UsedFunctionally, normal(5)),
    Model("scaled", Scaled, normal(5)),
    Model("spectral_norm", spectral_norm, normal(5)),
    Model("inplace_functions", InPlace, normal(5)),
    Model("frozen_backbone", FrozenBackbone, normal(5)),
    Model("masked", Masked, masked_inputs(3, 1, 2), missed=("layer.weight", "layer.bias")),
    # as many rows as samples, or as samples times the rows of the first, but not of each
    Model("masked_by_chance", Masked, masked_inputs(2, 1, 3), missed=("layer.weight", "layer.bias")),
    Model("masked_by_chance_as_samples", Masked, masked_inputs(1, 2, 0), missed=("layer.weight", "layer.bias")),
    Model("windows", Windows, normal(16)),
    Model("sequence_first", SequenceFirst, tokens(4)),
    Model("sequence_first_as_many_positions_as_samples", SequenceFirst, tokens(5)),
    Model("positions", Positions, tokens(4)),
    Model("positions_as_many_as_samples", Positions, tokens(5)),
    Model("positions_uneven", UnevenPositions, tokens(4)),
    Model("cross_attention", CrossAttention, with_memory),
    Model("cross_attention_widths", partial(CrossAttention, kdim=6, vdim=6), with_memory),
    Model(
        "cross_attention_added_keys",
        partial(CrossAttention, add_bias_kv=True),
        with_memory,
    ),
    Model("attention_weights_used", ViewedWeights, with_memory),
    Model("checkpointed", partial(Checkpointed, False), normal(5)),
    *(Model(kind.__name__, partial(Recurrent, kind), normal(3, 3)) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    Model("branches", Branches, one_outlier, n1=6),
    Model(
        "transformer_encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda n: {"src": torch.randn(n, 4, 8), "src_key_padding_mask": torch.arange(4).expand(n, 4) > 2},
        output=lambda out: out[:, :2],
    ),
    Model(
        "torchvision_vit",
        small_vit,
        normal(3, 8, 8),
        needs="torchvision",
    ),
    Model(
        "gpt2",
        hugging_face("GPT2", "ForSequenceClassification", num_labels=3, **GPT2),
        ids(),
        output=logits,
        needs="transformers",
    ),
    Model(
        "gpt2_lm_tied",
        hugging_face("GPT2", "LMHeadModel", **GPT2),
        ids(length=5),
        output=lambda out: out.logits[:, -2:],
        needs="transformers",
    ),
    Model(
        "bert",
        hugging_face(
            "Bert", "ForSequenceClassification", vocab_size=11, num_labels=3, max_position_embeddings=8, **ENCODER
        ),
        ids(),
        output=logits,
        needs="transformers",
    ),
    Model(
        "hugging_face_vit",
        hugging_face("ViT", "ForImageClassification", image_size=8, patch_size=4, num_labels=3, **ENCODER),
        lambda n: {"pixel_values": torch.randn(n, 3, 8, 8)},
        output=logits,
        needs="transformers",
    ),
    Model(
        "llama",
        hugging_face("Llama", "ForCausalLM", vocab_size=11, num_key_value_heads=1, **ENCODER),
        ids(),
        output=last_logits,
        needs="transformers",
    ),
    Model(
        "gemma",
        hugging_face("Gemma", "ForCausalLM", vocab_size=11, num_key_value_heads=1, head_dim=4, **ENCODER),
        ids(),
        output=last_logits,
        needs="transformers",
        rounds=True,
    ),
]


def large(name: str, n: int, **options: Any) -> Model:
    """A model of torchvision's, of its original width and depth, on small images."""
    return Model(name, torchvision_model(name, **options), normal(3, 32, 32), n1=n, n2=1, needs="torchvision")


LARGE = [
    large("resnet18", 2, num_classes=3),
    large("mobilenet_v2", 2, num_classes=3),
    large("convnext_tiny", 1, num_classes=2),
    large("vit_b_16", 1, num_classes=1, image_size=32),
]


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def each(models):
    return [pytest.param(model, marks=needs(model.needs), id=model.name) for model in models]
