"""What the tensors of an adapter say, by names and shapes, of the config that they were trained with.

Rank, targets, method and the like show; what only scales or trains (alpha, rsLoRA, dropout) does not. Importing this
module imports no other library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flair_peft.adapter import keys, traits
from flair_peft.adapter.methods import method_name
from flair_peft.adapter.peft_registry import peft_methods

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
    says = traits.of_method(method).from_tensors
    settings = {**_READERS[says.shows](of_method, shapes, says), **_saved_modules(tensors, shapes)}
    unsaid = (*_open_settings(method, settings, of_method), *_trained_rows(tensors, says))
    return ImpliedConfig(method, settings, unsaid, says.optional)


def text_of(config: PeftConfig, implied: ImpliedConfig) -> str:
    """Return the call of a config's class with those arguments that tensors can say or leave open."""
    of_same_method = {*implied.settings, *implied.open} if method_name(config) == implied.method else {"target_modules"}
    described = config.to_dict()
    shown = {name: described[name] for name in sorted(of_same_method) if described.get(name) is not None}
    return _call(
        method_name(config), {name: sorted(value) if isinstance(value, set) else value for name, value in shown.items()}
    )


def adapter_tensors(shapes: Shapes) -> list[AdapterTensor]:
    """Return the tensors that PEFT added."""
    added = []
    for key, shape in shapes.items():
        segments = _without_wrappers(key).split(".")
        index = next((i for i, segment in enumerate(segments) if keys.is_adapter_key(segment)), None)
        if index is not None and segments[index] != "base_layer":
            rest = ".".join(segments[index + 1 :])
            module = ".".join(segment for segment in segments[:index] if segment not in _WRAPPERS_INSIDE)
            added.append(AdapterTensor(module, segments[index], rest, tuple(shape)))
    return added


# Beside the tensors of a method, in any method's adapter.
_BESIDE = frozenset({"modules_to_save", "trainable_tokens_delta", "trainable_tokens_original", "original_module"})
_WRAPPERS_INSIDE = frozenset({"base_layer", "token_adapter"})

