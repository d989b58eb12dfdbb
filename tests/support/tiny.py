"""Tiny random transformers with tokenizers, built offline.

Every architecture has two layers, four heads, a hidden size of 32 and weights drawn with a standard deviation of 0.2,
so that two inputs get clearly different embeddings. The tokenizers are of the class that the real models use. Their
vocabularies hold every printable ASCII character (the byte-level ones: every byte): English text is never unknown.
"""

from __future__ import annotations

import io
import json
import random
import string
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch
import transformers
from flair.data import Sentence
from PIL import Image
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_LENGTH = 128
UNBOUNDED = int(1e30)  # what transformers writes for tokenizers without a maximal length
IMAGE_SIZE = 32
ALIGNMENT = 64  # bytes, of the memory that torch takes for a tensor

CORPUS = (
    "George Washington went to Washington .",
    "Berlin and Paris are large cities in Europe .",
    "Angela Merkel lives in Berlin , Germany .",
    "I love this wonderful movie , it is great !",
    "This film was terrible and I hated every minute of it .",
    "The founder of Apple , Steve Jobs , was born in San Francisco .",
    "She sold the house in New York and bought a car .",
    "Who wrote the book that you are reading ?",
    "The quick brown fox jumps over the lazy dog .",
)
"""What the tokenizers are trained on."""

_ALPHABET = string.ascii_letters + string.digits + string.punctuation

_QUERY_KEY_VALUE = ["query", "key", "value"]
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]

ATTENTION_TARGETS: dict[str, list[str]] = {
    "bert": _QUERY_KEY_VALUE,
    "bert-slow": _QUERY_KEY_VALUE,
    "bert-padded-vocab": _QUERY_KEY_VALUE,
    "bert-mlm": _QUERY_KEY_VALUE,
    "roberta": _QUERY_KEY_VALUE,
    "xlm-roberta": _QUERY_KEY_VALUE,
    "deberta-v2": ["query_proj", "key_proj", "value_proj"],
    "electra": _QUERY_KEY_VALUE,
    "distilbert": ["q_lin", "k_lin", "v_lin"],
    "albert": _QUERY_KEY_VALUE,
    "modernbert": ["Wqkv"],
    # XLNet's attention consists of bare parameters: its only linear modules are those of the feed-forward blocks.
    "xlnet": ["layer_1", "layer_2"],
    "t5": ["q", "k", "v"],
    "layoutlm": _QUERY_KEY_VALUE,
    "layoutlmv3": _QUERY_KEY_VALUE,
    "gpt2": ["c_attn"],  # transformers' Conv1D, not torch's Linear
    "llama": _PROJECTIONS,
    "qwen2": _PROJECTIONS,
    "qwen3": _PROJECTIONS,
    "mistral": _PROJECTIONS,
    "gemma": _PROJECTIONS,
}
"""Architecture → names of its linear modules, for ``LoraConfig(target_modules=…)``."""

ARCHITECTURES: tuple[str, ...] = tuple(ATTENTION_TARGETS)

MORE_TARGETS: dict[str, list[str] | str] = {
    "umt5": ["q", "k", "v"],
    "t5gemma": _PROJECTIONS,
    "fnet": ["dense"],  # mixes by a Fourier transform: no attention, and no mask
    "squeezebert": _QUERY_KEY_VALUE,  # convolutions in groups
    "mpnet": ["q", "k", "v"],
    "bart": r"encoder\..*[qkv]_proj",  # has a decoder, which is not read
}
"""Architectures that PEFT or Flair treats apart, and the names of their layers."""
DECODERS: tuple[str, ...] = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma")
LAYOUT: tuple[str, ...] = ("layoutlm", "layoutlmv3")
WITHOUT_PADDING_TOKEN: tuple[str, ...] = ("gpt2", "llama", "mistral")
LEFT_PADDED: tuple[str, ...] = ("xlnet", "llama", "mistral", "gemma")


