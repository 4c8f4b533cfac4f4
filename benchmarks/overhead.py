"""What the kernel costs in a training step that is run anyway: ``EmpiricalNTK`` beside ``BatchGrad``."""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import Tensor, nn

from benchmarks import plan
from benchmarks.check import relative_error
from benchmarks.network import network, samples
from benchmarks.results import Measurement
from benchmarks.workloads import FULL
from ggn_ntk import EmpiricalNTK, empirical_ntk

_WORKLOAD = FULL[0]


class GradientsDifferError(RuntimeError):
    """The extension changed the gradients."""


def measure_overhead(rounds: int, device: str) -> dict[str, Measurement]:
    """Time training steps of the CNN with the cross-entropy loss, with and without the kernel.

    Args:
        rounds: How often each variant is timed, after one round to warm up.
        device: Where to compute.

    Returns:
        Times by variant, and the largest error of the kernels.
    """
    step = _Step(device)
    variants: dict[str, Callable[[int], Any]] = {
        plan.STEP: lambda seed: step.gradients(seed, nullcontext()),
        plan.BATCH_GRAD_STEP: lambda seed: step.gradients(seed, backpack(BatchGrad())),
        plan.KERNEL_STEP: step.kernel_and_gradients,
        plan.ALONE: lambda seed: empirical_ntk(step.plain_model, *samples(_WORKLOAD, seed, device)),
    }
    measured = {name: Measurement() for name in variants}
    for number in range(rounds + 1):
        results = {}
        for name in list(variants)[:: 1 if number % 2 else -1]:
            seconds, results[name] = _timed(lambda: variants[name](number))
            if number:
                measured[name].seconds.append(seconds)
        kernel, with_kernel = results[plan.KERNEL_STEP]
        _compare(with_kernel, results[plan.BATCH_GRAD_STEP])
        _compare(with_kernel[: len(results[plan.STEP])], results[plan.STEP])
        error = relative_error(kernel.cpu().numpy(), results[plan.ALONE].cpu().numpy())
        measured[plan.KERNEL_STEP].error = max(measured[plan.KERNEL_STEP].error or 0.0, error)
    return measured


class _Step:
    """A training step.

    Attributes:
        plain_model: The network, without BackPACK.
    """

    def __init__(self, device: str) -> None:
        """Build the network.

        Args:
            device: Where to compute.
        """
        self._device = device
        self.plain_model = network(_WORKLOAD, device)
        self._model, self._loss = extend(network(_WORKLOAD, device)), extend(nn.CrossEntropyLoss())

    def gradients(self, seed: int, context: AbstractContextManager[Any]) -> list[Tensor]:
        """Run a forward and a backward pass.

        Args:
            seed: Decides on the samples.
            context: To run them in.

        Returns:
            The gradients of all parameters, then those of each sample if BackPACK computes them.
        """
        x = torch.cat(samples(_WORKLOAD, seed, self._device))
        y = torch.arange(len(x), device=self._device) % _WORKLOAD.outputs
        params = list(self._model.parameters())
        self._model.zero_grad()
        with context, warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Full backward hook is firing", UserWarning
            )  # the input needs no gradient
            self._loss(self._model(x), y).backward()
        of_samples = [vars(p).pop("grad_batch") for p in params if hasattr(p, "grad_batch")]
        return [p.grad for p in params if p.grad is not None] + of_samples

    def kernel_and_gradients(self, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Run the passes with both extensions.

        Args:
            seed: Decides on the samples.

        Returns:
            The kernel, and the gradients.
        """
        extension = EmpiricalNTK(_WORKLOAD.n1)
        gradients = self.gradients(seed, backpack(BatchGrad(), extension))
        return extension.ntk(), gradients


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Time a call.

    Args:
        run: What to call.

    Returns:
        Seconds, and its result.
    """
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _compare(with_kernel: list[Tensor], without: list[Tensor]) -> None:
    """Compare gradients bit for bit.

    Args:
        with_kernel: Of a step with ``EmpiricalNTK``.
        without: Of one without.

    Raises:
        GradientsDifferError: If they differ.
    """
    if not all(torch.equal(a, b) for a, b in zip(with_kernel, without, strict=True)):
        raise GradientsDifferError("EmpiricalNTK changed the gradients of the training step.")
