"""install / uninstall: the only writer into Flair.

These attributes of Flair are replaced, each by a function that calls the original for everything that has no adapter:

=============================================  ========================================================================
``load`` of ``Model`` and its subclasses       takes ``peft_config=``; reads files with adapters; aligns dtypes
``train`` of ``Model`` and its subclasses      gives a cast head its fp32 values back before it trains
``Model._apply``                               keeps heads that need fp32 in fp32, whatever ``model.half()`` does
``Embeddings._everything_embedded``            never reuses vectors that depend on an adapter that can change
``TransformerEmbeddings.to_params``            keeps the PEFT config of stock embeddings
``TransformerEmbeddings.from_params``          rebuilds stock embeddings that have a PEFT config, with an adapter
``ModelTrainer.train_custom``                  checks settings, attaches :class:`flair_peft.training.AdapterGuard`
``ModelTrainer._load_model``                   reloads the best model into the live one, without a second base
=============================================  ========================================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flair.embeddings import TransformerEmbeddings
from flair.embeddings.base import Embeddings, TokenEmbeddings
from flair.models import MultitaskModel
from flair.nn import Model
from flair.trainers import ModelTrainer
from peft import PeftConfig, PeftModel

from flair_peft import adapters, compat, dtypes, legacy, training
from flair_peft import config as configs
from flair_peft.embeddings import PeftTransformerEmbeddings, counterpart
from flair_peft.errors import AdapterConfigError, FlairPeftError, ModelFileError, StateMismatchError, name_some

log = logging.getLogger("flair_peft")

# How torch lists the keys that do not fit.
_LISTED = r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)"
_QUOTED = r'"([^"]+)"'

_MISSING = object()
_lock = threading.RLock()
_installed: list[_Replacement] = []
_is_loading: contextvars.ContextVar[bool] = contextvars.ContextVar("flair_peft_is_loading", default=False)


class _Replacement:
    """One attribute of a Flair class, the descriptor found there, and the one put in its place."""

    def __init__(self, owner: type, name: str, replacement: Any) -> None:
        self.owner, self.name = owner, name
        self.found = vars(owner).get(name, _MISSING)
        self.replacement = replacement

    def put(self) -> None:
        setattr(self.owner, self.name, self.replacement)

    def take_back(self) -> None:
        if vars(self.owner).get(self.name) is not self.replacement:
            # Somebody wrapped ours since: removing it would remove theirs. Ours passes through once uninstalled.
            log.warning("%s.%s was replaced by others too and is left in place.", self.owner.__name__, self.name)
        elif self.found is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.found)


def install() -> None:
    """Make every Flair model load with adapters. Flair is changed whole or not at all; twice is once.

    Raises:
        UnsupportedHostError: this Flair is not one that the hook was written for; nothing was changed.
    """
    with _lock:
        if _installed:
            return
        compat.check_host()
        replacements = [*_load_replacements(), *_other_replacements()]
        try:
            for replacement in replacements:
                replacement.put()
                _installed.append(replacement)
        except BaseException:
            uninstall()
            raise


def uninstall() -> None:
    """Give Flair back the very objects that :func:`install` found. Doing it twice does nothing more."""
    with _lock:
        while _installed:
            _installed.pop().take_back()


def is_installed() -> bool:
    """Whether the hook is in place."""
    return bool(_installed)


def _load_replacements() -> Iterator[_Replacement]:
    for model_class in [Model, *_subclasses(Model)]:
        if "load" in vars(model_class):
            yield _Replacement(model_class, "load", _loading_with_adapters(vars(model_class)["load"]))


def _other_replacements() -> Iterator[_Replacement]:
    for model_class in [Model, *(c for c in _subclasses(Model) if "train" in vars(c))]:
        original = vars(model_class).get("train", torch.nn.Module.train)
        yield _Replacement(model_class, "train", _training_in_fp32(original))
    yield _Replacement(Model, "_apply", _converting_by_the_rule(vars(Model).get("_apply", torch.nn.Module._apply)))
    for owner in (Embeddings, TokenEmbeddings):
        yield _Replacement(owner, "_everything_embedded", _embedding_afresh(vars(owner)["_everything_embedded"]))
    yield _Replacement(TransformerEmbeddings, "to_params", _keeping_config(vars(TransformerEmbeddings)["to_params"]))
    yield _Replacement(
        TransformerEmbeddings, "from_params", _rebuilding_adapter(vars(TransformerEmbeddings)["from_params"])
    )
    yield _Replacement(ModelTrainer, "train_custom", _training_guarded(vars(ModelTrainer)["train_custom"]))
    yield _Replacement(ModelTrainer, "_load_model", _reloading_in_place(vars(ModelTrainer)["_load_model"]))


def _subclasses(root: type[Any]) -> Iterator[type[Any]]:
    for subclass in root.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _loading_with_adapters(original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    """Return a ``load`` that prepares what has adapters, calls the original, and aligns the model it returns.

    Loads re-enter: an abstract class finds the concrete one, a multitask model loads each task. Only the outermost
    call prepares and aligns; it sees the whole model.
    """

    @functools.wraps(original.__func__)
    def load(cls: type[Model], model_path: Any, *, peft_config: PeftConfig | None = None) -> Model:
        stock_load = original.__get__(None, cls)
        if not _installed or _is_loading.get():
            return stock_load(model_path) if peft_config is None else stock_load(model_path, peft_config=peft_config)
        path = None if isinstance(model_path, dict) else Path(model_path)
        source = "the given state" if path is None else str(path)
        state = model_path if path is None else legacy.read_state(path) if path.is_file() else None
        if state is None or not legacy.has_adapters(state):
            _refuse_useless_config(peft_config, source, was_read=state is not None)
            return stock_load(model_path if state is None else state)
        if path is not None:
            legacy.check_sums(path)
        state = legacy.with_config(state, peft_config, source=source)
        _check_class(cls, state, source)
        with _outermost_load(), _naming_mismatches(source):
            model = stock_load(state)
        _share_embeddings_again(model)
        dtypes.align_head_(model)
        return model

    return classmethod(load)


def _check_class(cls: type[Model], state: legacy.State, source: str) -> None:
    """Say which class a file holds where an abstract class would try all others and print the whole state."""
    stored = state.get("__cls__")
    known = {subclass.__name__ for subclass in _subclasses(cls)}
    if inspect.isabstract(cls) and stored is not None and stored not in known:
        raise ModelFileError(
            f"Cannot load '{source}' as a {cls.__name__}: it holds a {stored}. {cls.__name__}.load finds only classes "
            f"that derive from {cls.__name__}. Use {stored}.load, after importing the module that defines it, or "
            "flair.nn.Model.load."
        )


def _refuse_useless_config(peft_config: PeftConfig | None, source: str, *, was_read: bool) -> None:
    if peft_config is None:
        return
    if not was_read:
        raise ModelFileError(
            f"Cannot load '{source}' with a peft_config: there is no such file. A config can be given for files only. "
            "Download the file and pass its path."
        )
    raise AdapterConfigError(
        f"Cannot use the peft_config given for '{source}': it holds no adapter weights. A new adapter would predict "
        "with random weights. Leave out peft_config."
    )


@contextlib.contextmanager
def _outermost_load() -> Iterator[None]:
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)


@contextlib.contextmanager
def _naming_mismatches(source: str) -> Iterator[None]:
    """Raise torch's list of keys that do not fit as an error that names the file."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FlairPeftError) or "loading state_dict" not in str(error):
            raise
        listed = re.findall(_LISTED, str(error))
        found = "; ".join(f"{kind.lower()}: {name_some(re.findall(_QUOTED, names))}" for kind, names in listed)
        raise StateMismatchError(
            f"Cannot load '{source}': {found or error}. The tensors in it and the model built from its settings "
            "differ. Load it with the versions of Flair and PEFT that wrote it, or save the model again."
        ) from error


