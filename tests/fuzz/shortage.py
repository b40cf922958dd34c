"""A host that has too little for a while: no more descriptors (by its own limit, so that each call
that makes one fails), no more threads, no place in an epoll instance.

Nothing is drawn while it lasts but from the random numbers that it has been given.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any, NoReturn
from unittest import mock

_thread_begins = threading._start_new_thread  # type: ignore[attr-defined]
_Epoll = select.epoll


@contextmanager
def short_of_descriptors(spare: int) -> Iterator[None]:
    """This process can have `spare` more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    used = {int(name) for name in os.listdir(listing)} - {listing}
    os.close(listing)
    limit = 0
    while limit in used or spare > 0:
        spare -= limit not in used
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Shortage:
    """`fails` is how likely a thread or a place in an epoll instance is refused; `lasts` says
    whether there is too little now."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.fails = 0.0
        self.lasts = False

    def _meets(self) -> bool:
        return self.rng.random() < self.fails

    def _begin_thread(self, *arguments: Any) -> Any:
        if self._meets():
            raise RuntimeError("can't start new thread")
        return _thread_begins(*arguments)

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """Now."""
        rng = self.rng
        kind = rng.randrange(3)
        with ExitStack() as ended:
            if kind < 2:
                ended.enter_context(short_of_descriptors(rng.choice((0, 0, 1, 2, 3, 4, 5, 6, 9))))
            if kind > 0:
                self.fails = rng.choice((0.1, 0.4, 1.0))
                ended.enter_context(mock.patch.object(select, "epoll", lambda: _Full(self)))
                ended.enter_context(
                    mock.patch.object(threading, "_start_new_thread", self._begin_thread)
                )
            self.lasts = True
            try:
                yield
            finally:
                self.fails, self.lasts = 0.0, False


class _Full:
    """An epoll instance that has no place for more."""

    def __init__(self, shortage: Shortage) -> None:
        self._shortage = shortage
        self._epoll = _Epoll()
        for name in ("unregister", "poll", "close", "fileno"):
            setattr(self, name, getattr(self._epoll, name))

    def _refuse(self) -> NoReturn:
        raise OSError(self._shortage.rng.choice((errno.ENOSPC, errno.ENOMEM)), "epoll is full")

    def register(self, fd: int, events: int) -> None:
        if self._shortage._meets():
            self._refuse()
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)
