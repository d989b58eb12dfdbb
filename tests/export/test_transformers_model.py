"""Flair models for transformers: the same scores and spans where neither Flair nor this package is."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flair.data import Dictionary, Sentence, get_spans_from_bio
from flair.embeddings import (
    DocumentRNNEmbeddings,
    StackedEmbeddings,
    TransformerDocumentEmbeddings,
    TransformerWordEmbeddings,
)
from flair.models import SequenceTagger, TextClassifier, TextRegressor, TokenClassifier
from flair.nn import Model
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    IA3Config,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, AutoTokenizer, pipeline

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.errors import (
    AdapterConfigError,
    HeadMismatchError,
    SaveError,
    StateMismatchError,
    UnsupportedMethodError,
    UnsupportedStateError,
)
from flair_peft.export import transformers_model
from tests.export import reader
from tests.support import tiny
from tests.support.configs import lora
from tests.support.foreign_adapters import write_base
from tests.support.methods import perturb_
from tests.support.models import ZOO, make, save_random
from tests.support.quantised import quantised_classifier
from tests.support.selection import few

Base = Callable[[str], str]

TARGETS = {**tiny.ATTENTION_TARGETS, **tiny.MORE_TARGETS}
TEXTS = list(tiny.CORPUS)
WORDS = [text.split() for text in TEXTS]
TOLERANCE = 1e-4
SPAN_LABELS = ["PER", "LOC", "ORG"]


def _dictionary(items: list[str], *, add_unk: bool = False, are_spans: bool = False) -> Dictionary:
    dictionary = Dictionary(add_unk=add_unk)
    for item in items:
        dictionary.add_item(item)
    dictionary.span_labels = are_spans
    return dictionary


def _lora(architecture: str, **options: Any) -> Any:
    return lora(target_modules=TARGETS[architecture], fan_in_fan_out=architecture == "gpt2", **options)


def _words(base: str, architecture: str = "bert", **options: Any) -> PeftTransformerWordEmbeddings:
    return PeftTransformerWordEmbeddings(base, **{"peft_config": _lora(architecture), **options})


def _documents(base: str, architecture: str = "bert", **options: Any) -> PeftTransformerDocumentEmbeddings:
    return PeftTransformerDocumentEmbeddings(base, **{"peft_config": _lora(architecture), **options})


def _tagger(embeddings: Any, labels: list[str] = SPAN_LABELS, **options: Any) -> SequenceTagger:
    settings = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False, **options}
    tags = settings.pop("dictionary", None) or _dictionary(labels, are_spans=True)
    return SequenceTagger(embeddings, tag_dictionary=tags, tag_type="ner", **settings).eval()


def _classifier(embeddings: Any, labels: list[str] | None = None, **options: Any) -> TextClassifier:
    """Return a classifier whose bias is not zero, where transformers has one."""
    settings = {"label_dictionary": _dictionary(labels or ["good", "bad", "odd"]), "label_type": "class", **options}
    model = TextClassifier(embeddings, **settings).eval()
    if model.decoder.bias is not None:
        torch.nn.init.normal_(model.decoder.bias)
    return model


def _without_bias(embeddings: Any) -> TextClassifier:
    return _classifier(embeddings, decoder=torch.nn.Linear(embeddings.embedding_length, 3, bias=False))


def _live_scores(model: Any, words: list[list[str]] = WORDS) -> torch.Tensor:
    """Return what the live model's own layers make of the vectors that its embeddings give each word, or text."""
    sentences = [Sentence(each) for each in words]
    embeddings = model.document_embeddings if isinstance(model, TextRegressor) else model.embeddings
    embeddings.embed(sentences)
    is_of_words = isinstance(model, SequenceTagger | TokenClassifier)
    points = [token for sentence in sentences for token in sentence] if is_of_words else sentences
    vectors = torch.stack([point.get_embedding() for point in points])
    with torch.no_grad():
        if isinstance(model, SequenceTagger):
            return model.linear(model.embedding2nn(vectors) if model.reproject_embeddings else vectors).float()
        return model.decoder(vectors).float()


def _read_scores(folder: Path, model: Any, words: list[list[str]] = WORDS, *, is_merged: bool = True) -> torch.Tensor:
    reads_words = isinstance(model, SequenceTagger | TokenClassifier)
    return torch.tensor(reader.scores(str(folder), words, reads_words=reads_words, is_merged=is_merged))


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def _assert_same(model: Model, folder: Path, *, is_merged: bool = True, tolerance: float = TOLERANCE) -> None:
    """Export, and compare on text that the export itself does not look at."""
    expected = _live_scores(model)
    flair_peft.to_transformers(model, folder, merged=is_merged)
    assert _distance(_read_scores(folder, model, is_merged=is_merged), expected) < tolerance


TAGGERS = ["bert", "bert-slow", "bert-padded-vocab", "bert-mlm", "roberta", "xlm-roberta", "deberta-v2", "electra"]
TAGGERS += ["distilbert", "albert", "mpnet", "xlnet", "t5", "gpt2", "llama", "qwen2", "mistral", "gemma"]


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("architecture", few(TAGGERS, {"bert", "roberta", "deberta-v2", "xlnet", "gpt2", "llama"}))
def test_tagger_scores_words_as_its_live_model_does(
    architecture: str, is_merged: bool, base: Base, tmp_path: Path
) -> None:
    """The first subtoken of each word has the scores that Flair's head gives the word."""
    _assert_same(_tagger(_words(base(architecture), architecture)), tmp_path / "out", is_merged=is_merged)


# What reads the first token through two layers: with tanh, ReLU or GELU between them.
ENCODERS = ["bert", "bert-padded-vocab", "roberta", "xlm-roberta", "deberta-v2", "electra", "distilbert", "albert"]
ENCODERS += ["mpnet"]


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("architecture", few(ENCODERS, {"bert", "roberta", "deberta-v2", "distilbert"}))
def test_classifier_on_an_encoder_scores_texts_as_its_live_model_does(
    architecture: str, is_merged: bool, base: Base, tmp_path: Path
) -> None:
    """Two layers with an activation between them compute what Flair's one does."""
    _assert_same(_classifier(_documents(base(architecture), architecture)), tmp_path / "out", is_merged=is_merged)


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize(
    "architecture", few(["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma"], {"gpt2", "llama"})
)
def test_classifier_on_a_decoder_scores_texts_as_its_live_model_does(
    architecture: str, is_merged: bool, base: Base, tmp_path: Path
) -> None:
    """Both read the last token, in padded batches too; transformers has no bias there."""
    _assert_same(_without_bias(_documents(base(architecture), architecture)), tmp_path / "out", is_merged=is_merged)


