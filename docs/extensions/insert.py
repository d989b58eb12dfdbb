"""Puts parts of the repository's own texts into pages, so that each thing is written once.

A line ``% insert README.md: Files are small`` becomes that part of the README: what stands below the heading of that
name, or the paragraphs that begin with it in bold. ``% insert resources/format.md`` becomes the whole file, and
``% insert :methods`` what `generated` makes. A part that is not there, and a link that leads nowhere, end the build.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]

INSERT = re.compile(r"^% insert (?P<source>\S+?)(?:: (?P<part>.+))?$", re.MULTILINE)
HEADING = re.compile(r"^(#{1,6}) (.+)$")
LEAD = re.compile(r"^\*\*(.+?)\*\*")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)")

PAGES = {
    "CHANGELOG.md": "/reference/changelog.md",
    "CONTRIBUTING.md": "/contributing/index.md",
    "README.md": "/index.md",
    "examples/README.md": "/guide/examples.md",
    "resources/benchmarks/README.md": "/reference/measured/index.md",
    "resources/format.md": "/reference/format.md",
    "resources/benchmarks/checkpoints.md": "/reference/measured/checkpoints.md",
    "resources/benchmarks/conversion.md": "/reference/measured/conversion.md",
    "resources/benchmarks/peers.md": "/reference/measured/peers.md",
    "resources/benchmarks/prediction.md": "/reference/measured/prediction.md",
    "resources/benchmarks/quality.md": "/reference/measured/quality.md",
    "resources/benchmarks/quantised.md": "/reference/measured/quantised.md",
    "resources/benchmarks/serving.md": "/reference/measured/serving.md",
    "resources/benchmarks/training.md": "/reference/measured/training.md",
}
"""Where a link of the repository's texts leads within the site."""

MAKERS: dict[str, Callable[[], str]] = {}
"""What pages may insert beside files; `generated` fills it."""


def part_of(text: str, title: str) -> str:
    """Return what stands below the heading ``title``, or the paragraphs whose bold beginning is ``title``.

    Raises:
        LookupError: the text has no such part, or several.
    """
    lines = text.splitlines()
    in_code = _in_code(lines)
    starts = [n for n, line in enumerate(lines) if not in_code[n] and _title(line) == title]
    if len(starts) != 1:
        raise LookupError(f"There are {len(starts)} parts called {title!r}, and a page inserts one.")
    start = starts[0]
    heading = HEADING.match(lines[start])
    end = next((n for n in range(start + 1, len(lines)) if not in_code[n] and _ends(lines[n], heading)), len(lines))
    if heading:
        return "\n".join(lines[start + 1 : end]).strip()
    first = LEAD.sub(_opening, lines[start]).strip()
    return "\n".join([first, *lines[start + 1 : end]]).strip()


def _opening(lead: re.Match[str]) -> str:
    """Return nothing for a bold sentence, which the page has as its heading, and the words of a bold beginning."""
    return "" if lead[1].endswith(".") else lead[1]


def _title(line: str) -> str | None:
    found = HEADING.match(line)
    if found:
        return found[2]
    lead = LEAD.match(line)
    return lead[1].rstrip(".,") if lead else None


def _ends(line: str, heading: re.Match[str] | None) -> bool:
    found = HEADING.match(line)
    if found:
        return heading is None or len(found[1]) <= len(heading[1])
    return heading is None and LEAD.match(line) is not None


def _in_code(lines: list[str]) -> list[bool]:
    found, inside = [], False
    for line in lines:
        is_fence = line.startswith("```")
        found.append(inside or is_fence)
        inside ^= is_fence
    return found


def with_links_of_site(text: str, source: str) -> str:
    """Return the text with its relative links turned to pages; scripts, notebooks and figures are downloads.

    Raises:
        LookupError: no page stands for the target of one.
    """

    def page(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(source).parent / link[1])
        if target in PAGES:
            return f"]({PAGES[target]})"
        if target.endswith(".md") or not (ROOT / target).is_file():
            raise LookupError(f"No page stands for '{target}', to which {source} links: see PAGES in insert.py.")
        return f"](/../{target})"

    return LINK.sub(page, text)


def inserted(found: Mapping[str, str | None], note: Callable[[str], None] = lambda _: None) -> str:
    """Return what stands in the page for a match of ``INSERT``; ``note`` gets the path of each file that is read."""
    source, part = found["source"] or "", found["part"]
    if source.startswith(":"):
        return MAKERS[source[1:]]()
    note(str(ROOT / source))
    text = (ROOT / source).read_text(encoding="utf-8")
    return with_links_of_site(part_of(text, part) if part else text, source)


def _read_source(app: Sphinx, _: str, source: list[str]) -> None:
    source[0] = INSERT.sub(lambda found: inserted(found.groupdict(), app.env.note_dependency), source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _read_source)
    return {"parallel_read_safe": True}
