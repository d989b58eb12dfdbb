"""What the tensors of an adapter say, by names and shapes, of the config that they were trained with.

Rank, targets, method and the like show; what only scales or trains (alpha, rsLoRA, dropout) does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flair_peft.adapter import keys
from flair_peft.adapter.peft_methods import peft_methods

if TYPE_CHECKING:
    from peft import PeftConfig

Shapes = Mapping[str, tuple[int, ...]]

_OPEN = "…"


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor that PEFT added.

    Attributes:
        module: path of the module of the base that it belongs to; "" for prompts.
        container: name that PEFT keeps it under, such as ``"lora_A"``.
        rest: what follows, such as ``"default.weight"``.
        shape: of the tensor.
    """

    module: str
    container: str
    rest: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ImpliedConfig:
    """The part of a PEFT config that the tensors of an adapter say.

    Attributes:
        method: PEFT's name of the method, such as ``"LORA"``.
        settings: keyword arguments of its config.
        open: names of the arguments that change predictions, that tensors cannot say and that have to be known.
        optional: names of those that tensors cannot say either, and that most trainings leave as they are.
    """

    method: str
    settings: Mapping[str, Any]
    open: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The call of the config's class, with ``…`` for what the tensors cannot say."""
        shown = {**self.settings, **dict.fromkeys(self.open, _OPEN)}
        order = ["r", *self.open, *sorted(self.settings)]
        return _call(self.method, {name: shown[name] for name in dict.fromkeys(order) if name in shown})

    def to_config(self, **given: Any) -> PeftConfig:
        """Return the config, with the given arguments for what the tensors cannot say."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return PEFT_TYPE_TO_CONFIG_MAPPING[self.method](**{**self.settings, **given})


def read_config(shapes: Shapes) -> ImpliedConfig | None:
    """Return what the state dict of one transformer with an adapter says of the config; ``None`` without an adapter.

    Args:
        shapes: key, with or without the prefix of the embeddings → shape. The keys of the base's own weights tell
            which modules were *not* adapted, so that the targets can be named shortly.
    """
    tensors = adapter_tensors(shapes)
    method = _method_of(tensors, shapes)
    if method is None:
        return None
    of_method = [tensor for tensor in tensors if tensor.container not in _BESIDE]
    settings = {**_SETTINGS.get(method, _only_targets)(of_method, shapes), **_saved_modules(tensors, shapes)}
    unsaid = (*_open_settings(method, settings, of_method), *_tokens(tensors, method))
    return ImpliedConfig(method, settings, unsaid, _OPTIONAL_SETTINGS.get(method, ()))


def text_of(config: PeftConfig, implied: ImpliedConfig) -> str:
    """Return the call of a config's class with those arguments that tensors can say or leave open."""
    of_same_method = {*implied.settings, *implied.open} if _name(config) == implied.method else {"target_modules"}
    described = config.to_dict()
    shown = {name: described[name] for name in sorted(of_same_method) if described.get(name) is not None}
    return _call(
        _name(config), {name: sorted(value) if isinstance(value, set) else value for name, value in shown.items()}
    )


def adapter_tensors(shapes: Shapes) -> list[AdapterTensor]:
    """Return the tensors that PEFT added."""
    found = []
    for key, shape in shapes.items():
        segments = _without_wrappers(key).split(".")
        index = next((i for i, segment in enumerate(segments) if keys.is_adapter_key(segment)), None)
        if index is not None and segments[index] != "base_layer":
            rest = ".".join(segments[index + 1 :])
            module = ".".join(segment for segment in segments[:index] if segment not in _WRAPPERS_INSIDE)
            found.append(AdapterTensor(module, segments[index], rest, tuple(shape)))
    return found


# Beside the tensors of a method, in any method's adapter.
_BESIDE = frozenset({"modules_to_save", "trainable_tokens_delta", "trainable_tokens_original", "original_module"})
_WRAPPERS_INSIDE = frozenset({"base_layer", "token_adapter"})

# What tells a method, in this order: several share a prefix.
_MARKS: tuple[tuple[str, str], ...] = (
    ("lora_E", "ADALORA"),
    ("lora_A", "LORA"),
    ("lora_embedding_A", "LORA"),
    ("adaption_prompt", "ADAPTION_PROMPT"),
    ("ia3_l", "IA3"),
    ("hada_", "LOHA"),
    ("lokr_", "LOKR"),
    ("vera_lambda_", "VERA"),
    ("pvera_lambda_", "PVERA"),
)

