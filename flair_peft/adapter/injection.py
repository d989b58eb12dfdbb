"""Add an adapter to a transformer, mend what PEFT leaves wrong about it, and read its parts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from flair_peft.adapter import keys, methods, refusals, traits
from flair_peft.adapter.methods import ADAPTER_NAME
from flair_peft.errors import AdapterConfigError, FlairPeftError, name_some

log = logging.getLogger("flair_peft")

traits.add_unlisted_(
    {method.value: prefix for method, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()},
    {method.value: config_class.__name__ for method, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()},
)

# transformers and PEFT build models on the meta device, without initialising them or in another default dtype, by
# switches for the whole process: one thread at a time makes modules, or those of another would be empty. It is the
# lock of all that leads there too, so that no two threads wait for each other.
building = threading.RLock()


@contextlib.contextmanager
def building_anew() -> Iterator[None]:
    """Inside, one thread at a time makes ordinary tensors; outside, it is as if no random number had been drawn.

    Weights that a source lacks are the same each time, as if they had been read: whether a base is read, or is alive
    already, shows neither in them nor in what is drawn afterwards.
    """
    with building, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


# What PEFT raises where a method does not fit; AssertionError comes from torch without CUDA.
_INJECTION_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ImportError,
    re.error,
)

_ALWAYS_GIVEN = frozenset({"attention_mask", "inputs_embeds", "output_attentions"})


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
    refusals.refuse_unsupported(model, config)
    _refuse_reading_offloaded(model, config)
    _spell_out_layers_(model, config)
    _fill_in_sizes_(model, config)
    try:
        with building, _standing_in_for_offloaded(model):
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except FlairPeftError:
        raise
    except _INJECTION_ERRORS as error:
        raise refusals.explain_injection(model, config, error) from error
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise refusals.unsupported(model, config, "it finds nothing to train in this model")
    repair_(peft_model)
    _refuse_training_offloaded(peft_model, is_filled_later=is_filled_later)
    return peft_model


@contextlib.contextmanager
def _standing_in_for_offloaded(model: PreTrainedModel) -> Iterator[None]:
    """Inside, weights that accelerate offloads have a place: PEFT puts adapters where the weights of their layer are.

    What stands in for them takes no memory, and is no number: so is whatever is computed from it.
    """
    offloaded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and hasattr(module, "_hf_hook")
    ]
    for module, name, parameter in offloaded:
        device = getattr(module._hf_hook, "execution_device", None)
        fill = math.nan if parameter.is_floating_point() else 0
        place = torch.full((1,), fill, dtype=parameter.dtype, device="cpu" if device is None else device)
        module._parameters[name] = torch.nn.Parameter(place.expand(parameter.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in offloaded:
            parameter.requires_grad = module._parameters[name].requires_grad
            module._parameters[name] = parameter


def _refuse_reading_offloaded(model: PreTrainedModel, config: PeftConfig) -> None:
    """Return unless the method computes with weights that accelerate offloads."""
    if methods.reads_base(config) and any(parameter.is_meta for parameter in model.parameters()):
        raise refusals.unsupported(model, config, "it reads weights of the base that are offloaded")


def _refuse_training_offloaded(model: PeftModel, *, is_filled_later: bool) -> None:
    """Return unless weights are trained that accelerate offloads, or what was computed from them, which is nothing."""
    trained = trainable_parameters(model)
    offloaded = {name for name, parameter in trained.items() if parameter.is_meta}
    if getattr(model, "hf_device_map", None) and not is_filled_later:
        offloaded |= {name for name, parameter in trained.items() if not parameter.is_meta and parameter.isnan().any()}
    if offloaded:
        raise AdapterConfigError(
            f"Cannot train {name_some(offloaded)}: these are weights that accelerate offloads, or start from such "
            "weights. They are not in memory to be read, and changes are not written back. Keep their modules on a "
            "device in device_map, or choose a method that leaves the base as it is, such as LoRA."
        )


def inject_skeleton(model: PreTrainedModel, config: PeftConfig, *, has_weights: bool) -> PeftModel:
    """Add an adapter whose tensors a state dict will fill, without decomposing weights, data or a tokenizer.

    The PEFT model carries ``config`` itself, with the initialisation it was trained from.

    Args:
        model: changed in place.
        config: of the adapter.
        has_weights: whether the model's weights are there already; otherwise its memory was never initialised.
    """
    if any(option.decomposes_base for option, _ in methods.options(config)) and not has_weights:
        # A decomposition does not converge on memory that was never initialised.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    _refuse_reading_offloaded(model, config)
    peft_model = inject(model, methods.without_costly_init(config), is_filled_later=True)
    completed = peft_model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = completed.base_model_name_or_path
    for field in dataclasses.fields(config):
        # Sizes and default targets: files of ours hold them, the config that a user gives may not.
        if getattr(config, field.name, None) is None:
            setattr(config, field.name, getattr(completed, field.name, None))
    peft_model.peft_config[ADAPTER_NAME] = config
    _freeze_never_trained_(peft_model)
    return peft_model


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


def derived_again(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the keys of those tensors that no file need hold, since the model computes the same itself.

    PEFT 0.11 and 0.12 stored the permutations of BOFT, which follow from its settings.
    """
    own = {keys.canonical_key(name): buffer for name, buffer in model.named_buffers() if keys.base_key(name) is None}
    namesakes = {key: own.get(keys.canonical_key(key)) for key in tensors if isinstance(tensors[key], torch.Tensor)}
    return {
        key
        for key, buffer in namesakes.items()
        if buffer is not None and torch.equal(buffer.cpu(), tensors[key].to("cpu", buffer.dtype))
    }


