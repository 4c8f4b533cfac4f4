"""A workload's network in torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload


def network(workload: Workload, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the network with its weights.

    Args:
        workload: The workload.
        device: Where to put it.
        dtype: Of its parameters.

    Returns:
        The network.
    """
    if workload.architecture:
        torch.manual_seed(0)
        return _ARCHITECTURES[workload.architecture](workload.outputs).eval().to(device, dtype)
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


def _resnet18(outputs: int) -> nn.Module:
    """Build torchvision's ResNet-18.

    Args:
        outputs: The number of outputs.

    Returns:
        The network, with random weights.
    """
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=outputs)
    return model


def _resnet18_cifar(outputs: int) -> nn.Module:
    """Build ResNet-18 for CIFAR-10: its first convolution is 3x3 and keeps all positions, and no pooling follows it.

    Args:
        outputs: The number of outputs.

    Returns:
        The network, with random weights.
    """
    model: Any = _resnet18(outputs)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    changed: nn.Module = model
    return changed


class _Transformer(nn.Module):
    """A transformer of four layers on sequences of vectors, with the mean of the last layer's outputs on top."""

    def __init__(self, outputs: int, width: int = 128) -> None:
        """Set up.

        Args:
            outputs: The number of outputs.
            width: Length of the vectors.
        """
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Any:
        """Evaluate.

        Args:
            x: ``[N, T, width]``.

        Returns:
            ``[N, O]``.
        """
        return self.head(self.encoder(x).mean(1))


_ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": _resnet18,
    "resnet18_cifar": _resnet18_cifar,
    "transformer": _Transformer,
}


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
