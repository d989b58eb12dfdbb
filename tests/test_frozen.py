"""One frozen base under many models: the same storage, and no way from one model's writes to another."""

from __future__ import annotations

import copy
import gc
import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Sentence
from peft import LNTuningConfig, LoraConfig
from transformers import AutoConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, frozen
from flair_peft.embeddings import PeftTransformerEmbeddings
from flair_peft.frozen import FrozenBase
from flair_peft.refusals import REFUSED_METHODS
from flair_peft.sources import BaseRecord
from tests import methods
from tests.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS
from tests.zoo import ZOO


def make(base: str, config: Any = None, **options: Any) -> PeftTransformerDocumentEmbeddings:
    config = config or LoraConfig(r=4, lora_alpha=16, init_lora_weights=False)
    return PeftTransformerDocumentEmbeddings(base, peft_config=config, **options)


def pointers(embeddings: PeftTransformerEmbeddings) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in embeddings.model.named_parameters() if not p.requires_grad}


def vector(embeddings: PeftTransformerEmbeddings) -> torch.Tensor:
    sentence = Sentence("Berlin is large .")
    embeddings.embed(sentence)
    return sentence.get_embedding().detach().clone()


def test_bases_of_two_models_share_every_frozen_tensor(base: Callable[[str], str]) -> None:
    """The second model on a base adds its adapter and nothing else, the separator's row included."""
    first, second = make(base("bert")), make(base("bert"), LoraConfig(r=2, lora_alpha=8, target_modules=["dense"]))
    frozen_first = {p.data_ptr() for p in first.base_model.parameters() if not p.requires_grad}
    frozen_second = {p.data_ptr() for p in second.base_model.parameters() if not p.requires_grad}
    assert frozen_first == frozen_second
    assert not torch.equal(vector(first), vector(second))


