"""Jobs that take turns: one at a time, one answer for all, and an end for all when one fails."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flair_peft.embeddings import cooperative_threads


def asking(found: list[Any], name: str, times: int) -> Callable[[], None]:
    def job() -> None:
        for number in range(times):
            found.append((name, number, cooperative_threads.ask(f"{name}{number}")))

    return job


def test_run_jobs_that_ask_are_answered_together_until_each_has_ended() -> None:
    """Every round answers what all jobs that still run ask for, in their order."""
    asked: list[list[str]] = []
    found: list[Any] = []

    def answer(requests: list[str]) -> list[str]:
        asked.append(requests)
        return [request.upper() for request in requests]

    cooperative_threads.run([asking(found, "a", 1), asking(found, "b", 3), asking(found, "c", 0)], answer)
    assert asked == [["a0", "b0"], ["b1"], ["b2"]]
    assert found == [("a", 0, "A0"), ("b", 0, "B0"), ("b", 1, "B1"), ("b", 2, "B2")]


def test_run_never_lets_two_jobs_run_at_once() -> None:
    """Between two questions a job has the machine for itself."""
    running, most = [0], [0]

    def job() -> None:
        for _ in range(20):
            running[0] += 1
            most[0] = max(most[0], running[0])
            torch.zeros(1000).sum()  # releases the interpreter
            running[0] -= 1
            cooperative_threads.ask(None)

    cooperative_threads.run([job] * 8, lambda requests: requests)
    assert most[0] == 1


def test_run_job_that_raises_ends_the_others_and_leaves_no_thread() -> None:
    """The error reaches the caller, and the other jobs unwind where they stand."""
    unwound: list[str] = []
    before = threading.active_count()

    def waiting() -> None:
        try:
            cooperative_threads.ask(None)
        except Exception:
            unwound.append("caught")
        finally:
            unwound.append("left")

    def failing() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        cooperative_threads.run([waiting, failing, waiting], lambda requests: requests)
    assert unwound == ["left"]  # the third had not started
    assert threading.active_count() == before


def test_run_answer_that_raises_ends_all_jobs() -> None:
    """So does an error of whoever answers."""
    before = threading.active_count()

    def answer(_: list[Any]) -> list[Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cooperative_threads.run([asking([], "a", 2), asking([], "b", 2)], answer)
    assert threading.active_count() == before
    assert not cooperative_threads.is_going_on()


def test_run_jobs_see_the_contexts_of_the_caller() -> None:
    """Context variables, autocast and inference mode are those in which the caller stands."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
    found: list[Any] = []

    def job() -> None:
        found.append((variable.get(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))

    variable.set("set")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        cooperative_threads.run([job], lambda requests: requests)
    cooperative_threads.run([job], lambda requests: requests)
    assert found == [("set", True, True), ("set", False, False)]


def test_known_in_this_round_is_shared_and_empty_after_an_answer() -> None:
    """Jobs tell one another what they know until they are answered."""
    found: list[Any] = []

    def job(name: str) -> None:
        for _ in range(2):
            known = cooperative_threads.known_in_this_round()
            assert known is not None
            found.append((name, sorted(known)))
            known[name] = True
            cooperative_threads.ask(None)

    cooperative_threads.run([partial(job, "a"), partial(job, "b")], lambda requests: requests)
    assert found == [("a", []), ("b", ["a"]), ("a", []), ("b", ["a"])]
    assert cooperative_threads.known_in_this_round() is None
