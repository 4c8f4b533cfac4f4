"""Empirical neural tangent kernels of PyTorch models, from the Gram matrix of the generalized Gauss-Newton."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ggn_ntk import plots, reference
from ggn_ntk.kernels.explain import explain
from ggn_ntk.kernels.ntk import empirical_ntk
from ggn_ntk.kernels.outputs import empirical_kernels, nngp
from ggn_ntk.linearization.taylor import TaylorExpansion, linearize, taylor_expand
from ggn_ntk.problem.errors import (
    KernelMemoryError,
    NotFiniteWarning,
    NTKMismatchError,
    RouteWarning,
    UnsupportedModelError,
    UnsupportedRouteError,
)
from ggn_ntk.problem.result import EmpiricalKernels
from ggn_ntk.rules import Factored, register_rule
from ggn_ntk.spectrum.matrix import IllConditionedWarning
from ggn_ntk.spectrum.spectra import (
    centered_kernel_alignment,
    condition_number,
    effective_rank,
    eigenvalues,
    ggn_eigenvalues,
    kernel_target_alignment,
    relative_kernel_change,
)
from ggn_ntk.training.arguments import Gaussian
from ggn_ntk.training.squared_loss import (
    gradient_descent_mse,
    gradient_flow,
    gradient_flow_mse,
    kernel_ridge_regression,
    max_learning_rate,
    nngp_posterior,
    ntk_ensemble,
)

if TYPE_CHECKING:
    from ggn_ntk.extensions.extension import EmpiricalNTK
    from ggn_ntk.extensions.gram_hook import AccumulateGramHook
    from ggn_ntk.methods.vivit import empirical_ntk_vivit

__version__ = "0.1.0"

__all__ = [
    "AccumulateGramHook",
    "EmpiricalKernels",
    "EmpiricalNTK",
    "Factored",
    "Gaussian",
    "IllConditionedWarning",
    "KernelMemoryError",
    "NTKMismatchError",
    "NotFiniteWarning",
    "RouteWarning",
    "TaylorExpansion",
    "UnsupportedModelError",
    "UnsupportedRouteError",
    "centered_kernel_alignment",
    "condition_number",
    "effective_rank",
    "eigenvalues",
    "empirical_kernels",
    "empirical_ntk",
    "empirical_ntk_vivit",
    "explain",
    "ggn_eigenvalues",
    "gradient_descent_mse",
    "gradient_flow",
    "gradient_flow_mse",
    "kernel_ridge_regression",
    "kernel_target_alignment",
    "linearize",
    "max_learning_rate",
    "nngp",
    "nngp_posterior",
    "ntk_ensemble",
    "plots",
    "reference",
    "register_rule",
    "relative_kernel_change",
    "taylor_expand",
]

# What imports BackPACK or ViViT is imported when it is first asked for.
_WITH_BACKPACK = {
    "AccumulateGramHook": "ggn_ntk.extensions.gram_hook",
    "EmpiricalNTK": "ggn_ntk.extensions.extension",
    "empirical_ntk_vivit": "ggn_ntk.methods.vivit",
}


def __getattr__(name: str) -> Any:
    """Import what is exported from modules that need BackPACK or ViViT."""
    if name not in _WITH_BACKPACK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WITH_BACKPACK[name]), name)
    return value


def __dir__() -> list[str]:
    """List what is there, and what would be imported."""
    return sorted({*globals(), *__all__})
