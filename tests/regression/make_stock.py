"""Write the files that stock versions of Flair save of models with adapters, each in an environment of its own.

``python -m tests.regression.make_stock --environments FOLDER --encoder /opt/models/stock-encoder [--master TREE]``

Environments are made where they are missing. The encoder is written where ``--encoder`` says, a neutral path that the
files name. ``--master`` is the source tree of Flair's development version. The files of one version are stored as one
archive: they hold the same base, which is compressed away. Existing archives are never written again.
"""

from __future__ import annotations

import argparse
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.support import tiny

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "stock"

# PEFT, transformers and accelerate of the time in which each version came out; torch is what runs everywhere.
VERSIONS: dict[str, tuple[str, ...]] = {
    "0.14.0": ("flair==0.14.0", "peft==0.12.0", "transformers==4.44.2", "accelerate==0.34.2", "numpy<2"),
    "0.15.0": ("flair==0.15.0", "peft==0.14.0", "transformers==4.47.1", "accelerate==1.2.1", "numpy<2"),
    "0.15.1": ("flair==0.15.1", "peft==0.14.0", "transformers==4.49.0", "accelerate==1.4.0", "numpy<2"),
    "master": ("peft==0.17.1", "transformers==4.57.6", "numpy<2"),
}
_TORCH = "torch==2.13.0"


def write_encoder(folder: Path) -> None:
    """Write a BERT of one layer and 16 dimensions, with the tokenizer of the tests' tiny BERT."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = AutoTokenizer.from_pretrained(tiny.build("bert", Path(temporary, "bert")))
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=tiny.MAX_LENGTH,
            initializer_range=0.2,
        )
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        BertModel(config).save_pretrained(folder)


def environment(version: str, folder: Path, master: Path | None) -> Path:
    """Return the Python of a version's environment, which is made if it is missing."""
    python = folder / version / "bin" / "python"
    if not python.exists():
        venv.create(folder / version, with_pip=True)
        wanted = [*VERSIONS[version], *([str(master)] if version == "master" else [])]
        subprocess.run([python, "-m", "pip", "install", "--quiet", _TORCH, *wanted], check=True)
    return python


def make(version: str, python: Path, encoder: Path) -> None:
    """Write the archive of one version."""
    with tempfile.TemporaryDirectory() as temporary:
        inside = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [python, "-m", "tests.regression.stock_process", encoder, temporary]
        subprocess.run(command, check=True, env=inside, cwd=temporary)
        FOLDER.mkdir(exist_ok=True)
        pack({"": Path(temporary), "encoder/": encoder}, FOLDER / f"{version}.tar.xz")


def pack(folders: Mapping[str, Path], archive_path: Path) -> None:
    """Write an archive of what lies in folders, each behind a prefix, that does not tell who wrote it, or when."""
    with (
        lzma.open(archive_path, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for prefix, folder in folders.items():
            for path in sorted(folder.iterdir()):
                archive.add(path, f"{prefix}{path.name}", filter=_anonymous)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
    return info


def main() -> None:
    """Make what is missing, two versions at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--master", type=Path)
    arguments = parser.parse_args()
    if not (arguments.encoder / "config.json").exists():
        write_encoder(arguments.encoder)
    wanted = [v for v in VERSIONS if not (FOLDER / f"{v}.tar.xz").exists() and (v != "master" or arguments.master)]
    pythons = {version: environment(version, arguments.environments, arguments.master) for version in wanted}
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(make, version, python, arguments.encoder) for version, python in pythons.items()]
    for each in made:
        each.result()
    sys.stderr.write(f"{FOLDER}: {sum(path.stat().st_size for path in FOLDER.iterdir())} bytes\n")


if __name__ == "__main__":
    main()
