"""What the README, the pages and the docstrings show runs, and so does the gallery; what they say holds."""

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import matplotlib as mpl
import pytest

import ggn_ntk
from benchmarks import figures
from benchmarks.pictures import speed_data, speed_picture

ROOT = Path(__file__).parent.parent
NEURAL_TANGENTS = ROOT / ".venv-jax" / "bin" / "python"  # what `make benchmark` sets up

THEIRS = "neural-tangents"  # the column that does not run here

mpl.use("agg")

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
PAGES += [path for path in sorted((ROOT / "docs").rglob("*.md")) if not {"_build", "gallery"} & set(path.parts)]
SITE_ALONE = [
    ROOT / "docs" / name for name in ("api/index.md", "changelog.md", "contributing.md")
]  # no page of their own
MODULES = [m.name for m in pkgutil.walk_packages(ggn_ntk.__path__, "ggn_ntk.") if m.name != "ggn_ntk.__main__"]
NAMED = {f"ggn_ntk.{name}": getattr(ggn_ntk, name) for name in ggn_ntk.__all__}
PUBLIC_MODULES = [ggn_ntk, *(item for item in NAMED.values() if inspect.ismodule(item))]
PUBLIC = {name: item for name, item in NAMED.items() if not inspect.ismodule(item)}
for module in PUBLIC_MODULES[1:]:
    for name in module.__all__:
        item = getattr(module, name)
        if not any(item is other for other in PUBLIC.values()):  # else it is documented there
            PUBLIC[f"{module.__name__}.{name}"] = item


class Block(NamedTuple):
    """A fenced block of a page: what stands behind its fence, its text, and the head of its column in a table."""

    info: str
    text: str
    column: str

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def file(self) -> str:
        """The file of the package that a block of Python is, by its first line; empty for what a page runs."""
        found = re.match(r"# (ggn_ntk/\S+\.py)\n", self.text) if self.language == "python" else None
        return found.group(1) if found else ""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order; a table that stands for two columns of code names their heads."""
    found, heads, lines = [], iter(()), iter(page.read_text().splitlines())
    for line in lines:
        assert not re.match(r"\s+```|\s*~~~", line), f"{page.name} has a fence that the tests do not look for"
        if line.startswith("<table"):
            heads = iter(re.findall("<th>(.*?)</th>", line))
        elif line.startswith("```"):
            found.append(
                Block(line[3:].strip(), "\n".join(takewhile(lambda line: line != "```", lines)), next(heads, ""))
            )
    return found


def of_language(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_of_a_page_is_in_blocks_that_run(page):
    """Python runs below, with the changes of diffs; commands are those of the Makefile, a fence alone is a drawing."""
    assert {block.language for block in blocks(page)} <= {"python", "diff", "console", ""} or page in SITE_ALONE
    assert ">>>" not in page.read_text()
    assert not any(re.search(r"^(import|from \w+ import) ", b.text, re.M) for b in blocks(page) if b.language == "")


def run(page: Path) -> dict:
    """Run the Python of a page, in order and in one namespace, and return that."""
    namespace: dict = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.column != THEIRS:
            exec(compile(block.text, page_name(page), "exec"), namespace)
    return namespace


def test_readme(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(README)["ntk"].shape == (20, 5, 10, 10)


def change(root: Path, diff: str) -> None:
    """Change a file as a diff says, whose pieces, each behind a line of ``@@``, are found by their text alone."""
    name, *pieces = diff.split("\n@@\n")
    path = root / name.removeprefix("--- ")
    text = path.read_text()
    for piece in pieces:
        lines = piece.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != other) for other in "+-")
        assert text.count(old) == 1, f"{name} has no such place, or several:\n{old}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.parametrize("page", of_language("diff"), ids=page_name)
def test_changes_that_a_page_shows(page, tmp_path):
    """A copy of the package is changed as the page says, and its Python runs there."""
    shutil.copytree(ROOT / "ggn_ntk", tmp_path / "ggn_ntk", ignore=shutil.ignore_patterns("__pycache__"))
    script = ""
    for block in blocks(page):
        if block.language == "diff":
            change(tmp_path, block.text)
        elif block.file:
            assert not (tmp_path / block.file).exists()
            (tmp_path / block.file).write_text(f"{block.text}\n")
        elif block.language == "python":
            script += f"{block.text}\n"
    (tmp_path / "page.py").write_text(script)
    ran = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


RUN_HERE = [page for page in of_language("python") if page not in (README, *of_language("diff"))]


@pytest.mark.parametrize("page", RUN_HERE, ids=page_name)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, in jvp
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's, of transformers
def test_page(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_page_of_neural_tangents(tmp_path):
    """Their lines, in a Python that has neural-tangents: this one, or the one of `make benchmark`."""
    lines = [block.text for page in PAGES for block in blocks(page) if block.column == THEIRS]
    assert len(lines) >= 8
    python = str(NEURAL_TANGENTS) if NEURAL_TANGENTS.exists() else sys.executable
    if subprocess.run([python, "-c", "import neural_tangents"], capture_output=True, check=False).returncode:
        pytest.skip("neural-tangents is not installed; `make benchmark` installs it in .venv-jax")
    script = tmp_path / "page.py"
    script.write_text("\n".join(lines))
    ran = subprocess.run([python, script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_readme_names_targets_that_exist():
    text = "\n".join(block.text for page in PAGES for block in blocks(page) if block.language == "console")
    commands = set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "docs"} <= commands <= targets


def heading_anchors(page: Path) -> set[str]:
    """What links may name behind ``#``: headings in small letters, with hyphens for spaces."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The targets of links and pictures of a page that are no addresses."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [link for link in found if not link.startswith(("http:", "https:"))]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_of_the_repository(page):
    """Files that are there without a build, and headings of pages. Those of the site are checked by `make docs`."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not {"_build", "gallery"} & set(target.relative_to(ROOT).parts), link
        assert not anchor or anchor in heading_anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SITE_ALONE], ids=page_name)
def test_pages_are_plain_markdown(page):
    """They read whole where nothing is built: no directives, no roles, nothing included."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^:::|\{[a-z]+\}$", text, flags=re.MULTILINE)
    assert not re.search(r"\{[\w:]+\}`", page.read_text())
    assert not [block for block in blocks(page) if block.info.startswith("{")]


