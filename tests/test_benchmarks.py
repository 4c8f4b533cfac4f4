"""What the benchmarks compute, count and report; not how long it takes."""

from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import by_hand, check, contenders, plan, te_nas
from benchmarks.environment import slug
from benchmarks.failures import OUT_OF_MEMORY, describe
from benchmarks.floor import floor
from benchmarks.network import network, samples
from benchmarks.plots import SUMMARY_PLOT, sweep_plot
from benchmarks.report import write_report
from benchmarks.results import Measurement, Results, WorkloadResult
from benchmarks.workloads import SWEEPS, WORKLOADS, Workload
from ggn_ntk import empirical_ntk, explain

SMALL = Workload(
    "small",
    (("conv", 2, 3, 1), ("relu",), ("maxpool",), ("conv", 3, 4, 0), ("flatten",), ("linear", 16, 5)),
    (2, 8, 8),
    3,
    2,
)
TRACED = Workload("traced", (("conv", 2, 3, 1), ("relu",), ("conv", 3, 4, 0)), (2, 4, 4), 3, 2, trace_axes=(1, 2))
ENVIRONMENT = {"date": "2026-01-31", "CPU": "A CPU (TM)", "cores": "2", "torch": "2.6.0"}


def test_network_has_the_drawn_weights_and_shapes():
    x1, _ = samples(SMALL, 1, dtype=torch.float64)
    model = network(SMALL, dtype=torch.float64)
    shapes = [SMALL.shape]
    for module in model:
        x1 = module(x1)
        shapes.append(tuple(x1.shape[1:]))
    assert shapes == SMALL.shapes()
    drawn = [values for pair in SMALL.parameters() if pair is not None for values in pair]
    for param, values in zip(model.parameters(), drawn, strict=True):
        assert np.array_equal(param.detach().numpy(), values.astype(np.float64))


def test_inputs_are_fresh_for_each_seed_and_equal_for_all():
    first, again, other = SMALL.inputs(1), SMALL.inputs(1), SMALL.inputs(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("compute", ["full", "trace"])
def test_check_tells_right_from_wrong(compute):
    workload = Workload("small", SMALL.layers, SMALL.shape, 3, 2, compute)
    x1, x2 = samples(workload, 1)
    spot = check.spot(workload, network(workload, dtype=torch.float64), 1)
    kernel = empirical_ntk(network(workload), x1, x2, compute=compute).numpy()
    assert spot.error(kernel) < 1e-5
    assert spot.error(1.01 * kernel) > check.TOLERANCE


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # by torch's own jvp
@pytest.mark.parametrize("contender", [plan.JACOBIANS, plan.PRODUCTS, plan.VIVIT, plan.GGN_NTK])
def test_contenders_agree(contender):
    load, run = contenders.prepare(contender, SMALL, "cpu")
    spot = check.spot(SMALL, network(SMALL, dtype=torch.float64), 3)
    assert spot.error(run(*(load(x) for x in SMALL.inputs(3))).numpy()) < 1e-5


@pytest.mark.parametrize("contender", plan.contenders_of(TRACED))
def test_contenders_agree_where_axes_are_traced(contender):
    load, run = contenders.prepare(contender, TRACED, "cpu")
    spot = check.spot(TRACED, network(TRACED, dtype=torch.float64), 3)
    kernel = run(*(load(x) for x in TRACED.inputs(3))).numpy()
    assert kernel.shape == (3, 2, 4, 4)
    assert spot.error(kernel) < 1e-5
    assert spot.error(1.01 * kernel) > check.TOLERANCE


def test_floor_counts_what_explain_counts():
    x1, x2 = samples(SMALL, 0)
    contractions = explain(network(SMALL), x1, x2).contractions
    counted = floor(SMALL)
    weights = sum(c.flops for c in contractions if c.parameter.endswith("weight"))
    assert counted.contraction <= 1.01 * weights
    # 64 positions of 18 by 3, 4 of 27 by 4, then 16 by 5; s is shared up to the pooling layer
    assert counted.forward == 5 * 2 * (64 * 18 * 3 + 4 * 27 * 4 + 16 * 5)
    assert counted.backward == 5 * 2 * (4 * 27 * 4)


def test_workloads_are_named_by_their_own_name():
    assert all(name == workload.name for name, workload in WORKLOADS.items())
    assert len(WORKLOADS) == len(set(WORKLOADS.values()))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate", OUT_OF_MEMORY),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory", OUT_OF_MEMORY),
        ("it died with status -6:   what():  std::bad_alloc", OUT_OF_MEMORY),
        ("ValueError: two\n  lines", "ValueError: two lines"),
        ("x" * 1000, "x" * 200 + "..."),
    ],
)
def test_failures(message, said):
    assert describe(message) == said


