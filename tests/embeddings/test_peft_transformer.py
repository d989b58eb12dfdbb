"""Embeddings with an adapter against stock Flair's, and what can be done with them as objects."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import logging
import pickle
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flair
import pytest
import torch
from flair.data import Corpus, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import (
    DocumentPoolEmbeddings,
    DocumentRNNEmbeddings,
    Embeddings,
    OneHotEmbeddings,
    StackedEmbeddings,
    TransformerDocumentEmbeddings,
    TransformerEmbeddings,
    TransformerWordEmbeddings,
)
from flair.embeddings.base import load_embeddings
from flair.embeddings.transformer import SENTENCE_BOUNDARY_TAG
from flair.models import SequenceTagger, TextClassifier, TextRegressor, TokenClassifier
from flair.trainers import ModelTrainer
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from transformers import AutoModel

import flair_peft
from flair_peft import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
)
from flair_peft.embeddings.peft_transformer import adapted_embeddings, modules_around
from flair_peft.errors import (
    AdapterConfigError,
    BaseModelNotFoundError,
    ModelFileError,
    PredictionSetupError,
    StateMismatchError,
)
from tests.support import tiny
from tests.support.configs import lora
from tests.support.methods import METHODS, perturb_
from tests.support.models import CLASSIFIER, make
from tests.support.round_trip import largest_difference
from tests.support.vectors import is_close, is_same
from tests.support.zoo import sentence_corpus

Base = Callable[[str], str]

TEXTS = (
    "George Washington went to Washington .",
    "I love it",
    "Berlin and Paris are large cities in Europe .",
)
LONG_TEXT = " ".join([*tiny.CORPUS] * 4)  # 400 subtokens and more, where the tiny models have 128 positions

STOCK: dict[type[PeftTransformerEmbeddings], type[TransformerEmbeddings]] = {
    PeftTransformerWordEmbeddings: TransformerWordEmbeddings,
    PeftTransformerDocumentEmbeddings: TransformerDocumentEmbeddings,
    PeftTransformerEmbeddings: TransformerEmbeddings,
}
WORD, DOCUMENT, BOTH = STOCK
CLASSES = pytest.mark.parametrize("ours", [WORD, DOCUMENT, BOTH])
WORD_AND_DOCUMENT = pytest.mark.parametrize("ours", [WORD, DOCUMENT])


def read(embeddings: Embeddings, sentences: Sequence[Sentence]) -> list[torch.Tensor]:
    """Return what the embeddings have stored, words first."""
    has_words = getattr(embeddings, "token_embedding", embeddings.embedding_type == "word-level")
    has_documents = getattr(embeddings, "document_embedding", embeddings.embedding_type == "sentence-level")
    words = [token.get_embedding(embeddings.get_names()) for sentence in sentences for token in sentence]
    documents = [sentence.get_embedding(embeddings.get_names()) for sentence in sentences]
    return [*(words if has_words else []), *(documents if has_documents else [])]


def embed(embeddings: Embeddings, texts: Sequence[str] = TEXTS) -> list[torch.Tensor]:
    """Return the vectors of new sentences, embedded as one batch."""
    sentences = [Sentence(text) for text in texts]
    embeddings.embed(sentences)
    return read(embeddings, sentences)


def copy_separator_row_(embeddings: PeftTransformerEmbeddings, stock: TransformerEmbeddings) -> None:
    """Give the stock model, which draws the row of the separator at random, the row of ours."""
    row = embeddings.tokenizer.convert_tokens_to_ids(SENTENCE_BOUNDARY_TAG)
    with torch.no_grad():
        stock.model.get_input_embeddings().weight[row] = embeddings.base_model.get_input_embeddings().weight[row]


def pair(ours: type[PeftTransformerEmbeddings], path: str, **options: Any) -> tuple[Any, Any]:
    """Return embeddings with an adapter, and stock embeddings with the same options on the same base."""
    embeddings = ours(path, peft_config=lora(), **options)
    stock = STOCK[ours](path, **options)
    if options.get("use_context_separator", True):
        copy_separator_row_(embeddings, stock)
    return embeddings, stock


def assert_equals_stock(
    ours: type[PeftTransformerEmbeddings], path: str, texts: Sequence[str] = TEXTS, **options: Any
) -> None:
    """Compare with the adapter switched off, and make sure that it is not a no-op when it is on."""
    embeddings, stock = pair(ours, path, **options)
    expected = embed(stock, texts)
    assert embeddings.embedding_length == stock.embedding_length
    assert embeddings.embedding_type == stock.embedding_type
    with embeddings.model.disable_adapter():
        assert is_same(embed(embeddings, texts), expected)
    assert not is_close(embed(embeddings, texts), expected, tolerance=1e-2)


def change_weights_(embeddings: PeftTransformerEmbeddings) -> None:
    with torch.no_grad():
        for parameter in embeddings.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)


def storages(embeddings: PeftTransformerEmbeddings) -> set[int]:
    return {tensor.data_ptr() for tensor in embeddings.state_dict().values() if tensor.numel()}


def gradients(embeddings: PeftTransformerEmbeddings) -> dict[str, torch.Tensor]:
    """Return the gradient of every trained parameter for one batch."""
    embeddings.train()
    embeddings.zero_grad()
    torch.stack(embed(embeddings)).square().sum().backward()
    trained = {name: p.grad for name, p in embeddings.model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    return trained


# Equal to stock


@pytest.mark.parametrize("layer_mean", [True, False])
@pytest.mark.parametrize("layers", ["-1", "all", "0,1", "-1,-2"])
@WORD_AND_DOCUMENT
def test_embeddings_with_adapter_off_equal_stock_for_layers(
    base: Base, ours: type[PeftTransformerEmbeddings], layers: str, layer_mean: bool
) -> None:
    """Any choice of layers, averaged or concatenated, gives stock Flair's bits."""
    assert_equals_stock(ours, base("bert"), layers=layers, layer_mean=layer_mean)


@pytest.mark.parametrize("layer_mean", [True, False])
@pytest.mark.parametrize("pooling", ["first", "last", "first_last", "mean"])
def test_embeddings_with_adapter_off_equal_stock_for_subtoken_pooling(
    base: Base, pooling: str, layer_mean: bool
) -> None:
    """Every subtoken pooling gives stock Flair's bits."""
    assert_equals_stock(WORD, base("bert"), subtoken_pooling=pooling, layers="-1,-2", layer_mean=layer_mean)


@pytest.mark.parametrize("allow_long_sentences", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "max", "mean"])
def test_embeddings_with_adapter_off_equal_stock_for_document_pooling(
    base: Base, pooling: str, allow_long_sentences: bool
) -> None:
    """Every document pooling gives stock Flair's bits, for sentences beyond the model's length too."""
    texts = [*TEXTS, LONG_TEXT]
    assert_equals_stock(DOCUMENT, base("bert"), texts, cls_pooling=pooling, allow_long_sentences=allow_long_sentences)


