"""``flair-peft``: the command line over the public functions."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from flair_peft._version import __version__
from flair_peft.cli.command import CLOSED, DIFFERENT, INTERRUPTED, TROUBLE
from flair_peft.cli.convert_command import add_convert
from flair_peft.cli.read_commands import add_diff, add_inspect, add_verify
from flair_peft.cli.serve_command import add_serve
from flair_peft.cli.terminal import complain, print_plainly
from flair_peft.cli.write_commands import add_export, add_merge, add_push
from flair_peft.errors import FlairPeftError, StateMismatchError

log = logging.getLogger("flair_peft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of a command: 0, 1 where ``diff`` or ``verify`` found a difference, 2 for trouble.

    Args:
        arguments: those of the process where ``None``.
    """
    parser = _make_parser()
    chosen = parser.parse_args(arguments)
    log.addFilter(print_plainly)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter would complain once more when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except Exception as error:  # whatever it is, a user gets a paragraph
        if chosen.traceback:
            traceback.print_exc()
        complain(_explain(error))
        return DIFFERENT if chosen.command == "verify" and isinstance(error, StateMismatchError) else TROUBLE
    finally:
        log.removeFilter(print_plainly)


def _explain(error: Exception) -> str:
    """Return what went wrong as one paragraph."""
    if isinstance(error, FlairPeftError):
        return str(error)
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}: {error}. This was not expected; --traceback in front of the command shows where."


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flair-peft",
        description="Look into, prove, compare, publish, convert and serve Flair models with adapters.",
    )
    parser.add_argument("--version", action="version", version=f"flair_peft {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in _COMMANDS.items():
        add(commands, name)
    return parser


_COMMANDS: dict[str, Callable[[Any, str], None]] = {
    "inspect": add_inspect,
    "verify": add_verify,
    "diff": add_diff,
    "push": add_push,
    "convert": add_convert,
    "merge": add_merge,
    "export": add_export,
    "serve": add_serve,
}


def run() -> NoReturn:
    """End the process with the exit code of the command."""
    sys.exit(main())
