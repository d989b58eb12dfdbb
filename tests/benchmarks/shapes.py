"""Base models in the shapes of real ones, with random weights and tokenizers of the real size, built offline."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizerFast,
)
from transformers.modeling_utils import no_init_weights


def bert_base(directory: Path) -> Path:
    """Write a model of BERT-base's shape, 110 M parameters in fp32, with a vocabulary of 30,522 word pieces."""
    return _with_word_pieces(_bert, directory)


def minilm(directory: Path) -> Path:
    """Write a model of MiniLM's shape, 6 layers of 384, 23 M parameters in fp32, with the same vocabulary."""
    return _with_word_pieces(_minilm, directory)


def _with_word_pieces(build: Callable[[], torch.nn.Module], directory: Path) -> Path:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
    pieces += itertools.islice(_words(4), 30_522 - len(pieces))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    return _save(BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=512), build, directory)


def xlm_roberta_large(directory: Path) -> Path:
    """Write a model of XLM-R-large's shape, 560 M parameters in fp32, with a vocabulary of 250,002 pieces."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [f"{space}{letter}" for letter in string.ascii_letters + string.punctuation for space in ("", "▁")]
    pieces = [*special, *letters]
    pieces += itertools.islice((f"▁{word}" for word in _words(4)), 250_001 - len(pieces))
    vocabulary = [(piece, -float(index) / 1e5) for index, piece in enumerate(pieces)] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _save(XLMRobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=512), _xlm_roberta, directory)


def llama_1b(directory: Path) -> Path:
    """Write a decoder of Llama's architecture, 1.2 B parameters in bf16, with a vocabulary of 32,000 pieces."""
    return llama(directory, hidden_size=2048, num_hidden_layers=22, intermediate_size=6656, num_attention_heads=32)


def llama_7b(directory: Path) -> Path:
    """Write a decoder of Llama's architecture, 6.7 B parameters in bf16 (13.5 GB), with the same vocabulary."""
    return llama(directory, hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32)


def llama(directory: Path, **shape: int) -> Path:
    """Write a decoder of Llama's architecture in bf16, in a shape as ``LlamaConfig`` takes it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"▁{letter}" for letter in string.printable[:94]), *string.printable[:94], "▁"]
    pieces += itertools.islice((f"▁{word}" for word in _words(4)), 32_000 - len(pieces))
    tokenizer = Tokenizer(models.Unigram([(piece, -float(n) / 1e5) for n, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return _save(fast, lambda: LlamaModel(LlamaConfig(**shape)), directory)
    finally:
        torch.set_default_dtype(before)


SHAPES: dict[str, Callable[[Path], Path]] = {
    "bert-base": bert_base,
    "minilm": minilm,
    "xlm-roberta-large": xlm_roberta_large,
}
DECODERS: dict[str, Callable[[Path], Path]] = {"llama-1b": llama_1b, "llama-7b": llama_7b}


def _bert() -> BertModel:
    return BertModel(BertConfig())


def _minilm() -> BertModel:
    return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))


def _xlm_roberta() -> XLMRobertaModel:
    return XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=250_002,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    )


def _save(tokenizer: PreTrainedTokenizerBase, build: Callable[[], torch.nn.Module], directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    with no_init_weights():
        model = build()
    for name, parameter in model.named_parameters():
        if "LayerNorm.weight" in name or "norm.weight" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    return directory


def _words(length: int) -> itertools.chain[str]:
    return itertools.chain.from_iterable(
        ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=count))
        for count in range(2, length + 1)
    )
