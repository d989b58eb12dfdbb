"""The transformer of a base: read its config and its weights, build it without weights, say what it computes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_offline_mode

from flair_peft.base import config_safety, config_versions
from flair_peft.base.unusable import UNUSABLE, not_found
from flair_peft.errors import AdapterConfigError, BaseModelNotFoundError, FlairPeftError, UnknownArgumentError
from flair_peft.primitives import building, host_internals, progress
from flair_peft.primitives.dtypes import DtypeLike

_COMMIT = re.compile("[0-9a-f]{40}")

KeywordArguments = Mapping[str, Any]

# Of these the encoder is read; AutoModel would ask for decoder inputs. Each is the name of a class of transformers.
ENCODER_OF_T5: Mapping[str, str] = {
    "t5": "T5EncoderModel",
    "mt5": "T5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
}


def find_config(source: str, kwargs: KeywordArguments) -> PretrainedConfig:
    """Return the config of the base model in a directory or on the Hub, set to give all hidden states.

    Raises:
        BaseModelNotFoundError: there is none, or only a newer transformers computes what it says.
    """
    try:
        config = _of_encoder(_read_config(source, {"output_hidden_states": True, **with_answer(kwargs)}))
    except BaseModelNotFoundError:
        raise
    except UNUSABLE as error:
        raise not_found(source, error) from error
    return config_safety.sanitise_(config, kwargs)


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


def names_of_input_embeddings(model: PreTrainedModel) -> frozenset[str]:
    """Return the names under which state dicts hold the input embeddings: several where weights are tied."""
    matrix = model.get_input_embeddings().weight
    return frozenset(name for name, each in model.named_parameters(remove_duplicate=False) if each is matrix)


def _read_config(source: str, kwargs: KeywordArguments) -> PretrainedConfig:
    described, settings = PretrainedConfig.get_config_dict(source, **kwargs)
    config_safety.refuse_many(described, source)
    runs_code = kwargs.get("trust_remote_code") and "AutoConfig" in (described.get("auto_map") or {})
    if not runs_code:
        described = config_versions.in_own_words(described, source)
    if runs_code or described.get("model_type") not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(source, **kwargs)
    settings = {"attn_implementation": config_versions.attention_of(described), **settings, "name_or_path": source}
    settings.pop("code_revision", None)
    return CONFIG_MAPPING[described["model_type"]].from_dict(described, **settings)


@progress.shown("reading the base")
def find_model(
    source: str, config: PretrainedConfig, *, dtype: DtypeLike | None, kwargs: KeywordArguments
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return the base model in evaluation mode and the names of its weights that the source lacks: these are random.

    It stands on the CPU unless ``kwargs`` place it elsewhere; weights that keep their dtype are mapped from the file.
    With ``dtype=None`` transformers has its default, with ``"auto"`` that of the file.

    Raises:
        BaseModelNotFoundError: there are no such weights, or none of this shape.
        UnknownArgumentError: one of the keyword arguments is none of transformers'.
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
        # It would warn of weights that nobody reads; what is lacking is told apart below.
        with building.anew(), host_internals.errors_of_transformers_alone():
            model, found = model_class.from_pretrained(
                source, config=config, output_loading_info=True, **wanted, **with_answer(kwargs)
            )
    except FlairPeftError:
        raise
    except UNUSABLE as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is not None and unknown[1] in kwargs:
            raise UnknownArgumentError(
                f"Cannot use the argument '{unknown[1]}': neither the embeddings nor {model_class.__name__} know it. "
                "What embeddings do not know is handed on to transformers. Check its spelling."
            ) from error
        # An AttributeError is how transformers fails where the cache has no weights and it may not download them.
        is_unread = isinstance(error, AttributeError) and (kwargs.get("local_files_only") or is_offline_mode())
        is_missing = is_unread and not Path(source).is_dir()
        raise not_found(source, FileNotFoundError("no weights") if is_missing else error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _has_adapter_beside(source)
    _check_reads_ids(model, source)
    if dtype is not None and not getattr(model, "quantization_method", None):
        convert_(model, model.get_input_embeddings().weight.dtype)
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
    with building.anew(), no_init_weights():
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
    with torch.inference_mode(False), torch.enable_grad(), keeping_attention(model):
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            output = model(ids, output_hidden_states=True, return_dict=True)
        except Exception:  # some ask for more than ids
            return None
    last = [] if model.config.is_encoder_decoder else [output[0]]
    reached = reached_parameters([*states_of(output)[0], *last])
    return frozenset(name.partition(".")[0] for name, each in model.named_parameters() if id(each) in reached)


def reached_parameters(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return ``id`` of each parameter that a gradient of the tensors would reach; none is computed."""
    waiting, seen = [tensor.grad_fn for tensor in tensors], set[Any]()
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            waiting.extend(before for before, _ in step.next_functions)
    return {id(step.variable) for step in seen if hasattr(step, "variable")}


def states_of(output: Mapping[str, Any]) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """Return all hidden states, and the one that the transformer, or its encoder, returns as its last."""
    states, last = output.get("hidden_states"), output.get("last_hidden_state")
    if states is None:
        states, last = output["encoder_hidden_states"], output.get("encoder_last_hidden_state")
    return states, states[-1] if last is None else last


def has_unread_layers(model: PreTrainedModel) -> bool:
    """Whether the model has linear layers that learn nothing: a pooler, or LayoutLM's biases, read without gradient."""
    has_bias = any(name.endswith("rel_pos_bias") for name, _ in model.named_modules())
    return getattr(model, "pooler", None) is not None or has_bias


def takes_mask(model: PreTrainedModel) -> bool:
    """Whether padding can be masked; FNet mixes all positions of a batch."""
    parameters = inspect.signature(model.forward).parameters
    return "attention_mask" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def is_sparse(model: torch.nn.Module) -> bool:
    """Whether it attends to blocks of tokens, as BigBird does until a short text makes it attend to all for good."""
    return vars(model).get("attention_type") == "block_sparse"  # what is wrapped around it has the attribute, too


@contextlib.contextmanager
def keeping_attention(model: torch.nn.Module) -> Iterator[None]:
    """Outside, transformers in the model attend to what they attended to before, whatever texts were embedded."""
    sparse = [(each, dict(each._modules)) for each in model.modules() if is_sparse(each)]
    if not sparse:
        yield
        return
    # Each layer makes another attention with random weights, and puts those that it has in their place.
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, parts in sparse:
                vars(module)["attention_type"] = "block_sparse"
                module._modules.update(parts)


def has_transposed_weights(model: PreTrainedModel) -> bool:
    """Whether the linear layers are transformers' ``Conv1D``, whose weights have the shape (in, out)."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def convert_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the weights a dtype, in place, but for those that transformers reads in fp32 then.

    It leaves some itself: XLNet creates its attention as explicit FloatTensors, and its first matrix product fails.
    """
    kept = names_kept_in_fp32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in kept:
            parameter.data = parameter.data.to(dtype)


def names_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of the weights that transformers reads in fp32 where it is asked for another dtype."""
    in_half = (torch.float16, torch.bfloat16)
    kept = {*(model._keep_in_fp32_modules_strict or ())} if dtype in in_half else set()
    kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    return frozenset(name for name in model.state_dict() if not kept.isdisjoint(name.split(".")))
