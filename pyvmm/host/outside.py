"""Threads that stay outside of the box that the others of a process are in (`pyvmm.host.box`).

They share the memory of those in the box. So they are not a wall for whoever has taken over the
whole process; they are what lets a mistake in the box reach nothing but what it may.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import Any, TypeVar

T = TypeVar("T")


_latest: Outside | None = None


def run(job: Callable[[], T]) -> T:
    """Do `job` in threads that are outside, if there are any; return its result, or raise."""
    return job() if _latest is None else _latest.run(job)


class Outside:
    """To be made before the box is entered, by a thread that has all rights still."""

    def __init__(self, begin: Callable[[], None] = lambda: None) -> None:
        """`begin` is called first in each of the threads; what it gives up stays so."""
        self._begin = begin
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        global _latest
        _latest = self
        self._here = local()
        Thread(target=self._spawn, name="outside", daemon=True).start()

    def run(self, job: Callable[[], T]) -> T:
        """Do `job` outside, and return or raise what it does. Others that are under way hold up
        none."""
        if getattr(self._here, "outside", False):
            return job()
        answer: list[Any] = []
        done = Lock()
        done.acquire()

        def work() -> None:
            self._here.outside = True
            try:
                answer.extend((True, job()))
            except BaseException as error:
                answer.extend((False, error))
            finally:
                done.release()

        self._jobs.put(work)
        done.acquire()
        succeeded, found = answer
        if not succeeded:
            raise found
        result: T = found
        return result

    def _spawn(self) -> None:
        self._begin()
        while True:
            job = self._jobs.get()
            try:
                Thread(target=job, name="outside-job", daemon=True).start()
            except RuntimeError:  # no more threads: others wait then
                job()
