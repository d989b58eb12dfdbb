"""The page in a real browser: the right characters, everything as text, and usable by everyone."""

from __future__ import annotations

import json
import subprocess
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from flair.data import Dictionary
from flair.models import SequenceTagger, TextClassifier
from selenium.webdriver import ActionChains, Chrome, Keys

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, save_pretrained
from flair_peft.serving import create_app
from tests.support.browser import Page, chromium, needed
from tests.support.configs import lora
from tests.support.http_server import address_of
from tests.support.methods import perturb_
from tests.support.stand_in_answers import StandIn, StandInAnswers

HOSTILE = "<img src=x onerror=document.title='hacked'>"
BIDI = "safe\u202egnissim si"
ADMIN = "keep this"

ZOO_MODELS = {
    "sentiment": "text-classifier",
    "ner": "sequence-tagger",
    "pos": "token-classifier",
    "relations": "relation-extractor",
    "rating": "text-regressor",
    "pair": "text-pair-classifier",
    "triple": "text-triple-classifier",
    "both": "multitask",
}


class Served(NamedTuple):
    """A server, and what is between it and its clients."""

    address: str
    app: FastAPI
    between: StandInAnswers

    def ask(self, inputs: Any, model: Any, **parameters: Any) -> Any:
        """Return what the server answers to whoever asks it without the page."""
        body = {"inputs": inputs, "model": model, **({"parameters": parameters} if parameters else {})}
        answer = httpx.post(f"{self.address}predict", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()


def _hostile(base: str) -> tuple[TextClassifier, SequenceTagger]:
    """Return a classifier and a tagger whose labels are markup, or turn what follows them."""
    labels, tags = Dictionary(add_unk=False), Dictionary(add_unk=False)
    for label in (HOSTILE, BIDI, "plain"):
        labels.add_item(label)
        for place in "BIES":
            tags.add_item(f"{place}-{label}")
    document = PeftTransformerDocumentEmbeddings(base, peft_config=lora())
    word = PeftTransformerWordEmbeddings(base, peft_config=lora())
    classifier = TextClassifier(document, label_type="odd", label_dictionary=labels)
    options = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False}
    tagger = SequenceTagger(word, tag_dictionary=tags, tag_type="odd", **options)
    for model in (classifier, tagger):
        perturb_(model, seed=0, scale=0.3)
    return classifier.eval(), tagger.eval()


