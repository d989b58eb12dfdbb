"""Every way of loading a Flair model: open what is stored, complete it, build the model."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from flair.nn import Model
from peft import PeftConfig

from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import (
    AdapterConfigError,
    FlairPeftError,
    MissingFileError,
    ModelFileError,
    StateMismatchError,
    UnknownArgumentError,
    name_some,
)
from flair_peft.models import build, directory_layout
from flair_peft.models import model_class as model_classes
from flair_peft.models.stored import Stored, complete, explain_mismatch
from flair_peft.primitives import building, devices, progress
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import LoadOptions, current, within_load
from flair_peft.storage import checkpoint_directory, file_names, held_directory, hub
from flair_peft.torchfile import state_tree, unpickle

# How torch lists the keys that do not fit.
_LISTED = r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)"
_QUOTED = r'"([^"]+)"'


def open_stored(source: Path | dict[str, Any], options: LoadOptions, *, expects_adapters: bool = True) -> Stored:
    """Return the model in a checkpoint directory, a ``.pt`` file or a dictionary, as it is stored there.

    Hashes or checksums are compared, and of a file only what Flair's models with adapters need is unpickled.

    Args:
        source: a directory or file on this machine, or the state of a model.
        options: of the load.
        expects_adapters: False where models without adapters are Flair's own business.

    Raises:
        ModelFileError: there is no model, or it is not as it was written.
        UnsafeFileError: loading it would run code of the file.
    """
    if isinstance(source, dict):
        return Stored("state", source, "the given state", options)
    if not source.is_file():
        return _open_directory(source, dataclasses.replace(options, source=source, owns_state=True))
    return _open_file(source, dataclasses.replace(options, source=source, owns_state=True), expects_adapters)


def _open_file(path: Path, options: LoadOptions, expects_adapters: bool) -> Stored:
    file_names.refuse_part(path)
    with within_load(options=options):
        state = unpickle.read_state(path, expects_adapters=expects_adapters, trust_pickle=options.trust_file)
    return Stored("file", state, str(path), options)


def _open_directory(directory: Path, options: LoadOptions) -> Stored:
    if (directory / file_names.ADAPTER_CONFIG).is_file() and not held_directory.is_checkpoint(directory):
        raise ModelFileError(
            f"Cannot load '{directory}': it is an adapter of PEFT and no Flair model, which has a head and labels as "
            "well. Another library trained it, or the rest was not copied. Make embeddings of it for a model of your "
            f"own: PeftTransformerDocumentEmbeddings.from_adapter('{directory}'), or of the Word class for a tagger."
        )
    found = checkpoint_directory.read(directory)
    model_class = model_classes.class_of_directory(found.document.get("class"), str(directory))
    content = (found.document, found.files, found.tensors)
    return stored_in(*content, model_class=model_class, source=str(directory), options=options)


def stored_in(
    document: Mapping[str, Any],
    files: Mapping[str, bytes],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    model_class: type[Model],
    source: str,
    options: LoadOptions,
) -> Stored:
    """Return the model in the document and the files of a directory, which need not be written yet."""
    with within_load(options=options):
        state = directory_layout.from_files(document, files, tensors)
    prefixes = {index: part["prefixes"] for index, part in enumerate(document["parts"])}
    return Stored("directory", state, source, options, model_class, prefixes=prefixes)


def load_stored(
    stored: Stored,
    model_class: type[Model] = Model,
    *,
    peft_config: PeftConfig | None = None,
    load: Callable[[Any], Model] | None = None,
) -> Model:
    """Return the model that was stored."""
    # How much is drawn depends on which bases are alive already.
    with _naming_mismatches(stored.source), devices.same_random_numbers():
        stored = complete(stored, peft_config)
        model_classes.check_class(model_class, stored)
        try:
            return build.build(stored, (stored.model_class.load if stored.model_class else load) or model_class.load)
        except StateMismatchError as error:
            raise explain_mismatch(error, stored) from error


@progress.shown("loading")
def load_for_flair(
    model_class: type[Model],
    source: Any,
    load: Callable[[Any], Model],
    *,
    peft_config: PeftConfig | None = None,
    revision: str | None = None,
    **options: Any,
) -> Model:
    """Return what ``model_class.load(source)`` means: a model with adapters, or what Flair's own ``load`` returns.

    The source is a path, a Hub id, or the state of a model, which stays as it is.
    """
    chosen, given = choose(**options), options if peft_config is None else {**options, "peft_config": peft_config}
    place = source
    if isinstance(source, dict):
        hub.refuse_revision("a state", revision)
    else:
        file_names.refuse_impossible(source)
        found = hub.find_for_flair(
            str(source), revision=revision, options=chosen, may_be_known=_finds_names_itself(model_class)
        )
        place = found or Path(source)
        if place.is_dir():
            refuse_useless(given, ("peft_config",), str(source), "it is a checkpoint that holds its config")
        elif not place.is_file():
            _refuse_device(place)
            refuse_useless(given, given, str(place), "there is no such file, and no such checkpoint on the Hub")
            name = source if revision is None else f"{source}@{revision}"
            # Flair's own classes call one another's load with the same name: it is looked up once.
            with within_load(left_to_flair=str(name)), hub.looked_up_by_flair(str(name)):
                return load(name)
    stored = open_stored(place, chosen, expects_adapters=False)
    if stored.kind == "directory" or state_tree.has_adapters(stored.state):
        return load_stored(stored, model_class, peft_config=peft_config, load=load)
    refuse_useless(given, given, stored.source, "it holds no adapter")
    with building.lock:
        return load(stored.state)


def is_flairs_own(source: Any) -> bool:
    """Whether Flair itself calls a ``load`` inside one: of a part of what is built, or of what it looks for already."""
    return current().is_building or current().left_to_flair == str(source)


def _finds_names_itself(model_class: type[Model]) -> bool:
    """Whether it is somebody's own class that knows where models of some name are."""
    return not getattr(model_class._fetch_model, "__module__", "").startswith("flair.")


