"""Whether a base model is the one that a model was trained on, and whether its files hold all of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flair_peft.adapter import keys
from flair_peft.base import transformer, weight_files
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.errors import BaseMismatchError, BaseModelNotFoundError, ModelFileError, name_some
from flair_peft.primitives.base_record import BaseRecord
from flair_peft.primitives.load_context import load_options

log = logging.getLogger("flair_peft")


def check_base(base: FrozenBase, expected: BaseRecord, *, name: str) -> None:
    """Return if the base found is the one that the model was trained on, as far as the user wants it checked.

    Raises:
        BaseMismatchError: it is not.
    """
    verify = load_options().verify
    if not verify:
        log.warning("Not checked for '%s': whether the base model is the one it was trained on.", name)
        return
    if not base.is_as(expected):
        raise _mismatch(base, expected, "its weights differ")
    if verify == "full" and expected.full_fingerprint is None:
        raise ModelFileError(
            f"Cannot verify the base model of '{name}': the file holds no digest of all its weights. Files have one "
            "if their base was found when they were saved. Save the model again beside its base."
        )
    if verify == "full" and not base.is_fully_as(expected):
        raise _mismatch(base, expected, "some of its weights differ")


def check_complete(base: FrozenBase, kwargs: Mapping[str, Any]) -> None:
    """Return if the files of a new base hold every weight that hidden states depend on; the others are random.

    Raises:
        BaseModelNotFoundError: they do not; the message names weights that are missing, and what is there instead.
    """
    lacking = {name for name in base.random_names & base.names_of_parameters() if not keys.is_unread(name)}
    read = transformer.read_parts(base.copy()) if lacking and not base.is_placed else None
    if read is not None:
        lacking = {name for name in lacking if name.partition(".")[0] in read}
    if not lacking:
        return
    unused = set(weight_files.names_of_weights(base.record.name, kwargs)) - base.names_of_parameters()
    instead = f", and hold others that it does not have: {name_some(unused, limit=3)}" if unused else ""
    raise BaseModelNotFoundError(
        f"Cannot use '{base.record.name}' as a base model: its files lack weights of the model that its config "
        f"describes, {name_some(lacking, limit=3)}{instead}. They would be random, and others in each process. Save "
        "the whole model there with save_pretrained of its own class, or pass another base."
    )


def _mismatch(base: FrozenBase, expected: BaseRecord, what: str) -> BaseMismatchError:
    is_other_size = expected.vocabulary_size not in (None, base.own_rows)
    sizes = f" ({base.own_rows} rows of vocabulary instead of {expected.vocabulary_size})" if is_other_size else ""
    revision = f" at revision {expected.revision}" if expected.revision else ""
    return BaseMismatchError(
        f"Cannot use '{base.record.name}' as base model: {what} from those that the model was trained on{sizes}. "
        "Another revision, another precision or a re-trained copy would predict something else. Pass base_model= with "
        f"the model that was '{expected.name}'{revision}, or verify=False to use this one all the same."
    )
