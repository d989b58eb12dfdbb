"""A Flair model as a directory of transformers: the class that scores the same, its weights, its tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from flair.embeddings import TransformerEmbeddings
from flair.nn import Model
from transformers import PreTrainedTokenizerBase

from flair_peft.base import quantisation, tokenizers
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import AdapterConfigError, StateMismatchError
from flair_peft.export import adapter_around, headed_class, merge, transformers_card, transformers_folder
from flair_peft.export.headed_class import HeadedModel
from flair_peft.export.linear_head import LinearHead, linear_head, live_scores
from flair_peft.primitives import devices, dtypes, host_internals, progress, rounding
from flair_peft.primitives.dtypes import dtype_name
from flair_peft.primitives.full_precision import full_precision
from flair_peft.storage import atomic, file_names, manifest

log = logging.getLogger("flair_peft")

_PROBES = tuple(
    text.split()
    for text in (
        "Berlin is large .",
        "Yes",
        "I would not have thought that anybody would write 3 or 4 sentences of this length to test it .",
        "The founder of the company , Angela Merkel-Schmidt , sold a house in New York .",
    )
)

# Of texts alone. Its last word is unknown to many vocabularies, whose mark of that may be that of padding, too.
_PROBES_OF_TEXTS = (*_PROBES, ("Yes", "\ua66e"))

# Largest distance of scores in fp32, as a share of their norm: sums in another order.
_TOLERANCE = 1e-4


@progress.shown("exporting")
def to_transformers(
    model: Model, directory: str | Path, *, merged: bool = True, dtype: dtypes.DtypeLike = torch.float32
) -> None:
    """The directory holds a model of transformers, with its tokenizer, that scores what this one does.

    A tagger becomes one of ``AutoModelForTokenClassification``, a classifier or regressor of texts one of
    ``AutoModelForSequenceClassification``. It loads where neither Flair nor this package is, in transformers 4 and 5.
    Before the directory is put in place, it is read again, and its scores are compared with those of the live model.

    What is the same are the scores of the same subtokens: those of the words that Flair gives the tokenizer one by one,
    as ``tokenizer(words, is_split_into_words=True)`` does. ``pipeline("token-classification",
    aggregation_strategy="first")`` gives the tagger's spans of text that Flair splits alike. It splits other text in
    other ways, such as "U.S." or "don't"; the card in the directory has code that does not. Flair reads long texts in
    windows, and here they are cut. Tags of BIOES are called B- and I-, as others read spans; only what Flair joins by
    an E- of another type than the tag before it are two spans then.

    A head that transformers has in two layers, with an activation between them, is written so that both together
    compute the one of Flair. Train on in Flair, not from there.

    Args:
        model: a ``SequenceTagger`` without RNN and CRF, a ``TokenClassifier``, ``TextClassifier`` or ``TextRegressor``
            on the last layer of one transformer, with an adapter or without. It stays as it is.
        directory: is made where it is missing; an earlier export in it is replaced as a whole, if it is unchanged.
        merged: merge the adapter into the weights. Otherwise it is written for PEFT, with the head in its
            ``modules_to_save``: ``AutoPeftModelForTokenClassification`` and ``…ForSequenceClassification`` load it with
            the settings that the card names.
        dtype: of merged weights.

    Raises:
        AdapterConfigError: no class of transformers computes what the model does, or its base is quantised.
        UnsupportedMethodError: the adapter cannot be merged.
        StateMismatchError: the model that was written gives other scores.
        SaveError: the directory could not be written; what was there is as it was.
    """
    if not isinstance(model, Model):
        raise AdapterConfigError(
            f"Cannot make a model of transformers of this {type(model).__name__}: it is no Flair model. Pass the model "
            "that you trained, such as a TextClassifier, and then the directory."
        )
    head, path, wanted = linear_head(model), file_names.path_of(directory), dtypes.parse_dtype(dtype)
    if not merged:
        _refuse_without_merging(model, dtype=wanted)
    _refuse_placed(head.embeddings)
    transformers_folder.refuse_others(path)
    with atomic.explained(path), devices.same_random_numbers():
        # A head that was cast when it was loaded has its exact values in a copy. Merged weights are rounded, once, when
        # they are known to be right.
        source = merge.copied(model) if adapted_embeddings(model) or not _is_in_fp32(model) else model
        exact = linear_head(source)
        head = dataclasses.replace(head, weight=exact.weight, bias=exact.bias)
        if merged:
            source.float()
        expected = live_scores(source if merged else model, _probes(head))
        export = _Export(model, head, _headed(source, head, is_merged=merged), expected, merged)
        export.fill_head_()
        if merged:
            export.headed.cast_(wanted)
        card = (manifest.CARD,)
        atomic.replace_directory(path, export.write, names_of=transformers_folder.names_of, gives_way=card)


def _refuse_without_merging(model: Model, *, dtype: torch.dtype) -> None:
    if not adapted_embeddings(model):
        raise AdapterConfigError(
            f"Cannot write the adapter of this {type(model).__name__}: none of its embeddings has one. A plain model "
            f"is its weights. {adapter_around.MERGED_INSTEAD}."
        )
    if dtype != torch.float32:
        raise AdapterConfigError(
            f"Cannot write the adapter of this {type(model).__name__} in {dtype_name(dtype)}: dtype is that of merged "
            "weights. Beside the adapter stands the base as it is, and who loads both says in which dtype. Leave dtype "
            "away, or merged at True."
        )


def _is_in_fp32(model: Model) -> bool:
    return {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


def _refuse_placed(embeddings: TransformerEmbeddings) -> None:
    if isinstance(embeddings, PeftTransformerEmbeddings):
        merge.refuse_placed(embeddings)
    elif quantisation.engine(embeddings.model) is not None:
        raise AdapterConfigError(
            f"Cannot make a model of transformers of '{embeddings.name}': its weights are quantised. They would be "
            "rounded once more. Load the model on weights as they are in their source."
        )


def _headed(source: Model, head: LinearHead, *, is_merged: bool) -> HeadedModel:
    """Return a model of transformers around merged weights, in fp32, or around the transformer with its adapter."""
    embedded = adapted_embeddings(source)
    if not is_merged:
        return headed_class.build(head, embedded[0].base_model, dtype=embedded[0].base_dtype)
    transformer = merge.merged_transformer(embedded[0]) if embedded else linear_head(source).embeddings.model
    return headed_class.build(head, transformer, dtype=torch.float32)


@dataclasses.dataclass(frozen=True)
class _Export:
    """A model of transformers on its way into a folder.

    Attributes:
        model: of Flair.
        head: of that.
        headed: the same as a model of transformers.
        expected: what the Flair model scores.
        is_merged: whether weights are written, or the adapter.
    """

    model: Model
    head: LinearHead
    headed: HeadedModel
    expected: torch.Tensor
    is_merged: bool

    def fill_head_(self) -> None:
        """Let the model of transformers score what the Flair model does."""
        tokenizer = _tokenizer(self.head.embeddings)
        apart: list[float] = []

        def is_right() -> bool:
            apart.append(self._apart(_scores(self.headed.model, tokenizer, self.head)))
            return apart[-1] <= self._allowed

        if not headed_class.fill_(self.headed, self.head, is_right):
            raise self._other(f"its scores are {min(apart):.2g} of their norm away from those here")

    def write(self, folder: Path) -> None:
        """Fill the folder, and return if what is read from it scores what the Flair model does.

        Raises:
            StateMismatchError: it does not.
        """
        if self.is_merged:
            self.headed.model.save_pretrained(folder)
        else:
            self.headed.model.config.save_pretrained(folder)
            adapter_around.write(folder, self.model, self.head, self.headed)
        tokenizers.save_portable(_tokenizer(self.head.embeddings), folder)
        with host_internals.errors_of_transformers_alone():
            can_be_merged = not self.is_merged and self._can_be_merged(folder)
        card = transformers_card.write_card(
            self.model,
            self.head,
            self.headed,
            is_merged=self.is_merged,
            can_be_merged=can_be_merged,
            is_text_other=_is_text_other(_tokenizer(self.head.embeddings)),
        )
        transformers_folder.seal(folder, transformers_card.settings(self.model, self.head), card)
        with host_internals.errors_of_transformers_alone():
            tokenizer, model = self._read(folder)
        apart = self._apart(_scores(model, tokenizer, self.head))
        if not apart <= rounding.explained(apart, self._allowed, lambda: self._measured(tokenizer)):
            raise self._other(f"read again, its scores are {apart:.2g} of their norm away from those here")
        _report_reading(self.head, tokenizer, is_merged=self.is_merged)

    def _read(self, folder: Path) -> tuple[PreTrainedTokenizerBase, Any]:
        """Return what transformers, or PEFT, makes of the folder."""
        task = "TokenClassification" if self.head.reads_words else "SequenceClassification"
        config = self.headed.model.config
        settings: dict[str, Any] = {"dtype": config.dtype}
        if self.is_merged:
            auto = getattr(transformers, f"AutoModelFor{task}")
        else:
            auto = getattr(peft, f"AutoPeftModelFor{task}")
            settings |= {name: getattr(config, name) for name in transformers_card.to_repeat(self.head)}
        try:
            return transformers.AutoTokenizer.from_pretrained(folder), auto.from_pretrained(str(folder), **settings)
        except Exception as error:  # transformers and PEFT fail in many ways
            reason = " ".join(str(error).split())
            instead = (
                "Use flair_peft.merge for a plain Flair model" if self.is_merged else adapter_around.MERGED_INSTEAD
            )
            raise StateMismatchError(
                f"Cannot make a {type(self.headed.model).__name__} of this {type(self.model).__name__}: what was "
                f"written cannot be read ({type(error).__name__}: {reason[:300]}). transformers, or PEFT, finds "
                f"something else there, no base, or one that has a head for other labels. {instead}."
            ) from error

    def _can_be_merged(self, folder: Path) -> bool:
        """Whether PEFT merges what it reads from the folder into weights that give the same, as far as one can try."""
        try:
            tokenizer, model = self._read(folder)
            apart = self._apart(_scores(model.merge_and_unload(), tokenizer, self.head))
        except Exception as error:  # PEFT fails in many ways
            log.debug("Not merged: %s", error)
            return False
        return apart <= self._allowed

    def _apart(self, found: torch.Tensor) -> float:
        """Return how far scores are from those expected, as a share of the norm of these.

        Without the bias, which all texts have in common, and beside which what a text adds to it could be anything. Of
        a large one rounding takes more.
        """
        if found.shape != self.expected.shape:
            return float("inf")
        bias = self.head.bias.expand_as(self.expected)
        of_bias = 2 * torch.finfo(self.headed.model.dtype).eps * bias.norm()
        norm = (self.expected - bias).norm() + of_bias / self._allowed
        return float((found - self.expected).norm() / norm.clamp_min(1e-12))

    def _measured(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[float]:
        """Yield how far other rounding moves the scores."""
        model, dtype = self.headed.model, str(dtype_name(self.headed.model.dtype))
        here = dataclasses.replace(self, expected=_scores(model, tokenizer, self.head))
        for found in rounding.rounded_otherwise(lambda: _scores(model, tokenizer, self.head), dtype):
            yield here._apart(found)

    @property
    def _allowed(self) -> float:
        """How far rounding may take the scores of usual models."""
        dtype = self.headed.model.dtype
        return _TOLERANCE if dtype == torch.float32 else rounding.tolerance(dtype_name(dtype))

    def _other(self, what: str) -> StateMismatchError:
        embeddings = self.head.embeddings
        reads = "reads or computes something else from the same words, such as another token or one more norm"
        if not self.head.reads_words and embeddings.cls_pooling == "cls" and not embeddings.initial_cls_token:
            reads = (
                "perhaps reads another token, or has one more norm: Flair reads the last token where the tokenizer, as "
                "here, puts no [CLS] in front"
            )
        return StateMismatchError(
            f"Cannot make a {type(self.headed.model).__name__} of this {type(self.model).__name__}: {what}. That class "
            f"{reads}. Use flair_peft.merge for a plain Flair model."
            if self.is_merged
            else f"Cannot write the adapter of '{embeddings.name}' for PEFT: {what}. That class {reads}, or PEFT "
            "reads the base in another way, as its own config says, without transformers_config_kwargs. "
            f"{adapter_around.MERGED_INSTEAD}."
        )


def _tokenizer(embeddings: TransformerEmbeddings) -> PreTrainedTokenizerBase:
    """Return a tokenizer that gives a model what Flair gives it, and pads as Flair does."""
    with tokenizers.exclusively(embeddings.tokenizer):
        tokenizer = copy.deepcopy(embeddings.tokenizer)
    tokenizers.complete_padding_(tokenizer)
    # Flair hands no token types on: to XLNet they would make a difference.
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    # What is not among these is not stored.
    tokenizer.init_kwargs.update(padding_side=tokenizer.padding_side, model_input_names=names)
    return tokenizer


def _scores(model: Any, tokenizer: PreTrainedTokenizerBase, head: LinearHead) -> torch.Tensor:
    """Return what a model of transformers scores, as :func:`live_scores` does."""
    probes = [[*words] for words in _probes(head)]
    encoding = tokenizer(probes, is_split_into_words=True, padding=True, return_tensors="pt")
    with vector_probe.trying_out(model), torch.no_grad(), full_precision(model.device.type):
        scores = model(**encoding.to(model.device), return_dict=True).logits.float().cpu()
    if not head.reads_words:
        return scores
    of_words = []
    for row, words in enumerate(probes):
        numbers = encoding.word_ids(row)
        for word in range(len(words)):
            own = scores[row, [place for place, number in enumerate(numbers) if number == word]]
            of_words.append(head.pooled(own))
    return torch.stack(of_words)


def _probes(head: LinearHead) -> Sequence[Sequence[str]]:
    """Return texts that are read as a whole here and there, or the shortest."""
    tokenizer, probes = head.embeddings.tokenizer, list[Sequence[str]](_PROBES)
    if not head.reads_words:
        probes = [*_PROBES_OF_TEXTS, *(text.split() for text in merge.ending_in_padding(tokenizer))]
    with tokenizers.exclusively(tokenizer):
        lengths = [
            len(tokenizer([*words], is_split_into_words=True, truncation=False, verbose=False)["input_ids"])
            for words in probes
        ]
    longest = max(tokenizer.model_max_length, min(lengths))
    return [words for words, length in zip(probes, lengths, strict=True) if length <= longest]


def _is_text_other(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives other subtokens for a text than for its words."""
    whole = [tokenizer(" ".join(words))["input_ids"] for words in _PROBES]
    return bool(whole != [tokenizer([*words], is_split_into_words=True)["input_ids"] for words in _PROBES])


