"""Tokenizers and image preprocessing: find, unpack, pack."""

from __future__ import annotations

import contextlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
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
    T5TokenizerFast,
)

from flair_peft.backbone import not_found
from flair_peft.errors import ModelFileError

KeywordArguments = Mapping[str, Any]

# Tried in this order for a tokenizer without a padding token; padding is masked, so any token will do.
_PADDING_CANDIDATES = ("eos_token", "unk_token", "bos_token", "cls_token", "sep_token")


def find_tokenizer(source: str, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, add_prefix_space=True, **kwargs)
    except (OSError, HFValidationError, ValueError, TypeError) as error:
        raise not_found(source, error) from error


def find_feature_extractor(source: str, kwargs: KeywordArguments) -> FeatureExtractionMixin | None:
    """Return the image preprocessing of the base model, or ``None`` where it has none."""
    try:
        return AutoFeatureExtractor.from_pretrained(source, apply_ocr=False, **kwargs)
    except OSError:
        return None


def unpack_tokenizer(stored: BytesIO, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer from the zip file of :func:`portable_tokenizer_files`.

    Nothing in the file makes code run: neither a setting of the tokenizer nor, in ``kwargs``, one of the embeddings. A
    user who trusts a base trusts its code, not that of whoever wrote the file.

    Raises:
        ModelFileError: the files are damaged, or need code of their own.
    """
    settings = {"use_fast": kwargs["use_fast"]} if isinstance(kwargs.get("use_fast"), bool) else {}
    try:
        with _unpacked(stored) as directory:
            _check_class_is_named(Path(directory))
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **settings)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelFileError(
            f"Cannot read the stored tokenizer: {type(error).__name__}: {error}. The file is damaged. Copy or save it "
            "again."
        ) from error


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
