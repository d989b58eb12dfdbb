"""The frozen transformer: find it, build it, look at it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import _add_variant, load_state_dict, no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_offline_mode,
)

from flair_peft.adapter import injection
from flair_peft.base import config_versions
from flair_peft.errors import AdapterConfigError, BaseModelNotFoundError, FlairPeftError, UnsafeFileError
from flair_peft.primitives.dtypes import DtypeLike

_COMMIT = re.compile("[0-9a-f]{40}")

# What transformers writes out one by one when it reads a config.
_COUNTED = re.compile(r"(layers?|labels|blocks|groups|experts)$")
_MANY = 1_000_000

# How a file of a base is reached.
REACHING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

log = logging.getLogger("flair_peft")

KeywordArguments = Mapping[str, Any]

# Of these the encoder is read; AutoModel would ask for decoder inputs. Each is the name of a class of transformers.
ENCODER_OF_T5: Mapping[str, str] = {
    "t5": "T5EncoderModel",
    "mt5": "T5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
}

# What transformers raises for files that it cannot make a model of.
UNUSABLE = (
    OSError,
    HFValidationError,
    ArithmeticError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ImportError,
    SafetensorError,
)


def find_config(source: str, kwargs: KeywordArguments) -> PretrainedConfig:
    """Return the config of the base model, set to give all hidden states.

    Args:
        source: a directory or a Hub id.
        kwargs: for ``AutoConfig.from_pretrained``.

    Raises:
        BaseModelNotFoundError: there is none, or only a newer transformers computes what it says.
    """
    try:
        config = _of_encoder(_read_config(source, {"output_hidden_states": True, **with_answer(kwargs)}))
    except BaseModelNotFoundError:
        raise
    except UNUSABLE as error:
        raise not_found(source, error) from error
    return tame_(config, kwargs)


def refuse_endless(source: str, kwargs: KeywordArguments) -> None:
    """Return if a config counts nothing that transformers would write out when it reads the config, for ever.

    Raises:
        BaseModelNotFoundError: it counts as many layers or labels as no model has.
    """
    reaching = {name: kwargs[name] for name in REACHING if kwargs.get(name) is not None}
    try:
        settings, _ = PretrainedConfig.get_config_dict(source, **reaching)
    except UNUSABLE:
        return  # who reads it says what is wrong with it
    refuse_many(settings, source)


def refuse_many(settings: Any, source: str) -> None:
    """Return if a config, as plain values, counts no more layers or labels than a model can have."""
    for name, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
        if isinstance(value, int) and value > _MANY and _COUNTED.search(str(name)):
            raise BaseModelNotFoundError(
                f"Cannot use the base model '{source}': its config asks for {value:,} {name}. No model has so many, "
                "and writing them out would not end. Correct the config, or pass another base model."
            )
        if isinstance(value, Mapping | list):
            refuse_many(value, source)


def with_answer(kwargs: KeywordArguments) -> dict[str, Any]:
    """Return the arguments with a word on code of the model's own: without it, transformers asks on standard input."""
    return {**kwargs, "trust_remote_code": bool(kwargs.get("trust_remote_code"))}


