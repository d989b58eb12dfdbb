"""Warnings of a training stand in Flair's file, and are printed as ever."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.opinions import classifier, train

SAID = "hardly learns with learning_rate=5e-5"


def test_warnings_of_a_training_stand_in_its_log(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each once, also of a second training in the same process; nothing of other times."""
    before = list(logging.getLogger("flair_peft").handlers)
    for name in ("first", "second"):
        train(classifier(base("bert")), tmp_path / name, learning_rate=5e-5, max_epochs=1)
        logging.getLogger("flair_peft").warning("after %s", name)
    for name in ("first", "second"):
        text = (tmp_path / name / "training.log").read_text()
        assert text.count(SAID) == 1
        assert "after" not in text
    assert caplog.text.count(SAID) == 2
    assert logging.getLogger("flair_peft").handlers == before


@pytest.mark.parametrize("has_handler", [False, True])
def test_warnings_are_printed_once(has_handler: bool, base: Callable[[str], str], tmp_path: Path) -> None:
    """Where nobody configured logging, Python prints them to stderr; where somebody did, that alone prints them."""
    code = f"""
        import logging
        from tests.support.opinions import classifier, train
        from flair_peft.training import training_log
        if {has_handler}:
            logging.basicConfig(format="HEARD %(message)s")
        with training_log.shared():  # as if another training went on
            train(classifier({base("bert")!r}), {str(tmp_path / "out")!r}, learning_rate=5e-5, max_epochs=1)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    (line,) = [line for line in run.stderr.splitlines() if SAID in line]
    assert line.startswith("HEARD ") is has_handler
    assert (tmp_path / "out" / "training.log").read_text().count(SAID) == 1
