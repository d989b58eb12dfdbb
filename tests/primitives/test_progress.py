"""A bar for what takes long: on a terminal, after a while, one at a time, and off where users switch bars off."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flair.models import TextClassifier
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import flair_peft
from flair_peft.primitives import progress
from tests.support.opinions import classifier


class Terminal(io.StringIO):
    """What is written to it, as to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal, on which a bar waits for a tenth of a second."""
    terminal = Terminal()
    monkeypatch.setattr(progress, "_PATIENCE", 0.1)
    monkeypatch.setattr(progress, "_INTERVAL", 0.02)
    return terminal


def take(seconds: float, *, count: int = 1024) -> None:
    """Read some bytes, and then take time."""
    progress.advance(count)
    time.sleep(seconds)


def test_bar_is_shown_for_what_takes_long_only(terminal: Terminal) -> None:
    """Nothing of what is done at once; of the rest the bytes, and the time that passes without any."""
    with progress.shown("short", file=terminal):
        take(0.0)
    assert terminal.getvalue() == ""
    with progress.shown("long", file=terminal):
        take(0.3)
    assert "long: 1.00kB [00:00]" in terminal.getvalue()
    assert terminal.getvalue().count("\rlong") > 3
    assert terminal.getvalue().endswith("\r")


def test_bar_inside_of_another_is_none_of_its_own(terminal: Terminal) -> None:
    """A load within a conversion moves the bar of the conversion."""

    @progress.shown("loading", file=terminal)
    def load() -> None:
        take(0.3)

    with progress.shown("converting", file=terminal):
        load()
    assert "converting: 1.00kB" in terminal.getvalue()
    assert "loading" not in terminal.getvalue()
    load()
    assert "loading: 1.00kB" in terminal.getvalue()


def _by_hub(_: pytest.MonkeyPatch) -> None:
    disable_progress_bars()


def _by_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda _: False)


@pytest.mark.parametrize("switch", [_by_hub, _by_pipe])
def test_bar_is_not_shown_where_none_is_wanted(
    switch: Callable[[pytest.MonkeyPatch], None], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where stderr is no terminal, as in notebooks and logs, nor where bars are switched off."""
    switch(monkeypatch)
    try:
        with progress.shown("long", file=terminal):
            take(0.3)
    finally:
        enable_progress_bars()
    assert terminal.getvalue() == ""


def test_bar_of_what_fails_is_taken_away(terminal: Terminal) -> None:
    """The error comes through, the line is empty again, and nothing goes on ticking."""

    @progress.shown("long", file=terminal)
    def fail() -> None:
        take(0.3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert terminal.getvalue().endswith("\r")
    written = len(terminal.getvalue())
    time.sleep(0.1)
    assert len(terminal.getvalue()) == written


def test_library_call_that_takes_long_has_a_bar(
    base: Callable[[str], str], terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving, loading, merging and the like, each under its own name and with one bar for all that is inside."""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, file=terminal))
    model, told = classifier(base("bert")), {}
    calls: dict[str, Callable[[], object]] = {
        "saving": lambda: flair_peft.save_pretrained(model, tmp_path / "model"),
        "verifying": lambda: flair_peft.verify(tmp_path / "model"),
        "loading": lambda: TextClassifier.load(tmp_path / "model"),
        "merging": lambda: flair_peft.merge(model),
        "exporting": lambda: flair_peft.to_transformers(model, tmp_path / "transformers"),
        "reading the base": lambda: classifier(base("electra")),
    }
    for name, call in calls.items():
        terminal.truncate(0)
        call()
        told[name] = {line.partition(":")[0] for line in terminal.getvalue().replace("\0", "").split("\r")} - {""}
    assert {name: {text for text in texts if text.strip()} for name, texts in told.items()} == {n: {n} for n in calls}
