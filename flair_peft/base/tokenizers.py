"""Tokenizers and image preprocessing: find, unpack, pack, and one vocabulary for models that have the same."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
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
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from flair_peft.base.config_safety import refuse_endless
from flair_peft.base.transformer import with_answer
from flair_peft.base.unusable import first_line, not_found
from flair_peft.base.weight_files import find_file
from flair_peft.errors import BaseModelNotFoundError, ModelFileError
from flair_peft.primitives.load_context import load_options

KeywordArguments = Mapping[str, Any]
KnownTokenizers = MutableMapping[tuple[Any, ...], PreTrainedTokenizerFast]
"""Content of tokenizer files → the tokenizer made of it."""

# Truncation and padding are settings of the vocabulary, which it cannot change while another thread uses it: copies of
# a tokenizer that have one vocabulary have one lock.
_locks: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, contextlib.AbstractContextManager[Any]] = (
    weakref.WeakKeyDictionary()
)

_FILES_OF_TOKENIZERS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]

_MOST_UNPACKED = 1 << 30

# Tried in this order for a tokenizer without a padding token; padding is masked, so any token will do.
_PADDING_CANDIDATES = ("eos_token", "unk_token", "bos_token", "cls_token", "sep_token")

# What slow tokenizers and fast ones take apart in different ways.
RARE = "a ﬁne “LARGE” naïve ２ ½ … 中国 Grüße 😀 1,000€"

# Asked for add_prefix_space, as Flair always does, these ignore tokenizer.json and are built from the slow one's file.
_BUILT_FROM_SLOW = (LlamaTokenizerFast, T5TokenizerFast)

# How transformers 5 calls a tokenizer that is all in tokenizer.json, and what is the class's own unless it is written.
_GENERIC, _COMPLETE = "TokenizersBackend", "tokenizer.json"
_OF_GENERIC = {"model_input_names": ["input_ids", "attention_mask"], "padding_side": "right"}


def find_tokenizer(source: str, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer at the source: a Hub id, or a directory of a base model or an adapter.

    Raises:
        BaseModelNotFoundError: there is none, or none that can be read.
    """
    refuse_endless(source, kwargs)
    try:
        if kwargs.get("token") is False and not Path(source).is_dir() and not kwargs.get("local_files_only"):
            # transformers asks for the list of all files with the user's token, whatever it was told.
            reaching = {name: kwargs[name] for name in ("cache_dir", "revision", "token") if name in kwargs}
            snapshot_download(source, allow_patterns=_FILES_OF_TOKENIZERS, **reaching)
            kwargs = {**kwargs, "local_files_only": True}
        return _read(source, {"add_prefix_space": True, **with_answer(kwargs)})
    except Exception as error:  # transformers and tokenizers fail in many ways
        raise _unreadable(source, error) from error


