"""The code of the README and of the guide runs as it stands there, with tiny models under the names of real ones."""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.trainers import ModelTrainer
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForTokenClassification, BitsAndBytesConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.cli import main
from tests.support.hub_stand_in import HubStandIn, online
from tests.support.zoo import sentence_corpus

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code of a page in one language."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [code for found, code in fenced if found == language]


FAILING, *_ = blocks(PAGES[0], "python")
# What stands on several pages is run once.
SNIPPETS = {
    code: f"{page.stem}-{number}"
    for page in reversed(PAGES)
    for number, code in enumerate(blocks(page, "python"))
    if code != FAILING
}
LINES = [line for page in PAGES for code in blocks(page, "bash") for line in code.splitlines()]
COMMANDS = sorted({" ".join(shlex.split(line, comments=True)) for line in LINES if line.startswith("flair-peft")})

# Under these names the pages' base models are looked for; a directory of that name comes before the Hub.
BASES = {
    "bert-base-uncased": "bert",
    "xlm-roberta-base": "xlm-roberta",
    "xlm-roberta-large": "xlm-roberta",
    "path/of/the/same/base": "bert",
    "path/of/its/base": "bert",
}
TEXTS = ["Berlin is large .", "I love this wonderful movie , it is great !"]


class World:
    """A folder with base models in which a reader stands, and the names that his code has by then."""

    def __init__(self, folder: Path, server: HubStandIn) -> None:
        self.folder, self.server = folder, server
        self.corpus = sentence_corpus()
        self.names: dict[str, Any] = {
            **vars(flair_peft),
            "flair_peft": flair_peft,
            "torch": torch,
            "lora": LoraConfig(r=8, lora_alpha=32),
            "corpus": self.corpus,
            "labels": self.corpus.make_label_dictionary("sentiment"),
            "tags": self.corpus.make_label_dictionary("ner", add_unk=False),
            "sentences": [Sentence(text) for text in TEXTS],
            "others": [Sentence("a bad film")],
            **{
                kind.__name__: kind
                for kind in (
                    BitsAndBytesConfig,
                    LoraConfig,
                    ModelTrainer,
                    SequenceTagger,
                    TextClassifier,
                    TransformerDocumentEmbeddings,
                )
            },
        }

    def run(self, code: str) -> None:
        exec(compile(code.replace("hf_…", str(self.server.token)), "page", "exec"), self.names)

    def classifier(self, base: str = "bert-base-uncased", *, config: Any = None) -> TextClassifier:
        embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config or LoraConfig(r=8, lora_alpha=32))
        return TextClassifier(embeddings, label_dictionary=self.names["labels"], label_type="sentiment")

    def tagger(self, base: str = "xlm-roberta-large") -> SequenceTagger:
        embeddings = PeftTransformerWordEmbeddings(base, peft_config=LoraConfig(r=8, lora_alpha=32))
        return SequenceTagger(embeddings, self.names["tags"], "ner", use_rnn=False, use_crf=False)

    def old_file(self, name: str) -> None:
        """Write a file as stock Flair does."""
        flair_peft.uninstall()
        embeddings = TransformerDocumentEmbeddings("bert-base-uncased", peft_config=LoraConfig(r=8, lora_alpha=32))
        model = TextClassifier(embeddings, label_dictionary=self.names["labels"], label_type="sentiment")
        model.save(name)
        flair_peft.install()

    def adapter(self, folder: str) -> None:
        """Write an adapter of PEFT with a head for the labels of the pages."""
        base = AutoModelForTokenClassification.from_pretrained("bert-base-uncased", num_labels=3)
        base.config.id2label = dict(enumerate(["O", "B-PER", "I-PER"]))
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type=TaskType.TOKEN_CLS)
        get_peft_model(base, config).save_pretrained(folder)


