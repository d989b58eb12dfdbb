"""A thousand damaged checkpoints: each is refused in this package's words, or predicts what the whole one predicts.

Damage comes in two sorts. *Raw* damage changes bytes, names and kinds of files, as disks, downloads and people do; no
hash is made right again, so it must be an error or make no difference at all. *Signed* damage changes what a file says
and makes every hash and checksum right again, as an attacker does. Some of that nobody can know: see ``_EDITS``.

The loads happen in forked processes with little memory and little time, so that a hang, a crash or a flood is a failure
that names the damage which caused it.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import gc
import hashlib
import io
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from flair.embeddings import StackedEmbeddings, TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.nn import Model

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.errors import FlairPeftError
from flair_peft.models import save_plan
from flair_peft.storage import manifest
from tests.support.configs import lora
from tests.support.files import DOCUMENT, resign, write_text
from tests.support.zoo import ZOO, Entry

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each batch of loads needs a process of its own")

Base = Callable[[str], str]
Tensors = dict[str, torch.Tensor]

SECONDS_A_LOAD, SECONDS_A_BATCH = 20, 300
MORE_MEMORY = 3 << 30
"""Address space that a process may take beyond what it has when the loads begin."""
MORE_RESIDENT = 400 << 10
"""Kilobytes by which the loads of one batch may raise the peak of the memory in use."""


# Good checkpoints


@dataclass(frozen=True)
class Good:
    """A checkpoint that loads.

    Attributes:
        entry: of the zoo, which knows how to predict.
        path: a directory or a file.
        expected: what :func:`judge` says of it.
        text: of the JSON in it, and ``tensors`` beside that, where it is a file of this package.
        options: for ``load``.
    """

    entry: Entry
    path: Path
    expected: str
    text: str = ""
    tensors: Tensors | None = None
    options: tuple[tuple[str, Any], ...] = ()


def judge(entry: Entry, model: Model) -> str:
    """Return what the model predicts, with all scores, and a digest of all that it could predict from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().double().contiguous().numpy().tobytes())
    for module in model.modules():
        if isinstance(module, PeftTransformerDocumentEmbeddings | PeftTransformerWordEmbeddings):
            digest.update(module.tokenizer.backend_tokenizer.to_str().encode())
    return f"{entry.predict(model, entry.corpus())!r} {digest.hexdigest()}"


MODELS = {"classifier": "text-classifier", "tagger": "sequence-tagger-crf", "tasks": "multitask"}


def build(name: str, word: Callable[..., Any], document: Callable[..., Any]) -> tuple[Entry, Model]:
    """Return a model with untrained but busy adapters; the tagger has a CRF and two of them in a stack."""
    torch.manual_seed(5)
    entry = ZOO[MODELS[name]]
    if name == "tagger":
        return entry, entry.build(lambda **_: StackedEmbeddings([word(), word(layers="-2")]), document)
    return entry, entry.build(word, document)


def load(good: Good, path: Path) -> Model:
    if good.path.is_dir():
        return flair_peft.from_pretrained(path)
    return good.entry.model_class.load(path, **dict(good.options))


def make(name: str, layout: str, base: str, root: Path) -> Good:
    path = root / f"{name}-{layout}".replace(" ", "-")
    config = lora()
    if layout.endswith("stock file"):
        flair_peft.uninstall()
        try:
            entry, model = build(
                name,
                lambda **kwargs: TransformerWordEmbeddings(base, **{"peft_config": config, **kwargs}),
                lambda **kwargs: TransformerDocumentEmbeddings(base, **{"peft_config": config, **kwargs}),
            )
            is_zip = layout == "stock file"
            torch.save(model._get_state_dict(), path, pickle_protocol=4, _use_new_zipfile_serialization=is_zip)
        finally:
            flair_peft.install()
        unjudged = Good(entry, path, "", options=(("peft_config", config),))
    else:
        entry, model = build(
            name,
            lambda **kwargs: PeftTransformerWordEmbeddings(base, **{"peft_config": config, **kwargs}),
            lambda **kwargs: PeftTransformerDocumentEmbeddings(base, **{"peft_config": config, **kwargs}),
        )
        is_whole = layout.startswith("whole")
        if layout.endswith("directory"):
            flair_peft.save_pretrained(model, path, save_base=is_whole)
            unjudged = Good(entry, path, "")
        else:
            description = save_plan.encode(save_plan.plan_save(model, save_base=is_whole))
            text = json.dumps(description.document)
            tensors = {key: tensor.clone() for key, tensor in description.tensors.items()}
            model.save(path, save_base=is_whole)
            unjudged = Good(entry, path, "", text, tensors)
    expected = judge(entry, load(unjudged, path))
    return Good(entry, path, expected, unjudged.text, unjudged.tensors, unjudged.options)


