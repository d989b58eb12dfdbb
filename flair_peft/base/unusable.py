"""Bases that cannot be used: what transformers raises for them, and the error that says why there is none."""

from __future__ import annotations

import textwrap
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from flair_peft.errors import OF_LIBRARIES, BaseModelNotFoundError

# What transformers raises for files that it cannot make a model of.
UNUSABLE = (*OF_LIBRARIES, OSError, SafetensorError)

# File that stands in its place → what is there, and who reads it.
_NO_BASES = {
    "flair_peft.json": ("a Flair model", "Load it with from_pretrained, or the load of a SharedBase"),
    "adapter_config.json": ("an adapter of PEFT", "Make embeddings of it with the from_adapter of their class"),
}


def first_line(error: Exception) -> str:
    """Return what an error of another library says, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 240, placeholder=" …").rstrip(".:") if lines else "no reason given"


def not_found(source: str, error: Exception) -> BaseModelNotFoundError:
    """Return the error that says why there is no base model, or no complete one, at the source."""
    if "trust_remote_code=True" in str(error):
        return BaseModelNotFoundError(
            f"Cannot load the base model '{source}': it comes with code of its own, which would run on this machine. "
            "No file may switch that on. If you trust that code, pass trust_remote_code=True."
        )
    folder = Path(source)
    if folder.is_file():
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{source}': that is a file. A base is a directory with a transformers "
            "model, or its name on the Hub. Pass one of these; a whole Flair model is loaded by the load of its class."
        )
    if folder.is_dir() and not any(folder.glob("config.json")) and not any(folder.glob("*/config.json")):
        for name, (what, way) in _NO_BASES.items():
            if (folder / name).is_file():
                return BaseModelNotFoundError(
                    f"Cannot load the base model from '{source}': it holds {what}, and is no transformers model. {way}."
                )
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{source}': there is no config.json in it. It is not a transformers model"
            f"{'' if any(folder.iterdir()) else ', but an empty folder'}. Pass a directory that holds config.json, the "
            "weights and the tokenizer."
        )
    if folder.is_dir() or not isinstance(error, OSError | HFValidationError):
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{source}': {type(error).__name__}: {first_line(error)}. It is not a "
            "complete model, or none that the installed transformers can build. Pass a directory that holds "
            "config.json, the weights and the tokenizer, or install the version that wrote it."
        )
    return BaseModelNotFoundError(
        f"Cannot find the base model '{source}'. It is neither a directory with a transformers model nor in the local "
        "cache, and it could not be downloaded. Check the name, or pass the path of a directory that holds "
        "config.json, the weights and the tokenizer."
    )