@pytest.mark.parametrize("pooling", ["cls", "max", "mean"])
@CLASSES
def test_embeddings_of_words_and_documents_with_adapter_off_equal_stock(
    base: Base, ours: type[PeftTransformerEmbeddings], pooling: str
) -> None:
    """Embeddings that give words and documents at once give stock Flair's bits for both."""
    extra = {WORD: {"is_document_embedding": True}, DOCUMENT: {"is_token_embedding": True}, BOTH: {}}[ours]
    assert_equals_stock(ours, base("bert"), cls_pooling=pooling, **extra)


@pytest.mark.parametrize("use_context_separator", [True, False])
@pytest.mark.parametrize("use_context", [True, 1, 5])
@WORD_AND_DOCUMENT
def test_embeddings_with_adapter_off_equal_stock_with_context(
    base: Base, ours: type[PeftTransformerEmbeddings], use_context: bool | int, use_context_separator: bool
) -> None:
    """Context of any width, with and without separator, gives stock Flair's bits."""
    assert_equals_stock(
        ours, base("bert"), use_context=use_context, use_context_separator=use_context_separator, cls_pooling="mean"
    )


@pytest.mark.parametrize("respect_document_boundaries", [True, False])
def test_embeddings_with_adapter_off_equal_stock_at_document_boundaries(
    base: Base, respect_document_boundaries: bool
) -> None:
    """Context stops at a document boundary exactly where stock Flair's does."""

    def embed_two_documents(embeddings: Embeddings) -> list[torch.Tensor]:
        sentences = [Sentence(TEXTS[0]), Sentence("-DOCSTART-"), Sentence(TEXTS[1]), Sentence(TEXTS[2])]
        sentences[1].is_document_boundary = True
        embeddings.embed(sentences)
        return read(embeddings, sentences)

    embeddings, stock = pair(
        WORD, base("bert"), use_context=True, respect_document_boundaries=respect_document_boundaries
    )
    expected = embed_two_documents(stock)
    with embeddings.model.disable_adapter():
        assert is_same(embed_two_documents(embeddings), expected)
    stock.respect_document_boundaries = not respect_document_boundaries
    assert not is_close(embed_two_documents(stock), expected, tolerance=1e-3)


def test_embeddings_in_training_drop_context_as_stock_does(base: Base) -> None:
    """Context dropout reads the same random numbers as stock Flair's and drops the same context."""
    embeddings, stock = pair(WORD, base("bert"), use_context=True, context_dropout=0.5)
    for seed in range(4):
        vectors = []
        for candidate in (embeddings, stock):
            random.seed(seed)
            candidate.train()
            with embeddings.model.disable_adapter():
                vectors.append(embed(candidate))
        assert is_same(*vectors)


@pytest.mark.parametrize("pooling", ["first", "last", "first_last", "mean"])
@pytest.mark.parametrize("allow_long_sentences", [True, False])
def test_embeddings_with_adapter_off_equal_stock_for_long_sentences(
    base: Base, allow_long_sentences: bool, pooling: str
) -> None:
    """Sentences beyond the model's length are split, or cut, exactly as stock Flair does it."""
    texts = [LONG_TEXT, *TEXTS, f"{LONG_TEXT} {LONG_TEXT}"]
    assert_equals_stock(WORD, base("bert"), texts, allow_long_sentences=allow_long_sentences, subtoken_pooling=pooling)


def test_embeddings_of_long_sentences_embed_every_word(base: Base) -> None:
    """With allow_long_sentences no word of a sentence beyond the model's length is left without a vector."""
    vectors = embed(WORD(base("bert"), peft_config=lora()), [LONG_TEXT])
    assert all(vector.abs().max() > 0 for vector in vectors)


@pytest.mark.parametrize("pooling", ["first", "last", "first_last", "mean"])
def test_embeddings_with_slow_tokenizer_with_adapter_off_equal_stock(base: Base, pooling: str) -> None:
    """A tokenizer without a fast twin gives stock Flair's bits."""
    assert_equals_stock(
        WORD,
        base("bert-slow"),
        allow_long_sentences=False,
        subtoken_pooling=pooling,
        transformers_tokenizer_kwargs={"use_fast": False},
    )


@pytest.mark.parametrize("texts", [TEXTS, (LONG_TEXT, *TEXTS)])
def test_embeddings_with_slow_tokenizer_by_default_embed_as_without_long_sentences(
    base: Base, texts: Sequence[str]
) -> None:
    """The default of word embeddings, which stock Flair fails on with a slow tokenizer, cuts long sentences."""
    options = {"transformers_tokenizer_kwargs": {"use_fast": False}}
    embeddings = WORD(base("bert-slow"), peft_config=lora(), **options)
    stock = TransformerWordEmbeddings(base("bert-slow"), allow_long_sentences=False, **options)
    assert not embeddings.tokenizer.is_fast
    with embeddings.model.disable_adapter():
        assert is_same(embed(embeddings, texts), embed(stock, texts))


@WORD_AND_DOCUMENT
def test_embeddings_with_force_max_length_with_adapter_off_equal_stock(
    base: Base, ours: type[PeftTransformerEmbeddings]
) -> None:
    """Batches padded to the model's length give stock Flair's bits."""
    assert_equals_stock(ours, base("bert"), force_max_length=True)
    embeddings = ours(base("bert"), peft_config=lora(), force_max_length=True)
    assert embeddings.prepare_tensors([Sentence("I")])["input_ids"].shape == (1, tiny.MAX_LENGTH)


@WORD_AND_DOCUMENT
def test_embeddings_without_fine_tuning_with_adapter_off_equal_stock(
    base: Base, ours: type[PeftTransformerEmbeddings]
) -> None:
    """With fine_tune=False vectors are stock Flair's, and detached in training too."""
    assert_equals_stock(ours, base("bert"), fine_tune=False)
    embeddings = ours(base("bert"), peft_config=lora(), fine_tune=False)
    assert embeddings.static_embeddings
    embeddings.train()
    assert not any(vector.requires_grad for vector in embed(embeddings))


@WORD_AND_DOCUMENT
def test_embeddings_with_padded_vocabulary_equal_stock_without_a_resize(
    base: Base, ours: type[PeftTransformerEmbeddings]
) -> None:
    """A vocabulary padded beyond its tokenizer keeps its rows: the separator reads one that is there."""
    path = base("bert-padded-vocab")
    raw = AutoModel.from_pretrained(path).get_input_embeddings().weight
    embeddings = ours(path, peft_config=lora(), use_context=True)
    separator = embeddings.tokenizer.convert_tokens_to_ids(SENTENCE_BOUNDARY_TAG)
    assert separator < len(raw)
    assert torch.equal(embeddings.base_model.get_input_embeddings().weight, raw)
    assert_equals_stock(ours, path, use_context=True)


