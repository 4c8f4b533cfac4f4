"""The probe: no rule, no capture is trusted.

For numbers v, ``sum v[n, c] J[c, n]`` from the Jacobians that rules write must be autograd's gradient of
``sum v[n, c] f[n, c]``. It is compared, parameter by parameter,

- on a few samples, each by itself: is each rule right, and is every use of a parameter the call of a layer with one?
- on the Jacobians that are contracted, of all samples: do rules hold for each of them, is the axis of the samples
  found, did ``s`` pass back right, and do samples leave one another alone? Autograd's side comes from the samples in
  two halves (:mod:`ggn_ntk.models.independence`). Where all layers are known to act on each sample by itself, and
  nothing but torch and this library runs between them, a few samples stand for all: the rest would take up to half of
  the kernel's time.

In the first, both sides come from one forward pass, so that they differ by rounding alone. In the second, rounding may
take a unit to the other side of a kink; what differs is compared once more with a gradient from a batch of all samples.
"""

from collections.abc import Container, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.contraction.factored import Factored
from ggn_ntk.contraction.vector_products import norm_of_sketch, sketched, sketched_sum
from ggn_ntk.jacobians.autograd import pass_back
from ggn_ntk.jacobians.recording import Call, Layout, Recording, locate, record, used_elsewhere
from ggn_ntk.jacobians.sequential import why_not
from ggn_ntk.memory.budget import resolve_axes
from ggn_ntk.models.autograd_graph import dense
from ggn_ntk.models.comparison import all_finite, cotangent, differing, norms, read, rows_differing
from ggn_ntk.models.independence import (
    Checked,
    Parts,
    check_output,
    check_shape,
    compare_alone,
    compare_gradients,
    compare_outputs,
    gradients,
    how_often,
    in_parts,
    look,
    partitions,
    probe_tolerance,
    rounding_of,
)
from ggn_ntk.problem.errors import NotFiniteError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.output_axes import OutputAxes
from ggn_ntk.problem.request import Request
from ggn_ntk.rules import channels_last, rule_for

# How many samples are evaluated by themselves: at most so many, and one of so many.
_PROBED, _SHARE = 3, 16

# Of large networks fewer samples are: to write and read their gradients in full, several times, would take as long as
# the kernel of a fully-connected network. How many entries are many, for all of them.
_MANY_ENTRIES = 2**22

#: What is said of a parameter whose rule is wrong.
DIFFERS = "its Jacobian by the layer's rule differs from autograd's"


# A sum over positions and uses cancels where the square of its norm is below this share of the sum of squares of its
# terms' norms: then products of terms round to so many times as much of the kernel.
_CANCELS = 1 / 30


class Trial(NamedTuple):
    """What rules make of one sample, beside autograd."""

    # Autograd's gradient of ``sum v f`` for each wanted parameter, by name (see :func:`sketched`)
    expected: dict[str, Tensor]
    failures: dict[str, str]  # why rules do not give the gradient of a parameter, by name
    cancelling: set[str]  # parameters whose gradient is far smaller than the terms that rules add up for it


def try_rules(request: Request, recording: Recording, v: Tensor, tolerance: float) -> Trial:
    """Compare rules with autograd on one sample."""
    # v [1, *out]
    failures = outside_of_calls(request, recording)
    passed, expected = _gradients(request, recording, v)
    if not all_finite(expected.values()):
        raise NotFiniteError
    actual, summed = dict[str, Tensor](), dict[str, list[Factored]]()
    for call, s in zip(recording.calls, passed, strict=True):
        try:
            jacobians = {} if s is None else _jacobians(call, s.unsqueeze(0), 1)
        except Exception as error:
            failures |= dict.fromkeys(call.params.values(), why_not(error, call.module))
            continue
        for name, jacobian in jacobians.items():
            product = sketched_sum(jacobian, v.new_ones(1, 1), request.params[name])
            actual[name] = actual[name] + product if name in actual else product
            summed.setdefault(name, []).append(jacobian)
        missing = (name for name in call.params.values() if name not in jacobians and s is not None)
        failures |= dict.fromkeys(missing, f"the rule of {type(call.module).__name__} does not state its Jacobian")
    actual |= {name: expected[name] for name in failures}
    rounding = rounding_of(request, recording.inputs, v, sketched)
    for name, size in differing(actual, expected, tolerance, rounding).items():
        failures[name] = f"{DIFFERS} (relative error {size:.1e})"
    terms = {
        name: reduce(torch.add, map(Factored.squared_terms, jacobians))
        for name, jacobians in summed.items()
        if len(jacobians) > 1 or jacobians[0].adds_up
    }
    return Trial(expected, failures, _cancelling(request, recording.inputs, v, expected, terms))


