"""Where in a model parameters are used: the operations, and the modules in whose forward passes these ran."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

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


#: From where each Jacobian of a parameter is, by name, in the order of the way back: that of a weight from several places.
Written = dict[str, list[tuple[Place, ...]]]


class Places(NamedTuple):
    """Where parameters are used."""

    written: Written
    refused: dict[str, str]  # for parameters that no rule covers: the module of the operation that has none, by name


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

    def written(calls: Sequence[LayerCall | Use]) -> Written:
        wanted = [call for call in calls if call.counts or call.weights]
        ordered = [call for stage in stages(recording.output, wanted) for call in reversed(stage.calls)]
        return _written([(call, place_of(call)) for call in ordered])

    of_fallback = {name: found for name, found in written(calls).items() if name in plan.fallback}
    nodes = list(walk(recording.output, [call for call in calls if isinstance(call, LayerCall)], uses.names))
    refused = {name: spans.module_of(nodes[place]) for name, place in uses.refused.items()}
    return Places(written([call.without(plan.fallback) for call in calls]) | of_fallback, refused)


def _of_layers(request: Request) -> Written:
    """List the layers of a Sequential model that use each parameter, from the last."""
    names: dict[int, str] = {id(p): name for name, p in request.params.items()}
    found: Written = defaultdict(list)
    for where, layer in reversed(list(named_layers(uncompiled(request.model)))):
        for p in layer.parameters(recurse=False) if is_layer(layer) else ():
            if id(p) in names:
                found[names[id(p)]].append((Place(type(layer).__name__, where),))
    return found


def _written(calls: Sequence[tuple[LayerCall | Use, Place]]) -> Written:
    """List the places behind each Jacobian that calls write, the last call first."""
    found: Written = defaultdict(list)
    left = Counter(weight.key for call, _ in calls for weight in call.weights)
    waiting: dict[Any, list[Place]] = defaultdict(list)
    for call, place in calls:
        for name, count in call.counts.items():
            found[name] += [(place,)] * count
        for weight in call.weights:
            waiting[weight.key].append(place)
            if len(waiting[weight.key]) == left[weight.key]:
                for name in weight.names:
                    found[name].append(tuple(waiting[weight.key]))
    return found
