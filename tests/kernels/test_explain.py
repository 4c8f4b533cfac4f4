"""What explain says is what the route does."""

import threading
from typing import ClassVar

import pytest
import torch
from cases import BY_NAME, CustomParameter, Residual, TiedTransformer, mlp
from conftest import batch_sizes
from torch import nn

from benchmarks.network import network
from benchmarks.tensors import TensorMeter
from benchmarks.workloads import TABLES
from ggn_ntk import UnsupportedModelError, empirical_ntk, explain
from ggn_ntk.jacobians import footprint
from ggn_ntk.jacobians.footprint import Counter
from ggn_ntk.kernels import Place
from ggn_ntk.process.torch_internals import forward_hooks


def wide_mlp():
    return nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 4))


def test_gram_matrices_for_wide_layers():
    explanation = explain(wide_mlp(), torch.randn(6, 300), torch.randn(5, 300))
    assert explanation.method == "structured"
    assert [c.parameter for c in explanation.contractions] == ["2.weight", "2.bias", "0.weight", "0.bias"]
    weight = explanation.contractions[2]
    assert weight.layer == "Linear"
    assert len(weight.order) == 3
    # the Gram matrices of x and of s, and their product
    assert weight.flops == 2 * 6 * 5 * 300 + 2 * (6 * 4) * (5 * 4) * 200 + 6 * 5 * 4 * 4
    assert weight.memory == 4 * 6 * 5 * 4 * 4


def test_jacobians_for_convolutions():
    model, x1, x2 = BY_NAME["tutorial_cnn_small"].build(torch.float32)
    by_name = {c.parameter: c for c in explain(model, x1, x2).contractions}
    assert by_name["2.weight"].layer == "Conv2d"
    assert len(by_name["2.weight"].order) == 3
    assert by_name["2.bias"].flops == 2 * 4 * 3 * 10 * 10 * 4  # positions are summed first


def test_uses_of_one_form_are_contracted_together():
    model, x1, _ = BY_NAME["tied"].build()
    assert [c.parameter for c in explain(model, x1).contractions].count("0.weight") == 1
    model, x1, _ = BY_NAME["tied_embedding"].build()  # a look-up and a product
    assert [c.parameter for c in explain(model, x1).contractions].count("0.weight") == 4


def test_printed():
    printed = str(explain(mlp(nn.Tanh)(), torch.randn(3, 5), compute="trace")).splitlines()
    assert printed[0] == "method: structured, capture: sequential; rules cover 79 of 79 parameter entries (100.0%)"
    columns = ["parameter", "operation", "module", "uses", "GFLOP", "MB", "order", "of", "contraction"]
    assert printed[1].split() == columns
    assert printed[2].startswith("4.weight   Linear     4       1 ")
    assert printed[-3].startswith("total")
    assert printed[-1].startswith("3 x 3 samples: GFLOP: forward ")


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_few_samples_tell_of_many(capture, compute):
    model, x1, x2 = BY_NAME["tutorial_cnn_small"].build()
    many, others = (x.repeat(20, 1, 1, 1) for x in (x1, x2))
    for second, n2 in ((None, None), (x2, len(others))):
        keywords = {"capture": capture, "compute": compute}
        dry = explain(model, x1, second, n1=len(many), n2=n2, **keywords)
        whole = explain(model, many, None if second is None else others, **keywords)
        assert dry.contractions == whole.contractions
        assert (dry.flops, dry.sizes) == (whole.flops, whole.sizes)
        assert dry.flops.total > dry.flops.contraction > 0
        # what parameters share is counted once, and of a set with itself about half
        assert dry.flops.contraction < (0.9 if second is None else 1.01) * sum(c.flops for c in dry.contractions)
        assert dry.seconds > 0
        assert dry.peak_bytes > 8 * len(many)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("compute", ["full", "trace"])
@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_operations_are_those_of_a_run(capture, compute, symmetric):
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 5))
    x1, x2 = torch.randn(40, 2, 12, 12), None if symmetric else torch.randn(24, 2, 12, 12)
    keywords = {"compute": compute, "capture": capture}
    with Counter() as run:
        empirical_ntk(model, x1, x2, method="structured", **keywords)
    assert explain(model, x1, x2, **keywords).flops.total == pytest.approx(run.flops, rel=0.1)


