"""Jobs that take turns and ask one place for what they need: what all of them want at once is answered at once."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

_current: contextvars.ContextVar[_Job | None] = contextvars.ContextVar("flair_peft_job", default=None)


Known = dict[Any, Any]
_known: contextvars.ContextVar[Known | None] = contextvars.ContextVar("flair_peft_known", default=None)


class _Abandoned(BaseException):
    """Unwinds a job that nobody waits for any more; no ``except Exception`` on its way stops it."""


class _Job:
    """One job in a thread of its own, which runs only while it is resumed."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._is_abandoned = self.is_done = False
        self.request: Any = None
        self._reply: Any = None
        self.error: BaseException | None = None
        self._modes = _modes_of_this_thread()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._work), daemon=True)
        self._thread.start()

    def resume(self, reply: Any = None) -> None:
        """Let the job go on with a reply until it asks again or ends."""
        self._reply = reply
        self._may_go.release()
        self._has_stopped.acquire()

    def abandon(self) -> None:
        """Let the job end where it stands."""
        if not self.is_done:
            self._is_abandoned = True
            self.resume()
        self._thread.join()

    def ask(self, request: Any) -> Any:
        self.request = request
        self._has_stopped.release()
        self._may_go.acquire()
        if self._is_abandoned:
            raise _Abandoned
        reply, self._reply, self.request = self._reply, None, None
        return reply

    def _work(self) -> None:
        _current.set(self)
        self._may_go.acquire()
        try:
            if not self._is_abandoned:
                with contextlib.ExitStack() as modes:
                    for mode in self._modes:
                        modes.enter_context(mode)
                    self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.is_done = True
            self._has_stopped.release()


def _modes_of_this_thread() -> list[contextlib.AbstractContextManager[Any]]:
    """Return what torch keeps for each thread, for another thread to enter."""
    modes: list[contextlib.AbstractContextManager[Any]] = []
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)))
    if torch.cuda.is_available():
        modes.append(torch.cuda.device(torch.cuda.current_device()))
    return [*modes, torch.inference_mode()] if torch.is_inference_mode_enabled() else modes


def run(jobs: Sequence[Callable[[], None]], answer: Callable[[list[Any]], list[Any]]) -> None:
    """Run the jobs to their end, one at a time, and answer what they :func:`ask` once all of them ask or have ended.

    Only one job runs at any moment, and it is only left where it asks. Jobs are resumed in their order.

    Args:
        jobs: each runs in a thread of its own, with the context variables of the caller.
        answer: requests, in the order of the jobs → replies in the same order; runs in the thread of the caller.

    Raises:
        BaseException: what a job or ``answer`` raised first; the other jobs are ended where they stand.
    """
    known: Known = {}
    token = _known.set(known)
    try:
        threads = [_Job(job) for job in jobs]
    finally:
        _known.reset(token)
    try:
        replies: dict[_Job, Any] = dict.fromkeys(threads)
        while replies:
            for job, reply in replies.items():
                job.resume(reply)
                if job.error is not None:
                    raise job.error
            known.clear()
            asking = [job for job in replies if not job.is_done]
            found = answer([job.request for job in asking]) if asking else []
            replies = dict(zip(asking, found, strict=True))
    finally:
        for job in threads:
            job.abandon()


def known_in_this_round() -> Known | None:
    """Return what jobs may tell one another until the next answer; ``None`` where no jobs take turns."""
    return _known.get()


def is_going_on() -> bool:
    """Whether this code runs within a job."""
    return _current.get() is not None


def ask(request: Any) -> Any:
    """Return the reply to a request, which is given once every other job asks too or has ended.

    Only within a job; see :func:`is_going_on`.
    """
    job = _current.get()
    assert job is not None
    return job.ask(request)
