"""What lies in a model file or directory of any kind, read from headers and opcodes: nothing is loaded or run.

A "checkpoint" is a directory of this package and a "file" a ``.pt`` file of it; "stock" is a ``.pt`` file of Flair's
own, with or without an adapter, and "adapter" a directory of PEFT's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from flair_peft.adapter import keys
from flair_peft.errors import MissingFileError, ModelFileError, name_some
from flair_peft.primitives import strict_json
from flair_peft.primitives.held_file import AnyFile, HeldFile, held
from flair_peft.storage import file_names, held_directory
from flair_peft.torchfile.outline import Outline, read_outline, tensors_in
from flair_peft.torchfile.stand_ins import ITEM_BYTES, Made, Tensor

if TYPE_CHECKING:
    import torch

CHECKPOINT, FILE, STOCK, ADAPTER = "checkpoint", "file", "stock", "adapter"

_RESTORE = "flair_peft.codec.restore_state"
_ADAPTER_FILES = (file_names.ADAPTER_WEIGHTS, file_names.OLD_ADAPTER_WEIGHTS)
_LARGEST_CONFIG = 16 << 20

# As safetensors calls them, where torch's own names differ.
_DTYPES = {
    **{f"{letter}{bits}": f"{name}{bits}" for letter, name in (("F", "float"), ("I", "int")) for bits in (16, 32, 64)},
    **{"BF16": "bfloat16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"},
    **{"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: by torch's name, such as "float32".
        shape: of the tensor.
        bytes: of its elements.
        storage: what two tensors have in common that share their bytes.
        read: returns its elements.
        part: where its elements lie in the storage.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    storage: Hashable
    read: Callable[[], torch.Tensor] = field(compare=False)
    part: Hashable = None

    @property
    def view(self) -> Hashable:
        """What two tensors have in common that are the same elements in the same order."""
        return self.storage, self.part, self.dtype, self.shape


@dataclass(frozen=True)
class Contents:
    """What a model file, a checkpoint directory or an adapter of PEFT holds: its state, and its tensors by name.

    Attributes:
        path: of the file or directory.
        kind: one of the four above.
        model_class: "module.qualname" or name of the Flair class, if it is a Flair model.
        state: of the Flair model: JSON of :mod:`flair_peft.codec.state_json`, or what a pickle would become.
        tensors: name → tensor; those of the model's state dict begin with "state_dict/".
        configs: PEFT's configs that lie in files of their own, by the number of the embeddings.
        prefixes: what stands in front of the names of a transformer's tensors, by the number of the embeddings; every
            task of a model that shares them has names of its own.
        twins: tensors that hold once more what others hold, for PEFT to read.
        files: name → bytes of each file.
        held: name → file, of a checkpoint: what is read of it later is read of these.
        damage: what shows already that it is not whole.
    """

    path: Path
    kind: str
    model_class: str | None
    state: Mapping[Any, Any]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    configs: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    prefixes: tuple[tuple[str, ...], ...] = ()
    twins: Mapping[str, StoredTensor] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    held: Mapping[str, HeldFile] = field(default_factory=dict)


def read_contents(path: Path) -> Contents:
    """Return what a model file, a checkpoint directory or an adapter of PEFT holds; no tensor is read.

    Raises:
        ModelFileError: nothing, nothing of these kinds, or something damaged.
        FormatVersionError: a checkpoint that was written by a newer flair_peft.
    """
    file_names.refuse_part(path)
    if path.is_file():
        return _read_file(path)
    if held_directory.is_checkpoint(path):
        return _read_checkpoint(path)
    if path.is_dir() and (path / file_names.ADAPTER_CONFIG).is_file():
        return _read_adapter(path)
    if path.is_dir():
        models = sorted(each.name for each in path.glob("*.pt"))
        is_of_transformers = (path / "config.json").is_file()
        nothing = "a model of transformers" if is_of_transformers else "no checkpoint and no adapter"
        what = f"it is a directory that holds {name_some(models) or nothing}"
    else:
        what = "it is neither a file nor a directory" if path.exists() else "there is no such file or directory"
    raise (ModelFileError if path.exists() else MissingFileError)(
        f"Cannot read '{path}': {what}. Only checkpoints of flair_peft, .pt files of Flair and PEFT's adapter "
        "directories can be read, on this machine. Check the path."
    )


def _read_file(path: Path) -> Contents:
    found = read_outline(path)
    files = {path.name: found.path.stat().st_size}
    if isinstance(found.value, Made) and found.value.name == _RESTORE:
        text, tensors = found.value.arguments
        state = _parse(text, path)
        kind, named = FILE, _tensors_of(found, tensors, path)
    else:
        state, kind, named = found.value, STOCK, _tensors_of(found, found.value, path)
    if not isinstance(state, dict) or not ("state_dict" in state or "model_states" in state):
        raise ModelFileError(
            f"Cannot read '{path}': it holds no model of Flair, which has a 'state_dict' beside its settings. Pass a "
            "file that model.save() or Flair's trainer wrote."
        )
    name = state.get("__cls__")
    # Embeddings call their transformer "model".
    modules = keys.find_adapter_prefixes(key for key in named if "state_dict/" in key)
    prefixes = tuple((f"{module}model.",) for module in modules)
    model_class = name if isinstance(name, str) else None
    return Contents(path, kind, model_class, state, named, files, prefixes=prefixes)


def _tensors_of(found: Outline, value: Any, path: AnyFile) -> dict[str, StoredTensor]:
    try:
        tensors = tensors_in(value)
    except ModelFileError as error:
        raise ModelFileError(f"Cannot read '{path}': {error}. It was never written by Flair.") from error

    def stored(tensor: Tensor) -> StoredTensor:
        part = (tensor.offset, tensor.strides)
        return StoredTensor(
            tensor.dtype, tensor.shape, tensor.bytes, tensor.storage.key, lambda: found.read(tensor), part
        )

    return {name: stored(tensor) for name, tensor in tensors.items()}


def _read_checkpoint(path: Path) -> Contents:
    document, opened = held_directory.hold(path)
    parts, state = document.body.get("parts"), document.body.get("model")
    if not isinstance(state, dict) or not isinstance(parts, list) or not all(map(file_names.is_part, parts)):
        raise _odd(path, "what it says of its model does not make sense")
    tensors = dict[str, StoredTensor]()
    files = {name: file.stat().st_size for name, file in opened.items()}
    damage = _compare_sizes({name: entry.bytes for name, entry in document.files.items()}, files)
    for name in (file_names.HEAD, file_names.BASE):
        if name in files:
            tensors.update(read_safetensors(opened[name]))
    configs, twins = dict[int, Any](), dict[str, StoredTensor]()
    for index, part in enumerate(parts):
        folder = file_names.folder_of(index)
        if folder + file_names.ADAPTER_CONFIG in files:
            configs[index] = _read_json(opened[folder + file_names.ADAPTER_CONFIG])
        if folder + file_names.ADAPTER_WEIGHTS in files:
            first, adapter = part["prefixes"][0], read_safetensors(opened[folder + file_names.ADAPTER_WEIGHTS])
            for name, tensor in adapter.items():
                (twins if name in part["only_for_peft"] else tensors)[first + name] = tensor
            for name, other in part.get("same_as", {}).items():
                held = adapter.get(other) or tensors.get(first + other)
                if held is not None:
                    tensors[first + name] = held
    model_class = document.body.get("class")
    return Contents(
        path=path,
        kind=CHECKPOINT,
        model_class=model_class if isinstance(model_class, str) else None,
        state=state,
        tensors=tensors,
        files=files,
        configs=configs,
        prefixes=tuple(tuple(part["prefixes"]) for part in parts),
        twins=twins,
        damage=tuple(damage),
        held=opened,
    )


def _compare_sizes(listed: Mapping[str, int], found: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each file that is not as it was saved."""
    for name, size in listed.items():
        if name not in found:
            yield f"the file '{name}' is missing"
        elif found[name] != size:
            yield f"the file '{name}' has {found[name]} bytes, not {size} as when it was saved"


