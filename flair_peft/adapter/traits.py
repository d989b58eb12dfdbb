"""What is true of each method of PEFT, and of the options of LoRA that change it: the one table that others ask.

A new method is one entry of :data:`METHODS`. Plain data: importing this module imports no other library.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LAYERS, PROMPT, PREFIX = "layers", "prompt", "prefix"
"""Kinds of methods: parameters beside those of layers, rows in front of the sentence's, past key values in front."""

LORA_RATE = 5e-4
"""A learning rate at which AdamW trains LoRA well on real text, and no training that was tried came to nothing.

Short trainings of small bases learn more at 1e-3 and above (resources/benchmarks/quality.md); of those of a base of
twelve layers, one in ten came to nothing there (resources/benchmarks/upper_layers.md).
"""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method or an option of one changes for a model that has it.

    Attributes:
        refused: why no model can have it, or "" if it can; ``{value}`` stands for that of an option.
        not_transferred: why an adapter that was trained on another class cannot be used, and what to do instead.
        reads_base: adding it computes with the base's weights.
        rewrites_base: adding it, or filling it, may change them, or let layers share them.
        derived_from_base: it keeps what it computed from them, and no state dict holds it.
        needs_gpu: why it cannot be added without one.
        not_mixed: why its sentences cannot share a forward pass with those of other adapters.
        keeps_graph: its modules keep tensors of their last forward pass, which torch does not copy.
        never_trained: containers of parameters that PEFT may leave trainable and that no training may change.
        ahead: class of modules that hold what they drew for the next passes.
    """

    refused: str = ""
    not_transferred: str = ""
    reads_base: bool = False
    rewrites_base: bool = False
    derived_from_base: bool = False
    needs_gpu: str = ""
    not_mixed: str = ""
    keeps_graph: bool = False
    never_trained: tuple[str, ...] = ()
    ahead: str = ""


@dataclass(frozen=True)
class FromTensors:
    """What the tensors of an adapter say of its config, by their names and shapes.

    Attributes:
        shows: which settings they show: the targets alone, also ranks, feed-forward modules, or those of a prompt.
        rank: the setting that is the first dimension of a tensor, and the containers of such tensors.
        has_rank_pattern: ranks that differ are a setting of their own.
        flags: setting that is True → container, and the last part of a tensor's name where that tells.
        unsaid: settings that change predictions, that no tensor says and that have to be known; None for all that
            the config's class has and that could.
        unless_drawn: those of them that need not be known where the file holds what was drawn by them.
        optional: settings that tensors cannot say either, and that most trainings leave as they are.
        token_rows: the setting that says which rows of the vocabulary were trained.
        mark: beginning of a container's name that only this method has, where its prefix does not tell it.
        prompt_parts: names of modules that only this prompt's encoder has.
        has_copies_alone: its file may hold nothing but trained copies of modules.
    """

    shows: Literal["targets", "ranks", "feedforward", "prompt"] = "targets"
    rank: tuple[str, tuple[str, ...]] = ("", ())
    has_rank_pattern: bool = False
    flags: Mapping[str, str] = field(default_factory=dict)
    unsaid: tuple[str, ...] | None = None
    unless_drawn: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    token_rows: str = "trainable_token_indices"
    mark: str = ""
    prompt_parts: tuple[str, ...] = ()
    has_copies_alone: bool = False


@dataclass(frozen=True)
class MethodTraits(Traits):
    """What is true of one method of PEFT, for all that treats methods differently to ask.

    Attributes:
        name: PEFT's, such as "LORA".
        config_class: what PEFT calls the class of its configs.
        prefix: beginning of the names of the containers of its parameters, where that is not the method's name.
        further_prefixes: of containers that do not begin with it.
        kind: LAYERS, PROMPT or PREFIX.
        containers: whole names of its other containers.
        nested_containers: those that hold one container for each kind of layer: frod_V.<kind>.<adapter>.
        scale: the setting by which what was learned is multiplied.
        from_tensors: what its tensors say of its config.
        is_mixable: its layers take the name of an adapter for each sentence of a batch.
        depends_on_batch: the vectors of a sentence depend on the sentences that are embedded together with it.
        learning_rate: to try for it; None where that of a whole transformer suits it.
        needs_step: it must be told after each optimiser step.
        needs_step_with: the option with which it must.
        masks_ranks: its rank_pattern says which ranks its budget left to which matrix.
        has_module_patterns: keys of its patterns are the ends of modules' names, as ``get_pattern_key`` reads them.
        projects_gradients: hooks on its parameters do, which casting and copying lose.
        scores: attributes in which modules keep the importance of ranks, which no state dict holds.
        scores_in: the attribute that has these attributes, or "" for the module itself.
        is_drawn_together: it draws, or numbers, something for all modules that it adapts together.
        drawn: the container of what was drawn, where a file may hold it.
        is_sized_together: what was drawn is as large as the largest of these modules.
        sliced: containers of which each module reads as many rows and columns as it has.
        counts_layers: it adapts the last layers, by their number, and not modules by name.
        factors: containers of two matrices whose product moves a weight: the one that starts at zero → the other.
        deciding: containers of parameters that make the product zero as long as they are.
        has_free_rank: no tensor is as large as its rank.
        goes_on_as: the method as which its parameters are trained on, since files hold what an encoder gave.
        start: settings that say how it starts, and what they are once it has started.
    """

    name: str
    config_class: str
    prefix: str = ""
    further_prefixes: tuple[str, ...] = ()
    kind: str = LAYERS
    containers: tuple[str, ...] = ()
    nested_containers: tuple[str, ...] = ()
    scale: str = ""
    from_tensors: FromTensors = FromTensors()
    is_mixable: bool = False
    depends_on_batch: bool = False
    learning_rate: float | None = LORA_RATE
    needs_step: bool = False
    needs_step_with: str = ""
    masks_ranks: bool = False
    has_module_patterns: bool = True
    projects_gradients: bool = False
    scores: tuple[str, ...] = ()
    scores_in: str = ""
    is_drawn_together: bool = False
    drawn: str = ""
    is_sized_together: bool = False
    sliced: tuple[str, ...] = ()
    counts_layers: bool = False
    factors: Mapping[str, str] = field(default_factory=dict)
    deciding: tuple[str, ...] = ()
    has_free_rank: bool = False
    goes_on_as: str = ""
    start: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of the containers of its parameters, PEFT's own first."""
        return self.prefix or f"{self.name.lower()}_", *self.further_prefixes

    @property
    def adds_product(self) -> bool:
        """Whether it moves a weight by the product of two matrices and a scale, and by nothing else."""
        return bool(self.factors) and set(self.factors) == set(self.deciding)


