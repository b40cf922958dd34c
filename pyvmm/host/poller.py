"""Sleeping until one of many files has something to say: epoll(7), edge-triggered."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import NamedTuple

from pyvmm.errors import HostError
from pyvmm.host.syscalls import Closable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
# The other end has closed its sending half; both halves are closed; an error waits to be read.
ENDED = select.EPOLLRDHUP
HUNG_UP = select.EPOLLHUP
FAILED = select.EPOLLERR

_ALL = READABLE | WRITABLE | ENDED | select.EPOLLET
_AT_ONCE = 32  # events taken by one wait; the others come with the next

Handler = Callable[[int], None]


class Source(NamedTuple):
    """Something that ends a wait: `fd` becoming ready for `events` (READABLE, WRITABLE).

    It ends one each time it *becomes* ready, so whoever it wakes reads (or writes) until EAGAIN.
    With `on_demand` it is watched only after `Poller.arm`, and then ends one wait, at once if it is
    ready already. `fd` may itself be an epoll instance, for any number of files that come and go.
    """

    fd: int
    events: int = READABLE
    on_demand: bool = False


class Poller(Closable):
    """Waits for any of its files, and calls the handlers of those that changed.

    Edge-triggered: a file is reported when something *became* possible, so whoever reads or writes
    it goes on until it would block. Nobody has to drain an eventfd: each signal, even one to a
    counter that is not zero, ends one wait. A handler gets the events as bits (READABLE, …). It
    notes what it hears and neither closes nor adds files, so that no event can reach the wrong one.
    """

    def __init__(self) -> None:
        """Raises HostError."""
        self._handlers: dict[int, Handler] = {}
        self._always: dict[int, int] = {}  # what is watched without being armed, by descriptor
        self._on_demand: list[Source] = []
        self._armed_before: set[int] = set()
        self._disarm: list[int] = []  # descriptors to be watched as always after the next wait
        try:
            self._epoll = select.epoll()
        except OSError as error:
            raise HostError(error.errno or 0, "epoll_create1") from None

    def add(self, fd: int, handler: Handler | None, events: int = _ALL) -> None:
        """Report what happens to `fd` to `handler`; without one it only ends a wait. Raises
        HostError."""
        events |= select.EPOLLET
        self._control(self._epoll.register, fd, events)
        self._always[fd] = events
        if handler is not None:
            self._handlers[fd] = handler

    def replace(self, fd: int, handler: Handler) -> None:
        """From now on `handler` hears of `fd`."""
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Report `fd` no more; to be called before it is closed."""
        del self._always[fd]
        self._handlers.pop(fd, None)
        self._epoll.unregister(fd)

    def watch(self, source: Source) -> None:
        """Have `source` end waits. One descriptor can be that of two sources, one of them on
        demand. Raises HostError."""
        if source.on_demand:
            self._on_demand.append(source)
        else:
            self.add(source.fd, None, source.events)

    def arm(self) -> None:
        """Watch the sources that are watched on demand, until each has ended a wait once.

        Raises HostError."""
        for source in self._on_demand:
            fd = source.fd
            always = self._always.get(fd)
            known = always is not None or fd in self._armed_before
            events = source.events | select.EPOLLONESHOT
            if always is not None:
                events = source.events | always
                self._disarm.append(fd)
            self._control(self._epoll.modify if known else self._epoll.register, fd, events)
            self._armed_before.add(fd)

    def _control(self, change: Callable[[int, int], None], fd: int, events: int) -> None:
        try:
            change(fd, events)
        except OSError as error:
            raise HostError(error.errno or 0, "epoll_ctl") from None

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until something happened or `timeout` seconds have passed; call the handlers. What
        has happened to a file since the last wait counts once."""
        happened = self._epoll.poll(timeout, _AT_ONCE)
        while self._disarm:
            fd = self._disarm.pop()
            self._epoll.modify(fd, self._always[fd])
        if self._handlers:
            for fd, events in happened:
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(events)

    def close(self) -> None:
        self._epoll.close()