def _refuse_device(path: Path) -> None:
    if path.exists():
        raise ModelFileError(
            f"Cannot load '{path}': it is a pipe or a device. Reading it may never end. Pass a regular file."
        )


def refuse_useless(options: Mapping[str, Any], names: Collection[str], source: str, reason: str) -> None:
    """Raise if an option is given that this load could only ignore."""
    given = sorted(name for name in names if name in options)
    if given:
        raise AdapterConfigError(
            f"Cannot use the {', '.join(given)} given for '{source}': {reason}. These options are meant for models "
            f"with an adapter, and peft_config for files of stock Flair that lack it. Leave out {', '.join(given)}."
        )


@progress.shown("loading")
def from_pretrained(
    source: str | Path,
    *,
    base_model: str | Mapping[str, str] | None = None,
    verify: bool | Literal["full"] = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> Model:
    """Return the Flair model that :func:`save_pretrained` wrote.

    Args:
        source: a directory, a ``.pt`` file, or a Hub id, with ``@revision`` behind it if you like.
        base_model: directory or Hub id of the base model, if it is not where it was; it must be the same model. For a
            checkpoint with several bases, a dictionary from the recorded names.
        verify: True checks the base's fingerprint, and the vectors of a probe sentence and what the head gives for one;
            "full" reads all of the base's weights; False checks nothing of this.
        trust_remote_code: let the base model run code of its own. No checkpoint can switch that on.
        revision: branch, tag or commit on the Hub.
        token: for the Hub.
        cache_dir: of the Hub.
        local_files_only: make no network call.
        device_map: spreads the base over devices, as in transformers; no file does.
        max_memory: what a device map that is computed may take of each device.
        offload_folder: for what a device map leaves on disk.

    Raises:
        ModelFileError: there is no checkpoint, or it is not as it was written.
        FormatVersionError: it was written by a newer version.
        BaseModelNotFoundError: the base model is not found.
        BaseMismatchError: the base model is not the one that the adapter was trained on.
        StateMismatchError: a tensor is missing or left over, or the model does not give the vectors it gave.
    """
    options = choose(
        base_model=base_model,
        verify=verify,
        trust_remote_code=trust_remote_code,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    return load_stored(open_stored(hub.find_checkpoint(str(source), revision=revision, options=options), options))


def choose(**given: Any) -> LoadOptions:
    """Return the options of a load; see :func:`from_pretrained`.

    Raises:
        UnknownArgumentError: there are no such options.
    """
    known = [name for name in inspect.signature(from_pretrained).parameters if name not in ("source", "revision")]
    if unknown := given.keys() - known:
        raise UnknownArgumentError(
            f"Cannot load with {name_some(unknown)}: there is no such option. Loads take {', '.join(known)}, and some "
            "of them revision and peft_config. Check its spelling."
        )
    placement = {name: given.pop(name, None) for name in ("device_map", "max_memory", "offload_folder")}
    cache_dir = None if given.get("cache_dir") is None else str(given["cache_dir"])
    spread = {name: value for name, value in placement.items() if value is not None}
    return LoadOptions(**{**given, "cache_dir": cache_dir, "placement": spread})


@progress.shown("verifying")
def verify(source: str | Path, *, base_model: str | Mapping[str, str] | None = None, **options: Any) -> None:
    """Return if a checkpoint or ``.pt`` file, and every single weight of its base model, is as it was.

    Weights of the base that the file itself holds are as they were if its checksums and the probe are right.

    Args:
        source: directory, Hub id or file.
        base_model: as for :func:`from_pretrained`.
        **options: as for :func:`from_pretrained`.

    Raises:
        ModelFileError: the file holds nothing by which this could be told: stock Flair wrote it, or flair_peft 0.1.0.
        FlairPeftError: it is not; see :func:`from_pretrained`.
    """
    revision, chosen = options.pop("revision", None), choose(base_model=base_model, verify="full", **options)
    stored = open_stored(hub.find_checkpoint(str(source), revision=revision, options=chosen), chosen)
    embedded = adapted_embeddings(load_stored(stored))
    is_known = embedded or stored.kind == "directory"
    if not is_known or any(embeddings.origin is None for embeddings in embedded):
        raise ModelFileError(
            f"Cannot verify '{source}': it loads, but it holds no probe and no record of the base model. "
            "Files that stock Flair or flair_peft 0.1.0 wrote say nothing by which the model and its base could be "
            "proven to be as they were. Load it and save it with save_pretrained."
        )


@progress.shown("loading")
def load_legacy(
    path: str | Path, *, peft_config: PeftConfig | None = None, trust_pickle: bool = False, **options: Any
) -> Model:
    """Return the model in a ``.pt`` file of stock Flair that was trained with an adapter.

    Args:
        path: of the file.
        peft_config: that it was trained with; Flair 0.14.0 to 0.15.1 do not store it.
        trust_pickle: unpickle whatever the file names. It can run any code: only for files whose writer you trust.
        **options: as for :func:`flair_peft.from_pretrained`.

    Raises:
        MissingConfigError: the file lacks the config and none is given; the message prints the one that it implies.
        ConfigMismatchError: its tensors do not fit the config given; the message names both.
        UnsafeFileError: it names what hardly any Flair model needs, and ``trust_pickle`` is False; nothing was run.
        ModelFileError: it is damaged, or no Flair model.
    """
    return load_any_file(Path(path), dataclasses.replace(choose(**options), trust_file=trust_pickle), peft_config)


def load_any_file(
    path: Path, options: LoadOptions, peft_config: PeftConfig | None, *, base_of_slim: str | None = None
) -> Model:
    """Return the model in a ``.pt`` file, of the class that the file names; see :func:`load_legacy`.

    ``base_of_slim`` is where the base is, of a file that does not hold it; others do without.
    """
    file_names.refuse_impossible(path)
    if not path.is_file():
        raise MissingFileError(f"Cannot load '{path}': there is no file. Pass the path of one that Flair wrote.")
    stored = open_stored(path, options)
    if base_of_slim is not None and any(base.is_needed for base in stored.bases.values()):
        stored = dataclasses.replace(stored, options=dataclasses.replace(stored.options, base_model=base_of_slim))
    model_class = model_classes.class_of_file(stored)
    if peft_config is not None and not state_tree.has_adapters(stored.state):
        refuse_useless({"peft_config": peft_config}, ("peft_config",), str(path), "it holds no adapter")
    return load_stored(stored, model_class, peft_config=peft_config)


def reload_(model: Model, path: Path) -> None:
    """The live model holds the weights of a file that was written from it, in the tensors that it had.

    Raises:
        StateMismatchError: the file was written from another model.
    """
    stored = complete(open_stored(path, LoadOptions()))
    embedded = adapted_embeddings(model)
    for index, embeddings in enumerate(embedded):
        embeddings.expect_without(stored.bases.get(index, StoredBase()))
    try:
        with _naming_mismatches(str(path)):
            model.load_state_dict(stored.tensors)
        card = stored.state.get("model_card")
        if isinstance(model.model_card, dict):
            # Of the epoch that the weights are of; files of older versions name none.
            scores = card.get("scores") if isinstance(card, dict) else None
            model.model_card.pop("scores", None)
            model.model_card.update({} if scores is None else {"scores": scores})
    finally:
        for embeddings in embedded:
            embeddings.expect_whole()


@contextmanager
def _naming_mismatches(source: str) -> Iterator[None]:
    """Raise torch's list of keys that do not fit as an error that names the file."""
    try:
        yield
    except (FlairPeftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Flair, PEFT and transformers raise what they like when a file gives them nonsense.
        if "loading state_dict" not in str(error):
            raise ModelFileError(
                f"Cannot build the model in '{source}': {type(error).__name__}: {str(error)[:200]}. Its settings are "
                "not those that this model class has, or this process could not build it. If the file was not copied "
                "whole, or comes from another version, copy or save it again."
            ) from error
        listed = re.findall(_LISTED, str(error))
        found = "; ".join(f"{kind.lower()}: {name_some(re.findall(_QUOTED, names))}" for kind, names in listed)
        raise StateMismatchError(
            f"Cannot load '{source}': {found or error}. The tensors in it and the model built from its settings "
            "differ. Load it with the versions of Flair and PEFT that wrote it. Layers that were put into the model "
            "after it was made are in no settings: make it with them, as its class takes them, and train it again."
        ) from error
