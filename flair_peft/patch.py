"""install / uninstall: the only writer into Flair.

These attributes of Flair are replaced, each by a function that calls the original for everything that has no adapter:

=============================================  ========================================================================
``load`` of ``Model`` and its subclasses       takes directories, and files with adapters, here and on the Hub
``Model.save``                                 writes what was learned, whole or not at all, and no pickled objects;
                                               and merged models, and what replaces a file with an adapter, likewise
``predict`` of ``Model`` and its subclasses    says what a model with an adapter cannot predict for, or with
``train`` of ``Model`` and its subclasses      gives a cast head its fp32 values back, or fp32, before it trains
``Model._apply``                               keeps heads that need fp32 in fp32, whatever ``model.half()`` does
``Embeddings._everything_embedded``            never reuses vectors that depend on an adapter that can change
``TransformerEmbeddings.to_params``            keeps the PEFT config of stock embeddings
``TransformerEmbeddings.from_params``          rebuilds stock embeddings that have a PEFT config, with an adapter
``ModelTrainer.train_custom``                  checks settings, attaches :class:`.AdapterGuard`, gives the head a rate
``ModelTrainer.fine_tune``, ``.train``         gives the adapter the rate of its method, where none was given
``ModelTrainer._save_model``                   leaves a best model that a training which goes on has not beaten
``ModelTrainer._load_model``                   reloads the best model into the live one, without a second base
``trainer.DistributedDataParallel``            in several processes, on CPUs too: sends what is trained, not the base
=============================================  ========================================================================
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flair
import flair.trainers.trainer
import torch
from flair.embeddings import TransformerEmbeddings
from flair.embeddings.base import Embeddings, TokenEmbeddings
from flair.nn import Model
from flair.trainers import ModelTrainer
from peft import PeftConfig, PeftModel

from flair_peft import compat
from flair_peft.adapter import config as configs
from flair_peft.adapter import methods, refusals
from flair_peft.embeddings import head_dtype
from flair_peft.embeddings.adapted import has_nothing_to_embed
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.embeddings.word_and_document import counterpart
from flair_peft.errors import AdapterConfigError, ModelFileError, SaveError, UnsupportedStateError
from flair_peft.export import merge
from flair_peft.models import inputs
from flair_peft.models import load as loading
from flair_peft.models import save as saving
from flair_peft.models.model_class import subclasses
from flair_peft.primitives import host_internals, mapped_memory
from flair_peft.storage import atomic
from flair_peft.torchfile import unpickle
from flair_peft.training import ddp, guard, plugins, position, rates, resume, training_log

log = logging.getLogger("flair_peft")

_MISSING = object()

# A mount point, a folder that is protected: so says a system where a file cannot be replaced, or none made beside it.
_IRREPLACEABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
_lock = threading.RLock()
_trainers: weakref.WeakKeyDictionary[Model, ModelTrainer] = weakref.WeakKeyDictionary()
# Trainers that were told to train without a learning rate → the one that Flair takes then.
_without_rate: weakref.WeakKeyDictionary[ModelTrainer, float] = weakref.WeakKeyDictionary()
_installed: list[_Replacement] = []


class _Replacement:
    """One attribute of a Flair class or module, the descriptor found there, and the one put in its place."""

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
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
        host_internals.tokenize_as_before()


def is_installed() -> bool:
    """Whether the hook is in place."""
    return bool(_installed)


def _load_replacements() -> Iterator[_Replacement]:
    for model_class in [Model, *subclasses(Model)]:
        if "load" in vars(model_class):
            yield _Replacement(model_class, "load", _loading_with_adapters(vars(model_class)["load"]))


def _other_replacements() -> Iterator[_Replacement]:
    for model_class in [Model, *(c for c in subclasses(Model) if "train" in vars(c))]:
        original = vars(model_class).get("train", torch.nn.Module.train)
        yield _Replacement(model_class, "train", _training_in_fp32(original))
    for model_class in [Model, *subclasses(Model)]:
        if inspect.isfunction(vars(model_class).get("predict")):
            yield _Replacement(model_class, "predict", _predicting_what_it_can(vars(model_class)["predict"]))
    yield _Replacement(Model, "save", _saving_what_was_learned(vars(Model)["save"]))
    yield _Replacement(Model, "_apply", _converting_by_the_rule(vars(Model).get("_apply", torch.nn.Module._apply)))
    for owner in (Embeddings, TokenEmbeddings):
        yield _Replacement(owner, "_everything_embedded", _embedding_afresh(vars(owner)["_everything_embedded"]))
    yield _Replacement(TransformerEmbeddings, "to_params", _keeping_config(vars(TransformerEmbeddings)["to_params"]))
    yield _Replacement(
        TransformerEmbeddings, "from_params", _rebuilding_adapter(vars(TransformerEmbeddings)["from_params"])
    )
    yield _Replacement(ModelTrainer, "train_custom", _training_guarded(vars(ModelTrainer)["train_custom"]))
    for name in ("fine_tune", "train"):
        yield _Replacement(ModelTrainer, name, _training_at_suited_rates(vars(ModelTrainer)[name]))
    yield _Replacement(ModelTrainer, "_save_model", _keeping_the_best(vars(ModelTrainer)["_save_model"]))
    yield _Replacement(ModelTrainer, "_load_model", _reloading_in_place(vars(ModelTrainer)["_load_model"]))
    trainer = flair.trainers.trainer
    yield _Replacement(trainer, "DistributedDataParallel", _sending_what_is_trained(trainer.DistributedDataParallel))


def _loading_with_adapters(original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    """Return a ``load`` that takes what has adapters upon itself and leaves the rest to the original.

    Its keyword arguments are those of :func:`flair_peft.from_pretrained`, and ``peft_config`` for files that lack it.
    """

    @functools.wraps(original.__func__)
    def load(cls: type[Model], model_path: Any, *, peft_config: PeftConfig | None = None, **options: Any) -> Model:
        stock_load = original.__get__(None, cls)
        if not _installed or loading.is_flairs_own(model_path):
            given = {} if peft_config is None else {"peft_config": peft_config}
            return stock_load(model_path, **given, **options)
        return loading.load_for_flair(cls, model_path, stock_load, peft_config=peft_config, **options)

    return classmethod(load)


def _training_in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Model, mode: bool = True) -> Model:
        if _installed and mode:
            head_dtype.train_in_fp32_(self)
        return original(self, mode)

    return train


def _predicting_what_it_can(original: Callable[..., Any]) -> Callable[..., Any]:
    name = next(iter([*inspect.signature(original).parameters][1:]), "")

    @functools.wraps(original)
    def predict(self: Model, *args: Any, **kwargs: Any) -> Any:
        if not (_installed and (args or name in kwargs) and adapted_embeddings(self)):
            return original(self, *args, **kwargs)
        inputs.check_embeddings(self)
        inputs.check_points(self, args[0] if args else kwargs[name])
        with head_dtype.in_one(self):
            return original(self, *args, **kwargs)

    return predict


def _converting_by_the_rule(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _apply(self: Model, fn: Callable[..., Any], recurse: bool = True) -> Model:
        if not _installed or not adapted_embeddings(self):
            return original(self, fn, recurse)
        return head_dtype.convert_(self, lambda: original(self, fn, recurse))

    return _apply


def _embedding_afresh(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def _everything_embedded(self: Embeddings, data_points: Any) -> bool:
        # Flair's trainer stores evaluation vectors and reads them again in the next epoch.
        is_fixed = not _installed or has_nothing_to_embed(self, data_points) or not _has_changing_adapter(self)
        return original(self, data_points) and is_fixed

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
        try:
            refusals.refuse_unstorable(self.model)
        except AdapterConfigError as error:
            log.warning("'%s' is stored without its PEFT config, which a load will ask for. %s", self.name, error)
            return params
        encoded = configs.encode_config(self.model.peft_config[methods.ADAPTER_NAME])
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
        if not _installed or not adapted_embeddings(self.model):
            return original(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs)
        settings = arguments.arguments
        inputs.check_embeddings(self.model)
        self.model.train()  # in fp32, before an optimiser or DistributedDataParallel takes note of dtypes
        optimizer = settings.get("optimizer", signature.parameters["optimizer"].default)
        guard.check_training(self.model, settings, optimizer=optimizer)
        settings.update(resume.prepare_settings({**settings}))
        chosen = rates.choose(
            self.model,
            settings,
            optimizer=optimizer,
            is_given=settings.get("learning_rate", _without_rate.get(self)) != _without_rate.get(self),
            past=resume.past_rates(settings),
        )
        settings.update(chosen)
        ddp.prepare(self.model, settings)
        checks = guard.AdapterGuard(chosen, is_head_rate_zero=settings.get("decoder_learning_rate") == 0)
        added = [checks, *([ddp.GlobalSchedule()] if ddp.is_parallel(settings) else [])]
        settings["plugins"] = [*(settings.get("plugins") or []), *added]
        _trainers[self.model] = self
        try:
            with training_log.shared():
                return original(*arguments.args, **arguments.kwargs)
        finally:
            _trainers.pop(self.model, None)
            plugins.detach_known(self)

    return train_custom


def _training_at_suited_rates(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train(self: ModelTrainer, *args: Any, **kwargs: Any) -> Any:
        if not _installed:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        if "learning_rate" not in bound.arguments:
            rates.report_flairs_own(self.model, signature.parameters["learning_rate"].default)
        if not adapted_embeddings(self.model):
            return original(self, *args, **kwargs)
        # Flair appends its schedulers to the list, which the next training may be given, too.
        bound.arguments["plugins"] = list(bound.arguments.get("plugins") or [])
        args, kwargs = bound.args[1:], bound.kwargs
        if "learning_rate" in bound.arguments:
            return original(self, *args, **kwargs)
        # What Flair takes then is made for whole transformers; train_custom cannot tell it from one that was given.
        _without_rate[self] = signature.parameters["learning_rate"].default
        try:
            return original(self, *args, **kwargs)
        finally:
            _without_rate.pop(self, None)

    return train


def _keeping_the_best(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _save_model(self: ModelTrainer, model_file: Any, checkpoint: bool = False) -> None:
        # Flair counts the best score from zero in each training, one that goes on included.
        has_adapter = _installed and bool(adapted_embeddings(self.model))
        if not has_adapter or ddp.agree(position.may_replace(self, model_file)):
            original(self, model_file, checkpoint)

    return _save_model


def _saving_what_was_learned(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save(self: Model, model_file: str | Path, checkpoint: bool = False, *, save_base: bool | None = None) -> None:
        if not _installed:
            return original(self, model_file, checkpoint)
        if not adapted_embeddings(self):
            path = Path(str(model_file))
            if merge.is_merged(self) or _holds_adapter(path):
                return _replace_whole(path, lambda path: original(self, path, checkpoint))
            return original(self, model_file, checkpoint)
        trainer, state = _trainers.get(self) if checkpoint else None, None
        if trainer is not None:
            try:
                state = resume.training_state(trainer, self)
            except UnsupportedStateError as error:  # that must not cost a trained model
                log.warning("'%s' holds the model alone, and no training can go on from it. %s", model_file, error)
        saving.save_file(self, Path(model_file), save_base=save_base, training_state=state)
        return None

    return save


def _replace_whole(path: Path, save: Callable[[Path], None]) -> None:
    """Save to a path, whole or not at all; a file that no other can take the place of is written into, as Flair does.

    The weights of a live model may be mapped from the file that is there, and it may be the only copy of an adapter.
    """
    try:
        atomic.write_file(path, lambda file: save(Path(file.name)))
    except SaveError as error:
        if error.errno not in _IRREPLACEABLE or not path.is_file() or mapped_memory.is_file_mapped(path):
            raise
        save(path)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # of torch's writer, which so reports a full disk
            raise
        raise SaveError(
            f"Cannot save to '{path}': {str(error)[:200]}. torch could not write the file, and what was there is as it "
            "was before. Make room there, or save to another place."
        ) from error


def _holds_adapter(path: Path) -> bool:
    try:
        return path.is_file() and unpickle.holds_adapters(path)
    except ModelFileError:
        return False


def _reloading_in_place(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_model(self: ModelTrainer, model_file: Any) -> None:
        if not _installed or not adapted_embeddings(self.model):
            return original(self, model_file)
        loading.reload_(self.model, Path(model_file))
        return None

    return _load_model


def _sending_what_is_trained(original: type[torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    @functools.wraps(original, updated=())
    def distributed_data_parallel(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        if not _installed or not adapted_embeddings(module):
            return original(module, *args, **options)
        return ddp.wrap(module, *args, **options)

    return distributed_data_parallel
