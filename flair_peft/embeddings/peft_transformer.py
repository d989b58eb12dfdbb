"""Flair's transformer embeddings with a PEFT adapter that trains, saves, loads and predicts."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, Literal

import torch
from flair.embeddings import TransformerEmbeddings
from flair.embeddings.base import register_embeddings
from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig
from typing_extensions import Self

from flair_peft.adapter import config as configs
from flair_peft.adapter import mending, methods, refusals
from flair_peft.base import memory_check, quantisation, tokenizers, transformer
from flair_peft.embeddings import construction, fill_weights, stored_params, vector_probe
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.embeddings.pending_load import PendingLoad
from flair_peft.errors import AdapterConfigError
from flair_peft.foreign import adapter_files, fill_embeddings, transfer_plan
from flair_peft.foreign.transfer_plan import ForeignHead
from flair_peft.primitives import dtypes, host_internals, mapped_memory
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import LoadOptions
from flair_peft.torchfile.allowed_names import EMBEDDINGS_STATE

log = logging.getLogger("flair_peft")


@register_embeddings
class PeftTransformerEmbeddings(AdaptedEmbeddings):
    """Transformer embeddings whose frozen transformer carries a PEFT adapter.

    Takes every keyword of :class:`flair.embeddings.TransformerEmbeddings`, with the same meaning. With the adapter
    switched off (``with embeddings.model.disable_adapter(): …``) the vectors are those of the stock class.

    ``model`` holds the :class:`peft.PeftModel`; ``foreign_head`` what :meth:`from_adapter` found of a head, which no
    file of Flair's keeps. Embeddings whose weights can change are always computed, never taken from what a sentence
    stored before.

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
        length_grouping: run the sentences of a batch in packed rows or in groups of similar length, wherever that takes
            less than padding all to the longest. Results are those of one pass up to rounding; dropout draws other
            random numbers. What depends on padding, and ``force_max_length``, has one pass in any case.
        **kwargs: for the tokenizer, the config and the model.

    Raises:
        BaseModelNotFoundError: the base model is not found.
        AdapterConfigError: the config is no PEFT config or does not fit the model.
        UnsupportedMethodError: the method cannot work on this architecture.
    """

    foreign_head: ForeignHead | None = None
    # torch asks its modules to be strict, whatever it was asked for itself.
    _is_strict = True

    @torch.inference_mode(False)
    @host_internals.errors_of_transformers_alone()
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
        length_grouping: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load a transformer and add an adapter to it; the class says what the arguments mean."""
        host_internals.tokenize_in_one_thread()
        _check_name(model)
        _check_pooling(is_token_embedding, subtoken_pooling, is_document_embedding, cls_pooling)
        arguments = construction.TransformersArguments.sort(
            kwargs, transformers_tokenizer_kwargs, transformers_config_kwargs, transformers_model_kwargs, dtype
        )
        config = None if peft_config is None else configs.own_config(peft_config)
        stored = (tokenizer_data, feature_extractor_data)
        self.tokenizer, self.feature_extractor = construction.make_tokenizer(model, tokenizer, arguments, stored)
        separator = construction.add_separator_(self.tokenizer) if use_context_separator else None
        request = construction.BaseRequest(
            model, name or model, arguments, saved_config, stored_base, self.tokenizer, separator
        )
        base = construction.resolve_base(request, config, peft_gradient_checkpointing_kwargs)

        # Attributes with the names and meanings that the stock constructor gives them.
        self.base_model_name = base.source.name
        self.name = name if name is not None else construction.unique_name(self.base_model_name, base.adapter_config)
        self.truncate = construction.limit_length_(self.tokenizer, base.adapter_config, is_new=saved_config is None)
        # Flair splits sentences by what only fast tokenizers report; stock embeddings fail at the first batch.
        self.allow_long_sentences = allow_long_sentences and self.truncate and self.tokenizer.is_fast
        self.stride = self.tokenizer.model_max_length // 2 if self.allow_long_sentences else 0
        self.context_length = (64 if use_context else 0) if isinstance(use_context, bool) else use_context
        self.context_dropout, self.respect_document_boundaries = context_dropout, respect_document_boundaries
        self.token_embedding, self.document_embedding = is_token_embedding, is_document_embedding
        self.layer_indexes, self.layer_mean = construction.wanted_layers(layers, base.model), layer_mean
        self.cls_pooling, self.subtoken_pooling = cls_pooling, subtoken_pooling
        self.fine_tune, self.static_embeddings = fine_tune, not fine_tune
        self.force_max_length, self.use_context_separator = force_max_length, use_context_separator
        self.use_lang_emb = bool(getattr(base.model, "use_lang_emb", False))
        self.embedding_length_internal = self._calculate_embedding_length(base.model)
        if needs_manual_ocr is not None:
            self.needs_manual_ocr = needs_manual_ocr
        # The stock constructor would load a second transformer: go straight to what its base class sets up.
        with tokenizers.exclusively(self.tokenizer):
            super(TransformerEmbeddings, self).__init__(**self.to_args())

        self.head_dtype = None if head_dtype is None else dtypes.parse_dtype(head_dtype)
        self.keep_virtual_rows, self.after_final_norm, self.save_base = keep_virtual_rows, after_final_norm, save_base
        self.length_grouping = length_grouping
        self._preparing = quantisation.stored_preparation(peft_gradient_checkpointing_kwargs)
        self.register_load_state_dict_post_hook(PeftTransformerEmbeddings._after_loading)
        construction.attach_adapter_(self, base, is_new=saved_config is None)

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
        fill_embeddings.fill_(embeddings, plan, allow_untrained=allow_untrained)
        embeddings._start, embeddings.foreign_head = {}, plan.head
        _report_final_norm(embeddings, source)
        return embeddings

    def stops_before_final_norm(self) -> bool:
        """Whether the transformer goes on after the last of its hidden states; the model is asked, by a small pass."""
        ids = torch.tensor([vector_probe.probe_ids(self)])
        with vector_probe.trying_out(self), torch.no_grad():
            states, last = transformer.states_of(self._output(ids, attention_mask=torch.ones_like(ids)))
        return not torch.equal(states[-1], last)

    def to_params(self) -> dict[str, Any]:
        """Return the constructor parameters as plain values; see :func:`stored_params.describe`."""
        return stored_params.describe(self, super().to_params)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Return embeddings of the stored shape; a state dict must fill them before they can embed.

        ``params`` is not modified. Parameters of the stock classes are read too, if they hold a PEFT config.

        Raises:
            FormatVersionError: the parameters were written by a newer version.
            ModelFileError: they are damaged, or the architecture is not one that transformers knows.
        """
        return stored_params.rebuild(cls, params)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does; nothing is changed if they do not fit.

        Raises:
            StateMismatchError: ``strict``, and a tensor is missing, left over, ambiguous or of another shape.
        """
        self._is_strict = strict
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        finally:
            self._is_strict = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Bring the keys of a file to those of this model, then load; see :func:`fill_weights.fill_`."""
        state_dict.pop(f"{prefix}model.embeddings.position_ids", None)  # written by transformers before 4.31
        inner = fill_weights.take_inner(prefix)
        if inner is not None and not (self._pending and self._pending.is_first):
            self._pending = stored_params.take_over_(self, inner)
        pending = self._pending or PendingLoad(is_first=False)
        fill_weights.fill_(self, state_dict, prefix, pending=pending, is_strict=self._is_strict)
        self._pending = pending
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def _after_loading(self, incompatible: Any) -> None:
        """Say of the keys that are in place without torch that they are, then verify what was loaded."""
        pending = self._pending
        assert pending is not None
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in pending.in_place]
        # Embeddings in several places of a model are read again as often: what the file leaves out stays expected.
        if pending.is_complete or not (pending.is_first or pending.left_out):
            self._pending = None
        if pending.is_complete:
            self._start = fill_weights.finish_(self, pending)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        with self.in_use():
            if isinstance(self.model, PeftModel) and methods.keeps_graph(self.adapter_config):
                clone.__setstate__(self.__getstate__())
                return clone
            clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
            if isinstance(clone.model, PeftModel):
                mending.repair_(clone.model)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        if self.is_placed:
            raise stored_params.without_weights(self.name)
        refusals.refuse_unstorable(self.model)
        return {
            EMBEDDINGS_STATE: {**self.to_params(), "trained_base": stored_params.trained_base(self)},
            "state_dict": {name: mapped_memory.lent(tensor) for name, tensor in self.state_dict().items()},
            "output_dtype": self.output_dtype,
            "training": self.training,
            "base": StoredBase(self.base_record).to_dict(),
            "start": dict(self._start),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if EMBEDDINGS_STATE not in state:
            super().__setstate__(state)
            return
        loaded = self.from_params(state[EMBEDDINGS_STATE])
        loaded.load_state_dict(state["state_dict"])
        loaded.output_dtype = state["output_dtype"]
        # Files of 0.1.0 hold neither of these.
        loaded.base_source.record = StoredBase.from_dict(state.get("base")).record
        loaded._start = dict(state.get("start", {}))
        loaded.train(state["training"])
        self.__dict__.update(loaded.__dict__)


def adapted_embeddings(model: torch.nn.Module) -> list[PeftTransformerEmbeddings]:
    """Return the embeddings with an adapter in a model, each once, in the order of its modules."""
    return [module for _, module in modules_around(model) if isinstance(module, PeftTransformerEmbeddings)]


def modules_around(
    module: torch.nn.Module, name: str = "", seen: set[torch.nn.Module] | None = None
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield name and module as torch does, without the hundreds that are inside of embeddings with an adapter."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in () if isinstance(module, PeftTransformerEmbeddings) else module._modules.items():
        if child is not None:
            yield from modules_around(child, f"{name}.{child_name}" if name else child_name, seen)


def _report_final_norm(embeddings: PeftTransformerEmbeddings, source: str) -> None:
    if not embeddings.after_final_norm and embeddings.reads_last_layer and embeddings.stops_before_final_norm():
        log.warning(
            "'%s': Flair reads the last layer of %s before its final norm. Sentence-transformers and the heads of "
            "transformers, with which adapters are trained, read it after. Pass after_final_norm=True to get those "
            "vectors.",
            source,
            type(embeddings.base_model).__name__,
        )


def _check_name(model: object) -> None:
    """Return if this may be the name of a base, or its path.

    Raises:
        AdapterConfigError: it is something else.
    """
    if not isinstance(model, str | os.PathLike):
        raise AdapterConfigError(
            f"Cannot make embeddings on a {type(model).__name__}: a base is read from its files, to which saved models "
            "refer. Pass the path of its directory, or its name on the Hub; from_adapter takes adapters that were "
            "trained elsewhere."
        )


def _check_pooling(
    is_token_embedding: bool, subtoken_pooling: str, is_document_embedding: bool, cls_pooling: str
) -> None:
    if is_document_embedding and cls_pooling not in ("cls", "max", "mean"):
        raise ValueError(f"Document Pooling operation `{cls_pooling}` is not defined for TransformerEmbedding")
    if is_token_embedding and subtoken_pooling not in ("first", "last", "first_last", "mean"):
        raise ValueError(f"Subtoken Pooling operation `{subtoken_pooling}` is not defined for TransformerEmbedding")
