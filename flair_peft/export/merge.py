"""Merging adapters: plain Flair models, which load where neither flair_peft nor PEFT is installed."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Sequence
from typing import Any

import flair
import torch
from flair.data import DataPoint, Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.models import MultitaskModel
from flair.models.tars_model import FewshotClassifier
from flair.nn import Model
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flair_peft.adapter import methods, model_call
from flair_peft.base import config_versions, quantisation, stored_config, tokenizers
from flair_peft.base import transformer as base_transformer
from flair_peft.base.unusable import first_line
from flair_peft.codec import state_json
from flair_peft.embeddings import head_dtype, vector_probe
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import AdapterConfigError, FlairPeftError, StateMismatchError, UnsupportedMethodError, name_some
from flair_peft.models import build, save_plan, unkept_settings
from flair_peft.models.stored import Stored
from flair_peft.primitives import devices, dtypes, mapped_memory, progress, rounding
from flair_peft.primitives.full_precision import full_precision

log = logging.getLogger("flair_peft")

# Largest distance of merged from unmerged hidden states in fp32, as a share of their norm: sums in another order.
_TOLERANCE = 1e-4

# Of several lengths, since batches are padded, and none so long that Flair mixes its windows.
_TEXTS = ("Berlin is large , isn't it ?", "Yes", "I would not have thought that anybody would write 3 of 4 of these .")

# Models that were made here: plain ones, which this package writes.
_made: weakref.WeakSet[Model] = weakref.WeakSet()

_STOCK: tuple[type[TransformerEmbeddings], ...] = (TransformerWordEmbeddings, TransformerDocumentEmbeddings)


@progress.shown("merging")
def merge(model: Model, *, dtype: dtypes.DtypeLike = torch.float32) -> Model:
    """Return a plain Flair model that predicts what this one does; this one stays as it is.

    Its embeddings are Flair's own. Adapters are merged in fp32, and the result is compared with the unmerged model.

    Args:
        model: a Flair model whose embeddings have an adapter.
        dtype: of the base's weights afterwards. No stock model predicts with a base in half precision, until its head
            is converted by hand.

    Raises:
        AdapterConfigError: the model has no adapter, or reads texts or its transformer as Flair's own embeddings
            cannot, or its base is quantised, so that merging would round it once more, or spread over devices, or has
            a config that stock Flair does not read as it is.
        UnsupportedMethodError: the method cannot be merged, as prompts cannot.
        StateMismatchError: the merged model gives other hidden states.
    """
    if not isinstance(model, Model):
        raise AdapterConfigError(
            f"Cannot merge this {type(model).__name__}: it is no Flair model. Pass the model that you trained, such as "
            "a TextClassifier."
        )
    if not adapted_embeddings(model):
        raise AdapterConfigError(
            f"Cannot merge this {type(model).__name__}: none of its embeddings has an adapter. It is a plain Flair "
            "model already. Save it with model.save(path)."
        )
    for embeddings in adapted_embeddings(model):
        if embeddings.after_final_norm:
            raise AdapterConfigError(
                f"Cannot merge the adapter of '{embeddings.name}': it reads the transformer after its final norm, and "
                "Flair's own embeddings before it. The merged model would predict something else. Keep the adapter "
                "beside its base."
            )
        refuse_placed(embeddings)
    with devices.same_random_numbers():
        plain = copied(model)
        wanted = dtypes.parse_dtype(dtype)
        marks = [module.separator for module in plain.modules() if isinstance(module, FewshotClassifier)]
        texts = [*_TEXTS, *(f"Yes {mark} {_TEXTS[0]}" for mark in marks)]
        build.replace_each_(plain, PeftTransformerEmbeddings, lambda child: _merged_embeddings(child, wanted, texts))
    plain.to(flair.device).eval()
    if unkept := {name for settings in unkept_settings.read(plain).values() for name in settings}:
        log.warning(
            "Flair's own files do not keep %s of this %s: a .pt file of the merged model predicts something else where "
            "it matters. save_pretrained keeps it.",
            name_some(unkept),
            type(plain).__name__,
        )
    if parts := unreadable_parts(plain):
        log.warning(
            "Flair reads no .pt file of this merged %s: it pickles %s with the transformer embeddings inside, and "
            "cannot unpickle these. save_pretrained keeps the model.",
            type(plain).__name__,
            name_some(parts),
        )
    _made.add(plain)
    return plain


def unreadable_parts(model: Model) -> list[str]:
    """Return which parts of a plain model Flair would pickle in a way that it cannot undo: label encoders."""
    tasks = model.tasks.values() if isinstance(model, MultitaskModel) else [model]
    stored = [(name, value) for task in tasks for name, value in task._get_state_dict().items()]
    modules = [(name, value) for name, value in stored if isinstance(value, torch.nn.Module)]
    return [name for name, value in modules if any(isinstance(m, TransformerEmbeddings) for m in value.modules())]


def is_merged(model: Model) -> bool:
    """Whether a plain model was made by :func:`merge`."""
    return model in _made


def refuse_placed(embeddings: PeftTransformerEmbeddings) -> None:
    """Return if the base's weights are here, as they are in its source.

    Raises:
        AdapterConfigError: they are quantised, or spread over devices.
    """
    if embeddings.is_placed:
        engine = quantisation.engine(embeddings.base_model)
        reason = f"quantised by {engine}, and merging would round its weights once more"
        if engine is None:
            reason = "spread over devices, and what is offloaded cannot be written"
        raise AdapterConfigError(
            f"Cannot merge the adapter of '{embeddings.name}': its base is {reason}. A merged model holds all its "
            "weights, as exact as they were. Load the model on the base as it is in its source, and merge there."
        )


def copied(model: Model) -> Model:
    """Return the model as a load gives it: Flair's document RNNs cannot be copied otherwise."""
    description = save_plan.encode(save_plan.plan_save(model, save_base=True))
    tensors = {name: mapped_memory.lent(tensor) for name, tensor in description.tensors.items()}
    state = state_json.decode(description.document, tensors)
    copied = build.build(Stored("state", state, type(model).__name__), type(model).load)
    head_dtype.restore_head_(copied)
    return copied


