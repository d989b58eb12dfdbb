"""What lies beside a file or folder while it is replaced, and who still needs it.

    .<name>.<random>.new.tmp    content in the making; worthless if its writer was killed
    .<name>.<random>.old.tmp    complete content just before, and replaced content just after, the two were exchanged
    .<name>.previous            replaced content, where a file system cannot exchange two folders

A writer holds a lock on its own temporary file or folder, so the next one knows which of these nobody needs any
more; and on the parent folder while it creates, exchanges or clears away. Such locks leave nothing behind, and a
process that is killed lets go of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

if sys.platform != "win32":
    import fcntl

WRITERS_PATIENCE = 10.0
READERS_PATIENCE = 1.0
_ABANDONED_AFTER = 24 * 3600.0
"""Seconds. A lock is waited for so long and then done without: who locks a folder for the length of a job, with
flock(1) for example, must not stop a save. Where nothing can be locked, age alone tells what is abandoned."""


def backup_of(target: Path) -> Path:
    """Return where the old folder is between two renamings."""
    return target.with_name(f".{_stem(target)}.previous")


def once_old(new: Path) -> Path:
    """Return the name of a new folder that is complete, and about to hold the old content."""
    return new.with_name(new.name.removesuffix(".new.tmp") + ".old.tmp")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside the target, which others leave alone until then."""
    new = _temporary(target)
    with contextlib.ExitStack() as held:
        with lock(target.parent, WRITERS_PATIENCE):
            # Where the parent could not be locked, another writer may take it for abandoned before it is locked.
            while not new.exists():
                new.mkdir()
                held.enter_context(lock(new, READERS_PATIENCE))
        yield new


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file beside the target, open for writing and locked; it is to be put in place before it is closed.

    Nothing is left of it if an exception is raised.
    """
    new = _temporary(target)
    with lock(target.parent, WRITERS_PATIENCE):
        raw = _locked_file(new)
        while not new.exists():  # as for folders
            raw.close()
            raw = _locked_file(new)
    file = cast(BinaryIO, io.BufferedWriter(cast(io.RawIOBase, raw), 1 << 20))
    try:
        yield new, file
        file.close()
    except BaseException as error:
        # The buffer tries once more to write what it holds, and closes the file whether it can or not.
        with contextlib.suppress(OSError):
            file.close()
        new.unlink(missing_ok=True)
        if raw.failure is not None and isinstance(error, Exception):
            raise raw.failure from error
        raise


def _locked_file(new: Path) -> _WatchedFile:
    raw = _WatchedFile(new, "xb")
    _acquire(raw.fileno(), READERS_PATIENCE)
    return raw


class _WatchedFile(io.FileIO):
    """A file that remembers why it could not be written: torch raises a RuntimeError instead."""

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failure = error
            raise


def leftovers_of(target: Path) -> list[Path]:
    """Return this user's temporary files and folders of the target; others could put some into a shared folder."""
    pattern = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{16}}\.(new|old)\.tmp")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and _is_own(path)]


def _is_own(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # put in place since it was listed
        return sys.platform == "win32" or path.lstat().st_uid == os.geteuid()
    return False


@contextlib.contextmanager
def claimed(leftover: Path, *, is_alone: bool) -> Iterator[bool]:
    """Yield whether the writer of a temporary file or folder is gone, if the parent is locked, or likely so.

    A writer that waits for its lock meanwhile finds out afterwards whether it is still there.
    """
    if not is_alone:
        yield time.time() - leftover.lstat().st_mtime > _ABANDONED_AFTER
        return
    with lock(leftover, 0) as is_free:
        yield is_free


@contextlib.contextmanager
def lock(path: Path, patience: float) -> Iterator[bool]:
    """Hold the lock of a file or folder; yields False where it is not to be had."""
    try:
        # A pipe of a temporary file's name must not be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        descriptor = None
    try:
        yield descriptor is not None and _acquire(descriptor, patience)
    finally:
        if descriptor is not None:
            _release(descriptor)


def _acquire(descriptor: int, patience: float) -> bool:
    if sys.platform == "win32":
        return False
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        except OSError:
            return False


def _release(descriptor: int) -> None:
    """Unlock, then close: a process forked meanwhile has the descriptor too, and would go on holding the lock."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}.new.tmp")


def _stem(target: Path) -> str:
    """Return the name, or a digest of one that leaves no room for endings in the 255 bytes of a file name."""
    encoded = os.fsencode(target.name)
    return target.name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()
