r"""
Any module: a ResNet and a small GPT
====================================

**Does a model that is no sequence of layers get its kernel by rules, and where is the kernel from?**

The structured route writes the Jacobian of each parameter as a product of what the parameter meets and of the output
Jacobian that is passed back to it, and contracts only the block of the kernel that was asked for. This needs no
``nn.Sequential``: in any module, autograd's graph shows where parameters are used, and autograd passes the Jacobians
back.

Verification compares every parameter with plain autograd. This example looks at what rules cover, and at kernels layer
by layer.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from ggn_ntk import empirical_ntk, explain
from ggn_ntk.reference import jacobian_contraction, relative_error

torch.manual_seed(0)

# %%
# A ResNet
# --------
#
# Additions between modules, BatchNorm in eval mode, activations in place. And one parameter that is no layer's: a
# learned scale of each residual branch.


class Block(nn.Module):
    """A residual block with a learned scale."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.scale = nn.Parameter(torch.ones(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.scale * self.branch(x) + self.shortcut(x))


resnet = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.ReLU(inplace=True),
    Block(16, 16, 1),
    Block(16, 32, 2),
    Block(32, 64, 2),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
)
x1, x2 = torch.randn(6, 3, 16, 16), torch.randn(4, 3, 16, 16)
resnet(torch.randn(32, 3, 16, 16))  # in train mode, so that BatchNorm has statistics
resnet.eval()
ntk = empirical_ntk(resnet, x1, x2)
print(f"ResNet, [N1, N2, C, C]: {list(ntk.shape)}")

# %%
# ``explain`` says how each parameter is contracted, and which no rule covers: these, and only these, are contracted
# from Jacobians of each sample. Here there are none: the scales belong to no layer of torch's, but rules know products.

explanation = explain(resnet, x1, x2)
print(f"capture: {explanation.capture}")
print(f"covered by rules: {explanation.covered} of {explanation.entries} parameter entries")
for name, reason in explanation.fallback.items():
    print(f"  {name}: {reason}")

error = relative_error(ntk, jacobian_contraction(resnet.double(), x1.double(), x2.double()))
resnet.float()
print(f"relative error against Jacobian contraction in float64: {error:.1e}")
if error > 1e-5:
    raise ValueError("the kernel does not match")

# %%
# A small GPT
# -----------
#
# Token embedding and output layer share one table, and positions are looked up once for all samples. The model takes
# tokens and returns a dict; ``output`` picks what to differentiate: the logits of the last position.


class GPT(nn.Module):
    """A causal transformer whose embedding is its output layer."""

    def __init__(self, vocabulary: int = 40, length: int = 12, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        length = tokens.shape[1]
        h = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, h.device, h.dtype)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return {"logits": self.head(self.norm(h))}


def last(out: dict[str, Tensor]) -> Tensor:
    """The logits of the last position, [N, vocabulary]."""
    return out["logits"][:, -1]


gpt = GPT()
tokens = {"tokens": torch.randint(40, (8, 12))}
explanation = explain(gpt, tokens, compute="trace", output=last)
print(f"GPT, covered by rules: {explanation.covered / explanation.entries:.0%}")

# %%
# The table is used twice, so its Jacobian is a sum, and its kernel has cross-terms. Here it is cheaper to form that sum
# than to contract four pairs of uses: one product is left.

for contraction in explanation.contractions:
    if contraction.parameter == "token.weight":
        print(f"  {contraction.parameter}: {contraction.flops / 1e6:.2f} MFLOP, {'; '.join(contraction.order)}")

# %%
# Layer by layer
# --------------
#
# ``per_parameter=True`` keeps the kernels of parameters apart, in the same pass. Summed over each block, their traces
# show which part of the network the kernel comes from.

kernels = empirical_ntk(gpt, tokens, compute="trace", output=last, per_parameter=True)
parts: dict[str, Tensor] = {}
for name, kernel in kernels.items():
    part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
    parts[part] = parts.get(part, 0) + kernel
total = sum(parts.values()).trace()
for part, kernel in parts.items():
    print(f"  {part:<9} {kernel.trace() / total:6.1%}")

figure, axes = plt.subplots(ncols=len(parts), figsize=(2.2 * len(parts), 2.4), layout="constrained")
for ax, (part, kernel) in zip(axes, parts.items(), strict=True):
    ax.imshow(kernel.numpy())
    ax.set(title=part, xticks=[], yticks=[])
figure.suptitle("Trace kernels of eight sequences, part by part")
plt.show()