def test_bases_that_differ_in_source_dtype_or_settings_share_nothing(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Another dtype, another attention, another copy of the files: another base."""
    moved = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    models = [
        make(base("bert")),
        make(base("bert"), dtype="bfloat16"),
        make(base("bert"), transformers_model_kwargs={"attn_implementation": "eager"}),
        make(str(moved)),
    ]
    addresses = [set(pointers(model).values()) for model in models]
    assert all(not one & other for i, one in enumerate(addresses) for other in addresses[i + 1 :])


def test_base_whose_files_changed_is_read_again(base: Callable[[str], str], tmp_path: Path) -> None:
    """A base is recognised by the state of its files, not by its name alone."""
    moved = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    first = make(str(moved))
    shutil.copy(Path(base("bert")) / "model.safetensors", moved / "model.safetensors.new")
    (moved / "model.safetensors.new").replace(moved / "model.safetensors")
    assert not set(pointers(first).values()) & set(pointers(make(str(moved))).values())


def test_base_is_forgotten_with_its_last_model(base: Callable[[str], str], tmp_path: Path) -> None:
    """The cache keeps no base alive."""
    moved = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    model = make(str(moved))
    assert any(str(moved) in str(key) for key in list(frozen._cache))
    del model
    gc.collect()
    assert not any(str(moved) in str(key) for key in list(frozen._cache))


def write_state(embeddings: PeftTransformerEmbeddings) -> None:
    state = {name: tensor.clone().add_(1) for name, tensor in embeddings.state_dict().items()}
    embeddings.load_state_dict(state)


def write_by_merging(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.merge_adapter()


def write_by_merging_and_unloading(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.merge_and_unload()


def convert(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.to(torch.bfloat16)


def train_base(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.requires_grad_(True)
    embeddings.train()
    loss = embeddings.hidden_states(torch.tensor([[1, 2, 3]]))[0].sum()
    loss.backward()
    torch.optim.SGD(embeddings.parameters(), lr=1.0).step()


def resize(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.resize_token_embeddings(400)
    embeddings.base_model.get_input_embeddings().weight.data.add_(1)


@pytest.mark.parametrize(
    "write", [write_state, write_by_merging, write_by_merging_and_unloading, convert, train_base, resize]
)
def test_write_of_one_model_never_reaches_another(
    base: Callable[[str], str], write: Callable[[PeftTransformerEmbeddings], None]
) -> None:
    """Whatever one model does to its weights, one that stands on the same base gives what it gave."""
    first, second = make(base("bert")), make(base("bert"))
    assert set(pointers(first).values()) & set(pointers(second).values())
    before, own = vector(second), vector(first)
    write(first)
    assert torch.equal(vector(second), before)
    assert torch.equal(vector(make(base("bert"), LoraConfig(r=2))), vector(make(base("bert"), LoraConfig(r=2))))
    assert second._frozen is not None
    assert second._frozen.fingerprint == frozen.fingerprint.sampled(second._frozen._parent.own_weights())
    assert write in (write_by_merging, write_by_merging_and_unloading) or not torch.equal(vector(first), own)


ALL = {**METHODS, **LORA_VARIANTS, **OTHER_VARIANTS}
WORKING = [
    name for name, method in ALL.items() if method.works and method.before is None and name not in REFUSED_METHODS
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what PEFT says of each method is asserted in test_methods.py
@pytest.mark.parametrize("name", WORKING)
def test_adding_and_training_an_adapter_leaves_the_shared_base_alone(base: Callable[[str], str], name: str) -> None:
    """No method, whatever it rewrites or trains, changes the base under another model."""
    method = ALL[name]
    kind = "encoder" if "encoder" in method.works else "decoder"
    witness = make(base({"encoder": "bert", "decoder": "llama"}[kind]))
    assert witness._frozen is not None
    before = copy.deepcopy(witness._frozen._model.state_dict())
    embeddings = make(base({"encoder": "bert", "decoder": "llama"}[kind]), method.config(kind))
    methods.perturb_(embeddings.model, seed=1)
    embeddings.train()
    states = embeddings.hidden_states(torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.ones(1, 4))
    states[0].sum().backward()
    torch.optim.SGD([p for p in embeddings.parameters() if p.requires_grad], lr=1.0).step()
    if kind in method.mergeable and hasattr(embeddings.model, "merge_adapter"):
        embeddings.model.merge_adapter()
    after = witness._frozen._model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_trained_base_parameters_get_storage_of_their_own(base: Callable[[str], str]) -> None:
    """What will be trained is copied first; what stays frozen is shared."""
    first = make(base("bert"))
    second = make(base("bert"), LoraConfig(r=2, bias="all", init_lora_weights=False))
    third = make(base("bert"), LNTuningConfig(target_modules=["LayerNorm"]))
    shared = set(pointers(first).values())
    for embeddings in (second, third):
        trained = {p.data_ptr() for p in embeddings.model.parameters() if p.requires_grad}
        assert trained
        assert not trained & shared
        assert set(pointers(embeddings).values()) & shared


def test_copies_of_embeddings_are_independent(base: Callable[[str], str]) -> None:
    """A deep copy, or a pickled one, shares nothing with its original."""
    import pickle

    first = make(base("bert"))
    for clone in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(vector(clone), vector(first))
        clone.model.requires_grad_(True)
        with torch.no_grad():
            for parameter in clone.model.parameters():
                parameter.add_(1)
        assert not torch.equal(vector(clone), vector(first))


def test_peft_model_of_shared_embeddings_can_be_pickled(base: Callable[[str], str]) -> None:
    """torch.save of the PEFT model alone works, and what comes back merges."""
    first = make(base("bert"))
    stream = io.BytesIO()
    torch.save(first.model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    loaded.merge_adapter()
    assert torch.equal(vector(first), vector(first))


def test_threads_that_ask_for_one_base_get_one_base(base: Callable[[str], str], tmp_path: Path) -> None:
    """Eight threads that build models at once end on one storage and predict what a lone one predicts."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    made: list[PeftTransformerDocumentEmbeddings] = []

    def build() -> None:
        made.append(make(moved, LoraConfig(r=2)))

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len({embeddings.base_model.get_input_embeddings().weight.data_ptr() for embeddings in made}) == 1


def found(name: str, **kwargs: Any) -> FrozenBase:
    config = AutoConfig.from_pretrained(name, output_hidden_states=True)
    return frozen.find(BaseRecord(name), config, dtype=None, kwargs=kwargs)


@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2", "xlnet", "albert", "modernbert", "llama", "electra"])
def test_rows_are_appended_as_transformers_would(base: Callable[[str], str], architecture: str) -> None:
    """A base with rows appended is what resizing gives, with the mean of all rows in the new ones."""
    plain = found(base(architecture))
    longer = plain.with_rows(3).copy()
    resized = plain.private_copy()
    resized.resize_token_embeddings(plain.own_rows + 3, mean_resizing=False)
    matrix = resized.get_input_embeddings().weight.data
    matrix[plain.own_rows :] = matrix[: plain.own_rows].mean(dim=0)
    expected, actual = resized.state_dict(), longer.state_dict()
    assert list(expected) == list(actual)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert longer.config.vocab_size == resized.config.vocab_size
    ids = torch.tensor([[1, plain.own_rows + 2]])
    assert torch.equal(longer(ids)[0], resized(ids)[0])


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether the memory of a tensor is that of a file, as Linux tells."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.endswith(str(path.resolve()))
    return False


def test_appended_rows_leave_the_matrix_in_its_file(base: Callable[[str], str]) -> None:
    """The longer matrix is mapped from the file, writing to it changes neither the file nor the other tensors."""
    content = (Path(base("bert")) / "model.safetensors").read_bytes()
    plain = found(base("bert"))
    before = {name: tensor.clone() for name, tensor in plain.own_weights().items()}
    longer = plain.with_rows(torch.full((2, 32), 7.0))
    matrix = longer._model.get_input_embeddings().weight
    assert is_mapped(matrix, Path(base("bert")) / "model.safetensors")
    matrix.data.add_(1)
    assert (Path(base("bert")) / "model.safetensors").read_bytes() == content
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.own_weights().items())


