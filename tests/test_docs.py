"""What the README shows, and the gallery, run."""

import re
import runpy
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parent.parent

mpl.use("agg")


def test_readme(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["ntk"].shape == (20, 5, 10, 10)


def test_readme_names_targets_that_exist():
    commands = set(re.findall(r"make (\w+)  ", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= commands <= targets


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("example_*.py")), ids=lambda path: path.stem)
def test_examples(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GGN_NTK_GALLERY", "reduced")
    runpy.run_path(str(path), run_name="__main__")


def test_version_is_in_the_changelog():
    from ggn_ntk import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
