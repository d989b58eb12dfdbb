"""Methods that put virtual tokens in front of the sentence: which rows become vectors, and which positions are left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.embeddings.base import load_embeddings
from flair.embeddings.transformer import SENTENCE_BOUNDARY_TAG
from peft import (
    CartridgeConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from flair_peft import (
    FlairPeftError,
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
)
from flair_peft.errors import UnsupportedMethodError
from tests.support import tiny
from tests.support.selection import few
from tests.support.vectors import is_close, is_same

Base = Callable[[str], str]

VIRTUAL = 4

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=VIRTUAL),
    "P_TUNING-mlp": lambda: PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
    "P_TUNING-lstm": lambda: PromptEncoderConfig(
        num_virtual_tokens=VIRTUAL,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.0,
    ),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(num_virtual_tokens=VIRTUAL),
    "PREFIX_TUNING-projection": lambda: PrefixTuningConfig(
        num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=16
    ),
    "CARTRIDGE": lambda: CartridgeConfig(num_virtual_tokens=VIRTUAL, num_frozen_tokens=1),
}
PREPENDING = ("PROMPT_TUNING", "P_TUNING-mlp", "P_TUNING-lstm")
PREFIXING = ("PREFIX_TUNING", "PREFIX_TUNING-projection", "CARTRIDGE")

EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
PLAIN = ("PROMPT_TUNING", "P_TUNING-mlp", "PREFIX_TUNING", "CARTRIDGE")
SOME_METHODS = pytest.mark.parametrize("method", few(METHODS, PLAIN))
ENCODER_AND_DECODERS = pytest.mark.parametrize(
    "architecture", ["bert", "llama", pytest.param("gpt2", marks=pytest.mark.matrix)]
)

TEXTS = ("George Washington went to Washington .", "I love it", "Berlin and Paris are large cities in Europe .")


def make(
    base: Base,
    method: str,
    architecture: str = "bert",
    *,
    ours: type[PeftTransformerEmbeddings] = PeftTransformerWordEmbeddings,
    **options: Any,
) -> PeftTransformerEmbeddings:
    return ours(base(architecture), peft_config=METHODS[method](), **options)


def embed(embeddings: TransformerEmbeddings, texts: Sequence[str] = TEXTS) -> list[torch.Tensor]:
    """Return the vectors of new sentences, embedded as one batch: of words, or of documents where there are none."""
    sentences = [Sentence(text) for text in texts]
    embeddings.embed(sentences)
    if embeddings.token_embedding:
        return [token.get_embedding() for sentence in sentences for token in sentence]
    return [sentence.get_embedding() for sentence in sentences]


def raw_rows(
    embeddings: PeftTransformerEmbeddings, method: str, words: Sequence[str], *, max_length: int | None = None
) -> tuple[torch.Tensor, list[int | None]]:
    """Return what PEFT itself gives for the subtokens of the words, and the word that each of them belongs to.

    The rows of the virtual tokens are cut off by hand: (virtual + subtokens, hidden) → (subtokens, hidden).
    """
    encoding = embeddings.tokenizer(
        list(words),
        is_split_into_words=True,
        return_tensors="pt",
        truncation=max_length is not None,
        max_length=max_length,
    )
    with torch.no_grad():
        output = embeddings.model(
            input_ids=encoding["input_ids"],
            attention_mask=encoding["attention_mask"],
            output_hidden_states=True,
            return_dict=True,
        )
    rows = output["hidden_states"][-1][0]
    in_front = VIRTUAL if method in PREPENDING else 0
    assert len(rows) == in_front + encoding["input_ids"].shape[1]
    return rows[in_front:], encoding.word_ids(0)


def first_rows(rows: torch.Tensor, word_ids: list[int | None], words: Sequence[int]) -> list[torch.Tensor]:
    """Return the row of the first subtoken of each word."""
    return [rows[word_ids.index(word)] for word in words]


# Rows


@ENCODER_AND_DECODERS
@EVERY_METHOD
def test_words_read_the_rows_of_their_own_subtokens(base: Base, architecture: str, method: str) -> None:
    """A word's vector is the row that PEFT gives for its first subtoken, counted behind the virtual tokens."""
    embeddings = make(base, method, architecture)
    for text in TEXTS:
        words = [token.text for token in Sentence(text)]
        rows, word_ids = raw_rows(embeddings, method, words)
        assert is_same(embed(embeddings, [text]), first_rows(rows, word_ids, range(len(words))))