def _cancelling(
    request: Request, inputs: Inputs, v: Tensor, expected: dict[str, Tensor], terms: dict[str, Tensor]
) -> set[str]:
    """Find the parameters for which the terms that rules add up cancel."""
    numbers = read([*(norm_of_sketch(expected[name], request.params[name]) for name in terms), *terms.values()])
    least = {name: _CANCELS * square for name, square in zip(terms, numbers[len(terms) :], strict=True)}
    found = [name for name, size in zip(terms, numbers, strict=False) if size**2 < least[name]]
    if not found:
        return set()
    # A sketch of few vectors may be short by chance, and to form a Jacobian for that would take long.
    _, exact = gradients(request, inputs, v)
    sizes = norms(exact[name] for name in found)
    return {name for name, size in zip(found, sizes, strict=True) if size**2 < least[name]}


def outside_of_calls(request: Request, recording: Recording) -> dict[str, str]:
    """Find the parameters that are used outside of recorded calls, and what is the matter with them, by name."""
    elsewhere = used_elsewhere(recording)
    owners = {id(p): module for module in request.model.modules() for p in module.parameters(recurse=False)}
    found = {}
    for name, p in request.params.items():
        if id(p) in elsewhere:
            owner = owners[id(p)]
            kind = type(owner).__name__
            if any(name in call.params.values() for call in recording.calls):
                found[name] = f"it is also used outside of a call of {kind}"
            elif rule_for(owner) is None:
                found[name] = f"{kind} has no rule"
            else:
                found[name] = f"{kind} is not called as its rule has it, with its own parameters and forward"
    return found


def _jacobians(call: Call, s: Tensor, n: int) -> dict[str, Factored]:
    """Write the Jacobians of a call by name, and make sure that they are over N samples."""
    jacobians = call.jacobians(s)
    for jacobian in jacobians.values():
        if jacobian.sizes["n"] != n:
            raise ValueError(f"its Jacobian is over {jacobian.sizes['n']} samples instead of {n}")
    return jacobians


