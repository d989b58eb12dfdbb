"""Checksums of a torch file: torch writes them and reads over them."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

from flair_peft.errors import ModelFileError, name_some
from flair_peft.primitives import progress
from flair_peft.primitives.held_file import AnyFile
from flair_peft.torchfile import scan

_MOST_THREADS = 8
_CHUNK = 1 << 18  # fits into the cache of a core


def check_sums(path: AnyFile) -> None:
    """Return if the checksums in a file are right; old-style files have none.

    Members are summed side by side, in pieces that stay in a core's cache.

    Raises:
        ModelFileError: one is wrong, and a flipped bit would change predictions silently; or torch may read other
            bytes than those that were summed.
    """
    if not scan.is_zip(path):
        return
    members = sorted(scan.stored_members(path), key=lambda member: member.start - member.stop)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as threads:
        sums = threads.map(lambda member: _checksum(path, member), members)
        damaged = []
        for member, found in zip(members, sums, strict=True):
            progress.advance(member.stop - member.start)
            damaged.extend([member.name] if found != member.checksum else [])
    if damaged:
        raise ModelFileError(
            f"Cannot load '{path}': the checksum of {name_some(damaged)} in it is wrong. The file was damaged after it "
            "was written, and would predict something else. Copy or save it again."
        )


def _checksum(path: AnyFile, member: scan.Member) -> int:
    """Return the checksum of the bytes of a member; both reading and summing let other threads run."""
    checksum, rest = 0, member.stop - member.start
    view = memoryview(bytearray(min(rest, _CHUNK)))
    with path.open("rb", buffering=0) as file:
        file.seek(member.start)
        while rest > 0:
            size = file.readinto(view[:rest])
            if not size:
                break
            checksum, rest = zlib.crc32(view[:size], checksum), rest - size
    return checksum
