"""Real text for trainings: the sentences of each task, the model for it, and how its predictions are scored.

The texts are those of the folder ``shared/data`` beside the project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from flair.data import Dictionary, Sentence, get_spans_from_bio
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Classifier

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings

DATA = Path(__file__).parents[3] / "shared" / "data"
EVALUATION_BATCH = 16

ONE_WINDOW = {"allow_long_sentences": False}
"""No sentence here is longer than the model reads; Flair's default would copy each batch into 512 places."""
CONTEXT = 16
"""Words on either side of a sentence that a model with context reads; with Flair's 64, trainings take far longer."""
HELD_OUT = 400
"""At the end of the development part of the treebank: sentences, and marks between documents, for the choice."""
BOUNDARY = "-DOCSTART-"

Tagged = tuple[list[str], list[str]]
"""The words of a sentence; one label for all of them, or one for each."""


@dataclass(frozen=True)
class Task:
    """A data set in three parts, which share no sentence but short ones that occur several times, and the model for it.

    Attributes:
        label_type: Flair's name for the labels.
        pool: sentences from which each seed draws those of its training.
        choice: sentences on which learning rates are chosen.
        test: sentences on which the chosen ones are measured.
        embeddings: the stock class and ours.
        options: of either class.
        model: the class of the model.
        arguments: what the model's class takes, of the dictionary of the labels.
        in_documents: whether the pool is one training set in its order, whose sentences may be read together.
    """

    label_type: str
    pool: list[Tagged]
    choice: list[Tagged]
    test: list[Tagged]
    embeddings: tuple[type[TransformerEmbeddings], type[TransformerEmbeddings]]
    options: dict[str, Any]
    model: type[Classifier]
    arguments: Callable[[Dictionary], dict[str, Any]]
    in_documents: bool = False


