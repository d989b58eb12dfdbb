"""What an exported model of transformers tells who opens it: how it is used, and where it reads text unlike Flair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flair.models import TextClassifier
from flair.nn import Model
from huggingface_hub import ModelCard, ModelCardData

from flair_peft.compat import versions
from flair_peft.errors import spell_out
from flair_peft.export.headed_class import HeadedModel
from flair_peft.export.linear_head import LinearHead
from flair_peft.primitives.dtypes import dtype_name

_CARD = """\
---
{metadata}
---

# {kind} of a Flair {model}

It scores what a {model} of [Flair](https://github.com/flairNLP/flair) scores for the same words.

```python
{use}
```

## Where it reads text unlike Flair

{differences}
"""

_WORDS = """\
from transformers import pipeline

tagger = pipeline("token-classification", model={model}, tokenizer="path of this folder", aggregation_strategy="first")
tagger("George Washington went to Washington .")

# The same for any text: the words that Flair reads, each tagged by its {subtoken} subtoken; None where it has none.
from flair.data import Sentence

words = [token.text for token in Sentence("George Washington went to Washington.")]
encoding = tagger.tokenizer(words, is_split_into_words=True, truncation=True, return_tensors="pt")
scores = tagger.model(**encoding).logits[0]
places = [[place for place, word in enumerate(encoding.word_ids()) if word == number] for number in range(len(words))]
names = tagger.model.config.id2label
tags = [names[scores[place]{pooled}.argmax().item()] if place else None for place in places]"""

_POOLED = {"first": ("first", "[0]"), "last": ("last", "[-1]"), "mean": ("every", ".mean(dim=0)")}

_TEXTS = """\
from transformers import pipeline

classifier = pipeline("text-classification", model={model}, tokenizer="path of this folder"{top})
classifier("George Washington went to Washington .", truncation=True)

# The same for any text: the words that Flair reads.
from flair.data import Sentence

text = Sentence("George Washington went to Washington.").to_tokenized_string()
classifier(text, truncation=True)"""

_WORDS_OF_TEXTS = """\
from flair.data import Sentence
from transformers import pipeline

classifier = pipeline("text-classification", model={model}, tokenizer="path of this folder"{top})
words = [token.text for token in Sentence("George Washington went to Washington.")]
encoding = classifier.tokenizer(words, is_split_into_words=True, truncation=True, return_tensors="pt")
scores = classifier.model(**encoding).logits[0]      # of the words that Flair reads"""


_REPEATED = ("id2label", "label2id", "problem_type", "pad_token_id", "return_dict", "is_encoder_decoder")

_FROM_PEFT = """\
from peft import AutoPeftModelFor{task}
from transformers import AutoConfig

config = AutoConfig.from_pretrained("path of this folder")
settings = {{name: getattr(config, name) for name in {names}}}
model = AutoPeftModelFor{task}.from_pretrained("path of this folder", dtype="{dtype}", **settings)
"""
_MERGED = "model = model.merge_and_unload()      # for a pipeline\n"


def to_repeat(head: LinearHead) -> tuple[str, ...]:
    """Return settings of the config that PEFT does not read: it takes the base's config, unless it is told."""
    base = getattr(head.embeddings, "base_model", head.embeddings.model)
    returns_tuples = ("torchscript",) if getattr(base.config, "torchscript", False) else ()
    return (*_REPEATED, *returns_tuples)


def settings(model: Model, head: LinearHead) -> dict[str, Any]:
    """Return what the config keeps of the Flair model: nothing in transformers reads it."""
    kept: dict[str, Any] = {"class": type(model).__name__, "versions": versions()}
    kept.update(labels=[*head.labels], names=head.names)
    if head.reads_words:
        kept["subtoken_pooling"] = head.embeddings.subtoken_pooling
    if isinstance(model, TextClassifier) and model.multi_label:
        kept["multi_label_threshold"] = model.multi_label_threshold
    return kept


def write_card(
    model: Model, head: LinearHead, headed: HeadedModel, *, is_merged: bool, can_be_merged: bool, is_text_other: bool
) -> str:
    """Return the card in Markdown, with the metadata that the Hub reads."""
    task = "token-classification" if head.reads_words else "text-classification"
    data = ModelCardData(library_name="transformers" if is_merged else "peft", pipeline_tag=task, tags=["flair"])
    text = _CARD.format(
        metadata=data.to_yaml(),
        kind=type(headed.model).__name__,
        model=type(model).__name__,
        use=_use(head, headed, is_merged=is_merged, can_be_merged=can_be_merged, is_text_other=is_text_other),
        differences="\n".join(f"- {line}" for line in differences(model, head, is_text_other=is_text_other)),
    )
    return str(ModelCard(text))


def _use(head: LinearHead, headed: HeadedModel, *, is_merged: bool, can_be_merged: bool, is_text_other: bool) -> str:
    top = ", top_k=None" if head.problem == "multi_label_classification" else ""
    source = '"path of this folder"' if is_merged else "model"
    if head.reads_words:
        subtoken, pooled = _POOLED[head.embeddings.subtoken_pooling]
        use = _WORDS.format(model=source, subtoken=subtoken, pooled=pooled)
    else:
        use = (_WORDS_OF_TEXTS if is_text_other else _TEXTS).format(model=source, top=top)
    if is_merged:
        return use
    task = "TokenClassification" if head.reads_words else "SequenceClassification"
    dtype = dtype_name(headed.model.dtype)
    loaded = _FROM_PEFT.format(task=task, dtype=dtype, names=to_repeat(head))
    return loaded + (_MERGED if can_be_merged else "") + use


def differences(model: Model, head: LinearHead, *, is_text_other: bool) -> Iterator[str]:
    """Yield a line for each way in which transformers can read text, or what was scored, unlike Flair."""
    yield (
        "Flair splits text into words by rules of its own, and gives the tokenizer these; the tokenizer splits plain "
        'text by others. Words such as "U.S." or "don\'t" come out in another way where plain text is read.'
    )
    if is_text_other:
        yield (
            "This tokenizer gives other subtokens for a text than for its words, one by one, which Flair reads: plain "
            "text is scored in another way. Give it words, with is_split_into_words=True, as in the code above."
        )
    embeddings = head.embeddings
    if embeddings.allow_long_sentences:
        longest = embeddings.tokenizer.model_max_length
        yield f"Flair reads texts of more than {longest} subtokens in windows, and here they are cut."
    if head.reads_words and embeddings.subtoken_pooling != "first":
        yield (
            f"A word has the scores of its subtokens by '{embeddings.subtoken_pooling}', before any softmax. No "
            "strategy of pipeline reads it so: words of several subtokens come out in another way there."
        )
    if head.reads_words and not getattr(
        embeddings.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None
    ):
        yield (
            "pipeline guesses from spaces where a word begins, since this tokenizer does not mark it: a span can start "
            "with the space before it, and a subtoken that is a space alone counts as a word."
        )
    if head.unlabelled & {*head.labels} - {"O"}:
        yield "Flair gives no label where it finds _; here _ is called O, which pipeline leaves out."
    if head.has_span_ends:
        yield (
            "B- and S- of Flair's tags are both called B-, and I- and E- are both called I-: several labels have one "
            "name. config.json has Flair's own names in flair_peft.labels. What Flair joins by an E- of another type "
            "than the tag before it are two spans here."
        )
    if head.taken_for_none:
        yield (
            "pipeline takes the type O for no span, and leaves out its spans. Rename the type before the training, or "
            "read the labels of words, as in the code above."
        )
    if odd := head.without_place:
        yield (
            f"Flair goes on with a span, or begins one, at words that it labels {spell_out(', '.join(odd))}; here each "
            "such word is a span of its own."
        )
    if head.reads_words and not head.has_spans:
        yield "pipeline joins neighbouring words with the same label, where Flair labels each word."
    if head.problem == "multi_label_classification":
        thresholds = spell_out(repr(model.multi_label_threshold))
        yield f"Flair gives the labels whose score is above a threshold ({thresholds}); here all have their score."
    if not head.reads_words and not embeddings.initial_cls_token:
        yield (
            "The last token before the padding is read, and padding is told by its mark: a text that ends in "
            f"{spell_out(repr(embeddings.tokenizer.pad_token))} itself is read at a token before."
        )
    if "O" in head.labels and not head.reads_words:
        yield "Flair gives no label where it finds O; here O is a label like others."