def test_embeddings_with_separator_add_one_row_that_is_the_mean(base: Base) -> None:
    """The separator's row is the mean of the others, the same each time, and changes none of them."""
    raw = AutoModel.from_pretrained(base("bert")).get_input_embeddings().weight
    first, second = (WORD(base("bert"), peft_config=lora()).base_model.get_input_embeddings().weight for _ in range(2))
    assert first.shape == (len(raw) + 1, raw.shape[1])
    assert torch.equal(first[:-1], raw)
    assert torch.allclose(first[-1], raw.mean(dim=0), atol=1e-6)
    assert torch.equal(first, second)


def test_embeddings_without_separator_keep_the_vocabulary(base: Base) -> None:
    """With use_context_separator=False neither the tokenizer nor the matrix grows."""
    embeddings = WORD(base("bert"), peft_config=lora(), use_context_separator=False)
    raw = AutoModel.from_pretrained(base("bert")).get_input_embeddings().weight
    assert torch.equal(embeddings.base_model.get_input_embeddings().weight, raw)
    assert SENTENCE_BOUNDARY_TAG not in embeddings.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls_pooling": "median"}, "Document Pooling operation `median` is not defined"),
        ({"subtoken_pooling": "median"}, "Subtoken Pooling operation `median` is not defined"),
        ({"is_token_embedding": False, "is_document_embedding": False}, "either 'is_token_embedding' or"),
    ],
)
def test_embeddings_without_a_pooling_refuse_as_stock_does(base: Base, options: dict[str, Any], message: str) -> None:
    """An unknown pooling, and embeddings of nothing, are refused with stock Flair's words."""
    with pytest.raises(ValueError, match=message):
        TransformerEmbeddings(base("bert"), **options)
    with pytest.raises(ValueError, match=message):
        PeftTransformerEmbeddings(base("bert"), peft_config=lora(), **options)


@pytest.mark.parametrize("texts", [("",), ("", "I love it"), ("I love it", ""), (" ",)])
@WORD_AND_DOCUMENT
def test_embeddings_of_empty_sentences_equal_stock(
    base: Base, ours: type[PeftTransformerEmbeddings], texts: Sequence[str]
) -> None:
    """Sentences without words get what stock Flair gives them, or fail as there."""
    embeddings, stock = pair(ours, base("bert"))
    outcomes = []
    for candidate in (embeddings, stock):
        sentences = [Sentence(text) for text in texts]
        with embeddings.model.disable_adapter():
            try:
                candidate.embed(sentences)
            except Exception as error:  # whatever stock Flair raises
                outcomes.append((type(error), str(error)))
            else:
                outcomes.append(read(candidate, sentences))
    found, expected = outcomes
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert [vector.tolist() for vector in found] == [vector.tolist() for vector in expected]


# Under other embeddings


def bert_and_electra(base: Base) -> tuple[StackedEmbeddings, StackedEmbeddings, list[PeftTransformerWordEmbeddings]]:
    members = [pair(WORD, base(architecture)) for architecture in ("bert", "electra")]
    ours, stock = (StackedEmbeddings([member[index] for member in members]) for index in (0, 1))
    return ours, stock, [member[0] for member in members]


def test_stacked_embeddings_with_adapters_off_equal_stock(base: Base) -> None:
    """Two embeddings with adapters in a stack give what two stock embeddings give."""
    ours, stock, (first, second) = bert_and_electra(base)
    with first.model.disable_adapter(), second.model.disable_adapter():
        assert is_same(embed(ours), embed(stock))
    assert not is_close(embed(ours), embed(stock), tolerance=1e-2)


def test_stacked_embeddings_of_two_adapters_on_one_base_hold_both(base: Base) -> None:
    """Two adapters on one base in one stack give the vectors of each, side by side."""
    first, second = (WORD(base("bert"), peft_config=lora()) for _ in range(2))
    stacked = embed(StackedEmbeddings([first, second]))
    expected = [torch.cat(both) for both in zip(embed(first), embed(second), strict=True)]
    assert is_same(stacked, expected)
    assert not torch.equal(stacked[0][:32], stacked[0][32:])


@pytest.mark.parametrize("fine_tune_mode", ["none", "linear", "nonlinear"])
@pytest.mark.parametrize("pooling", ["mean", "max", "min"])
def test_document_pool_embeddings_with_adapter_off_equal_stock(base: Base, pooling: str, fine_tune_mode: str) -> None:
    """Flair's document pooling over words with an adapter gives stock Flair's bits."""
    members = pair(WORD, base("bert"))
    ours, stock = (
        DocumentPoolEmbeddings([member], pooling=pooling, fine_tune_mode=fine_tune_mode).eval() for member in members
    )
    copy_head_(stock, ours)
    with members[0].model.disable_adapter():
        assert is_same(embed(ours), embed(stock))
    assert not is_close(embed(ours), embed(stock), tolerance=1e-2)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("rnn_type", ["GRU", "LSTM"])
def test_document_rnn_embeddings_with_adapter_off_equal_stock(base: Base, rnn_type: str, bidirectional: bool) -> None:
    """Flair's recurrent network over words with an adapter gives stock Flair's bits."""
    members = pair(WORD, base("bert"))
    ours, stock = (
        DocumentRNNEmbeddings([member], hidden_size=8, rnn_type=rnn_type, bidirectional=bidirectional).eval()
        for member in members
    )
    copy_head_(stock, ours)
    with members[0].model.disable_adapter():
        assert is_same(embed(ours), embed(stock))
    assert not is_close(embed(ours), embed(stock), tolerance=1e-3)


def copy_head_(source: Embeddings, target: Embeddings) -> None:
    """Copy all weights outside the transformers."""
    head = {name: p for name, p in target.named_parameters() if not name.startswith("embeddings.")}
    expected = {name: p for name, p in source.named_parameters() if not name.startswith("embeddings.")}
    assert head.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(expected[name])


# Names, configs and dtypes


@CLASSES
def test_names_of_two_adapters_on_one_base_differ(base: Base, ours: type[PeftTransformerEmbeddings]) -> None:
    """Flair takes vectors of the same name for the same vectors, so each adapter has a name of its own."""
    first, second = (ours(base("bert"), peft_config=lora()) for _ in range(2))
    assert first.name != second.name
    sentence = Sentence("I love it")
    first.embed([sentence])
    second.embed([sentence])
    assert not is_close(read(first, [sentence]), read(second, [sentence]), tolerance=1e-2)


@CLASSES
def test_name_given_is_kept(base: Base, ours: type[PeftTransformerEmbeddings]) -> None:
    """A name that the user gives is the name, also after a round trip."""
    embeddings = ours(base("bert"), peft_config=lora(), name="mine")
    assert embeddings.name == embeddings.get_names()[0] == "mine"
    assert load_embeddings(embeddings.save_embeddings()).name == "mine"


@pytest.mark.parametrize("method", ["LORA", "ADALORA", "IA3", "VERA", "PROMPT_TUNING", "TRAINABLE_TOKENS"])
def test_peft_config_given_is_not_mutated(base: Base, method: str) -> None:
    """PEFT writes into the config that it is given; the user's object stays as it was."""
    config: PeftConfig = METHODS[method].config("encoder")
    config.task_type = None
    config.inference_mode = True
    before = copy.deepcopy(vars(config))
    embeddings = WORD(base("bert"), peft_config=config)
    embed(embeddings)
    assert vars(config) == before
    assert embeddings.adapter_config is not config


