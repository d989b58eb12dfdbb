"""PEFT model ⇄ adapter: inject, try, read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from flair_peft.errors import AdapterConfigError, FlairPeftError, UnsupportedMethodError, name_some

ADAPTER_NAME = "default"

# transformers builds models on the meta device, or without initialising them, by switches for the whole process: one
# thread at a time makes modules, or those of another would be empty.
building = threading.RLock()

# Methods that put rows of their own in front of the sentence's rows.
_PREPENDING = frozenset({"PROMPT_TUNING", "P_TUNING"})

# Methods that put past key values in front of the sentence, so that its positions start later.
_PREFIXING = frozenset({"PREFIX_TUNING", "CARTRIDGE"})

# Methods that decompose the base's weights when they are added and keep results that no state dict holds.
# Trained tokens keep the rows that they replace, to put them back after merging.
_DERIVED_FROM_BASE = frozenset({"ADAMSS", "FROD", "OSF", "PSOFT", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS"})

# Initialisations of LoRA that leave the base's weights as they are; all others take something out of them.
_INITS_BESIDE_BASE = frozenset({True, False, "gaussian", "eva", "orthogonal"})

# Methods whose layers take the name of an adapter for each sentence of a batch.
_MIXABLE = frozenset({"LORA", "HIRA", "ROAD", "GLORA"})

_NEEDS_TASK_IDS = "it needs a task id with every sentence, and Flair has none to give"
REFUSED_METHODS: Mapping[str, str] = {
    "CPT": "PEFT offers it for causal language models only, and Flair reads hidden states",
    "MULTITASK_PROMPT_TUNING": _NEEDS_TASK_IDS,
    "POLY": _NEEDS_TASK_IDS,
    "XLORA": "it mixes adapters that were trained before, given as paths, instead of training one",
}


_REFUSED_SETTINGS: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA switches on at a token of a prompt, and Flair has no prompts",
    "sample_at_inference": "every prediction would be drawn anew",
    "use_qalora": "it is written for GPTQ layers, and elsewhere PEFT trains plain LoRA without a word",
}
_NEEDS_DATA_FIRST = ("corda", "lora_ga")
_WANTS_DATA = "must see data before the adapter is added, and Flair's embeddings embed only afterwards"


# What PEFT raises where a method does not fit; AssertionError comes from torch without CUDA.
_INJECTION_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, re.error)


def method_name(config: PeftConfig) -> str:
    """Return PEFT's name of the method, such as ``"LORA"``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def describe(config: PeftConfig) -> str:
    """Return the method with the setting that shapes its tensors, such as ``"LORA (r=8)"``."""
    shaping = [name for name in ("r", "num_virtual_tokens") if isinstance(getattr(config, name, None), int)]
    return method_name(config) + "".join(f" ({name}={getattr(config, name)})" for name in shaping[:1])


def inject(model: PreTrainedModel, config: PeftConfig, *, is_filled_later: bool = False) -> PeftModel:
    """Add a new adapter to the model, which is changed in place, and return the PEFT model around it.

    Args:
        model: the base.
        config: of the adapter.
        is_filled_later: whether a state dict will give the adapter its values.

    Raises:
        UnsupportedMethodError: the method cannot work on this architecture.
        AdapterConfigError: the config does not fit the model, for example because its targets match no module.
    """
    refuse_unsupported(model, config)
    _refuse_reading_offloaded(model, config)
    _spell_out_layers_(model, config)
    _fill_in_sizes_(model, config)
    try:
        with building, _standing_in_for_offloaded(model):
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except _INJECTION_ERRORS as error:
        raise _explain_injection(model, config, error) from error
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise _unsupported(model, config, "it finds nothing to train in this model")
    repair_(peft_model)
    _refuse_training_offloaded(peft_model, is_filled_later=is_filled_later)
    return peft_model