def sst2() -> Task:
    """Return sentiment of sentences: 6,920 to draw from, 872 for the choice, 1,821 to test."""

    def read(part: str) -> list[Tagged]:
        lines = (DATA / "sst2" / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
        return [(text.split(" "), [label]) for text, label in (line.split("\t") for line in lines)]

    return classification(read("train"), read("dev"), read("test"))


def classification(pool: list[Tagged], choice: list[Tagged], test: list[Tagged]) -> Task:
    """Return a task whose sentences have one label each."""
    return Task(
        "sentiment",
        pool,
        choice,
        test,
        embeddings=(TransformerDocumentEmbeddings, PeftTransformerDocumentEmbeddings),
        options={"cls_pooling": "mean", **ONE_WINDOW},
        model=TextClassifier,
        arguments=lambda labels: {"label_dictionary": labels, "label_type": "sentiment"},
    )


def ewt() -> Task:
    """Return universal parts of speech: of the file "dev", all but the last 400 to draw from, these for the choice."""

    def read(part: str) -> list[Tagged]:
        blocks = (DATA / "ud-english-ewt" / f"en_ewt-ud-{part}.conllu").read_text(encoding="utf-8").split("\n\n")
        rows = [[line.split("\t") for line in block.splitlines() if line[:1].isdigit()] for block in blocks]
        # Ranges ("1-2") and empty nodes ("1.1") are not words.
        words = [[row for row in block if row[0].isdigit()] for block in rows if block]
        return [([row[1] for row in block], [row[3] for row in block]) for block in words]

    read_dev = read("dev")
    return tagging(read_dev[:-HELD_OUT], read_dev[-HELD_OUT:], read("test"))


def uner(*, crf: bool = False, context: bool = False) -> Task:
    """Return names of people, organisations and places in the same sentences, which stand in documents."""

    def read(part: str) -> list[Tagged]:
        blocks = (DATA / "uner-english-ewt" / f"{part}.tsv").read_text(encoding="utf-8").strip().split("\n\n")
        rows = [[line.split("\t") for line in block.splitlines()] for block in blocks]
        return [([word for word, _ in block], [tag for _, tag in block]) for block in rows]

    read_dev = read("dev")
    options = {"use_context": CONTEXT} if context else {}
    return tagging(
        read_dev[:-HELD_OUT],
        read_dev[-HELD_OUT:],
        read("test"),
        label_type="ner",
        crf=crf,
        in_documents=True,
        **options,
    )


def tagging(
    pool: list[Tagged],
    choice: list[Tagged],
    test: list[Tagged],
    *,
    label_type: str = "upos",
    crf: bool = False,
    in_documents: bool = False,
    **options: Any,
) -> Task:
    """Return a task whose words have a label each; the options are those of the embeddings."""
    heads = {"use_crf": crf, "use_rnn": False, "reproject_embeddings": False}
    return Task(
        label_type,
        pool,
        choice,
        test,
        embeddings=(TransformerWordEmbeddings, PeftTransformerWordEmbeddings),
        options={"layers": "-1", "subtoken_pooling": "first", **ONE_WINDOW, **options},
        model=SequenceTagger,
        arguments=lambda labels: {"tag_dictionary": labels, "tag_type": label_type, **heads},
        in_documents=in_documents,
    )


TASKS: dict[str, Callable[[], Task]] = {"SST-2": sst2, "UD-EWT": ewt}
NER_TASKS: dict[str, Callable[[], Task]] = {
    "NER, linear": uner,
    "NER, CRF": partial(uner, crf=True),
    "NER, linear, context": partial(uner, context=True),
    "NER, CRF, context": partial(uner, crf=True, context=True),
}


def dictionary(task: Task) -> Dictionary:
    """Return the labels of a task, in alphabetical order."""
    labels = {label for _, those in task.pool for label in those}
    made = Dictionary(add_unk=False)
    if task.label_type == "ner":
        labels = {label[2:] for label in labels} - {""}
        made.span_labels = True
    for label in sorted(labels):
        made.add_item(label)
    return made


def sentences(those: Sequence[Tagged], label_type: str) -> list[Sentence]:
    """Return them as Flair has them; those with names know what stands before and behind them in their document."""
    made = []
    for words, labels in those:
        sentence = Sentence(words, use_tokenizer=False)
        if label_type == "ner":
            for places, _, label in get_spans_from_bio([*labels]):
                sentence[places[0] : places[-1] + 1].add_label("ner", label)
        elif len(labels) == 1 and label_type == "sentiment":
            sentence.add_label(label_type, labels[0])
        else:
            for token, label in zip(sentence, labels, strict=True):
                token.add_label(label_type, label)
        made.append(sentence)
    return _linked(made) if label_type == "ner" else made


def _linked(made: list[Sentence]) -> list[Sentence]:
    """Return the sentences without the marks between documents, which stay their neighbours."""
    for before, after in pairwise(made):
        before._next_sentence, after._previous_sentence = after, before
    for sentence in made:
        sentence.is_document_boundary = sentence.text == BOUNDARY
    return [sentence for sentence in made if not sentence.is_document_boundary]


def score(model: Any, test: list[Sentence], label_type: str) -> float:
    """Return the micro-F1 of names, or else the share of labels that are right, as Flair counts and as we do."""
    result = model.evaluate(test, gold_label_type=label_type, mini_batch_size=EVALUATION_BATCH)
    if label_type == "ner":
        found, known = ({(n, *span) for n, s in enumerate(test) for span in _spans(s, t)} for t in ("predicted", "ner"))
        right, flairs = 2 * len(found & known) / (len(found) + len(known)), result.main_score
    else:
        units = [unit for sentence in test for unit in (sentence if label_type == "upos" else [sentence])]
        those = [unit.get_label("predicted").value == unit.get_label(label_type).value for unit in units]
        right, flairs = sum(those) / len(those), result.scores["accuracy"]
    # Flair rounds to four digits.
    assert math.isclose(flairs, right, abs_tol=1e-4)
    return right


def _spans(sentence: Sentence, label_type: str) -> list[tuple[int, int, str]]:
    return [(span[0].idx, span[-1].idx, span.get_label(label_type).value) for span in sentence.get_spans(label_type)]


def check_reloaded(model: Any, loaded: Any, sample: list[Sentence]) -> None:
    """Raise unless both predict the same labels with the same scores."""
    found = []
    for predictor, name in ((model, "live"), (loaded, "loaded")):
        predictor.predict(sample, label_name=name, mini_batch_size=EVALUATION_BATCH)
        found.append([[(label.value, label.score) for label in sentence.get_labels(name)] for sentence in sample])
    assert found[0] == found[1]