def build(architecture: str, directory: Path, *, dropout: float = 0.0, seed: int = 0) -> Path:
    """Write a tiny random model of this architecture and its tokenizer into ``directory``.

    Args:
        architecture: one of ``ARCHITECTURES``.
        directory: created where it is missing.
        dropout: the value of every dropout in the config.
        seed: of the weights; the tokenizer is always the same.

    Returns:
        ``directory``, which ``AutoModel`` and ``AutoTokenizer`` read without a network.

    Raises:
        KeyError: the architecture is unknown.
    """
    directory = Path(directory)
    tokenizer = _TOKENIZERS[architecture](directory)
    tokenizer.save_pretrained(directory)
    config, model_class = _MODELS[architecture](len(tokenizer))
    _set_dropout_(config, dropout)
    _random_model(config, model_class, seed).save_pretrained(directory)
    align_(directory / "model.safetensors")
    if architecture == "layoutlmv3":
        _save_feature_extractor(directory)
    return directory


def align_(file: Path) -> None:
    """Let the tensors in a file begin where memory for a tensor does: some products round by where a matrix begins."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length] + b" " * (-(8 + length) % ALIGNMENT)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def make_sentences(architecture: str, texts: Sequence[str]) -> list[Sentence]:
    """Return one sentence per text, with the bounding boxes and the image that layout models ask for."""
    sentences = [Sentence(text) for text in texts]
    if architecture in LAYOUT:
        for number, sentence in enumerate(sentences):
            _lay_out_(sentence, number=number, with_image=architecture == "layoutlmv3")
    return sentences


def _lay_out_(sentence: Sentence, *, number: int, with_image: bool) -> None:
    for position, token in enumerate(sentence):
        left, top = 40 * position % 900, 30 * (number + position // 20) % 900
        token.add_metadata("bbox", (left, top, left + 35, top + 25))
    if with_image:
        pixels = random.Random(number).randbytes(3 * IMAGE_SIZE * IMAGE_SIZE)
        sentence.add_metadata("image", Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), pixels))


def _set_dropout_(config: PretrainedConfig, dropout: float) -> None:
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, (int, float)):
            setattr(config, name, dropout)


def _random_model(config: PretrainedConfig, model_class: type[PreTrainedModel], seed: int) -> PreTrainedModel:
    """Return a model whose matrices have standard deviation 0.2, its word embeddings 1.0, and whose norms are not 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
            torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model.eval()


def _save_feature_extractor(directory: Path) -> None:
    """Write preprocessor_config.json with the (old) keys that microsoft/layoutlmv3-base has."""
    settings = {
        "apply_ocr": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "LayoutLMv3FeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "ocr_lang": None,
        "resample": 2,
        "size": IMAGE_SIZE,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


_Tokenizer = Callable[[Path], PreTrainedTokenizerBase]


def _word_pieces(name: str) -> _Tokenizer:
    def make(directory: Path) -> PreTrainedTokenizerBase:
        directory.mkdir(parents=True, exist_ok=True)
        characters = string.ascii_lowercase + string.digits
        words = sorted({word for text in CORPUS for word in text.lower().split() if len(word) > 1})
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *string.punctuation]
        pieces += [f"##{character}" for character in characters] + ["##ed", "##ing", "##er", "##ly", *words[::2]]
        vocabulary = directory / "vocab.txt"
        vocabulary.write_text("\n".join(pieces) + "\n", encoding="utf-8")
        return getattr(transformers, name)(vocab_file=str(vocabulary), model_max_length=MAX_LENGTH)

    return make


@lru_cache
def _byte_pairs(special_tokens: tuple[str, ...]) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        CORPUS,
        vocab_size=256 + len(special_tokens) + 60,
        min_frequency=1,
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    return tokenizer


def _byte_level(name: str, *special_tokens: str, **options: object) -> _Tokenizer:
    def make(directory: Path) -> PreTrainedTokenizerBase:
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary, merges = _byte_pairs(special_tokens).save_model(str(directory))
        return getattr(transformers, name)(
            vocab_file=vocabulary, merges_file=merges, model_max_length=MAX_LENGTH, **options
        )

    return make


