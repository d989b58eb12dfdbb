"""Models of the zoo in files, and the same behind an address, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from flair_peft.serving import create_app
from tests.support.http_server import address_of
from tests.support.models import save_random

NAMES = (
    "sequence-tagger",
    "sequence-tagger-rnn-crf",
    "sequence-tagger-tokens",
    "token-classifier",
    "token-classifier-spans",
    "text-classifier",
    "text-classifier-multi-label",
    "text-regressor",
    "text-pair-classifier",
    "text-pair-regressor",
    "text-triple-classifier",
    "relation-extractor",
    "relation-classifier",
    "span-classifier",
    "multitask",
    "lemmatizer",
    "tars-classifier",
    "tars-tagger",
    "prefixed-sequence-tagger",
)


@pytest.fixture(scope="session")
def directories(base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return name → checkpoint of a model with a random adapter and head."""
    root = tmp_path_factory.mktemp("served")
    found = {name: save_random(name, base("bert"), root / name, seed=len(name))[0] for name in NAMES}
    for name in ("sequence-tagger", "prefixed-sequence-tagger", "text-classifier"):
        options = {"use_context": 12}
        found[f"{name}-context"] = save_random(name, base("bert"), root / f"{name}-context", seed=5, **options)[0]
    return found


@pytest.fixture(scope="session")
def address(directories: dict[str, str]) -> Iterator[str]:
    """Return where all of them answer."""
    with address_of(create_app(directories, admin_token="the admin's")) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """Return a client of that address."""
    with httpx.Client(base_url=address, timeout=60) as found:
        yield found
