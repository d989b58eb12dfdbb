"""The ways through the package that CONTRIBUTING describes are the ones that a save and a load take."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from flair.models import TextClassifier
from peft import LoraConfig

import flair_peft
from flair_peft import SharedBase
from flair_peft.models import load
from tests.support.methods import perturb_
from tests.support.round_trip import Factories
from tests.support.zoo import ZOO

Base = Callable[[str], str]
Call = tuple[str, str]
"""Module of the package, such as ``models/load``, and function."""

PACKAGE = Path(flair_peft.__file__).parent
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
STATION = re.compile(r"^\d+\. `([\w/]+?)(?:\.py)?` `(\w+)`", re.MULTILINE)

# Everything calls these, or a station asks them for the transformer.
NO_STATIONS = ("primitives", "adapter", "base", "errors", "compat")

# A station asks these whether it may build something or a file can have this name, Flair's predict whether it can read
# a sentence.
ASKED = {"models/inputs", "storage/temporaries", "storage/file_names"}

STEPS = [("models/load", "open_stored"), ("models/stored", "complete"), ("models/build", "build")]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Note each call of a function of the package that this thread makes inside."""
    calls: list[Call] = []

    def note(frame: FrameType, _: str, __: Any) -> None:
        if frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            module = Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("").as_posix()
            calls.append((module, frame.f_code.co_name))

    before = sys.gettrace()  # of a debugger, or of what measures coverage
    sys.settrace(note)
    try:
        yield calls
    finally:
        sys.settrace(before)


def described(heading: str) -> list[Call]:
    """Return the stations that a section of CONTRIBUTING lists."""
    text = CONTRIBUTING.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [(place.rstrip("/"), function) for place, function in STATION.findall(text)]


def assert_passes(calls: list[Call], stations: list[Call]) -> None:
    """Assert that the stations were entered in this order, and that no other module was."""
    assert stations
    assert [call for call in dict.fromkeys(calls) if call in stations] == stations
    entered = {_subject(module) for module, _ in calls if module.split("/")[0] not in NO_STATIONS}
    assert entered - ASKED == {_subject(module) for module, _ in stations}


def _subject(module: str) -> str:
    """Return the module, or its folder where this is one subject: the embeddings, or JSON of a state."""
    folder = module.partition("/")[0]
    return folder if folder in ("embeddings", "codec") else module


def classifier(base: str) -> TextClassifier:
    factories = Factories(base, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["query"]))
    model = ZOO["text-classifier"].build(factories.words, factories.documents)
    perturb_(model.embeddings.model, seed=1)
    return model


@pytest.fixture
def saved(base: Base, tmp_path: Path) -> Path:
    """Return a file of a model with an adapter."""
    classifier(base("bert")).save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_save_of_a_file_passes_the_stations_that_are_described(base: Base, tmp_path: Path) -> None:
    """A stranger who follows the list in CONTRIBUTING meets the save at each of its numbers."""
    model = classifier(base("bert"))
    with recorded() as calls:
        model.save(tmp_path / "model.pt")
    assert_passes(calls, described("How a model is stored"))
    assert calls.count(("models/save_plan", "plan_save")) == 1
    assert len([place for place in calls if place[0].startswith("embeddings/") and place[1] == "to_params"]) == 1


def test_load_of_a_file_passes_the_stations_that_are_described(saved: Path) -> None:
    """A stranger who follows the list in CONTRIBUTING meets the load at each of its numbers, at most 15 modules."""
    with recorded() as calls:
        TextClassifier.load(saved)
    stations = described("How a model loads")
    assert_passes(calls, stations)
    assert len({module for module, _ in stations}) <= 15


def test_load_of_a_file_reads_and_checks_it_once(saved: Path) -> None:
    """The file is opened once by its name, its pickle scanned once, and trust and sums are judged once."""
    with recorded() as calls:
        TextClassifier.load(saved)
    counted = Counter(calls)
    once = [
        ("primitives/held_file", "_opened"),  # who reads it afterwards gets what is open
        ("torchfile/scan", "read_contents"),
        ("torchfile/unpickle", "_read_allowed"),
        ("torchfile/checksums", "check_sums"),
        ("models/stored", "_refuse_unsafe"),
        *STEPS,
    ]
    assert {place: counted[place] for place in once} == dict.fromkeys(once, 1)


WAYS: dict[str, Callable[[Path], Any]] = {
    "load": TextClassifier.load,
    "from_pretrained": flair_peft.from_pretrained,
    "verify": flair_peft.verify,
    "load_legacy": flair_peft.load_legacy,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_opens_completes_and_builds(way: str, saved: Path) -> None:
    """None of the steps can be skipped, and they come in one order."""
    with recorded() as calls:
        WAYS[way](saved)
    assert [call for call in calls if call in STEPS] == STEPS


def test_model_on_a_shared_base_is_opened_completed_and_built(saved: Path, base: Base) -> None:
    """A shared base is told to the same three steps."""
    shared = SharedBase(base("bert"))
    with recorded() as calls:
        shared.load(saved)
    assert [call for call in calls if call in STEPS] == STEPS


def test_reload_of_the_best_model_opens_and_completes_it(saved: Path) -> None:
    """What the trainer reloads is checked like any other file: its checksums too."""
    model = TextClassifier.load(saved)
    with recorded() as calls:
        load.reload_(model, saved)
    assert [call for call in calls if call in STEPS] == STEPS[:2]
    assert calls.count(("torchfile/checksums", "check_sums")) == 1
