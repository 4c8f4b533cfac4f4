"""Verification: no rule, no backward pass is trusted.

For numbers v, ``sum v[n, c] J[c, n]`` from the Jacobians that rules write must be autograd's gradient of
``sum v[n, c] f[n, c]``. It is compared, parameter by parameter,

- on a few samples, in the graph that uses were found in, or each by itself: is each rule right, and is every use found?
- on the Jacobians that are contracted, of all samples: do rules hold for each of them, is the axis of the samples
  found, did ``s`` pass back right, and do samples leave one another alone? Autograd's side comes from the samples in
  two halves (:mod:`ggn_ntk.models.independence`). Where all layers are known to act on each sample by itself, and
  nothing but torch and this library runs between them, a few samples stand for all: the rest may take longer than
  the kernel. This is then the comparison of rules, too.

In the first, both sides come from one forward pass, so that they differ by rounding alone. In the second, rounding may
take a unit to the other side of a kink; what differs is compared once more with a gradient from a batch of all samples.
"""

from collections.abc import Container, Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.contraction.factored import Jacobians
from ggn_ntk.contraction.vector_products import sketched, sketched_sum
from ggn_ntk.jacobians.layer_call import Recording
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.trial import DIFFERS, try_rules
from ggn_ntk.jacobians.uses import Uses, read
from ggn_ntk.models.autograd_graph import results_in_graph
from ggn_ntk.models.comparison import check_finite, cotangent, differing, gradient_tolerance
from ggn_ntk.models.evaluation import check_output, check_shape
from ggn_ntk.models.gradients import Parts, gradients, in_parts
from ggn_ntk.models.independence import (
    Checked,
    compare_alone,
    compare_gradients,
    compare_outputs,
    how_often,
    look,
    partitions,
)
from ggn_ntk.models.rounding import rounding_of
from ggn_ntk.problem.errors import UnsupportedModelError, is_out_of_memory
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.rules.registry import channels_last

# How many samples are evaluated by themselves: at most so many, and one of so many.
_ALONE, _SHARE = 3, 16

# Of large networks fewer samples are: to write and read their gradients in full, several times, would take as long as
# the kernel of a fully-connected network. How many entries are many, for all of them.
_MANY_ENTRIES = 2**22


def _choose(n: int, count: int, seed: int) -> list[int]:
    """Choose samples, neither the first nor the last of more than two."""
    # What a model makes of all samples with the help of one of them, say of ``x[:1]``, shows at the others alone.
    if n <= 2:
        return list(range(n))
    order = torch.randperm(n - 2, generator=torch.Generator().manual_seed(seed), device="cpu") + 1
    return order[:count].tolist()


class Few(NamedTuple):
    """A few samples, evaluated before all: together, or each by itself where layers may let samples meet."""

    inputs: Inputs  # all samples, in the memory layout that suits the model
    samples: list[int]  # which of them
    recordings: list[Recording]
    outputs: list[Tensor]  # of each recording, ``[N, *out]``
    channels_last: bool  # whether channels of images are last in memory
    every: bool  # whether calls of all layers with a rule were recorded: the model is a sequence of layers
    known: bool  # whether these are known to act on each sample by itself

    @property
    def bytes_of_one(self) -> tuple[int, int]:
        """What is computed of a sample, all together, and the largest result: ``s`` of an output is as large there."""
        recording = self.recordings[0]
        results = results_in_graph(recording.output)
        largest = max((size for shape, size in results if shape[:1] == (recording.n,)), default=0)
        return sum(size for _, size in results) // recording.n, largest // recording.n


