"""Every architecture that Flair can embed with: an adapter goes in, vectors come out, and files give them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.embeddings.base import load_embeddings
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, T5EncoderModel

from flair_peft import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
)
from flair_peft.base.tokenizers import complete_padding_
from flair_peft.errors import AdapterConfigError
from tests.support import tiny, vectors
from tests.support.configs import lora
from tests.support.selection import OF_THEIR_OWN_KIND, few
from tests.support.vectors import is_same

Base = Callable[[str], str]

TEXTS = ("George Washington went to Washington .", "I love it", "Berlin and Paris are large cities in Europe .")

EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
SOME_ARCHITECTURES = pytest.mark.parametrize("architecture", few(tiny.ARCHITECTURES, OF_THEIR_OWN_KIND))
EVERY_POOLING = pytest.mark.parametrize(
    "pooling", ["first", "mean", *(pytest.param(pooling, marks=pytest.mark.matrix) for pooling in ("cls", "max"))]
)
"""Words by their first subtoken, or documents by one of Flair's three poolings."""


def options(architecture: str) -> dict[str, Any]:
    """Return what this architecture asks for beyond its path, in stock Flair too."""
    if architecture == "bert-slow":
        return {"transformers_tokenizer_kwargs": {"use_fast": False}, "allow_long_sentences": False}
    return {}


def make(base: Base, architecture: str, pooling: str = "first", **given: Any) -> PeftTransformerEmbeddings:
    config = lora(target_modules=tiny.ATTENTION_TARGETS[architecture], fan_in_fan_out=architecture == "gpt2")
    given = {"peft_config": config, **options(architecture), **given}
    if pooling == "first":
        return PeftTransformerWordEmbeddings(base(architecture), **given)
    return PeftTransformerDocumentEmbeddings(base(architecture), cls_pooling=pooling, **given)


def make_stock(base: Base, architecture: str, pooling: str = "first") -> TransformerEmbeddings:
    if pooling == "first":
        stock = TransformerWordEmbeddings(base(architecture), **options(architecture))
    else:
        stock = TransformerDocumentEmbeddings(base(architecture), cls_pooling=pooling, **options(architecture))
    return stock


def embed(
    embeddings: TransformerEmbeddings, architecture: str, texts: Sequence[str] = TEXTS, *, batch: bool = True
) -> list[torch.Tensor]:
    """Return the vectors of new sentences, embedded in one batch or one by one."""
    sentences = tiny.make_sentences(architecture, texts)
    for part in [sentences] if batch else [[sentence] for sentence in sentences]:
        embeddings.embed(part)
    return read(embeddings, sentences)


is_close = partial(vectors.is_close, tolerance=1e-4)


def read(embeddings: TransformerEmbeddings, sentences: Sequence[Sentence]) -> list[torch.Tensor]:
    if embeddings.token_embedding:
        return [token.get_embedding() for sentence in sentences for token in sentence]
    return [sentence.get_embedding() for sentence in sentences]


@EVERY_POOLING
@SOME_ARCHITECTURES
def test_architecture_with_adapter_off_equals_stock(base: Base, architecture: str, pooling: str) -> None:
    """With the adapter switched off each sentence gets stock Flair's bits; switched on it gets others."""
    embeddings, stock = make(base, architecture, pooling), make_stock(base, architecture, pooling)
    if architecture in tiny.WITHOUT_PADDING_TOKEN:
        # Stock Flair cannot embed at all without one; another token than ours, which a sentence never contains.
        stock.tokenizer.add_special_tokens({"pad_token": "[stock-pad]"})
    # Stock Flair pads xlnet, llama, mistral and gemma on the left, so sentences of a batch read wrong rows.
    expected = embed(stock, architecture, batch=False)
    with embeddings.model.disable_adapter():
        assert is_same(embed(embeddings, architecture, batch=False), expected)
    assert not is_close(embed(embeddings, architecture, batch=False), expected, tolerance=1e-2)


@EVERY_POOLING
@pytest.mark.parametrize(
    "architecture", [a for a in tiny.ARCHITECTURES if a not in (*tiny.WITHOUT_PADDING_TOKEN, *tiny.LEFT_PADDED)]
)
def test_architecture_with_adapter_off_equals_stock_in_a_batch(base: Base, architecture: str, pooling: str) -> None:
    """Where stock Flair pads batches rightly, a batch gets its bits too."""
    embeddings, stock = make(base, architecture, pooling), make_stock(base, architecture, pooling)
    with embeddings.model.disable_adapter():
        assert is_same(embed(embeddings, architecture), embed(stock, architecture))


