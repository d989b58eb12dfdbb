"""Files of models with adapters by stock versions of Flair: each predicts what the process that wrote it did."""

from __future__ import annotations

import json
import math
import tarfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import pytest
from flair.nn import Model
from peft import PeftConfig

import flair_peft
from flair_peft.errors import MissingConfigError, UnsafeFileError
from tests.regression.make_stock import FOLDER, VERSIONS
from tests.regression.stock_process import METHODS, MORE, MORE_OF
from tests.support.selection import ONE_OF_A_KIND
from tests.support.zoo import ZOO

TOLERANCE = 1e-4

# Flair pickles the label encoder, a transformer embedding, with the decoder; stock embeddings cannot be unpickled, and
# their pickle names functions that no allow-list could hold.
UNREADABLE = {name for name, entry in ZOO.items() if entry.loads_in_stock is not True}

Archive = Callable[[str], Path]


@lru_cache
def record(version: str) -> dict[str, Any]:
    """Return what the stock process wrote down."""
    with tarfile.open(FOLDER / f"{version}.tar.xz") as archive:
        member = archive.extractfile("record.json")
        assert member is not None
        return json.load(member)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Return a function from a version to the folder with its files."""
    unpacked: dict[str, Path] = {}

    def find(version: str) -> Path:
        if version not in unpacked:
            unpacked[version] = tmp_path_factory.mktemp(version)
            with tarfile.open(FOLDER / f"{version}.tar.xz") as files:
                files.extractall(unpacked[version], filter="data")
        return unpacked[version]

    return find


def cases() -> list[Any]:
    """Return each file; by default one model with each method, and the models that differ with LoRA."""
    found = []
    for version in VERSIONS:
        for name, model in record(version)["models"].items():
            is_common = model["model"] == MORE_OF or (name.endswith(".lora.pt") and model["model"] in ONE_OF_A_KIND)
            marks = [] if is_common else [pytest.mark.matrix]
            if model["model"] not in UNREADABLE:
                found.append(pytest.param(version, name, id=f"{version}-{name}", marks=marks))
    return found


def config_of(model: dict[str, Any], version: str = "") -> PeftConfig:
    """Return the config that the stock process was given."""
    kind, settings = model["config"]
    if kind == "LoKrConfig" and version == "0.14.0":
        settings = {**settings, "alpha": settings["r"]}  # PEFT 0.12 did not scale LoKr by its alpha
    return getattr(peft, kind)(**settings)


def load(version: str, path: Path, model: dict[str, Any]) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {} if version == "master" else {"peft_config": config_of(model, version)}
        return ZOO[model["model"]].model_class.load(path, **given)


def largest_difference(first: Any, second: Any) -> float:
    """Return the largest difference between two numbers in the same place; infinity if anything else differs."""
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) if math.isfinite(first) and math.isfinite(second) else math.inf
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return max(map(largest_difference, first, second), default=0.0)
    return 0.0 if first == second else math.inf


def predicted(model: Model, name: str) -> Any:
    entry = ZOO[name]
    return json.loads(json.dumps(entry.predict(model, entry.corpus())))


def test_every_class_and_method_was_made_by_every_version_that_can() -> None:
    """What is missing is missing for a reason that the stock process gave."""
    for version in VERSIONS:
        made, failures = record(version)["models"], record(version)["failures"]
        wanted = {f"{name}.{method}.pt" for name in ZOO for method in METHODS}
        wanted |= {f"{MORE_OF}.{method}.pt" for method in MORE}
        assert made.keys() | failures.keys() == wanted
        assert len(failures) <= 6
        assert all("has no" in reason or "DynamicCache" in reason for reason in failures.values())


@pytest.mark.parametrize(("version", "name"), cases())
def test_file_of_stock_flair_predicts_what_the_process_that_wrote_it_did(
    version: str, name: str, archive: Archive
) -> None:
    """With the config that it was trained with, or with the one that it holds."""
    model = record(version)["models"][name]
    loaded = load(version, archive(version) / name, model)
    assert largest_difference(model["predicted"], predicted(loaded, model["model"])) < TOLERANCE


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != "master"])
@pytest.mark.parametrize("method", [*METHODS, *MORE])
def test_file_without_a_config_names_its_method(version: str, method: str, archive: Archive) -> None:
    """The error prints the class of the config that it was trained with."""
    name = f"{MORE_OF}.{method}.pt"
    kind, _ = record(version)["models"][name]["config"]
    with pytest.raises(MissingConfigError, match=rf"peft_config={kind}\("):
        flair_peft.load_legacy(archive(version) / name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_file_of_stock_flair_converts_to_a_small_checkpoint(
    version: str, method: str, archive: Archive, tmp_path: Path
) -> None:
    """The base beside it is the one in the file, so it is left out; the checkpoint predicts the same."""
    name = f"{MORE_OF}.{method}.pt"
    model = record(version)["models"][name]
    given = None if version == "master" else config_of(model)
    encoder = str(archive(version) / "encoder")
    flair_peft.convert_legacy(archive(version) / name, tmp_path / "new", peft_config=given, base_model=encoder)
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    assert loaded.embeddings.base_source.frozen is not None
    assert largest_difference(model["predicted"], predicted(loaded, MORE_OF)) < TOLERANCE
    flair_peft.verify(tmp_path / "new")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_file_that_nothing_can_read_is_refused_with_what_it_names(version: str, name: str, archive: Archive) -> None:
    """Nothing of it is run."""
    path = archive(version) / f"{name}.lora.pt"
    config = config_of(record(version)["models"][path.name])
    with pytest.raises(UnsafeFileError, match="it names"):
        flair_peft.load_legacy(path, peft_config=config)
