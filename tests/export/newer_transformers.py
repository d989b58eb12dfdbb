"""Models that are exported here, read where only a newer transformers is installed.

``python -m tests.export.newer_transformers PYTHON`` writes models of each architecture for transformers, and has the
interpreter of another environment, with transformers 5, PEFT and torch, score the same words. ``nox -s transformers5``
makes that environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import flair_peft
from flair_peft.export.linear_head import live_scores
from tests.support import tiny
from tests.support.configs import lora
from tests.support.models import CLASSIFIER, TAGGER, make

READER = Path(__file__).with_name("reader.py")
ARCHITECTURES = (
    *("bert", "roberta", "xlm-roberta", "deberta-v2", "electra", "distilbert", "albert", "mpnet"),
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "t5"),
)
WORDS = [text.split() for text in tiny.CORPUS[:4]]
TARGETS = {**tiny.ATTENTION_TARGETS, **tiny.MORE_TARGETS}


def exported(folder: Path) -> Iterator[tuple[Path, dict[str, Any], torch.Tensor]]:
    """Yield the folder of each model, how it is read, and its scores here: (rows, labels)."""
    for architecture in ARCHITECTURES:
        base = str(tiny.build(architecture, folder / architecture))
        config = lora(target_modules=TARGETS[architecture], fan_in_fan_out=architecture == "gpt2")
        for entry in (TAGGER,) if architecture == "t5" else (TAGGER, CLASSIFIER):
            model: Any = make(entry, base, config).eval()
            if entry is CLASSIFIER and architecture in tiny.DECODERS:
                torch.nn.init.zeros_(model.decoder.bias)
            for is_merged in (True, False):
                place = folder / f"{architecture}-{type(model).__name__}-{is_merged}"
                flair_peft.to_transformers(model, place, merged=is_merged)
                how = {"folder": str(place), "reads_words": entry is TAGGER, "is_merged": is_merged, "words": WORDS}
                yield place, how, live_scores(model, WORDS)


def main() -> None:
    """Export, have the other interpreter read, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="interpreter of an environment with a newer transformers")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = list(exported(Path(folder)))
        asked = json.dumps([how for _, how, _ in found])
        command = [chosen.python, "-I", str(READER)]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        answer = json.loads(done.stdout.splitlines()[-1])
    assert int(answer["transformers"].split(".")[0]) >= 5, answer["transformers"]
    apart = {
        place.name: float((torch.tensor(scores) - expected).norm() / expected.norm())
        for (place, _, expected), scores in zip(found, answer["scores"], strict=True)
    }
    assert max(apart.values()) < 1e-4, {name: distance for name, distance in apart.items() if not distance < 1e-4}
    print(f"{len(found)} models score the same in transformers {answer['transformers']}")


if __name__ == "__main__":
    main()