# Methods whose tensors say everything that changes predictions. All others need to be told.
_SAY_EVERYTHING = frozenset({"BEFT", "IA3", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"})

_OPEN_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "ADALORA": ("lora_alpha", "total_step"),
    "LORA": ("lora_alpha",),
    "LOHA": ("alpha",),
    "LOKR": ("alpha",),
    "MISS": ("r", "mini_r", "init_weights"),  # by which MiSS chooses what it computes
}

_OPTIONAL_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "LORA": ("use_rslora", "lora_dropout", "alpha_pattern"),
    "LOHA": ("alpha_pattern",),
    "LOKR": ("alpha_pattern",),
}

# Settings that say where an adapter is, or how it trains or is saved, and those that PEFT reads off the model; beside
# those of every method's config.
_CHANGE_NOTHING = frozenset(
    {
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("bias", "fan_in_fan_out", "progressbar", "runtime_offload_base_weight"),
        *("save_projection", "save_indices", "save_precomputed_indices"),
        *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    }
)


def _open_settings(method: str, settings: Mapping[str, Any], tensors: Iterable[AdapterTensor]) -> tuple[str, ...]:
    """Return which arguments have to be known, beside those that the tensors say.

    Of a method without a row, these are all that could change predictions: what a new method leaves out of its tensors
    is not known here.
    """
    if method in _SAY_EVERYTHING:
        return ()
    if method == "VERA":
        has_projection = any(tensor.container == "vera_A" for tensor in tensors)
        return () if has_projection else ("projection_prng_key",)
    if method in _OPEN_SETTINGS:
        return _OPEN_SETTINGS[method]
    known = {*_CHANGE_NOTHING, *peft_methods().shared_settings, *settings}
    fields = peft_methods().by_name[method].defaults
    return tuple(name for name in fields if name not in known and not _is_for_training(name))


def _is_for_training(setting: str) -> bool:
    return setting.startswith("init_") or setting.endswith("dropout")


def _method_of(tensors: list[AdapterTensor], shapes: Shapes) -> str | None:
    containers = {tensor.container for tensor in tensors}
    for mark, method in _MARKS:
        if any(container.startswith(mark) for container in containers):
            return method
    if "prompt_encoder" in containers:
        return _prompt_method(tensors, shapes)
    for name, found in sorted(peft_methods().by_name.items()):
        if found.prefix and any(container.startswith(found.prefix) for container in containers):
            return name
    return "LN_TUNING" if containers & {"modules_to_save"} else None


# Parts of the names of what makes a prompt.
_PROMPT_MARKS = (
    ("trainable_embedding", "CARTRIDGE"),
    ("transform", "PREFIX_TUNING"),
    ("mlp_head", "P_TUNING"),
    ("lstm_head", "P_TUNING"),
)


def _prompt_method(tensors: Iterable[AdapterTensor], shapes: Shapes) -> str:
    rests = {tensor.rest: tensor.shape for tensor in tensors if tensor.container == "prompt_encoder"}
    for mark, method in _PROMPT_MARKS:
        if any(mark in rest.split(".") for rest in rests):
            return method
    # The vectors of a prompt are as long as those of the words; a prefix has keys and values for each layer.
    lengths = {shape[-1] for shape in rests.values()}
    norms = {shape[0] for key, shape in shapes.items() if len(shape) == 1 and key.endswith(".weight")}
    return "PROMPT_TUNING" if lengths <= norms else "PREFIX_TUNING"