@contextlib.contextmanager
def _standing_in_for_offloaded(model: PreTrainedModel) -> Iterator[None]:
    """Inside, weights that accelerate offloads have a place: PEFT puts adapters where the weights of their layer are.

    What stands in for them takes no memory, and is no number: so is whatever is computed from it.
    """
    found = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and hasattr(module, "_hf_hook")
    ]
    for module, name, parameter in found:
        device = getattr(module._hf_hook, "execution_device", None)
        fill = math.nan if parameter.is_floating_point() else 0
        place = torch.full((1,), fill, dtype=parameter.dtype, device="cpu" if device is None else device)
        module._parameters[name] = torch.nn.Parameter(place.expand(parameter.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in found:
            parameter.requires_grad = module._parameters[name].requires_grad
            module._parameters[name] = parameter


def _refuse_reading_offloaded(model: PreTrainedModel, config: PeftConfig) -> None:
    """Return unless the method computes with weights that accelerate offloads."""
    reads_base = rewrites_base(config) or bool(getattr(config, "use_dora", False))
    if reads_base and any(parameter.is_meta for parameter in model.parameters()):
        raise _unsupported(model, config, "it reads weights of the base that are offloaded")


def _refuse_training_offloaded(model: PeftModel, *, is_filled_later: bool) -> None:
    """Return unless weights are trained that accelerate offloads, or what was computed from them, which is nothing."""
    trained = trainable_parameters(model)
    found = {name for name, parameter in trained.items() if parameter.is_meta}
    if getattr(model, "hf_device_map", None) and not is_filled_later:
        found |= {name for name, parameter in trained.items() if not parameter.is_meta and parameter.isnan().any()}
    if found:
        raise AdapterConfigError(
            f"Cannot train {name_some(found)}: these are weights that accelerate offloads, or start from such weights. "
            "They are not in memory to be read, and changes are not written back. Keep their modules on a device in "
            "device_map, or choose a method that leaves the base as it is, such as LoRA."
        )


def inject_skeleton(model: PreTrainedModel, config: PeftConfig, *, has_weights: bool) -> PeftModel:
    """Add an adapter whose tensors a state dict will fill, without decomposing weights, data or a tokenizer.

    The PEFT model carries ``config`` itself, with the initialisation it was trained from.

    Args:
        model: changed in place.
        config: of the adapter.
        has_weights: whether the model's weights are there already; otherwise its memory was never initialised.
    """
    if getattr(config, "kasa_config", None) and not has_weights:
        # Its decomposition does not converge on memory that was never initialised.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    _refuse_reading_offloaded(model, config)
    peft_model = inject(model, without_costly_init(config), is_filled_later=True)
    completed = peft_model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = completed.base_model_name_or_path
    for field in dataclasses.fields(config):
        # Sizes and default targets: files of ours hold them, the config that a user gives may not.
        if getattr(config, field.name, None) is None:
            setattr(config, field.name, getattr(completed, field.name, None))
    peft_model.peft_config[ADAPTER_NAME] = config
    return peft_model


def is_derived_from_base(config: PeftConfig) -> bool:
    """Whether the method keeps results computed from the base's weights, so that these must be there before it."""
    trains_tokens = bool(getattr(config, "trainable_token_indices", None))
    return method_name(config) in _DERIVED_FROM_BASE or trains_tokens


def rewrites_base(config: PeftConfig) -> bool:
    """Whether adding the adapter, or filling it, may change frozen weights of the base."""
    init = getattr(config, "init_lora_weights", True)
    return (
        init not in _INITS_BESIDE_BASE
        or bool(getattr(config, "kasa_config", None))
        or bool(getattr(config, "layer_replication", None))
        or is_derived_from_base(config)
    )


def protect_(model: PeftModel, before_merge: Callable[[], None]) -> None:
    """Have ``before_merge`` called before PEFT merges the adapter into the base's weights, which it does in place."""
    tuner = model.base_model
    for name in ("merge_adapter", "_unload_and_optionally_merge"):
        if hasattr(type(tuner), name):
            setattr(tuner, name, functools.partial(_merge_apart, tuner, name, before_merge))


def _merge_apart(tuner: torch.nn.Module, name: str, before_merge: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    before_merge()
    return getattr(type(tuner), name)(tuner, *args, **kwargs)


def refuse_unstorable(model: PeftModel, layers: Sequence[BaseTunerLayer] | None = None) -> None:
    """Return if a file that holds the adapter and not the base would give the model back as it is now.

    Args:
        model: with its adapter.
        layers: those of the adapter, if they were looked up already.

    Raises:
        AdapterConfigError: the adapter is merged or switched off, or there are several.
    """
    if layers is None:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = sorted(set(model.peft_config) - {ADAPTER_NAME})
    if ADAPTER_NAME not in model.peft_config:
        raise AdapterConfigError(
            f"Cannot store the adapter: it is called {name_some(others) or 'nothing'}, and files hold the one called "
            f"'{ADAPTER_NAME}', which was deleted. Make embeddings with the adapter that you want to store."
        )
    if others:
        reason, remedy = f"is one of several, beside {name_some(others)}, and files hold one", "delete_adapter(name)"
    elif any(layer.merged for layer in layers):
        reason, remedy = "is merged into the base, onto which a load would add it once more", "unmerge_adapter()"
    elif model._adapters_disabled or any(layer.disable_adapters for layer in layers):
        reason, remedy = "is switched off, and a load would switch it on", "leave disable_adapter() first"
    else:
        return
    raise AdapterConfigError(
        f"Cannot store the {describe(model.peft_config[ADAPTER_NAME])} adapter as it is: it {reason}. The model would "
        f"predict something else after loading. Undo that on embeddings.model, here by {remedy}."
    )


def derived_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return name → tensor of what the method computed from the base's weights and no state dict holds.

    A decomposition computed again on another machine may have other signs or another order.
    """
    stored = model.state_dict().keys()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, BufferDict):
            state.update({f"{name}.{key}": tensor for key, tensor in module.items() if f"{name}.{key}" not in stored})
        index = getattr(module, "scatter_index", None)
        if isinstance(index, dict) and ADAPTER_NAME in index:
            state[f"{name}.scatter_index.{ADAPTER_NAME}"] = index[ADAPTER_NAME]
    return state


def set_derived_state_(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put back, in place, what :func:`derived_state` returned."""
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        if path.endswith(".scatter_index"):
            module = model.get_submodule(path.removesuffix(".scatter_index"))
            module.scatter_index[key] = tensor.to(model.device)
        else:
            buffers = model.get_submodule(path)
            buffers[key] = tensor.to(buffers[key].device)
    repair_(model)


def repair_(model: PeftModel) -> None:
    """Make right, in place, what PEFT leaves wrong after adding an adapter; see the functions called."""
    config = model.peft_config[ADAPTER_NAME]
    if config.peft_type == PeftType.ADALORA:
        _freeze_rank_counts_(model)
    if method_name(config) == "OSF":
        _reattach_projections_(model)
    if config.is_prompt_learning:
        # PEFT freezes the children of the base, but no parameter that the base holds itself, such as XLNet's mask_emb.
        model.get_base_model().requires_grad_(False)
    if config.is_prompt_learning and not hasattr(model.base_model, "prepare_inputs_for_generation"):
        # PeftModel.disable_adapter swaps this attribute, which models without a language model head do not have.
        model.prepare_inputs_for_generation = model.base_model.prepare_inputs_for_generation = None


def refuse_unsupported(model: PreTrainedModel, config: PeftConfig) -> None:
    """Return if the method is not known to fail on this architecture.

    Raises:
        UnsupportedMethodError: it is; the message names the method, the architecture and the reason.
    """
    method = method_name(config)
    if method in REFUSED_METHODS:
        raise _unsupported(model, config, REFUSED_METHODS[method])
    for setting, reason in _REFUSED_SETTINGS.items():
        if getattr(config, setting, None):
            raise _unsupported(model, config, f"{setting}: {reason}")
    if getattr(config, "init_lora_weights", None) in _NEEDS_DATA_FIRST:
        raise _unsupported(model, config, f"init_lora_weights={config.init_lora_weights!r} {_WANTS_DATA}")
    if method in _PREPENDING and "bbox" in inspect.signature(model.forward).parameters:
        raise _unsupported(model, config, "it asks for a bounding box per row, and virtual tokens have none")
    if method in _PREFIXING and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _unsupported(model, config, "its forward takes no past key values, which carry the prefix")
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if method in _PREFIXING and places and places <= {"cpu", "disk"}:
        raise _unsupported(model, config, "PEFT puts a prefix on a GPU alone where the base is spread (peft#3619)")


def preparation(config: PeftConfig | None) -> dict[str, bool]:
    """Return what ``peft.prepare_model_for_kbit_training`` is to do unless the user says something else."""
    # transformers passes no past key values, which carry the prefix, through a checkpointed layer.
    return {"use_gradient_checkpointing": config is None or method_name(config) not in _PREFIXING}


def try_out(model: PeftModel, forward: Callable[[], tuple[torch.Tensor, ...]], *, rows: int) -> None:
    """Return if one small forward pass with the adapter gives hidden states of the right shape.

    Args:
        model: the PEFT model; only named in errors.
        forward: runs the pass and returns hidden states, each of shape (batch, rows, hidden).
        rows: the number of rows that each sentence must have.

    Raises:
        UnsupportedMethodError: it fails or gives another shape.
    """
    config = model.peft_config[ADAPTER_NAME]
    base = model.get_base_model()
    try:
        with torch.no_grad():
            hidden_states = forward()
    except FlairPeftError:
        raise
    except Exception as error:
        reason = f"its first forward pass fails with {type(error).__name__}: {str(error) or 'no message'}"
        raise _unsupported(base, config, reason) from error
    found = {states.shape[1] for states in hidden_states}
    if any(count < rows for count in found):
        raise _unsupported(base, config, f"it gives {sorted(found)} rows for a sentence of {rows} subtokens")


def virtual_rows(model: PeftModel) -> int:
    """Return how many rows of the hidden states stand in front of the sentence's own."""
    config = model.peft_config[ADAPTER_NAME]
    return virtual_tokens(config) if method_name(config) in _PREPENDING and not model._adapters_disabled else 0


def virtual_tokens(config: PeftConfig) -> int:
    """Return how many positions of the transformer the method takes from each sentence."""
    takes_positions = method_name(config) in _PREPENDING | _PREFIXING
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if takes_positions else 0


def trainable_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return name → parameter of all that the adapter trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def require_input_gradients_(model: PeftModel) -> None:
    """Make the output of the input embeddings require a gradient where gradient checkpointing needs it, in place.

    Reentrant checkpointing passes no gradient to parameters if none of its inputs requires one, and in a frozen base
    none does. PEFT does this only if checkpointing was on before the adapter was added.
    """
    base = model.get_base_model()
    if getattr(base, "is_gradient_checkpointing", False) and not getattr(base, "_require_grads_hook", None):
        base.enable_input_require_grads()


def refuse_lost_prefix(model: PeftModel) -> None:
    """Return unless transformers would drop the prefix: it passes no past key values through a checkpointed layer.

    Raises:
        UnsupportedMethodError: gradient checkpointing was switched on after a prefix was added.
    """
    config, base = model.peft_config[ADAPTER_NAME], model.get_base_model()
    if method_name(config) in _PREFIXING and getattr(base, "is_gradient_checkpointing", False):
        raise _unsupported(base, config, "gradient checkpointing drops past key values, which carry the prefix")


def without_cache(model: PeftModel) -> dict[str, bool]:
    """Return the keyword arguments that keep the base from building a cache for generation."""
    parameters = inspect.signature(model.get_base_model().forward).parameters
    return {name: False for name in ("use_cache", "use_mems") if name in parameters}


def _freeze_rank_counts_(model: PeftModel) -> None:
    """Freeze AdaLoRA's rank counts: PEFT wraps them in new trainable parameters when it casts a 16-bit adapter."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def _reattach_projections_(model: PeftModel) -> None:
    """Attach OSF's gradient projections again: casting or copying its parameters loses them.

    What they project onto is brought to the dtype of the parameters.
    """
    for layer in model.modules():
        if not hasattr(layer, "osf_svd_params"):
            continue
        dtype = layer.osf_svd_params[ADAPTER_NAME]["U_low"].dtype
        for buffers in layer.children():
            if isinstance(buffers, BufferDict) and ADAPTER_NAME in buffers:
                buffers[ADAPTER_NAME] = buffers[ADAPTER_NAME].to(dtype)
        layer._detach_hooks()
        layer._attach_hooks(ADAPTER_NAME)


def _spell_out_layers_(model: PreTrainedModel, config: PeftConfig) -> None:
    """Write ``layers_to_transform`` as a regular expression, in place, where PEFT would find no layer at all.

    PEFT looks for ``<something>.layers.0.``; the layers of a decoder loaded without its head are called ``layers.0.``.
    """
    wanted, targets = getattr(config, "layers_to_transform", None), getattr(config, "target_modules", None)
    if wanted is None or isinstance(targets, str) or not targets:
        return
    names = [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not names or any(re.match(r".*\.[^.]*\.(\d+)\.", name) for name in names):
        return
    numbers = "|".join(str(number) for number in ([wanted] if isinstance(wanted, int) else wanted))
    config.target_modules = rf"[^.]+\.(?:{numbers})\.(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(targets)))})"
    config.layers_to_transform = config.layers_pattern = None


def _fill_in_sizes_(model: PreTrainedModel, config: PeftConfig) -> None:
    """Give a prompt method the sizes that it does not find under the names that it knows, in place.

    Rows in front of the sentence are as wide as the input embeddings, which ELECTRA and ALBERT project afterwards.
    """
    sizes = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
    if method_name(config) not in _PREPENDING:
        return
    for setting, name in sizes.items():
        if getattr(config, setting, None) is None:
            setattr(config, setting, getattr(model.config, name))
    if config.token_dim is None:
        config.token_dim = model.get_input_embeddings().embedding_dim


def without_costly_init(config: PeftConfig) -> PeftConfig:
    """Return a copy whose initialisation neither reads base weights nor data; tensors have the same shapes."""
    fields = {field.name for field in dataclasses.fields(config)}
    skeleton = copy.deepcopy(config)
    skeleton.base_model_name_or_path = None  # PEFT warns of a base under another name; loads compare its weights
    if isinstance(getattr(config, "init_lora_weights", None), str):
        skeleton.init_lora_weights = True
    if config.peft_type == PeftType.ADALORA:
        skeleton.rank_pattern = {}  # says which ranks are masked, not how many there are
    if "prompt_tuning_init" in fields:
        from peft.tuners.prompt_tuning import PromptTuningInit

        skeleton.prompt_tuning_init = PromptTuningInit.RANDOM
    return skeleton


def _explain_injection(model: PreTrainedModel, config: PeftConfig, error: Exception) -> AdapterConfigError:
    targets = getattr(config, "target_modules", None)
    targets = sorted(targets) if isinstance(targets, set) else targets
    if "target" in str(error).lower() and "found" in str(error).lower():
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
        return AdapterConfigError(
            f"Cannot add a {method_name(config)} adapter to {type(model).__name__}: its target_modules {targets!r} "
            f"match no module that it can adapt. Its linear modules are called {name_some(linear, limit=12)}. "
            'Pass some of these, or target_modules="all-linear".'
        )
    other = "another method" if config.peft_type == PeftType.LORA else "another method, LoRA for example,"
    return UnsupportedMethodError(
        f"Cannot use this {method_name(config)} config on {type(model).__name__}. The reason: PEFT says: "
        f"{str(error).rstrip('.')}. Correct the config, or choose {other} or another base model."
    )


def _is_linear(module: torch.nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, torch.nn.Linear) or type(base).__name__ == "Conv1D"


def _unsupported(model: PreTrainedModel, config: PeftConfig, reason: str) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"Cannot use {method_name(config)} on {type(model).__name__}. The reason: {reason.rstrip('.')}. "
        "Choose another method, LoRA for example, or another base model."
    )


def needs_step_hook(config: PeftConfig) -> bool:
    """Whether the method must be told after each optimiser step, so that it can move its rank budget."""
    uses_asa = method_name(config) == "ADAMSS" and bool(getattr(config, "use_asa", False))
    return config.peft_type == PeftType.ADALORA or uses_asa


def depends_on_batch(config: PeftConfig) -> bool:
    """Whether the vectors of a sentence depend on the sentences that are embedded together with it."""
    return method_name(config) == "LILY"


def why_not_mixed(config: PeftConfig) -> str | None:
    """Return why sentences of this adapter cannot share a forward pass with those of others; ``None`` if they may."""
    if method_name(config) not in _MIXABLE:
        return "PEFT mixes no adapters of this method in one batch"
    reasons = {
        "bias": "it changes biases of the base",
        "use_dora": "PEFT mixes no DoRA in one batch",
        "modules_to_save": "it replaces modules of the base",
        "trainable_token_indices": "it replaces rows of the base",
        "target_parameters": "it adapts bare parameters",
    }
    found = (reason for name, reason in reasons.items() if getattr(config, name, None) not in (None, False, "none", []))
    return next(found, None)


def keeps_graph(config: PeftConfig) -> bool:
    """Whether modules of the adapter keep tensors of their last forward pass, which torch does not copy."""
    return method_name(config) == "SHADOW" or bool(getattr(config, "monteclora_config", None))
