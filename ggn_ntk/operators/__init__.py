"""The empirical NTK as a linear operator: products with vectors, without the kernel.

Operators are those of curvlinops (Dangel, Eschenhagen, Ormaniec, Fernandez, Tatzel, Kristiadi: "Position: Curvature
Matrices Should Be Democratized via Linear Operators", 2025), whose inverses, spectra and estimates of traces take them,
as SciPy's solvers do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ggn_ntk.spectrum.matrix import as_matrix

if TYPE_CHECKING:
    from ggn_ntk.operators.jacobian_operator import JacobianOperator, TransposedJacobianOperator
    from ggn_ntk.operators.ntk_operator import NTKOperator
    from ggn_ntk.operators.store_operator import StoreOperator

__all__ = ["JacobianOperator", "NTKOperator", "StoreOperator", "TransposedJacobianOperator", "as_matrix"]

# Names whose modules are imported at their first use, since they need curvlinops.
_LAZY = {
    "JacobianOperator": "ggn_ntk.operators.jacobian_operator",
    "NTKOperator": "ggn_ntk.operators.ntk_operator",
    "StoreOperator": "ggn_ntk.operators.store_operator",
    "TransposedJacobianOperator": "ggn_ntk.operators.jacobian_operator",
}


def __getattr__(name: str) -> Any:
    """Look up a name that is imported at its first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
