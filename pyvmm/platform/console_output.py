"""From the guest's serial port to standard output, without holding up the guest for each byte.

The guest writes a byte at a time; a write(2) for each would cost as much as the exit that brought
it. So bytes collect in a buffer, and a thread writes what has come together every few
milliseconds, too soon for a reader to notice. The thread also is what may get stuck in write(2)
when the terminal is paused or a pipe is full; the vCPUs then wait where they can be called back.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import threading
import time
from collections.abc import Callable

from pyvmm.host import log
from pyvmm.host.output import write_all
from pyvmm.host.syscalls import EventFd

LIMIT = 64 << 10  # bytes that may wait; a guest that has written more waits too

_GATHER = 0.002  # seconds between the first byte of a batch and its write


class ConsoleOutput:
    """Writes the guest's console to the file descriptor `fd`; None throws it away.

    `observer(data)` sees every byte before it is written, in the writer's thread. If nobody reads
    any more (a pipe whose reader has gone, a terminal that hung up, a full disk), one line says so
    and the guest's output is dropped from there on: a guest must not die of its console.

    Use `start`, and `close` at the end; `close` is also called at the interpreter's exit.
    """

    def __init__(
        self,
        fd: int | None = 1,
        *,
        observer: Callable[[bytes], None] | None = None,
        warn: Callable[[str], None] = log.to_stderr,
    ) -> None:
        self._fd = fd
        self._observer = observer
        self._warn = warn
        self._buffer = bytearray()
        self._changed = threading.Condition()
        self._wake = EventFd()
        self._idle = True  # the writer sleeps, or is about to look again
        self._released = False
        self._refused = False  # an offer was turned down since the last batch
        self._on_room: Callable[[], None] = lambda: None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="console-output", daemon=True)

    def start(self) -> None:
        """Start the writer."""
        self._thread.start()
        atexit.register(self.close)

    def write(self, data: bytes) -> None:
        """Take `data`; waits while more than `LIMIT` bytes are unwritten, until `release`."""
        # One thread appends while another removes from the front: each is one bytearray operation,
        # which the interpreter's lock makes whole.
        buffer = self._buffer
        buffer += data
        if self._idle or len(buffer) > LIMIT:
            self._attend()

    def offer(self, data: bytes) -> bool:
        """Take `data` if it can be had without waiting; whether it was. If not, `watch_room` tells
        when it is worth trying again."""
        if len(self._buffer) + len(data) > LIMIT and not self._released:
            self._refused = True
            # Looked at again, as the writer may have emptied it before it saw `_refused`.
            if len(self._buffer) + len(data) > LIMIT:
                return False
        self.write(data)
        return True

    def watch_room(self, on_room: Callable[[], None]) -> None:
        """Have `on_room` called, in the writer's thread, after an offer was turned down and there
        is room again. It must not block."""
        self._on_room = on_room

    def release(self) -> None:
        """The machine is stopping: from now on `write` drops what has no place, and never waits."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def close(self, timeout: float = 2.0) -> bool:
        """Write what is left and end the writer; whether that took less than `timeout` seconds.

        If not, the reader has stopped reading, and what it has not read is lost.
        """
        self.release()
        self._closing = True
        self._wake_writer()
        if self._thread.is_alive():
            self._thread.join(timeout)
        atexit.unregister(self.close)
        done = not self._thread.is_alive()
        if done:
            with self._changed:
                self._wake.close()
        return done

    def _attend(self) -> None:
        if self._idle:
            self._idle = False
            self._wake_writer()
        if len(self._buffer) <= LIMIT:
            return
        with self._changed:
            while len(self._buffer) > LIMIT and not self._released:
                self._changed.wait()
            if self._released:
                del self._buffer[LIMIT:]

    def _wake_writer(self) -> None:
        with self._changed:  # not while `close` gives the number back for another file
            if self._wake.fd >= 0:
                self._wake.signal()

    # --- the writer's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake.fd, select.POLLIN)
        try:
            while self._write_batch() or not self._closing:
                if self._buffer:
                    continue
                self._idle = True
                # A byte that came before `_idle` was set has not woken this thread.
                if not self._buffer and not self._closing:
                    poller.poll()
                self._wake.drain()
                self._idle = False
                if not self._closing:
                    time.sleep(_GATHER)
        finally:
            self._fd = None
            self.release()

    def _write_batch(self) -> bool:
        with self._changed:
            batch = bytes(self._buffer)
            del self._buffer[: len(batch)]
            self._changed.notify_all()
        if self._refused:
            self._refused = False
            self._on_room()
        if not batch:
            return False
        if self._observer is not None:
            self._observer(batch)
        if self._fd is not None:
            self._write_out(self._fd, batch)
        return True

    def _write_out(self, fd: int, data: bytes) -> None:
        try:
            write_all(fd, data)
        except OSError as error:
            self._fd = None
            reason = os.strerror(error.errno or errno.EIO)
            self._warn(f"the guest's console output is dropped from here on: {reason}")
