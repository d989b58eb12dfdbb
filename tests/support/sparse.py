"""Files of any size that take no room on the disk: the bytes of their tensors are holes."""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


class Hole:
    """A float32 tensor whose bytes were never written."""

    def __init__(self, key: str, *shape: int) -> None:
        self.key, self.shape = key, shape

    @property
    def bytes(self) -> int:
        return 4 * torch.Size(self.shape).numel()

    def __reduce__(self) -> Any:
        strides = torch.empty(self.shape, device="meta").stride()
        settings = (0, self.shape, strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, (_Storage(self), *settings)


class _Storage:
    def __init__(self, hole: Hole) -> None:
        self.hole = hole


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", torch.FloatStorage, value.hole.key, "cpu", value.hole.bytes // 4)
        return None


def pickled(value: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def write_zip(path: Path, value: Any, holes: Iterable[Hole]) -> None:
    """Write what ``torch.save`` writes of a value, without the bytes of its tensors; their checksums are wrong."""
    members: list[tuple[str, int, bytes | None]] = [("archive/data.pkl", 0, pickled(value, 4))]
    members += [(f"archive/data/{hole.key}", hole.bytes, None) for hole in holes]
    directory = b""
    with path.open("wb") as file:
        for name, size, content in members:
            size = len(content) if content is not None else size
            offset, encoded = file.tell(), name.encode()
            common = struct.pack("<HHHHHIIIHH", 0, 0, 0, 0, 0, 0, size, size, len(encoded), 0)
            file.write(b"PK\x03\x04" + common + encoded)
            if content is None:
                file.seek(size, io.SEEK_CUR)
            else:
                file.write(content)
            directory += (
                b"PK\x01\x02" + struct.pack("<H", 0) + common + struct.pack("<HHHII", 0, 0, 0, 0, offset) + encoded
            )
        start = file.tell()
        file.write(directory)
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(members), len(members), len(directory), start, 0))


def write_old(path: Path, value: Any, holes: Iterable[Hole]) -> None:
    """Write what torch wrote before it wrote zip files."""
    holes = list(holes)
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(part, file, protocol=2)
        file.write(pickled(value))
        pickle.dump([hole.key for hole in holes], file, protocol=2)
        for hole in holes:
            file.write(struct.pack("<q", hole.bytes // 4))
            file.seek(hole.bytes, io.SEEK_CUR)
        file.truncate(file.tell())


def write_safetensors(path: Path, holes: Mapping[str, Hole]) -> None:
    header, end = {}, 0
    for name, hole in holes.items():
        header[name] = {"dtype": "F32", "shape": list(hole.shape), "data_offsets": [end, end + hole.bytes]}
        end += hole.bytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
