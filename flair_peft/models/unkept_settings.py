"""Settings that Flair's classes take and do not keep: stored beside what Flair stores, and set again by a load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from flair.embeddings import (
    DocumentCNNEmbeddings,
    DocumentLMEmbeddings,
    DocumentPoolEmbeddings,
    DocumentRNNEmbeddings,
    FlairEmbeddings,
    HashEmbeddings,
    MuseCrosslingualEmbeddings,
    OneHotEmbeddings,
    PooledFlairEmbeddings,
    StackedEmbeddings,
    TransformerEmbeddings,
)
from flair.models import (
    SequenceTagger,
    SpanClassifier,
    TARSClassifier,
    TARSTagger,
    TextPairClassifier,
    TextTripleClassifier,
    TokenClassifier,
)
from flair.nn import DefaultClassifier, LockedDropout, Model
from transformers.tokenization_utils_base import LARGE_INTEGER

from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import ModelFileError, UnsupportedStateError

log = logging.getLogger("flair_peft")

KEY = "unkept_settings"
"""Where the state of a model holds them: path of the module → name → value."""


def _is_flairs_rnn(tagger: SequenceTagger) -> bool:
    rnn = tagger.rnn if tagger.use_rnn else None
    return rnn is None or (rnn.bias and rnn.mode != "RNN_RELU")


def _is_flairs_decoder(decoder: torch.nn.Module) -> bool:
    return type(decoder) is torch.nn.Linear and decoder.bias is not None


def _predicts_spans(model: SequenceTagger | TokenClassifier) -> bool:
    return bool(model._determine_if_span_prediction_problem(model.label_dictionary))


# Class → attributes that neither its state nor its parameters bring back, with what they are without, or a function to
# that. Flair puts vectors of a stack beside each other in the order of names.
_UNKEPT: dict[type, dict[str, Any]] = {
    DefaultClassifier: {
        "should_embed_sentence": lambda found: not isinstance(found, TextPairClassifier | TextTripleClassifier)
    },
    DocumentCNNEmbeddings: {"name": "document_cnn"},
    DocumentLMEmbeddings: {"name": "document_lm"},
    DocumentPoolEmbeddings: {"name": lambda found: f"document_{found.pooling}"},
    DocumentRNNEmbeddings: {"name": lambda found: f"document_{type(found.rnn).__name__}"},
    FlairEmbeddings: {"with_whitespace": True},
    HashEmbeddings: {"name": "hash"},
    MuseCrosslingualEmbeddings: {"name": "muse-crosslingual"},
    OneHotEmbeddings: {"name": lambda found: f"one-hot-{found.field}"},
    PooledFlairEmbeddings: {"name": lambda found: f"{found.context_embeddings.name}-context"},
    SequenceTagger: {
        "predict_spans": _predicts_spans,
        "rnn.dropout": lambda found: 0.0 if found.rnn.num_layers == 1 else 0.5,
    },
    SpanClassifier: {"_span_label_type": None},  # Flair stores it, and does not read it again
    TARSClassifier: {
        "prefix": True,
        "tars_model.dropout.p": 0.0,
        "tars_model.inverse_model": False,
        "tars_model.locked_dropout.dropout_rate": 0.0,
        "tars_model.multi_label": False,
        "tars_model.multi_label_threshold": {"default": 0.5},
        "tars_model.train_on_gold_pairs_only": False,
        "tars_model.word_dropout.dropout_rate": 0.0,
    },
    TARSTagger: {"tars_model.use_dropout": 0.0, "tars_model.use_locked_dropout": 0.5},
    TokenClassifier: {"span_encoding": "BIOES", "span_prediction_problem": _predicts_spans},
    TransformerEmbeddings: {
        "truncate": lambda found: found.tokenizer.model_max_length <= LARGE_INTEGER,
        "stride": lambda found: found.tokenizer.model_max_length // 2 if found.allow_long_sentences else 0,
    },
}

# What a setting decides besides its own value, as Flair makes it.
_FOLLOWING: dict[str, tuple[str, Callable[[Any], torch.nn.Module]]] = {
    "tars_model.multi_label": (
        "tars_model.loss_function",
        lambda value: (torch.nn.BCEWithLogitsLoss if value else torch.nn.CrossEntropyLoss)(reduction="sum"),
    ),
    "tars_model.use_dropout": ("tars_model.dropout", torch.nn.Dropout),
    "tars_model.use_locked_dropout": ("tars_model.locked_dropout", LockedDropout),
}

# Those on which the weights depend: what Flair builds without them cannot hold these.
_DECIDING: tuple[tuple[type, str, Callable[[Any], bool]], ...] = (
    (FlairEmbeddings, "a recurrent_type other than LSTM", lambda found: not isinstance(found.lm.rnn, torch.nn.LSTM)),
    (SequenceTagger, "bidirectional=False", lambda found: found.use_rnn and not found.bidirectional),
    (SequenceTagger, "bias and nonlinearity of an rnn", lambda found: not _is_flairs_rnn(found)),
    (TARSClassifier, "a decoder of one's own", lambda found: not _is_flairs_decoder(found.tars_model.decoder)),
    (TARSClassifier, "loss_weights", lambda found: found.tars_model.loss_weights is not None),
    (TARSTagger, "loss_weights", lambda found: found.tars_model.loss_weights is not None),
    (TARSTagger, "allow_unk_predictions", lambda found: found.tars_model.label_dictionary.add_unk),
    (TARSTagger, "tag_format", lambda found: found.tars_model.tag_format != "BIOES"),
)


def refuse_deciding(model: Model) -> None:
    """Return if what Flair builds of the settings that it keeps has places for the weights of the model.

    Raises:
        UnsupportedStateError: it has not.
    """
    for module in model.modules():
        for kind, setting, is_set in _DECIDING:
            is_of_flair = type(module).__module__.startswith("flair.")  # a user's own class may keep what it wants
            if is_of_flair and isinstance(module, kind) and is_set(module):
                raise UnsupportedStateError(
                    f"Cannot store this {type(model).__name__}: Flair does not keep {setting} of {kind.__name__}, and "
                    "what it builds without that has no place for the weights. Nothing could load what would be "
                    f"written. Make the {kind.__name__} without it."
                )


def read(model: Model) -> dict[str, dict[str, Any]]:
    """Return those that differ from what Flair's classes take where nobody says anything: path → name → value."""
    found: dict[str, dict[str, Any]] = {}
    for path, module, name, usual in _settings(model):
        value = attrgetter(name)(module)
        if value != usual:
            found.setdefault(path, {})[name] = value
    return found


