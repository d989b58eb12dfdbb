"""One room for each dangerous thing, and imports that point downwards only."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flair_peft
from flair_peft import errors

PACKAGE = Path(flair_peft.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

FLOORS = (
    "first_imports",
    "_version",
    "errors",
    "progress",
    "residency",
    "compat",
    "dtypes",
    "keys",
    "held",
    "opcodes",
    "implied",
    "outline",
    "config",
    "methods",
    "refusals",
    "adapters",
    "fingerprint",
    "sources",
    "base_config",
    "backbone",
    "capacity",
    "tokenizer_files",
    "rows",
    "copies",
    "quantised",
    "frozen",
    "learned",
    "proof",
    "bases",
    "flair_objects",
    "allowed",
    "codec",
    "siblings",
    "bystanders",
    "replacement",
    "manifest",
    "checkpoint",
    "hub",
    "older_peft",
    "adapter_files",
    "origins",
    "bare_config",
    "foreign",
    "weights",
    "storable",
    "rendezvous",
    "adapter_memory",
    "embeddings",
    "heads",
    "model_inputs",
    "states",
    "head_probe",
    "legacy",
    "layout",
    "contents",
    "inspection",
    "comparison",
    "heat_map",
    "card",
    "assembly",
    "models",
    "stock",
    "merging",
    "neighbours",
    "attempts",
    "streaming",
    "exporting",
    "int8",
    "mixing",
    "training",
    "trainer_state",
    "resume",
    "parallel",
    "shared",
    "patch",
    "distributed",
    "__init__",
    "terminal",
    "wording",
    "cli",
    "__main__",
)
"""From the ground up: a module may import those before it."""

LOADERS = frozenset(
    {"torch.load", "pickle.load", "pickle.loads", "load_torch_state", "load_big_file", "pickle.Unpickler"}
)


def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def _imported_modules(module: str) -> Iterator[str]:
    """Yield the modules of the package that this one imports, wherever in its text it does."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            if root == "flair_peft":
                yield rest[0] if rest and rest[0] in MODULES else "__init__"


def _calls(module: str) -> Iterator[str]:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def _names_from_flair(module: str) -> set[str]:
    imports = (node for node in ast.walk(_tree(module)) if isinstance(node, (ast.Import, ast.ImportFrom)))
    found: set[str] = set()
    for node in imports:
        origin = getattr(node, "module", None) or node.names[0].name
        if origin.split(".")[0] == "flair":
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return found


def _assigned_attributes(module: str) -> Iterator[ast.Attribute]:
    for node in ast.walk(_tree(module)):
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        else:
            continue
        for target in targets:
            yield from (part for part in ast.walk(target) if isinstance(part, ast.Attribute))


def test_house_modules_all_have_a_floor() -> None:
    """A new module is given its place among the others before anything imports it."""
    assert set(MODULES) <= set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_house_imports_of_a_module_point_downwards(module: str) -> None:
    """A module imports only what lies below it, so that there are no cycles and reading starts at the ground."""
    upwards = {found for found in _imported_modules(module) if FLOORS.index(found) >= FLOORS.index(module)}
    assert not upwards


def test_house_imports_are_seen_by_this_test() -> None:
    """The import graph that the test reads is not empty."""
    assert {"errors", "adapters"} <= set(_imported_modules("embeddings"))
    assert "errors" in set(_imported_modules("config"))


# What other modules write to by name: (module, function, object). None of these is Flair's.
WRITTEN_BY_NAME = {
    ("adapters", "setattr", "config"),
    ("assembly", "setattr", "parent"),
    ("base_config", "setattr", "config"),
}


def _written_by_name(module: str) -> set[tuple[str, str, str]]:
    return {
        (module, node.func.id, ast.unparse(node.args[0]))
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr")
    }


@pytest.mark.parametrize("module", [name for name in MODULES if name != "patch"])
def test_house_modules_but_patch_write_nothing_into_flair(module: str) -> None:
    """Only patch.py sets or deletes attributes of Flair's, by name or by assigning to what was imported from it."""
    assert _written_by_name(module) <= WRITTEN_BY_NAME
    assert not {call for call in _calls(module) if call.endswith(("__setattr__", "__delattr__"))}
    from_flair = _names_from_flair(module)
    written = {ast.unparse(target) for target in _assigned_attributes(module)}
    assert not {name for name in written if name.split(".")[0] in from_flair}


def test_house_patch_is_the_writer_that_the_rule_is_about() -> None:
    """The rule has an object: patch.py does call setattr and delattr."""
    assert {"setattr", "delattr"} <= set(_calls("patch"))


READS_TENSORS_ALONE = "adapter_files"
"""Reads PEFT's older files by torch's reader for tensors and plain values."""