def _read_adapter(path: Path) -> Contents:
    opened = held_directory.hold_files(path, (file_names.ADAPTER_CONFIG, *_ADAPTER_FILES))
    if file_names.ADAPTER_CONFIG not in opened:
        raise _odd(path, f"its {file_names.ADAPTER_CONFIG} cannot be opened")
    config = _read_json(opened[file_names.ADAPTER_CONFIG])
    name = next((name for name in _ADAPTER_FILES if name in opened), None)
    tensors: Mapping[str, StoredTensor] = {}
    if name is not None:
        is_safe = name.endswith(".safetensors")
        tensors = read_safetensors(opened[name]) if is_safe else read_pickled(opened[name])
    return Contents(
        path=path,
        kind=ADAPTER,
        model_class=None,
        state={},
        tensors=tensors,
        files={file.name: file.stat().st_size for file in path.iterdir() if file.is_file()},
        configs={0: config},
        prefixes=(("",),),
        damage=() if name is not None else (f"the file '{_ADAPTER_FILES[0]}' is missing",),
    )


def read_pickled(path: AnyFile) -> dict[str, StoredTensor]:
    """Return the tensors of a torch file that holds nothing else.

    Raises:
        ModelFileError: it cannot be read.
    """
    found = read_outline(path)
    return _tensors_of(found, found.value, path)


def read_safetensors(path: AnyFile) -> dict[str, StoredTensor]:
    """Return the tensors of a file in safetensors' format, from its header.

    Raises:
        ModelFileError: it cannot be read.
    """
    file = held(path)

    def read(name: str) -> torch.Tensor:
        with safetensors.safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    try:
        with safetensors.safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
            found = ((name, part, functools.partial(read, name)) for name, part in slices.items())
            return {name: _stored(part, (str(path), name), reading) for name, part, reading in found}
    except Exception as error:  # safetensors fails in many ways on what is damaged
        raise _odd(path, f"it holds no tensors in safetensors' format ({error})") from error


def _stored(part: Any, storage: Hashable, read: Callable[[], torch.Tensor]) -> StoredTensor:
    dtype, shape = _DTYPES.get(part.get_dtype(), part.get_dtype().lower()), tuple(part.get_shape())
    return StoredTensor(dtype, shape, math.prod(shape) * ITEM_BYTES.get(dtype, 1), storage, read)


def _read_json(path: HeldFile) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise _odd(path, f"it has more than {_LARGEST_CONFIG} bytes")
    with path.open() as file:
        return _parse(file.read().decode("utf-8", "replace"), path)


def _parse(text: Any, path: AnyFile) -> dict[str, Any]:
    """Return the JSON object that a text is."""
    try:
        found = strict_json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _odd(path, f"it holds no JSON object ({type(error).__name__}: {str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise _odd(path, f"it holds no JSON object but a {type(found).__name__}")
    return found


def _odd(path: AnyFile, why: str) -> ModelFileError:
    return ModelFileError(
        f"Cannot read '{path}': {why}. It is damaged, or was not written by flair_peft, Flair or PEFT. Copy or save it "
        "again."
    )
