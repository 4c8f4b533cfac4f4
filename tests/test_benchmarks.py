"""What the benchmarks compute, count and report; not how long it takes."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import by_hand, check, contenders, large, operator, plan, predictions, te_nas
from benchmarks.environment import slug
from benchmarks.failures import OUT_OF_MEMORY, describe
from benchmarks.floor import floor
from benchmarks.network import network, samples
from benchmarks.plots import SUMMARY_PLOT, sweep_plot
from benchmarks.process import Contender
from benchmarks.report import write_report
from benchmarks.results import Measurement, Results, WorkloadResult
from benchmarks.workloads import SWEEPS, WORKLOADS, Workload, tiny
from ggn_ntk import empirical_ntk, explain

SMALL = Workload(
    "small",
    (("conv", 2, 3, 1), ("relu",), ("maxpool",), ("conv", 3, 4, 0), ("flatten",), ("linear", 16, 5)),
    (2, 8, 8),
    3,
    2,
)
MLP = Workload("mlp", (("linear", 6, 5), ("relu",), ("linear", 5, 4), ("relu",), ("linear", 4, 3)), (6,), 3, 2)
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
@pytest.mark.parametrize(
    ("workload", "contender", "shape"),
    [
        *((SMALL, name, (3, 2, 5, 5)) for name in (plan.JACOBIANS, plan.PRODUCTS, plan.VIVIT, plan.GGN_NTK)),
        *((MLP, name, (3, 2, 3, 3)) for name in (plan.PREPARED, plan.BY_HAND)),
        *((replace(MLP, compute="trace"), name, (3, 2)) for name in (plan.PREPARED, plan.GRADIENTS)),
        (replace(MLP, n2=3, compute="trace", symmetric=True), plan.GRADIENTS, (3, 3)),
        *((replace(SMALL, n2=3, paired=True), name, (3, 5, 5)) for name in (plan.GGN_NTK, plan.JACOBIANS)),
        *((TRACED, name, (3, 2, 4, 4)) for name in plan.contenders_of(TRACED)),
    ],
    ids=lambda value: value.name if isinstance(value, Workload) else str(value),
)
def test_contenders_agree(workload, contender, shape):
    load, run = contenders.prepare(contender, workload, "cpu")
    spot = check.spot(workload, network(workload, dtype=torch.float64), 3)
    kernel = run(*(load(x) for x in workload.inputs(3))).numpy()
    assert kernel.shape == shape
    assert spot.error(kernel) < 1e-5
    assert spot.error(1.01 * kernel) > check.TOLERANCE


def test_each_workload_has_a_tiny_one_that_its_contenders_can_do():
    for workload in WORKLOADS.values():
        small = tiny(workload)
        assert (small.compute, small.symmetric, small.paired) == (
            workload.compute,
            workload.symmetric,
            workload.paired,
        )
    load, run = contenders.prepare(plan.BY_HAND, tiny(WORKLOADS["small"]), "cpu")
    assert run(*(load(x) for x in tiny(WORKLOADS["small"]).inputs(0))).shape == (2, 2, 2, 2)


def test_resnet_for_small_images_keeps_their_positions():
    workload = WORKLOADS["resnet18_cifar"]
    seen = []
    model = network(workload)
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert model(samples(workload, 0)[0][:1]).shape == (1, 10)
    assert seen == [(1, 64, 32, 32)]


def test_a_process_computes_several_kernels_and_saves_that_of_its_seed(tmp_path):
    workload = WORKLOADS["quick mlp"]
    with Contender(plan.GGN_NTK, workload, "cpu", tmp_path) as process:
        process.wait()
        seconds, _ = process.compute(7, tmp_path / "kernel.npy", calls=3)
    assert seconds > 0
    spot = check.spot(workload, network(workload, dtype=torch.float64), 7)
    assert spot.error(np.load(tmp_path / "kernel.npy")) < 1e-5


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
    names = plan.swept(SWEEPS["N"])
    measurements = {name: Measurement([0.5, 0.1 * (i + 1), 0.3], 100.0 * i, 1e-7) for i, name in enumerate(names)}
    measurements[plan.PRODUCTS] = Measurement(failure=OUT_OF_MEMORY)
    measurements[plan.VIVIT].spot_error = 0.07
    result = WorkloadResult("cnn", 20, 5, 10, measurements, [2e11, 3e11, 2.5e11], 1e10)
    overhead = dict.fromkeys((plan.STEP, plan.BATCH_GRAD_STEP, plan.KERNEL_STEP, plan.ALONE), Measurement([0.1], 0, 0))
    counts = {"cnn": {"launches": 304, "syncs": 5}, "mlp_ReLU": {"launches": 192, "syncs": 6}}
    commits = {name: Measurement([0.1 * (i + 2)], 50.0 * (i + 1), 0) for i, name in enumerate(plan.AGAINST)}
    return Results(
        {**ENVIRONMENT, plan.BEFORE: "f2a7431"},
        [result],
        [WorkloadResult("cnn", 20, 5, 10, commits)],
        {"N": dict.fromkeys(SWEEPS["N"].workloads, result)},
        overhead,
        counts,
        {"GRU": {"seconds": {"loop": [0.5]}, "error": 1e-7, "covered": 1.0}},
        {"skip skip": {"seconds, loop": 0.2, "seconds, library": 0.1}},
        {"cnn": 1.5, "N": 2.5},
        {"regression": {"seconds": 0.5, "busy seconds": 1.0, "load": 2.0}},
    )


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
    assert "| minutes of the run | 4 |" in report
    assert "| cnn | 0.200 | 0.300 | 0.667x | 0.500x | 0.400 | 0.500 | 0.800x | 0.750x |" in report
    assert "| ggn_ntk before | f2a7431 |" in report
    assert "| GRU | 100.0% |  |  |  | 500 ms |  |  |" in (tmp_path / "by_hand.md").read_text()
    assert "The loop takes 2.00 times as long (median of 1 cells)." in (tmp_path / "te_nas.md").read_text()
    assert "| regression | 0.5 | – | 1 | – | – | – | – | 2.0 |" in (tmp_path / "predictions.md").read_text()
    assert "mlp_ReLU" not in report
    assert "| mlp_ReLU | 192 | 6 |" in (tmp_path / "counts.md").read_text()
    tables = [line for line in report.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in tables)


def test_results_are_put_in_the_order_of_the_tables():
    results = Results(ENVIRONMENT)
    for name in ("vgg", "cnn", "vgg"):
        results.put(WorkloadResult(name, 1, 1, 1, {}))
    assert [result.name for result in results.workloads] == ["cnn", "vgg"]


def test_parts_of_a_run_gather_in_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "measure_overhead", lambda *_: {})
    monkeypatch.setattr(main, "run_workload", lambda workload, names, *_, **__: made_up(workload, names))
    arguments = ["--output", str(tmp_path)]
    assert main.main([*arguments, "--only", "vgg", "overhead"]) == 0
    assert main.main([*arguments, "--only", "cnn"]) == 0
    kept = Results.load(tmp_path / "results.json")
    assert [result.name for result in kept.workloads] == ["cnn", "vgg"]
    assert set(kept.took) == {"vgg", "overhead", "cnn"}
    assert "vgg" in (tmp_path / "README.md").read_text()
    with pytest.raises(SystemExit):
        main.main([*arguments, "--only", "N", "--against", "HEAD"])
    assert "--against compares workloads, not N" in capsys.readouterr().err


def made_up(workload: Workload, names: list[str]) -> WorkloadResult:
    return WorkloadResult(workload.name, 1, 1, 1, {name: Measurement([0.1], 10, 0) for name in names})


def test_folders_are_named_by_device_version_and_date():
    assert slug(ENVIRONMENT) == "a-cpu-tm-2-cores-torch-2.6.0-2026-01-31"
    assert slug({**ENVIRONMENT, "GPU": "NVIDIA H200"}) == "nvidia-h200-torch-2.6.0-2026-01-31"


def test_models_beside_loops_by_hand(monkeypatch):
    case = by_hand.Case(lambda: by_hand._Unrolled(3, 2), lambda: torch.randn(4, 5, 8))
    residuals = [
        by_hand.Case(partial(kind, 4), lambda: torch.randn(4, 2)) for kind in by_hand._Residual.__subclasses__()
    ]
    monkeypatch.setattr(by_hand, "CASES", {"unrolled": case, "residual": residuals[0]})
    results = {name: by_hand.measure(name, 1) for name in by_hand.CASES}
    for result in results.values():
        assert result["error"] < 1e-5
        assert result["covered"] == 1
        assert len(result["seconds"]) == 5
    assert by_hand.table(results).splitlines()[2].startswith("| unrolled | 100.0% | ")


def test_predictions_beside_eigendecompositions(monkeypatch):
    measured = predictions.measure((40, 60))
    assert all(numbers["relative difference"] < 1e-8 for numbers in measured.values())
    assert "| kernel_ridge_regression, N C = 60, threads: 1 | " in predictions.table(measured)
    monkeypatch.setattr(predictions, "_PATIENCE", 0.0)
    left_out = predictions.table(predictions.measure((40, 60)))
    assert left_out.count(" | – | ") > 0


def test_condition_numbers_of_cells():
    measured = te_nas.measure(cells=1, batch=6, size=4)
    (numbers,) = measured.values()
    assert numbers["covered by rules"] == 1
    assert numbers["error of the kernel"] < 1e-5
    assert numbers["condition, library"] == pytest.approx(numbers["condition, loop"], rel=1e-2)
    assert "The loop takes " in te_nas.table(measured)


def test_kernels_in_tiles():
    pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")
    found = large.measure(large.Case(large.digits_cnn, (1, 8, 8), 6, 4), tile=3, pools=False)
    assert found["tile"] == (3, 3)
    assert found["seconds"].keys() == {"tiles", "one call", "contractions", "evaluation"}
    assert large.table({"small": found}).splitlines()[2].startswith("| small | 3 x 3 | ")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux")
def test_products_without_the_kernel(monkeypatch):
    small = operator.Case(lambda: operator._mlp(3, 4, 2), lambda: torch.randn(6, 3))
    monkeypatch.setattr(operator, "CASES", {"one": small, "several": small._replace(vectors=3)})
    results = {name: operator.measure(name, 1) for name in operator.CASES}
    assert all(result["error"] < 1e-5 for result in results.values())
    assert operator.table(results).splitlines()[2].startswith("| one | ")


def test_peers_without_torch_find_what_they_need():
    code = "import sys; sys.modules['torch'] = None; import benchmarks.worker"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
