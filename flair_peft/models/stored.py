"""A Flair model as a file, a directory or a dictionary holds it: its state, completed and checked before a build."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from flair.embeddings.base import EMBEDDING_CLASSES
from flair.embeddings.transformer import TransformerEmbeddings
from peft import PeftConfig

from flair_peft.adapter import config as configs
from flair_peft.adapter import implied, keys
from flair_peft.adapter.implied import ImpliedConfig
from flair_peft.codec import trust
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.embeddings.word_and_document import counterpart
from flair_peft.errors import (
    AdapterConfigError,
    ConfigMismatchError,
    MissingConfigError,
    StateMismatchError,
    UnsafeFileError,
    name_some,
)
from flair_peft.models import head_probe
from flair_peft.primitives import fingerprint
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import LoadOptions
from flair_peft.torchfile import state_tree
from flair_peft.torchfile.state_tree import State, StoredEmbeddings

log = logging.getLogger("flair_peft")


@dataclass(frozen=True)
class Stored:
    """A Flair model that was read and is not built yet.

    Attributes:
        kind: where the state comes from: a checkpoint directory, a ``.pt`` file, or somebody's dictionary.
        state: of the model, as Flair gives it.
        source: named in errors.
        options: of this load.
        model_class: that a checkpoint directory names.
        given: the PEFT config that the user gave, and the embeddings that it was meant for.
        prefixes: of a directory: number of embeddings → what stands in front of the names of their tensors.
    """

    kind: Literal["directory", "file", "state"]
    state: State
    source: str
    options: LoadOptions = dataclasses.field(default_factory=LoadOptions)
    model_class: Any = None
    given: tuple[PeftConfig, tuple[StoredEmbeddings, ...]] | None = None
    prefixes: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)

    @cached_property
    def embeddings(self) -> tuple[StoredEmbeddings, ...]:
        """All transformer embeddings in the state."""
        return tuple(state_tree.embeddings_in(self.state))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the model under the names that its live counterpart gives them."""
        return state_tree.tensors_of(self.state)

    @cached_property
    def inner(self) -> dict[str, dict[str, Any]]:
        """Module prefix → parameters of the embeddings that code around them makes."""
        return state_tree.inner_embeddings(self.state)

    @cached_property
    def bases(self) -> dict[int, StoredBase]:
        """Number of each embeddings module whose base may be left out → how it is stored."""
        parts = (value for _, part in state_tree.tasks_of(self.state) for value in part.values())
        decoders = (value.modules() for value in parts if isinstance(value, torch.nn.Module))
        inside = (module for modules in decoders for module in modules if isinstance(module, PeftTransformerEmbeddings))
        numbered = (embeddings.params for embeddings in self.embeddings if "part" in embeddings.params)
        return {
            **dict(module.origin for module in inside if module.origin is not None),
            **{params["part"]: StoredBase.from_dict(params.get("stored_base")) for params in numbered},
        }


def complete(stored: Stored, peft_config: PeftConfig | None = None) -> Stored:
    """Return the model with a PEFT config for all embeddings that have adapter tensors; it may be built.

    Containers are copied, tensors are not; ``stored`` stays as it is.

    Raises:
        MissingConfigError: there are adapter tensors without a config, and none is given.
        AdapterConfigError: a config is given for a state that holds all configs itself, a base model for one that
            holds all of its weights, or a device map for Flair's own embeddings.
        StateMismatchError: its settings or labels are not those that it was saved with.
        UnsafeFileError: Flair would run code, or open what the state names, when it builds the model.
    """
    source = stored.source
    stored = dataclasses.replace(stored, state=_copy_containers(stored.state))
    lacking = tuple(embeddings for embeddings in stored.embeddings if embeddings.lacks_config)
    if peft_config is not None and not lacking:
        raise AdapterConfigError(
            f"Cannot use the peft_config given for '{source}': it holds the config that it was trained with. Another "
            "one would change predictions. Leave out peft_config."
        )
    if peft_config is None and lacking:
        raise _missing_config(lacking[0], source)
    if len(places := _places_of(lacking)) > 1:
        log.warning(
            "'%s' holds %s adapters without a config (%s): the one given is used for all of them. If they were trained "
            "with different ones, with another alpha for example, the model predicts something else.",
            source,
            len(places),
            name_some(places, 3),
        )
    for embeddings in stored.embeddings:
        if peft_config is not None and embeddings.lacks_config:
            embeddings.params["peft_config"] = configs.own_config(peft_config)
        if embeddings.params.get("peft_config") is not None:
            _take_over_(embeddings.params)
    if not stored.options.trust_file:
        _refuse_unsafe(stored.state, source)
    _refuse_useless_base(stored)
    _refuse_placement(stored)
    head_probe.check_settings(stored.state, source=source, verify=bool(stored.options.verify))
    return stored if peft_config is None else dataclasses.replace(stored, given=(peft_config, lacking))


def _refuse_useless_base(stored: Stored) -> None:
    given = stored.options.base_model
    bases = stored.bases.values() if given is not None else ()
    needs_code = any(base.record is not None and base.record.needs_remote_code for base in bases)
    if given is not None and not needs_code and not any(base.is_needed for base in bases):
        raise AdapterConfigError(
            f"Cannot use the base_model given for '{stored.source}', {given!r:.200}: the file holds all weights of its "
            "base itself. None would be read from there, or compared with what is there. Leave out base_model."
        )


