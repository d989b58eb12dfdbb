"""How the command line prints: for any encoding, with nothing that moves the cursor, and progress on a terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from flair_peft.errors import spell_out


def printable(value: object) -> str:
    """Return a text in which nothing moves the cursor or colours the screen: names and labels come from files."""
    return spell_out(" ".join(str(value).split()) if isinstance(value, str) else str(value))


def print_plainly(record: logging.LogRecord) -> bool:
    """Let a warning that names what stands in a file be printed as such a name is printed elsewhere."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def complain(text: str) -> None:
    """Print a paragraph to the errors."""
    echo(textwrap.fill(printable(f"flair-peft: {text}"), width=100, break_on_hyphens=False), to_errors=True)


def echo(text: str = "", *, to_errors: bool = False) -> None:
    """Print a line; what the encoding of the stream lacks is spelled out."""
    stream = sys.stderr if to_errors else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def echo_json(value: Any) -> None:
    """Print a value as JSON that any reader takes."""
    echo(json.dumps(_without_infinity(value), indent=2, default=str, allow_nan=False))


def _without_infinity(value: Any) -> Any:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(count: int) -> str:
    """Return a number of bytes in the unit that reads best."""
    for unit, limit in (("bytes", 10**3), ("kB", 10**6), ("MB", 10**9)):
        if count < limit:
            return f"{count} {unit}" if unit == "bytes" else f"{count / limit * 1000:.3g} {unit}"
    return f"{count / 10**9:.3g} GB"


def some(items: Sequence[object], limit: int) -> str:
    """Return the first items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