@pytest.mark.parametrize(
    "name", ["cnn", "fcn_wideout", "fcn_wideout trace", "vgg symmetric", "paired mlp", "segmentation", "transformer"]
)
def test_bytes_are_those_of_a_run(name):
    workload = TABLES[name]
    model, (x1, x2) = network(workload, "cpu"), map(torch.from_numpy, workload.inputs(0))
    x2 = None if workload.symmetric else x2
    keywords = {"compute": workload.compute, "trace_axes": workload.trace_axes or None, "paired": workload.paired}
    with TensorMeter([*model.parameters(), *model.buffers(), x1, *([] if x2 is None else [x2])]) as meter:
        empirical_ntk(model, x1, x2, **keywords)
    n2 = None if workload.symmetric else workload.n2
    explained = explain(model, x1[:2], None if x2 is None else x2[:2], n1=workload.n1, n2=n2, **keywords)
    assert explained.peak_bytes / 1e6 == pytest.approx(meter.peak(), rel=0.25)


@pytest.mark.parametrize(("most", "count"), [(footprint._MOST, 64), (0, 4)])  # more are timed of small ones alone
def test_a_dry_run_evaluates_few_samples(most, count, monkeypatch):
    model, x, _ = BY_NAME["tutorial_cnn_small"].build()
    monkeypatch.setattr(footprint, "_MOST", most)
    sizes = batch_sizes(monkeypatch)
    explanation = explain(model, x.repeat(30, 1, 1, 1), n1=60_000, n2=50_000, compute="trace", memory="16GiB")
    assert max(sizes) <= count
    assert 60_000 * 50_000 * 8 < explanation.peak_bytes < 2**36


def test_memory_decides_on_blocks():
    model, x, _ = BY_NAME["tutorial_cnn_small"].build()
    unbounded, bounded = (explain(model, x, n1=200, compute="trace", memory=m) for m in (None, "1MB"))
    assert unbounded.blocks is None
    assert bounded.peak_bytes < unbounded.peak_bytes
    assert bounded.flops.forward >= unbounded.flops.forward
    assert "samples at a time" in str(bounded)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"n1": 0}, "n1 must be a positive integer"),
        ({"n2": 2.5}, "n2 must be a positive integer"),
        ({"n1": 5, "interacting": True}, "n1 goes with interacting=False alone"),
        ({"n1": 5, "n2": 4, "paired": True}, "n1 and n2 must be the same with paired=True"),
    ],
)
def test_sizes_that_are_none_are_errors(keywords, message):
    with pytest.raises(ValueError, match=message):
        explain(mlp(nn.Tanh)(), torch.randn(3, 5), **keywords)


def test_other_models():
    x = torch.randn(3, 5)
    explanation = explain(Residual(), x)
    assert (explanation.method, explanation.capture) == ("structured", "autograd")
    assert [(c.parameter, c.layer, c.operation, c.module, c.uses) for c in explanation.contractions] == [
        (f"{layer}.{name}", "Linear", "addmm", layer, 1)
        for layer in ("head", "second", "first")
        for name in ("bias", "weight")
    ]


class Distances(nn.Module):
    """Distances to centers, for which there is no rule."""

    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.rand(5, 5))

    def forward(self, x):
        return torch.cdist(x, self.centers)


def test_the_fallback_is_printed():
    model = nn.ModuleDict({"first": Distances(), "block": nn.Sequential(nn.Linear(5, 5), Distances())})
    model.forward = lambda x: model.block(model.first(x))
    explanation = explain(model, torch.randn(3, 5))
    operation = "CdistBackward0"
    why = {f"{name}.centers": f"there is no rule for {operation}, in {name}" for name in ("block.1", "first")}
    assert explanation.fallback == why
    assert (explanation.covered, explanation.entries) == (30, 80)
    printed = str(explanation).splitlines()
    assert printed[0].endswith("; rules cover 30 of 80 parameter entries (37.5%)")
    assert printed[-2:] == [f"  - {name}: {reason}" for name, reason in explanation.fallback.items()]


def test_parameters_without_a_layer_are_used_in_the_model_itself():
    rows = {row.parameters[0]: row for row in explain(CustomParameter(), torch.randn(3, 5)).rows}
    assert (rows["scale"].operation, rows["scale"].module) == ("mul", "(model)")
    assert explain(CustomParameter(), torch.randn(3, 5)).places["temperature"] == (Place("div", ""),)


def test_models_that_take_another_route():
    x = torch.randn(3, 5)
    explanation = explain(Residual(), x, capture="sequential")
    assert explanation.method == "jacobian_contraction"
    assert str(explanation).startswith("method: jacobian_contraction, since:")
    assert "Residual may compute between its modules" in str(explanation)
    with pytest.raises(UnsupportedModelError):
        explain(Residual(), x, method="structured", capture="sequential")