@pytest.mark.parametrize("pooling", ["last", "first_last", "mean"])
@SOME_METHODS
def test_words_of_several_subtokens_pool_their_own_rows(base: Base, method: str, pooling: str) -> None:
    """Every subtoken pooling sees the rows of the word's own subtokens."""
    embeddings = make(base, method, subtoken_pooling=pooling)
    words = ["unbelievable", "washington", "xyz"]
    rows, word_ids = raw_rows(embeddings, method, words)
    expected = []
    for word in range(len(words)):
        own = rows[[index for index, found in enumerate(word_ids) if found == word]]
        expected.append({"last": own[-1], "mean": own.mean(0), "first_last": torch.cat([own[0], own[-1]])}[pooling])
    assert is_close(embed(embeddings, [" ".join(words)]), expected, tolerance=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@ENCODER_AND_DECODERS
@SOME_METHODS
def test_documents_pool_the_rows_of_real_tokens_only(base: Base, architecture: str, method: str, pooling: str) -> None:
    """A document's vector is pooled from its own rows, in a padded batch too, and never from virtual tokens."""
    embeddings = make(base, method, architecture, ours=PeftTransformerDocumentEmbeddings, cls_pooling=pooling)
    expected = []
    for text in TEXTS:
        rows, _ = raw_rows(embeddings, method, [token.text for token in Sentence(text)])
        cls = rows[0 if architecture == "bert" else -1]
        expected.append({"cls": cls, "mean": rows.mean(dim=0), "max": rows.amax(dim=0)}[pooling])
    assert is_close(embed(embeddings), expected)


@pytest.mark.parametrize("layers", ["0,1", "all"])
@SOME_METHODS
def test_rows_are_stripped_from_every_layer(base: Base, method: str, layers: str) -> None:
    """Each layer that is returned has one row per subtoken, none per virtual token."""
    embeddings = make(base, method, layers=layers, layer_mean=False)
    tensors = embeddings.prepare_tensors([Sentence(text) for text in TEXTS])
    states = embeddings.hidden_states(tensors["input_ids"], attention_mask=tensors["attention_mask"])
    assert {state.shape[:2] for state in states} == {tensors["input_ids"].shape}


@pytest.mark.parametrize("use_context_separator", [True, False])
@SOME_METHODS
def test_words_with_context_read_the_rows_of_their_own_subtokens(
    base: Base, method: str, use_context_separator: bool
) -> None:
    """Context and separators in front of the sentence shift its rows as much as its words, not more."""
    embeddings = make(base, method, use_context=True, use_context_separator=use_context_separator)
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.embed(sentences)
    left, middle, right = ([token.text for token in sentence] for sentence in sentences)
    separator = [SENTENCE_BOUNDARY_TAG] if use_context_separator else []
    in_front = [*left, *separator]
    rows, word_ids = raw_rows(embeddings, method, [*in_front, *middle, *separator, *right])
    expected = first_rows(rows, word_ids, range(len(in_front), len(in_front) + len(middle)))
    assert is_close([token.get_embedding() for token in sentences[1]], expected)


@pytest.mark.parametrize("method", PREPENDING)
def test_rows_kept_for_stock_models_are_those_that_stock_reads(base: Base, method: str) -> None:
    """keep_virtual_rows=True gives the bits of a stock Flair model with this adapter, off by the virtual tokens."""
    stock = TransformerWordEmbeddings(base("bert"), peft_config=METHODS[method]())
    ours = make(base, method, keep_virtual_rows=True, allow_long_sentences=False)
    ours.model.load_state_dict(stock.model.state_dict())
    kept = embed(ours)
    stock.allow_long_sentences, stock.stride = False, 0
    assert is_same(kept, embed(stock))
    ours.keep_virtual_rows = False
    assert not is_close(embed(ours), kept, tolerance=1e-2)


# Batches


@ENCODER_AND_DECODERS
@SOME_METHODS
def test_attention_mask_covers_virtual_tokens_and_hides_padding(base: Base, architecture: str, method: str) -> None:
    """The base sees a mask over virtual and real tokens: ones for both, zeros for the padding behind them."""
    embeddings = make(base, method, architecture)
    seen: list[torch.Tensor] = []
    embeddings.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    sentences = [Sentence(text) for text in TEXTS]
    mask = embeddings.prepare_tensors(sentences)["attention_mask"]
    embeddings.embed(sentences)
    assert mask.min() == 0
    expected = torch.cat([torch.ones(len(TEXTS), VIRTUAL, dtype=mask.dtype), mask], dim=1)
    assert torch.equal(seen[0].to(mask.dtype), expected)


@ENCODER_AND_DECODERS
@SOME_METHODS
def test_batch_gives_each_sentence_what_it_gets_alone(base: Base, architecture: str, method: str) -> None:
    """Padding between sentences and virtual tokens changes no vector."""
    embeddings = make(base, method, architecture)
    alone = [vector for text in TEXTS for vector in embed(embeddings, [text])]
    assert is_close(embed(embeddings), alone)


@pytest.mark.parametrize("ours", [PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings])
@ENCODER_AND_DECODERS
@SOME_METHODS
def test_padding_side_of_the_tokenizer_changes_nothing(
    base: Base, architecture: str, method: str, ours: type[PeftTransformerEmbeddings]
) -> None:
    """Padding on the left would put it between virtual and real tokens; it is put on the right again."""
    embeddings = make(base, method, architecture, ours=ours)
    expected = embed(embeddings)
    embeddings.tokenizer.padding_side = "left"
    assert is_same(embed(embeddings), expected)


@SOME_METHODS
def test_batches_padded_to_the_maximal_length_leave_room_for_virtual_tokens(base: Base, method: str) -> None:
    """force_max_length fills the positions that virtual tokens leave."""
    plain, forced = make(base, method), make(base, method, force_max_length=True)
    forced.load_state_dict(plain.state_dict())
    assert is_close(embed(forced), embed(plain))


# Long sentences


@pytest.mark.parametrize("allow_long_sentences", [True, False])
@pytest.mark.parametrize("architecture", ["bert", pytest.param("roberta", marks=pytest.mark.matrix), "gpt2"])
@SOME_METHODS
def test_sentences_around_the_last_position_do_not_overflow(
    base: Base, architecture: str, method: str, allow_long_sentences: bool
) -> None:
    """Sentences shorter than, as long as and longer than the model embed: virtual tokens take positions too."""
    embeddings = make(base, method, architecture, allow_long_sentences=allow_long_sentences)
    for words in (61, 119, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 250, 400):
        vectors = torch.stack(embed(embeddings, [" ".join("a" * words)]))
        assert len(vectors) == words
        assert vectors.isfinite().all()
        embedded = int((vectors.abs().amax(dim=1) > 0).sum())
        if allow_long_sentences and architecture != "gpt2":
            assert embedded == words
        else:
            # Without special tokens, Flair loses two subtokens wherever it joins two windows.
            assert embedded >= min(words, tiny.MAX_LENGTH // 2 - VIRTUAL)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@SOME_METHODS
def test_sentence_that_is_cut_reads_as_many_rows_as_fit(base: Base, architecture: str, method: str) -> None:
    """Without allow_long_sentences a sentence is cut where the positions end, and its words read their own rows."""
    embeddings = make(base, method, architecture, allow_long_sentences=False)
    words = list("abcdefgh" * 30)
    rows, word_ids = raw_rows(embeddings, method, words, max_length=tiny.MAX_LENGTH - VIRTUAL)
    found = embed(embeddings, [" ".join(words)])
    inside = sorted({word for word in word_ids if word is not None})
    assert 60 < len(inside) < len(words)
    assert is_same(found[: len(inside)], first_rows(rows, word_ids, inside))
    assert all(vector.abs().max() == 0 for vector in found[len(inside) :])


@SOME_METHODS
def test_sentence_that_is_split_reads_the_rows_of_its_first_window(base: Base, method: str) -> None:
    """With allow_long_sentences the words at the start read the rows of the first window."""
    embeddings = make(base, method)
    words = list("abcdefgh" * 30)
    limit = tiny.MAX_LENGTH - VIRTUAL
    rows, word_ids = raw_rows(embeddings, method, words, max_length=limit)
    quarter = range(limit // 4 - 2)  # Flair takes the end of the overlap from the next window
    assert is_close(embed(embeddings, [" ".join(words)])[: len(quarter)], first_rows(rows, word_ids, quarter))


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@SOME_METHODS
def test_long_documents_embed(base: Base, method: str, pooling: str) -> None:
    """Documents beyond the model's length embed, in windows or cut, alone as in a batch."""
    long_text = " ".join("abcdefgh" * 30)
    for allow_long_sentences in (True, False):
        embeddings = make(
            base,
            method,
            ours=PeftTransformerDocumentEmbeddings,
            cls_pooling=pooling,
            allow_long_sentences=allow_long_sentences,
        )
        together = embed(embeddings, [*TEXTS, long_text])
        assert is_close(together, [vector for text in [*TEXTS, long_text] for vector in embed(embeddings, [text])])


# The adapter as a whole


@ENCODER_AND_DECODERS
@SOME_METHODS
def test_embeddings_with_prompts_off_equal_stock(base: Base, architecture: str, method: str) -> None:
    """With the adapter switched off, prompts leave no trace; switched on again they do."""
    for ours, theirs in (
        (PeftTransformerWordEmbeddings, TransformerWordEmbeddings),
        (PeftTransformerDocumentEmbeddings, TransformerDocumentEmbeddings),
    ):
        embeddings = make(base, method, architecture, ours=ours)
        stock = theirs(base(architecture))
        stock.tokenizer.pad_token = embeddings.tokenizer.pad_token
        texts = TEXTS[:1]
        before = embed(embeddings, texts)
        with embeddings.model.disable_adapter():
            assert is_same(embed(embeddings, texts), embed(stock, texts))
        assert is_same(embed(embeddings, texts), before)
        assert not is_close(before, embed(stock, texts), tolerance=1e-2)


@ENCODER_AND_DECODERS
@SOME_METHODS
def test_gradients_reach_every_trained_parameter_and_nothing_else_is_trained(
    base: Base, architecture: str, method: str
) -> None:
    """The prompt learns, all of it, and the base stays frozen."""
    embeddings = make(base, method, architecture)
    embeddings.train()
    torch.stack(embed(embeddings)).square().sum().backward()
    trained = {name: p for name, p in embeddings.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("prompt_encoder.") for name in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(p.grad is None for p in embeddings.model.parameters() if not p.requires_grad)


def test_base_with_parameters_of_its_own_is_frozen_whole(base: Base) -> None:
    """XLNet's mask embedding, a parameter of no submodule, is frozen like the rest of the base."""
    embeddings = make(base, "PROMPT_TUNING", "xlnet")
    trained = [name for name, p in embeddings.model.named_parameters() if p.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@SOME_METHODS
def test_gradient_checkpointing_keeps_the_prompt_or_is_refused(base: Base, architecture: str, method: str) -> None:
    """transformers drops past key values while it checkpoints; a prefix must not be lost without an error."""
    embeddings = make(base, method, architecture)
    embeddings.train()
    expected = torch.stack(embed(embeddings))
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in embeddings.model.parameters() if p.requires_grad]
    embeddings.zero_grad()
    embeddings.model.gradient_checkpointing_enable()
    try:
        found = torch.stack(embed(embeddings))
    except FlairPeftError:
        assert method in PREFIXING
        return
    assert torch.allclose(found, expected, atol=1e-5)
    found.square().sum().backward()
    again = [p.grad for p in embeddings.model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
@SOME_METHODS
def test_conversion_of_the_module_converts_the_prompt_too(
    base: Base, architecture: str, method: str, dtype: torch.dtype
) -> None:
    """to(dtype) gives embeddings that still work, with the vectors they had up to rounding."""
    embeddings = make(base, method, architecture)
    expected = embed(embeddings)
    embeddings.to(dtype)
    found = embed(embeddings)
    assert {vector.dtype for vector in found} == {dtype}
    assert is_close([v.float() for v in found], expected, tolerance=0.3 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@SOME_METHODS
def test_prompts_on_a_base_in_half_precision_survive_a_round_trip(base: Base, method: str, dtype: str) -> None:
    """A base in 16 bits with a prompt embeds, and gives the same bits when it is loaded."""
    embeddings = make(base, method, dtype=dtype)
    loaded = load_embeddings(embeddings.save_embeddings())
    assert loaded.base_dtype == getattr(torch, dtype)
    assert is_same(embed(loaded), embed(embeddings))


def flair_saved(embeddings: PeftTransformerEmbeddings) -> PeftTransformerEmbeddings:
    return load_embeddings(embeddings.save_embeddings())


def pickled(embeddings: PeftTransformerEmbeddings) -> PeftTransformerEmbeddings:
    return pickle.loads(pickle.dumps(embeddings))


@pytest.mark.parametrize(
    "copied", [flair_saved, *(pytest.param(c, marks=pytest.mark.matrix) for c in (pickled, copy.deepcopy))]
)
@ENCODER_AND_DECODERS
@SOME_METHODS
def test_round_trips_give_bit_equal_vectors_and_the_same_length(
    base: Base, architecture: str, method: str, copied: Callable[..., PeftTransformerEmbeddings]
) -> None:
    """Stored once or twice, a prompt gives the same bits, and takes its positions from the sentences only once."""
    embeddings = make(base, method, architecture)
    texts = [*TEXTS, " ".join("abcdefgh" * 30)]
    expected = embed(embeddings, texts)
    loaded = embeddings
    for _ in range(2):
        loaded = copied(loaded)
        assert loaded.tokenizer.model_max_length == embeddings.tokenizer.model_max_length
        assert loaded.stride == embeddings.stride
        assert is_same(embed(loaded, texts), expected)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_prompts_with_a_slow_tokenizer_read_the_rows_of_their_own_subtokens(base: Base, method: str) -> None:
    """A tokenizer without a fast twin gives the vectors that a fast one gives."""
    fast = make(base, method, "bert-slow")
    slow = make(base, method, "bert-slow", transformers_tokenizer_kwargs={"use_fast": False})
    assert not slow.tokenizer.is_fast
    slow.load_state_dict(fast.state_dict())
    assert is_close(embed(slow), embed(fast))


# Architectures that cannot carry a prompt


@pytest.mark.parametrize(
    ("architecture", "model_name"),
    [
        ("distilbert", "DistilBertModel"),
        ("albert", "AlbertModel"),
        ("deberta-v2", "DebertaV2Model"),
        ("modernbert", "ModernBertModel"),
        ("xlnet", "XLNetModel"),
        ("t5", "T5EncoderModel"),
        ("layoutlm", "LayoutLMModel"),
        ("layoutlmv3", "LayoutLMv3Model"),
    ],
)
@pytest.mark.parametrize("method", PREFIXING)
def test_prefix_on_an_architecture_without_past_key_values_is_refused(
    base: Base, architecture: str, model_name: str, method: str
) -> None:
    """A prefix that could not reach the attention is refused by name of method, architecture and reason."""
    with pytest.raises(UnsupportedMethodError) as error:
        make(base, method, architecture)
    for part in (method.split("-")[0], model_name, "takes no past key values"):
        assert part in str(error.value)


@pytest.mark.parametrize("method", PREFIXING)
def test_prefix_that_a_decoder_alone_would_read_is_refused(base: Base, method: str) -> None:
    """BART takes past key values for its decoder, and its encoder, which is read, would learn nothing."""
    with pytest.raises(UnsupportedMethodError, match=f"{method.split('-')[0]} on BartModel.*its decoder alone"):
        make(base, method, "bart")


@pytest.mark.parametrize("method", PREPENDING)
def test_prompt_on_a_base_without_heads_is_refused_by_name(base: Base, method: str) -> None:
    """FNet mixes words without attention: there is no mask that a prompt could be part of."""
    with pytest.raises(UnsupportedMethodError, match=f"{method.split('-')[0]} on FNetModel"):
        make(base, method, "fnet")


@pytest.mark.parametrize("method", few(PREPENDING, ["PROMPT_TUNING"]))
def test_prompt_on_a_base_that_names_its_sizes_for_its_encoder_comes_back(base: Base, method: str) -> None:
    """The config of T5Gemma has no number of heads of its own, which PEFT asks for and prompts do not need."""
    torch.manual_seed(0)
    embeddings = make(base, method, "t5gemma").eval()
    loaded = type(embeddings).from_params(embeddings.to_params())
    loaded.load_state_dict(embeddings.state_dict())
    before = embed(embeddings)
    assert is_same(before, embed(loaded.eval()))
    for parameter in embeddings.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    assert not is_close(before, embed(embeddings))


@pytest.mark.parametrize("architecture", tiny.LAYOUT)
@pytest.mark.parametrize("method", PREPENDING)
def test_prompt_without_bounding_boxes_of_its_own_is_refused_on_layout_models(
    base: Base, architecture: str, method: str
) -> None:
    """Layout models ask for a bounding box per row, and virtual tokens have none: refused before the first batch."""
    with pytest.raises(UnsupportedMethodError, match=f"{method.split('-')[0]} on LayoutLM"):
        make(base, method, architecture)


@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize(("architecture", "width"), [("electra", 16), ("albert", 16), ("distilbert", 32)])
def test_prompt_is_as_wide_as_the_input_embeddings(base: Base, architecture: str, width: int, is_given: bool) -> None:
    """Virtual tokens have the width of the embedding matrix, given or not, where hidden states have another."""
    sizes = {"token_dim": width, "num_attention_heads": 4, "num_layers": 2} if is_given else {}
    config = PromptTuningConfig(num_virtual_tokens=VIRTUAL, **sizes)
    embeddings = PeftTransformerWordEmbeddings(base(architecture), peft_config=config)
    assert embeddings.model.prompt_encoder["default"].embedding.weight.shape == (VIRTUAL, width)
    words = [token.text for token in Sentence(TEXTS[0])]
    rows, word_ids = raw_rows(embeddings, "PROMPT_TUNING", words)
    assert is_same(embed(embeddings, TEXTS[:1]), first_rows(rows, word_ids, range(len(words))))
    assert is_same(embed(flair_saved(embeddings)), embed(embeddings))


@pytest.mark.parametrize("architecture", [*tiny.DECODERS, "bert", "roberta", "xlm-roberta", "electra", "bert-mlm"])
@pytest.mark.parametrize("method", PREFIXING)
def test_prefix_changes_vectors_where_it_is_accepted(base: Base, architecture: str, method: str) -> None:
    """An architecture that accepts a prefix reads it: the vectors differ and the prefix gets a gradient."""
    embeddings = make(base, method, architecture).train()
    found = embed(embeddings)
    with embeddings.model.disable_adapter():
        assert not is_close(found, embed(embeddings), tolerance=1e-2)
    torch.stack(found).square().sum().backward()
    trained = [p for p in embeddings.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