def _read(source: str, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer, from ``tokenizer.json`` alone where transformers 5 wrote it, which keeps all of it there.

    The classes of version 4 put defaults of theirs in the place of settings that version 5 does not write, such as
    ``add_eos_token``, and some want the vocabulary of a slow tokenizer.
    """
    written = get_tokenizer_config(source, **kwargs)
    settings = {**_special_tokens(written), **kwargs}
    own_class = _class_of(written)
    is_from_slow = own_class is not None and issubclass(own_class, _BUILT_FROM_SLOW)
    if _is_complete(written, own_class) and kwargs.get("use_fast", True) and find_file(source, _COMPLETE, kwargs):
        of_class = {name: written.get(name, getattr(own_class, name, value)) for name, value in _OF_GENERIC.items()}
        settings.pop("use_fast", None)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **of_class, **settings)
    elif is_from_slow and find_file(source, str(own_class.vocab_files_names["vocab_file"]), kwargs) is None:
        tokenizer = AutoTokenizer.from_pretrained(source, **{**settings, "add_prefix_space": None})
    else:
        return AutoTokenizer.from_pretrained(source, **settings)
    if is_from_slow and kwargs.get("add_prefix_space"):
        _mark_words_(tokenizer, is_legacy=bool(written.get("legacy", True)))
    return tokenizer


def _mark_words_(tokenizer: PreTrainedTokenizerFast, *, is_legacy: bool) -> None:
    """Have words begin with a mark, in place, as if the tokenizer were built anew with ``add_prefix_space``."""
    splitting = tokenizer.backend_tokenizer.pre_tokenizer
    if getattr(splitting, "prepend_scheme", None) == "never":
        splitting.prepend_scheme = "always" if is_legacy else "first"


def _class_of(written: KeywordArguments) -> Any:
    """Return the class that the settings name, the fast one if there is one; ``None`` if it is not known here."""
    name = str(written.get("tokenizer_class")).removesuffix("Fast")
    return tokenizer_class_from_name(f"{name}Fast") or tokenizer_class_from_name(name)


def _is_complete(written: KeywordArguments, own_class: Any) -> bool:
    """Whether ``tokenizer.json``, if it is there, holds all that the tokenizer does."""
    name = written.get("tokenizer_class")
    if own_class is None:
        return name == _GENERIC or (name is not None and "auto_map" not in written)
    takes_boxes = "boxes" in inspect.signature(own_class.__call__).parameters
    return written.get("backend") == "tokenizers" and not takes_boxes


def _special_tokens(written: KeywordArguments) -> dict[str, Any]:
    """Return the special tokens that transformers 5 writes in another form, in that of version 4."""
    extra, named = (written.get(name) for name in ("extra_special_tokens", "model_specific_special_tokens"))
    tokens: dict[str, Any] = {"extra_special_tokens": named} if isinstance(named, dict) else {}
    if isinstance(extra, list):
        tokens = {"extra_special_tokens": {}, **tokens, "additional_special_tokens": extra}
    return tokens


def are_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give words with rare characters the same subtokens."""
    ids = []
    for each in (tokenizer, other):
        with exclusively(each):
            ids.append(each(RARE.split(), is_split_into_words=True)["input_ids"])
    return bool(ids[0] == ids[1])


def _unreadable(source: str, error: Exception) -> BaseModelNotFoundError:
    folder = Path(source)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    is_model = folder.is_dir() and (has_tokenizer or any(folder.glob("config.json")))
    if not is_model or "trust_remote_code=True" in str(error):
        return not_found(source, error)
    if not has_tokenizer:
        error = FileNotFoundError("there is no tokenizer_config.json in it")
    return BaseModelNotFoundError(
        f"Cannot read the tokenizer in '{source}': {type(error).__name__}: {first_line(error)}. Its files are damaged "
        "or incomplete, or need a class or code that the installed transformers does not have. Save it there as a fast "
        "tokenizer, which is all in tokenizer.json, or pass tokenizer= with the directory or Hub id of another."
    )


def exclusively(tokenizer: PreTrainedTokenizerBase) -> contextlib.AbstractContextManager[Any]:
    """Inside, no other thread uses the vocabulary of the tokenizer.

    Its library would raise "Already borrowed": https://github.com/huggingface/tokenizers/issues/537
    """
    return _locks.setdefault(tokenizer, threading.RLock())


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

    For models on a shared base, a fast tokenizer that is unpacked twice is read once: its copies differ in settings,
    not in vocabulary. Tokens that are added to one of them afterwards are added to all.

    Raises:
        ModelFileError: the files are damaged, or need code of their own.
    """
    settings = {"use_fast": kwargs["use_fast"]} if isinstance(kwargs.get("use_fast"), bool) else {}
    offer = load_options().offer
    known: KnownTokenizers | None = None if offer is None else offer.tokenizers
    try:
        key = () if known is None else (_digest(stored), *settings.items())
        first = None if known is None else known.get(key)
        if first is not None:
            return _copy(first)
        with _unpacked(stored) as directory:
            _check_class_is_named(Path(directory))
            found = _read(directory, {"trust_remote_code": False, **settings})
        if known is not None and isinstance(found, PreTrainedTokenizerFast):
            known[key] = found
            return _copy(found)
        return found
    except ModelFileError:
        raise
    except Exception as error:  # transformers and tokenizers fail in many ways
        raise ModelFileError(
            f"Cannot read the stored tokenizer: {type(error).__name__}: {first_line(error)}. The file is damaged. Copy "
            "or save it again."
        ) from error


@contextlib.contextmanager
def opened(stored: BytesIO) -> Iterator[zipfile.ZipFile]:
    """Yield the zip file of a tokenizer or of image preprocessing, whose files are no larger than such ones are.

    Raises:
        ModelFileError: they are.
        zipfile.BadZipFile: it is no zip file.
    """
    with zipfile.ZipFile(stored) as files:
        unpacked = sum(member.file_size for member in files.infolist())
        if unpacked > _MOST_UNPACKED:
            raise ModelFileError(
                f"Cannot unpack the stored tokenizer: its files have {unpacked} bytes, and no tokenizer has more than "
                f"{_MOST_UNPACKED}. They would fill the memory. Do not use this file."
            )
        yield files


def digest_of_vocabulary(stored: BytesIO) -> str | None:
    """Return a digest of the files of a tokenizer without its settings, or ``None`` for what is no zip file."""
    digest = hashlib.sha256()
    try:
        with opened(BytesIO(stored.getvalue())) as files:
            names = set(files.namelist()) - {"tokenizer_config.json"}
            for name in sorted({_COMPLETE} if _COMPLETE in names else names):
                content = files.read(name)
                # Before the tokens stand truncation and padding, as the last batch left them.
                digest.update(name.encode() + content[max(content.find(b'"added_tokens"'), 0) :])
    except zipfile.BadZipFile:
        return None
    return digest.hexdigest()


def _digest(stored: BytesIO) -> str:
    """Return a digest of names and contents of the files; the archive holds times of writing, too."""
    digest = hashlib.sha256()
    with opened(stored) as files:
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


def forget_use_(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take away truncation and padding that the last batch left in the tokenizer, in place: each batch sets both.

    On which side it pads and cuts, and whether it reads its marks as text, are not forgotten: transformers writes these
    only where they were given or read.
    """
    for name in ("padding_side", "truncation_side", "split_special_tokens"):
        value = getattr(tokenizer, name)
        if value != tokenizer.init_kwargs.get(name, getattr(type(tokenizer), name, False)):
            tokenizer.init_kwargs[name] = value
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        with exclusively(tokenizer):
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()


def portable_tokenizer_files(stored: BytesIO, tokenizer: PreTrainedTokenizerBase) -> BytesIO:
    """Return the zip file of a tokenizer in a form that depends on the tokenizer alone.

    Without the times of writing, equal tokenizers have equal bytes, and a file holds them once. Without the setting
    ``add_prefix_space``, which Flair always gives, transformers reads the fast tokenizers of Llama and T5 from
    ``tokenizer.json``: with it, they are built from the slow one, whose files Flair drops or which are gone after a
    load.
    """
    portable = BytesIO()
    with opened(stored) as files, zipfile.ZipFile(portable, "w") as kept:
        for name in sorted(files.namelist()):
            content = files.read(name)
            if name == "tokenizer_config.json":
                content = _portable_settings(content, tokenizer)
            kept.writestr(zipfile.ZipInfo(name), content)
    portable.seek(0)
    return portable


def save_portable(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the files of a tokenizer, as transformers writes them, so that they are read as they are here.

    See :func:`portable_tokenizer_files`; no batch has left its truncation and padding in them. Of ``add_prefix_space``,
    which Flair asks all for, and some of version 4 do not hear, they say what is so: those of version 5 obey.
    """
    forget_use_(tokenizer)
    with exclusively(tokenizer):
        tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(_portable_settings(path.read_bytes(), tokenizer))
    if "add_prefix_space" in settings and isinstance(tokenizer, PreTrainedTokenizerFast):
        found = list(_prefix_spaces(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]))
        settings["add_prefix_space"] = any(found) if found else settings["add_prefix_space"]
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _prefix_spaces(splitting: Any) -> Iterator[bool]:
    """Yield what each part of a description of how text is split says of a space in front."""
    for part in (splitting or {}).get("pretokenizers", [splitting or {}]):
        if "add_prefix_space" in part:
            yield part["add_prefix_space"]


def _portable_settings(content: bytes, tokenizer: PreTrainedTokenizerBase) -> bytes:
    if not isinstance(tokenizer, _BUILT_FROM_SLOW):
        return content
    settings = json.loads(content)
    settings.pop("add_prefix_space", None)
    return json.dumps(settings).encode()


@contextlib.contextmanager
def _unpacked(stored: BytesIO) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory, opened(stored) as files:
        files.extractall(directory)
        yield directory
