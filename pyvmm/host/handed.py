"""Files that somebody else has opened for us, where we open nothing by name (pyvmm.host.box).

They have the names by which they would be opened here. Whoever opens a file asks `take` first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import local

from pyvmm.host.syscalls import Closable

MOST = 32  # descriptors that come with one request: a tap has 16 at most

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
