"""The documentation: quoted messages are raised, public names are in it, made parts are current, links lead on."""

from __future__ import annotations

import ast
import functools
import gc
import html
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flair
import psutil
import pytest
import torch
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import SequenceTagger, TextClassifier
from peft import AdaLoraConfig, C3AConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from transformers.activations import GELUActivation

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase, errors
from tests.support import foreign_adapters, house_picture, pages, tiny
from tests.support.configs import lora
from tests.support.methods import LORA_VARIANTS, METHODS, perturb_
from tests.support.opinions import classifier, train
from tests.support.quantised import quantised_classifier

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TROUBLESHOOTING = DOCS / "guide" / "troubleshooting.md"
PAGES = pages.pages()
BASE = "bert-base"

Provoke = Callable[[], object]
PROVOKED: dict[str, Provoke] = {}


def provokes(heading: str) -> Callable[[Provoke], Provoke]:
    """Register a function that raises, or logs, what the page quotes under ``heading``."""

    def register(provoke: Provoke) -> Provoke:
        PROVOKED[heading] = provoke
        return provoke

    return register


def embeddings(config: Any = None, base: str = BASE, **options: Any) -> PeftTransformerDocumentEmbeddings:
    return PeftTransformerDocumentEmbeddings(base, peft_config=config or lora(), **options)


def stock_classifier(**options: Any) -> TextClassifier:
    """Return a model of stock Flair, with an adapter if the options have one."""
    model = classifier(BASE)
    return TextClassifier(
        TransformerDocumentEmbeddings(BASE, **options), label_dictionary=model.label_dictionary, label_type="opinion"
    )


def save_stock(path: str) -> None:
    flair_peft.uninstall()
    try:
        model = stock_classifier(peft_config=LoraConfig(r=8, lora_alpha=32, target_modules=["query", "value"]))
        perturb_(model.embeddings.model, 1)
        model.save(path)
    finally:
        flair_peft.install()


def saved(directory: str = "my-classifier", **options: Any) -> TextClassifier:
    model = classifier(BASE, **options)
    perturb_(model.embeddings.model, 1)
    flair_peft.save_pretrained(model, directory)
    return model


@provokes("The base model is not found")
def _no_base() -> None:
    embeddings(base="bert-bse-uncased")


@provokes("The targets match no module")
def _no_target() -> None:
    embeddings(LoraConfig(target_modules=["q_proj", "v_proj"]))


@provokes("The method cannot work on this architecture")
def _unsupported() -> None:
    tiny.build("distilbert", Path("distilbert"))
    embeddings(PrefixTuningConfig(num_virtual_tokens=5), base="distilbert")


@provokes("PEFT refuses the config")
def _refused_by_peft() -> None:
    embeddings(C3AConfig(block_size=7, target_modules=["query"]))


@provokes("The config is a dictionary")
def _no_config() -> None:
    embeddings({"r": 8})


@provokes("The dtype is not known")
def _no_dtype() -> None:
    embeddings(dtype="bf16")


@provokes("Two dtypes are asked for")
def _two_dtypes() -> None:
    embeddings(dtype="float16", transformers_model_kwargs={"torch_dtype": torch.bfloat16})


@provokes("The base does not fit into the memory")
def _no_memory() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        tiny.build("bert", Path("xlm-roberta-xxl"))
        embeddings(base="xlm-roberta-xxl")


@provokes("An adapter lies beside the base's weights")
def _adapter_beside() -> None:
    foreign_adapters.train(BASE, Path("merged-base"), "bare", lora(target_modules=["query"]))
    shutil.copytree(BASE, "merged-base", dirs_exist_ok=True)
    embeddings(base="merged-base")


@provokes("The adapter cannot learn")
def _frozen_adapter() -> None:
    embeddings(fine_tune=False, name="frozen")


@provokes("Embeddings and head in different dtypes")
def _head_dtype() -> None:
    model = classifier(BASE, name="my-embeddings")
    model.decoder.to(torch.bfloat16)
    train(model, Path("out"))


