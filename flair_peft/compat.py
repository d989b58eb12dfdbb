"""Supported versions of the host libraries, and the mark that files of this package carry."""

from __future__ import annotations

import inspect
from typing import Any

import flair
import peft
import torch
import transformers
from flair.nn import Model
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from flair_peft._version import __version__
from flair_peft.errors import FormatVersionError, UnsupportedHostError

FLAIR_VERSIONS = SpecifierSet(">=0.15.1,<0.16", prereleases=True)
# 1: the base's weights are in the file. 2: they need not be.
FORMAT_VERSION = 2

_EXPECTED_PARAMETERS = {
    "load": ["model_path"],
    "save": ["self", "model_file", "checkpoint"],
    "_get_state_dict": ["self"],
}


class FormatVersion(int):
    """The number of the layout in which embeddings parameters were written.

    It is a class of this package on purpose: whoever unpickles a file that holds one imports flair_peft, which
    registers the embeddings. Without it, Flair ends in a bare ``KeyError`` where the package was never imported.
    """


def check_format_version(version: Any) -> None:
    """Return if embeddings parameters of this layout ``version`` can be read here.

    Raises:
        FormatVersionError: the layout is newer than this package.
    """
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FormatVersionError(
            f"Cannot read these embeddings: they are in layout version {version}. This flair_peft reads versions up "
            f"to {FORMAT_VERSION}. Upgrade it: pip install --upgrade flair_peft."
        )


def check_host() -> None:
    """Return if the installed Flair has the version and the signatures that the hook was written for.

    Raises:
        UnsupportedHostError: it has not; nothing has been changed.
    """
    if Version(flair.__version__) not in FLAIR_VERSIONS:
        raise UnsupportedHostError(
            f"flair_peft cannot hook into Flair {flair.__version__}. Its hook was written for Flair {FLAIR_VERSIONS}. "
            "Install one of those."
        )
    for name, expected in _EXPECTED_PARAMETERS.items():
        found = list(inspect.signature(getattr(Model, name)).parameters)
        if found != expected:
            raise UnsupportedHostError(
                f"flair_peft cannot hook into flair.nn.Model.{name}: it takes {found}, not {expected}. Another package "
                "may have replaced it. Import flair_peft first."
            )


def versions() -> dict[str, str]:
    """Return the versions of the libraries whose behaviour a checkpoint depends on."""
    return {
        "flair_peft": __version__,
        "flair": flair.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
