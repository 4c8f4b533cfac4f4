"""Pages of benchmarks that are commands of their own: results in JSON, and a table below what the module says."""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment, title


def write_page(folder: Path, name: str, heading: str, doc: str | None, results: dict[str, Any], table: str) -> None:
    """Write results to a folder, and print the page.

    Args:
        folder: Where to put them.
        name: The name of the files.
        heading: What the page is about.
        doc: The module's docstring, of which all but the first paragraph stands above the table.
        results: What was measured.
        table: The same as a table, in Markdown.
    """
    environment = describe_environment("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"environment": environment, "results": results}, indent=1))
    text = f"# {heading}: {title(environment)}\n\n{(doc or '').split(chr(10), 2)[2].strip()}\n\n{table}\n"
    (folder / f"{name}.md").write_text(text)
    print(text)
