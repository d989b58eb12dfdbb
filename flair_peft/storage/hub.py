"""Files on the Hugging Face Hub: find, download, upload."""

from __future__ import annotations

import functools
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from flair_peft.errors import MissingFileError, ModelFileError, SaveError
from flair_peft.primitives.load_context import LoadOptions
from flair_peft.storage import atomic, checkpoint_directory, file_names, held_directory, manifest

log = logging.getLogger("flair_peft")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILE_ENDINGS = (".pt", ".bin", ".pth")
_BEGINS_A_PATH = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]")

_COMMIT = re.compile("[0-9a-f]{40}")
_FROM_THE_HUB = (HfHubHTTPError, HFValidationError, OSError)


def find_checkpoint(source: str, *, revision: str | None, options: LoadOptions) -> Path:
    """Return the file or the directory of a checkpoint, which is downloaded if it is on the Hub.

    Raises:
        ModelFileError: there is none.
    """
    file_names.refuse_impossible(source)
    if Path(source).exists():
        refuse_revision(source, revision)
        return Path(source)
    _refuse_path(source)
    try:
        found = _download(source, revision=revision, options=options)
    except _FROM_THE_HUB as error:
        raise _not_downloaded(source, error) from error
    if found is None:
        raise ModelFileError(
            f"Cannot load '{source}': the repository, or what the local cache has of it, holds no "
            f"{manifest.DOCUMENT}, so it is no checkpoint of flair_peft. Models of stock Flair are loaded "
            "with Model.load. Check the name and the revision."
        )
    return found


def refuse_revision(source: str, revision: str | None) -> None:
    """Return unless a revision is asked for of something that has none.

    Raises:
        ModelFileError: it is.
    """
    if revision is not None:
        raise ModelFileError(
            f"Cannot load revision '{revision}' of '{source}': that is here already, and only repositories on the Hub "
            "have revisions. Leave out revision, or pass the Hub id."
        )


def find_for_flair(
    source: str, *, revision: str | None, options: LoadOptions, may_be_known: bool = False
) -> Path | None:
    """Return the directory of the checkpoint that ``Model.load`` was asked for; ``None`` if that is Flair's business.

    ``may_be_known``: the class that loads it may know what looks like a path.

    Raises:
        MissingFileError: a path at which there is nothing.
    """
    if Path(source).exists():
        refuse_revision(source, revision)
        return Path(source) if Path(source).is_dir() else None
    if not may_be_known:
        _refuse_path(source)
    if not _HUB_ID.fullmatch(source):
        return None
    try:
        return _download(source, revision=revision, options=options)
    except _FROM_THE_HUB as error:
        log.warning(
            "'%s' is no file or directory here, and was not found as a checkpoint on the Hub (%s). Flair looks for a "
            "model of its own.",
            source,
            _reason(error),
        )
        return None


def _refuse_path(source: str) -> None:
    """Return unless this can only be the path of what is on this machine.

    Raises:
        MissingFileError: it is one, and there is nothing.
    """
    if "://" in source:  # Flair may know what to do with it
        return
    has_folders = source.partition("@")[0].count("/") > 1
    if source.endswith(_FILE_ENDINGS) or has_folders or _BEGINS_A_PATH.match(source):
        raise MissingFileError(f"Cannot load '{source}': there is no such file or directory. Check the path.")


@contextmanager
def looked_up_by_flair(source: str) -> Iterator[None]:
    """Inside, Flair looks for a model of its own that may be called so.

    Raises:
        MissingFileError: there is none.
    """
    try:
        yield
    except FileNotFoundError as error:
        if isinstance(error, MissingFileError) or Path(str(error.filename)).name != Path(source).name:
            raise
        raise MissingFileError(
            f"Cannot load '{source}': there is no such file or directory here, and Flair knows no model of that name. "
            "Check the path."
        ) from error


