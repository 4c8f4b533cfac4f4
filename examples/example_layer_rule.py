r"""
A rule for a layer of your own
==============================

**How do I make kernels fast for a layer that the library does not know?**

The structured route knows the layers of ``torch.nn``. For any other, the kernel is exact all the same: a parameter
without a rule is contracted from the Jacobians of each sample. A rule makes it fast. It is one function, which says
what the Jacobian of each parameter is. How to contract it is found for you.

As an example, this adds a low-rank linear layer, the adapter of `LoRA <https://arxiv.org/abs/2106.09685>`_ without the
frozen weight: :math:`y = \mathbf{U} \mathbf{V} x`.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from ggn_ntk import Factored, UnsupportedModelError, empirical_ntk, explain, register_rule
from ggn_ntk.reference import jacobian_contraction, relative_error
from ggn_ntk.rules import register_backpropagation

torch.manual_seed(0)

# %%
# The layer
# ---------


class LowRank(nn.Module):
    """A linear layer whose weight is a product of two thin matrices."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T


net = nn.Sequential(LowRank(300, 200, 8), nn.Tanh(), LowRank(200, 10, 4))
x1, x2 = torch.randn(12, 300), torch.randn(8, 300)

# %%
# Without a rule
# --------------
#
# The kernel is right, and ``explain`` says what it costs: no parameter is covered.

print(explain(net, x1, x2))
oracle = jacobian_contraction(net.double(), x1.double(), x2.double())
net.float()
print(f"relative error: {relative_error(empirical_ntk(net, x1, x2), oracle):.1e}")

# %%
# The rule
# --------
#
# A rule takes the layer, its input ``x`` ``[N, ...]``, and ``s`` ``[C, N, ...]``, the Jacobian of the network's outputs
# with respect to the layer's output. By the chain rule,
#
# .. math::
#     \frac{\partial f_c}{\partial U_{o,r}} = s_{c,n,o} \, [\mathbf{V} x_n]_r
#     \qquad \text{and} \qquad
#     \frac{\partial f_c}{\partial V_{r,i}} = \sum_o s_{c,n,o} \, U_{o,r} \, x_{n,i} ,
#
# and the rule writes just that, one :class:`ggn_ntk.Factored` for each parameter. Two letters are fixed: ``c`` is the
# output and ``n`` the sample. Those that follow them in the result are the parameter's axes, in order: ``or`` for the
# shape ``[outputs, rank]``. All others are summed. Three operands are as good as two.


@register_rule(LowRank)
def low_rank(module: LowRank, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Letters: ``i``, ``o`` inputs, outputs; ``r`` rank."""
    return {
        "up": Factored("cno,nr->cnor", (s, x @ module.down.T)),
        "down": Factored("cno,or,ni->cnri", (s, module.up, x)),
    }


# %%
# Now all parameters are covered:

print(explain(net, x1, x2))
kernel = empirical_ntk(net, x1, x2, method="structured")
print(f"relative error: {relative_error(kernel, oracle):.1e}")
if not relative_error(kernel, oracle) < 1e-5:
    raise ValueError("the kernel does not match")

# %%
# What each matrix contributes to the trace kernel of twelve samples:

parts = empirical_ntk(net, x1, compute="trace", per_parameter=True)
figure, axes = plt.subplots(ncols=len(parts), figsize=(8, 2.2), layout="constrained")
for ax, (name, part) in zip(axes, parts.items(), strict=True):
    ax.imshow(part.numpy(), cmap="cividis")
    ax.set(title=name, xticks=[], yticks=[])
plt.show()

# %%
# A wrong rule
# ------------
#
# No rule is trusted. Each call compares the Jacobians with plain autograd on a few samples, and a parameter whose rule
# is wrong is contracted from Jacobians of each sample, as if it had none. Here one rule forgets a matrix:


@register_rule(LowRank)
def wrong(module: LowRank, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Forgets to multiply the input by the first matrix."""
    return {**low_rank(module, x, s), "up": Factored("cno,nr->cnor", (s, x[:, : module.down.shape[0]]))}


explanation = explain(net, x1, x2)
for name, reason in explanation.fallback.items():
    print(f"{name}: {reason}")
print(f"relative error: {relative_error(empirical_ntk(net, x1, x2), oracle):.1e}")
register_rule(LowRank)(low_rank)

# %%
# Passing back
# ------------
#
# In an ``nn.Sequential``, ``s`` passes back through the layer by autograd. Where a faster way is known, register it
# too. This one takes :math:`s` to :math:`s \, \mathbf{U} \mathbf{V}`. The layer is linear: its Jacobian is the same for
# all samples, so an ``s`` that is the same for all samples stays so, and is kept once.


@register_backpropagation(LowRank, linear=True)
def low_rank_backward(module: LowRank, x: Tensor, s: Tensor) -> Tensor:
    """``[C, N, outputs]`` to ``[C, N, inputs]``."""
    return s @ module.up @ module.down


print(f"relative error: {relative_error(empirical_ntk(net, x1, x2), oracle):.1e}")

# %%
# What a rule has to know
# -----------------------
#
# - A layer matches by its exact type: a subclass may override ``forward``, so it needs a rule of its own.
#   ``@register_rule(A, B)`` takes several types.
# - Extra axes are positions: flatten them to one letter, ``cnpo,npi->cnoi``, and the sum over ``p`` is the sum over the
#   places where the weight is used. The rules in ``ggn_ntk/rules`` are short and read as examples.
# - Rows of a table that are looked up are one-hot vectors: :class:`ggn_ntk.rules.OneHot` is an operand that is never
#   formed unless that is cheaper.
# - A layer whose samples influence one another has no rule, and its model has no kernel of two samples.
#
# A rule serves every way to the kernel: ``nn.Sequential`` and any other module, the BackPACK extension
# :class:`ggn_ntk.EmpiricalNTK`, tied and reused weights, and full, diagonal and trace.

try:
    empirical_ntk(nn.Sequential(LowRank(300, 20, 2), nn.BatchNorm1d(20)), x1)
except UnsupportedModelError as error:
    print(error)