@pytest.fixture(scope="module")
def good(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Good]:
    """Return a function from model and layout to a checkpoint that loads."""
    made: dict[tuple[str, str], Good] = {}
    root = tmp_path_factory.mktemp("good")

    def find(name: str, layout: str) -> Good:
        if (name, layout) not in made:
            made[name, layout] = make(name, layout, base("bert"), root)
        return made[name, layout]

    return find


# Raw damage to the bytes of one file


Damage = Callable[[Path, random.Random, Good], None]
"""Damages the copy of a checkpoint at a path; one that changes nothing is tried again."""


def _flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 3))):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.choice((0, 1, 8, len(content) // 2, len(content) - 1, chance.randrange(len(content))))]


def _grown(content: bytes, chance: random.Random) -> bytes:
    return content + chance.choice((b"\0", b"}", content, chance.randbytes(50)))


def _led(content: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"\0", b" ", b"\xef\xbb\xbf", b"PK\x03\x04", chance.randbytes(9))) + content


def _overwritten(content: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(content)), chance.choice((1, 4, 64))
    noise = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return (content[:start] + noise + content[start + size :])[: len(content)]


def _shortened(content: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(content)), chance.choice((1, 8, 100))
    return content[:start] + content[start + size :]


def _repeated(content: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(content)), chance.choice((1, 8, 100))
    return content[: start + size] + content[start:]


def _deep(_: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"[", b'{"a":', b'{"metadata":[')) * chance.choice((2_000, 200_000))


def _oversized(content: bytes, chance: random.Random) -> bytes:
    """Return a header of safetensors that lies about its length."""
    return struct.pack("<Q", chance.choice((0, 1, 1 << 20, 1 << 31, 1 << 40, (1 << 64) - 1))) + content[8:]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": _flipped,
    "cut off": _cut,
    "grown": _grown,
    "bytes in front": _led,
    "overwritten": _overwritten,
    "shortened inside": _shortened,
    "repeated inside": _repeated,
    "deep": _deep,
    "header that lies": _oversized,
}


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def _to_bytes(change: Callable[[bytes, random.Random], bytes]) -> Damage:
    def damage(place: Path, chance: random.Random, _: Good) -> None:
        path = chance.choice(_files(place))
        path.write_bytes(change(path.read_bytes(), chance))

    return damage


# Raw damage to files as a whole


def _remove(place: Path, chance: random.Random, _: Good) -> None:
    chance.choice(_files(place)).unlink()


def _exchange(place: Path, chance: random.Random, _: Good) -> None:
    one, other = chance.sample(_files(place), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _rename(place: Path, chance: random.Random, _: Good) -> None:
    path = chance.choice(_files(place))
    path.rename(path.with_name(chance.choice((path.name.upper(), path.name + "~", "x", "." + path.name))))


_STRANGERS = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "base.safetensors",
    "config.json",
    "model.safetensors",
    "notes.txt",
    "embeddings-9/adapter_config.json",
    "embeddings-1/x.safetensors",
    "tokenizer/tokenizer.model",
    "tokenizer/vocab.txt",
    "tokenizer/chat_template.jinja",
    "image_processor/preprocessor_config.json",
    "tokenizer/deep/er/file",
)


def _add(place: Path, chance: random.Random, _: Good) -> None:
    name = chance.choice([name for name in _STRANGERS if not (place / name).exists()])
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(chance.choice((b"", b"{}", b"[" * 9999, chance.randbytes(99))))


def _replace_by(kind: str) -> Damage:
    def damage(place: Path, chance: random.Random, _: Good) -> None:
        path = chance.choice([path for path in _files(place) if path.name != "README.md"])
        content = path.read_bytes()
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "link to its content":
            place.with_name(f"{place.name}.aside").write_bytes(content)
            path.symlink_to(place.with_name(f"{place.name}.aside"))
        else:
            targets = (
                ("/dev/zero", "/dev/null", "/dev/tty") if kind == "link to a device" else ("/etc/passwd", ".", "/")
            )
            path.symlink_to(chance.choice(targets))

    return damage


def _edit_unsigned(place: Path, chance: random.Random, good: Good) -> None:
    path = place / DOCUMENT
    text = _mutated_text(path.read_text(), chance, chance.choice(list(STRUCTURES)))
    path.write_text(text)


