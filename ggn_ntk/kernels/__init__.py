"""Ask for a kernel; public here is what calls take and return."""

from ggn_ntk.jacobians.places import Place
from ggn_ntk.kernels.explain import Contraction, Explanation, Row
from ggn_ntk.kernels.initialisations import Ensemble, Member
from ggn_ntk.kernels.ntk import Method
from ggn_ntk.kernels.prepared import PreparedKernel
from ggn_ntk.problem.errors import Problem

__all__ = ["Contraction", "Ensemble", "Explanation", "Member", "Method", "Place", "PreparedKernel", "Problem", "Row"]
