"""The model as a pure function of the wanted parameters and the inputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Size, Tensor

from ggn_ntk.models.autograd_graph import graph_nodes, precisions
from ggn_ntk.models.comparison import TOLERANCES
from ggn_ntk.models.faults import check_pooling
from ggn_ntk.models.inspection import in_low_precision, without_draws
from ggn_ntk.models.isolation import Session, isolated
from ggn_ntk.models.precision import too_coarse
from ggn_ntk.problem.errors import NoTensorError, Problem, UnsupportedModelError
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import tree_map
from ggn_ntk.process.transforms import AutogradInside, is_transformed

#: What to do about a sample axis that is lost for some numbers of samples.
SHAPE_REMEDY = (
    "Keep the sample axis also for a single sample (say squeeze(-1), not squeeze()), and mark inputs that all samples "
    "share with ggn_ntk.shared; or pass interacting=True, if the whole batch is one input"
)


def evaluate(
    request: Request,
    primals: dict[str, Tensor] | None,
    inputs: Inputs,
    *,
    inspect: bool = False,
    jitter: int | None = None,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """Evaluate the model as a pure function of the wanted parameters and the inputs."""
    # The session puts the model back to how it was found before each call.
    # -> [N, *out], or [1, N, *out] of a batch that is one input
    with isolated(request.model) as session:
        values = _stand_ins(request, session, primals, jitter)

        def copied(x: Tensor) -> Tensor:
            x = x.clone() if jitter is None else _jittered(x, jitter)
            return _widened(x) if request.widened else x

        def call(within: Callable[[], AbstractContextManager[None]] = nullcontext) -> Any:
            # Copies, so that a model that writes to its inputs leaves the user's alone.
            args, kwargs = inputs.arguments(copied)
            inside = AutogradInside() if is_transformed() else nullcontext()
            with session.evaluation(values, inspect=inspect), within(), inside:
                result = request.model(*args, **kwargs)
                result = result if request.output is None else request.output(result)
                if isinstance(result, Tensor) and not is_transformed():  # plain gradients are what others are held to
                    check_pooling(result)
                if inputs.whole and isinstance(result, Tensor):
                    return check_output(result, inputs.count).unsqueeze(0)
                return result

        if inspect:
            return _inspected(request, session, without_draws(call, within))
        return call(within) if within is not nullcontext else _with_graph_if_needed(call)


def _stand_ins(
    request: Request, session: Session, primals: dict[str, Tensor] | None, jitter: int | None
) -> dict[int, Tensor]:
    """Choose the tensors that take the place of parameters and buffers, by the id of what they stand for."""
    model, values = request.model, dict[int, Tensor]()
    if request.graph is not None:  # all are the user's tensors
        values = dict[int, Tensor](request.graph)
    elif request.widened:
        values = {id(t): _widened(t.detach()) for t in (*model.parameters(), *model.buffers())}
    elif primals is not None:  # parameters that are not wanted are constants, as quantised ones are already
        others = (p for p in model.parameters() if session.written or p.is_floating_point() or p.is_complex())
        values = {id(p): p.detach().clone() if session.written else p.detach() for p in others}
    if primals is not None:
        if jitter is not None:
            values = {key: _jittered(value, jitter) for key, value in values.items()}
        values |= {id(request.params[name]): value for name, value in primals.items()}
    return values


def _with_graph_if_needed(call: Callable[[], Any]) -> Any:
    """Call a model; if it differentiates something inside, with a graph even where the caller records none."""
    try:
        return call()
    except RuntimeError as error:
        if torch.is_grad_enabled() or "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return tree_map(lambda y: y.detach() if isinstance(y, Tensor) else y, call())


def _inspected(request: Request, session: Session, result: Any) -> Any:
    """Raise if an evaluation under inspection has shown what no kernel is exact for."""
    if not isinstance(result, Tensor):
        return result
    # An output that is itself of a low precision is for check_output to report.
    low = too_coarse(request, session.low | precisions(result))
    if low and result.dtype in TOLERANCES:
        raise UnsupportedModelError([in_low_precision(low)])
    if session.earlier and not session.earlier.isdisjoint(graph_nodes(result)):
        what = "it uses a tensor with a graph from an earlier call, which a module holds"
        raise UnsupportedModelError([Problem("", what, "Compute it in the forward pass, or detach() it")])
    return result


def evaluate_checked(request: Request, inputs: Inputs, shape: Size | None = None) -> Tensor:
    """Evaluate the model with its own parameters, inspect foreign code, and check what it returns."""
    # shape [*out], where it is known -> [N, *out]
    output = evaluate(request, None, inputs, inspect=runs_foreign_code(request))
    return check_output(output, len(inputs)) if shape is None else check_shape(output, len(inputs), shape)


def check_output(output: object, n: int) -> Tensor:
    """Make sure that a model returns something to differentiate, for each sample."""
    # -> [N, *out]
    problem = None
    if not isinstance(output, Tensor):
        raise NoTensorError.of(output)
    if output.ndim == 0 or len(output) != n or output.numel() == 0:
        what = f"its output for {n} sample{'s' * (n > 1)} has shape {list(output.shape)}"
        problem = Problem("", what, "Its leading axis must be the samples (a loss for each), and it must not be empty")
    elif output.dtype not in TOLERANCES:
        problem = Problem(
            "", f"its output is {output.dtype}", "Outputs must be float32 or float64: output= may convert them"
        )
    if problem is not None:
        raise UnsupportedModelError([problem])
    return output


def check_shape(output: object, n: int, shape: Size) -> Tensor:
    """Make sure that a model returns for some samples what it returns for others."""
    # shape [*out] -> [N, *out]
    output = check_output(output, n)
    if output.shape[1:] != shape:
        raise UnsupportedModelError([other_shape(output, Size([n, *shape]))])
    return output


def other_shape(output: Tensor, expected: Size) -> Problem:
    """Say that outputs of some samples have another shape than those of all."""
    what = f"its output for {expected[0]} of the samples has shape {list(output.shape)}, not {list(expected)}"
    return Problem("", what, SHAPE_REMEDY)


def runs_foreign_code(request: Request) -> bool:
    """Tell whether code that is not torch's own may run between x and the outputs."""
    with isolated(request.model) as session:
        return session.foreign or request.output is not None


