"""Models with an adapter, merged: plain Flair models that predict the same where this package is not installed."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings
from flair.models import TextClassifier
from flair.nn import Model
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from tokenizers import processors
from transformers import AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError, SaveError, UnsupportedMethodError, UnsupportedStateError
from flair_peft.export import merge
from tests.support import tiny
from tests.support.configs import lora
from tests.support.method_cases import make_embeddings, one_kind_each
from tests.support.methods import Method
from tests.support.models import CLASSIFIER, classifier, make
from tests.support.predictions import TEXTS
from tests.support.quantised import quantised_classifier
from tests.support.round_trip import ROUNDING, Factories, largest_difference
from tests.support.selection import OF_THEIR_OWN_KIND, ONE_OF_A_KIND, few
from tests.support.zoo import ZOO

Base = Callable[[str], str]
READABLE = [name for name, entry in ZOO.items() if entry.loads_in_stock is True]
WITHOUT_LAYOUT = [name for name in tiny.ARCHITECTURES if name not in tiny.LAYOUT]


# Without the packages, and without a hook that importing them would put in.
STOCK_PROCESS = """
import json, sys
for name in ("flair_peft", "peft"):
    sys.modules[name] = None
import flair, torch
from flair.data import Dictionary, Sentence
from flair.models import TextClassifier
from flair.nn import Model
flair.device = torch.device("cpu")
model = Model.load(sys.argv[1])
sentences = [Sentence(text) for text in json.loads(sys.argv[2])]
model.predict(sentences)
found = [[(label.data_point.text, label.value, label.score) for label in s.get_labels()] for s in sentences]
assert any(found)
print(json.dumps(found))
"""


def predictions(model: Any, texts: list[str]) -> list[list[tuple[str, str, float]]]:
    sentences = [Sentence(text) for text in texts]
    model.eval()
    model.predict(sentences)
    return [[(label.data_point.text, label.value, label.score) for label in s.get_labels()] for s in sentences]


@pytest.mark.parametrize("name", few(READABLE, ONE_OF_A_KIND & {*READABLE}))
def test_merged_model_of_every_class_is_flairs_own_and_predicts_the_same(name: str, base: Base, tmp_path: Path) -> None:
    """It is saved and loaded by stock Flair, and the original keeps its adapter and its bits."""
    entry = ZOO[name]
    live = make(entry, base("bert"), lora())
    corpus = entry.corpus()
    expected = entry.predict(live, corpus)
    before = {key: tensor.clone() for key, tensor in live.state_dict().items()}
    plain = flair_peft.merge(live)
    assert not any(isinstance(m, (PeftTransformerEmbeddings, PeftModel)) for m in plain.modules())
    assert type(plain) is type(live)
    flair_peft.uninstall()
    plain.save(tmp_path / "plain.pt")
    loaded = entry.model_class.load(tmp_path / "plain.pt")
    found = entry.predict(loaded, corpus)
    flair_peft.install()
    assert largest_difference(expected, found) < ROUNDING
    after = live.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert entry.predict(live, corpus) == expected


@pytest.mark.parametrize("name", few(["text-classifier", "sequence-tagger"], ["text-classifier"]))
def test_merged_model_loads_where_neither_package_is_installed(name: str, base: Base, tmp_path: Path) -> None:
    live = make(ZOO[name], base("bert"), lora())
    texts = ["Berlin is a wonderful city .", "George Washington was bad ."]
    expected = predictions(live, texts)
    flair_peft.merge(live).save(tmp_path / "plain.pt")
    done = subprocess.run(
        [sys.executable, "-c", STOCK_PROCESS, str(tmp_path / "plain.pt"), json.dumps(texts)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for one, other in zip(expected, found, strict=True):
        assert [label[:2] for label in one] == [tuple(label[:2]) for label in other]
        assert all(abs(a[2] - b[2]) < 1e-5 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
def test_method_merges_or_is_refused_by_name(method: Method, kind: str, base: Base) -> None:
    """What PEFT can merge gives the vectors of the unmerged model; all else says why not."""
    embeddings = make_embeddings(method, kind, base, torch.float32)
    model = wrapped(embeddings)
    expected = embed(embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind not in method.mergeable:
            with pytest.raises(flair_peft.FlairPeftError, match=r"Cannot (merge|add)"):
                flair_peft.merge(model)
            return
        plain = flair_peft.merge(model)
    assert type(plain.embeddings).__module__.startswith("flair.")
    assert torch.allclose(embed(plain.embeddings), expected, atol=1e-4)


def wrapped(embeddings: PeftTransformerDocumentEmbeddings) -> Model:
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    return TextClassifier(embeddings, label_type="opinion", label_dictionary=labels)


def embed(embeddings: TransformerEmbeddings) -> torch.Tensor:
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.eval()
    embeddings.embed(sentences)
    return torch.stack([sentence.get_embedding() for sentence in sentences]).detach()


@pytest.mark.parametrize("architecture", few(WITHOUT_LAYOUT, OF_THEIR_OWN_KIND & {*WITHOUT_LAYOUT}))
def test_merged_model_on_every_architecture_predicts_the_same(architecture: str, base: Base) -> None:
    targets = tiny.ATTENTION_TARGETS[architecture]
    live = classifier(base(architecture), lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2"))
    corpus = CLASSIFIER.corpus()
    expected = CLASSIFIER.predict(live, corpus)
    found = CLASSIFIER.predict(flair_peft.merge(live), corpus)
    assert largest_difference(expected, found) < ROUNDING


def test_model_that_takes_no_mask_is_merged_too(base: Base) -> None:
    """FNet refuses an argument that all others take."""
    live = classifier(base("fnet"), lora(target_modules=["dense"]))
    corpus = CLASSIFIER.corpus()
    expected = CLASSIFIER.predict(live, corpus)
    assert largest_difference(expected, CLASSIFIER.predict(flair_peft.merge(live), corpus)) < ROUNDING


def test_bf16_model_is_merged_in_fp32(base: Base) -> None:
    """Rounding the sum of base and adapter to bf16 would lose most of the adapter."""
    live = classifier(base("bert"), dtype="bfloat16")
    plain = flair_peft.merge(live)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    layer = live.embeddings.base_model.encoder.layer[0].attention.self.query
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    merged = plain.embeddings.model.encoder.layer[0].attention.self.query.weight
    assert torch.allclose(merged, exact, atol=1e-6)
    half = flair_peft.merge(live, dtype="bfloat16")
    assert half.embeddings.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_prompts_are_refused_by_name(config: Any, base: Base) -> None:
    with pytest.raises(UnsupportedMethodError, match=str(config.peft_type.value)):
        flair_peft.merge(classifier(base("bert"), copy.deepcopy(config)))


def test_quantised_base_is_refused(base: Base) -> None:
    with pytest.raises(AdapterConfigError, match=r"round its weights once more\. A merged model holds all"):
        flair_peft.merge(quantised_classifier(base("bert"), "nf4"))


def test_plain_model_has_nothing_to_merge(base: Base) -> None:
    with pytest.raises(AdapterConfigError, match="has an adapter"):
        flair_peft.merge(make(CLASSIFIER, base("bert"), None, is_stock=True))


def test_loaded_model_is_merged_too(base: Base, tmp_path: Path) -> None:
    """Also one whose base is shared with another model, which stays as it is."""
    live = classifier(base("bert"))
    live.save(tmp_path / "model.pt")
    first, second = Model.load(tmp_path / "model.pt"), Model.load(tmp_path / "model.pt")
    corpus = CLASSIFIER.corpus()
    expected = CLASSIFIER.predict(live, corpus)
    found = CLASSIFIER.predict(flair_peft.merge(first), corpus)
    assert largest_difference(expected, found) < ROUNDING
    assert CLASSIFIER.predict(first, corpus) == CLASSIFIER.predict(second, corpus) == expected


def test_config_of_the_user_is_left_as_it_was(base: Base) -> None:
    config = lora(target_modules=["query"])
    before = config.to_dict()
    flair_peft.merge(classifier(base("bert"), config))
    assert config.to_dict() == before


def test_merged_model_replaces_the_file_that_the_live_one_is_mapped_from(base: Base, tmp_path: Path) -> None:
    """The file is replaced, not written into: the model that was loaded from it goes on predicting."""
    path = tmp_path / "whole.pt"
    make(CLASSIFIER, base("bert"), lora()).save(path, save_base=True)
    live, corpus = TextClassifier.load(path), CLASSIFIER.corpus()
    expected, place = CLASSIFIER.predict(live, corpus), path.stat().st_ino
    flair_peft.merge(live).save(path)
    # Writing into a mapped file ends the process.
    assert path.stat().st_ino != place
    assert CLASSIFIER.predict(live, corpus) == expected
    assert largest_difference(CLASSIFIER.predict(TextClassifier.load(path), corpus), expected) < 1e-4
    assert [found.name for found in tmp_path.iterdir()] == ["whole.pt"]


def test_plain_model_that_cannot_be_written_leaves_the_file_as_it_was(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk costs the new file, not the old one."""

    def fill_the_disk(state: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    model = flair_peft.merge(make(CLASSIFIER, base("bert"), lora()))
    (tmp_path / "x.pt").write_bytes(b"precious")
    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(SaveError, match="as it was before"):
        model.save(tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == b"precious"
    assert [found.name for found in tmp_path.iterdir()] == ["x.pt"]


def test_merge_leaves_the_random_numbers_of_a_training_as_they_were(base: Base) -> None:
    """A merge between two epochs does not change what is drawn in the next."""
    model = make(CLASSIFIER, base("bert"), lora())
    before = torch.get_rng_state()
    flair_peft.merge(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_merged_model_that_flair_cannot_read_again_is_said_to_be_one(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Flair pickles a label encoder with the decoder around it, and its embeddings cannot be unpickled."""
    entry = ZOO["text-classifier-label-verbalizer"]
    live = make(entry, base("bert"), lora())
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        plain = flair_peft.merge(live)
    assert merge.unreadable_parts(plain) == ["decoder"]
    assert "Flair reads no .pt file of this merged TextClassifier: it pickles 'decoder'" in caplog.text
    plain.save(tmp_path / "plain.pt")
    flair_peft.uninstall()
    try:
        with pytest.raises(TypeError, match="instance_parameters"):  # else the warning can go
            entry.model_class.load(tmp_path / "plain.pt")
    finally:
        flair_peft.install()
    flair_peft.save_pretrained(plain, tmp_path / "kept")
    found = entry.predict(flair_peft.from_pretrained(tmp_path / "kept"), entry.corpus())
    assert largest_difference(entry.predict(live, entry.corpus()), found) < ROUNDING
    others = (flair_peft.merge(make(ZOO[name], base("bert"), lora())) for name in ("text-classifier", "multitask"))
    assert [merge.unreadable_parts(other) for other in others] == [[], []]


def test_model_on_a_base_without_a_pooler_is_merged_saved_and_exported(base: Base, tmp_path: Path) -> None:
    """Copies and files are read on a base that has one, which nobody reads."""
    model = classifier(base("bert"), transformers_model_kwargs={"add_pooling_layer": False})
    assert not any("pooler" in name for name in model.state_dict())
    expected = predictions(model, TEXTS)
    assert largest_difference(predictions(flair_peft.merge(model), TEXTS), expected) < ROUNDING
    flair_peft.save_pretrained(model, tmp_path / "whole", save_base=True)
    model.save(tmp_path / "whole.pt", save_base=True)
    for loaded in (flair_peft.from_pretrained(tmp_path / "whole"), TextClassifier.load(tmp_path / "whole.pt")):
        assert predictions(loaded, TEXTS) == expected
    tagger = make(ZOO["sequence-tagger"], base("bert"), lora(), transformers_model_kwargs={"add_pooling_layer": False})
    for is_merged in (True, False):
        flair_peft.to_transformers(tagger, tmp_path / str(is_merged), merged=is_merged)


def two_labels() -> Dictionary:
    labels = Dictionary(add_unk=False)
    for label in ("a", "b"):
        labels.add_item(label)
    return labels


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_tokenizer_that_ends_texts_in_its_padding_token_is_refused(pooling: str, base: Base, tmp_path: Path) -> None:
    """Flair's own embeddings take that token for padding: the merged model would read the one in front of it."""
    folder = shutil.copytree(base("qwen3"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = [(tokenizer.pad_token, tokenizer.pad_token_id)]
    ending = processors.TemplateProcessing(single=f"$A {end[0][0]}", pair=f"$A $B {end[0][0]}", special_tokens=end)
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([before, ending])
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("Berlin")["input_ids"][-1] == tokenizer.pad_token_id
    config = lora(target_modules=["q_proj", "v_proj"])
    for source, is_refused in ((base("qwen3"), False), (str(folder), True)):
        embeddings = PeftTransformerDocumentEmbeddings(source, peft_config=config, cls_pooling=pooling)
        model = TextClassifier(embeddings, label_dictionary=two_labels(), label_type="class")
        with pytest.raises(AdapterConfigError, match="take tokens for padding") if is_refused else nullcontext():
            flair_peft.merge(model)


@pytest.mark.parametrize("name", ["tars-classifier", "text-classifier", "tars-tagger"])
def test_padding_token_within_texts_is_refused_where_flair_takes_it_for_padding(name: str, base: Base) -> None:
    """TARS puts GPT-2's into each text; a mark that is a word as well is in some."""
    config = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    padding = "!" if name == "text-classifier" else None
    options = {"transformers_tokenizer_kwargs": {"pad_token": padding}} if padding else {}
    factories = Factories(base("gpt2"), config, **options)
    model = ZOO[name].build(factories.words, factories.documents)
    reads_documents = name != "tars-tagger"
    with pytest.raises(AdapterConfigError, match="take tokens for padding") if reads_documents else nullcontext():
        flair_peft.merge(model)


@pytest.mark.parametrize("use_fast", [True, False])
def test_slow_tokenizer_that_flair_makes_a_fast_one_is_named(
    use_fast: bool, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rare characters have other subtokens then; a plain model of stock Flair is not written so without a word."""
    options: dict[str, Any] = {"transformers_tokenizer_kwargs": {"use_fast": use_fast}}
    config = lora(target_modules=["q_proj", "v_proj"])
    embeddings = PeftTransformerDocumentEmbeddings(base("llama"), peft_config=config, **options)
    model = TextClassifier(embeddings, label_dictionary=two_labels(), label_type="class")
    with caplog.at_level(logging.WARNING, "flair_peft"):
        flair_peft.merge(model)
    said = [record.getMessage() for record in caplog.records if "takes rare characters apart" in record.getMessage()]
    assert [("LlamaTokenizerFast" in text, "LlamaTokenizer," in text) for text in said] == [(True, True)] * (
        not use_fast
    )
    plain = TransformerDocumentEmbeddings(base("llama"), transformers_config_kwargs={"use_cache": False}, **options)
    plain.tokenizer.pad_token = plain.tokenizer.eos_token
    model = TextClassifier(plain, label_dictionary=two_labels(), label_type="class")
    with pytest.raises(UnsupportedStateError, match="rare characters apart") if not use_fast else nullcontext():
        flair_peft.save_pretrained(model, tmp_path / "plain")
    assert (tmp_path / "plain").exists() is use_fast


def test_embeddings_that_read_boxes_or_windows_of_their_own_are_merged(base: Base) -> None:
    """What reads more than words is not compared by words; a stride of one's own is that of the merged model."""
    config = lora(target_modules=["query", "value"])
    boxed = PeftTransformerDocumentEmbeddings(base("layoutlm"), peft_config=config)
    flair_peft.merge(TextClassifier(boxed, label_dictionary=two_labels(), label_type="class"))
    short = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=config, allow_long_sentences=True)
    short.tokenizer.model_max_length, short.stride = 16, 4
    merged = flair_peft.merge(TextClassifier(short, label_dictionary=two_labels(), label_type="class"))
    assert merged.embeddings.stride == 4


@pytest.mark.parametrize("architecture", ["bert", "llama", "xlnet"])
def test_merged_model_in_half_precision_is_compared_before_it_is_rounded(architecture: str, base: Base) -> None:
    """On a processor that does not compute all of it in bf16, too; numbers of positions are not rounded with it."""
    config = lora(target_modules=tiny.ATTENTION_TARGETS[architecture])
    embeddings = PeftTransformerDocumentEmbeddings(base(architecture), peft_config=config)
    model = TextClassifier(embeddings, label_dictionary=two_labels(), label_type="class")
    exact, rounded = (flair_peft.merge(model, dtype=dtype).embeddings.model for dtype in ("float32", "bfloat16"))
    weights = dict(rounded.named_parameters())
    assert torch.bfloat16 in {p.dtype for p in weights.values()}  # Flair makes some of XLNet's in fp32
    assert all(torch.equal(weights[name].bfloat16(), p.bfloat16()) for name, p in exact.named_parameters())
    assert {b.dtype for b in rounded.buffers()} == {b.dtype for b in exact.buffers()}
