"""Pages are written for the repository, where each reads whole. This makes pages of the site of them.

Links to examples and to files at the root lead to their pages of the site, names in code lead to the reference,
pictures follow the theme, and the start page gets its contents.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from links import on_site
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import ggn_ntk

#: The guide's page that lists the others, which is their order.
_GUIDE = Path(__file__).parent / "guide" / "README.md"

_CONTENTS = {
    "User guide": [
        "guide/README",
        *(f"guide/{page}" for page in re.findall(r"^\| \[.*?\]\((\w+)\.md\)", _GUIDE.read_text(), re.M)),
    ],
    "How it works": [
        "derivation",
        "Order of contraction <gallery/example_contraction_order>",
        "architecture",
        "extend/layer",
        "extend/route",
        "extend/keyword",
    ],
    "Beside others": [
        "comparison",
        "coming_from/neural_tangents",
        "coming_from/torch_func",
        "coming_from/laplace",
        "coming_from/curvlinops",
        "coming_from/nngeometry",
        "benchmarks/README",
    ],
    "Reference": ["gallery/index", "api/index", "changelog", "contributing"],
}


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    if app.env.doc2path(docname).suffix == ".md":
        source[0] = on_site(source[0])
    if docname == "index":
        for caption, pages in _CONTENTS.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def _public_names() -> dict[str, str]:
    """Find the full name of each public name that is unique, by itself and with its module's."""
    modules = {name: item for name in ggn_ntk.__all__ if type(item := getattr(ggn_ntk, name)).__name__ == "module"}
    names = {name: f"ggn_ntk.{name}" for name in ggn_ntk.__all__ if name not in modules}
    for module, item in modules.items():
        for name in item.__all__:
            names.setdefault(name, f"ggn_ntk.{module}.{name}")
            names[f"{module}.{name}"] = names[name]
    return names


class NamesInCode(SphinxPostTransform):
    """Link the first mention of a public name on a page, in code, to the reference."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs: Any) -> None:
        """Put references around names.

        Args:
            **kwargs: Nothing.
        """
        names, seen = _public_names(), set()
        if self.env.doc2path(self.env.docname).suffix != ".md":
            return
        for code in list(self.document.findall(nodes.literal)):
            target = names.get(code.astext().removeprefix("ggn_ntk."))
            if target is None or target in seen or isinstance(code.parent, nodes.reference | nodes.title):
                continue
            seen.add(target)
            reference = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname, refwarn=True
            )
            code.replace_self(reference)
            reference += code


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what makes pages of the site.

    Args:
        app: The builder.

    Returns:
        What Sphinx wants to know of an extension.
    """
    app.connect("source-read", _read)
    app.add_post_transform(NamesInCode)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
