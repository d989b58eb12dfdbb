"""Checkpoints of every version load and predict what they did; files are in ``files/VERSION/MODEL``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flair.nn import Classifier, Model

import flair_peft
from tests.regression.make import FOLDER, MODELS, outputs

ENCODER = str(Path(__file__).parents[2] / "resources" / "tiny-encoder")
CASES = sorted(path for path in FOLDER.glob("*/*") if path.is_dir())


def test_regression_files_are_there() -> None:
    """The replay has something to replay: every model of the first version that wrote any."""
    assert {path.name for path in FOLDER.glob("0.2.0/*")} == set(MODELS)


@pytest.mark.parametrize("form", ["checkpoint", "slim.pt"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_checkpoint_of_an_older_version_predicts_what_it_did(case: Path, form: str) -> None:
    """Outputs agree within 1e-4, the probe included, on an encoder that lies elsewhere than it did."""
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    model = Model.load(case / form, base_model=ENCODER)
    assert isinstance(model, Classifier)
    found = outputs(model)
    for these, those in zip(found, expected, strict=True):
        assert [value for value, _ in these] == [value for value, _ in those]
        assert [score for _, score in these] == pytest.approx([score for _, score in those], abs=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_checkpoint_of_an_older_version_is_fully_verified(case: Path) -> None:
    """Every byte of the checkpoint, and every weight of the encoder, is what it was."""
    flair_peft.verify(case / "checkpoint", base_model=ENCODER)
