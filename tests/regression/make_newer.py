"""Write bases and their hidden states as a newer transformers has them, in an environment with that version.

``PYTHONPATH=. PYTHON-OF-THAT-ENVIRONMENT -m tests.regression.make_newer``

Weights are multiples of 1/16: the archive of all bases is small. An existing archive is never written again.
"""

from __future__ import annotations

import json
import lzma
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.regression.newer_bases import BASES, LENGTH, VOCABULARY, Settings

FOLDER = Path(__file__).parent / "newer"


def inputs() -> dict[str, torch.Tensor]:
    """Return two sequences, the second one shorter."""
    ids = torch.randint(6, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 4 :] = 0
    return {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}


def build(name: str, settings: Settings) -> transformers.PreTrainedModel:
    """Return a model in whose weights every difference of settings shows."""
    model_class = getattr(transformers, name if "For" in name else f"{name}Model")
    model = model_class(model_class.config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.randint(-8, 9, parameter.shape, generator=generator) / 16
            parameter.copy_(steps if parameter.dim() > 1 else 1 + steps / 2)
    return model


def states(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Return all hidden states, and the last one as the model calls it."""
    bare = model.base_model
    encoder = bare.get_encoder() if model.config.is_encoder_decoder else bare
    with torch.no_grad():
        output = encoder(**inputs(), output_hidden_states=True, return_dict=True)
    every = [state.tolist() for state in output.hidden_states]
    return {"hidden_states": every, "last_hidden_state": output.last_hidden_state.tolist()}


def main() -> None:
    """Write the archive of the version that runs."""
    path = FOLDER / f"{transformers.__version__}.tar.xz"
    FOLDER.mkdir(exist_ok=True)
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as temporary:
        record = {}
        for name, (model_name, settings) in BASES.items():
            model = build(model_name, settings)
            model.save_pretrained(Path(temporary, name))
            # as a user of that version gets it from the files
            record[name] = states(type(model).from_pretrained(Path(temporary, name)).eval())
        Path(temporary, "record.json").write_text(json.dumps(_rounded(record)), encoding="utf-8")
        with (
            lzma.open(path, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for found in sorted(Path(temporary).iterdir()):
                archive.add(found, found.name, filter=_anonymous)
    sys.stderr.write(f"{path}: {path.stat().st_size} bytes\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else round(value, 5)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
    return info


if __name__ == "__main__":
    main()
