"""``flair-peft``: the command line over the public functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flair.data import Sentence
from peft import PeftConfig

import flair_peft
from flair_peft.adapter import config as configs
from flair_peft.cli import wording
from flair_peft.cli.terminal import complain, echo, echo_json, print_plainly, printable, showing, size, some
from flair_peft.errors import (
    AdapterConfigError,
    FlairPeftError,
    MissingConfigError,
    ModelFileError,
    SaveError,
    StateMismatchError,
)
from flair_peft.inspection import compare, plot, report
from flair_peft.storage import hub

log = logging.getLogger("flair_peft")

OK, DIFFERENT, TROUBLE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141


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
        prog="flair-peft", description="Look into, prove, compare, publish and convert Flair models with adapters."
    )
    parser.add_argument("--version", action="version", version=f"flair_peft {flair_peft.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in _COMMANDS.items():
        add(commands, name)
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_base_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", metavar="BASE", help="where the base model is, if not where it was")


def _add_load(parser: argparse.ArgumentParser) -> None:
    _add_base_model(parser)
    text = "let the base model run code of its own, if it comes with some"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def _add_inspect(commands: Any, name: str) -> None:
    text = "what is in a checkpoint, .pt file or adapter; nothing is loaded or run"
    parser = _add(commands, name, _inspect, text, "flair-peft inspect best-model.pt --plot adapter.png")
    parser.add_argument("path", type=Path, help="directory or file")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--plot", metavar="IMAGE", help="draw where a LoRA adapter learned, layer by module")
    _add_base_model(parser)


def _inspect(chosen: argparse.Namespace) -> int:
    found = report.inspect(chosen.path)
    if chosen.json:
        echo_json(found.to_dict())
    else:
        wording.echo_inspection(found)
    if chosen.plot:
        with showing("measuring"):
            measured = plot.measure(found, base_model=chosen.base_model)
        plot.draw(measured, chosen.plot, title=chosen.path.name or str(chosen.path))
        for note in measured.notes:
            complain(note)
    return OK


def _add_verify(commands: Any, name: str) -> None:
    text = "prove that a model, and every weight of its base, is as it was when it was saved"
    parser = _add(commands, name, _verify, text, "flair-peft verify my-tagger --base-model ./xlm-roberta-base")
    parser.add_argument("path", help="directory, .pt file or Hub id")
    _add_load(parser)


def _verify(chosen: argparse.Namespace) -> int:
    with showing("verifying"):
        flair_peft.verify(chosen.path, base_model=chosen.base_model, trust_remote_code=chosen.trust_remote_code)
    echo(f"{printable(chosen.path)}: every tensor, every weight of the base and the probe are as they were.")
    return OK


def _add_diff(commands: Any, name: str) -> None:
    text = "what differs between two models: config, labels, tokenizer, tensors"
    parser = _add(commands, name, _diff, text, "flair-peft diff best-model.pt final-model.pt")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--json", action="store_true", help="print the same as JSON, in full")
    parser.description = f"{parser.description} Exits with 0 if nothing differs, with 1 if something does, else with 2."


def _diff(chosen: argparse.Namespace) -> int:
    first, second = report.inspect(chosen.first), report.inspect(chosen.second)
    total = first.sizes["total"] + second.sizes["total"]
    with showing("comparing", total):
        found = compare.compare(first, second)
    if chosen.json:
        echo_json(found.to_dict())
    else:
        wording.echo_comparison(found)
    return OK if found.is_equal else DIFFERENT


def _add_push(commands: Any, name: str) -> None:
    text = "put a model on the Hub: a checkpoint as it lies there, or a .pt file as a checkpoint"
    parser = _add(commands, name, _push, text, "flair-peft push my-tagger me/my-tagger --private")
    parser.add_argument("source", type=Path, help="directory or .pt file")
    parser.add_argument("repository", help="user/name; it is made where it is missing")
    parser.add_argument("--private", action="store_true", default=None, help="for a new repository")
    parser.add_argument("--revision", help="branch; it is made where it is missing")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    _add_load(parser)


def _push(chosen: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        "private": chosen.private,
        "revision": chosen.revision,
        "commit_message": chosen.message,
        "create_pr": chosen.create_pr,
    }
    if chosen.source.is_file():
        address = flair_peft.push_to_hub(_load(chosen.source, chosen), chosen.repository, **options)
    elif chosen.base_model is not None or chosen.trust_remote_code:
        raise SaveError(
            f"Cannot push '{chosen.source}' with --base-model or --trust-remote-code: a directory is uploaded as it "
            "lies there, and its base is not loaded. Leave them out, or use verify with them first."
        )
    else:
        with showing("verifying"):
            address = hub.push_directory(chosen.source, chosen.repository, **options)
        for adapter in report.inspect(chosen.source).adapters:
            if adapter.base["name"] and Path(adapter.base["name"]).is_absolute():
                hub.report_local_base(adapter.base["name"])
    echo(address)
    return OK


def _load(source: Path, chosen: argparse.Namespace) -> Any:
    _refuse_missing(source)
    with showing("loading"):
        return flair_peft.from_pretrained(
            source, base_model=chosen.base_model, trust_remote_code=chosen.trust_remote_code
        )


def _refuse_missing(source: Path) -> None:
    if not source.exists():
        raise ModelFileError(f"Cannot read '{source}': there is no such file or directory. Check the path.")


def _add_convert(commands: Any, name: str) -> None:
    text = "make a checkpoint of a .pt file that stock Flair trained with an adapter, and without its PEFT config"
    example = "flair-peft convert old.pt my-tagger --lora-alpha 32"
    parser = _add(commands, name, _convert, text, example)
    parser.add_argument("source", type=Path, help="the .pt file")
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    parser.add_argument("--config", type=Path, metavar="JSON", help="adapter_config.json of the training")
    parser.add_argument("--lora-alpha", type=float, metavar="A", help="as in training: the file does not hold it")
    parser.add_argument("--use-rslora", action="store_true", default=None, help="if it was trained with rsLoRA")
    parser.add_argument("--lora-dropout", type=float, metavar="P", help="for training on")
    text = "unpickle the file even if it names what no Flair model needs: it can run any code"
    parser.add_argument("--trust-pickle", action="store_true", help=text)
    _add_base_model(parser)


def _convert(chosen: argparse.Namespace) -> int:
    _refuse_missing(chosen.source)
    config = _config_of(chosen)
    options = {"base_model": chosen.base_model, "trust_pickle": chosen.trust_pickle}
    flair_peft.convert_legacy(chosen.source, chosen.directory, peft_config=config, **options)
    with_config = f" with {printable(_settings_of(config))}" if config is not None else ""
    echo(f"{printable(chosen.directory)} holds the model{with_config}.")
    return OK


def _config_of(chosen: argparse.Namespace) -> PeftConfig | None:
    """Return the config that the user gave, or the one that the tensors and the user's settings make together.

    ``None`` if the file holds it.
    """
    names = ("lora_alpha", "use_rslora", "lora_dropout")
    given = {name: _whole(value) for name in names if (value := getattr(chosen, name)) is not None}
    if not 0 < given.get("lora_alpha", 1) < math.inf:
        raise AdapterConfigError(
            f"Cannot use --lora-alpha {chosen.lora_alpha}: it scales what the adapter adds, and no training has such a "
            "scale. Pass the lora_alpha of the training, a number above 0."
        )
    if chosen.config is not None:
        if given:
            raise AdapterConfigError(
                f"Cannot use {some([*given], 3)} beside --config: the file '{chosen.config}' holds all settings, and "
                "it is not clear which were meant. Change the file, or leave it out."
            )
        return _read_config(chosen.config)
    found = report.inspect(chosen.source)
    lacking = [adapter for adapter in found.adapters if not adapter.has_config]
    if not lacking and (given or not found.adapters or found.kind != "stock"):
        raise AdapterConfigError(
            f"Cannot convert '{chosen.source}': it holds no adapter without a config. Models of flair_peft become "
            "checkpoints with load and save_pretrained. Look into it with flair-peft inspect."
        )
    if not lacking:
        return None
    implied = [other for adapter in lacking if (other := report.implied_config(found, adapter)) is not None]
    if len(implied) < len(lacking) or any(other.text != implied[0].text for other in implied):
        found_texts = some([other.text for other in implied], 3)
        raise AdapterConfigError(
            f"Cannot tell one config for '{chosen.source}': its adapters are of several shapes, or of a method that "
            f"cannot be told by its tensors ({found_texts}). The command takes one config. Pass it with --config."
        )
    _refuse_guessing(chosen.source, implied[0], given)
    config: PeftConfig = implied[0].to_config(**given)
    return config


def _refuse_guessing(source: Path, implied: Any, given: dict[str, Any]) -> None:
    """Return if the user gave what the file lost, and nothing else: what changes predictions is never guessed."""
    lost = [name for name in implied.open if name not in given]
    if lost:
        raise MissingConfigError(
            f"Cannot convert '{source}': it does not hold the {some(lost, 3)} that it was trained with, and a wrong "
            f"value changes predictions silently. By its tensors it was {implied.text}. Pass --lora-alpha for LoRA, or "
            "--config with the adapter_config.json of the training."
        )
    useless = [name for name in given if name not in (*implied.open, *implied.optional)]
    if useless:
        raise AdapterConfigError(
            f"Cannot use {some(useless, 3)} for '{source}': by its tensors it was {implied.text}, a method without "
            "such a setting. Leave it out."
        )


def _whole(value: Any) -> Any:
    """Return 32 for 32.0: configs hold whole numbers where a whole number was meant."""
    return int(value) if isinstance(value, float) and value.is_integer() and value else value


def _read_config(path: Path) -> PeftConfig:
    try:
        return configs.decode_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, TypeError) as error:
        if isinstance(error, FlairPeftError):
            raise
        raise AdapterConfigError(
            f"Cannot read '{path}': it is no PEFT config ({error}). PEFT writes it as adapter_config.json. Pass that "
            "file."
        ) from error


def _settings_of(config: PeftConfig) -> str:
    settings = configs.encode_config(config)
    names = [name for name in ("r", "lora_alpha", "use_rslora", "target_modules") if name in settings]
    return f"{settings['peft_type']} ({', '.join(f'{name}={settings[name]}' for name in names)})"


def _add_merge(commands: Any, name: str) -> None:
    text = "write a .pt file that stock Flair loads: the adapter is merged into the base"
    parser = _add(commands, name, _merge, text, "flair-peft merge my-tagger merged.pt")
    parser.add_argument("source", type=Path, help="directory or .pt file")
    parser.add_argument("target", type=Path, help="the .pt file to write")
    _add_load(parser)


def _merge(chosen: argparse.Namespace) -> int:
    if chosen.target.is_dir() or not chosen.target.absolute().parent.is_dir():
        raise SaveError(
            f"Cannot write '{chosen.target}': it is a directory, or would be in one that is missing. The command "
            "writes one file. Choose another name."
        )
    _refuse_overwriting(chosen.source, chosen.target)
    flair_peft.merge(_load(chosen.source, chosen)).save(chosen.target)
    echo(f"{printable(chosen.target)} holds the merged model, {size(chosen.target.stat().st_size)}.")
    return OK


def _refuse_overwriting(source: Path, *targets: Path) -> None:
    """Return if no file to be written is the one that is read, or part of it: it holds the adapter."""
    for target in targets:
        if target.exists() and any(target.samefile(place) for place in (source, *source.rglob("*")) if place.exists()):
            raise SaveError(
                f"Cannot write '{target}': it is the model that is read, or part of it. What is written there does not "
                "hold the adapter any more, and there may be no other copy. Choose another name."
            )


def _add_export(commands: Any, name: str) -> None:
    text = "write an ONNX file of the transformer with its adapter, and the .pt file of the model that runs it"
    parser = _add(commands, name, _export, text, "flair-peft export my-tagger encoder.onnx tagger.pt")
    parser.add_argument("source", type=Path, help="directory or .pt file")
    parser.add_argument("onnx", type=Path, help="the ONNX file to write; the .pt file names its path")
    parser.add_argument("target", type=Path, help="the .pt file to write, which stock Flair loads")
    text = "compute in int8, and print what that costs on the sentences of this file, one a line"
    parser.add_argument("--int8", type=Path, metavar="TEXTS", help=text)
    _add_load(parser)


def _export(chosen: argparse.Namespace) -> int:
    if chosen.onnx.absolute() == chosen.target.absolute():
        raise SaveError(
            f"Cannot write '{chosen.target}' twice: one file is the transformer, and the other the model that runs it. "
            "Choose two names."
        )
    for path in (chosen.onnx, chosen.target):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise SaveError(
                f"Cannot write '{path}': it is a directory, or would be in one that is missing. The command writes two "
                "files. Choose another name."
            )
    sentences = [] if chosen.int8 is None else _sentences(chosen.int8)
    _refuse_overwriting(chosen.source, chosen.onnx, chosen.target)
    model = flair_peft.export_onnx(_load(chosen.source, chosen), chosen.onnx.absolute())
    if sentences:
        echo(f"int8: {flair_peft.quantize_onnx(model, sentences)}.")
    model.save(chosen.target)
    echo(f"{printable(chosen.target)} holds the model, and {printable(chosen.onnx)} its transformer.")
    return OK


def _sentences(path: Path) -> list[Sentence]:
    """Return the sentences of a text file; an empty one is refused before anything is exported."""
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


_COMMANDS: dict[str, Callable[[Any, str], None]] = {
    "inspect": _add_inspect,
    "verify": _add_verify,
    "diff": _add_diff,
    "push": _add_push,
    "convert": _add_convert,
    "merge": _add_merge,
    "export": _add_export,
}


def run() -> NoReturn:
    """End the process with the exit code of the command."""
    sys.exit(main())
