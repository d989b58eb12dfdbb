"""Transformer embeddings that compute with an adapter: dtypes, devices, tokens and the forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from flair.data import Sentence
from flair.embeddings import TransformerEmbeddings
from flair.embeddings.base import Embeddings, TokenEmbeddings
from flair.embeddings.transformer import combine_strided_tensors
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from flair_peft.adapter import keys, mending, methods, model_call, refusals
from flair_peft.base import placement, quantisation, tokenizers, transformer
from flair_peft.embeddings import batch_division, cooperative_threads, division_trial, exact_values, flair_pooling
from flair_peft.embeddings.base_source import BaseSource
from flair_peft.embeddings.batch_division import Division
from flair_peft.embeddings.offload import AdapterMemory
from flair_peft.embeddings.pending_load import PendingLoad, canonical
from flair_peft.errors import AdapterConfigError, ModelFileError
from flair_peft.primitives import host_internals
from flair_peft.primitives.base_record import BaseRecord, StoredBase


class AdaptedEmbeddings(TransformerEmbeddings):
    """What embeddings with an adapter hold, and how they compute; subclasses make them and store them.

    Attributes:
        model: the :class:`peft.PeftModel`, or the bare transformer while its adapter waits for the base's weights.
        base_source: where the frozen transformer comes from.
        origin: number and base of these embeddings in the file that they come from.
        adapter_memory: keeps the adapters of many models within a number of bytes, or ``None``.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    head_dtype: torch.dtype | None
    keep_virtual_rows: bool
    after_final_norm: bool
    save_base: bool
    # Read from the class where older pickles lack it.
    length_grouping: bool = True
    base_source: BaseSource
    origin: tuple[int, StoredBase] | None = None
    adapter_memory: AdapterMemory | None = None
    # What the transformer lacks until a state dict is loaded.
    _pending: PendingLoad | None = None
    # Name → digest of the parameters that were not seen to change since they were made.
    _start: Mapping[str, str] = {}
    # Arguments with which PEFT prepared a quantised base for training.
    _preparing: Mapping[str, Any] = {}
    # Without elements: its dtype and device are those in which vectors leave, and change with the model's.
    _output_mark: torch.Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; of a model that ``torch.compile`` wrapped, that model, whose calls are compiled then."""
        super().__setattr__(name, host_internals.compiled_in_place(value) if name == "model" else value)

    @property
    def adapter_config(self) -> PeftConfig:
        """The config of the adapter, as it was trained.

        Raises:
            AdapterConfigError: PEFT merged, unloaded or deleted the adapter.
        """
        if self._pending is not None and self._pending.adapter_config is not None:
            return self._pending.adapter_config
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
    def is_placed(self) -> bool:
        """Whether quantisation or a device map says where the base's weights are, so that nobody may move them."""
        return placement.is_placed(self.base_model)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base model's weights, read from its input embeddings."""
        return self.base_model.get_input_embeddings().weight.dtype

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype in which vectors leave: that of the head, which ``model.half()`` and the like change with it."""
        return self._output_mark.dtype

    @output_dtype.setter
    def output_dtype(self, dtype: torch.dtype) -> None:
        self._output_mark.data = self._output_mark.data.to(dtype)

    @property
    def base_record(self) -> BaseRecord | None:
        """Where the base model comes from, as files say it; ``None`` where that was never known."""
        return self.base_source.record

    @property
    def base_revision(self) -> str | None:
        """Commit of the base model on the Hub; ``None`` if it comes from a directory."""
        return None if self.base_record is None else self.base_record.revision

    def compare_with_base(self, trained: Set[str] | None = None, *, is_tied: bool = True) -> StoredBase:
        """Return which of the weights are the base's own and need not be stored; see :meth:`BaseSource.compare`."""
        return self.base_source.compare(self.model, self.base_model, trained, is_tied=is_tied)

    def expect_whole(self) -> None:
        """Let the next state dict hold every weight again."""
        self._pending = None

    def expect_without(self, stored: StoredBase) -> None:
        """Let the next state dict be without what the file leaves out; that is the base's own here, too.

        Weights that were the base's own when the file was written and were changed since get their values back.
        """
        self._pending = PendingLoad(is_first=False, left_out=canonical(stored))
        if not self.is_placed:
            self.base_source.restore_(self.model, self.base_model, stored)

    def narrow_adapter_(self) -> None:
        """Let LoRA compute in the dtype of a base in half precision, where PEFT gives it fp32; training takes it back.

        ``state_dict`` and files hold the exact values.
        """
        is_half = self.base_dtype.itemsize < torch.float32.itemsize
        if not is_half or self.training or methods.why_not_mixed(self.adapter_config) is not None:
            return
        added = {name: p for name, p in self.model.named_parameters() if keys.base_key(name) is None}
        exact_values.cast_(self.model, added, self.base_dtype)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch does; an adapter that was narrowed trains in fp32, with its exact values if kept."""
        super().train(mode)
        if mode and self.has_adapter:
            with self.in_use():
                exact_values.restore_(self.model, lambda: exact_values.without_copies(self.model))
                mending.widen_(self.model)
        return self

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the adapter is in memory, if it is one of those that may be left on disk."""
        return contextlib.nullcontext() if self.adapter_memory is None else self.adapter_memory.using(self)

    def _move_to(self, device: str | torch.device) -> None:
        if not self.is_placed:
            self.to(device)
        else:
            self._output_mark.data = self._output_mark.data.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or convert as torch does; what accelerate spread over devices stays as it is."""
        model = getattr(self, "model", None)
        is_dispatched = isinstance(model, torch.nn.Module) and placement.is_dispatched(model)
        # Flair moves a model that it loads twice, to where it is: torch would assign every tensor to itself.
        if recurse and not is_dispatched and self._stays_as_it_is(fn):
            return self
        if not isinstance(model, torch.nn.Module):
            return super()._apply(fn, recurse)
        with self.in_use(), exact_values.converted(model, lambda: dict(model.named_parameters())):
            return super()._apply(fn, recurse and not is_dispatched)

    @torch.no_grad()
    def _stays_as_it_is(self, fn: Callable[..., Any]) -> bool:
        """Whether a conversion gives back each tensor itself; there are no gradients, which would have to follow."""
        held = (each for module in self.modules() for each in (module._buffers, module._parameters))
        tensors = (tensor for each in held for tensor in each.values() if tensor is not None)
        return all(tensor.grad is None and fn(tensor) is tensor for tensor in tensors)

    def prepare_tensors(self, sentences: list[Sentence], device: torch.device | None = None) -> dict[str, Any]:
        """Return the model inputs for a batch; lengths come from the attention mask, not from padding ids.

        The id of the padding token may stand for a real token too, where a tokenizer has none of its own. Models that
        predict together tokenise a batch once if their settings are the same.
        """
        tokenizers.complete_padding_(self.tokenizer)
        known = cooperative_threads.known_in_this_round()
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
        tokenizer = self.tokenizer
        settings["tokenizer"] = (
            tokenizers.vocabulary_of(tokenizer),
            *(tokenizer.model_max_length, tokenizer.truncation_side, tokenizer.pad_token_id),
            *tokenizer.model_input_names,
        )
        settings["feature_extractor"] = id(self.feature_extractor)
        return (type(self), *sorted(settings.items()))  # a subclass may put words in front

    def forward(self, input_ids: torch.Tensor, **tensors: Any) -> dict[str, torch.Tensor]:
        """Return ``{"document_embeddings": (batch, length), "token_embeddings": (batch, words, length)}``.

        Takes what :meth:`prepare_tensors` returns. Pooling is Flair's own, in fp32 or wider; vectors leave in
        :attr:`output_dtype`.
        """
        pooled = flair_pooling.pool(self, input_ids, tensors)
        mark = self._output_mark
        return {name: vectors.to(device=mark.device, dtype=mark.dtype) for name, vectors in pooled.items()}

    def hidden_states(self, input_ids: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
        """Return the hidden states of the wanted layers, each (batch, subtokens, hidden), virtual tokens stripped.

        They are asked for by name and without a cache: the last output of a decoder can be its cache. Where sentences
        ran in groups of similar length or in packed rows, those of padding are zero.
        """
        states, last = transformer.states_of(self._output(input_ids, **tensors))
        beyond = [index for index in self.layer_indexes if not -len(states) <= index < len(states)]
        if beyond:
            raise AdapterConfigError(
                f"Cannot read layers {beyond} of {type(self.base_model).__name__}: it has {len(states)} hidden states, "
                "counted from 0 for the embeddings. Flair's `layers` takes these numbers. Pass some of them, or 'all'."
            )
        wanted = [states[index] for index in self.layer_indexes]
        if self.after_final_norm:
            wanted = [
                last if index in (-1, len(states) - 1) else state
                for index, state in zip(self.layer_indexes, wanted, strict=True)
            ]
        first = model_call.virtual_rows(self.model) if self.has_adapter and not self.keep_virtual_rows else 0
        return tuple(state[:, first:] for state in wanted)

    @property
    def reads_last_layer(self) -> bool:
        """Whether the last of the transformer's layers is among those that are read."""
        return not {-1, getattr(self.base_model.config, "num_hidden_layers", None)}.isdisjoint(self.layer_indexes)

    def _output(self, input_ids: torch.Tensor, **tensors: Any) -> Any:
        if self._pending is not None and self._pending.is_first:
            raise ModelFileError(
                f"Cannot embed with '{self.name}': its weights were never loaded. It was built from stored parameters "
                "without a state dict. Load the whole Flair model, or call load_state_dict first."
            )
        if self.training and self.has_adapter:
            mending.require_input_gradients_(self.model)
            refusals.refuse_lost_prefix(self.model)
        if torch.is_grad_enabled():
            _unmap_trained_(self.model)
        device = self.base_model.device
        inputs: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.base_dtype)
        inputs.update(model_call.without_cache(self.base_model))
        inputs = {"input_ids": input_ids.to(device), **inputs, "output_hidden_states": True, "return_dict": True}
        # Several models may predict together: then a forward pass is one for all of them.
        forward_pass = ForwardPass(self, inputs)
        return cooperative_threads.ask(forward_pass) if cooperative_threads.is_going_on() else forward_pass.run()

    def _everything_embedded(self, data_points: Sequence[Any]) -> bool:
        """Whether stored vectors can be reused: never while the weights that they depend on can change."""
        return has_nothing_to_embed(self, data_points) or (
            not self.fine_tune and super()._everything_embedded(data_points)
        )


