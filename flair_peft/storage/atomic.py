"""Files and folders are replaced whole or not at all, whatever interrupts that; what else lies in a folder stays.

Nothing here knows a format. The new content is written beside the old one, flushed to the disk and put in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from flair_peft.errors import FlairPeftError, SaveError
from flair_peft.storage.other_files import allow_removal, carry, discard, settle
from flair_peft.storage.temporaries import (
    READERS_PATIENCE,
    WRITERS_PATIENCE,
    backup_of,
    claimed,
    leftovers_of,
    lock,
    new_file,
    new_folder,
    once_old,
)

logger = logging.getLogger("flair_peft")

NamesOf = Callable[[Path], list[str]]
"""The names, below a folder, of the files that belong to its content, and none where it holds no content.

The first is the file that the others are known by: it is the last to be removed.
"""

_MOUNT = "A mount point cannot be replaced: mount the folder around a file, and save to a folder inside of a mount."
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there, or save to another disk."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Save to a folder that you may write to."),
    **dict.fromkeys((errno.EBUSY, errno.EXDEV), _MOUNT),
    errno.ENOENT: "Make the folder first, or save to another one.",
}


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """The file holds what ``write`` wrote, or an error was raised and it is as it was.

    It keeps the permissions of the file that was there; a new one gets those that ``open`` would give it. A symbolic
    link goes on pointing to the file, and a pipe or device is written to as it is.

    Args:
        path: of the file; its folder must be there.
        write: is called with a binary file, open for writing.

    Raises:
        SaveError: it could not be written. What else ``write`` raises is passed on.
    """
    target = Path(os.path.realpath(path))
    with explained(target):
        if target.exists() and not target.is_file() and not target.is_dir():
            with target.open("wb") as pipe:
                write(pipe)
            return
        _check_place(target, is_right=os.path.isfile, kind="folder")
        with new_file(target) as (new, file):
            write(file)
            file.flush()
            _keep_access(target, file.fileno())
            os.fsync(file.fileno())
            if sys.platform == "win32":  # an open file cannot be moved there, and nothing is locked
                file.close()
            new.replace(target)
    _after(target, lambda _: [])


def replace_directory(
    path: Path, fill: Callable[[Path], None], *, names_of: NamesOf, gives_way: Collection[str] = ()
) -> None:
    """The folder holds what ``fill`` wrote and, untouched, the files that were not part of its earlier content.

    Args:
        path: of the folder; it and its parents may be missing; a symbolic link goes on pointing to the folder.
        fill: writes and flushes all files of the new content into the folder that it is given.
        names_of: of the content in a folder, old or new. All other files are hard links to the same ones afterwards.
        gives_way: names in the new content that are left out where the folder has a file of others by that name.

    Raises:
        SaveError: it could not be written; the folder is as it was. What else ``fill`` raises is passed on.
    """
    target = Path(os.path.realpath(path))
    with explained(target):
        _check_place(target, is_right=os.path.isdir, kind="file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(target) as new:
            try:
                fill(new)
                with lock(target.parent, WRITERS_PATIENCE):
                    _put_in_place(new, target, names_of, gives_way)
            except BaseException:
                for leftover in (new, once_old(new)):
                    _dispose(leftover, target, names_of)
                raise
    _after(target, names_of)


def find_directory(path: Path, *, names_of: NamesOf) -> Path:
    """Return the folder that holds the whole content: ``path``, or what a killed writer left of it.

    That is put back if it can be.

    Args:
        path: of the folder; it may be missing.
        names_of: of the content in a folder.
    """
    target = Path(os.path.realpath(path))
    if not target.name:  # the root, beside which nothing can lie
        return path
    backup = backup_of(target)
    if not _is_folder(backup) or names_of(target) or not names_of(backup):
        return path
    with lock(target.parent, READERS_PATIENCE) as is_alone, contextlib.suppress(OSError):
        # A folder that was made anew since gives way only if it is empty.
        if is_alone and not names_of(target):
            backup.rename(target)
    return path if names_of(target) else backup


@contextlib.contextmanager
def flushing() -> Iterator[Callable[[Path, bytes], None]]:
    """Yield what writes a new file; at the end all these are on the disk, and not only in memory.

    A file system that keeps a journal commits them together then, which takes less time than one after the other.
    """
    with contextlib.ExitStack() as opened:
        written: list[BinaryIO] = []

        def write(path: Path, content: bytes) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(opened.enter_context(path.open("xb")))
            written[-1].write(content)
            written[-1].flush()

        yield write
        for file in written:
            os.fsync(file.fileno())


def _check_place(target: Path, *, is_right: Callable[[Path], bool], kind: str) -> None:
    if target.exists() and not is_right(target):
        raise SaveError(
            f"Cannot save to '{target}': there is a {kind} of that name. It is not replaced by something else than a "
            f"{kind}. Save under another name, or remove it."
        )
    if is_right(target) and not os.access(target, os.W_OK):
        raise SaveError(
            f"Cannot save to '{target}': it is protected from being written to. It would be replaced as a whole. "
            "Change its permissions, or save under another name."
        )
    if os.path.ismount(target):
        raise SaveError(
            f"Cannot save to '{target}': it is a mount point. It would be replaced as a whole, which its file system "
            f"does not allow. {_MOUNT}"
        )


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn the system's errors, of temporary files too, into a ``SaveError`` that says what they mean here."""
    try:
        yield
    except FlairPeftError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number_in(error)
        if number is None and not isinstance(error, OSError):
            raise
        what = getattr(error, "strerror", None) or str(error).rstrip(".")
        filename = str(getattr(error, "filename", None) or target)
        # A temporary file stands for the target.
        place = "" if filename == str(target) or ".tmp" in filename else f" ('{filename}')"
        raised = SaveError(
            f"Cannot save to '{target}': {what}{place}. What was there before is unchanged. "
            + _ADVICE.get(number or 0, "Save to another place, or mend this one.")
        )
        raised.errno = number
        raise raised from error


