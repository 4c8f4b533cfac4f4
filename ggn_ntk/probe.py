"""The probe: no rule, no capture is trusted.

For numbers v, ``sum v[n, c] J[c, n]`` from the Jacobians that rules write must be autograd's gradient of
``sum v[n, c] f[n, c]``. It is compared, parameter by parameter,

- on a few samples, each by itself: is each rule right, and is every use of a parameter the call of a layer with one?
- where layers were recorded in an arbitrary model, on all samples at once, with v that differ from sample to sample: is
  the axis of the samples found, also where a mask or a view has moved them?
- between the two, the Jacobians that are contracted, of these few samples among all: do samples leave one another
  alone, and did ``s`` pass back right?

In the first two, both sides come from one forward pass, so that they differ by rounding alone. In the third, rounding
may take a unit to the other side of a kink, so a difference must show in several draws.
"""

import math
import string
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Size, Tensor

from ggn_ntk.capture import Call, Layout, Recording, locate, record, used_elsewhere
from ggn_ntk.checks import (
    TRIES,
    UnsupportedModelError,
    cotangent,
    gradient_error,
    gradients_agree,
    is_out_of_memory,
    output_problem,
    probe_tolerance,
    relative_error,
    total_norm,
)
from ggn_ntk.doubling import select_samples
from ggn_ntk.request import Request
from ggn_ntk.rules import Factored, OneHot
from ggn_ntk.way_back import pass_back

# How many samples are evaluated by themselves: at most so many, and one of so many.
_PROBED, _SHARE = 3, 16

# Gradients of large parameters are compared by their products with a few random vectors, and of fewer samples: to write
# and read them in full, several times, would take as long as the kernel of a fully-connected network. How many vectors;
# how many entries are many for a parameter, and for all of them times the samples.
_VECTORS, _LARGE, _LARGE_IN_ALL = 8, 2**16, 2**22

_DIFFERS = "its Jacobian by the layer's rule differs from autograd's (relative error {:.1e})"


