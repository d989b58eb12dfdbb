"""What is served is what ``predict`` says: of every kind of model, in batches with others, at the right characters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from flair.data import Sentence
from flair.nn import Model

import flair_peft
from flair_peft.serving import create_app
from tests.support import tiny
from tests.support.direct_answers import assert_same, direct
from tests.support.http_server import client_of
from tests.support.models import make, save_random
from tests.support.zoo import ZOO

TEXTS = [*tiny.CORPUS, "Who ?", "Angela Merkel met Steve Jobs ; he left Apple in California ."]
ENTITIES = [
    {"start": 0, "end": 13, "entity_group": "PER"},
    {"start": 18, "end": 28, "entity_group": "PER"},
    {"start": 39, "end": 44, "entity_group": "ORG"},
]
PAIR = {"text": "A dog runs .", "text_pair": "It is asleep ."}
INPUTS: dict[str, list[Any]] = {
    "text": TEXTS,
    "pair": [PAIR, {"texts": ["No .", "Yes , it rains in Berlin ."]}],
    "triple": [{"texts": ["A dog runs .", "It sleeps .", "Is that so ?"]}, {"texts": ["A", "b", "c"]}],
    "entities": [{"text": TEXTS[-1], "entities": ENTITIES}, {"text": TEXTS[0], "entities": []}],
}
Directories = dict[str, str]


@pytest.fixture(scope="module")
def alone(directories: Directories) -> Callable[[str], Model]:
    """Return a function from the name of a model to the model, loaded apart from all others."""
    loaded: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in loaded:
            loaded[name] = flair_peft.from_pretrained(directories[name])
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def about(address: str) -> dict[str, Any]:
    """Return name → what the server says of a model."""
    return {model["name"]: model for model in httpx.get(f"{address}/info").json()["models"]}


def expected(model: Model, said: dict[str, Any], given: list[Any], **options: Any) -> list[Any]:
    """Return what the model itself says of a list of inputs."""
    types = getattr(model, "entity_label_types", None) or (
        getattr(model, "entity_label_type", None) or getattr(model, "_span_label_type", None) or said["label_type"],
    )
    return direct(model, given, said["kind"], label_type=said["label_type"], entity_types=tuple(types), **options)


def ask(client: httpx.Client, inputs: Any, model: Any, **parameters: Any) -> Any:
    """Return the answer to a request."""
    answer = client.post("/predict", json={"inputs": inputs, "model": model, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_answers_of_every_kind_of_model_are_those_of_predict(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """One by one and as a list, for every class of models that is served."""
    for name, said in about.items():
        if said["kind"] == "tasks":
            continue
        given = INPUTS[said["takes"]]
        assert_same(ask(client, given, name), expected(alone(name), said, given), said["kind"])
        answer = ask(client, given[0], name)
        assert_same([answer], expected(alone(name), said, given[:1]), said["kind"])


def test_answers_of_a_multitask_model_are_those_of_each_task(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """By the name of the task, in the form of its kind."""
    answers = ask(client, TEXTS, "multitask")
    for name, task in about["multitask"]["tasks"].items():
        found = direct(alone("multitask"), TEXTS, task["kind"], label_type=task["label_type"])
        assert_same([answer[name] for answer in answers], found, task["kind"])


def test_answers_to_a_crowd_are_those_to_each_alone(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """Requests of many clients to many models share batches, and nothing of one is in the answer to another."""
    dice = random.Random(1)
    names = [name for name, said in about.items() if said["kind"] != "tasks"]
    asked = []
    for _ in range(120):
        name = dice.choice(names)
        asked.append((name, dice.choices(INPUTS[about[name]["takes"]], k=dice.choice([1, 1, 2, 5, 40]))))
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda each: ask(client, each[1], each[0]), asked))
    for (name, given), answer in zip(asked, answers, strict=True):
        assert_same(answer, expected(alone(name), about[name], given), about[name]["kind"])
    shared = [line for line in client.get("/metrics").text.splitlines() if "batch_requests_bucket" in line]
    assert shared[0].split()[-1] != shared[-1].split()[-1]  # not all batches had one request


def test_context_of_a_text_is_its_own_request_alone(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """A model that reads its neighbours reads those of the list, in its order, and never another client's."""
    name = "sequence-tagger-context"
    said, lists = about[name], [TEXTS[:4], TEXTS[4:5], TEXTS[5:] * 8, TEXTS[::-1]]
    by_predict = [expected(alone(name), said, given) for given in lists]
    with pytest.raises(AssertionError):  # it does read them
        assert_same(ask(client, TEXTS[1], name), by_predict[0][1:2], said["kind"])
    with ThreadPoolExecutor(16) as pool:
        for number, answer in pool.map(lambda n: (n % 4, ask(client, lists[n % 4], name)), range(32)):
            assert_same(answer, by_predict[number], said["kind"])