def test_names_of_input_embeddings_are_all_that_are_tied(base: Callable[[str], str]) -> None:
    """A matrix that a model holds under two names is one matrix."""
    assert found(base("t5")).names_of_input_embeddings() == {"shared.weight", "encoder.embed_tokens.weight"}


def damage_other_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapted.safetensors")
    content = bytearray((folder / "adapted.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "adapted.safetensors").write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", None], ids=["empty", "pointer", "other weights"])
def test_rows_are_appended_to_the_matrix_that_was_loaded_whatever_else_lies_there(
    content: bytes | None, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Files that transformers does not read the weights from are not read for them here either."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    if content is None:
        damage_other_file(folder)
    else:
        (folder / "adapter_model.safetensors").write_bytes(content)
    embeddings = make(str(folder))
    own = found(base("bert"))._model.get_input_embeddings().weight
    assert torch.equal(embeddings.base_model.get_input_embeddings().weight[: len(own)], own)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_load_of_trained_tokens_and_biases_never_reaches_another_model(
    bias: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A method that is computed from the base, filled and merged after loading, leaves the shared base alone."""
    config = LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[5, 6], bias=bias)
    saved = make(base("bert"), config)
    methods.perturb_(saved.model, seed=1, scale=1.0)
    state, params = copy.deepcopy(saved.state_dict()), saved.to_params()
    witness = make(base("bert"))
    before = vector(witness)
    loaded = PeftTransformerDocumentEmbeddings.from_params(params)
    loaded.load_state_dict(state)
    loaded.model.merge_adapter()
    assert torch.equal(vector(witness), before)


def test_storage_moved_to_shared_memory_is_still_known_as_shared(base: Callable[[str], str], tmp_path: Path) -> None:
    """A model sent to another process takes its base with it; what is trained on that base is copied all the same."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    first = make(moved)
    first.share_memory()
    second = make(moved, LoraConfig(r=2, bias="all", target_modules=["query"]))
    shared = {p.data_ptr() for p in first.model.parameters() if not p.requires_grad}
    assert not {p.data_ptr() for p in second.model.parameters() if p.requires_grad} & shared


def test_threads_that_save_and_load_at_once_disturb_nobody(base: Callable[[str], str], tmp_path: Path) -> None:
    """Saving reads the base anew, under switches of transformers that hold for the whole process."""
    model = ZOO["text-classifier"].build(None, lambda **kwargs: make(base("bert"), **kwargs))
    flair_peft.save_pretrained(model, tmp_path / "0")
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            flair_peft.save_pretrained(model, tmp_path / str(number))
            flair_peft.from_pretrained(tmp_path / "0")
        except Exception as error:  # whatever it is, it must not be
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    for number in range(1, 7):
        flair_peft.from_pretrained(tmp_path / str(number))


@pytest.mark.parametrize("options", [{"local_files_only": True}, {"cache_dir": "elsewhere"}], ids=str)
def test_way_to_a_source_is_no_reason_to_share_less(
    options: dict[str, Any], base: Callable[[str], str], tmp_path: Path
) -> None:
    """How a source is reached does not change what is in it."""
    model = ZOO["text-classifier"].build(None, lambda **kwargs: make(base("bert"), **kwargs))
    flair_peft.save_pretrained(model, tmp_path / "x")
    loaded = flair_peft.from_pretrained(tmp_path / "x", **options)
    assert set(pointers(loaded.embeddings).values()) == set(pointers(model.embeddings).values())
