"""Bases that accelerate spreads over devices and the disk: they train, save, load and predict like whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flair
import pytest
import torch
from flair.data import Sentence
from flair.models import TextClassifier
from flair.trainers import ModelTrainer
from peft import IA3Config, LNTuningConfig, PeftConfig, PrefixTuningConfig
from peft.utils.integrations import get_layer_device_map
from safetensors.torch import load_file

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.errors import AdapterConfigError, StateMismatchError, UnsupportedMethodError
from tests.support.configs import lora
from tests.support.methods import perturb_
from tests.support.predictions import TEXTS, labels_of
from tests.support.zoo import sentence_corpus

ON_DISK = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "disk"}
TARGETS = ["query", "value", "intermediate.dense"]


def make(base: str, config: PeftConfig | None = None, folder: Path | None = None, **options: Any) -> TextClassifier:
    torch.manual_seed(0)
    if folder is not None:
        options["transformers_model_kwargs"] = {"device_map": ON_DISK, "offload_folder": str(folder)}
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config or lora(target_modules=TARGETS), **options)
    dictionary = sentence_corpus().make_label_dictionary("sentiment", add_unk=False)
    model = TextClassifier(embeddings, label_type="sentiment", label_dictionary=dictionary)
    perturb_(model, seed=1)
    return model.eval()


def predicted(model: TextClassifier) -> list[Any]:
    sentences = [Sentence(text) for text in TEXTS]
    model.predict(sentences, return_probabilities_for_all_classes=True)
    return labels_of(sentences)


def offloaded(model: TextClassifier) -> set[str]:
    return {name for name, parameter in model.embeddings.model.named_parameters() if parameter.is_meta}


IA3 = IA3Config(target_modules=TARGETS, feedforward_modules=["intermediate.dense"])


@pytest.mark.parametrize(
    "config",
    [lora(target_modules=TARGETS), lora(target_modules=TARGETS, use_rslora=True), IA3],
    ids=["lora", "rslora", "ia3"],
)
def test_dispatched_base_predicts_saves_and_loads_as_a_whole_one_does(
    config: PeftConfig, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Bit-equal, and the checkpoint is loaded whole or spread, whoever wrote it."""
    whole = make(base("bert"), config)
    expected = predicted(whole)
    model = make(base("bert"), config, tmp_path / "offload")
    assert len(offloaded(model)) >= 16
    assert predicted(model) == expected
    flair_peft.save_pretrained(model, tmp_path / "spread")
    flair_peft.save_pretrained(whole, tmp_path / "whole")
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("spread", "whole")]
    assert all(torch.equal(written[0][name], tensor) for name, tensor in written[1].items())
    for name in ("spread", "whole"):
        flair_peft.verify(tmp_path / name)
        assert predicted(flair_peft.from_pretrained(tmp_path / name)) == expected
        placed = flair_peft.from_pretrained(
            tmp_path / name, device_map=ON_DISK, offload_folder=tmp_path / f"{name}-offload"
        )
        assert offloaded(placed) == offloaded(model)
        assert predicted(placed) == expected


def test_dispatched_base_survives_the_moves_of_flair(base: Callable[[str], str], tmp_path: Path) -> None:
    """Flair moves models to its device whenever it trains, loads or evaluates; what is offloaded cannot be moved."""
    model = make(base("bert"), folder=tmp_path / "offload")
    expected = predicted(model)
    model.to(flair.device)
    model.eval()
    assert predicted(model) == expected
    assert model.evaluate(list(sentence_corpus().test), "sentiment").main_score >= 0


