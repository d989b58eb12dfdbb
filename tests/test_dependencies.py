"""What the package imports is declared in ``setup.cfg``, and what is declared is imported."""

from __future__ import annotations

import ast
import configparser
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flair_peft"

# Imported by some modules alone, which are themselves imported only where a picture or a server is asked for.
OPTIONAL = {
    "matplotlib": "plot",
    **dict.fromkeys(("fastapi", "prometheus-client", "pydantic", "starlette", "uvicorn"), "serve"),
    "ray": "ray",
}


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level modules that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def distributions() -> set[str]:
    """Return the distributions that the package imports from."""
    modules = {module for path in PACKAGE.rglob("*.py") for module in imported(path)}
    others = modules - set(sys.stdlib_module_names) - {"flair_peft"}
    installed = packages_distributions()
    return {canonicalize_name(name) for module in others for name in installed[module]}


def declared(section: str, option: str) -> set[str]:
    """Return the names of the requirements in an option of ``setup.cfg``."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return {canonicalize_name(Requirement(line).name) for line in settings[section][option].split("\n") if line}


def test_requirements_are_what_the_package_imports() -> None:
    """Nothing is there only because another library happens to bring it, and nothing is installed for no use."""
    assert declared("options", "install_requires") == distributions() - set(OPTIONAL)


def test_optional_requirements_are_extras() -> None:
    """What only a part of the package needs has an extra of its own."""
    for name, extra in OPTIONAL.items():
        assert name in distributions()
        assert name in declared("options.extras_require", extra)


def test_imports_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    """The tests above have an object."""
    path = tmp_path / "module.py"
    path.write_text("import a.b, c\nfrom d.e import f\nfrom . import g\n\ndef h():\n    import i as j\n")
    assert set(imported(path)) == {"a", "c", "d", "i"}
