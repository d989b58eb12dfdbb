"""What else lies in a folder whose content is replaced: it moves along, as the very files that it was."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from flair_peft.errors import SaveError

Identity = tuple[int, int]
"""Device and number of a file: the same for all links to it."""


def _others(folder: Path, own: Collection[str]) -> list[tuple[str, bool]]:
    """Return (name below the folder, is it a folder) of all that is not own; folders come before what they hold."""
    own, homes = set(own), {parent.as_posix() for name in own for parent in PurePosixPath(name).parents}
    found = []
    for path, folders, files in os.walk(folder, onerror=_raise):
        below = Path(path).relative_to(folder)
        real = {name for name in folders if not (Path(path) / name).is_symlink()}
        for name in (*folders, *files):
            relative = (below / name).as_posix()
            if relative not in (homes if name in real else own):
                found.append((relative, name in real))
    return found


def _raise(error: OSError) -> None:
    raise error


def carry(source: Path, into: Path, *, own: Collection[str]) -> dict[str, Identity]:
    """Give ``into`` all that is not own in ``source``, as links to the same files; a log can go on being written.

    Returns:
        name → identity of the file that ``into`` got.
    """
    carried, folders = {}, []
    for name, is_folder in _others(source, own):
        (into / name if is_folder else (into / name).parent).mkdir(parents=True, exist_ok=True)
        # What has gone since it was listed need not be carried.
        with contextlib.suppress(FileNotFoundError):
            if is_folder:
                _check_no_mount(source / name)
                folders.append(name)
            else:
                _link(source / name, into / name)
                carried[name] = _identity(into / name)
    for name in reversed(folders):
        with contextlib.suppress(FileNotFoundError):
            shutil.copystat(source / name, into / name)
    return carried


def _check_no_mount(folder: Path) -> None:
    if os.path.ismount(folder):
        raise SaveError(
            f"Cannot save to '{folder.parent}': '{folder.name}' in it is a mount point. The folder would be replaced "
            "as a whole, and another file system cannot move along. Save to a folder without one."
        )


def _link(source: Path, place: Path) -> None:
    """Link, or copy where the file system or its protection of others' files allows no link."""
    try:
        os.link(source, place, follow_symlinks=os.link not in os.supports_follow_symlinks)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise
        shutil.copy2(source, place, follow_symlinks=False)


def settle(old: Path, new: Path, *, own: Collection[str], carried: dict[str, Identity]) -> None:
    """Nothing is left in ``old`` that is not own: ``new`` has it, in the state that it was in last.

    Args:
        old: the folder that was replaced.
        new: the folder in its place.
        own: names of the content, old and new.
        carried: what ``new`` got before it was put in place; others may have written to either folder since.
    """
    allow_removal(old)
    for name, is_folder in _others(old, own):
        source, place = old / name, new / name
        if is_folder:
            place.mkdir(parents=True, exist_ok=True)
        elif not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            source.replace(place)
        elif _identity(source) in (_identity(place), carried.get(name)):
            source.unlink()
        elif _identity(place) == carried.get(name):
            source.replace(place)
        else:
            source.replace(_free_name(place))


def discard(folder: Path, *, own: Sequence[str]) -> None:
    """Remove the own files, the first of them last, and the folders; anything else stays and an error is raised."""
    allow_removal(folder)
    for name in reversed(own):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / name).unlink()
    for path, _, _ in os.walk(folder, topdown=False):
        Path(path).rmdir()


def allow_removal(folder: Path) -> None:
    """Let the owner remove files from the folder and all below, which were given away or are about to be."""
    for path, _, _ in os.walk(folder):
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            Path(path).chmod(mode | stat.S_IRWXU)


def _free_name(place: Path) -> Path:
    number = 1
    while os.path.lexists(place.with_name(f"{place.name}.{number}")):
        number += 1
    return place.with_name(f"{place.name}.{number}")


def _identity(path: Path) -> Identity:
    status = path.lstat()
    return status.st_dev, status.st_ino