def _refuse_placement(stored: Stored) -> None:
    given = stored.options.placement
    if given and not state_tree.has_adapters(stored.state):
        raise AdapterConfigError(
            f"Cannot use the {', '.join(sorted(given))} given for '{stored.source}': all of its embeddings are Flair's "
            f"own, which lie on flair.device as a whole. Leave out {', '.join(sorted(given))}."
        )


def _refuse_unsafe(state: State, source: str) -> None:
    """Return if no setting would have Flair open what the file names, and nothing have it run code or unpickle."""
    if danger := trust.unsafe_setting(state):
        raise UnsafeFileError(
            f"Cannot load '{source}': {danger}. Flair would open, and may run, what a file names in that place, or the "
            "file is damaged. Copy or save the model again, and load no such file from somebody whom you do not trust."
        )
    pending: list[Any] = [state]
    while pending:
        value = pending.pop()
        if isinstance(value, dict) and (danger := trust.unsafe_part(value)):
            raise UnsafeFileError(
                f"Cannot load '{source}': there are embeddings that need {danger}. No file may do that. Save the model "
                "without them."
            )
        pending.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ())


def _take_over_(params: dict[str, Any]) -> None:
    """Let the embeddings of a stock class be built as those of its counterpart with an adapter, in place."""
    stock_class = EMBEDDING_CLASSES.get(params["__cls__"])
    is_of_flair = isinstance(stock_class, type) and issubclass(stock_class, TransformerEmbeddings)
    if is_of_flair and not issubclass(stock_class, PeftTransformerEmbeddings):
        params["__cls__"] = counterpart(stock_class).__name__
        params["keep_virtual_rows"] = True  # stock Flair trained the words of prompt methods on the rows that it reads


def _places_of(lacking: tuple[StoredEmbeddings, ...]) -> list[str]:
    """Return the places of adapters that have no PEFT config; those that several tasks share have one place."""
    places: dict[Any, str] = {}
    for embeddings in lacking:
        mine = ((k, t) for k, t in embeddings.tensors.items() if k.startswith(embeddings.adapter_prefixes[0]))
        tensor = next(tensor for key, tensor in mine if keys.is_adapter_key(key))
        places.setdefault(tensor.data_ptr(), f"{embeddings.task}{embeddings.prefix}".strip("."))
    return list(places.values())


def report_not_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Say which tensors of a model hold NaN or infinite numbers, apart from the base's own weights.

    Args:
        tensors: by the names that their state dict gives them, whatever stands in front.
        where: they are, for the message.
    """
    prefixes = tuple(keys.find_adapter_prefixes(tensors))
    # Matrices of the base, which older files hold beside what was learned, stay unread.
    of_base = {n for n, t in tensors.items() if t.dim() > 1 and n.startswith(prefixes) and keys.base_key(n) is not None}
    learned = {n: t for n, t in tensors.items() if n not in of_base or "modules_to_save" in n}
    broken = fingerprint.not_finite(learned)
    if broken:
        log.warning(
            "%s holds NaN or infinite numbers in %s of %s tensors that were learned: %s. Its training diverged, and "
            "its predictions mean nothing. Take an earlier checkpoint, or train again, with a lower learning rate or "
            "in fp32 or bf16.",
            where,
            len(broken),
            len(learned),
            name_some(broken, limit=3),
        )


def _copy_containers(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copy_containers(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy_containers(item) for item in value]
    return copy.copy(value) if isinstance(value, Mapping) else value


def _missing_config(embeddings: StoredEmbeddings, source: str) -> MissingConfigError:
    found = embeddings.implied_config()
    named = sorted(key for key in embeddings.tensors if keys.is_adapter_key(key))
    what = f"adapter weights ({name_some(named, 2)})" if found is None else _describe(found)
    config, others = ("…", ()) if found is None else (found.text, found.optional)
    return MissingConfigError(
        f"Cannot load '{source}': it holds {what} but not {_what_is_lost(found)}. Stock Flair does not "
        "store the PEFT config, and a wrong one changes predictions silently. Pass the config used in training: "
        f"load('{source}', peft_config={config})"
        + (f", with {' and '.join(others)} if you used them." if others else ".")
    )


def _what_is_lost(found: ImpliedConfig | None) -> str:
    if found is None or not found.open:
        return "the PEFT config that shapes them"
    if found.open[0] in ("lora_alpha", "alpha"):
        return f"the {found.open[0]} that scales them"
    return f"those settings of {found.method} that no tensor shows"


def _describe(config: ImpliedConfig) -> str:
    targets = name_some(config.settings.get("target_modules", ()))
    ranks = sorted({config.settings.get("r"), *config.settings.get("rank_pattern", {}).values()} - {None})
    rank = f" (rank {', '.join(map(str, ranks))} from their shapes, on {targets})" if ranks else ""
    return f"{config.method} weights{rank or (f' on {targets}' if targets else '')}"


def explain_mismatch(error: StateMismatchError, stored: Stored) -> StateMismatchError:
    """Return the error of a load whose tensors do not fit the config given, with both configs in words."""
    given, lacking = stored.given or (None, ())
    # Of the head, say, the config says nothing.
    for embeddings in lacking if error.problems and given is not None else ():
        of_file = embeddings.implied_config()
        if of_file is not None:
            unfit = "; ".join(f"{what}: {name_some(names, 1)}" for what, names in error.problems.items())
            return ConfigMismatchError(
                f"Cannot load '{stored.source}' with the config given, {implied.text_of(given, of_file)}. Its tensors "
                f"are those of {of_file.text} ({unfit}). Pass the config that it was trained with."
            )
    return error
