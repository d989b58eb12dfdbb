"""Flair's transformer embeddings with a PEFT adapter that trains, saves, loads and predicts."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import flair
import torch
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.embeddings.base import DocumentEmbeddings, Embeddings, TokenEmbeddings, register_embeddings
from flair.embeddings.transformer import SENTENCE_BOUNDARY_TAG, combine_strided_tensors
from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import LARGE_INTEGER
from typing_extensions import Self

from flair_peft.adapter import config as configs
from flair_peft.adapter import injection, keys, methods, refusals
from flair_peft.base import frozen, memory_check, quantisation, resolve, tokenizers, transformer
from flair_peft.base.frozen import FrozenBase
from flair_peft.base.learned import PlacedStart
from flair_peft.embeddings import batching, head_dtype, vector_probe
from flair_peft.embeddings.offload import AdapterMemory
from flair_peft.embeddings.params import Storable
from flair_peft.errors import AdapterConfigError, ModelFileError
from flair_peft.foreign import adapter_files, transfer_plan
from flair_peft.foreign.transfer_plan import ForeignHead
from flair_peft.primitives import dtypes
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import LoadOptions, load_options

log = logging.getLogger("flair_peft")

_OUTPUT_DTYPE_MARK = "_output_dtype_mark"


@register_embeddings
class PeftTransformerEmbeddings(Storable, TransformerEmbeddings):
    """Transformer embeddings whose frozen transformer carries a PEFT adapter.

    Takes every keyword of :class:`flair.embeddings.TransformerEmbeddings`, with the same meaning. With the adapter
    switched off (``with embeddings.model.disable_adapter(): …``) the vectors are those of the stock class.

    ``model`` holds the :class:`peft.PeftModel`; ``foreign_head`` what :meth:`from_adapter` found of a head, which no
    file of Flair's keeps. Embeddings whose weights can change are always computed, never taken from what a sentence
    stored before.
    """

    foreign_head: ForeignHead | None = None
    adapter_memory: AdapterMemory | None = None

    @torch.inference_mode(False)
    def __init__(
        self,
        model: str = "bert-base-uncased",
        fine_tune: bool = True,
        layers: str = "-1",
        layer_mean: bool = True,
        subtoken_pooling: Literal["first", "last", "first_last", "mean"] = "first",
        cls_pooling: Literal["cls", "max", "mean"] = "cls",
        is_token_embedding: bool = True,
        is_document_embedding: bool = True,
        allow_long_sentences: bool = False,
        use_context: bool | int = False,
        respect_document_boundaries: bool = True,
        context_dropout: float = 0.5,
        saved_config: PretrainedConfig | None = None,
        tokenizer_data: BytesIO | None = None,
        feature_extractor_data: BytesIO | None = None,
        name: str | None = None,
        force_max_length: bool = False,
        needs_manual_ocr: bool | None = None,
        use_context_separator: bool = True,
        transformers_tokenizer_kwargs: dict[str, Any] | None = None,
        transformers_config_kwargs: dict[str, Any] | None = None,
        transformers_model_kwargs: dict[str, Any] | None = None,
        peft_config: PeftConfig | None = None,
        peft_gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        dtype: dtypes.DtypeLike | None = None,
        head_dtype: dtypes.DtypeLike | None = None,
        keep_virtual_rows: bool = False,
        after_final_norm: bool = False,
        save_base: bool = False,
        stored_base: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a transformer and add an adapter to it.

        Args:
            model: name or directory of the base model.
            fine_tune: if False, embeddings are computed without gradient, so the adapter cannot learn.
            layers: hidden states to use: "all" or comma-separated indices, "-1" being the last.
            layer_mean: average the layers; otherwise concatenate them.
            subtoken_pooling: how the subtokens of a word become one vector.
            cls_pooling: how a sentence becomes one vector.
            is_token_embedding: embed words.
            is_document_embedding: embed sentences.
            allow_long_sentences: split sentences beyond the model's length into overlapping windows.
            use_context: tokens of the neighbouring sentences to add on each side; True means 64.
            respect_document_boundaries: do not take context from another document.
            context_dropout: share of training sentences without context.
            saved_config: shape of the transformer; given by Flair when loading. The weights then come from a file.
            tokenizer_data: tokenizer files; given by Flair when loading.
            feature_extractor_data: image preprocessing; given by Flair when loading.
            name: under which vectors are stored in sentences. The default differs for each adapter, since Flair takes
                vectors of the same name for the same vectors.
            force_max_length: pad every batch to the model's length.
            needs_manual_ocr: read bounding boxes from the tokens' metadata.
            use_context_separator: mark the sentence within its context with a token of its own.
            transformers_tokenizer_kwargs: for ``AutoTokenizer.from_pretrained``.
            transformers_config_kwargs: for ``AutoConfig.from_pretrained``.
            transformers_model_kwargs: for ``AutoModel.from_pretrained``; its ``torch_dtype`` means ``dtype``.
            peft_config: of any PEFT method; None means LoRA (r=16, alpha=32) on all linear layers. Not modified.
            peft_gradient_checkpointing_kwargs: for ``peft.prepare_model_for_kbit_training``, for quantised bases.
            dtype: of the base model's weights, such as "bfloat16"; None leaves transformers its default.
            head_dtype: of the head after loading; None means the base's dtype for heads of linear layers, else fp32.
                Heads train in fp32 in any case.
            keep_virtual_rows: read words from the rows that stock Flair reads with prompt tuning, which are off by the
                number of virtual tokens. Only for models that stock Flair trained.
            after_final_norm: take for the last layer what the transformer returns as its last hidden state. In
                ModernBERT, BioGPT and RoBERTa-PreLayerNorm that comes after one more norm than what Flair reads; heads
                of transformers, sentence-transformers and transformers 5 read it.
            save_base: write the base's weights into files too, so that these need no base model to load.
            stored_base: what a file says of its base model; given when loading.
            tokenizer: name or directory of the tokenizer, where that is not the base model's own.
            **kwargs: for the tokenizer, the config and the model.

        Raises:
            BaseModelNotFoundError: the base model is not found.
            AdapterConfigError: the config is no PEFT config or does not fit the model.
            UnsupportedMethodError: the method cannot work on this architecture.
        """
        # Tokenizers warn of forked processes; Flair forks none while it embeds.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        transformers_logging.set_verbosity_error()

        self._check_pooling(is_token_embedding, subtoken_pooling, is_document_embedding, cls_pooling)
        config_kwargs = {**(transformers_config_kwargs or {}), **kwargs}
        model_kwargs = {**(transformers_model_kwargs or {}), **kwargs}
        asked_dtype = dtypes.requested_dtype(dtype, model_kwargs)
        model_kwargs = {key: value for key, value in model_kwargs.items() if key not in dtypes.SPELLINGS}
        given_config = None if peft_config is None else configs.own_config(peft_config)
        is_new = saved_config is None
        # A tokenizer keeps every keyword, and cannot be saved with those that only models understand.
        for_others = {key: value for key, value in kwargs.items() if key not in (*frozen.PLACING, *dtypes.SPELLINGS)}

        self._set_tokenizer(
            model,
            tokenizer or model,
            tokenizer_data,
            feature_extractor_data,
            {**(transformers_tokenizer_kwargs or {}), **for_others},
            for_others,
        )
        if use_context_separator:
            with tokenizers.exclusively(self.tokenizer):
                self.tokenizer.add_special_tokens(
                    {"additional_special_tokens": [SENTENCE_BOUNDARY_TAG]}, replace_additional_special_tokens=False
                )
        stored = StoredBase.from_dict(stored_base)
        found: FrozenBase | None = None
        if saved_config is None:
            found = resolve.find_new(model, dtype=asked_dtype, config_kwargs=config_kwargs, model_kwargs=model_kwargs)
            if stored.added_rows is not None:
                found = found.with_rows(stored.added_rows)
            if use_context_separator:
                found = found.reaching(self.tokenizer.convert_tokens_to_ids(SENTENCE_BOUNDARY_TAG))
        elif stored.is_needed:
            found = resolve.find_stored(stored, saved_config, dtype=asked_dtype, name=name or model)
        base = found.copy() if found else resolve.build_stored(stored, saved_config, dtype=asked_dtype)
        read_dtype = base.get_input_embeddings().weight.dtype
        how = {**methods.preparation(given_config), **(peft_gradient_checkpointing_kwargs or {})}
        base = quantisation.prepare_(base, how)
        own_config = given_config or configs.own_config(_default_config(base))
        refusals.refuse_unsupported(base, own_config)
        if is_new and given_config is not None and stored_base is None:  # those that were trained elsewhere pass it
            refusals.check_names(base, own_config)
        configs.encode_config(own_config)  # a config that no file can hold is refused now, not after the training
        shared = found
        if frozen.is_placed(base):
            shared = None
        elif found is not None and methods.rewrites_base(own_config):
            shared, base = None, found.private_copy()

        # From here on, attributes with the names and meanings that the stock constructor gives them.
        self.truncate = self.tokenizer.model_max_length <= LARGE_INTEGER
        # Flair splits sentences by what only fast tokenizers report; stock embeddings fail at the first batch.
        self.allow_long_sentences = allow_long_sentences and self.truncate and self.tokenizer.is_fast
        if is_new and self.truncate:
            # Virtual tokens take positions of the transformer that long sentences would need too.
            self.tokenizer.model_max_length -= methods.virtual_tokens(own_config)
        self.stride = self.tokenizer.model_max_length // 2 if self.allow_long_sentences else 0
        self.force_max_length = force_max_length
        self.use_lang_emb = bool(getattr(base, "use_lang_emb", False))
        self.base_model_name = base.name_or_path or str(model)
        self.name = name if name is not None else _unique_name(self.base_model_name, own_config)
        self.token_embedding = is_token_embedding
        self.document_embedding = is_document_embedding
        self.context_length = (64 if use_context else 0) if isinstance(use_context, bool) else use_context
        self.context_dropout = context_dropout
        self.respect_document_boundaries = respect_document_boundaries
        self.layer_indexes = (
            list(range(_count_hidden_states(base))) if layers == "all" else [int(index) for index in layers.split(",")]
        )
        self.cls_pooling = cls_pooling
        self.subtoken_pooling = subtoken_pooling
        self.layer_mean = layer_mean
        self.fine_tune = fine_tune
        self.static_embeddings = not fine_tune
        self.embedding_length_internal = self._calculate_embedding_length(base)
        if needs_manual_ocr is not None:
            self.needs_manual_ocr = needs_manual_ocr
        self.use_context_separator = use_context_separator

        # The stock constructor would load a second transformer: go straight to what its base class sets up.
        with tokenizers.exclusively(self.tokenizer):
            super(TransformerEmbeddings, self).__init__(**self.to_args())

        self.head_dtype = None if head_dtype is None else dtypes.parse_dtype(head_dtype)
        self.keep_virtual_rows = keep_virtual_rows
        self.after_final_norm = after_final_norm
        self.save_base = save_base
        self.register_buffer(_OUTPUT_DTYPE_MARK, torch.empty(0, dtype=torch.get_default_dtype()), persistent=False)
        self.register_load_state_dict_post_hook(type(self)._after_loading)
        self._frozen = shared
        self._record = stored.record if found is None else found.known_record if is_new else found.expected_record
        self._start: dict[str, str] = {}
        self._cache_dir = model_kwargs.get("cache_dir") or load_options().cache_dir
        self._preparing = quantisation.stored_preparation(peft_gradient_checkpointing_kwargs)
        if found is not None and frozen.is_placed(base):
            self._placed_start = PlacedStart.of(base, dtype=read_dtype, random_names=found.random_names)
        if is_new:
            bounds = memory_check.bounds()
            if bounds is not None:
                bounds.know_model(base)
            names = [name for name, _ in base.named_modules()]
            # Files are refused for an expression that does not end: that is not to be found out after the training.
            configs.refuse_endless_patterns(own_config.to_dict(), names, source=self.name)
            self.model = injection.inject(base, own_config)
        else:
            self._left_out = frozenset(map(keys.canonical_key, stored.left_out))
            self._await_weights(base, own_config, has_weights=found is not None)
        self._move_to(flair.device)
        self.eval()
        if is_new:
            self._start = vector_probe.start_of(self.model)
            self._try_out()
            self._report()

    @classmethod
    def from_adapter(
        cls,
        source: str,
        *,
        base_model: str | None = None,
        base_revision: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        allow_untrained: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Return embeddings with a PEFT adapter that was trained elsewhere, ready to embed and to be trained on.

        The adapter may come from any class of transformers around the base model (``AutoModelForCausalLM``,
        ``…ForSequenceClassification`` and so on), from sentence-transformers or from a bare ``AutoModel``. Every tensor
        of the file is used exactly once, or belongs to a head and is kept in :attr:`foreign_head`.

        Args:
            source: directory or Hub id of the adapter.
            base_model: Hub id or directory of the base; None for the one that the adapter's config names.
            base_revision: of the base; None for what the adapter's config says, if the base is the one it names.
            revision: of the adapter, on the Hub.
            subfolder: where the adapter is within ``source``.
            token: for the Hub.
            cache_dir: where files from the Hub are kept.
            local_files_only: download nothing.
            allow_untrained: take an adapter that changes nothing, too.
            **kwargs: as for the constructor, apart from ``model`` and ``peft_config``. The tokenizer is the one beside
                the adapter, or the base model's; ``tokenizer=`` names another.

        Raises:
            ModelFileError: files of the adapter are missing or damaged.
            BaseModelNotFoundError: the base model is not found.
            BaseMismatchError: the adapter was trained on another base model.
            AdapterMismatchError: tensors of the adapter have no place in the model.
            UntrainedAdapterError: it changes nothing, and ``allow_untrained`` was not given.
            AdapterConfigError: its config cannot be used; UnsupportedMethodError: the method cannot work here.
        """
        options = LoadOptions(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        files = adapter_files.read(str(source), revision=revision, subfolder=subfolder, options=options)
        with memory_check.bounded(str(source), files.tensors):
            plan = transfer_plan.plan(
                files, base_model=base_model, base_revision=base_revision, options=options, kwargs=kwargs
            )
            rows = {"added_rows": plan.added_rows}
            embeddings = cls(plan.base, peft_config=plan.config, stored_base=rows, **{**plan.access, **kwargs})
        transfer_plan.fill_(embeddings, plan, allow_untrained=allow_untrained)
        embeddings._start, embeddings.foreign_head = {}, plan.head
        if not embeddings.after_final_norm and embeddings.reads_last_layer and embeddings.stops_before_final_norm():
            log.warning(
                "'%s': Flair reads the last layer of %s before its final norm. Sentence-transformers and the heads of "
                "transformers, with which adapters are trained, read it after. Pass after_final_norm=True to get those "
                "vectors.",
                source,
                type(embeddings.base_model).__name__,
            )
        return embeddings

    @property
    def adapter_config(self) -> PeftConfig:
        """The config of the adapter, as it was trained.

        Raises:
            AdapterConfigError: PEFT merged, unloaded or deleted the adapter.
        """
        if self._pending_config is not None:
            return self._pending_config
        if not self.has_adapter:
            refusals.refuse_without_adapter(self.model)
        return self.model.peft_config[methods.ADAPTER_NAME]

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter is there: ``embeddings.model = embeddings.model.merge_and_unload()`` takes it away."""
        return isinstance(self.model, PeftModel) and methods.ADAPTER_NAME in self.model.peft_config

    @property
    def base_model(self) -> PreTrainedModel:
        """The frozen transformer, without the PEFT model around it."""
        if not isinstance(self.model, PeftModel):
            return self.model
        # PEFT asks its adapters where the base is; after delete_adapter it may have none.
        return self.model.get_base_model() if self.model.peft_config else self.model.base_model.model

    @property
    def is_quantised(self) -> bool:
        """Whether the base's weights are quantised, by bitsandbytes for example."""
        return quantisation.engine(self.base_model) is not None

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base model's weights, read from its input embeddings."""
        return self.base_model.get_input_embeddings().weight.dtype

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype in which vectors leave: that of the head, which ``model.half()`` and the like change with it."""
        return getattr(self, _OUTPUT_DTYPE_MARK).dtype

    @output_dtype.setter
    def output_dtype(self, dtype: torch.dtype) -> None:
        mark = getattr(self, _OUTPUT_DTYPE_MARK)
        mark.data = mark.data.to(dtype)

    def narrow_adapter_(self) -> None:
        """Let LoRA compute in the dtype of a base in half precision, where PEFT gives it fp32; training takes it back.

        ``state_dict`` and files hold the exact values.
        """
        is_half = self.base_dtype.itemsize < torch.float32.itemsize
        if not is_half or self.training or methods.why_not_mixed(self.adapter_config) is not None:
            return
        added = {name: p for name, p in self.model.named_parameters() if keys.base_key(name) is None}
        head_dtype.cast_(self.model, added, self.base_dtype)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch does; an adapter that was narrowed trains in fp32, with its exact values if kept."""
        super().train(mode)
        if mode and self.has_adapter:
            with self.in_use():
                head_dtype.restore_(self.model, lambda: dict(self.model.named_parameters()))
                injection.widen_(self.model)
        return self

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the adapter is in memory, if it is one of those that may be left on disk."""
        return contextlib.nullcontext() if self.adapter_memory is None else self.adapter_memory.using(self)

    def prepare_tensors(self, sentences: list[Sentence], device: torch.device | None = None) -> dict[str, Any]:
        """Return the model inputs for a batch; lengths come from the attention mask, not from padding ids.

        The id of the padding token may stand for a real token too, where a tokenizer has none of its own. Models that
        predict together tokenise a batch once if their settings are the same.
        """
        tokenizers.complete_padding_(self.tokenizer)
        known = batching.known_in_this_round()
        if known is None or self.training:
            return self._prepare(sentences, device)
        key = (*self._tokenising(), device, *map(id, sentences))
        if key not in known:
            known[key] = (self._prepare(sentences, device), sentences)  # while they are held, their ids are theirs
        return dict(known[key][0])

    def _prepare(self, sentences: list[Sentence], device: torch.device | None) -> dict[str, Any]:
        with tokenizers.exclusively(self.tokenizer):
            tensors = super().prepare_tensors(sentences, device=device)
        if "sub_token_lengths" in tensors and "attention_mask" in tensors:
            mask = tensors["attention_mask"]
            if self.allow_long_sentences:
                mask = combine_strided_tensors(
                    mask, tensors["overflow_to_sample_mapping"], self.stride // 2, self.tokenizer.model_max_length, 0
                )
            tensors["sub_token_lengths"] = mask.sum(dim=1)
        return tensors

    def _tokenising(self) -> tuple[Any, ...]:
        """Return all that the model inputs of a batch depend on, beside its sentences."""
        settings = {**self.to_args(), "name": None, "fine_tune": None, "embedding_length": None}
        settings["tokenizer"] = (tokenizers.vocabulary_of(self.tokenizer), self.tokenizer.model_max_length)
        settings["feature_extractor"] = id(self.feature_extractor)
        return tuple(sorted(settings.items()))

    def forward(self, input_ids: torch.Tensor, **tensors: Any) -> dict[str, torch.Tensor]:
        """Return ``{"document_embeddings": (batch, length), "token_embeddings": (batch, words, length)}``.

        Takes what :meth:`prepare_tensors` returns. Pooling is Flair's own, in fp32 or wider; vectors leave in
        :attr:`output_dtype`.
        """
        pooled = TransformerEmbeddings.forward(_PoolingView(self), input_ids, **tensors)
        mark = getattr(self, _OUTPUT_DTYPE_MARK)
        return {name: vectors.to(device=mark.device, dtype=mark.dtype) for name, vectors in pooled.items()}

    def hidden_states(self, input_ids: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
        """Return the hidden states of the wanted layers, each (batch, subtokens, hidden), virtual tokens stripped.

        They are asked for by name and without a cache: the last output of a decoder can be its cache.
        """
        states, last = transformer.states_of(self._output(input_ids, **tensors))
        beyond = [index for index in self.layer_indexes if not -len(states) <= index < len(states)]
        if beyond:
            raise AdapterConfigError(
                f"Cannot read layers {beyond} of {type(self.base_model).__name__}: it has {len(states)} hidden states, "
                "counted from 0 for the embeddings. Flair's `layers` takes these numbers. Pass some of them, or 'all'."
            )
        if self.after_final_norm:
            states = (*states[:-1], last)
        first = injection.virtual_rows(self.model) if self.has_adapter and not self.keep_virtual_rows else 0
        return tuple(states[index][:, first:] for index in self.layer_indexes)

    @property
    def reads_last_layer(self) -> bool:
        """Whether the last of the transformer's layers is among those that are read."""
        return not {-1, getattr(self.base_model.config, "num_hidden_layers", None)}.isdisjoint(self.layer_indexes)

    def stops_before_final_norm(self) -> bool:
        """Whether the transformer goes on after the last of its hidden states; the model is asked, by a small pass."""
        ids = torch.tensor([vector_probe.probe_ids(self)])
        with vector_probe.evaluating(self), torch.no_grad():
            states, last = transformer.states_of(self._output(ids, attention_mask=torch.ones_like(ids)))
        return not torch.equal(states[-1], last)

    def _output(self, input_ids: torch.Tensor, **tensors: Any) -> Any:
        if self._awaits_weights:
            raise ModelFileError(
                f"Cannot embed with '{self.name}': its weights were never loaded. It was built from stored parameters "
                "without a state dict. Load the whole Flair model, or call load_state_dict first."
            )
        if self.training and self.has_adapter:
            injection.require_input_gradients_(self.model)
            refusals.refuse_lost_prefix(self.model)
        if torch.is_grad_enabled():
            self.own_trained_()
        device = self.base_model.device
        inputs: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.base_dtype)
        inputs.update(injection.without_cache(self.base_model))
        inputs = {"input_ids": input_ids.to(device), **inputs, "output_hidden_states": True, "return_dict": True}
        # Several models may predict together: then a forward pass is one for all of them.
        forward_pass = ForwardPass(self, inputs)
        return batching.ask(forward_pass) if batching.is_going_on() else forward_pass.run()

    def _everything_embedded(self, data_points: Sequence[Any]) -> bool:
        """Whether stored vectors can be reused: never while the weights that they depend on can change."""
        return has_nothing_to_embed(self, data_points) or (
            not self.fine_tune and super()._everything_embedded(data_points)
        )

    def _set_tokenizer(
        self,
        model: str,
        tokenizer: str,
        tokenizer_data: BytesIO | None,
        feature_extractor_data: BytesIO | None,
        tokenizer_kwargs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> None:
        if tokenizer_data is None:
            self.tokenizer = tokenizers.find_tokenizer(tokenizer, tokenizer_kwargs)
            self.feature_extractor = tokenizers.find_feature_extractor(model, kwargs)
        else:
            self.tokenizer = tokenizers.unpack_tokenizer(tokenizer_data, tokenizer_kwargs)
            self.feature_extractor = tokenizers.unpack_feature_extractor(feature_extractor_data)
        tokenizers.complete_padding_(self.tokenizer)

    def _move_to(self, device: str | torch.device) -> None:
        if not self.is_placed:
            self.to(device)
        else:
            getattr(self, _OUTPUT_DTYPE_MARK).data = getattr(self, _OUTPUT_DTYPE_MARK).data.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or convert as torch does; what accelerate spread over devices stays as it is."""
        is_dispatched = isinstance(getattr(self, "model", None), torch.nn.Module) and frozen.is_dispatched(self.model)
        return super()._apply(fn, recurse and not is_dispatched)

    def _try_out(self) -> None:
        encoded = self.tokenizer("a", return_tensors="pt") if not self.tokenizer_needs_ocr_boxes else None
        ids = torch.tensor([[0]]) if encoded is None or encoded["input_ids"].numel() == 0 else encoded["input_ids"]
        inputs = {"attention_mask": torch.ones_like(ids)}
        refusals.try_out(self.model, lambda: self.hidden_states(ids, **inputs), rows=ids.shape[1])

    def _report(self) -> None:
        injection.report_without_effect(self.model)
        trainable, total = self.model.get_nb_trainable_parameters()
        log.info("%s: %s of %s parameters are trained (%.2f %%).", self.name, trainable, total, 100 * trainable / total)
        if methods.depends_on_batch(self.adapter_config):
            log.warning(
                "%s weighs its parts by an average over the batch: the vectors of a sentence depend on the sentences "
                "that are embedded with it. Predict with the same mini_batch_size and order to get the same labels.",
                methods.method_name(self.adapter_config),
            )
        if not transformer.takes_mask(self.base_model):
            log.warning(
                "%s takes no attention mask: the vectors of a sentence depend on the padding of its batch. Predict "
                "with the same mini_batch_size and order to get the same labels.",
                type(self.base_model).__name__,
            )
        if not self.fine_tune:
            log.warning(
                "The adapter of '%s' cannot learn: with fine_tune=False Flair embeds without gradient. Its weights "
                "stay as they are now. Pass fine_tune=True to train it.",
                self.name,
            )

    @staticmethod
    def _check_pooling(
        is_token_embedding: bool, subtoken_pooling: str, is_document_embedding: bool, cls_pooling: str
    ) -> None:
        if is_document_embedding and cls_pooling not in ("cls", "max", "mean"):
            raise ValueError(f"Document Pooling operation `{cls_pooling}` is not defined for TransformerEmbedding")
        if is_token_embedding and subtoken_pooling not in ("first", "last", "first_last", "mean"):
            raise ValueError(f"Subtoken Pooling operation `{subtoken_pooling}` is not defined for TransformerEmbedding")


@register_embeddings
class PeftTransformerWordEmbeddings(TransformerWordEmbeddings, PeftTransformerEmbeddings):
    """Word embeddings from a transformer with an adapter; see :class:`PeftTransformerEmbeddings`."""

    def __init__(
        self,
        model: str = "bert-base-uncased",
        is_document_embedding: bool = False,
        allow_long_sentences: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load a transformer and add an adapter to it.

        Args:
            model: name or directory of the base model.
            is_document_embedding: embed sentences too.
            allow_long_sentences: split sentences beyond the model's length into overlapping windows.
            **kwargs: as for :class:`PeftTransformerEmbeddings`.
        """
        PeftTransformerEmbeddings.__init__(
            self,
            model=model,
            is_token_embedding=True,
            is_document_embedding=is_document_embedding,
            allow_long_sentences=allow_long_sentences,
            **kwargs,
        )

    def _everything_embedded(self, data_points: Sequence[Any]) -> bool:
        return has_nothing_to_embed(self, data_points) or (
            not self.fine_tune and TokenEmbeddings._everything_embedded(self, data_points)
        )


@register_embeddings
class PeftTransformerDocumentEmbeddings(TransformerDocumentEmbeddings, PeftTransformerEmbeddings):
    """Document embeddings from a transformer with an adapter; see :class:`PeftTransformerEmbeddings`."""

    def __init__(
        self,
        model: str = "bert-base-uncased",
        layers: str = "-1",
        layer_mean: bool = False,
        is_token_embedding: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a transformer and add an adapter to it.

        Args:
            model: name or directory of the base model.
            layers: hidden states to use.
            layer_mean: average the layers; otherwise concatenate them.
            is_token_embedding: embed words too.
            **kwargs: as for :class:`PeftTransformerEmbeddings`.
        """
        PeftTransformerEmbeddings.__init__(
            self,
            model=model,
            layers=layers,
            layer_mean=layer_mean,
            is_token_embedding=is_token_embedding,
            is_document_embedding=True,
            **kwargs,
        )

    def _everything_embedded(self, data_points: Sequence[Any]) -> bool:
        return has_nothing_to_embed(self, data_points) or (
            not self.fine_tune and DocumentEmbeddings._everything_embedded(self, data_points)
        )


@dataclass(frozen=True)
class ForwardPass:
    """What embeddings ask for while several models predict together: the output of ``embeddings.model(**inputs)``."""

    embeddings: PeftTransformerEmbeddings
    inputs: dict[str, Any]

    def run(self) -> Any:
        """Return the output, as :mod:`transformers` gives it."""
        has_adapter = self.embeddings.has_adapter
        with self.embeddings.in_use():
            return injection.forward(self.embeddings.model if has_adapter else self.embeddings.base_model, self.inputs)


class _PoolingView:
    """The embeddings as stock ``forward`` should see them: a model that returns the wanted layers and nothing else.

    Flair's pooling reads ``self.model(...)[-1]``, stacks it and takes ``self.layer_indexes`` of the stack.
    """

    def __init__(self, embeddings: PeftTransformerEmbeddings) -> None:
        self._embeddings = embeddings
        self.layer_indexes = list(range(len(embeddings.layer_indexes)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embeddings, name)

    def model(self, input_ids: torch.Tensor, **tensors: Any) -> tuple[tuple[torch.Tensor, ...]]:
        """Return hidden states where Flair expects them, wide enough for its pooling, which mixes fp32 into sums."""
        states = self._embeddings.hidden_states(input_ids, **tensors)
        wide = torch.promote_types(states[0].dtype, torch.float32)
        return (tuple(state.to(device=flair.device, dtype=wide) for state in states),)


def has_nothing_to_embed(embeddings: Embeddings[Any], data_points: Sequence[Any]) -> bool:
    """Whether there is no data point, or no word of one where words are embedded: Flair embeds nothing then."""
    if isinstance(embeddings, TokenEmbeddings):
        return not any(sentence.tokens for sentence in data_points)
    return not data_points


def counterpart(stock_class: type[TransformerEmbeddings]) -> type[PeftTransformerEmbeddings]:
    """Return the class with an adapter that stands for a stock class.

    Raises:
        AdapterConfigError: there is none.
    """
    pairs: list[tuple[type, type[PeftTransformerEmbeddings]]] = [
        (TransformerWordEmbeddings, PeftTransformerWordEmbeddings),
        (TransformerDocumentEmbeddings, PeftTransformerDocumentEmbeddings),
        (TransformerEmbeddings, PeftTransformerEmbeddings),
    ]
    for stock, ours in pairs:
        if issubclass(stock_class, stock):
            return ours
    raise AdapterConfigError(
        f"Cannot add an adapter to {stock_class.__name__}. Only Flair's transformer embeddings can carry one. Use "
        "TransformerWordEmbeddings, TransformerDocumentEmbeddings or TransformerEmbeddings."
    )


def _default_config(base: PreTrainedModel) -> PeftConfig:
    config = configs.default_config(
        has_unread_layers=transformer.has_unread_layers(base),
        has_transposed_weights=transformer.has_transposed_weights(base),
    )
    if not refusals.linear_names(base):
        config.target_modules = set(refusals.names_to_target(base))  # "all-linear" leaves convolutions out
    return config


def _unique_name(base_model_name: str, config: PeftConfig) -> str:
    """Return a name that no other adapter has; names sort in the order of creation."""
    method = methods.method_name(config).lower().replace("_", "-")
    return f"transformer-{base_model_name}-{method}-{time.time_ns():x}{os.urandom(2).hex()}"


def _count_hidden_states(base: PreTrainedModel) -> int:
    with torch.no_grad():
        output = base(torch.tensor([[1]], device=base.device), output_hidden_states=True, return_dict=True)
    return len(transformer.states_of(output)[0])
