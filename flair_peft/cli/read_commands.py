"""``inspect``, ``verify`` and ``diff``: what is in models, whether it is as it was, and what differs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import flair_peft
from flair_peft.cli import wording
from flair_peft.cli.command import DIFFERENT, OK, add_base_model, add_command, add_load
from flair_peft.cli.terminal import complain, echo, echo_json, printable
from flair_peft.errors import AdapterConfigError
from flair_peft.primitives import progress


def add_inspect(commands: Any, name: str) -> None:
    """Add the command ``inspect``."""
    text = "what is in a checkpoint, .pt file or adapter; nothing is loaded or run"
    parser = add_command(commands, name, _inspect, text, "flair-peft inspect best-model.pt --plot adapter.png")
    parser.add_argument("path", type=Path, help="directory or file")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--plot", metavar="IMAGE", help="draw where a LoRA adapter learned, layer by module")
    add_base_model(parser)


def _inspect(chosen: argparse.Namespace) -> int:
    from flair_peft.inspection import report

    if chosen.base_model is not None and chosen.plot is None:
        raise AdapterConfigError(
            f"Cannot use --base-model for '{chosen.path}': inspect reads a base for --plot alone. Add --plot, or use "
            "verify, which compares weights with the base."
        )
    found = report.inspect(chosen.path)
    if chosen.json:
        echo_json(found.to_dict())
    else:
        wording.echo_inspection(found)
    if chosen.plot:
        from flair_peft.inspection import moves, plot

        with progress.shown("measuring"):
            measured = moves.measure(found, base_model=chosen.base_model)
        plot.draw(measured, chosen.plot, title=chosen.path.name or str(chosen.path))
        for note in measured.notes:
            complain(note)
    return OK


def add_verify(commands: Any, name: str) -> None:
    """Add the command ``verify``."""
    text = "prove that a model, and every weight of its base, is as it was when it was saved"
    parser = add_command(commands, name, _verify, text, "flair-peft verify my-tagger --base-model ./xlm-roberta-base")
    parser.add_argument("path", help="directory, .pt file or Hub id")
    add_load(parser)


def _verify(chosen: argparse.Namespace) -> int:
    flair_peft.verify(chosen.path, base_model=chosen.base_model, trust_remote_code=chosen.trust_remote_code)
    echo(f"{printable(chosen.path)}: every tensor, the probe, and every weight left to a base are as they were.")
    return OK


def add_diff(commands: Any, name: str) -> None:
    """Add the command ``diff``."""
    text = "what differs between two models: config, labels, tokenizer, tensors"
    parser = add_command(commands, name, _diff, text, "flair-peft diff best-model.pt final-model.pt")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--json", action="store_true", help="print the same as JSON, in full")
    parser.description = f"{parser.description} Exits with 0 if nothing differs, with 1 if something does, else with 2."


def _diff(chosen: argparse.Namespace) -> int:
    from flair_peft.inspection import compare, report

    first, second = report.inspect(chosen.first), report.inspect(chosen.second)
    total = first.sizes["total"] + second.sizes["total"]
    with progress.shown("comparing", total=total):
        found = compare.compare(first, second)
    if chosen.json:
        echo_json(found.to_dict())
    else:
        wording.echo_comparison(found)
    return OK if found.is_equal else DIFFERENT
