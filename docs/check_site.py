"""Check a built site: every link and picture inside of it leads somewhere, and no page is empty.

``python docs/check_site.py docs/_build/html`` prints what is wrong, and fails if anything is.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Pages of fewer words are empty: a heading and a link make up less.
_FEWEST_WORDS = 20

# Written by Sphinx for scripts to fill, or for search engines.
_WITHOUT_TEXT = {"search.html", "genindex.html", "py-modindex.html"}


class Page(HTMLParser):
    """What a page links to, what can be linked to on it, and what it says.

    Attributes:
        links: Targets of links, pictures, styles and scripts.
        anchors: What links can name behind ``#``.
        words: The number of words of its article.
    """

    def __init__(self, path: Path) -> None:
        """Read a page.

        Args:
            path: The file.
        """
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.words = 0
        self._inside = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes of a tag that make or take links.

        Args:
            tag: Its name.
            attrs: Its attributes.
        """
        self._inside |= tag == "article"
        given = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        self.links += [value for name in ("href", "src") if (value := given.get(name))]

    def handle_endtag(self, tag: str) -> None:
        """Note the end of the article.

        Args:
            tag: The name of the tag.
        """
        self._inside &= tag != "article"

    def handle_data(self, data: str) -> None:
        """Count words.

        Args:
            data: Text between tags.
        """
        self.words += len(data.split()) * self._inside


def problems(site: Path) -> list[str]:
    """Look for what is wrong with a site.

    Args:
        site: The folder of the built pages.

    Returns:
        A line for each problem.
    """
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    found = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        where = path.relative_to(site)
        if page.words < _FEWEST_WORDS and path.name not in _WITHOUT_TEXT:
            found.append(f"{where}: empty ({page.words} words)")
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            known = next((page for path, page in pages.items() if path.resolve() == target), None)
            if not target.exists():
                found.append(f"{where}: {link} does not exist")
            elif parts.fragment and known is not None and unquote(parts.fragment) not in known.anchors:
                found.append(f"{where}: {link} names no place on that page")
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join([*lines, f"{len(lines)} problems in {sys.argv[1]}"]))
    sys.exit(bool(lines))
