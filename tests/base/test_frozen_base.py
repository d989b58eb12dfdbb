"""One frozen base under many models: the same storage, and no way from one model's writes to another."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flair.data import Sentence
from flair.trainers import ModelTrainer
from peft import LNTuningConfig, LoraConfig
from transformers import AutoConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, SharedBase
from flair_peft.adapter import keys
from flair_peft.base import base_cache, left_out, resolve, transformer
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.primitives import fingerprint, mapped_memory
from flair_peft.primitives.base_record import BaseRecord
from tests.support import methods, tiny
from tests.support.configs import lora
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS, REFUSED_METHODS
from tests.support.places import frozen_places, places_of
from tests.support.selection import few
from tests.support.zoo import ZOO


def make(base: str, config: Any = None, **options: Any) -> PeftTransformerDocumentEmbeddings:
    config = config or lora(target_modules=None)
    return PeftTransformerDocumentEmbeddings(base, peft_config=config, **options)


def pointers(embeddings: PeftTransformerEmbeddings) -> dict[str, Any]:
    return frozen_places(embeddings.model)


def vector(embeddings: PeftTransformerEmbeddings) -> torch.Tensor:
    sentence = Sentence("Berlin is large .")
    embeddings.embed(sentence)
    return sentence.get_embedding().detach().clone()


def test_bases_of_two_models_share_every_frozen_tensor(base: Callable[[str], str]) -> None:
    """The second model on a base adds its adapter and nothing else, the separator's row included."""
    first, second = make(base("bert")), make(base("bert"), LoraConfig(r=2, lora_alpha=8, target_modules=["dense"]))
    assert set(frozen_places(first.base_model).values()) == set(frozen_places(second.base_model).values())
    assert not torch.equal(vector(first), vector(second))


