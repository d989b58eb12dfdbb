"""Whole models go to the Hub and come back, and whoever has them in the cache needs no Hub any more."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Model
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.utils import reset_sessions
from safetensors.torch import load, save

import flair_peft
from flair_peft import SharedBase
from flair_peft.base import base_cache
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError, BaseMismatchError, BaseModelNotFoundError, ModelFileError, SaveError
from tests.support import round_trip
from tests.support.configs import lora
from tests.support.hub_stand_in import HubStandIn, _Answer, environment, online
from tests.support.methods import perturb_
from tests.support.zoo import ZOO

LORA = lora()
ENTRY = ZOO["text-classifier"]
CORPUS = ENTRY.corpus()
REPO, BASE = "me/model", "you/base"
OWN_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "flair_peft.json",
    "head.safetensors",
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
}


class _Hub(HubStandIn):
    """A Hub that refuses some requests.

    Attributes:
        refused: part of an address → status with which requests to it are answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, int] = {}

    def _reply(self, request: Any) -> Any:
        for part, status in self.refused.items():
            if part in request.path:
                return _Answer.of({"error": "you may not"}, status=status)
        return super()._reply(request)

    def new_requests(self) -> list[tuple[str, str]]:
        """Return the requests since this was asked last."""
        found, self.requests[:] = list(self.requests), []
        return found


@pytest.fixture
def hub(base: Callable[[str], str], tmp_path: Path) -> Iterator[_Hub]:
    """Yield a Hub that holds a base model; the owner of ``me`` is logged in."""
    _forget_bases()
    with _Hub() as server, online(server, None, tmp_path / "cache", token=server.token):
        server.add_repo(BASE, _files(Path(base("bert"))))
        yield server


@pytest.fixture
def stranger(hub: _Hub, tmp_path: Path) -> Iterator[Path]:
    """Yield the cache, empty yet, of somebody who is not logged in."""
    with online(hub, None, tmp_path / "stranger"):
        _forget_bases()
        hub.requests.clear()
        yield tmp_path / "stranger" / "hub"


@pytest.fixture(scope="module")
def published(
    base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], list[Any]]:
    """Return the files of a repository to which a classifier was pushed, and what the classifier predicts."""
    _forget_bases()  # one that an earlier test found would not be downloaded here
    with _Hub() as server, online(server, None, tmp_path_factory.mktemp("cache"), token=server.token):
        server.add_repo(BASE, _files(Path(base("bert"))))
        torch.manual_seed(0)
        model = _classifier()
        _push(model)
        return server.files(REPO), _predict(model)


@pytest.fixture
def pushed(hub: _Hub, published: tuple[dict[str, bytes], list[Any]]) -> tuple[str, list[Any]]:
    """Return the commit of a classifier on the Hub, whose base is there too, and what it predicts."""
    files, predictions = published
    return hub.add_repo(REPO, files), predictions


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _classifier(base: str = BASE, **options: Any) -> Model:
    factories = round_trip.Factories(base, LORA, **options)
    return ENTRY.build(factories.words, factories.documents)


def _predict(model: Model) -> Any:
    return ENTRY.predict(model, CORPUS)


def _push(model: Model, repo: str = REPO, **options: Any) -> str:
    return flair_peft.push_to_hub(model, repo, **options).rpartition("/")[2]


def _embeddings(model: Model) -> PeftTransformerEmbeddings:
    return next(module for module in model.modules() if isinstance(module, PeftTransformerEmbeddings))


def _other_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    weights = load(files["model.safetensors"])
    moved = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    return {**files, "model.safetensors": save(moved, {"format": "pt"})}


def _go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_HUB_OFFLINE=1 does when the hosts are imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True)
    reset_sessions()


def _forget_bases() -> None:
    base_cache._cache.clear()  # the base of a model that is alive would be shared instead of loaded


def _cached(cache: Path, repo: str, name: str) -> list[Path]:
    return list(cache.glob(f"models--{repo.replace('/', '--')}/snapshots/*/{name}"))


