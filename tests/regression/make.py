"""Write the checkpoints that this version replays for ever: ``python -m tests.regression.make``.

Run once for each released version, on the code that is released. Existing files are never written again: who changes
something before the release removes the folder of the version first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.models import MultitaskModel, SequenceTagger, TextClassifier
from flair.nn import Model
from peft import IA3Config, LoraConfig, PrefixTuningConfig
from transformers import AutoTokenizer, BertConfig, BertModel

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from tests.support.methods import perturb_

FOLDER = Path(__file__).parent / "files"
ENCODER = Path(__file__).parents[2] / "resources" / "tiny-encoder"
TEXTS = ("Angela Merkel visited Berlin .", "The film was terrible , and long .", "Nobody knows why .")


def labels(*names: str) -> Dictionary:
    dictionary = Dictionary(add_unk=False)
    for name in names:
        dictionary.add_item(name)
    return dictionary


def make_classifier(base: str) -> Model:
    config = LoraConfig(r=4, lora_alpha=12, bias="lora_only", use_dora=True, init_lora_weights=False)
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config, cls_pooling="mean")
    return TextClassifier(embeddings, label_dictionary=labels("good", "bad", "neither"), label_type="sentiment")


def make_tagger(base: str) -> Model:
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    embeddings = PeftTransformerWordEmbeddings(base, peft_config=config, use_context=True)
    return SequenceTagger(
        embeddings, tag_dictionary=labels("PER", "LOC"), tag_type="ner", use_rnn=False, reproject_embeddings=False
    )


def make_half(base: str) -> Model:
    config = PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=4)
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config, dtype="bfloat16")
    return TextClassifier(embeddings, label_dictionary=labels("good", "bad"), label_type="sentiment")


def make_tasks(base: str) -> Model:
    config = LoraConfig(r=2, lora_alpha=6, layers_to_transform=[2, 3], init_lora_weights=False, use_rslora=True)
    embeddings = PeftTransformerWordEmbeddings(base, peft_config=config, subtoken_pooling="first_last")
    options = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False}
    tagger = SequenceTagger(embeddings, tag_dictionary=labels("PER", "LOC"), tag_type="ner", **options)
    options = {"hidden_size": 4, "reproject_embeddings": False}
    other = SequenceTagger(embeddings, tag_dictionary=labels("NOUN", "VERB"), tag_type="pos", **options)
    return MultitaskModel([tagger, other], task_ids=["names", "words"], loss_factors=[1.0, 0.5])


def small_encoder(base: str) -> str:
    """Return where an encoder with the same tokenizer lies that is small enough to be stored with a model."""
    small = Path(base).with_name("small-encoder")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(small)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False).save_pretrained(small)
    return str(small)


def make_whole(base: str) -> Model:
    config = IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False)
    embeddings = PeftTransformerDocumentEmbeddings(small_encoder(base), peft_config=config, save_base=True)
    options = {"multi_label": True, "multi_label_threshold": 0.4}
    return TextClassifier(embeddings, label_dictionary=labels("food", "price"), label_type="topic", **options)


def make_plain(base: str) -> Model:
    """Return a model without an adapter, none of whose weights is that of its base."""
    embeddings = TransformerDocumentEmbeddings(small_encoder(base), fine_tune=True)
    with torch.no_grad():
        for parameter in embeddings.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return TextClassifier(embeddings, label_dictionary=labels("good", "bad"), label_type="sentiment")


def make_frozen(base: str) -> Model:
    """Return a model without an adapter, whose transformer is its base: the directory holds its head alone."""
    embeddings = TransformerWordEmbeddings(base, fine_tune=False)
    options = {"use_rnn": False, "reproject_embeddings": False}
    return SequenceTagger(embeddings, tag_dictionary=labels("PER", "LOC"), tag_type="ner", **options)


MODELS: dict[str, Callable[[str], Model]] = {
    "classifier-dora-biases": make_classifier,
    "tagger-crf-context": make_tagger,
    "classifier-prefix-bf16": make_half,
    "taggers-shared-upper-layers": make_tasks,
    "classifier-whole": make_whole,
    "classifier-plain": make_plain,
    "tagger-plain-frozen": make_frozen,
}
WITHOUT_FILE = {"classifier-plain", "tagger-plain-frozen"}
"""Models without an adapter, of which a file is Flair's own."""
WRITTEN = {"0.2.0": {"classifier-dora-biases", "tagger-crf-context", "classifier-prefix-bf16"}, "0.3.0": {*MODELS}}
"""Version → names of the models that it wrote."""


def outputs(model: Model) -> list[list[list[Any]]]:
    """Return the labels of each sentence with their scores, of taggers those of each token, and of all tasks."""
    if isinstance(model, MultitaskModel):
        return [found for task in model.tasks.values() for found in outputs(task)]
    sentences = [Sentence(text.split(), use_tokenizer=False) for text in TEXTS]
    model.predict(sentences, label_name="x", return_probabilities_for_all_classes=True)
    found = []
    for sentence in sentences:
        of_tokens = [label for token in sentence for label in token.get_tags_proba_dist("x")]
        found.append([[label.value, float(label.score)] for label in of_tokens or sentence.get_labels("x")])
    return found


def write(name: str, encoder: str) -> None:
    """Write a model as a directory and a file, with what it predicts."""
    folder = FOLDER / flair_peft.__version__ / name
    if folder.exists():
        return
    torch.manual_seed(1)
    model = MODELS[name](encoder)
    for index, embeddings in enumerate(module for module in model.modules() if hasattr(module, "adapter_config")):
        perturb_(embeddings.model, seed=index)
    model.eval()
    flair_peft.save_pretrained(model, folder / "checkpoint")
    if name not in WITHOUT_FILE:
        model.save(folder / "slim.pt")
    expected = outputs(flair_peft.from_pretrained(folder / "checkpoint"))
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def main() -> None:
    """Write each model that this version has not written yet; the files name its encoder, in a neutral place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    place = Path(tempfile.gettempdir()) / "models"
    encoder = shutil.copytree(ENCODER, place / "tiny-encoder")
    try:
        for name in MODELS:
            write(name, str(encoder))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
