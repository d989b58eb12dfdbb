"""One room for each dangerous thing, and imports that point downwards only."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flair_peft
from flair_peft import errors

PACKAGE = Path(flair_peft.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))

FLOORS = (
    ("errors", "first_imports", "_version"),
    ("compat",),
    ("primitives",),
    ("adapter",),
    ("base", "storage", "torchfile"),
    ("codec", "foreign"),
    ("embeddings",),
    ("models",),
    ("export", "training", "inspection"),
    ("serving",),
    ("patch",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""From the ground up: what may be imported is in a lower row; folders in one row do not import each other."""

LEVEL = {name: level for level, row in enumerate(FLOORS) for name in row}

LOADERS = frozenset(
    {"torch.load", "pickle.load", "pickle.loads", "load_torch_state", "load_big_file", "pickle.Unpickler"}
)


# What importlib or an allow-list is given; messages name what users call.
IN_A_STRING = re.compile(r"flair_peft(?:\.\w+)+")


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def _folder(module: str) -> str:
    """Return the folder of a module, or the module where it stands in none."""
    return module.partition("/")[0]


def _docstrings(tree: ast.Module) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, owners))
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def _named(node: ast.AST) -> list[str]:
    """Return the dotted names that a statement imports, or that a string holds."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports by a relative name"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and IN_A_STRING.fullmatch(node.value):
        return [node.value] if _resolved(node.value) != "__init__" else []
    return []


def _resolved(name: str) -> str | None:
    """Return the module of the package that a dotted name stands for: ``adapter/keys``, ``errors``, ``__init__``."""
    root, *rest = name.split(".")
    if root != "flair_peft":
        return None
    found = ("/".join(rest[:length]) for length in range(len(rest), 0, -1))
    paths = (each if each in MODULES else f"{each}/__init__" for each in found)
    return next((path for path in paths if path in MODULES), "__init__")


def _imported_modules(module: str) -> Iterator[str]:
    """Yield the modules of the package that this one names, wherever in its text it imports them or spells them out."""
    tree = _tree(module)
    documentation = _docstrings(tree)
    for node in ast.walk(tree):
        if id(node) not in documentation:
            yield from (found for name in _named(node) if (found := _resolved(name)) is not None)


@functools.cache
def _calls(module: str) -> tuple[str, ...]:
    return tuple(ast.unparse(node.func) for node in ast.walk(_tree(module)) if isinstance(node, ast.Call))


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


# Names in files that must never change: the module that reads them spells them out.
WRITTEN_IN_FILES = {"codec/__init__", "embeddings/__init__"}
NAMES_FILES_HOLD = {"torchfile/allowed_names", "torchfile/scan", "torchfile/unpickle"}


def test_house_folders_all_have_a_floor() -> None:
    """A new folder is given its place among the others before anything imports it."""
    assert {_folder(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_house_imports_of_a_module_point_downwards(module: str) -> None:
    """A module imports only from its own folder and from folders below, so that reading starts at the ground."""
    own = _folder(module)
    others = {found for found in _imported_modules(module) if _folder(found) != own}
    upwards = {found for found in others if LEVEL[_folder(found)] >= LEVEL[own]}
    assert not upwards - (WRITTEN_IN_FILES if module in NAMES_FILES_HOLD else set())


def _cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for found in sorted(edges.get(module, ())):
                if circle := visit(found, [*path, module]):
                    return circle
            done.add(module)
        return []

    return next((circle for module in sorted(edges) if (circle := visit(module, []))), [])


def test_house_imports_have_no_circle() -> None:
    """Inside a folder, too, no two modules need each other."""
    assert not _cycle({module: set(_imported_modules(module)) - {module} for module in MODULES if "__" not in module})


def test_house_imports_are_seen_by_this_test() -> None:
    """The import graph that the test reads is not empty, and a circle in it is found."""
    assert {"embeddings/adapted", "adapter/mending"} <= set(_imported_modules("embeddings/peft_transformer"))
    assert "errors" in set(_imported_modules("adapter/config"))
    assert _resolved("flair_peft.codec.restore_state") == "codec/__init__"
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


IMPORTS_FLAIR_LATER = {"patch", "torchfile/unpickle"}
"""Modules that may be under way when the hook imports all others: none of these imports a name from them."""


@pytest.mark.parametrize("module", [name for name in MODULES if name not in IMPORTS_FLAIR_LATER])
def test_house_folders_that_need_flair_import_it_before_their_modules(module: str) -> None:
    """The hook, which is put in when Flair is imported, needs all modules: none of them may be half imported then."""
    top = [node for node in _tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if any(name.split(".")[0] == "flair" for node in top for name in _named(node)):
        first = _tree(f"{_folder(module)}/__init__").body[1]
        assert isinstance(first, ast.Import)
        assert first.names[0].name == "flair"


@pytest.mark.parametrize("folder", sorted({_folder(module) for module in MODULES if "/" in module}))
def test_house_folders_say_what_lives_in_them(folder: str) -> None:
    """The first thing that a stranger opens is two or three lines long and says what may be imported."""
    text = ast.get_docstring(_tree(f"{folder}/__init__")) or ""
    assert 2 <= len(text.splitlines()) <= 5
    assert "mport" in text or folder == "cli"


@pytest.mark.parametrize("module", MODULES)
def test_house_loggers_have_names_that_are_written_out(module: str) -> None:
    """What cleans the paths in messages is a filter of the one logger "flair_peft", which those below it do not ask."""
    calls = [node for node in ast.walk(_tree(module)) if isinstance(node, ast.Call)]
    names = [node.args for node in calls if ast.unparse(node.func) == "logging.getLogger"]
    assert all(isinstance(given, ast.Constant) for args in names for given in args)
    assert not any(given.value.startswith("flair_peft.") for args in names for given in args)


# What other modules write to by name: (module, function, object). None of these is Flair's.
WRITTEN_BY_NAME = {
    ("adapter/injection", "setattr", "config"),
    ("models/build", "setattr", "parent"),
    ("models/head_probe", "setattr", "part"),
    ("models/unkept_settings", "setattr", "owner"),
    ("base/stored_config", "setattr", "config"),
}


# What Flair has its users set.
SETTINGS = {"primitives/devices": {"flair.device"}}


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
    of_others = {*_calls(module)} - {"super().__setattr__"}
    assert not {call for call in of_others if call.endswith(("__setattr__", "__delattr__"))}
    from_flair = _names_from_flair(module)
    written = {ast.unparse(target) for target in _assigned_attributes(module)}
    assert not {name for name in written if name.split(".")[0] in from_flair} - SETTINGS.get(module, set())


def test_house_patch_is_the_writer_that_the_rule_is_about() -> None:
    """The rule has an object: patch.py does call setattr and delattr."""
    assert {"setattr", "delattr"} <= set(_calls("patch"))


READS_TENSORS_ALONE = "foreign/adapter_files"
"""Reads PEFT's older files by torch's reader for tensors and plain values."""


@pytest.mark.parametrize("module", [name for name in MODULES if name != "torchfile/unpickle"])
def test_house_modules_but_unpickle_unpickle_nothing(module: str) -> None:
    """Only unpickle.py calls, or even imports, a function that unpickles."""
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
    """Outside of unpickle.py, torch's reader is called with ``weights_only=True``."""
    calls = [node for node in ast.walk(_tree(READS_TENSORS_ALONE)) if isinstance(node, ast.Call)]
    readers = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert readers
    for call in readers:
        assert "weights_only=True" in {ast.unparse(keyword) for keyword in call.keywords}