@pytest.mark.parametrize(
    ("settings", "is_merged"),
    [({"pad_token_id": 7}, False), ({"pad_token_id": 7, "return_dict": False}, True)],
    ids=["adapter", "merged"],
)
def test_settings_of_a_base_that_classes_read_in_their_own_way_are_set_right(
    settings: dict[str, Any], is_merged: bool, base: Base, tmp_path: Path
) -> None:
    """Decoders look for padding that their tokenizer does not use, and outputs can be tuples."""
    path = tmp_path / "base"
    shutil.copytree(base("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    _assert_same(_without_bias(_documents(str(path), "llama")), tmp_path / "out", is_merged=is_merged)


@pytest.mark.parametrize("scale", [0.01, 30.0])
@pytest.mark.parametrize("architecture", ["roberta", "electra"])
def test_classifier_scores_small_and_large_come_out_right(
    architecture: str, scale: float, base: Base, tmp_path: Path
) -> None:
    """What an activation does to large numbers, or to small ones, changes no score."""
    model = _classifier(_documents(base(architecture), architecture))
    with torch.no_grad():
        model.decoder.weight.mul_(scale)
    _assert_same(model, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
@pytest.mark.parametrize("merged", [True, False])
def test_files_may_be_read_by_whom_those_of_the_package_may(merged: bool, base: Base, tmp_path: Path) -> None:
    """A server runs under another user, and safetensors 0.8 makes files for their owner alone."""
    flair_peft.to_transformers(_classifier(_documents(base("bert"))), tmp_path / "out", merged=merged)
    (tmp_path / "usual").touch()
    wanted = {(tmp_path / "usual").stat().st_mode}
    assert {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()} == wanted


DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"]


@pytest.mark.parametrize("is_adapted", [True, False], ids=["adapter", "plain"])
@pytest.mark.parametrize(("of_base", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("architecture", few([*DECODERS, "bert"], ["llama", "bert"]))
def test_weights_have_the_dtype_that_is_asked_for(
    architecture: str, of_base: str, wanted: str, is_adapted: bool, base: Base, tmp_path: Path
) -> None:
    """Whatever the config of the base says, and with the adapter merged in fp32."""
    if is_adapted:
        model = _tagger(_words(base(architecture), architecture, dtype=of_base))
    else:
        arguments = {"model_kwargs": {"torch_dtype": getattr(torch, of_base)}, "tokenizer_kwargs": {"pad_token": "."}}
        options = {f"transformers_{name}": value for name, value in arguments.items()}
        model = _tagger(TransformerWordEmbeddings(base(architecture), **options)).to(getattr(torch, of_base))
    flair_peft.to_transformers(model, tmp_path, dtype=wanted)
    written = load_file(tmp_path / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{wanted}"}
    if is_adapted and wanted == "float32":
        merged = flair_peft.merge(model).embeddings.model.state_dict()
        same = {name: key for name in merged for key in written if key.endswith(f".{name}")}
        assert len(same) > 10
        assert all(torch.equal(merged[name], written[key]) for name, key in same.items())


def test_classifier_in_half_precision_still_tells_texts_apart(base: Base, tmp_path: Path) -> None:
    """Servers load in fp16: what the two layers multiply by must not fall below its smallest number."""
    model = _classifier(_documents(base("bert")))
    flair_peft.to_transformers(model, tmp_path, dtype="float16")
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="float16").float()
    encoding = AutoTokenizer.from_pretrained(tmp_path)(
        WORDS, is_split_into_words=True, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = read(**encoding).logits
    assert _distance(found, _live_scores(model)) < 0.02


def _spans(model: Any, text: str, label_type: str = "ner") -> list[tuple[int, int, str, float]]:
    sentence = Sentence(text.split())
    model.predict(sentence)
    labels = sentence.get_labels(label_type)
    return [(each.data_point.start_position, each.data_point.end_position, each.value, each.score) for each in labels]


def _found_by(tagger: Any, text: str) -> list[tuple[int, int, str, float]]:
    """Return what pipeline finds; offsets of some tokenizers begin with the space before a word."""
    found = tagger(text)
    starts = [each["end"] - len(text[each["start"] : each["end"]].lstrip()) for each in found]
    return [(n, each["end"], each["entity_group"], float(each["score"])) for n, each in zip(starts, found, strict=True)]


def _split_alike(tokenizer: Any) -> list[str]:
    """Return texts without words whose first subtoken is a space alone: pipeline takes what follows for a new word."""

    def first(word: str) -> str:
        encoding = tokenizer([word], is_split_into_words=True)
        return encoding.tokens()[encoding.word_ids().index(0)]

    texts = [[word for word in words if first(word) not in ("Ġ", "▁")] for words in WORDS]
    return [" ".join(words) for words in texts if len(words) > 1]


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize(
    ("labels", "tag_format"), [(SPAN_LABELS, "BIO"), (["PER"], "BIOES")], ids=["BIO", "BIOES of one type"]
)
@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "llama"])
def test_pipeline_gives_the_spans_of_the_tagger(
    architecture: str, labels: list[str], tag_format: str, base: Base, tmp_path: Path
) -> None:
    """Any sequence of tags, right or wrong, is grouped as in Flair, and spans have Flair's scores."""
    model = _tagger(_words(base(architecture), architecture), labels, tag_format=tag_format)
    flair_peft.to_transformers(model, tmp_path)
    tagger = pipeline("token-classification", model=str(tmp_path), aggregation_strategy="first")
    count = 0
    for text in _split_alike(tagger.tokenizer):
        expected, found = _spans(model, text), _found_by(tagger, text)
        assert [each[:3] for each in found] == [each[:3] for each in expected]
        assert [each[3] for each in found] == pytest.approx([each[3] for each in expected], abs=1e-4)
        count += len(expected)
    assert count > 5


def test_pipeline_gives_the_spans_of_all_types_in_bioes_where_the_tags_are_in_order(base: Base, tmp_path: Path) -> None:
    """B-, I- and E- of one type are one span, and S- beside it another."""
    model = _tagger(_words(base("bert")))
    flair_peft.to_transformers(model, tmp_path)
    tagger = pipeline("token-classification", model=str(tmp_path), aggregation_strategy="first")
    wanted = ["S-PER", "B-PER", "I-PER", "E-PER", "O", "B-LOC", "E-LOC", "S-LOC", "S-ORG", "O"]
    scores = torch.full((len(wanted), len(model.label_dictionary)), -9.0)
    for row, label in enumerate(wanted):
        scores[row, model.label_dictionary.get_idx_for_item(label)] = 9.0
    text = " ".join("abcdefghij")

    class Fixed(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return torch.cat([scores[:1], scores, scores[:1]])[None]

    tagger.model.classifier = Fixed()
    found = [(each["start"] // 2, each["end"] // 2, each["entity_group"]) for each in tagger(text)]
    expected = [(places[0], places[-1], label) for places, _, label in get_spans_from_bio([*wanted])]
    assert found == expected
    assert len(expected) == 5


def test_labels_of_bioes_are_called_as_others_read_them(base: Base, tmp_path: Path) -> None:
    """The rows keep their order, and the config keeps Flair's names."""
    flair_peft.to_transformers(_tagger(_words(base("bert")), ["PER"]), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "O", 1: "B-PER", 2: "B-PER", 3: "I-PER", 4: "I-PER"}
    assert config.label2id == {"O": 0, "B-PER": 1, "I-PER": 3}
    assert config.flair_peft["labels"] == ["O", "S-PER", "B-PER", "E-PER", "I-PER"]
    assert config.num_labels == 5


def test_type_of_spans_that_pipeline_takes_for_none_is_said(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Short for an organisation, O is what transformers calls a word without a label."""
    for labels in (["PER", "O"], ["PER", "ORG"]):
        model, folder = _tagger(_words(base("bert")), labels), tmp_path / labels[1]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flair_peft"):
            _assert_same(model, folder)
        is_left_out = labels[1] == "O"
        assert ("spans of the type O" in caplog.text) is is_left_out
        assert ("takes the type O for no span" in (folder / "README.md").read_text()) is is_left_out


ODD = ["<unk>", "O", "S-x", 'a "quoted" label', "Größe|`x`", "two\nlines", ""]


def test_label_that_flair_gives_to_no_word_is_called_o(base: Base, tmp_path: Path) -> None:
    """A SequenceTagger leaves out _ like O, as pipeline leaves out O; other models give it."""
    tags = _dictionary(["O", "_", "NOUN"])
    flair_peft.to_transformers(_tagger(_words(base("bert")), dictionary=tags), tmp_path / "tagger")
    flair_peft.to_transformers(TokenClassifier(_words(base("bert")), tags, "pos"), tmp_path / "words")
    config = AutoConfig.from_pretrained(tmp_path / "tagger")
    assert (config.id2label, config.flair_peft["labels"]) == ({0: "O", 1: "O", 2: "NOUN"}, ["O", "_", "NOUN"])
    card = (tmp_path / "tagger" / "README.md").read_text()
    assert "here _ is called O" in card
    assert "B- and S-" not in card
    assert AutoConfig.from_pretrained(tmp_path / "words").id2label[1] == "_"


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_labels_of_any_text_are_kept(is_merged: bool, base: Base, tmp_path: Path) -> None:
    """A dictionary with <unk> has its row, and names are not changed where they are no tags of spans."""
    labels = [label for label in ODD if label != "<unk>"]
    model = _classifier(_documents(base("bert")), label_dictionary=_dictionary(labels, add_unk=True))
    _assert_same(model, tmp_path / "out", is_merged=is_merged)
    assert [*AutoConfig.from_pretrained(tmp_path / "out").id2label.values()] == ODD


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_tagger_that_reads_other_subtokens_has_their_scores_and_says_so(
    pooling: Any, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores of a linear layer can be pooled as the vectors are; that pipeline does not is said."""
    model = _tagger(_words(base("bert"), subtoken_pooling=pooling))
    flair_peft.to_transformers(model, tmp_path)
    assert f"subtoken_pooling='{pooling}'" in caplog.text
    read = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    expected = _live_scores(model, WORDS[:1])
    encoding = AutoTokenizer.from_pretrained(tmp_path)(WORDS[0], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        scores = read(**encoding).logits[0]
    numbers = encoding.word_ids()
    for number, row in enumerate(expected):
        own = scores[[place for place, word in enumerate(numbers) if word == number]]
        assert _distance(own.mean(dim=0) if pooling == "mean" else own[-1], row) < TOLERANCE


def test_code_in_the_card_gives_the_tags_of_any_text(base: Base, tmp_path: Path) -> None:
    """Words that the tokenizer splits in its own way are tagged as in Flair."""
    model = _tagger(_words(base("bert")), tag_format="BIO")
    flair_peft.to_transformers(model, tmp_path)
    text = "The U.S. troops don't leave San-Francisco."
    code = (tmp_path / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    code = code.replace("path of this folder", str(tmp_path)).replace("George Washington went to Washington.", text)
    found: dict[str, Any] = {}
    exec(code, found)
    sentence = Sentence(text)
    model.predict(sentence, force_token_predictions=True)
    assert found["tags"] == [token.get_label("ner", "O").value for token in sentence]
    assert len(found["tags"]) < len(AutoTokenizer.from_pretrained(tmp_path).tokenize(text))


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_code_in_the_card_of_a_classifier_runs(is_merged: bool, base: Base, tmp_path: Path) -> None:
    """It classifies as Flair does, from merged weights and from the adapter."""
    model = _classifier(_documents(base("bert")))
    flair_peft.to_transformers(model, tmp_path, merged=is_merged)
    code = (tmp_path / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("path of this folder", str(tmp_path)), found)
    sentence = Sentence("George Washington went to Washington.")
    model.predict(sentence)
    (label,) = found["classifier"](found["text"])
    assert label["label"] == sentence.labels[0].value
    assert label["score"] == pytest.approx(sentence.labels[0].score, abs=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(
    ("name", "config"),
    {
        "IA3": lambda t: IA3Config(target_modules=t, feedforward_modules=[], init_ia3_weights=False),
        "VERA": lambda t: VeraConfig(target_modules=t[:1], r=4, init_weights=False),
    }.items(),
    ids=["IA3", "VERA"],
)
def test_code_in_the_card_of_a_classifier_runs_whether_or_not_peft_merges_it(
    name: str, config: Callable[[list[str]], Any], architecture: str, base: Base, tmp_path: Path
) -> None:
    """PEFT does not merge all methods beside a head of several layers that is saved whole: then the card does not."""
    embeddings = _documents(base(architecture), peft_config=config(TARGETS[architecture]))
    perturb_(embeddings.model, seed=1, scale=0.1)
    model = _classifier(embeddings)
    flair_peft.to_transformers(model, tmp_path, merged=False)
    text = "George Washington went to Washington ."
    found = _run_card(tmp_path, text)
    model.predict(sentence := Sentence(text, use_tokenizer=False))
    (label,) = found["classifier"](found["text"])
    assert label["label"] == sentence.labels[0].value
    assert label["score"] == pytest.approx(sentence.labels[0].score, abs=1e-4)


def _run_card(folder: Path, text: str | list[str]) -> dict[str, Any]:
    """Return what the code in a card finds for a text."""
    code = (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    code = code.replace("path of this folder", str(folder))
    found: dict[str, Any] = {}
    exec(code.replace('"George Washington went to Washington."', repr(text)), found)
    return found


@pytest.mark.filterwarnings("ignore:Token indices sequence length")
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_code_in_the_card_bears_words_without_subtokens_and_long_texts(
    pooling: str, base: Base, tmp_path: Path
) -> None:
    """The former have no tag there; of the latter, what the transformer reads at once is tagged as in Flair."""
    model = _tagger(_words(base("bert"), subtoken_pooling=pooling, allow_long_sentences=False), tag_format="BIO")
    flair_peft.to_transformers(model, tmp_path)
    words = ["George", "\u200b", *["Washington"] * 600]
    tags = _run_card(tmp_path, words)["tags"]
    sentence = Sentence(words)
    model.predict(sentence, force_token_predictions=True)
    live = [token.get_label("ner", "O").value for token in sentence]
    read = [place for place, tag in enumerate(tags) if tag is not None]
    assert len(tags) == len(words)
    assert 1 not in read
    assert 10 < len(read) < 600
    assert [tags[place] for place in read] == [live[place] for place in read]


def test_code_in_the_card_of_a_classifier_cuts_long_texts(base: Base, tmp_path: Path) -> None:
    """As Flair does where it reads no windows."""
    model = _classifier(_documents(base("bert"), allow_long_sentences=False))
    flair_peft.to_transformers(model, tmp_path)
    text = "Washington " * 600
    sentence = Sentence(text)
    model.predict(sentence)
    found = _run_card(tmp_path, text)
    (label,) = found["classifier"](found["text"], truncation=True)
    assert label["score"] == pytest.approx(sentence.labels[0].score, abs=1e-4)


@pytest.mark.parametrize("architecture", few(["bert", "qwen2", "gemma"], ["bert", "qwen2"]))
def test_card_gives_a_classifier_words_where_a_text_has_other_subtokens(
    architecture: str, base: Base, tmp_path: Path
) -> None:
    """Byte-level and SentencePiece tokenizers can see the spaces between words."""
    embeddings = _documents(base(architecture), architecture)
    model = _classifier(embeddings) if architecture == "bert" else _without_bias(embeddings)
    flair_peft.to_transformers(model, tmp_path)
    is_said = "other subtokens for a text than for its words" in (tmp_path / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    of_text, of_words = tokenizer(" ".join(WORDS[0])), tokenizer(WORDS[0], is_split_into_words=True)
    assert is_said is (of_text["input_ids"] != of_words["input_ids"])
    assert is_said is (architecture != "bert")
    text = "That's a U.S. thing, isn't it?"
    sentence = Sentence(text)
    model.predict(sentence, return_probabilities_for_all_classes=True)
    found = _run_card(tmp_path, text)
    live = {label.value: label.score for label in sentence.labels}
    if is_said:
        scores = found["scores"].softmax(dim=-1).tolist()
        own = {found["classifier"].model.config.id2label[place]: score for place, score in enumerate(scores)}
    else:
        own = {each["label"]: each["score"] for each in found["classifier"](found["text"], top_k=None)}
    assert own == pytest.approx(live, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_card_of_an_adapter_that_peft_merges_wrongly_does_not_merge_it(base: Base, tmp_path: Path) -> None:
    """The adapter is right as it is; merged by the card's own code it would tag something else."""
    config = lora(target_modules=["q", "shared"])
    model = _tagger(PeftTransformerWordEmbeddings(base("t5"), peft_config=config), tag_format="BIO")
    with pytest.raises(StateMismatchError, match="merges this method wrongly"):
        flair_peft.merge(model)
    flair_peft.to_transformers(model, tmp_path / "t5", merged=False)
    assert "merge_and_unload" not in (tmp_path / "t5" / "README.md").read_text()
    sentence = Sentence(TEXTS[0])
    model.predict(sentence, force_token_predictions=True)
    tags = _run_card(tmp_path / "t5", [token.text for token in sentence])["tags"]
    assert tags == [token.get_label("ner", "O").value for token in sentence]
    other = _tagger(_words(base("bert")))
    flair_peft.to_transformers(other, tmp_path / "bert", merged=False)
    assert "merge_and_unload" in (tmp_path / "bert" / "README.md").read_text()


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"torchscript": True}], ids=str)
@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_base_that_returns_tuples_is_asked_for_names(
    is_merged: bool, settings: dict[str, bool], base: Base, tmp_path: Path
) -> None:
    """A config may say so; what reads the export asks for logits by name."""
    own = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, **settings}))
    model = _classifier(_documents(str(own)))
    flair_peft.to_transformers(model, tmp_path / "model", merged=is_merged)
    found = _run_card(tmp_path / "model", "George went .")
    assert found["classifier"](found["text"])[0]["label"] in ("good", "bad", "odd")


@pytest.mark.parametrize("architecture", ["umt5", "t5gemma"])
def test_adapter_on_a_transformer_that_stock_flair_cannot_hold_is_written(
    architecture: str, base: Base, tmp_path: Path
) -> None:
    """PEFT reads and merges it all the same; a plain Flair model of it is refused."""
    model = _tagger(_words(base(architecture), architecture))
    _assert_same(model, tmp_path / "adapter", is_merged=False)
    assert "merge_and_unload" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(AdapterConfigError, match="Flair's own embeddings cannot hold its"):
        flair_peft.merge(model)


def test_adapter_is_written_without_a_word_on_merging(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a merged Flair model would do otherwise is no matter here."""
    model = _classifier(_documents(base("bert"), allow_long_sentences=True))
    flair_peft.to_transformers(model, tmp_path, merged=False)
    assert "merged" not in caplog.text


def test_labels_that_peft_does_not_read_are_named_where_an_adapter_is_written(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of them load without a word, under names of transformers' own: shows once PEFT reads them."""
    embeddings = _documents(base("llama"), "llama")
    head = torch.nn.Linear(embeddings.embedding_length, 2, bias=False)
    flair_peft.to_transformers(_classifier(embeddings, ["good", "bad"], decoder=head), tmp_path, merged=False)
    assert "labels would have no names" in caplog.text
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "good", 1: "bad"}
    found = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path))
    assert found.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("length", [8, 16])
def test_tagger_whose_tokenizer_cuts_soon_is_compared_on_what_it_reads(length: int, base: Base, tmp_path: Path) -> None:
    """Here and there, long texts are cut or split in other ways."""
    model = _tagger(_words(base("bert"), transformers_tokenizer_kwargs={"model_max_length": length}))
    flair_peft.to_transformers(model, tmp_path)
    short = [["Berlin"], ["It", "is"]]
    assert _distance(_read_scores(tmp_path, model, short), _live_scores(model, short)) < TOLERANCE


def test_base_with_a_head_for_other_labels_is_merged_alone(base: Base, tmp_path: Path) -> None:
    """PEFT would have to drop that head first."""
    classified = AutoModelForTokenClassification.from_pretrained(base("bert"), num_labels=7)
    classified.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(tmp_path / "base")
    model = _tagger(_words(str(tmp_path / "base")))
    with pytest.raises(StateMismatchError, match=r"size mismatch.*Leave merged at True, or --adapter out\.$"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=False)
    _assert_same(model, tmp_path / "out")


def test_words_that_are_labelled_without_a_place_in_a_span_are_named(base: Base, tmp_path: Path) -> None:
    """Flair joins them to the span before; a pipeline does not."""
    tags = _dictionary(["PER", "LOC"], add_unk=True, are_spans=True)
    model = _tagger(_words(base("bert")), dictionary=tags, allow_unk_predictions=True, tag_format="BIO")
    flair_peft.to_transformers(model, tmp_path / "unknown")
    flair_peft.to_transformers(_tagger(_words(base("bert"))), tmp_path / "usual")
    said = [(tmp_path / name / "README.md").read_text() for name in ("unknown", "usual")]
    assert ["is a span of its own" in text for text in said] == [True, False]


def test_text_that_ends_in_the_mark_of_padding_is_named(base: Base, tmp_path: Path) -> None:
    """Classes of decoders take it for padding, wherever it comes from."""
    flair_peft.to_transformers(_without_bias(_documents(base("llama"), "llama")), tmp_path / "decoder")
    flair_peft.to_transformers(_classifier(_documents(base("bert"))), tmp_path / "encoder")
    said = [(tmp_path / name / "README.md").read_text() for name in ("decoder", "encoder")]
    assert ["padding is told by its mark" in text for text in said] == [True, False]


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_no_dtype_and_no_place_are_refused(is_merged: bool, base: Base, tmp_path: Path) -> None:
    """Before anything is written, in either form."""
    model = _classifier(_documents(base("bert")))
    with pytest.raises(AdapterConfigError, match="Cannot use dtype 'nonsense'"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=is_merged, dtype="nonsense")
    for place in ("", None):
        with pytest.raises(AdapterConfigError, match="names no place"):
            flair_peft.to_transformers(model, place, merged=is_merged)
        with pytest.raises(AdapterConfigError, match="names no place"):
            flair_peft.save_pretrained(model, place)
    assert not list(tmp_path.iterdir())


def test_adapter_of_bare_parameters_is_written_for_peft(base: Base, tmp_path: Path) -> None:
    """target_parameters names them, and none of their modules is a target besides."""
    config = lora(target_modules=[], target_parameters=["query.weight"])
    _assert_same(_tagger(PeftTransformerWordEmbeddings(base("bert"), peft_config=config)), tmp_path, is_merged=False)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"^encoder.layer.0.attention.self.query|^encoder.layer.1.attention.self.query": 2}},
        {"alpha_pattern": {"(^encoder.layer.0.attention.self|x).query": 3, "query": 7}},
        {"modules_to_save": ["dense"]},
        {"modules_to_save": ["output.dense", "LayerNorm"]},
    ],
    ids=str,
)
def test_names_of_an_adapter_are_those_of_the_same_modules_in_the_class(
    options: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    """Whichever way an expression says where a name begins, and though the head has layers that are called so, too."""
    model = _classifier(_documents(base("bert"), peft_config=lora(target_modules=["query", "value"], **options)))
    perturb_(model.embeddings.model, seed=1, scale=0.1)
    _assert_same(model, tmp_path, is_merged=False)


@pytest.mark.parametrize("kind", [_tagger, _classifier])
def test_head_that_is_not_finite_is_refused(kind: Any, base: Base, tmp_path: Path) -> None:
    """Of such numbers nothing could be compared."""
    model = kind((_words if kind is _tagger else _documents)(base("bert")))
    with torch.no_grad():
        (model.linear if kind is _tagger else model.decoder).weight[0, 0] = torch.nan
    with pytest.raises(AdapterConfigError, match="not finite"):
        flair_peft.to_transformers(model, tmp_path / "model")


def test_checkpoint_does_not_replace_what_was_written_for_peft(base: Base, tmp_path: Path) -> None:
    """Its weights have the names that those of a checkpoint have, and its config would stay beside them."""
    model = _tagger(_words(base("bert")))
    flair_peft.to_transformers(model, tmp_path, merged=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(SaveError, match="a transformers model is there"):
        flair_peft.save_pretrained(model, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_what_is_no_model_is_named_by_all_that_take_one(base: Base, tmp_path: Path) -> None:
    """Embeddings, or a path that somebody took for what it holds."""
    for given in (TransformerWordEmbeddings(base("bert")), _words(base("bert")), "my-tagger"):
        for call in (flair_peft.save_pretrained, flair_peft.to_transformers, lambda model, _: flair_peft.merge(model)):
            with pytest.raises(AdapterConfigError, match=f"this {type(given).__name__}"):
                call(given, tmp_path / "model")  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", ["word_dropout", "locked_dropout"])
def test_settings_that_flair_cannot_read_are_refused_by_what_has_them(dropout: str, base: Base, tmp_path: Path) -> None:
    """Flair reads an attribute of its dropout layers that they lack, and fails without a word on what to do."""
    embeddings = DocumentRNNEmbeddings([_words(base("bert"))], hidden_size=8, **{dropout: 0.1})
    model = _classifier(embeddings)
    for save in (lambda: flair_peft.save_pretrained(model, tmp_path / "d"), lambda: model.save(tmp_path / "x.pt")):
        with pytest.raises(UnsupportedStateError, match="word_dropout of DocumentRNNEmbeddings"):
            save()


def test_model_of_several_labels_and_regressor_have_their_problem_type(base: Base, tmp_path: Path) -> None:
    """pipeline takes the sigmoid of each label, and the number of a regressor as it is."""
    several = _classifier(_documents(base("bert")), multi_label=True, multi_label_threshold=0.3)
    regressor = TextRegressor(_documents(base("roberta"), "roberta"), label_name="value").eval()
    for name, model in (("several", several), ("regressor", regressor)):
        _assert_same(model, tmp_path / name)
    sentence = Sentence(TEXTS[0].split())
    several.predict(sentence, return_probabilities_for_all_classes=True)
    found = pipeline("text-classification", model=str(tmp_path / "several"))(TEXTS[0], top_k=None)
    expected = {label.value: label.score for label in sentence.labels}
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-4)
    regressor.predict(sentence)
    (number,) = pipeline("text-classification", model=str(tmp_path / "regressor"))(TEXTS[0])
    assert number["score"] == pytest.approx(float(sentence.get_label("value").value), abs=1e-4)
    assert AutoConfig.from_pretrained(tmp_path / "several").flair_peft["multi_label_threshold"] == {"default": 0.3}


def test_head_around_the_linear_layer_changes_nothing(base: Base, tmp_path: Path) -> None:
    """A reprojection, a stack of one and dropouts are one linear layer on the vectors."""
    options = {"reproject_embeddings": True, "dropout": 0.3, "locked_dropout": 0.5, "word_dropout": 0.1}
    stacked = StackedEmbeddings([_words(base("bert"))])
    _assert_same(_tagger(stacked, **options), tmp_path / "tagger")
    tags = _dictionary(["NOUN", "VERB"], add_unk=True)
    _assert_same(TokenClassifier(_words(base("bert")), tags, "pos").eval(), tmp_path / "words")


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_model_that_was_loaded_on_a_base_in_bf16_scores_the_same_within_its_rounding(
    is_merged: bool, base: Base, tmp_path: Path
) -> None:
    """The merged weights are fp32."""
    _classifier(_documents(base("bert"), dtype="bfloat16")).save(tmp_path / "model.pt")
    model = TextClassifier.load(tmp_path / "model.pt")
    assert model.decoder.weight.dtype == torch.bfloat16
    _assert_same(model, tmp_path / "out", is_merged=is_merged, tolerance=0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == ("float32" if is_merged else "bfloat16")


@pytest.mark.parametrize(
    ("of_base", "wanted"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize(("name", "seed"), [("text-classifier", 3), ("sequence-tagger", 4)])
def test_adapter_that_multiplies_rounding_is_merged(
    name: str, seed: int, of_base: str, wanted: str, base: Base, tmp_path: Path
) -> None:
    """What is right is found in fp32, and rounded once: the weights are those of the merged model of Flair."""
    _, model = save_random(name, base("bert"), tmp_path / "model", seed=seed, dtype=of_base)
    flair_peft.to_transformers(model, tmp_path / "out", dtype=wanted)
    merged = flair_peft.merge(model)
    if wanted == "float32":
        read = _read_scores(tmp_path / "out", merged)
        assert _distance(read, _live_scores(merged)) < TOLERANCE
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: part for name, part in merged.embeddings.model.state_dict().items() if "pooler" not in name}
    same = {name: key for name in expected for key in written if key.endswith(f".{name}")}
    assert len(same) > 10
    assert all(torch.equal(expected[name].to(getattr(torch, wanted)), written[key]) for name, key in same.items())


def test_head_that_was_cast_when_it_was_loaded_is_written_with_its_exact_values(base: Base, tmp_path: Path) -> None:
    """What bf16 rounds in memory is not rounded in files."""
    model = TokenClassifier(_words(base("bert"), dtype="bfloat16"), _dictionary(["a", "b"]), "x")
    model.save(tmp_path / "model.pt")
    loaded = TokenClassifier.load(tmp_path / "model.pt")
    assert loaded.decoder.weight.dtype == torch.bfloat16
    flair_peft.to_transformers(loaded, tmp_path / "out")
    read = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(read.classifier.weight, model.decoder.weight)


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_rows_of_tokens_that_were_trained_are_kept(is_merged: bool, base: Base, tmp_path: Path) -> None:
    """Also where the text of the export's own check has none of them."""
    number = AutoTokenizer.from_pretrained(base("bert")).convert_tokens_to_ids("q")
    config = lora(trainable_token_indices={"word_embeddings": [number]})
    model = _tagger(_words(base("bert"), peft_config=config))
    delta = next(p for name, p in model.named_parameters() if name.endswith("trainable_tokens_delta.default"))
    torch.nn.init.normal_(delta)
    expected = _live_scores(model, [["q"]])
    flair_peft.to_transformers(model, tmp_path, merged=is_merged)
    assert _distance(_read_scores(tmp_path, model, [["q"]], is_merged=is_merged), expected) < TOLERANCE


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True, target_modules="all-linear"),
        lora(
            target_modules=r"encoder\.layer\.1\..*(query|dense)",
            rank_pattern={"query": 2},
            modules_to_save=["LayerNorm"],
        ),
        lora(target_modules=["query"], layers_to_transform=[1], bias="all"),
        lora(rank_pattern={r"^encoder\.layer\.0\.attention\.self\.query": 2, "query": 3}),
        IA3Config(
            target_modules=["query", "output.dense"], feedforward_modules=["output.dense"], init_ia3_weights=False
        ),
        AdaLoraConfig(
            target_r=2, init_r=4, lora_alpha=12, total_step=9, init_lora_weights=False, target_modules=["key"]
        ),
        RandLoraConfig(r=4, target_modules=["query", "dense"], init_weights=False),
    ],
    ids=["dora", "expression", "layers", "patterns", "ia3", "adalora", "randlora"],
)
def test_config_selects_the_same_modules_in_the_class(config: Any, is_merged: bool, base: Base, tmp_path: Path) -> None:
    """However the adapter's config names its targets, none of the class's own layers become one."""
    _assert_same(_tagger(_words(base("bert"), peft_config=config)), tmp_path / "out", is_merged=is_merged)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"target_modules": "all-linear"}),
        ("albert", {"target_modules": "all-linear"}),
        ("bert", {"bias": "all"}),
        ("bert", {"modules_to_save": ["pooler", "LayerNorm"]}),
    ],
    ids=["linear layers", "pooler that is one", "biases", "whole"],
)
def test_adapter_that_changes_the_pooler_leaves_the_head_in_its_place(
    architecture: str, options: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    """Flair reads nothing of the pooler, in which classes for texts have a part of their head."""
    model = _classifier(_documents(base(architecture), architecture, peft_config=lora(**options)))
    for name, parameter in model.embeddings.model.named_parameters():
        if "pooler" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    _assert_same(model, tmp_path, is_merged=False)


def test_plain_models_of_flair_are_written_too(base: Base, tmp_path: Path) -> None:
    """A model without an adapter is its weights; it is not changed."""
    tagger = _tagger(TransformerWordEmbeddings(base("bert"), fine_tune=True))
    classifier = _classifier(TransformerDocumentEmbeddings(base("bert"), fine_tune=True))
    for name, model in (("tagger", tagger), ("classifier", classifier)):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        _assert_same(model, tmp_path / name)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(AdapterConfigError, match="none of its embeddings has one"):
        flair_peft.to_transformers(tagger, tmp_path / "adapter", merged=False)


def test_final_norm_is_read_where_the_embeddings_read_it(base: Base, tmp_path: Path) -> None:
    """What reads the states before it gives other scores, and is refused."""
    normed = write_base("RobertaPreLayerNorm", tmp_path / "base", base("bert"))
    config = lora(target_modules=["query"])
    _assert_same(_tagger(_words(normed, peft_config=config, after_final_norm=True)), tmp_path / "out")
    with pytest.raises(StateMismatchError, match="one more norm"):
        flair_peft.to_transformers(_tagger(_words(normed, peft_config=config)), tmp_path / "before")
    assert not (tmp_path / "before").exists()


def test_export_leaves_the_model_and_the_random_numbers_as_they_were(base: Base, tmp_path: Path) -> None:
    """A model in training goes on as if nothing had happened."""
    model = _tagger(_words(base("bert"))).train()
    before, numbers = {key: t.clone() for key, t in model.state_dict().items()}, torch.get_rng_state()
    for is_merged in (True, False):
        flair_peft.to_transformers(model, tmp_path / str(is_merged), merged=is_merged)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(module.training for module in (model, model.embeddings, model.embeddings.model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_way_there_and_back_gives_the_same_predictions(base: Base, tmp_path: Path) -> None:
    """from_adapter and take_over_head read what was written for PEFT, with labels that have one name there."""
    model = _tagger(_words(base("bert")))
    flair_peft.to_transformers(model, tmp_path, merged=False)
    again = _tagger(PeftTransformerWordEmbeddings.from_adapter(str(tmp_path)))
    assert flair_peft.take_over_head(again) == []
    for text in TEXTS:
        found, expected = _spans(again, text), _spans(model, text)
        assert [each[:3] for each in found] == [each[:3] for each in expected]
        assert [each[3] for each in found] == pytest.approx([each[3] for each in expected], abs=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_way_back_asks_for_the_subtokens_that_the_tagger_reads(pooling: str, base: Base, tmp_path: Path) -> None:
    """A head on others would tag otherwise without a word."""
    model = _tagger(_words(base("bert"), subtoken_pooling=pooling))
    flair_peft.to_transformers(model, tmp_path, merged=False)
    again = _tagger(PeftTransformerWordEmbeddings.from_adapter(str(tmp_path)))
    with pytest.raises(HeadMismatchError, match=f"subtoken_pooling='{pooling}'; make the embeddings with that"):
        flair_peft.take_over_head(again)
    again = _tagger(PeftTransformerWordEmbeddings.from_adapter(str(tmp_path), subtoken_pooling=pooling))
    assert flair_peft.take_over_head(again) == []
    assert _distance(_live_scores(again), _live_scores(model)) < 1e-5


def test_way_back_knows_labels_that_are_called_as_transformers_calls_them(base: Base, tmp_path: Path) -> None:
    """Those of two labels it does not write."""
    labels = ["LABEL_0", "LABEL_1"]
    embeddings = _documents(base("llama"), "llama")
    model = _classifier(embeddings, labels, decoder=torch.nn.Linear(embeddings.embedding_length, 2, bias=False))
    flair_peft.to_transformers(model, tmp_path, merged=False)
    again = _classifier(PeftTransformerDocumentEmbeddings.from_adapter(str(tmp_path)), labels)
    assert flair_peft.take_over_head(again) == []
    assert _distance(_live_scores(again), _live_scores(model)) < 1e-5


def test_way_there_and_back_of_a_decoder_gives_the_same_scores(base: Base, tmp_path: Path) -> None:
    model = _without_bias(_documents(base("llama"), "llama"))
    flair_peft.to_transformers(model, tmp_path, merged=False)
    again = _classifier(PeftTransformerDocumentEmbeddings.from_adapter(str(tmp_path)))
    assert flair_peft.take_over_head(again) == []
    assert _distance(_live_scores(again), _live_scores(model)) < 1e-5


def _refused() -> dict[str, tuple[Callable[[Base], Model], str]]:
    return {
        "a CRF": (lambda b: _tagger(_words(b("bert")), use_crf=True), "'use_crf'"),
        "an RNN": (lambda b: _tagger(_words(b("bert")), use_rnn=True), "'use_rnn'"),
        "a stack": (
            lambda b: _tagger(StackedEmbeddings([_words(b("bert")), _words(b("roberta"), "roberta")])),
            "StackedEmbeddings makes",
        ),
        "context": (lambda b: _tagger(_words(b("bert"), use_context=True)), "use_context"),
        "several layers": (lambda b: _tagger(_words(b("bert"), layers="all", layer_mean=True)), "several layers"),
        "an early layer": (lambda b: _tagger(_words(b("bert"), layers="1")), "not the last one"),
        "two subtokens": (lambda b: _tagger(_words(b("bert"), subtoken_pooling="first_last")), "two subtokens"),
        "a mean of a text": (lambda b: _classifier(_documents(b("bert"), cls_pooling="mean")), "cls_pooling='mean'"),
        "virtual tokens": (
            lambda b: _tagger(
                _words(b("bert"), peft_config=PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3))
            ),
            "virtual tokens",
        ),
        "no mask": (lambda b: _tagger(_words(b("fnet"), "fnet")), "masks no padding"),
        "a class with more": (lambda b: _tagger(_words(b("modernbert"), "modernbert")), "'head.norm'"),
        "no class": (lambda b: _tagger(_words(b("bart"), "bart")), "no class for it that scores words"),
        "a decoder beside": (lambda b: _classifier(_documents(b("t5"), "t5")), "more than the T5EncoderModel"),
        "a bias": (lambda b: _classifier(_documents(b("llama"), "llama")), "has no bias"),
        "many labels": (
            lambda b: _classifier(_documents(b("bert")), [str(number) for number in range(17)]),
            "no room for 17 labels",
        ),
        "more scores than labels": (
            lambda b: _classifier(_documents(b("bert")), decoder=torch.nn.Linear(32, 5)),
            "gives 5 scores, and its dictionary has 3 labels",
        ),
        "one label": (lambda b: _classifier(_documents(b("bert")), ["good"]), "one label only"),
        "words of several labels": (
            lambda b: TokenClassifier(_words(b("bert")), _dictionary(["a", "b"]), "x", multi_label=True),
            "several labels",
        ),
        "another decoder": (
            lambda b: _classifier(_documents(b("bert")), decoder=torch.nn.Bilinear(1, 1, 3)),
            "Bilinear",
        ),
        "another model": (lambda b: make(ZOO["text-pair-classifier"], b("bert"), lora()), "TextPairClassifier does"),
        "a subclass": (lambda b: make(ZOO["prefixed-sequence-tagger"], b("bert"), lora()), "PrefixedSequenceTagger"),
        "boxes": (lambda b: _tagger(_words(b("layoutlm"), "layoutlm")), "boxes or images"),
        "a quantised base": (lambda b: quantised_classifier(b("bert"), "nf4"), "round its weights once more"),
    }


@pytest.mark.parametrize("what", _refused())
def test_what_no_class_of_transformers_computes_is_refused_with_the_reason(
    what: str, base: Base, tmp_path: Path
) -> None:
    """In either form, before anything is written."""
    build, reason = _refused()[what]
    model = build(base)
    for is_merged in (True, False):
        with pytest.raises(AdapterConfigError, match=reason) as raised:
            flair_peft.to_transformers(model, tmp_path / "out", merged=is_merged)
        assert str(raised.value).count(". ") >= 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_class_that_gives_a_token_global_attention_is_refused(is_merged: bool, base: Base, tmp_path: Path) -> None:
    """Texts within a window have the same scores where both kinds of attention have the same weights, longer ones not.

    Such weights come of RoBERTa. The class for words gives none, and is written.
    """
    longformer = write_base("Longformer", tmp_path / "base", base("bert"), attention_window=[64, 64])
    model = AutoModel.from_pretrained(longformer)
    weights = model.state_dict()
    model.load_state_dict({name: weights[name.replace("_global", "")] for name in weights})
    model.save_pretrained(longformer)
    with pytest.raises(AdapterConfigError, match="gives the first token global attention"):
        flair_peft.to_transformers(_classifier(_documents(longformer)), tmp_path / "out", merged=is_merged)
    assert not (tmp_path / "out").exists()
    _assert_same(_tagger(_words(longformer)), tmp_path / "out", is_merged=is_merged)


def test_class_that_reads_another_token_is_refused(base: Base, tmp_path: Path) -> None:
    """XLNet's class reads the last position, which is padding where Flair pads."""
    with pytest.raises(StateMismatchError, match="another token"):
        flair_peft.to_transformers(_classifier(_documents(base("xlnet"), "xlnet")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tokenizer_that_puts_no_mark_in_front_is_named(tmp_path: Path) -> None:
    """BERT's class reads the first token, and Flair the last one then."""
    embeddings = _documents(str(Path(__file__).parents[2] / "resources" / "tiny-encoder"))
    assert not embeddings.initial_cls_token
    with pytest.raises(StateMismatchError, match=r"another token.*the tokenizer, as here, puts no \[CLS\] in front"):
        flair_peft.to_transformers(_classifier(embeddings), tmp_path / "out")


@pytest.mark.parametrize(("bias", "dtype"), [(1e5, "float32"), (-50.0, "float32"), (30.0, "bfloat16")])
def test_class_that_reads_another_token_is_refused_whatever_all_texts_have_in_common(
    bias: float, dtype: str, base: Base, tmp_path: Path
) -> None:
    """A large bias, as that of years or prices, is most of each score and says nothing of a text."""
    model = TextRegressor(_documents(base("xlnet"), "xlnet", dtype=dtype), "value").eval()
    torch.nn.init.constant_(model.decoder.bias, bias)
    with pytest.raises(StateMismatchError, match="another token"):
        flair_peft.to_transformers(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [1e5, 30.0])
def test_regressor_of_large_numbers_is_written(bias: float, dtype: str, base: Base, tmp_path: Path) -> None:
    """What rounding takes from large numbers is no other model."""
    model = TextRegressor(_documents(base("bert"), dtype=dtype), "value").eval()
    torch.nn.init.constant_(model.decoder.bias, bias)
    flair_peft.to_transformers(model, tmp_path)
    allowed = bias * (1e-6 if dtype == "float32" else 0.01)
    assert (_read_scores(tmp_path, model) - _live_scores(model)).abs().max() < allowed


def test_class_that_takes_an_unknown_word_for_padding_is_refused(base: Base, tmp_path: Path) -> None:
    """A decoder's class looks for the last token that is no padding, and tokenizers have one mark for both at times."""
    folder = shutil.copytree(base("llama"), tmp_path / "base")
    words = {word: number for number, word in enumerate(["<unk>", *sorted({w for text in WORDS for w in text}), "Yes"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    marks = {"unk_token": "<unk>", "pad_token": "<unk>", "model_max_length": 64}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)
    model = _without_bias(_documents(str(folder), "llama"))
    with pytest.raises(StateMismatchError, match="another token"):
        flair_peft.to_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merged", [True, False])
def test_class_that_takes_a_word_for_padding_is_refused(merged: bool, base: Base, tmp_path: Path) -> None:
    """A padding token that is a word ends texts, too, and the class reads the token in front of it."""
    options = {"transformers_tokenizer_kwargs": {"pad_token": "!"}}
    model = _without_bias(_documents(base("gpt2"), "gpt2", **options))
    with pytest.raises(StateMismatchError, match="another token"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=merged)
    assert not (tmp_path / "out").exists()


def test_directory_of_an_earlier_export_is_replaced_and_others_files_stay(base: Base, tmp_path: Path) -> None:
    """No file of the one is read with the other; a card that somebody edited is theirs."""
    model = _tagger(_words(base("bert")))
    flair_peft.to_transformers(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    flair_peft.to_transformers(model, tmp_path, merged=False)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "AutoPeftModelForTokenClassification" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("edited")
    flair_peft.to_transformers(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "README.md").read_text() == "edited"
    assert _distance(_read_scores(tmp_path, model), _live_scores(model)) < TOLERANCE


def test_directory_of_another_model_is_left_alone(base: Base, tmp_path: Path) -> None:
    """A base, a checkpoint and an adapter are not mixed with what is written."""
    model = _tagger(_words(base("bert")))
    checkpoint = tmp_path / "checkpoint"
    flair_peft.save_pretrained(model, checkpoint)
    tokenizer = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(tokenizer)
    for folder in (Path(base("bert")), checkpoint, tokenizer):
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        with pytest.raises(SaveError, match="files of another model are there"):
            flair_peft.to_transformers(model, folder)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def _train_on(folder: Path, *, is_merged: bool) -> None:
    """Save in the same place what was trained on from an export."""
    read = reader.read(str(folder), reads_words=True, is_merged=is_merged)
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.add_(0.1)
    read.save_pretrained(folder, **({} if is_merged else {"save_embedding_layers": False}))


def _rename_label(folder: Path, **_: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {**config["id2label"], "0": "another"}}))


@pytest.mark.parametrize(
    ("change", "is_merged"),
    [(_train_on, True), (_train_on, False), (_rename_label, True)],
    ids=["weights", "adapter", "settings"],
)
def test_directory_of_an_export_that_was_changed_is_left_alone(
    change: Callable[..., None], is_merged: bool, base: Base, tmp_path: Path
) -> None:
    """transformers and PEFT save in its place what they trained on from it, and the config still says what it was."""
    model = _tagger(_words(base("bert")))
    flair_peft.to_transformers(model, tmp_path, merged=is_merged)
    change(tmp_path, is_merged=is_merged)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SaveError, match="changed after an export"):
        flair_peft.to_transformers(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_labels_that_were_renamed_since_are_those_of_the_head(base: Base, tmp_path: Path) -> None:
    """A training on from an export keeps what its config says of Flair."""
    flair_peft.to_transformers(_tagger(_words(base("bert"))), tmp_path, merged=False)
    _rename_label(tmp_path)
    head = PeftTransformerWordEmbeddings.from_adapter(str(tmp_path)).foreign_head
    assert head is not None
    assert head.labels is not None
    assert head.labels[0] == "another"


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapter"])
def test_export_that_does_not_prove_right_leaves_the_earlier_one(
    is_merged: bool, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read again from the new files decides."""
    model = _tagger(_words(base("bert")))
    flair_peft.to_transformers(model, tmp_path / "out", merged=is_merged)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    read = transformers_model._Export._read

    def read_another(self: Any, folder: Path) -> Any:
        tokenizer, found = read(self, folder)
        with torch.no_grad():
            weight = next(found.parameters())
            weight.add_(torch.randn_like(weight))
        return tokenizer, found

    monkeypatch.setattr(transformers_model._Export, "_read", read_another)
    with pytest.raises(StateMismatchError, match="read again"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=is_merged)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_that_cannot_be_read_is_refused(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of an adapter that is gone since is one reason."""
    model = _tagger(_words(base("bert")))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("it has moved")

    monkeypatch.setattr(AutoPeftModelForTokenClassification, "from_pretrained", fail)
    with pytest.raises(StateMismatchError, match=r"cannot be read \(OSError: it has moved"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=False)
    assert not list(tmp_path.iterdir())


def test_method_whose_config_has_no_room_for_a_head_is_merged_alone(base: Base, tmp_path: Path) -> None:
    """PEFT keeps a head in modules_to_save, which the config of trainable tokens does not have."""
    config = TrainableTokensConfig(token_indices=[7], target_modules=["word_embeddings"], init_weights=False)
    model = _tagger(_words(base("bert"), peft_config=config))
    with pytest.raises(AdapterConfigError, match="has no modules_to_save"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=False)
    assert not list(tmp_path.iterdir())
    _assert_same(model, tmp_path / "out")


def test_method_that_neither_peft_merges_nor_its_files_with_a_head_hold_is_refused(base: Base, tmp_path: Path) -> None:
    """Its parts are no layers of PEFT's: what is written without them would be random."""
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    model = _tagger(_words(base("llama"), peft_config=config))
    perturb_(model, seed=1)
    with pytest.raises(AdapterConfigError, match="has no modules_to_save"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=False)
    with pytest.raises(UnsupportedMethodError, match="Cannot merge ADAPTION_PROMPT"):
        flair_peft.to_transformers(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_that_were_added_to_the_base_are_not_lost_with_the_adapter_alone(base: Base, tmp_path: Path) -> None:
    """PEFT draws rows for new tokens at random: a base that was resized is written as merged weights."""
    model = _tagger(_words(base("bert"), use_context_separator=False))
    embeddings = model.embeddings
    embeddings.tokenizer.add_tokens(["zzzz", "yyyy"])
    embeddings.base_model.resize_token_embeddings(len(embeddings.tokenizer))
    with pytest.raises(AdapterConfigError, match="beside it"):
        flair_peft.to_transformers(model, tmp_path / "adapter", merged=False)
    assert not (tmp_path / "adapter").exists()
    expected = _live_scores(model, [["zzzz", "a"]])
    flair_peft.to_transformers(model, tmp_path / "merged")
    assert _distance(_read_scores(tmp_path / "merged", model, [["zzzz", "a"]]), expected) < TOLERANCE


def test_dtype_of_an_adapter_is_refused(base: Base, tmp_path: Path) -> None:
    """It is that of merged weights, and would be left aside."""
    with pytest.raises(AdapterConfigError, match="in bfloat16: dtype is that of merged weights"):
        flair_peft.to_transformers(_tagger(_words(base("bert"))), tmp_path / "out", merged=False, dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"num_hidden_layers": 1}, {"hidden_act": "relu"}], ids=str)
def test_settings_of_the_base_that_peft_does_not_read_are_named(
    setting: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    """Beside an adapter stands the base as it is; merged weights have a config of their own."""
    model = _tagger(_words(base("bert"), transformers_config_kwargs=setting))
    with pytest.raises(StateMismatchError, match=r"without transformers_config_kwargs\. Leave merged at True"):
        flair_peft.to_transformers(model, tmp_path / "out", merged=False)
    _assert_same(model, tmp_path / "merged")
