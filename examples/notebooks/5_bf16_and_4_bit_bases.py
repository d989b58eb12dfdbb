# %% [markdown]
# # 5. Bases in bf16 and in 4 bits
#
# The base is frozen, so it need not be stored in full precision. `dtype="bfloat16"` halves it. bitsandbytes brings its
# linear layers to 4 bits (QLoRA). Adapter and head train in fp32 in each case, because half precision cannot hold small
# updates.
#
# It needs `pip install bitsandbytes`. A GPU makes 4 bits fast; a CPU does the same, slowly. **For a real base, change
# the line `BASE = …`**, to `"xlm-roberta-large"` for example, and use smaller learning rates.

# %%
import logging
import time

import flair
import torch
from flair.data import Sentence
from flair.datasets import ClassificationCorpus
from flair.models import TextClassifier
from flair.trainers import ModelTrainer
from matplotlib import pyplot as plt
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from flair_peft import PeftTransformerDocumentEmbeddings

BASE = "../../resources/tiny-encoder"

torch.set_num_threads(1)  # faster than several for a model as small as this
logging.getLogger("flair").setLevel(logging.WARNING)

# %% [markdown]
# ## Three bases
#
# The keyword arguments below are all that differs.

# %%
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
BASES = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "4 bits": {"transformers_model_kwargs": {"quantization_config": four_bits}},
}

corpus = ClassificationCorpus(
    "../../resources/corpora/sentiment",
    label_type="sentiment",
    train_file="train.txt",
    dev_file="dev.txt",
    test_file="test.txt",
)
labels = corpus.make_label_dictionary("sentiment", add_unk=False)


def build(**options) -> TextClassifier:
    flair.set_seed(1)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    embeddings = PeftTransformerDocumentEmbeddings(BASE, peft_config=lora, **options)
    return TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)


# %% [markdown]
# ## Training and loading
#
# Files hold the dtype and the settings of the quantisation, and a load makes the base from its source in the same way.
# In fp32 and in 4 bits, what is loaded predicts the same to the last bit. In bf16, the head is rounded to bf16 after
# loading (more of that below), and scores move a little.


# %%
def base_megabytes(model: TextClassifier) -> tuple[float, float]:
    """Return the sizes in memory of the frozen linear layers and of the rest of the base."""
    weights = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    frozen = [p for p in model.embeddings.base_model.parameters() if not p.requires_grad]
    total = sum(p.numel() * p.element_size() for p in frozen) / 1e6
    in_linear = sum(p.numel() * p.element_size() for p in frozen if id(p) in weights) / 1e6
    return in_linear, total - in_linear


def predictions(model: TextClassifier) -> list[tuple[str, float]]:
    sentences = [Sentence(sentence.text) for sentence in corpus.test]
    model.predict(sentences, mini_batch_size=32)
    return [(sentence.tag, sentence.score) for sentence in sentences]


sizes, scores, seconds = {}, {}, {}
for name, options in BASES.items():
    model = build(**options)
    sizes[name], start = base_megabytes(model), time.perf_counter()
    result = ModelTrainer(model, corpus).fine_tune(
        f"out/{name}",
        learning_rate=2e-3,
        decoder_learning_rate=1e-2,
        mini_batch_size=16,
        max_epochs=3,
        eval_batch_size=32,
    )
    seconds[name], scores[name] = time.perf_counter() - start, result["test_score"]
    trained = predictions(model)
    loaded = predictions(TextClassifier.load(f"out/{name}/final-model.pt"))
    same = sum(one[0] == other[0] for one, other in zip(trained, loaded, strict=True))
    change = max(abs(one[1] - other[1]) for one, other in zip(trained, loaded, strict=True))
    changed = f"scores change by at most {change:.4f}" if change else "scores do not change at all"
    print(f"{name:<7} accuracy {scores[name]:.3f}; after loading, {same} of {len(loaded)} labels stay, {changed}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
linear, rest = zip(*sizes.values(), strict=True)
left.bar(list(sizes), linear, label="linear layers")
left.bar(list(sizes), rest, bottom=linear, label="embeddings and the rest")
left.set(title="the base's weights in memory", ylabel="MB", ylim=(0, 1.5 * sum(sizes["fp32"])))
left.legend()
bars = right.bar(list(scores), list(scores.values()), color="C2")
right.bar_label(bars, fmt="%.3f")
right.set(title="accuracy on the test reviews", ylim=(0, 1.1))
plt.show()

# %% [markdown]
# The embedding matrix is not quantised. It is a third of this tiny base, a fifth of BERT-base and almost half of
# XLM-R-large, whose vocabulary is large.
#
# How long did it take? For matrices as small as these, unpacking 4 bits costs more than computing with them:

# %%
for name, time_taken in seconds.items():
    print(f"{name:<8}{time_taken:5.1f} s for three epochs")

# %% [markdown]
# ## The dtype of the head
#
# Loaded on a bf16 base, the head of a text classifier is bf16 too, so that all of a prediction is in half precision.
# The file keeps its fp32 values. `head_dtype="float32"` in the embeddings keeps it in fp32 after loading; heads with a
# CRF or an RNN stay there in any case.

# %%
print("while training:", build(dtype="bfloat16").decoder.weight.dtype)
loaded = TextClassifier.load("out/bf16/final-model.pt")
print("after loading: ", loaded.decoder.weight.dtype)
loaded.train()
print("training on:   ", loaded.decoder.weight.dtype)
