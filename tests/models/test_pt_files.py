"""The ``.pt`` files of Flair's trainer: they hold what was learned, no code, and load wherever Flair does."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import json
import logging
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.embeddings import StackedEmbeddings, TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.nn import Classifier, Model
from flair.trainers import ModelTrainer
from flair.trainers.plugins import TrainerPlugin
from peft import AdaLoraConfig, PeftConfig
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from transformers import AutoModel, AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, compat
from flair_peft.base import base_cache, tokenizers
from flair_peft.codec import state_json
from flair_peft.errors import AdapterConfigError, ModelFileError, SaveError
from flair_peft.models import save_plan
from flair_peft.torchfile import unpickle
from tests.support import tiny
from tests.support.configs import lora
from tests.support.method_cases import KINDS, make_embeddings, one_kind_each
from tests.support.methods import METHODS, Method, perturb_
from tests.support.opinions import opinion_corpus
from tests.support.round_trip import SCORE_TOLERANCE, Factories, largest_difference
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO

Base = Callable[[str], str]
Load = Callable[..., Any]

CLASSIFIER = ZOO["text-classifier"]
TWO_ADAPTERS = ("text-classifier-label-verbalizer", "sequence-tagger-stacked")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return a load that reads bases from their files, as a process does that holds no other model."""

    def load(path: Path, loader: type[Model] = Model, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(base_cache, "_cache", weakref.WeakValueDictionary())
            return loader.load(path, **options)

    return load


def build(name: str, base: str, config: PeftConfig | None = None, **options: Any) -> Any:
    factories = Factories(base, config or lora(), **options)
    return ZOO[name].build(factories.words, factories.documents)


def classifier(base: str, config: PeftConfig | None = None, **options: Any) -> TextClassifier:
    return build("text-classifier", base, config, **options)


def predict(model: Model) -> Any:
    return CLASSIFIER.predict(model, CLASSIFIER.corpus())


def own_copy(base: str, directory: Path) -> Path:
    """Return a copy of a base that a test may change or remove."""
    return Path(shutil.copytree(base, directory / "base"))


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor that a file holds but those of its archives, by name."""
    state = unpickle.read_state(path)
    return dict(walk(state, ""))


def walk(value: Any, place: str) -> Any:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, torch.nn.Module):
        yield from walk(value.state_dict(), place)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, f"{place}/{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from walk(item, f"{place}/{number}")


class Watch(TrainerPlugin):
    """Calls a function of the trainer and the epoch at each event of one kind."""

    def __init__(self, event: str, look: Callable[[ModelTrainer, int], None]) -> None:
        super().__init__()
        self.event, self.look = event, look

    def attach_to(self, pluggable: Any) -> None:
        super().attach_to(pluggable)
        self._hook_handles.append(
            pluggable.register_hook(lambda epoch=0, **_: self.look(self.trainer, epoch), self.event)
        )


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_file_of_any_model_class_holds_no_tensor_of_the_base(name: str, base: Base, tmp_path: Path) -> None:
    """Best and final model alike hold head, adapter and tokenizer."""
    entry, model = ZOO[name], build(name, base("bert"))
    # A label encoder inside a decoder is a module of the state that is read, which has its base again then.
    model.save(tmp_path / "model.pt")
    assert base_weights_in(tmp_path / "model.pt", base("bert")) == []
    assert entry.predict(Model.load(tmp_path / "model.pt"), entry.corpus()) == entry.predict(model, entry.corpus())


def base_weights_in(path: Path, base: str) -> list[str]:
    """Return which of the raw storages in a file have the bytes of a weight of the base, or its rows at their start."""
    own = AutoModel.from_pretrained(base).state_dict()
    contents = {name: tensor.contiguous().numpy().tobytes() for name, tensor in own.items() if tensor.numel() > 64}
    with zipfile.ZipFile(path) as archive:
        storages = [archive.read(member) for member in archive.namelist() if "/data/" in member]
    return [name for name, content in contents.items() if any(content in storage for storage in storages)]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what PEFT says of each method is asserted in test_methods.py
@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
def test_file_of_any_method_holds_no_tensor_of_the_base(method: Method, kind: str, base: Base, tmp_path: Path) -> None:
    """Whatever a method wraps, renames or registers twice, the base's weights stay where they are."""
    embeddings = make_embeddings(method, kind, base, torch.float32)
    labels = CLASSIFIER.corpus().make_label_dictionary("sentiment", add_unk=False)
    TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels).save(tmp_path / "model.pt")
    assert base_weights_in(tmp_path / "model.pt", base(KINDS[kind])) == []