def test_links_out_of_docs_lead_to_pages_of_the_site():
    """Links to examples and to files at the root have pages of the site."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        on_site = importlib.import_module("links").on_site
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert on_site("[x](../../examples/example_pinn_weights.py)") == "[x](/gallery/example_pinn_weights.rst)"
    assert on_site("[x](../CONTRIBUTING.md#set-up)") == "[x](/contributing.md#set-up)"
    assert on_site("[x](../guide/README.md)") == "[x](../guide/README.md)"


def test_guide_lists_its_pages():
    listed = re.findall(r"^\| \[.*?\]\((\w+\.md)\)", (ROOT / "docs/guide/README.md").read_text(), flags=re.MULTILINE)
    assert sorted(["README.md", *listed]) == sorted(path.name for path in (ROOT / "docs/guide").glob("*.md"))


def test_readme_is_short():
    assert len(README.read_text().split()) < 700


@pytest.mark.parametrize("page", [page for page in figures.pages() if "measured:" in page.read_text()], ids=page_name)
def test_numbers_are_measured(page):
    assert figures.update(page.read_text()) == page.read_text(), "python -m benchmarks.figures writes them again"


def test_a_number_that_nobody_measured_is_an_error():
    for what in ("cpu a_workload seconds", "cpu cnn colour", "tpu cnn seconds", 'cpu cnn seconds "a peer"'):
        with pytest.raises(LookupError):
            figures.measured(what)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_picture_shows_what_was_measured(theme):
    assert escape(speed_data(figures.swept("cpu", "N"))) in speed_picture(theme).read_text()


def test_site_checker_finds_dead_links_and_empty_pages(tmp_path):
    (tmp_path / "good.html").write_text(f'<article id="here">{"word " * 30}<a href="good.html#here">x</a></article>')
    (tmp_path / "bad.html").write_text('<article><a href="gone.html">x</a><img src="good.html#there"></article>')
    found = runpy.run_path(str(ROOT / "docs" / "check_site.py"))["problems"](tmp_path)
    assert found == [
        "bad.html: empty (1 words)",
        "bad.html: gone.html does not exist",
        "bad.html: good.html#there names no place on that page",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("example_*.py")), ids=lambda path: path.stem)
def test_examples(path, monkeypatch, tmp_path):
    if path.stem == "example_large_kernel":
        pytest.importorskip("zarr", reason="large kernels need Python 3.11 or later")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GGN_NTK_GALLERY", "reduced")
    runpy.run_path(str(path), run_name="__main__")


def test_examples_say_what_they_answer():
    """Each begins with its question, and the gallery's page in the repository lists it."""
    listed = (ROOT / "examples" / "README.md").read_text()
    for path in sorted((ROOT / "examples").glob("example_*.py")):
        title, question = re.match(r'r"""\n(.+)\n=+\n\n\*\*(.+\?)\*\*\n\n', path.read_text()).groups()
        assert f"| [{title}]({path.name}) | {question} |" in listed


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


