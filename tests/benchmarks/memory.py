"""What a process takes, from Linux's account of it. Nothing is imported here, so that nothing is counted for it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return _field("VmRSS")


def private() -> int:
    """Return the resident memory of this process that is not that of files, in bytes."""
    return _field("RssAnon")


def peak() -> int:
    """Return the largest resident memory of this process since the last reset, in bytes."""
    return _field("VmHWM")


def reset_peak() -> int:
    """Let :func:`peak` start from the memory of now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def _field(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
