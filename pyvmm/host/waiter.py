"""Sleeping until one of a few file descriptors has something to tell: epoll(7)."""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.errors import HostError
from pyvmm.host.syscalls import EventFd


class Source(NamedTuple):
    """Something else to wait for than a kick: `fd` becoming ready for `events` (EPOLLIN, EPOLLOUT).

    It is watched edge-triggered: it ends a wait each time it *becomes* ready, so whoever it wakes
    reads (or writes) until EAGAIN. With `on_demand` it is watched only after `Waiter.arm`, and then
    ends one wait, at once if it is ready already. `fd` may itself be an epoll instance, for any
    number of descriptors that come and go.
    """

    fd: int
    events: int = select.EPOLLIN
    on_demand: bool = False


class Waiter:
    """Waits for `kick`, for one of `sources`, or for `stop`.

    `kick` is watched edge-triggered, so nobody has to drain it: each signal, even one to a counter
    that is not zero, ends one wait. `stop` is watched level-triggered: once signalled, no wait
    blocks any more.
    """

    def __init__(self, kick: EventFd, stop: EventFd, sources: Sequence[Source] = ()) -> None:
        """Raises HostError."""
        self._on_demand = [source for source in sources if source.on_demand]
        self._always: dict[int, int] = {}  # what is watched without being armed, by descriptor
        self._armed_before: set[int] = set()
        self._disarm: list[int] = []  # descriptors to be watched as always after the next wait
        self._most = 2 + len(sources)
        try:
            self._epoll = select.epoll()
            self._epoll.register(kick.fd, select.EPOLLIN | select.EPOLLET)
            self._epoll.register(stop.fd, select.EPOLLIN)
            for source in sources:
                if not source.on_demand:
                    self._always[source.fd] = source.events | select.EPOLLET
                    self._epoll.register(source.fd, source.events | select.EPOLLET)
        except OSError as error:
            raise HostError(error.errno or 0, "epoll") from None

    def arm(self) -> None:
        """Watch the sources that are watched on demand, until each has ended a wait once.

        Raises HostError."""
        for source in self._on_demand:
            fd = source.fd
            always = self._always.get(fd)
            known = always is not None or fd in self._armed_before
            change = self._epoll.modify if known else self._epoll.register
            events = source.events | select.EPOLLONESHOT
            if always is not None:
                events = source.events | always
                self._disarm.append(fd)
            try:
                change(fd, events)
            except OSError as error:
                raise HostError(error.errno or 0, "epoll") from None
            self._armed_before.add(fd)

    def wait(self, seconds: float | None = None) -> None:
        """Block until there is a signal, or for `seconds`; signals that came since the last wait
        count as one."""
        self._epoll.poll(seconds, self._most)
        while self._disarm:
            fd = self._disarm.pop()
            self._epoll.modify(fd, self._always[fd])

    def close(self) -> None:
        self._epoll.close()
