"""Models that stock Flair trained with an adapter: load them, and convert them to checkpoints."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flair.nn import Model
from peft import PeftConfig

from flair_peft.adapter import injection, keys, methods
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import (
    AdapterConfigError,
    BaseMismatchError,
    ConfigMismatchError,
    ModelFileError,
    StateMismatchError,
    name_some,
)
from flair_peft.models import build, files, stored_state
from flair_peft.primitives import mapped_memory, progress
from flair_peft.primitives.base_record import LoadOptions, StoredBase, loading_with
from flair_peft.torchfile import state_tree, unpickle

log = logging.getLogger("flair_peft")


def load_legacy(
    path: str | Path, *, peft_config: PeftConfig | None = None, trust_pickle: bool = False, **options: Any
) -> Model:
    """Return the model in a ``.pt`` file of stock Flair that was trained with an adapter.

    Args:
        path: of the file.
        peft_config: that it was trained with; Flair 0.14.0 to 0.15.1 do not store it.
        trust_pickle: unpickle whatever the file names. It can run any code: only for files whose writer you trust.
        **options: as for :func:`flair_peft.from_pretrained`.

    Raises:
        MissingConfigError: the file lacks the config and none is given; the message prints the one that it implies.
        ConfigMismatchError: its tensors do not fit the config given; the message names both.
        UnsafeFileError: it names what no Flair model needs, and ``trust_pickle`` is False; nothing of it was run.
        ModelFileError: it is damaged, or no Flair model.
    """
    path, chosen = Path(path), files.choose(**options)
    if not path.is_file():
        raise ModelFileError(f"Cannot load '{path}': there is no such file. Pass a file that Flair wrote.")
    chosen = dataclasses.replace(chosen, directory=path.parent, owns_state=True, trust_file=trust_pickle)
    with loading_with(chosen):
        state = unpickle.read_sound_state(path, trust_pickle=trust_pickle)
    model_class, given = _class_of(state, path), {} if peft_config is None else {"peft_config": peft_config}
    if state_tree.has_adapters(state):
        return load_state(model_class, state, given, source=str(path), chosen=chosen)
    refuse_useless(given, given, str(path), "it holds no adapter")
    with loading_with(chosen):
        return build.assemble(model_class.load, state, source=str(path))


def convert_legacy(
    path: str | Path,
    directory: str | Path,
    *,
    peft_config: PeftConfig | None = None,
    base_model: str | None = None,
    trust_pickle: bool = False,
    save_base: bool | None = None,
    **options: Any,
) -> Model:
    """The directory holds the model of a stock ``.pt`` file, as :func:`flair_peft.save_pretrained` writes it.

    The weights of the base in the file are compared with those of the base model, bit by bit. What is equal is left
    out; what is not is kept, and a warning says so.

    Args:
        path: of the file.
        directory: is made where it is missing.
        peft_config: as for :func:`load_legacy`.
        base_model: directory or Hub id of the base model, if it is not where it was.
        trust_pickle: as for :func:`load_legacy`.
        save_base: keep the base's weights in any case.
        **options: as for :func:`load_legacy`.

    Returns:
        The model.

    Raises:
        BaseModelNotFoundError: ``base_model`` is given, and there is no such model.
        BaseMismatchError: ``base_model`` is given, and no weight in the file is one of its own.
        ConfigMismatchError: the biases of the base were trained and the config given says that they were not, or the
            reverse; see :func:`load_legacy` for what else is compared.
        SaveError: the directory could not be written.
        FlairPeftError: as for :func:`load_legacy`.
    """
    # The file is summed, its weights are compared with the base's, and these are hashed.
    total = 3 * Path(path).stat().st_size if Path(path).is_file() else 0
    with progress.shown("convert", total=total), mapped_memory.sparing():
        model = load_legacy(path, peft_config=peft_config, trust_pickle=trust_pickle, **options)
        chosen = files.choose(base_model=base_model, **options)

        def plan(embeddings: PeftTransformerEmbeddings) -> StoredBase:
            with loading_with(chosen):
                found = _compare(embeddings, is_whole=bool(save_base), is_given=peft_config is not None)
                if base_model is not None and not save_base:
                    _refuse_other_base(found, source=str(path))
                return found

        files.write_checkpoint(model, Path(directory), plan)
    return model


def _refuse_other_base(stored: StoredBase, *, source: str) -> None:
    if all(keys.is_unread(keys.base_key(key) or "") for key in stored.left_out):
        name = "base_model" if stored.record is None else f"'{stored.record.name}'"
        raise BaseMismatchError(
            f"Cannot convert '{source}' with {name}: none of the weights in the file are those of that model. The file "
            "was trained on another one. Pass base_model= with that, or leave it out to keep all weights in the "
            "checkpoint."
        )


def _compare(embeddings: PeftTransformerEmbeddings, *, is_whole: bool, is_given: bool) -> StoredBase:
    """Return which weights are the base model's own, and report those that are not."""
    if is_whole or not embeddings.find_base_():
        if not is_whole:
            log.warning(
                "No base model '%s' with weights of this shape is found: the checkpoint holds all of them. Pass "
                "base_model= with its directory or Hub id to leave them out.",
                embeddings.base_model_name,
            )
        return StoredBase(embeddings.base_record)
    # A pickle keeps layers in one storage that a replication put there; without it, a load would make them apart.
    config = embeddings.adapter_config
    is_tied = config.is_prompt_learning or any(option.ties_layers for option, _ in methods.options(config))
    stored = embeddings.compare_with_base(trained=frozenset(), is_tied=is_tied)
    trained = {name for name, parameter in embeddings.model.named_parameters() if parameter.requires_grad}
    own = {key for key in embeddings.model.state_dict() if keys.base_key(key) is not None}
    others = own - stored.left_out - trained
    if is_given:
        _check_biases(embeddings, own, own - stored.left_out, others, source=embeddings.base_model_name)
    if others:
        log.warning(
            "%s of %s weights in the file are not those of '%s' (%s): the checkpoint holds them.",
            len(others),
            len(own),
            embeddings.base_model_name if stored.record is None else stored.record.name,
            name_some(others, 3),
        )
    # What was trained goes on to be trained: it belongs to the checkpoint even where it is equal.
    return dataclasses.replace(stored, left_out=stored.left_out - trained)