@pytest.fixture(scope="module")
def paths(
    base: Callable[[str], str], directories: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return where a checkpoint of each kind of model lies."""
    folder = tmp_path_factory.mktemp("odd")
    found = {name: directories[kind] for name, kind in ZOO_MODELS.items()}
    for name, model in zip(("odd", "odd-tags"), _hostile(base("bert")), strict=True):
        save_pretrained(model, folder / name)
        found[name] = str(folder / name)
    return found


@pytest.fixture(scope="module")
def server(paths: dict[str, str]) -> Iterator[Served]:
    """Serve all of them, below a path of another app."""
    app = create_app(paths, admin_token=ADMIN)
    outer = FastAPI()
    outer.mount("/nlp", app)
    between = StandInAnswers(outer)
    with address_of(between) as address:
        yield Served(f"{address}/nlp/", app, between)
    app.state.service.close()


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    """Start one browser for all tests."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(driver: Chrome, server: Served) -> Iterator[Page]:
    """Open the page anew; at the end the browser has nothing to complain of, no broken policy either."""
    server.between.answers.clear()
    server.between.bodies.clear()
    opened = Page(driver, server.address)
    yield opened
    assert opened.complaints() == []


def span(text: str, start: int, end: int, group: str = "X", score: float = 0.5) -> dict[str, Any]:
    return {"entity_group": group, "score": score, "word": text[start:end], "start": start, "end": end}


TEXTS = {
    "ascii": "George Washington went to Washington. Angela Merkel lives in Berlin.",
    "emoji": "😀 George 👩‍👩‍👧 went 🇩🇪 to 👨🏽‍🚀 Berlin 𝒳𝒴.",
    "combining": "Cafe\u0301 E\u0301cole Na\u0308hte went to Zu\u0308rich.",
    "right to left": "ولد محمد في القاهرة.\nשלום Anna Maria, אני גר בתל אביב.",
    "line ends": "George went\r\nto Berlin\r\n\r\nand\tthen\tto Paris.",
}


def _with_accents(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the place of a span with the letters that its accents are on, and the accents that its letters have."""
    while start and unicodedata.combining(text[start]):
        start -= 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return start, end


@pytest.mark.parametrize("model", ["odd-tags", "pos"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_page_marks_the_characters_that_the_server_means(page: Page, server: Served, text: str, model: str) -> None:
    """What is marked is the text between the offsets of the answer, and around the marks nothing is lost."""
    page.run(text, [model])
    sent = server.between.bodies[-1]["inputs"]
    assert sent == text.replace("\r\n", "\n")  # what a browser makes of a field of text
    (panel,) = page.panels(model)
    answer = server.ask(sent, model)
    expected = []
    for each in answer:
        start, end = _with_accents(sent, each["start"], each["end"])
        expected.append((each["start"], each["end"], sent[start:end]))
        if model == "pos" and (start, end) != (each["start"], each["end"]) and start < each["start"]:
            expected.pop()  # an accent that is a token: its label stands with that of its letter
    assert expected
    assert page.spans(panel) == sorted(expected)
    assert page.text(panel) == sent
    assert len(page.all(".read .chip")) == len(answer)


@pytest.mark.parametrize("model", ["ner", "pos"])
def test_page_cuts_through_no_visible_character(page: Page, server: Served, model: str) -> None:
    """A span that begins or ends inside a cluster, as between a letter and its accent, marks all of that."""
    text = "a👩‍👩‍👧b e\u0301x"
    family = text.index("b")
    spans = [span(text, 1, 2), span(text, 3, 4, "Y"), span(text, family + 2, family + 3), span(text, 0, 1)]
    server.between.answers[text] = StandIn(content=spans)
    page.run(text, [model])
    drawn = {(start, end): marked for start, end, marked in page.spans(page.panels(model)[0])}
    assert drawn[0, 1] == "a"
    assert drawn[1, 2] == text[1:family]
    assert drawn[family + 2, family + 3] == "e\u0301"
    assert page.text(page.panels(model)[0]) == text
    assert len(page.all(".panel .chip")) == 4


def test_page_spans_that_overlap_are_each_whole_and_labelled_once(page: Page, server: Served) -> None:
    """Nested, crossing and equal spans keep their characters, and one label each at their end."""
    text = "one two three four five\nsix seven"
    places = [(0, 13), (4, 7), (4, 18), (8, 28), (8, 28), (14, 33), (0, 33)]
    spans = [span(text, start, end, f"L{number}", 0.25) for number, (start, end) in enumerate(places)]
    server.between.answers[text] = StandIn(content=spans)
    page.run(text, ["ner"])
    (panel,) = page.panels("ner")
    assert page.spans(panel) == sorted((start, end, text[start:end]) for start, end in places)
    assert page.text(panel) == text
    labels = [label.text for label in page.all(".panel .chip .label")]
    assert sorted(labels) == [f"L{number}" for number in range(len(places))]
    # The label of a span stands where the span ends.
    for label in page.all(".panel .chip"):
        before = page.script(
            "const range = document.createRange(); range.setStart(arguments[0].closest('.read'), 0);"
            "range.setEndBefore(arguments[0]); const part = range.cloneContents();"
            "part.querySelectorAll('.chip').forEach((chip) => chip.remove()); return part.textContent.length",
            label,
        )
        assert before == places[int(label.text[1])][1]


def test_page_all_spans_in_one_text_say_by_which_model(page: Page, server: Served) -> None:
    """Spans of several taggers stand in one text, each with the name of its model."""
    page.one("#together").click()
    page.run(TEXTS["ascii"], ["ner", "odd-tags", "sentiment"])
    answers = server.ask(TEXTS["ascii"], ["ner", "odd-tags"])
    (panel,) = page.panels("ner + odd-tags")
    assert len(page.spans(panel)) == len(
        {(s["start"], s["end"], s["entity_group"]) for a in answers.values() for s in a}
    )
    summary = panel.find_element("css selector", ".proof summary").text
    for model in httpx.get(f"{server.address}info").json()["models"]:
        assert (model["adapter_digest"][:10] in summary) is (model["name"] in answers)
    assert {by.text for by in page.all(".by")} == {name for name, answer in answers.items() if answer}
    assert page.text(panel) == TEXTS["ascii"]
    assert len(page.panels("sentiment")) == 1


def test_page_labels_and_texts_are_text_whatever_they_hold(page: Page, server: Served) -> None:
    """Markup in labels, names and texts is shown as it is written, and does nothing."""
    text = "<script>document.title='hacked'</script> <b>George</b> &amp; Berlin"
    page.run(text, ["odd", "odd-tags"])
    answer = server.ask(text, "odd", top_k="all")
    assert {each["label"] for each in answer} == {HOSTILE, BIDI, "plain"}
    assert [label.text for label in page.all(".bars .label")] == [each["label"] for each in answer]
    assert page.text(page.panels("odd-tags")[0]) == text
    assert {s["entity_group"] for s in server.ask(text, "odd-tags")} == {
        label.get_attribute("textContent") for label in page.all(".read .label")
    }
    assert not page.all(".results img, .results script, .results b, .models img")
    assert page.driver.title == "Models served by flair_peft"
    # A label that turns the direction of what follows keeps that to itself.
    isolated = "return getComputedStyle(arguments[0]).unicodeBidi"
    assert {page.script(isolated, label) for label in page.all(".results .label")} == {"isolate"}
    assert "\u202e" not in page.one("#curl").text


def test_page_labels_are_bars_as_long_as_their_scores(page: Page, server: Served) -> None:
    """All classes are shown, the best first, with bars of the length of their scores."""
    page.run(TEXTS["ascii"], ["sentiment"])
    answer = server.ask(TEXTS["ascii"], "sentiment", top_k="all")
    assert len(answer) == 3
    assert [label.text for label in page.all(".bar .label")] == [each["label"] for each in answer]
    shares = [page.script("return arguments[0].offsetWidth / arguments[0].parentNode.offsetWidth", bar)
              for bar in page.all(".filled")]  # fmt: skip
    assert shares == pytest.approx([each["score"] for each in answer], abs=0.01)
    page.one("#all-labels").click()
    page.run()
    assert [label.text for label in page.all(".bar .label")] == [
        each["label"] for each in server.ask(TEXTS["ascii"], "sentiment")
    ]


_PLACES = """
return ['.word', '.chip'].map((part) => arguments[0].querySelector(part).getBoundingClientRect().toJSON());
"""


def test_page_labels_stand_under_their_tokens(page: Page) -> None:
    """The label of a token is below it and in the same place from left to right."""
    page.run(TEXTS["ascii"], ["pos"])
    tokens = page.all(".token")
    assert len(tokens) > 10
    for token in tokens:
        word, chip = page.script(_PLACES, token)
        assert chip["top"] >= word["bottom"] - 1
        assert abs((chip["left"] + chip["right"]) - (word["left"] + word["right"])) < 3


def test_page_tokens_of_right_to_left_text_stand_in_its_order(page: Page) -> None:
    """Tokens with labels run from right to left, and English words among them from left to right."""
    page.run("שלום Anna Maria אביב", ["pos"])
    left = {word.text: word.location["x"] for word in page.all(".word")}
    assert left["שלום"] > left["Maria"] > left["Anna"] > left["אביב"]


def test_page_models_of_other_inputs_get_what_they_take(page: Page, server: Served) -> None:
    """Pairs, triples and given entities have fields that appear with the models that take them."""
    page.tick("sentiment")
    assert not any(page.one(f"#{name}").is_displayed() for name in ("second", "third", "entities"))
    page.tick("pair", "triple", "relations", "rating", "both")
    text = "Steve Jobs founded Apple 🍎 in California, and Apple grew."
    page.write("It was he.", "second")
    page.write("Was it?", "third")
    page.write("Steve Jobs = PER\nApple=ORG\n\nCalifornia = LOC", "entities")
    page.run(text)
    pair, triple = {"text": text, "text_pair": "It was he."}, {"texts": [text, "It was he.", "Was it?"]}
    ends = [(0, 10, "PER"), (19, 24, "ORG"), (30, 40, "LOC"), (46, 51, "ORG")]
    given = {"text": text, "entities": [{"start": s, "end": e, "entity_group": g} for s, e, g in ends]}
    assert [text[s:e] for s, e, _ in ends] == ["Steve Jobs", "Apple", "California", "Apple"]
    asked = {json.dumps(body["inputs"]) for body in server.between.bodies}
    assert asked == {json.dumps(each) for each in (text, pair, triple, given)}

    for name, inputs in (("pair", pair), ("triple", triple)):
        (panel,) = page.panels(name)
        best = panel.find_element("css selector", ".best .label").text
        assert best == server.ask(inputs, name)[0]["label"]
    number = float(page.panels("rating")[0].find_element("css selector", ".number").text)
    assert number == pytest.approx(server.ask(text, "rating")["value"], rel=1e-4)
    assert [task.text for task in page.all(".task")] == list(server.ask(text, "both"))


def test_page_relations_show_both_ends_in_list_and_text(page: Page, server: Served) -> None:
    """A relation names its ends; whoever goes to it sees them in the text."""
    text = "Anna 😀 works for Apple, and Bob for Google."
    ends = [span(text, 0, 4, "PER"), span(text, 17, 22, "ORG"), span(text, 28, 31, "PER"), span(text, 36, 42, "ORG")]
    relations = [{"label": "works_for", "score": 0.875, "head": ends[i], "tail": ends[i + 1]} for i in (0, 2)]
    server.between.answers[text] = StandIn(content=relations)
    page.run(text, ["relations"])
    rows = page.all(".relation")
    assert [[end.text for end in row.find_elements("css selector", ".end")] for row in rows] == [
        ["Anna", "Apple"], ["Bob", "Google"]
    ]  # fmt: skip
    assert "works_for" in rows[0].text
    assert "0.88" in rows[0].text
    assert [text for _, _, text in page.spans(page.panels("relations")[0])] == ["Anna", "Apple", "Bob", "Google"]
    rows[1].send_keys(Keys.ENTER)
    assert rows[1].get_attribute("aria-pressed") == "true"
    assert [mark.get_attribute("data-start") for mark in page.all(".shown")] == ["28", "36"]


def test_page_two_models_stand_side_by_side_and_stacked_on_a_phone(page: Page) -> None:
    """Each model has a column; on a phone they follow each other."""
    page.run(TEXTS["ascii"], ["ner", "sentiment"])
    first, second = (group.rect for group in page.all(".group"))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    page.resize(360, 740)
    first, second = (group.rect for group in page.all(".group"))
    assert first["x"] == second["x"]
    assert first["y"] + first["height"] <= second["y"]


def _shown(score: float) -> str:
    if 0.995 <= score < 1:
        return "> 0.99"
    return "< 0.01" if 0 < score < 0.005 else f"{score:.2f}"


def test_page_answers_with_and_without_the_adapter_stand_side_by_side(page: Page, server: Served) -> None:
    """Both are what the server answers, they differ, and each says which it is."""
    text = TEXTS["ascii"]
    page.one("#compare").click()
    page.run(text, ["sentiment", "ner"])
    on, off = (server.ask(text, "sentiment", top_k="all", **extra) for extra in ({}, {"adapter": False}))
    assert on != off
    panels = page.panels("sentiment")
    assert [panel.find_element("css selector", ".state").text for panel in panels] == ["Adapter on", "Adapter off"]
    assert panels[0].rect["y"] == panels[1].rect["y"]
    for panel, answer in zip(panels, (on, off), strict=True):
        shown = [score.text for score in panel.find_elements("css selector", ".bar .score")]
        assert shown == [_shown(each["score"]) for each in answer]
    proofs = [panel.find_element("css selector", ".proof summary").text for panel in panels]
    digest = next(m for m in httpx.get(f"{server.address}info").json()["models"] if m["name"] == "sentiment")
    assert digest["adapter_digest"][:10] in proofs[0]
    assert "off" in proofs[1]
    assert all(digest["base_fingerprint"][:10] in proof for proof in proofs)
    assert len(page.panels("ner")) == 2


def test_page_proof_is_that_of_the_answer_and_not_of_the_list(page: Page, server: Served) -> None:
    """Digest and fingerprint are read from the headers of the answer, in the order of its models."""
    text = "proof"
    headers = {"x-adapter-digest": f"{'a' * 64},{'b' * 64}", "x-base-fingerprint": f"{'c' * 64},{'d' * 64}"}
    server.between.answers[text] = StandIn(content={"ner": [], "pos": []}, headers=headers)
    page.run(text, ["ner", "pos"])
    for name, (digest, base) in {"ner": "ac", "pos": "bd"}.items():
        proof = page.panels(name)[0].find_element("css selector", ".proof")
        assert proof.find_element("css selector", "summary").text == f"Adapter {digest * 10} · base {base * 10}"
        proof.find_element("css selector", "summary").click()
        assert [row.text for row in proof.find_elements("css selector", "dd")] == [digest * 64, base * 64]


def test_page_is_used_from_the_keyboard_alone(page: Page, server: Served) -> None:
    """Tab goes to everything in the order of the page, and shows where; Space ticks, Ctrl and Enter run."""
    keys = ActionChains(page.driver)
    page.script("document.activeElement.blur()")
    keys.send_keys(Keys.TAB).perform()
    assert page.driver.switch_to.active_element.text == "Skip to the results"
    visited = []
    for _ in range(8):
        keys.send_keys(Keys.TAB).perform()
        active = page.driver.switch_to.active_element
        visited.append(active.get_attribute("id") or active.tag_name)
        assert page.script("return getComputedStyle(arguments[0]).outlineStyle", active) != "none"
        if visited[-1] == "text":
            active.send_keys("George Washington went to Berlin.")
        if visited[-1] == "model-0":
            chosen = active.is_selected()
            active.send_keys(Keys.SPACE)
            assert active.is_selected() is not chosen
    assert visited[:3] == ["a", "example", "text"]
    assert visited[3:] == [f"model-{index}" for index in range(5)]
    page.tick("ner")
    keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.wait(lambda: page.all(".group"))
    page.wait_for_answer()
    assert page.spans(page.panels("ner")[0])
    assert page.status.startswith("1 answer in ")  # read aloud: it is a live region
    skip = page.one(".skip")
    page.script("arguments[0].focus()", skip)
    keys.send_keys(Keys.ENTER).perform()
    assert page.driver.switch_to.active_element.get_attribute("id") == "results"


def test_page_every_field_has_a_name_and_the_page_a_language(page: Page) -> None:
    """What a screen reader says of each field is written somewhere."""
    page.one("#access summary").click()
    page.run(TEXTS["ascii"], ["pair", "triple", "relations", "ner"])
    assert page.one("html").get_attribute("lang") == "en"
    fields = [field for field in page.all("input, textarea, button, summary, [tabindex='0']") if field.is_displayed()]
    assert len(fields) > 20
    assert [field.get_attribute("outerHTML") for field in fields if not (field.accessible_name or field.text)] == []


CURL_TEXT = "It's $HOME `date` \\n \"quoted\" 😀 !! \u202eeil\u202c\n'second' line\t%s"


@pytest.mark.parametrize("repeated", [1, 1500])
def test_page_curl_command_gets_the_same_answer(page: Page, server: Served, repeated: int) -> None:
    """What is copied runs in a shell as it stands, whatever the text holds and however long, and prints the answer."""
    needed("curl")
    text = CURL_TEXT * repeated
    if repeated > 1:  # the models would take long
        server.between.answers[text] = StandIn(content={"ner": [], "sentiment": []})
    page.run(text, ["ner", "sentiment"])
    command = _copied(page)
    assert page.one("#curl").get_attribute("textContent")[:4900] == command[:4900]
    printed = subprocess.run(["sh"], input=command.encode(), capture_output=True, timeout=60, check=True).stdout
    assert json.loads(printed) == server.ask(text, ["ner", "sentiment"], top_k="all")
    assert server.between.bodies[1] == server.between.bodies[0]


def _copied(page: Page) -> str:
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(page.address))
    permissions = {"origin": origin, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.one("#copy").click()
    page.wait(lambda: page.one("#copy").text == "Copied")
    return page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")


def test_page_model_that_was_unloaded_is_said_to_be_gone(page: Page, server: Served, paths: dict[str, str]) -> None:
    """The server's own sentences are shown, nothing answers in its place, and the list of models is read again."""
    admin = {"Authorization": f"Bearer {ADMIN}"}
    body = {"name": "passing", "source": paths["ner"]}
    assert httpx.post(f"{server.address}models", json=body, headers=admin, timeout=60).status_code == 200
    page.driver.refresh()
    page.wait(lambda: page.all(".model"))
    page.tick("passing")
    assert httpx.delete(f"{server.address}models/passing", headers=admin).status_code == 200
    page.run("George")
    said = httpx.post(f"{server.address}predict", json={"inputs": "George", "model": "passing"}).json()["error"]
    assert [problem.text for problem in page.all("[role=alert] .problem")] == [f"passing: {said}"]
    assert not page.all(".group")
    page.wait(lambda: "passing" not in [label.text for label in page.all(".model label")])


def test_page_asks_for_the_token_and_keeps_it_to_itself(driver: Chrome, paths: dict[str, str]) -> None:
    """Without it the server's sentences are shown; it goes into no storage, no command and no address."""
    app = create_app({"ner": paths["ner"]}, token="sécret ☃")
    with address_of(app) as address:
        page = Page(driver, f"{address}/")
        assert "Cannot answer without a token" in page.one(".problem").text
        field = page.one("#token")
        assert field.is_displayed()
        field.send_keys("wrong", Keys.ENTER)
        time.sleep(0.2)
        assert not page.all(".model")
        field.clear()
        field.send_keys("sécret ☃", Keys.ENTER)
        page.wait(lambda: page.all(".model"))
        page.run("George Washington")
        assert len(page.panels("ner")) == 1
        assert '-H "Authorization: Bearer $TOKEN"' in page.one("#curl").text
        kept = "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert "cret" not in page.script(kept) + page.one("#curl").text
        field.clear()
        field.send_keys("wrong")
        page.run()
        assert "Cannot answer without a token" in page.one("[role=alert] .problem").text
        assert page.complaints() == []
    app.state.service.close()


def test_page_server_that_is_gone_and_answers_that_are_none_are_said(page: Page, server: Served) -> None:
    """What did not come from the server has sentences of the page; what asks for a pause says for how long."""
    server.between.answers["busy"] = StandIn(
        content={"error": "Too many wait."}, status=503, headers={"retry-after": "7"}
    )
    server.between.answers["odd"] = StandIn(content="<html>", status=502)
    page.run("busy", ["ner"])
    assert page.one("[role=alert] .problem").text == "ner: Too many wait. It asks for a pause of 7 s."
    page.run("odd", ["ner"])
    assert "The answer was 502" in page.one("[role=alert] .problem").text
    page.driver.set_network_conditions(offline=True, latency=0, throughput=1 << 20)
    try:
        page.run("George", ["ner"])
        assert "could not reach its server" in page.one("[role=alert] .problem").text
    finally:
        page.driver.delete_network_conditions()
    server.between.answers["other"] = StandIn(content={"ner": 1})
    page.run("other", ["ner"])
    assert page.status.startswith("The answer cannot be shown")
    page.run("George", ["ner"])
    assert not page.all(".problem")
    expected = ("ERR_INTERNET_DISCONNECTED", "TypeError")
    assert all(any(each in message for each in expected) for message in page.complaints())


def test_page_answer_that_comes_late_is_not_shown(page: Page, server: Served) -> None:
    """A second run gives the first one up, whichever is answered first."""
    server.between.answers["first"] = StandIn(content=[span("first", 0, 5, "FIRST")], seconds=1.0)
    server.between.answers["second"] = StandIn(content=[span("second", 0, 6, "SECOND")], seconds=0.1)
    page.tick("ner")
    page.write("first")
    page.one("#run").click()
    page.wait(lambda: server.between.bodies)
    page.run("second")
    assert page.text(page.panels("ner")[0]) == "second"
    shown = page.one("#results").get_attribute("innerHTML")
    time.sleep(1.2)
    assert page.one("#results").get_attribute("innerHTML") == shown


_WAITING = """
const style = getComputedStyle(document.getElementById('waiting'), '::before');
return [style.opacity, style.animationName];
"""


def test_page_answer_that_takes_long_is_awaited_visibly_and_can_be_stopped(page: Page, server: Served) -> None:
    """Something says that it runs, for how long, and Stop ends it; nothing moves for those who want no motion."""
    server.between.answers["slow"] = StandIn(content=[], seconds=4.0)
    page.prefer("light", motion="reduce")
    page.tick("ner")
    page.write("slow")
    page.one("#run").click()
    page.wait(lambda: page.one("#results").get_attribute("aria-busy") == "true")
    assert page.status == "Running …"
    page.wait(lambda: page.script(_WAITING) == ["1", "none"])
    page.one("#stop").click()
    assert page.status == "Stopped."
    assert page.script(_WAITING)[0] == "0"
    time.sleep(0.2)
    assert not page.all(".group")


def test_page_asks_nobody_but_its_server(page: Page, server: Served) -> None:
    """Everything that the page loads and asks comes from the address that it came from."""
    page.one("#example").click()
    page.wait_for_answer()
    page.wait(lambda: page.all(".group"))
    loaded = page.script(
        "return performance.getEntries().map((entry) => entry.name).filter((name) => name.includes(':'))"
    )
    assert len(loaded) >= 5
    assert {urlsplit(name).netloc for name in loaded} == {urlsplit(server.address).netloc}
    assert all(name.startswith(server.address) for name in loaded)
    policy = httpx.get(server.address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


def test_page_before_anything_runs_has_an_example(page: Page) -> None:
    """One button shows what the models do, whichever are ticked."""
    assert page.one(".empty").is_displayed()
    page.tick("ner", "pair", "triple", "relations")
    page.one("#example").click()
    page.wait_for_answer()
    page.wait(lambda: page.all(".group"))
    assert not page.all(".problem")
    assert len(page.all(".group")) == 4


_OUTSIDE = """
const all = [...document.querySelectorAll('.panel *')];
return all.filter((element) => element.getBoundingClientRect().right > innerWidth).length;
"""


@pytest.mark.parametrize("width", [320, 360])
def test_page_on_a_phone_is_never_wider_than_it(page: Page, server: Served, width: int) -> None:
    """Long words, long labels and long names wrap."""
    page.resize(width, 740)
    word = "Donaudampfschifffahrtsgesellschaft" * 5
    text = f"{word} https://example.org/{'x' * 200} Berlin"
    long_label = "a_label_without_any_blank_" * 8
    pieces = [span(text, 0, len(word), long_label), span(text, len(word) + 1, len(word) + 180, "two words " * 20)]
    server.between.answers[text] = StandIn(
        content={"ner": pieces, "pos": pieces, "sentiment": [{"label": long_label, "score": 0.5}]}
    )
    page.one("#compare").click()
    page.one("#access summary").click()
    page.run(text, ["ner", "pos", "sentiment"])
    for details in page.all(".panel summary"):
        details.click()
    assert page.script("return document.documentElement.scrollWidth") <= width
    assert page.script(_OUTSIDE) == 0


_CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const ground = (node) => { for (; node; node = node.parentElement) {
  const colour = rgb(getComputedStyle(node).backgroundColor); if (colour[3] === 255) return colour; } };
return [...document.querySelectorAll(arguments[0])].filter((node) => node.getClientRects().length).map((node) => {
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05); });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_everything_that_is_written_can_be_read(page: Page, server: Served, scheme: str) -> None:
    """All text has the contrast that WCAG asks of small text, on labels of every colour, in light and in dark."""
    page.prefer(scheme)
    text = "abcdefghijklmnopqrstuvwxyz"
    spans = [span(text, index, index + 1, f"hue {index}") for index in range(16)]
    server.between.answers[text] = StandIn(content={"ner": spans, "pos": spans})
    page.run(text, ["ner", "pos"])
    assert (
        len(
            {
                name
                for chip in page.all(".kind-spans .span")
                for name in chip.get_attribute("class").split()
                if "hue" in name
            }
        )
        == 12
    )
    for selector in (
        ".label",
        ".score",
        ".span",
        ".word",
        ".quiet",
        ".about",
        ".about bdi",
        "label",
        "button",
        "summary",
        "h1 .chip *",
        "pre",
        "a",
        ".hint",
    ):
        found = page.script(_CONTRASTS, selector)
        assert found or selector in (".hint",), selector
        assert min(found, default=9) >= 4.5, selector
    page.run("", ["ner"])
    server.between.answers["bad"] = StandIn(content={"error": "Refused."}, status=422)
    page.run("bad", ["ner"])
    assert min(page.script(_CONTRASTS, ".problem, .problem bdi")) >= 4.5


_WATCH = """
window.steps = 0;
const answers = document.getElementById('answers');
new MutationObserver(() => (window.steps += 1)).observe(answers, {childList: true, subtree: true});
"""
_EMPTY_MARKS = """
return [...document.querySelectorAll('.read .span')].filter((mark) => !mark.firstChild.data).length;
"""
_LAYOUTS = """
const answers = document.getElementById('answers');
const layout = (width) => {
  const start = performance.now();
  answers.style.width = width;
  document.body.offsetHeight;
  return performance.now() - start;
};
const asItIs = layout('700px');
const sheet = new CSSStyleSheet();
sheet.replaceSync('.block { content-visibility: visible !important; }');
document.adoptedStyleSheets.push(sheet);
layout('800px');
const inSight = layout('700px');
document.adoptedStyleSheets.pop();
return [asItIs, inSight];
"""


def test_page_long_text_with_many_spans_stays_responsive(page: Page, server: Served) -> None:
    """10,000 spans in 100,000 characters are drawn bit by bit, and what is out of sight costs nothing."""
    text = "word 😀bcd " * 10_000
    step = len("word 😀bcd ")
    server.between.answers[text] = StandIn(content=[span(text, at, at + 4) for at in range(0, len(text), step)])
    page.tick("ner")
    page.write(text)
    page.script(_WATCH)
    page.one("#run").click()
    page.wait(lambda: page.all(".read[aria-busy]") or page.all(".read"))
    page.wait_for_answer()
    assert page.script("return document.querySelectorAll('.span[data-start]:not(.cut-start)').length") == 10_000
    assert page.text(page.panels("ner")[0]) == text
    assert page.script(_EMPTY_MARKS) == 0
    last = page.script("return [...document.querySelectorAll('.span[data-start]')].at(-1).firstChild.data")
    assert last == "word"
    # With each change of its width the page would take long to lay all of it out.
    as_it_is, all_in_sight = page.script(_LAYOUTS)
    assert as_it_is < all_in_sight / 4
    assert page.script("return window.steps") > 1


def test_page_styles_the_list_of_requests(page: Page, server: Served) -> None:
    """The page that describes requests is reached from this one, and breaks no policy either."""
    page.one("nav a").click()
    page.wait(lambda: "openapi" in page.driver.page_source)
    assert page.driver.current_url == f"{server.address}docs"
