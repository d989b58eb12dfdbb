"""Supported versions of the host libraries, and the mark that files of this package carry."""

from __future__ import annotations

import inspect
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from flair_peft._version import __version__
from flair_peft.errors import FormatVersionError, UnsupportedHostError, name_some

FLAIR_VERSIONS = SpecifierSet(">=0.15.1,<0.16", prereleases=True)
_INSTALL_A_RELEASE = f"install a release: pip install --force-reinstall --no-deps 'flair{FLAIR_VERSIONS}'"

# 1: the base's weights are in the file. 2: they need not be.
FORMAT_VERSION = 2

_EXPECTED_PARAMETERS = {
    ("Model", "load"): ["model_path"],
    ("Model", "save"): ["self", "model_file", "checkpoint"],
    ("Model", "_get_state_dict"): ["self"],
    ("ModelTrainer", "_save_model"): ["self", "model_file", "checkpoint"],
    ("ModelTrainer", "_load_model"): ["self", "model_file"],
}

# What models have in Flair's development version, which calls itself 0.15.1 and whose files hold more.
_NOT_YET_RELEASED = ("tokenizer", "license_info")


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
            f"to {FORMAT_VERSION}. Upgrade flair_peft."
        )


def check_host() -> None:
    """Return if the installed Flair has the version and the signatures that the hook was written for.

    Flair's development version has the version, and is told by what it has.

    Raises:
        UnsupportedHostError: it has not; nothing has been changed.
    """
    import flair
    from flair.nn import Model
    from flair.trainers import ModelTrainer

    if Version(flair.__version__) not in FLAIR_VERSIONS:
        raise UnsupportedHostError(
            f"flair_peft cannot hook into Flair {flair.__version__}. Its hook was written for Flair {FLAIR_VERSIONS}. "
            "Install one of those."
        )
    later = [name for name in _NOT_YET_RELEASED if hasattr(Model, name)]
    if later:
        raise UnsupportedHostError(
            f"flair_peft cannot hook into this Flair, which calls itself {flair.__version__}: its models have "
            f"{name_some(later)}, as those of no release. It is a development version, which trains and saves in "
            f"another way. Uninstall it, and {_INSTALL_A_RELEASE}."
        )
    owners = {"Model": Model, "ModelTrainer": ModelTrainer}
    for (owner_name, name), expected in _EXPECTED_PARAMETERS.items():
        owner = owners[owner_name]
        found = list(inspect.signature(getattr(owner, name)).parameters)
        if found != expected:
            raise UnsupportedHostError(
                f"flair_peft cannot hook into {owner.__module__}.{owner.__name__}.{name}: it takes {found}, not "
                f"{expected}. Another package may have replaced it, or this Flair is no release. Import flair_peft "
                f"first, or {_INSTALL_A_RELEASE}."
            )


def versions() -> dict[str, str]:
    """Return the versions of the libraries whose behaviour a checkpoint depends on."""
    import flair
    import peft
    import torch
    import transformers

    return {
        "flair_peft": __version__,
        "flair": flair.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
