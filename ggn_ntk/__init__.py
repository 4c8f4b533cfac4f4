"""Empirical neural tangent kernels of PyTorch models, from the Gram matrix of the generalized Gauss-Newton."""

from ggn_ntk import reference
from ggn_ntk.checks import NTKMismatchError, UnsupportedModelError
from ggn_ntk.explain import explain
from ggn_ntk.extension import EmpiricalNTK
from ggn_ntk.nngp import EmpiricalKernels, empirical_kernels, nngp
from ggn_ntk.ntk import empirical_ntk
from ggn_ntk.rules import Factored, register_rule
from ggn_ntk.taylor import TaylorExpansion, linearize, taylor_expand
from ggn_ntk.vivit import AccumulateGramHook, empirical_ntk_vivit

__version__ = "0.1.0"

__all__ = [
    "AccumulateGramHook",
    "EmpiricalKernels",
    "EmpiricalNTK",
    "Factored",
    "NTKMismatchError",
    "TaylorExpansion",
    "UnsupportedModelError",
    "empirical_kernels",
    "empirical_ntk",
    "empirical_ntk_vivit",
    "explain",
    "linearize",
    "nngp",
    "reference",
    "register_rule",
    "taylor_expand",
]
