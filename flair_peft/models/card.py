"""The model card of a checkpoint: what it predicts, how well it did, what it costs and how to load it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flair.data import Dictionary
from flair.models import SequenceTagger, TextClassifier, TextPairClassifier, TokenClassifier
from flair.nn import Model
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flair_peft.adapter import methods, trainable
from flair_peft.compat import versions
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import spell_out
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.dtypes import dtype_name
from flair_peft.torchfile import state_tree

_SHOWN_LABELS = 50

# The Hub shows scores by task and metric. Flair's evaluation of other models measures other things than it records.
_TASKS = {
    (SequenceTagger, TokenClassifier): "token-classification",
    (TextClassifier, TextPairClassifier): "text-classification",
}
_METRICS = {
    (average, metric): metric.removesuffix("-score")
    for average in ("micro avg", "macro avg", "weighted avg")
    for metric in ("f1-score", "precision", "recall")
}

_CARD = """\
---
{metadata}
---

# {title}

A [Flair](https://github.com/flairNLP/flair) model{about}

## Use

```python
import flair_peft
from {module} import {model}
from flair.data import Sentence

model = {model}.load("path or Hub id of this folder")
sentence = Sentence("George Washington went to Washington .")
model.predict(sentence)
print(sentence)
```

{sections}
"""

_WITH_ADAPTER = """\
 whose transformer carries a [PEFT](https://github.com/huggingface/peft) adapter. This folder holds what was learned; \
the base model is found where it is named below."""
_ON_BASE = ". This folder holds what was learned; the base model is found where it is named below."
_WHOLE = ". This folder holds all of it, as JSON and safetensors."
_BY_PEFT = "PEFT alone loads the adapter too: `PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)`."


def plain(value: Any) -> Any:
    """Return a value of Flair's model card as files hold it: what is no plain value, such as an optimiser, as text."""
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def write_card(
    model: Model, embedded: Sequence[Any], *, size: int, bases: Mapping[Any, StoredBase] = MappingProxyType({})
) -> str:
    """Return the card of a model in Markdown, with the metadata that the Hub reads."""
    method = _method(embedded[0]) if embedded else None
    on_base = f" on {_code(embedded[0].base_model_name)}" if embedded else ""
    plain = _ON_BASE if any(base.is_needed for base in bases.values()) else _WHOLE
    sections = [*_labels(model), *_scores(model), _facts(embedded, size, bases)]
    text = _CARD.format(
        metadata=_metadata(model, embedded, bases).to_yaml(),
        model=type(model).__name__,
        module=type(model).__module__,
        title=f"{type(model).__name__}{f' with {method}' if method else ''}{on_base}",
        about=_WITH_ADAPTER if method else plain,
        sections="\n\n".join([*([_BY_PEFT] if method else []), *sections]),
    )
    return str(ModelCard(text))  # reading the metadata again is how huggingface_hub validates them


def _method(embeddings: Any) -> str | None:
    """Return the method of the adapter that embeddings have, in words."""
    is_adapted = isinstance(embeddings, PeftTransformerEmbeddings)
    return methods.describe(embeddings.adapter_config) if is_adapted else None


def _revision(embeddings: Any, bases: Mapping[Any, StoredBase]) -> str | None:
    record = bases[embeddings].record if embeddings in bases else embeddings.base_record
    return None if record is None else record.revision


def _metadata(model: Model, embedded: Sequence[Any], bases: Mapping[Any, StoredBase]) -> ModelCardData:
    is_on_hub = bool(embedded) and _revision(embedded[0], bases) is not None
    results = list(_results(model))
    return ModelCardData(
        library_name="flair",
        base_model=spell_out(embedded[0].base_model_name) if is_on_hub else None,
        tags=["flair", "flair_peft", *(["peft"] if any(map(_method, embedded)) else [])],
        model_name=type(model).__name__ if results else None,
        eval_results=results or None,
    )


def _results(model: Model) -> Iterator[EvalResult]:
    """Yield the scores that the training recorded, where it also recorded what they measure."""
    task = next((task for classes, task in _TASKS.items() if isinstance(model, classes)), None)
    average, metric = measured = _main_metric(model)
    for split in ("dev", "test"):
        score = _recorded(model, "scores").get(f"{split} score")
        if task and measured in _METRICS and isinstance(score, float) and math.isfinite(score):
            yield EvalResult(
                task_type=task,
                dataset_type="unknown",
                dataset_name="corpus of the training",  # Flair records no name of it
                dataset_split=split,
                metric_type=_METRICS[measured],
                metric_name=f"{metric} ({average})",
                metric_value=round(score, 4),
            )


def _main_metric(model: Model) -> tuple[str, str]:
    match _recorded(model, "training_parameters").get("main_evaluation_metric"):
        case [str(average), str(metric)]:
            return average, metric
    return "", ""


def _recorded(model: Model, name: str) -> Mapping[str, Any]:
    """Return a part of what Flair's model card holds of the training; nothing, where there is no such part."""
    part = (model.model_card or {}).get(name)
    return part if isinstance(part, Mapping) else {}


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
    rows = [(_cell(name), _cell(value)) for name, value in _recorded(model, "scores").items()]
    if rows:
        yield _table("Scores in training", rows)


def _facts(embedded: Sequence[Any], size: int, bases: Mapping[Any, StoredBase]) -> str:
    rows = []
    for embeddings in embedded:
        found = _revision(embeddings, bases)
        revision = f", revision {_code(found)}" if found else ""
        rows.append(("base model", f"{_code(embeddings.base_model_name)}{revision}"))
        if method := _method(embeddings):
            trained = sum(p.numel() for p in trainable.parameters(embeddings.model).values())
            total = sum(p.numel() for p in embeddings.model.parameters())
            share = f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"
            rows += [("method", method), ("trained in the transformer", share)]
        base = getattr(embeddings, "base_model", embeddings.model)
        rows.append(("precision of the base", _code(str(dtype_name(base.get_input_embeddings().weight.dtype)))))
    rows += [("tensors stored", f"{size / 1e6:.2f} MB"), *((f"{k} version", v) for k, v in versions().items())]
    return _table("Facts", rows)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _cell(value: Any) -> str:
    """Return a value for a table: words and numbers as they are, anything that Markdown could read as a literal."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    is_plain = isinstance(value, int | float) or all(c.isalnum() or c in " -" for c in text)
    return text if is_plain else _code(text)


def _code(text: str) -> str:
    """Return text as a literal, also in a table: labels hold pipes, backticks and line ends."""
    escaped = spell_out(text.replace("`", "'").replace("|", "\\|").replace("\n", " "))
    return f"`{escaped or ' '}`"