def _merged_embeddings(
    embeddings: PeftTransformerEmbeddings, dtype: torch.dtype, texts: Sequence[str]
) -> TransformerEmbeddings:
    """Return Flair's own embeddings around the transformer with the adapter in its weights, which read texts alike."""
    _refuse_unreadable(embeddings)
    embeddings.float().eval()
    try:
        texts = [*texts, *ending_in_padding(embeddings.tokenizer)]
        expected = vectors(embeddings, texts)
    except Exception as error:  # such as of embeddings that read boxes or images beside the words
        log.info("Not compared how Flair reads texts with '%s': %s", embeddings.name, error)
        expected = None
    transformer = merged_transformer(embeddings)
    if "use_cache" in transformer.config.to_dict():
        transformer.config.use_cache = False  # stock Flair takes the last output for the hidden states
    # What is not among these is not stored, and the tokenizers of decoders pad on the left by default.
    embeddings.tokenizer.init_kwargs["padding_side"] = embeddings.tokenizer.padding_side
    embeddings.model = transformer
    if mixes_windows(embeddings):
        log.warning(
            "Flair gives sentences other vectors where one before them in the batch has several windows: the merged "
            "'%s' reads these so. Merge embeddings with allow_long_sentences=False, or keep the adapter beside its "
            "base.",
            embeddings.name,
        )
    try:
        plain = _stock(embeddings, transformer, torch.float32)
        if expected is not None:
            _compare_reading(embeddings, plain, rounding.distance(vectors(plain, texts), expected))
        return plain if dtype == torch.float32 else _stock(embeddings, transformer, dtype)
    except FlairPeftError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise AdapterConfigError(
            f"Cannot merge the adapter of '{embeddings.name}': Flair's own embeddings cannot hold its "
            f"{type(transformer).__name__} ({type(error).__name__}: {first_line(error)}). Keep the adapter beside its "
            "base, as save_pretrained and model.save do."
        ) from error


def _stock(
    embeddings: PeftTransformerEmbeddings, transformer: PreTrainedModel, dtype: torch.dtype
) -> TransformerEmbeddings:
    """Return Flair's own embeddings with the settings of these, around the weights in a dtype."""
    transformer.to(dtype)
    transformer.config.dtype = dtype
    params = TransformerEmbeddings.to_params(embeddings)
    params["tokenizer_data"] = tokenizers.portable_tokenizer_files(params["tokenizer_data"], embeddings.tokenizer)
    stock = next((found for found in _STOCK if isinstance(embeddings, found)), TransformerEmbeddings)
    plain = stock.from_params(params)
    plain.model.load_state_dict(transformer.state_dict())
    plain.truncate, plain.stride = embeddings.truncate, embeddings.stride
    return plain.eval()


def vectors(embeddings: Any, texts: Sequence[str] = _TEXTS) -> torch.Tensor:
    """Return the vectors of some texts, in one row."""
    sentences = [Sentence(text, use_tokenizer=False) for text in texts]  # which would take special tokens apart
    Sentence.set_context_for_sentences(sentences)
    with base_transformer.keeping_attention(embeddings), torch.no_grad(), full_precision(flair.device.type):
        embeddings.embed(sentences)
    points: list[DataPoint] = [*sentences] if embeddings.document_embedding else []
    points += [token for sentence in sentences for token in sentence] if embeddings.token_embedding else []
    return torch.cat([point.get_embedding().float().cpu() for point in points])


