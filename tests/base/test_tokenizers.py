"""Tokenizers as newer versions of transformers write them: they give what they gave there, or in stock Flair."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flair.data import Dictionary, Sentence
from flair.embeddings import StackedEmbeddings, TransformerWordEmbeddings
from flair.embeddings.base import load_embeddings
from flair.models import SequenceTagger, TokenClassifier
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings
from flair_peft.base import tokenizers
from flair_peft.errors import BaseModelNotFoundError, ModelFileError
from tests.regression import make_newer_tokenizers as newer
from tests.support import tiny
from tests.support.configs import lora
from tests.support.selection import few
from tests.support.vectors import is_same

Base = Callable[[str], str]

# Flair asks for spaces in front of words. Version 5 gives Qwen's tokenizer these and a generic one not; version 4, and
# so stock Flair, the other way round.
READ_AS_IN_STOCK = ("modernbert", "modernbert-with-image", "qwen3")
EVERY = (*newer.KINDS, *newer.CHANGED)

# The tiny Mistral's words have no mark in tokenizer.json, which version 5 goes by, and stock Flair does not.
READ_IN_STOCK_TOO = [kind for kind in newer.KINDS if kind != "mistral"]


@pytest.fixture(scope="session")
def newer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the tokenizers that a newer version wrote."""
    folder = tmp_path_factory.mktemp("newer-tokenizers")
    with tarfile.open(newer.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def with_newer_tokenizer(newer_files: Path, base: Base, kind: str, folder: Path) -> Path:
    """Return a base whose tokenizer is as the newer version writes it, and no other file of a tokenizer."""
    folder.mkdir()
    for path in Path(base(kind)).iterdir():
        if path.name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            shutil.copy(path, folder)
    for path in (newer_files / kind).glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def change(folder: Path, **settings: Any) -> Path:
    """Change the settings of a tokenizer; ``None`` takes one away."""
    path = folder / "tokenizer_config.json"
    found = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", EVERY)
def test_tokenizer_that_a_newer_version_wrote_gives_what_it_gave_there(
    newer_files: Path, base: Base, name: str
) -> None:
    """Ids, words, special tokens, padding side and length are those of transformers 5."""
    expected = json.loads((newer_files / "record.json").read_text())[name]
    found = newer.describe(tokenizers.find_tokenizer(str(newer_files / name), {}))
    if name in READ_AS_IN_STOCK:
        kind, settings = newer.CHANGED.get(name, (name, {}))
        stock = newer.describe(AutoTokenizer.from_pretrained(base(kind), add_prefix_space=True))
        for part in ("input_ids", "word_ids"):
            assert found[part][::2] == stock[part][::2] != expected.pop(part)[::2]
            assert (found.pop(part) == stock[part]) is not bool(settings)
    assert found == {name: found[name] for name in found} | {name: expected[name] for name in found}


@pytest.mark.parametrize("kind", few(READ_IN_STOCK_TOO, ["llama", "t5", "modernbert"]))
def test_base_with_a_tokenizer_of_a_newer_version_embeds_as_stock_flair_and_comes_back(
    newer_files: Path, base: Base, kind: str, tmp_path: Path
) -> None:
    """Vectors are stock Flair's for the same tokenizer in the older form, and a round trip keeps their bits."""
    folder = with_newer_tokenizer(newer_files, base, kind, tmp_path / "base")
    targets = tiny.ATTENTION_TARGETS[kind]
    config = lora(target_modules=targets, fan_in_fan_out=kind == "gpt2")
    embeddings = PeftTransformerWordEmbeddings(str(folder), peft_config=config)
    texts = ["I love it", "Berlin and Paris are large cities ."]
    stock = TransformerWordEmbeddings(base(kind))
    with embeddings.model.disable_adapter():
        assert is_same(_embed(embeddings, kind, texts), _embed(stock, kind, texts))
    expected = _embed(embeddings, kind, texts)
    for _ in range(2):
        embeddings = load_embeddings(embeddings.save_embeddings())
        assert is_same(_embed(embeddings, kind, texts), expected)


def _embed(embeddings: TransformerWordEmbeddings, kind: str, texts: list[str]) -> list[torch.Tensor]:
    embeddings.tokenizer.pad_token = embeddings.tokenizer.pad_token or embeddings.tokenizer.eos_token
    sentences = tiny.make_sentences(kind, texts)
    for sentence in sentences:
        embeddings.embed(sentence)
    return [token.get_embedding() for sentence in sentences for token in sentence]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tokenizer_without_the_file_of_the_slow_one_is_read_from_what_is_there(
    base: Base, kind: str, tmp_path: Path
) -> None:
    """Llama's and T5's tokenizers need no sentencepiece file beside tokenizer.json."""
    expected = newer.describe(tokenizers.find_tokenizer(base(kind), {}))
    folder = Path(shutil.copytree(base(kind), tmp_path / "base"))
    for name in ("tokenizer.model", "spiece.model", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    change(folder, tokenizer_class=transformers.AutoTokenizer.from_pretrained(folder).__class__.__name__[:-4])
    assert newer.describe(tokenizers.find_tokenizer(str(folder), {})) == expected


def test_tokenizer_with_a_list_of_extra_special_tokens_has_them(base: Base, tmp_path: Path) -> None:
    """Tokens of the list are special, as if they had been written in the older way."""
    folder = change(Path(shutil.copytree(base("bert"), tmp_path / "base")), extra_special_tokens=["[E1]", "[E2]"])
    found = tokenizers.find_tokenizer(str(folder), {})
    expected = AutoTokenizer.from_pretrained(base("bert"), additional_special_tokens=["[E1]", "[E2]"])
    assert newer.describe(found) == newer.describe(expected)


def _through_a_file(embeddings: TransformerWordEmbeddings, _: Path) -> TransformerWordEmbeddings:
    return load_embeddings(embeddings.save_embeddings())


def _through_a_pickle(embeddings: TransformerWordEmbeddings, _: Path) -> TransformerWordEmbeddings:
    return pickle.loads(pickle.dumps(embeddings))


def _through_a_directory(embeddings: TransformerWordEmbeddings, folder: Path) -> TransformerWordEmbeddings:
    head = SequenceTagger(embeddings, Dictionary(), "pos", use_rnn=False, use_crf=False)
    flair_peft.save_pretrained(head, folder)
    return flair_peft.from_pretrained(folder).embeddings


@pytest.mark.parametrize(
    ("make", "stored", "use_fast"),
    [
        *((PeftTransformerWordEmbeddings, each, True) for each in (_through_a_file, _through_a_pickle)),
        *((PeftTransformerWordEmbeddings, _through_a_directory, use_fast) for use_fast in (True, False)),
        (TransformerWordEmbeddings, _through_a_directory, True),
    ],
)
def test_side_from_which_a_tokenizer_cuts_is_stored(
    base: Base, make: Callable[..., Any], stored: Callable[..., Any], use_fast: bool, tmp_path: Path
) -> None:
    """What was set on the tokenizer is there after a load, after another, and after it was set back."""
    options = {"peft_config": lora()} if make is PeftTransformerWordEmbeddings else {}
    embeddings = make(
        base("bert"), allow_long_sentences=False, transformers_tokenizer_kwargs={"use_fast": use_fast}, **options
    )
    text = [" ".join(str(number) for number in range(600))]
    cut = {}
    for turn, side in enumerate(["left", "left", "right"]):
        embeddings.tokenizer.truncation_side = side
        cut[side] = _embed(embeddings, "bert", text)
        embeddings = stored(embeddings, tmp_path / str(turn))
        assert embeddings.tokenizer.truncation_side == side
        assert is_same(_embed(embeddings, "bert", text), cut[side])
    assert not is_same(cut["left"], cut["right"])


@pytest.mark.parametrize(
    ("make", "stored"),
    [
        *((PeftTransformerWordEmbeddings, each) for each in (_through_a_file, _through_a_pickle, _through_a_directory)),
        (TransformerWordEmbeddings, _through_a_directory),
    ],
)
def test_marks_that_a_tokenizer_reads_as_text_are_stored(
    base: Base, make: Callable[..., Any], stored: Callable[..., Any], tmp_path: Path
) -> None:
    """What was set on the tokenizer is there after a load, and after it was set back."""

    def read(embeddings: TransformerWordEmbeddings) -> torch.Tensor:
        sentence = Sentence(["Berlin", "[MASK]"])
        embeddings.embed(sentence)
        return torch.stack([token.get_embedding() for token in sentence])

    options = {"peft_config": lora()} if make is PeftTransformerWordEmbeddings else {}
    embeddings, found = make(base("bert"), **options), {}
    for turn, splits in enumerate([True, True, False]):
        embeddings.tokenizer.split_special_tokens = splits
        found[splits] = read(embeddings)
        embeddings = stored(embeddings, tmp_path / str(turn))
        assert embeddings.tokenizer.split_special_tokens == splits
        assert torch.equal(read(embeddings), found[splits])
    assert not torch.equal(found[True], found[False])


@pytest.mark.parametrize("name", ["TokenizersBackend", "ClassOfTomorrow"])
def test_tokenizer_of_an_unknown_class_with_code_of_its_own_never_asks(
    newer_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Code that a tokenizer names is neither run nor asked for: what is generic is read, the rest refused by name."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    code = {"AutoTokenizer": ["owner/code--code.Slow", "owner/code--code.Fast"]}
    folder = change(Path(shutil.copytree(newer_files / "bert", tmp_path / "base")), tokenizer_class=name, auto_map=code)
    if name == "TokenizersBackend":
        tokenizers.find_tokenizer(str(folder), {})
    else:
        with pytest.raises(BaseModelNotFoundError, match="comes with code of its own"):
            tokenizers.find_tokenizer(str(folder), {})


def test_foreign_adapter_brings_a_tokenizer_of_a_newer_version(newer_files: Path, base: Base, tmp_path: Path) -> None:
    """The tokenizer beside an adapter is the one that is used, whatever version wrote it."""
    adapter = _adapter(base("modernbert"), tmp_path / "adapter")
    for path in (newer_files / "modernbert").glob("tokenizer*"):
        shutil.copy(path, adapter)
    change(adapter, model_max_length=48)
    embeddings = PeftTransformerWordEmbeddings.from_adapter(str(adapter), base_model=base("modernbert"))
    assert embeddings.tokenizer.model_max_length == 48
    assert embeddings.embed(Sentence("Berlin"))


def test_foreign_adapter_with_a_tokenizer_that_cannot_be_read_names_its_folder(base: Base, tmp_path: Path) -> None:
    """The base is not blamed for files beside the adapter."""
    adapter = _adapter(base("bert"), tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelNotFoundError, match=r"Cannot read the tokenizer in .*adapter'.* pass tokenizer="):
        PeftTransformerWordEmbeddings.from_adapter(str(adapter), base_model=base("bert"))
    own = {"base_model": base("bert"), "tokenizer": base("bert")}
    assert PeftTransformerWordEmbeddings.from_adapter(str(adapter), **own).embed(Sentence("Berlin"))


def _adapter(base: str, folder: Path) -> Path:
    targets = ["Wqkv"] if "modernbert" in base else ["query"]
    model = get_peft_model(transformers.AutoModel.from_pretrained(base), LoraConfig(target_modules=targets))
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    model.save_pretrained(folder)
    return folder


def test_archive_that_would_fill_the_memory_is_not_unpacked() -> None:
    """A few kilobytes can say that they are gigabytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.json", bytes(300 << 20))
    for read in (lambda: tokenizers.unpack_tokenizer(packed, {}), lambda: tokenizers.digest_of_vocabulary(packed)):
        with pytest.raises(ModelFileError, match="fill the memory"):
            read()


@pytest.mark.parametrize("count", [1, 2])
def test_tokenizers_with_several_chat_templates_are_kept(count: int, base: Base, tmp_path: Path) -> None:
    """transformers writes these into a folder of their own, inside that of the tokenizer."""
    with_templates = tmp_path / "base"
    shutil.copytree(base("bert"), with_templates)
    tokenizer = AutoTokenizer.from_pretrained(with_templates)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(with_templates)
    assert (with_templates / "additional_chat_templates").is_dir()
    made = [PeftTransformerWordEmbeddings(str(with_templates), peft_config=lora(r=r)) for r in (2, 3)[:count]]
    labels = Dictionary(add_unk=False)
    labels.add_item("A")
    labels.add_item("B")
    model = TokenClassifier(StackedEmbeddings(made) if count > 1 else made[0], label_dictionary=labels, label_type="x")
    sentence = Sentence("a few words")
    model.predict(sentence)
    expected = [(token.get_label("x").value, token.get_label("x").score) for token in sentence]
    flair_peft.save_pretrained(model, tmp_path / "kept")
    model.save(tmp_path / "kept.pt")
    for loaded in (flair_peft.from_pretrained(tmp_path / "kept"), TokenClassifier.load(tmp_path / "kept.pt")):
        loaded.predict(sentence)
        assert [(token.get_label("x").value, token.get_label("x").score) for token in sentence] == expected
        for module in loaded.modules():
            if isinstance(module, PeftTransformerWordEmbeddings):
                assert module.tokenizer.chat_template == tokenizer.chat_template
    if count == 1:
        for _ in range(2):  # over the first, too
            flair_peft.to_transformers(model, tmp_path / "exported")
        assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template == tokenizer.chat_template
