"""Links and pictures in pages for the repository, as the site has them."""

import re

#: Where files outside of ``docs/`` are on the site.
_ELSEWHERE = {
    "examples/README.md": "/gallery/index.rst",
    "README.md": "/index.md",
    "CHANGELOG.md": "/changelog.md",
    "CONTRIBUTING.md": "/contributing.md",
}

_LINK = re.compile(r"\]\((?:\.\./)+([\w./-]+?)(#[\w.-]+)?\)")
_PICTURE = re.compile(r'<picture><source [^>]*srcset="([^"]*)"><img src="([^"]*)"([^>]*)></picture>')


def on_site(text: str) -> str:
    """Let links that lead out of ``docs/`` lead to pages of the site, and pictures follow its theme.

    Args:
        text: A page.

    Returns:
        The page for the site.
    """
    text = _PICTURE.sub(r'<img class="only-dark" src="\1"\3><img class="only-light" src="\2"\3>', text)
    return _LINK.sub(_site_link, text)


def _site_link(link: re.Match[str]) -> str:
    """Write a link for the site."""
    path, anchor = link[1], link[2] or ""
    if example := re.fullmatch(r"examples/(example_\w+)\.py", path):
        return f"](/gallery/{example[1]}.rst)"
    return f"]({_ELSEWHERE[path]}{anchor})" if path in _ELSEWHERE else link[0]