def test_several_models_on_one_text_answer_by_their_names(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """Also those that write labels of the same type, and those that need a call of their own."""
    names = ["sequence-tagger", "sequence-tagger-rnn-crf", "text-classifier", "sequence-tagger-tokens", "lemmatizer"]
    answers = ask(client, TEXTS, names)
    assert list(answers) == names
    for name in names:
        assert_same(answers[name], expected(alone(name), about[name], TEXTS), about[name]["kind"])
    assert list(ask(client, TEXTS[0], names[:1])) == names[:1]


def test_top_k_labels_are_the_best_of_all(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """``null`` and "all" give all of them, best first; labels of several models are cut for each."""
    name, multi = "text-classifier", "text-classifier-multi-label"
    every = {"return_probabilities_for_all_classes": True}
    scores = {each: expected(alone(each), about[each], TEXTS, **every) for each in (name, multi)}
    for top_k, most in ((None, None), ("all", None), (2, 2), (1, 1), (99, 99)):
        assert_same(ask(client, TEXTS, name, top_k=top_k), [each[:most] for each in scores[name]], "labels")
    both = ask(client, TEXTS, [multi, "sequence-tagger"], top_k=3)
    assert_same(both[multi], [each[:3] for each in scores[multi]], "labels")
    tags = expected(alone("sequence-tagger"), about["sequence-tagger"], TEXTS)
    assert_same(both["sequence-tagger"], tags, "spans")
    assert client.post("/predict", json=asking(TEXTS[0], "sequence-tagger", top_k=3)).json()["code"] == "no_top_k"


def asking(inputs: Any, model: Any, **parameters: Any) -> dict[str, Any]:
    """Return the body of a request."""
    return {"inputs": inputs, "model": model, "parameters": parameters}


def test_adapter_that_is_off_leaves_the_heads_on_the_base(
    client: httpx.Client, about: dict[str, Any], alone: Callable[[str], Model]
) -> None:
    """Only where it is asked for, and then the answer says so."""
    name = "text-classifier"
    model, body = alone(name), asking(TEXTS, name, adapter=False, top_k=None)
    every = {"return_probabilities_for_all_classes": True}
    with model.embeddings.model.disable_adapter():
        off = expected(model, about[name], TEXTS, **every)
    answer = client.post("/predict", json=body)
    assert answer.headers["X-Adapter"] == "off"
    assert_same(answer.json(), off, "labels")
    with pytest.raises(AssertionError):
        assert_same(ask(client, TEXTS, name, top_k=None), off, "labels")
    assert_same(ask(client, TEXTS, name), expected(model, about[name], TEXTS), "labels")


def test_proof_in_every_answer_is_that_of_the_files(
    client: httpx.Client, directories: Directories, about: dict[str, Any]
) -> None:
    """The digest is what the checkpoint says of itself and all its files, the fingerprint what it says of its base."""
    names = ["text-classifier", "sequence-tagger"]
    documents = [json.loads(Path(directories[name], "flair_peft.json").read_text()) for name in names]
    answer = client.post("/predict", json=asking("Who ?", names))
    assert answer.headers["X-Model"] == ",".join(names)
    assert answer.headers["X-Adapter-Digest"] == ",".join(document["sha256"] for document in documents)
    prints = answer.headers["X-Base-Fingerprint"].split(",")
    assert prints == [about[name]["base_fingerprint"] for name in names]
    assert all(found in json.dumps(document) for found, document in zip(prints, documents, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "  Berlin \t is\n\nlarge .  ",
        "I ❤️ Berlin 👩‍👩‍👧 and 🇩🇪 , no ?",
        "Zu\u0308rich is la\u0308rge .",  # combining marks
        "\u202bשלום עולם\u202c in Berlin .",
        "Berlin\u00a0is\u2003large\u200b .",
        "می\u200cخواهم Ber\u200blin \ufeffnow",
        "\ufeff\u200b Berlin",
        "A \u0093quoted\u0094 word\u0081 .",  # windows-1252
        "𝔘𝔫𝔦code 𠮷野家 is here",
        "one\u2028two\u2029three",
        "don't stop\u00adping , Mr. O'Neil 's \u00b4car\u00b4",
        "x" * 3000 + " end",
    ],
)
def test_positions_are_those_of_the_text_as_it_was_sent(client: httpx.Client, text: str) -> None:
    """For every word, whatever Flair leaves out or replaces: in code points, and ``word`` is what stands there."""
    answer = ask(client, text, "token-classifier")
    words = Sentence(text).tokens
    assert len(answer) == len(words)
    before = 0
    for found, token in zip(answer, words, strict=True):
        start, end = found["start"], found["end"]
        assert before <= start < end <= len(text)
        assert found["word"] == text[start:end]
        assert Sentence._handle_problem_characters(found["word"]) == token.text
        before = end


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u200b", "\ufeff \u200c"])
def test_text_without_words_has_an_empty_answer(client: httpx.Client, text: str) -> None:
    """As Flair gives it no label; beside others it takes nothing from them."""
    names = ["text-classifier", "sequence-tagger", "text-regressor", "lemmatizer", "token-classifier", "tars-tagger"]
    empty = {"text-regressor": {"value": None}}
    answers = ask(client, text, names)
    assert answers == {name: empty.get(name, []) for name in names}
    both = ask(client, [text, "Berlin is large ."], "text-classifier")
    assert both[0] == []
    assert both[1]


@pytest.mark.parametrize("model", ["text-classifier", ["text-classifier", "sequence-tagger"]])
def test_no_texts_have_no_answers(model: str | list[str], client: httpx.Client) -> None:
    """Nothing is waited for."""
    response = client.post("/predict", json={"model": model, "inputs": []}, timeout=20)
    assert response.status_code == 200
    assert response.json() == ([] if isinstance(model, str) else {name: [] for name in model})


def test_words_that_were_split_before_are_counted_as_sent(client: httpx.Client, alone: Callable[[str], Model]) -> None:
    """Positions are those in the words joined by blanks; empty words have none, but keep their numbers."""
    words = ["Berlin", "", "is", "larger than", "Zu\u200brich", "."]
    answer = ask(client, {"tokens": words}, "token-classifier")
    joined = " ".join(words)
    assert [words[each["first_token"]] for each in answer] == [word for word in words if word]
    assert all(each["first_token"] == each["last_token"] for each in answer)
    assert all(joined[each["start"] : each["end"]] == each["word"] == words[each["first_token"]] for each in answer)
    sentence = Sentence(words)
    alone("token-classifier").predict(sentence)
    assert [each["entity_group"] for each in answer] == [token.get_label("pos").value for token in sentence]


@pytest.fixture(scope="module")
def others(base: Callable[[str], str], directories: Directories, tmp_path_factory: Any) -> Iterator[httpx.Client]:
    """Return a client of models of other forms: a file, a live one, a plain one in a file and a merged one."""
    path = tmp_path_factory.mktemp("others")
    live = save_random("text-classifier", base("bert"), path / "live", seed=3)[1]
    plain = make(ZOO["sequence-tagger"], base("bert"), None, is_stock=True)
    plain.save(path / "plain.pt")
    flair_peft.from_pretrained(directories["text-classifier"]).save(path / "file.pt")
    models = {"file": path / "file.pt", "live": live, "plain": path / "plain.pt"}
    app = create_app(models)
    app.state.sources = {**models, "plain": plain.eval()}
    with client_of(app) as client:
        client.sources = app.state.sources  # type: ignore[attr-defined]
        yield client


def test_models_of_every_form_are_served(others: httpx.Client, alone: Callable[[str], Model]) -> None:
    """A ``.pt`` file on the shared base, a live model as it is, and a plain model of Flair's."""
    sources = others.sources  # type: ignore[attr-defined]
    for name, model in (("file", alone("text-classifier")), ("live", sources["live"])):
        found = direct(model, TEXTS, "labels", label_type="sentiment")
        assert_same(ask(others, TEXTS, name), found, "labels")
    found = direct(sources["plain"], TEXTS, "spans", label_type="ner")
    assert_same(ask(others, TEXTS, "plain"), found, "spans")


def test_proof_of_a_plain_model_is_that_it_has_none(others: httpx.Client) -> None:
    """Nothing stands for a digest, and its adapter cannot be switched off."""
    answer = others.post("/predict", json=asking("Who ?", ["plain", "file"]))
    digests = answer.headers["X-Adapter-Digest"].split(",")
    assert digests[0] == "none"
    assert len(digests[1]) == 64
    refused = others.post("/predict", json=asking("Who ?", "plain", adapter=False))
    assert (refused.status_code, refused.json()["code"]) == (422, "no_adapter")


def test_merged_model_answers_as_before(directories: Directories, alone: Callable[[str], Model]) -> None:
    """With the digest of the checkpoint that it was merged from."""
    with client_of(create_app({"ner": directories["sequence-tagger"]}, merge=True)) as client:
        found = direct(alone("sequence-tagger"), TEXTS, "spans", label_type="ner")
        answer = client.post("/predict", json={"inputs": TEXTS})
        assert_same(answer.json(), found, "spans")
        assert client.get("/info").json()["models"][0]["adapter"]["merged"] is True
        assert answer.headers["X-Adapter-Digest"] in Path(directories["sequence-tagger"], "flair_peft.json").read_text()
