"""``push``, ``merge`` and ``export``: a model on the Hub, as a file of stock Flair, as ONNX, for transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flair_peft
from flair_peft.cli.command import OK, add_command, add_load, load_model, refuse_missing
from flair_peft.cli.terminal import echo, printable, size
from flair_peft.errors import ModelFileError, SaveError, name_some
from flair_peft.primitives import progress

if TYPE_CHECKING:
    from flair.data import Sentence


def add_push(commands: Any, name: str) -> None:
    """Add the command ``push``."""
    text = "put a model on the Hub: a checkpoint as it lies there, or a .pt file as a checkpoint"
    parser = add_command(commands, name, _push, text, "flair-peft push my-tagger me/my-tagger --private")
    parser.add_argument("source", type=Path, help="directory or .pt file")
    parser.add_argument("repository", help="user/name; it is made where it is missing")
    parser.add_argument("--private", action="store_true", default=None, help="for a new repository")
    parser.add_argument("--revision", help="branch; it is made where it is missing")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    add_load(parser)


def _push(chosen: argparse.Namespace) -> int:
    from flair_peft.inspection import report
    from flair_peft.storage import hub

    refuse_missing(chosen.source)
    options: dict[str, Any] = {
        "private": chosen.private,
        "revision": chosen.revision,
        "commit_message": chosen.message,
        "create_pr": chosen.create_pr,
    }
    if chosen.source.is_file():
        address = flair_peft.push_to_hub(load_model(chosen.source, chosen), chosen.repository, **options)
    elif chosen.base_model is not None or chosen.trust_remote_code:
        raise SaveError(
            f"Cannot push '{chosen.source}' with --base-model or --trust-remote-code: a directory is uploaded as it "
            "lies there, and its base is not loaded. Leave them out, or use verify with them first."
        )
    else:
        with progress.shown("verifying"):
            address = hub.push_directory(chosen.source, chosen.repository, **options)
        found = report.inspect(chosen.source)
        left_to = (plain.base for plain in found.transformers if plain.base["left_out"])
        for base in (*(adapter.base for adapter in found.adapters), *left_to):
            if base["name"] and Path(base["name"]).is_absolute():
                hub.report_local_base(base["name"])
    echo(address)
    return OK


def add_merge(commands: Any, name: str) -> None:
    """Add the command ``merge``."""
    text = "write a .pt file that stock Flair loads: the adapter is merged into the base"
    parser = add_command(commands, name, _merge, text, "flair-peft merge my-tagger merged.pt")
    parser.add_argument("source", type=Path, help="directory or .pt file")
    parser.add_argument("target", type=Path, help="the .pt file to write")
    add_load(parser)


def _merge(chosen: argparse.Namespace) -> int:
    _refuse_place(chosen.target, "one file")
    _refuse_overwriting(chosen.source, chosen.target)
    from flair_peft.export import merge

    merged = flair_peft.merge(load_model(chosen.source, chosen))
    if parts := merge.unreadable_parts(merged):
        raise SaveError(
            f"Cannot write '{chosen.target}': Flair pickles {name_some(parts)} of this {type(merged).__name__} with "
            "the embeddings inside, and cannot read that again. No .pt file of it would load. In Python, "
            "flair_peft.save_pretrained(flair_peft.merge(model), directory) keeps it."
        )
    merged.save(chosen.target)
    echo(f"{printable(chosen.target)} holds the merged model, {size(chosen.target.stat().st_size)}.")
    return OK


def _refuse_overwriting(source: Path, *targets: Path) -> None:
    """Return if no file to be written is the one that is read, or part of it."""
    for target in targets:
        if target.exists() and any(target.samefile(place) for place in (source, *source.rglob("*")) if place.exists()):
            raise SaveError(
                f"Cannot write '{target}': it is the model that is read, or part of it. What is written there takes "
                "its place, and there may be no other copy. Choose another name."
            )


def add_export(commands: Any, name: str) -> None:
    """Add the command ``export``."""
    text = "write a model that runs elsewhere: its transformer as an ONNX file, or all of it for transformers"
    parser = add_command(commands, name, _export, text, "flair-peft export my-tagger encoder.onnx tagger.pt")
    parser.add_argument("source", type=Path, help="directory or .pt file")
    text = "the ONNX file to write, whose path the .pt file names; or the directory for transformers"
    parser.add_argument("output", type=Path, help=text)
    text = "the .pt file to write, of the model that runs the ONNX file; stock Flair loads it"
    parser.add_argument("target", type=Path, nargs="?", help=text)
    parser.add_argument(
        "--to", choices=["onnx", "transformers"], default="onnx", help="what to write; onnx unless said"
    )
    text = "for transformers: do not merge the adapter, but write it for PEFT, with the head"
    parser.add_argument("--adapter", action="store_true", help=text)
    text = "for ONNX: compute in int8, and print what that costs on the sentences of this file, one a line"
    parser.add_argument("--int8", type=Path, metavar="TEXTS", help=text)
    add_load(parser)


def _export(chosen: argparse.Namespace) -> int:
    _refuse_other_form(chosen)
    if chosen.to == "transformers":
        _refuse_overwriting(chosen.source, chosen.output)
        flair_peft.to_transformers(load_model(chosen.source, chosen), chosen.output, merged=not chosen.adapter)
        echo(f"{printable(chosen.output)} holds the {'adapter' if chosen.adapter else 'model'} for transformers.")
        return OK
    return _export_onnx(chosen)


def _refuse_other_form(chosen: argparse.Namespace) -> None:
    """Return if only such arguments are given as the form takes that is written."""
    is_onnx = chosen.to == "onnx"
    if is_onnx and chosen.target is None:
        raise SaveError(
            "Cannot export to ONNX into one file: one is the transformer, and the other the model that runs it. Only "
            "the first is named. Name the .pt file too, or pass --to transformers."
        )
    others = {"--adapter": chosen.adapter} if is_onnx else {"a .pt file": chosen.target, "--int8": chosen.int8}
    unused = [name for name, given in others.items() if given]
    if unused:
        raise SaveError(
            f"Cannot export to {chosen.to} with {unused[0]}: that belongs to the other form. It would be left aside. "
            f"Leave it out, or pass --to {'transformers' if is_onnx else 'onnx'}."
        )


def _export_onnx(chosen: argparse.Namespace) -> int:
    if chosen.output.absolute() == chosen.target.absolute():
        raise SaveError(
            f"Cannot write '{chosen.target}' twice: one file is the transformer, and the other the model that runs it. "
            "Choose two names."
        )
    for path in (chosen.output, chosen.target):
        _refuse_place(path, "two files")
    sentences = [] if chosen.int8 is None else _sentences(chosen.int8)
    _refuse_overwriting(chosen.source, chosen.output, chosen.target)
    model = flair_peft.export_onnx(load_model(chosen.source, chosen), chosen.output.absolute())
    if sentences:
        echo(f"int8: {flair_peft.quantize_onnx(model, sentences)}.")
    model.save(chosen.target)
    echo(f"{printable(chosen.target)} holds the model, and {printable(chosen.output)} its transformer.")
    return OK


def _sentences(path: Path) -> list[Sentence]:
    """Return the sentences of a text file; an empty one is refused before anything is exported."""
    from flair.data import Sentence

    try:
        found = [Sentence(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"Cannot read the sentences in '{path}': {error}. They are text in UTF-8, one sentence a line. Pass such a "
            "file."
        ) from error
    if not found:
        raise ModelFileError(
            f"Cannot measure int8 on '{path}': it holds no sentence. What int8 costs shows on text like that for "
            "which the model is meant. Pass a file with some, one a line."
        )
    return found


def _refuse_place(path: Path, written: str) -> None:
    """Return if a file can be here."""
    is_directory = path.is_dir()
    if is_directory or not path.absolute().parent.is_dir():
        why = "it is a directory" if is_directory else "the directory that it would be in is missing"
        raise SaveError(f"Cannot write '{path}': {why}. The command writes {written}. Choose another name.")