def _check_biases(
    embeddings: PeftTransformerEmbeddings, own: set[str], changed: set[str], others: set[str], *, source: str
) -> None:
    """Return if the biases differ from those of the base exactly where the config says that they were trained.

    If other weights differ as well, the base is another one, and its biases say nothing.
    """
    asked = getattr(embeddings.adapter_config, "bias", "none")
    biases = {key for key in own if key.endswith(".bias")}
    found = changed & biases
    if others - biases:
        return
    says = "none" if not found else "all" if _are_beyond_targets(found) else "lora_only"
    if (says == "none") != (asked == "none"):
        raise ConfigMismatchError(
            f"Cannot convert with the config given, bias={asked!r}: against the base model '{source}', the file has "
            f"bias={says!r}, by {name_some(found, 3) if found else 'equal biases'}. Pass the config that it was "
            "trained with."
        )


def _are_beyond_targets(changed: Collection[str]) -> bool:
    """Whether biases were trained of modules that have no adapter, which PEFT leaves without ``base_layer``."""
    return any(".base_layer." not in key for key in changed)


def load_state(
    model_class: type[Model],
    state: state_tree.State,
    options: Mapping[str, Any],
    *,
    source: str,
    chosen: LoadOptions,
    load: Callable[[Any], Model] | None = None,
) -> Model:
    """Return the model of a state that Flair's own function has read.

    Args:
        model_class: the class asked for.
        state: of one model; it stays as it is.
        options: given by the user, among them ``peft_config``.
        source: named in errors.
        chosen: the same options, read.
        load: Flair's own ``load`` of the class.
    """
    load = load or model_class.load
    if not state_tree.has_adapters(state):
        refuse_useless(options, options, source, "it holds no adapter")
        with injection.building:
            return load(state)
    given = options.get("peft_config")
    completed = stored_state.with_config(state, given, source=source)
    lacking = [] if given is None else stored_state.adapters_without_config(state)
    if len(lacking) > 1:
        log.warning(
            "'%s' holds %s adapters without a config (%s): the one given is used for all of them. If they were trained "
            "with different ones, with another alpha for example, the model predicts something else.",
            source,
            len(lacking),
            name_some(lacking, 3),
        )
    build.check_class(model_class, state.get("__cls__"), source)
    try:
        with loading_with(chosen):
            return build.assemble(load, completed, source=source)
    except StateMismatchError as error:
        raise error if given is None else stored_state.explain_mismatch(error, state, given, source=source) from error


def refuse_useless(options: Mapping[str, Any], names: Collection[str], source: str, reason: str) -> None:
    """Raise if an option is given that this load could only ignore."""
    given = sorted(name for name in names if name in options)
    if given:
        raise AdapterConfigError(
            f"Cannot use the {', '.join(given)} given for '{source}': {reason}. These options are meant for models "
            f"with an adapter, and peft_config for files of stock Flair that lack it. Leave out {', '.join(given)}."
        )


def _class_of(state: state_tree.State, path: Path) -> type[Model]:
    name = state.get("__cls__")
    found = [model_class for model_class in build.subclasses(Model) if model_class.__name__ == name]
    if not found:
        raise ModelFileError(
            f"Cannot load '{path}': it holds a {name!r:.100}, and no such model class is imported. Import the module "
            "that defines it, or load the file with its class."
        )
    return found[0]