def _report_reading(head: LinearHead, tokenizer: PreTrainedTokenizerBase, *, is_merged: bool) -> None:
    """Say where transformers reads what is usual in another way than Flair does."""
    name, pooling = head.embeddings.name, getattr(head.embeddings, "subtoken_pooling", None)
    if not is_merged:
        log.warning(
            "PEFT reads the config of the base '%s', and not the one that is written beside the adapter: labels would "
            "have no names, or their number would not fit. Load it as the card in the directory, README.md, shows.",
            getattr(head.embeddings, "base_model_name", name),
        )
    if head.reads_words and pooling != "first":
        log.warning(
            "'%s' has subtoken_pooling='%s', which no strategy of transformers' pipeline reads: the scores of the "
            "subtokens are those of the model, and words of several subtokens come out otherwise there.",
            name,
            pooling,
        )
    if head.taken_for_none:
        log.warning(
            "'%s' has spans of the type O, which transformers' pipeline takes for none and leaves out: rename the type "
            "before the training, or read the labels of words.",
            name,
        )
    if _is_text_other(tokenizer):
        log.warning(
            "The tokenizer of '%s' gives other subtokens for a text than for its words, one by one, which Flair reads. "
            "Give it words, with is_split_into_words=True: transformers' pipeline for tokens takes that, too.",
            name,
        )
