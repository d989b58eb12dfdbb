# %% [markdown]
# # 3. A model that stock Flair trained with LoRA
#
# Flair 0.14.0 to 0.15.1 take a `peft_config` and train with it, and save models that they cannot load again. The
# weights in such files are whole; what they lack is the config. This notebook makes such a file, loads it, and turns it
# into one that loads by itself.
#
# **For a file of your own, change the line `OLD = …`** and begin at "Loading it".

# %%
import json
import logging
from pathlib import Path

import flair
import torch
from flair.datasets import ClassificationCorpus
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.trainers import ModelTrainer
from peft import LoraConfig

OLD = "out/old.pt"

torch.set_num_threads(1)
logging.getLogger("flair").setLevel(logging.WARNING)

# %% [markdown]
# ## Making one
#
# Flair alone, without this package: it is not imported yet.

# %%
corpus = ClassificationCorpus(
    "../../resources/corpora/sentiment",
    label_type="sentiment",
    train_file="train.txt",
    dev_file="dev.txt",
    test_file="test.txt",
)
flair.set_seed(1)
embeddings = TransformerDocumentEmbeddings(
    "../../resources/tiny-encoder", peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
)
labels = corpus.make_label_dictionary("sentiment", add_unk=False)
classifier = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)
ModelTrainer(classifier, corpus).fine_tune(
    "out/old", learning_rate=2e-3, decoder_learning_rate=1e-2, mini_batch_size=16, max_epochs=3, save_final_model=False
)
classifier.save(OLD)


# %%
def accuracy(model: TextClassifier) -> float:
    return model.evaluate(corpus.test, gold_label_type="sentiment", mini_batch_size=32).main_score


before = accuracy(classifier)
print(f"accuracy of the model as it was trained: {before:.3f}")

# %% [markdown]
# Stock Flair cannot load what it has just saved:

# %%
try:
    TextClassifier.load(OLD)
except RuntimeError as error:
    print(str(error)[:310], "…")

# %% [markdown]
# ## Loading it
#
# The import installs a hook in Flair's `load`. Most of the config can be read from the names and shapes of the tensors,
# and the error prints it. The value that they cannot say is `lora_alpha`, and a wrong one changes predictions without a
# word. So it has to be given:

# %%
from flair_peft import convert_legacy
from flair_peft.errors import MissingConfigError

try:
    TextClassifier.load(OLD)
except MissingConfigError as error:
    print(error)

# %%
lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
model = TextClassifier.load(OLD, peft_config=lora)

assert accuracy(model) == before
print(f"accuracy of the loaded model: {accuracy(model):.3f}")

# %% [markdown]
# How much does alpha matter?

# %%
for alpha in (8, 16, 32, 64):
    guessed = TextClassifier.load(OLD, peft_config=LoraConfig(r=8, lora_alpha=alpha, target_modules="all-linear"))
    print(f"lora_alpha={alpha:<3} accuracy {accuracy(guessed):.3f}{'  ← as in training' if alpha == 32 else ''}")

# %% [markdown]
# A rank that does not fit is not a matter of guessing, and is refused:

# %%
from flair_peft import FlairPeftError

try:
    TextClassifier.load(OLD, peft_config=LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
except FlairPeftError as error:
    print(error)

# %% [markdown]
# ## Converting it
#
# The conversion compares the weights of the base in the file with those of the base model, bit by bit, and leaves out
# what is equal. The directory holds JSON and safetensors, and loads without a config. On the command line:
# `flair-peft convert out/old.pt out/converted --lora-alpha 32`.

# %%
convert_legacy(OLD, "out/converted", peft_config=lora)

converted = TextClassifier.load("out/converted")
assert accuracy(converted) == before

folder = sum(path.stat().st_size for path in Path("out/converted").rglob("*") if path.is_file())
print(f"{Path(OLD).stat().st_size / 1e6:.2f} MB before, {folder / 1e6:.2f} MB after")

# %%
config = json.loads(Path("out/converted/adapter_config.json").read_text())
print({key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")})
