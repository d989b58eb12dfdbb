"""What importing the package imports, and when the hook is put in: in each order of imports, in fresh processes."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flair_peft
from tests.support.configs import lora
from tests.support.files import save_as
from tests.support.models import CLASSIFIER, make

LARGE = {
    "torch",
    "flair",
    "transformers",
    "peft",
    "matplotlib",
    "accelerate",
    "bitsandbytes",
    "sklearn",
}

LIGHT = """
import contextlib, io, json, sys
import flair_peft
found = {"import": [*sys.modules]}
from flair_peft.cli import main
for line in map(json.loads, sys.argv[1:]):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        assert main.main(line) == 0
    assert output.getvalue()
    found[" ".join(line)] = [*sys.modules]
print(json.dumps(found))
"""


def run(code: str, *arguments: str, timeout: float = 900) -> str:
    """Return what a fresh process prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(flair_peft.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_headers_are_read_without_any_of_the_large_libraries(base: Callable[[str], str], tmp_path: Path) -> None:
    """The command line starts at once: neither it nor what it looks into imports what takes seconds."""
    model = make(CLASSIFIER, base("bert"), lora())
    directory, file = save_as("directory", model, tmp_path), save_as("file", model, tmp_path)
    stock = tmp_path / "stock.pt"
    torch.save({"__cls__": "TextClassifier", "state_dict": model.state_dict()}, stock)
    inspected = [["inspect", str(path), *option] for path in (directory, file, stock) for option in ([], ["--json"])]
    lines = [["--version"], ["--help"], ["inspect", "--help"], ["convert", "--help"], *inspected]
    found = json.loads(run(LIGHT, *map(json.dumps, lines)))
    assert len(found) == len(lines) + 1
    imported = {line: LARGE & set(modules) for line, modules in found.items()}
    assert not any(imported.values()), imported


# Most of the time goes into libraries that do not matter here: processes are copies of one that has imported these.
ORDERS = """
import json, os, sys, threading
import torch, transformers, accelerate, sklearn.metrics
assert not {"flair", "peft", "flair_peft"} & set(sys.modules)
for code in map(json.loads, sys.argv[1:]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            exec(code)
        except BaseException as error:
            print(json.dumps([code, repr(error)]), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""

INSTALLED = """
assert "flair" in sys.modules and "flair_peft.patch" in sys.modules
import flair_peft, flair.embeddings.base
assert set(flair_peft.__all__) <= set(vars(flair_peft)) and flair_peft.is_installed()
assert flair.embeddings.base.EMBEDDING_CLASSES["PeftTransformerWordEmbeddings"]
flair_peft.errors.SaveError, flair_peft.storage.hub, flair_peft.training.plugins, flair_peft.torchfile.scan
"""

FIRST_IMPORTS = [
    "import flair_peft\nassert 'flair' not in sys.modules\nfrom flair.nn import Model",
    "import flair.data\nimport flair_peft",
    "from flair_peft import merge",
    "import flair_peft\nflair_peft.training",
    "import flair_peft.patch",
    "import flair_peft.codec",
    "from flair_peft.compat import FormatVersion\nimport flair",
    "from flair_peft.torchfile import unpickle",
    "from flair_peft.training.resume import ResumePlugin",
    "from flair_peft.embeddings import PeftTransformerEmbeddings",
    "from flair_peft.embeddings.word_and_document import PeftTransformerWordEmbeddings",
    *(f"import flair_peft.{folder}\nimport flair" for folder in flair_peft._MODULES),
    """
errors = []
def work(code):
    try:
        exec(code, {})
    except BaseException as error:
        errors.append(repr(error))
codes = ["import flair", "import flair_peft; flair_peft.merge", "from flair_peft import SharedBase"]
threads = [threading.Thread(target=work, args=(code,)) for code in codes * 2]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
""",
]

UNINSTALLED = """
import flair_peft
flair_peft.uninstall()
import flair
from flair.models import TextClassifier
assert not flair_peft.is_installed() and "flair_peft" not in vars(TextClassifier)["load"].__func__.__module__
flair_peft.install()
assert flair_peft.is_installed()
"""

UNSUPPORTED = """
import flair_peft.compat
from packaging.specifiers import SpecifierSet
flair_peft.compat.FLAIR_VERSIONS = SpecifierSet("<0.1")
for code in ("import flair", "flair_peft.merge", "flair_peft.install()", "from flair_peft import SharedBase"):
    try:
        exec(code)
    except flair_peft.FlairPeftError as error:
        assert type(error).__name__ == "UnsupportedHostError" and "cannot hook into Flair" in str(error)
    else:
        raise AssertionError(code)
"""


@pytest.mark.matrix
def test_hook_is_put_in_once_flair_is_imported_whatever_comes_first() -> None:
    """Each order of imports ends in the same package, with the hook in place, unless it was taken out."""
    codes = [*(first + INSTALLED for first in FIRST_IMPORTS), UNINSTALLED, UNSUPPORTED]
    failed = [json.loads(line) for line in run(ORDERS, *map(json.dumps, codes)).splitlines() if line.startswith("[")]
    assert not failed


def test_package_has_no_other_attributes_than_it_says() -> None:
    """A name that is wrong is an AttributeError, and all that introspection asks for is there."""
    with pytest.raises(AttributeError, match="'flair_peft' has no attribute 'mergee'"):
        _ = flair_peft.mergee  # type: ignore[attr-defined]
    assert not hasattr(flair_peft, "__wrapped__")
    named = [name for names in flair_peft._NAMES_IN.values() for name in names]
    assert sorted([*named, "FlairPeftError", "__version__"]) == flair_peft.__all__
    assert pickle.loads(pickle.dumps(flair_peft.merge)) is flair_peft.merge
    assert "merge" in dict(inspect.getmembers(flair_peft))
