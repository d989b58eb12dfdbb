# %% [markdown]
# # 6. From an adapter to a plain model
#
# Where a model is used, this package may not be wanted. `merge` adds the adapter to the weights of the base and returns
# a Flair model that needs neither flair_peft nor PEFT. `export_onnx` lets onnxruntime run the transformer, and
# `quantize_onnx` brings that to int8 for CPUs.
#
# **For a real base, change the line `BASE = …`**, to `"xlm-roberta-base"` for example, and use smaller learning rates.

# %%
import logging
import subprocess
import sys
from pathlib import Path

import flair
import torch
from flair.data import Sentence
from flair.datasets import ColumnCorpus
from flair.models import SequenceTagger
from flair.trainers import ModelTrainer
from matplotlib import pyplot as plt
from peft import LoraConfig

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings

BASE = "../../resources/tiny-encoder"

torch.set_num_threads(1)  # faster than several for a model as small as this
logging.getLogger("flair").setLevel(logging.WARNING)

# %%
corpus = ColumnCorpus(
    "../../resources/corpora/ner",
    column_format={0: "text", 1: "ner"},
    train_file="train.txt",
    dev_file="dev.txt",
    test_file="test.txt",
)
flair.set_seed(1)
tagger = SequenceTagger(
    PeftTransformerWordEmbeddings(BASE, peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")),
    tag_dictionary=corpus.make_label_dictionary("ner", add_unk=False),
    tag_type="ner",
    use_rnn=False,
    use_crf=False,
    reproject_embeddings=False,
)
result = ModelTrainer(tagger, corpus).fine_tune(
    "out", learning_rate=3e-3, decoder_learning_rate=1e-2, mini_batch_size=16, max_epochs=5, save_final_model=False
)
tagger.save("out/adapter.pt")
print(f"F1 on the test sentences: {result['test_score']:.3f}")

# %% [markdown]
# ## Merging
#
# The merged model is compared with the unmerged one before it is returned; the model with the adapter stays as it is.


# %%
def spans(model: SequenceTagger) -> list[tuple[str, str]]:
    sentences = [Sentence(sentence.text) for sentence in corpus.test]
    model.predict(sentences, mini_batch_size=32)
    return [(span.text, span.tag) for sentence in sentences for span in sentence.get_spans("ner")]


plain = flair_peft.merge(tagger)
plain.save("out/plain.pt")

assert spans(plain) == spans(tagger)
print(type(plain.embeddings).__module__, type(plain.embeddings).__name__)
print(f"{len(spans(plain))} names, all the same")

# %% [markdown]
# ## Stock Flair loads it
#
# In a process of its own, in which neither package can be imported:

# %%
script = """
import sys
sys.modules["flair_peft"] = sys.modules["peft"] = None  # importing them fails from here on

import logging
logging.disable(logging.WARNING)
from flair.data import Sentence
from flair.models import SequenceTagger

tagger = SequenceTagger.load("out/plain.pt")
sentence = Sentence("Mr Chad moved from Lake Kyoto to Washington .")
tagger.predict(sentence)
for span in sentence.get_spans("ner"):
    print(f"{span.text} is {span.tag} ({span.score:.3f})")
"""
print(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# ## ONNX and int8
#
# `pip install onnx onnxruntime` first. The export is refused if onnxruntime gives other vectors than torch. Then
# `quantize_onnx` rounds to int8, and says what that costs on sentences of yours.

# %%
exported = flair_peft.export_onnx(tagger, "out/encoder.onnx")
exported.save("out/with-onnx.pt")
assert spans(exported) == spans(tagger)

# %%
cost = flair_peft.quantize_onnx(exported, list(corpus.test), gold_label_type="ner")
exported.save("out/with-int8.pt")
print(cost)

# %% [markdown]
# Whether int8 is worth it depends on the model: it is measured here, not promised. The command
# `flair-peft export out/adapter.pt out/encoder.onnx out/with-onnx.pt --int8 texts.txt` does the same.
#
# ## The files

# %%
FILES = {
    "adapter and head": ["adapter.pt"],
    "merged": ["plain.pt"],
    "ONNX": ["with-onnx.pt", "encoder.onnx"],
    "ONNX, int8": ["with-int8.pt", "encoder-int8.onnx"],
}
sizes = {name: sum(Path("out", file).stat().st_size for file in files) / 1e6 for name, files in FILES.items()}

figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
bars = axes.barh(list(sizes), list(sizes.values()))
axes.bar_label(bars, fmt=" %.2f MB")
axes.invert_yaxis()
axes.set(xlabel="MB", xlim=(0, 1.2 * max(sizes.values())))
plt.show()
