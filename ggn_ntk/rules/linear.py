"""Matrix products and linear layers.

Letters: ``o``, ``i`` output and input features; ``p`` positions; ``j`` features of a second input.
"""

from torch import Tensor, nn

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.rules.linear_map import LinearMap, Operation, register_operation
from ggn_ntk.rules.registry import register_backpropagation, register_rule


@register_operation("mm")
def mm(op: Operation) -> LinearMap:
    """Write a product of two matrices."""
    return op.product(self="ak", mat2="kb", output="ab")


@register_operation("bmm")
def bmm(op: Operation) -> LinearMap:
    """Write products of two batches of matrices."""
    return op.product(self="gak", mat2="gkb", output="gab")


@register_operation("mv")
def mv(op: Operation) -> LinearMap:
    """Write a product of a matrix and a vector."""
    return op.product(self="ak", vec="k", output="a")


@register_operation("dot")
def dot(op: Operation) -> LinearMap:
    """Write a product of two vectors."""
    return op.product(self="k", tensor="k", output="")


@register_operation("vdot")
def vdot(op: Operation) -> LinearMap:
    """Write a product of two vectors of real numbers."""
    return op.product(self="k", other="k", output="")


@register_operation("addmm")
def addmm(op: Operation) -> LinearMap:
    """Write a sum of a matrix and a product of two."""
    return _sum(op, mat1="ak", mat2="kb", output="ab")


@register_operation("addmv")
def addmv(op: Operation) -> LinearMap:
    """Write a sum of a vector and a product of a matrix and a vector."""
    return _sum(op, mat="ak", vec="k", output="a")


@register_operation("baddbmm")
def baddbmm(op: Operation) -> LinearMap:
    """Write a sum of a batch of matrices and products of two batches."""
    return _sum(op, batch1="gak", batch2="gkb", output="gab")


def _sum(op: Operation, **terms: str) -> LinearMap:
    """Write ``beta * self + alpha * product``."""
    if op.argument == "self":
        return op.entrywise(factor=op["beta"])
    return op.product(**terms)._replace(factor=op["alpha"])


@register_operation("trilinear")
def trilinear(op: Operation) -> LinearMap:
    """Write a product of three arguments, each repeated along some axes, summed over others."""
    names = ("i1", "i2", "i3")
    absent = {name: op[f"expand{name[1]}"] for name in names}
    letters = "abcdefgh"[: len(op.shape) + len(absent[op.argument])]
    terms = {name: "".join(c for i, c in enumerate(letters) if i not in absent[name]) for name in names}
    output = tuple(letter for i, letter in enumerate(letters) if i not in op["sumdim"])
    return LinearMap(
        output, tuple(terms[op.argument]), tuple((terms[name], op[name]) for name in names if name != op.argument)
    )


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
