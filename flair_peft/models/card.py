"""The model card of a checkpoint: what it predicts, how well it did, what it costs and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flair.data import Dictionary
from flair.models import SequenceTagger
from flair.nn import Model
from huggingface_hub import ModelCardData

from flair_peft.adapter import injection, methods
from flair_peft.compat import versions
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import spell_out
from flair_peft.torchfile import state_tree

_SHOWN_LABELS = 50


def plain(value: Any) -> Any:
    """Return a value of Flair's model card as files hold it: what is no plain value, such as an optimiser, as text."""
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def write_card(model: Model, embedded: list[PeftTransformerEmbeddings], *, size: int) -> str:
    """Return the card of a model in Markdown, with the metadata that the Hub reads.

    Args:
        model: a Flair model.
        embedded: its embeddings with an adapter.
        size: bytes of the checkpoint's tensors.
    """
    base = embedded[0].base_model_name
    sections = [
        _metadata(embedded),
        f"# {type(model).__name__} with {methods.describe(embedded[0].adapter_config)} on {_code(base)}",
        "A [Flair](https://github.com/flairNLP/flair) model whose transformer carries a "
        "[PEFT](https://github.com/huggingface/peft) adapter. This folder holds what was learned; the base model is "
        "found where it is named below.",
        _usage(model),
        *_labels(model),
        *_scores(model),
        _facts(model, embedded, size),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(embedded: list[PeftTransformerEmbeddings]) -> str:
    is_on_hub = embedded[0].base_revision is not None
    base = spell_out(embedded[0].base_model_name) if is_on_hub else None
    data = ModelCardData(library_name="flair", base_model=base, tags=["flair", "flair_peft", "peft"])
    return f"---\n{data.to_yaml()}\n---"


def _usage(model: Model) -> str:
    name = type(model).__name__
    return "\n".join(
        [
            "## Use",
            "",
            "```python",
            "import flair_peft",
            f"from {type(model).__module__} import {name}",
            "from flair.data import Sentence",
            "",
            f'model = {name}.load("path or Hub id of this folder")',
            'sentence = Sentence("George Washington went to Washington .")',
            "model.predict(sentence)",
            "print(sentence)",
            "```",
            "",
            "PEFT alone loads the adapter too: `PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)`.",
        ]
    )


def _labels(model: Model) -> Iterator[str]:
    tasks: Mapping[str, Any] = getattr(model, "tasks", None) or {"": model}
    for task, part in tasks.items():
        dictionary = getattr(part, "label_dictionary", None)
        if isinstance(dictionary, Dictionary):
            marks = state_tree.MARKS if isinstance(part, SequenceTagger) else ()
            items = [item for item in dictionary.get_items() if item not in marks]
            shown = ", ".join(_code(item) for item in items[:_SHOWN_LABELS])
            more = f" and {len(items) - _SHOWN_LABELS} more" if len(items) > _SHOWN_LABELS else ""
            yield f"## Labels{f' of {_cell(task)}' if task else ''}\n\n{_code(str(part.label_type))}: {shown}{more}"


def _scores(model: Model) -> Iterator[str]:
    scores = (model.model_card or {}).get("scores")
    if isinstance(scores, Mapping) and scores:
        rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in scores.items())
        yield f"## Scores in training\n\n| | |\n|---|---|\n{rows}"


def _facts(model: Model, embedded: list[PeftTransformerEmbeddings], size: int) -> str:
    rows = []
    for embeddings in embedded:
        trained = sum(p.numel() for p in injection.trainable_parameters(embeddings.model).values())
        total = sum(p.numel() for p in embeddings.model.parameters())
        revision = f", revision {_code(embeddings.base_revision)}" if embeddings.base_revision else ""
        rows += [
            ("base model", f"{_code(embeddings.base_model_name)}{revision}"),
            ("method", methods.describe(embeddings.adapter_config)),
            ("trained in the transformer", f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"),
            ("precision of the base", _code(str(embeddings.base_dtype).removeprefix("torch."))),
        ]
    rows += [("tensors stored", f"{size / 1e6:.2f} MB"), *((f"{k} version", v) for k, v in versions().items())]
    return "## Facts\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _cell(value: Any) -> str:
    """Return a value for a table: words and numbers as they are, anything that Markdown could read as a literal."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    is_plain = isinstance(value, int | float) or all(c.isalnum() or c in " -" for c in text)
    return text if is_plain else _code(text)


def _code(text: str) -> str:
    """Return text as a literal, also in a table: labels hold pipes, backticks and line ends."""
    escaped = spell_out(text.replace("`", "'").replace("|", "\\|").replace("\n", " "))
    return f"`{escaped or ' '}`"
