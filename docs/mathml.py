"""Formulas as MathML, which browsers draw by themselves: no script is loaded, and pages read the same offline."""

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx


def _inline(writer: Any, node: nodes.math) -> None:
    """Write a formula that stands in the text.

    Args:
        writer: What writes the page.
        node: The formula.

    Raises:
        SkipNode: Always: nothing of it is left to write.
    """
    writer.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def _display(writer: Any, node: nodes.math_block) -> None:
    """Write a formula that stands by itself.

    Args:
        writer: What writes the page.
        node: The formula.

    Raises:
        SkipNode: Always: nothing of it is left to write.
    """
    writer.body.append('<div class="formula">')
    writer.body.append(latex2mathml.tex2mathml(node.astext(), as_block=True))
    writer.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the writer of formulas.

    Args:
        app: The builder.

    Returns:
        What Sphinx wants to know of an extension.
    """
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
