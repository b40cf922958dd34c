"""Threads that make way for a moment: unshare(2) gives no user namespace to a process of several.

A process that waits for something from early on, as for the end of its parent, has a `Watcher` for
it, or adds a thread of another kind by `register`.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import Protocol

_PATIENCE = 1.0  # seconds for threads that are busy
_MOST = 4096  # bytes of a line
_ALL_THREADS = "/proc/self/task"


class Pausing(Protocol):
    def pause(self) -> None:
        """Have the thread end, and wait for that, though not for ever."""

    def go_on(self) -> None:
        """Have one take its place, unless its work is over."""


_known: list[Pausing] = []
_is_paused = False
_lock = Lock()


def register(one: Pausing) -> None:
    """`one` has a thread, until `forget`."""
    with _lock:
        _known.append(one)


def forget(one: Pausing) -> None:
    """The thread of `one` has ended, or will not be in the way."""
    with _lock, suppress(ValueError):
        _known.remove(one)


def _be_alone() -> None:
    global _lock
    _lock = Lock()
    _known.clear()


os.register_at_fork(after_in_child=_be_alone)  # a child has none of the threads


@contextmanager
def paused() -> Iterator[None]:
    """Without the threads that can make way; those of others stay. For one thread at a time, in
    which this may be within another one of these."""
    global _is_paused
    if _is_paused:
        yield
        return
    with _lock:
        those = list(_known)
    _is_paused = True
    try:
        others = max(1, _count_threads() - len(those))
        for one in those:
            one.pause()
        if those:  # each is the kernel's still for a moment after it was waited for
            deadline = time.monotonic() + _PATIENCE
            while _count_threads() > others and time.monotonic() < deadline:
                time.sleep(0.0005)
        yield
    finally:
        _is_paused = False
        for one in those:
            one.go_on()


def _count_threads() -> int:
    try:
        return len(os.listdir(_ALL_THREADS))
    except OSError:
        return 0


class Watcher:
    """A thread that calls `heard` whenever `fd` can be read, until that returns False."""

    def __init__(self, fd: int, name: str, heard: Callable[[], bool]) -> None:
        """Raises OSError if there are no more descriptors."""
        self._fd, self._name, self._heard = fd, name, heard
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = Lock()
        self._over = Event()
        self._start()
        register(self)

    def wait(self, seconds: float) -> bool:
        """Wait for the end; True if it has come."""
        return self._over.wait(seconds)

    def pause(self) -> None:
        with self._lock:
            if self._over.is_set():
                return
            os.eventfd_write(self._wake, 1)
        self._thread.join(_PATIENCE)

    def stop(self) -> bool:
        """Hear no more, whatever comes; False if it hears something still, and is over after
        that. Not for `heard` itself to call."""
        self.pause()
        stopped = not self._thread.is_alive()
        if stopped:
            self._end()
        return stopped

    def go_on(self) -> None:
        with self._lock:
            if self._over.is_set():
                return
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            if not self._thread.is_alive():
                self._start()

    def _start(self) -> None:
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poll.poll()]
                if self._wake in ready:
                    return
                if not self._heard():
                    break
        except BaseException:
            self._end()
            raise
        self._end()

    def _end(self) -> None:
        forget(self)
        with self._lock:
            if not self._over.is_set():
                self._over.set()
                os.close(self._wake)


def each_line(fd: int, line: Callable[[str], None], end: Callable[[], None]) -> Callable[[], bool]:
    """What a Watcher of `fd` hears: calls `line` with each of what is written there, and `end`
    once all writers have gone."""
    rest = b""

    def heard() -> bool:
        nonlocal rest
        try:
            data = os.read(fd, _MOST)
        except BlockingIOError:  # somebody else has it, and was quicker
            return True
        except OSError:  # the writing end of a pipe, from somebody
            data = b""
        *whole, rest = (rest + data).split(b"\n")
        if rest and (not data or len(rest) >= _MOST):
            whole.append(rest)
            rest = b""
        for one in whole:
            line(one.decode(errors="replace"))
        if not data:
            end()
        return bool(data)

    return heard