def test_methods_without_a_choice():
    with pytest.raises(ValueError, match=r"method must be 'auto' or 'structured'.* got 'vivit'"):
        explain(mlp(nn.Tanh)(), torch.randn(3, 5), method="vivit")


@pytest.mark.parametrize("capture", ["sequential", "autograd"])
def test_compute_is_all_axes_in_one_role(capture):
    model, x1, x2 = BY_NAME["output_image"].build()
    for compute, axes in [("trace", {"trace_axes": (0, 1, 2)}), ("diagonal", {"diagonal_axes": [0, -1, 1]})]:
        by_compute = explain(model, x1, x2, compute=compute, capture=capture)
        assert explain(model, x1, x2, capture=capture, **axes) == by_compute
        assert sum(c.flops for c in by_compute.contractions) < sum(c.flops for c in explain(model, x1, x2).contractions)


def test_params_are_selected():
    explanation = explain(wide_mlp(), torch.randn(3, 300), params=["0.bias"])
    assert [c.parameter for c in explanation.contractions] == ["0.bias"]


# ---------------------------------------------------------------- where parameters are used


def used(explanation):
    return {name: [tuple(place) for place in places] for name, places in explanation.places.items()}


def test_tied_weights_are_used_in_two_modules():
    model, x = TiedTransformer().eval(), torch.randint(7, (3, 4))
    explanation = explain(model, x)
    assert used(explanation)["embedding.weight"] == [("mm", "head"), ("embedding", "embedding")]
    pairs = [c for c in explanation.contractions if c.parameter == "embedding.weight"]
    assert {c.layer for c in pairs} == {"Embedding"}
    assert {(c.operation, c.module, c.uses) for c in pairs} == {("mm, embedding", "head, embedding", 2)}
    row = explanation.rows[-1]
    assert row.parameters == ("embedding.weight",)
    assert (row.operation, row.module, row.uses) == ("mm, embedding", "head, embedding", 2)
    assert row.flops == sum(c.flops for c in pairs)
    assert row.memory == max(c.memory for c in pairs)
    # out_proj is never called: attention takes its weight
    assert used(explanation)["block.self_attn.out_proj.weight"] == [("addmm", "block.self_attn")]
    assert used(explanation)["position"] == [("add", "")]


class Lent(nn.Module):
    """Calls one layer with the parameters of another."""

    def __init__(self):
        super().__init__()
        self.kept, self.lent, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.func.functional_call(self.lent, dict(self.kept.named_parameters()), (x,)).tanh())


def test_a_functional_call_runs_in_the_module_that_is_called():
    explanation = explain(Lent(), torch.randn(3, 4))
    assert used(explanation)["kept.weight"] == [("addmm", "lent")]
    assert "lent.weight" not in used(explanation)


def test_a_module_that_runs_several_times_is_listed_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2))
    model.forward = lambda x: model[4](model[0](model[0](x).tanh()).tanh())
    (c,) = (c for c in explain(model, torch.randn(3, 4)).contractions if c.parameter == "0.weight")
    assert (c.operation, c.module, c.uses) == ("addmm", "0", 2)
    del model.forward
    (c,) = (c for c in explain(model, torch.randn(3, 4)).contractions if c.parameter == "0.weight")
    assert (c.operation, c.module, c.uses) == ("Linear", "2, 0", 2)


def test_layers_of_a_sequential_model_are_named_by_their_types():
    model, x, _ = BY_NAME["tied_embedding"].build()
    assert used(explain(model, x)) == {"0.weight": [("Linear", "2"), ("Embedding", "0")]}
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 2))
    assert [(c.operation, c.module, c.uses) for c in explain(model, torch.randn(3, 5)).contractions] == [
        ("Linear", module, 1) for module in ("1", "1", "0.0", "0.0")
    ]


