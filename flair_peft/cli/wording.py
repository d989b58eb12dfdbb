"""What ``flair-peft inspect`` and ``flair-peft diff`` say of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flair_peft.cli.terminal import echo, printable, size, some

if TYPE_CHECKING:
    from flair_peft.inspection.adapters import Adapter
    from flair_peft.inspection.compare import Comparison
    from flair_peft.inspection.report import Inspection

_SHOWN_LABELS = 20
_SHOWN_CHANGES = 20
_KINDS = {
    "checkpoint": "checkpoint of flair_peft",
    "file": ".pt file of flair_peft",
    "stock": ".pt file of Flair's own",
    "adapter": "adapter of PEFT",
}
_PARTS = {
    "adapter": "adapter",
    "head": "head",
    "embeddings": "other embeddings",
    "base": "base weights",
    "tokenizer": "tokenizer",
    "training": "state of the training",
    "other": "text and other",
}


def echo_inspection(found: Inspection) -> None:
    """Print a line for each thing that is known of a model."""
    for name, value in _describe(found):
        echo(f"{name + ' ':<16}{printable(value)}".rstrip())


def _describe(found: Inspection) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each line about a model."""
    yield "path", str(found.contents.path)
    yield "kind", _KINDS[found.kind]
    yield from (("Flair class", name) for name in [found.flair_class] if name)
    sizes = found.sizes
    named = {**_PARTS, "base": "transformer"} if found.transformers else _PARTS
    parts = ", ".join(f"{text} {size(sizes[part])}" for part, text in named.items() if sizes[part])
    yield "size", f"{size(sizes['total'])}: {parts}"
    for adapter in found.adapters:
        yield from _describe_adapter(adapter)
    for transformer in found.transformers:
        yield "embeddings", f"{transformer.embeddings} ({transformer.place})"
        yield "base", ", ".join(_facts_of_base(transformer.base))
    for other in found.others:
        yield "embeddings", f"{other.embeddings} ({other.place})"
    for name, labels in found.labels.items():
        described = f"{name} ({labels.type or 'no type'}, {len(labels.items)})"
        yield "labels", f"{described}: {some(labels.items, _SHOWN_LABELS)}"
    for part, dtypes in found.dtypes.items():
        title = "transformer" if part == "base" and found.transformers else "other" if part == "embeddings" else part
        yield f"{title} dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.items())
    for title, named in (("versions", found.versions), ("scores", found.scores)):
        if named:
            yield title, ", ".join(f"{name} {_number(value)}" for name, value in named.items())
    yield from (("missing", text) for text in found.missing)
    yield from (("note", text) for text in found.notes)


def _describe_adapter(adapter: Adapter) -> Iterator[tuple[str, str]]:
    yield "", ""
    if adapter.embeddings:
        yield "embeddings", f"{adapter.embeddings} ({adapter.place})"
    rank = f", rank {' / '.join(map(str, adapter.ranks))}" if adapter.ranks else ""
    alpha = f", alpha {adapter.alpha:g}" if adapter.alpha is not None else ", alpha unknown" if rank else ""
    yield "method", f"{adapter.method or 'unknown'}{rank}{alpha}"
    if adapter.modules:
        yield "on", ", ".join(f"{name} ({count})" for name, count in adapter.modules.items())
    settings = ", ".join(f"{name}={value!r}" for name, value in adapter.settings.items())
    yield ("config" if adapter.has_config else "config, implied"), adapter.suggestion or settings
    base = adapter.base
    yield "base", ", ".join(_facts_of_base(base))


def _facts_of_base(base: Any) -> Iterator[str]:
    yield base["name"] or "not named"
    if base["revision"]:
        yield f"revision {base['revision']}"
    if base["dtype"]:
        yield base["dtype"]
    if base["quantization"]:
        bits = [name for name in ("load_in_4bit", "load_in_8bit") if base["quantization"].get(name)]
        yield f"quantised ({', '.join(bits) or 'settings in the JSON'})"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def echo_comparison(found: Comparison) -> None:
    """Print what differs between two models, at most some lines of each kind."""
    changed = {"config": found.config, "labels": found.labels, "tokenizer": found.tokenizer, "shapes": found.reshaped}
    for title, changes in changed.items():
        _echo_some(title, [f"{change.name}: {_side(change.first)} → {_side(change.second)}" for change in changes])
    _echo_some("only in the first", found.removed)
    _echo_some("only in the second", found.added)
    rows = [f"{row.name}: at most {row.largest:.3g}, relative {row.relative:.3g}" for row in found.values]
    _echo_some("values", rows)
    echo(f"{found.equal} tensors are equal." if not found.is_equal else f"Equal: {found.equal} tensors and all else.")


def _side(value: object) -> str:
    return "–" if value is None else repr(value) if isinstance(value, str) else str(value)


def _echo_some(title: str, lines: Sequence[str]) -> None:
    if lines:
        echo(f"{title} ({len(lines)})")
        for line in lines[:_SHOWN_CHANGES]:
            echo(f"  {printable(line)}")
        if len(lines) > _SHOWN_CHANGES:
            echo(f"  … and {len(lines) - _SHOWN_CHANGES} more; --json lists all")
