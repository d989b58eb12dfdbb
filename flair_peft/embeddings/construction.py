"""The steps of the constructor: the arguments of transformers, the tokenizer, the base and the adapter on it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import flair
import torch
from flair.embeddings.transformer import SENTENCE_BOUNDARY_TAG
from peft import PeftConfig, PeftModel
from transformers import FeatureExtractionMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from flair_peft.adapter import config as configs
from flair_peft.adapter import injection, methods, refusals, trainable
from flair_peft.base import memory_check, placement, quantisation, resolve, tokenizers, transformer
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.base.left_out import PlacedStart
from flair_peft.embeddings import resizing, untrained
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.embeddings.base_source import BaseSource
from flair_peft.embeddings.pending_load import PendingLoad, canonical
from flair_peft.errors import AdapterConfigError
from flair_peft.primitives import dtypes
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import load_options

log = logging.getLogger("flair_peft")

KeywordArguments = Mapping[str, Any]


@dataclass(frozen=True)
class TransformersArguments:
    """Keyword arguments for transformers, each for those of its classes that understand it.

    ``dtype`` is the one that the user asked for, however that was spelt.
    """

    tokenizer: KeywordArguments
    extractor: KeywordArguments
    config: KeywordArguments
    model: KeywordArguments
    dtype: dtypes.DtypeLike | None

    @classmethod
    def sort(
        cls,
        kwargs: KeywordArguments,
        tokenizer: KeywordArguments | None,
        config: KeywordArguments | None,
        model: KeywordArguments | None,
        dtype: dtypes.DtypeLike | None,
    ) -> TransformersArguments:
        """Return the arguments for all, ``kwargs``, together with those for one each."""
        for_model = {**(model or {}), **kwargs}
        # A tokenizer keeps every keyword, and cannot be saved with those that only models understand.
        for_others = {key: value for key, value in kwargs.items() if key not in (*placement.PLACING, *dtypes.SPELLINGS)}
        return cls(
            tokenizer={**(tokenizer or {}), **for_others},
            extractor=for_others,
            config={**(config or {}), **kwargs},
            model={key: value for key, value in for_model.items() if key not in dtypes.SPELLINGS},
            dtype=dtypes.requested_dtype(dtype, for_model),
        )


def make_tokenizer(
    model: str, tokenizer: str | None, arguments: TransformersArguments, stored: tuple[BytesIO | None, BytesIO | None]
) -> tuple[PreTrainedTokenizerBase, FeatureExtractionMixin | None]:
    """Return tokenizer and feature extractor: the stored ones, or those beside a model.

    ``stored`` holds the files of both; without the tokenizer's, ``tokenizer`` or else ``model`` says where they are.
    """
    tokenizer_files, extractor_files = stored
    if tokenizer_files is None:
        made = tokenizers.find_tokenizer(tokenizer or model, arguments.tokenizer)
        extractor = tokenizers.find_feature_extractor(model, arguments.extractor)
    else:
        made = tokenizers.unpack_tokenizer(tokenizer_files, arguments.tokenizer)
        extractor = tokenizers.unpack_feature_extractor(extractor_files)
    tokenizers.complete_padding_(made)
    return made, extractor


def add_separator_(tokenizer: PreTrainedTokenizerBase) -> int:
    """Let a tokenizer have the token that marks a sentence within its context; return its id."""
    with tokenizers.exclusively(tokenizer):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [SENTENCE_BOUNDARY_TAG]}, replace_additional_special_tokens=False
        )
    return tokenizer.convert_tokens_to_ids(SENTENCE_BOUNDARY_TAG)


@dataclass(frozen=True)
class BaseRequest:
    """Which transformer the constructor is asked for.

    Attributes:
        name: Hub id or directory.
        title: of the embeddings, for messages.
        arguments: for transformers.
        saved_config: shape of the transformer in a file; ``None`` for new embeddings.
        stored_base: what a file says of the base; an adapter from elsewhere passes the rows that it adds.
        tokenizer: whose added tokens need a row each in the base of new embeddings.
        separator: id of Flair's own among these, or ``None``.
    """

    name: str
    title: str
    arguments: TransformersArguments
    saved_config: PretrainedConfig | None
    stored_base: Mapping[str, Any] | None
    tokenizer: PreTrainedTokenizerBase
    separator: int | None

    def find(self, stored: StoredBase) -> FrozenBase | None:
        """Return the frozen transformer, or ``None`` for a file that holds all weights of its own."""
        dtype = self.arguments.dtype
        if self.saved_config is not None:
            is_needed = stored.is_needed
            return resolve.find_stored(stored, self.saved_config, dtype=dtype, name=self.title) if is_needed else None
        base = resolve.find_new(
            self.name, dtype=dtype, config_kwargs=self.arguments.config, model_kwargs=self.arguments.model
        )
        if stored.added_rows is not None:
            base = base.with_rows(stored.added_rows)
        return base.reaching(self._rows(base.own_rows), separator=self.separator)

    def _rows(self, own: int) -> int:
        """Return how many rows of input embeddings the tokens need, where the base has those of the vocabulary."""
        places = [] if self.separator is None else [self.separator]
        if self.tokenizer.vocab_size <= own:  # not so where ids are hashed, for example
            places += self.tokenizer.get_added_vocab().values()
        return max(places, default=-1) + 1


@dataclass(frozen=True)
class ResolvedBase:
    """The transformer that embeddings stand on, with what their adapter needs to know of it.

    Attributes:
        model: the transformer, of the embeddings' own, prepared for training where it is quantised.
        adapter_config: of an adapter that the transformer can carry, with what the user left open.
        source: where it comes from.
        stored: what the file says of it.
        has_weights: False for one that a state dict has to fill.
    """

    model: PreTrainedModel
    adapter_config: PeftConfig
    source: BaseSource
    stored: StoredBase
    has_weights: bool


def resolve_base(
    request: BaseRequest, peft_config: PeftConfig | None, preparation: KeywordArguments | None
) -> ResolvedBase:
    """Return the transformer that is asked for, which can carry the adapter that is asked for.

    Args:
        request: names the transformer.
        peft_config: of the adapter; ``None`` means a LoRA.
        preparation: arguments for PEFT's preparation of quantised models.

    Raises:
        BaseModelNotFoundError: the base model is not found.
        AdapterConfigError: the config does not fit the model, or no file could hold it.
        UnsupportedMethodError: the method cannot work on this architecture.
    """
    stored, is_new = StoredBase.from_dict(request.stored_base), request.saved_config is None
    frozen_base, dtype = request.find(stored), request.arguments.dtype
    base = frozen_base.copy() if frozen_base else resolve.build_stored(stored, request.saved_config, dtype=dtype)
    read_dtype = base.get_input_embeddings().weight.dtype
    base = quantisation.prepare_(base, {**methods.preparation(peft_config), **(preparation or {})})
    config = peft_config or configs.own_config(_default_config(base))
    refusals.refuse_unsupported(base, config)
    if is_new and peft_config is not None and request.stored_base is None:  # those from elsewhere pass it
        refusals.check_names(base, config)
    configs.encode_config(config)  # a config that no file can hold is refused now, not after the training
    source = BaseSource(
        name=base.name_or_path or str(request.name),
        record=stored.record,
        cache_dir=request.arguments.model.get("cache_dir") or load_options().cache_dir,
    )
    if frozen_base is not None:
        source.record = frozen_base.known_record if is_new else frozen_base.expected_record
        if placement.is_placed(base):
            source.placed_start = PlacedStart.of(base, dtype=read_dtype, random_names=frozen_base.random_names)
        elif methods.rewrites_base(config):
            base = frozen_base.private_copy()
        else:
            source.frozen = frozen_base
    return ResolvedBase(base, config, source, stored, has_weights=frozen_base is not None)


def limit_length_(tokenizer: PreTrainedTokenizerBase, config: PeftConfig, *, is_new: bool) -> bool:
    """Return whether long sentences have to be cut, and leave room for the virtual tokens of a new adapter.

    These take positions of the transformer that long sentences would need too.
    """
    has_limit = tokenizer.model_max_length <= LARGE_INTEGER
    if is_new and has_limit:
        tokenizer.model_max_length -= methods.virtual_tokens(config)
    return has_limit


def wanted_layers(layers: str, base: PreTrainedModel) -> list[int]:
    """Return the numbers of the hidden states that are asked for, by number or as "all".

    Raises:
        AdapterConfigError: something else is asked for.
    """
    if layers != "all":
        try:
            return [int(index) for index in layers.split(",")]
        except (ValueError, AttributeError) as error:
            if isinstance(layers, PeftConfig):
                raise AdapterConfigError(
                    f"Cannot read layers={type(layers).__name__}(…): the second argument of Flair's embeddings is "
                    "`layers`. Pass the config by its name: peft_config=…."
                ) from error
            raise AdapterConfigError(
                f"Cannot read layers={layers!r}: it is no string of numbers. Flair's `layers` takes them with commas "
                "between, counted from 0 for the embeddings or from -1 for the last. Pass '-1', '-1,-2' or 'all'."
            ) from error
    with torch.no_grad():
        output = base(torch.tensor([[1]], device=base.device), output_hidden_states=True, return_dict=True)
    return list(range(len(transformer.states_of(output)[0])))


def unique_name(base_model_name: str, config: PeftConfig) -> str:
    """Return a name that no other adapter has; names sort in the order of creation."""
    method = methods.method_name(config).lower().replace("_", "-")
    return f"transformer-{base_model_name}-{method}-{time.time_ns():x}{os.urandom(2).hex()}"


def attach_adapter_(embeddings: AdaptedEmbeddings, base: ResolvedBase, *, is_new: bool) -> None:
    """Give embeddings their transformer with an adapter: a new one, which is tried out, or one for a state dict."""
    config, pending = base.adapter_config, PendingLoad(left_out=canonical(base.stored))
    names = [name for name, _ in base.model.named_modules()]
    # Files are refused for an expression that does not end: that is not to be found out after the training.
    configs.refuse_endless_patterns(config.to_dict(), names, source=embeddings.name)
    bounds = memory_check.bounds()
    if bounds is not None:
        bounds.know_model(base.model)
    embeddings.base_source = base.source
    embeddings.register_buffer("_output_mark", torch.empty(0, dtype=torch.get_default_dtype()), persistent=False)
    if is_new:
        embeddings.model = injection.inject(base.model, config)
    elif methods.is_derived_from_base(config):
        pending.adapter_config, embeddings.model = config, base.model
    else:
        embeddings.model = _add_skeleton(base, config)
    resizing.override_(embeddings.model)
    embeddings._pending = None if is_new else pending
    embeddings._move_to(flair.device)
    embeddings.eval()
    if is_new:
        embeddings._start = untrained.trained_digests(embeddings.model)
        _try_out(embeddings)


def _add_skeleton(base: ResolvedBase, config: PeftConfig) -> PeftModel:
    """Return the transformer of stored embeddings with an adapter that their state dict fills."""

    def add() -> PeftModel:
        return injection.inject_skeleton(base.model, config, has_weights=base.has_weights)

    frozen = base.source.frozen
    return add() if frozen is None else frozen.adapter_template.add(base.model, config, add)


def _try_out(embeddings: AdaptedEmbeddings) -> None:
    """Return if new embeddings can embed a word, and say what of their settings may surprise."""
    tokenizer, model = embeddings.tokenizer, embeddings.model
    encoded = tokenizer("a", return_tensors="pt") if not embeddings.tokenizer_needs_ocr_boxes else None
    ids = torch.tensor([[0]]) if encoded is None or encoded["input_ids"].numel() == 0 else encoded["input_ids"]
    inputs = {"attention_mask": torch.ones_like(ids)}
    with transformer.keeping_attention(model):
        refusals.try_out(model, lambda: embeddings.hidden_states(ids, **inputs), rows=ids.shape[1])
    trainable.report_without_effect(model)
    trained, total = model.get_nb_trainable_parameters()
    log.info("%s: %s of %s parameters are trained (%.2f %%).", embeddings.name, trained, total, 100 * trained / total)
    if methods.depends_on_batch(embeddings.adapter_config):
        log.warning(
            "%s weighs its parts by an average over the batch: the vectors of a sentence depend on the sentences "
            "that are embedded with it. Predict with the same mini_batch_size and order to get the same labels.",
            methods.method_name(embeddings.adapter_config),
        )
    if not transformer.takes_mask(embeddings.base_model):
        log.warning(
            "%s takes no attention mask: the vectors of a sentence depend on the padding of its batch. Predict "
            "with the same mini_batch_size and order to get the same labels.",
            type(embeddings.base_model).__name__,
        )
    if not embeddings.fine_tune:
        log.warning(
            "The adapter of '%s' cannot learn: with fine_tune=False Flair embeds without gradient. Its weights "
            "stay as they are now. Pass fine_tune=True to train it.",
            embeddings.name,
        )


def _default_config(base: PreTrainedModel) -> PeftConfig:
    config = configs.default_config(
        has_unread_layers=transformer.has_unread_layers(base),
        has_transposed_weights=transformer.has_transposed_weights(base),
    )
    if not refusals.linear_names(base):
        config.target_modules = set(refusals.names_to_target(base))  # "all-linear" leaves convolutions out
    return config
