"""Rules: what parameter Jacobians are, and how a Jacobian passes back through a layer.

Operations, as autograd's graph has them, are written as linear maps (:mod:`ggn_ntk.rules.linear_map`). Layers of a
Sequential model, and those with a rule of the user's, are taken as a whole: a parameter rule writes the Jacobian of the
network's outputs with respect to each parameter of one layer as an unevaluated einsum of the layer's input and of the
backpropagated Jacobian ``s``. It says what the Jacobian is, not how to contract it. A layer is one function in a file
of this package::

    @register_rule(nn.Linear)
    def linear(module, x, s):
        return {"weight": Factored("cno,ni->cnoi", (s, x)), "bias": Factored("cno->cno", (s,))}

Letters: ``c`` output, ``n`` sample; the other letters of the result stand, in order, for the parameter's own
axes (adjacent axes may be merged or split), and all remaining letters are summed.
"""

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.operand import OneHot
from ggn_ntk.rules.registry import (
    Backpropagation,
    batched_vjp,
    register_backpropagation,
    register_rule,
    rule_for,
)

# Importing these registers their rules.
from ggn_ntk.rules import (  # isort: skip
    activation,
    convolution,
    elementwise,
    embedding,
    linear,
    normalization,
    pooling,
    shape,
    views,
)

__all__ = [
    "Backpropagation",
    "Factored",
    "OneHot",
    "batched_vjp",
    "register_backpropagation",
    "register_rule",
    "rule_for",
]
