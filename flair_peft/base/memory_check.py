"""Whether a base model fits into the memory that is free, and whether files can fill what they have built."""

from __future__ import annotations

import contextlib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from flair_peft.adapter import traits
from flair_peft.base import weight_files
from flair_peft.base.transformer import ENCODER_OF_T5
from flair_peft.base.unusable import UNUSABLE
from flair_peft.errors import InsufficientMemoryError, ModelFileError
from flair_peft.primitives import load_context
from flair_peft.primitives.dtypes import DtypeLike, parse_dtype


def check_fits(
    source: str,
    config: PretrainedConfig,
    *,
    dtype: DtypeLike | None,
    kwargs: Mapping[str, Any],
    device: torch.device | str,
) -> None:
    """Return if the weights of a base model are no larger than the memory that is free on the device.

    Nothing is compared where transformers or accelerate spread the weights over devices, and where the source holds no
    safetensors. The headers of these are read, not their tensors. The dtype is that in memory: ``None`` for torch's
    default, ``"auto"`` for that of the file.

    Raises:
        InsufficientMemoryError: they are larger; the message names both sizes, in bytes and GB.
    """
    is_other_file = kwargs.get("variant") is not None or kwargs.get("use_safetensors") is False
    if kwargs.get("device_map") is not None or hasattr(config, "quantization_config") or is_other_file:
        return
    unread = "decoder." if config.model_type in ENCODER_OF_T5 else None
    try:
        stored = _count_numbers(source, kwargs, unread=unread)
    except UNUSABLE:
        return  # who loads it says what is wrong with it
    itemsize = _bytes_per_number(dtype, kwargs)
    needed = int(sum(count * (itemsize or size) for size, count in stored.items()))
    free = _free_memory(torch.device(device))
    if needed > free:
        raise InsufficientMemoryError(
            f"Cannot load the base model '{source}' onto {device}: its weights take {_readable(needed)}, and "
            f"{_readable(free)} are free. Loading would end in an out-of-memory error or in swapping. Use "
            "dtype='bfloat16' or a quantised base, let transformers_model_kwargs={'device_map': 'auto', "
            "'offload_folder': …} spread it, or choose a smaller model."
        )


def _bytes_per_number(dtype: DtypeLike | None, kwargs: Mapping[str, Any]) -> float | None:
    """Return the bytes that a weight takes in memory, at least; ``None`` means as many as in the file."""
    settings = kwargs.get("quantization_config")
    if kwargs.get("load_in_4bit") or getattr(settings, "load_in_4bit", False):
        return 0.5
    if settings is not None or kwargs.get("load_in_8bit"):
        return 1 if kwargs.get("load_in_8bit") or getattr(settings, "load_in_8bit", False) else 0.25
    if dtype == "auto":
        return None
    return (torch.get_default_dtype() if dtype is None else parse_dtype(dtype)).itemsize


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _count_numbers(source: str, kwargs: Mapping[str, Any], *, unread: str | None) -> Counter[float]:
    """Return bytes of a number in the files → how many there are, but for tensors whose names start with ``unread``."""
    counts: Counter[float] = Counter()
    for path in weight_files.find(source, {**kwargs, "use_safetensors": True}):
        for entry in weight_files.read_header(path):
            if not (unread and entry.name.startswith(unread)):
                counts[entry.itemsize] += entry.numbers
    return counts


def _readable(size: int) -> str:
    return f"{size:,} bytes ({size / 1e9:.1f} GB)"


# What makes tensors: those whose size their arguments say, and copies.
_SIZED: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint),
        *(torch.eye, torch.arange, torch.linspace, torch.randperm, torch.empty_strided, torch.tril_indices),
    }
)
_MAKING = _SIZED | {torch.Tensor.__deepcopy__}

# Made within a second, whatever files hold.
_FEW_TENSORS, _FEW_NUMBERS = 10_000, 1 << 25

# Parts of a model that have no weights, or share them, and what a method computes from the weights of the base.
_TENSORS_FOR_EACH, _TENSORS_FOR_EACH_ADAPTED, _NUMBERS_FOR_EACH = 16, 32, 12

# Of bases of which nothing tells what their files hold.
_UNKNOWN = (100_000, 1 << 50)


