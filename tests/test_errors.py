"""What every message is made of."""

from __future__ import annotations

import pytest

from flair_peft.errors import BaseModelNotFoundError, FlairPeftError, StateMismatchError, name_some


@pytest.mark.parametrize(
    ("names", "limit", "expected"),
    [
        ([], 5, ""),
        (["b"], 5, "'b'"),
        (["b", "a"], 5, "'a', 'b'"),
        (["e", "d", "c", "b", "a"], 5, "'a', 'b', 'c', 'd', 'e'"),
        (["f", "e", "d", "c", "b", "a"], 5, "'a', 'b', 'c', 'd', 'e' and 1 more"),
        (["c", "b", "a"], 1, "'a' and 2 more"),
    ],
)
def test_name_some_with_names_and_limit_sorts_quotes_and_counts_the_rest(
    names: list[str], limit: int, expected: str
) -> None:
    """Names are sorted and quoted; at most ``limit`` are shown, with a count of those left out."""
    assert name_some(names, limit) == expected


def test_name_some_without_limit_shows_five() -> None:
    """Five names at most are shown unless a caller asks for more."""
    assert name_some("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"


@pytest.mark.parametrize("kind", [set, tuple, list, iter, dict.fromkeys])
def test_name_some_of_any_iterable_gives_the_same_text(kind: type) -> None:
    """The order in which names come does not show, and an iterator is read once only."""
    assert name_some(kind(["b", "c", "a"])) == "'a', 'b', 'c'"


def test_name_some_of_a_list_leaves_it_as_it_was() -> None:
    """The caller's list is not sorted in place."""
    names = ["b", "a"]
    name_some(names)
    assert names == ["b", "a"]


@pytest.mark.parametrize("error", [FlairPeftError, StateMismatchError, BaseModelNotFoundError])
def test_message_that_quotes_a_file_moves_no_cursor(error: type[FlairPeftError]) -> None:
    """Names come from files: control characters and turned writing are spelled out, lines stay lines."""
    assert str(error("a\x1b[31m\u202eb\r\nsecond é 語")) == "a\\x1b[31m\\u202eb\\r\nsecond é 語"
