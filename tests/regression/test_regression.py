"""Checkpoints of every version load and predict what they did; files are in ``files/VERSION/MODEL``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flair.nn import Model

import flair_peft
from tests.regression.make import ENCODER, FOLDER, WITHOUT_FILE, WRITTEN, outputs

CASES = sorted(path for path in FOLDER.glob("*/*") if path.is_dir())


def base_of(case: Path) -> str | None:
    """Return where the encoder is now, if the files name it; others hold their base."""
    document = (case / "checkpoint" / "flair_peft.json").read_text(encoding="utf-8")
    return str(ENCODER) if ENCODER.name in document else None


def test_regression_files_are_there() -> None:
    """The replay has something to replay: all that the versions wrote, and this one among them."""
    assert flair_peft.__version__ in WRITTEN
    found = {folder.name: {path.name for path in folder.iterdir()} for folder in FOLDER.iterdir()}
    assert found == WRITTEN


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, id=f"{case.parent.name}-{case.name}-{form}")
        for case in CASES
        for form in ("checkpoint", "slim.pt")
        if form == "checkpoint" or case.name not in WITHOUT_FILE
    ],
)
def test_checkpoint_of_an_older_version_predicts_what_it_did(case: Path, form: str) -> None:
    """Outputs agree, the probe included, on an encoder that lies elsewhere than it did, and another processor.

    In bf16 scores have steps of 1/256, and processors differ in where they round: two steps are no difference.
    """
    tolerance = 2**-7 if "bf16" in case.name else 1e-4
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    model = Model.load(case / form, base_model=base_of(case))
    found = outputs(model)
    for these, those in zip(found, expected, strict=True):
        assert [value for value, _ in these] == [value for value, _ in those]
        assert [score for _, score in these] == pytest.approx([score for _, score in those], abs=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_checkpoint_of_an_older_version_is_fully_verified(case: Path) -> None:
    """Every byte of the checkpoint, and every weight of the encoder, is what it was."""
    flair_peft.verify(case / "checkpoint", base_model=base_of(case))
