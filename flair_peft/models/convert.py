"""Files of stock Flair → checkpoints that hold what was learned."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from flair.embeddings import TransformerEmbeddings
from flair.nn import Model
from peft import PeftConfig

from flair_peft.adapter import keys, methods
from flair_peft.embeddings import plain_transformers
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import BaseMismatchError, ConfigMismatchError, name_some
from flair_peft.models import load, save
from flair_peft.primitives import progress
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import within_load
from flair_peft.storage import file_names

log = logging.getLogger("flair_peft")


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
    out; what is not is kept, and a warning says so where an adapter was trained beside it.

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
    target = file_names.path_of(directory)
    total = 3 * Path(path).stat().st_size if Path(path).is_file() else 0
    chosen = dataclasses.replace(load.choose(**options), trust_file=trust_pickle, is_sparing=True)
    with progress.shown("converting", total=total):
        model = load.load_any_file(Path(path), chosen, peft_config, base_of_slim=base_model)

        def stored_base(embeddings: Any) -> StoredBase:
            if isinstance(embeddings, PeftTransformerEmbeddings):
                found = _compare(embeddings, is_whole=bool(save_base), is_given=peft_config is not None)
            else:
                found = _compare_plain(embeddings, is_whole=bool(save_base))
            if base_model is not None and not save_base:
                _refuse_other_base(found, source=str(path))
            return found

        with within_load(options=dataclasses.replace(chosen, base_model=base_model)):
            save.write_directory(model, target, stored_base=stored_base)
    return model


def _compare_plain(embeddings: TransformerEmbeddings, *, is_whole: bool) -> StoredBase:
    """Return which weights of embeddings without an adapter are the base model's own: all may have been trained."""
    found = StoredBase() if is_whole else plain_transformers.compare_with_base(embeddings)
    if found.record is None and not is_whole:
        _report_no_base(str(embeddings.base_model_name))
    return found


def _report_no_base(name: str) -> None:
    log.warning(
        "No base model '%s' with weights of this shape is found: the checkpoint holds all of them. Pass "
        "base_model= with its directory or Hub id to leave them out.",
        name,
    )


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
    if is_whole or not embeddings.base_source.find_record_(embeddings.base_model):
        if not is_whole:
            _report_no_base(embeddings.base_model_name)
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

    If other weights differ as well, the base is another one, and its biases say nothing. Neither does it where the
    layers that the config means have no biases.
    """
    asked = getattr(embeddings.adapter_config, "bias", "none")
    biases = {key for key in own if key.endswith(".bias")}
    trained = {name for name, parameter in embeddings.model.named_parameters() if parameter.requires_grad}
    found = changed & biases
    if others - biases or (asked != "none" and not trained & biases):
        return
    # Modules without an adapter have no base_layer.
    says = "none" if not found else "all" if any(".base_layer." not in key for key in found) else "lora_only"
    if (says == "none") != (asked == "none"):
        raise ConfigMismatchError(
            f"Cannot convert with the config given, bias={asked!r}: against the base model '{source}', the file has "
            f"bias={says!r}, by {name_some(found, 3) if found else 'equal biases'}. Pass the config that it was "
            "trained with."
        )