def repair_(model: PeftModel) -> None:
    """Make right, in place, what PEFT leaves wrong after adding an adapter; see the functions called."""
    config = model.peft_config[ADAPTER_NAME]
    _freeze_never_trained_(model)
    if methods.method_traits(config).projects_gradients:
        _reattach_projections_(model)
    if config.is_prompt_learning:
        # PEFT freezes the children of the base, but no parameter that the base holds itself, such as XLNet's mask_emb.
        model.get_base_model().requires_grad_(False)
    if config.is_prompt_learning and not hasattr(model.base_model, "prepare_inputs_for_generation"):
        # PeftModel.disable_adapter swaps this attribute, which models without a language model head do not have.
        model.prepare_inputs_for_generation = model.base_model.prepare_inputs_for_generation = None


def virtual_rows(model: PeftModel) -> int:
    """Return how many rows of the hidden states stand in front of the sentence's own."""
    config = model.peft_config[ADAPTER_NAME]
    is_in_front = methods.prepends_rows(config) and not model._adapters_disabled
    return methods.virtual_tokens(config) if is_in_front else 0


def modules_without_effect(model: PeftModel) -> list[str]:
    """Return the names of the modules whose adapter is multiplied with zero, such as by ``lora_alpha=0``."""
    unscaled = []
    for name, module in model.named_modules():
        scales = [value for key, value in vars(module).items() if key.endswith("scaling") and isinstance(value, dict)]
        if isinstance(module, BaseTunerLayer) and any(scale.get(ADAPTER_NAME) == 0 for scale in scales):
            unscaled.append(name)
    return unscaled


def report_without_effect(model: PeftModel) -> None:
    """Say which adapters are multiplied with zero, so that they change nothing and learn nothing."""
    unscaled = modules_without_effect(model)
    if unscaled:
        log.warning(
            "The adapter has no effect on %s modules, such as '%s': its scale is zero there. It changes nothing and "
            "learns nothing. Pass an alpha (or scaling) that is not zero, such as lora_alpha=32 with LoRA.",
            len(unscaled),
            unscaled[0].removeprefix("base_model.model."),
        )


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name → parameter of all that the adapter trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def widen_(model: PeftModel) -> None:
    """Give what the adapter trains the dtype that a new one on this base would have, in place: fp32 for most methods.

    ``model.half()`` and files of such models narrow it, and half precision holds neither small updates nor the squares
    of gradients that optimisers divide by. Parameters keep their identity, so that an optimiser goes on with them.
    """
    if not any(_is_narrow(parameter) for parameter in trainable_parameters(model).values()):
        return
    held = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    if hasattr(model.base_model, "_cast_adapter_dtype"):
        model.base_model._cast_adapter_dtype(ADAPTER_NAME)
    for module, name, parameter in held:
        new = module._parameters[name]
        if new is not None and new is not parameter:
            parameter.data = new.data
            module._parameters[name] = parameter
    # PEFT casts neither of these when it adds them: they are made in fp32.
    buffers = [b for layer in model.modules() if isinstance(layer, BaseTunerLayer) for b in layer._buffers.values()]
    prompts = model.prompt_encoder.parameters() if model.peft_config[ADAPTER_NAME].is_prompt_learning else ()
    for tensor in (*prompts, *buffers):
        if tensor is not None and _is_narrow(tensor):
            tensor.data = tensor.data.to(torch.float32)
    repair_(model)


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def require_input_gradients_(model: PeftModel) -> None:
    """Make the output of the input embeddings require a gradient where gradient checkpointing needs it, in place.

    Reentrant checkpointing passes no gradient to parameters if none of its inputs requires one, and in a frozen base
    none does. PEFT does this only if checkpointing was on before the adapter was added.
    """
    base = model.get_base_model()
    if getattr(base, "is_gradient_checkpointing", False) and not getattr(base, "_require_grads_hook", None):
        base.enable_input_require_grads()


def forward(model: PreTrainedModel | PeftModel, inputs: Mapping[str, Any]) -> Any:
    """Return the output of the model, with its adapter if it has one.

    PEFT's model for feature extraction gives every base some arguments that not all take, such as FNet and CLIP: these
    get what they take, and what PEFT's plain model gives them. Rows of a prompt need the former.
    """
    has_adapter = isinstance(model, PeftModel)
    parameters = _parameters_of(model.get_base_model() if has_adapter else model)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    is_prompt = has_adapter and model.peft_config[ADAPTER_NAME].is_prompt_learning
    if takes_any or parameters.keys() >= _ALWAYS_GIVEN or is_prompt:
        return model(**inputs)
    known = {name: value for name, value in inputs.items() if name in parameters}
    return PeftModel.forward(model, **known) if has_adapter else model(**known)


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the keyword arguments that keep the base from building a cache for generation."""
    return {name: False for name in ("use_cache", "use_mems") if name in _parameters_of(model)}


def _parameters_of(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """Return what the forward method takes; that of a class is read once: it takes as long as 20 modules."""
    is_own = "forward" in vars(model)
    return inspect.signature(model.forward).parameters if is_own else _parameters_of_method(type(model).forward)


@functools.lru_cache(maxsize=64)
def _parameters_of_method(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(method).parameters


def _freeze_never_trained_(model: PeftModel) -> None:
    """Freeze, in place, what the method never trains, and PEFT may have left trainable."""
    every = methods.all_traits(model.peft_config[ADAPTER_NAME])
    containers = {container for each in every for container in each.never_trained}
    for name, parameter in model.named_parameters() if containers else ():
        if not containers.isdisjoint(name.split(".")):
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
    if not methods.prepends_rows(config):
        return
    for setting, name in sizes.items():
        if getattr(config, setting, None) is None:
            setattr(config, setting, getattr(model.config, name))
    if config.token_dim is None:
        config.token_dim = model.get_input_embeddings().embedding_dim
