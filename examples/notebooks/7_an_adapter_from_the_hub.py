# %% [markdown]
# # 7. A PEFT adapter from the Hub, in Flair
#
# Adapters on the Hub were trained with PEFT on classes of transformers, such as `AutoModelForTokenClassification`.
# `from_adapter` makes Flair embeddings of them, and `take_over_head` takes the classifier that came with them, too.
#
# This notebook needs no network: it trains an adapter with transformers and PEFT alone, without Flair, and saves it to
# a directory. **For one from the Hub, change the line `ADAPTER = …`** to its id, such as `"user/adapter"`, and begin at
# "In Flair". Its base and its tokenizer are found by what its files say.

# %%
import logging
from pathlib import Path

import torch
import transformers
from flair.data import Sentence
from flair.datasets import ColumnCorpus
from flair.models import SequenceTagger
from flair.trainers import ModelTrainer
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForTokenClassification, AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings

ADAPTER = "out/adapter"

torch.set_num_threads(1)  # faster than several for a model as small as this
logging.getLogger("flair").setLevel(logging.WARNING)
transformers.logging.set_verbosity_error()  # it would say that a head of random numbers has to be trained

# %% [markdown]
# ## Somewhere else: an adapter that was trained without Flair

# %%
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


def read(path: str) -> list[list[list[str]]]:
    """Return sentences of pairs of a word and its label."""
    blocks = Path(path).read_text().strip().split("\n\n")
    return [[line.split(" ") for line in block.splitlines()] for block in blocks]


def encode(sentences: list[list[list[str]]]) -> dict[str, torch.Tensor]:
    """Return a batch; the label of a word stands at its first subtoken."""
    words = [[word for word, _ in sentence] for sentence in sentences]
    batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    batch["labels"] = torch.full(batch["input_ids"].shape, -100)
    for row, sentence in enumerate(sentences):
        starts: dict[int, int] = {}
        for column, word in enumerate(batch.word_ids(row)):
            if word is not None and word not in starts:
                starts[word] = column
        for word, column in starts.items():
            batch["labels"][row, column] = LABELS.index(sentence[word][1])
    return batch


tokenizer = AutoTokenizer.from_pretrained("../../resources/tiny-encoder")
torch.manual_seed(1)
transformer = AutoModelForTokenClassification.from_pretrained("../../resources/tiny-encoder", num_labels=len(LABELS))
lora = LoraConfig(task_type=TaskType.TOKEN_CLS, r=8, lora_alpha=32, target_modules=["query", "key", "value", "dense"])
source = get_peft_model(transformer, lora)

train = read("../../resources/corpora/ner/train.txt")
optimizer = torch.optim.AdamW(source.parameters(), lr=5e-3)
source.train()
for _ in range(4):
    for chosen in torch.randperm(len(train)).split(16):
        source(**encode([train[index] for index in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
source.eval().save_pretrained("out/adapter")
print(sorted(path.name for path in Path("out/adapter").iterdir()))

# %% [markdown]
# ## In Flair
#
# Every tensor of the adapter is used exactly once, or belongs to a head, and then a line says so. What does not fit is
# refused with the reason.

# %%
embeddings = PeftTransformerWordEmbeddings.from_adapter(ADAPTER)
print(embeddings.adapter_config.peft_type.value, embeddings.adapter_config.r, embeddings.foreign_head.source_class)

sentence = Sentence("Mr Chad moved to Washington .")
embeddings.embed(sentence)
print(sentence[1].embedding.shape)

# %% [markdown]
# ## Its head
#
# PEFT does not store the labels of the head's rows, so they are given here in their order. They have to be those of the
# tagger's own dictionary: BIO tags here.

# %%
corpus = ColumnCorpus(
    "../../resources/corpora/ner",
    column_format={0: "text", 1: "ner"},
    train_file="train.txt",
    dev_file="dev.txt",
    test_file="test.txt",
)
tagger = SequenceTagger(
    embeddings,
    tag_dictionary=corpus.make_label_dictionary("ner", add_unk=False),
    tag_type="ner",
    tag_format="BIO",
    use_rnn=False,
    use_crf=False,
    reproject_embeddings=False,
)
left_random = flair_peft.take_over_head(tagger, labels=LABELS)
print("labels without a row of the other head:", left_random)

result = tagger.evaluate(corpus.test, gold_label_type="ner", mini_batch_size=32)
print(f"F1 in Flair, before any training there: {result.main_score:.3f}")

# %% [markdown]
# Are these the scores of the source? For each word of the test sentences, the probabilities of both:


# %%
def source_probabilities(pairs: list[list[str]]) -> torch.Tensor:
    batch = encode([pairs])
    with torch.no_grad():
        logits = source(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    return logits[batch["labels"][0] != -100].softmax(-1)


largest = 0.0
for pairs in read("../../resources/corpora/ner/test.txt")[:100]:
    sentence = Sentence([word for word, _ in pairs])
    tagger.predict(sentence, return_probabilities_for_all_classes=True)
    for token, expected in zip(sentence, source_probabilities(pairs), strict=True):
        found = {label.value: label.score for label in token.get_tags_proba_dist("ner")}
        for label, probability in zip(LABELS, expected.tolist(), strict=True):
            largest = max(largest, abs(found[label] - probability))
assert largest < 1e-4
print("probabilities of 100 sentences agree up to rounding")

# %% [markdown]
# ## Training on
#
# From here on, it is a tagger like any other.

# %%
result = ModelTrainer(tagger, corpus).fine_tune(
    "out/tagger", learning_rate=1e-3, decoder_learning_rate=3e-3, mini_batch_size=16, max_epochs=2, eval_batch_size=32
)
print(f"F1 after two epochs more: {result['test_score']:.3f}")

# %%
loaded = SequenceTagger.load("out/tagger/final-model.pt")
sentence = Sentence("Mr Chad moved from Lake Kyoto to Washington .")
loaded.predict(sentence)
for span in sentence.get_spans("ner"):
    print(f"{span.text} is {span.tag} ({span.score:.3f})")
