"""Whole Flair models ⇄ files, directories and the Hub."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from flair.nn import Model

from flair_peft.adapter import refusals
from flair_peft.base import learned, weight_files
from flair_peft.base.learned import Part
from flair_peft.codec import state_json
from flair_peft.compat import versions
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import AdapterConfigError, ModelFileError, SaveError
from flair_peft.models import build, card, directory_layout, head_probe, stored_state
from flair_peft.primitives import mapped_memory
from flair_peft.primitives.base_record import LoadOptions, StoredBase, loading_with
from flair_peft.storage import checkpoint_directory, file_names, hub
from flair_peft.torchfile import state_tree, unpickle

# Flair's trainer writes these at protocol 4, whose frames torch's restricted unpickler does not read.
_PICKLE_PROTOCOL = 2

_describing = threading.RLock()


class _StoredState:
    """The state of a model as it is pickled: one call of one function with a text and tensors."""

    def __init__(self, description: directory_layout.Description) -> None:
        self.description = description

    def __reduce__(self) -> Any:
        return state_json.restore_state, (json.dumps(self.description.document), dict(self.description.tensors))


def save_pretrained(model: Model, directory: str | Path, *, save_base: bool | None = None) -> None:
    """The directory holds the model: what was learned, as JSON and safetensors, and nothing that runs code.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own: PEFT alone can load them onto the base. An
    earlier checkpoint in the directory is replaced as a whole; other files in it stay.

    Args:
        model: a Flair model whose embeddings have an adapter.
        directory: is made where it is missing.
        save_base: write the base model's weights too; None means what the embeddings were made with.

    Raises:
        UnsupportedStateError: the model holds an object that files cannot hold; named by field and type.
        AdapterConfigError: the model has no adapter.
        SaveError: the directory could not be written; what was there is as it was.
    """
    write_checkpoint(model, Path(directory), lambda embeddings: _stored_base(embeddings, save_base))


def write_checkpoint(model: Model, directory: Path, plan: Callable[[PeftTransformerEmbeddings], StoredBase]) -> None:
    """The directory holds the model; ``plan`` says how each of its embeddings stores its base."""
    _refuse_base_directory(directory)
    with checkpoint_directory.explained(directory), describing(model, plan=plan) as (description, embedded):
        _report_not_finite(description, directory)
        document, files = directory_layout.to_files(description, embedded)
        size = sum(t.nbytes for content in files.values() if isinstance(content, dict) for t in content.values())
        text = card.write_card(model, embedded, size=size)
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        checkpoint_directory.write(directory, {"class": name, **document}, files, text)


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
    if Path(source).is_file():
        hub.refuse_revision(str(source), revision)
        return load_file(Model, Path(source), options)
    return load_checkpoint(Model, hub.find_checkpoint(str(source), revision=revision, options=options), options)


def choose(
    *,
    base_model: str | Mapping[str, str] | None = None,
    verify: bool | Literal["full"] = True,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> LoadOptions:
    """Return the options of a load; see :func:`from_pretrained`."""
    placement = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    return LoadOptions(
        base_model=base_model,
        verify=verify,
        trust_remote_code=trust_remote_code,
        token=token,
        cache_dir=None if cache_dir is None else str(cache_dir),
        local_files_only=local_files_only,
        placement={name: value for name, value in placement.items() if value is not None},
    )


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
    model = from_pretrained(source, base_model=base_model, verify="full", **options)
    embedded = adapted_embeddings(model)
    if not embedded or any(embeddings.origin is None for embeddings in embedded):
        lacking = "probe and no record of the base model" if embedded else "adapter"
        raise ModelFileError(
            f"Cannot verify '{source}': it loads, but it holds no {lacking}. "
            "Files that stock Flair or flair_peft 0.1.0 wrote say nothing by which the model and its base could be "
            "proven to be as they were. If it has an adapter, load it and save it again."
        )


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    save_base: bool | None = None,
    endpoint: str | None = None,
) -> str:
    """Return the address of the commit by which the Hub holds the model; see :func:`save_pretrained`.

    Args:
        model: a Flair model whose embeddings have an adapter.
        repo_id: ``user/name``; the repository is made where it is missing.
        token: of a user who may write there.
        private: for a new repository.
        revision: branch; it is made where it is missing.
        commit_message: of the commit.
        create_pr: open a pull request.
        save_base: as for :func:`save_pretrained`.
        endpoint: of a Hub other than the public one.

    Raises:
        SaveError: the Hub refused it or could not be reached.
        UnsupportedStateError: the model holds an object that files cannot hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder, "model"), save_base=save_base)
        for embeddings in adapted_embeddings(model):
            if embeddings.base_record is None or Path(embeddings.base_record.name).is_dir():
                hub.report_local_base(embeddings.base_model_name)
        return hub.upload(
            Path(folder, "model"),
            repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            create_pr=create_pr,
            endpoint=endpoint,
        )


