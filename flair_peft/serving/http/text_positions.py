"""Where the words of a sentence stand in the text as it was sent.

Flair's ``Sentence`` leaves out characters without width and replaces some control characters before it counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from flair.data import Sentence, Token


class TextPositions:
    """From positions in what Flair keeps of a text to positions in the text, both in code points."""

    def __init__(self, text: str, *, is_split: bool = False) -> None:
        """Compare the text with what Flair keeps of it; of words that were split already it keeps all."""
        self.text = text
        self._kept: list[int] | None = None
        if not is_split and len(_kept_of(text)) != len(text):
            # Character by character: Flair looks at each for itself.
            self._kept = [index for index, character in enumerate(text) if _kept_of(character)]

    def span_of(self, tokens: Sequence[Token]) -> tuple[int, int]:
        """Return where the first of some words begins and the last one ends."""
        start, end = tokens[0].start_position, tokens[-1].end_position
        return (start, end) if self._kept is None else (self._kept[start], self._kept[end - 1] + 1)


def _kept_of(text: str) -> str:
    kept: str = Sentence._handle_problem_characters(text)
    return kept
