"""Where in a model parameters are used: the operations, and the modules in whose forward passes these ran."""

from collections import defaultdict
from typing import NamedTuple

from ggn_ntk.jacobians.layer_call import LayerCall
from ggn_ntk.jacobians.layers import is_layer, named_layers
from ggn_ntk.jacobians.plan import Plan, recorded
from ggn_ntk.jacobians.stages import stages
from ggn_ntk.jacobians.uses import Use, walk
from ggn_ntk.models.spans import Spans
from ggn_ntk.problem.inputs import Inputs
from ggn_ntk.problem.request import Request
from ggn_ntk.process.torch_internals import uncompiled


class Place(NamedTuple):
    """Where a parameter is used.

    Attributes:
        operation: The operation in which it meets the samples, or the type of a layer that is taken as a whole.
        module: Dotted name of the module in whose forward pass that runs; empty for the model itself.
    """

    operation: str
    module: str


class Places(NamedTuple):
    """Where parameters are used."""

    used: dict[str, list[Place]]  # each parameter, by name, in the order of the way back
    refused: dict[str, str]  # for parameters that no rule covers: the module of the operation that has none, by name

    def merged(self, other: "Places") -> "Places":
        """Add those of other samples, where they differ."""
        used = dict(self.used)
        for name, places in other.used.items():
            if places != used.get(name):
                used[name] = [*used.get(name, ()), *places]
        return Places(used, self.refused | other.refused)


def find_places(plan: Plan, inputs: Inputs) -> Places:
    """Find out where parameters are used; the model is evaluated once more for that."""
    request = plan.request
    model = uncompiled(request.model)
    if plan.uses is None:
        return Places(_of_layers(request), {})
    spans, names = Spans(model), {id(module): name for name, module in model.named_modules()}
    recording, uses, calls = recorded(request, inputs, plan.uses, spans.noted)

    def place_of(call: LayerCall | Use) -> Place:
        module = names[id(call.module)] if isinstance(call, LayerCall) else spans.module_of(call.edge.node)
        return Place(call.label, module)

    used: dict[str, list[Place]] = defaultdict(list)
    for stage in stages(recording.output, [call for call in calls if call.names or call.weights]):
        for call in reversed(stage.calls):
            for name in dict.fromkeys((*call.names, *(name for weight in call.weights for name in weight.names))):
                used[name].append(place_of(call))
    nodes = list(walk(recording.output, [call for call in calls if isinstance(call, LayerCall)], uses.names))
    refused = {name: spans.module_of(nodes[place]) for name, place in uses.refused.items()}
    return Places(used, refused)


def _of_layers(request: Request) -> dict[str, list[Place]]:
    """List the layers of a Sequential model that use each parameter, from the last."""
    names: dict[int, str] = {id(p): name for name, p in request.params.items()}
    found: dict[str, list[Place]] = defaultdict(list)
    for where, layer in reversed(list(named_layers(uncompiled(request.model)))):
        for p in layer.parameters(recurse=False) if is_layer(layer) else ():
            if id(p) in names:
                found[names[id(p)]].append(Place(type(layer).__name__, where))
    return found
