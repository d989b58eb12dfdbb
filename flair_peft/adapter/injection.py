"""Add an adapter to a transformer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import PreTrainedModel

from flair_peft.adapter import mending, methods, refusals, trainable, traits
from flair_peft.adapter.methods import ADAPTER_NAME
from flair_peft.errors import OF_LIBRARIES, AdapterConfigError, FlairPeftError, name_some
from flair_peft.primitives import building

traits.add_unlisted_(
    {method.value: prefix for method, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()},
    {method.value: config_class.__name__ for method, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()},
)


def inject(model: PreTrainedModel, config: PeftConfig, *, is_filled_later: bool = False) -> PeftModel:
    """Add a new adapter to the model, which is changed in place, and return the PEFT model around it.

    ``is_filled_later``: a state dict will give the adapter its values.

    Raises:
        UnsupportedMethodError: the method cannot work on this architecture.
        AdapterConfigError: the config does not fit the model, for example because its targets match no module.
    """
    refusals.refuse_unsupported(model, config)
    _refuse_reading_offloaded(model, config)
    _spell_out_layers_(model, config)
    _fill_in_sizes_(model, config)
    try:
        with building.lock, _standing_in_for_offloaded(model):
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except FlairPeftError:
        raise
    except (*OF_LIBRARIES, re.error) as error:  # AssertionError comes from torch without CUDA
        raise refusals.explain_injection(model, config, error) from error
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise refusals.unsupported(model, config, "it finds nothing to train in this model")
    mending.repair_(peft_model)
    _refuse_training_offloaded(peft_model, is_filled_later=is_filled_later)
    return peft_model


def inject_skeleton(model: PreTrainedModel, config: PeftConfig, *, has_weights: bool) -> PeftModel:
    """Add an adapter whose tensors a state dict will fill, without decomposing weights, data or a tokenizer.

    The PEFT model carries ``config`` itself, with the initialisation it was trained from. Without ``has_weights`` the
    model, which is changed in place, is of memory that was never initialised.
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
    mending.freeze_never_trained_(peft_model)
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
    trained = trainable.parameters(model)
    offloaded = {name for name, parameter in trained.items() if parameter.is_meta}
    if getattr(model, "hf_device_map", None) and not is_filled_later:
        offloaded |= {name for name, parameter in trained.items() if not parameter.is_meta and parameter.isnan().any()}
    if offloaded:
        raise AdapterConfigError(
            f"Cannot train {name_some(offloaded)}: these are weights that accelerate offloads, or start from such "
            "weights. They are not in memory to be read, and changes are not written back. Keep their modules on a "
            "device in device_map, or choose a method that leaves the base as it is, such as LoRA."
        )


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
            # PEFT asks every prompt for both, and some bases have no heads, or name them for their encoder apart.
            setattr(config, setting, getattr(model.config, name, 1))
    if config.token_dim is None:
        config.token_dim = model.get_input_embeddings().embedding_dim