def test_bases_that_differ_in_source_dtype_or_settings_share_nothing(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Another dtype, another copy of the files: other memory. Another attention: another base."""
    moved = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    models = [
        make(base("bert")),
        make(base("bert"), dtype="bfloat16"),
        make(base("bert"), transformers_model_kwargs={"attn_implementation": "eager"}),
        make(str(moved)),
    ]
    assert len({id(model.base_source.frozen.root) for model in models if model.base_source.frozen is not None}) == 4
    places = [set(pointers(models[index]).values()) for index in (0, 1, 3)]
    assert all(not one & other for i, one in enumerate(places) for other in places[i + 1 :])


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
    assert any(str(moved) in str(key) for key in list(base_cache._cache))
    del model
    gc.collect()
    assert not any(str(moved) in str(key) for key in list(base_cache._cache))


WORDS = "embeddings.word_embeddings.weight"
Write = Callable[[PeftTransformerEmbeddings], None]


def weight(embeddings: PeftTransformerEmbeddings, name: str = "encoder.layer.1.output.dense.weight") -> Any:
    return dict(embeddings.model.get_base_model().named_parameters())[name.replace("dense.", "dense.base_layer.")]


def norm(embeddings: PeftTransformerEmbeddings) -> Any:
    return weight(embeddings, "encoder.layer.1.output.LayerNorm.weight")


def initialise_again(embeddings: PeftTransformerEmbeddings) -> None:
    for module in embeddings.base_model.encoder.layer[-1].modules():
        embeddings.base_model._init_weights(module)


def write_state(embeddings: PeftTransformerEmbeddings) -> None:
    state = {name: tensor.clone().add_(1) for name, tensor in embeddings.state_dict().items()}
    embeddings.load_state_dict(state)


def write_into_state(embeddings: PeftTransformerEmbeddings) -> None:
    for tensor in embeddings.state_dict().values():
        tensor.add_(1)


def write_into_state_of_one_module(embeddings: PeftTransformerEmbeddings) -> None:
    layer = embeddings.base_model.encoder.layer
    layer[0].attention.load_state_dict(layer[1].attention.state_dict())


def write_without_gradient(embeddings: PeftTransformerEmbeddings) -> None:
    with torch.no_grad():
        norm(embeddings)[3:5] = 7


def write_in_inference_mode(embeddings: PeftTransformerEmbeddings) -> None:
    with torch.inference_mode():
        norm(embeddings).mul_(2)


def write_rows(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.base_model.get_input_embeddings().weight.data[:150] = 0.5


def write_separator_row(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.base_model.get_input_embeddings().weight.data[-1] = 0.5
    write_rows(embeddings)


def write_by_numpy(embeddings: PeftTransformerEmbeddings) -> None:
    norm(embeddings).detach().view(torch.uint8).numpy()[:] = 63


def write_by_dlpack(embeddings: PeftTransformerEmbeddings) -> None:
    torch.from_dlpack(weight(embeddings).detach()).zero_()


def write_by_storage(embeddings: PeftTransformerEmbeddings) -> None:
    norm(embeddings).untyped_storage().fill_(0)


def write_by_address(embeddings: PeftTransformerEmbeddings) -> None:
    ctypes.memset(norm(embeddings).data_ptr(), 0, norm(embeddings).nbytes)


def write_vector(embeddings: PeftTransformerEmbeddings) -> None:
    parameters = list(embeddings.base_model.parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) * 1.5, parameters)
    parameters[0].data.add_(1)


def initialise(embeddings: PeftTransformerEmbeddings) -> None:
    torch.nn.init.uniform_(weight(embeddings))
    torch.nn.init.ones_(weight(embeddings, "encoder.layer.0.output.dense.bias"))


def replace_data(embeddings: PeftTransformerEmbeddings) -> None:
    norm(embeddings).data = torch.ones_like(norm(embeddings))
    norm(embeddings).data.add_(1)


def set_memory(embeddings: PeftTransformerEmbeddings) -> None:
    with torch.no_grad():
        norm(embeddings).set_(torch.ones(32, dtype=norm(embeddings).dtype))
        norm(embeddings).mul_(2)


def write_after_switching_gradients_on(embeddings: PeftTransformerEmbeddings) -> None:
    norm(embeddings).requires_grad_(True)
    norm(embeddings).data.copy_(torch.zeros(32))


def write_by_pruning(embeddings: PeftTransformerEmbeddings) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(embeddings.base_model.encoder.layer[1].output.LayerNorm, "weight", amount=0.5)
    prune.remove(embeddings.base_model.encoder.layer[1].output.LayerNorm, "weight")


def write_buffers(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.base_model.embeddings.token_type_ids.fill_(1)
    embeddings.base_model.embeddings.position_ids.add_(1)


def write_by_merging(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.merge_adapter()


def write_by_merging_and_unloading(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.merge_and_unload()


def write_by_merging_one_layer(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.base_model.encoder.layer[0].output.dense.merge()


def convert(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.to(torch.float64)
    norm(embeddings).data.add_(1)


def train_base(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.requires_grad_(True)
    embeddings.train()
    loss = embeddings.hidden_states(torch.tensor([[1, 2, 3]]))[0].sum()
    loss.backward()
    torch.optim.SGD(embeddings.parameters(), lr=1.0).step()
    embeddings.eval()


def train_one_layer(embeddings: PeftTransformerEmbeddings) -> None:
    layer = embeddings.base_model.encoder.layer[-1].requires_grad_(True)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    embeddings.hidden_states(torch.tensor([[1, 2, 3]]))[0].pow(2).sum().backward()
    optimiser.step()


def resize(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.resize_token_embeddings(400)
    embeddings.base_model.get_input_embeddings().weight.data.add_(1)


def write_by_another_thread(embeddings: PeftTransformerEmbeddings) -> None:
    thread = threading.Thread(target=write_by_numpy, args=(embeddings,))
    thread.start()
    thread.join()


def write_many_at_once(embeddings: PeftTransformerEmbeddings) -> None:
    torch._foreach_add_([parameter.data for parameter in embeddings.base_model.parameters()], 1.0)


def write_into_an_array_that_is_shared(embeddings: PeftTransformerEmbeddings) -> None:
    values = norm(embeddings).detach().clone()
    array = values.view(torch.uint8).numpy()  # NumPy has no bfloat16
    norm(embeddings).data = torch.from_numpy(array).view(values.dtype)
    embeddings.compare_with_base()
    array[:] = torch.full_like(values, 3).view(torch.uint8).numpy()


def swap(embeddings: PeftTransformerEmbeddings) -> None:
    torch.utils.swap_tensors(norm(embeddings), torch.nn.Parameter(torch.full_like(norm(embeddings), 2)))


def assign(embeddings: PeftTransformerEmbeddings) -> None:
    state = {name: tensor + 1 for name, tensor in embeddings.base_model.state_dict().items()}
    embeddings.base_model.load_state_dict(state, assign=True)
    embeddings.base_model.requires_grad_(False)


def merge_and_take_back(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model.merge_adapter()
    embeddings.model.unmerge_adapter()


def convert_and_take_back(embeddings: PeftTransformerEmbeddings) -> None:
    dtype = embeddings.base_dtype
    embeddings.model.to(torch.float16).to(dtype)


def make_memory_larger(embeddings: PeftTransformerEmbeddings) -> None:
    storage = norm(embeddings).data.clone().untyped_storage()
    norm(embeddings).data = norm(embeddings).data.new_empty(0).set_(storage, 0, norm(embeddings).shape)
    storage.resize_(2 * storage.nbytes())
    storage.fill_(63)


# These change weights only a little, or none of a small model in some dtypes.
LITTLE = [merge_and_take_back, convert_and_take_back]
MERGES = [write_by_merging, write_by_merging_and_unloading, write_by_merging_one_layer]
WRITES = [
    initialise_again,
    write_by_numpy,
    write_rows,
    train_one_layer,
    write_into_state_of_one_module,
    write_state,
    write_into_state,
    write_without_gradient,
    write_in_inference_mode,
    write_separator_row,
    write_by_dlpack,
    write_by_storage,
    write_by_address,
    write_vector,
    initialise,
    replace_data,
    set_memory,
    write_after_switching_gradients_on,
    write_by_pruning,
    write_buffers,
    convert,
    train_base,
    resize,
    write_by_another_thread,
    write_many_at_once,
    write_into_an_array_that_is_shared,
    swap,
    assign,
    make_memory_larger,
    *MERGES,
]
KEPT = {
    "mapped": lambda base: {},
    "in memory": lambda base: {"keep": SharedBase(base)},
    "bfloat16": lambda base: {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("write", few(WRITES, WRITES[:5]), ids=lambda write: write.__name__)
def test_write_of_one_model_never_reaches_another(
    write: Write, kept: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Whatever is written to one model, one that stands on the same base gives what it gave, and so does a new one."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    options = KEPT[kept](moved)
    keep = options.pop("keep", None)
    config = lora(target_modules=["query", "dense"])
    torch.manual_seed(1)
    first, second = make(moved, config, **options), make(moved, config, **options)
    assert set(pointers(first).values()) == set(pointers(second).values())
    before, own = vector(second), vector(first)
    write(first)
    changed = vector(first) if write is not convert else None
    assert torch.equal(vector(second), before)
    third = make(moved, config, **options)
    third.load_state_dict(second.state_dict())
    assert torch.equal(vector(third), before)
    assert second.base_source.frozen is not None
    assert second.base_source.frozen.root.sampled_digests[0] == fingerprint.sampled(
        second.base_source.frozen.root.own_weights()
    )
    assert write in MERGES or changed is None or not torch.equal(changed, own)
    write(second)
    assert changed is None or torch.equal(vector(first), changed)
    assert torch.equal(vector(third), before)
    del keep


def in_file(base: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(base, "model.safetensors"))


@pytest.mark.parametrize("kept", ["mapped", "in memory"])
@pytest.mark.parametrize("write", [*WRITES, *LITTLE], ids=lambda write: write.__name__)
def test_save_after_a_write_leaves_out_only_what_the_file_of_the_base_holds(
    write: Write, kept: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Whoever writes between two saves, and however: what a file leaves out is the base's own, bit by bit."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    options = KEPT[kept](moved)
    model = make(moved, lora(target_modules=["query", "dense"]))
    first = model.compare_with_base()
    write(model)
    again, state, source = model.compare_with_base(), model.model.state_dict(), in_file(moved)
    for key in again.left_out:
        name = keys.base_key(key)
        if name in source:
            tensor = state[key][: len(source[name])] if name == WORDS else state[key]
            assert fingerprint.are_same_bits(tensor, source[name].to(tensor.dtype)), key
    assert write in (*LITTLE, write_buffers, write_by_merging_and_unloading) or again.left_out < first.left_out
    del options


def test_save_reads_no_base_that_is_as_its_files_are(
    base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that a model stands on is its source, and what a save stores of it is the same as after reading."""
    model = make(base("bert"))
    read = resolve.reference(model.base_record, model.base_model, dtype=model.base_dtype, cache_dir=None)
    monkeypatch.setattr(transformer, "find_model", lambda *_, **__: pytest.fail("it was read"))
    found = model.base_source._read(model.base_record, model.base_model)
    assert found is model.base_source.frozen.root
    state = model.model.state_dict()
    stored, expected = model.compare_with_base(), left_out.compare(state, trained(model), read)
    assert stored.record == expected.record
    assert stored.left_out == expected.left_out


def trained(embeddings: PeftTransformerEmbeddings) -> set[str]:
    return {name for name, parameter in embeddings.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("how", ["replaced", "rewritten", "removed"])
def test_save_after_the_files_of_the_base_changed_holds_all_weights(
    how: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A base that is alive is not taken for a source that is another one by now, though size and time are the same."""
    moved = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    model, file = make(str(moved)), moved / "model.safetensors"
    assert model.compare_with_base().left_out
    before, other = file.stat(), tmp_path / "other.safetensors"
    safetensors.torch.save_file({name: t + 1 for name, t in in_file(str(moved)).items()}, other, {"format": "pt"})
    tiny.align_(other)
    if how == "replaced":
        other.replace(file)
    elif how == "rewritten":
        file.write_bytes(other.read_bytes())
    else:
        file.unlink()
    if file.exists():
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not model.compare_with_base().left_out


def test_save_reads_a_base_again_that_somebody_wrote_to(base: Callable[[str], str], tmp_path: Path) -> None:
    """What models are compared with is what is in the files, even if the base in memory is not any more."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    model = make(moved)
    expected, root = model.compare_with_base(), model.base_source.frozen.root
    written = root.own_weights()["encoder.layer.1.output.LayerNorm.weight"]
    ctypes.memset(mapped_memory.address(written), 0, written.nbytes)
    found = model.base_source._read(model.base_record, model.base_model)
    assert found is not None
    assert found is not root
    assert model.compare_with_base().left_out == expected.left_out


def test_base_whose_file_cannot_be_mapped_again_is_shared_and_written_apart_all_the_same(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A base that is alive stays what it is when its file is replaced or removed; where nothing is mapped, too."""
    moved = Path(shutil.copytree(base("bert"), tmp_path / "copy"))
    plain = found(str(moved)).with_rows(torch.full((1, 32), 7.0))
    mapped = plain.copy()
    before = {name: tensor.clone() for name, tensor in mapped.state_dict().items()}
    (moved / "model.safetensors").unlink()
    first, second = plain.copy(), plain.copy()
    assert places_of(dict(first.named_parameters())) == places_of(dict(second.named_parameters()))
    for parameter in [*first.parameters(), *mapped.parameters()]:
        parameter.data.add_(1)
    for state in (second.state_dict(), plain.copy().state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in before)


def test_forward_and_backward_passes_leave_the_memory_shared(base: Callable[[str], str]) -> None:
    """What is copied when it is written to is not copied when it is read, in whatever dtype."""
    keep = SharedBase(base("bert")), SharedBase(base("llama"), dtype="bfloat16")
    for first in (make(base("bert")), make(base("llama"), dtype="bfloat16")):
        before = pointers(first)
        vector(first)
        first.train()
        first.hidden_states(torch.tensor([[1, 2, 3]]))[0].sum().backward()
        first.state_dict()
        copy.deepcopy(first)
        assert pointers(first) == before
    del keep


def test_model_whose_base_was_written_to_is_saved_as_it_is_and_others_as_they_are(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """An untouched file loads beside a model that was changed; what was changed is stored, also by a later save."""
    served, other = (ZOO["text-classifier"].build(None, lambda **k: make(base("bert"), **k)) for _ in range(2))
    served.save(tmp_path / "served.pt")
    before = vector(served.embeddings)
    initialise_again(other.embeddings)
    write_rows(other.embeddings)
    changed = vector(other.embeddings)
    other.save(tmp_path / "other.pt")
    flair_peft.save_pretrained(served, tmp_path / "again")
    write_by_numpy(other.embeddings)
    assert not torch.equal(vector(other.embeddings), changed)
    for loaded in (type(served).load(tmp_path / "served.pt"), flair_peft.from_pretrained(tmp_path / "again")):
        assert torch.equal(vector(loaded.embeddings), before)
    assert torch.equal(vector(type(served).load(tmp_path / "other.pt").embeddings), changed)
    assert torch.equal(vector(served.embeddings), before)


def test_trainer_with_an_unfrozen_layer_leaves_other_models_alone(base: Callable[[str], str], tmp_path: Path) -> None:
    """A user may unfreeze a part of the base and train it: the others stay, and the file holds what was trained."""
    other = make(base("bert"))
    before = vector(other)
    model = ZOO["text-classifier"].build(None, lambda **kwargs: make(base("bert"), **kwargs))
    model.embeddings.base_model.encoder.layer[-1].requires_grad_(True)
    corpus = ZOO["text-classifier"].corpus()
    ModelTrainer(model, corpus).train(tmp_path, max_epochs=1, learning_rate=0.1, mini_batch_size=4)
    assert torch.equal(vector(other), before)
    trained = vector(model.embeddings)
    assert torch.equal(vector(type(model).load(tmp_path / "final-model.pt").embeddings), trained)
    fresh = make(base("bert"))
    assert not torch.equal(norm(fresh), norm(model.embeddings))
    assert torch.equal(norm(fresh), norm(other))


def test_write_to_one_model_of_a_shared_base_shows_in_mixed_batches(base: Callable[[str], str], tmp_path: Path) -> None:
    """Predicting together gives what each model gives alone, whichever was written to, before or between."""
    model = ZOO["text-classifier"].build(None, lambda **kwargs: make(base("bert"), **kwargs))
    flair_peft.save_pretrained(model, tmp_path / "model")
    shared = SharedBase(base("bert"))
    models = [shared.load(tmp_path / "model") for _ in range(3)]
    for changed in (None, 0, 1):
        if changed is not None:
            write_rows(models[changed].embeddings)
        together = {each: [Sentence("Berlin is large .")] for each in models}
        shared.predict(together, return_probabilities_for_all_classes=True)
        for each, (sentence,) in together.items():
            alone = Sentence("Berlin is large .")
            each.predict(alone, return_probabilities_for_all_classes=True)
            scores = [[label.score for label in found.labels] for found in (sentence, alone)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-6)


ALL = {**METHODS, **LORA_VARIANTS, **OTHER_VARIANTS}
WORKING = [
    name for name, method in ALL.items() if method.works and method.before is None and name not in REFUSED_METHODS
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what PEFT says of each method is asserted in test_methods.py
@pytest.mark.parametrize("name", few(WORKING, METHODS.keys() & {*WORKING}))
def test_adding_and_training_an_adapter_leaves_the_shared_base_alone(base: Callable[[str], str], name: str) -> None:
    """No method, whatever it rewrites or trains, changes the base under another model."""
    method = ALL[name]
    kind = "encoder" if "encoder" in method.works else "decoder"
    witness = make(base({"encoder": "bert", "decoder": "llama"}[kind]))
    assert witness.base_source.frozen is not None
    before = copy.deepcopy(witness.base_source.frozen._model.state_dict())
    embeddings = make(base({"encoder": "bert", "decoder": "llama"}[kind]), method.config(kind))
    methods.perturb_(embeddings.model, seed=1)
    embeddings.train()
    states = embeddings.hidden_states(torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.ones(1, 4))
    states[0].sum().backward()
    torch.optim.SGD([p for p in embeddings.parameters() if p.requires_grad], lr=1.0).step()
    if kind in method.mergeable and hasattr(embeddings.model, "merge_adapter"):
        embeddings.model.merge_adapter()
    after = witness.base_source.frozen._model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize(
    "config",
    [lora(target_modules=None, r=2, bias="all"), LNTuningConfig(target_modules=["LayerNorm"])],
    ids=["biases", "norms"],
)
def test_trained_parameters_of_the_base_are_written_to_alone(base: Callable[[str], str], config: Any) -> None:
    """What is trained is its model's own; what stays frozen is shared."""
    first, second = make(base("bert")), make(base("bert"), config)
    before = vector(first)
    methods.perturb_(second.model, seed=1)
    assert torch.equal(vector(first), before)
    assert set(pointers(second).values()) & set(pointers(first).values())


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
    matrices = {str(n): e.base_model.get_input_embeddings().weight for n, e in enumerate(made)}
    assert len(set(places_of(matrices).values())) == 1


def found(name: str, **kwargs: Any) -> FrozenBase:
    config = AutoConfig.from_pretrained(name, output_hidden_states=True)
    return base_cache.find(BaseRecord(name), config, dtype=None, kwargs=kwargs)


@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2", "xlnet", "albert", "modernbert", "llama", "electra"])
def test_rows_are_appended_as_transformers_would(base: Callable[[str], str], architecture: str) -> None:
    """A base with rows appended is what resizing gives, with these rows in the new ones."""
    plain = found(base(architecture))
    new = torch.arange(3.0)[:, None].expand(3, plain._model.get_input_embeddings().weight.shape[1])
    longer = plain.with_rows(new).copy()
    resized = plain.private_copy()
    resized.resize_token_embeddings(plain.own_rows + 3, mean_resizing=False)
    matrix = resized.get_input_embeddings().weight.data
    matrix[plain.own_rows :] = new
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
        if start <= mapped_memory.address(tensor) < stop:
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


def test_model_in_shared_memory_is_not_written_to_by_another(base: Callable[[str], str], tmp_path: Path) -> None:
    """A model sent to another process takes its base with it; what is trained on that base is copied all the same."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    first = make(moved)
    first.share_memory()
    second = make(moved, LoraConfig(r=2, bias="all", target_modules=["query"]))
    before = vector(first)
    methods.perturb_(second.model, seed=1)
    assert torch.equal(vector(first), before)


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


def state_and_draw(make_model: Callable[[], Any]) -> tuple[dict[str, torch.Tensor], float]:
    """Return all tensors of a model that is made after a fixed seed, and the random number that comes next."""
    torch.manual_seed(42)
    model = make_model()
    drawn = torch.rand(1).item()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, drawn


@pytest.mark.parametrize(
    ("architecture", "attention"), [("bert", "eager"), ("bert-mlm", None), ("llama", None), ("bart", None)]
)
def test_same_seed_gives_the_same_weights_whether_or_not_a_base_is_alive(
    architecture: str, attention: str | None, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What is drawn at random shows nothing of the cache: in head, adapter, lacking weights and what comes next."""
    moved = str(shutil.copytree(base(architecture), tmp_path / "copy"))
    options = {"transformers_model_kwargs": {"attn_implementation": attention}} if attention else {}

    def build() -> Any:
        return ZOO["text-classifier"].build(None, lambda **kwargs: make(moved, **kwargs, **options))

    gc.collect()
    (first, drawn), alive = state_and_draw(build), build()
    for state, again in (state_and_draw(build), state_and_draw(build)):
        assert again == drawn
        assert all(torch.equal(state[name], first[name]) for name in first)
    flair_peft.save_pretrained(alive, tmp_path / "model")
    torch.manual_seed(1)
    expected = torch.rand(1).item()
    torch.manual_seed(1)
    flair_peft.save_pretrained(alive, tmp_path / "again")
    assert torch.rand(1).item() == expected
    _, drawn = state_and_draw(lambda: flair_peft.from_pretrained(tmp_path / "model"))
    del alive
    gc.collect()
    assert state_and_draw(lambda: flair_peft.from_pretrained(tmp_path / "model"))[1] == drawn


def test_predicting_together_draws_no_random_number(base: Callable[[str], str], tmp_path: Path) -> None:
    """The module tree of mixed batches is made once, and its making shows in no random number."""
    model = ZOO["text-classifier"].build(None, lambda **kwargs: make(base("bert"), **kwargs))
    flair_peft.save_pretrained(model, tmp_path / "model")
    shared = SharedBase(base("bert"), dtype="bfloat16")
    models = [shared.load(tmp_path / "model") for _ in range(2)]
    torch.manual_seed(1)
    expected = torch.rand(1).item()
    torch.manual_seed(1)
    shared.predict({each: [Sentence("Berlin is large .")] for each in models})
    assert torch.rand(1).item() == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_base_that_a_server_loads_first_serves_and_trains_everywhere(
    mode: Any, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A load inside of inference_mode blocks its base for nobody, and what it gives is trained as any other model."""
    moved = str(shutil.copytree(base("bert"), tmp_path / "copy"))
    model = ZOO["text-classifier"].build(None, lambda **kwargs: make(moved, **kwargs))
    model.save(tmp_path / "model.pt")
    expected = vector(model.embeddings)
    load, corpus = type(model).load, ZOO["text-classifier"].corpus()
    del model
    gc.collect()
    with mode():
        served, fresh = load(tmp_path / "model.pt"), make(moved)
        shared = SharedBase(moved, dtype="float32")
        together = [shared.load(tmp_path / "model.pt") for _ in range(2)]
        assert torch.equal(vector(served.embeddings), expected)
        shared.predict({each: [Sentence("Berlin is large .")] for each in together})
    shared.predict({each: [Sentence("Berlin is large .")] for each in together})
    outside = load(tmp_path / "model.pt")
    outside.save(tmp_path / "again.pt")
    served.save(tmp_path / "again.pt")
    for number, loaded in enumerate((served, outside, together[0])):
        assert torch.equal(vector(loaded.embeddings), expected)
        ModelTrainer(loaded, corpus).train(tmp_path / f"{number}", max_epochs=1, learning_rate=0.1, mini_batch_size=4)
        assert not torch.equal(vector(loaded.embeddings), expected)
    fresh.embed(Sentence("Berlin"))


def save_two(base: str, folder: Path) -> None:
    """Write two models, each as a directory and as a file."""
    for name in ("text-classifier", "sequence-tagger-rnn-crf"):
        model = ZOO[name].build(lambda **k: make_words(base, **k), lambda **k: make(base, **k))
        flair_peft.save_pretrained(model, folder / name)
        model.save(folder / f"{name}.pt")


def make_words(base: str, **options: Any) -> PeftTransformerWordEmbeddings:
    config = lora(target_modules=None)
    return PeftTransformerWordEmbeddings(base, peft_config=config, **options)


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.matrix)])
def test_threads_that_load_save_predict_and_unload_disturb_nobody(
    rounds: int, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Bases are read under switches for the whole process: threads wait, or do not see them. All predict the same."""
    moved = str(shutil.copytree(base("bert-mlm"), tmp_path / "copy"))
    save_two(moved, tmp_path)
    shared, failures, scores = SharedBase(moved), list[str](), set[tuple[str, float]]()
    start = threading.Barrier(8)

    def use(model: Any) -> None:
        sentence = Sentence("Berlin is large .")
        model.predict(sentence, return_probabilities_for_all_classes=True)
        kind = type(model).__name__
        scores.add((kind, round(sum(label.score for label in sentence.get_labels(model.label_type)), 5)))
        assert all(parameter.device.type == "cpu" and parameter.isfinite().all() for parameter in model.parameters())

    def work(number: int) -> None:
        start.wait()
        for turn in range(rounds):
            source = tmp_path / ("text-classifier" if (number + turn) % 2 else "sequence-tagger-rnn-crf")
            try:
                model = shared.load(source)
                use(model)
                shared.unload(model)
                alone = flair_peft.from_pretrained(f"{source}.pt", base_model=str(folders[(number + turn) % 3]))
                use(alone)
                alone.save(tmp_path / f"saved-{number}.pt")
                use(flair_peft.from_pretrained(tmp_path / f"saved-{number}.pt"))
            except Exception as error:  # whatever it is, it must not be
                failures.append(repr(error)[:300])

    # Copies of the base are bases of their own, which are read while others are in use.
    folders = [shutil.copytree(moved, tmp_path / f"other-{number}") for number in range(3)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(scores) == 2
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
