"""Makes pages of the site from texts that stand elsewhere in the repository, and keeps links right in both.

Pages link as the repository does, to ``../../resources/format.md`` for example. The site has a copy of each such text,
the notebooks with what they printed included, in its folder ``repository``, and links lead there. Links to other files,
such as scripts and figures, become downloads. A link that leads nowhere ends the build.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
COPIES = "repository"
"""The folder of the copies, in ``docs`` while the site is built, and in the site."""

TEXTS = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/notebooks/*.ipynb",
    "resources/format.md",
    "resources/benchmarks/*.md",
)
"""Texts outside of ``docs`` that are pages of the site."""

LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]+)?\)")


def texts() -> list[str]:
    """Return the paths of the texts in the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in TEXTS for path in ROOT.glob(pattern))


def with_links_of_site(text: str, page: str) -> str:
    """Return the text of ``page``, a path in the repository, with its relative links as the site needs them.

    Raises:
        LookupError: there is no file, or no page of the site, where a link leads.
    """

    def in_site(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(page).parent / link[1])
        if target == "README.md":
            found = "/index.md"
        elif target in texts():
            found = f"/{COPIES}/{target}"
        elif target.startswith("docs/") and (ROOT / target).is_file():
            found = target.removeprefix("docs")
        elif not target.endswith(".md") and (ROOT / target).is_file():
            found = f"/../{target}"
        else:
            raise LookupError(f"{page} links to '{target}', which is no page of the site: see TEXTS in repository.py.")
        return f"]({found}{link[2] or ''})"

    return LINK.sub(in_site, text)


def copy(name: str) -> str:
    """Return the page that the site has of a text of the repository."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if not name.endswith(".ipynb"):
        return with_links_of_site(text, name)
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links_of_site("".join(cell["source"]), name)
    return json.dumps(notebook)


def _write_copies(app: Sphinx) -> None:
    folder = Path(app.srcdir) / COPIES
    copies = {folder / name: copy(name) for name in texts()}
    for old in {path for path in folder.rglob("*") if path.is_file()} - set(copies):
        old.unlink()
    for page, text in copies.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:  # what is as it was is not built again
            page.write_text(text, encoding="utf-8")


def _read_source(_: Sphinx, name: str, source: list[str]) -> None:
    if not name.startswith(f"{COPIES}/"):
        source[0] = with_links_of_site(source[0], f"docs/{name}.md")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", _write_copies)
    app.connect("source-read", _read_source)
    return {"parallel_read_safe": True}
