"""Models as they are found in papers and packages, small, whose parameters rules have to cover."""

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import torch
from cases import normal, tokens
from models import ENCODER, GPT2, Model, Recurrent, hugging_face, ids, last_logits, logits, torchvision_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

# ---------------------------------------------------------------- weights that are computed from parameters


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 2)
    )


def reparametrized(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """A small network with each layer of it changed."""

    def build() -> nn.Module:
        model = small_net()
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                change(layer)
        return model

    return build


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.random_unstructured(layer, "bias", amount=1)


class NTKLinear(nn.Linear):
    """A layer in NTK parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 1.5 / sqrt(self.in_features), 0.1 * self.bias)


class LoRA(nn.Module):
    """A frozen layer with an update of low rank, added to the weight or computed beside it."""

    def __init__(self, layer: nn.Linear, merged: bool) -> None:
        super().__init__()
        self.layer, self.merged = layer.requires_grad_(False), merged
        self.a = nn.Parameter(torch.randn(2, layer.in_features))
        self.b = nn.Parameter(torch.randn(layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.layer.weight + 0.5 * self.b @ self.a, self.layer.bias)
        return self.layer(x) + 0.5 * (x @ self.a.T) @ self.b.T


def lora(merged: bool) -> nn.Module:
    return nn.Sequential(
        LoRA(nn.Linear(5, 6), merged), nn.Tanh(), LoRA(nn.Linear(6, 6), merged), nn.Tanh(), nn.Linear(6, 2)
    )


def peft_lora(model: Callable[[], nn.Module], targets: list[str], **options: Any) -> Callable[[], nn.Module]:
    """A model with adapters of low rank, neither of whose factors is zero."""

    def build() -> nn.Module:
        import peft

        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
        return peft.get_peft_model(model(), config)

    return build


# ---------------------------------------------------------------- models


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return build


def small_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=2)


def small_densenet() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    return DenseNet(4, (2, 2), 8, 2, num_classes=2)


class Causal(nn.Module):
    """Attention to earlier positions, which come before the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4]
        x = x.transpose(0, 1)
        mask = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        h, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return self.head(h[-1])


class Residual(nn.Module):
    """The residual of a heat equation, by differentiating a network twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        # x [N, 2]: time and place -> [N, 1]
        x = x.detach().requires_grad_()
        u_t, u_x = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0].unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0][:, 1]
        return (u_t - 0.3 * u_xx).unsqueeze(1)


class Graph(nn.Module):
    """Convolutions on a graph, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.register_buffer("edges", torch.tensor([[0, 1, 1, 2, 3, 0], [1, 0, 2, 1, 0, 3]]))
        self.first, self.second = GCNConv(3, 5), GCNConv(5, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 3]
        return self.second(self.first(x, self.edges).tanh(), self.edges).mean(1)


def with_decoder_ids(n: int) -> dict[str, Tensor]:
    return ids()(n) | {"decoder_input_ids": tokens(3)(n)}


ZOO = [
    Model("pruned", reparametrized(pruned), normal(2, 4, 4)),
    Model("weight_normed", reparametrized(parametrizations.weight_norm), normal(2, 4, 4)),
    Model("spectrally_normed", reparametrized(parametrizations.spectral_norm), normal(2, 4, 4)),
    Model("spectrally_normed_by_hooks", reparametrized(nn.utils.spectral_norm), normal(2, 4, 4)),
    Model("orthogonal", reparametrized(parametrizations.orthogonal), normal(2, 4, 4)),
    Model("ntk_parametrized", lambda: nn.Sequential(NTKLinear(5, 6), nn.Tanh(), NTKLinear(6, 2)), normal(5)),
    Model("lora", partial(lora, False), normal(5)),
    Model("lora_merged", partial(lora, True), normal(5)),
    Model("peft_lora", peft_lora(small_net, ["0", "3"]), normal(2, 4, 4), needs="peft"),
    Model("peft_dora", peft_lora(small_net, ["0", "3"], use_dora=True), normal(2, 4, 4), needs="peft"),
    Model(
        "peft_lora_gpt2",
        peft_lora(
            hugging_face("GPT2", "ForSequenceClassification", num_labels=3, **GPT2), ["c_attn"], fan_in_fan_out=True
        ),
        ids(),
        output=logits,
        needs="peft",
    ),
    *(
        Model(f"deep_{kind.__name__}", partial(Recurrent, partial(kind, num_layers=2)), normal(3, 3))
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ),
    Model("causal_attention", Causal, normal(3, 4)),
    *(
        Model(f"timm_{name}", timm_model(name, num_classes=2, **options), normal(3, *size), needs="timm")
        for name, size, options in [
            (
                "vit_tiny_patch16_224",
                (8, 8),
                {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2},
            ),
            ("convnext_atto", (32, 32), {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)}),
            ("nf_resnet26", (32, 32), {"depths": (1, 1, 1, 1), "width_factor": 1 / 16}),
        ]
    ),
    Model(
        "mamba",
        hugging_face("Mamba", "ForCausalLM", vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=2),
        tokens(5),
        output=last_logits,
        needs="transformers",
        rounds=True,
    ),
    Model(
        "albert",
        hugging_face(
            "Albert",
            "ForSequenceClassification",
            vocab_size=11,
            embedding_size=6,
            num_labels=2,
            max_position_embeddings=8,
            **ENCODER,
        ),
        ids(),
        output=logits,
        needs="transformers",
    ),
    Model(
        "t5",
        hugging_face(
            "T5",
            "ForConditionalGeneration",
            vocab_size=11,
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
        with_decoder_ids,
        output=last_logits,
        needs="transformers",
    ),
    Model(
        "mobilenet_v3",
        torchvision_model("mobilenet_v3_small", num_classes=2, width_mult=0.2),
        normal(3, 32, 32),
        needs="torchvision",
    ),
    Model("swin", small_swin, normal(3, 8, 8), needs="torchvision"),
    Model("densenet", small_densenet, normal(3, 32, 32), needs="torchvision"),
    Model("pde_residual", Residual, normal(2)),
    Model("gcn", Graph, normal(4, 3), needs="torch_geometric"),
]