@dataclass(frozen=True)
class ForwardPass:
    """What embeddings ask for while several models predict together: the output of ``embeddings.model(**inputs)``."""

    embeddings: AdaptedEmbeddings
    inputs: dict[str, Any]

    def run(self) -> Any:
        """Return the output, as :mod:`transformers` gives it; of a divided batch, its hidden states alone."""
        division = self.division
        with self.embeddings.in_use():
            return batch_division.run_divided(self._forward, self.inputs, division)

    @functools.cached_property
    def division(self) -> Division | None:
        """How the batch is divided, ``None`` for one pass as it is: the same for the same inputs.

        The model may be run, to see whether that makes a difference.
        """
        if not may_be_divided(self.embeddings):
            return None
        model = self._model
        is_adapted = isinstance(model, PeftModel)
        with self.embeddings.in_use():
            return division_trial.find_division(
                self._forward,
                self.inputs,
                model=model,
                first=model_call.virtual_rows(model) if is_adapted else 0,
                before=methods.virtual_tokens(self.embeddings.adapter_config) if is_adapted else 0,
                is_packable=True,
            )

    @property
    def _model(self) -> PreTrainedModel | PeftModel:
        return self.embeddings.model if self.embeddings.has_adapter else self.embeddings.base_model

    def _forward(self, inputs: Mapping[str, Any], rows: Sequence[int]) -> Any:
        with host_internals.one_pass_at_a_time(self.embeddings.base_model):
            return model_call.forward(self._model, inputs)


