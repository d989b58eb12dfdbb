"""Make right, in place, what PEFT, a cast or a copy leaves wrong about a model with an adapter."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.adapter import methods, trainable
from flair_peft.adapter.methods import ADAPTER_NAME


def repair_(model: PeftModel) -> None:
    """Make right, in place, what PEFT leaves wrong after adding an adapter; see the functions called."""
    config = model.peft_config[ADAPTER_NAME]
    freeze_never_trained_(model)
    keep_projections_(model)
    if methods.method_traits(config).projects_gradients:
        _reattach_projections_(model)
    if config.is_prompt_learning:
        # PEFT freezes the children of the base, but no parameter that the base holds itself, such as XLNet's mask_emb.
        model.get_base_model().requires_grad_(False)
    if config.is_prompt_learning and not hasattr(model.base_model, "prepare_inputs_for_generation"):
        # PeftModel.disable_adapter swaps this attribute, which models without a language model head do not have.
        model.prepare_inputs_for_generation = model.base_model.prepare_inputs_for_generation = None


def freeze_never_trained_(model: PeftModel) -> None:
    """Freeze, in place, what the method never trains, and PEFT may have left trainable."""
    every = methods.all_traits(model.peft_config[ADAPTER_NAME])
    containers = {container for each in every for container in each.never_trained}
    for name, parameter in model.named_parameters() if containers else ():
        if not containers.isdisjoint(name.split(".")):
            parameter.requires_grad_(False)


def keep_projections_(model: PeftModel) -> None:
    """Let VeLoRA layers that were filled keep their projection where it is drawn from the first batch alone.

    Whether they have one already stands beside it, in no state dict, and PEFT would draw another.
    """
    for layer in model.modules():
        drawn: dict[str, bool] = vars(layer).get("lora_velora_initialized", {})
        for name in drawn:
            drawn[name] = drawn[name] or bool(layer.lora_velora_embed[name].any())


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


def widen_(model: PeftModel) -> None:
    """Give what the adapter trains the dtype that a new one on this base would have, in place: fp32 for most methods.

    ``model.half()`` and files of such models narrow it, and half precision holds neither small updates nor the squares
    of gradients that optimisers divide by. Parameters keep their identity, so that an optimiser goes on with them.
    """
    if not any(_is_narrow(parameter) for parameter in trainable.parameters(model).values()):
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
