"""A stand-in for the Hugging Face Hub on loopback: create, push, list, load and pin without a network.

It answers what huggingface_hub, transformers and peft ask for models: repositories, commits with regular and LFS files,
branches, tags, file lists and downloads, with the status codes and the headers of the real Hub. Whatever else is asked
is answered with 501, which huggingface_hub does not retry, and with the name of the route that is missing.

The routes and headers were read in huggingface_hub 0.34.0 and 0.36.2. Uploads of LFS files take git-lfs' ``basic``
transfer and downloads carry no ``X-Xet-Hash``, so that hf_xet stays unused where it is installed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import flair
import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions

_HOST = "127.0.0.1"
_LARGE = 10 * 1024 * 1024
_LARGE_SUFFIXES = frozenset({".bin", ".gz", ".h5", ".model", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".zip"})
_DATE = "2025-01-01T00:00:00.000Z"

_GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(_LARGE_SUFFIXES))
_INVALID_TOKEN = "Invalid credentials in Authorization header"  # hf_raise_for_status knows this sentence


def _is_large(path: str, *, sample: bytes, size: int) -> bool:
    """Return whether the Hub keeps this file in LFS: by its name, its size, or because it is binary."""
    return PurePosixPath(path).suffix in _LARGE_SUFFIXES or size > _LARGE or b"\0" in sample


@dataclass(frozen=True)
class _File:
    content: bytes
    is_lfs: bool

    @classmethod
    def of(cls, path: str, content: bytes) -> _File:
        return cls(content, is_lfs=_is_large(path, sample=content[:512], size=len(content)))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """The hash that git knows this file by: of the pointer, where the content is in LFS."""
        stored = self._pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """What a cache names this file by."""
        return self.sha256 if self.is_lfs else self.blob_id

    @property
    def _pointer(self) -> bytes:
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    def lfs(self, hash_name: str) -> dict[str, Any]:
        """Return the entry ``lfs`` of a listing, or nothing where the file is a regular one."""
        if not self.is_lfs:
            return {}
        return {"lfs": {hash_name: self.sha256, "size": len(self.content), "pointerSize": len(self._pointer)}}


@dataclass
class _Repo:
    repo_id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find_commit(self, revision: str) -> str:
        """Return the hash of the commit that a branch, a tag or a full hash names."""
        known = {**{commit: commit for commit in self.commits}, **self.tags, **self.branches}
        if revision not in known:
            raise _Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return known[revision]

    def files(self, revision: str) -> dict[str, _File]:
        return self.commits[self.find_commit(revision)]

    def find_file(self, revision: str, path: str) -> _File:
        commit = self.find_commit(revision)
        if path not in self.commits[commit]:
            # The cache remembers under this commit that the file does not exist.
            raise _Refusal(404, "Entry not found", code="EntryNotFound", headers={"X-Repo-Commit": commit})
        return self.commits[commit][path]

    def commit(self, branch: str, files: Mapping[str, _File]) -> str:
        """Make ``files`` the whole content of ``branch``, which is created where it is missing."""
        tree = "".join(f"{path} {files[path].blob_id}\n" for path in sorted(files))
        commit = hashlib.sha1(f"{self.repo_id} {len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class _Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> _Answer:
        typed = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        return cls(json.dumps(value).encode(), status, typed)


class _Refusal(Exception):
    """An error that the client is told: ``X-Error-Code`` decides which exception huggingface_hub raises."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        codes = {"X-Error-Code": code} if code else {}
        self.answer = _Answer.of(
            {"error": message}, status=status, headers={**codes, "X-Error-Message": message, **(headers or {})}
        )


