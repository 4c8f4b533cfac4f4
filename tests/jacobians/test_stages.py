"""The way back of capture by autograd: where it is divided, and that nothing is lost there."""

import torch
from conftest import assert_close, limit_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import empirical_ntk, register_rule
from ggn_ntk.jacobians import autograd
from ggn_ntk.jacobians.finding import find_uses
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.stages import merged
from ggn_ntk.jacobians.stages import stages as divide
from ggn_ntk.jacobians.uses import read
from ggn_ntk.memory.buffers import Buffer
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction
from ggn_ntk.rules import rule_for


class OfAUser(nn.Linear):
    """A layer of a user's, whose calls are recorded if a rule is registered for it."""


class Branches(nn.Module):
    """Layers in a random graph: each takes the sum of results before it."""

    def __init__(self, inputs, layer=nn.Linear):
        super().__init__()
        self.inputs = inputs
        self.layers = nn.ModuleList(layer(3, 3) for _ in inputs)

    def forward(self, x):
        results = [x]
        for layer, places in zip(self.layers, self.inputs, strict=True):
            results.append(torch.tanh(layer(sum(results[place] for place in places))))
        return results[-1]

    def used(self):
        """Which layers the output depends on."""
        found, waiting = set(), [len(self.inputs)]
        while waiting:
            place = waiting.pop() - 1
            if place >= 0 and place not in found:
                found.add(place)
                waiting += self.inputs[place]
        return sorted(found)


def stages_of(model, x):
    """Evaluate a model, find the uses of its parameters, and divide its way back."""
    request = Request.parse(model, x, None, AxesRequest.parse("full"), params=None, per_parameter=False)
    few = [record(request, request.x1[[i % len(x) for i in range(n)]]) for n in (2, 3)]
    recording = record(request, request.x1)
    calls = read(find_uses(few, request.params), recording)
    return recording, calls, divide(recording.output, calls)


def names(calls):
    """The layers of uses."""
    found = [{int(name.split(".")[1]) for name in call.names} for call in calls]
    return [place for (place,) in found]


def test_a_sequence_is_divided_behind_each_layer():
    model = Branches([{0}, {1}, {2}])
    *_, stages = stages_of(model, torch.randn(2, 3))
    assert [names(stage.calls) for stage in stages] == [[2], [1], [0]]


def test_a_residual_block_is_one_stage():
    model = Branches([{0}, {1}, {2}, {1, 3}, {4}])
    *_, stages = stages_of(model, torch.randn(2, 3))
    assert [names(stage.calls) for stage in stages] == [[4], [3], [1, 2], [0]]


def test_stages_are_joined_up_to_a_size():
    *_, stages = stages_of(Branches([{0}, {1}, {2}, {1, 3}, {4}]), torch.randn(2, 3))
    assert [stage.numel for stage in stages] == [6, 6, 12, 6]
    for size, expected in [(0, [6, 6, 12, 6]), (12, [12, 12, 6]), (18, [12, 18]), (100, [30])]:
        joined = merged(stages, size)
        assert [stage.numel for stage in joined] == expected
        assert [stage.start for stage in joined[1:]] == [end for stage in joined for end in stage.end]


graphs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, i), min_size=1, max_size=3) for i in range(n)))
)


@settings(deadline=None)
@given(inputs=graphs, layer=st.sampled_from([nn.Linear, OfAUser]))
def test_cotangents_pass_stages_of_any_graph(inputs, layer):
    register_rule(OfAUser)(rule_for(nn.Linear(1, 1)))
    model, x = Branches(inputs, layer).double(), torch.randn(2, 3).double()
    recording, calls, stages = stages_of(model, x)
    assert len(recording.calls) == len(inputs) * (layer is OfAUser)
    several = torch.randn(4, *recording.output.shape).double()
    cotangents, buffer = several, Buffer(20)
    for stage in stages:
        buffer.clear()
        found, cotangents = autograd.pull_back(stage, cotangents, buffer)
        for call, s in zip(stage.calls, found, strict=True):
            whole = [autograd.pass_back(recording.output, [call], v)[0][0] for v in several]
            torch.testing.assert_close(s, torch.stack(whole))
    assert sorted(names([call for stage in stages for call in stage.calls])) == sorted(names(calls)) == model.used()
    assert_close(empirical_ntk(model, x, capture="autograd"), jacobian_contraction(model, x))


def test_a_hook_that_changes_gradients_at_the_end_of_a_stage(monkeypatch):
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x).tanh()
            if y.requires_grad:
                y.register_hook(lambda g: 2 * g)
            return self.last(y.sin() + y)

    limit_memory(monkeypatch, passing=0)
    model, x = Hooked().double(), torch.randn(4, 3).double()
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_buffer_hold_what_fits_until_they_are_cleared():
    buffer, like = Buffer(200), torch.empty(0)
    first, second = buffer.take([4, 5], like), buffer.take([10], like)
    assert first.is_contiguous()
    assert second.data_ptr() - first.data_ptr() == 64 * first.element_size()
    kept = {first.untyped_storage().data_ptr(), second.untyped_storage().data_ptr()}
    assert len(kept) == 1
    for apart in (buffer.take([80], like), buffer.take([1], like.double())):
        assert apart.untyped_storage().data_ptr() not in kept
    buffer.clear()
    assert buffer.take([200], like).data_ptr() == first.data_ptr()


def test_jacobians_that_wait_for_others_are_not_overwritten(monkeypatch):
    limit_memory(monkeypatch, passing=0, one_by_one=0)
    model, x = Branches([{0}, {1}, {2}, {3}]).double(), torch.randn(4, 3).double()
    model.layers[3] = model.layers[1]
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))


def test_a_layer_whose_output_is_empty():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = nn.Linear(3, 1)
            self.nothing.weight = nn.Parameter(torch.empty(0, 3).double())
            self.nothing.bias = nn.Parameter(torch.empty(0).double())
            self.scale = nn.Parameter(torch.ones(()).double())

        def forward(self, x):
            return self.nothing(x).sum(1, keepdim=True) + self.scale * x

    model, x = Empty(), torch.randn(4, 3).double()
    assert_close(empirical_ntk(model, x, method="structured"), jacobian_contraction(model, x))
    assert empirical_ntk(model, x, method="structured", params=["nothing.weight"]).count_nonzero() == 0