def test_peft_config_used_twice_gives_two_independent_adapters(base: Base) -> None:
    """One config object can be given to any number of embeddings."""
    config = lora(target_modules="all-linear")
    first, second = WORD(base("bert"), peft_config=config), WORD(base("roberta"), peft_config=config)
    assert config.target_modules == "all-linear"
    assert storages(first).isdisjoint(storages(second))
    expected = embed(first)
    change_weights_(second)
    assert is_same(embed(first), expected)


@CLASSES
def test_peft_config_of_none_is_lora_on_all_linear_layers(base: Base, ours: type[PeftTransformerEmbeddings]) -> None:
    """Without a config the adapter is LoRA of rank 16 and alpha 32 on every linear layer that can learn."""
    embeddings = ours(base("bert"), peft_config=None)
    config = embeddings.adapter_config
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (16, 32)
    linear = {
        name
        for name, module in AutoModel.from_pretrained(base("bert")).named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    }
    trained = {name for name, p in embeddings.model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in trained} == linear


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", "float32"])
def test_dtype_equals_torch_dtype_of_model_arguments(base: Base, dtype: str | torch.dtype) -> None:
    """dtype= and transformers' torch_dtype give the same base and the same vectors."""
    options = [
        {"dtype": dtype},
        {"transformers_model_kwargs": {"torch_dtype": dtype}},
        {"transformers_model_kwargs": {"dtype": dtype}},
        {"dtype": dtype, "transformers_model_kwargs": {"torch_dtype": dtype}},
    ]
    vectors = []
    for given in options:
        torch.manual_seed(1)
        embeddings = WORD(base("bert"), peft_config=lora(), **given)
        assert embeddings.base_dtype == getattr(torch, str(dtype).removeprefix("torch."))
        vectors.append(embed(embeddings))
    assert all(is_same(vectors[0], other) for other in vectors[1:])


def test_dtype_that_disagrees_with_torch_dtype_is_refused(base: Base) -> None:
    """Two different dtypes for one base are an error that names both."""
    with pytest.raises(AdapterConfigError, match=r"torch\.bfloat16 and torch\.float16"):
        WORD(base("bert"), dtype="bfloat16", transformers_model_kwargs={"torch_dtype": torch.float16})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@CLASSES