class Bounds(TorchFunctionMode):
    """Ends what a thread builds from a file once it is larger than the weights in files can make use of.

    A number in a file can ask for any number of layers, or of rows. The weights that fill them must be in a file, too.

    Attributes:
        largest: of the sizes of tensors in the file.
        count: of tensors in the file.
    """

    def __init__(self, source: str, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.source = source
        self.count, self._numbers = len(tensors), sum(tensor.numel() for tensor in tensors.values())
        self.largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
        self.begin()
        self._bases: dict[str, Mapping[str, Any]] = {}
        self._counted: dict[str, tuple[int, int]] = {}

    def check_settings(self, settings: Any) -> None:
        """Return if the ranks and lists in the config of an adapter are no larger than the tensors can make them.

        Raises:
            ModelFileError: they are.
        """
        size = max(_USUAL_SIZE, self.largest)
        with contextlib.suppress(RecursionError):  # who reads a config that is so deep says so
            for name, value in settings.items() if isinstance(settings, Mapping) else ():
                is_size = name in _RANKS and not traits.of_method(str(settings.get("peft_type"))).has_free_rank
                too_large = [number for number in _numbers_in(value) if number > size] if is_size else []
                if too_large or _entries(value, size) > max(_USUAL_ENTRIES, _TENSORS_FOR_EACH * self.count):
                    what = f"{max(too_large):,}" if too_large else f"{len(value):,} entries"
                    raise ModelFileError(
                        f"Cannot build the adapter in '{self.source}': its config has {what} in '{name}', and the file "
                        "has no tensor that is so large, or not so many. It is not the config that the tensors were "
                        "trained with. Correct it, or copy or save the file again."
                    )

    def begin(self, factor: int = _TENSORS_FOR_EACH) -> None:
        """Begin to count anew: a model is built next, or an adapter, with so many tensors for each in the files."""
        self._made, self._held, self._factor = 0, 0, factor

    def know_base(self, source: str, kwargs: Mapping[str, Any]) -> None:
        """Let the weights in the files of a base count, which is built next; they are looked at when that matters."""
        self.begin()
        self._bases.setdefault(source, kwargs)

    def know_model(self, model: PreTrainedModel) -> None:
        """Let the weights of a base that is there count; an adapter is added next."""
        self.begin(_TENSORS_FOR_EACH_ADAPTED)
        self._numbers += sum(parameter.numel() for parameter in model.parameters())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, if that makes no tensor too much."""
        if func in _MAKING:
            self._allow(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _allow(self, func: Any, args: Any, kwargs: Any) -> None:
        size = _size_of(func, args, kwargs) if func in _SIZED else args[0].numel()
        self._made += size > 0
        self._held += size
        if self._made > _FEW_TENSORS and self._made > self._factor * (self.count + self._of_bases[0]):
            raise self._error(f"{self._made:,} tensors")
        if self._held > _FEW_NUMBERS and self._held > _NUMBERS_FOR_EACH * (self._numbers + self._of_bases[1]):
            raise self._error(f"{self._held:,} numbers")

    @property
    def _of_bases(self) -> tuple[int, int]:
        """How many tensors and numbers the files of the bases hold."""
        for source, kwargs in self._bases.items():
            if source not in self._counted:
                self._counted[source] = _count(source, kwargs)
        counted = self._counted.values()
        return sum(tensors for tensors, _ in counted), sum(numbers for _, numbers in counted)

    def _error(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"Cannot build what '{self.source}' describes: it asks for {what} or more, and the weights in its files "
            "and those of its base do not fill so many. The number of layers, of rows or the rank in its settings is "
            "not the one that it was trained with. Correct it, or copy or save the file again."
        )


@contextlib.contextmanager
def bounded(source: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[Bounds]:
    """Inside, this thread builds nothing that the tensors of a file, and the files of its bases, could not fill.

    Raises:
        ModelFileError: it would.
    """
    outer = bounds()
    if outer is not None:
        yield outer
        return
    with Bounds(source, tensors) as inside, load_context.within_load(bounds=inside):
        yield inside


def bounds() -> Bounds | None:
    """Return the bounds of what is being built from a file, if anything is."""
    found: Bounds | None = load_context.current().bounds
    return found


# What PEFT calls the ranks and counts that are sizes of tensors in the file, with most methods.
_RANKS = ("r", "init_r", "target_r", "num_virtual_tokens", "num_vectors", "n_frequency", "rank_pattern")
_USUAL_SIZE, _USUAL_ENTRIES = 1024, 2_000


def _numbers_in(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    for part in value.values() if isinstance(value, Mapping) else ():
        yield from _numbers_in(part)


def _entries(value: Any, size: int) -> int:
    """Return how many entries a setting has, beside numbers of which there are as many as rows in a tensor."""
    if isinstance(value, Mapping):
        return len(value) + sum(_entries(part, size) for part in value.values())
    if not isinstance(value, list | tuple | set) or (len(value) <= size and all(type(p) in (int, bool) for p in value)):
        return 0
    return len(value) + sum(_entries(part, size) for part in value if isinstance(part, Mapping | list))


def _size_of(func: Any, args: Any, kwargs: Any) -> int:
    on_meta = {
        name: value for name, value in kwargs.items() if name not in ("device", "generator", "pin_memory", "out")
    }
    try:
        return int(func(*args, **on_meta, device="meta").numel())
    except (RuntimeError, TypeError, NotImplementedError):
        return 0  # it fails there, too


def _count(source: str, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many tensors and numbers the files of a base hold, at least; nothing of them is read but headers."""
    with contextlib.suppress(*UNUSABLE, zipfile.BadZipFile):
        paths = weight_files.find(source, kwargs)
        if paths:
            counted = [_count_in(path) for path in paths]
            return sum(tensors for tensors, _ in counted), sum(numbers for _, numbers in counted)
    return _UNKNOWN


def _count_in(path: Path) -> tuple[int, int]:
    if path.suffix == ".safetensors":
        entries = list(weight_files.read_header(path))
        return len(entries), sum(entry.numbers for entry in entries)
    with zipfile.ZipFile(path) as archive:
        return len(archive.namelist()), path.stat().st_size
