"""Every problem of a model that can be read off its configuration, found before work starts and reported at once."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Size, nn
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import UninitializedParameter
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.models.comparison import relative_error as relative_error  # the guide imports it from here
from ggn_ntk.models.independence import Checked, check_samples, look
from ggn_ntk.models.isolation import has_global_hooks, runs_hooks
from ggn_ntk.problem.errors import OTHER_METHOD, Problem, UnsupportedModelError, UnsupportedRouteError
from ggn_ntk.problem.request import Request
from ggn_ntk.rules import acts_on_each_sample


def check_model(request: Request) -> Checked:
    """Raise unless the model has an exact empirical NTK. Call it inside ``isolated(request.model)``.

    The configuration of all modules is read first; only if nothing is wrong there, samples are sent through the model.

    Args:
        request: The request.

    Returns:
        What was found of it.

    Raises:
        UnsupportedModelError: If there is any problem; it lists all of them.
    """
    problems = configuration_problems(request)
    if problems:
        raise UnsupportedModelError(problems)
    return check_samples(request)


def check_vivit(request: Request) -> Size:
    """Raise unless ViViT suits the model. Call it inside ``isolated(request.model)``.

    Args:
        request: The request.

    Returns:
        The shape ``[*out]`` of one sample's output.

    Raises:
        UnsupportedModelError: If there is a problem on any route.
        UnsupportedRouteError: If there are problems on this one.
    """
    route, problems = "empirical NTK through ViViT", configuration_problems(request)
    of_route = vivit_problems(request)
    if problems or of_route:
        kind = UnsupportedModelError if problems else UnsupportedRouteError
        raise kind(problems + of_route, route)
    if all(acts_on_each_sample(module) for module in eager(request.model).modules() if not any(module.children())):
        shape = look(request)
    else:
        shape = check_samples(request).outputs.shape[1:]
    if not shape:
        remedy = "Drop the layer that removes the output axis, or use another method"
        problem = Problem("", "its output has no axis behind the samples, and MSELoss in BackPACK needs one", remedy)
        raise UnsupportedRouteError([problem], route)
    return shape


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
    wanted = {id(p) for p in request.params.values()}
    for name, p in [*request.model.named_parameters(), *request.model.named_buffers()]:
        if isinstance(p, UninitializedParameter | nn.UninitializedBuffer):
            names["has no shape yet", "Run one forward pass first"].append(name)
        elif p.is_meta:
            names["holds no data (meta device)", "Load the weights first"].append(name)
        elif p.is_inference():
            names["was created in inference mode", "Create the model outside torch.inference_mode()"].append(name)
        elif p.is_complex() and id(p) in wanted:
            names[f"is {p.dtype}", "Write the model in terms of real and imaginary parts"].append(name)
        elif p.is_floating_point() and p.dtype not in TOLERANCES:
            remedy = "Kernels are exact in float32 and float64 only: convert with model.float() or model.double()"
            names[f"is {p.dtype}", remedy].append(name)
    for (what, remedy), places in names.items():
        others = f", as are {len(places) - 1} others" if len(places) > 1 else ""
        yield Problem(places[0], what + others, remedy)
    devices = sorted({str(p.device) for p in request.model.parameters() if not p.is_meta})
    if len(devices) > 1 and any(id(p) in wanted for p in request.model.parameters()):
        what = f"its parameters are on several devices ({', '.join(devices)}), and a kernel sums over all of them"
        yield Problem("", what, "Move it to one of them: model.to(device)")
    if not request.params:
        yield Problem("", "it has no trainable parameter", "Call requires_grad_() on those the kernel should sum over")


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
    if runs_hooks(module) or "forward" in vars(module) or has_global_hooks():
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


AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

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
        "ceil_mode=True": lambda m: isinstance(m, AVG_POOLS) and m.ceil_mode,
        "count_include_pad=False": lambda m: isinstance(m, AVG_POOLS) and not m.count_include_pad,
        "divisor_override": lambda m: isinstance(m, AVG_POOLS) and getattr(m, "divisor_override", None) is not None,
    }.items()
]
