"""What the commands share: how one is added to the parser, its exit codes, how it loads a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flair_peft
from flair_peft.errors import MissingFileError

OK, DIFFERENT, TROUBLE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command with its help text and an example, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_base_model(parser: argparse.ArgumentParser) -> None:
    """Let the command take ``--base-model``."""
    parser.add_argument("--base-model", metavar="BASE", help="where the base model is, if not where it was")


def add_load(parser: argparse.ArgumentParser) -> None:
    """Let the command take the options of a load."""
    add_base_model(parser)
    text = "let the base model run code of its own, if it comes with some"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def load_model(source: Path, chosen: argparse.Namespace) -> Any:
    """Return the model of a file or directory, loaded with the options that the user chose."""
    refuse_missing(source)
    return flair_peft.from_pretrained(source, base_model=chosen.base_model, trust_remote_code=chosen.trust_remote_code)


def refuse_missing(source: Path) -> None:
    """Return if the path exists.

    Raises:
        MissingFileError: it does not.
    """
    if not source.exists():
        raise MissingFileError(f"Cannot read '{source}': there is no such file or directory. Check the path.")
