"""Empirical neural tangent kernels of PyTorch models, from the Gram matrix of the generalized Gauss-Newton."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ggn_ntk import features, kernels, large, operators, plots, reference, rules, spectrum, training
from ggn_ntk.kernels.explain import explain
from ggn_ntk.kernels.initialisations import ensemble
from ggn_ntk.kernels.ntk import empirical_ntk
from ggn_ntk.kernels.outputs import empirical_kernels, nngp
from ggn_ntk.kernels.prepared import empirical_ntk_fn
from ggn_ntk.large.store import KernelStore
from ggn_ntk.large.tiled import tiled_ntk
from ggn_ntk.linearization.taylor import TaylorExpansion, linearize, taylor_expand
from ggn_ntk.problem.errors import (
    KernelMemoryError,
    NotFiniteWarning,
    NTKMismatchError,
    RouteWarning,
    StatisticsWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
)
from ggn_ntk.problem.inputs import shared
from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.rules import Factored, register_rule

if TYPE_CHECKING:
    from ggn_ntk.extensions.extension import EmpiricalNTK
    from ggn_ntk.extensions.gram_hook import AccumulateGramHook
    from ggn_ntk.methods.vivit import empirical_ntk_vivit

__version__ = "0.2.0"

__all__ = [
    "AccumulateGramHook",
    "EmpiricalKernels",
    "EmpiricalNTK",
    "Factored",
    "KernelMemoryError",
    "KernelStore",
    "NTKMismatchError",
    "NotFiniteWarning",
    "RouteWarning",
    "StatisticsWarning",
    "TaylorExpansion",
    "UnsupportedModelError",
    "UnsupportedRouteError",
    "empirical_kernels",
    "empirical_ntk",
    "empirical_ntk_fn",
    "empirical_ntk_vivit",
    "ensemble",
    "explain",
    "features",
    "kernels",
    "large",
    "linearize",
    "nngp",
    "operators",
    "plots",
    "reference",
    "register_rule",
    "rules",
    "shared",
    "spectrum",
    "taylor_expand",
    "tiled_ntk",
    "training",
]

# Names whose modules are imported at their first use, since they need BackPACK and ViViT, or curvlinops.
_LAZY = {
    "AccumulateGramHook": "ggn_ntk.extensions.gram_hook",
    "EmpiricalNTK": "ggn_ntk.extensions.extension",
    "NTKOperator": "ggn_ntk.operators.ntk_operator",
    "empirical_ntk_vivit": "ggn_ntk.methods.vivit",
}

# Names that stood here, and the public modules they have moved to.
_MOVED = {name: module.__name__ for module in (spectrum, training) for name in module.__all__}


def __getattr__(name: str) -> Any:
    """Look up a name that is imported at its first use, or has moved."""
    if name in _MOVED:
        what = f"ggn_ntk.{name} has moved: import it from {_MOVED[name]}."
        warnings.warn(what, DeprecationWarning, stacklevel=2)
        return getattr(import_module(_MOVED[name]), name)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, without those that have moved."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
