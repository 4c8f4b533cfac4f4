"""The way back of capture by autograd: where it is divided, and that nothing is lost there."""

import torch
from conftest import assert_close, limit_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ggn_ntk import empirical_ntk
from ggn_ntk.jacobians import autograd
from ggn_ntk.jacobians.recording import record
from ggn_ntk.jacobians.sample_axes import locate
from ggn_ntk.jacobians.stages import merged
from ggn_ntk.jacobians.stages import stages as divide
from ggn_ntk.memory.buffers import Buffer
from ggn_ntk.problem.output_axes import AxesRequest
from ggn_ntk.problem.request import Request
from ggn_ntk.reference import jacobian_contraction


class Branches(nn.Module):
    """Layers in a random graph: each takes the sum of results before it."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in inputs)

    def forward(self, x):
        results = [x]
        for layer, places in zip(self.layers, self.inputs, strict=True):
            results.append(torch.tanh(layer(sum(results[place] for place in places))))
        return results[-1]

    def names(self, calls):
        return [next(i for i, layer in enumerate(self.layers) if layer is call.module) for call in calls]


def stages_of(model, x):
    """Record a model and divide its way back."""
    request = Request.parse(model, x, None, AxesRequest("full", (), ()), params=None, per_parameter=False)
    recording = locate(record(request, request.x1), None)
    used = [c for c, s in zip(recording.calls, passed(recording, x), strict=True) if s is not None]
    return recording, divide(recording.output, used)


def passed(recording, x):
    return autograd.pass_back(recording.output, recording.calls, torch.ones_like(recording.output))[0]


def test_a_sequence_is_divided_behind_each_layer():
    model = Branches([{0}, {1}, {2}])
    _, stages = stages_of(model, torch.randn(2, 3))
    assert [model.names(stage.calls) for stage in stages] == [[2], [1], [0]]


def test_a_residual_block_is_one_stage():
    model = Branches([{0}, {1}, {2}, {1, 3}, {4}])
    _, stages = stages_of(model, torch.randn(2, 3))
    assert [model.names(stage.calls) for stage in stages] == [[4], [3], [1, 2], [0]]


def test_stages_are_joined_up_to_a_size():
    _, stages = stages_of(Branches([{0}, {1}, {2}, {1, 3}, {4}]), torch.randn(2, 3))
    assert [stage.numel for stage in stages] == [6, 6, 12, 6]
    for size, expected in [(0, [6, 6, 12, 6]), (12, [12, 12, 6]), (18, [12, 18]), (100, [30])]:
        joined = merged(stages, size)
        assert [stage.numel for stage in joined] == expected
        assert [stage.start for stage in joined[1:]] == [end for stage in joined for end in stage.end]


graphs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, i), min_size=1, max_size=3) for i in range(n)))
)


@settings(deadline=None)
@given(inputs=graphs)
def test_cotangents_pass_stages_of_any_graph(inputs):
    model, x = Branches(inputs).double(), torch.randn(2, 3).double()
    recording, stages = stages_of(model, x)
    several = torch.randn(4, *recording.output.shape).double()
    cotangents, buffer = several, Buffer(20)
    for stage in stages:
        buffer.clear()
        found, cotangents = autograd.pull_back(stage, cotangents, buffer)
        for call, s in zip(stage.calls, found, strict=True):
            whole = [autograd.pass_back(recording.output, [call], v)[0][0] for v in several]
            torch.testing.assert_close(s, torch.stack(whole))
    used = [c for c, s in zip(recording.calls, passed(recording, x), strict=True) if s is not None]
    assert sorted(model.names([call for stage in stages for call in stage.calls])) == model.names(used)
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
