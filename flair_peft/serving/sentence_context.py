"""Which sentences are context of which: linked while a model reads them, and unlinked afterwards.

Flair's ``predict`` links the sentences that it is given and leaves the links. In a stream these would be cut wherever a
call of ``predict`` ends, and would keep all of it in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flair.data import Sentence


def readable(points: Iterable[Any]) -> list[Sentence]:
    """Return the sentences that can be context of others: those without neighbours, whose words tokenizers can read.

    Sentences that have neighbours belong to another document; Flair passes over them as well.
    """
    return [
        sentence
        for sentence in _without_neighbours(points)
        if (len(sentence) or sentence.is_document_boundary) and is_unicode("".join(t.text for t in sentence.tokens))
    ]


def last_words(document: Sequence[Sentence], count: int) -> list[Sentence]:
    """Return the last sentences of a document, as many as hold ``count`` words."""
    kept: deque[Sentence] = deque()
    for sentence in reversed(document):
        if count <= 0:
            break
        kept.appendleft(sentence)
        count -= len(sentence)
    return list(kept)


@contextmanager
def linked(document: Sequence[Sentence], *, alone: Iterable[Any]) -> Iterator[None]:
    """Inside, the sentences of a document are neighbours in its order; afterwards all are as they were.

    Args:
        document: sentences; one that stands in it twice counts where it stands first.
        alone: data points. Sentences among them that have no neighbours, and do not get any here, get none from
            Flair's ``predict`` either.
    """
    ordered = dict.fromkeys(document)
    places = list(zip([None, *ordered], ordered, [*[*ordered][1:], None], strict=False))
    places += [(None, sentence, None) for sentence in _without_neighbours(alone) if sentence not in ordered]
    found = [(s._previous_sentence, s, s._next_sentence, s._has_context) for _, s, _ in places]
    try:
        for left, sentence, right in places:
            sentence._previous_sentence, sentence._next_sentence, sentence._has_context = left, right, True
        yield
    finally:
        for left, sentence, right, has_context in found:
            sentence._previous_sentence, sentence._next_sentence, sentence._has_context = left, right, has_context


def is_unicode(text: str) -> bool:
    """Tell whether a text can be encoded, which halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_neighbours(points: Iterable[Any]) -> list[Sentence]:
    return [point for point in points if isinstance(point, Sentence) and not point.is_context_set()]