def ending_in_padding(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a text that ends in the token that pads, unless that is in brackets, as nobody writes it."""
    mark = str(tokenizer.pad_token)
    return [] if re.fullmatch(r"[<\[].*[>\]]", mark) else [f"Yes {mark}"]


def _compare_reading(embeddings: PeftTransformerEmbeddings, plain: TransformerEmbeddings, distance: float) -> None:
    """Say if Flair's own embeddings read rare characters otherwise.

    Raises:
        AdapterConfigError: they read plain texts otherwise.
    """
    allowed = rounding.tolerance("float32")
    if not distance <= allowed:
        raise AdapterConfigError(
            f"Cannot merge the adapter of '{embeddings.name}': around the same transformer, Flair's own embeddings "
            f"give texts vectors that are {distance:.2g} of their norm away, and rounding explains {allowed:g}. They "
            "take tokens for padding by their id, such as the one that some tokenizers end each text with, or make "
            "another tokenizer of what they store. The merged model would predict something else. Keep the adapter "
            "beside its base."
        )
    if not tokenizers.are_alike(embeddings.tokenizer, plain.tokenizer):
        log.warning(
            "Flair's own embeddings read with a %s, and '%s' with a %s, which takes rare characters apart in another "
            "way, as in '%s': the merged model predicts something else there. Keep the adapter beside its base, or "
            "train with the former.",
            type(plain.tokenizer).__name__,
            embeddings.name,
            type(embeddings.tokenizer).__name__,
            tokenizers.RARE,
        )


def mixes_windows(embeddings: TransformerEmbeddings) -> bool:
    """Whether Flair's own embeddings would take windows of long sentences for the vectors of those behind them."""
    return embeddings.allow_long_sentences and bool(embeddings._can_document_embedding_shortcut())


def _refuse_unreadable(embeddings: PeftTransformerEmbeddings) -> None:
    """Return if stock Flair makes the same config, with the same attention, of what it stores."""
    config = embeddings.base_model.config
    lost = stored_config.changing(config)
    if config_versions.is_capped(config.to_dict()) and config._attn_implementation == "eager":
        lost = lost | {"attn_implementation"}
    if lost:
        raise AdapterConfigError(
            f"Cannot merge the adapter of '{embeddings.name}': stock Flair stores its {type(config).__name__} and "
            f"reads another {name_some(lost)} from it. The merged model would predict something else. Keep the adapter "
            "beside its base, as save_pretrained and model.save do."
        )


def merged_transformer(embeddings: PeftTransformerEmbeddings) -> PreTrainedModel:
    """Return the transformer, in fp32, with the adapter in its weights.

    Raises:
        UnsupportedMethodError: PEFT cannot merge the method into this model.
        StateMismatchError: it gives other hidden states than before.
    """
    config, kind = embeddings.adapter_config, type(embeddings.base_model).__name__
    embeddings.float().eval()
    ids = vector_probe.probe_ids(embeddings)
    expected = _hidden_states(embeddings.model, ids)
    try:
        with full_precision(embeddings.model.device.type):
            merged = embeddings.model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise UnsupportedMethodError(
            f"Cannot merge {methods.describe(config)} into {kind}. The reason: it has no weights to merge it into, or "
            f"PEFT cannot do it ({type(error).__name__}: {str(error)[:200]}). Keep the adapter beside its base, as "
            "save_pretrained and model.save do."
        ) from error
    distance = rounding.distance(_hidden_states(merged, ids), expected)
    if not distance <= _TOLERANCE:
        raise StateMismatchError(
            f"Cannot merge {methods.describe(config)} into {kind}: the merged model's hidden states are "
            f"{distance:.2g} of their norm away from those before, and rounding explains {_TOLERANCE:g}. PEFT merges "
            "this method wrongly here. Keep the adapter beside its base."
        )
    return merged


def _hidden_states(transformer: PreTrainedModel | PeftModel, ids: list[int]) -> torch.Tensor:
    """Return all hidden states of one sentence, (layers, subtokens, hidden)."""
    device = next(transformer.parameters()).device
    batch = torch.tensor([ids], device=device)
    inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "output_hidden_states": True}
    with base_transformer.keeping_attention(transformer), torch.no_grad(), full_precision(device.type):
        output = model_call.forward(transformer, {**inputs, "return_dict": True})
    return torch.cat([*base_transformer.states_of(output)[0]]).cpu()
