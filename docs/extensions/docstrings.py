"""Shows the signature of a class once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def _signature_once(_: Sphinx, what: str, __: str, shown: Any, *___: object) -> tuple[str, None] | None:
    """Leave the signature of a class to its constructor, where that has a docstring of its own."""
    if what == "class" and getattr(vars(shown).get("__init__"), "__doc__", None):
        return "", None
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("autodoc-process-signature", _signature_once)
    return {"parallel_read_safe": True}