def test_code_in_public_docstrings_is_doctests():
    """A literal block would be code that nothing runs."""
    shown = {name: inspect.getdoc(item) or "" for name, item in PUBLIC.items()}
    assert not [name for name, text in shown.items() if re.search(r"::\n\n    ", text)]
    assert any(">>>" in text for text in shown.values())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_in_the_reference(name):
    pages = "".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.rst")))
    by_module = "automodule:: ggn_ntk.plots\n   :members:" in pages and name.startswith("ggn_ntk.plots.")
    assert by_module or re.search(rf"^\.\. auto\w+:: {re.escape(name)}(\(\))?$", pages, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, item in PUBLIC.items() if inspect.isfunction(item)])
def test_public_function_states_shapes_and_errors(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert {"Args:", "Returns:"} <= set(text.splitlines())
    if not name.startswith("ggn_ntk.rules."):  # what is wrong there, shows when a kernel is computed
        assert "Raises:" in text.splitlines()
        assert "``[" in text


@pytest.mark.parametrize("name", [name for name, item in PUBLIC.items() if inspect.isfunction(item)])
def test_public_function_names_its_source(name):
    """A publication, with its year, in its own docstring or in that of its module."""
    if not name.startswith("ggn_ntk.plots."):  # these draw what others compute
        texts = [inspect.getdoc(PUBLIC[name]) or "", inspect.getmodule(PUBLIC[name]).__doc__ or ""]
        assert any(re.search(r"\b(19|20)\d\d\b", text) for text in texts)


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "examples").glob("*.py"))], ids=page_name)
def test_what_pages_import_is_public(path):
    public = {module.__name__: {*module.__all__, "__version__"} for module in PUBLIC_MODULES}
    text = path.read_text()
    for block in blocks(path) if path.suffix == ".md" else ():
        if block.file or block.language == "diff":  # the package itself may import what is not
            text = text.replace(block.text, "")
    imports = re.findall(r"^ *from (ggn_ntk[\w.]*) import (?:\(([^)]*)\)|([^(\n]+))", text, re.MULTILINE)
    for module, several, some in imports:
        assert module in public
        assert {name.split()[0] for name in (several or some).split(",") if name.strip()} <= public[module]
    assert not re.search(r"^ *import ggn_ntk\.", text, re.MULTILINE)


def test_the_reference_names_what_is_public():
    public = {f"{module.__name__}.{name}" for module in PUBLIC_MODULES for name in module.__all__} | {"ggn_ntk"}
    pages = [path for folder in ("docs", "examples") for path in (ROOT / folder).rglob("*.*")]
    pages = [p for p in pages if p.suffix in (".rst", ".md", ".py") and not {"_build", "gallery"} & set(p.parts)]
    for page in pages:
        shown = re.findall(r"^\.\. auto\w+:: ([\w.]+)", page.read_text(), flags=re.MULTILINE)
        shown += re.findall(r"[{:]\w+[}:]`~?(ggn_ntk[\w.]*)", page.read_text())
        assert {*shown} <= public, page


def test_citation():
    """What version 1.2.0 of the format asks for; `make dist` validates all of it."""
    text = (ROOT / "CITATION.cff").read_text()
    values = dict(re.findall(r'^([\w-]+): "?([^"\n]+)"?$', text, flags=re.MULTILINE))
    assert {"cff-version", "title", "message", "type", "version", "license"} <= set(values)
    assert values["cff-version"] == "1.2.0"
    assert values["type"] == "software"
    assert values["version"] == ggn_ntk.__version__
    assert re.search(r"^authors:\n  - name: ", text, flags=re.MULTILINE)
    for reference in text.split("\n  - type: ")[1:]:  # each names who wrote it, and what
        assert {"title", "authors", "year"} <= set(re.findall(r"^    (\w+):", reference, flags=re.MULTILINE))


def test_version_is_in_the_changelog():
    assert f"## {ggn_ntk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
