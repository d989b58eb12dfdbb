"""The stand-in for the Hub answers as the real one does, and is used by everything that asks a Hub."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import flair
import huggingface_hub
import pytest
import requests
import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from tests.support import tiny
from tests.support.configs import lora
from tests.support.hub_stand_in import HubStandIn, environment, online
from tests.support.methods import perturb_

LARGE = os.urandom(2 * 1024 * 1024)
REPO = "me/base"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """Yield a stand-in that everything in this process uses, with nobody logged in."""
    with HubStandIn() as server, online(server, None, tmp_path / "cache"):
        yield server


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def _read(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def _add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def _tiny_bert() -> BertModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=50, **sizes)).eval()


def _output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10).unsqueeze(0)).last_hidden_state


def test_hub_upload_folder_then_snapshot_gives_the_same_bytes(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    """Text goes with the commit, binaries through LFS, and both come back as they were."""
    files = {"README.md": b"---\nlicense: mit\n---\n", "a/b.txt": "ä\n".encode(), "large.bin": LARGE, "empty.txt": b""}
    folder = _write(tmp_path / "folder", files)
    assert api.create_repo(REPO, private=True).repo_id == REPO
    api.create_repo(REPO, exist_ok=True)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/lfs/objects/{_sha256(LARGE)}"]
    snapshot = Path(api.snapshot_download(REPO))
    assert snapshot.name == commit.oid
    assert {**files, ".gitattributes": hub.files(REPO)[".gitattributes"]} == _read(str(snapshot)) == hub.files(REPO)


def _sha256(content: bytes) -> str:
    return huggingface_hub.utils.sha.sha256(content).hexdigest()


def test_hub_upload_of_unchanged_files_makes_no_commit(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    """The Hub tells the hashes of the files it has, so that an upload which changes nothing ends there."""
    folder = _write(tmp_path / "folder", {"a.txt": b"a", "large.bin": LARGE})
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert sum("/commit/" in path for _, path in hub.requests) == 1


def test_hub_revisions_are_pinned_by_branch_tag_and_commit(hub: HubStandIn, api: HfApi) -> None:
    """A file is found as it was at the revision that is asked for, under each name of that revision."""
    first = hub.add_repo(REPO, {"a.txt": b"first"})
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="old/one", revision="v1")
    second = api.create_commit(REPO, [_add("a.txt", b"second")], commit_message="second", parent_commit=first).oid
    api.create_commit(REPO, [_add("a.txt", b"third")], commit_message="third", revision="old/one")
    expected = {None: b"second", "main": b"second", second: b"second", "v1": b"first", first: b"first"}
    expected["old/one"] = b"third"
    read = {revision: Path(api.hf_hub_download(REPO, "a.txt", revision=revision)).read_bytes() for revision in expected}
    assert read == expected
    assert [api.model_info(REPO, revision=revision).sha for revision in ("v1", None)] == [first, second]
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "old/one"}


def test_hub_commit_on_an_old_parent_is_refused(hub: HubStandIn, api: HfApi) -> None:
    """Whoever names the commit that he builds on is told that another came in between."""
    first = hub.add_repo(REPO, {"a.txt": b"first"})
    hub.add_repo(REPO, {"a.txt": b"second"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [_add("a.txt", b"third")], commit_message="third", parent_commit=first)


def test_hub_commit_copies_deletes_and_proposes(hub: HubStandIn, api: HfApi) -> None:
    """Copies of regular and LFS files, deleted files and folders, and pull requests are commits like others."""
    hub.add_repo(REPO, {"a.txt": b"a", "b/c.txt": b"c", "b/d.bin": LARGE, "e.txt": b"e"})
    copies = [CommitOperationCopy("a.txt", "a2.txt"), CommitOperationCopy("b/d.bin", "d2.bin")]
    deletions = [CommitOperationDelete("b/"), CommitOperationDelete("e.txt")]
    api.create_commit(REPO, [*copies, *deletions], commit_message="move")
    assert hub.files(REPO) == {"a.txt": b"a", "a2.txt": b"a", "d2.bin": LARGE}
    proposed = api.create_commit(REPO, [_add("f.txt", b"f")], commit_message="propose", create_pr=True)
    assert proposed.pr_num == 1
    assert "f.txt" in api.list_repo_files(REPO, revision=proposed.pr_revision)
    assert "f.txt" not in api.list_repo_files(REPO)


def test_hub_lists_files_with_sizes_and_hashes(hub: HubStandIn, api: HfApi) -> None:
    """Trees, paths and model_info agree on what the repository holds."""
    hub.add_repo(REPO, {"a.txt": b"abc", "b/c/d.bin": LARGE})
    assert [entry.path for entry in api.list_repo_tree(REPO)] == ["b", "a.txt"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "b", recursive=True)] == ["b/c", "b/c/d.bin"]
    large, text = api.get_paths_info(REPO, ["b/c/d.bin", "a.txt", "missing"])
    assert (large.size, large.lfs.sha256) == (len(LARGE), _sha256(LARGE))
    assert (text.size, text.lfs, text.blob_id) == (3, None, "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f")  # git's own
    siblings = api.model_info(REPO, files_metadata=True).siblings
    assert [(s.rfilename, s.size, s.blob_id) for s in siblings] == [(f.path, f.size, f.blob_id) for f in (text, large)]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))


def test_hub_private_repo_is_not_there_for_strangers(hub: HubStandIn, api: HfApi) -> None:
    """Without the token a private repository is missing; a wrong token is refused, whatever it asks for."""
    hub.add_repo(REPO, {"a.txt": b"a"}, private=True)
    stranger, forger = HfApi(endpoint=hub.endpoint, token=False), HfApi(endpoint=hub.endpoint, token="hf_wrong")
    for ask in (stranger.model_info, stranger.list_repo_files, stranger.snapshot_download):
        with pytest.raises(RepositoryNotFoundError):
            ask(REPO)
    assert not stranger.file_exists(REPO, "a.txt")
    assert api.model_info(REPO).private
    assert Path(api.hf_hub_download(REPO, "a.txt")).read_bytes() == b"a"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as wrong:
        forger.model_info(REPO)
    assert not isinstance(wrong.value, RepositoryNotFoundError)
    with pytest.raises(requests.HTTPError, match="Invalid user token"):
        forger.whoami()
    assert api.whoami()["name"] == hub.user


def test_hub_writing_without_a_token_is_refused(hub: HubStandIn) -> None:
    """Nobody but the user creates a repository or commits to a public one."""
    hub.add_repo(REPO, {})
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("me/other")
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_commit(REPO, [_add("a.txt", b"a")], commit_message="add")
    assert hub.files(REPO) == {}


def test_hub_missing_things_are_told_apart(hub: HubStandIn, api: HfApi) -> None:
    """A missing repository, revision or file, and a gated repository, each raise their own error."""
    hub.add_repo(REPO, {"a.txt": b"a"})
    hub.add_repo("me/gated", {"a.txt": b"a"}, gated=True)
    with pytest.raises(RepositoryNotFoundError, match="404"):
        api.hf_hub_download("me/missing", "a.txt")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        huggingface_hub.hf_hub_download("me/missing", "a.txt")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "a.txt", revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "b.txt")
    assert [api.file_exists(REPO, name) for name in ("a.txt", "b.txt")] == [True, False]
    with pytest.raises(GatedRepoError):
        huggingface_hub.hf_hub_download("me/gated", "a.txt")
    assert huggingface_hub.model_info("me/gated").gated == "manual"


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [("bytes=2-4", 206, b"cde"), ("bytes=7-", 206, b"hij"), ("bytes=-2", 206, b"ij"), ("bytes=10-", 416, b"")],
)
@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_hub_range_gives_the_part(hub: HubStandIn, name: str, asked: str, status: int, part: bytes) -> None:
    """Interrupted downloads go on where they ended, for regular files and behind the redirect of LFS files."""
    hub.add_repo(REPO, {name: b"abcdefghij"})
    address = f"{hub.endpoint}/{REPO}/resolve/main/{name}"
    with requests.Session() as session:
        answer = session.get(address, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, part)


def test_hub_unknown_route_says_so_at_once(hub: HubStandIn, api: HfApi) -> None:
    """What the stand-in does not serve fails with its name, and is not tried again."""
    with pytest.raises(HfHubHTTPError, match="no route for GET /api/datasets/me/data"):
        api.dataset_info("me/data")
    assert len(hub.requests) == 1


def test_hub_model_pushed_loads_equal_and_knows_its_commit(hub: HubStandIn) -> None:
    """A model that transformers pushed is the one that it loads, and its config names the commit."""
    model = _tiny_bert()
    commit = model.push_to_hub(REPO, token=hub.token)
    loaded = AutoModel.from_pretrained(REPO)
    assert torch.equal(_output(loaded), _output(model))
    assert loaded.config._commit_hash == commit.oid
    hub.requests.clear()
    pinned = AutoModel.from_pretrained(REPO, revision=commit.oid)
    assert pinned.config._commit_hash == commit.oid
    assert hub.requests == []
    AutoModel.from_pretrained(REPO)
    assert hub.requests == [("HEAD", f"/{REPO}/resolve/main/config.json")]


def test_hub_private_model_loads_with_the_token_only(hub: HubStandIn) -> None:
    """The token that is passed on opens a private base model; without it the model is not valid."""
    _tiny_bert().push_to_hub(REPO, token=hub.token, private=True)
    with pytest.raises(OSError, match="is not a valid model identifier"):
        AutoModel.from_pretrained(REPO)
    assert AutoModel.from_pretrained(REPO, token=hub.token).config.hidden_size == 32


def test_hub_tokenizer_asks_for_lists_even_when_pinned_and_cached(hub: HubStandIn, tmp_path: Path) -> None:
    """transformers 4.57 lists a tokenizer's files at every load, but fetches none that it has."""
    files = _read(str(tiny.build("bert", tmp_path / "bert")))
    commit = hub.add_repo(REPO, files)
    text = AutoTokenizer.from_pretrained(REPO, revision=commit)("Berlin")
    hub.requests.clear()
    assert AutoTokenizer.from_pretrained(REPO, revision=commit)("Berlin") == text
    assert all("/tree/" in path for _, path in hub.requests)
    hub.requests.clear()
    AutoTokenizer.from_pretrained(REPO, revision=commit, local_files_only=True)
    assert hub.requests == []


