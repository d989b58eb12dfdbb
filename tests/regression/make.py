"""Write the checkpoints that this version replays for ever: ``python -m tests.regression.make FOLDER-OF-THE-ENCODER``.

Run once for each released version, with the tiny encoder copied or linked to a neutral path, which the files name.
Existing files are never written again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flair.data import Dictionary, Sentence
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Classifier
from peft import LoraConfig, PrefixTuningConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from tests.support.methods import perturb_

FOLDER = Path(__file__).parent / "files"
TEXTS = ("Angela Merkel visited Berlin .", "The film was terrible , and long .", "Nobody knows why .")


def labels(*names: str) -> Dictionary:
    dictionary = Dictionary(add_unk=False)
    for name in names:
        dictionary.add_item(name)
    return dictionary


def make_classifier(base: str) -> Classifier:
    config = LoraConfig(r=4, lora_alpha=12, bias="lora_only", use_dora=True, init_lora_weights=False)
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config, cls_pooling="mean")
    return TextClassifier(embeddings, label_dictionary=labels("good", "bad", "neither"), label_type="sentiment")


def make_tagger(base: str) -> Classifier:
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    embeddings = PeftTransformerWordEmbeddings(base, peft_config=config, use_context=True)
    return SequenceTagger(
        embeddings, tag_dictionary=labels("PER", "LOC"), tag_type="ner", use_rnn=False, reproject_embeddings=False
    )


def make_half(base: str) -> Classifier:
    config = PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=4)
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config, dtype="bfloat16")
    return TextClassifier(embeddings, label_dictionary=labels("good", "bad"), label_type="sentiment")


MODELS: dict[str, Callable[[str], Classifier]] = {
    "classifier-dora-biases": make_classifier,
    "tagger-crf-context": make_tagger,
    "classifier-prefix-bf16": make_half,
}


def outputs(model: Classifier) -> list[list[list[Any]]]:
    """Return the labels of each sentence with their scores, and of taggers those of each token."""
    sentences = [Sentence(text.split(), use_tokenizer=False) for text in TEXTS]
    model.predict(sentences, label_name="x", return_probabilities_for_all_classes=True)
    found = []
    for sentence in sentences:
        of_tokens = [label for token in sentence for label in token.get_tags_proba_dist("x")]
        found.append([[label.value, float(label.score)] for label in of_tokens or sentence.get_labels("x")])
    return found


def main() -> None:
    """Write each model as a directory, a slim file and a self-contained one, with what it predicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder")
    encoder = parser.parse_args().encoder
    for name, make in MODELS.items():
        folder = FOLDER / flair_peft.__version__ / name
        if folder.exists():
            continue
        torch.manual_seed(1)
        model = make(encoder)
        for index, embeddings in enumerate(module for module in model.modules() if hasattr(module, "adapter_config")):
            perturb_(embeddings.model, seed=index)
        model.eval()
        flair_peft.save_pretrained(model, folder / "checkpoint")
        model.save(folder / "slim.pt")
        expected = outputs(flair_peft.from_pretrained(folder / "checkpoint"))
        (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main()