@pytest.mark.parametrize("module", [name for name in MODULES if name != "legacy"])
def test_house_modules_but_legacy_unpickle_nothing(module: str) -> None:
    """Only legacy.py calls, or even imports, a function that unpickles."""
    allowed = {"torch.load"} if module == READS_TENSORS_ALONE else set()
    assert LOADERS & set(_calls(module)) == allowed
    imported = {
        alias.name
        for node in ast.walk(_tree(module))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert not {"pickle", "dill", "joblib", "load_torch_state", "load_big_file"} & imported


def test_house_files_of_peft_are_read_for_their_tensors_alone() -> None:
    """Outside of legacy.py, torch's reader is called with ``weights_only=True``."""
    calls = [node for node in ast.walk(_tree(READS_TENSORS_ALONE)) if isinstance(node, ast.Call)]
    readers = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert readers
    for call in readers:
        assert "weights_only=True" in {ast.unparse(keyword) for keyword in call.keywords}


def test_house_legacy_is_the_reader_that_the_rule_is_about() -> None:
    """The rule has an object: legacy.py does unpickle."""
    assert LOADERS & set(_calls("legacy"))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "terminal"])
def test_house_modules_print_nothing(module: str) -> None:
    """The package speaks through logging; only the command line prints."""
    assert not {"print", "sys.stdout.write", "sys.stderr.write", "pprint"} & set(_calls(module))


def test_house_public_names_are_sorted_importable_and_documented() -> None:
    """Every name in ``__all__`` resolves and says what it is; nothing public is left out of it."""
    assert list(flair_peft.__all__) == sorted(flair_peft.__all__)
    for name in flair_peft.__all__:
        value = getattr(flair_peft, name)
        assert value if isinstance(value, str) else vars(value).get("__doc__", value.__doc__), name
    public = {
        name
        for name, value in vars(flair_peft).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public == {name for name in flair_peft.__all__ if not name.startswith("_")}


def _public_definitions(module: str) -> Iterator[tuple[str, ast.AST]]:
    for node in _tree(module).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                is_setter = isinstance(method, ast.FunctionDef) and any(
                    ast.unparse(decorator).endswith(".setter") for decorator in method.decorator_list
                )
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not is_setter:
                    yield f"{node.name}.{method.name}", method


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__main__"])
def test_house_public_functions_and_classes_have_docstrings(module: str) -> None:
    """Every module, public class, function and method says in its first line what is true afterwards."""
    assert ast.get_docstring(_tree(module))
    undocumented = [name for name, node in _public_definitions(module) if not ast.get_docstring(node)]
    assert not undocumented


def _error_classes() -> dict[str, type]:
    return {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def _documented_tree() -> dict[str, str | None]:
    """Return error → parent as the docstring of errors.py draws them."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r"^(    [│ ├└─]*)([A-Z]\w+Error)\b", line)
        if drawn:
            depth, name = len(drawn.group(1)), drawn.group(2)
            above = [(level, parent) for level, parent in above if level < depth]
            parents[name] = above[-1][1] if above else None
            above.append((depth, name))
    return parents


def test_house_errors_stand_in_the_documented_tree_where_they_are() -> None:
    """Every error class is a FlairPeftError and stands in the module's docstring under its own parent."""
    classes = {n: c for n, c in _error_classes().items() if issubclass(c, BaseException)}
    own = {name: value for name, value in classes.items() if value.__module__ == errors.__name__}
    actual = {
        name: next((base.__name__ for base in value.__bases__ if base.__name__ in own), None)
        for name, value in own.items()
    }
    assert all(issubclass(value, errors.FlairPeftError) for value in own.values())
    assert _documented_tree() == actual


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("AdapterConfigError", ValueError),
        ("UnsupportedMethodError", ValueError),
        ("MissingConfigError", ValueError),
        ("BaseModelNotFoundError", OSError),
        ("ModelFileError", ValueError),
        ("ModelFileError", RuntimeError),
        ("FormatVersionError", RuntimeError),
        ("UnsafeFileError", RuntimeError),
        ("UnsupportedStateError", TypeError),
        ("SaveError", OSError),
        ("BaseMismatchError", RuntimeError),
        ("StateMismatchError", RuntimeError),
        ("AdapterMismatchError", RuntimeError),
        ("UntrainedAdapterError", RuntimeError),
        ("HeadMismatchError", RuntimeError),
        ("DtypeMismatchError", TypeError),
        ("TrainingSetupError", ValueError),
        ("PredictionSetupError", TypeError),
        ("PredictionSetupError", ValueError),
        ("PredictionError", RuntimeError),
        ("UnsupportedHostError", ImportError),
    ],
)
def test_house_errors_are_what_callers_already_catch(name: str, also: type[BaseException]) -> None:
    """Code written for Flair, torch or transformers catches the errors of this package where it caught theirs."""
    assert issubclass(getattr(errors, name), also)


@pytest.mark.parametrize("module", MODULES)
def test_house_modules_raise_only_errors_of_the_tree(module: str) -> None:
    """What the package raises on purpose is its own, or Flair's own message word for word."""
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    builtin = {name for name in raised if inspect.isclass(getattr(importlib.import_module("builtins"), name, None))}
    assert builtin <= ({"ValueError"} if module == "embeddings" else set())