def test_output_dtype_of_new_embeddings_is_fp32_with_and_without_padding(
    base: Base, ours: type[PeftTransformerEmbeddings], dtype: str
) -> None:
    """Whatever dtype the base has, vectors leave in fp32, for which heads are trained, padded or not."""
    embeddings = ours(base("bert"), peft_config=lora(), dtype=dtype)
    assert embeddings.base_dtype == getattr(torch, dtype)
    assert embeddings.output_dtype == torch.float32
    for texts in (["I love it"], ["I love it", "I love it"], ["I love it", "I"]):
        assert {vector.dtype for vector in embed(embeddings, texts)} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_embeddings_of_a_base_in_half_precision_are_pooled_in_fp32(base: Base, dtype: str) -> None:
    """Averages over layers and subtokens are not rounded to the base's dtype on the way."""
    embeddings = WORD(base("bert"), peft_config=lora(), dtype=dtype, layers="all", subtoken_pooling="mean")
    tensors = embeddings.prepare_tensors([Sentence("xyz")])
    with torch.no_grad():
        states = embeddings.hidden_states(tensors["input_ids"], attention_mask=tensors["attention_mask"])
    assert {state.dtype for state in states} == {getattr(torch, dtype)}
    subtokens = torch.stack([state[0].float() for state in states]).mean(dim=0)[1:-1]
    assert len(subtokens) > 1
    assert is_close(embed(embeddings, ["xyz"]), [subtokens.mean(dim=0)], tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@CLASSES
def test_output_dtype_follows_a_conversion_of_the_module(
    base: Base, ours: type[PeftTransformerEmbeddings], dtype: torch.dtype
) -> None:
    """half(), bfloat16() and to(dtype) convert what leaves the embeddings along with their weights, and back."""
    embeddings = ours(base("bert"), peft_config=lora())
    expected = embed(embeddings)
    embeddings.to(dtype)
    found = embed(embeddings)
    assert embeddings.output_dtype == embeddings.base_dtype == dtype
    assert {vector.dtype for vector in found} == {dtype}
    assert is_close([vector.float() for vector in found], expected, tolerance=0.2)
    embeddings.float()
    assert {vector.dtype for vector in embed(embeddings)} == {torch.float32}


def test_base_model_not_found_is_an_error_that_names_it(tmp_path: Any) -> None:
    """A base model that is nowhere is named in an OSError."""
    with pytest.raises(BaseModelNotFoundError, match="nowhere"):
        WORD(str(tmp_path / "nowhere"), peft_config=lora())


def test_keyword_arguments_reach_the_base_as_in_stock(base: Base) -> None:
    """Keyword arguments for the tokenizer, the config and the model work as with the stock class."""
    assert_equals_stock(
        WORD,
        base("bert"),
        local_files_only=True,
        transformers_tokenizer_kwargs={"do_lower_case": False},
        transformers_config_kwargs={"hidden_act": "relu"},
        transformers_model_kwargs={"attn_implementation": "eager"},
    )


# Stored vectors


@pytest.mark.parametrize("is_installed", [True, False])
@CLASSES
def test_embeddings_stored_before_a_weight_change_are_computed_again(
    base: Base, ours: type[PeftTransformerEmbeddings], is_installed: bool
) -> None:
    """Vectors that a sentence stores from earlier weights are never taken for those of the weights of now."""
    if not is_installed:
        flair_peft.uninstall()
    embeddings = ours(base("bert"), peft_config=lora())
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.embed(sentences)
    before = [vector.clone() for vector in read(embeddings, sentences)]
    change_weights_(embeddings)
    embeddings.embed(sentences)
    assert is_same(read(embeddings, sentences), embed(embeddings))
    assert not is_close(read(embeddings, sentences), before, tolerance=1e-2)


@pytest.mark.parametrize("wrap", [lambda e: StackedEmbeddings([e]), lambda e: DocumentPoolEmbeddings([e])])
def test_embeddings_stored_by_their_wrapper_are_computed_again(
    base: Base, wrap: Callable[[PeftTransformerEmbeddings], Embeddings]
) -> None:
    """A stack or a pool over an adapter that changed does not return what it stored before."""
    embeddings = WORD(base("bert"), peft_config=lora())
    wrapped = wrap(embeddings).eval()
    sentences = [Sentence(text) for text in TEXTS]
    wrapped.embed(sentences)
    change_weights_(embeddings)
    wrapped.embed(sentences)
    assert is_same(read(wrapped, sentences), embed(wrapped))


@CLASSES
def test_embeddings_without_fine_tuning_reuse_stored_vectors(
    base: Base, ours: type[PeftTransformerEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that cannot change are not run again over sentences that store their vectors."""
    embeddings = ours(base("bert"), peft_config=lora(), fine_tune=False)
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.embed(sentences)
    monkeypatch.setattr(embeddings, "hidden_states", lambda *_, **__: pytest.fail("computed again"))
    embeddings.embed(sentences)
    assert len(read(embeddings, sentences)) > 0


# Copies and round trips


def deep_copied(embeddings: PeftTransformerEmbeddings) -> PeftTransformerEmbeddings:
    return copy.deepcopy(embeddings)


def pickled(embeddings: PeftTransformerEmbeddings) -> PeftTransformerEmbeddings:
    return pickle.loads(pickle.dumps(embeddings))


def torch_saved(embeddings: PeftTransformerEmbeddings) -> PeftTransformerEmbeddings:
    buffer = io.BytesIO()
    torch.save(embeddings, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def flair_saved(embeddings: PeftTransformerEmbeddings) -> PeftTransformerEmbeddings:
    return load_embeddings(embeddings.save_embeddings())


COPIES = pytest.mark.parametrize("copied", [deep_copied, pickled, torch_saved])
ROUND_TRIPS = pytest.mark.parametrize("copied", [deep_copied, pickled, torch_saved, flair_saved])
Copy = Callable[[PeftTransformerEmbeddings], PeftTransformerEmbeddings]


@CLASSES
@ROUND_TRIPS
def test_copy_gives_bit_equal_vectors_and_settings(
    base: Base, ours: type[PeftTransformerEmbeddings], copied: Copy
) -> None:
    """A copied, pickled or stored object is of the same class and gives the same bits."""
    embeddings = ours(
        base("bert"),
        peft_config=lora(),
        layers="-1,-2",
        layer_mean=False,
        subtoken_pooling="mean",
        cls_pooling="max",
        use_context=3,
        context_dropout=0.25,
        force_max_length=True,
        respect_document_boundaries=False,
        head_dtype="float16",
    )
    clone = copied(copied(embeddings))
    assert type(clone) is type(embeddings)
    assert is_same(embed(clone), embed(embeddings))
    ignored = {"tokenizer_data"}
    found, expected = clone.to_params(), embeddings.to_params()
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


@COPIES
def test_copy_has_weights_of_its_own(base: Base, copied: Copy) -> None:
    """Changing a copy leaves the original as it is, and the reverse."""
    embeddings = WORD(base("bert"), peft_config=lora())
    clone = copied(embeddings)
    assert storages(clone).isdisjoint(storages(embeddings))
    expected = embed(embeddings)
    change_weights_(clone)
    assert is_same(embed(embeddings), expected)
    assert not is_close(embed(clone), expected, tolerance=1e-2)
    changed = embed(clone)
    change_weights_(embeddings)
    assert is_same(embed(clone), changed)


@ROUND_TRIPS
def test_copy_trains_what_the_original_trains(base: Base, copied: Copy) -> None:
    """The gradients of a copy are those of the original, for the same parameters."""
    embeddings = WORD(base("bert"), peft_config=lora())
    expected, found = gradients(embeddings), gradients(copied(embeddings))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("method", ["LORA", "ADALORA", "OSF", "PSOFT", "TRAINABLE_TOKENS", "LN_TUNING", "VERA"])
@ROUND_TRIPS
def test_copy_of_other_methods_gives_bit_equal_vectors(base: Base, method: str, copied: Copy) -> None:
    """Methods that keep tensors outside the state dict, or rewrite the base, survive a copy too."""
    embeddings = WORD(base("bert"), peft_config=METHODS[method].config("encoder"))
    change_weights_(embeddings)
    assert is_same(embed(copied(embeddings)), embed(embeddings))


@ROUND_TRIPS
def test_copy_keeps_the_dtype_of_the_base(base: Base, copied: Copy) -> None:
    """A bf16 base is a bf16 base in the copy, with the same bits."""
    embeddings = WORD(base("bert"), peft_config=lora(), dtype="bfloat16")
    clone = copied(embeddings)
    assert clone.base_dtype == torch.bfloat16
    assert {k: v.dtype for k, v in clone.state_dict().items()} == {
        k: v.dtype for k, v in embeddings.state_dict().items()
    }
    assert is_same(embed(clone), embed(embeddings))


@COPIES
def test_copy_keeps_the_output_dtype(base: Base, copied: Copy) -> None:
    """What leaves in bf16 leaves in bf16 from the copy."""
    embeddings = WORD(base("bert"), peft_config=lora(), dtype="bfloat16")
    embeddings.output_dtype = torch.bfloat16
    assert is_same(embed(copied(embeddings)), embed(embeddings))


@COPIES
def test_copy_trains_what_was_unfrozen_of_the_base(base: Base, copied: Copy) -> None:
    """Weights of the base that a user unfroze are trained on in the copy, and no others."""
    embeddings = WORD(base("bert"), peft_config=lora())
    embeddings.base_model.encoder.layer[1].output.dense.requires_grad_(True)
    expected = {name for name, parameter in embeddings.named_parameters() if parameter.requires_grad}
    clone = copied(copied(embeddings))
    assert {name for name, parameter in clone.named_parameters() if parameter.requires_grad} == expected
    assert is_same(embed(clone), embed(embeddings))


@COPIES
def test_copy_keeps_the_mode(base: Base, copied: Copy) -> None:
    """Embeddings copied while they train go on training."""
    embeddings = WORD(base("bert"), peft_config=lora())
    embeddings.train()
    assert copied(embeddings).training
    embeddings.eval()
    assert not copied(embeddings).training


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "merged": lambda model: model.merge_adapter(),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": lambda model: [m.scale_layer(0.25) for m in model.modules() if isinstance(m, LoraLayer)],
    "one of several": lambda model: model.add_adapter("second", lora(lora_alpha=20)),
}


@pytest.mark.parametrize("copied", [pickled, torch_saved])
@pytest.mark.parametrize("change", CHANGES)
def test_adapter_in_a_state_that_no_pickle_gives_back_is_refused(base: Base, change: str, copied: Copy) -> None:
    """What would embed something else after unpickling is refused when it is pickled; a deep copy embeds the same."""
    embeddings = WORD(base("bert"), peft_config=lora())
    CHANGES[change](embeddings.model)
    with pytest.raises(AdapterConfigError, match="Undo that on embeddings"):
        copied(embeddings)
    assert is_same(embed(copy.deepcopy(embeddings)), embed(embeddings))


@pytest.mark.parametrize("method", ["LORA", "PROMPT_TUNING", "PREFIX_TUNING"])
def test_model_that_torch_compile_wrapped_is_what_it_was(method: str, base: Base, tmp_path: Path) -> None:
    """As with ``embeddings.model.compile()``: rows of a prompt are found, and the adapter is stored."""
    compiled = list[Any]()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    model = make(CLASSIFIER, base("bert"), METHODS[method].config("encoder"))
    perturb_(model, seed=1)
    expected = CLASSIFIER.predict(model.eval(), CLASSIFIER.corpus())
    inner = model.embeddings.model
    model.embeddings.model = torch.compile(inner, backend=backend)
    assert model.embeddings.model is inner
    found = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    assert compiled
    assert largest_difference(found, expected) < 1e-6
    model.save(tmp_path / "model.pt")
    assert CLASSIFIER.predict(TextClassifier.load(tmp_path / "model.pt"), CLASSIFIER.corpus()) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_round_trip_keeps_the_attention_implementation(base: Base, attention: str) -> None:
    """The attention that the adapter was trained with is the one that it is loaded with."""
    embeddings = WORD(base("bert"), peft_config=lora(), transformers_model_kwargs={"attn_implementation": attention})
    loaded = flair_saved(embeddings)
    assert loaded.base_model.config._attn_implementation == attention
    assert is_same(embed(loaded), embed(embeddings))


def plain(value: Any) -> Any:
    """Return a copy that can be compared: file objects become their bytes."""
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


@CLASSES
def test_parameters_are_not_mutated_by_loading_beyond_what_flair_pops(
    base: Base, ours: type[PeftTransformerEmbeddings]
) -> None:
    """Loading takes two keys out of the dict, as Flair does, and changes nothing else in it or below."""
    embeddings = ours(base("bert"), peft_config=lora(), use_context=True)
    params = embeddings.save_embeddings()
    before = plain(params)
    load_embeddings(params)
    del before["__cls__"], before["state_dict"]
    assert plain(params) == before
    for _ in range(2):
        again = ours.from_params(params)
        again.load_state_dict(embeddings.state_dict())
        assert is_same(embed(again), embed(embeddings))
    assert plain(params) == before


@CLASSES
def test_embeddings_built_from_parameters_without_weights_refuse_to_embed(
    base: Base, ours: type[PeftTransformerEmbeddings]
) -> None:
    """Weights that were never loaded are an error, not vectors out of uninitialised memory."""
    embeddings = ours(base("bert"), peft_config=lora())
    empty = load_embeddings(embeddings.save_embeddings(use_state_dict=False))
    with pytest.raises(ModelFileError, match="never loaded"):
        empty.embed([Sentence("I love it")])
    empty.load_state_dict(embeddings.state_dict())
    assert is_same(embed(empty), embed(embeddings))


def test_embeddings_given_only_a_part_of_their_weights_refuse_to_embed(base: Base) -> None:
    """Half a state dict loads with strict=False, as torch promises, but does not count as loaded."""
    embeddings = WORD(base("bert"), peft_config=lora())
    empty = WORD.from_params(embeddings.to_params())
    state = embeddings.state_dict()
    missing = [name for name in state if "lora_" in name]
    found = empty.load_state_dict({name: state[name] for name in state if name not in missing}, strict=False)
    assert sorted(found.missing_keys) == sorted(missing)
    with pytest.raises(ModelFileError, match="never loaded"):
        empty.embed([Sentence("I love it")])


def test_head_loads_with_strict_false_around_an_adapter(base: Base) -> None:
    """A state dict of the modules around the embeddings alone loads with strict=False, as torch promises."""
    embeddings = DocumentRNNEmbeddings([WORD(base("bert"), peft_config=lora())], hidden_size=8)
    head = {name: 2 * t for name, t in embeddings.state_dict().items() if not name.startswith("embeddings.")}
    found = embeddings.load_state_dict(head, strict=False)
    assert not found.unexpected_keys
    assert all(torch.equal(embeddings.state_dict()[name], tensor) for name, tensor in head.items())


def test_embeddings_of_a_model_are_found_once_each_wherever_they_are(base: Base) -> None:
    """Stacked or shared by several modules, each counts once; stock embeddings do not count."""
    first, second = (WORD(base("bert"), peft_config=lora()) for _ in range(2))
    stock = TransformerWordEmbeddings(base("bert"))
    nested = torch.nn.ModuleList([StackedEmbeddings([first, stock, second]), torch.nn.Sequential(first)])
    assert adapted_embeddings(nested) == [first, second]
    assert adapted_embeddings(stock) == []


# Training and batches


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_gradient_checkpointing_after_construction_gives_the_same_gradients(
    base: Base, architecture: str, options: dict[str, Any] | None
) -> None:
    """Trading memory for time changes no gradient, however the checkpointing is set up."""
    embeddings = WORD(base(architecture), peft_config=lora(target_modules=tiny.ATTENTION_TARGETS[architecture]))
    expected = {name: gradient.clone() for name, gradient in gradients(embeddings).items()}
    embeddings.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert embeddings.base_model.is_gradient_checkpointing
    found = gradients(embeddings)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("use_context", [False, True])
@CLASSES
def test_batch_of_sentences_gives_each_what_it_gets_alone(
    base: Base, ours: type[PeftTransformerEmbeddings], use_context: bool
) -> None:
    """The vectors of a sentence do not depend on the sentences that are embedded with it."""
    embeddings = ours(base("bert"), peft_config=lora(), cls_pooling="mean", use_context=use_context)

    def connected() -> list[Sentence]:
        sentences = [Sentence(text) for text in [*TEXTS, LONG_TEXT]]
        for left, right in itertools.pairwise(sentences):
            left._next_sentence, right._previous_sentence = right, left
        return sentences

    together, alone = connected(), connected()
    embeddings.embed(together)
    for sentence in alone:
        embeddings.embed([sentence])
    assert is_close(read(embeddings, together), read(embeddings, alone))


def test_embeddings_follow_flairs_device(base: Base) -> None:
    """Embeddings are on Flair's device when they are made."""
    flair.device = torch.device("cpu")
    embeddings = WORD(base("bert"), peft_config=lora())
    assert {parameter.device.type for parameter in embeddings.parameters()} == {"cpu"}


def test_embeddings_with_prompts_and_long_sentences_cut_where_the_positions_end(base: Base) -> None:
    """The tokenizer leaves room for virtual tokens once, however often the embeddings are stored and loaded."""
    embeddings = WORD(base("bert"), peft_config=PromptTuningConfig(num_virtual_tokens=3))
    for _ in range(3):
        assert embeddings.tokenizer.model_max_length == tiny.MAX_LENGTH - 3
        embeddings = flair_saved(embeddings)


def test_layer_that_the_model_lacks_is_named_with_how_many_there_are(base: Callable[[str], str]) -> None:
    """A wrong number in ``layers`` is not taken for a fault of the adapter."""
    with pytest.raises(AdapterConfigError, match=r"layers \[9\] of BertModel: it has 3 hidden states"):
        PeftTransformerWordEmbeddings(base("bert"), peft_config=LoraConfig(), layers="-1,9")


EMPTY: dict[str, list[str]] = {
    "nothing": [],
    "no words": [""],
    "zero width": ["\u200b", ""],
    "some words": ["", "I love it", "\u200b"],
}


@pytest.mark.parametrize("texts", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize(
    ("ours", "wrap"),
    [(WORD, None), (DOCUMENT, None), (BOTH, None), (WORD, StackedEmbeddings), (WORD, DocumentPoolEmbeddings)],
    ids=["words", "documents", "both", "stacked", "pooled"],
)
def test_empty_input_is_embedded_as_stock_embeddings_do(
    ours: type[PeftTransformerEmbeddings], wrap: Callable[[Any], Embeddings] | None, texts: list[str], base: Base
) -> None:
    """The same vectors, or the same error; stock classes with an adapter included."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["query"])  # B is 0: the vectors are the base's
    kinds = [(STOCK[ours], {}), (STOCK[ours], {"peft_config": config}), (ours, {"peft_config": config})]
    outcomes = []
    for kind, options in kinds:
        embeddings = kind(base("bert"), fine_tune=True, use_context_separator=False, **options)
        embeddings = (embeddings if wrap is None else wrap([embeddings])).eval()
        sentences = [Sentence(text) for text in texts]
        try:
            embeddings.embed(sentences)
            outcomes.append(read(embeddings, [sentence for sentence in sentences if sentence.tokens]))
        except (IndexError, ValueError) as error:
            outcomes.append([str(error)])
    for outcome in outcomes[1:]:
        assert len(outcome) == len(outcomes[0])
        assert all(a == b if isinstance(a, str) else is_close(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


NAMES: dict[str, tuple[str, Callable[[], PeftConfig], str]] = {
    "letters exchanged": ("bert", lambda: lora(target_modules=["query", "valeu"]), "'valeu' .is 'value' meant"),
    "a letter too many": ("bert", lambda: lora(target_modules=["querys", "value"]), "'querys' .is 'query' meant"),
    "a letter missing": ("llama", lambda: lora(target_modules=["q_proj", "gateproj"]), "is 'gate_proj' meant"),
    "another case": ("bert", lambda: lora(target_modules=["Query", "value"]), "is 'query' meant"),
    "of a path": ("bert", lambda: lora(target_modules=["key", "self.valeu"]), "'self.valeu' .is 'self.value' meant"),
    "in a path": (
        "bert",
        lambda: lora(target_modules=["key", "encoder.layr.1.attention.self.query"]),
        "is 'encoder.layer.1.attention.self.query' meant",
    ),
    "with trained tokens": ("bert", lambda: lora(trainable_token_indices={"word_embeddngs": [5]}), "'word_embeddings'"),
    "saved": ("bert", lambda: lora(modules_to_save=["poler"]), "'poler' .is 'pooler' meant.*modules_to_save"),
    "excluded": ("bert", lambda: lora(exclude_modules=["quer"], target_modules=["value"]), "exclude_modules"),
    "feed-forward": (
        "bert",
        lambda: IA3Config(target_modules=["key", "dense", "dens"], feedforward_modules=["dens"]),
        "is 'dense' meant",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_config_with_a_misspelt_name_is_refused_with_the_name_that_is_meant(name: str, base: Base) -> None:
    """PEFT is content with the other names, and a part of the adapter would be missing without a word."""
    architecture, config, message = NAMES[name]
    with pytest.raises(AdapterConfigError, match=message):
        PeftTransformerDocumentEmbeddings(base(architecture), peft_config=config())


LISTS: dict[str, tuple[str, Callable[[], PeftConfig], tuple[str, ...]]] = {
    "for many architectures": (
        "bert",
        lambda: lora(target_modules=["query", "value", "q_proj", "v_proj", "c_attn", "querys"]),
        ("'c_attn', 'q_proj', 'querys', 'v_proj'", "target_modules", "'dense', 'key'"),
    ),
    "of deeper models": (
        "bert",
        lambda: lora(target_modules=[f"layer.{number}.attention.self.query" for number in (0, 1, 10)]),
        ("'layer.10.attention.self.query'", "target_modules"),
    ),
    "with slips among many": (
        "bert",
        lambda: lora(target_modules=["query", "q_proj", "k_proj", "values"]),
        ("'k_proj', 'q_proj', 'values'", "target_modules"),
    ),
    "with the head of a class": ("bert", lambda: lora(modules_to_save=["classifier"]), ("'classifier'", "to_save")),
    "with too many layers": ("bert", lambda: lora(layers_to_transform=[0, 1, 2]), ("no layers '2'", "0 to 1")),
}


@pytest.mark.parametrize("name", LISTS)
def test_config_with_names_that_no_module_has_is_taken_with_a_word(
    name: str, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    """Lists that are meant for many architectures may stay as they are; what selects nothing is said once."""
    architecture, config, said = LISTS[name]
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        embeddings = PeftTransformerDocumentEmbeddings(base(architecture), peft_config=config())
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in said)
    caplog.clear()
    load_embeddings(embeddings.save_embeddings())
    assert caplog.text == ""


def test_base_that_holds_nan_is_said_when_an_adapter_is_added(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stock Flair embeds with it, and so do these; but every vector is NaN, which is said."""
    model = AutoModel.from_pretrained(base("bert"))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    shutil.copytree(base("bert"), tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        PeftTransformerDocumentEmbeddings(str(tmp_path / "base"), peft_config=lora())
    assert "BertModel gives NaN or infinite numbers in float32" in caplog.text


def test_empty_tensors_of_zero_3_are_called_what_they_are(base: Base) -> None:
    """Weights that nobody gathered before they were saved have no numbers; that is no other model size."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    state = {name: t[:0, 0] if "query.lora_B" in name else t for name, t in embeddings.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"empty, as ZeRO-3 leaves weights.*: '.*query\.lora_B"):
        embeddings.load_state_dict(state)


WORDS, SENTENCES = PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings


def _misread_models(base: str) -> Iterator[tuple[Any, str]]:
    """Yield models whose embeddings embed what they do not read, and the class that they want."""
    labels = Dictionary(add_unk=False)
    for label in ("a", "b"):
        labels.add_item(label)
    options = {"label_dictionary": labels, "label_type": "class"}
    words, sentences = WORDS(base), SENTENCES(base)
    yield TextClassifier(words, **options), "PeftTransformerDocumentEmbeddings"
    yield TextRegressor(words, label_name="value"), "PeftTransformerDocumentEmbeddings"
    yield TokenClassifier(sentences, **options), "PeftTransformerWordEmbeddings"
    yield SequenceTagger(StackedEmbeddings([words, sentences]), labels, "class"), "PeftTransformerWordEmbeddings"


def test_model_whose_embeddings_embed_something_else_says_which_it_reads(base: Base, tmp_path: Path) -> None:
    """Words in a classifier and sentences in a tagger end in an error that names both, not in one on shapes."""
    sentence = Sentence("Berlin is large")
    corpus = Corpus(train=[sentence], dev=[sentence], test=[sentence])
    for model, wanted in _misread_models(base("bert")):
        with pytest.raises(AdapterConfigError, match=f"{type(model).__name__}.*Make the model with {wanted}"):
            model.predict(sentence)
        with pytest.raises(AdapterConfigError, match=wanted):
            ModelTrainer(model, corpus).fine_tune(tmp_path, max_epochs=1)


class MeanOfWords(TextClassifier):
    """A classifier of a user's own, which makes a sentence's vector of those of its words."""

    def _get_embedding_for_data_point(self, prediction_data_point: Sentence) -> torch.Tensor:
        names = self.embeddings.get_names()
        return torch.stack([token.get_embedding(names) for token in prediction_data_point]).mean(dim=0)


def test_model_of_ones_own_may_read_words_where_flairs_reads_sentences(base: Base) -> None:
    """What a class that overrides how vectors are read makes of them is its own business."""
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    sentence = Sentence("Berlin is large")
    MeanOfWords(WORDS(base("bert")), label_dictionary=labels, label_type="class").predict(sentence)
    assert sentence.get_label("class").value == "a"


@pytest.mark.parametrize("given", ["Berlin is large", ["Berlin"], [["Berlin", "is"]], ("Berlin",), None])
def test_predict_for_what_is_no_sentence_says_what_to_pass(given: Any, base: Base) -> None:
    """A text, or a list of texts, ends in an error that names it, whichever class and keyword; sentences pass."""
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    classifier = TextClassifier(SENTENCES(base("bert")), label_dictionary=labels, label_type="class")
    tagger = SequenceTagger(WORDS(base("bert")), labels, "class", use_crf=False)
    for model in (classifier, tagger):
        with pytest.raises(PredictionSetupError, match=r"labels data points.*predict_stream"):
            model.predict(given)
        with pytest.raises(PredictionSetupError, match="labels data points"):
            model.predict(sentences=given)
        model.predict([])
        model.predict(sentences=Sentence("Berlin is large"))
    tagger.predict(FlairDatapointDataset([Sentence("Berlin is large")]))  # as Flair's taggers do


def test_predict_of_a_plain_model_with_a_text_is_left_to_flair() -> None:
    """A model without an adapter raises what Flair raises."""
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    plain = TextClassifier(
        DocumentPoolEmbeddings([OneHotEmbeddings(labels)]), label_dictionary=labels, label_type="class"
    )
    with pytest.raises(AttributeError):
        plain.predict("Berlin")


def merge_and_assign(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model = embeddings.model.merge_and_unload()


def unload_and_assign(embeddings: PeftTransformerEmbeddings) -> None:
    embeddings.model = embeddings.model.unload()


TAKING_AWAY: dict[str, Callable[[PeftTransformerEmbeddings], Any]] = {
    "merged": merge_and_assign,
    "merged in place": lambda embeddings: embeddings.model.merge_and_unload(),
    "unloaded": unload_and_assign,
    "deleted": lambda embeddings: embeddings.model.delete_adapter("default"),
}


@pytest.mark.parametrize("how", TAKING_AWAY)
def test_embeddings_whose_adapter_peft_took_away_embed_on_and_are_stored_by_no_file(
    how: str, base: Base, tmp_path: Path
) -> None:
    """PEFT's own idiom: vectors as merged, or of the base; saving and training name `flair_peft.merge`."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), use_context_separator=False)
    labels = sentence_corpus().make_label_dictionary("sentiment", add_unk=False)
    model = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)
    sentences = [Sentence(text) for text in TEXTS]
    adapted = embed(embeddings, TEXTS)
    stock = embed(TransformerDocumentEmbeddings(base("bert"), use_context_separator=False), TEXTS)
    TAKING_AWAY[how](embeddings)
    expected = adapted if "merged" in how else stock
    for moved in (model, model.to("cpu"), model.train().eval(), copy.deepcopy(model) if how != "deleted" else model):
        assert all(map(is_close, embed(moved.embeddings, TEXTS), expected))
    model.predict(sentences)
    for act in (model.save, functools.partial(flair_peft.save_pretrained, model)):
        with pytest.raises(AdapterConfigError, match="Cannot store"):
            act(tmp_path / "out")
    with pytest.raises(AdapterConfigError, match="Cannot store"):
        ModelTrainer(model, sentence_corpus()).fine_tune(tmp_path, max_epochs=1)
    with pytest.raises(AdapterConfigError, match="Cannot store"):
        flair_peft.merge(model)
    if how != "deleted":
        with pytest.raises(AdapterConfigError, match=r"flair_peft\.merge\(model\)"):
            model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_threads_with_one_model_get_what_it_gives_alone(base: Base) -> None:
    """transformers puts methods into the layers of Llama during a pass, and there would be those of two threads."""
    config = lora(target_modules=["q_proj", "v_proj"])
    embeddings = PeftTransformerWordEmbeddings(base("llama"), peft_config=config).eval()

    def vectors(text: str) -> list[torch.Tensor]:
        sentence = Sentence(text)
        embeddings.embed(sentence)
        return [token.embedding for token in sentence]

    expected = [vectors(text) for text in TEXTS[:2]]
    both = threading.Barrier(2)

    def meet(*_: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    embeddings.base_model.layers[0].register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(vectors, TEXTS[:2]))
    assert all(map(is_same, found, expected))
    assert both.broken


def test_moving_embeddings_to_where_they_are_assigns_no_tensor(base: Base) -> None:
    """Flair moves what it loads to its device twice: what is there already is left alone."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    asked: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        return tensor

    held = [*embeddings.parameters(), *embeddings.buffers()]
    assert embeddings._apply(keep) is embeddings
    assert {id(tensor) for tensor in asked} == {id(tensor) for tensor in held}
    assert len(asked) == len(held)


def test_conversion_that_leaves_the_first_tensors_alone_reaches_all_others(base: Base) -> None:
    """Vectors leave in fp32 already where a base in bf16 is converted to it."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), dtype="bfloat16")
    assert embeddings.output_dtype == torch.float32
    embeddings.to(torch.float32)
    assert {parameter.dtype for parameter in embeddings.parameters()} == {torch.float32}


def test_conversion_that_leaves_weights_alone_reaches_their_gradients(base: Base) -> None:
    """Gradients go where their parameters go, as torch takes them there."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    trained = [parameter for parameter in embeddings.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    embeddings._apply(lambda tensor: tensor if isinstance(tensor, torch.nn.Parameter) else tensor * 2)
    assert all(parameter.grad is not None and bool((parameter.grad == 2).all()) for parameter in trained)


def test_modules_around_embeddings_are_those_of_torch_but_for_what_is_inside(base: Base) -> None:
    """Names and order are torch's; a module that has two places has the first."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(shared, embeddings), "b": shared, "c": torch.nn.ReLU()})
    inside = {id(module) for module in embeddings.modules()} - {id(embeddings)}
    expected = [(name, module) for name, module in model.named_modules() if id(module) not in inside]
    assert list(modules_around(model)) == expected
    assert adapted_embeddings(model) == [embeddings]
