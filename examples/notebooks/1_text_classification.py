# %% [markdown]
# # 1. Text classification with LoRA
#
# A classifier of reviews, in Flair as you know it. One class has another name: `PeftTransformerDocumentEmbeddings`
# stands for `TransformerDocumentEmbeddings`.
#
# The encoder and the corpus are part of the repository, and so small that everything here runs on one CPU core. **For a
# real base, change the line `BASE = …`**, to `"xlm-roberta-base"` for example. Larger models want smaller learning
# rates: 5e-4 is a good first try for LoRA, a tenth of it for full fine-tuning.

# %%
import logging
from pathlib import Path

import flair
import torch
from flair.data import Corpus, Sentence
from flair.datasets import ClassificationCorpus
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.trainers import ModelTrainer
from matplotlib import pyplot as plt
from peft import LoraConfig

from flair_peft import PeftTransformerDocumentEmbeddings

BASE = "../../resources/tiny-encoder"

torch.set_num_threads(1)  # faster than several for a model as small as this
logging.getLogger("flair").setLevel(logging.WARNING)  # Flair's training log is long: leave this line out to read it

# %% [markdown]
# ## The corpus
#
# 400 short reviews to learn from. The test reviews use words that the training reviews lack.

# %%
corpus = ClassificationCorpus(
    "../../resources/corpora/sentiment",
    label_type="sentiment",
    train_file="train.txt",
    dev_file="dev.txt",
    test_file="test.txt",
)
labels = corpus.make_label_dictionary("sentiment", add_unk=False)
print(corpus)
print(corpus.train[0])

# %% [markdown]
# ## The model
#
# `r` and `lora_alpha` are PEFT's own. Without `peft_config`, you get LoRA with r=16 and alpha=32 on all linear layers.

# %%
flair.set_seed(1)
lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
embeddings = PeftTransformerDocumentEmbeddings(BASE, peft_config=lora)
classifier = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)

trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
total = sum(p.numel() for p in classifier.parameters())
print(f"{trained:,} of {total:,} parameters are trained: {trained / total:.1%}")

# %% [markdown]
# ## Training
#
# Flair's own trainer. The head of the classifier starts from random numbers, so it gets a larger learning rate than the
# adapter.

# %%
settings = {"decoder_learning_rate": 1e-2, "mini_batch_size": 16, "max_epochs": 4, "eval_batch_size": 32}

result = ModelTrainer(classifier, corpus).fine_tune("out/reviews", learning_rate=2e-3, **settings)
print(f"accuracy on the test reviews: {result['test_score']:.3f}")

# %% [markdown]
# ## Predicting
#
# What the trainer saved holds the adapter and the head. The base is found again where it was.

# %%
loaded = TextClassifier.load("out/reviews/final-model.pt")

for text in ("The soup was cold and the waiter was rude.", "Not a dull moment: the show made us smile."):
    sentence, again = Sentence(text), Sentence(text)
    classifier.predict(sentence)
    loaded.predict(again)
    assert sentence.tag == again.tag
    assert sentence.score == again.score  # the very same number
    print(f"{again.tag:<9} {again.score:.3f}  {text}")

# %%
slim = Path("out/reviews/final-model.pt").stat().st_size
classifier.save("out/reviews/whole.pt", save_base=True)
whole = Path("out/reviews/whole.pt").stat().st_size
print(f"adapter and head: {slim / 1e6:.2f} MB; with the base: {whole / 1e6:.2f} MB")

# %% [markdown]
# For BERT-base with LoRA (r=8) on queries and values, the sizes are 1.8 MB and 439 MB.
#
# ## LoRA, full fine-tuning and a frozen encoder
#
# Each of them three epochs long, with three seeds. The class of the embeddings and one more line make the difference.

# %%
train_and_dev = Corpus(train=corpus.train, dev=corpus.dev, sample_missing_splits=False)
LEARNING_RATES = {"LoRA": 2e-3, "full fine-tuning": 3e-4, "frozen encoder": 3e-3}


def train(method: str, seed: int) -> list[float]:
    """Return the accuracy on the development reviews after each epoch."""
    flair.set_seed(seed)
    if method == "LoRA":
        embeddings = PeftTransformerDocumentEmbeddings(BASE, peft_config=lora)
    else:
        embeddings = TransformerDocumentEmbeddings(BASE)
    if method == "frozen encoder":
        embeddings.requires_grad_(False)
    model = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)
    folder = Path("out", method, str(seed))
    rate = LEARNING_RATES[method]
    options = {**settings, "max_epochs": 3, "save_final_model": False}
    (folder / "loss.tsv").unlink(missing_ok=True)  # Flair writes behind what an earlier run left
    ModelTrainer(model, train_and_dev).fine_tune(folder, learning_rate=rate, **options)
    header, *rows = (line.split("\t") for line in (folder / "loss.tsv").read_text().splitlines())
    return [float(row[header.index("DEV_ACCURACY")]) for row in rows]


curves = {method: [train(method, seed) for seed in (1, 2, 3)] for method in LEARNING_RATES}

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
for method, runs in curves.items():
    epochs = range(1, len(runs[0]) + 1)
    means = [sum(scores) / len(scores) for scores in zip(*runs, strict=True)]
    (line,) = axes.plot(epochs, means, label=method)
    lowest, highest = [list(map(extreme, zip(*runs, strict=True))) for extreme in (min, max)]
    axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.2)
    print(f"{method:<18}{means[-1]:.3f} after the last epoch, mean of {len(runs)} seeds")
axes.set(xlabel="epoch", ylabel="accuracy on dev", title="Lines are means, areas reach from lowest to highest seed")
axes.set_xticks(epochs)
axes.legend()
plt.show()

# %% [markdown]
# ## Where the adapter learned
#
# `flair-peft inspect` (or `python -m flair_peft inspect`) reads a model file without loading it, and `--plot` draws how
# far each matrix of the base moved, layer by module, and in how many directions. This encoder came without a pooler,
# and the classifier does not use one: that row stays empty.

# %%
# !python -m flair_peft inspect out/reviews/final-model.pt --plot out/adapter.png

# %%
from IPython.display import Image

Image("out/adapter.png", width=700)