class Gru(nn.Module):
    """A classifier of sequences."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def test_steps_of_a_recurrent_layer_are_put_together():
    explanation = explain(Gru(), torch.randn(3, 6, 4))
    assert not explanation.fallback
    (c,) = (c for c in explanation.contractions if c.parameter == "gru.weight_hh_l0")
    assert (c.layer, c.operation, c.module, c.uses) == ("GRU", "addmm", "gru", 6)


def test_weights_that_are_computed_are_used_where_they_meet_samples():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    places = used(explain(model, torch.randn(3, 4), capture="autograd"))
    for name in ("original0", "original1"):
        assert places[f"2.parametrizations.weight.{name}"] == [("addmm", "2")]


# ---------------------------------------------------------------- rows


def test_rows_are_summed_by_module():
    model, x = TiedTransformer().eval(), torch.randint(7, (3, 4))
    explanation = explain(model, x, depth=1)
    assert [row.module for row in explanation.rows] == ["block", "(model)", "head, embedding"]
    block = explanation.rows[0]
    own = [c for c in explanation.contractions if c.module.startswith("block.")]
    assert (len(block.parameters), block.uses) == (12, 12)
    assert block.flops == sum(c.flops for c in own)
    assert block.memory == max(c.memory for c in own)
    printed = str(explanation).splitlines()
    assert printed[2].startswith("12 parameters     layer_norm, addmm, add, mm  block ")
    assert len(printed) == 2 + 3 + 1 + 2
    assert [row.module for row in explain(model, x, depth=2).rows][:2] == ["block.norm2", "block.linear2"]
    (row,) = explain(model, x, depth=0).rows
    assert row.flops == sum(c.flops for c in explanation.contractions)
    assert (len(row.parameters), row.uses, row.module) == (14, 15, "(model)")


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("sort", ["flops", "memory"])
def test_the_most_costly_come_first(sort, depth):
    x = torch.randn(6, 300)
    plain, ordered = explain(wide_mlp(), x, depth=depth), explain(wide_mlp(), x, depth=depth, sort=sort)
    costs = [getattr(row, sort) for row in ordered.rows]
    assert costs == sorted(costs, reverse=True)
    assert set(ordered.rows) == set(plain.rows)
    assert ordered.contractions == plain.contractions
    assert [row.module for row in plain.rows][::-1] == sorted(row.module for row in plain.rows)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": -1}, ValueError, r"depth must be 0, 1, 2, ... or None, got -1\."),
        ({"depth": "1"}, TypeError, r"depth must be an integer or None, got str\."),
        ({"depth": True}, TypeError, r"depth must be an integer or None, got bool\."),
        ({"sort": "time"}, ValueError, r"sort must be one of 'flops', 'memory' or None, got 'time'\."),
        ({"sort": 1}, ValueError, r"sort must be one of 'flops', 'memory' or None, got 1\."),
    ],
)
def test_arguments_of_rows(arguments, error, message):
    with pytest.raises(error, match=message):
        explain(wide_mlp(), torch.randn(3, 300), **arguments)


# ---------------------------------------------------------------- the model is left as it was


def hooks_of(model):
    return [dict(hooks) for module in model.modules() for hooks in forward_hooks(module)]


class Hooked(Residual):
    """Takes down at each evaluation how many hooks a layer has; may fail where these are more than its own."""

    seen: ClassVar = []  # not on the module, whose state is put back before each evaluation

    def __init__(self):
        super().__init__()
        self.fails = False

    def forward(self, x):
        self.seen.append([len(hooks) for hooks in forward_hooks(self.first)])
        if self.fails and self.seen[-1] == [2, 2]:
            raise ArithmeticError("it fails")
        return super().forward(x)


def test_hooks_are_left_as_found():
    model, x, calls = Hooked(), torch.randn(3, 5), set()
    model.first.register_forward_pre_hook(lambda module, args: calls.add("before"))
    model.first.register_forward_hook(lambda module, args, output: calls.add("behind"))
    found = hooks_of(model)
    model.seen.clear()
    assert used(explain(model, x))["first.weight"] == [("addmm", "first")]
    assert model.seen.count([2, 2]) == 1  # modules are noted in an evaluation of its own
    assert model.seen.count([1, 1]) == len(model.seen) - 1
    assert calls == {"before", "behind"}
    assert hooks_of(model) == found
    model.fails = True
    with pytest.raises(ArithmeticError, match="it fails"):
        explain(model, x)
    assert model.seen[-1] == [2, 2]
    assert hooks_of(model) == found


class Catching(nn.Module):
    """Goes on where a layer fails."""

    def __init__(self):
        super().__init__()
        self.failing, self.head = nn.Linear(4, 4), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x):
        try:
            x = self.failing(x)
        except RuntimeError:
            x = x * self.scale
        return self.head(x)


def test_a_call_that_fails_ends_there():
    assert used(explain(Catching(), torch.randn(3, 5)))["scale"] == [("mul", "")]


class Beside(Residual):
    """Has another thread call a layer meanwhile."""

    def forward(self, x):
        other = threading.Thread(target=self.second, args=(torch.ones(1, 6),))
        other.start()
        other.join()
        return super().forward(x)


def test_calls_of_other_threads_are_not_noted():
    places = used(explain(Beside(), torch.randn(3, 5)))
    assert places == used(explain(Residual(), torch.randn(3, 5)))
