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
        replacements = [*_replacements()]
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


def _replacements() -> Iterator[_Replacement]:
    for model_class in [Model, *subclasses(Model)]:
        if "load" in vars(model_class):
            yield _Replacement(model_class, "load", _around(vars(model_class)["load"], _load))
        if model_class is Model or "train" in vars(model_class):
            original = vars(model_class).get("train", torch.nn.Module.train)
            yield _Replacement(model_class, "train", _around(original, _train))
        if inspect.isfunction(original := vars(model_class).get("predict")):
            name = next(iter([*inspect.signature(original).parameters][1:]), "")
            yield _Replacement(model_class, "predict", _around(original, functools.partial(_predict, name)))
    apply = vars(Model).get("_apply", torch.nn.Module._apply)
    yield _Replacement(Model, "_apply", _around(apply, _apply))
    for owner, name, ours in (
        (Model, "save", _save),
        (Embeddings, "_everything_embedded", _everything_embedded),
        (TokenEmbeddings, "_everything_embedded", _everything_embedded),
        (TransformerEmbeddings, "to_params", _to_params),
        (TransformerEmbeddings, "from_params", _from_params),
        (ModelTrainer, "train_custom", _train_custom),
        (ModelTrainer, "fine_tune", _train_at_suited_rates),
        (ModelTrainer, "train", _train_at_suited_rates),
        (ModelTrainer, "_save_model", _save_model),
        (ModelTrainer, "_load_model", _load_model),
        (flair.trainers.trainer, "DistributedDataParallel", _distribute),
    ):
        yield _Replacement(owner, name, _around(vars(owner)[name], ours))


def _around(found: Any, ours: Callable[..., Any]) -> Any:
    """Return what calls ours, with the original of its object in front; once uninstalled, the original alone."""
    function = found.__func__ if isinstance(found, classmethod) else found

    @functools.wraps(function, updated=())
    def replaced(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(function, owner)
        return ours(original, owner, *args, **kwargs) if _installed else original(*args, **kwargs)

    return classmethod(replaced) if isinstance(found, classmethod) else replaced


def _load(
    original: Any, cls: type[Model], model_path: Any, *, peft_config: PeftConfig | None = None, **options: Any
) -> Model:
    """Take what has adapters, and leave the rest to the original.

    The keyword arguments are those of :func:`flair_peft.from_pretrained`, and ``peft_config`` for files that lack it.
    """
    if loading.is_flairs_own(model_path):
        given = {} if peft_config is None else {"peft_config": peft_config}
        return original(model_path, **given, **options)
    return loading.load_for_flair(cls, model_path, original, peft_config=peft_config, **options)


def _train(original: Any, self: Model, mode: bool = True) -> Model:
    if mode:
        head_dtype.train_in_fp32_(self)
    return original(mode)


def _predict(name: str, original: Any, self: Model, *args: Any, **kwargs: Any) -> Any:
    if not ((args or name in kwargs) and adapted_embeddings(self)):
        return original(*args, **kwargs)
    inputs.check_embeddings(self)
    inputs.check_points(self, args[0] if args else kwargs[name])
    with head_dtype.in_one(self):
        return original(*args, **kwargs)


def _apply(original: Any, self: Model, fn: Callable[..., Any], recurse: bool = True) -> Model:
    convert = functools.partial(original, fn, recurse)
    return head_dtype.convert_(self, convert) if adapted_embeddings(self) else convert()


def _everything_embedded(original: Any, self: Embeddings, data_points: Any) -> bool:
    # Flair's trainer stores evaluation vectors and reads them again in the next epoch.
    is_fixed = has_nothing_to_embed(self, data_points) or not _has_changing_adapter(self)
    return original(data_points) and is_fixed


def _has_changing_adapter(embeddings: Embeddings) -> bool:
    return any(
        isinstance(module, TransformerEmbeddings) and module.fine_tune and isinstance(module.model, PeftModel)
        for module in embeddings.modules()
        if isinstance(module, Embeddings)
    )


def _to_params(original: Any, self: TransformerEmbeddings) -> dict[str, Any]:
    params = original()
    if isinstance(self, PeftTransformerEmbeddings) or not isinstance(self.model, PeftModel):
        return params
    try:
        refusals.refuse_unstorable(self.model)
    except AdapterConfigError as error:
        log.warning("'%s' is stored without its PEFT config, which a load will ask for. %s", self.name, error)
        return params
    encoded = configs.encode_config(self.model.peft_config[methods.ADAPTER_NAME])
    # Mark the layout, so that loading in a process that never imported flair_peft imports it.
    return {**params, "peft_config": encoded, "flair_peft_format": compat.FormatVersion(compat.FORMAT_VERSION)}


def _from_params(original: Any, cls: type[TransformerEmbeddings], params: dict[str, Any]) -> TransformerEmbeddings:
    if params.get("peft_config") is None:
        return original(params)
    # Stock Flair trained the words of prompt methods on the rows that it reads.
    return counterpart(cls).from_params({**params, "keep_virtual_rows": True})


def _train_custom(original: Any, self: ModelTrainer, *args: Any, **kwargs: Any) -> Any:
    if not adapted_embeddings(self.model):
        return original(*args, **kwargs)
    signature = inspect.signature(original)
    arguments = signature.bind(*args, **kwargs)
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


def _train_at_suited_rates(original: Any, self: ModelTrainer, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    usual = bound.signature.parameters["learning_rate"].default
    if "learning_rate" not in bound.arguments:
        rates.report_flairs_own(self.model, usual)
    if not adapted_embeddings(self.model):
        return original(*args, **kwargs)
    # Flair appends its schedulers to the list, which the next training may be given, too.
    bound.arguments["plugins"] = list(bound.arguments.get("plugins") or [])
    if "learning_rate" in bound.arguments:
        return original(*bound.args, **bound.kwargs)
    # What Flair takes then is made for whole transformers; train_custom cannot tell it from one that was given.
    _without_rate[self] = usual
    try:
        return original(*bound.args, **bound.kwargs)
    finally:
        _without_rate.pop(self, None)


def _save_model(original: Any, self: ModelTrainer, model_file: Any, checkpoint: bool = False) -> None:
    # Flair counts the best score from zero in each training, one that goes on included.
    if not adapted_embeddings(self.model) or ddp.agree(position.may_replace(self, model_file)):
        original(model_file, checkpoint)


def _save(
    original: Any, self: Model, model_file: str | Path, checkpoint: bool = False, *, save_base: bool | None = None
) -> None:
    if not adapted_embeddings(self):
        path = Path(str(model_file))
        if merge.is_merged(self) or _holds_adapter(path):
            return _replace_whole(path, lambda path: original(path, checkpoint))
        return original(model_file, checkpoint)
    trainer, state = _trainers.get(self) if checkpoint else None, None
    if trainer is not None:
        try:
            state = resume.training_state(trainer, self)
        except UnsupportedStateError as error:  # that must not cost a trained model
            log.warning("'%s' holds the model alone, and no training can go on from it. %s", model_file, error)
    return saving.save_file(self, Path(model_file), save_base=save_base, training_state=state)


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


def _load_model(original: Any, self: ModelTrainer, model_file: Any) -> None:
    if adapted_embeddings(self.model):
        loading.reload_(self.model, Path(model_file))
    else:
        original(model_file)


def _distribute(original: Any, module: torch.nn.Module, *args: Any, **options: Any) -> Any:
    return ddp.wrap(module, *args, **options) if adapted_embeddings(module) else original(*args, **options)
