"""All problems of a model that can be read off its configuration: found before work starts, reported together."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn import Module
from torch.nn.parameter import UninitializedParameter, is_lazy

from ggn_ntk.memory.budget import resolve_axes
from ggn_ntk.models.comparison import TOLERANCES, read
from ggn_ntk.models.independence import Checked, check_samples, look
from ggn_ntk.models.isolation import runs_hooks
from ggn_ntk.problem.errors import OTHER_METHOD, Problem, StatisticsWarning, UnsupportedModelError, listed, warn
from ggn_ntk.problem.functions import FunctionModule, own_parameters
from ggn_ntk.problem.output_axes import KernelAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import AnyBatchNorm, AnyDropout, has_global_hooks


def check_model(request: Request) -> tuple[KernelAxes, list[Checked]]:
    """Raise unless the model has an exact empirical NTK. Call it inside ``isolated(request.model)``."""
    # The roles of output axes, and what is known of each batch of samples that are evaluated together.
    problems = configuration_problems(request)
    if problems:
        raise UnsupportedModelError(problems)
    few = [look(batch) for batch in request.batches]
    axes = resolve_axes(request, few)  # a kernel that cannot fit is refused before more is evaluated
    return axes, [check_samples(batch, f.shape[1:]) for batch, f in zip(request.batches, few, strict=True)]


def configuration_problems(request: Request) -> list[Problem]:
    """Find all problems that modules and parameters show without being used."""
    checks = [check for check in MODULE_CHECKS if check is not BATCH_STATISTICS or not request.axes.interacting]
    modules = request.model.named_modules()
    return [p for name, m in modules for p in find(checks, m, name)] + list(_parameter_problems(request))


def warn_of_statistics(model: Module) -> None:
    """Warn of running statistics that are in use, but were never set."""
    layers: dict[str, Any] = {
        name: m for name, m in model.named_modules() if isinstance(m, AnyBatchNorm) and _uses_statistics(m)
    }
    counts = read([m.num_batches_tracked for m in layers.values()])  # waits for the device once
    new = [name for (name, m), count in zip(layers.items(), counts, strict=True) if not count and _as_made(m)]
    if new:
        warn(
            f"{listed(name or 'the model' for name in new)}: BatchNorm normalises by running statistics that were "
            "never set, so the kernel has no normalisation at all. Let batches pass in train mode before, or call "
            "train() and pass interacting=True, for the statistics of the batch itself.",
            StatisticsWarning,
        )


def _uses_statistics(module: Any) -> bool:
    """Tell whether a BatchNorm layer uses running statistics, of which it counts the batches."""
    counts = module.num_batches_tracked
    held = (counts, module.running_mean, module.running_var)
    return not module.training and all(t is not None and not is_lazy(t) and not t.is_meta for t in held)


def _as_made(module: Any) -> bool:
    """Tell whether running statistics are those that a layer is made with; others may have been copied."""
    return not module.running_mean.any() and bool((module.running_var == 1).all())


class ModuleCheck(NamedTuple):
    """Something to look for in a module's configuration."""

    applies: Callable[[Any], bool]  # tells whether a module, of any type, has the problem
    what: str  # what is wrong, behind the name of the module's type
    remedy: str  # what to do about it


def find(checks: Iterable[ModuleCheck], module: Module, name: str) -> Iterator[Problem]:
    """Look for problems in one module's configuration."""
    for check in checks:
        if check.applies(module):
            yield Problem(name, f"{type(module).__name__} {check.what}", check.remedy)


def _is_active_dropout(module: Any) -> bool:
    """Tell whether a module drops activations at random."""
    if isinstance(module, AnyDropout):
        return module.training and module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.training and module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0


BATCH_STATISTICS = ModuleCheck(
    lambda m: isinstance(m, AnyBatchNorm) and (m.training or m.running_mean is None),
    "normalises by batch statistics, so samples influence one another",
    "Call eval() on it, and give it running statistics (track_running_stats=True); or, if the whole batch is one "
    "input, pass interacting=True to empirical_ntk",
)

MODULE_CHECKS = [
    BATCH_STATISTICS,
    ModuleCheck(
        _is_active_dropout,
        "drops activations at random",
        "Call eval() on it, or set its probability to 0",
    ),
    ModuleCheck(
        lambda m: isinstance(m, nn.RReLU) and m.training and m.lower != m.upper,
        "draws its slopes at random",
        "Call eval() on it",
    ),
    ModuleCheck(
        lambda m: isinstance(m, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d),
        "draws its windows at random",
        "Use another pooling layer",
    ),
    ModuleCheck(
        lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None,
        "rewrites its weight in the forward pass (max_norm)",
        "Rescale the weight once and set max_norm to None",
    ),
    ModuleCheck(
        lambda m: isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.scale_grad_by_freq,
        "scales gradients by the batch's token counts (scale_grad_by_freq), which couples samples",
        "Set scale_grad_by_freq to False",
    ),
]


def _parameter_problems(request: Request) -> Iterator[Problem]:
    """Find problems of the model's parameters and buffers."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    wanted = {id(p) for p in request.params.values()}
    # Modules that a function refers to may be mere shells, which it calls with other parameters than their own.
    own, shells = own_parameters(request.model), isinstance(request.model, FunctionModule)
    for name, p in [*own.items(), *request.model.named_buffers(recurse=not shells)]:
        if isinstance(p, UninitializedParameter | nn.UninitializedBuffer):
            names["has no shape yet", "Run one forward pass first"].append(name)
        elif p.is_meta:
            names["holds no data (meta device)", "Load the weights first"].append(name)
        elif p.is_inference():
            names["was created in inference mode", "Create the model outside torch.inference_mode()"].append(name)
        elif p.is_complex() and id(p) in wanted:
            names[
                f"is {p.dtype}",
                "Write the model in terms of real and imaginary parts, or leave it out (freeze it, or pass params)",
            ].append(name)
        elif p.is_floating_point() and p.dtype not in TOLERANCES and id(p) in wanted:
            remedy = (
                "Kernels are exact in float32 and float64 only: convert with model.float() or model.double(), or leave "
                "such parameters out (freeze them, or pass params)"
            )
            names[f"is {p.dtype}", remedy].append(name)
    for (what, remedy), places in names.items():
        others = f", as are {len(places) - 1} others" if len(places) > 1 else ""
        yield Problem(places[0], what + others, remedy)
    devices = sorted({str(p.device) for p in own.values() if not p.is_meta})
    if len(devices) > 1 and any(id(p) in wanted for p in own.values()):
        what = f"its parameters are on several devices ({', '.join(devices)}), and a kernel sums over all of them"
        yield Problem("", what, "Move it to one of them: model.to(device)")
    if not request.params:
        yield Problem(
            "",
            "it has no trainable parameter",
            "Call requires_grad_() on those to sum over; of a function, pass them as params",
        )


def hidden_computation(module: Module, name: str) -> Iterator[Problem]:
    """Find computation of a module that its type does not show."""
    if runs_hooks(module) or "forward" in vars(module) or has_global_hooks():
        what = f"{type(module).__name__} has forward hooks or a forward of its own, which its type does not tell"
        yield Problem(name, what, f"Remove them, or: {OTHER_METHOD}")
