"""What a Flair model computes on the last hidden states of its transformer, where that is one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import flair
import torch
from flair.data import Sentence
from flair.embeddings import StackedEmbeddings, TransformerEmbeddings
from flair.models import SequenceTagger, TextClassifier, TextRegressor, TokenClassifier
from flair.nn import Model

from flair_peft.adapter import methods
from flair_peft.base import transformer as base_transformer
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import AdapterConfigError, name_some
from flair_peft.primitives.full_precision import full_precision

_OF_WORDS = (SequenceTagger, TokenClassifier)
_OF_TEXTS = (TextClassifier, TextRegressor)

# Prefix of Flair's BIOES tags → that of BIO, which is all that others know.
_BIO = {"S-": "B-", "E-": "I-"}


@dataclass(frozen=True)
class LinearHead:
    """A head that is one linear layer, and what it is applied to.

    Attributes:
        embeddings: whose transformer's last hidden states it reads.
        weight: (labels, hidden), in fp32.
        bias: (labels,), in fp32.
        labels: of the rows, as Flair has them.
        problem: "tokens", or the ``problem_type`` that transformers has for texts.
        has_spans: whether the labels are tags of spans.
        unlabelled: labels of words that Flair takes for none.
    """

    embeddings: TransformerEmbeddings
    weight: torch.Tensor
    bias: torch.Tensor
    labels: tuple[str, ...]
    problem: str
    has_spans: bool
    unlabelled: frozenset[str] = frozenset({"O"})

    @property
    def reads_words(self) -> bool:
        """Whether it scores the words of a text, and not the text."""
        return self.problem == "tokens"

    def pooled(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of a word, (labels,), from those of its subtokens: of a linear layer they can be pooled."""
        pooling = self.embeddings.subtoken_pooling
        return scores.mean(dim=0) if pooling == "mean" else scores[0 if pooling == "first" else -1]

    @property
    def has_span_ends(self) -> bool:
        """Whether tags are those of BIOES."""
        return self.has_spans and any(label[:2] in _BIO for label in self.labels)

    @property
    def without_place(self) -> list[str]:
        """Labels of a tagger of spans that say nothing of a place in one, such as "<unk>"."""
        named = (label for label in self.labels if label not in self.unlabelled) if self.has_spans else ()
        return [label for label in named if label[:2] not in ("B-", "I-", *_BIO)]

    @property
    def taken_for_none(self) -> list[str]:
        """Labels of spans of a type that pipeline takes for no span."""
        named = (label for label in self.labels if label not in self.unlabelled) if self.has_spans else ()
        return [label for label in named if label[2:] == "O"]

    @property
    def names(self) -> list[str]:
        """What the rows are called where tags are B-, I- and O: BIOES has two names for each of the first."""
        renamed = _BIO if self.has_spans else {}
        unlabelled = self.unlabelled if self.reads_words else ()
        return ["O" if label in unlabelled else renamed.get(label[:2], label[:2]) + label[2:] for label in self.labels]


def linear_head(model: Model) -> LinearHead:
    """Return the head of a model, if that and how it reads its transformer is what classes of transformers can have.

    Raises:
        AdapterConfigError: it is not.
    """
    if type(model) not in (*_OF_WORDS, *_OF_TEXTS):
        _refuse(model, f"no class of transformers does what {type(model).__name__} does")
    embeddings = _reader(model)
    weight, bias = _layer_of(model)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        _refuse(model, "its head holds numbers that are not finite")
    labels = ["value"] if isinstance(model, TextRegressor) else model.label_dictionary.get_items()
    if len(weight) != len(labels):
        _refuse(model, f"its head gives {len(weight)} scores, and its dictionary has {len(labels)} labels")
    has_spans = getattr(model, "predict_spans", False) or getattr(model, "span_prediction_problem", False)
    # A legacy of Flair's own: its spans, and its SequenceTagger, leave "_" out.
    legacy = {"_"} if has_spans or isinstance(model, SequenceTagger) else set()
    unlabelled = frozenset({"O", *legacy, *([""] if has_spans else [])})
    return LinearHead(embeddings, weight, bias, tuple(labels), _problem_of(model), has_spans, unlabelled)


def _refuse(model: Model, reason: str) -> NoReturn:
    adapted = adapted_embeddings(model) if isinstance(model, Model) else []
    has_weights = any(not each.adapter_config.is_prompt_learning for each in adapted)
    plain = "Use flair_peft.merge for a plain Flair model, or train" if has_weights else "Train"
    raise AdapterConfigError(
        f"Cannot make a model of transformers of this {type(model).__name__}: {reason}. What is written would predict "
        f"something else. {plain} with one linear layer on the last layer of the transformer."
    )


