"""Sleeping until one of many files has something to say: epoll(7), edge-triggered."""

from __future__ import annotations

import select
from collections.abc import Callable

from pyvmm.errors import HostError
from pyvmm.host.syscalls import Closable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
# The other end has closed its sending half; both halves are closed; an error waits to be read.
ENDED = select.EPOLLRDHUP
HUNG_UP = select.EPOLLHUP
FAILED = select.EPOLLERR

_ALL = READABLE | WRITABLE | ENDED | select.EPOLLET
_AT_ONCE = 256  # events taken by one wait; the others come with the next

Handler = Callable[[int], None]


class Poller(Closable):
    """Waits for any of its files, and calls the handler of each that changed.

    Edge-triggered: a file is reported when something *became* possible, so whoever reads or writes
    it goes on until it would block. A handler gets the events as bits (READABLE, …). It notes what
    it hears and neither closes nor adds files, so that no event can reach the wrong one.
    """

    def __init__(self) -> None:
        """Raises HostError."""
        self._handlers: dict[int, Handler] = {}
        try:
            self._epoll = select.epoll()
        except OSError as error:
            raise HostError(error.errno or 0, "epoll_create1") from None

    def add(self, fd: int, handler: Handler, events: int = _ALL) -> None:
        """Report what happens to `fd` to `handler`. Raises HostError."""
        try:
            self._epoll.register(fd, events | select.EPOLLET)
        except OSError as error:
            raise HostError(error.errno or 0, "epoll_ctl") from None
        self._handlers[fd] = handler

    def replace(self, fd: int, handler: Handler) -> None:
        """From now on `handler` hears of `fd`."""
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Report `fd` no more; to be called before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until something happened or `timeout` seconds have passed; call the handlers."""
        for fd, events in self._epoll.poll(timeout, _AT_ONCE):
            self._handlers[fd](events)

    def close(self) -> None:
        self._epoll.close()
