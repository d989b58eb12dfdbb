"""Where the state of a model holds embeddings, told without Flair."""

from __future__ import annotations

from typing import Any

from flair.models.sequence_tagger_utils.crf import START_TAG, STOP_TAG

from flair_peft.torchfile import state_tree


def params(**settings: Any) -> dict[str, Any]:
    return {"__cls__": "TransformerWordEmbeddings", "model": "bert", **settings}


def test_embeddings_in_stacks_have_the_prefixes_of_their_modules() -> None:
    """Flair numbers embeddings in stacks; tensors and parameters agree on the numbers, not on the first name."""
    stack = {"__cls__": "StackedEmbeddings", "embeddings": [params(), {"__cls__": "WordEmbeddings"}, params()]}
    state = {
        "embeddings": stack,
        "state_dict": {},
        "label_type": "ner",
        "inner_embeddings": {"decoder.e.": params(part=1)},
    }
    stored = [*state_tree.embeddings_in(state)]
    assert [each.prefix for each in stored] == [
        "decoder.e.",
        "embeddings.list_embedding_0.",
        "embeddings.list_embedding_2.",
    ]
    assert [each.place for each in stored[1:]] == [("embeddings", "embeddings", 0), ("embeddings", "embeddings", 2)]
    assert state_tree.positions("embeddings.list_embedding_2.") == ["list_embedding_2"]


def test_embeddings_of_any_class_are_told_by_their_parameters() -> None:
    """A user's own class can have any name; one that holds no transformer is none, whatever its name."""
    own = {"__cls__": "Mine", "config_state_dict": {}}
    state = {"a": own, "b": {"__cls__": "TransformerOnnxWordEmbeddings", "onnx_model": "x"}, "c": {"model": "bert"}}
    assert [(each.prefix, each.params) for each in state_tree.embeddings_in(state)] == [("a.", own)]


def test_embeddings_that_hold_themselves_are_found_once() -> None:
    """A file can nest containers without end, and the walk over it has one."""
    stack: dict[str, Any] = {"__cls__": "StackedEmbeddings", "embeddings": [params()]}
    stack["embeddings"] += [stack, stack]
    assert [each.prefix for each in state_tree.embeddings_in({"e": stack})] == ["e.list_embedding_0."]
    deep: dict[str, Any] = params()
    for _ in range(5_000):
        deep = {"__cls__": "StackedEmbeddings", "embeddings": [deep]}
    assert not [*state_tree.embeddings_in({"e": deep})]


def test_tasks_of_a_model_come_after_the_model_with_their_prefixes() -> None:
    """A model of several tasks has a state for each; what is no state is left out."""
    assert [*state_tree.tasks_of({"label_type": "x"})] == [("", {"label_type": "x"})]
    tasks = {"model_states": {"a": {"b": params()}, "c": None}}
    assert [*state_tree.tasks_of(tasks)] == [("", tasks), ("a.", {"b": params()})]
    assert [(each.task, each.prefix) for each in state_tree.embeddings_in(tasks)] == [("a.", "b.")]


def test_marks_are_what_flairs_crf_calls_them() -> None:
    """They are spelled out, for Flair is not imported to read a file."""
    assert {START_TAG, STOP_TAG} == state_tree.MARKS
