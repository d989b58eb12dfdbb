"""Writes what the README and the pages in ``docs`` have from the code, the tests' tables and the measured figures.

``python -m tests.support.pages`` writes what stands between ``<!-- made: methods -->`` and ``<!-- end -->``, and the
picture of the folders. ``tests/test_docs.py`` fails where a page has something else than is made now.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from transformers import CONFIG_MAPPING

import flair_peft
from flair_peft import errors
from flair_peft.adapter.methods import why_not_mixed
from flair_peft.cli import main
from tests.benchmarks import faster_rows, goals, quality_table, upper_layer_table
from tests.support import house_picture, tiny
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS, REFUSED_METHODS, Method

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PICTURE = DOCS / "house.svg"
FIGURES = ROOT / "resources" / "benchmarks"

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
    """Return the kinds of models that the method works on here, as ``tests/support/method_cases.py`` has them."""
    if method.name in constant("tests/support/method_cases.py", "WORKS_HERE"):
        return frozenset(KINDS)
    is_refused = method.name in REFUSED_METHODS or method.before is not None
    return frozenset() if is_refused else method.works


def _figures(name: str = "methods") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
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


def upper_layers() -> str:
    """Return the table of what adapters on the upper layers alone cost, and how it was measured."""
    measured = _figures("upper_layers")
    parts = (upper_layer_table.source(measured), upper_layer_table.conclusion(measured))
    return "\n\n".join([parts[0], "\n".join(upper_layer_table.table(measured)), parts[1]])


def quality(ways: Sequence[str] = ()) -> str:
    """Return the table of what ways of training reached on real text."""
    return "\n".join(quality_table.overview(_figures("quality")["quality"], ways))


def refused() -> str:
    """Return the table of methods and settings that are refused, or that some models cannot carry, with the reason."""
    rows = []
    for name, method in METHODS.items():
        lacking = [kind for kind in KINDS if kind not in works(method)]
        if lacking:
            reason = REFUSED_METHODS.get(name, method.reason)
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


def without_default_targets() -> str:
    """Return the table of architectures for which PEFT names no layers, and what they can be given."""
    targets = {**tiny.ATTENTION_TARGETS, **tiny.MORE_TARGETS}
    rows = [
        [f"`{architecture}`", f"`target_modules={targets[architecture]!r}`"]
        for architecture in sorted(targets.keys() & CONFIG_MAPPING.keys() - LORA_TARGETS.keys())
    ]
    return _table(["model type", "what LoRA was tried on"], rows)


def commands() -> str:
    """Return what each command of ``flair-peft`` says of itself."""
    return "\n\n".join(f"## {name}\n\n```text\n{_help(name)}\n```" for name in main._COMMANDS)


def _help(name: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main.main([name, "--help"])
    return printed.getvalue().strip()


def names() -> str:
    """Return the table of the public names, each with what its docstring says first."""
    rows = [
        [f"`{name}`", _first_line(getattr(flair_peft, name))]
        for name in sorted(flair_peft.__all__, key=str.lower)
        if not name.startswith("_")
    ]
    return _table(["name", ""], rows)


def _first_line(documented: Any) -> str:
    line = (inspect.getdoc(documented) or "").partition("\n")[0]
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`")


def error_tree() -> str:
    """Return the tree of the errors, as the docstring of their module draws it."""
    tree = re.findall(r"^    (.+)$", errors.__doc__ or "", flags=re.MULTILINE)
    return "\n".join(["```text", *tree, "```"])


def error_reference() -> str:
    """Return the reference of all errors, in the order of their file."""
    tree = ast.parse((ROOT / "flair_peft" / "errors.py").read_text(encoding="utf-8"))
    classes = (node.name for node in tree.body if isinstance(node, ast.ClassDef))
    lines = [line for name in classes for line in (f".. autoexception:: {name}", "   :show-inheritance:", "")]
    return "\n".join(["```{eval-rst}", ".. py:currentmodule:: flair_peft.errors", "", *lines, "```"])


def _contributing(title: str) -> str:
    """Return what stands below a heading of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(title)}\n\n(.*?)(?=\n## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\((?!https?://|#)", "](../", found.strip())


def _of_prediction(table: Callable[[Mapping[str, Any]], str]) -> str:
    return table(json.loads((FIGURES / "faster_prediction.json").read_text(encoding="utf-8")))


MADE: dict[str, Callable[[], str]] = {
    "methods": methods,
    "settings_measured": settings_measured,
    "upper_layers": upper_layers,
    "quality": quality,
    "quality_of_three": lambda: quality(("full fine-tuning", "frozen encoder", "LoRA")),
    "goals": lambda: "\n".join(goals.table(_figures)),
    "rates_on_real_text": lambda: "\n".join(quality_table.rates(_figures("quality")["quality"])),
    "lora_beside_full_fine_tuning": lambda: "\n".join(quality_table.leads(_figures("quality")["quality"])),
    "between_lora_and_full_fine_tuning": lambda: "\n".join(quality_table.gaps(_figures("quality")["quality"])),
    "without_default_targets": without_default_targets,
    "lora_options": lora_options,
    "refused": refused,
    "commands": commands,
    "names": names,
    "error_tree": error_tree,
    "error_reference": error_reference,
    "ways_to_predict": lambda: _of_prediction(faster_rows.of_ways),
    "several_models": lambda: _of_prediction(faster_rows.of_several),
    "prediction_measured": lambda: _of_prediction(faster_rows.conditions),
    "folders": lambda: _contributing("Where things live"),
    "storing": lambda: _contributing("How a model is stored"),
    "loading": lambda: _contributing("How a model loads"),
}

PART = re.compile(r"^<!-- made: (?P<name>\w+) -->\n(?P<made>.*?)\n?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def renewed(text: str) -> str:
    """Return the text of a page with each of its made parts as it is made now."""
    return PART.sub(lambda part: f"<!-- made: {part['name']} -->\n\n{MADE[part['name']]()}\n\n<!-- end -->", text)


def floors() -> tuple[tuple[str, ...], ...]:
    """Return the folders from the ground up, as the test of the house has them."""
    found: tuple[tuple[str, ...], ...] = constant("tests/test_house.py", "FLOORS")
    return found


def pages() -> list[Path]:
    """Return the pages of the documentation, without the copies that a build of the site makes beside them."""
    return sorted(page for page in DOCS.rglob("*.md") if DOCS / "repository" not in page.parents)


def with_made_parts() -> list[Path]:
    """Return the pages in which parts are made: those of the documentation, and the README."""
    return [ROOT / "README.md", *pages()]


def write() -> None:
    """Write the made parts of all pages, and the picture."""
    for page in with_made_parts():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(house_picture.draw(floors()), encoding="utf-8")


if __name__ == "__main__":
    write()
