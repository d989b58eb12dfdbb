"""``flair-peft``: the command line over the public functions."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from flair_peft._version import __version__
from flair_peft.cli.command import CLOSED, DIFFERENT, INTERRUPTED, TROUBLE
from flair_peft.cli.convert_command import add_convert
from flair_peft.cli.read_commands import add_diff, add_inspect, add_verify
from flair_peft.cli.serve_command import add_serve
from flair_peft.cli.terminal import complain, echo, print_plainly
from flair_peft.cli.write_commands import add_export, add_merge, add_push
from flair_peft.errors import FlairPeftError, StateMismatchError

log = logging.getLogger("flair_peft")

# What decides how a model is trained and read; those that are not installed are not named.
_LIBRARIES = (
    *("flair", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "huggingface_hub"),
    *("bitsandbytes", "torchao"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of a command: 0, 1 where ``diff`` or ``verify`` found a difference, 2 for trouble."""
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
        complain(_with_options(_explain(error), vars(chosen)))
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


def _with_options(text: str, known: Collection[str]) -> str:
    """Return a message in which the arguments of Python that the command has are called as it calls them."""
    for name in known:
        text = re.sub(rf"\b{name}=(True\b|(?=\s))", f"--{name.replace('_', '-')}", text)
    return text


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flair-peft",
        description="Look into, prove, compare, publish, convert and serve Flair models, with adapters or without.",
    )
    parser.add_argument("--version", action=_Versions, nargs=0, help="show the versions that a bug report asks for")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in _COMMANDS.items():
        add(commands, name)
    return parser


class _Versions(argparse.Action):
    """Prints the versions of the package, of Python and of the libraries, which are not imported for that."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print a line for each, and end."""
        echo(f"flair_peft {__version__}")
        echo(f"Python {platform.python_version()} on {platform.platform()}")
        for name in _LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                echo(f"{name} {importlib.metadata.version(name)}")
        parser.exit()


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