def save_file(
    model: Model, path: Path, *, save_base: bool | None = None, training_state: Mapping[str, Any] | None = None
) -> None:
    """The file holds the model in the form of Flair's ``.pt`` files, whole, or it holds what it held before.

    ``torch.load(path, weights_only=True)`` reads it if :func:`flair_peft.codec.restore_state` is allowed.

    Args:
        model: a Flair model whose embeddings have an adapter.
        path: of the file.
        save_base: as for :func:`save_pretrained`.
        training_state: of the trainer, to go on with.

    Raises:
        UnsupportedStateError: the model holds an object that files cannot hold.
        SaveError: the file could not be written.
    """
    extra: dict[str, Any] = {} if training_state is None else {"training_state": dict(training_state)}
    with checkpoint_directory.explained(path), describing(model, save_base=save_base, **extra) as (description, _):
        _report_not_finite(description, path)
        tensors = {name: _alone(tensor) for name, tensor in description.tensors.items()}
        stored = _StoredState(dataclasses.replace(description, tensors=tensors))
        checkpoint_directory.write_file(path, lambda file: torch.save(stored, file, pickle_protocol=_PICKLE_PROTOCOL))


@contextmanager
def describing(
    model: Model,
    *,
    save_base: bool | None = None,
    plan: Callable[[PeftTransformerEmbeddings], StoredBase] | None = None,
    **extra: Any,
) -> Iterator[tuple[directory_layout.Description, list[PeftTransformerEmbeddings]]]:
    """Yield the model as JSON and tensors, and its embeddings; inside, their state dicts are those of the file."""
    embedded = adapted_embeddings(model)
    if not embedded:
        raise AdapterConfigError(
            f"Cannot save this {type(model).__name__} as a checkpoint: none of its embeddings has an adapter. The "
            "format holds what was learned on top of a base model. Use model.save(path)."
        )
    for embeddings in embedded:
        refusals.refuse_unstorable(embeddings.model)
    stored = (_stored_base(embeddings, save_base) if plan is None else plan(embeddings) for embeddings in embedded)
    parts = {id(embeddings): Part(i, base) for i, (embeddings, base) in enumerate(zip(embedded, stored, strict=True))}
    # The probe switches dropout off for a moment, which no other save may see.
    with _describing, learned.storing(parts):
        state = model._get_state_dict()
        state = {**state, head_probe.KEY: head_probe.take(model, state), "versions": versions(), **extra}
        if model.model_card is not None:
            state["model_card"] = card.plain(model.model_card)
        encoded = state_json.encode(state)
        inner = _inner_embeddings(model, parts)
        yield (
            directory_layout.Description(
                *(state_json.encode({**state, state_tree.INNER: inner}) if inner else encoded)
            ),
            embedded,
        )


def _inner_embeddings(model: Model, parts: Mapping[int, Part]) -> dict[str, dict[str, Any]]:
    """Return module prefix → parameters of embeddings that the state lacks: code around them makes them of its own."""
    named = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if id(m) in parts]
    lacking = [(name, m) for name, m in named if not parts[id(m)].is_described]
    return {f"{name}.": m.save_embeddings(use_state_dict=False) for name, m in lacking}


def check_storable(model: Model) -> None:
    """Return if files can hold the model; nothing is written and no base is read.

    Raises:
        UnsupportedStateError: the model holds an object that they cannot hold.
    """
    with describing(model, plan=lambda embeddings: embeddings.without_frozen_weights()):
        pass


