"""Linear layers. Letters: ``o``, ``i`` output and input features; ``p`` positions; ``j`` features of a second input."""

from torch import Tensor, nn

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.rules.registry import register_backpropagation, register_rule


@register_rule(nn.Linear)
def linear(module: nn.Linear, x: Tensor, s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of ``y = x W^T + b``, at one or many positions."""
    # x [N, ..., I], s [C, N, ..., O] -> [O, I], [O]
    if x.ndim == 2:
        return {"weight": Factored("cno,ni->cnoi", (s, x)), "bias": Factored("cno->cno", (s,))}
    x, s = x.flatten(1, -2), s.flatten(2, -2)  # [N, P, I], [C, N, P, O]
    return {"weight": Factored("cnpo,npi->cnoi", (s, x)), "bias": Factored("cnpo->cno", (s,))}


@register_backpropagation(nn.Linear, linear=True)
def linear_transposed(module: nn.Linear, x: Tensor, s: Tensor) -> Tensor:
    """Multiply by W^T."""
    # s [C, N, ..., O] -> [C, N, ..., I], samples outermost in memory, so that a block of them is one run
    return (s.transpose(0, 1) @ module.weight).transpose(0, 1)


@register_rule(nn.Bilinear)
def bilinear(module: nn.Bilinear, x: tuple[Tensor, Tensor], s: Tensor) -> dict[str, Factored]:
    """Write the Jacobians of ``y_o = x1^T W_o x2 + b_o``."""
    # x ([N, ..., I], [N, ..., J]), s [C, N, ..., O] -> [O, I, J], [O]
    n = len(x[0])
    first, second = (t.reshape(n, -1, t.shape[-1]) for t in x)  # [N, P, I], [N, P, J]
    s = s.reshape(s.shape[0], n, -1, s.shape[-1])  # [C, N, P, O]
    return {
        "weight": Factored("cnpo,npi,npj->cnoij", (s, first, second)),
        "bias": Factored("cnpo->cno", (s,)),
    }