def test_house_unpickle_is_the_reader_that_the_rule_is_about() -> None:
    """The rule has an object: unpickle.py does unpickle."""
    assert LOADERS & set(_calls("torchfile/unpickle"))


# Private names of other libraries, and what belongs to the whole process.
REACHES = {
    "_data_address",
    "_is_cow_tensor",
    "_cdata",
    "_lazy_clone",
    "__globals__",
    "f_locals",
    "f_back",
    "currentframe",
    "_getframe",
}
PROCESS_WIDE = {"logging.getLogger()", "set_verbosity", "os.environ"}


def _reaches(module: str) -> set[str]:
    """Return the private names that a module reads, and what it changes for the whole process."""
    nodes = list(ast.walk(_tree(module)))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & REACHES
    calls = {ast.unparse(node) for node in nodes if isinstance(node, ast.Call)}
    written = {ast.unparse(node.value) for node in nodes if _is_written_item(node)}
    verbosity = {"set_verbosity" for call in _calls(module) if "set_verbosity" in call}
    return read | ((calls | written | verbosity) & PROCESS_WIDE)


def _is_written_item(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "primitives/host_internals"])
def test_house_modules_but_host_internals_reach_into_no_other_library(module: str) -> None:
    """Frames, torch's private functions, the environment, the root logger and the verbosity of others have one room."""
    assert not _reaches(module)


