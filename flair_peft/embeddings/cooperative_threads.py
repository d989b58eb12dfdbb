"""Cooperative threads whose requests are answered in one batch.

Flair's ``predict`` needs a forward pass deep inside. Each of several calls runs in a thread of its own, as far as its
next request. Once all of them ask, or have ended, the requests are answered together and the calls go on.

A thread that stops wakes the next one itself, and threads are kept for the next run: to start one takes half as long as
all that Flair does for a sentence around the forward pass, and on a busy machine longer than that.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

# Threads that are kept, as many as a mini-batch of Flair's has sentences.
_KEPT = 32


class _Abandoned(BaseException):
    """Unwinds a thread that nobody waits for any more; no ``except Exception`` on its way stops it."""


class _Turns:
    """Who is to go on in one run, and what those who stopped ask for.

    Attributes:
        known: what the tasks tell one another until the next answer.
        requests: of the threads that asked since the last answer, in the order of their tasks.
        error: of the task that failed.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.requests: dict[_CooperativeThread, Any] = {}
        self.error: BaseException | None = None
        self._waiting: deque[tuple[_CooperativeThread, Any]] = deque()
        self._caller: SimpleQueue[None] = SimpleQueue()

    def take(self, messages: Iterable[tuple[_CooperativeThread, Any]]) -> dict[_CooperativeThread, Any]:
        """Let each thread go on with its message, one after another; return what those that did not end ask for."""
        self.requests = {}
        self._waiting.extend(messages)
        self.pass_on()
        self._caller.get()
        if self.error is None:
            return self.requests
        error, self.error = self.error, None
        try:
            raise error
        finally:
            del error  # which holds this frame

    def pass_on(self) -> None:
        """Wake whose turn is next: a thread, or the caller of the run after the last one."""
        try:
            thread, message = self._waiting.popleft()
        except IndexError:
            self._caller.put(None)
        else:
            thread.messages.put(message)

    def stop(self) -> None:
        """Let no other thread go on."""
        self._waiting.clear()


class _Task:
    """A task, and the contexts of the thread that made it, in which another one runs it."""

    def __init__(self, call: Callable[[], None], turns: _Turns) -> None:
        self.turns = turns
        self._call, self._context, self._modes = call, contextvars.copy_context(), _modes_of_this_thread()

    def run(self) -> None:
        self._context.run(self._run)

    def _run(self) -> None:
        with contextlib.ExitStack() as modes:
            for mode in self._modes:
                modes.enter_context(mode)
            self._call()


class _CooperativeThread(threading.Thread):
    """A thread that runs only when it gets a message: a task, the reply to what the task asks for, or ``None`` to end.

    Attributes:
        messages: to the thread.
        turns: of the run whose task it has.
        torch_threads: how many threads torch uses in this one, which is set when it starts.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.messages: SimpleQueue[Any] = SimpleQueue()
        self.turns: _Turns | None = None
        self.torch_threads = torch.get_num_threads()
        self.start()

    def ask(self, request: Any) -> Any:
        """Stop, in this thread, until there is a reply."""
        assert self.turns is not None
        self.turns.requests[self] = request
        self.turns.pass_on()
        reply = self.messages.get()
        if reply is _Abandoned:
            raise _Abandoned
        return reply

    def abandon(self) -> None:
        """Let the task end where it stands, and the thread with it."""
        self.messages.put(_Abandoned)
        self.messages.put(None)
        self.join()

    def run(self) -> None:
        """Run the tasks that come, one after another, and hold nothing of them in between."""
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        task = self.messages.get()
        if isinstance(task, _Task):
            turns = self.turns = task.turns
            try:
                task.run()
            except BaseException as error:
                turns.error = error
                turns.stop()
            # Whoever is next may look whether what the task held is freed.
            self.turns = None
            del task
            turns.pass_on()
            return True
        return task is not None


class CooperativeThreads:
    """Threads for any number of runs, also at the same time; those that are idle end together with this object."""

    def __init__(self) -> None:
        self._idle: list[_CooperativeThread] = []
        weakref.finalize(self, _end, self._idle).atexit = False

    def run(self, tasks: Sequence[Callable[[], None]], answer: Callable[[list[Any]], list[Any]]) -> None:
        """Run the tasks to their end, one at a time; answer what they :func:`ask` once all of them ask or have ended.

        Only one task runs at any moment, and it is only left where it asks. Tasks go on in their order.

        Args:
            tasks: each runs in a thread of its own, with the context variables of the caller.
            answer: requests, in the order of the tasks → replies in the same order; runs in the thread of the caller.

        Raises:
            BaseException: what a task or ``answer`` raised first; the other tasks are ended where they stand.
        """
        turns, threads = _Turns(), list[_CooperativeThread]()
        try:
            threads += (self._thread() for _ in tasks)
            started = [_Task(task, turns) for task in tasks]
            asking = turns.take(zip(threads, started, strict=True))
            while asking:
                turns.known.clear()
                asking = turns.take(zip(asking, answer([*asking.values()]), strict=True))
        except BaseException:
            turns.stop()
            for thread in threads:
                thread.abandon()
            turns.error = None  # whose frames hold this object
            raise
        turns.known.clear()  # the last thread may hold it a moment longer
        for thread in threads:
            if len(self._idle) < _KEPT:
                self._idle.append(thread)
            else:
                _end([thread])

    def _thread(self) -> _CooperativeThread:
        """Return an idle thread, or a new one."""
        with contextlib.suppress(IndexError):
            while thread := self._idle.pop():
                # In a child of this process there are none any more.
                if thread.is_alive() and thread.torch_threads == torch.get_num_threads():
                    return thread
                _end([thread])
        return _CooperativeThread()


def _end(threads: Iterable[_CooperativeThread]) -> None:
    """Let idle threads end."""
    for thread in threads:
        thread.messages.put(None)


def _modes_of_this_thread() -> list[contextlib.AbstractContextManager[Any]]:
    """Return what torch keeps for each thread, for another thread to enter."""
    modes: list[contextlib.AbstractContextManager[Any]] = [torch.enable_grad()]  # whatever an earlier task left
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)))
    if torch.cuda.is_available():
        modes.append(torch.cuda.device(torch.cuda.current_device()))
    return [*modes, torch.inference_mode()] if torch.is_inference_mode_enabled() else modes


def _turns() -> _Turns | None:
    thread = threading.current_thread()
    return thread.turns if isinstance(thread, _CooperativeThread) else None


def known_in_this_round() -> dict[Any, Any] | None:
    """Return what tasks may tell one another until the next answer; ``None`` outside of a run."""
    turns = _turns()
    return None if turns is None else turns.known


def is_going_on() -> bool:
    """Whether this code runs within a task of :class:`CooperativeThreads`."""
    return _turns() is not None


def ask(request: Any) -> Any:
    """Return the reply to a request, which is given once every other task asks too or has ended.

    Only within a task; see :func:`is_going_on`.
    """
    thread = threading.current_thread()
    assert isinstance(thread, _CooperativeThread)
    return thread.ask(request)
