"""A fault of torch's own gradients that verification cannot see: what it compares with has the same fault.

Some releases of torch forget the padding in the gradient of ``avg_pool2d`` on CUDA where channels are last in memory
(so does ``avg_pool1d``, which is made of it). Whether a device has the fault is tried once. Where it has, graphs with
such a node are refused.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ggn_ntk.models.autograd_graph import graph_nodes
from ggn_ntk.problem.errors import Problem, UnsupportedModelError
from ggn_ntk.process.torch_internals import AVERAGE_POOLING, saved


def check_pooling(output: Tensor) -> None:
    """Raise if torch's gradient of a tensor would be wrong, since it passes through padded average pooling."""
    if not output.requires_grad or not _pools_wrongly(output.device):
        return
    for node in graph_nodes(output):
        if node.name() == AVERAGE_POOLING and any(saved(node, "padding")) and _channels_last(saved(node, "self")):
            what = (
                f"torch {torch.__version__} gets the gradient of avg_pool2d with padding wrong on {output.device} "
                "where channels are last in memory"
            )
            remedy = (
                "Update torch to a release without this fault; or keep model and inputs in torch.contiguous_format, or "
                "pad with F.pad and pool without padding, or compute on the CPU"
            )
            raise UnsupportedModelError([Problem("", what, remedy)])


@cache
def _pools_wrongly(device: torch.device) -> bool:
    """Try whether the gradient of padded average pooling depends on the memory layout."""
    if device.type == "cpu":
        return False
    x = torch.zeros(1, 2, 4, 4, device=device)
    with torch.enable_grad():
        inputs = [
            x.to(memory_format=layout, copy=True).requires_grad_()
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
        right, found = (torch.autograd.grad(F.avg_pool2d(t, 2, 1, 1).sum(), t)[0] for t in inputs)
    return not torch.allclose(right, found)


def _channels_last(x: Tensor) -> bool:
    """Tell whether torch may take the channels of images for last in memory."""
    # x [N, K, height, width]; axes of length one may leave it open
    return x.stride(-3) <= x.stride(-1)
