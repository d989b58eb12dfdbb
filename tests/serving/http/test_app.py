"""The app: who may ask, how models come and go, what is told of them, and how it lives in other apps."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
from flair.models import LanguageModel, SequenceTagger, SpanClassifier
from flair.nn import Model
from safetensors.torch import load_file, save, save_file

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings, SharedBase
from flair_peft.base import base_cache
from flair_peft.errors import (
    AdapterConfigError,
    BaseMismatchError,
    BaseModelNotFoundError,
    FlairPeftError,
    ModelFileError,
)
from flair_peft.serving import create_app
from flair_peft.serving.http.model_forms import form_of
from tests.support.classic import dictionary
from tests.support.configs import lora
from tests.support.direct_answers import assert_same, direct
from tests.support.gated_model import GatedModel, wait_until
from tests.support.http_server import client_of
from tests.support.hub_stand_in import HubStandIn, online
from tests.support.models import classifier, save_random

ADMIN = {"Authorization": "Bearer the admin's"}
TEXTS = ["Berlin is large .", "Who ?", "I love this wonderful movie , it is great !"]
Directories = dict[str, str]


def bearer(token: str | bytes) -> dict[str, Any]:
    return {"Authorization": b"Bearer " + (token.encode() if isinstance(token, str) else token)}


@pytest.fixture
def live(base: Callable[[str], str]) -> Model:
    """Return a classifier."""
    return classifier(base("bert")).eval()


def test_model_that_holds_a_base_of_its_own_is_served_beside_those_that_share_one_of_that_name(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """What lies under a name was trained on; the file has what it was then."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    weights, models = load_file(folder / "model.safetensors"), {}
    for name, shift in (("own", 0.01), ("shared", 0.0)):
        save_file(
            {key: w + shift for key, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        _, model = save_random("text-classifier", str(folder), tmp_path / name)
        model.save(tmp_path / f"{name}.pt", save_base=name == "own")
        models[name] = tmp_path / f"{name}.pt"
    with client_of(create_app(dict(reversed(models.items())))) as client:
        for name, path in models.items():
            answers = client.post("/predict", json={"inputs": TEXTS, "model": name}).json()
            model = flair_peft.from_pretrained(path)
            expected = direct(model, TEXTS, "labels", label_type=model.label_type)
            assert_same(answers, expected, "labels")


def test_file_that_holds_its_base_is_served_where_that_lies_nowhere_else(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """As it is loaded; beside a dtype that its weights do not have, the reason is theirs."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    _, model = save_random("text-classifier", str(folder), tmp_path / "model")
    model.save(tmp_path / "whole.pt", save_base=True)
    with pytest.raises(BaseMismatchError, match="it holds weights of its base, which are not bit by bit these"):
        create_app({"m": tmp_path / "whole.pt"}, dtype="bfloat16")
    shutil.rmtree(folder)
    for options in ({"dtype": "bfloat16"}, {"base_model": str(folder)}):
        with pytest.raises(BaseModelNotFoundError):
            create_app({"m": tmp_path / "whole.pt"}, **options)
    with client_of(create_app({"m": tmp_path / "whole.pt"})) as client:
        answers = client.post("/predict", json={"inputs": TEXTS, "model": "m"}).json()
    assert_same(answers, direct(model, TEXTS, "labels", label_type=model.label_type), "labels")
    with pytest.raises(BaseModelNotFoundError):
        create_app({"m": tmp_path / "model"})


def test_token_is_asked_of_everyone_who_wants_to_know(live: Model) -> None:
    """Whether the process lives is for everyone, and so is the page, which holds nothing."""
    with client_of(create_app({"m": live}, token="süß and secret")) as client:
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        for headers in ({}, bearer("wrong"), bearer("süß and secre"), {"Authorization": "Basic x"}):
            for path in ("/info", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
            refused = client.post("/predict", json={"inputs": "Who ?"}, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "no_token")
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        answer = client.post("/predict", json={"inputs": "Who ?"}, headers=bearer("süß and secret"))
        assert answer.status_code == 200


@pytest.mark.parametrize("token", ["déjà", "Å", "\u2003x\u2003"])
def test_token_may_end_in_any_letter(live: Model, token: str) -> None:
    """The last byte of its UTF-8 may be what Latin-1 calls a space."""
    with client_of(create_app({"m": live}, token=token)) as client:
        assert client.get("/info", headers=bearer(token)).status_code == 200
        assert client.get("/info", headers=bearer(token + "x")).status_code == 401


def test_model_of_an_impossible_name_is_refused() -> None:
    """What is no path of this system is an error of this package."""
    with pytest.raises(ModelFileError, match="too long"):
        create_app({"m": "x" * 5000})


def test_models_are_changed_by_those_with_the_admin_token_alone(live: Model, directories: Directories) -> None:
    """Where there is none, by nobody; what a request names is not even looked for."""
    load = {"name": "new", "source": directories["text-classifier"]}
    with client_of(create_app({"m": live})) as client:
        for headers in ({}, bearer("x")):
            assert client.post("/models", json=load, headers=headers).status_code == 403
            assert client.delete("/models/m", headers=headers).status_code == 403
    with client_of(create_app({"m": live}, token="user", admin_token="admin")) as client:
        assert client.post("/models", json=load).status_code == 401
        for wrong in ("user", "x"):
            assert client.post("/models", json=load, headers=bearer(wrong)).status_code == 403
        assert client.delete("/models/m", headers=bearer("user")).status_code == 403
        assert client.post("/predict", json={"inputs": "a"}, headers=bearer("admin")).status_code == 200
        assert client.post("/models", json=load, headers=bearer("admin")).status_code == 200
        assert len(client.get("/info", headers=bearer("user")).json()["models"]) == 2


def test_model_that_is_replaced_answers_what_was_asked_of_it(
    base: Callable[[str], str], tmp_path: Path, directories: Directories
) -> None:
    """Its digest says which of the two answered; it is gone once nobody asks it."""
    directory, other = directories["text-classifier"], save_random("text-classifier", base("bert"), tmp_path / "o")[0]
    app = create_app({"m": directory}, admin_token="the admin's")
    found = {path: direct(flair_peft.from_pretrained(path), TEXTS, "labels", label_type="sentiment")
             for path in (directory, other)}  # fmt: skip
    old = app.state.service.models.get(["m"])[0]
    gated, gone = GatedModel(old.model), weakref.ref(old.model)
    with client_of(app) as client, ThreadPoolExecutor(4) as pool:
        gated.close()
        before = [pool.submit(client.post, "/predict", json={"inputs": TEXTS})]
        assert gated.arrived.wait(20)
        before += [pool.submit(client.post, "/predict", json={"inputs": TEXTS}) for _ in range(2)]
        wait_until(lambda: app.state.service.queue.waiting == 2 * len(TEXTS))
        load = pool.submit(client.post, "/models", json={"name": "m", "source": other}, headers=ADMIN)
        gated.gate.set()
        assert load.result().status_code == 200, load.result().text
        assert load.result().json()["adapter_digest"] != old.digest
        for answer in before:
            assert answer.result().headers["X-Adapter-Digest"] == old.digest
            assert_same(answer.result().json(), found[directory], "labels")
        after = client.post("/predict", json={"inputs": TEXTS})
        assert_same(after.json(), found[other], "labels")
        assert after.headers["X-Adapter-Digest"] == load.result().json()["adapter_digest"]
        assert old.shared is not None
        shared = old.shared
        del gated, old, before, load
        client.post("/predict", json={"inputs": "Who ?"})
        gc.collect()
        assert gone() is None
        assert len(shared.models) == 1


def test_model_that_is_unloaded_is_not_there(directories: Directories) -> None:
    """Nothing answers in its place; its name can be given again."""
    names = ("sequence-tagger", "text-classifier")
    with client_of(create_app({name: directories[name] for name in names}, admin_token="the admin's")) as client:
        assert client.delete("/models/text-classifier", headers=ADMIN).status_code == 200
        gone = client.post("/predict", json={"inputs": "Who ?", "model": "text-classifier"})
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")
        assert "'sequence-tagger'" in gone.json()["error"]
        assert client.delete("/models/text-classifier", headers=ADMIN).status_code == 404
        load = {"name": "text-classifier", "source": directories["text-classifier"]}
        assert client.post("/models", json=load, headers=ADMIN).status_code == 200
        assert client.post("/predict", json={"inputs": "Who ?", "model": names[1]}).status_code == 200


def test_model_that_cannot_be_loaded_leaves_the_one_that_is_there(
    live: Model, directories: Directories, tmp_path: Path
) -> None:
    """Whatever is wrong with it: what was served is served on."""
    damaged = shutil.copytree(directories["text-classifier"], tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no model")
    sources = [
        str(damaged),
        str(tmp_path / "empty"),
        str(tmp_path / "text.pt"),
        str(tmp_path / "none"),
        "no/such-model",
        "a" * 300,  # longer than any name of a file
    ]
    with client_of(create_app({"m": live}, admin_token="the admin's")) as client:
        for source in sources:
            refused = client.post("/models", json={"name": "m", "source": source}, headers=ADMIN)
            assert (refused.status_code, refused.json()["code"]) == (422, "not_loaded"), refused.text
            assert "Traceback" not in refused.text
            assert refused.json()["error"].count(". ") >= 2, refused.text
        assert client.post("/predict", json={"inputs": "Who ?", "model": "m"}).status_code == 200


def test_models_on_one_base_share_it(directories: Directories, live: Model) -> None:
    """A file, too; and the base goes with the last of them."""
    app = create_app({name: directories[name] for name in ("sequence-tagger", "text-classifier", "multitask")})
    shared = {id(model.shared) for model in app.state.service.models.all}
    assert len(shared) == 1


def test_models_share_a_base_in_another_cache_at_the_commit_of_the_training(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """As each of them finds it by itself: offline, and by its name after the repository moved on."""
    repo, other = "you/base", str(tmp_path / "other")
    with HubStandIn() as server, online(server, None, tmp_path / "first"):
        files = {path.name: path.read_bytes() for path in Path(base("bert")).iterdir()}
        server.add_repo(repo, files)
        sources = {name: save_random("text-classifier", repo, tmp_path / name, seed=1)[0] for name in ("a", "b")}
        base_cache._cache.clear()
        SharedBase(repo, cache_dir=other)
        shutil.rmtree(tmp_path / "first")
        weights = {name: tensor + 1 for name, tensor in load_file(Path(base("bert"), "model.safetensors")).items()}
        server.add_repo(repo, {**files, "model.safetensors": save(weights, {"format": "pt"})})
        server.requests.clear()
        for options in ({"local_files_only": True}, {"base_model": repo}):
            base_cache._cache.clear()
            app = create_app(sources, cache_dir=other, **options)
            first, second = app.state.service.models.all
            assert first.shared is second.shared is not None
            assert "local_files_only" not in options or not server.requests


def test_labels_of_spans_are_given_as_they_are_called(base: Callable[[str], str]) -> None:
    """A classifier of spans has no marks of positions in them."""
    words = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    model = SpanClassifier(words, dictionary("B-cell", "T-cell", "I-95"), span_label_type="ner")
    assert form_of(model).labels == ("B-cell", "T-cell", "I-95")
    tagger = SequenceTagger(words, dictionary("cell", "virus"), "ner", tag_format="BIOES", use_rnn=False)
    assert form_of(tagger).labels == ("cell", "virus")


def test_models_that_cannot_be_served_are_refused_with_the_reason(live: Model, tmp_path: Path) -> None:
    """When the app is made, and not when somebody asks them."""
    letters = flair_dictionary()
    with pytest.raises(AdapterConfigError, match="Cannot serve a LanguageModel"):
        create_app({"m": LanguageModel(letters, is_forward_lm=True, hidden_size=4, nlayers=1)})
    broken = GatedModel(live)
    broken.raises = lambda _: RuntimeError("out of order")
    with pytest.raises(AdapterConfigError, match="it does not predict for a plain text"):
        create_app({"m": live})
    with pytest.raises(FlairPeftError):
        create_app({"m": tmp_path / "nothing"})
    for name in ("", "a b", "a,b", "a\nb", "../a"):
        with pytest.raises(AdapterConfigError, match="names stand in headers"):
            create_app({name: live})


def test_merged_models_take_no_options_of_a_shared_base(live: Model) -> None:
    """They have no base that others share, and no adapter beside it: whoever gives both learns it."""
    for option, value in (("dtype", "bfloat16"), ("adapter_memory", "1MB")):
        with pytest.raises(AdapterConfigError, match=f"Leave out merge, or '{option}'"):
            create_app({"m": live}, merge=True, **{option: value})
    create_app({"m": live}, merge=True, dtype="float32")
    create_app({"m": live}, dtype="auto")


def flair_dictionary() -> Any:
    from flair.data import Dictionary

    dictionary = Dictionary(add_unk=True)
    dictionary.add_item("a")
    return dictionary


@pytest.mark.parametrize(
    "option",
    [{"batch": 0}, {"queue": -1}, {"max_wait": -1}, {"max_wait": "5"}, {"max_texts": 1.5}, {"batch_tokens": 0}],
)
def test_numbers_that_make_no_sense_are_refused(live: Model, option: dict[str, Any]) -> None:
    """Before anything is loaded."""
    with pytest.raises(AdapterConfigError, match=next(iter(option))):
        create_app({"m": live}, **option)


def test_app_mounts_into_another_app(live: Model) -> None:
    """Its thread starts with the first request, and ends when it is closed."""
    outer, app = fastapi.FastAPI(), create_app({"m": live})
    outer.mount("/nlp", app)
    with client_of(outer) as client:
        assert client.get("/nlp/ready").status_code == 200
        answer = client.post("/nlp/predict", json={"inputs": "Who ?"})
        assert answer.status_code == 200
        assert client.post("/nlp/predict", json={"inputs": 1}).json()["code"] == "malformed"
        for path in ("/nlp/", "/nlp/docs", "/nlp/openapi.json", "/nlp/info"):
            assert client.get(path).status_code == 200
        assert client.get("/nlp/health").headers["X-Content-Type-Options"] == "nosniff"
    app.state.service.close()
    assert not app.state.service.is_ready


def test_what_nobody_expected_is_answered_and_not_quoted(
    live: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A 500 in sentences; neither it nor the log repeats a message, which may quote the text."""
    app = create_app({"m": live})

    def submit(_: Any) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(app.state.service.queue, "submit", submit)
    with client_of(app) as client:
        failed = client.post("/predict", json={"inputs": "a secret"})
    assert (failed.status_code, failed.json()["code"]) == (500, "failed")
    assert "secret" not in failed.text + caplog.text
    assert "KeyError" in caplog.text


def test_two_apps_count_apart(base: Callable[[str], str]) -> None:
    """Their figures do not meet, though they are in one process."""
    apps = [create_app({"m": classifier(base("bert")).eval()}) for _ in range(2)]
    with client_of(apps[0]) as first, client_of(apps[1]) as second:
        for _ in range(3):
            first.post("/predict", json={"inputs": ["Who ?", "You ."]})
        first.post("/predict", json={"inputs": 1})
        figures = first.get("/metrics").text
        for line in (
            'flair_peft_requests_total{model="m"} 3.0',
            'flair_peft_sentences_total{model="m"} 6.0',
            'flair_peft_errors_total{code="malformed"} 1.0',
            "flair_peft_batch_sentences_count 3.0",
            'flair_peft_request_seconds_count{model="m"} 3.0',
            "flair_peft_queue_sentences 0.0",
        ):
            assert line in figures
        assert "flair_peft_requests_total{" not in second.get("/metrics").text


def test_info_says_what_is_served(client: httpx.Client, directories: Directories) -> None:
    """What a client needs to ask, and to know who answers."""
    info = client.get("/info").json()
    assert [model["name"] for model in info["models"]] == sorted(directories)
    assert info["versions"]["flair_peft"] == flair_peft.__version__
    assert info["limits"]["batch"] == 32
    by_name = {model["name"]: model for model in info["models"]}
    assert by_name["sequence-tagger"]["labels"] == ["LOC", "PER", "ORG"]
    assert by_name["sequence-tagger-rnn-crf"]["labels"] == ["LOC", "PER", "ORG"]
    assert by_name["text-classifier-multi-label"]["multi_label"] is True
    assert by_name["text-pair-regressor"]["takes"] == "pair"
    assert by_name["text-classifier"]["adapter"]["method"] == "LORA"
    assert by_name["text-classifier"]["adapter"]["r"] == 4


def test_docs_and_page_ask_nobody_else(client: httpx.Client) -> None:
    """Nothing is loaded from elsewhere, and the browser is told so; the schema of bodies is there."""
    for path in ("/", "/docs"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert 'src="http' not in answer.text
        assert 'href="http' not in answer.text
    schema = client.get("/openapi.json").json()
    assert "top_k" in json.dumps(schema["paths"]["/predict"]["post"]["requestBody"])


def test_pages_elsewhere_may_ask_if_they_are_named(live: Model) -> None:
    """And no other may; without ``cors`` nobody may."""
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with client_of(create_app({"m": live}, cors=["https://example.org"])) as client:
        allowed = client.options("/predict", headers=ask)
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://example.org"
        answer = client.post("/predict", json={"inputs": "Who ?"}, headers={"Origin": "https://example.org"})
        assert "X-Model" in answer.headers["Access-Control-Expose-Headers"]
        other = client.options("/predict", headers={**ask, "Origin": "https://example.com"})
        assert "Access-Control-Allow-Origin" not in other.headers
    with client_of(create_app({"m": live})) as client:
        assert "Access-Control-Allow-Origin" not in client.options("/predict", headers=ask).headers


def test_digest_of_a_file_is_its_hash(base: Callable[[str], str], tmp_path: Path) -> None:
    """As ``sha256sum`` prints it."""
    model = classifier(base("bert")).eval()
    model.save(tmp_path / "m.pt")
    app = create_app({"m": tmp_path / "m.pt"})
    expected = hashlib.sha256((tmp_path / "m.pt").read_bytes()).hexdigest()
    assert app.state.service.models.get(["m"])[0].digest == expected


def test_nothing_of_the_extra_is_imported_before_it_is_needed() -> None:
    """Neither by the package nor by Flair, nor by the folder."""
    code = (
        "import sys, flair, flair_peft, flair_peft.serving, flair_peft.cli.serve_command\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found & {'fastapi', 'uvicorn', 'prometheus_client', 'starlette', 'ray'}, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    find = flair_peft.serving._util.find_spec
    monkeypatch.setattr(flair_peft.serving._util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(AdapterConfigError, match=r"pip install -e \"\.\[serve\]\" in its folder"):
        flair_peft.serving.create_app  # noqa: B018