def test_hub_adapter_pushed_loads_equal(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that peft pushed for somebody who is logged in is the one that it loads."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    model = _tiny_bert()
    model.push_to_hub(REPO)
    config = lora(lora_alpha=3, target_modules=["query"])
    adapted = get_peft_model(AutoModel.from_pretrained(REPO), config).eval()
    perturb_(adapted, seed=0)
    adapted.push_to_hub("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("me/adapter"))
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(REPO), "me/adapter").eval()
    assert torch.equal(_output(loaded), _output(adapted))
    assert not torch.equal(_output(loaded), _output(model))


def test_hub_down_leaves_the_cache(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Hub, a cached commit is taken at once; main too, once huggingface_hub has stopped trying."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    model = _tiny_bert()
    commit = model.push_to_hub(REPO, token=hub.token).oid
    AutoModel.from_pretrained(REPO)
    with hub.down():
        assert torch.equal(_output(AutoModel.from_pretrained(REPO, revision=commit)), _output(model))
        assert waits == []
        assert torch.equal(_output(AutoModel.from_pretrained(REPO)), _output(model))
        assert waits in ([1, 2, 4, 8, 8], [])  # 0.36.2 looks for main for 23 seconds; 0.34.0 asks once
        with pytest.raises(LocalEntryNotFoundError):
            huggingface_hub.hf_hub_download("me/never", "a.txt")
    assert AutoModel.from_pretrained(REPO).config._commit_hash == commit


def test_hub_online_is_undone_when_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the block everything is offline as before, and no thread is left."""
    before, threads = _settings(), set(threading.enumerate())
    with HubStandIn() as server:
        commit = server.add_repo(REPO, {"a.txt": b"a"})
        with online(server, monkeypatch, tmp_path, token=server.token):
            assert _settings() != before
            assert huggingface_hub.whoami()["name"] == server.user
            assert Path(huggingface_hub.hf_hub_download(REPO, "a.txt")).is_relative_to(tmp_path)
        seen = len(server.requests)
        with pytest.raises(OfflineModeIsEnabled):
            HfApi(endpoint=server.endpoint).model_info(REPO, revision=commit)
        assert len(server.requests) == seen
    assert _settings() == before
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads


def _settings() -> list[object]:
    copies = [constants, transformers.utils.hub, huggingface_hub.file_download]
    values = [{n: v for n, v in vars(m).items() if isinstance(v, (str, bool))} for m in copies]
    return [*values, dict(os.environ), flair.cache_root, huggingface_hub.hf_api.api.endpoint]


def test_hub_environment_leads_a_new_process_to_the_stand_in(hub: HubStandIn, tmp_path: Path) -> None:
    """A process started with the variables downloads from the stand-in, logged in with the token."""
    hub.add_repo(REPO, {"a.txt": b"private"}, private=True)
    program = f"import huggingface_hub as h; print(open(h.hf_hub_download({REPO!r}, 'a.txt')).read(), end='')"
    variables = {**os.environ, **environment(hub, tmp_path / "other", token=hub.token)}
    ended = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("private", 0), ended.stderr