@EVERY_POOLING
@SOME_ARCHITECTURES
def test_architecture_gives_a_sentence_in_a_batch_what_it_gets_alone(
    base: Base, architecture: str, pooling: str
) -> None:
    """Padding, on whichever side the tokenizer would put it, changes no vector."""
    embeddings = make(base, architecture, pooling)
    assert is_close(embed(embeddings, architecture), embed(embeddings, architecture, batch=False))


@pytest.mark.parametrize("pooling", ["first", pytest.param("mean", marks=pytest.mark.matrix)])
@EVERY_ARCHITECTURE
def test_architecture_gives_bit_equal_vectors_after_two_round_trips(
    base: Base, architecture: str, pooling: str
) -> None:
    """Embeddings that were stored, loaded, stored and loaded again give the bits of the first."""
    embeddings = make(base, architecture, pooling)
    expected = embed(embeddings, architecture)
    loaded = embeddings
    for _ in range(2):
        loaded = load_embeddings(loaded.save_embeddings())
        assert is_same(embed(loaded, architecture), expected)
        assert loaded.state_dict().keys() == embeddings.state_dict().keys()


@SOME_ARCHITECTURES
def test_architecture_gives_bit_equal_vectors_after_a_round_trip_in_bf16(base: Base, architecture: str) -> None:
    """A base in bf16 is loaded in bf16, layer by layer, and gives the same bits."""
    embeddings = make(base, architecture, dtype="bfloat16")
    loaded = load_embeddings(embeddings.save_embeddings())
    found = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert found == {name: tensor.dtype for name, tensor in embeddings.state_dict().items()}
    assert is_same(embed(loaded, architecture), embed(embeddings, architecture))


@pytest.mark.parametrize(
    "layers", ["1,-1", *(pytest.param(layer, marks=pytest.mark.matrix) for layer in ("-1", "0", "all"))]
)
@SOME_ARCHITECTURES
def test_architecture_returns_only_the_layers_asked_for(base: Base, architecture: str, layers: str) -> None:
    """Hidden states are those of the layers asked for, in that order, as the transformer itself gives them."""
    path = base(architecture)
    embeddings = make(base, architecture, layers=layers, use_context_separator=False)
    tensors = embeddings.prepare_tensors(tiny.make_sentences(architecture, TEXTS[:1]))
    inputs = {name: tensors[name] for name in ("attention_mask", "bbox", "pixel_values") if name in tensors}
    with embeddings.model.disable_adapter(), torch.no_grad():
        found = embeddings.hidden_states(tensors["input_ids"], **inputs)
        transformer = (T5EncoderModel if architecture == "t5" else AutoModel).from_pretrained(path)
        every = transformer(tensors["input_ids"], output_hidden_states=True, **inputs)["hidden_states"]
    wanted = range(len(every)) if layers == "all" else [int(index) for index in layers.split(",")]
    assert is_same(found, [every[index] for index in wanted])


@pytest.mark.parametrize("layer_mean", [True, False])
@SOME_ARCHITECTURES
def test_architecture_embeds_with_all_layers(base: Base, architecture: str, layer_mean: bool) -> None:
    """layers="all" gives vectors of the length that the embeddings announce, averaged or side by side."""
    embeddings = make(base, architecture, layers="all", layer_mean=layer_mean)
    assert len(embeddings.layer_indexes) == 3
    assert embeddings.embedding_length == (32 if layer_mean else 96)
    assert {vector.shape for vector in embed(embeddings, architecture)} == {(embeddings.embedding_length,)}


def without_gradient(embeddings: PeftTransformerEmbeddings, architecture: str) -> list[str]:
    """Return the names of trained parameters, poolers apart, that one batch gives no gradient."""
    embeddings.train()
    torch.stack(embed(embeddings, architecture)).square().sum().backward()
    trained = {name: p for name, p in embeddings.model.named_parameters() if p.requires_grad and "pooler" not in name}
    assert trained
    return [name for name, p in trained.items() if p.grad is None or p.grad.abs().max() == 0]


@pytest.mark.parametrize("pooling", ["first", pytest.param("cls", marks=pytest.mark.matrix)])
@SOME_ARCHITECTURES
def test_architecture_gives_every_adapter_parameter_a_gradient(base: Base, architecture: str, pooling: str) -> None:
    """Both LoRA matrices of every target learn from words and from documents."""
    embeddings = make(base, architecture, pooling)
    assert without_gradient(embeddings, architecture) == []
    assert all("lora_" in name for name, p in embeddings.model.named_parameters() if p.requires_grad)


