"""Write adapters as older versions of PEFT do, with the hidden states that they give there.

``python -m tests.regression.make_older_peft --packages FOLDER``

Each version is installed alone into a folder of its own, in front of the libraries that are here. All adapters have one
base, and lie with it in one archive.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
ARCHIVE = Path(__file__).parent / "older_peft.tar.xz"
INPUT_IDS = ((2, 5, 9, 17, 11, 3),)

_TARGETS = ["query", "value"]
_LORA = {"r": 4, "lora_alpha": 12, "target_modules": _TARGETS}
_LOKR = {"r": 4, "alpha": 6, "target_modules": _TARGETS}
_OFT = {"r": 0, "oft_block_size": 4, "target_modules": _TARGETS}
_BONE = {"r": 4, "target_modules": _TARGETS}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", _LORA),
    "lora-embedding": ("LoraConfig", {**_LORA, "target_modules": ["query", "word_embeddings"]}),
    "lora-biases": ("LoraConfig", {**_LORA, "bias": "lora_only"}),
    "dora": ("LoraConfig", {**_LORA, "use_dora": True}),
    "patterns": ("LoraConfig", {**_LORA, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 5}}),
    "patterns-crossed": ("LoraConfig", {**_LORA, "rank_pattern": {"query": 2}, "alpha_pattern": {"self.query": 5}}),
    "patterns-either": ("LoraConfig", {**_LORA, "alpha_pattern": {"nothing|query": 5}}),
    "loha": ("LoHaConfig", {**_LOKR, "rank_pattern": {"query": 2}}),
    "lokr": ("LoKrConfig", _LOKR),
    "lokr-both": ("LoKrConfig", {**_LOKR, "r": 2, "decompose_both": True, "decompose_factor": 4}),
    "lokr-patterns": ("LoKrConfig", {**_LOKR, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 5}}),
    "oft-rank": ("OFTConfig", {"r": 4, "target_modules": _TARGETS}),
    "oft": ("OFTConfig", _OFT),
    "oft-exact": ("OFTConfig", {**_OFT, "use_cayley_neumann": False}),
    "oft-two-terms": ("OFTConfig", {**_OFT, "num_cayley_neumann_terms": 2}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": _TARGETS}),
    "bone": ("BoneConfig", _BONE),
    "bone-uneven": ("BoneConfig", {**_BONE, "r": 3}),
    "bone-bat": ("BoneConfig", {**_BONE, "init_weights": "bat"}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": _TARGETS, "save_projection": False}),
    "adamss": ("AdamssConfig", {"r": 4, "target_modules": _TARGETS}),
}

# Of each version, what it computed, stored or named in another way than the next one; and what has not changed.
VERSIONS: dict[str, tuple[str, ...]] = {
    "0.4.0": ("lora", "lora-embedding"),
    "0.6.2": ("lokr", "loha"),
    "0.10.0": ("dora",),
    "0.12.0": ("boft", "vera"),
    "0.13.2": ("lokr", "lokr-both", "lokr-patterns", "oft-rank", "patterns", "patterns-crossed", "lora-biases"),
    "0.14.0": ("bone", "lokr", "patterns-either", "patterns-crossed"),
    "0.15.2": ("oft", "patterns-either"),
    "0.17.1": ("oft", "oft-exact", "oft-two-terms"),
    "0.18.1": ("oft", "bone", "bone-uneven", "bone-bat"),
    "0.19.1": ("adamss",),
}


def write(name: str, base: str, folder: Path) -> None:
    """Write an adapter with the PEFT that is installed, and what it gives."""
    kind, settings = METHODS[name]
    torch.manual_seed(1)
    model = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=3).eval()
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="TOKEN_CLS", **settings)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad and "classifier" not in parameter_name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        ids = torch.tensor(INPUT_IDS)
        states = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    adapted.save_pretrained(folder)
    save_file({str(i): state.contiguous().clone() for i, state in enumerate(states)}, folder / "reference.safetensors")
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Write the archive."""
    from tests.regression.make_stock import pack, write_encoder

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    packages = parser.parse_args().packages.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        write_encoder(Path(temporary, "base"))
        for version in VERSIONS:
            target = packages / version
            if not target.exists():
                wanted = ["--no-deps", "--target", target, f"peft=={version}"]
                subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
            inside = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "tests.regression.make_older_peft", version]
            subprocess.run(command, check=True, env=inside, cwd=temporary)
        pack({"": Path(temporary)}, ARCHIVE)


def inside(version: str) -> None:
    """Write the adapters of the version that this process found."""
    assert peft.__version__ == version
    for name in VERSIONS[version]:
        write(name, "base", Path(f"{version}--{name}"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] and sys.argv[1] in VERSIONS:
        inside(sys.argv[1])
    else:
        main()