def evaluate_few(request: Request, inputs: Inputs, *, every: bool, known: bool) -> Few:
    """Evaluate a few samples, with the channels of images last in memory unless a view or a fault of torch objects."""
    entries, n = sum(p.numel() for p in request.params.values()), len(inputs)
    most = _ALONE if every else 1  # others are verified all
    samples = _choose(n, max(1, min(most, n // _SHARE, _MANY_ENTRIES // max(1, entries))), seed=0)
    if every or n == 1:
        together = [samples] if known else [[sample] for sample in samples]
    else:
        together = [following(samples[0], 2, n)]
    fast = inputs.map(channels_last)
    try:
        first = record(request, fast[together[0]], every=every)
    except (RuntimeError, UnsupportedModelError) as error:
        if is_out_of_memory(error) or all(x.ndim != 4 for x in inputs.tensors.values()):
            raise
        fast, first = inputs, record(request, inputs[together[0]], every=every)
    recordings = [first, *(record(request, fast[others], every=every) for others in together[1:])]
    outputs = [_checked_output(request, recording) for recording in recordings]
    return Few(fast, samples, recordings, outputs, fast is not inputs, every, known)


def following(sample: int, count: int, n: int) -> list[int]:
    """Choose a sample and those behind it, the first behind the last."""
    return [(sample + i) % n for i in range(count)]


class Verification:
    """What the Jacobians of an evaluation are compared with.

    Attributes:
        inputs: All samples that are evaluated together, in the memory layout that suits the model.
        out_shape: Shape ``[*out]`` of the output of one sample.
        everyone: Whether Jacobians of all samples are compared, or those of these few.
        cancelling: Parameters whose Jacobian is far smaller than the terms that rules add up for it.
    """

    def __init__(self, request: Request, few: Few, *, everyone: bool, of: int = 0) -> None:
        """Take down what a few samples say, and evaluate all of them in halves; a block ``of`` more."""
        self._request, self._looked_at, self.inputs, n = request, few, few.inputs, len(few.inputs)
        outputs = few.outputs
        self.out_shape, self._tolerance = outputs[0].shape[1:], gradient_tolerance(outputs[0])
        self._v_alone = cotangent(outputs[0], 0, Size([len(few.samples), *self.out_shape]))
        self._outputs = torch.cat(outputs).detach()
        self._few = few.samples
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
            self._look_at_halves(of or n)

    def _look_at_halves(self, of: int) -> None:
        """Evaluate all samples in halves, as often as there is time for, and differentiate them the first time."""
        n = len(self.inputs)
        times = how_often(self._request, of, self.out_shape.numel())
        for samples in partitions(n, times) or [[[0]]]:
            self._halves.append(in_parts(self._request, self.inputs, samples, self._v, sketched))
        self._expected = self._halves[0].gradient
        check_finite(self._expected.values())

    def try_rules(self, recordings: Sequence[Recording], uses: Uses | None) -> dict[str, str]:
        """Try the rules on few samples: why they do not give the Jacobian of a parameter, by name."""
        vs = self._v_alone.split([r.n for r in recordings]) if uses is None else [self._v_of(recordings[0])]
        problems = {} if uses is None else uses.problems
        # Of a sequence of known layers, what rules write of these samples on the way back is compared with the same.
        compare = uses is not None or self.everyone
        tried = [
            try_rules(self._request, recording, read(uses, recording), v, self._tolerance, problems, compare=compare)
            for recording, v in zip(recordings, vs, strict=True)
        ]
        params = self._request.params
        self.cancelling = {name for trial in tried for name in trial.cancelling}
        if not self.everyone:
            self._expected = {name: reduce(torch.add, [trial.expected[name] for trial in tried]) for name in params}
            self._weights = self._v_alone.reshape(len(self._few), -1).T
        return {name: why for trial in tried for name, why in trial.failures.items()}

    def _v_of(self, recording: Recording) -> Tensor:
        """Choose numbers for the outputs of some samples: those of the sample by itself, if all are this one."""
        # -> [N, *out]
        v = cotangent(recording.output, 1, recording.output.shape)
        v[0] = self._v_alone[0]
        if not self.everyone:
            v[1:] = 0
        return v

    def of_block(self, request: Request, inputs: Inputs, of: int) -> "Verification":
        """Set up for a block of N other samples of the same model, all of which are compared."""
        return Verification(request, self._looked_at._replace(inputs=inputs), everyone=True, of=of)

    @property
    def done(self) -> bool:
        """Whether Jacobians of all outputs were taken down, of all samples."""
        return self.everyone and all(output < 0 for output in self._outputs_of)

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
            self._weights_of_chunk = self._weights.index_select(0, chosen)
            self._weights = self._weights.index_fill(0, chosen, 0)

    def add(self, jacobians: Jacobians) -> None:
        """Take down Jacobians of some parameters."""
        for name, parts in jacobians.items():
            for part in parts:
                if self.everyone:
                    seen, weights = part.pick(*self._picked), self._numbers[self._picked[1]].unsqueeze(0)
                else:
                    seen, weights = part.select_samples(self._few), self._weights_of_chunk
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

    def checked(self, output: Tensor) -> Checked:
        """Say what is known of all samples, with their outputs ``[N, *out]``."""
        _, gradient = gradients(self._request, self.inputs, self._v)
        return Checked(output, self._v, gradient, self._tolerance)


def _draw(n: int, outputs: int) -> tuple[list[int], Tensor]:
    """Draw an output of each of N samples, and a number for it, none of them close to zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = torch.randint(outputs, (n,), generator=generator, device="cpu").tolist()
    signs = torch.randint(2, (n,), generator=generator, device="cpu") * 2 - 1
    return chosen, signs * (0.5 + torch.rand(n, generator=generator, device="cpu"))


def _checked_output(request: Request, recording: Recording) -> Tensor:
    """Check the output of few samples; where it is none, others beside these tell better what is wrong."""
    output = recording.output
    if not isinstance(output, Tensor) or output.shape[:1] != (recording.n,) or not output.numel():
        look(request)
    return check_output(output, recording.n)


def diagnosed(doubtful: Iterable[Verification], missed: Container[str]) -> dict[str, str]:
    """Find out why Jacobians differ from gradients, by names of parameters."""
    found: dict[str, str] = {}
    for verification in doubtful:
        found |= verification.diagnose(missed)
    return found