LOADS: dict[str, Callable[[str], Model]] = {
    "from_pretrained": lambda commit: flair_peft.from_pretrained(REPO),
    "from_pretrained at revision": lambda commit: flair_peft.from_pretrained(REPO, revision=commit),
    "Model": lambda commit: Model.load(REPO),
    "Model at commit": lambda commit: Model.load(f"{REPO}@{commit}"),
    "TextClassifier at branch": lambda commit: TextClassifier.load(f"{REPO}@main"),
    "TextClassifier at revision": lambda commit: TextClassifier.load(REPO, revision="main"),
}


@pytest.mark.parametrize("way", LOADS)
def test_hub_pushed_model_predicts_the_same_however_it_is_loaded(
    way: str, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """A stranger with an empty cache gets the very numbers of the model that was pushed, by each way to name it."""
    commit, expected = pushed
    loaded = LOADS[way](commit)
    assert type(loaded) is TextClassifier
    assert _predict(loaded) == expected


def test_hub_push_returns_the_address_of_the_commit_that_holds_the_model(hub: _Hub) -> None:
    """The repository holds the checkpoint and nothing else, at the commit whose address is returned."""
    address = flair_peft.push_to_hub(_classifier(), "model", commit_message="First")
    assert address.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert set(hub.files(REPO, address.rpartition("/")[2])) == {*OWN_FILES, ".gitattributes"}
    assert hub.files(REPO, address.rpartition("/")[2]) == hub.files(REPO)


@pytest.mark.parametrize("is_on_hub", [True, False])
def test_hub_card_names_the_base_only_if_it_is_on_the_hub(
    is_on_hub: bool, hub: _Hub, base: Callable[[str], str]
) -> None:
    """The Hub links the base of the metadata; a path of somebody's machine would be refused there."""
    _push(_classifier(BASE if is_on_hub else base("bert")))
    _, metadata, _ = hub.files(REPO)["README.md"].decode().split("---\n", 2)
    lines = metadata.splitlines()
    assert {"library_name: flair", "- flair", "- flair_peft", "- peft"} <= set(lines)
    assert [line for line in lines if line.startswith("base_model:")] == [f"base_model: {BASE}"] * is_on_hub


def test_hub_private_model_on_private_base_is_for_the_token_only(hub: _Hub, tmp_path: Path) -> None:
    """``token=`` opens the model and its base; without it both do not exist."""
    hub.add_repo(BASE, hub.files(BASE), private=True)
    model = _classifier()
    _push(model, private=True)
    with online(hub, None, tmp_path / "stranger"):
        with pytest.raises(ModelFileError, match=r"Repository Not Found.*token"):
            flair_peft.from_pretrained(REPO)
        assert _predict(Model.load(REPO, token=hub.token)) == _predict(model)


def test_hub_push_to_a_branch_leaves_main_as_it_is(hub: _Hub) -> None:
    """A branch is made where it is missing, and is used again where it is not."""
    for _ in range(2):
        model = _classifier()
        _push(model, revision="bigger")
        assert set(hub.files(REPO)) == {".gitattributes"}
        assert _predict(Model.load(f"{REPO}@bigger")) == _predict(model)


def test_hub_pull_request_holds_the_model_and_main_does_not(hub: _Hub) -> None:
    """``create_pr`` proposes, and what it proposes can be loaded before it is merged."""
    first, second = _classifier(), _classifier()
    commit = _push(first)
    perturb_(_embeddings(second).model, seed=5)
    _push(second, create_pr=True)
    assert hub.files(REPO) == hub.files(REPO, commit)
    assert _predict(Model.load(f"{REPO}@refs/pr/1")) == _predict(second) != _predict(first)


def test_hub_second_push_replaces_the_checkpoint_and_keeps_what_others_put_there(hub: _Hub) -> None:
    """Files of the earlier checkpoint go if the new one lacks them; no other file does, whatever its name."""
    _push(_classifier(), save_base=True)
    earlier = hub.files(REPO)
    assert "base.safetensors" in earlier
    foreign = {"notes.txt": b"mine", "onnx/model.safetensors": b"mine", "tokenizer/mine.json": b"{}"}
    hub.add_repo(REPO, {**earlier, **foreign})
    model = _classifier()
    _push(model)
    found = hub.files(REPO)
    assert set(found) == {*OWN_FILES, *foreign, ".gitattributes"}
    assert {name: found[name] for name in foreign} == foreign
    assert found["README.md"] != earlier["README.md"]
    assert _predict(Model.load(REPO)) == _predict(model)


def test_hub_push_keeps_a_card_that_somebody_wrote(hub: _Hub) -> None:
    """As in a directory, a card that people edited stays, be it of an earlier checkpoint or there from the start."""
    card = b"---\nlicense: mit\n---\nMine.\n"
    hub.add_repo(REPO, {"README.md": card})
    for _ in range(2):
        _push(_classifier())
        assert hub.files(REPO)["README.md"] == card


def test_hub_push_of_a_model_that_cannot_be_stored_makes_no_repository(hub: _Hub, base: Callable[[str], str]) -> None:
    """What cannot be stored is said before the Hub is asked for anything."""
    model = ENTRY.build(None, lambda: TransformerDocumentEmbeddings(base("bert"), peft_config=copy.deepcopy(LORA)))
    hub.requests.clear()
    with pytest.raises(AdapterConfigError, match="of Flair's own class and has an adapter"):
        _push(model)
    assert hub.requests == []


def test_hub_holds_a_plain_model_beside_the_commit_of_its_base(hub: _Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Flair's own embeddings are pushed without the weights that a base of the Hub has, and pulled as they were."""
    model = ENTRY.build(None, lambda: TransformerDocumentEmbeddings(BASE))
    expected = _predict(model)
    _push(model)
    assert "base_model: " + BASE in hub.files(REPO)["README.md"].decode()
    assert sum(len(content) for name, content in hub.files(REPO).items() if name.endswith("safetensors")) < 20_000
    assert "directory" not in caplog.text
    hub.add_repo(BASE, _other_weights(hub.files(BASE)))
    _forget_bases()
    loaded = Model.load(REPO)
    assert type(loaded.embeddings) is TransformerDocumentEmbeddings
    assert _predict(loaded) == expected


def test_plain_file_is_converted_with_a_base_in_another_cache(hub: _Hub, tmp_path: Path) -> None:
    """Where a user keeps files from the Hub, the base is found for the comparison and for the trial."""
    model = ENTRY.build(None, lambda: TransformerDocumentEmbeddings(BASE))
    model.save(tmp_path / "plain.pt")
    shutil.rmtree(tmp_path / "cache")
    _forget_bases()
    other = str(tmp_path / "other")
    flair_peft.convert_legacy(tmp_path / "plain.pt", tmp_path / "model", cache_dir=other)
    assert sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")) < 20_000
    loaded = flair_peft.from_pretrained(tmp_path / "model", cache_dir=other, local_files_only=True)
    assert _predict(loaded) == _predict(model)


def test_hub_push_of_a_plain_model_on_a_local_base_says_so(
    hub: _Hub, base: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Others do not have the directory, unless nothing is left to it."""
    model = ENTRY.build(None, lambda: TransformerDocumentEmbeddings(base("bert")))
    _push(model, save_base=True)
    assert "others do not have" not in caplog.text
    _push(model)
    assert "others do not have" in caplog.text


def test_hub_base_is_pinned_to_the_commit_it_was_trained_on(hub: _Hub, tmp_path: Path) -> None:
    """A newer commit of the base, with other weights, changes nothing: the load asks for the one that is recorded."""
    model = _classifier()
    record = _embeddings(model).base_record
    trained_on = hub.add_repo(BASE, hub.files(BASE), revision="backup")
    assert record is not None
    assert (record.name, hub.files(BASE, str(record.revision))) == (BASE, hub.files(BASE, trained_on))
    _push(model)
    expected = _predict(model)
    newer = hub.add_repo(BASE, _other_weights(hub.files(BASE)))
    del model
    _forget_bases()
    with online(hub, None, tmp_path / "stranger"):
        loaded = Model.load(REPO)
        assert _predict(loaded) == expected
        asked = [path for _, path in hub.requests if path.startswith(f"/{BASE}/") and "model.safetensors" in path]
        assert asked
        assert not [path for path in asked if newer in path or "main" in path]


def test_hub_base_that_moved_is_named_by_the_user(hub: _Hub, pushed: tuple[str, list[Any]], tmp_path: Path) -> None:
    """A base that is gone is an error that says what to pass; what is passed must be the same model."""
    files = hub.files(BASE)
    hub.add_repo("new/home", files)
    hub.add_repo("new/other", _other_weights(files))
    del hub._repos[BASE]
    _forget_bases()
    with online(hub, None, tmp_path / "stranger"):
        with pytest.raises(BaseModelNotFoundError, match=f"'{BASE}', revision .* Pass base_model="):
            Model.load(REPO)
        with pytest.raises(BaseMismatchError, match="new/other"):
            Model.load(REPO, base_model="new/other")
        assert _predict(Model.load(REPO, base_model="new/home")) == pushed[1]


def test_hub_model_in_the_cache_asks_once_for_the_newest_commit(
    hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """A branch can move, so it is asked for, with one request and no other; a commit cannot, and is not asked for."""
    Model.load(REPO)
    _forget_bases()
    hub.requests.clear()
    Model.load(REPO)
    assert hub.new_requests() == [("GET", f"/api/models/{REPO}/revision/main")]
    _forget_bases()
    assert _predict(flair_peft.from_pretrained(REPO, revision=pushed[0])) == pushed[1]
    assert hub.new_requests() == []


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "local_files_only"])
@pytest.mark.parametrize(("load_model", "at_commit"), [(Model.load, False), (flair_peft.from_pretrained, True)])
def test_hub_model_in_the_cache_loads_offline_without_a_request(
    way: str,
    at_commit: bool,
    load_model: Callable[..., Model],
    hub: _Hub,
    pushed: tuple[str, list[Any]],
    stranger: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offline means offline: what is in the cache predicts the same, and nobody hears of it."""
    source = f"{REPO}@{pushed[0]}" if at_commit else REPO
    load_model(source)
    _forget_bases()
    hub.requests.clear()
    if way == "HF_HUB_OFFLINE":
        _go_offline(monkeypatch)
    options = {"local_files_only": True} if way == "local_files_only" else {}
    assert _predict(load_model(source, **options)) == pushed[1]
    assert hub.new_requests() == []


@pytest.mark.parametrize("at_commit", [True, False])
def test_hub_model_in_the_cache_loads_at_once_while_the_hub_is_down(
    at_commit: bool, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """A Hub that is down costs no waiting: huggingface_hub tries for 23 seconds where it is asked for single files."""
    Model.load(f"{REPO}@{pushed[0]}")
    Model.load(REPO)
    _forget_bases()
    with hub.down():
        start = time.monotonic()
        loaded = Model.load(f"{REPO}@{pushed[0]}" if at_commit else REPO)
        assert time.monotonic() - start < 3
        assert _predict(loaded) == pushed[1]


def test_hub_model_at_commit_loads_while_down_when_another_process_filled_the_cache(
    hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """A cache filled by snapshot_download, which notes nothing of files that do not exist, is enough."""
    for repo in (REPO, BASE):
        snapshot_download(repo)
    _forget_bases()
    with hub.down():
        start = time.monotonic()
        loaded = Model.load(f"{REPO}@{pushed[0]}")
        assert time.monotonic() - start < 3
        assert _predict(loaded) == pushed[1]


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "local_files_only", "down"])
def test_hub_model_that_is_not_in_the_cache_is_an_error_at_once(
    way: str, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the model and says that it is not here; no request is made for it."""
    options = {"local_files_only": True} if way == "local_files_only" else {}
    if way == "HF_HUB_OFFLINE":
        _go_offline(monkeypatch)
    if way == "down":
        with hub.down(), pytest.raises(ModelFileError, match=f"'{REPO}'.*internet connection"):
            flair_peft.from_pretrained(REPO)
    else:
        with pytest.raises(ModelFileError, match=f"'{REPO}'.*outgoing traffic has been disabled"):
            flair_peft.from_pretrained(REPO, **options)
    assert hub.new_requests() == []


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "local_files_only"])
def test_hub_base_that_is_not_in_the_cache_is_an_error_that_names_it(
    way: str, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without its base says which model lacks, at which commit, and what to pass."""
    snapshot_download(REPO)
    _forget_bases()
    hub.requests.clear()
    if way == "HF_HUB_OFFLINE":
        _go_offline(monkeypatch)
    options = {"local_files_only": True} if way == "local_files_only" else {}
    with pytest.raises(BaseModelNotFoundError, match=f"its base model '{BASE}', revision .* Pass base_model="):
        Model.load(REPO, **options)
    assert hub.new_requests() == []


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "me/nothing": ({}, "Repository Not Found"),
    f"{REPO}@nowhere": ({}, "Revision Not Found"),
    f"{REPO}@{'0' * 40}": ({}, "Revision Not Found"),
    REPO: ({"token": "hf_wrong"}, "Invalid credentials"),
    "me/private": ({}, "Repository Not Found.*private.*the token"),
    BASE: ({}, "holds no flair_peft.json, so it is no checkpoint"),
    "not a name": ({}, "neither a directory here nor a repository"),
}
PATHS = ["a/b/c", "./models", "../tagger", "/models/tagger", "~/tagger", "C:\\tagger", "best-model.pt", "me/tagger.bin"]


@pytest.mark.parametrize("source", REFUSALS)
def test_hub_model_that_cannot_be_had_is_an_error_that_says_why(
    source: str, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """One request is enough to know, and the Hub's own words are in the message."""
    hub.add_repo("me/private", hub.files(REPO), private=True)
    options, words = REFUSALS[source]
    with pytest.raises(ModelFileError, match=words) as raised:
        flair_peft.from_pretrained(source, **options)
    assert str(raised.value).startswith(f"Cannot load '{source}'")
    assert len(hub.requests) <= 1
    assert not list(stranger.glob("*/blobs/*"))


@pytest.mark.parametrize("path", PATHS)
def test_path_at_which_nothing_is_does_not_go_to_the_hub(path: str, hub: _Hub) -> None:
    """Nor to Flair, which would say that a repository cannot be called so."""
    ways = [Model.load, TextClassifier.load, flair_peft.from_pretrained, flair_peft.verify]
    for way in (*ways, flair_peft.PeftTransformerDocumentEmbeddings.from_adapter):
        with pytest.raises(ModelFileError, match=r"there is no such file or directory.*Check the path") as raised:
            way(path)
        assert isinstance(raised.value, FileNotFoundError)  # as from Flair, whose users go by it
    assert hub.requests == []


def test_address_is_left_to_a_class_that_knows_what_to_do_with_it(hub: _Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flair asks the class of the model first."""
    asked = list[str]()
    monkeypatch.setattr(TextClassifier, "_fetch_model", staticmethod(lambda name: asked.append(str(name)) or name))
    # One that could be a repository is looked for there.
    names = ["https://example.org/models/mine.pt", *(path for path in PATHS if path != "me/tagger.bin")]
    for name in names:
        with pytest.raises(FileNotFoundError):
            TextClassifier.load(name)
    assert asked == names
    assert hub.requests == []


def test_hub_reason_is_logged_where_flair_looks_for_a_model_of_its_own(
    hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``Model.load`` leaves it to Flair to fail, which does not say why: the reason stands in the log."""
    with caplog.at_level(logging.WARNING, "flair_peft"), pytest.raises(ValueError, match="Could not find any model"):
        Model.load("me/nothing")
    assert "'me/nothing' is no file or directory here" in caplog.text
    assert "Repository Not Found" in caplog.text


@pytest.fixture
def stock(base: Callable[[str], str], tmp_path: Path) -> dict[str, bytes]:
    """Return the files of a repository with a model of stock Flair."""
    entry = ZOO["sequence-tagger"]
    model = entry.build(lambda **kwargs: TransformerWordEmbeddings(base("bert"), **kwargs), None)
    model.save(tmp_path / "stock.bin")
    return {"pytorch_model.bin": (tmp_path / "stock.bin").read_bytes()}


@pytest.mark.parametrize("load_model", [Model.load, SequenceTagger.load])
def test_hub_stock_model_costs_one_request_more_than_without_this_package(
    load_model: Callable[..., Model], hub: _Hub, stock: dict[str, bytes], tmp_path: Path
) -> None:
    """Whether a repository holds a checkpoint is one question; the rest is Flair's, as it always was."""
    hub.add_repo("you/tagger", stock)
    flair_peft.uninstall()
    with online(hub, None, tmp_path / "before"):
        hub.requests.clear()
        load_model("you/tagger")
        alone = hub.new_requests()
    flair_peft.install()
    with online(hub, None, tmp_path / "after"):
        for requests_of_flair in (alone, [r for r in alone if r[0] == "HEAD"]):
            loaded = load_model("you/tagger")
            assert type(loaded) is SequenceTagger
            assert hub.new_requests() == [("GET", "/api/models/you/tagger/revision/main"), *requests_of_flair]


def test_hub_stock_model_in_the_cache_loads_offline(
    hub: _Hub, stock: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline nobody is asked whether the repository holds a checkpoint."""
    hub.add_repo("you/tagger", stock)
    SequenceTagger.load("you/tagger")
    hub.requests.clear()
    _go_offline(monkeypatch)
    assert type(SequenceTagger.load("you/tagger")) is SequenceTagger
    assert hub.new_requests() == []


def test_hub_repository_that_becomes_a_checkpoint_is_found_to_be_one(
    hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """That there was no checkpoint yesterday is not remembered: the branch can have moved."""
    hub.add_repo("me/later", {"notes.txt": b""})
    with pytest.raises(ValueError, match="Could not find any model"):
        Model.load("me/later")
    hub.add_repo("me/later", hub.files(REPO))
    assert _predict(Model.load("me/later")) == pushed[1]


def test_hub_newer_commit_of_a_branch_is_loaded(hub: _Hub) -> None:
    """What the cache has of a branch is not taken for the newest."""
    first, second = _classifier(), _classifier()
    perturb_(_embeddings(second).model, seed=5)
    for model in (first, second):
        _push(model)
        assert _predict(Model.load(REPO)) == _predict(model)
    assert _predict(first) != _predict(second)


def test_hub_load_downloads_what_the_checkpoint_names_and_nothing_else(
    hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """Weights that others put into the repository may be gigabytes."""
    hub.add_repo(REPO, {**hub.files(REPO), "model.safetensors": b"theirs", "other/config.json": b"{}"})
    assert _predict(Model.load(REPO)) == pushed[1]
    info = next(repo for repo in scan_cache_dir(stranger).repos if repo.repo_id == REPO)
    [revision] = info.revisions
    folder = revision.snapshot_path
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == OWN_FILES - {
        "README.md"
    }


@pytest.mark.parametrize(
    "load_model",
    [TextClassifier.load, flair_peft.from_pretrained, SequenceTagger.load],
    ids=lambda load: load.__qualname__ + str(getattr(load, "__self__", "")),
)
@pytest.mark.parametrize("source", ["out/best-model.pt", "out/model.bin", "./out/best-model.pt", "/out/best-model.pt"])
def test_hub_is_not_asked_for_a_file_that_does_not_exist(
    source: str, load_model: Callable[[str], Model], hub: _Hub
) -> None:
    """A path with the ending of a file is no name on the Hub, though it may look like one."""
    with pytest.raises((OSError, ModelFileError, ValueError)):
        load_model(source)
    # Flair's own taggers ask for whatever has a slash.
    assert not [path for _, path in hub.requests if "pytorch_model.bin" not in path]


@pytest.mark.parametrize("load_model", [TextClassifier.load, flair_peft.from_pretrained, Model.load])
def test_hub_is_not_asked_for_a_directory_that_is_no_checkpoint(
    load_model: Callable[[Path], Model], hub: _Hub, tmp_path: Path
) -> None:
    """What stands here is what is meant, and the error says what it lacks."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelFileError, match=r"out.*flair_peft\.json"):
        load_model(tmp_path / "out")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer/tokenizer.json", "flair_peft.json"])
@pytest.mark.parametrize("at_commit", [True, False])
def test_hub_file_lost_from_the_cache_is_downloaded_again(
    name: str, at_commit: bool, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """A snapshot of which a part was deleted, or never arrived, is completed before it is read."""
    source = f"{REPO}@{pushed[0]}" if at_commit else REPO
    Model.load(source)
    [lost] = _cached(stranger, REPO, name)
    lost.resolve().unlink()
    assert _predict(Model.load(source)) == pushed[1]
    assert lost.is_file()


@pytest.mark.parametrize("way", ["local_files_only", "down"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer/tokenizer.json", "flair_peft.json"])
def test_hub_file_lost_from_the_cache_is_named_offline(
    name: str, way: str, hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """Half a model is never loaded."""
    Model.load(REPO)
    [lost] = _cached(stranger, REPO, name)
    lost.resolve().unlink()
    if way == "local_files_only":
        with pytest.raises(ModelFileError, match=Path(name).name):
            flair_peft.from_pretrained(REPO, local_files_only=True)
    else:
        with hub.down(), pytest.raises(ModelFileError, match=Path(name).name):
            flair_peft.from_pretrained(REPO)


def test_hub_base_lost_from_the_cache_is_downloaded_again(
    hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path
) -> None:
    """The cache is asked first for the base's commit, and the Hub where it lacks."""
    Model.load(REPO)
    [lost] = _cached(stranger, BASE, "model.safetensors")
    lost.resolve().unlink()
    lost.unlink()
    _forget_bases()
    assert _predict(Model.load(f"{REPO}@{pushed[0]}")) == pushed[1]


def test_hub_push_without_the_base_in_the_cache_stores_the_base_whole(hub: _Hub, tmp_path: Path) -> None:
    """Nothing is downloaded for a push: where the base is gone, the files hold it, and load without it."""
    model = _classifier()
    with online(hub, None, tmp_path / "elsewhere", token=hub.token):
        _push(model)
    assert "base.safetensors" in hub.files(REPO)
    del hub._repos[BASE]
    with online(hub, None, tmp_path / "stranger"):
        assert _predict(Model.load(REPO)) == _predict(model)


FAILURES: dict[str, tuple[str, int, str]] = {
    "cannot create": ("/api/repos/create", 500, "500.*you may not"),
    "may not create branch": (f"/api/models/{REPO}/branch", 403, "403.*you may not"),
    "cannot be looked at": (f"/api/models/{REPO}/revision", 500, "500|internet connection"),
    "may not write": ("/preupload/", 403, "403.*you may not"),
    "may not upload": ("/lfs/objects/", 403, "403"),
    "commit fails": ("/commit/", 500, "500.*you may not"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_hub_push_that_is_refused_says_why_and_changes_no_file(failure: str, hub: _Hub) -> None:
    """Whichever request of a push fails, the error holds the reason and the files are those of before."""
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    model, (address, status, words) = _classifier(), FAILURES[failure]
    hub.refused = {address: status}
    with pytest.raises(SaveError, match=f"Cannot push to '{REPO}': .*({words})"):
        _push(model, revision="new" if "branch" in failure else None)
    hub.refused = {}
    assert hub.files(REPO) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("reason", ["no token", "wrong token", "down", "offline", "bad name"])
def test_hub_push_that_cannot_be_made_says_why(reason: str, hub: _Hub, tmp_path: Path) -> None:
    """Tokens, the network and names that the Hub does not take end in the same error."""
    model, words = _classifier(), {"no token": "401", "wrong token": "Invalid credentials", "down": "Connection"}
    hub.add_repo(REPO, {"notes.txt": b"mine"})
    token = {"no token": False, "wrong token": "hf_wrong"}.get(reason)
    with pytest.MonkeyPatch.context() as patch:
        if reason == "offline":
            _go_offline(patch)
        with hub.down() if reason == "down" else patch.context(), pytest.raises(SaveError) as raised:
            _push(model, "me//model" if reason == "bad name" else REPO, token=token)
    reset_sessions()
    message = str(raised.value)
    assert message.startswith("Cannot push to 'me/")
    assert {**words, "offline": "offline", "bad name": "me//model"}[reason].lower() in message.lower()
    assert hub.files(REPO) == {"notes.txt": b"mine"}


def test_hub_model_is_verified_whole(hub: _Hub, pushed: tuple[str, list[Any]], stranger: Path) -> None:
    """``verify`` takes a name on the Hub, and reads every weight of the base that is found there."""
    hub.add_repo("new/other", _other_weights(hub.files(BASE)))
    flair_peft.verify(REPO)
    with pytest.raises(BaseMismatchError):
        flair_peft.verify(REPO, base_model="new/other")


@pytest.mark.matrix
def test_hub_new_process_loads_with_flair_alone(hub: _Hub, pushed: tuple[str, list[Any]], tmp_path: Path) -> None:
    """A process that knows Flair, this package and the name of the model predicts what was pushed."""
    script = f"""
from flair.data import Sentence
from flair.nn import Model
import flair_peft
model = Model.load("{REPO}")
sentence = Sentence("George Washington went to Washington .")
model.predict(sentence, return_probabilities_for_all_classes=True)
print(*(f"{{label.value}}={{label.score!r}}" for label in sentence.labels))
"""
    variables = {**os.environ, **environment(hub, tmp_path / "new"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    sentence = Sentence("George Washington went to Washington .")
    Model.load(REPO).predict(sentence, return_probabilities_for_all_classes=True)
    assert found.stdout.split() == [f"{label.value}={label.score!r}" for label in sentence.labels]


def _load_checkpoint(_: Path) -> object:
    return Model.load(REPO, token=False)


def _load_adapter(cache: Path) -> object:
    folder = snapshot_download(REPO, cache_dir=cache / "adapter", token=False)
    return PeftTransformerEmbeddings.from_adapter(folder, base_model=BASE, token=False)


def _make_embeddings(_: Path) -> object:
    return PeftTransformerEmbeddings(BASE, token=False)


def _make_shared_base(_: Path) -> object:
    return SharedBase(BASE, token=False).load(REPO, token=False)


@pytest.mark.parametrize("act", [_load_checkpoint, _load_adapter, _make_embeddings, _make_shared_base])
def test_hub_is_sent_no_token_where_token_is_false(
    act: Callable[[Path], object],
    hub: _Hub,
    pushed: tuple[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the user is logged in: no request has one, for the model, its base, its tokenizer or its adapter."""
    seen, reply = list[Any](), hub._reply
    monkeypatch.setattr(hub, "_reply", lambda request: (seen.append(request), reply(request))[1])
    with online(hub, None, tmp_path / "other", token=hub.token):
        _forget_bases()
        assert act(tmp_path) is not None
    assert {request.path.split("/")[2] for request in seen if "resolve" in request.path} >= {BASE.split("/")[1]}
    assert {request.path for request in seen if request.token is not None} == set()