def test_file_is_as_large_as_what_was_learned_and_the_tokenizer(tmp_path: Path) -> None:
    """On a base of some size the rest, settings and torch's own records, is within a twentieth."""
    directory = tiny.build("bert", tmp_path / "base")
    config = lora(r=64, target_modules="all-linear", exclude_modules=r".*pooler.*")
    model = classifier(str(directory), config)
    model.save(tmp_path / "model.pt")
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    tokenizer = len(model.embeddings.to_params()["tokenizer_data"].getvalue())
    records = 64 * sum(1 for p in model.parameters() if p.requires_grad) * 8 + (1 << 15)
    whole = sum(p.nbytes for p in model.parameters()) + tokenizer
    size = (tmp_path / "model.pt").stat().st_size
    assert size <= 1.05 * (learned + tokenizer) + records
    model.save(tmp_path / "whole.pt", save_base=True)
    assert (tmp_path / "whole.pt").stat().st_size > whole > size - records


def test_file_is_read_by_torch_with_one_name_allowed_and_by_none_without(base: Base, tmp_path: Path) -> None:
    """Nothing but plain values and tensors is rebuilt, by one function, at protocol 2."""
    classifier(base("bert")).save(tmp_path / "model.pt")
    with torch.serialization.safe_globals([state_json.restore_state]):
        state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {"state_dict", "document_embeddings", "label_dictionary"} <= state.keys()
    with pytest.raises(Exception, match=r"flair_peft\.codec\.restore_state"):
        torch.load(tmp_path / "model.pt", weights_only=True)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        (name,) = [member for member in archive.namelist() if member.endswith("/data.pkl")]
        opcodes = list(pickletools.genops(archive.read(name)))
    assert [argument for opcode, argument, _ in opcodes if opcode.name == "PROTO"] == [2]
    named = {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
    assert {name for name in named if "torch" not in name} == {
        "flair_peft.codec restore_state",
        "collections OrderedDict",
    }


_KNOWING_ONLY_FLAIR = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import flair, flair.models, flair.nn
from flair.data import Sentence
assert not any(name.startswith("flair_peft") for name in sys.modules)
for path, *loaders in json.loads(sys.argv[1]):
    for loader in loaders:
        child = os.fork()
        if child == 0:
            found = getattr(flair.models, loader, None) or getattr(flair.nn, loader)
            model = found.load(path)
            sentences = [Sentence("I love this wonderful movie"), Sentence("Berlin and Paris are large")]
            model.predict(sentences, return_probabilities_for_all_classes=True)
            scores = [[(label.value, label.score) for label in s.labels] for s in sentences]
            print(json.dumps([path, loader, type(model).__name__, scores]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, (path, loader)
"""


@pytest.mark.matrix
def test_file_loads_in_a_process_that_knows_only_flair(base: Base, tmp_path: Path) -> None:
    """Concrete and abstract classes of Flair load it there, and predict what the live model predicts."""
    from flair.data import Sentence

    expected, jobs = {}, []
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for kind, dtype in dtypes.items():
        model = classifier(base("bert"), dtype=dtype)
        path = str(tmp_path / f"{kind}.pt")
        model.save(path)
        sentences = [Sentence("I love this wonderful movie"), Sentence("Berlin and Paris are large")]
        model.predict(sentences, return_probabilities_for_all_classes=True)
        expected[path] = [[[label.value, label.score] for label in s.labels] for s in sentences]
        jobs.append([path, "TextClassifier", "Classifier", "Model"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(flair_peft.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", _KNOWING_ONLY_FLAIR, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    for path, _, name, scores in lines:
        tolerance = SCORE_TOLERANCE[dtypes[Path(path).stem]]
        assert name == "TextClassifier"
        assert largest_difference(expected[path], scores) <= tolerance


def as_version_1(model: Model) -> dict[str, Any]:
    """Return the state of a model as flair_peft 0.1.0 wrote it: with the whole base, pickled as it is."""
    state = model._get_state_dict()
    params = [p for p in walk_params(state) if "peft_config" in p]
    assert params
    for found in params:
        found["format_version"] = compat.FormatVersion(1)
        del found["save_base"]
        assert not {"stored_base", "probe", "part", "untrained"} & found.keys()
    return state


def walk_params(value: Any) -> Any:
    if isinstance(value, dict):
        if "__cls__" in value:
            yield value
        for item in value.values():
            yield from walk_params(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk_params(item)


@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger-crf", "sequence-tagger-stacked", "multitask"])
@pytest.mark.parametrize("config", ["LORA", "PSOFT"])
def test_file_of_version_1_loads_where_its_base_is_gone_and_becomes_slim(
    config: str, name: str, base: Base, tmp_path: Path, load: Load
) -> None:
    """Files of 0.1.0 hold everything; saved again beside nothing known of the base, they go on holding it."""
    own, entry = own_copy(base("bert"), tmp_path), ZOO[name]
    model, corpus = build(name, str(own), METHODS[config].config("encoder")), entry.corpus()
    torch.save(as_version_1(model), tmp_path / "old.pt", pickle_protocol=4)
    before = entry.predict(model, corpus)
    shutil.rmtree(own)
    loaded = load(tmp_path / "old.pt")
    assert entry.predict(loaded, corpus) == before
    loaded.save(tmp_path / "new.pt")
    assert entry.predict(load(tmp_path / "new.pt"), corpus) == before


@pytest.mark.parametrize("name", ["text-classifier", *TWO_ADAPTERS])
@pytest.mark.parametrize("form", ["file", "directory"])
def test_save_where_the_base_is_gone_says_so_and_is_self_contained(
    form: str, name: str, base: Base, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """A base that was removed while the model lived costs space and loses nothing."""
    own, entry = own_copy(base("bert"), tmp_path), ZOO[name]
    model, corpus = build(name, str(own)), entry.corpus()
    before = entry.predict(model, corpus)
    shutil.rmtree(own)
    with caplog.at_level(logging.WARNING, "flair_peft"):
        if form == "file":
            model.save(tmp_path / "model")
        else:
            flair_peft.save_pretrained(model, tmp_path / "model")
    assert f"'{own}' is not found any more" in caplog.text
    loaded = load(tmp_path / "model")
    assert entry.predict(loaded, corpus) == before


def test_save_of_stock_embeddings_says_that_their_base_was_never_known(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is where it was; but nothing proved that the weights in the file are its own."""
    torch.manual_seed(0)
    stock = TransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    labels = opinion_corpus().make_label_dictionary("opinion", add_unk=False)
    TextClassifier(stock, label_dictionary=labels, label_type="opinion").save(tmp_path / "stock.pt")
    loaded = TextClassifier.load(tmp_path / "stock.pt")
    with caplog.at_level(logging.WARNING, "flair_peft"):
        loaded.save(tmp_path / "again.pt")
    assert f"those of '{base('bert')}' was never known" in caplog.text
    assert "flair-peft convert" in caplog.text
    assert "not found" not in caplog.text


@pytest.mark.parametrize("form", ["file", "directory"])
def test_save_where_the_base_was_rewritten_is_self_contained_and_right(
    form: str, base: Base, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """Other weights under the same name are not taken for those that the adapter was trained on."""
    own = own_copy(base("bert"), tmp_path)
    model = classifier(str(own))
    before = predict(model)
    replace_base(own, seed=5)
    with caplog.at_level(logging.WARNING, "flair_peft"):
        if form == "file":
            model.save(tmp_path / "model")
        else:
            flair_peft.save_pretrained(model, tmp_path / "model")
    assert "is not found any more, as it was" in caplog.text
    assert predict(load(tmp_path / "model")) == before
    assert predict(classifier(str(own))) != before


def replace_base(directory: Path, *, seed: int) -> None:
    """Put another model of the same shape in place of a base, as a re-training does."""
    tiny.build("bert", directory.parent / "other", seed=seed)
    shutil.rmtree(directory)
    (directory.parent / "other").rename(directory)


def train(model: Model, directory: Path, **options: Any) -> dict[str, Any]:
    settings = {"learning_rate": 0.05, "max_epochs": 4, "use_final_model_for_eval": False, **options}
    return CLASSIFIER.train(model, CLASSIFIER.corpus(), directory, **settings)


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(bias="all"),
        lora(bias="lora_only", modules_to_save=["LayerNorm"]),
        lora(init_lora_weights="pissa"),
        lora(trainable_token_indices=[5, 6, 7]),
    ],
    ids=["lora", "bias all", "saved modules", "pissa", "tokens"],
)
def test_best_model_is_reloaded_by_the_trainer_with_every_value(
    config: PeftConfig, base: Base, tmp_path: Path, load: Load
) -> None:
    """The live model ends with the values of its best epoch, biases and saved modules among them."""
    model = classifier(base("bert"), config)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def look(trainer: ModelTrainer, epoch: int) -> None:
        seen[epoch] = copied(model)

    def spoil(trainer: ModelTrainer, epoch: int) -> None:
        if epoch == 4:  # so that the best model is an earlier one
            model.decoder.weight.data.zero_()

    train(model, tmp_path, plugins=[Watch("after_training_epoch", spoil), Watch("after_evaluation", look)])
    after = copied(model)
    same = [epoch for epoch, state in seen.items() if all(torch.equal(state[name], after[name]) for name in after)]
    assert len(same) == 1
    assert same[0] < 4
    assert predict(load(tmp_path / "best-model.pt")) == predict(model)


def test_best_model_is_reloaded_where_the_base_was_unfrozen_midway(base: Base, tmp_path: Path, load: Load) -> None:
    """Base weights that the best model left out, being the base's own then, get these values back."""
    model = classifier(base("bert"))
    layer = model.embeddings.base_model.encoder.layer[1].output.dense
    original = layer.weight.detach().clone()
    model.save(tmp_path / "best-model.pt")
    before = predict(model)
    layer.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.1
    assert predict(model) != before
    trainer = ModelTrainer(model, CLASSIFIER.corpus())
    trainer._load_model(tmp_path / "best-model.pt")
    assert torch.equal(layer.weight, original)
    assert predict(model) == before
    witness = classifier(base("bert"))
    assert torch.equal(witness.embeddings.base_model.encoder.layer[1].output.dense.weight, original)


def test_base_unfrozen_during_a_training_is_stored_from_then_on(base: Base, tmp_path: Path, load: Load) -> None:
    """The file of the epoch before holds no base weight, the one of the epoch after holds what was trained."""
    model = classifier(base("bert"))
    layer = model.embeddings.base_model.encoder.layer[0].output.dense
    before = copied(layer)

    def unfreeze(trainer: ModelTrainer, epoch: int) -> None:
        layer.requires_grad_(epoch > 1)

    settings: dict[str, Any] = {"max_epochs": 2, "use_final_model_for_eval": True}
    train(model, tmp_path, plugins=[Watch("before_training_epoch", unfreeze)], save_model_each_k_epochs=1, **settings)
    assert base_weights_in(tmp_path / "model_epoch_1.pt", base("bert")) == []
    names = [name for name in stored(tmp_path / "model_epoch_2.pt") if "layer.0.output.dense" in name]
    assert len(names) == 2
    assert not torch.equal(stored(tmp_path / "model_epoch_2.pt")[names[0]], before[names[0].rpartition(".")[2]])
    assert predict(load(tmp_path / "model_epoch_2.pt")) == predict(model)


@pytest.mark.parametrize("where", ["describing", "writing"])
def test_save_that_fails_midway_leaves_the_earlier_file(
    where: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception before or while bytes are written changes nothing, and leaves no temporary file."""
    model = classifier(base("bert"))
    path = tmp_path / "model.pt"
    model.save(path)
    content, before = path.read_bytes(), predict(model)
    perturb_(model.embeddings.model, seed=9)

    class Full(OSError):
        pass

    def fail_while_writing(value: Any, file: Any, **_: Any) -> None:
        file.write(b"half of it")
        raise Full(28, "No space left on device")

    def fail_before(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    if where == "writing":
        monkeypatch.setattr(torch, "save", fail_while_writing)
    else:
        monkeypatch.setattr(save_plan.state_json, "encode", fail_before)
    with pytest.raises((SaveError, RuntimeError)):
        model.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == ["model.pt"]
    assert predict(Model.load(path)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["text-classifier", *TWO_ADAPTERS, "multitask", "relation-classifier-special-tokens"])
def test_loaded_model_saved_twice_more_is_the_same(
    name: str, dtype: torch.dtype, base: Base, tmp_path: Path, load: Load
) -> None:
    """Generations of files hold the same tensors under the same names, bit by bit."""
    model = build(name, base("bert"), dtype=dtype)
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    model.save(paths[0])
    for earlier, later in itertools.pairwise(paths):
        load(earlier).save(later)
    first, *others = [stored(path) for path in paths]
    # What a head gives follows from the dtype in which it computes, which is another one after a load.
    learned = {n: t for n, t in first.items() if "head_probe/" not in n}
    for other in others:
        assert other.keys() == first.keys()
        assert all(t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in learned.items())
    assert [base_weights_in(path, base("bert")) for path in paths] == [[], [], []]
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) - min(sizes) < 1024


def test_stored_tokenizer_does_not_depend_on_the_time(base: Base) -> None:
    """Tasks that share a tokenizer find equal bytes, also when a second passes between them."""
    tokenizer = AutoTokenizer.from_pretrained(base("bert"))
    zips = []
    for year, order in ((1999, 1), (2024, -1)):
        stored = io.BytesIO()
        with zipfile.ZipFile(stored, "w") as files:
            for name in ["tokenizer.json", "tokenizer_config.json"][::order]:
                info = zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0))
                files.writestr(info, (Path(base("bert")) / name).read_bytes())
        zips.append(stored)
    first, second = (tokenizers.portable_tokenizer_files(stored, tokenizer) for stored in zips)
    assert zips[0].getvalue() != zips[1].getvalue()
    assert first.getvalue() == second.getvalue()
    kwargs = {"use_fast": True}
    assert tokenizers.unpack_tokenizer(first, kwargs).get_vocab() == tokenizer.get_vocab()


def test_loaded_model_trains_on_and_its_copies_are_its_own(base: Base, tmp_path: Path, load: Load) -> None:
    """What came from a slim file learns, is copied, and is saved slim again."""
    classifier(base("bert")).save(tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    clone = copy.deepcopy(loaded)
    before, start = predict(loaded), copied(loaded)
    assert predict(clone) == before
    train(loaded, tmp_path / "on", max_epochs=1, learning_rate=5e-3)
    after = copied(loaded)
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert {name for name in changed if "lora_" not in name} == {"decoder.weight", "decoder.bias"}
    assert any("lora_" in name for name in changed)
    assert predict(clone) == before
    clone.save(tmp_path / "clone.pt")
    assert predict(load(tmp_path / "clone.pt")) == before
    assert base_weights_in(tmp_path / "clone.pt", base("bert")) == []
    assert predict(load(tmp_path / "on" / "final-model.pt", Classifier)) == predict(loaded)


def test_copy_and_original_of_a_trained_model_each_save_what_they_hold(base: Base, tmp_path: Path, load: Load) -> None:
    """A deep copy knows its base, compares with it, and stores only its own adapter."""
    model = classifier(base("bert"))
    clone = copy.deepcopy(model)
    perturb_(clone.embeddings.model, seed=11)
    for number, each in enumerate((model, clone)):
        each.save(tmp_path / f"{number}.pt")
        assert predict(load(tmp_path / f"{number}.pt")) == predict(each)
        assert base_weights_in(tmp_path / f"{number}.pt", base("bert")) == []
    assert predict(model) != predict(clone)


def by_pickle(model: Model) -> Model:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("copy_of", "config"),
    [(by_pickle, lora()), (copy.deepcopy, METHODS["SHADOW"].config("decoder")), (by_pickle, lora(bias="all"))],
    ids=["pickled", "rebuilt by deepcopy", "pickled with biases"],
)
def test_model_that_was_pickled_saves_slim_too(
    copy_of: Callable[[Model], Model], config: PeftConfig, base: Base, tmp_path: Path, load: Load
) -> None:
    """A model that went through pickle, as multiprocessing sends them, still knows what its base is."""
    architecture = "llama" if config.peft_type == "SHADOW" else "bert"
    model = classifier(base(architecture), config)
    clone = copy_of(model)
    clone.save(tmp_path / "model.pt")
    assert predict(load(tmp_path / "model.pt")) == predict(model)
    assert base_weights_in(tmp_path / "model.pt", base(architecture)) == []


def test_saving_draws_no_random_numbers(base: Callable[[str], str], tmp_path: Path) -> None:
    """A training with saves goes on as one without, also where the base has weights that are random in each load."""
    config = lora(target_modules=None)
    model = ZOO["text-classifier"].build(
        None, lambda **kwargs: PeftTransformerDocumentEmbeddings(base("bert-mlm"), peft_config=config, **kwargs)
    )
    state = torch.get_rng_state()
    model.save(tmp_path / "model.pt")
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("state", ["merged", "disabled", "several"])
def test_adapter_in_a_state_that_no_file_gives_back_is_refused(
    state: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What would predict something else after loading is refused when it is saved, with the way out."""
    config = lora(target_modules=["query"])
    model = ZOO["text-classifier"].build(
        None, lambda **kwargs: PeftTransformerDocumentEmbeddings(base("bert"), peft_config=config, **kwargs)
    )
    peft_model = model.embeddings.model
    if state == "merged":
        peft_model.merge_adapter()
    elif state == "several":
        peft_model.add_adapter("second", config)
    switched = peft_model.disable_adapter() if state == "disabled" else contextlib.nullcontext()
    with switched, pytest.raises(AdapterConfigError, match="Undo that on embeddings"):
        model.save(tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    if state == "merged":
        peft_model.unmerge_adapter()
    elif state == "several":
        peft_model.delete_adapter("second")
    model.save(tmp_path / "model.pt")
    Model.load(tmp_path / "model.pt")


def _edit_alpha(model: Any) -> None:
    model.peft_config["default"].lora_alpha += 4


def _each_layer(act: Callable[[Any], Any]) -> Callable[[Any], None]:
    def act_on_all(model: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                act(layer)

    return act_on_all


RESCALING: dict[str, Callable[[Any], Any]] = {
    "scale_layer": _each_layer(lambda layer: layer.scale_layer(0.25)),
    "set_scale": _each_layer(lambda layer: layer.set_scale("default", 3)),
    "one layer": lambda model: [m for m in model.modules() if isinstance(m, LoraLayer)][-1].scale_layer(2),
    "alpha of the config": _edit_alpha,
}
SCALED_CONFIGS = [
    lora(target_modules=["query"]),
    lora(target_modules=["query", "word_embeddings"], use_rslora=True, rank_pattern={"query": 3}),
    lora(target_modules=["query", "value"], alpha_pattern={r"^encoder.layer.0.*query": 5}, use_dora=True),
    AdaLoraConfig(target_modules=["query"], init_r=4, target_r=2, lora_alpha=6, total_step=10, tinit=1, tfinal=2),
]


@pytest.mark.parametrize("config", SCALED_CONFIGS, ids=["lora", "rslora", "patterns", "adalora"])
@pytest.mark.parametrize("change", RESCALING)
def test_adapter_that_is_scaled_otherwise_than_its_config_says_is_refused(
    change: str, config: PeftConfig, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A load scales by the config: a file is written again when the scale is what that says."""
    entry = ZOO["text-classifier"]
    model = entry.build(
        None, lambda **kwargs: PeftTransformerDocumentEmbeddings(base("bert"), peft_config=config, **kwargs)
    )
    peft_model = model.embeddings.model
    perturb_(peft_model, 3)
    expected = entry.predict(model, entry.corpus())
    RESCALING[change](peft_model)
    for save in (model.save, functools.partial(flair_peft.save_pretrained, model)):
        with pytest.raises(AdapterConfigError, match=r"is scaled in '.*set_scale"):
            save(tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    if change == "alpha of the config":
        peft_model.peft_config["default"].lora_alpha -= 4
    elif isinstance(config, AdaLoraConfig):
        _each_layer(lambda layer: layer.scaling.update(default=config.lora_alpha))(peft_model)
    else:
        _each_layer(lambda layer: layer.set_scale("default", 1))(peft_model)
    model.save(tmp_path / "model.pt")
    assert entry.predict(Model.load(tmp_path / "model.pt"), entry.corpus()) == expected


def test_adapter_is_not_stored_within_a_context_that_scales_it(base: Callable[[str], str], tmp_path: Path) -> None:
    """What `rescale_adapter_scale` does ends with its context."""
    model = query_classifier(base("bert"))
    with rescale_adapter_scale(model.embeddings.model, 0.5), pytest.raises(AdapterConfigError, match="is scaled in"):
        model.save(tmp_path / "model.pt")
    model.save(tmp_path / "model.pt")


POOLERLESS: dict[str, dict[str, Any]] = {
    "argument": {"transformers_model_kwargs": {"add_pooling_layer": False}},
    "keyword": {"add_pooling_layer": False},
    "taken away": {},
}


@pytest.mark.parametrize("save", [Model.save, flair_peft.save_pretrained])
@pytest.mark.parametrize("how", POOLERLESS)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_model_whose_base_has_no_pooler_comes_back(
    architecture: str, how: str, save: Callable[..., Any], base: Callable[[str], str], tmp_path: Path
) -> None:
    """Nobody reads a pooler, so that it makes no difference that a load has one."""
    entry, model = ZOO["text-classifier"], query_classifier(base(architecture), **POOLERLESS[how])
    model.embeddings.base_model.pooler = None
    save(model, tmp_path / "model")
    loaded = flair_peft.from_pretrained(tmp_path / "model", verify="full")
    assert entry.predict(loaded, entry.corpus()) == entry.predict(model, entry.corpus())
    save(loaded, tmp_path / "again")
    flair_peft.from_pretrained(tmp_path / "again")


def query_classifier(base: str, **options: Any) -> TextClassifier:
    config = lora(target_modules=["query"])
    return ZOO["text-classifier"].build(
        None, lambda **kwargs: PeftTransformerDocumentEmbeddings(base, peft_config=config, **{**options, **kwargs})
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_that_was_converted_is_stored_slim(
    dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base in another dtype is the base all the same."""
    model = query_classifier(base("bert"))
    model.to(dtype)
    model.save(tmp_path / "model.pt")
    assert "not found any more" not in caplog.text
    assert not [key for key in unpickle.read_state(tmp_path / "model.pt")["state_dict"] if "base_layer" in key]
    corpus = ZOO["text-classifier"].corpus()
    expected, found = (ZOO["text-classifier"].predict(m, corpus) for m in (model, Model.load(tmp_path / "model.pt")))
    assert largest_difference(expected, found) <= SCORE_TOLERANCE[dtype]


def test_base_on_a_device_map_is_stored_slim(base: Callable[[str], str], tmp_path: Path) -> None:
    """A base that transformers placed is known by the weights that it had before rows were added."""
    model = query_classifier(base("bert"), transformers_model_kwargs={"device_map": "cpu"})
    model.save(tmp_path / "model.pt")
    assert not [key for key in unpickle.read_state(tmp_path / "model.pt")["state_dict"] if "base_layer" in key]
    Model.load(tmp_path / "model.pt")


def test_saving_under_autocast_gives_a_file_that_loads(base: Callable[[str], str], tmp_path: Path) -> None:
    """The probe is that of the model, not of the precision in which it happens to run."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query_classifier(base("bert")).save(tmp_path / "model.pt")
    Model.load(tmp_path / "model.pt")


def test_unfrozen_weights_of_the_base_are_trained_on_after_loading(base: Callable[[str], str], tmp_path: Path) -> None:
    """What the user chose to train goes on being trained."""
    model = query_classifier(base("bert"))
    layer = model.embeddings.base_model.encoder.layer[1]
    layer.requires_grad_(True)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save(tmp_path / "model.pt")
    loaded = Model.load(tmp_path / "model.pt")
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == expected


def test_embeddings_used_twice_come_back_as_one(base: Callable[[str], str], tmp_path: Path) -> None:
    """They would train apart otherwise."""
    words = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(target_modules=None, r=2))
    model = ZOO["sequence-tagger"].build(lambda **_: StackedEmbeddings([words, words]), None)
    model.save(tmp_path / "model.pt")
    loaded = Model.load(tmp_path / "model.pt").embeddings
    assert loaded.list_embedding_0 is loaded.list_embedding_1 is loaded.embeddings[0] is loaded.embeddings[1]


def test_adapter_that_never_learned_is_reported_after_a_training_too(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """The trainer reloads its best model, which says nothing about what was learned."""
    entry = ZOO["text-classifier"]
    model = query_classifier(base("bert"), fine_tune=False)
    entry.train(model, entry.corpus(), tmp_path, use_final_model_for_eval=False)
    assert model.embeddings._start


def test_revision_of_what_is_here_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """An option that could only be ignored is refused."""
    query_classifier(base("bert")).save(tmp_path / "model.pt")
    for load in (flair_peft.from_pretrained, TextClassifier.load):
        with pytest.raises(ModelFileError, match="Leave out revision"):
            load(tmp_path / "model.pt", revision="v1")
    with pytest.raises(ModelFileError, match="Leave out revision"):
        TextClassifier.load(unpickle.read_state(tmp_path / "model.pt"), revision="v1")
    assert isinstance(flair_peft.from_pretrained(tmp_path / "model.pt"), TextClassifier)


def test_file_names_its_base_without_detours_unless_a_link_makes_one_needed(base: Base, tmp_path: Path) -> None:
    """What users read in messages is short, and never another directory."""
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere" / "inner"
    shutil.copytree(base("bert"), own / "bert")
    elsewhere.mkdir(parents=True)
    assert base_name(classifier(f"{own}/../own/bert")) == str(own / "bert")
    (own / "link").symlink_to(elsewhere, target_is_directory=True)
    shutil.copytree(base("bert"), elsewhere.parent / "bert")
    shutil.rmtree(own / "bert")
    assert base_name(classifier(f"{own}/link/../bert")) == f"{own}/link/../bert"


def base_name(model: TextClassifier) -> str:
    record = model.embeddings.base_record
    assert record is not None
    return str(record.name)