@pytest.fixture
def world(base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    for name, architecture in BASES.items():
        shutil.copytree(base(architecture), tmp_path / name)
    with HubStandIn() as server, online(server, None, tmp_path / "cache", token=server.token):
        yield World(tmp_path, server)


def _nothing(_: World) -> None:
    """What the code needs, it makes."""


def _model(world: World) -> None:
    world.names["model"] = world.classifier().eval()


def _best_model(world: World) -> None:
    _model(world)
    world.names["model"].save("best-model.pt")
    shutil.rmtree("bert-base-uncased")
    shutil.copytree("path/of/the/same/base", "bert-base-uncased")


def _tagger(world: World) -> None:
    world.names["model"] = world.tagger().eval()


def _written_for_peft(world: World) -> None:
    flair_peft.to_transformers(world.tagger(), "for-peft", merged=False)


def _trainer(world: World) -> None:
    _model(world)
    world.names["trainer"] = ModelTrainer(world.names["model"], world.corpus)


def _plugins(world: World) -> None:
    config = AdaLoraConfig(target_r=2, init_r=4, tinit=1, tfinal=1, total_step=100)
    world.names["adalora_tagger"], world.names["lora_tagger"] = world.classifier(config=config), world.classifier()


def _stream(world: World) -> None:
    _model(world)
    Path("ten-million-lines.txt").write_text("\n".join(TEXTS))


def _texts(world: World) -> None:
    _model(world)
    world.names["texts"] = TEXTS


def _two_on_one_base(world: World) -> None:
    shared = flair_peft.SharedBase("bert-base-uncased")
    for name in ("first", "second"):
        flair_peft.save_pretrained(world.classifier().eval(), name)
        world.names[name] = shared.load(name)
    world.names["shared"] = shared


def _served(world: World) -> None:
    """Save the two models of the first command of the README."""
    Path("models").mkdir()
    world.classifier().save("models/sentiment.pt")
    world.tagger("bert-base-uncased").save("models/ner.pt")


def _on_ray(world: World) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own models are written for an older pydantic
        pytest.importorskip("ray.serve")
    _served(world)


def _spread(world: World) -> None:
    flair_peft.save_pretrained(world.tagger().eval(), "my-tagger")


def _shared(world: World) -> None:
    flair_peft.save_pretrained(world.tagger("xlm-roberta-base").eval(), "ner-dir")
    flair_peft.push_to_hub(world.classifier("xlm-roberta-base").eval(), "me/sentiment")


def _adapters(world: World) -> None:
    world.adapter("path/of/adapter")
    files = {path.name: path.read_bytes() for path in Path("path/of/adapter").iterdir()}
    world.server.add_repo("user/adapter", files, revision="v1")
    world.names["tags"] = Dictionary(add_unk=False)
    for label in ("O", "B-PER", "I-PER"):
        world.names["tags"].add_item(label)


def _old(world: World) -> None:
    world.old_file("old.pt")


def _pickled(world: World) -> None:
    """Write a plain model as Flair does."""
    flair_peft.merge(world.classifier()).save("pickled.pt")


def _own_corpus(world: World) -> None:
    Path("my-corpus").mkdir()
    lines = [f"__label__{label} {text}" for label, text in (("good", "a fine film"), ("bad", "a dull film"))] * 4
    for split in ("train", "dev", "test"):
        Path("my-corpus", f"{split}.txt").write_text("\n".join(lines))


def _interrupted(world: World) -> None:
    _trainer(world)
    rates = {"learning_rate": 5e-4, "decoder_learning_rate": 1e-2}
    saving = {"save_optimizer_state": True, "save_model_each_k_epochs": 1, "use_final_model_for_eval": True}
    world.names["trainer"].fine_tune("out", **rates, **saving, max_epochs=2)


# What stands in a block → what a reader has by then.
READERS: dict[str, Callable[[World], None]] = {
    "my-corpus": _own_corpus,
    '"tagger", learning_rate': _nothing,
    "# instead of TransformerDocumentEmbeddings": _nothing,
    "additional_special_tokens": _nothing,
    "layers_to_transform": _nothing,
    "path/of/the/same/base": _best_model,
    "push_to_hub(model": _tagger,
    "trainer.fine_tune": _trainer,
    "# with save_optimizer_state=True": _interrupted,
    "join_processes": _model,
    "ten-million-lines": _stream,
    "predict_stream(model, texts):": _texts,
    "model.predict(sentences": _model,
    "shared.predict": _two_on_one_base,
    "small.onnx": _model,
    "four_bits": _nothing,
    "spread": _spread,
    "create_app": _served,
    "ray_app": _on_ray,
    "SharedBase": _shared,
    "from_adapter": _adapters,
    '"xlm-roberta-large", ': _nothing,
    "old.pt": _old,
    "merge(model)": _model,
    "pickled.pt": _pickled,
    "to_transformers(model": _tagger,
    'from_pretrained("for-peft")': _written_for_peft,
    "RankAllocationPlugin": _plugins,
}


def test_stock_flair_fails_as_the_readme_says(world: World) -> None:
    """The first block of the README is what this package exists for; a release of Flair that loads it ends this."""
    flair_peft.uninstall()
    (said,) = (code for code in blocks(PAGES[0], "text") if "state_dict" in code)
    with pytest.raises(RuntimeError) as error:
        world.run(FAILING)
    for line in said.splitlines():
        assert line.strip().removeprefix("RuntimeError: ").rstrip("…").rstrip(", ") in " ".join(
            str(error.value).split()
        )


@pytest.mark.parametrize("code", SNIPPETS, ids=SNIPPETS.get)
def test_code_of_a_page_runs(code: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, from the folder of its reader."""
    prepare = next(found for mark, found in READERS.items() if mark in code)
    prepare(world)
    _train_shortly(monkeypatch)
    world.run(code)


def test_every_block_has_a_reader() -> None:
    """A new block of code is run, and none is prepared for that is gone."""
    marks = [next((mark for mark in READERS if mark in code), None) for code in SNIPPETS]
    assert None not in marks
    assert set(marks) == set(READERS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[1])
def test_command_of_a_page_runs(
    command: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, or 1 where ``diff`` finds what differs; a server is made, and ended before it listens."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: setattr(server, "started", True))
    _served(world)
    model = world.classifier()
    model.save("final-model.pt")
    with torch.no_grad():
        for name, parameter in model.embeddings.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    model.eval()
    model.save("best-model.pt")
    flair_peft.save_pretrained(model, "my-tagger")
    world.old_file("old.pt")
    _pickled(world)
    if "convert" in command:
        shutil.rmtree("my-tagger")
    _, *arguments = shlex.split(command)
    try:
        code = main.main(arguments)
    except SystemExit as ended:  # of an option that ends the command by itself
        code = ended.code
    assert code == int("diff" in command), capsys.readouterr().err


def _train_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``fine_tune`` take two epochs, whatever the page says."""
    plain = ModelTrainer.fine_tune

    def fine_tune(self: ModelTrainer, path: str, **options: Any) -> Any:
        return plain(self, path, **{**options, "max_epochs": 2, "use_final_model_for_eval": True})

    monkeypatch.setattr(ModelTrainer, "fine_tune", fine_tune)
