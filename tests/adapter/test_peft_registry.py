"""PEFT's methods by a table that is read instead of importing PEFT, and by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from flair_peft.adapter import peft_registry

TABLE = json.loads(Path(peft_registry.__file__).with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    peft_registry._read.cache_clear()
    yield
    peft_registry._read.cache_clear()


@pytest.mark.skipif(
    version("peft") not in TABLE["versions"], reason="PEFT is asked, which is not of the table's versions"
)
def test_table_says_what_peft_says() -> None:
    """Whether PEFT is imported makes no difference to what is known of its methods."""
    found, asked = peft_registry._read(is_imported=False), peft_registry.ask_peft()
    assert found == asked
    assert [*found.defaults["LORA"]] == [*asked.defaults["LORA"]]


def test_peft_of_another_version_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is not taken for what a later PEFT says."""
    monkeypatch.setattr(peft_registry.importlib.metadata, "version", lambda _: "99.0")
    monkeypatch.setattr(peft_registry, "ask_peft", lambda: "asked")
    assert peft_registry._read(is_imported=False) == "asked"