def _of_encoder(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config, changed in place where an encoder has one of its own in it, as that encoder wants it."""
    encoder = getattr(config, "encoder", None)
    if config.model_type in ENCODER_OF_T5 and isinstance(encoder, PretrainedConfig):
        config.is_encoder_decoder, config.hidden_size = False, encoder.hidden_size
        config.num_hidden_layers = encoder.num_hidden_layers
    return config


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that holds the size of the vocabulary, for a model that reads text and more."""
    return config if hasattr(config, "vocab_size") else config.get_text_config()


def find_file(source: str, name: str, kwargs: KeywordArguments) -> Path | None:
    """Return a file of a directory or of a Hub id, downloaded if need be; ``None`` if there is none.

    Args:
        source: the directory or Hub id.
        name: of the file.
        kwargs: for ``from_pretrained``, of which those are used that say how a file is reached.
    """
    reaching = {key: kwargs[key] for key in REACHING if kwargs.get(key) is not None}
    kinds = ("missing_entries", "gated_repo", "connection_errors")
    settings = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    found = cached_file(source, name, **reaching, **settings)
    return None if found is None else Path(found)


def _read_config(source: str, kwargs: KeywordArguments) -> PretrainedConfig:
    described, settings = PretrainedConfig.get_config_dict(source, **kwargs)
    refuse_many(described, source)
    runs_code = kwargs.get("trust_remote_code") and "AutoConfig" in (described.get("auto_map") or {})
    if not runs_code:
        described = config_versions.in_own_words(described, source)
    if runs_code or described.get("model_type") not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(source, **kwargs)
    settings = {"attn_implementation": config_versions.attention_of(described), **settings, "name_or_path": source}
    settings.pop("code_revision", None)
    return CONFIG_MAPPING[described["model_type"]].from_dict(described, **settings)


def find_model(
    source: str, config: PretrainedConfig, *, dtype: DtypeLike | None, kwargs: KeywordArguments
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return the base model in evaluation mode and the names of its weights that the source lacks: these are random.

    It stands on the CPU unless ``kwargs`` place it elsewhere; weights that keep their dtype are mapped from the file.

    Args:
        source: a directory or a Hub id.
        config: shape and settings of the model.
        dtype: of the weights; ``None`` leaves transformers its default, ``"auto"`` keeps that of the file.
        kwargs: for ``AutoModel.from_pretrained``.

    Raises:
        BaseModelNotFoundError: there are no such weights, or none of this shape.
    """
    wanted: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if _is_pinned(source, kwargs):
        # What a commit holds never changes: where the cache has it, the Hub is not asked.
        with contextlib.suppress(BaseModelNotFoundError):
            return find_model(source, copy.deepcopy(config), dtype=dtype, kwargs={**kwargs, "local_files_only": True})
    if Path(source, kwargs.get("subfolder") or "", "adapter_config.json").is_file():
        raise _has_adapter_beside(source)
    model_class = _model_class(config, kwargs)
    if getattr(model_class, "base_model_prefix", None) == "" and not config.sub_configs:
        wanted["key_mapping"] = {r"^model\.": ""}  # Gemma 3 does not say what its weights are called below a head
    try:
        with injection.building_anew():
            model, found = model_class.from_pretrained(
                source, config=config, output_loading_info=True, **wanted, **with_answer(kwargs)
            )
    except FlairPeftError:
        raise
    except UNUSABLE as error:
        # An AttributeError is how transformers fails where the cache has no weights and it may not download them.
        is_unread = isinstance(error, AttributeError) and (kwargs.get("local_files_only") or is_offline_mode())
        is_missing = is_unread and not Path(source).is_dir()
        raise not_found(source, FileNotFoundError("no weights") if is_missing else error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _has_adapter_beside(source)
    _check_reads_ids(model, source)
    if dtype is not None and not getattr(model, "quantization_method", None):
        _cast_left_overs_(model)
    if set(map(str, getattr(model, "hf_device_map", {}).values())) == {"cpu"}:
        # It says nothing, and PEFT looks for a GPU in it to put a prefix there (peft#3619).
        del model.hf_device_map
    # Of another shape than in the file, where the user lets that pass, they are as random as those that it lacks.
    return model.eval(), frozenset([*found["missing_keys"], *found["mismatched_keys"]])


def _check_reads_ids(model: PreTrainedModel, source: str) -> None:
    try:
        is_matrix = model.get_input_embeddings().weight.dim() == 2
    except (AttributeError, NotImplementedError):
        is_matrix = False
    if not is_matrix:
        raise AdapterConfigError(
            f"Cannot use '{source}' as a base model: {type(model).__name__} has no matrix of input embeddings. Flair "
            "gives a transformer the ids of subtokens, and this one reads something else. Pass a model for text."
        )
    if not hasattr(model.config, "hidden_size"):
        raise AdapterConfigError(
            f"Cannot use '{source}' as a base model: {type(model).__name__} is several models in one, and its config "
            "has no hidden_size. Flair embeds with one transformer for text. Pass that alone: save it, such as "
            "model.language_model, in a directory of its own, with the tokenizer."
        )


def _has_adapter_beside(source: str) -> AdapterConfigError:
    return AdapterConfigError(
        f"Cannot use '{source}' as a base model: an adapter lies beside its weights, and transformers adds it to "
        "them without a word. A second one on top would be trained on something else than the base. Pass the base "
        "model alone."
    )


def _is_pinned(source: str, kwargs: KeywordArguments) -> bool:
    """Whether the base is a commit on the Hub that may be downloaded."""
    is_commit = _COMMIT.fullmatch(str(kwargs.get("revision"))) is not None
    return is_commit and not Path(source).is_dir() and not kwargs.get("local_files_only")


def _model_class(config: PretrainedConfig, kwargs: KeywordArguments) -> Any:
    if config.model_type in ENCODER_OF_T5:
        return getattr(transformers, ENCODER_OF_T5[config.model_type])
    # AutoModel looks for an adapter beside the weights, and asks the Hub for it even with local_files_only.
    found = None if kwargs.get("trust_remote_code") else MODEL_MAPPING.get(type(config), None)
    return found if getattr(found, "config_class", None) is type(config) else AutoModel


def build_model(
    config: PretrainedConfig, *, dtype: DtypeLike | None, model_kwargs: KeywordArguments
) -> PreTrainedModel:
    """Return a model of this shape whose weights are not initialised: a state dict must fill every one of them.

    Buffers that are not stored, such as rotary frequencies, hold their values.
    """
    wanted = {**model_kwargs} if dtype in (None, "auto") else {"dtype": dtype, **model_kwargs}
    with injection.building_anew(), no_init_weights():
        if config.model_type in ENCODER_OF_T5:
            model = _model_class(config, model_kwargs)._from_config(config, **wanted)
        else:
            model = AutoModel.from_config(config, **with_answer(wanted))
    model.tie_weights()
    return model.eval()


def read_parts(model: PreTrainedModel) -> frozenset[str] | None:
    """Return the names of those parts of a model that its vectors depend on; ``None`` if that cannot be told.

    A part is what the model holds itself, such as ``"embeddings"``. What images would reach is not asked.
    """
    if "pixel_values" in inspect.signature(model.forward).parameters:
        return None
    with torch.inference_mode(False), torch.enable_grad():
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            output = model(ids, output_hidden_states=True, return_dict=True)
        except Exception:  # some ask for more than ids
            return None
    last = [] if model.config.is_encoder_decoder else [output[0]]
    reached = _leaves([*states_of(output)[0], *last])
    return frozenset(name.partition(".")[0] for name, each in model.named_parameters() if id(each) in reached)


def _leaves(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return ``id`` of each parameter that a gradient of the tensors would reach; none is computed."""
    waiting, seen = [tensor.grad_fn for tensor in tensors], set[Any]()
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            waiting.extend(before for before, _ in step.next_functions)
    return {id(step.variable) for step in seen if hasattr(step, "variable")}


def states_of(output: Mapping[str, Any]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return all hidden states, and the one that the transformer, or its encoder, returns as its last."""
    states, last = output.get("hidden_states"), output.get("last_hidden_state")
    if states is None:
        states, last = output["encoder_hidden_states"], output.get("encoder_last_hidden_state")
    return tuple(states), states[-1] if last is None else last


def names_in_file(source: str, kwargs: KeywordArguments) -> list[str]:
    """Return the names of the weights in the files of a base, as they are spelt there; none if they cannot be read."""
    variant = kwargs.get("variant")
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        with contextlib.suppress(Exception):
            path = find_file(source, _add_variant(name, variant), kwargs)
            if path is not None and path.suffix == ".json":
                return sorted(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            if path is not None:
                return sorted(load_state_dict(str(path), map_location="meta"))
    return []


def has_unread_layers(model: PreTrainedModel) -> bool:
    """Whether the model has linear layers that learn nothing: a pooler, or LayoutLM's biases, read without gradient."""
    has_bias = any(name.endswith("rel_pos_bias") for name, _ in model.named_modules())
    return getattr(model, "pooler", None) is not None or has_bias


def takes_mask(model: PreTrainedModel) -> bool:
    """Whether padding can be masked; FNet mixes all positions of a batch."""
    parameters = inspect.signature(model.forward).parameters
    return "attention_mask" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def has_transposed_weights(model: PreTrainedModel) -> bool:
    """Whether the linear layers are transformers' ``Conv1D``, whose weights have the shape (in, out)."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def tame_(config: PretrainedConfig, kwargs: KeywordArguments | None = None) -> PretrainedConfig:
    """Return the config; it and those inside it have nothing fetched and run, unless the user asked for that.

    A config can name a kernel as its attention (CVE-2026-4372), and code or another model inside it.

    Args:
        config: from a file; modified in place.
        kwargs: that the user gave for it.

    Raises:
        UnsafeFileError: it has another model fetched as a part of it.
    """
    kwargs = kwargs or {}
    asked = set(_attention_in(kwargs))
    for place, part in enumerate(_parts(config)):
        settings = vars(part) if isinstance(part, PretrainedConfig) else part
        if not kwargs.get("trust_remote_code"):
            _refuse_other_model(settings, config)
            if place:
                settings.pop("auto_map", None)  # of the whole model, the classes of transformers ask what the user says
        for name in filter(names_attention, list(settings)):
            if not asked.issuperset(_texts(settings[name])) and available_attention(settings[name]) is None:
                settings[name] = None
    return config


def _parts(value: Any) -> Iterator[Any]:
    """Yield the configs and dictionaries of which a config consists, itself first."""
    settings = vars(value) if isinstance(value, PretrainedConfig) else value
    if isinstance(settings, dict):
        yield value
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list | tuple) else ()
    for part in inner:
        yield from _parts(part)


def _refuse_other_model(settings: Mapping[Any, Any], config: PretrainedConfig) -> None:
    if isinstance(settings.get("backbone"), str):
        raise UnsafeFileError(
            f"Cannot use the config of '{config.name_or_path}': it names another model, '{settings['backbone']}', as "
            "its backbone. transformers would fetch that from the Hub, and ask whether its code may run. Use a base "
            "model that has no such part, or pass trust_remote_code=True if you trust both."
        )


def _attention_in(kwargs: Any) -> Iterator[str]:
    """Yield what arguments of the user name as attention, wherever in them."""
    for name, value in kwargs.items() if isinstance(kwargs, Mapping) else ():
        yield from _texts(value) if names_attention(name) else _attention_in(value)


def _texts(value: Any) -> Iterator[str]:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in [value, *parts]:
        if isinstance(part, str):
            yield part


def names_attention(name: Any) -> bool:
    """Whether a setting of a transformer's config says how attention is computed."""
    return "attn_implementation" in str(name)


def is_fetched(attention: Any) -> bool:
    """Whether transformers would fetch code for an attention, or for one of several.

    It calls kernels on the Hub "owner/kernel", and takes one for FlashAttention where that is not installed.
    """
    return any("/" in text or _lacks_library(text) for text in _texts(attention))


def _lacks_library(attention: str) -> bool:
    is_here = is_flash_attn_3_available() if attention.endswith("3") else is_flash_attn_2_available()
    return attention.startswith("flash_attention") and not is_here


def available_attention(implementation: Any) -> Any:
    """Return the attention implementation, or ``None`` for the default where it is not part of transformers here."""
    if is_fetched(implementation):
        log.warning("The attention '%s' is not here: the default is used, which rounds differently.", implementation)
        return None
    return implementation


def _cast_left_overs_(model: PreTrainedModel) -> None:
    """Cast parameters that transformers left in fp32 although it was asked for another dtype, in place.

    XLNet creates its attention as explicit FloatTensors, so its first matrix product fails in half precision.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        is_kept = not kept.isdisjoint(name.split("."))
        if parameter.is_floating_point() and parameter.dtype != dtype and not is_kept:
            parameter.data = parameter.data.to(dtype)


def names_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of the weights that transformers reads in fp32 where it is asked for another dtype."""
    in_half = (torch.float16, torch.bfloat16)
    kept = {*(model._keep_in_fp32_modules_strict or ())} if dtype in in_half else set()
    kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    return frozenset(name for name in model.state_dict() if not kept.isdisjoint(name.split(".")))


def first_line(error: Exception) -> str:
    """Return what an error of another library says, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 240, placeholder=" …").rstrip(".:") if lines else "no reason given"


def not_found(source: str, error: Exception) -> BaseModelNotFoundError:
    """Return the error that says why there is no base model, or no complete one, at the source."""
    if "trust_remote_code=True" in str(error):
        return BaseModelNotFoundError(
            f"Cannot load the base model '{source}': it comes with code of its own, which would run on this machine. "
            "No file may switch that on. If you trust that code, pass trust_remote_code=True."
        )
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("config.json")) and not any(folder.glob("*/config.json")):
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{source}': there is no config.json in it. It is not a transformers model"
            f"{'' if any(folder.iterdir()) else ', but an empty folder'}. Pass a directory that holds config.json, the "
            "weights and the tokenizer."
        )
    if folder.is_dir() or not isinstance(error, OSError | HFValidationError):
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{source}': {type(error).__name__}: {first_line(error)}. It is not a "
            "complete model, or none that the installed transformers can build. Pass a directory that holds "
            "config.json, the weights and the tokenizer, or install the version that wrote it."
        )
    return BaseModelNotFoundError(
        f"Cannot find the base model '{source}'. It is neither a directory with a transformers model nor in the local "
        "cache, and it could not be downloaded. Check the name, or pass the path of a directory that holds "
        "config.json, the weights and the tokenizer."
    )
