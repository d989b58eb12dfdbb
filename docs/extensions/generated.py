"""Parts of pages that are made from the code, the tables of the tests and the figures."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import house
import insert
import peft
from peft import LoraConfig, PeftConfig, PeftType

from flair_peft.adapter import refusals
from flair_peft.adapter.methods import why_not_mixed
from flair_peft.cli import main
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS, Method

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "resources" / "benchmarks" / "methods.json"

KINDS = ("encoder", "decoder")
YES, NO, UNKNOWN = "✓", "–", ""

# What every option of LoRA in the tests' table is given, so that an adapter is not a no-op.
COMMON = {"r", "lora_alpha", "init_lora_weights", "target_modules", "task_type"}


def constant(path: str, name: str) -> Any:
    """Return the value of a literal in a file of the repository, without importing it."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(f"{path} has no literal {name}")


def works(method: Method) -> frozenset[str]:
    """Return the kinds of models that the method works on here, as ``tests/adapter/test_methods.py`` tests it."""
    if method.name in constant("tests/adapter/test_methods.py", "WORKS_HERE"):
        return frozenset(KINDS)
    is_refused = method.name in refusals.REFUSED_METHODS or method.before is not None
    return frozenset() if is_refused else method.works


def _figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return found


def _config(method: Method) -> PeftConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's words on configs that are not used here
        return method.config("encoder" if "encoder" in method.works or not method.works else "decoder")


def _class_of(name: str) -> str:
    return f"`{peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)].__name__}`"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _on(kinds: Iterable[str]) -> str:
    found = [kind for kind in KINDS if kind in kinds]
    return YES if len(found) == len(KINDS) else ", ".join(f"{kind}s" for kind in found) or NO


def methods() -> str:
    """Return the table of the methods that work."""
    measured = _figures()["methods"]
    rows = []
    for name, method in sorted(METHODS.items(), key=lambda item: (item[0] != "LORA", _class_of(item[0]).lower())):
        found = works(method)
        if not found:
            continue
        mixes = YES if why_not_mixed(_config(method)) is None else NO
        costs = _costs(measured[name]) if name in measured else [UNKNOWN] * 4
        rows.append([_class_of(name), _on(found), *costs, _on(method.mergeable & found), mixes])
    return _table(["config", "works on", "trained", "file", "step", "4 bits", "merges", "mixes"], rows)


def _costs(figures: Mapping[str, Any]) -> list[str]:
    in_4_bits = YES if figures["in_4_bits"]["works"] else NO
    return [f"{figures['trained']:,}", _size(figures["bytes"]), f"{figures['step']:.2f}", in_4_bits]


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count / 1e3:.1f} kB"


def settings_measured() -> str:
    """Return what the configs that were measured were given beyond the common targets."""
    measured = _figures()
    own = {
        row["config"]: {key: value for key, value in row["settings"].items() if value != ["query", "value"]}
        for row in measured["methods"].values()
    }
    shown = ", ".join(f"`{name}({_arguments(values)})`" for name, values in sorted(own.items()) if values)
    return (
        f"Measured by `python -m tests.benchmarks.methods` on {measured['date']}: {measured['machine']}; "
        f"{measured['versions']}. Configs have PEFT's own settings on `query` and `value`, and where PEFT has no "
        f"default: {shown}."
    )


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"[{value[0]!r}, …, {value[-1]!r}]"
    return f"{type(value).__name__}(…)" if dataclasses.is_dataclass(value) else repr(value)


def refused() -> str:
    """Return the table of methods and settings that are refused, or that some models cannot carry, with the reason."""
    rows = []
    for name, method in METHODS.items():
        lacking = [kind for kind in KINDS if kind not in works(method)]
        if lacking:
            reason = refusals.REFUSED_METHODS.get(name, method.reason)
            rows.append([_class_of(name), " and ".join(f"{kind}s" for kind in lacking), reason])
    for method in (*LORA_VARIANTS.values(), *OTHER_VARIANTS.values()):
        lacking = [kind for kind in KINDS if kind not in works(method)]
        if lacking:
            reason = method.reason or "it wants data before the adapter is added, when Flair's embeddings are not built"
            rows.append([f"`{_written(method)}`", " and ".join(f"{kind}s" for kind in lacking), reason])
    return _table(["config", "refused on", "reason"], rows)


def lora_options() -> str:
    """Return the table of LoRA's options that work."""
    rows = []
    for method in LORA_VARIANTS.values():
        found = works(method)
        if found:
            notes = [text for text, holds in _notes(method).items() if holds]
            rows.append([f"`{_written(method)}`", _on(found), _on(method.mergeable & found), "; ".join(notes)])
    return _table(["config", "works on", "merges", "note"], rows)


def _notes(method: Method) -> dict[str, bool]:
    return {
        "changes frozen weights of the base": method.rewrites_base,
        "trains parameters of the base": method.trains_base,
        "random in training beyond dropout": method.random_in_training and method.name != "dropout",
        "initialise with PEFT's own function, on `embeddings.model`": method.after is not None,
    }


def _written(method: Method) -> str:
    """Return how the config of the tests is written, without what all of them have."""
    config = _config(method)
    default = type(config)(**_required(config))
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.init and getattr(config, field.name) != getattr(default, field.name, None)
    }
    shown = {key: value for key, value in values.items() if key not in COMMON or _is_told(method, key, value)}
    return f"{type(config).__name__}({_arguments(_without_sets(shown))})"


def _required(config: PeftConfig) -> dict[str, Any]:
    return {} if isinstance(config, LoraConfig) else {"task_type": config.task_type}


def _is_told(method: Method, key: str, value: Any) -> bool:
    """Whether a setting that all configs have is what this option is about."""
    if key == "init_lora_weights":
        return isinstance(value, str)
    return key == "target_modules" and (isinstance(value, str) or method.name == "embedding")


def _without_sets(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def commands() -> str:
    """Return what each command of ``flair-peft`` says of itself."""
    return "\n\n".join(f"## {name}\n\n```text\n{_help(name)}\n```" for name in main._COMMANDS)


def _help(name: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main.main([name, "--help"])
    return printed.getvalue().strip()


def error_classes() -> Iterator[str]:
    """Yield the names of the errors in the order of their file."""
    tree = ast.parse((ROOT / "flair_peft" / "errors.py").read_text(encoding="utf-8"))
    yield from (node.name for node in tree.body if isinstance(node, ast.ClassDef))


def errors() -> str:
    """Return the reference of all errors."""
    lines = [line for name in error_classes() for line in (f".. autoexception:: {name}", "   :show-inheritance:", "")]
    return "\n".join(["```{eval-rst}", ".. py:currentmodule:: flair_peft.errors", "", *lines, "```"])


MADE: dict[str, Callable[[], str]] = {
    "methods": methods,
    "settings_measured": settings_measured,
    "lora_options": lora_options,
    "refused": refused,
    "commands": commands,
    "errors": errors,
}


def _draw(app: Sphinx) -> None:
    picture = Path(app.srcdir) / "generated" / "house.svg"
    drawn = house.draw(floors())
    picture.parent.mkdir(exist_ok=True)
    if not picture.exists() or picture.read_text(encoding="utf-8") != drawn:
        picture.write_text(drawn, encoding="utf-8")


def floors() -> tuple[tuple[str, ...], ...]:
    """Return the folders from the ground up, as the test of the house has them."""
    found: tuple[tuple[str, ...], ...] = constant("tests/test_house.py", "FLOORS")
    return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    insert.MAKERS.update(MADE)
    app.connect("builder-inited", _draw)
    return {"parallel_read_safe": True}
