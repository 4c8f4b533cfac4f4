"""Networks expanded in their parameters: the linearization, and Taylor polynomials of any degree.

The linearization ``f(θ0, x) + J(x) (θ - θ0)`` is the model whose training the NTK at ``θ0`` describes (Lee, Xiao,
Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington: "Wide Neural Networks of Any Depth Evolve as Linear Models Under
Gradient Descent", NeurIPS 2019, section 2.2). Directional derivatives come from nested ``torch.func.jvp``.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ggn_ntk.linearization.derivatives import (
    Parameters,
    Pushforward,
    derivatives_along,
    find_pushforward,
    fingerprints,
    forward_mode,
    is_right,
)
from ggn_ntk.linearization.elementary_ops import differentiable
from ggn_ntk.models.evaluation import evaluate, primals_of
from ggn_ntk.models.isolation import isolated
from ggn_ntk.problem.functions import Model, Params, as_module, own_parameters
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request, check_picks, check_wrappers
from ggn_ntk.problem.selection import selected
from ggn_ntk.process.switches import without_checkpoints
from ggn_ntk.process.torch_internals import COMPILED_PREFIX, backward_hooks, named_leaves, uncompiled
from ggn_ntk.process.transforms import is_transformed
from ggn_ntk.process.turns import alone_with


def linearize(
    model: Model,
    params: Params | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> "TaylorExpansion":
    """Linearize a model in its parameters.

    f_lin(θ, x) = f(θ0, x) + J(x) (θ - θ0), with θ0 the parameters now.

    Args:
        model: Any module whose forward pass draws no random numbers. It is copied: what happens to it later, training
            included, does not move the expansion point. Or a function, as for :func:`ggn_ntk.empirical_ntk`, of which
            the parameters are copied, but nothing else that it refers to.
        params: See :func:`taylor_expand`.
        output: Turns what the model returns into the tensor ``[N, *out]`` to linearize, say ``lambda out: out.logits``.

    Returns:
        ``f_lin(new_params, x)``, which returns ``[N, *out]``; see :class:`TaylorExpansion`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a parameter does not exist or a value is not accepted.
    """
    return TaylorExpansion(model, 1, params, output=output)


def taylor_expand(
    model: Model,
    degree: int,
    params: Params | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> "TaylorExpansion":
    """Expand a model in its parameters, up to a degree.

    f_k(θ, x) = Σ_{j<=k} 1/j! D^j f(θ0, x)[(θ - θ0)^j], with θ0 the parameters now. The derivatives come from ``degree``
    nested jvps, so the cost of a call grows as 2^degree forward passes. From degree 2 on, normalisations are computed
    from elementary operations, since torch's own are wrong in nested derivatives.

    Args:
        model: Any module whose forward pass draws no random numbers. It is copied: what happens to it later, training
            included, does not move the expansion point. Or a function, as for :func:`ggn_ntk.empirical_ntk`, of which
            the parameters are copied, but nothing else that it refers to.
        degree: The degree k; 0 for the model itself at θ0.
        params: Which parameters to expand in: an entry, or several, each a name, a glob or the dotted name of a module,
            as for :func:`ggn_ntk.empirical_ntk` but with frozen ones; or a mapping from names to values, which are then
            the expansion point. The others are held constant. ``None`` for all, at the model's values. For a function
            the mapping that is its first argument.
        output: Turns what the model returns into the tensor ``[N, *out]`` to expand, say ``lambda out: out.logits``.

    Returns:
        ``f_k(new_params, x)``, which returns ``[N, *out]``; see :class:`TaylorExpansion`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a parameter does not exist or a value is not accepted.
    """
    return TaylorExpansion(model, degree, params, output=output)


class TaylorExpansion:
    """A Taylor polynomial of a model in its parameters; call it as ``expansion(new_params, x)``.

    Attributes:
        degree: The degree of the polynomial.
        point: The expansion point θ0: the parameters expanded in, by name.
    """

    def __init__(
        self,
        model: Model,
        degree: int,
        params: Params | None = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Take a snapshot of the model.

        Args:
            model: The model.
            degree: The degree.
            params: The parameters to expand in.
            output: Turns what the model returns into the tensor to expand.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        if isinstance(degree, bool) or not isinstance(degree, int):
            raise TypeError(f"degree must be an integer, got {type(degree).__name__}.")
        if degree < 0:
            raise ValueError(f"degree must not be negative, got {degree}.")
        self.degree = degree
        check_picks(output)
        if isinstance(model, Module):
            check_wrappers(model)
            self._model = _snapshot(uncompiled(model))
        else:
            self._model, params = _snapshot_of_function(model, params), None
        self._names = _first_names(self._model)
        self._params = self._choose(params)
        self._output = output
        self._pushforward: Pushforward | None = None  # the one that gets the samples right that were looked at
        self._verified: set[tuple[Any, ...]] = set()  # fingerprints of these samples

    @property
    def point(self) -> Parameters:
        """The expansion point θ0: the parameters expanded in, by name."""
        return {name: p.detach() for name, p in self._params.items()}

    def __call__(self, new_params: Mapping[str, Tensor] | Module, x: Any) -> Tensor:
        """Evaluate the polynomial.

        Args:
            new_params: The parameters θ: a mapping like ``dict(model.named_parameters())``, in which those left out
                stay at θ0, or a model of the same architecture. Those not expanded in are not looked at. Of a function,
                a mapping like the one that it was expanded at, nested or by names such as ``"layers.0.weight"``.
            x: N samples ``[N, ...]``, as for :func:`ggn_ntk.empirical_ntk`. They are constants: no gradient flows to
                them, and one that requires a gradient is refused.

        Returns:
            ``[N, *out]``, in the dtype and on the device of the model's output, differentiable with respect to
            ``new_params``.

        Raises:
            UnsupportedModelError: If neither the model nor ``output`` returns a tensor, if it draws random numbers, or
                if ``torch.func`` does not get its derivatives right. Calls inside of a ``torch.func`` transform do not
                look.
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument has a value that is not accepted.
        """
        step = self._step(new_params)
        axes, output = AxesRequest.parse("full"), self._output
        request = Request.parse(
            self._model, x, None, axes, params=None, per_parameter=False, output=output, transforms=True
        )
        request = replace(request, params={name: self._params[name] for name in step})
        records = torch.is_grad_enabled()
        # what is returned is differentiated outside of the session: no checkpoint may evaluate the model again there
        with isolated(self._model), differentiable(self.degree), without_checkpoints():
            if not is_transformed():
                self._verify(replace(request, params=self._params))
            with torch.set_grad_enabled(records):
                function = derivatives_along(
                    lambda p: evaluate(request, p, request.x1), step, self.degree, self._pushforward or forward_mode
                )
                terms = function(primals_of(request))
                return torch.stack([term / math.factorial(j) for j, term in enumerate(terms)]).sum(0)

    def _verify(self, request: Request) -> None:
        """Make sure that derivatives are right at each sample that comes for the first time."""
        seen = fingerprints(request.x1)
        new = [i for i, fingerprint in enumerate(seen) if fingerprint not in self._verified]
        if not new:
            return
        inputs = request.x1 if len(new) == len(seen) else request.x1[new]
        if self._pushforward is None or not is_right(request, inputs, self._pushforward, self.degree):
            self._pushforward = find_pushforward(request, self.degree)  # at all samples of this call
            self._verified.clear()  # earlier samples were looked at with another pushforward
        self._verified.update(seen)

    def _choose(self, params: Params | None) -> Parameters:
        """Look up the parameters to expand in, and put the values that are given into the snapshot."""
        known = own_parameters(self._model)
        if params is None:
            chosen = {name: p for name, p in known.items() if p.is_floating_point()}
            if not chosen:
                raise ValueError("model has no parameters to expand in.")
        else:
            given = [params] if isinstance(params, str) else params
            plain = map(_plain, given) if isinstance(given, Iterable) else given
            names = [self._names[name] for _, found in selected(plain, self._names) for name in found]
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
        """Compute the step θ - θ0 of the parameters that are given, by their first names."""
        if isinstance(new_params, Module):
            with alone_with(new_params):
                new_params = dict(new_params.named_parameters())
        if not isinstance(new_params, Mapping):
            raise TypeError(
                "new_params must be a mapping from parameter names to tensors, say dict(model.named_parameters()), or "
                f"a model of the same architecture, got {type(new_params).__name__}."
            )
        given: Parameters = {}
        for name, value in named_leaves(dict(new_params))[0]:
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
        """Look up the first name of a parameter."""
        plain = _plain(name)
        if plain not in self._names:
            raise ValueError(
                f"{argument} names {name!r}, which the model does not have. It has: {', '.join(self._names)}."
            )
        return self._names[plain]


def _plain(name: Any) -> Any:
    """Leave out of a name what compiling puts before it."""
    return name.removeprefix(COMPILED_PREFIX) if isinstance(name, str) else name


def _snapshot(model: Module) -> Module:
    """Copy a model without its backward hooks."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    with torch.inference_mode(False), torch.no_grad(), alone_with(model):
        # deepcopy refuses results of an earlier forward pass that a module holds on to
        memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}
        snapshot = copy.deepcopy(model, memo)
    for module in snapshot.modules():
        for hooks in backward_hooks(module):
            hooks.clear()
    return snapshot


def _snapshot_of_function(function: Model, params: Any) -> Module:
    """Take a function with copies of its parameters; what it refers to itself is not copied."""
    model = as_module(function, params)
    for p in own_parameters(model).values():
        p.data = p.detach().clone()
    return model


def _first_names(model: Module) -> dict[str, str]:
    """Map the names of each parameter to the first of them."""
    firsts = {id(p): name for name, p in own_parameters(model).items()}
    return {name: firsts[id(p)] for name, p in own_parameters(model, remove_duplicate=False).items()}


def _checked(argument: str, name: str, value: Any, parameter: Tensor) -> Tensor:
    """Refuse a value that is not like the parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}[{name!r}] must be a tensor, got {type(value).__name__}.")
    for what in ("shape", "dtype", "device"):
        expected, actual = getattr(parameter, what), getattr(value, what)
        if expected != actual:
            shown = (list(expected), list(actual)) if what == "shape" else (expected, actual)
            raise ValueError(f"{argument}[{name!r}] must have the {what} of the parameter: {shown[0]}, got {shown[1]}.")
    return value
