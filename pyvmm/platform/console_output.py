"""From the guest's console to standard output, without holding up the guest.

The guest writes a byte at a time; a write(2) for each would cost as much as the exit that brought
it. So bytes collect in a buffer, and a thread writes what has come together every few
milliseconds, too soon for a reader to notice.

A reader who is only slow gets every byte, as the guest is slowed down to his pace. For one who does
not read at all a vCPU waits `BRIEFLY`, once; from then on, until he reads again, what has no room
is left out and counted, and a line in its place says how much that was.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import threading
import time
from collections.abc import Callable

from pyvmm.errors import how_many
from pyvmm.host import log
from pyvmm.host.output import Outbox
from pyvmm.host.syscalls import EventFd

LIMIT = 64 << 10  # bytes that wait for the thread
KEPT = 256 << 10  # bytes that wait for the reader
BRIEFLY = 0.1  # seconds without a byte read after which nobody waits for the reader any more

_GATHER = 0.002  # seconds between the first byte of a batch and its write


def notice(count: int) -> bytes:
    """The text that stands in a console's output for `count` bytes of it."""
    return f"\r\n[pyvmm: {how_many(count, 'byte')} left out]\r\n".encode()


class ConsoleOutput:
    """Writes the guest's console to the file descriptor `fd`; None throws it away.

    `observer(data)` sees every byte that has room in the first buffer, whether it is read or not,
    in the writer's thread. If nobody reads any more (a pipe whose reader has gone, a terminal that
    hung up, a full disk), one line says so and the guest's output is dropped from there on: a guest
    must not die of its console.

    Use `start`, and `close` at the end; `close` is also called at the interpreter's exit.
    """

    def __init__(
        self,
        fd: int | None = 1,
        *,
        observer: Callable[[bytes], None] | None = None,
        warn: Callable[[str], None] = log.to_stderr,
    ) -> None:
        self._outbox = None if fd is None else _outbox(fd)
        self._observer = observer
        self._warn = warn
        self._buffer = bytearray()
        self._changing = threading.Lock()  # a leaf: for what changes the buffer
        self._changed = threading.Condition()
        self._wake = EventFd()
        self._idle = True  # the writer sleeps, or is about to look again
        self._stuck = False  # nobody reads: nobody waits
        self._progress_at = 0.0
        self._released = False
        self._refused = False  # an offer was turned down since the last batch
        self._on_room: Callable[[], None] = lambda: None
        self._lost = 0  # bytes that had no room in the buffer, and that the writer has yet to tell
        self._closing = False
        self._close_by = 0.0
        self._thread = threading.Thread(target=self._run, name="console-output", daemon=True)

    def start(self) -> None:
        """Start the writer."""
        self._thread.start()
        atexit.register(self.close)

    @property
    def left_out(self) -> int:
        """The number of bytes that nobody has read in time."""
        return self._lost + (0 if self._outbox is None else self._outbox.left_out)

    def write(self, data: bytes) -> None:
        """Take `data`. Waits `BRIEFLY` at the most."""
        buffer = self._buffer
        with self._changing:
            buffer += data
        if self._idle or len(buffer) > LIMIT:
            self._attend()

    def offer(self, data: bytes) -> bool:
        """Take `data`, unless the reader is just slow; whether it was taken. If not, `watch_room`
        tells when it is worth trying again. Never waits."""
        if self._is_full(data) and not (self._stuck or self._released):
            self._refused = True
            self._wake_writer()
            # Looked at again, as the writer may have emptied it before it saw `_refused`.
            if self._is_full(data):
                return False
        self.write(data)
        return True

    def _is_full(self, data: bytes) -> bool:
        return len(self._buffer) + len(data) > LIMIT

    def watch_room(self, on_room: Callable[[], None]) -> None:
        """Have `on_room` called, in the writer's thread, after an offer was turned down and there
        is room again. It must not block."""
        self._on_room = on_room

    def settle(self, timeout: float = 2.0) -> None:
        """Return when `observer` has seen all that was written so far."""
        deadline = time.monotonic() + timeout
        while self._buffer and self._thread.is_alive() and time.monotonic() < deadline:
            self._stuck = True
            self._wake_writer()
            time.sleep(_GATHER)
        with self._changed:  # and the batch that was taken last
            pass

    def close(self, timeout: float = 2.0) -> bool:
        """Write what is left and end the writer; whether that took less than `timeout` seconds.

        If not, the reader has stopped reading, and what it has not read is lost.
        """
        with self._changed:
            self._released = True
            self._changed.notify_all()
        self._close_by = time.monotonic() + timeout
        self._closing = True
        self._wake_writer()
        if self._thread.is_alive():
            self._thread.join(timeout + 1.0)
        atexit.unregister(self.close)
        done = not self._thread.is_alive()
        if done:
            with self._changed:
                self._wake.close()
                if self._outbox is not None:
                    self._outbox.outlet.close()
        return done and not (self._outbox is not None and len(self._outbox))

    def _attend(self) -> None:
        if self._idle:
            self._idle = False
            self._wake_writer()
        if len(self._buffer) <= LIMIT:
            return
        with self._changed:
            until = time.monotonic() + BRIEFLY
            # Also if nobody reads: the writer has room soon, and the observer shall see it all.
            while len(self._buffer) > LIMIT and not self._released:
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    break
            with self._changing:
                extra = len(self._buffer) - LIMIT
                if extra > 0:
                    del self._buffer[LIMIT:]
                    self._lost += extra

    def _wake_writer(self) -> None:
        with self._changed:  # not while `close` gives the number back for another file
            if self._wake.fd >= 0:
                self._wake.signal()

    # --- the writer's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._take_batch()
            self._send()
            if self._closing and not self._buffer and self._is_done():
                return
            if self._buffer and self._has_room():
                continue
            self._sleep()
            if not self._closing:
                time.sleep(_GATHER)

    def _is_done(self) -> bool:
        waiting = self._outbox is not None and len(self._outbox)
        return not waiting or time.monotonic() >= self._close_by

    def _has_room(self) -> bool:
        """True if what is in the buffer is to be taken now."""
        free = self._outbox is None or self._outbox.has_room(min(len(self._buffer), LIMIT))
        return free or self._stuck or self._released

    def _take_batch(self) -> None:
        if not self._has_room():
            return
        with self._changed:
            with self._changing:
                batch = bytes(self._buffer)
                self._buffer.clear()
                lost, self._lost = self._lost, 0
            if batch and self._observer is not None:
                self._observer(batch)
            self._changed.notify_all()
        if self._outbox is not None:
            if not len(self._outbox):
                self._progress_at = time.monotonic()
            if batch:
                self._outbox.put(batch, len(batch))
            if lost:
                self._outbox.leave_out(lost)
        if self._refused:
            self._refused = False
            self._on_room()

    def _send(self) -> None:
        if self._outbox is None:
            return
        try:
            sent = self._outbox.send()
        except OSError as error:
            self._outbox.outlet.close()
            self._outbox = None
            reason = os.strerror(error.errno or errno.EIO)
            self._warn(f"the guest's console output is dropped from here on: {reason}")
            return
        now = time.monotonic()
        if sent or not len(self._outbox):
            self._progress_at = now
            self._stuck = False
        elif now - self._progress_at >= BRIEFLY:
            self._stuck = True

    def _sleep(self) -> None:
        """Until there is something to do."""
        waiting = self._outbox is not None and len(self._outbox)
        self._idle = True
        # A byte that came before `_idle` was set has not woken this thread. By the lock, whoever
        # brings a later one sees it.
        with self._changing:
            came = bool(self._buffer)
        if (came and self._has_room()) or (self._closing and not waiting):
            self._idle = False
            return
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        timeout = None
        if waiting and self._outbox is not None:
            poll.register(self._outbox.outlet.descriptor, select.POLLOUT)
            timeout = BRIEFLY * 1000 if not self._stuck or self._closing else None
        poll.poll(timeout)
        self._wake.drain()
        self._idle = False


def _outbox(fd: int) -> Outbox | None:
    try:
        return Outbox(fd, KEPT, notice)
    except OSError:
        return None