def may_be_divided(embeddings: AdaptedEmbeddings) -> bool:
    """Whether the forward pass may be several, whatever the inputs."""
    model, base = embeddings.model, embeddings.base_model
    is_whole = (
        not embeddings.length_grouping
        or embeddings.force_max_length
        # A graph holds the groups of the batch that it was traced with, and each is compiled anew.
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.compiler.is_compiling()
        or any(getattr(each, "_compiled_call_impl", None) is not None for each in (model, base))
        # Each pass reads what is offloaded.
        or placement.is_dispatched(base)
        # A short group would change how the longer ones attend.
        or transformer.is_sparse(base)
    )
    config = embeddings.adapter_config if embeddings.has_adapter else None
    if is_whole or (config is not None and methods.depends_on_batch(config)):
        return False
    if config is not None and embeddings.training and any(o.averages_batch for o, _ in methods.options(config)):
        return False
    # Reentrant checkpoints of each group would give DistributedDataParallel a gradient of their own.
    is_checkpointed = embeddings.training and getattr(base, "is_gradient_checkpointing", False)
    return not (is_checkpointed and torch.distributed.is_available() and torch.distributed.is_initialized())


def has_nothing_to_embed(embeddings: Embeddings[Any], data_points: Sequence[Any]) -> bool:
    """Whether there is no data point, or no word of one where words are embedded: Flair embeds nothing then."""
    if isinstance(embeddings, TokenEmbeddings):
        return not any(sentence.tokens for sentence in data_points)
    return not data_points


def _unmap_trained_(model: torch.nn.Module) -> None:
    """Give each parameter that requires a gradient memory of its own, in place.

    Optimisers on a GPU write to many tensors at once, and read their addresses as of tensors that they only read:
    memory that is copied on write would not be copied.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and host_internals.is_copied_on_write(parameter):
            parameter.data = parameter.data.clone()
