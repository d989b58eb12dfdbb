"""Two replicas of the models on one machine with Ray Serve, asked by many clients while one of the two is killed.

    pip install -c resources/constraints.txt -e ".[ray]"
    python examples/quickstart.py --output models
    python examples/serving/ray_example.py sentiment=models/sentiment.pt ner=models/ner.pt

Every answer is compared with what the same model predicts in this process. Exits with 1 if one differs, or is missing.
``--keep`` leaves the address open until Ctrl-C, for curl and for a browser.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: nothing is told to anyone

import psutil
import ray
import requests
from flair.data import Label, Sentence
from flair.nn import Classifier
from ray import serve

from flair_peft.serving import ray_app

TEXTS = (
    "Many students live in Egypt.",
    "Not a dull moment: the show made us smile.",
    "The soup was cold and the waiter was rude.",
    "Anna moved from Oslo to Lima, and works for a bank.",
)
Answers = dict[tuple[str, str], Any]


def predict_here(models: dict[str, str]) -> Answers:
    """What each model says of each text by Flair's own predict, in the form of answers."""
    expected: Answers = {}
    for name, path in models.items():
        model = Classifier.load(path)
        for text in TEXTS:
            sentence = Sentence(text)
            model.predict(sentence)
            expected[name, text] = [_in_answer(label) for label in sentence.get_labels(model.label_type)]
    return expected


def _in_answer(label: Label) -> dict[str, Any]:
    if isinstance(label.data_point, Sentence):
        return {"label": label.value, "score": label.score}
    start, end = label.data_point.start_position, label.data_point.end_position
    return {"entity_group": label.value, "score": label.score, "start": start, "end": end}


def is_same(found: Any, expected: Any) -> bool:
    """Whether two answers differ by the rounding of their scores at most."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(is_same, found, expected))
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(is_same(found.get(key), expected[key]) for key in expected)
    if isinstance(expected, float):
        return isinstance(found, float) and abs(found - expected) < 1e-4
    return found == expected


class Clients:
    """Ask one question after another until they are told to stop, and keep what is not as expected."""

    def __init__(self, address: str, expected: Answers, *, count: int = 8) -> None:
        self.address, self.expected = address, expected
        self.answered, self.wrong = 0, list[Any]()
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(number,)) for number in range(count)]

    def ask(self, number: int) -> None:
        """Ask until it is over."""
        chance = random.Random(number)
        with requests.Session() as session:
            while not self.is_over.is_set():
                name, text = chance.choice(list(self.expected))
                try:
                    answer = session.post(self.address, json={"model": name, "inputs": text}, timeout=60)
                except requests.RequestException as error:
                    self.wrong.append(error)
                    continue
                if answer.status_code == 503:  # asked again, as Retry-After says
                    time.sleep(0.2)
                elif answer.status_code != 200 or not is_same(answer.json(), self.expected[name, text]):
                    self.wrong.append((name, text, answer.status_code, answer.text))
                else:
                    self.answered += 1

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        for thread in self.threads:
            thread.join()


def replicas() -> list[psutil.Process]:
    """The processes of the replicas that hold models; Ray names its workers by what they do."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "flair_peft_models" in " ".join(process.cmdline())]


def wait_for(condition: Any, seconds: float = 120) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def kill_one_under_load(address: str, expected: Answers, *, seconds: float) -> bool:
    """Whether all answers are right before a replica is killed, while it is away, and when it is back."""
    with Clients(address, expected) as clients:
        time.sleep(seconds)
        before, victim = clients.answered, replicas()[0]
        victim.send_signal(signal.SIGKILL)
        time.sleep(seconds)
        meanwhile = clients.answered - before
        is_back = wait_for(lambda: len(replicas()) == 2)
        time.sleep(seconds)
    print(f"{before} answers, then one of two replicas was killed; {meanwhile} in the next {seconds:g} seconds;")
    print(f"{clients.answered} answers in all, {len(clients.wrong)} wrong or missing; two again: {is_back}")
    for each in clients.wrong[:5]:
        print(each)
    return bool(before and meanwhile and is_back and not clients.wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve models with two replicas, and kill one under load.")
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=5, help="of load before, during and after")
    parser.add_argument("--keep", action="store_true", help="go on until Ctrl-C")
    arguments = parser.parse_args()
    models = dict(given.split("=", 1) for given in arguments.models)
    expected, address = predict_here(models), f"http://127.0.0.1:{arguments.port}/predict"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        serve.run(ray_app(models, replicas=2, ray_actor_options={"num_cpus": 1}))
        is_right = kill_one_under_load(address, expected, seconds=arguments.seconds)
        if arguments.keep:
            signal.pause()
        return 0 if is_right else 1
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
