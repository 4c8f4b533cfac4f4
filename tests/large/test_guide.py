"""The scripts of the page about large kernels, on a few samples."""

import importlib.util
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from ggn_ntk import KernelStore

pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "large.md").read_text()
SCRIPTS = {re.search(r'store="(\w+)\.zarr"', text)[1]: text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S)}


def script(name: str) -> str:
    """One of them, with fewer samples, in smaller tiles, and with workers that start quickly."""
    text = SCRIPTS[name].replace("1797", "20").replace("tile=225", "tile=5")
    if name == "mpi":  # each of its processes would import scikit-learn
        text = text.replace("from sklearn.datasets import load_digits\n", "")
        text = text.replace("torch.tensor(load_digits().images[:20], dtype=torch.float32)", "torch.rand(20, 8, 8)")
    return text.replace("Client()", "Client(processes=False, dashboard_address=None)")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "mpi"])  # which is run by test_executors
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_scripts(name, tmp_path, monkeypatch):
    if name == "dask" and importlib.util.find_spec("distributed") is None:
        pytest.skip("dask.distributed is not installed")
    (tmp_path / "script.py").write_text(script(name))
    monkeypatch.chdir(tmp_path)
    for i in range(4 if name == "array" else 1):
        monkeypatch.setitem(os.environ, "SLURM_ARRAY_TASK_ID", str(i))
        monkeypatch.setitem(os.environ, "SLURM_ARRAY_TASK_COUNT", "4")
        runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    store = KernelStore(tmp_path / f"{name}.zarr")
    assert store.complete
    assert store.shape == (20, 20)
    assert torch.equal(store.to_torch(), store.to_torch().T)
