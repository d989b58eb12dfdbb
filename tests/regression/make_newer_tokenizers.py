"""Write tokenizers, and what they give, as a newer transformers has them.

``python -m tests.regression.make_newer_tokenizers FOLDER`` writes those of :mod:`tests.support.tiny` into an empty
folder. The same with the Python of an environment with the newer version, and ``PYTHONPATH=.``, reads them there and
writes the archive of that version. An existing archive is never written again.
"""

from __future__ import annotations

import json
import lzma
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

ARCHIVE = Path(__file__).parent / "newer_tokenizers.tar.xz"

KINDS = (
    "albert",
    "bert",
    "deberta-v2",
    "gemma",
    "gpt2",
    "layoutlmv3",
    "llama",
    "mistral",
    "modernbert",
    "qwen3",
    "roberta",
    "t5",
    "xlm-roberta",
    "xlnet",
)
"""Architectures of :mod:`tests.support.tiny`: one of each kind of tokenizer."""

CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-cased": ("bert", {"do_lower_case": False, "extra_special_tokens": ["[E1]", "[E2]"]}),
    "gemma-with-end": ("gemma", {"add_bos_token": True, "add_eos_token": True}),
    "llama-with-end": ("llama", {"add_bos_token": True, "add_eos_token": True}),
    "modernbert-with-image": ("modernbert", {"image_token": "<image>"}),
    "roberta-with-prefix": ("roberta", {"add_prefix_space": True}),
}
"""Name → kind, and settings that its users change."""

WORDS = (("I", "love", "it", "!"), ("Größe", "x<y", "[E1]", "<image>"), ("A", "quick", "brown", "fox", "jumps"))
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def describe(tokenizer: Any) -> dict[str, Any]:
    """Return what a transformer gets from the tokenizer, and what Flair asks it."""
    words = [list(each) for each in WORDS]
    boxes = {"boxes": [[[1, 2, 3, 4]] * len(each) for each in words]}
    encoded = tokenizer(words, **(boxes if "LayoutLM" in type(tokenizer).__name__ else {"is_split_into_words": True}))
    return {
        "input_ids": encoded["input_ids"],
        "word_ids": [encoded.word_ids(index) for index in range(len(words))],
        "special": {
            name: None if getattr(tokenizer, name) is None else str(getattr(tokenizer, name)) for name in SPECIAL
        },
        "special_ids": sorted(tokenizer.all_special_ids),
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "has_mask": "attention_mask" in encoded,
        "length": len(tokenizer),
    }


def write_archive(folder: Path) -> None:
    """Write the archive from tokenizers of an older version."""
    record = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (kind, settings) in {**{kind: (kind, {}) for kind in KINDS}, **CHANGED}.items():
            written = Path(temporary, name)
            AutoTokenizer.from_pretrained(folder / kind, **settings).save_pretrained(written)
            # Without the class of a model's config transformers reads some as generic.
            (written / "config.json").write_bytes((folder / kind / "config.json").read_bytes())
            # Flair asks for add_prefix_space.
            record[name] = describe(AutoTokenizer.from_pretrained(written, add_prefix_space=True))
        Path(temporary, "record.json").write_text(json.dumps(record), encoding="utf-8")
        with (
            lzma.open(ARCHIVE, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(Path(temporary).iterdir()):
                archive.add(path, path.name, filter=_anonymous)
    sys.stderr.write(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes, by transformers {transformers.__version__}\n")


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
    return info


def main() -> None:
    """Write what the folder lacks, or the archive."""
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        from tests.support import tiny

        for kind in KINDS:
            tiny.build(kind, folder / kind)
    elif not ARCHIVE.exists():
        write_archive(folder)


if __name__ == "__main__":
    main()
