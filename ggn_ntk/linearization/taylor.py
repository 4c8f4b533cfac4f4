"""Networks expanded in their parameters: the linearization, and Taylor polynomials of any degree.

The linearization ``f(θ0, x) + J(x) (θ - θ0)`` is the model whose training the NTK at ``θ0`` describes (Lee, Xiao,
Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington: "Wide Neural Networks of Any Depth Evolve as Linear Models Under
Gradient Descent", NeurIPS 2019, section 2.2). Directional derivatives come from nested ``torch.func.jvp``.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn import Module
from torch.utils._pytree import tree_map

from ggn_ntk.linearization.elementary_ops import differentiable
from ggn_ntk.models.comparison import KINKS, Difference, cotangent, norms, probe_tolerance, read, total_norm
from ggn_ntk.models.evaluation import evaluate, leaves_of, primals_of
from ggn_ntk.models.gradients import gradients, gradients_of
from ggn_ntk.models.isolation import isolated
from ggn_ntk.models.requirements import eager
from ggn_ntk.problem.errors import Problem, UnsupportedModelError, is_out_of_memory, without
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request, check_wrappers
from ggn_ntk.process.switches import without_checkpoints
from ggn_ntk.process.transforms import is_transformed
from ggn_ntk.process.turns import alone_with

_KIND = "Taylor expansion"

# What torch.compile puts before the names of parameters.
_COMPILED = "_orig_mod."

Parameters = dict[str, Tensor]

# Takes a function, its arguments and their tangents; returns the function's value and its derivative along them.
Pushforward = Callable[[Callable[..., Any], tuple[Parameters], tuple[Parameters]], tuple[Any, Any]]


def linearize(model: Module, params: Iterable[str] | Mapping[str, Tensor] | None = None) -> "TaylorExpansion":
    """Linearize a model in its parameters.

    f_lin(θ, x) = f(θ0, x) + J(x) (θ - θ0), with θ0 the parameters now.

    Args:
        model: Any module whose forward pass draws no random numbers. It is copied: what happens to it later, training
            included, does not move the expansion point.
        params: See :func:`taylor_expand`.

    Returns:
        ``f_lin(new_params, x)``, which returns ``[N, *out]``; see :class:`TaylorExpansion`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a parameter does not exist or a value is not accepted.
    """
    return TaylorExpansion(model, 1, params)


def taylor_expand(
    model: Module, degree: int, params: Iterable[str] | Mapping[str, Tensor] | None = None
) -> "TaylorExpansion":
    """Expand a model in its parameters, up to a degree.

    f_k(θ, x) = Σ_{j<=k} 1/j! D^j f(θ0, x)[(θ - θ0)^j], with θ0 the parameters now. The derivatives come from ``degree``
    nested jvps, so the cost of a call grows as 2^degree forward passes. From degree 2 on, normalisations are computed
    from elementary operations, since torch's own are wrong in nested derivatives.

    Args:
        model: Any module whose forward pass draws no random numbers. It is copied: what happens to it later, training
            included, does not move the expansion point.
        degree: The degree k; 0 for the model itself at θ0.
        params: Which parameters to expand in: their names, or a mapping from names to values, which are then the
            expansion point. The others are held constant. ``None`` for all, at the model's values.

    Returns:
        ``f_k(new_params, x)``, which returns ``[N, *out]``; see :class:`TaylorExpansion`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a parameter does not exist or a value is not accepted.
    """
    return TaylorExpansion(model, degree, params)


class TaylorExpansion:
    """A Taylor polynomial of a model in its parameters; call it as ``expansion(new_params, x)``.

    Attributes:
        degree: The degree of the polynomial.
        point: The expansion point θ0: the parameters expanded in, by name.
    """

    def __init__(self, model: Module, degree: int, params: Iterable[str] | Mapping[str, Tensor] | None = None) -> None:
        """Take a snapshot of the model.

        Args:
            model: The model.
            degree: The degree.
            params: The parameters to expand in.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(degree, bool) or not isinstance(degree, int):
            raise TypeError(f"degree must be an integer, got {type(degree).__name__}.")
        if degree < 0:
            raise ValueError(f"degree must not be negative, got {degree}.")
        self.degree = degree
        check_wrappers(model)
        self._model = _snapshot(eager(model))
        self._names = _first_names(self._model)
        self._params = self._choose(params)
        self._pushforward: Pushforward | None = None
        self._verified: set[tuple[int, ...]] = set()

    @property
    def point(self) -> Parameters:
        """The expansion point θ0: the parameters expanded in, by name."""
        return {name: p.detach() for name, p in self._params.items()}

    def __call__(self, new_params: Mapping[str, Tensor] | Module, x: Any) -> Tensor:
        """Evaluate the polynomial.

        Args:
            new_params: The parameters θ: a mapping like ``dict(model.named_parameters())``, in which those left out
                stay at θ0, or a model of the same architecture. Those not expanded in are not looked at.
            x: N samples: a tensor ``[N, ...]``, a tuple (the model is called as ``model(*x)``) or a mapping
                (``model(**x)``). They are constants: no gradient flows to them.

        Returns:
            ``[N, *out]``, in the dtype and on the device of the model's output, differentiable with respect to
            ``new_params``.

        Raises:
            UnsupportedModelError: If the model returns no tensor or draws random numbers, or if ``torch.func`` does
                not get its derivatives right. Calls inside of a ``torch.func`` transform do not look.
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        step = self._step(new_params)
        request = Request.parse(
            self._model, x, None, AxesRequest.parse("full"), params=None, per_parameter=False, transforms=True
        )
        request = replace(request, params={name: self._params[name] for name in step})
        records = torch.is_grad_enabled()
        # what is returned is differentiated outside of the session: no checkpoint may evaluate the model again there
        with isolated(self._model), differentiable(self.degree), without_checkpoints():
            if not is_transformed():
                self._verify(replace(request, params=self._params))
            with torch.set_grad_enabled(records):
                function = _derivatives(
                    lambda p: evaluate(request, p, request.x1), step, self.degree, self._pushforward or _forward_mode
                )
                terms = function(primals_of(request))
                return torch.stack([term / math.factorial(j) for j, term in enumerate(terms)]).sum(0)

    def _verify(self, request: Request) -> None:
        """Make sure that derivatives are right, at each sample that comes for the first time."""
        fingerprints = _fingerprints(request.x1)
        new = [i for i, fingerprint in enumerate(fingerprints) if fingerprint not in self._verified]
        if not new:
            return
        inputs = request.x1 if len(new) == len(fingerprints) else request.x1[new]
        if self._pushforward is None or not _is_right(request, inputs, self._pushforward, self.degree):
            self._pushforward = _find_pushforward(request, self.degree)
            self._verified.clear()
        self._verified.update(fingerprints)

    def _choose(self, params: Iterable[str] | Mapping[str, Tensor] | None) -> Parameters:
        """Look up the parameters to expand in, and move the snapshot to where they are wanted."""
        known = dict(self._model.named_parameters())
        if params is None:
            chosen = {name: p for name, p in known.items() if p.is_floating_point()}
            if not chosen:
                raise ValueError("model has no parameters to expand in.")
        else:
            if isinstance(params, str) or not isinstance(params, Iterable):
                raise TypeError(
                    "params must be an iterable of parameter names or a mapping from names to tensors, "
                    f"got {type(params).__name__}."
                )
            names = [self._first_name("params", name) for name in params]
            if not names:
                raise ValueError("params is empty: name at least one parameter, or pass None for all.")
            chosen = {name: known[name] for name in names}
        if isinstance(params, Mapping):
            for name, value in params.items():
                with torch.no_grad():
                    target = chosen[self._first_name("params", name)]
                    target.copy_(_checked("params", name, value, target))
        return {name: p.requires_grad_() for name, p in chosen.items()}

    def _step(self, new_params: Mapping[str, Tensor] | Module) -> Parameters:
        """Compute the step away from the expansion point."""
        if isinstance(new_params, Module):
            with alone_with(new_params):
                new_params = dict(new_params.named_parameters())
        if not isinstance(new_params, Mapping):
            raise TypeError(
                "new_params must be a mapping from parameter names to tensors, say dict(model.named_parameters()), or "
                f"a model of the same architecture, got {type(new_params).__name__}."
            )
        given: Parameters = {}
        for name, value in new_params.items():
            first = self._first_name("new_params", name)
            if first not in self._params:
                continue
            if first in given and given[first] is not value:
                raise ValueError(
                    f"new_params gives {name!r} twice, also as {first!r}, which is tied to it: leave one out."
                )
            given[first] = _checked("new_params", name, value, self._params[first])
        if not given:
            raise ValueError(f"new_params holds none of the parameters expanded in: {', '.join(self._params)}.")
        return {name: value - self._params[name].detach() for name, value in given.items()}

    def _first_name(self, argument: str, name: Any) -> str:
        """Look up a parameter."""
        plain = name.removeprefix(_COMPILED) if isinstance(name, str) else name
        if plain not in self._names:
            raise ValueError(
                f"{argument} names {name!r}, which the model does not have. It has: {', '.join(self._names)}."
            )
        return self._names[plain]


def _snapshot(model: Module) -> Module:
    """Copy a model as the function it is now."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    with torch.inference_mode(False), torch.no_grad(), alone_with(model):
        # deepcopy refuses results of an earlier forward pass that a module holds on to
        memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}
        snapshot = copy.deepcopy(model, memo)
    for module in snapshot.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return snapshot


