"""Writing to terminals and pipes that others share, and that nobody may be reading."""

from __future__ import annotations

import _socket
import os
import select
import stat
from collections.abc import Callable
from contextlib import suppress

# A pipe that poll(2) calls writable takes this much without blocking (pipe(7), PIPE_BUF).
_ATOMIC = 4096
_PTS = range(136, 144)  # major numbers of pseudoterminals: Documentation/admin-guide/devices.txt
_TTY = 4


def write_all(fd: int, data: bytes) -> None:
    """Write `data`, also where whoever shares this terminal or pipe with us has made it
    non-blocking. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            _wait(fd, None)


def _wait(fd: int, seconds: float | None) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll(None if seconds is None else seconds * 1000)


_Identity = tuple[int, int, int]
_opened: dict[_Identity, int] = {}


def open_streams() -> None:
    """Open standard output and error once more now, for every Outlet to come: another user, whom
    this process is going to be, could not."""
    for fd in (1, 2):
        with suppress(OSError):
            found = os.fstat(fd)
            if _is_pipe_or_terminal(found) and _identity(found) not in _opened:
                _opened[_identity(found)] = _open_again(fd)


def close_streams() -> None:
    """Close what `open_streams` has opened, for a process that goes on when its guest has ended:
    who reads the streams waits for their end."""
    while _opened:
        os.close(_opened.popitem()[1])


def _open_again(fd: int) -> int:
    """Raises OSError."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    return os.open(f"/proc/self/fd/{fd}", flags)


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino, found.st_rdev


class Outlet:
    """Writes to `fd` as much as can be had without waiting.

    The flags of `fd` are left alone, for other processes share them: a pipe or a terminal is opened
    once more, a socket is asked each time.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._own = -1
        self._socket: _socket.socket | None = None
        found = os.fstat(fd)
        self.identity = _identity(found)
        self.may_wait = True
        if stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
            self.may_wait = False  # a disk is not waited for
        elif stat.S_ISSOCK(found.st_mode):
            self._socket = _socket.socket(fileno=os.dup(fd))
        elif _is_pipe_or_terminal(found):
            opened = _opened.get(self.identity, -1)
            with suppress(OSError):  # another user's
                self._own = os.dup(opened) if opened >= 0 else _open_again(fd)

    @property
    def descriptor(self) -> int:
        """The descriptor to be watched for room."""
        return self._own if self._own >= 0 else self._fd

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write, and return how many bytes of `data` were taken: 0 if there is no room now. Raises
        OSError."""
        try:
            if self._socket is not None:
                return self._socket.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
            if self._own >= 0:
                return os.write(self._own, data)
            if not self.may_wait:
                return os.write(self._fd, data)
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            return os.write(self._fd, memoryview(data)[:_ATOMIC]) if poll.poll(0) else 0
        except (BlockingIOError, InterruptedError):
            return 0

    def close(self) -> None:
        if self._own >= 0:
            os.close(self._own)
            self._own = -1
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _is_pipe_or_terminal(found: os.stat_result) -> bool:
    return stat.S_ISFIFO(found.st_mode) or _is_terminal(found)


def _is_terminal(found: os.stat_result) -> bool:
    """True if opening it once more gives the same terminal: /dev/ptmx, for one, makes another."""
    return stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) in (*_PTS, _TTY)


class Outbox:
    """Text that waits to be written to `fd`, up to `limit` bytes. Text without room is left out and
    counted, and `notice(count)` says so in its place. One thread at a time may use it."""

    def __init__(self, fd: int, limit: int, notice: Callable[[int], bytes]) -> None:
        self.outlet = Outlet(fd)
        self._limit = limit
        self._notice = notice
        self._waiting = bytearray()
        self._untold = 0
        self.left_out = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def has_room(self, size: int) -> bool:
        """True if `size` bytes would not be left out."""
        return not self._waiting or len(self._waiting) + size <= self._limit

    def put(self, data: bytes, count: int = 1) -> None:
        """Take `data`, or leave it out as `count`."""
        if self._untold or not self.has_room(len(data)):
            self.leave_out(count)
        else:
            self._waiting += data

    def leave_out(self, count: int) -> None:
        """Something that counts as `count` has no room."""
        self._untold += count
        self.left_out += count

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._untold = 0

    def send(self) -> int:
        """Write what can be written without waiting; how many bytes. Raises OSError."""
        done = 0
        while True:
            if not self._waiting and self._untold:
                self._waiting += self._notice(self._untold)
                self._untold = 0
            if not self._waiting:
                return done
            taken = self.outlet.write(self._waiting)
            if not taken:
                return done
            del self._waiting[:taken]
            done += taken

    def flush(self, patience: float) -> bool:
        """True if all was written within `patience` seconds since the last progress."""
        try:
            while len(self) or self._untold:
                if not self.send():
                    poll = select.poll()
                    poll.register(self.outlet.descriptor, select.POLLOUT)
                    if not poll.poll(patience * 1000):
                        return False
        except OSError:
            return False
        return True