def try_rules(request: Request, recording: Recording, v: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Compare rules with autograd on one sample.

    Args:
        request: The request.
        recording: A forward pass of one sample.
        v: Numbers like its output, ``[1, *out]``.

    Returns:
        Autograd's gradient of ``sum v f`` for each wanted parameter (see :func:`sketched`), and why rules do not give
        it where they do not, by name.
    """
    tolerance = probe_tolerance(recording.output)
    failures = _used_elsewhere(request, recording)
    passed, gradients = _gradients(request, recording, v)
    actual: dict[str, Tensor] = {}
    for call, s in zip(recording.calls, passed, strict=True):
        try:
            jacobians = {} if s is None else _jacobians(call, s.unsqueeze(0), 1)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failures |= dict.fromkeys(call.params.values(), f"the rule of {type(call.module).__name__} fails ({error})")
            continue
        for name, jacobian in jacobians.items():
            product = weighted_sum(jacobian, v.new_ones(1, 1), request.params[name])
            actual[name] = actual[name] + product if name in actual else product
        missing = (name for name in call.params.values() if name not in jacobians and s is not None)
        failures |= dict.fromkeys(missing, f"the rule of {type(call.module).__name__} does not state its Jacobian")
    for name, size in errors(actual, gradients, tolerance).items():
        failures.setdefault(name, _DIFFERS.format(size))
    return gradients, failures


def find_samples(request: Request, recording: Recording) -> tuple[list[Call], dict[str, str]]:
    """Check, on all samples, that calls tell samples apart, and that no use of a parameter is missing.

    The gradients of ``sum r[n] t[c] f[n, c]`` and of ``sum t[c] f[n, c]`` with respect to a layer's output differ by
    the factors r[n] along the axis of the samples, but not where samples influence one another behind the layer.

    Args:
        request: The request.
        recording: A forward pass of N samples.

    Returns:
        The calls on which the output depends, and why calls do not give the Jacobian of a parameter where they do
        not, by name.
    """
    output, n = recording.output, len(recording.output)
    failures = _used_elsewhere(request, recording)
    t, r = cotangent(output[:1], seed=0), cotangent(output.new_empty(n), seed=1)
    tolerance = probe_tolerance(output)
    same, weighted = (
        pass_back(output, recording.calls, v)[0] for v in (t.expand_as(output), r.reshape(-1, *[1] * (t.ndim - 1)) * t)
    )
    largest = max((total_norm([w]) for w in weighted if w is not None), default=0.0)
    calls = []
    for call, s, w in zip(recording.calls, same, weighted, strict=True):
        if s is None or w is None:
            continue
        calls.append(call)
        if call.axis is None:
            error = float("inf")
        else:
            rows = r.repeat_interleave(call.rows).reshape(-1, *[1] * (s.ndim - 1 - call.axis))
            error = gradient_error(s * rows, w, largest)
        if not error <= tolerance:
            what = f"samples are not told apart in an output {list(call.shape)} of its layer"
            failures |= dict.fromkeys(call.params.values(), what)
    return calls, failures


def _used_elsewhere(request: Request, recording: Recording) -> dict[str, str]:
    """Find the parameters that are used outside of recorded calls.

    Args:
        request: The request.
        recording: A forward pass.

    Returns:
        What is the matter with them, by name.
    """
    elsewhere = used_elsewhere(recording)
    owners = {id(p): module for module in request.model.modules() for p in module.parameters(recurse=False)}
    found = {}
    for name, p in request.params.items():
        if id(p) in elsewhere:
            owner = owners[id(p)]
            has_rule = any(name in call.params.values() for call in recording.calls)
            kind = type(owner).__name__
            found[name] = f"{kind} has no rule" if not has_rule else f"it is also used outside of a call of {kind}"
    return found


def _jacobians(call: Call, s: Tensor, n: int) -> dict[str, Factored]:
    """Write the Jacobians of a call, and check that they are over N samples.

    Args:
        call: The call.
        s: ``[C, *output]``.
        n: The number of samples N.

    Returns:
        The Jacobians by name.

    Raises:
        ValueError: If they are not.
    """
    if call.axis is None:
        raise ValueError(f"samples are not an axis of its output of shape {list(call.shape)}")
    jacobians = call.jacobians(s)
    for jacobian in jacobians.values():
        if jacobian.sizes["n"] != n:
            raise ValueError(f"its Jacobian is over {jacobian.sizes['n']} samples instead of {n}")
    return jacobians


def _gradients(request: Request, recording: Recording, v: Tensor) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Compute gradients in a graph that is kept.

    Args:
        request: The request.
        recording: A forward pass.
        v: Numbers like its output.

    Returns:
        The gradients of ``sum v f`` with respect to the outputs of calls, and, :func:`sketched`, to wanted parameters,
        by name.
    """
    passed, found = pass_back(recording.output, recording.calls, v, list(request.params.values()))
    gradients = zip(request.params.items(), found, strict=True)
    return passed, {name: sketched(torch.zeros_like(p) if g is None else g, p) for (name, p), g in gradients}


def _vectors(param: Tensor) -> Tensor | None:
    """Draw the vectors that a gradient is multiplied by.

    Args:
        param: The parameter.

    Returns:
        ``[V, last axis of the parameter]``, always the same ones; ``None`` where its gradient is compared in full.
    """
    if param.ndim < 2 or param.numel() < _LARGE or param.shape[-1] <= _VECTORS:
        return None
    return _random_vectors(param.shape[-1], param.dtype, param.device)


@lru_cache(maxsize=64)
def _random_vectors(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw vectors.

    Args:
        size: Their length.
        dtype: Their dtype.
        device: Their device.

    Returns:
        ``[V, size]``.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randn(_VECTORS, size, generator=generator, dtype=torch.float64).to(device, dtype)


def sketched(gradient: Tensor, param: Tensor) -> Tensor:
    """Multiply the rows of a large gradient with random vectors.

    A difference of two gradients is as large, relative to them, after as before, but for a factor that is far from one
    only with a small probability.

    Args:
        gradient: A gradient with as many entries as the parameter.
        param: The parameter.

    Returns:
        The products, or the gradient of a small parameter, flattened.
    """
    vectors = _vectors(param)
    if vectors is None:
        return gradient.flatten()
    return (vectors.to(gradient) @ gradient.reshape(-1, vectors.shape[1]).T).flatten()  # faster than its transpose


def weighted_sum(jacobian: Factored, weights: Tensor, param: Tensor) -> Tensor:
    """Compute ``sum_cn v[c, n] J[c, n]``, :func:`sketched`.

    Args:
        jacobian: The Jacobian.
        weights: The numbers v, ``[C, N]``.
        param: The parameter.

    Returns:
        The products with random vectors, or ``[P]`` for a small parameter with P entries.
    """
    vectors = _vectors(param)
    shorter = None if vectors is None else _multiply_last_axis(jacobian, vectors)
    if shorter is None:
        return sketched(_weighted_sum(jacobian, weights), param)
    return _weighted_sum(shorter, weights)


def _multiply_last_axis(jacobian: Factored, vectors: Tensor) -> Factored | None:
    """Multiply the rows of a parameter's Jacobian with vectors, where this is for one operand alone to do.

    Args:
        jacobian: The Jacobian.
        vectors: ``[V, last axis of the parameter]``.

    Returns:
        The products, with V in front of the parameter's axes; ``None`` where several operands have the last axis, where
        it is split or one-hot, and where its operand is over outputs: that is summed over these first.
    """
    last, terms, operands = jacobian.result[-1], jacobian.terms, list(jacobian.operands)
    places = [i for i, term in enumerate(terms) if last in term]
    if len(places) != 1:
        return None
    (place,) = places
    term, operand = terms[place], operands[place]
    if "c" in term or jacobian.sizes[last] != vectors.shape[1] or not isinstance(operand, Tensor):
        return None
    new = next(letter for letter in string.ascii_letters if letter not in jacobian.equation)
    terms[place] = term.replace(last, new)
    operands[place] = torch.einsum(f"{term},{new}{last}->{terms[place]}", operand, vectors.to(operand.dtype))
    return Factored(f"{','.join(terms)}->cn{new}{jacobian.result[2:-1]}", tuple(operands))


def _weighted_sum(jacobian: Factored, weights: Tensor) -> Tensor:
    """Compute ``sum_cn v[c, n] J[c, n]``.

    Args:
        jacobian: The Jacobian.
        weights: The numbers v, ``[C, N]``.

    Returns:
        ``[P]`` for a parameter with P entries.
    """
    weights = weights.to(next(o.dtype for o in jacobian.operands if isinstance(o, Tensor)))
    result, operands = jacobian.result[2:], list(zip(jacobian.terms, jacobian.operands, strict=True))
    one_hot = [(term, operand) for term, operand in operands if isinstance(operand, OneHot)]
    dense = [(term, operand) for term, operand in operands if isinstance(operand, Tensor)]
    if sum("c" in term for term, _ in dense) == 1:  # the weights first: what is left has no outputs
        term, s = dense.pop(next(i for i, (term, _) in enumerate(dense) if "c" in term))
        n = "n" if any("n" in other for other, _ in (*dense, *one_hot)) else ""
        summed = "".join(letter for letter in term if letter not in "cn") + n
        dense.insert(0, (summed, torch.einsum(f"{term},cn->{summed}", s, weights)))
    else:
        dense.append(("cn", weights))
    terms, tensors = zip(*dense, strict=True)
    if not one_hot:
        return torch.einsum(f"{','.join(terms)}->{result}", *tensors).flatten()
    ((term, vectors),) = one_hot
    places, rest = term[:-1], result.replace(term[-1], "")
    letters = places + "".join(letter for letter in rest if letter not in places)
    return _scatter(torch.einsum(f"{','.join(terms)}->{letters}", *tensors), letters, term, vectors, result)


def _scatter(values: Tensor, letters: str, term: str, vectors: OneHot, result: str) -> Tensor:
    """Multiply by one-hot vectors, and sum over their places.

    Args:
        values: What to multiply.
        letters: A letter for each axis: those of the places, and those of the result but for the vectors' own.
        term: The letters of the vectors.
        vectors: The vectors.
        result: The letters of the result.

    Returns:
        The flattened result.
    """
    sizes = dict(zip(letters, values.shape, strict=True)) | {term[-1]: vectors.size}
    known = vectors.places.reshape(*vectors.places.shape, *[1] * (values.ndim - vectors.places.ndim))
    index = torch.zeros_like(values, dtype=torch.long)
    for letter in result:
        along = known.clamp(min=0)
        if letter in letters:
            along = torch.arange(sizes[letter], device=index.device)
            along = along.view([-1 if other == letter else 1 for other in letters])
        index = index * sizes[letter] + along
    flat = values.new_zeros(math.prod(sizes[letter] for letter in result))
    return flat.index_add_(0, index.flatten(), (values * (known >= 0)).flatten())


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Find gradients that are off by more than rounding.

    Args:
        actual: Gradients by name, flattened; those that are missing are zero.
        expected: What they should be.
        tolerance: The largest relative error that rounding makes.

    Returns:
        The relative errors that are too large, by name.
    """
    total = total_norm(expected.values())
    found = {}
    for name, gradient in expected.items():
        flat = gradient.flatten()
        given = actual.get(name, torch.zeros_like(flat))
        error = gradient_error(given, flat, total) if given.shape == flat.shape else float("inf")
        if not error <= tolerance:
            found[name] = error
    return found


def _choose(n: int, count: int, seed: int) -> list[int]:
    """Choose samples, neither the first nor the last of more than two.

    What a model makes of all samples with the help of one of them, say of ``x[:1]``, shows at the others alone.

    Args:
        n: The number of samples.
        count: How many to choose of more than two; of two, both are.
        seed: Decides on the choice.

    Returns:
        The samples.
    """
    if n <= 2:
        return list(range(n))
    order = torch.randperm(n - 2, generator=torch.Generator().manual_seed(seed), device="cpu") + 1
    return order[:count].tolist()


class Probe:
    """A few samples, each by itself: what the Jacobians that a capture yields are compared with.

    Attributes:
        recordings: A forward pass of each, until rules were tried.
    """

    def __init__(self, request: Request, seed: int) -> None:
        """Evaluate the samples.

        Args:
            request: The request.
            seed: Decides on the samples and on v.

        Raises:
            UnsupportedModelError: If the output cannot be differentiated.
        """
        self._request, inputs = request, request.x1.stack(request.x2)
        entries = sum(p.numel() for p in request.params.values())
        count = max(1, min(_PROBED, len(inputs) // _SHARE, _LARGE_IN_ALL // max(1, entries)))
        self._samples = _choose(len(inputs), count, seed)
        self.recordings = [record(request, inputs[[sample]]) for sample in self._samples]
        for recording in self.recordings:
            problem = output_problem(recording.output, recording.deterministic, 1)
            if problem is not None:
                raise UnsupportedModelError([problem])
        outputs = [recording.output for recording in self.recordings]
        self._outputs, self._tolerance = torch.cat(outputs).detach(), probe_tolerance(outputs[0])
        self._v = torch.cat([cotangent(outputs[0], seed=TRIES * sample + seed) for sample in self._samples])
        self._weights = self._v.reshape(len(self._samples), -1).T
        self._actual: dict[str, Tensor] = {}

    @property
    def out_shape(self) -> Size:
        """Shape of the output of one sample."""
        return self._outputs.shape[1:]

    def try_rules(self, layouts: Sequence[Layout] | None) -> dict[str, str]:
        """Try the rules on the samples. This frees their recordings, so it works once.

        Args:
            layouts: Where the samples are in each call of a layer; ``None``: in front.

        Returns:
            Why rules do not give the Jacobian of a parameter, by name.
        """
        tried = [
            try_rules(self._request, locate(recording, layouts), v)
            for recording, v in zip(self.recordings, self._v.split(1), strict=True)
        ]
        self.recordings.clear()
        self._expected = {name: torch.stack([g[name] for g, _ in tried]).sum(0) for name in self._request.params}
        return {name: why for _, failures in tried for name, why in failures.items()}

    def agrees_in_batch(self, output: Tensor) -> bool:
        """Compare gradients of the samples' outputs among others and by themselves.

        Args:
            output: The outputs ``[N, *out]`` of all samples, in a graph.

        Returns:
            Whether they are equal but for rounding.
        """
        if not output.requires_grad:
            return True
        params = self._request.params
        found = torch.autograd.grad(
            output[self._samples],
            list(params.values()),
            self._v,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        together = {name: sketched(g, p) for (name, p), g in zip(params.items(), found, strict=True)}
        return gradients_agree(together, self._expected, self._tolerance)

    def outputs_agree(self, output: Tensor) -> bool:
        """Compare outputs of the samples among others and by themselves.

        Args:
            output: The outputs ``[N, *out]`` of all samples.

        Returns:
            Whether they are equal but for rounding.
        """
        return relative_error(output[self._samples], self._outputs) <= self._tolerance

    def begin(self, outputs: Tensor) -> None:
        """Start on some outputs.

        Args:
            outputs: Where they are in ``[*out]``, flattened. Those that have been there are not counted again.
        """
        self._piece = self._weights[outputs]
        self._weights = self._weights.index_fill(0, outputs, 0)

    def add(self, jacobians: dict[str, Factored]) -> None:
        """Take down one use of a layer.

        Args:
            jacobians: The Jacobian of each wanted parameter, over all samples, by name.
        """
        for name, jacobian in jacobians.items():
            product = weighted_sum(select_samples(jacobian, self._samples), self._piece, self._request.params[name])
            self._actual[name] = self._actual[name] + product if name in self._actual else product

    def judge(self) -> dict[str, str]:
        """Compare what was taken down.

        Returns:
            Why a Jacobian is wrong, for those parameters for which it is, by name.
        """
        return {
            name: _DIFFERS.format(error)
            for name, error in errors(self._actual, self._expected, self._tolerance).items()
        }