def primals_of(request: Request) -> dict[str, Tensor]:
    """List the wanted parameters, detached where no graph is asked for: where ``torch.func`` takes derivatives."""
    if request.graph is not None:
        return with_graph(request, request.params)
    with isolated(request.model) as session:
        copy = _widened if request.widened else torch.clone if session.written else torch.Tensor.detach
        return {name: copy(p.detach()) for name, p in request.params.items()}


def with_graph(request: Request, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """List the user's tensors that parameters are or stand for."""
    given = request.graph or {}
    return {name: given.get(id(p), p) for name, p in params.items()}


def leaves_of(request: Request, jitter: int | None = None) -> dict[str, Tensor]:
    """Copy the wanted parameters as leaves of a graph; with a seed, changed at random in their last digit."""
    copies = {name: (_widened(p) if request.widened else p).detach().clone() for name, p in request.params.items()}
    if jitter is not None:
        copies = {name: _jittered(copy, jitter) for name, copy in copies.items()}
    return {name: copy.requires_grad_() for name, copy in copies.items()}


def _widened(x: Tensor) -> Tensor:
    """Copy a tensor, to float64 if it holds real numbers, or complex ones of that."""
    dtype = torch.float64 if x.is_floating_point() else torch.complex128 if x.is_complex() else x.dtype
    return x.to(dtype, copy=True)


def _jittered(x: Tensor, seed: int) -> Tensor:
    """Change each number by a unit in its last digit, up or down."""
    if not (x.is_floating_point() or x.is_complex()) or x.element_size() == 1:  # no arithmetic in so few bits
        return x.clone()
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, x.shape, generator=generator, device="cpu").to(x.device, x.dtype) * 2 - 1
    return x + x * signs * torch.finfo(x.dtype).eps