class HubStandIn:
    """A Hub with repositories in memory, listening on loopback while its ``with`` block is open.

    Every namespace may be written to with the token. A private repository is not there for whoever comes without it; a
    gated one can then be listed but not downloaded. A wrong token is refused everywhere. As on the Hub, a repository
    that a client creates begins with a commit of ``.gitattributes``.

    Attributes:
        endpoint: ``http://127.0.0.1:<port>``; exists once the block was entered.
        token: the only valid one; it belongs to ``user``.
        user: the namespace of repositories that are created without one.
        requests: (method, path with query) of every request, in the order of arrival; clear it as you like.
    """

    endpoint: str

    def __init__(self) -> None:
        self.token = "hf_stand_in"
        self.user = "me"
        self.requests: list[tuple[str, str]] = []
        self._repos: dict[str, _Repo] = {}
        self._objects: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._port = 0

    def __enter__(self) -> HubStandIn:
        self._server = _Server((_HOST, self._port), self._answer)
        self._port = self._server.server_address[1]
        self.endpoint = f"http://{_HOST}:{self._port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse every connection until the block is left; repositories and port stay."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
    ) -> str:
        """Commit exactly these files to a branch, creating the repository and the branch where they are missing.

        Args:
            repo_id: with or without a namespace.
            files: path → content; replaces all that the branch held.
            private: from now on seen only by who comes with the token.
            gated: from now on downloaded only by who comes with the token.
            revision: name of the branch.

        Returns:
            The hash of the commit, 40 hex digits.
        """
        with self._lock:
            repo = self._repos.setdefault(repo_id, _Repo(repo_id))
            repo.private, repo.gated = repo.private or private, repo.gated or gated
            made = {path: _File.of(path, content) for path, content in files.items()}
            self._objects.update({file.sha256: file.content for file in made.values() if file.is_lfs})
            return repo.commit(revision, made)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return path → content at a branch, tag or commit.

        Raises:
            KeyError: there is no such repository.
        """
        with self._lock:
            return {path: file.content for path, file in self._repos[repo_id].files(revision).items()}

    def _answer(self, request: _Request, target: str) -> _Answer:
        """Return what the Hub says to this request, which was recorded as ``target``."""
        with self._lock:
            self.requests.append((request.method, target))
            try:
                return self._reply(request)
            except _Refusal as refusal:
                return refusal.answer
            except Exception as error:
                return _Refusal(501, f"HubStandIn failed at {request.method} {target}: {error!r}").answer

    def _reply(self, request: _Request) -> _Answer:
        if request.token not in (None, self.token):
            raise _Refusal(401, _INVALID_TOKEN)
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, route in _ROUTES:
            match = pattern.fullmatch(request.path)
            if match and route_method == method:
                return route(self, request, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise _Refusal(501, f"HubStandIn has no route for {request.method} {request.path}")

    def _read(self, request: _Request, repo_id: str) -> _Repo:
        """Return the repository, or refuse as the Hub does to somebody who may not know that it exists."""
        repo = self._repos.get(repo_id)
        if repo and (request.token or not repo.private):
            return repo
        # The Hub does not tell a stranger whether a repository is missing or private.
        status, message = (404, "Repository not found") if request.token else (401, "Invalid username or password.")
        raise _Refusal(status, message, code="RepoNotFound")

    def _download(self, request: _Request, repo_id: str) -> _Repo:
        """Return the repository to somebody who may see the content of its files."""
        repo = self._read(request, repo_id)
        if repo.gated and not request.token:
            raise _Refusal(401, f"Access to model {repo_id} is restricted.", code="GatedRepo")
        return repo

    def _write(self, request: _Request, repo_id: str) -> _Repo:
        """Return the repository to its owner."""
        self._identify(request)
        return self._read(request, repo_id)

    def _identify(self, request: _Request) -> None:
        """Refuse who comes without a token."""
        if not request.token:
            raise _Refusal(401, "Invalid username or password.")


_Route = Callable[..., _Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Route]] = []
_NAMED = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
_MODEL = f"/api/models/{_NAMED}"
_REVISION = "(?P<revision>[^/]+)"


def _route(method: str, pattern: str) -> Callable[[_Route], _Route]:
    """Register a function for requests whose quoted path matches; its named groups arrive unquoted."""

    def register(route: _Route) -> _Route:
        _ROUTES.append((method, re.compile(pattern), route))
        return route

    return register


@_route("GET", "/api/whoami-v2")
def _whoami(hub: HubStandIn, request: _Request) -> _Answer:
    hub._identify(request)
    access = {"type": "access_token", "accessToken": {"displayName": "stand-in", "role": "write"}}
    return _Answer.of({"type": "user", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": access})


@_route("POST", "/api/validate-yaml")
def _validate_yaml(hub: HubStandIn, request: _Request) -> _Answer:
    has_metadata = request.json()["content"].startswith("---")
    missing = {"message": "empty or missing yaml metadata in repo card"}
    return _Answer.of({"errors": [], "warnings": [] if has_metadata else [missing]})


@_route("POST", "/api/repos/create")
def _create_repo(hub: HubStandIn, request: _Request) -> _Answer:
    hub._identify(request)
    asked = request.json()
    if asked.get("type", "model") != "model":
        raise _Refusal(501, "HubStandIn serves models only")
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    answer = {"name": repo_id, "url": f"{hub.endpoint}/{repo_id}"}
    if repo_id in hub._repos:
        return _Answer.of({**answer, "error": "You already created this model repo"}, status=409)
    # The Hub's first commit is its own.
    hub.add_repo(repo_id, {".gitattributes": _GIT_ATTRIBUTES.encode()}, private=bool(asked.get("private")))
    return _Answer.of(answer)


@_route("POST", f"{_MODEL}/branch/(?P<branch>[^/]+)")
def _create_branch(hub: HubStandIn, request: _Request, repo_id: str, branch: str) -> _Answer:
    repo = hub._write(request, repo_id)
    start = repo.find_commit(request.json().get("startingPoint") or "main")
    return _name(repo.branches, branch, start)


@_route("DELETE", f"{_MODEL}/branch/(?P<branch>[^/]+)")
def _delete_branch(hub: HubStandIn, request: _Request, repo_id: str, branch: str) -> _Answer:
    return _forget(hub._write(request, repo_id).branches, branch)


@_route("POST", f"{_MODEL}/tag/{_REVISION}")
def _create_tag(hub: HubStandIn, request: _Request, repo_id: str, revision: str) -> _Answer:
    repo = hub._write(request, repo_id)
    return _name(repo.tags, request.json()["tag"], repo.find_commit(revision))


@_route("DELETE", f"{_MODEL}/tag/{_REVISION}")
def _delete_tag(hub: HubStandIn, request: _Request, repo_id: str, revision: str) -> _Answer:
    return _forget(hub._write(request, repo_id).tags, revision)


def _name(references: dict[str, str], name: str, commit: str) -> _Answer:
    if name in references:
        raise _Refusal(409, f"Reference already exists: {name}")
    references[name] = commit
    return _Answer.of({})


def _forget(references: dict[str, str], name: str) -> _Answer:
    if name not in references:
        raise _Refusal(404, f"Invalid rev id: {name}", code="RevisionNotFound")
    del references[name]
    return _Answer.of({})


@_route("GET", f"{_MODEL}/refs")
def _refs(hub: HubStandIn, request: _Request, repo_id: str) -> _Answer:
    repo = hub._read(request, repo_id)
    pulls = {name: commit for name, commit in repo.branches.items() if name.startswith("refs/pr/")}
    branches = {name: commit for name, commit in repo.branches.items() if name not in pulls}
    return _Answer.of(
        {
            "branches": _references(branches, "refs/heads/"),
            "tags": _references(repo.tags, "refs/tags/"),
            "pullRequests": _references(pulls, ""),
            "converts": [],
        }
    )


def _references(references: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in references.items()]


@_route("POST", f"{_MODEL}/preupload/{_REVISION}")
def _preupload(hub: HubStandIn, request: _Request, repo_id: str, revision: str) -> _Answer:
    present = hub._write(request, repo_id).files(revision)
    return _Answer.of({"files": [_upload_mode(asked, present) for asked in request.json()["files"]]})


def _upload_mode(asked: Mapping[str, Any], present: Mapping[str, _File]) -> dict[str, Any]:
    path = asked["path"]
    is_large = _is_large(path, sample=base64.b64decode(asked["sample"]), size=asked["size"])
    # With the hash that a file has now, huggingface_hub leaves unchanged files out of the commit.
    oid = present[path].etag if path in present else None
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}


@_route("POST", rf"/{_NAMED}\.git/info/lfs/objects/batch")
def _lfs_batch(hub: HubStandIn, request: _Request, repo_id: str) -> _Answer:
    hub._write(request, repo_id)
    objects = [_lfs_actions(hub, asked) for asked in request.json()["objects"]]
    return _Answer.of({"transfer": "basic", "objects": objects})


def _lfs_actions(hub: HubStandIn, asked: Mapping[str, Any]) -> dict[str, Any]:
    oid, known = asked["oid"], {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
    if oid in hub._objects:
        return known
    upload = {"href": f"{hub.endpoint}/lfs/objects/{oid}", "header": {}}
    verify = {"href": f"{hub.endpoint}/lfs/verify/{oid}", "header": {}}
    return {**known, "actions": {"upload": upload, "verify": verify}}


# As with the Hub's signed addresses, whoever knows the hash of an object needs no token for it.
@_route("PUT", "/lfs/objects/(?P<oid>[0-9a-f]{64})")
def _put_object(hub: HubStandIn, request: _Request, oid: str) -> _Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _Refusal(400, "The content does not have the hash that it was announced with")
    hub._objects[oid] = request.body
    return _Answer()


@_route("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})")
def _verify_object(hub: HubStandIn, request: _Request, oid: str) -> _Answer:
    if len(hub._objects.get(oid, b"")) != request.json()["size"]:
        raise _Refusal(422, "The object is missing or of another size")
    return _Answer.of({})


@_route("GET", "/lfs/objects/(?P<oid>[0-9a-f]{64})")
def _get_object(hub: HubStandIn, request: _Request, oid: str) -> _Answer:
    if oid not in hub._objects:
        raise _Refusal(404, "Not found")
    return _content(request, hub._objects[oid], {"ETag": f'"{oid}"'})


@_route("POST", f"{_MODEL}/commit/{_REVISION}")
def _commit(hub: HubStandIn, request: _Request, repo_id: str, revision: str) -> _Answer:
    repo = hub._write(request, repo_id)
    if revision not in repo.branches:
        raise _Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    if header["value"].get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
        raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.files(revision))
    for operation in operations:
        _apply_(files, operation["key"], operation["value"], objects=hub._objects)
    pull = f"refs/pr/{_pulls(repo) + 1}" if "create_pr" in request.query else None
    oid = repo.commit(pull or revision, files)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{oid}"}
    address = {"pullRequestUrl": f"{hub.endpoint}/{repo_id}/discussions/{_pulls(repo)}"} if pull else {}
    return _Answer.of({**answer, **address})


def _pulls(repo: _Repo) -> int:
    return sum(name.startswith("refs/pr/") for name in repo.branches)


def _apply_(files: dict[str, _File], key: str, value: Mapping[str, Any], *, objects: Mapping[str, bytes]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = _File(base64.b64decode(value["content"]), is_lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise _Refusal(400, f"LFS object of {path} was not uploaded")
        files[path] = _File(objects[value["oid"]], is_lfs=True)
    else:
        assert key in ("deletedFile", "deletedFolder"), key
        _delete_(files, path, is_folder=key == "deletedFolder")


def _delete_(files: dict[str, _File], path: str, *, is_folder: bool) -> None:
    gone = [name for name in files if (name.startswith(path.rstrip("/") + "/") if is_folder else name == path)]
    if not gone:
        raise _Refusal(404, "A file with this name doesn't exist", code="EntryNotFound")
    for name in gone:
        del files[name]


@_route("POST", f"{_MODEL}/paths-info/{_REVISION}")
def _paths_info(hub: HubStandIn, request: _Request, repo_id: str, revision: str) -> _Answer:
    entries = {entry["path"]: entry for entry in _entries(hub._read(request, repo_id).files(revision))}
    asked = parse_qs(request.body.decode()).get("paths", [])
    return _Answer.of([entries[path] for path in asked if path in entries])


@_route("GET", f"{_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?")
def _tree(hub: HubStandIn, request: _Request, repo_id: str, revision: str, folder: str) -> _Answer:
    repo = hub._read(request, repo_id)
    inside = [entry for entry in _entries(repo.files(revision)) if PurePosixPath(folder) in _parents(entry["path"])]
    if folder and not inside:
        commit = {"X-Repo-Commit": repo.find_commit(revision)}
        raise _Refusal(404, f"{folder} does not exist", code="EntryNotFound", headers=commit)
    if request.query.get("recursive", ["False"])[0].lower() in ("true", "1"):
        return _Answer.of(inside)
    return _Answer.of([entry for entry in inside if PurePosixPath(entry["path"]).parent == PurePosixPath(folder)])


def _entries(files: Mapping[str, _File]) -> list[dict[str, Any]]:
    """Return what a listing says of every folder and file, folders first."""
    folders = {str(parent) for path in files for parent in _parents(path) if parent.parts}
    made = [{"type": "directory", "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0, "path": f} for f in folders]
    found = [
        {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path, **file.lfs("oid")}
        for path, file in files.items()
    ]
    return sorted(made, key=_path_of) + sorted(found, key=_path_of)


def _path_of(entry: Mapping[str, Any]) -> str:
    return entry["path"]


def _parents(path: str) -> Iterable[PurePosixPath]:
    return PurePosixPath(path).parents


@_route("GET", f"/{_NAMED}/resolve/{_REVISION}/(?P<path>.+)")
def _resolve(hub: HubStandIn, request: _Request, repo_id: str, revision: str, path: str) -> _Answer:
    repo = hub._download(request, repo_id)
    file = repo.find_file(revision, path)
    headers = {"X-Repo-Commit": repo.find_commit(revision), "ETag": f'"{file.etag}"'}
    if not file.is_lfs:
        return _content(request, file.content, headers)
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    location = f"{hub.endpoint}/lfs/objects/{file.sha256}"
    return _Answer(status=302, headers={**headers, **linked, "Location": location})


def _content(request: _Request, content: bytes, headers: Mapping[str, str]) -> _Answer:
    """Answer with the content, or with the part of it that ``Range`` asks for."""
    typed = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not match or not any(match.groups()):
        return _Answer(content, headers=typed)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return _Answer(status=416, headers={**typed, "Content-Range": f"bytes */{len(content)}"})
    part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
    return _Answer(content[start:stop], status=206, headers={**typed, **part})


# Last, since the name of a repository matches the first words of every other route.
@_route("GET", f"{_MODEL}/revision/{_REVISION}")
@_route("GET", _MODEL)
def _model_info(hub: HubStandIn, request: _Request, repo_id: str, revision: str = "main") -> _Answer:
    repo = hub._read(request, repo_id)
    commit = repo.find_commit(revision)
    with_blobs = "blobs" in request.query
    return _Answer.of(
        {
            "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "createdAt": _DATE,
            "lastModified": _DATE,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [_sibling(path, file, with_blobs) for path, file in sorted(repo.commits[commit].items())],
        },
        headers={"X-Repo-Commit": commit},
    )


def _sibling(path: str, file: _File, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    return {"rfilename": path, "size": len(file.content), "blobId": file.blob_id, **file.lfs("sha256")}


class _Handler(BaseHTTPRequestHandler):
    """Hands each request to the stand-in; the connection is kept, so the body is always read to its end."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = _Request(self.command, parts.path, parse_qs(parts.query), self.headers, body)
        answer = self.server.answer(request, self.path)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the names are http.server's

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what was asked is in ``HubStandIn.requests``."""


class _Server(ThreadingHTTPServer):
    """Ends its threads when it is closed, and says nothing of clients that hang up first."""

    daemon_threads = False  # those of daemons are not joined by server_close
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], answer: Callable[[_Request, str], _Answer]) -> None:
        self.answer = answer
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep for later."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def environment(server: HubStandIn, cache_dir: Path, *, token: str | None = None) -> dict[str, str]:
    """Return the variables with which a new process uses the stand-in and a cache of its own.

    huggingface_hub, transformers and flair read most of them while they are imported, so they must be there before:
    ``subprocess.run(…, env={**os.environ, **environment(server, tmp_path)})``.

    Args:
        server: has been entered.
        cache_dir: holds the caches of huggingface_hub and Flair, and the token that is not there.
        token: what the user is logged in with; without one, a token of the developer's is not sent either.
    """
    return {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(cache_dir),
        "HF_HUB_CACHE": str(cache_dir / "hub"),
        "HF_HUB_OFFLINE": "0",  # wins over TRANSFORMERS_OFFLINE; peft asks for it when it saves
        "HF_TOKEN": token or "",
        "HF_TOKEN_PATH": str(cache_dir / "token"),
        "FLAIR_CACHE_ROOT": str(cache_dir / "flair"),
        "DISABLE_SAFETENSORS_CONVERSION": "true",  # transformers would ask the Hub to convert, from another thread
        "NO_PROXY": _HOST,
        "no_proxy": _HOST,
    }


def _copies(server: HubStandIn, cache_dir: Path) -> list[tuple[Any, str, Any]]:
    """Return where the hosts keep what they read from the environment when they were imported."""
    cache, template = str(cache_dir / "hub"), "/{repo_id}/resolve/{revision}/{filename}"
    return [
        (constants, "ENDPOINT", server.endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HOME", str(cache_dir)),
        (constants, "HF_HUB_CACHE", cache),
        (constants, "HF_TOKEN_PATH", str(cache_dir / "token")),
        (huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template),
        (huggingface_hub.hf_api.api, "endpoint", server.endpoint),  # of create_repo, upload_folder and the like
        (transformers.utils.hub, "_is_offline_mode", False),
        (transformers.utils.hub, "TRANSFORMERS_CACHE", cache),
        (transformers.utils.hub, "HUGGINGFACE_CO_RESOLVE_ENDPOINT", server.endpoint),
        (flair, "cache_root", cache_dir / "flair"),
    ]


@contextmanager
def online(
    server: HubStandIn, monkeypatch: pytest.MonkeyPatch | None, cache_dir: Path, *, token: str | None = None
) -> Iterator[None]:
    """Make huggingface_hub, transformers, peft and flair use the stand-in and an own cache, until the block is left.

    Functions that take neither ``endpoint`` nor ``cache_dir`` then work as they do with the real Hub, processes started
    in the block included: the variables of ``environment`` are set too. For ``HfApi(endpoint=…, token=…)`` alone this
    is needed as well, since the tests' HF_HUB_OFFLINE=1 closes every session of huggingface_hub.

    Args:
        server: has been entered.
        monkeypatch: that of the test, or None; all is restored when the block is left, not when the test ends.
        cache_dir: a directory of the test's; the same one again is a cache that is filled.
        token: what the user is logged in with.
    """
    with (monkeypatch or pytest.MonkeyPatch).context() as patch:
        for name, value in environment(server, cache_dir, token=token).items():
            patch.setitem(os.environ, name, value)
        for owner, name, value in _copies(server, cache_dir):
            patch.setattr(owner, name, value)
        reset_sessions()  # a session remembers whether it was offline when it was made
        try:
            yield
        finally:
            reset_sessions()