def load_checkpoint(model_class: type[Model], directory: Path, options: LoadOptions) -> Model:
    """Return the model in a checkpoint directory.

    Args:
        model_class: the class that it must be of, or derive from.
        directory: of the checkpoint.
        options: of the load.
    """
    _refuse_adapter_directory(directory)
    stored = checkpoint_directory.read(directory)
    found = _find_class(stored.document.get("class"), str(directory))
    if not issubclass(found, model_class):
        raise ModelFileError(
            f"Cannot load '{directory}' as a {model_class.__name__}: it holds a {found.__name__}. Another class would "
            f"read it as something that it is not. Use {found.__name__}.load or flair_peft.from_pretrained."
        )
    with loading_with(dataclasses.replace(options, directory=directory, owns_state=True)):
        state = directory_layout.from_files(stored.document, stored.files, stored.tensors)
        return build.assemble(found.load, state, source=str(directory))


def load_file(model_class: type[Model], path: Path, options: LoadOptions) -> Model:
    """Return the model in a ``.pt`` file that this package wrote; see :func:`load_checkpoint`."""
    with loading_with(dataclasses.replace(options, directory=path.parent, owns_state=True)):
        state = stored_state.with_config(unpickle.read_sound_state(path), None, source=str(path))
        return build.assemble(model_class.load, state, source=str(path))


def reload_(model: Model, path: Path) -> None:
    """The live model holds the weights of a file that was written from it, in the tensors that it had.

    Raises:
        StateMismatchError: the file was written from another model.
    """
    state = unpickle.read_state(path)
    stored = dict(stored_state.stored_bases(state))
    embedded = adapted_embeddings(model)
    for index, embeddings in enumerate(embedded):
        embeddings.expect_without(stored.get(index, StoredBase()))
    try:
        with build.naming_mismatches(str(path)):
            model.load_state_dict(stored_state.tensors_of(state))
    finally:
        for embeddings in embedded:
            embeddings.expect_whole()


def _refuse_adapter_directory(directory: Path) -> None:
    """Return unless an adapter of PEFT lies there: it has no head, and no Flair model can be made of it alone."""
    if (directory / file_names.ADAPTER_CONFIG).is_file() and not checkpoint_directory.is_checkpoint(directory):
        raise ModelFileError(
            f"Cannot load '{directory}': it is an adapter of PEFT and no Flair model, which has a head and labels as "
            "well. Another library trained it, or the rest was not copied. Make embeddings of it for a model of your "
            f"own: PeftTransformerDocumentEmbeddings.from_adapter('{directory}'), or of the Word class for a tagger."
        )


def _report_not_finite(description: directory_layout.Description, path: Path) -> None:
    """Say that the model diverged, which is saved all the same."""
    named = (name.rpartition("state_dict/") for name in description.tensors)
    learned = {name: description.tensors[before + mark + name] for before, mark, name in named if mark}
    stored_state.report_not_finite(learned, f"The model that is saved as '{path}'")


def _refuse_base_directory(directory: Path) -> None:
    """Return unless a transformers model lies there: it would load the adapter of the checkpoint as its own."""
    if (directory / "config.json").exists() and any((directory / name).exists() for name in weight_files.NAMES):
        raise SaveError(
            f"Cannot save to '{directory}': a transformers model is there. It would load the adapter beside it as its "
            "own from then on. Choose another directory."
        )


def _stored_base(embeddings: PeftTransformerEmbeddings, save_base: bool | None) -> StoredBase:
    is_whole = embeddings.save_base if save_base is None else save_base
    return StoredBase(embeddings.base_record) if is_whole else embeddings.compare_with_base()


def _find_class(stored: Any, source: str) -> type[Model]:
    """Return the model class of that name among those that are imported; nothing is imported because of a file."""
    known = {f"{found.__module__}.{found.__qualname__}": found for found in build.subclasses(Model)}
    if not isinstance(stored, str) or stored not in known:
        raise ModelFileError(
            f"Cannot load '{source}': it holds a {stored!r:.200}, and no such model class is imported. Files import "
            "nothing. Import the module that defines it first."
        )
    return known[stored]


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a storage of just its size: torch writes whole storages, and maps them in whole."""
    is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    is_alone = is_alone and not mapped_memory.is_copied_on_write(tensor)
    return tensor if is_alone else tensor.detach().clone(memory_format=torch.contiguous_format)