def find_files(
    source: str, patterns: Sequence[str], *, revision: str | None, subfolder: str | None, options: LoadOptions
) -> Path:
    """Return the directory that holds those files of a directory or repository that match the patterns, if any do.

    ``@revision`` may be added to the id of a repository.

    Raises:
        ModelFileError: there is neither a directory nor a repository.
    """
    file_names.refuse_impossible(source)
    if Path(source).exists():
        refuse_revision(source, revision)
        return Path(source, subfolder or "")
    _refuse_path(source)
    name, _, behind = source.partition("@")
    within = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        folder = snapshot_download(
            name,
            revision=revision or behind or None,
            allow_patterns=[within + pattern for pattern in patterns],
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
        )
    except _FROM_THE_HUB as error:
        raise _not_downloaded(source, error) from error
    return Path(folder, subfolder or "")


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Return the address of the commit by which the Hub holds a checkpoint; for the arguments see ``push_to_hub``.

    Raises:
        SaveError: the Hub refused it or could not be reached.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        earlier, has_own_card = _standing_in(api, repo_id, revision=revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=[manifest.CARD] if has_own_card else None,
            delete_patterns=earlier or None,
        )
    except (*_FROM_THE_HUB, RuntimeError, ValueError) as error:
        # A RuntimeError only names the file that was not taken.
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        raise SaveError(
            f"Cannot push to '{repo_id}': {_reason(cause or error)}. No file there was changed. Check the name, the "
            "token's right to write there, and the network."
        ) from error
    return str(commit.commit_url)


def report_local_base(name: str) -> None:
    """Warn that what is published names a directory of this machine as its base."""
    log.warning(
        "The base model is the directory '%s', which others do not have; its path is published. Train on a base from "
        "the Hub, so that a checkpoint there names it.",
        name,
    )


def push_directory(directory: str | Path, repo_id: str, *, commit_message: str | None = None, **options: Any) -> str:
    """Return the address of the commit by which the Hub holds a checkpoint as it lies in a directory, card and all.

    Every byte is verified first; the base model is not needed. Other files in the directory stay here.

    Args:
        directory: of the checkpoint.
        repo_id: as for :func:`flair_peft.push_to_hub`.
        commit_message: as there.
        **options: as there: ``token``, ``private``, ``revision``, ``create_pr``, ``endpoint``.

    Raises:
        ModelFileError: there is no checkpoint, or it is not as it was written.
        SaveError: the Hub refused it or could not be reached.
    """
    document, files = held_directory.hold(Path(directory))
    with tempfile.TemporaryDirectory() as folder:
        with atomic.explained(Path(folder)):
            for name, file in files.items():
                Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, Path(folder, name))
        checkpoint_directory.read(Path(folder))
        message = commit_message or f"Upload {str(document.body.get('class')).rpartition('.')[2]}"
        return upload(Path(folder), repo_id, commit_message=message, **options)


def _download(source: str, *, revision: str | None, options: LoadOptions) -> Path | None:
    """Return the directory in the Hub's cache with all files of a checkpoint; ``None`` if the repository has none.

    All files are of one commit. The Hub is asked once which that is, or not at all if the commit is given and cached.
    """
    name, _, behind = source.partition("@")
    commit, known = revision or behind or None, None
    download = functools.partial(
        snapshot_download,
        name,
        token=options.token,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
    )
    if _COMMIT.fullmatch(commit or ""):
        known = try_to_load_from_cache(name, manifest.DOCUMENT, cache_dir=options.cache_dir, revision=commit)
    if not isinstance(known, str):
        known = Path(download(revision=commit, allow_patterns=[manifest.DOCUMENT]), manifest.DOCUMENT)
    document, folder = Path(known), Path(known).parent
    if not document.is_file():
        return None
    lacking = [file for file in manifest.parse(document.read_bytes(), document).files if not (folder / file).is_file()]
    if lacking:
        download(revision=folder.name, allow_patterns=lacking)
    return folder


def _standing_in(api: HfApi, repo_id: str, *, revision: str | None) -> tuple[list[str], bool]:
    """Return the files of the checkpoint that a repository holds, and whether its card was written by somebody."""
    with tempfile.TemporaryDirectory() as cache:
        wanted = [manifest.DOCUMENT, manifest.CARD]
        folder = Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=wanted, cache_dir=cache))
        has_card, document = (folder / manifest.CARD).is_file(), manifest.Document({}, {}, card="")
        # What cannot be known to be a checkpoint's stays.
        with suppress(FileNotFoundError, ModelFileError):
            document = manifest.parse((folder / manifest.DOCUMENT).read_bytes(), folder / manifest.DOCUMENT)
        is_ours = has_card and manifest.entry_of((folder / manifest.CARD).read_bytes()).sha256 == document.card
        return sorted(document.files), has_card and not is_ours


def _not_downloaded(source: str, error: BaseException) -> ModelFileError:
    return ModelFileError(
        f"Cannot load '{source}': it is neither a directory here nor a repository that could be downloaded "
        f"({_reason(error)}). Check the name, the revision, the token and the network."
    )


def _reason(error: BaseException) -> str:
    """Return type and message of an error in one line: the Hub's own words stand in later lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".: ")
