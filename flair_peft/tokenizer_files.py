"""Tokenizers and image preprocessing: find, unpack, pack, and one vocabulary for models that have the same."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import hashlib
import json
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5TokenizerFast,
)

from flair_peft.backbone import not_found, with_answer
from flair_peft.errors import ModelFileError

KeywordArguments = Mapping[str, Any]
KnownTokenizers = MutableMapping[tuple[Any, ...], PreTrainedTokenizerFast]
"""Content of tokenizer files → the tokenizer made of it."""

# Truncation and padding are settings of the vocabulary, which it cannot change while another thread uses it: copies of
# a tokenizer that have one vocabulary have one lock.
_locks: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, contextlib.AbstractContextManager[Any]] = (
    weakref.WeakKeyDictionary()
)
_known: contextvars.ContextVar[KnownTokenizers | None] = contextvars.ContextVar("flair_peft_tokenizers", default=None)

# Tried in this order for a tokenizer without a padding token; padding is masked, so any token will do.
_PADDING_CANDIDATES = ("eos_token", "unk_token", "bos_token", "cls_token", "sep_token")


def find_tokenizer(source: str, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, add_prefix_space=True, **with_answer(kwargs))
    except (OSError, HFValidationError, ValueError, TypeError) as error:
        raise not_found(source, error) from error


@contextlib.contextmanager
def sharing_with(known: KnownTokenizers) -> Iterator[None]:
    """Inside, a fast tokenizer that is unpacked twice is read once: its copies differ in settings, not in vocabulary.

    Tokens that are added to one of them afterwards are added to all.
    """
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


@contextlib.contextmanager
def exclusively(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside, no other thread uses the vocabulary of the tokenizer.

    Its library would raise "Already borrowed": https://github.com/huggingface/tokenizers/issues/537
    """
    with _locks.setdefault(tokenizer, threading.RLock()):
        yield


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what tells vocabularies apart that are in use: copies of a tokenizer may have the same."""
    return id(tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else tokenizer)


def _copy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer with settings of its own over the same vocabulary."""
    copied = copy.copy(tokenizer)
    own = {name: value for name, value in vars(tokenizer).items() if isinstance(value, (dict, list, set))}
    vars(copied).update(copy.deepcopy(own))
    _locks[copied] = _locks.setdefault(tokenizer, threading.RLock())
    return copied


def find_feature_extractor(source: str, kwargs: KeywordArguments) -> FeatureExtractionMixin | None:
    """Return the image preprocessing of the base model, or ``None`` where it has none.

    Raises:
        BaseModelNotFoundError: it needs code of its own, which the user has not allowed, or is not known.
    """
    try:
        return AutoFeatureExtractor.from_pretrained(source, apply_ocr=False, **with_answer(kwargs))
    except OSError:
        return None
    except ValueError as error:
        raise not_found(source, error) from error


def unpack_tokenizer(stored: BytesIO, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer from the zip file of :func:`portable_tokenizer_files`.

    Nothing in the file makes code run: neither a setting of the tokenizer nor, in ``kwargs``, one of the embeddings. A
    user who trusts a base trusts its code, not that of whoever wrote the file.

    Raises:
        ModelFileError: the files are damaged, or need code of their own.
    """
    settings = {"use_fast": kwargs["use_fast"]} if isinstance(kwargs.get("use_fast"), bool) else {}
    known = _known.get()
    try:
        key = () if known is None else (_digest(stored), *settings.items())
        first = None if known is None else known.get(key)
        if first is not None:
            return _copy(first)
        with _unpacked(stored) as directory:
            _check_class_is_named(Path(directory))
            found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **settings)
        if known is not None and isinstance(found, PreTrainedTokenizerFast):
            known[key] = found
            return _copy(found)
        return found
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelFileError(
            f"Cannot read the stored tokenizer: {type(error).__name__}: {error}. The file is damaged. Copy or save it "
            "again."
        ) from error


def _digest(stored: BytesIO) -> str:
    """Return a digest of names and contents of the files; the archive holds times of writing, too."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(stored) as files:
        for name in sorted(files.namelist()):
            content = files.read(name)
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _check_class_is_named(directory: Path) -> None:
    """Return if the files say which class reads them: transformers guesses it from the directory's name otherwise.

    Raises:
        ModelFileError: they do not.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("tokenizer_class"), str):
        raise ModelFileError(
            f"Cannot read the stored tokenizer: its {path.name} names no tokenizer_class. transformers would guess "
            "one. Copy or save the file again."
        )


def unpack_feature_extractor(stored: BytesIO | None) -> FeatureExtractionMixin | None:
    """Return the image preprocessing from the zip file that Flair wrote, or ``None`` where there is none."""
    if stored is None:
        return None
    with _unpacked(stored) as directory:
        try:
            return AutoFeatureExtractor.from_pretrained(directory, apply_ocr=False, trust_remote_code=False)
        except ValueError:
            # Image processors are stored under a name of their own, which AutoFeatureExtractor does not read.
            return AutoImageProcessor.from_pretrained(directory, apply_ocr=False, trust_remote_code=False)


def complete_padding_(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer pad batches on the right, in place, also where it has no padding token of its own.

    With padding on the right, and masked, a sentence in a batch has the positions that it has alone.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        candidates = (getattr(tokenizer, name, None) for name in _PADDING_CANDIDATES)
        tokenizer.pad_token = next(token for token in candidates if token is not None)


def portable_tokenizer_files(stored: BytesIO, tokenizer: PreTrainedTokenizerBase) -> BytesIO:
    """Return the zip file of a tokenizer in a form that depends on the tokenizer alone.

    Without the times of writing, equal tokenizers have equal bytes, and a file holds them once. Without the setting
    ``add_prefix_space``, which Flair always gives, transformers reads the fast tokenizers of Llama and T5 from
    ``tokenizer.json``: with it, they are built from the slow one, whose files Flair drops or which are gone after a
    load.
    """
    built_from_slow = isinstance(tokenizer, (LlamaTokenizerFast, T5TokenizerFast))
    portable = BytesIO()
    with zipfile.ZipFile(stored) as files, zipfile.ZipFile(portable, "w") as kept:
        for name in sorted(files.namelist()):
            content = files.read(name)
            if name == "tokenizer_config.json" and built_from_slow:
                settings = json.loads(content)
                settings.pop("add_prefix_space", None)
                content = json.dumps(settings).encode()
            kept.writestr(zipfile.ZipInfo(name), content)
    portable.seek(0)
    return portable


@contextlib.contextmanager
def _unpacked(stored: BytesIO) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(stored) as files:
        files.extractall(directory)
        yield directory
