"""How much memory a sample takes, measured on a few."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ggn_ntk.contraction.gathered import Gathered
from ggn_ntk.jacobians.plan import Plan
from ggn_ntk.memory.layout import Footprint
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.process.torch_internals import storage_id


def measured(plan: Plan, inputs: Inputs) -> Footprint:
    """Evaluate a few samples, pass one output back, or two, and see what is kept."""
    n, own = len(inputs), {storage_id(p) for p in plan.request.model.parameters()}
    with _saved() as saved:
        side = plan.evaluate(inputs)
    storages = {storage_id(t): t.untyped_storage().nbytes() for t in (*saved, *side.kept)}
    evaluated = sum(size for place, size in storages.items() if place not in own)
    outputs = torch.arange(min(2, side.output[0].numel()))
    passing, gathered = side.numel * side.output.element_size(), Gathered(n)
    steps = side.steps(outputs, lambda *_: None, again=False)
    gathered.put(slice(0, n), (step.jacobians() for step in steps))
    held, by_output = (gathered.nbytes(of_outputs=of_outputs) for of_outputs in (False, True))
    return Footprint(evaluated / n, passing / n, held / n, by_output / n / len(outputs))


@contextmanager
def _saved() -> Iterator[list[Tensor]]:
    """Take down the tensors that graphs keep."""
    found: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        found.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(take, lambda x: x):
        yield found