def _lora(tensors: list[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
    ranks = {t.module: t.shape[0] for t in tensors if t.container in ("lora_A", "lora_embedding_A")}
    settings = {"r": _most_common(ranks), **_only_targets(tensors, shapes)}
    others = {module: rank for module, rank in ranks.items() if rank != settings["r"]}
    if others:
        settings["rank_pattern"] = {_suffix(module, [*ranks]): rank for module, rank in sorted(others.items())}
    if any(tensor.container == "lora_magnitude_vector" for tensor in tensors):
        settings["use_dora"] = True
    if any(tensor.container == "lora_B" and tensor.rest.endswith("bias") for tensor in tensors):
        settings["lora_bias"] = True
    return settings


def _adalora(tensors: list[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
    ranks = {t.module: t.shape[0] for t in tensors if t.container == "lora_A"}
    return {"init_r": _most_common(ranks), **_only_targets(tensors, shapes)}


def _ia3(tensors: list[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
    feedforward = {t.module for t in tensors if len(t.shape) == 2 and t.shape[0] == 1 and t.shape[1] != 1}
    names = short_names(feedforward, _modules(shapes))
    # PEFT wants the names of these among those.
    targets = {*_only_targets(tensors, shapes)["target_modules"], *names}
    return {"target_modules": sorted(targets), "feedforward_modules": names}


def _by_rank(container: str) -> Callable[[list[AdapterTensor], Shapes], dict[str, Any]]:
    def read(tensors: list[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
        ranks = {t.module: t.shape[0] for t in tensors if t.container == container}
        return {**({"r": _most_common(ranks)} if ranks else {}), **_only_targets(tensors, shapes)}

    return read


def _prompt(tensors: list[AdapterTensor], _: Shapes) -> dict[str, Any]:
    shapes = {t.rest.partition(".")[2]: t.shape for t in tensors if t.container == "prompt_encoder"}
    settings: dict[str, Any] = {}
    if "embedding.weight" in shapes:
        settings["num_virtual_tokens"] = shapes["embedding.weight"][0]
    if "transform.0.weight" in shapes:
        settings |= {"prefix_projection": True, "encoder_hidden_size": shapes["transform.0.weight"][0]}
    if "mlp_head.0.weight" in shapes:
        settings["encoder_hidden_size"] = shapes["mlp_head.0.weight"][0]
    if "lstm_head.weight_hh_l0" in shapes:
        layers = sum(name.startswith("lstm_head.weight_hh_l") and not name.endswith("_reverse") for name in shapes)
        settings |= {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": shapes["lstm_head.weight_hh_l0"][1],
            "encoder_num_layers": layers,
        }
    return settings


def _only_targets(tensors: list[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
    modules = {tensor.module for tensor in tensors if tensor.module}
    return {"target_modules": short_names(modules, _modules(shapes))} if modules else {}


_SETTINGS: Mapping[str, Callable[[list[AdapterTensor], Shapes], dict[str, Any]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
    "LOHA": _by_rank("hada_w1_b"),
    "LOKR": _by_rank("lokr_w2_b"),
    "VERA": _by_rank("vera_lambda_d"),
    "PREFIX_TUNING": _prompt,
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,
}


def _saved_modules(tensors: Iterable[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
    saved = {tensor.module for tensor in tensors if tensor.container == "modules_to_save"}
    return {"modules_to_save": short_names(saved, _modules(shapes))} if saved else {}


def _tokens(tensors: Iterable[AdapterTensor], method: str) -> tuple[str, ...]:
    has_tokens = any(tensor.container == "trainable_tokens_delta" for tensor in tensors)
    if not has_tokens:
        return ()
    return ("token_indices",) if method == "TRAINABLE_TOKENS" else ("trainable_token_indices",)


def short_names(modules: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """Return the shortest names by which PEFT finds these modules and no others: it compares the ends of paths."""
    wanted, others = set(modules), set(all_modules)
    return sorted({_suffix(module, [*(others - wanted)]) for module in wanted})


def _suffix(module: str, others: Iterable[str]) -> str:
    segments, others = module.split("."), [other for other in others if other != module]
    for count in range(1, len(segments)):
        suffix = ".".join(segments[-count:])
        if not any(other == suffix or other.endswith(f".{suffix}") for other in others):
            return suffix
    return module


def _modules(shapes: Shapes) -> set[str]:
    """Return the paths of all modules that hold a matrix or a vector of the base."""
    found = set()
    for key in shapes:
        name = keys.base_key(_without_wrappers(key))
        if name is not None and name.endswith((".weight", ".bias")):
            found.add(name.rpartition(".")[0])
    return found


def _without_wrappers(key: str) -> str:
    """Return the key without PEFT's wrapper and what a Flair model puts in front of it."""
    wrapper = next((each for each in ("base_model.model.", "base_model.") if each in key), "base_model.model.")
    return key.rpartition(wrapper)[2]


def _most_common(ranks: Mapping[str, int]) -> int:
    return Counter(ranks.values()).most_common(1)[0][0]


def _call(method: str, arguments: Mapping[str, Any]) -> str:
    shown = (f"{name}={value if value == _OPEN else repr(value)}" for name, value in arguments.items())
    found = peft_methods().by_name.get(method)
    return f"{'PeftConfig' if found is None else found.config_class}({', '.join(shown)})"


def _name(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
