"""Whether a base model fits into the memory that is free, before anything of it is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import HFValidationError
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from flair_peft.backbone import ENCODER_OF_T5, find_file
from flair_peft.dtypes import DtypeLike, parse_dtype
from flair_peft.errors import InsufficientMemoryError

_HEADER_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000

# Bytes of a number, by its name in safetensors.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}


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
    safetensors. The headers of these are read, not their tensors.

    Args:
        source: directory or Hub id.
        config: of the model; may say how it is quantised.
        dtype: of the weights in memory; ``None`` means torch's default, ``"auto"`` that of the file.
        kwargs: for ``from_pretrained``.
        device: where the weights go.

    Raises:
        InsufficientMemoryError: they are larger; the message names both sizes, in bytes and GB.
    """
    is_other_file = kwargs.get("variant") is not None or kwargs.get("use_safetensors") is False
    if kwargs.get("device_map") is not None or hasattr(config, "quantization_config") or is_other_file:
        return
    unread = "decoder." if config.model_type in ENCODER_OF_T5 else None
    try:
        stored = _count_numbers(source, kwargs, unread=unread)
    except (OSError, HFValidationError, ValueError, LookupError, TypeError, RecursionError, struct.error):
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


def _count_numbers(source: str, kwargs: Mapping[str, Any], *, unread: str | None) -> dict[int, int]:
    """Return bytes of a number in the files → how many there are, but for tensors whose names start with ``unread``."""
    counts: dict[int, int] = {}
    for path in _files(source, kwargs):
        with path.open("rb") as file:
            (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
            entries = json.loads(file.read(length)) if length < _LARGEST_HEADER else {}
        for name, entry in entries.items():
            if name != "__metadata__" and not (unread and name.startswith(unread)):
                start, end = entry["data_offsets"]
                size = _SIZES.get(entry["dtype"], 1)
                counts[size] = counts.get(size, 0) + (end - start) // size
    return counts


def _files(source: str, kwargs: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors that hold the weights, downloaded where transformers would download them next."""
    found = find_file(source, SAFE_WEIGHTS_NAME, kwargs)
    if found is not None:
        return [found]
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME, kwargs)
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [find_file(source, name, kwargs) for name in names]
    return [file for file in files if file is not None]


def _readable(size: int) -> str:
    return f"{size:,} bytes ({size / 1e9:.1f} GB)"