# Settings that say where an adapter is, or how it trains or is saved, and those that PEFT reads off the model.
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

    Of a method whose traits do not list them, these are all that could change predictions: what it leaves out of its
    tensors is not known here.
    """
    what_is_true = traits.of_method(method)
    unsaid = what_is_true.from_tensors.unsaid
    if unsaid is not None:
        is_drawn = any(tensor.container == what_is_true.drawn for tensor in tensors)
        return tuple(name for name in unsaid if not (is_drawn and name in what_is_true.from_tensors.unless_drawn))
    known = {*_CHANGE_NOTHING, *peft_methods().shared_settings, *settings}
    names = peft_methods().defaults[method]
    return tuple(name for name in names if name not in known and not _is_for_training(name))


def _is_for_training(setting: str) -> bool:
    return setting.startswith("init_") or setting.endswith("dropout")


def _method_of(tensors: list[AdapterTensor], shapes: Shapes) -> str | None:
    containers = {tensor.container for tensor in tensors}
    if "prompt_encoder" in containers:
        return _prompt_method(tensors, shapes)
    by_mark = {name: each.from_tensors.mark for name, each in traits.METHODS.items() if each.from_tensors.mark}
    by_prefix = {name: each.prefixes[0] for name, each in traits.METHODS.items() if name not in by_mark}
    # Trained tokens are a method, and stand beside the tensors of others.
    for candidates in (containers - _BESIDE, containers):
        for name, beginning in (*by_mark.items(), *by_prefix.items()):
            if any(container.startswith(beginning) for container in candidates):
                return name
    with_copies = (name for name, each in traits.METHODS.items() if each.from_tensors.has_copies_alone)
    return next(with_copies, None) if "modules_to_save" in containers else None


def _prompt_method(tensors: Iterable[AdapterTensor], shapes: Shapes) -> str:
    rests = {tensor.rest: tensor.shape for tensor in tensors if tensor.container == "prompt_encoder"}
    for name, each in traits.METHODS.items():
        if any(part in rest.split(".") for rest in rests for part in each.from_tensors.prompt_parts):
            return name
    # The vectors of a prompt are as long as those of the words; a prefix has keys and values for each layer.
    lengths = {shape[-1] for shape in rests.values()}
    norms = {shape[0] for key, shape in shapes.items() if len(shape) == 1 and key.endswith(".weight")}
    kind = traits.PROMPT if lengths <= norms else traits.PREFIX
    return next(
        name for name, each in traits.METHODS.items() if each.kind == kind and each.from_tensors.shows == "prompt"
    )


def _ranks_and_flags(tensors: list[AdapterTensor], shapes: Shapes, says: traits.FromTensors) -> dict[str, Any]:
    setting, containers = says.rank
    ranks = {tensor.module: tensor.shape[0] for tensor in tensors if tensor.container in containers}
    usual = Counter(ranks.values()).most_common(1)
    settings = {**({setting: usual[0][0]} if usual else {}), **_only_targets(tensors, shapes, says)}
    others = {module: rank for module, rank in ranks.items() if rank != settings[setting]}
    if others and says.has_rank_pattern:
        settings["rank_pattern"] = {_suffix(module, [*ranks]): rank for module, rank in sorted(others.items())}
    names = {name for t in tensors for name in (t.container, f"{t.container}.{t.rest.rpartition('.')[2]}")}
    return {**settings, **{flag: True for flag, name in says.flags.items() if name in names}}


def _targets_and_feedforward(tensors: list[AdapterTensor], shapes: Shapes, says: traits.FromTensors) -> dict[str, Any]:
    feedforward = {t.module for t in tensors if len(t.shape) == 2 and t.shape[0] == 1 and t.shape[1] != 1}
    names = short_names(feedforward, _modules(shapes))
    # PEFT wants the names of these among those.
    targets = {*_only_targets(tensors, shapes, says)["target_modules"], *names}
    return {"target_modules": sorted(targets), "feedforward_modules": names}


def _prompt(tensors: list[AdapterTensor], _: Shapes, says: traits.FromTensors) -> dict[str, Any]:
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


def _only_targets(tensors: list[AdapterTensor], shapes: Shapes, says: traits.FromTensors) -> dict[str, Any]:
    modules = {tensor.module for tensor in tensors if tensor.module}
    return {"target_modules": short_names(modules, _modules(shapes))} if modules else {}


_READERS: Mapping[str, Callable[[list[AdapterTensor], Shapes, traits.FromTensors], dict[str, Any]]] = {
    "targets": _only_targets,
    "ranks": _ranks_and_flags,
    "feedforward": _targets_and_feedforward,
    "prompt": _prompt,
}


def _saved_modules(tensors: Iterable[AdapterTensor], shapes: Shapes) -> dict[str, Any]:
    saved = {tensor.module for tensor in tensors if tensor.container == "modules_to_save"}
    return {"modules_to_save": short_names(saved, _modules(shapes))} if saved else {}


def _trained_rows(tensors: Iterable[AdapterTensor], says: traits.FromTensors) -> tuple[str, ...]:
    has_rows = any(tensor.container == "trainable_tokens_delta" for tensor in tensors)
    return (says.token_rows,) if has_rows else ()


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
    modules = set()
    for key in shapes:
        name = keys.base_key(_without_wrappers(key))
        if name is not None and name.endswith((".weight", ".bias")):
            modules.add(name.rpartition(".")[0])
    return modules


def _without_wrappers(key: str) -> str:
    """Return the key without PEFT's wrapper and what a Flair model puts in front of it."""
    wrapper = next((each for each in ("base_model.model.", "base_model.") if each in key), "base_model.model.")
    return key.rpartition(wrapper)[2]


def _call(method: str, arguments: Mapping[str, Any]) -> str:
    shown = (f"{name}={value if value == _OPEN else repr(value)}" for name, value in arguments.items())
    return f"{traits.of_method(method).config_class}({', '.join(shown)})"
