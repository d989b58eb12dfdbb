"""Jobs that take turns: one at a time, one answer for all, and an end for all when one fails."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flair_peft.embeddings import cooperative_threads
from flair_peft.embeddings.cooperative_threads import CooperativeThreads


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

    CooperativeThreads().run([asking(found, "a", 1), asking(found, "b", 3), asking(found, "c", 0)], answer)
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

    CooperativeThreads().run([job] * 8, lambda requests: requests)
    assert most[0] == 1


def test_run_job_that_raises_ends_the_others_and_leaves_no_thread() -> None:
    """The error reaches the caller, and the other jobs unwind where they stand."""
    unwound: list[str] = []
    before = set(threading.enumerate())  # those of other tests may be about to end

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
        CooperativeThreads().run([waiting, failing, waiting], lambda requests: requests)
    assert unwound == ["left"]  # the third had not started
    assert set(threading.enumerate()) <= before


def test_run_answer_that_raises_ends_all_jobs() -> None:
    """So does an error of whoever answers."""
    before = set(threading.enumerate())  # those of other tests may be about to end

    def answer(_: list[Any]) -> list[Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CooperativeThreads().run([asking([], "a", 2), asking([], "b", 2)], answer)
    assert set(threading.enumerate()) <= before
    assert not cooperative_threads.is_going_on()


def test_run_jobs_see_the_contexts_of_the_caller() -> None:
    """Context variables, autocast and inference mode are those in which the caller stands."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
    found: list[Any] = []

    def job() -> None:
        found.append((variable.get(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))

    variable.set("set")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        CooperativeThreads().run([job], lambda requests: requests)
    CooperativeThreads().run([job], lambda requests: requests)
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

    CooperativeThreads().run([partial(job, "a"), partial(job, "b")], lambda requests: requests)
    assert found == [("a", []), ("b", ["a"]), ("a", []), ("b", ["a"])]
    assert cooperative_threads.known_in_this_round() is None


def names_of(threads: CooperativeThreads, count: int) -> set[str]:
    """Return the names of the threads in which so many tasks ran."""
    found: list[str] = []

    def job() -> None:
        found.append(threading.current_thread().name)
        cooperative_threads.ask(None)

    threads.run([job] * count, lambda requests: requests)
    assert len(set(found)) == count
    return set(found)


def test_run_after_run_takes_the_same_threads_and_one_that_failed_takes_others() -> None:
    """Threads are kept; those of a run that failed are not, whatever the tasks left in them."""
    threads = CooperativeThreads()
    first = names_of(threads, 3)
    assert names_of(threads, 3) == first
    assert names_of(threads, 2) < first

    def answer(_: list[Any]) -> list[Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.run([asking([], "a", 1)] * 3, answer)
    assert names_of(threads, 3).isdisjoint(first)


def test_threads_that_are_kept_are_bounded_and_end_with_the_object() -> None:
    """A wave of many models leaves no more threads than a mini-batch has sentences, and an object that is gone none."""
    before = set(threading.enumerate())
    threads = CooperativeThreads()
    names_of(threads, cooperative_threads._KEPT + 3)
    started = set(threading.enumerate()) - before
    kept = set(threads._idle)
    assert len(kept) == cooperative_threads._KEPT
    del threads
    gc.collect()
    for thread in started:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in started)


def test_run_holds_nothing_of_a_task_afterwards() -> None:
    """What a task, its request and its reply held is freed when the run returns, or when it fails."""

    class Held:
        pass

    threads = CooperativeThreads()
    for error in (None, KeyError):
        held = [Held() for _ in range(3)]
        gone = [weakref.ref(each) for each in held]

        def job(each: Held, error: Any = error) -> None:
            known = cooperative_threads.known_in_this_round()
            assert known is not None
            known[each] = each
            cooperative_threads.ask(each)
            known[each] = each
            if error is not None:
                raise error

        with contextlib.suppress(KeyError):
            threads.run([partial(job, each) for each in held], lambda requests: requests)
        del held
        if error is not None:
            gc.collect()  # an error and its frames hold each other
        assert [reference() for reference in gone] == [None] * 3


def test_run_gives_each_task_the_state_of_torch_that_a_new_thread_has() -> None:
    """Gradients that a task switched off, and a number of threads that torch has by now, are not those of the next."""
    threads, found = CooperativeThreads(), list[Any]()

    def job() -> None:
        found.append((torch.is_grad_enabled(), torch.get_num_threads()))
        torch.set_grad_enabled(False)

    count = torch.get_num_threads()
    threads.run([job], lambda requests: requests)
    threads.run([job], lambda requests: requests)
    try:
        torch.set_num_threads(count + 1)
        threads.run([job], lambda requests: requests)
    finally:
        torch.set_num_threads(count)
    assert found == [(True, count), (True, count), (True, count + 1)]


def test_runs_at_the_same_time_have_threads_of_their_own() -> None:
    """Callers in several threads share what is idle, and nobody's task runs in the thread of another's."""
    threads, found = CooperativeThreads(), list[Any]()

    def call(name: str) -> None:
        for _ in range(20):
            threads.run([asking(found, name, 2)] * 3, lambda requests: [request + name for request in requests])

    callers = [threading.Thread(target=call, args=(name,)) for name in "abc"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 3 * 20 * 3 * 2
    assert all(reply == f"{name}{number}{name}" for name, number, reply in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_run_in_a_child_of_the_process_starts_threads_of_its_own() -> None:
    """A fork has none of the threads that are kept: it does not wait for them."""
    threads = CooperativeThreads()
    names_of(threads, 3)
    child = os.fork()
    if child == 0:
        try:
            names_of(threads, 3)
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (done, status) == (child, 0)