def made_up_results() -> Results:
    measurements = {name: Measurement([0.5, 0.1 * (i + 1), 0.3], 100.0 * i, 1e-7) for i, name in enumerate(plan.SWEPT)}
    measurements[plan.PRODUCTS] = Measurement(failure=OUT_OF_MEMORY)
    measurements[plan.VIVIT].spot_error = 0.07
    result = WorkloadResult("cnn", 20, 5, 10, measurements, [2e11, 3e11, 2.5e11], 1e10)
    overhead = dict.fromkeys((plan.STEP, plan.BATCH_GRAD_STEP, plan.KERNEL_STEP, plan.ALONE), Measurement([0.1], 0, 0))
    counts = {"cnn": {"launches": 304, "syncs": 5}, "mlp_ReLU": {"launches": 192, "syncs": 6}}
    return Results(ENVIRONMENT, [result], {"N": dict.fromkeys(SWEEPS["N"], result)}, overhead, counts)


def test_results_are_kept(tmp_path):
    results = made_up_results()
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_report(tmp_path):
    write_report(made_up_results(), tmp_path)
    report = (tmp_path / "README.md").read_text()
    assert "# A CPU (TM), 2 cores, torch 2.6.0, 2026-01-31" in report
    for picture in (SUMMARY_PLOT, sweep_plot("N")):
        assert f"({picture})" in report
        assert (tmp_path / picture).stat().st_size > 0
    assert OUT_OF_MEMORY in report
    assert "**wrong: 7e-02**" in report
    assert "10 GFLOP at 250 GFLOP/s (200 to 300)" in report
    assert "| cnn | 304 | 5 |" in report
    assert "mlp_ReLU" not in report
    assert "| mlp_ReLU | 192 | 6 |" in (tmp_path / "counts.md").read_text()
    tables = [line for line in report.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in tables)


def test_report_of_two_commits(tmp_path):
    measurements = {plan.GGN_NTK: Measurement([0.3], 100, 0), plan.BEFORE: Measurement([0.2], 50, 0)}
    results = Results({**ENVIRONMENT, plan.BEFORE: "f2a7431"}, [WorkloadResult("cnn", 20, 5, 10, measurements)])
    write_report(results, tmp_path)
    report = (tmp_path / "README.md").read_text()
    assert "| cnn | 0.300 | 0.200 | 1.50x | 2.00x |" in report
    assert "| ggn_ntk before | f2a7431 |" in report
    assert SUMMARY_PLOT not in report


def test_folders_are_named_by_device_version_and_date():
    assert slug(ENVIRONMENT) == "a-cpu-tm-2-cores-torch-2.6.0-2026-01-31"
    assert slug({**ENVIRONMENT, "GPU": "NVIDIA H200"}) == "nvidia-h200-torch-2.6.0-2026-01-31"


def test_models_beside_loops_by_hand(monkeypatch):
    case = by_hand.Case(lambda: by_hand._Unrolled(3, 2), lambda: torch.randn(4, 5, 8))
    residuals = [
        by_hand.Case(partial(kind, 4), lambda: torch.randn(4, 2)) for kind in by_hand._Residual.__subclasses__()
    ]
    paired = by_hand.Case(lambda: torch.nn.Linear(3, 2), lambda: torch.randn(4, 3), paired=True)
    monkeypatch.setattr(by_hand, "CASES", {"unrolled": case, "residual": residuals[0], "paired": paired})
    results = {name: by_hand.measure(name, 1) for name in by_hand.CASES}
    for result in results.values():
        assert result["error"] < 1e-5
        assert result["covered"] == 1
        assert len(result["seconds"]) == 5
    assert by_hand.table(results).splitlines()[2].startswith("| unrolled | 100.0% | ")


def test_condition_numbers_of_cells(capsys):
    te_nas.main(["--cells", "1", "--batch", "6", "--size", "4"])
    _, row, last = capsys.readouterr().out.strip().splitlines()
    *_, covered, by_loop, by_library, error, _, _ = row.split()
    assert covered == "100%"
    assert float(error) < 1e-5
    assert float(by_library) == pytest.approx(float(by_loop), rel=1e-2)
    assert last.startswith("The loop takes ")