@dataclass(frozen=True)
class OptionTraits(Traits):
    """What is true of a setting that is switched on, whichever method has it.

    Attributes:
        setting: of the config.
        off: its value where it is switched off, if that does not count as false.
        decomposes_base: it computes with the base's weights even where a state dict will fill the adapter.
        ties_layers: it lets layers share their weights.
        averages_batch: in training it projects gradients by a mean over all that its layers get in one pass.
        own_loss: the method of PEFT's model that gives the loss which it adds to that of the training, if it has one.
    """

    setting: str
    off: object = None
    decomposes_base: bool = False
    ties_layers: bool = False
    averages_batch: bool = False
    own_loss: str = ""

    def is_on(self, value: object) -> bool:
        """Whether a config with this value of the setting switches it on; None is that of a config without it."""
        return bool(value) if self.off is None else value not in (None, False, self.off)


_NEEDS_TASK_IDS = "it needs a task id with every sentence, and Flair has none to give"
_LAYER_SCORES = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")


def _by_name(*methods: MethodTraits) -> dict[str, MethodTraits]:
    return {method.name: method for method in methods}


METHODS = _by_name(
    MethodTraits(
        "LORA",
        "LoraConfig",
        scale="lora_alpha",
        from_tensors=FromTensors(
            "ranks",
            rank=("r", ("lora_A", "lora_embedding_A")),
            has_rank_pattern=True,
            flags={"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"},
            unsaid=("lora_alpha",),
            optional=("use_rslora", "lora_dropout", "alpha_pattern"),
        ),
        is_mixable=True,
        factors={"lora_B": "lora_A", "lora_embedding_B": "lora_embedding_A"},
        deciding=("lora_B", "lora_embedding_B"),
    ),
    MethodTraits(
        "ADALORA",
        "AdaLoraConfig",
        prefix="lora_",
        scale="lora_alpha",
        containers=("ranknum",),
        from_tensors=FromTensors(
            "ranks", rank=("init_r", ("lora_A",)), unsaid=("lora_alpha", "total_step"), mark="lora_E"
        ),
        never_trained=("ranknum",),  # PEFT wraps them in new trainable parameters when it casts a 16-bit adapter
        needs_step=True,
        masks_ranks=True,
        has_module_patterns=False,
        scores=("ipt", "exp_avg_ipt", "exp_avg_unc"),
        scores_in="rankallocator",
        factors={"lora_B": "lora_A", "lora_embedding_B": "lora_embedding_A"},
        deciding=("lora_B", "lora_embedding_B", "lora_E"),
    ),
    MethodTraits("ADAMSS", "AdamssConfig", derived_from_base=True, needs_step_with="use_asa", scores=_LAYER_SCORES),
    MethodTraits(
        "ADAPTION_PROMPT",
        "AdaptionPromptConfig",
        containers=("adaption_gate", "adaption_prompt"),
        from_tensors=FromTensors(mark="adaption_prompt"),
        counts_layers=True,
    ),
    MethodTraits("BEFT", "BeftConfig", from_tensors=FromTensors(unsaid=())),
    MethodTraits("BOFT", "BOFTConfig"),
    MethodTraits("C3A", "C3AConfig"),
    MethodTraits(
        "CARTRIDGE",
        "CartridgeConfig",
        kind=PREFIX,
        from_tensors=FromTensors(prompt_parts=("trainable_embedding",)),
        learning_rate=1e-2,
    ),
    MethodTraits(
        "CPT",
        "CPTConfig",
        kind=PROMPT,
        refused="PEFT offers it for causal language models only, and Flair reads hidden states",
    ),
    MethodTraits("DEFT", "DeftConfig", scale="alpha"),
    MethodTraits("DELORA", "DeloraConfig"),
    MethodTraits("FOURIERFT", "FourierFTConfig", scale="scaling"),
    MethodTraits(
        "FROD",
        "FrodConfig",
        nested_containers=("frod_V", "frod_s_indices", "frod_s_size"),
        derived_from_base=True,
        is_drawn_together=True,
    ),
    MethodTraits("GLORA", "GloraConfig", is_mixable=True),
    MethodTraits("GRALORA", "GraloraConfig", scale="alpha"),
    MethodTraits("HIRA", "HiraConfig", is_mixable=True),
    MethodTraits("HRA", "HRAConfig"),
    MethodTraits("IA3", "IA3Config", from_tensors=FromTensors("feedforward", unsaid=()), learning_rate=3e-2),
    MethodTraits("LILY", "LilyConfig", scale="scaling", depends_on_batch=True),
    MethodTraits("LN_TUNING", "LNTuningConfig", from_tensors=FromTensors(unsaid=(), has_copies_alone=True)),
    MethodTraits(
        "LOHA",
        "LoHaConfig",
        prefix="hada_",
        scale="alpha",
        from_tensors=FromTensors("ranks", rank=("r", ("hada_w1_b",)), unsaid=("alpha",), optional=("alpha_pattern",)),
    ),
    MethodTraits(
        "LOKR",
        "LoKrConfig",
        scale="alpha",
        from_tensors=FromTensors("ranks", rank=("r", ("lokr_w2_b",)), unsaid=("alpha",), optional=("alpha_pattern",)),
        has_free_rank=True,
    ),
    MethodTraits(
        "MISS",
        "MissConfig",
        from_tensors=FromTensors(unsaid=("r", "mini_r", "init_weights")),  # by which it chooses what it computes
    ),
    MethodTraits("MULTITASK_PROMPT_TUNING", "MultitaskPromptTuningConfig", kind=PROMPT, refused=_NEEDS_TASK_IDS),
    MethodTraits("OFT", "OFTConfig"),
    MethodTraits(
        "OSF",
        "OSFConfig",
        derived_from_base=True,
        learning_rate=None,  # it trains matrices as large as those of the base
        has_module_patterns=False,
        projects_gradients=True,
    ),
    MethodTraits("PEANUT", "PeanutConfig", scale="scaling"),
    MethodTraits("POLY", "PolyConfig", refused=_NEEDS_TASK_IDS),
    MethodTraits(
        "PREFIX_TUNING",
        "PrefixTuningConfig",
        kind=PREFIX,
        from_tensors=FromTensors("prompt", unsaid=(), prompt_parts=("transform",)),
        learning_rate=1e-2,
        start={"prefix_projection": False},
    ),
    MethodTraits(
        "PROMPT_TUNING",
        "PromptTuningConfig",
        kind=PROMPT,
        from_tensors=FromTensors("prompt", unsaid=()),
        learning_rate=3e-2,
        start={"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None},
    ),
    MethodTraits("PSOFT", "PsoftConfig", scale="psoft_alpha", derived_from_base=True),
    MethodTraits(
        "PVERA",
        "PveraConfig",
        prefix="pvera_lambda_",
        further_prefixes=("pvera_",),
        is_drawn_together=True,
        drawn="pvera_A",
        sliced=("pvera_A", "pvera_B"),
    ),
    MethodTraits(
        "P_TUNING",
        "PromptEncoderConfig",
        kind=PROMPT,
        from_tensors=FromTensors("prompt", unsaid=(), prompt_parts=("mlp_head", "lstm_head")),
        learning_rate=3e-2,
        goes_on_as="PROMPT_TUNING",
    ),
    MethodTraits(
        "RANDLORA",
        "RandLoraConfig",
        scale="randlora_alpha",
        is_drawn_together=True,
        drawn="randlora_A",
        is_sized_together=True,
    ),
    MethodTraits("ROAD", "RoadConfig", is_mixable=True),
    MethodTraits("SHADOW", "ShadowConfig", scale="shadow_alpha", keeps_graph=True),
    MethodTraits("SHIRA", "ShiraConfig"),
    MethodTraits("SUPERTUNING", "SupertuningConfig", scale="lora_alpha", derived_from_base=True),
    MethodTraits("TINYLORA", "TinyLoraConfig", derived_from_base=True, is_drawn_together=True),
    MethodTraits(
        "TRAINABLE_TOKENS",
        "TrainableTokensConfig",
        from_tensors=FromTensors(token_rows="token_indices"),
        derived_from_base=True,  # it keeps the rows that it replaces, to put them back after merging
    ),
    MethodTraits("UNILORA", "UniLoraConfig", is_drawn_together=True, drawn="unilora_indices_A"),
    MethodTraits("VBLORA", "VBLoRAConfig"),
    MethodTraits(
        "VERA",
        "VeraConfig",
        prefix="vera_lambda_",
        further_prefixes=("vera_",),
        from_tensors=FromTensors(
            "ranks",
            rank=("r", ("vera_lambda_d",)),
            unsaid=("projection_prng_key",),
            unless_drawn=("projection_prng_key",),
        ),
        is_drawn_together=True,
        drawn="vera_A",
        sliced=("vera_A", "vera_B"),
    ),
    MethodTraits("WAVEFT", "WaveFTConfig", scale="scaling"),
    MethodTraits(
        "XLORA",
        "XLoraConfig",
        refused="it mixes adapters that were trained before, given as paths, instead of training one",
    ),
)
"""PEFT's name of a method → what is true of it."""

OPTIONS: tuple[OptionTraits, ...] = (
    OptionTraits(
        "alora_invocation_tokens",
        refused="alora_invocation_tokens: activated LoRA switches on at a token of a prompt, and Flair has no prompts",
    ),
    OptionTraits(
        "megatron_config",
        refused="megatron_config: it adapts layers of Megatron-LM, which no model of transformers has",
    ),
    OptionTraits("sample_at_inference", refused="sample_at_inference: every prediction would be drawn anew"),
    OptionTraits(
        "use_qalora",
        refused="use_qalora: it is written for GPTQ layers, and elsewhere PEFT trains plain LoRA without a word",
    ),
    OptionTraits(
        "shadow_model",
        off="mirror",  # what PEFT calls a shadow that it builds itself; anything else is the name of a model
        refused="shadow_model={value!r}: files would have it fetched anew",
    ),
    OptionTraits("bias", off="none", not_mixed="it changes biases of the base"),
    OptionTraits("use_dora", reads_base=True, not_mixed="PEFT mixes no DoRA in one batch"),
    OptionTraits("modules_to_save", not_mixed="it replaces modules of the base"),
    OptionTraits("trainable_token_indices", derived_from_base=True, not_mixed="it replaces rows of the base"),
    OptionTraits("target_parameters", not_mixed="it adapts bare parameters"),
    OptionTraits("kasa_config", rewrites_base=True, decomposes_base=True, own_loss="_get_kasa_loss"),
    OptionTraits("velora_config", averages_batch=True),
    OptionTraits("monteclora_config", keeps_graph=True, ahead="MontecloraSampler", own_loss="_get_monteclora_loss"),
    OptionTraits(
        "layer_replication",
        rewrites_base=True,
        ties_layers=True,
        not_transferred="it replicates layers of its base. Which tensors belong to which copy cannot be proven from "
        "the base. Use an adapter without layer_replication.",
    ),
)
"""Settings that change what is true of a method, in the order in which they are looked at."""

_INIT = "init_lora_weights"
_WANTS_DATA = (
    "init_lora_weights={value!r} must see data before the adapter is added, and Flair's embeddings embed only "
    "afterwards"
)

INITS: Mapping[object, OptionTraits] = {
    True: OptionTraits(_INIT),
    False: OptionTraits(_INIT),
    "gaussian": OptionTraits(_INIT),
    "orthogonal": OptionTraits(_INIT),
    # Its data is seen after the adapter was added, and decides lora_A and the ranks alone.
    "eva": OptionTraits(_INIT),
    "mica": OptionTraits(_INIT, reads_base=True, never_trained=("lora_B", "lora_embedding_B")),
    "pissa": OptionTraits(_INIT, rewrites_base=True),
    "pissa_niter": OptionTraits(
        _INIT,
        rewrites_base=True,
        not_transferred="its init_lora_weights={value!r} takes from the base what a random decomposition gave, which "
        "is another one each time, and the file does not hold it. Save the adapter with PEFT's "
        "path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
    ),
    "olora": OptionTraits(_INIT, rewrites_base=True),
    "corda": OptionTraits(_INIT, rewrites_base=True, refused=_WANTS_DATA),
    "lora_ga": OptionTraits(_INIT, rewrites_base=True, refused=_WANTS_DATA),
    "loftq": OptionTraits(
        _INIT, rewrites_base=True, needs_gpu="init_lora_weights='loftq' quantises the base on a GPU, and there is none"
    ),
}
"""Value of ``init_lora_weights``, without the number of iterations → what is true of it."""

_UNKNOWN_INIT = OptionTraits(_INIT, rewrites_base=True)


def of_method(name: str | None) -> MethodTraits:
    """Return what is true of a method, by PEFT's name of it."""
    return METHODS.get(name or "") or MethodTraits(name or "", "PeftConfig")


def of_init(value: object) -> OptionTraits:
    """Return what is true of a value of ``init_lora_weights``; one that is not listed may rewrite the base."""
    if isinstance(value, str):
        name, niter, _ = value.lower().partition("_niter")
        value = name + niter
    return INITS.get(value, _UNKNOWN_INIT) if isinstance(value, (bool, str)) else _UNKNOWN_INIT


# Containers of parameters that adapters of several methods can have, one entry for each adapter.
_OF_SEVERAL_METHODS = ("modules_to_save", "prompt_encoder", "trainable_tokens_delta", "trainable_tokens_original")

NESTED_CONTAINERS = frozenset(name for traits in METHODS.values() for name in traits.nested_containers)


@functools.lru_cache(maxsize=4096)
def is_container(segment: str) -> bool:
    """Whether a part of a tensor's name is that of a container in which a method keeps parameters."""
    every = METHODS.values()
    return (
        segment in _OF_SEVERAL_METHODS
        or any(segment in traits.containers for traits in every)
        or any(segment.startswith(traits.prefixes) for traits in every)
    )


def add_unlisted_(prefixes: Mapping[str, str], config_classes: Mapping[str, str]) -> None:
    """Add methods that a newer PEFT brings to the table, as methods of which nothing else is known.

    Args:
        prefixes: method → prefix of its parameters.
        config_classes: method → name of the class of its configs.
    """
    for name in prefixes.keys() - METHODS.keys():
        METHODS[name] = MethodTraits(name, config_classes[name], prefix=prefixes[name])
    is_container.cache_clear()