def _share_embeddings_again(model: Model) -> None:
    """Make embeddings that several tasks shared one object again; Flair stores and builds them once per task."""
    if not isinstance(model, MultitaskModel):
        return
    first: dict[str, PeftTransformerEmbeddings] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PeftTransformerEmbeddings):
                shared = first.setdefault(child.name, child)
                if shared is not child and _are_equal(shared.state_dict(), child.state_dict()):
                    setattr(parent, name, shared)
                    _replace_in_list(parent, child, shared)


def _replace_in_list(parent: torch.nn.Module, child: torch.nn.Module, shared: torch.nn.Module) -> None:
    """Replace embeddings in the plain list that StackedEmbeddings keeps beside its submodules."""
    listed = parent.__dict__.get("embeddings")
    if isinstance(listed, list):
        listed[:] = [shared if item is child else item for item in listed]


def _are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _training_in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Model, mode: bool = True) -> Model:
        if _installed and mode:
            dtypes.restore_head_(self)
        return original(self, mode)

    return train


def _converting_by_the_rule(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _apply(self: Model, fn: Callable[..., Any], recurse: bool = True) -> Model:
        if not _installed or not any(dtypes.adapted_embeddings(self)):
            return original(self, fn, recurse)
        return dtypes.convert_(self, lambda: original(self, fn, recurse))

    return _apply


def _embedding_afresh(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def _everything_embedded(self: Embeddings, data_points: Any) -> bool:
        # Flair's trainer stores evaluation vectors and reads them again in the next epoch.
        return original(self, data_points) and not (_installed and _has_changing_adapter(self))

    return _everything_embedded


def _has_changing_adapter(embeddings: Embeddings) -> bool:
    return any(
        isinstance(module, TransformerEmbeddings) and module.fine_tune and isinstance(module.model, PeftModel)
        for module in embeddings.modules()
        if isinstance(module, Embeddings)
    )


def _keeping_config(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def to_params(self: TransformerEmbeddings) -> dict[str, Any]:
        params = original(self)
        if not _installed or isinstance(self, PeftTransformerEmbeddings) or not isinstance(self.model, PeftModel):
            return params
        encoded = configs.encode_config(self.model.peft_config[adapters.ADAPTER_NAME])
        # Mark the layout, so that loading in a process that never imported flair_peft imports it.
        return {**params, "peft_config": encoded, "flair_peft_format": compat.FormatVersion(compat.FORMAT_VERSION)}

    return to_params


def _rebuilding_adapter(original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    @functools.wraps(original.__func__)
    def from_params(cls: type[TransformerEmbeddings], params: dict[str, Any]) -> TransformerEmbeddings:
        if not _installed or params.get("peft_config") is None:
            return original.__get__(None, cls)(params)
        # Stock Flair trained the words of prompt methods on the rows that it reads.
        return counterpart(cls).from_params({**params, "keep_virtual_rows": True})

    return classmethod(from_params)


def _training_guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train_custom(self: ModelTrainer, *args: Any, **kwargs: Any) -> Any:
        if not _installed or not any(dtypes.adapted_embeddings(self.model)):
            return original(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs)
        settings = arguments.arguments
        training.check_training(self.model, reduce_transformer_vocab=settings.get("reduce_transformer_vocab", False))
        settings["plugins"] = [*(settings.get("plugins") or []), training.AdapterGuard()]
        return original(*arguments.args, **arguments.kwargs)

    return train_custom


def _reloading_in_place(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_model(self: ModelTrainer, model_file: Any) -> None:
        if not _installed or not any(dtypes.adapted_embeddings(self.model)):
            return original(self, model_file)
        state = legacy.read_state(Path(model_file))
        with _naming_mismatches(str(model_file)):
            self.model.load_state_dict(_whole_state_dict(state))
        return None

    return _load_model


def _whole_state_dict(state: legacy.State) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names that its live counterpart gives them."""
    tensors = dict(state.get("state_dict", {}))
    for task, task_state in state.get("model_states", {}).items():
        tensors.update({f"{task}.{name}": tensor for name, tensor in _whole_state_dict(task_state).items()})
    return tensors
