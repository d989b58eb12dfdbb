"""The frozen transformer: find it, build it, give it a separator row."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    FeatureExtractionMixin,
    LlamaTokenizerFast,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.modeling_utils import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available

from flair_peft.dtypes import DtypeLike
from flair_peft.errors import BaseModelNotFoundError, ModelFileError

_building = threading.Lock()

log = logging.getLogger("flair_peft")

KeywordArguments = Mapping[str, Any]

# Flair reads the encoder of these; AutoModel would ask for decoder inputs.
_ENCODER_OF_T5 = frozenset({"t5", "mt5", "longt5"})

# Tried in this order for a tokenizer without a padding token; padding is masked, so any token will do.
_PADDING_CANDIDATES = ("eos_token", "unk_token", "bos_token", "cls_token", "sep_token")


def find_tokenizer(source: str, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, add_prefix_space=True, **kwargs)
    except (OSError, HFValidationError, ValueError, TypeError) as error:
        raise _not_found(source, error) from error


def find_feature_extractor(source: str, kwargs: KeywordArguments) -> FeatureExtractionMixin | None:
    """Return the image preprocessing of the base model, or ``None`` where it has none."""
    try:
        return AutoFeatureExtractor.from_pretrained(source, apply_ocr=False, **kwargs)
    except OSError:
        return None


def unpack_tokenizer(stored: BytesIO, kwargs: KeywordArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer from the zip file of :func:`portable_tokenizer_files`."""
    try:
        with _unpacked(stored) as directory:
            return AutoTokenizer.from_pretrained(directory, **kwargs)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelFileError(
            f"Cannot read the stored tokenizer: {type(error).__name__}: {error}. The file is damaged. Copy or save it "
            "again."
        ) from error


def unpack_feature_extractor(stored: BytesIO | None) -> FeatureExtractionMixin | None:
    """Return the image preprocessing from the zip file that Flair wrote, or ``None`` where there is none."""
    if stored is None:
        return None
    with _unpacked(stored) as directory:
        try:
            return AutoFeatureExtractor.from_pretrained(directory, apply_ocr=False)
        except ValueError:
            # Image processors are stored under a name of their own, which AutoFeatureExtractor does not read.
            return AutoImageProcessor.from_pretrained(directory, apply_ocr=False)


def find_model(
    source: str,
    *,
    dtype: DtypeLike | None,
    config_kwargs: KeywordArguments,
    model_kwargs: KeywordArguments,
) -> PreTrainedModel:
    """Return the base model in evaluation mode, on the CPU unless ``model_kwargs`` place it elsewhere.

    Args:
        source: a directory or a Hub id.
        dtype: of the weights; ``None`` leaves transformers its default, ``"auto"`` keeps that of the file.
        config_kwargs: for ``AutoConfig.from_pretrained``.
        model_kwargs: for ``AutoModel.from_pretrained``.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    try:
        config = AutoConfig.from_pretrained(source, output_hidden_states=True, **config_kwargs)
        wanted = {} if dtype is None else {"dtype": dtype}
        model_class = T5EncoderModel if config.model_type in _ENCODER_OF_T5 else AutoModel
        model = model_class.from_pretrained(source, config=config, **wanted, **model_kwargs)
    except (OSError, HFValidationError, ValueError, SafetensorError) as error:
        raise _not_found(source, error) from error
    if dtype is not None and not getattr(model, "quantization_method", None):
        _cast_left_overs_(model)
    return model.eval()


def build_model(
    config: PretrainedConfig, *, dtype: DtypeLike | None, model_kwargs: KeywordArguments
) -> PreTrainedModel:
    """Return a model of this shape whose weights are not initialised: a state dict must fill every one of them.

    Buffers that are not stored, such as rotary frequencies, hold their values.
    """
    wanted = {**model_kwargs} if dtype in (None, "auto") else {"dtype": dtype, **model_kwargs}
    # transformers switches initialisation off for the whole process; overlapping threads would leave it off.
    with _building, no_init_weights():
        if config.model_type in _ENCODER_OF_T5:
            model = T5EncoderModel._from_config(config, **wanted)
        else:
            model = AutoModel.from_config(config, **wanted)
    model.tie_weights()
    return model.eval()


def has_unread_layers(model: PreTrainedModel) -> bool:
    """Whether the model has linear layers that learn nothing: a pooler, or LayoutLM's biases, read without gradient."""
    has_bias = any(name.endswith("rel_pos_bias") for name, _ in model.named_modules())
    return getattr(model, "pooler", None) is not None or has_bias


