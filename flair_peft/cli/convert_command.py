"""``convert``: a checkpoint of a .pt file; stock Flair's lack the config, which the user gives or the tensors imply."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flair_peft
from flair_peft.cli.command import OK, add_base_model, add_command, refuse_missing
from flair_peft.cli.terminal import echo, printable, some
from flair_peft.errors import AdapterConfigError, FlairPeftError, MissingConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

    from flair_peft.inspection.report import Inspection


def add_convert(commands: Any, name: str) -> None:
    """Add the command ``convert``."""
    text = "make a checkpoint of a .pt file, with an adapter or without; stock Flair's lack the PEFT config of theirs"
    example = "flair-peft convert old.pt my-tagger --lora-alpha 32"
    parser = add_command(commands, name, _convert, text, example)
    parser.add_argument("source", type=Path, help="the .pt file")
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    parser.add_argument("--config", type=Path, metavar="JSON", help="adapter_config.json of the training")
    parser.add_argument("--lora-alpha", type=float, metavar="A", help="as in training: the file does not hold it")
    parser.add_argument("--use-rslora", action="store_true", default=None, help="if it was trained with rsLoRA")
    parser.add_argument("--lora-dropout", type=float, metavar="P", help="for training on")
    text = "unpickle the file even if it names what hardly any Flair model needs: it can run any code"
    parser.add_argument("--trust-pickle", action="store_true", help=text)
    add_base_model(parser)


def _convert(chosen: argparse.Namespace) -> int:
    refuse_missing(chosen.source)
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
    from flair_peft.inspection.adapters import implied_config
    from flair_peft.inspection.report import inspect

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
                f"Cannot use {some(_options(given), 3)} beside --config: the file '{chosen.config}' holds all "
                "settings, and it is not clear which were meant. Change the file, or leave it out."
            )
        return _read_config(chosen.config)
    found = inspect(chosen.source)
    lacking = [adapter for adapter in found.adapters if not adapter.has_config]
    if not lacking:
        _refuse_useless(found, given, chosen.source)
        return None
    implied = [other for adapter in lacking if (other := implied_config(found.contents, adapter)) is not None]
    if len(implied) < len(lacking) or any(other.text != implied[0].text for other in implied):
        found_texts = some([other.text for other in implied], 3)
        raise AdapterConfigError(
            f"Cannot tell one config for '{chosen.source}': its adapters are of several shapes, or of a method that "
            f"cannot be told by its tensors ({found_texts}). The command takes one config. Pass it with --config."
        )
    _refuse_guessing(chosen.source, implied[0], given)
    config: PeftConfig = implied[0].to_config(**given)
    return config


def _refuse_useless(found: Inspection, given: dict[str, Any], source: Path) -> None:
    """Return if this is a file that holds all that it needs, and the user gave nothing more."""
    if found.kind in ("checkpoint", "adapter"):
        reason, advice = {
            "checkpoint": ("it is what this command makes", "Look into it with flair-peft inspect"),
            "adapter": ("an adapter of PEFT holds no Flair model", "Build one on it with from_adapter in Python"),
        }[found.kind]
        raise AdapterConfigError(f"Cannot convert '{source}': {reason}. The command takes .pt files. {advice}.")
    if given:
        reason = "the file holds the config of its adapter" if found.adapters else "the file holds no adapter"
        raise AdapterConfigError(
            f"Cannot use {some(_options(given), 3)} for '{source}': {reason}. Nothing would read it. Leave it out."
        )


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
            f"Cannot use {some(_options(useless), 3)} for '{source}': by its tensors it was {implied.text}, a method "
            "without such a setting. Leave it out."
        )


def _options(names: Iterable[str]) -> list[str]:
    """Return the names of settings as they are given here, such as ``"--lora-alpha"``."""
    return [f"--{name.replace('_', '-')}" for name in names]


def _whole(value: Any) -> Any:
    """Return 32 for 32.0: configs hold whole numbers where a whole number was meant."""
    return int(value) if isinstance(value, float) and value.is_integer() and value else value


def _read_config(path: Path) -> PeftConfig:
    from flair_peft.adapter import config as configs

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
    from flair_peft.adapter import config as configs

    settings = configs.encode_config(config)
    names = [name for name in ("r", "lora_alpha", "use_rslora", "target_modules") if name in settings]
    return f"{settings['peft_type']} ({', '.join(f'{name}={settings[name]}' for name in names)})"
