"""How Sphinx builds this documentation; ``make docs`` runs it."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx_gallery.sorting import ExplicitOrder

import ggn_ntk

_DOCS = Path(__file__).parent
sys.path.insert(0, str(_DOCS))  # links.py, mathml.py, repository.py

project = "ggn_ntk"
author = "The ggn_ntk developers"
project_copyright = author
version = release = ggn_ntk.__version__

extensions = [
    "mathml",
    "myst_parser",
    "repository",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",  # folders whose names begin with an underscore are served, too
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"ggn_ntk {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

# Every reference has to resolve, but for those to other packages: their inventories would have to be downloaded.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(backpack|collections|curvlinops|matplotlib|numpy|os|pathlib|scipy|torch|typing|vivit)\..*"),
    (r"py:.*", r"(Any|Axes|Callable|Iterable|Mapping|Module|Size|Tensor|ArrayLike|optional|.*\bTensor\b.*)"),
    (r"py:.*", r"ggn_ntk\..*\.(_\w+|Shared)"),  # type variables, and what only `shared` makes
]

# torch, at each backward pass of a BackPACK pipeline whose input needs no gradient
warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)

_ORDER = [
    "example_ntk_vivit.py",
    "example_any_module.py",
    "example_contraction_order.py",
    "example_layer_rule.py",
    "example_linearized_training.py",
    "example_kernel_during_training.py",
    "example_pinn_weights.py",
    "example_ntk_regression.py",
    "example_large_kernel.py",
    "example_gp_without_kernel.py",
    "example_projected_features.py",
    "example_spectrum_alignment.py",
]
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "example_",
    "within_subsection_order": ExplicitOrder([*_ORDER, "*"]),
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}


# What follows the summaries of the committed runs on the page about benchmarks.
_AFTER_RESULTS = "## How it is measured"


def _add_results(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add the summary of each committed benchmark run to the page about benchmarks, the latest first.

    Args:
        app: The builder.
        docname: The page.
        source: Its text, in a list of one, which is changed.
    """
    if docname != "benchmarks/README":
        return
    reports = sorted((_DOCS / "benchmarks").glob("*/README.md"), key=lambda path: path.parent.name[-10:], reverse=True)
    parts = []
    for report in reports:
        app.env.note_dependency(str(report))
        heading, *sections = report.read_text().split("\n## ")
        folder, title = report.parent.name, heading.splitlines()[0].removeprefix("# ")
        parts.append(f"### [{title}]({folder}/README.md)")
        summaries = [section.removeprefix("Summary") for section in sections if section.startswith("Summary")]
        parts += [summary.replace("](", f"]({folder}/") for summary in summaries]
    parts.append("```{toctree}\n:hidden:\n:glob:\n\n*/*\n```")
    before, after = source[0].split(_AFTER_RESULTS)
    source[0] = "\n\n".join([before, *parts, _AFTER_RESULTS + after])


def _drop_links_back(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out the links from source code to the reference, which miss names that are documented in two modules.

    Args:
        app: The builder.
        pagename: The page.
        templatename: Its template.
        context: What fills the template, which is changed.
        doctree: The page's document, of which source code has none.
    """
    if pagename.startswith("_modules/"):
        context["body"] = re.sub(r'<a class="viewcode-back".*?</a>', "", context["body"])


def setup(app: Sphinx) -> None:
    """Register what is particular to this documentation.

    Args:
        app: The builder.
    """
    app.connect("source-read", _add_results)
    app.connect("html-page-context", _drop_links_back)
