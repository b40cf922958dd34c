"""The lock of a queue that something outside this process serves while nobody holds the lock.

The rule of every queue is that whoever holds its lock has the ring for himself. `OffloadLock` keeps
that rule for a ring that a kernel's thread or another process works on: whoever takes the lock
takes the ring back first, and releasing it hands the ring over again. A device whose queues may be
served so gives them this lock when they are built (`VirtioDevice.queue_lock`), and says by `serve`
who has them.
"""

from __future__ import annotations

from threading import Lock
from types import TracebackType
from typing import Protocol

from pyvmm.virtio.queue.protocol import Queue


class Server(Protocol):
    """A server of one queue. Both methods are called with its lock held, and must not raise."""

    def hand_over(self) -> None:
        """Begin to serve the queue where it stands."""

    def take_back(self) -> None:
        """Serve the queue no more; it stands where the server left it when this returns."""


class OffloadLock:
    """A queue's lock; a `Server` serves the queue while nobody holds it, from `serve_by` on."""

    def __init__(self) -> None:
        self._lock = Lock()
        # Guards what follows. It is held while a ring changes hands, never while one is in use.
        self._changing = Lock()
        self._server: Server | None = None  # serves the queue when the lock is released
        self._serving: Server | None = None  # has the ring now

    def serve_by(self, server: Server | None) -> None:
        """From now on `server` serves the queue; with None, nobody does.

        When this returns a former server has let go of the ring. It does not wait for whoever
        holds the lock (a VM that is paused, say): `server` then begins at the release.
        """
        with self._changing:
            self._server = server
            self._end_serving()
            if self._lock.acquire(blocking=False):
                self._begin_serving()
                self._lock.release()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """See threading.Lock."""
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            with self._changing:
                self._end_serving()
        return taken

    def release(self) -> None:
        """See threading.Lock."""
        with self._changing:
            self._begin_serving()
            self._lock.release()

    def _begin_serving(self) -> None:
        self._serving = self._server
        if self._serving is not None:
            self._serving.hand_over()

    def _end_serving(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.take_back()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Offload(Protocol):
    """A server of several queues: each as for `Server`."""

    def hand_over(self, queue: Queue) -> None: ...

    def take_back(self, queue: Queue) -> None: ...


class _OfOne:
    """What serves several, for one of them."""

    def __init__(self, offload: Offload, queue: Queue) -> None:
        self._offload, self._queue = offload, queue

    def hand_over(self) -> None:
        self._offload.hand_over(self._queue)

    def take_back(self) -> None:
        self._offload.take_back(self._queue)


def serve(queue: Queue, by: Offload | None) -> None:
    """From now on `by` serves `queue`, whose lock is an OffloadLock: see there, `serve_by`."""
    lock = queue.lock
    assert isinstance(lock, OffloadLock), "its device gave it another lock"
    lock.serve_by(None if by is None else _OfOne(by, queue))