def test_dispatched_base_trains_as_a_whole_one_does(base: Callable[[str], str], tmp_path: Path) -> None:
    """The same weights after an epoch of Flair's trainer, and the best model comes back."""
    models = [make(base("bert")), make(base("bert"), folder=tmp_path / "offload")]
    for index, model in enumerate(models):
        torch.manual_seed(2)
        ModelTrainer(model, sentence_corpus()).fine_tune(tmp_path / str(index), max_epochs=1, mini_batch_size=4)
    states = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    loaded = TextClassifier.load(tmp_path / "1" / "final-model.pt")
    assert predicted(loaded) == predicted(models[1].eval()) == predicted(models[0].eval())


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(
    "config",
    [
        LNTuningConfig(target_modules=["LayerNorm"]),
        lora(target_modules=TARGETS, modules_to_save=["pooler"]),
        lora(target_modules=TARGETS, bias="lora_only"),
    ],
    ids=["ln tuning", "modules_to_save", "biases"],
)
def test_dispatched_base_methods_that_read_or_train_what_is_offloaded_are_refused(
    config: PeftConfig, base: Callable[[str], str], tmp_path: Path
) -> None:
    """They would start from nothing, and learn nothing."""
    with pytest.raises(AdapterConfigError, match="weights that accelerate offloads, or start from such"):
        make(base("bert"), config, tmp_path / "offload")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_dispatched_base_methods_that_compute_with_its_weights_are_refused(
    options: dict[str, Any], base: Callable[[str], str], tmp_path: Path
) -> None:
    """In a new model and in a loaded one."""
    config = lora(target_modules=TARGETS, **options)
    with pytest.raises(UnsupportedMethodError, match="reads weights of the base that are offloaded"):
        make(base("bert"), config, tmp_path / "offload")
    flair_peft.save_pretrained(make(base("bert"), config), tmp_path / "model")
    with pytest.raises(UnsupportedMethodError, match="reads weights of the base that are offloaded"):
        flair_peft.from_pretrained(tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload")


def test_dispatched_base_with_offloaded_input_embeddings_needs_no_separator(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A row cannot be added to what is not in memory."""
    kwargs = {"device_map": {**ON_DISK, "embeddings": "disk"}, "offload_folder": str(tmp_path)}
    with pytest.raises(AdapterConfigError, match="Keep the embeddings on a device"):
        make(base("bert"), transformers_model_kwargs=kwargs)


def test_dispatched_base_is_neither_merged_nor_stored_whole_nor_shared(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Each with its reason."""
    model = make(base("bert"), folder=tmp_path / "offload")
    with pytest.raises(AdapterConfigError, match="spread over devices, and what is offloaded cannot be written"):
        flair_peft.merge(model)
    with pytest.raises(AdapterConfigError, match="quantised or spread over devices, and files and pickles"):
        flair_peft.save_pretrained(model, tmp_path / "whole", save_base=True)
    kwargs = {"device_map": ON_DISK, "offload_folder": str(tmp_path / "shared")}
    with pytest.raises(AdapterConfigError, match="quantised or spread over devices"):
        flair_peft.SharedBase(base("bert"), transformers_model_kwargs=kwargs)


def test_dispatched_base_refuses_a_file_that_holds_what_is_offloaded(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A base that was trained on is in the file; torch would leave it out with a warning."""
    whole = make(base("bert"))
    weight = dict(whole.embeddings.base_model.named_parameters())["encoder.layer.1.output.LayerNorm.weight"]
    weight.requires_grad_(True)
    weight.data.add_(1.0)
    flair_peft.save_pretrained(whole, tmp_path / "model")
    with pytest.raises(StateMismatchError, match="the device_map offloads them"):
        flair_peft.from_pretrained(tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload")


def test_prefix_on_a_base_that_is_mapped_to_the_cpu_is_that_of_any_base(base: Callable[[str], str]) -> None:
    """PEFT looks for a GPU in the map (peft#3619); where the disk is in it too, the prefix is refused with that."""
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    mapped = make(base("bert"), config, transformers_model_kwargs={"device_map": "cpu"})
    assert predicted(mapped) == predicted(make(base("bert"), config))
    with pytest.raises(StopIteration):  # once this fails, no map has to go and no prefix has to be refused
        get_layer_device_map(SimpleNamespace(hf_device_map={"": "cpu"}, config=SimpleNamespace(num_hidden_layers=2)))


def test_prefix_on_a_base_that_is_partly_on_the_disk_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """With the reason, before anything is trained."""
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    with pytest.raises(UnsupportedMethodError, match=r"PEFT puts a prefix on a GPU alone .*peft#3619"):
        make(base("bert"), config, folder=tmp_path / "offload")


def test_load_refuses_options_that_it_does_not_have(base: Callable[[str], str], tmp_path: Path) -> None:
    """A slip of the pen is not taken for a placement."""
    flair_peft.save_pretrained(make(base("bert")), tmp_path / "model")
    with pytest.raises(TypeError, match="Cannot load with 'device_maps'"):
        TextClassifier.load(tmp_path / "model", device_maps="auto")
