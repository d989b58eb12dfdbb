"""What a load would give of a directory that is not written yet, compared with the model that is to be saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flair.nn import Model

from flair_peft.errors import ModelFileError, StateMismatchError, UnsupportedStateError, name_some
from flair_peft.models import load
from flair_peft.primitives import building
from flair_peft.primitives.fingerprint import are_same_bits
from flair_peft.primitives.load_context import load_options


def compare_with_load(model: Model, document: Mapping[str, Any], files: Mapping[str, Any], *, source: str) -> None:
    """Return if what is about to be written loads as a model of the same weights, which predicts the same.

    Flair's own classes store less of themselves than they were made with, here and there, and nothing says so.

    Args:
        model: that is saved.
        document: of the directory.
        files: name → bytes or tensors.
        source: named in errors.

    Raises:
        UnsupportedStateError: it does not.
    """
    tensors = {name: content for name, content in files.items() if not isinstance(content, bytes)}
    others = {name: content for name, content in files.items() if isinstance(content, bytes)}
    # The base that the directory names was found, by what a user said of that; nothing more is downloaded.
    options = dataclasses.replace(load_options(), base_model=None, local_files_only=True, trust_file=False)
    try:
        with building.anew():  # saving must not change what is drawn next in training
            stored = load.stored_in(document, others, tensors, model_class=type(model), source=source, options=options)
            loaded = load.load_stored(stored)
    except (ModelFileError, StateMismatchError) as error:
        raise _lost(model, source, str(error).partition(". ")[0]) from error
    ours, theirs = model.state_dict(), loaded.state_dict()
    odd = {name for name in {*ours, *theirs} if name not in ours or name not in theirs}
    odd |= {name for name in {*ours} - odd if not are_same_bits(ours[name], theirs[name])}
    if odd:
        raise _lost(model, source, f"it has other weights: {name_some(odd)}")


def _lost(model: Model, source: str, what: str) -> UnsupportedStateError:
    return UnsupportedStateError(
        f"Cannot save this {type(model).__name__} to '{source}': what Flair stores of it does not load as the same "
        f"model ({what.rstrip('.')}). A part of it was made with a setting that its class does not keep. "
        "Nothing was written; make that part without the setting."
    )