def test_house_host_internals_reaches_into_others() -> None:
    """The rule has an object."""
    found = _reaches("primitives/host_internals")
    assert found >= {"_data_address", "_cdata", "_lazy_clone", "f_locals", "logging.getLogger()", "os.environ"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cli/terminal"])
def test_house_modules_print_nothing(module: str) -> None:
    """The package speaks through logging; only the command line prints."""
    assert not {"print", "sys.stdout.write", "sys.stderr.write", "pprint"} & set(_calls(module))


# Modules that the package has as attributes in another way, or not at all.
NO_ATTRIBUTES = ("__init__", "__main__", "_version", "cli", "errors", "first_imports")


def test_house_public_names_are_sorted_importable_and_documented() -> None:
    """Every name in ``__all__`` resolves and says what it is; nothing public is left out of it."""
    assert list(flair_peft.__all__) == sorted(flair_peft.__all__)
    for name in flair_peft.__all__:
        value = getattr(flair_peft, name)
        assert value if isinstance(value, str) else vars(value).get("__doc__", value.__doc__), name
    assert set(flair_peft.__all__) <= set(dir(flair_peft))
    assert set(flair_peft._MODULES) <= {_folder(module) for module in MODULES} <= {*flair_peft._MODULES, *NO_ATTRIBUTES}
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
    """What the package raises on purpose is its own, Flair's own message word for word, or what Python asks for."""
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    builtin = {name for name in raised if inspect.isclass(getattr(importlib.import_module("builtins"), name, None))}
    is_asked_for = {"embeddings/peft_transformer": {"ValueError"}, "primitives/strict_json": {"ValueError"}}
    is_asked_for.update({name: {"AttributeError"} for name in ("__init__", "serving/__init__")})
    assert builtin <= is_asked_for.get(module, set())


# Lines, docstrings included. Signs of what should be two things, and no aims: whatever is longer says why.
LONGEST = {"module": 400, "class": 300, "constructor": 80, "function": 60}
LONGER: dict[str, str] = {
    "adapter/traits": "a table of data: an entry for each method",
}
"""What is longer, and why it belongs together."""


def _lengths(module: str) -> Iterator[tuple[str, str, int]]:
    """Yield name, kind and lines of a module and of all that it defines."""
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    yield module, "module", len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            kind = "constructor" if node.name == "__init__" else kind
            yield f"{module}:{node.name}", kind, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("module", MODULES)
def test_house_modules_can_be_read_in_a_sitting(module: str) -> None:
    """Nothing is longer than what one can hold in mind, apart from what is listed with a reason."""
    longer = {name for name, kind, lines in _lengths(module) if lines > LONGEST[kind]}
    assert longer == {name for name in LONGER if name.partition(":")[0] == module}


TESTS = Path(__file__).parent


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{module}{alias.name}" for alias in node.names)


def test_house_test_modules_import_nothing_from_each_other() -> None:
    """What several tests need stands in tests/support, so that a test can be read, moved or deleted alone."""
    imported = {(path.name, name) for path in TESTS.rglob("*.py") for name in _imports_of(path)}
    assert ("test_patch.py", "tests.support.configs.lora") in imported
    assert not {(path, name) for path, name in imported if re.match(r"tests\.(\w+\.)*test_", name)}
