"""Cooperative threads whose requests are answered in one batch.

Flair's ``predict`` needs a forward pass deep inside. Each of several calls runs in a thread of its own, as far as its
next request. Once all of them ask, or have ended, the requests are answered together and the calls go on.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch


class _Abandoned(BaseException):
    """Unwinds a thread that nobody waits for any more; no ``except Exception`` on its way stops it."""


class _Stop(NamedTuple):
    """Why a thread stopped: it asks for something, or its task has ended, with an error or without."""

    request: Any = None
    has_ended: bool = False
    error: BaseException | None = None


class _CooperativeThread(threading.Thread):
    """A thread that runs only while it is resumed: from a reply to its next request, or to the end of its task.

    Attributes:
        known: what the threads of one :func:`run` tell one another until the next answer.
    """

    def __init__(self, task: Callable[[], None], known: dict[Any, Any]) -> None:
        super().__init__(daemon=True)
        self.known = known
        self._task, self._context, self._modes = task, contextvars.copy_context(), _modes_of_this_thread()
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._stops: SimpleQueue[_Stop] = SimpleQueue()
        self.start()

    def resume(self, reply: Any) -> _Stop:
        """Let the task go on with a reply until it asks again or ends."""
        self._replies.put(reply)
        return self._stops.get()

    def abandon(self) -> None:
        """Let the task end where it stands."""
        self._replies.put(_Abandoned)
        self.join()

    def ask(self, request: Any) -> Any:
        """Stop, in this thread, until there is a reply."""
        self._stops.put(_Stop(request))
        reply = self._replies.get()
        if reply is _Abandoned:
            raise _Abandoned
        return reply

    def run(self) -> None:
        """Run the task, in the contexts in which the thread was made, once it is resumed for the first time."""
        if self._replies.get() is _Abandoned:
            return
        try:
            self._context.run(self._run_task)
            self._stops.put(_Stop(has_ended=True))
        except BaseException as error:
            self._stops.put(_Stop(has_ended=True, error=error))

    def _run_task(self) -> None:
        with contextlib.ExitStack() as modes:
            for mode in self._modes:
                modes.enter_context(mode)
            self._task()


def _modes_of_this_thread() -> list[contextlib.AbstractContextManager[Any]]:
    """Return what torch keeps for each thread, for another thread to enter."""
    modes: list[contextlib.AbstractContextManager[Any]] = []
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)))
    if torch.cuda.is_available():
        modes.append(torch.cuda.device(torch.cuda.current_device()))
    return [*modes, torch.inference_mode()] if torch.is_inference_mode_enabled() else modes


def run(tasks: Sequence[Callable[[], None]], answer: Callable[[list[Any]], list[Any]]) -> None:
    """Run the tasks to their end, one at a time, and answer what they :func:`ask` once all of them ask or have ended.

    Only one task runs at any moment, and it is only left where it asks. Tasks are resumed in their order.

    Args:
        tasks: each runs in a thread of its own, with the context variables of the caller.
        answer: requests, in the order of the tasks → replies in the same order; runs in the thread of the caller.

    Raises:
        BaseException: what a task or ``answer`` raised first; the other tasks are ended where they stand.
    """
    known: dict[Any, Any] = {}
    threads: list[_CooperativeThread] = []
    try:
        for task in tasks:
            threads.append(_CooperativeThread(task, known))
        replies: dict[_CooperativeThread, Any] = dict.fromkeys(threads)
        while replies:
            stops = {}
            for thread, reply in replies.items():
                stops[thread] = thread.resume(reply)
                if (error := stops[thread].error) is not None:
                    raise error
            known.clear()
            asking = {thread: stop.request for thread, stop in stops.items() if not stop.has_ended}
            answers = answer([*asking.values()]) if asking else []
            replies = dict(zip(asking, answers, strict=True))
    finally:
        for thread in threads:
            thread.abandon()


def _thread_of_run() -> _CooperativeThread | None:
    thread = threading.current_thread()
    return thread if isinstance(thread, _CooperativeThread) else None


def known_in_this_round() -> dict[Any, Any] | None:
    """Return what tasks may tell one another until the next answer; ``None`` outside of :func:`run`."""
    thread = _thread_of_run()
    return None if thread is None else thread.known


def is_going_on() -> bool:
    """Whether this code runs within a task of :func:`run`."""
    return _thread_of_run() is not None


def ask(request: Any) -> Any:
    """Return the reply to a request, which is given once every other task asks too or has ended.

    Only within a task; see :func:`is_going_on`.
    """
    thread = _thread_of_run()
    assert thread is not None
    return thread.ask(request)
