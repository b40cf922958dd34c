"""Files that somebody else has opened for us, where we open nothing by name (pyvmm.host.box).

They have the names by which they would be opened here. Whoever opens a file asks `take` first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import local
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError
from pyvmm.host.syscalls import Closable

if TYPE_CHECKING:
    import socket

MOST = 40  # descriptors that come with one request: a tap with 16 queues has 34

_of_thread = local()


class Descriptors(Closable):
    """Open descriptors that came from somebody, until each is taken; the rest is closed."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self.fds = list(fds)

    def close(self) -> None:
        while self.fds:
            with suppress(OSError):  # of a file system's: it is closed all the same
                os.close(self.fds.pop())


@contextmanager
def files(names: Mapping[str, int], owner: Descriptors) -> Iterator[None]:
    """In this thread, `take` finds the descriptors of `names`, which `owner` has."""
    before = getattr(_of_thread, "found", None)
    _of_thread.found = dict(names), owner
    try:
        yield
    finally:
        _of_thread.found = before


def present() -> bool:
    """True if what this thread opens was opened by somebody else."""
    return getattr(_of_thread, "found", None) is not None


def take(name: str) -> int | None:
    """The descriptor of that name, which is the caller's from now on; None if there is none."""
    found = getattr(_of_thread, "found", None)
    if found is None:
        return None
    names, owner = found
    fd: int | None = names.pop(name, None)
    if fd is not None:
        owner.fds.remove(fd)
    return fd


def has(name: str) -> bool:
    """True if `take` would find it."""
    found = getattr(_of_thread, "found", None)
    return found is not None and name in found[0]


def take_stream(name: str) -> socket.socket:
    """A connected stream socket of that name. Raises ConfigError if there is none, and closes what
    is something else."""
    import socket

    fd = need(name)
    try:
        found = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
    else:
        with suppress(OSError):
            found.getpeername()
            if found.type == socket.SOCK_STREAM:
                return found
        found.close()
    raise ConfigError("what was handed over is no stream socket that is connected")


def take_pipe(name: str) -> int:
    """An end of a pipe of that name; likewise."""
    fd = need(name)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise ConfigError("what was handed over is no pipe")


def need(name: str) -> int:
    """What `take` finds. Raises ConfigError if there is none."""
    fd = take(name)
    if fd is None:
        raise ConfigError(f"no {name} was handed over")
    return fd
