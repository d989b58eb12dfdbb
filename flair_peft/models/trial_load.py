"""What a load would give of a model that is not written yet: before a training, and before a directory is there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from flair.embeddings import TransformerEmbeddings
from flair.nn import Model

from flair_peft.base import tokenizers
from flair_peft.errors import ModelFileError, StateMismatchError, UnsupportedStateError, name_some
from flair_peft.models import directory_layout, head_probe, load
from flair_peft.models.save_plan import Description, SavePlan
from flair_peft.primitives import building
from flair_peft.primitives.fingerprint import are_same_bits
from flair_peft.primitives.load_context import load_options

log = logging.getLogger("flair_peft")

_TRIAL = "the model to be trained"


def compare_with_load(model: Model, document: Mapping[str, Any], files: Mapping[str, Any], *, source: str) -> None:
    """Return if what is about to be written loads as a model of the same weights, which predicts the same.

    Flair's own classes store less of themselves than they were made with, here and there, and nothing says so.

    Raises:
        UnsupportedStateError: it does not.
    """
    try:
        loaded = _loaded(model, document, files, source)
    except (ModelFileError, StateMismatchError) as error:
        raise _lost(model, source, str(error).partition(". ")[0]) from error
    ours, theirs = model.state_dict(), loaded.state_dict()
    odd = {name for name in {*ours, *theirs} if name not in ours or name not in theirs}
    odd |= {name for name in {*ours} - odd if not are_same_bits(ours[name], theirs[name])}
    if odd:
        raise _lost(model, source, f"it has other weights: {name_some(odd)}")
    _compare_tokenizers(model, loaded, source)
    _compare_answers(model, loaded, source)


def _compare_tokenizers(model: Model, loaded: Model, source: str) -> None:
    """Return if both read rare characters in the same way: Flair makes slow tokenizers fast ones."""
    others = dict(loaded.named_modules())
    for name, part in model.named_modules():
        other = getattr(others.get(name), "tokenizer", None)
        if not isinstance(part, TransformerEmbeddings) or other is None or part.tokenizer_needs_ocr_boxes:
            continue
        try:
            are_alike = tokenizers.are_alike(part.tokenizer, other)
        except Exception as error:  # what a user's own class wants must not cost a trained model
            log.info("Not compared how '%s' reads: %s: %s", part.name, type(error).__name__, error)
            continue
        if not are_alike:
            what = f"it takes rare characters apart with a {type(other).__name__}, as in '{tokenizers.RARE}'"
            raise _lost(model, source, what)


def _compare_answers(model: Model, loaded: Model, source: str) -> None:
    """Return if both label the probe sentence in the same way, behind heads that give the same."""
    try:
        expected = head_probe.answers(model)
    except Exception as error:  # what a user's own class wants, or a lack of memory, must not cost a trained model
        log.info("Not compared what this %s predicts: %s: %s", type(model).__name__, type(error).__name__, error)
        return
    try:
        found = head_probe.answers(loaded)
    except (MemoryError, torch.OutOfMemoryError):
        return
    except Exception as error:
        raise _lost(model, source, f"it cannot predict: {type(error).__name__}: {error}") from error
    labels, others = ([label for label, _ in each] for each in (expected, found))
    before, after = (torch.tensor([score for _, score in each]) for each in (expected, found))
    if labels != others or not torch.allclose(before, after, rtol=1e-3, equal_nan=True):
        raise _lost(model, source, "it labels a probe sentence otherwise, though its head gives the same")


def report_loss(plan: SavePlan, description: Description) -> None:
    """Say if a model with adapters could not be loaded as it is, while a training can still be kept from that."""
    model = plan.model
    try:
        with _silent():
            _loaded(model, *directory_layout.to_files(description, plan), _TRIAL)
    except (ModelFileError, StateMismatchError) as error:
        log.warning(
            "What files will hold of this %s does not load as the same model: %s. Something in it was changed since it "
            "was made, such as layers of its head, its labels or its transformer, and Flair makes them as they were; "
            "or it is one that Flair saves and cannot load. Make the model with what it is to have, or be sure that "
            "you can load it otherwise.",
            type(model).__name__,
            str(error).removeprefix(f"Cannot load '{_TRIAL}': ").partition(". ")[0].rstrip("."),
        )
    except Exception as error:  # such as of a lack of memory: a training needs no trial
        log.debug("Not tried whether this %s loads: %s: %s", type(model).__name__, type(error).__name__, error)


def _loaded(model: Model, document: Mapping[str, Any], files: Mapping[str, Any], source: str) -> Model:
    tensors = {name: content for name, content in files.items() if not isinstance(content, bytes)}
    others = {name: content for name, content in files.items() if isinstance(content, bytes)}
    # The base that the directory names was found, by what a user said of that; nothing more is downloaded.
    options = dataclasses.replace(load_options(), base_model=None, local_files_only=True, trust_file=False)
    with building.anew():  # saving must not change what is drawn next in training
        stored = load.stored_in(document, others, tensors, model_class=type(model), source=source, options=options)
        return load.load_stored(stored)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, this thread logs nothing of a save and a load that nobody asked for, and PEFT warns of nothing."""
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_others)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeFilter(is_of_others)


def _lost(model: Model, source: str, what: str) -> UnsupportedStateError:
    return UnsupportedStateError(
        f"Cannot save this {type(model).__name__} to '{source}': what Flair stores of it does not load as the same "
        f"model ({what.rstrip('.')}). A part of it was made with a setting that its class does not keep. "
        "Nothing was written; make that part without the setting."
    )