def _reader(model: Any) -> TransformerEmbeddings:
    """Return the embeddings that the head reads, if it reads each vector from the last hidden state."""
    outer = model.document_embeddings if isinstance(model, TextRegressor) else model.embeddings
    parts = list(outer.embeddings) if isinstance(outer, StackedEmbeddings) else [outer]
    embeddings = parts[0]
    if len(parts) != 1 or not isinstance(embeddings, TransformerEmbeddings):
        _refuse(
            model, f"it reads what {type(outer).__name__} makes of its embeddings, not the vectors of a transformer"
        )
    last = {-1, getattr(embeddings.model.config, "num_hidden_layers", -1)}
    if len(embeddings.layer_indexes) != 1 or last.isdisjoint(embeddings.layer_indexes):
        _refuse(model, "its embeddings read several layers of the transformer, or not the last one (layers='-1')")
    if embeddings.context_length > 0:
        _refuse(model, "its embeddings read neighbouring sentences (use_context), and transformers has none")
    if embeddings.tokenizer_needs_ocr_boxes or embeddings.needs_manual_ocr or embeddings.feature_extractor:
        _refuse(model, "its embeddings read boxes or images beside the words")
    if not embeddings.tokenizer.is_fast:
        _refuse(model, "its tokenizer is a slow one, which does not tell which subtokens a word has")
    transformer = embeddings.model
    if isinstance(embeddings, AdaptedEmbeddings):
        transformer = embeddings.base_model
        if embeddings.adapter_config.is_prompt_learning:
            _refuse(model, "its adapter puts virtual tokens in front of the text")
        if methods.depends_on_batch(embeddings.adapter_config):
            _refuse(model, "its adapter makes the scores of a text depend on the texts beside it")
    if not base_transformer.takes_mask(transformer):
        _refuse(model, f"{type(transformer).__name__} masks no padding: its scores depend on the texts beside it")
    if isinstance(model, _OF_WORDS) and embeddings.subtoken_pooling == "first_last":
        _refuse(model, "it reads two subtokens of a word at once (subtoken_pooling='first_last')")
    if isinstance(model, _OF_TEXTS) and embeddings.cls_pooling != "cls":
        _refuse(model, f"it reads all subtokens of a text at once (cls_pooling='{embeddings.cls_pooling}')")
    return embeddings


def _layer_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the head: a reprojection and the layer after it are one layer."""
    layers = [model.linear] if isinstance(model, SequenceTagger) else [model.decoder]
    if isinstance(model, SequenceTagger):
        between = [name for name in ("use_crf", "use_rnn") if getattr(model, name)]
        if between:
            _refuse(model, f"its head is more than one linear layer: it has {name_some(between)}")
        layers = [*([model.embedding2nn] if model.reproject_embeddings else []), *layers]
    if not all(type(layer) is torch.nn.Linear for layer in layers):
        _refuse(model, f"its head is a {type(layers[-1]).__name__}, not one linear layer")
    weight, bias = _as_double(layers[0])
    for layer in layers[1:]:
        after, added = _as_double(layer)
        weight, bias = after @ weight, after @ bias + added
    return weight.float(), bias.float()


def _as_double(layer: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.weight.detach().cpu().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double()
    return weight, bias


def _problem_of(model: Any) -> str:
    if isinstance(model, TextRegressor):
        return "regression"
    is_multi_label = getattr(model, "multi_label", False)
    if isinstance(model, _OF_WORDS):
        if is_multi_label:
            _refuse(model, "it gives a word several labels, and classes for tokens give it one")
        return "tokens"
    if not is_multi_label and len(model.label_dictionary) == 1:
        _refuse(model, "it has one label only, which transformers takes for a yes or no")
    return "multi_label_classification" if is_multi_label else "single_label_classification"


def live_scores(model: Any, texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return what a model scores before any softmax: (words of all texts, labels), or (texts, labels)."""
    sentences = [Sentence(list(words)) for words in texts]
    with vector_probe.trying_out(model), torch.no_grad(), full_precision(flair.device.type):
        if isinstance(model, SequenceTagger):
            tensor, lengths = model._prepare_tensors(sentences)
            scores = model.forward(tensor, lengths)
        elif isinstance(model, TextRegressor):
            scores = model.forward(*model._prepare_tensors(sentences))
        else:
            points = model._get_data_points_for_batch(sentences)
            scores = model.decoder(model._encode_data_points(sentences, points))
    return scores.float().cpu()
