"""Every way of saving a Flair model: plan what is left out, encode the rest, write it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from flair.distributed_utils import is_main_process
from flair.nn import Model

from flair_peft.base import like_config, weight_files
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import SaveError
from flair_peft.models import card, directory_layout, trial_load
from flair_peft.models.save_plan import Description, SavePlan, check_model, encode, plan_save
from flair_peft.models.stored import report_not_finite
from flair_peft.primitives import host_internals, mapped_memory, progress
from flair_peft.storage import atomic, checkpoint_directory, file_names, hub, manifest

# Flair's trainer writes these at protocol 4, whose frames torch's restricted unpickler does not read.
_PICKLE_PROTOCOL = 2


def save_pretrained(model: Model, directory: str | Path, *, save_base: bool | None = None) -> None:
    """The directory holds the model: what was learned, as JSON and safetensors, and nothing that runs code.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own: PEFT alone can load them onto the base. An
    earlier checkpoint in the directory is replaced as a whole; other files in it stay.

    Of a model without an adapter it holds what a load of Flair's own would bring back, and all weights that are not
    those of a base on this machine. It is loaded from what will be written, and compared, before anything is: that
    takes the memory of a second model.

    Args:
        model: a Flair model.
        directory: is made where it is missing.
        save_base: write the base model's weights too; None means what the embeddings were made with.

    Raises:
        UnsupportedStateError: the model holds an object that files cannot hold, named by field and type, or Flair
            loads something else than it stores.
        AdapterConfigError: its adapter cannot be stored as it is.
        SaveError: the directory could not be written; what was there is as it was.
    """
    check_model(model)
    write_directory(model, file_names.path_of(directory), save_base=save_base)


@progress.shown("saving")
def write_directory(model: Model, directory: Path, **how: Any) -> SavePlan:
    """The directory holds the model, as :func:`flair_peft.models.save_plan.plan_save` plans it if it is told how.

    Returns:
        The plan.
    """
    _refuse_base_directory(directory)
    with atomic.explained(directory):
        plan = plan_save(model, **how)
        description = encode(plan)
        document, files = directory_layout.to_files(description, plan)
        if adapted_embeddings(model):
            _report_not_finite(description, directory)
        else:
            trial_load.compare_with_load(model, document, files, source=str(directory))
        size = sum(t.nbytes for content in files.values() if isinstance(content, dict) for t in content.values())
        bases = {part.embeddings: part.stored for part in plan.parts if part.is_plain}
        text = card.write_card(model, [part.embeddings for part in plan.parts], size=size, bases=bases)
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        checkpoint_directory.write(directory, {"class": name, **document}, files, text)
    return plan


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
        model: a Flair model.
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
        for part in write_directory(model, Path(folder, "model"), save_base=save_base).parts:
            record = part.stored.record
            if (record is None or Path(record.name).is_dir()) and (part.stored.is_needed or not part.is_plain):
                hub.report_local_base(part.embeddings.base_model_name)
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


@progress.shown("saving")
def save_file(
    model: Model, path: Path, *, save_base: bool | None = None, training_state: Mapping[str, Any] | None = None
) -> None:
    """The file holds the model in the form of Flair's ``.pt`` files, whole, or it holds what it held before.

    ``torch.load(path, weights_only=True)`` reads it if :func:`flair_peft.codec.restore_state` is allowed.

    Raises:
        UnsupportedStateError: the model holds an object that files cannot hold.
        SaveError: the file could not be written.
    """
    extra = {} if training_state is None else {"training_state": dict(training_state)}
    with atomic.explained(path):
        description = encode(plan_save(model, save_base=save_base), **extra)
        _report_not_finite(description, path)
        stored = Description(description.document, _alone(description.tensors))
        atomic.write_file(path, lambda file: torch.save(stored, file, pickle_protocol=_PICKLE_PROTOCOL))


# Bytes of models that are loaded once more to see whether a load gives them back.
_LARGEST_TRIAL = 1 << 30


def check_storable(model: Model) -> None:
    """Return if files can hold the model, and say if they would not give it back; nothing is written.

    The latter is tried where a model is small, and none of its code came with a base: it is read, and compared as for a
    save.

    Raises:
        UnsupportedStateError: the model holds an object that they cannot hold, or its transformer other layers than
            its config says.
    """
    embedded = adapted_embeddings(model)
    for each in embedded:
        like_config.refuse_unlike_config(each.base_model)
    size = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    has_code = any(each.base_record is not None and each.base_record.needs_remote_code for each in embedded)
    is_large = size > _LARGEST_TRIAL or any(each.is_placed for each in embedded)
    if is_large or has_code or not is_main_process():  # one of several processes is enough
        encode(plan_save(model, stored_base=lambda each: each.base_source.without_frozen(each.model)))
    else:
        plan = plan_save(model)
        trial_load.report_loss(plan, encode(plan))


def _report_not_finite(description: Description, path: Path) -> None:
    """Say that the model diverged, which is saved all the same."""
    named = (name.rpartition("state_dict/") for name in description.tensors)
    learned = {name: description.tensors[before + mark + name] for before, mark, name in named if mark}
    report_not_finite(learned, f"The model that is saved as '{path}'")


def _refuse_base_directory(directory: Path) -> None:
    """Return unless a transformers model lies there, which would load an adapter of the checkpoint as its own.

    One for PEFT has its weights in files of the names that those of a checkpoint have.
    """
    is_for_peft = (directory / file_names.ADAPTER_WEIGHTS).exists() and not (directory / manifest.DOCUMENT).exists()
    has_weights = is_for_peft or any((directory / name).exists() for name in weight_files.NAMES)
    if (directory / "config.json").exists() and has_weights:
        raise SaveError(
            f"Cannot save to '{directory}': a transformers model is there. Its files and those of a checkpoint would "
            "lie among each other, and be read as one model. Choose another directory."
        )


def _alone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors, each in a storage of just its size: torch writes whole storages, and maps them in whole.

    Those that have the same elements stay one, such as the weights of embeddings that several tasks share.
    """
    found: dict[str, torch.Tensor] = {}
    copies: dict[Hashable, torch.Tensor] = {}
    for name, tensor in tensors.items():
        is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if is_alone and not host_internals.is_copied_on_write(tensor):
            found[name] = tensor
            continue
        place = mapped_memory.place_of(tensor)
        if place not in copies:
            copies[place] = tensor.detach().clone(memory_format=torch.contiguous_format)
        found[name] = copies[place]
    return found
