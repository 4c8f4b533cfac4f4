"""What BackPACK and ViViT cannot do, or do wrong without an error."""

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import Module
from vivit.extensions.secondorder.vivit import ViViTGGNExact

from ggn_ntk.extensions.backpack_internals import module_extensions, params_of
from ggn_ntk.models.independence import check_samples, look
from ggn_ntk.models.requirements import ModuleCheck, configuration_problems, find, hidden_computation
from ggn_ntk.problem.errors import OTHER_METHOD, Problem, UnsupportedModelError, UnsupportedRouteError
from ggn_ntk.problem.functions import FunctionModule
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import AnyBatchNorm, AnyConv, AnyLoss, AnyTransposedConv, uncompiled
from ggn_ntk.rules.registry import acts_on_each_sample


def check_vivit(request: Request) -> Tensor:
    """Raise unless ViViT suits the model; a few outputs. Call it inside ``isolated(request.model)``."""
    # -> [few, *out]
    route, problems = "empirical NTK through ViViT", configuration_problems(request)
    of_route = vivit_problems(request)
    if problems or of_route:
        kind = UnsupportedModelError if problems else UnsupportedRouteError
        raise kind(problems + of_route, route)
    few = look(request)
    modules = (module for module in uncompiled(request.model).modules() if not any(module.children()))
    if not all(map(acts_on_each_sample, modules)):
        check_samples(request, few.shape[1:])
    if few.ndim == 1:
        remedy = "Drop the layer that removes the output axis, or use another method"
        problem = Problem("", "its output has no axis behind the samples, and MSELoss in BackPACK needs one", remedy)
        raise UnsupportedRouteError([problem], route)
    return few


def vivit_problems(request: Request) -> list[Problem]:
    """Find what the ViViT route cannot do, or would do wrong without an error."""
    model = uncompiled(request.model)
    if isinstance(model, FunctionModule):
        return [Problem("", "it is a function, and ViViT takes nn.Sequential models of its layers", OTHER_METHOD)]
    problems = []
    if request.outputs != (None, None):
        problems.append(Problem("", "what it returns is not its last layer's output (output=)", OTHER_METHOD))
    elif len(request.batches) > 1:
        problems.append(Problem("", "x1 and x2 differ in form, and ViViT takes all samples together", OTHER_METHOD))
    args = request.x1.positional
    if args is None or len(args) != 1 or not args[0].is_floating_point():
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


def vivit_module_problems(module: Module, name: str) -> Iterator[Problem]:
    """Find what ViViT cannot do, or does wrong without an error, in one module."""
    kind = type(module).__name__
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        known: list[str] = []
    elif any(True for _ in module.children()):
        what = f"{kind} may compute between its modules what BackPACK cannot see"
        yield Problem(name, what, "Build the model from nn.Sequential alone, or use another method")
        return
    elif isinstance(module, AnyLoss) or type(module) not in VIVIT_LAYERS:
        yield Problem(name, f"ViViT has no extension for {kind}", OTHER_METHOD)
        return
    else:
        known = VIVIT_LAYERS[type(module)]
    for p_name, _ in module.named_parameters(recurse=False):
        if p_name not in known:
            yield Problem(name, f"ViViT has no Gram matrix for its parameter {p_name!r}", OTHER_METHOD)
    yield from find(VIVIT_CHECKS, module, name)


AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

# Layer type -> the parameters ViViT has Gram matrices for, read from the extension itself.
VIVIT_LAYERS: dict[type[Module], list[str]] = {
    layer: params_of(extension) for layer, extension in module_extensions(ViViTGGNExact()).items()
}

# What BackPACK ignores or refuses, found by comparing ViViT 1.0.0 on BackPACK 1.7.1 with torch.func.
VIVIT_CHECKS = [
    ModuleCheck(applies, f"has {option}, which BackPACK gets wrong or refuses", OTHER_METHOD)
    for option, applies in {
        "a padding_mode other than 'zeros'": lambda m: isinstance(m, AnyConv) and m.padding_mode != "zeros",
        "its padding given as a string": lambda m: isinstance(m, AnyConv) and isinstance(m.padding, str),
        "output_padding": lambda m: isinstance(m, AnyTransposedConv) and any(m.output_padding),
        "affine=False": lambda m: isinstance(m, AnyBatchNorm) and not m.affine,
        "inplace=True": lambda m: getattr(m, "inplace", False),
        "ceil_mode=True": lambda m: isinstance(m, AVG_POOLS) and m.ceil_mode,
        "count_include_pad=False": lambda m: isinstance(m, AVG_POOLS) and not m.count_include_pad,
        "divisor_override": lambda m: isinstance(m, AVG_POOLS) and getattr(m, "divisor_override", None) is not None,
    }.items()
]