def _modernbert_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return what ModernBERT has: a byte-level BPE in the generic class, without a slow twin or vocabulary file."""
    special_tokens = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(special_tokens)._tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{token.strip('[]').lower()}_token": token for token in special_tokens},
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


@lru_cache
def _sentence_pieces(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        required_chars=_ALPHABET,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _sentence_piece(name: str, *, trained_with: dict[str, object], **options: object) -> _Tokenizer:
    def make(directory: Path) -> PreTrainedTokenizerBase:
        tokenizer_class = getattr(transformers, name)
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary = directory / tokenizer_class.vocab_files_names["vocab_file"]
        vocabulary.write_bytes(_sentence_pieces(**trained_with))
        return tokenizer_class(vocab_file=str(vocabulary), **{"model_max_length": MAX_LENGTH, **options})

    return make


_UNIGRAM: dict[str, object] = {"model_type": "unigram", "vocab_size": 150}
_ALBERT_PIECES = {
    **_UNIGRAM,
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
    "control_symbols": "[CLS],[SEP],[MASK]",
}
_DEBERTA_PIECES = {
    **_UNIGRAM,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "pad_piece": "[PAD]",
    "bos_piece": "[CLS]",
    "eos_piece": "[SEP]",
    "unk_piece": "[UNK]",
}
_XLNET_PIECES = {**_UNIGRAM, "control_symbols": "<cls>,<sep>,<pad>,<mask>,<eod>,<eop>"}
_T5_PIECES = {**_UNIGRAM, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
_LLAMA_PIECES: dict[str, object] = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True}
_GEMMA_PIECES = {
    **_LLAMA_PIECES,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "add_dummy_prefix": False,
}
_ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_TOKENIZERS: dict[str, _Tokenizer] = {
    "bert": _word_pieces("BertTokenizerFast"),
    "bert-slow": _word_pieces("BertTokenizer"),
    "bert-padded-vocab": _word_pieces("BertTokenizerFast"),
    "bert-mlm": _word_pieces("BertTokenizerFast"),
    "roberta": _byte_level("RobertaTokenizerFast", *_ROBERTA_SPECIAL),
    "xlm-roberta": _sentence_piece("XLMRobertaTokenizerFast", trained_with=_UNIGRAM),
    "deberta-v2": _sentence_piece("DebertaV2TokenizerFast", trained_with=_DEBERTA_PIECES),
    "electra": _word_pieces("ElectraTokenizerFast"),
    "distilbert": _word_pieces("DistilBertTokenizerFast"),
    "albert": _sentence_piece("AlbertTokenizerFast", trained_with=_ALBERT_PIECES),
    "modernbert": _modernbert_tokenizer,
    "xlnet": _sentence_piece("XLNetTokenizerFast", trained_with=_XLNET_PIECES, model_max_length=UNBOUNDED),
    "t5": _sentence_piece("T5TokenizerFast", trained_with=_T5_PIECES, extra_ids=4),
    "layoutlm": _word_pieces("LayoutLMTokenizerFast"),
    "layoutlmv3": _byte_level("LayoutLMv3TokenizerFast", *_ROBERTA_SPECIAL),
    "gpt2": _byte_level("GPT2TokenizerFast", "<|endoftext|>"),
    "llama": _sentence_piece(
        "LlamaTokenizerFast", trained_with=_LLAMA_PIECES, model_max_length=UNBOUNDED, legacy=False
    ),
    "qwen2": _byte_level("Qwen2TokenizerFast", "<|endoftext|>"),
    "qwen3": _byte_level("Qwen2TokenizerFast", "<|endoftext|>"),
    "mistral": _sentence_piece(
        "LlamaTokenizerFast", trained_with=_LLAMA_PIECES, model_max_length=UNBOUNDED, legacy=False
    ),
    "gemma": _sentence_piece("GemmaTokenizerFast", trained_with=_GEMMA_PIECES, model_max_length=UNBOUNDED),
    "umt5": _sentence_piece("T5TokenizerFast", trained_with=_T5_PIECES, extra_ids=4),
    "t5gemma": _sentence_piece("GemmaTokenizerFast", trained_with=_GEMMA_PIECES, model_max_length=UNBOUNDED),
    "fnet": _sentence_piece("FNetTokenizerFast", trained_with=_ALBERT_PIECES),
    "squeezebert": _word_pieces("SqueezeBertTokenizerFast"),
    "mpnet": _word_pieces("MPNetTokenizerFast"),
    "bart": _byte_level("BartTokenizerFast", *_ROBERTA_SPECIAL),
}

_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_Model = Callable[[int], tuple[PretrainedConfig, type[PreTrainedModel]]]


def _model(name: str, *, extra_rows: int = 0, model_class: str | None = None, **options: object) -> _Model:
    """Return a function: number of tokens → config and class, which is ``name`` + "Model" or ``model_class``."""

    def make(vocabulary_size: int) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
        config_class = getattr(transformers, f"{name}Config")
        config = config_class(vocab_size=vocabulary_size + extra_rows, **options)
        return config, getattr(transformers, model_class or f"{name}Model")

    return make


def _encoder(name: str, *, positions: int = MAX_LENGTH, **options: object) -> _Model:
    return _model(name, **{**_SIZE, "max_position_embeddings": positions, **options})


def _decoder(name: str, **options: object) -> _Model:
    return _encoder(name, num_key_value_heads=2, head_dim=8, **options)


def _of_two(name: str, **options: object) -> _Model:
    """Return a function as that of :func:`_model`, of a model whose config holds those of an encoder and a decoder."""

    def make(vocabulary_size: int) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
        part = {"vocab_size": vocabulary_size, **options}
        config = getattr(transformers, f"{name}Config")(encoder=part, decoder=part, vocab_size=vocabulary_size)
        return config, getattr(transformers, f"{name}Model")

    return make


# RoBERTa counts positions from pad_token_id + 1 on.
_ROBERTA = {"positions": MAX_LENGTH + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

_MODELS: dict[str, _Model] = {
    "bert": _encoder("Bert"),
    "bert-slow": _encoder("Bert"),
    "bert-padded-vocab": _encoder("Bert", extra_rows=20),
    "bert-mlm": _encoder("Bert", model_class="BertForMaskedLM"),
    "roberta": _encoder("Roberta", **_ROBERTA, type_vocab_size=1),
    "xlm-roberta": _encoder("XLMRoberta", **_ROBERTA, type_vocab_size=1),
    "deberta-v2": _encoder(
        "DebertaV2",
        relative_attention=True,
        max_relative_positions=-1,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
    ),
    "electra": _encoder("Electra", embedding_size=16),
    "distilbert": _model(
        "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=MAX_LENGTH
    ),
    "albert": _encoder("Albert", embedding_size=16, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    "modernbert": _encoder(
        "ModernBert",
        local_attention=16,
        global_attn_every_n_layers=2,
        pad_token_id=3,
        cls_token_id=1,
        bos_token_id=1,
        sep_token_id=2,
        eos_token_id=2,
        reference_compile=False,
    ),
    "xlnet": _model("XLNet", d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=5),
    "t5": _model("T5", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "layoutlm": _encoder("LayoutLM"),
    "layoutlmv3": _encoder(
        "LayoutLMv3",
        **_ROBERTA,
        type_vocab_size=1,
        coordinate_size=6,
        shape_size=4,
        rel_pos_bins=8,
        rel_2d_pos_bins=8,
        input_size=IMAGE_SIZE,
        patch_size=16,
    ),
    "gpt2": _model(
        "GPT2", n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=MAX_LENGTH, bos_token_id=0, eos_token_id=0
    ),
    "llama": _decoder("Llama", pad_token_id=None, bos_token_id=1, eos_token_id=2),
    "qwen2": _decoder("Qwen2", bos_token_id=0, eos_token_id=0),
    "qwen3": _decoder("Qwen3", bos_token_id=0, eos_token_id=0),
    "mistral": _decoder("Mistral", bos_token_id=1, eos_token_id=2, sliding_window=None),
    "gemma": _decoder("Gemma", pad_token_id=0, bos_token_id=2, eos_token_id=1),
    "umt5": _model("UMT5", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "t5gemma": _of_two("T5Gemma", **_SIZE, num_key_value_heads=2, head_dim=8, sliding_window=16),
    "fnet": _model(
        "FNet",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        tpu_short_seq_length=MAX_LENGTH,
    ),
    "squeezebert": _encoder("SqueezeBert", embedding_size=32),
    "mpnet": _encoder("MPNet", positions=MAX_LENGTH + 2),
    "bart": _model(
        "Bart",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=MAX_LENGTH,
    ),
}