def _gradients(request: Request, recording: Recording, v: Tensor) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Compute gradients in a graph that is kept."""
    passed, found = pass_back(recording.output, recording.calls, v, list(request.params.values()))
    gradients = zip(request.params.items(), found, strict=True)
    return passed, {name: sketched(torch.zeros_like(p) if g is None else dense(g), p) for (name, p), g in gradients}


def _choose(n: int, count: int, seed: int) -> list[int]:
    """Choose samples, neither the first nor the last of more than two."""
    # What a model makes of all samples with the help of one of them, say of ``x[:1]``, shows at the others alone.
    if n <= 2:
        return list(range(n))
    order = torch.randperm(n - 2, generator=torch.Generator().manual_seed(seed), device="cpu") + 1
    return order[:count].tolist()


class Probe:
    """What the Jacobians that a capture yields are compared with.

    Attributes:
        inputs: All samples, x2's behind x1's, in the memory layout that suits the model.
        out_shape: Shape ``[*out]`` of the output of one sample.
        axes: The role of each of its axes.
        recordings: A forward pass of each of a few samples by itself, until rules were tried.
        everyone: Whether Jacobians of all samples are compared, or those of these few.
        cancelling: Parameters whose Jacobian is far smaller than the terms that rules add up for it.
    """

    def __init__(self, request: Request, *, everyone: bool) -> None:
        """Evaluate samples by themselves, and all of them in halves."""
        self._request, stacked = request, request.x1.stack(request.x2)
        entries, n = sum(p.numel() for p in request.params.values()), len(stacked)
        count = max(1, min(_PROBED, n // _SHARE, _MANY_ENTRIES // max(1, entries)))
        few = _choose(n, count, seed=0)
        self.inputs, first = _in_fastest_layout(request, stacked, few[0])
        self.recordings = [first, *(record(request, self.inputs[[sample]]) for sample in few[1:])]
        outputs = [_output_of_one(request, recording) for recording in self.recordings]
        self.out_shape, self._tolerance = outputs[0].shape[1:], probe_tolerance(outputs[0])
        self.axes = resolve_axes(
            request, self.out_shape
        )  # a kernel that cannot fit is refused before more is evaluated
        self._v_alone = cotangent(outputs[0], 0, Size([len(few), *self.out_shape]))
        self._outputs = torch.cat(outputs).detach()
        self._few = few
        self.everyone = everyone
        if self.everyone:  # one output of each sample: ``s`` of all of them takes long to read
            self._outputs_of, numbers = _draw(n, self.out_shape.numel())
            v = torch.zeros(n, self.out_shape.numel())
            v[torch.arange(n), self._outputs_of] = numbers
            self._numbers = numbers.to(outputs[0])
            self._v = v.to(outputs[0]).reshape(n, *self.out_shape)
        self._halves: list[Parts] = []
        self.cancelling: set[str] = set()
        self._actual: dict[str, Tensor] = {}
        if self.everyone:
            self._look_at_halves()

    def _look_at_halves(self) -> None:
        """Evaluate all samples in halves, as often as there is time for, and differentiate them the first time."""
        n = len(self.inputs)
        times = how_often(self._request, n, self.out_shape.numel())
        for samples in partitions(n, times) or [[[0]]]:
            self._halves.append(in_parts(self._request, self.inputs, samples, self._v, sketched))
        self._expected = self._halves[0].gradient
        if not all_finite(self._expected.values()):
            raise NotFiniteError

    def try_rules(self, layouts: Sequence[Layout] | None) -> dict[str, str]:
        """Try the rules on the few samples. This frees their recordings, so it works once."""
        tried = [
            try_rules(self._request, locate(recording, layouts), v, self._tolerance)
            for recording, v in zip(self.recordings, self._v_alone.split(1), strict=True)
        ]
        self.recordings.clear()
        params = self._request.params
        self.cancelling = {name for trial in tried for name in trial.cancelling}
        if not self.everyone:
            self._expected = {name: torch.stack([trial.expected[name] for trial in tried]).sum(0) for name in params}
            self._weights = self._v_alone.reshape(len(self._few), -1).T
        return {name: why for trial in tried for name, why in trial.failures.items()}

    def see(self, output: Tensor) -> None:
        """Compare the outputs of all samples in one batch with those by themselves and in halves."""
        # output [N, *out]
        n = len(self.inputs)
        check_shape(output, n, self.out_shape)
        if self.everyone:
            compare_alone(self._request, self.inputs, output)
        elif n == 1:
            compare_outputs(self._request, self.inputs, output, self._few, self._outputs)
        for halves in self._halves:
            compare_outputs(self._request, self.inputs, output, range(n), halves.outputs)

    def agrees(self, output: Tensor) -> bool:
        """Tell whether outputs of the few samples among all of them are those by themselves, but for rounding."""
        return not rows_differing(output.detach()[self._few], self._outputs, self._tolerance).any()

    def begin(self, outputs: Tensor) -> None:
        """Start on some outputs."""
        # outputs [*out]
        if self.everyone:
            places = {output: place for place, output in enumerate(outputs.tolist())}
            samples = [i for i, output in enumerate(self._outputs_of) if output in places]
            local = [places[self._outputs_of[i]] for i in samples]
            self._picked = tuple(
                torch.tensor(x, dtype=torch.long, device=self._numbers.device) for x in (local, samples)
            )
            self._outputs_of = [-1 if output in places else output for output in self._outputs_of]
        else:
            chosen = outputs.to(self._weights.device)
            self._piece = self._weights.index_select(0, chosen)
            self._weights = self._weights.index_fill(0, chosen, 0)

    def add(self, jacobians: dict[str, Factored]) -> None:
        """Take down one use of a layer."""
        for name, jacobian in jacobians.items():
            if self.everyone:
                seen, weights = jacobian.pick(*self._picked), self._numbers[self._picked[1]].unsqueeze(0)
            else:
                seen, weights = jacobian.select_samples(self._few), self._piece
            product = sketched_sum(seen, weights, self._request.params[name])
            self._actual[name] = self._actual[name] + product if name in self._actual else product

    def judge(self, missed: Container[str]) -> dict[str, float]:
        """Compare what was taken down."""
        return differing(self._given(self._expected, missed), self._expected, self._tolerance)

    def diagnose(self, missed: Container[str]) -> dict[str, str]:
        """Find out why what was taken down of all samples differs from their gradient in halves."""
        request = self._request
        _, batch = gradients(request, self.inputs, self._v)
        expected = {name: sketched(batch.pop(name), p) for name, p in request.params.items()}
        compare_gradients(request, self.inputs, self._v, expected, self._halves[0], self._tolerance, sketched)
        rounding = rounding_of(request, self.inputs, self._v, sketched)
        wrong = differing(self._given(expected, missed), expected, self._tolerance, rounding)
        if wrong:  # what samples that see one another do to rules must not pass for a fault of these
            for samples in partitions(len(self.inputs), len(self.inputs))[1:]:
                halves = in_parts(request, self.inputs, samples, self._v, sketched)
                compare_gradients(request, self.inputs, self._v, expected, halves, self._tolerance, sketched)
        return {name: f"{DIFFERS} (relative error {error:.1e})" for name, error in wrong.items()}

    def _given(self, expected: dict[str, Tensor], missed: Container[str]) -> dict[str, Tensor]:
        """Give what was taken down, and what is expected of parameters whose Jacobians rules do not give."""
        return self._actual | {name: g for name, g in expected.items() if name in missed}

    def checked(self, axes: OutputAxes, output: Tensor) -> Checked:
        """Say what is known of all samples, with the roles of their outputs ``[N, *out]``."""
        _, gradient = gradients(self._request, self.inputs, self._v)
        return Checked(axes, output, self._v, gradient, self._tolerance)


def _draw(n: int, outputs: int) -> tuple[list[int], Tensor]:
    """Draw an output of each of N samples, and a number for it, none of them close to zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = torch.randint(outputs, (n,), generator=generator, device="cpu").tolist()
    signs = torch.randint(2, (n,), generator=generator, device="cpu") * 2 - 1
    return chosen, signs * (0.5 + torch.rand(n, generator=generator, device="cpu"))


def _in_fastest_layout(request: Request, inputs: Inputs, sample: int) -> tuple[Inputs, Recording]:
    """Evaluate a sample with the channels of images last in memory; as it is where a view asks for another layout."""
    fast = inputs.map(channels_last)
    try:
        return fast, record(request, fast[[sample]])
    except RuntimeError as error:
        if is_out_of_memory(error) or all(x.ndim != 4 for x in inputs.tensors.values()):
            raise
    return inputs, record(request, inputs[[sample]])


def _output_of_one(request: Request, recording: Recording) -> Tensor:
    """Check the output of a single sample; where it is none, several tell better what is wrong."""
    output = recording.output
    if not isinstance(output, Tensor) or output.shape[:1] != (1,) or not output.numel():
        look(request)
    return check_output(output, 1)
