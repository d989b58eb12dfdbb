"""Adapters that older versions of PEFT wrote: they give what they gave there, or are refused with the version."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flair_peft import PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError, AdapterMismatchError, FlairPeftError, UnsupportedMethodError
from tests.regression.make_older_peft import ARCHIVE, INPUT_IDS, VERSIONS

# What the installed PEFT cannot compute as it was, and what the message says of it.
REFUSED: dict[tuple[str, str], tuple[type[FlairPeftError], str]] = {
    ("0.13.2", "oft-rank"): (UnsupportedMethodError, "PEFT 0.15 and before"),
    ("0.15.2", "oft"): (UnsupportedMethodError, "PEFT 0.15 and before"),
    ("0.17.1", "oft"): (UnsupportedMethodError, "PEFT 0.16 and 0.17"),
    ("0.19.1", "adamss"): (UnsupportedMethodError, "PEFT 0.19"),
    ("0.13.2", "lora-biases"): (AdapterMismatchError, "PEFT 0.7 to 0.20"),
    ("0.13.2", "patterns-crossed"): (AdapterConfigError, "those before 0.15"),
    ("0.14.0", "patterns-either"): (AdapterConfigError, "those before 0.15"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B"),
]
CASES = [(version, name) for version, names in VERSIONS.items() for name in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the base and all adapters."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def difference(adapter: Path, base: Path) -> float:
    """Return how far the hidden states are from those of the process that wrote the adapter."""
    embeddings = PeftTransformerEmbeddings.from_adapter(str(adapter), base_model=str(base), layers="all")
    ids, expected = torch.tensor(INPUT_IDS), load_file(adapter / "reference.safetensors")
    with torch.no_grad():
        states = embeddings.hidden_states(ids, attention_mask=torch.ones_like(ids))
    return max(float((state - expected[str(i)]).abs().max()) for i, state in enumerate(states))


@pytest.mark.parametrize(("version", "name"), CASES, ids=map("--".join, CASES))
def test_older_peft_adapter_gives_what_it_gave_there(version: str, name: str, files: Path) -> None:
    """An adapter of an older PEFT gives the hidden states of its time, or the error names the versions."""
    adapter = files / f"{version}--{name}"
    if (version, name) not in REFUSED:
        assert difference(adapter, files / "base") < 2e-6
        return
    error, message = REFUSED[version, name]
    with pytest.raises(error, match=message):
        difference(adapter, files / "base")


def copy(files: Path, name: str, folder: Path, **settings: Any) -> Path:
    """Return a copy of an adapter with other settings."""
    adapter = shutil.copytree(files / name, folder / name)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return adapter


def test_older_peft_lokr_of_a_version_that_scales_keeps_its_alpha(files: Path, tmp_path: Path) -> None:
    """Only configs without the field that came with the scale are read as unscaled."""
    adapter = copy(files, "0.14.0--lokr", tmp_path, alpha=12)
    assert difference(adapter, files / "base") > 1e-2


def test_older_peft_buffer_with_other_values_is_refused(files: Path, tmp_path: Path) -> None:
    """What the model computes itself may stand in a file, but not with other values."""
    adapter = copy(files, "0.12.0--boft", tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("boft_P"))
    save_file({**tensors, name: 1 - tensors[name]}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match="boft_P"):
        difference(adapter, files / "base")


def test_older_peft_state_with_a_computed_buffer_loads(files: Path) -> None:
    """A state dict of a whole model may hold the buffer, too; everything else that is left over is refused."""
    made = PeftTransformerEmbeddings.from_adapter(str(files / "0.12.0--boft"), base_model=str(files / "base"))
    buffers = {f"model.{name}": value for name, value in made.model.named_buffers() if name.endswith("boft_P")}
    state = {name: value.clone() for name, value in made.state_dict().items()}
    made.load_state_dict({**state, **buffers})
    with pytest.raises(FlairPeftError, match="boft_P"):
        made.load_state_dict({**state, **{name: value + 1 for name, value in buffers.items()}})


@pytest.mark.parametrize("settings", [{"r": None}, {"rank_pattern": 3}, {"alpha": "x", "rank_pattern": {"query": "y"}}])
def test_older_peft_config_without_sense_is_refused(settings: dict[str, Any], files: Path, tmp_path: Path) -> None:
    """Settings that no PEFT wrote end in an error that names the file or the settings."""
    adapter = copy(files, "0.13.2--lokr", tmp_path, **settings)
    with pytest.raises(FlairPeftError):
        difference(adapter, files / "base")