def has_transposed_weights(model: PreTrainedModel) -> bool:
    """Whether the linear layers are transformers' ``Conv1D``, whose weights have the shape (in, out)."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def available_attention(implementation: str | None) -> str | None:
    """Return the attention implementation, or ``None`` for the default where this machine lacks FlashAttention."""
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        log.warning("FlashAttention 2 is not available here: the default attention is used, which rounds differently.")
        return None
    return implementation


def add_token_row_(model: PreTrainedModel, token_id: int) -> None:
    """Make sure that the token has a row in the embedding matrix, in place.

    A new row is the mean of all rows. transformers draws it from a normal distribution around that mean whose
    covariance, over all rows, takes seconds to compute and is scaled to nearly nothing.
    A vocabulary that is padded beyond its tokenizer has a row already, which is left as it is.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if token_id < rows:
        return
    model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[rows:] = weight[:rows].float().mean(dim=0).to(weight.dtype)


def complete_padding_(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer pad batches on the right, in place, also where it has no padding token of its own.

    With padding on the right, and masked, a sentence in a batch has the positions that it has alone.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        candidates = (getattr(tokenizer, name, None) for name in _PADDING_CANDIDATES)
        tokenizer.pad_token = next(token for token in candidates if token is not None)


def portable_tokenizer_files(stored: BytesIO, tokenizer: PreTrainedTokenizerBase) -> BytesIO:
    """Return the zip file of a tokenizer without the setting that makes transformers build it from other files.

    Given ``add_prefix_space``, which Flair always gives, the fast tokenizers of Llama and T5 are built from the slow
    one, whose files Flair drops or which are gone after a load. What was built from it is in ``tokenizer.json``.
    """
    if not isinstance(tokenizer, (LlamaTokenizerFast, T5TokenizerFast)):
        return stored
    completed = BytesIO()
    with zipfile.ZipFile(stored) as files, zipfile.ZipFile(completed, "w") as kept:
        for name in files.namelist():
            content = files.read(name)
            if name == "tokenizer_config.json":
                settings = json.loads(content)
                settings.pop("add_prefix_space", None)
                content = json.dumps(settings).encode()
            kept.writestr(name, content)
    completed.seek(0)
    return completed


def _cast_left_overs_(model: PreTrainedModel) -> None:
    """Cast parameters that transformers left in fp32 although it was asked for another dtype, in place.

    XLNet creates its attention as explicit FloatTensors, so its first matrix product fails in half precision.
    """
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        is_kept = any(part in kept for part in name.split("."))
        if parameter.is_floating_point() and parameter.dtype != dtype and not is_kept:
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _unpacked(stored: BytesIO) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(stored) as files:
        files.extractall(directory)
        yield directory


def _not_found(source: str, error: Exception) -> BaseModelNotFoundError:
    if Path(source).is_dir() or not isinstance(error, OSError | HFValidationError):
        cause = str(error).splitlines()[0].rstrip(".")
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{source}': {type(error).__name__}: {cause}. It is not a complete "
            "transformers model. Pass a directory that holds config.json, the weights and the tokenizer."
        )
    return BaseModelNotFoundError(
        f"Cannot find the base model '{source}'. It is neither a directory with a transformers model nor in the local "
        "cache, and it could not be downloaded. Check the name, or pass the path of a directory that holds "
        "config.json, the weights and the tokenizer."
    )