@provokes("`reduce_transformer_vocab=True`")
def _reduced() -> None:
    train(classifier(BASE, name="my-embeddings"), Path("out"), reduce_transformer_vocab=True)


@provokes("The model holds what no file can hold")
def _unstorable() -> None:
    class OwnDecoder(torch.nn.Linear):
        """Somebody's own."""

    model = classifier(BASE)
    train(
        TextClassifier(
            model.embeddings,
            label_dictionary=model.label_dictionary,
            label_type="opinion",
            decoder=OwnDecoder(model.embeddings.embedding_length, len(model.label_dictionary)),
        ),
        Path("out"),
    )


@provokes("The ranks of AdaLoRA do not change")
def _no_plugin() -> None:
    config = AdaLoraConfig(total_step=24, init_r=4, target_r=2, tinit=1, tfinal=1, target_modules=["query", "value"])
    train(classifier(BASE, peft_config=config), Path("out"), max_epochs=1)


@provokes("A loss of the method's own is left out")
def _no_loss_plugin() -> None:
    train(classifier(BASE, peft_config=lora(kasa_config=KasaConfig())), Path("out"), max_epochs=1)


@provokes("There is no state to go on from")
def _no_state() -> None:
    model = classifier(BASE)
    Path("out").mkdir()
    model.save("out/final-model.pt")
    flair_peft.ResumePlugin("out/final-model.pt")


@provokes("The adapter is merged or switched off")
def _merged() -> None:
    model = classifier(BASE)
    model.embeddings.model.merge_adapter()
    model.save("model.pt")


@provokes("A file has the directory's name")
def _in_the_way() -> None:
    Path("my-classifier").touch()
    saved()


@provokes("`save_base=True` on a quantised base")
def _quantised_in_full() -> None:
    quantised_classifier(BASE, "nf4", name="my-embeddings", save_base=True).save("model.pt")


@provokes("The file lacks the PEFT config")
def _no_alpha() -> None:
    save_stock("old.pt")
    TextClassifier.load("old.pt")


@provokes("The PEFT config is another one")
def _other_config() -> None:
    save_stock("old.pt")
    TextClassifier.load("old.pt", peft_config=LoraConfig(r=4, lora_alpha=32, target_modules=["query", "value"]))


@provokes("The PEFT config is there already")
def _config_twice() -> None:
    saved()
    TextClassifier.load("my-classifier", peft_config=lora())


@provokes("The base model of a file is not found")
def _base_gone() -> None:
    saved(name="my-embeddings")
    gc.collect()  # nothing holds the base any more
    shutil.move(BASE, "elsewhere")
    TextClassifier.load("my-classifier")