def _first_names(model: Module) -> dict[str, str]:
    """Map the names of each parameter to the first of them."""
    firsts = {id(p): name for name, p in model.named_parameters()}
    return {name: firsts[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _checked(argument: str, name: str, value: Any, parameter: Tensor) -> Tensor:
    """Check a value of a parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}[{name!r}] must be a tensor, got {type(value).__name__}.")
    for what in ("shape", "dtype", "device"):
        expected, actual = getattr(parameter, what), getattr(value, what)
        if expected != actual:
            shown = (list(expected), list(actual)) if what == "shape" else (expected, actual)
            raise ValueError(f"{argument}[{name!r}] must have the {what} of the parameter: {shown[0]}, got {shown[1]}.")
    return value


def _derivatives(
    function: Callable[[Parameters], Tensor], step: Parameters, degree: int, pushforward: Pushforward
) -> Callable[..., Any]:
    """Differentiate along a step, again and again."""
    if degree == 0:
        return lambda point: (function(point),)
    lower = _derivatives(function, step, degree - 1, pushforward)

    def derivatives(point: Parameters) -> tuple[Tensor, ...]:
        values, slopes = pushforward(lower, (point,), (step,))
        return (*values, slopes[-1])

    return derivatives


def _forward_mode(
    function: Callable[..., Any], primals: tuple[Parameters], tangents: tuple[Parameters]
) -> tuple[Any, Any]:
    """Differentiate along a direction in forward mode."""
    values, slopes, *_ = jvp(function, primals, tangents)
    return values, slopes


def _double_vjp(
    function: Callable[..., Any], primals: tuple[Parameters], tangents: tuple[Parameters]
) -> tuple[Any, Any]:
    """Differentiate along a direction in reverse mode, twice: the pullback is linear, and its own pullback is the jvp.

    Args:
        function: Takes parameters, returns a tensor or a tuple of tensors.
        primals: The parameters.
        tangents: The direction.

    Returns:
        The function's value and its derivative along the direction.
    """
    values, pullback, *_ = vjp(function, *primals)
    _, pushforward, *_ = vjp(pullback, tree_map(torch.zeros_like, values))
    return values, pushforward(tangents)[0]


def _fingerprints(inputs: Inputs) -> list[tuple[int, ...]]:
    """Sum the bits of each sample, in words, with random weights: a sample that differs has another sum."""
    sums = []
    for x in inputs.tensors.values():
        rows = x.detach().reshape(len(x), -1).contiguous()
        word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.uint8) if not rows.itemsize % w.itemsize)
        words = (torch.view_as_real(rows) if rows.is_complex() else rows).view(word).reshape(len(x), -1).long()
        sums.append((words * _weights(words.shape[1], words.device)).sum(1))
    return [tuple(row) for row in torch.stack(sums, dim=1).tolist()]


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    """Draw odd numbers of 64 bits."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        return (torch.randint(-(2**62), 2**62, (count,), generator=generator, device="cpu") * 2 + 1).to(device)


def _find_pushforward(request: Request, degree: int) -> Pushforward:
    """Find a way to differentiate a model along a direction that gets it right."""
    # Forward mode ignores ``torch.no_grad()``, and does not know all operations. Neither way reaches parameters that a
    # model uses past its modules.
    with without(_KIND):
        output = evaluate(request, None, request.x1, inspect=True)
    if not isinstance(output, Tensor):
        what = f"it returns {type(output).__name__}, not a tensor"
        raise UnsupportedModelError([Problem("", what, "Wrap it in a module that returns one")], _KIND)
    for pushforward in (_forward_mode, _double_vjp):
        if _is_right(request, request.x1, pushforward, degree):
            return pushforward
    what = "torch.func does not get its derivatives right"
    remedy = (
        "Look for parameters that its forward pass uses past the modules that hold them, custom autograd functions and "
        "fused operations"
    )
    raise UnsupportedModelError([Problem("", what, remedy)], _KIND)


def _is_right(request: Request, inputs: Inputs, pushforward: Pushforward, degree: int) -> bool:
    """Tell whether a way to differentiate is right at some samples."""
    try:
        return _agrees_with_autograd(request, inputs, pushforward) and (
            degree < 2 or _derivatives_commute(request, inputs, pushforward)
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False


def _agrees_with_autograd(request: Request, inputs: Inputs, pushforward: Pushforward) -> bool:
    """Tell whether a model's derivative along a direction is that of plain autograd, in the sum over samples."""
    output = evaluate(request, None, inputs)
    v = cotangent(output, seed=0)
    direction = {name: cotangent(p, seed=1) for name, p in request.params.items()}
    gradient = gradients_of(output, v, request.params)
    slope = pushforward(lambda p: evaluate(request, p, inputs), (primals_of(request),), (direction,))[1]

    def along(gradient: Parameters) -> float:
        return math.fsum(read([(g * direction[name]).sum(dtype=torch.float64) for name, g in gradient.items()]))

    error = abs((v * slope).sum(dtype=torch.float64).item() - along(gradient))
    differs = Difference(error, total_norm(gradient.values()))
    if differs.within(probe_tolerance(output)):
        return True
    moved = [gradients(request, inputs, v, leaves_of(request, jitter), jitter=jitter)[1] for jitter in (None, 0)]
    seen = abs(along(moved[0]) - along(moved[1]))  # what rounding does, to deep networks
    return differs.explained_by(seen) and differs.within(KINKS)


def _derivatives_commute(request: Request, inputs: Inputs, pushforward: Pushforward) -> bool:
    """Tell whether second derivatives along two random directions are the same in both orders."""
    # They are not where torch loses a term of a nested derivative.
    u, v = ({name: cotangent(p, seed) for name, p in primals_of(request).items()} for seed in (0, 1))

    def second_derivative(inner: Parameters, outer: Parameters) -> Tensor:
        def slope(point: Parameters) -> Any:
            return pushforward(lambda p: evaluate(request, p, inputs), (point,), (inner,))[1]

        result: Tensor = pushforward(slope, (primals_of(request),), (outer,))[1]
        return result

    one, other = second_derivative(u, v), second_derivative(v, u)
    return Difference(*norms([one - other, one])).within(math.sqrt(torch.finfo(one.dtype).eps))
