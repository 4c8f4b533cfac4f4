"""In which precisions a model may compute: float32 and float64, and those of a frozen base.

Rounding of a model that computes in bfloat16 is no error of its kernel where the model cannot do without: its frozen
weights are known no better. So it may compute as coarsely as the coarsest of these, and no coarser.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.problem.request import Request


def too_coarse(request: Request, dtypes: Iterable[torch.dtype]) -> set[torch.dtype]:
    """Find the dtypes of real numbers that are coarser than float32 and than all that is frozen."""
    low = set(dtypes) - TOLERANCES.keys()
    if not low:
        return low
    wanted = {id(p) for p in request.params.values()}
    frozen = (t for t in (*request.model.parameters(), *request.model.buffers()) if id(t) not in wanted)
    coarsest = max(map(spacing, frozen), default=0.0)
    return {dtype for dtype in low if torch.finfo(dtype).eps > coarsest}


def spacing(x: Tensor) -> float:
    """Tell how far apart the numbers are that a tensor can hold, relative to their size; 0 where it holds none."""
    if x.is_floating_point() or x.is_complex():
        return torch.finfo(x.dtype.to_real()).eps
    # Parameters of one byte are quantised, and what they are computed with is up to the layer.
    return math.inf if isinstance(x, Parameter) and x.element_size() == 1 else 0.0
