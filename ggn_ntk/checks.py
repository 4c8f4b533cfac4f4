"""Every problem of a model, found before work starts and reported at once."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from backpack import hook_store_io
from torch import Size, Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import UninitializedParameter
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk.request import Inputs, Request

#: Largest relative Frobenius error of a kernel against the oracle, by dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}

OTHER_METHOD = "Use another method ('auto' finds one)"

#: How often a probe must fail to count.
TRIES = 3

#: The same for probes on a few samples, where rounding does not average out.
PROBE_TOLERANCES = {dtype: 10 * tolerance for dtype, tolerance in TOLERANCES.items()}

#: The largest relative difference of gradients that rounding makes by taking units to the other side of a kink: the
#: square root of their share, of which 1e-4 would be many.
KINKS = 1e-2


class Problem(NamedTuple):
    """Something that keeps a kernel from being computed.

    Attributes:
        where: Dotted name of the module or parameter; empty for the model itself.
        what: What is wrong with it.
        remedy: What to do about it.
    """

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        """Format as one line of an error message.

        Returns:
            The line.
        """
        return f"{self.where or 'the model'}: {self.what}. {self.remedy}."


INTERACTION = Problem(
    "",
    "samples influence one another (gradients alone and in a batch differ)",
    "Remove what mixes the leading axis, e.g. use batch_first=True, or eval()",
)


class UnsupportedModelError(ValueError):
    """A kernel cannot be computed for a model; the message lists every problem and its remedy.

    Attributes:
        problems: The problems found.
    """

    def __init__(self, problems: Iterable[Problem], route: str = "empirical NTK") -> None:
        """Format the problems.

        Args:
            problems: What was found.
            route: What cannot be computed.
        """
        self.problems = list(problems)
        super().__init__(f"No {route} of this model:\n" + "\n".join(f"  - {p}" for p in self.problems))


class NTKMismatchError(RuntimeError):
    """A kernel differs from the oracle's by more than rounding."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Measure the relative Frobenius error.

    Args:
        actual: A tensor.
        expected: What it should be, of the same shape. It may have a wider dtype.

    Returns:
        ``|actual - expected| / |expected|`` in float64; zero where both are zero.
    """
    actual, expected = actual.double(), expected.double()
    error, scale = torch.linalg.vector_norm(actual - expected), torch.linalg.vector_norm(expected)
    return 0.0 if error == 0 else (error / scale).item()


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out, on any device.

    Args:
        error: The error.

    Returns:
        Whether it does.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def check_model(request: Request, *, vivit: bool = False) -> Size:
    """Raise unless the model has an exact empirical NTK. Call it inside ``isolated(request.model)``.

    The configuration of all modules is read first; only if nothing is wrong there, a few samples are
    sent through the model.

    Args:
        request: The request.
        vivit: Whether the model must also suit the ViViT route.

    Returns:
        The shape ``[*out]`` of one sample's output.

    Raises:
        UnsupportedModelError: If there is any problem; it lists all of them.
    """
    problems = configuration_problems(request)
    route = "empirical NTK"
    if vivit:
        route = "empirical NTK through ViViT"
        problems += vivit_problems(request)
    if problems:
        raise UnsupportedModelError(problems, route)
    out_shape, problems = _probe_samples(request)
    if vivit and not problems and not out_shape:
        remedy = "Drop the layer that removes the output axis, or use another method"
        problems = [Problem("", "its output has no axis behind the samples, and MSELoss in BackPACK needs one", remedy)]
    if problems:
        raise UnsupportedModelError(problems, route)
    return out_shape


# ---------------------------------------------------------------- problems on every route


def configuration_problems(request: Request) -> list[Problem]:
    """Find what can be read off modules and parameters.

    Args:
        request: The request.

    Returns:
        The problems.
    """
    modules = request.model.named_modules()
    return [p for name, m in modules for p in find(MODULE_CHECKS, m, name)] + list(_parameter_problems(request))


class ModuleCheck(NamedTuple):
    """Something to look for in a module's configuration.

    Attributes:
        applies: Tells whether a module, of any type, has the problem.
        what: What is wrong, behind the name of the module's type.
        remedy: What to do about it.
    """

    applies: Callable[[Any], bool]
    what: str
    remedy: str


def find(checks: Iterable[ModuleCheck], module: Module, name: str) -> Iterator[Problem]:
    """Look for problems in one module's configuration.

    Args:
        checks: What to look for.
        module: The module.
        name: Its dotted name.

    Yields:
        The problems.
    """
    for check in checks:
        if check.applies(module):
            yield Problem(name, f"{type(module).__name__} {check.what}", check.remedy)


def _is_active_dropout(module: Any) -> bool:
    """Tell whether a module drops activations at random.

    Args:
        module: Any module.

    Returns:
        Whether it is in train mode with a non-zero dropout probability.
    """
    if isinstance(module, _DropoutNd):
        return module.training and module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.training and module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0


BATCH_STATISTICS = ModuleCheck(
    lambda m: isinstance(m, _BatchNorm) and (m.training or m.running_mean is None),
    "normalises by batch statistics, so samples influence one another",
    "Call eval() on it, and give it running statistics (track_running_stats=True)",
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
    """Find problems of the model's parameters and buffers.

    Args:
        request: The request.

    Yields:
        The problems.
    """
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, p in [*request.model.named_parameters(), *request.model.named_buffers()]:
        if isinstance(p, UninitializedParameter | nn.UninitializedBuffer):
            names["has no shape yet", "Run one forward pass first"].append(name)
        elif p.is_meta:
            names["holds no data (meta device)", "Load the weights first"].append(name)
        elif p.is_inference():
            names["was created in inference mode", "Create the model outside torch.inference_mode()"].append(name)
        elif p.is_complex():
            names[f"is {p.dtype}", "Write the model in terms of real and imaginary parts"].append(name)
        elif p.is_floating_point() and p.dtype not in TOLERANCES:
            remedy = "Kernels are exact in float32 and float64 only: convert with model.float() or model.double()"
            names[f"is {p.dtype}", remedy].append(name)
    for (what, remedy), places in names.items():
        others = f", as are {len(places) - 1} others" if len(places) > 1 else ""
        yield Problem(places[0], what + others, remedy)
    if not request.params:
        yield Problem("", "it has no trainable parameter", "Call requires_grad_() on those the kernel should sum over")


def _probe_samples(request: Request) -> tuple[Size, list[Problem]]:
    """Send up to three samples through the model and back, together and one by one.

    Samples do not influence one another exactly if, for any numbers v, the gradient of ``sum v[n, c] f[n, c]``
    is the same when each sample is by itself. Rounding may take one of them to the other side of a kink, so a
    difference must show again and again, and not be one that rounding makes.

    Args:
        request: The request.

    Returns:
        The shape ``[*out]`` of one sample's output, and the problems found.
    """
    samples = request.x1[:2].stack(request.second[-1:])
    before = random_state(request.model)
    with torch.enable_grad():
        output = request.evaluate(None, samples)
    problem = output_problem(output, before == random_state(request.model), len(samples))
    if problem is not None:
        return Size(), [problem]
    tolerance, output = probe_tolerance(output), output.detach()
    for seed in range(TRIES):
        v = cotangent(output, seed)
        together = gradients(request, samples, v)
        each = [gradients(request, samples[i : i + 1], v[i : i + 1]) for i in range(len(samples))]
        alone = {name: torch.stack([gradient[name] for gradient in each]).sum(0) for name in together}
        problems = _sample_problems(together, alone, tolerance)
        if not problems:
            break
    if problems == [INTERACTION] and _only_kinks(request, samples, v, together, alone):
        problems = []
    return output.shape[1:], problems


def _only_kinks(
    request: Request, samples: Inputs, v: Tensor, together: dict[str, Tensor], alone: dict[str, Tensor]
) -> bool:
    """Tell whether gradients together and alone differ by units that rounding takes to the other side of a kink.

    Such units are few. Rounding depends on how many samples there are: in batches of one size, the gradient of a
    sample's outputs is the same whatever the others are, unless samples influence one another.

    Args:
        request: The request.
        samples: The samples.
        v: Numbers like their outputs.
        together: The gradient of ``sum v f``, by name.
        alone: The same with each sample by itself.

    Returns:
        Whether they do.
    """
    difference = total_norm(together[name] - gradient for name, gradient in alone.items())
    if not difference <= KINKS * total_norm(alone.values()):
        return False
    for i in range(len(samples)):
        of_one = torch.zeros_like(v)
        of_one[i] = v[i]
        among_others = gradients(request, samples, of_one)
        among_copies = gradients(request, samples[[i] * len(samples)], of_one)
        if not gradients_agree(among_others, among_copies):
            return False
    return True


def cotangent(output: Tensor, seed: int) -> Tensor:
    """Draw the numbers v of a probe.

    Args:
        output: ``[N, *out]``.
        seed: Seed of a generator of their own.

    Returns:
        Normal numbers like the output.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, dtype=output.dtype, device="cpu", generator=generator).to(output.device)