REPLACED: dict[str, Damage] = {
    "pipe": _replace_by("pipe"),
    "folder": _replace_by("folder"),
    "link to a device": _replace_by("link to a device"),
    "link elsewhere": _replace_by("link elsewhere"),
    "link to its content": _replace_by("link to its content"),
}
RAW_DIRECTORY: dict[str, Damage] = {
    **{name: _to_bytes(change) for name, change in BYTES.items()},
    **REPLACED,
    "removed": _remove,
    "exchanged": _exchange,
    "renamed": _rename,
    "added": _add,
    "edited": _edit_unsigned,
}
RAW_FILE: dict[str, Damage] = {
    **{name: _to_bytes(change) for name, change in BYTES.items() if name not in ("deep", "header that lies")},
    **REPLACED,
}


# Damage to JSON, or to any state of dictionaries and lists


class Spot(NamedTuple):
    """One value in a document: ``parent[key]``."""

    parent: Any
    key: Any
    place: str

    @property
    def value(self) -> Any:
        """What is there."""
        return self.parent[self.key]


def _spots(document: Any) -> list[Spot]:
    found, pending = list[Spot](), [(document, "")]
    while pending:
        value, place = pending.pop()
        keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
        for key in keys:
            if not isinstance(value[key], torch.Tensor | io.BytesIO):
                found.append(Spot(value, key, f"{place}/{key}"))
                pending.append((value[key], f"{place}/{key}"))
    return found


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 1.5, 10**30, -(10**30), 1e308, "", "x", "../x", "/", "\ud800", "x" * 100_000),
    *([], [0], ["x"], [[]], [None], {}, {"x": 1}, {"": {}}),
    *({"$type": "banana"}, {"$type": "tensor", "tensor": "x", "is_complex": False}, {"$type": []}, {"$x": 1}),
)


