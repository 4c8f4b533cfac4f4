"""A workload's network in torch."""

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload


def network(workload: Workload, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Build the network with its weights.

    Args:
        workload: The workload.
        device: Where to put it.
        dtype: Of its parameters.

    Returns:
        The network.
    """
    modules: list[nn.Module] = []
    for (kind, *sizes), drawn in zip(workload.layers, workload.parameters(), strict=True):
        numbers = [int(size) for size in sizes]
        if kind == "conv":
            modules.append(nn.Conv2d(numbers[0], numbers[1], 3, padding=numbers[2]))
        elif kind == "linear":
            modules.append(nn.Linear(numbers[0], numbers[1]))
        elif kind == "maxpool":
            modules.append(nn.MaxPool2d(2))
        else:
            modules.append(nn.ReLU() if kind == "relu" else nn.Flatten())
        if drawn is not None:
            own = zip(("weight", "bias"), drawn, strict=True)
            modules[-1].load_state_dict({name: torch.from_numpy(values) for name, values in own})
    return nn.Sequential(*modules).to(device, dtype)


def samples(workload: Workload, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Draw inputs.

    Args:
        workload: The workload.
        seed: Decides on them.
        device: Where to put them.
        dtype: Their dtype.

    Returns:
        x1 and x2.
    """
    return [torch.from_numpy(x).to(device, dtype) for x in workload.inputs(seed)]
