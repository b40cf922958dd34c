"""A callback at a given time, from a thread that sleeps until then."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from pyvmm.host.syscalls import Closable

Ring = Callable[[], float | None]


class Timer(Closable):
    """Calls `ring` at the time that was `set`, and again at each time that `ring` returns, until
    that is None. Times are those of `now`, in seconds.

    The thread, called `name`, starts with the first `set`; it wakes for nothing else.
    """

    def __init__(self, name: str, ring: Ring) -> None:
        self._name = name
        self._ring = ring
        self._times: SimpleQueue[float | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False

    @staticmethod
    def now() -> float:
        """The time in seconds (CLOCK_MONOTONIC)."""
        return time.monotonic()

    def set(self, when: float) -> None:
        """Call `ring` at `when`, or as soon as it has returned None from what was set before. Not
        to be called by two threads at once."""
        if self._closed:
            return
        if self._thread is None:
            self._thread = Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._times.put(when)

    def close(self) -> None:
        """Once this returns, `ring` is not called any more. Not to be called by `ring`."""
        self._closed = True
        if self._thread is not None:
            self._times.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (when := self._times.get()) is not None:
            next_time: float | None = when
            while next_time is not None and not self._closed:
                time.sleep(max(0.0, next_time - time.monotonic()))
                if self._closed:
                    return
                next_time = self._ring()