@provokes("The base model is another one")
def _base_changed() -> None:
    saved(name="my-embeddings")
    gc.collect()  # nothing holds the base any more
    weights = load_file(f"{BASE}/model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({**weights, name: weights[name] + 1}, f"{BASE}/model.safetensors", metadata={"format": "pt"})
    TextClassifier.load("my-classifier")


@provokes("The vectors are others")
def _other_vectors() -> None:
    saved(name="my-embeddings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GELUActivation, "forward", lambda _, given: torch.relu(given))
        TextClassifier.load("my-classifier")


@provokes("A file is damaged")
def _damaged() -> None:
    saved()
    path = Path("my-classifier/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    TextClassifier.load("my-classifier")


@provokes("There is no such model")
def _no_model() -> None:
    flair_peft.from_pretrained("my-tager")


@provokes("A newer version wrote it")
def _newer() -> None:
    saved()
    path = Path("my-classifier/flair_peft.json")
    path.write_text(re.sub(r'"format_version": ?1\b', '"format_version":2', path.read_text(), count=1))
    TextClassifier.load("my-classifier")


@provokes("The pickle names what hardly any model needs")
def _pickle() -> None:
    save_stock("old.pt")
    state = torch.load("old.pt", weights_only=False)
    torch.save({**state, "extra": os.getcwd}, "old.pt")
    TextClassifier.load("old.pt", peft_config=lora())


@provokes("The file holds another class")
def _other_class() -> None:
    saved()
    SequenceTagger.load("my-classifier")


@provokes("Some of the adapter never learned")
def _untrained() -> None:
    config = LoraConfig(r=4, lora_alpha=12)
    flair_peft.save_pretrained(classifier(BASE, name="my-embeddings", peft_config=config), "new")
    TextClassifier.load("new")


@provokes("The adapter belongs to another architecture")
def _other_architecture() -> None:
    tiny.build("llama", Path("llama"))
    foreign_adapters.train("llama", Path("their-adapter"), "causal-lm", lora(target_modules=["q_proj"]))
    PeftTransformerDocumentEmbeddings.from_adapter("their-adapter", base_model=BASE)


@provokes("The adapter changes nothing")
def _untrained_adapter() -> None:
    foreign_adapters.train(BASE, Path("their-adapter"), "bare", lora(target_modules=["query"]))
    path = "their-adapter/adapter_model.safetensors"
    weights = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    PeftTransformerDocumentEmbeddings.from_adapter("their-adapter")


@provokes("Nothing names the labels of a head")
def _no_labels() -> None:
    config = lora(target_modules=["query"], modules_to_save=["classifier"])
    foreign_adapters.train(BASE, Path("their-adapter"), "tokens", config)
    from_adapter = flair_peft.PeftTransformerWordEmbeddings.from_adapter("their-adapter")
    dictionary = classifier(BASE).label_dictionary
    tagger = SequenceTagger(
        from_adapter,
        dictionary,
        "opinion",
        tag_format="BIO",
        use_rnn=False,
        use_crf=False,
        reproject_embeddings=False,
    )
    flair_peft.take_over_head(tagger)


@provokes("The model was trained in another dtype")
def _shared_dtype() -> None:
    saved(name="my-embeddings", dtype="bfloat16")
    SharedBase(BASE).load("my-classifier")


@provokes("The model was trained on another base")
def _shared_other() -> None:
    saved(name="my-embeddings")
    tiny.build("roberta", Path("roberta-base"))
    SharedBase("roberta-base").load("my-classifier")


@provokes("The method cannot be merged")
def _unmergeable() -> None:
    flair_peft.merge(classifier(BASE, peft_config=PromptTuningConfig(num_virtual_tokens=3)))


@provokes("The base is quantised")
def _merge_quantised() -> None:
    flair_peft.merge(quantised_classifier(BASE, "nf4", name="my-embeddings"))


@provokes("onnx is not installed")
def _no_onnx() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        flair_peft.export_onnx(classifier(BASE), "encoder.onnx")


@provokes("A stream is one text")
def _one_text() -> None:
    flair_peft.predict_stream(classifier(BASE), "a wonderful film")


@provokes("An item cannot be predicted")
def _one_item() -> None:
    list(flair_peft.predict_stream(classifier(BASE), ["good", "half of \ud83d a pair"], errors="raise"))


@provokes("Stock Flair: a bf16 base")
def _stock_bf16() -> None:
    flair_peft.uninstall()
    try:
        model = stock_classifier(peft_config=lora(), transformers_model_kwargs={"torch_dtype": torch.bfloat16})
        model.predict(Sentence("good"))
    finally:
        flair_peft.install()


@provokes("The hook does not know this Flair")
def _unknown_flair() -> None:
    flair_peft.uninstall()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flair, "__version__", "0.16.0")
        flair_peft.install()


# What no test can bring about at its price: the words have to stand in the source.
IN_SOURCE_ONLY = {"Processes read different bases", "The disk is full"}
# A test of their own brings these about.
OF_FLAIR_ALONE = {"Stock Flair: a file with an adapter", "Stock Flair: a directory"}
STOCK = "Stock Flair: "


def quoted() -> dict[str, str]:
    """Return the heading of each entry of the page → the message, on one line."""
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    entries = re.findall(r"^### (.+)\n\n```text\n(.+)\n```$", text, flags=re.MULTILINE)
    return {heading: " ".join(message.split()) for heading, message in entries}


def matches(message: str, quote: str) -> bool:
    """Whether a message is what is quoted, where "…" stands for anything."""
    pattern = ".*".join(map(re.escape, quote.split("…")))
    return re.fullmatch(pattern, " ".join(message.split())) is not None


@functools.cache
def templates() -> tuple[tuple[str, str], ...]:
    """Return the class and the words of each message of the package, with "…" for what is filled in; "" is logged."""
    found = []
    for path in sorted(Path(flair_peft.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if isinstance(getattr(errors, name, None), type):
                found.append((name, words_of(node.args[0])))
            elif name == "warning":
                found.append(("", words_of(node.args[0]).replace("%s", "…")))
    return tuple(found)


def words_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    if isinstance(node, ast.BinOp):
        return words_of(node.left) + words_of(node.right)
    return "…"


@pytest.fixture
def workplace(base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a base model, so that messages have short paths."""
    shutil.copytree(base("bert"), tmp_path / BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# PEFT's own words on what it merges and loads.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("heading", PROVOKED)
def test_message_of_troubleshooting_is_the_one_that_is_raised(
    heading: str, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the page quotes is what a user reads, word for word."""
    quote = quoted()[heading]
    caplog.set_level(logging.WARNING, logger="flair")
    try:
        PROVOKED[heading]()
        printed = [record.getMessage() for record in caplog.records]
    except Exception as error:
        module = type(error).__module__
        printed = [f"{'' if module == 'builtins' else module + '.'}{type(error).__qualname__}: {error}"]
    assert [message for message in printed if matches(message, quote)], f"{quote}\n{printed}"


@pytest.mark.parametrize("heading", quoted())
def test_message_of_troubleshooting_stands_in_the_source(heading: str) -> None:
    """A message that was reworded, or that nothing raises any more, is reworded or removed on the page as well."""
    quote = quoted()[heading]
    assert heading in PROVOKED or heading in IN_SOURCE_ONLY | OF_FLAIR_ALONE
    if heading.startswith(STOCK):
        return
    name, _, words = quote.partition(": ") if quote.startswith("flair_peft.errors.") else ("", "", quote)
    found = {
        template
        for error, template in templates()
        if error == name.removeprefix("flair_peft.errors.")
        and len(template.replace("…", "")) > 30
        and matches(words.replace("…", "something"), template)
    }
    assert len(found) == 1, found


def test_message_of_stock_flair_for_a_file_is_the_one_quoted(workplace: Path) -> None:
    """Stock Flair saves what it cannot load; the README quotes its words, too."""
    save_stock("old.pt")
    flair_peft.uninstall()
    with pytest.raises(RuntimeError) as caught:
        TextClassifier.load("old.pt")
    assert matches(f"RuntimeError: {caught.value}", quoted()["Stock Flair: a file with an adapter"])
    Path("my-tagger").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        TextClassifier.load("my-tagger")
    assert matches(f"IsADirectoryError: {raised.value}", quoted()["Stock Flair: a directory"])


def test_troubleshooting_reads_what_it_quotes() -> None:
    """The tests above have an object, and entries without a message are seen."""
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert len(quoted()) == text.count("\n### ") > 40
    assert set(PROVOKED) <= set(quoted())
    assert not matches("Cannot do it: now. Or never.", "Cannot do it: … Never.")


def test_reference_has_every_public_name_once() -> None:
    """A new public name is documented before anybody can use it."""
    reference = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    found = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)$", reference, flags=re.MULTILINE)
    assert sorted(found) == sorted({*flair_peft.__all__} - {"FlairPeftError"})
    assert "<!-- made: error_reference -->" in reference


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the extension that brings other texts of the repository into the site; it imports no Sphinx."""
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    yield importlib.import_module("repository")
    sys.modules.pop("repository")


def test_made_parts_of_pages_and_the_picture_are_what_the_code_makes_now() -> None:
    """Tables, helps and the picture are committed as they are; ``python -m tests.support.pages`` renews them."""
    all_pages = pages.with_made_parts()
    parts = [part["name"] for page in all_pages for part in pages.PART.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(parts) == sorted(pages.MADE)
    stale = [page for page in all_pages if pages.renewed(text := page.read_text(encoding="utf-8")) != text]
    assert not stale
    assert pages.PICTURE.read_text(encoding="utf-8") == house_picture.draw(pages.floors())


def test_made_part_of_a_page_is_replaced_between_its_marks() -> None:
    """What stands around a part stays, and a part that is empty or old is written anew."""
    made = f"<!-- made: error_tree -->\n\n{pages.error_tree()}\n\n<!-- end -->"
    for between in ("", "\nold\n"):
        page = f"# Title\n\n<!-- made: error_tree -->\n{between}<!-- end -->\n\nwords <!-- end -->\n"
        assert pages.renewed(page) == f"# Title\n\n{made}\n\nwords <!-- end -->\n"
    assert pages.renewed("no part") == "no part"


def texts() -> list[Path]:
    """Return the texts that people read in the repository."""
    folders = [
        ROOT.glob("*.md"),
        DOCS.rglob("*.md"),
        *((ROOT / name).rglob("*.md") for name in ("examples", "resources")),
    ]
    return sorted({path for folder in folders for path in folder if DOCS / "repository" not in path.parents})


def anchors(path: Path) -> set[str]:
    """Return the anchors of a text's headings, as GitHub and the site spell them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> list[str]:
    """Return the relative links of a text that lead to no file, or to no heading in it."""
    dead = []
    for target, anchor in re.findall(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]+))?\)", path.read_text(encoding="utf-8")):
        found = path.parent / target if target else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            dead.append(f"{target}#{anchor}")
    return dead


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_text_lead_to_files_and_headings_of_the_repository(path: Path) -> None:
    """Who reads the texts where they lie gets on by their links."""
    assert not dead_links(path)


def test_dead_links_are_seen(tmp_path: Path) -> None:
    """The test above has an object."""
    (tmp_path / "other.md").write_text("# A *heading* of `it`, and more\n")
    (tmp_path / "page.md").write_text(
        "# Here\n[a](other.md#a-heading-of-it-and-more) [b](other.md#absent) [c](absent.md) [d](#here) [e](#there)\n"
    )
    assert dead_links(tmp_path / "page.md") == ["other.md#absent", "absent.md#", "#there"]


def test_readme_links_to_every_page_of_the_guide() -> None:
    """The README is short because each journey has a page, and it leads there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 250
    guide = {page.relative_to(ROOT).as_posix() for page in (DOCS / "guide").glob("*.md")} - {"docs/guide/index.md"}
    assert not [page for page in sorted(guide) if f"({page}" not in readme]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_page_is_text_that_is_read_where_it_lies(page: Path) -> None:
    """No page is put together from others when the site is built, and no line of code on it is cut off."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^% |^:*`*\{(?:literal)?include\}", text, flags=re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) > 10
    code = re.findall(r"^```(?:python|bash)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert not [line for block in code for line in block.splitlines() if len(line) > 96]


def test_links_of_the_repository_become_pages_and_downloads_of_the_site(repository: ModuleType) -> None:
    """A link that is right in the repository is right in the site, and one that leads nowhere ends the build."""
    with_links_of_site = repository.with_links_of_site
    text = "[a](../../resources/format.md#files) [b](https://example.org) [c](#here) [d](files.md)"
    assert with_links_of_site(text, "docs/guide/methods.md") == (
        "[a](/repository/resources/format.md#files) [b](https://example.org) [c](#here) [d](/guide/files.md)"
    )
    text = "[a](methods.json) [b](../../README.md) [c](../../examples/notebooks/1_text_classification.ipynb)"
    assert with_links_of_site(text, "resources/benchmarks/peers.md") == (
        "[a](/../resources/benchmarks/methods.json) [b](/index.md) "
        "[c](/repository/examples/notebooks/1_text_classification.ipynb)"
    )
    with pytest.raises(LookupError, match=r"resources/absent\.md"):
        with_links_of_site("[a](absent.md)", "resources/format.md")


def test_texts_outside_of_the_pages_are_in_the_menus_of_the_site(repository: ModuleType) -> None:
    """Every text that the site has a copy of can be reached."""
    menus = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    copied = repository.texts()
    assert len(copied) > 15
    assert not [text for text in copied if f"repository/{text.rpartition('.')[0]}" not in menus]


def test_notebook_of_the_site_keeps_what_it_printed(repository: ModuleType) -> None:
    """Its copy has all outputs; only links in its text are others."""
    name = "examples/notebooks/1_text_classification.ipynb"
    copied, notebook = (json.loads(text) for text in (repository.copy(name), (ROOT / name).read_text()))
    cells = list(zip(copied["cells"], notebook["cells"], strict=True))
    assert cells
    assert all(one == other for one, other in cells if other["cell_type"] == "code")


def test_table_of_methods_has_each_method_that_works_once() -> None:
    """Methods are those that the tests try; figures are there for all that work on an encoder."""
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in pages.methods().splitlines()[2:]}
    expected = {pages._class_of(name): method for name, method in METHODS.items() if pages.works(method)}
    assert set(rows) == set(expected)
    for name, method in expected.items():
        assert ("encoder" in method.works) == bool(rows[name][1].strip()), name
    assert [cell.strip() for cell in rows["`PromptTuningConfig`"][-2:]] == ["–", "–"]
    assert [cell.strip() for cell in rows["`LoraConfig`"][-3:]] == ["✓", "✓", "✓"]