def set_again_(model: Model, state: Mapping[str, Any], *, source: str) -> None:
    """The model has the settings of a state, in place; what the state does not say stays.

    Raises:
        ModelFileError: the state says something that no such model has.
    """
    stored = state[KEY] if KEY in state else _told_otherwise(model, state)
    known = {(path, name): (module, usual) for path, module, name, usual in _settings(model)}
    is_sound = isinstance(stored, Mapping) and all(isinstance(each, Mapping) for each in stored.values())
    given = [(path, *each) for path, settings in stored.items() for each in settings.items()] if is_sound else []
    if not is_sound or not all(_fits(value, known.get((path, name))) for path, name, value in given):
        raise ModelFileError(
            f"Cannot load '{source}': its '{KEY}' are damaged. They hold settings that Flair's classes do not "
            "keep, and fit no module of this model. Copy or save the file again."
        )
    for path, name, value in given:
        module = known[path, name][0]
        _set_(module, name, value)
        if name in _FOLLOWING:
            following, made = _FOLLOWING[name]
            _set_(module, following, made(value).train(module.training))


def _set_(module: Any, name: str, value: Any) -> None:
    *above, attribute = name.split(".")
    owner = attrgetter(".".join(above))(module) if above else module
    setattr(owner, attribute, value)


def _told_otherwise(model: Model, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what files of before, and of Flair, say elsewhere, or not at all: names in a stack were numbered."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(model, SpanClassifier) and state.get("span_label_type") is not None:
        found[""] = {"_span_label_type": state["span_label_type"]}
    stacks = ((path, each) for path, each in model.named_modules() if isinstance(each, StackedEmbeddings))
    for path, stack in stacks:
        is_numbered = [each.name.startswith(f"{number}-") for number, each in enumerate(stack.embeddings)]
        lacking = [number for number, each in enumerate(stack.embeddings) if "name" in _UNKEPT.get(type(each), {})]
        lacking = [number for number in lacking if any(is_numbered) and not is_numbered[number]]
        names = [each.name for each in stack.embeddings]
        numbered = [f"{number}-{name}" if number in lacking else name for number, name in enumerate(names)]
        for number in lacking:
            found[f"{path}.list_embedding_{number}".lstrip(".")] = {"name": numbered[number]}
        if sorted(range(len(names)), key=names.__getitem__) != sorted(range(len(names)), key=numbered.__getitem__):
            log.warning(
                "The file does not say in which order the vectors of its stack are: they are taken in that of the "
                "embeddings, as of a model when it is made. If it was loaded by an earlier version and trained on, it "
                "predicts something else: train it again.",
            )
    return found


def _settings(model: Model) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield path and module, name of an attribute, and what it is without."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PeftTransformerEmbeddings):  # their parameters have all
            continue
        for kind, settings in _UNKEPT.items():
            for name, usual in settings.items() if isinstance(module, kind) else ():
                if name != "rnn.dropout" or module.use_rnn:
                    yield path, module, name, usual(module) if callable(usual) else usual


def _fits(value: Any, known: tuple[Any, Any] | None) -> bool:
    """Whether a value is of the kind that the usual one is."""
    if known is None:
        return False
    if isinstance(known[1], dict):
        is_plain = isinstance(value, dict) and all(type(each) in (int, float) for each in value.values())
        return is_plain and "default" in value
    if isinstance(known[1], float):
        return type(value) in (int, float)
    return type(value) is (str if known[1] is None else type(known[1]))
