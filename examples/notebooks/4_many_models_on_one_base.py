# %% [markdown]
# # 4. Many models on one base
#
# Models with adapters differ in a small part of their weights. A `SharedBase` holds the large part once, and every
# model on it is an ordinary Flair model. Sentences of different models go through the transformer in the same batch.
#
# **For a real base, change the line `BASE = …`**, to `"xlm-roberta-base"` for example, and use smaller learning rates.

# %%
import logging
from pathlib import Path

import flair
import torch
from flair.data import Corpus, Sentence
from flair.datasets import ClassificationCorpus, ColumnCorpus
from flair.models import SequenceTagger, TextClassifier
from flair.trainers import ModelTrainer
from matplotlib import pyplot as plt
from peft import LoraConfig
from torch.utils.data import Subset

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, SharedBase
from flair_peft.primitives import mapped_memory

BASE = "../../resources/tiny-encoder"

torch.set_num_threads(1)  # faster than several for a model as small as this
logging.getLogger("flair").setLevel(logging.WARNING)

# %% [markdown]
# ## Ten classifiers and a tagger
#
# Each classifier learns from 40 reviews of its own, as if there were ten customers; the tagger learns to find names.
# `save_pretrained` writes directories.

# %%
files = {"train_file": "train.txt", "dev_file": "dev.txt", "test_file": "test.txt"}
reviews = ClassificationCorpus("../../resources/corpora/sentiment", label_type="sentiment", **files)
names = ColumnCorpus("../../resources/corpora/ner", column_format={0: "text", 1: "ner"}, **files)
lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
settings = {"learning_rate": 3e-3, "decoder_learning_rate": 1e-2, "mini_batch_size": 8, "save_final_model": False}

sentiments = reviews.make_label_dictionary("sentiment", add_unk=False)
for customer in range(10):
    flair.set_seed(customer)
    embeddings = PeftTransformerDocumentEmbeddings(BASE, peft_config=lora)
    classifier = TextClassifier(embeddings, label_type="sentiment", label_dictionary=sentiments)
    own = Subset(reviews.train, range(40 * customer, 40 * (customer + 1)))
    ModelTrainer(classifier, Corpus(train=own, sample_missing_splits=False)).fine_tune("out", max_epochs=3, **settings)
    flair_peft.save_pretrained(classifier, f"out/customer-{customer}")

# %%
flair.set_seed(1)
tagger = SequenceTagger(
    PeftTransformerWordEmbeddings(BASE, peft_config=lora),
    tag_dictionary=names.make_label_dictionary("ner", add_unk=False),
    tag_type="ner",
    use_rnn=False,
    use_crf=False,
    reproject_embeddings=False,
)
ModelTrainer(tagger, Corpus(train=names.train, sample_missing_splits=False)).fine_tune("out", max_epochs=3, **settings)
flair_peft.save_pretrained(tagger, "out/names")

# %% [markdown]
# ## Loading them on one base

# %%
base = SharedBase(BASE)
classifiers = [base.load(f"out/customer-{customer}") for customer in range(10)]
tagger = base.load("out/names")
print(f"{len(base.models)} models on one base")

# %% [markdown]
# ## One call for several models
#
# A dictionary from models to their sentences. A sentence can be given to more than one of them: here, all are read by
# the tagger too.

# %%
texts = [
    "The food in Jordan was awful and the room was dreadful.",
    "Mr Chad from Lake Washington was rude, and the hotel was dreadful.",
    "The waiter made us smile.",
]
sentences = [Sentence(text) for text in texts]
base.predict({tagger: sentences, classifiers[0]: sentences[:2], classifiers[7]: sentences[2:]})
for sentence in sentences:
    (sentiment,) = sentence.get_labels("sentiment")
    spans = ", ".join(f"{span.text} ({span.tag})" for span in sentence.get_spans("ner")) or "no names"
    print(f"{sentence.text}\n    {sentiment.value} {sentiment.score:.3f}; {spans}")

# %% [markdown]
# The labels are those of one `predict` after the other; scores may differ by rounding:


# %%
def labels(given: list[Sentence]) -> list[str]:
    return [sentence.tag for sentence in given]


jobs = {model: [Sentence(s.text) for s in reviews.test] for model in classifiers[:4]}
base.predict(jobs, mini_batch_size=32)
for model, together in jobs.items():
    alone = [Sentence(sentence.text) for sentence in together]
    model.predict(alone, mini_batch_size=32)
    largest = max(abs(one.score - other.score) for one, other in zip(alone, together, strict=True))
    assert labels(alone) == labels(together)
    assert largest < 1e-4
print(f"{sum(map(len, jobs.values()))} labels, all the same")

# %% [markdown]
# ## What it saves
#
# Counted here: the bytes of all weights that the models hold, each place in memory once, and the bytes of their files.
# The place is not asked of `data_ptr()`: weights are copied when somebody writes to them, and torch takes that for
# writing. The ten classifiers without adapters are what `merge` makes of them: plain Flair models, as large as if they
# had been fine-tuned in full.


# %%
def megabytes_in_memory(models: list[torch.nn.Module]) -> float:
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    places = {mapped_memory.address(tensor): tensor.nbytes for tensor in tensors}
    return sum(places.values()) / 1e6


def megabytes_of_files(path: str) -> float:
    found = Path(path)
    files = [found] if found.is_file() else [file for file in found.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


plain = [flair_peft.merge(classifier) for classifier in classifiers]
for customer, model in enumerate(plain):
    model.save(f"out/plain-{customer}.pt")

counts = [1, 5, 10]
memory = {
    "on one base": [megabytes_in_memory(classifiers[:count]) for count in counts],
    "plain models": [megabytes_in_memory(plain[:count]) for count in counts],
}
base_file = megabytes_of_files(f"{BASE}/model.safetensors")
files = {
    "on one base": [base_file + sum(megabytes_of_files(f"out/customer-{n}") for n in range(count)) for count in counts],
    "plain models": [sum(megabytes_of_files(f"out/plain-{n}.pt") for n in range(count)) for count in counts],
}
for name in memory:
    print(f"{name:<18}memory {memory[name][-1]:6.2f} MB   files {files[name][-1]:6.2f} MB   for {counts[-1]} models")

# %%
TITLES = ("weights in memory", "files, the base's included")
figure, panels = plt.subplots(1, 2, figsize=(7, 3), sharey=True, layout="constrained")
for axes, title, measured in zip(panels, TITLES, (memory, files), strict=True):
    for shift, (name, values) in zip((-0.2, 0.2), measured.items(), strict=True):
        bars = axes.bar([place + shift for place in range(len(counts))], values, width=0.4, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize="small")
    axes.set(title=title, xlabel="models", ylim=(0, 38))
    axes.set_xticks(range(len(counts)), counts)
panels[0].set_ylabel("MB")
panels[0].legend()
plt.show()

# %% [markdown]
# Of this tiny base, an adapter with r=8 is 7 %; of BERT-base, it is about 1 %, and the bars are further apart. In the
# files, each directory holds a tokenizer as well.
#
# `base.unload(model)` lets go of a model. `SharedBase(BASE, adapter_memory="500MB")` leaves adapters that were not used
# for longest on disk until they are needed.

# %%
base.unload(classifiers.pop())
print(f"{len(base.models)} models on one base")
