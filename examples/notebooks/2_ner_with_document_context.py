# %% [markdown]
# # 2. Names, with LoRA and the context of the document
#
# With `use_context`, Flair's embeddings read each sentence together with its neighbours. LoRA adapts what reads them.
# The documents below are made so that the context decides: "Everyone talked about Jordan." says nothing of whether
# Jordan is a person, a place or a company; the sentence before it does.
#
# **For a real base, change the line `BASE = …`**, to `"xlm-roberta-base"` for example, and use smaller learning rates.

# %%
import logging
import random
from pathlib import Path

import flair
import torch
from flair.data import Sentence
from flair.datasets import ColumnCorpus
from flair.models import SequenceTagger
from flair.trainers import ModelTrainer
from matplotlib import pyplot as plt
from peft import LoraConfig

from flair_peft import PeftTransformerWordEmbeddings

BASE = "../../resources/tiny-encoder"

torch.set_num_threads(1)  # faster than several for a model as small as this
logging.getLogger("flair").setLevel(logging.WARNING)

# %% [markdown]
# ## Documents
#
# Two sentences each. The first says what kind of name it is, the second repeats the name.

# %%
NAMES = ["Bradford", "Brooklyn", "Burton", "Chad", "Dakota", "Ford", "Honda", "Jordan", "Kellogg", "Kent", "Kyoto"]
NAMES += ["Lincoln", "Philips", "Siemens", "Siena", "Sofia", "Sydney", "Virginia", "Washington", "Wellington"]
FIRST = {
    "PER": ["Mr {} teaches Greek .", "Mrs {} likes the soup .", '" We need more time , " said {} on Monday .'],
    "LOC": ["Many students live in {} .", "Last Sunday it rained in {} for hours .", "The train to {} leaves soon ."],
    "ORG": ["Shares of {} rose in March .", "{} opened a second office last Wednesday .", "{} makes computers ."],
}
SECOND = ["Everyone talked about {} .", "We read a lot about {} last week .", "My brother asked about {} ."]


def column_lines(template: str, name: str, label: str) -> list[str]:
    return [f"{name} B-{label}" if word == "{}" else f"{word} O" for word in template.split()] + [""]


def write_documents(path: Path, count: int, draw: random.Random) -> None:
    lines = []
    for _ in range(count):
        label, name = draw.choice(sorted(FIRST)), draw.choice(NAMES)
        lines += ["-DOCSTART- O", ""]
        lines += column_lines(draw.choice(FIRST[label]), name, label)
        lines += column_lines(draw.choice(SECOND), name, label)
    path.write_text("\n".join(lines) + "\n")


data = Path("out/documents")
data.mkdir(parents=True, exist_ok=True)
draw = random.Random(1)
for split, count in {"train": 200, "dev": 50, "test": 100}.items():
    write_documents(data / f"{split}.txt", count, draw)
print("\n".join((data / "train.txt").read_text().splitlines()[:18]))

# %% [markdown]
# `document_separator_token` tells Flair where a document ends, so that no sentence gets its context from the next one.

# %%
corpus = ColumnCorpus(
    data,
    column_format={0: "text", 1: "ner"},
    document_separator_token="-DOCSTART-",
    train_file="train.txt",
    dev_file="dev.txt",
    test_file="test.txt",
)
tags = corpus.make_label_dictionary("ner", add_unk=False)
print(tags)

# %% [markdown]
# ## Training, without context and with it
#
# `use_context=True` means 64 tokens on each side; here it is all of a document. Everything else is the same.


# %%
def train(use_context: bool) -> tuple[SequenceTagger, list[float], float]:
    """Return the tagger, its F1 on the development documents after each epoch, and that on the test documents."""
    flair.set_seed(1)
    embeddings = PeftTransformerWordEmbeddings(
        BASE, peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"), use_context=use_context
    )
    tagger = SequenceTagger(
        embeddings, tag_dictionary=tags, tag_type="ner", use_rnn=False, use_crf=False, reproject_embeddings=False
    )
    folder = Path("out", "with context" if use_context else "without context")
    (folder / "loss.tsv").unlink(missing_ok=True)  # Flair writes behind what an earlier run left
    result = ModelTrainer(tagger, corpus).fine_tune(
        folder, learning_rate=3e-3, decoder_learning_rate=1e-2, mini_batch_size=16, max_epochs=4, eval_batch_size=32
    )
    header, *rows = (line.split("\t") for line in (folder / "loss.tsv").read_text().splitlines())
    return tagger, [float(row[header.index("DEV_F1")]) for row in rows], result["test_score"]


_, curve_without, score_without = train(use_context=False)
tagger, curve_with, score_with = train(use_context=True)
print(f"F1 on the test documents: {score_without:.3f} without context, {score_with:.3f} with it")

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
epochs = range(1, len(curve_with) + 1)
axes.plot(epochs, curve_with, marker="o", label="use_context=True")
axes.plot(epochs, curve_without, marker="o", label="use_context=False")
axes.set(xlabel="epoch", ylabel="F1 on dev", ylim=(0, 1.05))
axes.set_xticks(epochs)
axes.legend()
plt.show()

# %% [markdown]
# Without context, the second sentence of a document can only be guessed. The documents are made to show this. Where
# neighbours say nothing about each other, context brings nothing.
#
# ## Loading and predicting
#
# `best-model.pt` and `final-model.pt` remember `use_context`. Sentences that are predicted together are each other's
# context, as in Flair.

# %%
loaded = SequenceTagger.load("out/with context/final-model.pt")

for beginning in ("Mr Jordan teaches Greek .", "Many students live in Jordan .", "Shares of Jordan rose in March ."):
    document = [Sentence(beginning), Sentence("Everyone talked about Jordan .")]
    loaded.predict(document)
    (entity,) = document[1].get_spans("ner")
    print(f"{beginning:<34} {document[1].text:<32} {entity.text} is {entity.tag} ({entity.score:.3f})")

# %% [markdown]
# The loaded tagger gives the tags and the scores of the trained one, to the last bit:


# %%
def predictions(model: SequenceTagger) -> list[tuple[str, str, float]]:
    sentences = [Sentence(sentence.text.split()) for sentence in corpus.test]
    Sentence.set_context_for_sentences(sentences)
    model.predict(sentences, mini_batch_size=32)
    return [(span.text, span.tag, span.score) for sentence in sentences for span in sentence.get_spans("ner")]


assert predictions(loaded) == predictions(tagger)
print(f"{len(predictions(loaded))} names, all the same")