@SOME_ARCHITECTURES
def test_architecture_with_the_default_config_learns_in_every_layer(base: Base, architecture: str) -> None:
    """Without a config every linear layer gets an adapter; only lora_A, behind a B of zeros, waits for a step."""
    embeddings = make(base, architecture, peft_config=None)
    waiting = without_gradient(embeddings, architecture)
    assert [name for name in waiting if "lora_A" not in name] == []
    assert not any("pooler" in name for name, p in embeddings.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("architecture", tiny.WITHOUT_PADDING_TOKEN)
def test_padding_token_taken_from_another_is_read_where_it_is_real(base: Base, architecture: str) -> None:
    """A decoder without a padding token pads with another one, which still counts where a sentence contains it."""
    embeddings = make(base, architecture, "cls")
    pad = embeddings.tokenizer.pad_token
    assert pad == embeddings.tokenizer.eos_token
    texts = [f"I love it {pad}", "I love it"]
    sentences = [Sentence([*text.split()]) for text in texts]
    embeddings.embed(sentences)
    ending, plain = read(embeddings, sentences)
    assert not torch.allclose(ending, plain, atol=1e-2)
    alone = Sentence(texts[0].split())
    embeddings.embed([alone])
    assert torch.allclose(ending, alone.get_embedding(), atol=1e-5)


@pytest.mark.parametrize("architecture", [*tiny.DECODERS, "bert", "xlnet"])
def test_document_of_a_decoder_is_its_last_real_token(base: Base, architecture: str) -> None:
    """cls pooling reads the last row in front of the padding where the tokenizer has no initial [CLS]."""
    embeddings = make(base, architecture, "cls")
    tensors = embeddings.prepare_tensors(tiny.make_sentences(architecture, TEXTS))
    with torch.no_grad():
        rows = embeddings.hidden_states(tensors["input_ids"], attention_mask=tensors["attention_mask"])[0]
    last = tensors["attention_mask"].sum(dim=1) - 1
    index = torch.zeros_like(last) if architecture == "bert" else last
    assert is_same(embed(embeddings, architecture), list(rows[torch.arange(len(TEXTS)), index]))


@pytest.mark.parametrize("architecture", tiny.DECODERS)
def test_decoder_builds_no_cache_for_generation(base: Base, architecture: str) -> None:
    """Keys and values of past tokens, which embeddings never need, are not kept."""
    embeddings = make(base, architecture)
    outputs: list[Any] = []
    embeddings.base_model.register_forward_hook(lambda _, __, output: outputs.append(output))
    embed(embeddings, architecture)
    assert len(outputs) == 1
    assert outputs[0].past_key_values is None


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a not in tiny.LAYOUT])
def test_architecture_marks_context_with_a_separator_of_its_own(base: Base, architecture: str) -> None:
    """Context reaches the vectors of every architecture, and a round trip keeps the separator's row."""
    embeddings = make(base, architecture, use_context=True, context_dropout=0.0)
    expected = embed(embeddings, architecture)
    assert not is_close(expected, embed(embeddings, architecture, batch=False), tolerance=1e-3)
    loaded = load_embeddings(embeddings.save_embeddings())
    assert is_same(embed(loaded, architecture), expected)