def _number_in(error: Exception) -> int | None:
    """Return the system's number of what went wrong where an error only tells it: libraries in Rust raise such."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _after(target: Path, names_of: NamesOf) -> None:
    """The replacement survives a loss of power, and what killed writers left behind is gone, or is said to be there."""
    with contextlib.suppress(OSError):
        _flush_folder(target.parent)
        with lock(target.parent, WRITERS_PATIENCE) as is_alone:
            for leftover in leftovers_of(target):
                with claimed(leftover, is_alone=is_alone) as is_abandoned:
                    if is_abandoned:
                        _dispose(leftover, target, names_of)


def _dispose(leftover: Path, target: Path, names_of: NamesOf) -> None:
    """The leftover is gone, and what it held that is not of a writer is in the target."""
    try:
        if not _is_folder(leftover):
            leftover.unlink(missing_ok=True)
        elif leftover.name.endswith(".new.tmp") or not _is_folder(target):
            allow_removal(leftover)
            shutil.rmtree(leftover)
        else:
            own = _names_of_both(leftover, target, names_of)
            settle(leftover, target, own=own, carried={})
            discard(leftover, own=own)
    except OSError as error:
        logger.warning("Cannot remove '%s', which a save left behind: %s", leftover, error)


def _put_in_place(new: Path, target: Path, names_of: NamesOf, gives_way: Collection[str]) -> None:
    """The target is what ``new`` was; others' files moved along; the old content is gone."""
    _mend(target, names_of)
    if not _is_folder(target):
        _flush_folders(new)
        new.rename(target)
        return
    for name in set(gives_way).difference(names_of(target)):
        if os.path.lexists(target / name):
            (new / name).unlink(missing_ok=True)
    own = _names_of_both(target, new, names_of)
    carried = carry(target, new, own=own)
    _keep_access(target, new)
    _flush_folders(new)
    ready = new.rename(once_old(new))
    with _same_working_directory(target):
        old = _swap(ready, target)
    try:
        _flush_folder(target.parent)
        settle(old, target, own=own, carried=carried)
        discard(old, own=own)
    except OSError as error:
        logger.warning("Saved to '%s', but cannot remove what it replaced, now in '%s': %s", target, old, error)


def _mend(target: Path, names_of: NamesOf) -> None:
    """What a writer killed between its two renamings left is one folder again."""
    backup = backup_of(target)
    if not _is_folder(backup):
        return
    if names_of(target):
        _dispose(backup, target, names_of)
        return
    if _is_folder(target):
        # Somebody made it anew since, and may have put something into it.
        settle(target, backup, own=(), carried={})
        discard(target, own=())
    backup.rename(target)


def _swap(ready: Path, target: Path) -> Path:
    """Exchange the two folders, and return the path that holds the old one."""
    if _exchange(ready, target):
        return ready
    backup = backup_of(target)
    try:
        target.rename(backup)
        ready.rename(target)
    except BaseException:
        if not target.exists():
            backup.rename(target)
        raise
    return backup


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, and return whether this system and file system can."""
    call = _exchanging_call()
    return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0


@functools.cache
def _exchanging_call() -> Callable[[bytes, bytes], int] | None:
    """Return Linux's renameat2 or macOS's renamex_np; Python has neither."""
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            swap = 2
            return lambda one, other: library.renamex_np(one, other, swap)
        here, exchange, renameat2 = -100, 2, library.renameat2
        return lambda one, other: renameat2(here, one, here, other, exchange)
    except (OSError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def _same_working_directory(target: Path) -> Iterator[None]:
    """Leave the process in the folder of the same name, where it works in the target or below."""
    try:
        here = Path.cwd()
    except OSError:
        here = None
    yield
    if here is not None and here.is_relative_to(target):
        with contextlib.suppress(OSError):
            os.chdir(here)


def _names_of_both(one: Path, other: Path, names_of: NamesOf) -> list[str]:
    return list(dict.fromkeys([*names_of(one), *names_of(other)]))


def _is_folder(path: Path) -> bool:
    """Return whether this is a folder, and not a link to one."""
    # Path raises where a folder may not be entered, and where a name is too long.
    return os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114


def _keep_access(old: Path, new: Path | int) -> None:
    """Give the new file or folder the permissions of the old one, and its owner and group where that is allowed."""
    if not old.exists() or sys.platform == "win32":
        return
    status = old.stat()
    with contextlib.suppress(OSError):
        os.chown(new, status.st_uid, status.st_gid)
    os.chmod(new, stat.S_IMODE(status.st_mode))  # noqa: PTH101 - it may be a descriptor


def _flush_folders(root: Path) -> None:
    for path, _, _ in os.walk(root):
        _flush_folder(Path(path))


def _flush_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; a system that cannot do that for folders does without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)
