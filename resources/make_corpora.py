"""Write the corpora of this folder from the grammars in ``corpora/grammar``.

    python resources/make_corpora.py            # writes resources/corpora, the same bytes each time

A grammar file is a list of rules. ``= name`` opens a rule, each line below it holds one or more ways to write
it, separated by ``|``. ``= name @test`` adds ways that only the test split uses. Slots in the text are filled from
other rules:

========== =========================================================================================================
``{x}``    rule ``x``; ``topic.x`` as well, where the text has a topic
``{x=}``   the same for text with an opinion: ``x+`` or ``x-`` if there are such rules, else ``x``, polarity kept
``{x~}``   as ``{x=}`` with the polarity turned round
``{a x}``  rule ``x`` behind "a" or "an"
========== =========================================================================================================

What is tagged ``@test`` never occurs in the train split, and only the pre-training text holds the words of all splits:
a model that knows them has learned them there. Grammars and texts were written for this project; what the sentences
say of people, places and companies is invented.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

CORPORA = Path(__file__).parent / "corpora"
SENTENCES = {"train": 400, "dev": 100, "test": 300}
PRETRAINING_BYTES = 1_450_000
PRETRAINING = "pretraining"

SLOT = re.compile(r"\{(?P<article>a )?(?P<rule>[\w.]+)(?P<polarity>[=~]?)\}")
NAME = re.compile(r"\[(?P<label>[A-Z]+) (?P<text>[^]]+)\]")
OPPOSITE = {"+": "-", "-": "+", "": ""}
LABELS = {"+": "positive", "-": "negative"}

TaggedToken = tuple[str, str]


@dataclass(frozen=True)
class Grammar:
    """Rules by name; each way to write a rule comes with the splits it is limited to (none: all)."""

    rules: dict[str, list[tuple[str, frozenset[str]]]]

    @classmethod
    def read(cls, path: Path) -> Grammar:
        """The grammar that a file describes."""
        rules = defaultdict(list)
        name, splits = "", frozenset()
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("= "):
                name, *tags = line[2:].split()
                splits = frozenset(tag.lstrip("@") for tag in tags)
            elif line and not line.startswith("# "):
                rules[name] += [(text.strip(), splits) for text in line.split(" | ")]
        return cls(dict(rules))

    def ways(self, rule: str, split: str) -> list[str]:
        """All ways to write ``rule`` in ``split``; the pre-training text may use every one."""
        return [text for text, splits in self.rules.get(rule, []) if not splits or split in {PRETRAINING, *splits}]


@dataclass
class Writer:
    """Writes one text; no way to write a rule is chosen twice within it if there is another."""

    grammar: Grammar
    rng: random.Random
    split: str
    topic: str = ""
    used: set[tuple[str, str]] = field(default_factory=set)

    def write(self, rule: str, polarity: str = "") -> str:
        """A text for ``rule`` with all slots filled; ``polarity`` is "+", "-" or "" for text without an opinion."""
        if rule == "topic":
            return self.topic

        def fill(slot: re.Match[str]) -> str:
            wanted = OPPOSITE[polarity] if slot["polarity"] == "~" else polarity
            text = self.write(slot["rule"], wanted)
            return with_article(text) if slot["article"] else text

        return SLOT.sub(fill, self.choose(rule, polarity))

    def choose(self, rule: str, polarity: str) -> str:
        """One way to write ``rule``, its slots not yet filled."""
        names = [scope + rule + sign for scope in (f"{self.topic}.", "") for sign in (polarity, "")]
        found = {name: ways for name in names if (ways := self.grammar.ways(name, self.split))}
        if not found:
            raise KeyError(f"No rule '{rule}' for polarity '{polarity}', topic '{self.topic}', split '{self.split}'.")
        name = self.rng.choice(list(found))
        fresh = [text for text in found[name] if (name, text) not in self.used]
        text = self.rng.choice(fresh or found[name])
        self.used.add((name, text))
        return text


def with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def capitalise_sentences(text: str) -> str:
    """Each sentence starts with a capital letter, and so does the word "I"."""
    text = re.sub(r"(?:^|(?<=[.!?] ))[\"' ]*[a-z]", lambda match: match[0].upper(), text)
    return re.sub(r"\bi\b", "I", text)


def tag_tokens(text: str) -> list[TaggedToken]:
    """Tokens of a marked-up sentence ("[LOC Lake Como] froze .") with their BIO tags."""
    tagged, start = [], 0
    for name in NAME.finditer(text):
        tagged += [(token, "O") for token in text[start : name.start()].split()]
        inside = name["text"].split()
        tagged += [(token, f"{'I' if i else 'B'}-{name['label']}") for i, token in enumerate(inside)]
        start = name.end()
    return tagged + [(token, "O") for token in text[start:].split()]


def plain_text(text: str) -> str:
    """A marked-up sentence as people write it: no brackets, no space before punctuation."""
    text = NAME.sub(r"\g<text>", text)
    text = re.sub(r'(^| )" (.*?) "(?= )', r'\1"\2"', text)
    return re.sub(r" (?=[.,;?]|'s )", "", text)


def write_review(grammar: Grammar, rng: random.Random, split: str, *, rule: str, polarity: str) -> str:
    topic = rng.choice(grammar.ways("domain", split))
    return capitalise_sentences(Writer(grammar, rng, split, topic).write(rule, polarity))


def write_sentence(grammar: Grammar, rng: random.Random, split: str) -> str:
    """A sentence with marked names."""
    return capitalise_sentences(Writer(grammar, rng, split).write("sentence"))


def distinct(write: Callable[[], str], *, without: set[str]) -> Iterator[str]:
    """Texts from ``write``, none of them in ``without``, which grows by each text that is handed out."""
    while True:
        text = write()
        if text not in without:
            without.add(text)
            yield text


def make_sentiment(grammar: Grammar, rng: random.Random, seen: set[str]) -> dict[str, str]:
    """Split → file in FastText format, half of it positive."""
    files = {}
    for split, count in SENTENCES.items():
        lines = []
        for polarity, label in LABELS.items():
            write = partial(write_review, grammar, rng, split, rule="review", polarity=polarity)
            texts = distinct(write, without=seen)
            lines += [f"__label__{label} {next(texts)}" for _ in range(count // 2)]
        rng.shuffle(lines)
        files[split] = "\n".join(lines) + "\n"
    return files


def make_ner(grammar: Grammar, rng: random.Random, seen: set[str]) -> dict[str, str]:
    """Split → file in CoNLL format, two columns."""
    files = {}
    for split, count in SENTENCES.items():
        texts = distinct(partial(write_sentence, grammar, rng, split), without=seen)
        sentences = [tag_tokens(next(texts)) for _ in range(count)]
        files[split] = "\n".join("".join(f"{token} {tag}\n" for token, tag in sentence) for sentence in sentences)
    return files


def make_pretraining(opinions: Grammar, names: Grammar, rng: random.Random, seen: set[str]) -> str:
    """Plain text, one document a line; nothing that stands in the other corpora."""

    def write() -> str:
        if rng.random() < 0.5:
            return write_review(opinions, rng, PRETRAINING, rule="document", polarity=rng.choice("+-"))
        return write_sentence(names, rng, PRETRAINING)

    lines: list[str] = []
    size = 0
    for text in distinct(write, without=seen):
        line = plain_text(text) + "\n"
        size += len(line.encode())
        if size > PRETRAINING_BYTES:
            break
        lines.append(line)
    return "".join(lines)


def make_corpora(folder: Path, *, seed: int) -> None:
    """Write ``pretraining.txt``, ``sentiment/*.txt`` and ``ner/*.txt`` into ``folder``."""
    opinions = Grammar.read(CORPORA / "grammar" / "opinions.txt")
    names = Grammar.read(CORPORA / "grammar" / "names.txt")
    seen: set[str] = set()
    files = {f"sentiment/{split}": text for split, text in make_sentiment(opinions, random.Random(seed), seen).items()}
    files |= {f"ner/{split}": text for split, text in make_ner(names, random.Random(seed), seen).items()}
    files["pretraining"] = make_pretraining(opinions, names, random.Random(seed), seen)
    for name, text in files.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the corpora from their grammars.")
    parser.add_argument("--output", type=Path, default=CORPORA, help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other sentences (default: %(default)s)")
    arguments = parser.parse_args()
    make_corpora(arguments.output, seed=arguments.seed)


if __name__ == "__main__":
    main()
