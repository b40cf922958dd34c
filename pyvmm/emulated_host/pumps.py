"""Bytes from one descriptor to another, one step at a time, never blocking the others."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

_CHUNK = 1 << 16
# A pipe that poll(2) calls writable takes this much without blocking (pipe(7), PIPE_BUF). The
# user's descriptors are shared with other processes, so they are not to be made non-blocking.
_ATOMIC = 4096


class InputPump:
    """The user's standard input to its port, through `on_input`."""

    def __init__(
        self, source: int | None, port: socket.socket, on_input: Callable[[bytes], bytes]
    ) -> None:
        self.source = source
        self.port = port
        self.pending = b""
        self._on_input = on_input
        if source is None:
            self._end()

    @property
    def wants_input(self) -> bool:
        """True to wait for the source: not while the other side still has bytes to take."""
        return self.source is not None and not self.pending

    def receive(self) -> None:
        """Read what the source has; an end of file is passed on."""
        assert self.source is not None
        try:
            data = os.read(self.source, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""  # EIO of a terminal that hung up, EISDIR, ...: no more input.
        if not data:
            self.source = None
            self._end()
            return
        self.pending = self._on_input(data)

    def send(self) -> None:
        """Pass on what is pending, as far as the port takes it."""
        try:
            self.pending = self.pending[self.port.send(self.pending) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.pending, self.source = b"", None

    def _end(self) -> None:
        # Only this direction: closing it all would make QEMU drop what it has not read yet.
        with contextlib.suppress(OSError):
            self.port.shutdown(socket.SHUT_WR)


class OutputPump:
    """A port to one of the user's descriptors, up to the mark that ends the stream."""

    def __init__(self, port: socket.socket, target: int, mark: bytes) -> None:
        self.port = port
        self.target = target
        self.ended = False  # the mark has come
        self.broken = False  # the target takes no more
        self.see: Callable[[bytes], None] = lambda data: None
        self._mark = mark
        self._held = b""  # what may be the start of the mark
        self._pending = b""

    @property
    def done(self) -> bool:
        return self.ended and not self._pending

    @property
    def wants_output(self) -> bool:
        """True to wait for the target rather than for the port."""
        return bool(self._pending)

    def receive(self) -> None:
        """Take what the port has."""
        try:
            data = self.port.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:  # QEMU is gone; whatever looked like a mark was not one.
            self._pending, self._held, self.ended = self._held, b"", True
            return
        data = self._held + data
        if data.endswith(self._mark):
            self.ended, self._held = True, b""
            self._pending = data[: -len(self._mark)]
        else:
            keep = mark_prefix(data, self._mark)
            self._held = data[len(data) - keep :]
            self._pending = data[: len(data) - keep]
        if self._pending:
            self.see(self._pending)
        if self.broken:
            self._pending = b""

    def send(self) -> None:
        """Pass on a piece of what is pending."""
        try:
            self._pending = self._pending[os.write(self.target, self._pending[:_ATOMIC]) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.broken, self._pending = True, b""


def mark_prefix(data: bytes, mark: bytes) -> int:
    """The number of bytes at the end of `data` that may be the beginning of `mark`."""
    for length in range(min(len(data), len(mark) - 1), 0, -1):
        if data.endswith(mark[:length]):
            return length
    return 0