def test_tables_of_options_and_refusals_have_all_of_them() -> None:
    """Each option of LoRA in the tests' table works somewhere or is refused with a reason."""
    options, refused = pages.lora_options(), pages.refused()
    for method in LORA_VARIANTS.values():
        written = "| `" + pages._written(method).replace("|", "\\|") + "` |"
        works = pages.works(method)
        assert (written in options) == bool(works), method.name
        assert (written in refused) == (works != {"encoder", "decoder"}), method.name
    assert "`LoraConfig(use_dora=True)`" in options
    assert "`CPTConfig`" in refused


def test_picture_of_the_house_has_every_module_on_its_floor() -> None:
    """The storeys follow the floors, from the ground up, and nothing is left out."""
    floors, package = pages.floors(), Path(flair_peft.__file__).parent
    here = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for row in floors for name in row} == here
    drawn = house_picture.draw(floors)
    modules = [path.stem for path in package.rglob("*.py") if path.parent.name != "flair_peft"]
    for module in {*modules, "patch", "errors"} - {"__init__"}:
        assert f">{house_picture._label(module)}</text>" in drawn
    for folder in (name for row in floors for name in row if (house_picture.PACKAGE / name).is_dir()):
        (title,) = re.findall(rf">({folder}/ [^<]+)</text>", drawn)
        assert len(html.unescape(title)) * 9 < house_picture.WIDTH - 4 * house_picture.MARGIN, "cut at the edge"


@pytest.mark.matrix
@pytest.mark.skipif(importlib.util.find_spec("myst_nb") is None, reason="what the site needs is not installed")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links between pages, references in docstrings and pictures are there."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path / "site")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    site = tmp_path / "site"
    assert "LoraConfig" in (site / "guide" / "methods.html").read_text(encoding="utf-8")
    notebook = site / "repository" / "examples" / "notebooks" / "1_text_classification.html"
    assert len(re.findall(r'<img[^>]*src="[^"]*_images/[^"]+\.png"', notebook.read_text(encoding="utf-8"))) == 2