@pytest.mark.parametrize("architecture", [*tiny.DECODERS, "xlnet", "bert"])
def test_tokenizer_is_completed_once_and_stays_so(base: Base, architecture: str) -> None:
    """Completing a tokenizer twice does what completing it once does."""
    tokenizer = make(base, architecture).tokenizer
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    complete_padding_(tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == before
    assert tokenizer.padding_side == "right"


# PEFT's word on convolutions, which it adapts and does not merge.
UNCOMMON = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
# Of these stock Flair asks the decoder too, or finds no size.
ENCODERS = {"umt5": "UMT5EncoderModel", "t5gemma": "T5GemmaEncoderModel"}


def make_uncommon(base: Base, architecture: str, **given: Any) -> PeftTransformerWordEmbeddings:
    targets = tiny.MORE_TARGETS[architecture]
    config = lora(target_modules=targets)
    return PeftTransformerWordEmbeddings(base(architecture), **{"peft_config": config, **given})


@UNCOMMON
@pytest.mark.parametrize("architecture", tiny.MORE_TARGETS)
def test_uncommon_architecture_with_adapter_off_equals_stock_or_its_encoder(base: Base, architecture: str) -> None:
    """Its vectors are stock Flair's; where stock Flair fails, hidden states are those of the encoder alone."""
    embeddings = make_uncommon(base, architecture, use_context_separator=architecture not in ENCODERS)
    with embeddings.model.disable_adapter(), torch.no_grad():
        if architecture not in ENCODERS:
            stock = TransformerWordEmbeddings(base(architecture))
            assert is_same(embed(embeddings, architecture), embed(stock, architecture))
            return
        config = embeddings.base_model.config
        encoder = getattr(transformers, ENCODERS[architecture]).from_pretrained(base(architecture), config=config)
        tensors = embeddings.prepare_tensors(tiny.make_sentences(architecture, TEXTS))
        inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
        expected = encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        assert is_same(embeddings.hidden_states(**inputs), [expected])


@UNCOMMON
@pytest.mark.parametrize("architecture", tiny.MORE_TARGETS)
def test_uncommon_architecture_learns_and_comes_back_bit_equal_with_the_separators_row(
    base: Base, architecture: str
) -> None:
    """Both matrices of every target learn, and two round trips keep the bits, context and its new row included."""
    embeddings = make_uncommon(base, architecture, use_context=True, context_dropout=0.0)
    assert without_gradient(embeddings, architecture) == []
    embeddings.eval()
    expected = embed(embeddings, architecture)
    for _ in range(2):
        embeddings = load_embeddings(embeddings.save_embeddings())
        assert is_same(embed(embeddings, architecture), expected)


@UNCOMMON
@pytest.mark.parametrize("architecture", [name for name in tiny.MORE_TARGETS if name != "bart"])
def test_uncommon_architecture_with_the_default_config_learns_in_every_layer(base: Base, architecture: str) -> None:
    """Without a config its linear layers get an adapter, or its convolutions where it has no others."""
    waiting = without_gradient(make_uncommon(base, architecture, peft_config=None), architecture)
    assert [name for name in waiting if "lora_A" not in name] == []


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("mpnet", r"\['dense', 'k', 'o', 'q', 'v'\], or target_modules=\"all-linear\"\."),
        ("squeezebert", r"\['conv1d', 'key', 'query', 'value'\]\."),
    ],
)
def test_architecture_without_default_targets_says_which_to_pass(base: Base, architecture: str, targets: str) -> None:
    """LoRA without targets is refused with the very names that this model has."""
    with pytest.raises(AdapterConfigError, match=f"model type '{architecture}'\\. Pass target_modules={targets}"):
        make_uncommon(base, architecture, peft_config=LoraConfig(r=8))
    assert make_uncommon(base, "mpnet", peft_config=LoraConfig(r=8, target_modules=["dense", "k", "o", "q", "v"]))


def test_architecture_without_a_mask_says_that_batches_count(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    """FNet mixes a sentence with the padding of its batch, in stock Flair as well."""
    make_uncommon(base, "fnet")
    assert "depend on the padding of its batch" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [("Canine", "no matrix of input embeddings"), ("Gemma3", "several models in one.*language_model")],
)
def test_architecture_that_reads_no_ids_is_refused_by_name(base: Base, tmp_path: Path, name: str, message: str) -> None:
    """What is no single transformer over subtokens is refused in three sentences."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    parts = {
        "text_config": {**small, "vocab_size": 500, "head_dim": 8, "num_key_value_heads": 2},
        "vision_config": {**small, "image_size": 32, "patch_size": 16},
        "mm_tokens_per_image": 4,
    }
    settings = {**small, "num_hash_buckets": 64} if name == "Canine" else parts
    model_class = getattr(transformers, f"{name}Model")
    model_class(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(tmp_path)
    with pytest.raises(AdapterConfigError, match=f"Cannot use .* as a base model: {name}Model .*{message}"):
        PeftTransformerWordEmbeddings(str(tmp_path))


@pytest.mark.parametrize("name", ["Apertus", "Qwen3Moe"])
def test_architecture_that_computes_while_it_is_built_takes_a_foreign_adapter(
    base: Base, tmp_path: Path, name: str
) -> None:
    """An adapter of a model that needs its weights to be built gives the hidden states that it gave there."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    tokenizer = AutoTokenizer.from_pretrained(base("qwen3"))
    more = experts if "Moe" in name else {}
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **more)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, lora(target_modules=["q_proj", "down_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    embeddings = PeftTransformerWordEmbeddings.from_adapter(
        str(tmp_path / "adapter"), base_model=str(tmp_path / "base"), use_context_separator=False
    )
    ids = torch.arange(6, 12).unsqueeze(0)
    with torch.no_grad():
        expected = adapted(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        (found,) = embeddings.hidden_states(ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(found, expected)