def _kind_of(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "number" if is_number else type(value)


def _retype(spot: Spot, chance: random.Random) -> None:
    others = [value for value in _VALUES if _kind_of(value) != _kind_of(spot.value)]
    spot.parent[spot.key] = copy.deepcopy(chance.choice(others))


def _delete(spot: Spot, chance: random.Random) -> None:
    del spot.parent[spot.key]


def _empty(spot: Spot, chance: random.Random) -> None:
    if isinstance(spot.value, (list, dict, str)):
        spot.parent[spot.key] = type(spot.value)()


def _insert(spot: Spot, chance: random.Random) -> None:
    value = copy.deepcopy(chance.choice(_VALUES))
    if isinstance(spot.parent, list):
        spot.parent.insert(spot.key, value)
    else:
        name = chance.choice(("x", "auto_map", "trust_remote_code", "$type", "__cls__", "state_dict", "device_map", ""))
        spot.parent.setdefault(name, value)


def _nest(spot: Spot, chance: random.Random) -> None:
    value = copy.deepcopy(spot.value)
    for _ in range(chance.choice((1, 98, 150, 400))):
        value = chance.choice(([value], {"x": value}))
    spot.parent[spot.key] = value


def _inflate(spot: Spot, chance: random.Random) -> None:
    if _kind_of(spot.value) == "number":
        spot.parent[spot.key] = chance.choice((2**31 - 1, 2**31, 10**9, 10**12, 10**30, 10**400, -1, -(10**12)))
    elif isinstance(spot.value, list) and spot.value:
        spot.value.extend(spot.value * (100_000 // len(spot.value)))


def _alter(spot: Spot, chance: random.Random) -> None:
    """Replace a value by another one of its own type."""
    value = spot.value
    if isinstance(value, bool):
        spot.parent[spot.key] = not value
    elif isinstance(value, (int, float)):
        spot.parent[spot.key] = chance.choice((value + 1, value * 2, -value, 0, type(value)(0.5)))
    elif isinstance(value, str):
        spot.parent[spot.key] = chance.choice((value + "x", value[1:], value.upper(), value[::-1]))
    elif isinstance(value, list):
        chance.shuffle(value)


STRUCTURES: dict[str, Callable[[Spot, random.Random], None]] = {
    "JSON of another type": _retype,
    "JSON deleted": _delete,
    "JSON emptied": _empty,
    "JSON inserted": _insert,
    "JSON nested": _nest,
    "JSON inflated": _inflate,
    "JSON altered": _alter,
}


_notes: list[str] = []
"""What the last damage did, for the report."""


def _mutate_(spots: list[Spot], chance: random.Random, kind: str) -> None:
    if kind == "JSON deleted":  # an item of a list is a value like any other
        spots = [spot for spot in spots if isinstance(spot.parent, dict)]
    spot = chance.choice(spots)
    before = repr(spot.value)
    STRUCTURES[kind](spot, chance)
    is_there = spot.key in spot.parent if isinstance(spot.parent, dict) else spot.key < len(spot.parent)
    _notes.append(f"{spot.place}: {before:.60} -> {(spot.value if is_there else None)!r:.60}")


def _mutated(document: Any, chance: random.Random, kind: str) -> Any:
    _mutate_(_spots(document), chance, kind)
    return document


def _mutated_text(text: str, chance: random.Random, kind: str) -> str:
    return json.dumps(_mutated(json.loads(text), chance, kind))


def _doubled_key(text: str, chance: random.Random) -> str:
    """Return the text with one of its names a second time, with another value."""
    places = [index for index in range(len(text)) if text.startswith('": ', index)]
    index = chance.choice(places)
    start = text.rindex('"', 0, index)
    return text[:start] + text[start : index + 3] + "null, " + text[start:]


# Damage to tensors by name


def _rename_tensor(tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice(list(tensors))
    new = chance.choice((name + "x", name.upper(), "x", f"module.{name}", name.replace(".weight", ""), "../x", "x/y"))
    tensors[new] = tensors.pop(name)


def _remove_tensor(tensors: Tensors, chance: random.Random) -> None:
    del tensors[chance.choice(list(tensors))]


def _add_tensor(tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice(list(tensors))
    new = chance.choice(
        ("x", f"{name}.x", f"module.{name}", name.replace("lora_A", "lora_C"), name.replace(".0.", ".7."))
    )
    tensors[new] = tensors[name].clone()


def _reshape(tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice([name for name, tensor in tensors.items() if tensor.numel() > 1])
    tensor = tensors[name]
    shapes = (tensor[None], tensor[:-1], torch.cat([tensor, tensor]), tensor.flatten()[:1], tensor[..., None])
    tensors[name] = chance.choice((*shapes, tensor.t() if tensor.dim() == 2 else tensor[:0])).clone().contiguous()


def _to_integers(tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
    dtype = chance.choice((torch.int64, torch.uint8, torch.bool, torch.int8))
    tensors[name] = (tensors[name].nan_to_num() * 100).to(dtype)


def _to_other_floats(tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
    tensors[name] = tensors[name].to(chance.choice((torch.float16, torch.bfloat16, torch.float64)))


def _exchange_tensors(tensors: Tensors, chance: random.Random) -> None:
    one, other = chance.sample(list(tensors), 2)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _exchange_alike(tensors: Tensors, chance: random.Random) -> None:
    one = chance.choice(list(tensors))
    alike = [name for name in tensors if name != one and tensors[name].shape == tensors[one].shape]
    if alike:
        other = chance.choice(alike)
        tensors[one], tensors[other] = tensors[other], tensors[one]


def _alter_tensor(tensors: Tensors, chance: random.Random) -> None:
    name = chance.choice(list(tensors))
    tensor = tensors[name] = tensors[name].clone()
    if tensor.numel():
        value = chance.choice((0.0, 1.0, 1e30, float("nan"), float("inf"))) if tensor.is_floating_point() else 1
        tensor.view(-1)[chance.randrange(tensor.numel())] = value


TENSORS: dict[str, Callable[[Tensors, random.Random], None]] = {
    "tensor renamed": _rename_tensor,
    "tensor removed": _remove_tensor,
    "tensor added": _add_tensor,
    "tensor reshaped": _reshape,
    "tensor of integers": _to_integers,
    "tensor of other floats": _to_other_floats,
    "tensors exchanged": _exchange_tensors,
    "tensors of one shape exchanged": _exchange_alike,
    "tensor altered": _alter_tensor,
}


def _change_tensors_(tensors: Tensors, change: Callable[[Tensors, random.Random], None], chance: random.Random) -> None:
    before = dict(tensors)
    change(tensors, chance)
    changed = {name for name in {**before, **tensors} if before.get(name) is not tensors.get(name)}
    _notes.append(f"changed: {', '.join(sorted(changed))}")


# Signed damage to directories


def _in_json(change: Callable[[str, random.Random], str]) -> Damage:
    """Return damage to the JSON of this package and of PEFT."""

    def damage(place: Path, chance: random.Random, _: Good) -> None:
        configs = [path for path in _files(place) if path.name == "adapter_config.json"]
        path = chance.choice([*configs, place / DOCUMENT, place / DOCUMENT])
        if path.name == DOCUMENT:
            resign(place, lambda document: _change_body(document, chance, change))
        else:
            path.write_text(change(path.read_text(), chance))
            resign(place)

    return damage


def _in_tokenizer(place: Path, chance: random.Random, _: Good) -> None:
    path = chance.choice([path for path in _files(place) if path.parent.name == "tokenizer"])
    path.write_text(_mutated_text(path.read_text(), chance, chance.choice(list(STRUCTURES))))
    resign(place)


def _change_body(document: dict[str, Any], chance: random.Random, change: Callable[[str, random.Random], str]) -> None:
    own = {name: document[name] for name in manifest.RESERVED}
    body = {name: value for name, value in document.items() if name not in own}
    document.clear()
    document.update({**json.loads(change(json.dumps(body), chance)), **own})


def _in_tensors(change: Callable[[Tensors, random.Random], None]) -> Damage:
    def damage(place: Path, chance: random.Random, _: Good) -> None:
        path = chance.choice([path for path in _files(place) if path.suffix == ".safetensors"])
        # Which order safetensors returns them in differs between processes.
        tensors = dict(sorted(safetensors.torch.load(path.read_bytes()).items()))
        with contextlib.suppress(IndexError):
            _change_tensors_(tensors, change, chance)
        path.write_bytes(safetensors.torch.save({n: t.clone() for n, t in tensors.items()}, {"format": "pt"}))
        resign(place)

    return damage


def _in_header(place: Path, chance: random.Random, _: Good) -> None:
    path = chance.choice([path for path in _files(place) if path.suffix == ".safetensors"])
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = _mutated(json.loads(content[8 : 8 + size]), chance, chance.choice(list(STRUCTURES)))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    resign(place)


def _signed_bytes(place: Path, chance: random.Random, _: Good) -> None:
    path = chance.choice([path for path in _files(place) if path.name != DOCUMENT])
    change = chance.choice([BYTES[name] for name in ("deep", "header that lies", "cut off", "bytes in front", "grown")])
    path.write_bytes(change(path.read_bytes(), chance))
    resign(place)


_BAD_NAMES = (
    *("../x", "/etc/passwd", "a/../../x", "./x", "a//b", "..", "", "a/b/c/d", "x\n", "x\0", "~", "a\\..\\x", "\ud800"),
    *("README.md", DOCUMENT, "tokenizer/../x.json", "tokenizer/..", "CON", "tokenizer"),
)


def _list_bad_name(place: Path, chance: random.Random, _: Good) -> None:
    name, entry = chance.choice(_BAD_NAMES), chance.choice(_files(place))
    if name == "../x":
        shutil.copy(entry, place.parent / "x")
    size, digest = entry.stat().st_size, hashlib.sha256(entry.read_bytes()).hexdigest()
    resign(place, lambda document: document["files"].update({name: {"bytes": size, "sha256": digest}}))


def _list_stranger(place: Path, chance: random.Random, good: Good) -> None:
    before = set(_files(place))
    _add(place, chance, good)
    (path,) = set(_files(place)) - before
    entry = manifest.entry_of(path.read_bytes())
    listed = {path.relative_to(place).as_posix(): {"bytes": entry.bytes, "sha256": entry.sha256}}
    resign(place, lambda document: document["files"].update(listed))


def _unlist(place: Path, chance: random.Random, _: Good) -> None:
    resign(place, lambda document: document["files"].pop(chance.choice(list(document["files"]))))


def _rename_listed(place: Path, chance: random.Random, _: Good) -> None:
    path = chance.choice([path for path in _files(place) if path.name not in (DOCUMENT, "README.md")])
    name = path.relative_to(place).as_posix()
    new = chance.choice((name.upper(), f"embeddings-1/{path.name}", f"embeddings-7/{path.name}", "x" + path.suffix))
    if (place / new).exists():
        return
    (place / new).parent.mkdir(parents=True, exist_ok=True)
    path.rename(place / new)
    resign(place, lambda document: document["files"].update({new: document["files"].pop(name)}))


def _exchange_signed(place: Path, chance: random.Random, _: Good) -> None:
    suffix = chance.choice((".json", ".safetensors"))
    files = [path for path in _files(place) if path.suffix == suffix and path.name != DOCUMENT]
    if len(files) > 1:
        one, other = chance.sample(files, 2)
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        resign(place)


def _damage_manifest(place: Path, chance: random.Random, _: Good) -> None:
    def change(document: dict[str, Any]) -> None:
        name = chance.choice([name for name in manifest.RESERVED if name != "sha256"])
        part = {name: document[name]}
        _mutated(part, chance, chance.choice(list(STRUCTURES)))
        document.pop(name)
        document.update(part)

    resign(place, change)


SIGNED_DIRECTORY: dict[str, Damage] = {
    **{
        name: _in_json(lambda text, chance, name=name: _mutated_text(text, chance, name))  # type: ignore[misc]
        for name in STRUCTURES
    },
    **{name: _in_tensors(change) for name, change in TENSORS.items()},
    "JSON with a name twice": _in_json(_doubled_key),
    "tokenizer": _in_tokenizer,
    "header of tensors": _in_header,
    "bytes, signed": _signed_bytes,
    "bad name listed": _list_bad_name,
    "stranger listed": _list_stranger,
    "file not listed": _unlist,
    "file listed by another name": _rename_listed,
    "files exchanged, signed": _exchange_signed,
    "manifest": _damage_manifest,
}


# Signed damage to files


def _in_text(change: Callable[[str, random.Random], str]) -> Damage:
    def damage(path: Path, chance: random.Random, good: Good) -> None:
        write_text(change(good.text, chance), good.tensors or {}, path)

    return damage


def _in_stored_tensors(change: Callable[[Tensors, random.Random], None]) -> Damage:
    def damage(path: Path, chance: random.Random, good: Good) -> None:
        tensors = dict(good.tensors or {})
        _change_tensors_(tensors, change, chance)
        write_text(good.text, tensors, path)

    return damage


def _flipped_text(text: str, chance: random.Random) -> str:
    return _flipped(text.encode(), chance).decode("utf-8", "replace")


def _records(path: Path) -> dict[str, bytes]:
    reader = torch._C.PyTorchFileReader(str(path))
    return {name: reader.get_record(name) for name in reader.get_all_records() if name != ".data/serialization_id"}


def _write_records(path: Path, records: dict[str, bytes]) -> None:
    path.unlink()
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        if name != "version":  # which it writes itself
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def _in_pickle(path: Path, chance: random.Random, _: Good) -> None:
    records = _records(path)
    change = chance.choice((_flipped, _flipped, _flipped, _cut, _overwritten, _shortened, _repeated))
    records["data.pkl"] = change(records["data.pkl"], chance)
    _write_records(path, records)


def _in_records(path: Path, chance: random.Random, _: Good) -> None:
    records = _records(path)
    one, other = chance.sample([name for name in records if name != "version"], 2)
    kind = chance.randrange(6)
    if kind == 0:
        del records[one]
    elif kind == 1:
        records[one], records[other] = records[other], records[one]
    elif kind == 2:
        records[one] = _cut(records[one] or b"x", chance)
    elif kind == 3:
        records[one] = _grown(records[one], chance)
    elif kind == 4:
        records[chance.choice(("data/99", "x", "constants.pkl", "code/x.py", "data.pkl2", "../x", "y.pkl"))] = b"x" * 9
    else:
        records["byteorder"] = chance.choice((b"big", b"", b"banana", b"\xff"))
    _write_records(path, records)


def _pack_again(path: Path, chance: random.Random, _: Good) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    method = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    folder = chance.choice(("", "x/", "../"))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members.items():
            archive.writestr(folder + name.partition("/")[2] if folder else name, content)
        if chance.randrange(2):
            archive.writestr(chance.choice(list(members)), b"x")


SIGNED_FILE: dict[str, Damage] = {
    **{
        name: _in_text(lambda text, chance, name=name: _mutated_text(text, chance, name))  # type: ignore[misc]
        for name in STRUCTURES
    },
    **{name: _in_stored_tensors(change) for name, change in TENSORS.items()},
    "JSON with a name twice": _in_text(_doubled_key),
    "text flipped": _in_text(_flipped_text),
    "text deep": _in_text(lambda text, chance: _deep(text.encode(), chance).decode()),
    "text cut off": _in_text(lambda text, chance: text[: chance.randrange(len(text))]),
    "pickle": _in_pickle,
    "members": _in_records,
    "packed again": _pack_again,
}


# Signed damage to files of stock Flair


def _state_of(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False)


def _save_state(state: Any, path: Path) -> None:
    torch.save(state, path, pickle_protocol=4)


def _in_state(kind: str) -> Damage:
    def damage(path: Path, chance: random.Random, _: Good) -> None:
        state = _state_of(path)
        _mutate_([spot for spot in _spots(state) if spot.key != "state_dict"], chance, kind)
        _save_state(state, path)

    return damage


def _in_state_dict(change: Callable[[Tensors, random.Random], None]) -> Damage:
    def damage(path: Path, chance: random.Random, _: Good) -> None:
        state = _state_of(path)
        tensors = dict(state["state_dict"])
        _change_tensors_(tensors, change, chance)
        _save_state({**state, "state_dict": tensors}, path)

    return damage


SIGNED_STOCK_FILE: dict[str, Damage] = {
    **{name: _in_state(name) for name in STRUCTURES},
    **{name: _in_state_dict(change) for name, change in TENSORS.items()},
    "pickle": _in_pickle,
    "members": _in_records,
    "packed again": _pack_again,
}


# One batch of loads in a process of its own


class TooSlowError(BaseException):
    """A load did not end in time."""


class Outcome(NamedTuple):
    """What became of one load: "refused", "same", "different", "memory", or what else was raised."""

    kind: str
    number: int
    result: str
    detail: str = ""


def damaged_copy(good: Good, damage: Damage, chance: random.Random, folder: Path) -> Path:
    """Return a copy of the checkpoint that differs from it."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        place = folder / ("model" if good.path.is_dir() else "model.pt")
        (shutil.copytree if good.path.is_dir() else shutil.copy)(good.path, place)
        before = _contents(place)
        _notes.clear()
        damage(place, chance, good)
        if _contents(place) != before:
            return place


def _contents(place: Path) -> dict[str, Any]:
    found = [place] if place.is_symlink() else [place, *place.rglob("*")]
    return {str(p): p.is_symlink() or (p.read_bytes() if p.is_file() else p.is_dir()) for p in found}


def outcome_of(good: Good, place: Path) -> tuple[str, str]:
    """Return what a load gives, and what it raised."""
    try:
        signal.alarm(SECONDS_A_LOAD)
        try:
            model = load(good, place)
        except FlairPeftError as error:
            return ("memory" if isinstance(error.__cause__, MemoryError) else "refused"), _told(error)
        try:
            return ("same" if judge(good.entry, model) == good.expected else "different"), ""
        except Exception as error:  # a model that loads but cannot predict
            return ("refused later" if isinstance(error, FlairPeftError) else "breaks later"), _told(error)
    except (Exception, TooSlowError) as error:
        return type(error).__name__, _told(error)
    finally:
        signal.alarm(0)


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-4:]) + f"{type(error).__name__}: {str(error)[:500]}"


def run(good: Good, kinds: dict[str, Damage], *, seed: int, rounds: int, folder: Path) -> list[Outcome]:
    """Return the outcome of each kind of damage, ``rounds`` times, all in one process that is no more."""
    reading, writing = os.pipe()
    last_words = folder.parent / f"{folder.name} last words"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads; the child starts none of theirs
        child = os.fork()
    if child == 0:
        gc.freeze()  # sessions of onnxruntime, as earlier tests leave them, would wait for threads that are not here
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as report, last_words.open("w") as file:
                faulthandler.enable(file)
                faulthandler.dump_traceback_later(SECONDS_A_BATCH - 5, file=file)
                try:
                    _run_child(good, kinds, seed, rounds, folder, report)
                except BaseException:
                    traceback.print_exc(file=file)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        outcomes = _read_report(reading, deadline=time.monotonic() + SECONDS_A_BATCH)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if outcomes and outcomes[-1].result == "crashed":
        outcomes[-1] = outcomes[-1]._replace(detail=last_words.read_text())
    return outcomes


def _run_child(good: Good, kinds: dict[str, Damage], seed: int, rounds: int, folder: Path, report: Any) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _HAS_PROC else None
    if used is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _too_slow)
    alive = load(good, good.path)  # with it the base stays in the cache
    for number in range(rounds):
        for kind, damage in kinds.items():
            report.write(json.dumps([kind, number, "crashed", ""]) + "\n")
            report.flush()
            # Of a text, since hashes differ between processes.
            place = damaged_copy(good, damage, random.Random(f"{seed} {kind} {number}"), folder / "damaged")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result, detail = outcome_of(good, place)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak > MORE_RESIDENT:
                result = "memory"
            detail = "; ".join([*_notes, detail])
            report.write(json.dumps([kind, number, result, detail]) + "\n")
            report.flush()
    assert judge(good.entry, alive) == good.expected
    assert judge(good.entry, load(good, good.path)) == good.expected
    report.write(json.dumps(["the end", 0, "same", ""]) + "\n")
    report.flush()


_HAS_PROC = Path("/proc/self/statm").exists()


def _too_slow(*_: Any) -> None:
    raise TooSlowError


def _read_report(reading: int, *, deadline: float) -> list[Outcome]:
    text = b""
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            break
        text += chunk
    found: dict[tuple[str, int], Outcome] = {}
    for line in text.splitlines():
        kind, number, result, detail = json.loads(line)
        found[kind, number] = Outcome(kind, number, result, detail)
    return list(found.values())


# Which damage may go where


_EDITS = frozenset({*STRUCTURES} - {"JSON deleted"}) | {
    *("tensors exchanged", "tensors of one shape exchanged", "tensor altered", "tensor of other floats"),
    *("tokenizer", "files exchanged, signed", "text flipped", "pickle", "members"),
}
"""Signed changes to values: another label, number or setting under a right hash is another model, and a good one.

All others change which files, tensors and settings there are, and their shapes and kinds of number. That must be an
error, or make no difference.
"""

_HARMLESS = ("refused", "refused later", "same")


class Family(NamedTuple):
    """Kinds of damage to one layout: how often each, which share of all must be refused, what values may become."""

    layouts: tuple[str, ...]
    kinds: dict[str, Damage]
    rounds: int
    refused: float
    edits: frozenset[str] = frozenset()


FAMILIES = {
    "raw directory": Family(("directory", "whole directory"), RAW_DIRECTORY, 4, 0.6),
    "raw file": Family(("file", "whole file"), RAW_FILE, 4, 0.6),
    "raw stock file": Family(("stock file",), RAW_FILE, 4, 0.6),
    # Files of this layout hold no checksums at all: whatever is in them is what somebody saved.
    "raw old stock file": Family(("old stock file",), RAW_FILE, 3, 0.4, frozenset(RAW_FILE)),
    "signed directory": Family(("directory", "whole directory"), SIGNED_DIRECTORY, 3, 0.3, _EDITS),
    "signed file": Family(("file", "whole file"), SIGNED_FILE, 4, 0.4, _EDITS),
    "signed stock file": Family(("stock file",), SIGNED_STOCK_FILE, 3, 0.2, _EDITS),
}
BATCHES = [(name, layout, family) for family, f in FAMILIES.items() for layout in f.layouts for name in MODELS]
# Flair stores the tensors of several tasks under each of them: no single state_dict to damage.
BATCHES = [batch for batch in BATCHES if batch[::2] != ("tasks", "signed stock file")]
# The layouts of one model that a user saves in are damaged once in each way by default, all else with the matrix.
BY_DEFAULT = [("classifier", layout) for layout in ("file", "directory", "stock file")]
DAMAGED = [
    *((*batch, 1) for batch in BATCHES if batch[:2] in BY_DEFAULT),
    *(pytest.param(*batch, FAMILIES[batch[2]].rounds, marks=pytest.mark.matrix) for batch in BATCHES),
]


def test_mutations_are_a_thousand() -> None:
    """The number is what the readme says, and no family is empty."""
    assert sum(FAMILIES[family].rounds * len(FAMILIES[family].kinds) for _, _, family in BATCHES) >= 1_000
    assert all(FAMILIES[family].kinds for family in FAMILIES)


@pytest.mark.parametrize(("name", "layout", "family", "rounds"), DAMAGED)
def test_damaged_checkpoint_is_refused_or_predicts_the_same(
    name: str, layout: str, family: str, rounds: int, good: Callable[[str, str], Good], tmp_path: Path
) -> None:
    """No damage is silent, hangs, crashes, floods the memory or raises what is not this package's own."""
    wanted = FAMILIES[family]
    outcomes = run(good(name, layout), wanted.kinds, seed=7, rounds=rounds, folder=tmp_path)
    assert [outcome for outcome in outcomes if not _is_right(outcome, wanted.edits)] == []
    assert outcomes.pop().kind == "the end"
    counted = Counter(outcome.kind for outcome in outcomes)
    assert counted == dict.fromkeys(wanted.kinds, rounds)
    results = Counter(outcome.result for outcome in outcomes)
    assert results["refused"] >= wanted.refused * len(outcomes), results


def _is_right(outcome: Outcome, edits: frozenset[str]) -> bool:
    may_differ = outcome.kind in edits and outcome.result in ("different", "breaks later")
    return outcome.result in _HARMLESS or may_differ


@pytest.mark.parametrize(
    ("behaviour", "found"),
    [("raises", "ZeroDivisionError"), ("hangs", "TooSlowError"), ("floods", "memory"), ("dies", "crashed")],
)
def test_harness_sees_what_it_looks_for(
    behaviour: str, found: str, good: Callable[[str, str], Good], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that raises, hangs, floods or dies is reported as that: these tests can fail."""
    checkpoint = good("classifier", "directory")

    def load_badly(good: Good, path: Path) -> Any:
        if path == good.path:
            return real_load(good, path)
        actions = {
            "raises": lambda: 1 // 0,
            "hangs": lambda: time.sleep(60),
            "floods": lambda: bytearray(MORE_RESIDENT << 11) and real_load(good, good.path),
            "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        }
        return actions[behaviour]()

    real_load = load
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "load", load_badly)
    monkeypatch.setattr(module, "SECONDS_A_LOAD", 1)
    kinds = {"removed": RAW_DIRECTORY["removed"]}
    assert run(checkpoint, kinds, seed=0, rounds=1, folder=tmp_path)[0].result == found


def test_harness_tells_what_goes_wrong_in_itself(good: Callable[[str, str], Good], tmp_path: Path) -> None:
    """A kind of damage that raises is a failure with its traceback."""
    kinds: dict[str, Damage] = {"broken": lambda path, chance, _: 1 // 0}  # type: ignore[dict-item]
    (outcome,) = run(good("classifier", "directory"), kinds, seed=0, rounds=1, folder=tmp_path)
    assert outcome.result == "crashed"
    assert "ZeroDivisionError" in outcome.detail