def gradients(
    request: Request, inputs: Inputs, v: Tensor, primals: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute a gradient with plain autograd.

    Args:
        request: The request.
        inputs: N samples.
        v: Numbers like the output, ``[N, *out]``.
        primals: Parameters that require a gradient; ``None`` for the model's own.

    Returns:
        The gradient of ``sum v f`` with respect to each wanted parameter, by name.

    Raises:
        UnsupportedModelError: If the output has another shape.
    """
    leaves = request.params if primals is None else primals
    with torch.enable_grad():
        output = request.evaluate(primals, inputs)
        if output.shape != v.shape:
            what = f"its output for {len(v)} of the samples alone has shape {list(output.shape)}, not {list(v.shape)}"
            remedy = "Keep the sample axis also for a single sample (say squeeze(-1), not squeeze())"
            raise UnsupportedModelError([Problem("", what, remedy)])
        if not output.requires_grad:
            return {name: torch.zeros_like(p) for name, p in leaves.items()}
        tensors = list(leaves.values())
        found = torch.autograd.grad(output, tensors, v, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def gradient_error(actual: Tensor, expected: Tensor, total: float) -> float:
    """Measure how far one parameter's gradient is off.

    A gradient that is zero but for rounding (say of a bias in front of a normalisation) is off by rounding of
    the others' size, so the error is relative to at least a hundredth of the total.

    Args:
        actual: The gradient.
        expected: What it should be.
        total: The norm over all parameters.

    Returns:
        The relative error.
    """
    error = torch.linalg.vector_norm(actual - expected).item()
    scale = max(torch.linalg.vector_norm(expected).item(), total / 100)
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def gradients_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> bool:
    """Tell whether gradients agree, parameter by parameter.

    Args:
        actual: Gradients by name.
        expected: What they should be.
        tolerance: The largest relative error; ``None`` for that of probes, by dtype.

    Returns:
        Whether they do.
    """
    total = total_norm(expected.values())
    errors = [gradient_error(actual[name], gradient, total) for name, gradient in expected.items()]
    return all(
        error <= (PROBE_TOLERANCES[gradient.dtype] if tolerance is None else tolerance)
        for error, gradient in zip(errors, actual.values(), strict=True)
    )


def probe_tolerance(output: Tensor) -> float:
    """Choose the tolerance of a probe.

    A model may convert to float32 inside, also where its parameters are in float64 (normalisation layers of Hugging
    Face's do); then its gradients are reproducible to the rounding of float32 alone.

    Args:
        output: The model's output, in a graph.

    Returns:
        The largest relative error.
    """
    converts = any(node.name().startswith("ToCopyBackward") for node in graph_nodes(output))
    return PROBE_TOLERANCES[torch.float32 if converts else output.dtype]


def graph_nodes(output: Tensor | GradientEdge, sources: Mapping[Any, Iterable[Node]] | None = None) -> Iterator[Node]:
    """Walk through the graph of a tensor, from the tensor back.

    Args:
        output: The tensor, or its place in the graph.
        sources: Where to go on behind some nodes, instead of at those they come from; such nodes are left out.

    Yields:
        Each node once.
    """
    if isinstance(output, Tensor):
        waiting = [get_gradient_edge(output).node] if output.requires_grad else []
    else:
        waiting = [output.node]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if sources is not None and node in sources:
            waiting += sources[node]
        else:
            yield node
            waiting += [before for before, _ in node.next_functions if before is not None]


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Compute the norm over several tensors.

    Args:
        tensors: The tensors.

    Returns:
        The norm.
    """
    return math.hypot(*(torch.linalg.vector_norm(t).item() for t in tensors))


def _sample_problems(together: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float) -> list[Problem]:
    """Compare gradients of samples together and one by one.

    Args:
        together: Gradient of the samples in a batch.
        alone: The sum of their gradients by themselves.
        tolerance: The largest relative error.

    Returns:
        A problem, or nothing.
    """
    if not all(gradient.isfinite().all() for gradient in together.values()):
        return [Problem("", "its gradients are not finite", "Look for overflow in its weights and inputs")]
    if gradients_agree(together, alone, tolerance):
        return []
    return [INTERACTION]


def random_state(model: Module) -> list[Any]:
    """Read the state of the random number generators a forward pass may draw from.

    Args:
        model: The model.

    Returns:
        The states, for comparison.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
    of_numpy = np.random.get_state(legacy=False)["state"]
    return [*(s.numpy().tobytes() for s in states), random.getstate(), of_numpy["key"].tobytes(), of_numpy["pos"]]


def output_problem(output: Any, deterministic: bool, n: int) -> Problem | None:
    """Find what is wrong with the model's output.

    Args:
        output: What the model returned.
        deterministic: Whether it drew no random numbers.
        n: Number of samples it was given.

    Returns:
        The problem, or ``None``.
    """
    if not deterministic:
        remedy = "Call eval(), or make its forward pass deterministic"
        return Problem("", "its forward pass draws random numbers", remedy)
    if not isinstance(output, Tensor):
        remedy = "Pass output=, a function that picks the tensor [N, ...] to differentiate"
        return Problem("", f"it returns {type(output).__name__}, not a tensor", remedy)
    if output.ndim == 0 or len(output) != n or output.numel() == 0:
        what = f"its output for {n} samples has shape {list(output.shape)}"
        return Problem("", what, "Its leading axis must be the samples, and it must not be empty")
    if output.dtype not in TOLERANCES:
        return Problem("", f"its output is {output.dtype}", "Outputs must be float32 or float64")
    return None


# ---------------------------------------------------------------- problems on the ViViT route


def vivit_problems(request: Request) -> list[Problem]:
    """Find what the ViViT route cannot do, or would do wrong without a word.

    Args:
        request: The request.

    Returns:
        The problems.
    """
    model = eager(request.model)
    problems = []
    if request.output is not None:
        problems.append(Problem("", "what it returns is not its last layer's output (output=)", OTHER_METHOD))
    if len(request.x1.args) != 1 or not request.x1.args[0].is_floating_point():
        problems.append(Problem("", "ViViT takes one input tensor of real numbers", OTHER_METHOD))
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        owners[id(module)].append(name)
        problems += [*vivit_module_problems(module, name), *hidden_computation(module, name)]
        for p_name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(p)].append(f"{name}.{p_name}".lstrip("."))
    for first, *others in owners.values():
        if others:
            what = f"it is used {len(others) + 1} times (again as {', '.join(others)}), and ViViT drops the cross-terms"
            problems.append(Problem(first, what, OTHER_METHOD))
    return problems


def hidden_computation(module: Module, name: str) -> Iterator[Problem]:
    """Find computation that does not show in a module's type.

    Args:
        module: The module.
        name: Its dotted name.

    Yields:
        The problems.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(hook is not hook_store_io for hook in hooks) or "forward" in vars(module):
        what = f"{type(module).__name__} has forward hooks or a forward of its own, which its type does not tell"
        yield Problem(name, what, f"Remove them, or: {OTHER_METHOD}")


def eager(model: Module) -> Module:
    """Unwrap a compiled model.

    Args:
        model: A model, possibly returned by ``torch.compile``.

    Returns:
        The model behind it.
    """
    return getattr(model, "_orig_mod", model)


def vivit_module_problems(module: Module, name: str) -> Iterator[Problem]:
    """Find what ViViT cannot do, or does wrong without a word, in one module.

    Args:
        module: The module.
        name: Its dotted name.

    Yields:
        The problems.
    """
    kind = type(module).__name__
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        known: list[str] = []
    elif any(True for _ in module.children()):
        what = f"{kind} may compute between its modules what BackPACK cannot see"
        yield Problem(name, what, "Build the model from nn.Sequential alone, or use another method")
        return
    elif isinstance(module, _Loss) or type(module) not in _VIVIT_LAYERS:
        yield Problem(name, f"ViViT has no extension for {kind}", OTHER_METHOD)
        return
    else:
        known = _VIVIT_LAYERS[type(module)]
    for p_name, _ in module.named_parameters(recurse=False):
        if p_name not in known:
            yield Problem(name, f"ViViT has no Gram matrix for its parameter {p_name!r}", OTHER_METHOD)
    yield from find(VIVIT_CHECKS, module, name)


_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

# Layer type -> the parameters ViViT has Gram matrices for, read from the extension itself.
_VIVIT_LAYERS: dict[type[Module], list[str]] = {
    layer: extension._ModuleExtension__params
    for layer, extension in ViViTGGNExact()._BackpropExtension__module_extensions.items()
}

# What BackPACK ignores or refuses, found by comparing ViViT 1.0.0 on BackPACK 1.7.1 with torch.func.
VIVIT_CHECKS = [
    ModuleCheck(applies, f"has {option}, which BackPACK gets wrong or refuses", OTHER_METHOD)
    for option, applies in {
        "a padding_mode other than 'zeros'": lambda m: isinstance(m, _ConvNd) and m.padding_mode != "zeros",
        "its padding given as a string": lambda m: isinstance(m, _ConvNd) and isinstance(m.padding, str),
        "output_padding": lambda m: isinstance(m, _ConvTransposeNd) and any(m.output_padding),
        "affine=False": lambda m: isinstance(m, _BatchNorm) and not m.affine,
        "inplace=True": lambda m: getattr(m, "inplace", False),
        "ceil_mode=True": lambda m: isinstance(m, _AVG_POOLS) and m.ceil_mode,
        "count_include_pad=False": lambda m: isinstance(m, _AVG_POOLS) and not m.count_include_pad,
        "divisor_override": lambda m: isinstance(m, _AVG_POOLS) and getattr(m, "divisor_override", None) is not None,
    }.items()
]
