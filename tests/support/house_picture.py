"""Draws the folders of the package as the floors of a house: a module imports only what lies below it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "flair_peft"

GUARDED = {
    "patch": "writes into Flair",
    "unpickle": "unpickles",
    "checkpoint_directory": "writes directories",
    "terminal": "prints",
}
"""Modules that alone may do something."""

WIDTH, MARGIN, GAP = 960, 24, 8
ROOM_HEIGHT, TITLE_HEIGHT = 30, 28
LETTER = 7.7  # width of one in the font of the rooms
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
PROSE = "-apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def storeys(floors: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Return title and modules of each storey, from the ground up: one for each folder, one for modules beside them."""
    found: list[tuple[str, list[str]]] = []
    for row in floors:
        single = [name for name in row if not (PACKAGE / name).is_dir()]
        if single:
            found.append(("", single))
        found.extend(
            (f"{name}/   {_subject(PACKAGE / name)}", _modules(PACKAGE / name)) for name in row if name not in single
        )
    return found


def _subject(folder: Path) -> str:
    """Return the beginning of a folder's docstring, as far as its first colon or full stop."""
    documentation = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.split(r"[:.]\s|[:.]$", documentation)[0].replace("`", "")


def _modules(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*.py") if path.stem != "__init__")


def draw(floors: Sequence[Sequence[str]]) -> str:
    """Return the picture as SVG, the roof on top."""
    shapes: list[str] = []
    top = MARGIN
    for title, modules in reversed(storeys(floors)):
        rows = list(_rows(modules))
        ceiling = TITLE_HEIGHT if title else GAP
        height = ceiling + len(rows) * (ROOM_HEIGHT + GAP) + GAP
        shapes.append(_box(MARGIN, top, WIDTH - 2 * MARGIN, height, fill="#eef2f7", stroke="#9aa9bb"))
        shapes.append(_text(MARGIN + 12, top + 19, title, size=14, weight=600, family=PROSE))
        for number, row in enumerate(rows):
            shapes.extend(_rooms(row, top + ceiling + number * (ROOM_HEIGHT + GAP)))
        top += height + GAP
    foot = "A module imports only from its own folder and from lower ones. Framed: the one module that may."
    shapes.append(_text(MARGIN, top + 16, foot, size=13, weight=400, family=PROSE))
    height = top + 16 + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The folders of flair_peft as the floors of a house</title>",
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def _label(module: str) -> str:
    return f"{module}: {GUARDED[module]}" if module in GUARDED else module


def _width(module: str) -> float:
    return len(_label(module)) * LETTER + 20


def _rows(modules: Sequence[str]) -> Iterator[list[str]]:
    """Yield as many modules as fit side by side."""
    row: list[str] = []
    room = WIDTH - 2 * MARGIN - 24
    used = 0.0
    for module in modules:
        wanted = _width(module) + GAP
        if row and used + wanted > room:
            yield row
            row, used = [], 0.0
        row.append(module)
        used += wanted
    yield row


def _rooms(row: Sequence[str], top: float) -> Iterator[str]:
    left = MARGIN + 12.0
    for module in row:
        is_guarded = module in GUARDED
        fill, stroke = ("#fff4e0", "#c77700") if is_guarded else ("#ffffff", "#b9c4d1")
        yield _box(left, top, _width(module), ROOM_HEIGHT, fill=fill, stroke=stroke)
        yield _text(left + 10, top + 20, _label(module), size=12.8, weight=400, family=FONT)
        left += _width(module) + GAP


def _box(left: float, top: float, width: float, height: float, *, fill: str, stroke: str) -> str:
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{stroke}"/>'
    )


def _text(left: float, top: float, text: str, *, size: float, weight: int, family: str) -> str:
    return (
        f'<text x="{left:g}" y="{top:g}" font-family="{family}" font-size="{size:g}" font-weight="{weight}" '
        f'fill="#1c2733">{escape(text)}</text>'
    )
