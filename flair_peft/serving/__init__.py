"""Predictions of many models: one shared base, mixed batches, endless streams, and all of them behind an address.

May import ``export``, ``inspection``, ``models`` and what lies below them.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here

# isort: split
import importlib as _importlib
import importlib.util as _util
import typing as _typing

if _typing.TYPE_CHECKING:
    from flair_peft.serving.http.app import create_app
    from flair_peft.serving.http.ray_deployment import ray_app

__all__ = ["create_app", "ray_app"]

# What an extra brings along is imported with the first of these names, and not before.
_NAMES_IN = {
    "create_app": ("http.app", "serve", ("fastapi", "prometheus_client")),
    "ray_app": ("http.ray_deployment", "ray", ("ray", "fastapi", "prometheus_client")),
}


if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what serves, and return it."""
        if name not in _NAMES_IN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, extra, libraries = _NAMES_IN[name]
        _require(extra, libraries)
        return getattr(_importlib.import_module(f"{__name__}.{module}"), name)


def _require(extra: str, libraries: _typing.Sequence[str]) -> None:
    """Return if the libraries of an extra are installed.

    Raises:
        AdapterConfigError: one is not.
    """
    from flair_peft.errors import AdapterConfigError, name_some

    missing = [name for name in libraries if _util.find_spec(name) is None]
    if missing:
        raise AdapterConfigError(
            f"Cannot serve models: {name_some(missing)} cannot be imported here. It is not installed with flair_peft "
            f'itself. Install its extra: pip install -e ".[{extra}]" in its folder.'
        )
