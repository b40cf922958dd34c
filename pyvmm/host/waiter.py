"""Sleeping until one of a few eventfds is signalled: epoll(7)."""

from __future__ import annotations

import select

from pyvmm.errors import HostError
from pyvmm.host.syscalls import EventFd


class Waiter:
    """Waits for `kick`, or for `stop`.

    `kick` is watched edge-triggered, so nobody has to drain it: each signal, even one to a counter
    that is not zero, ends one wait. `stop` is watched level-triggered: once signalled, no wait
    blocks any more.
    """

    def __init__(self, kick: EventFd, stop: EventFd) -> None:
        """Raises HostError."""
        try:
            self._epoll = select.epoll()
            self._epoll.register(kick.fd, select.EPOLLIN | select.EPOLLET)
            self._epoll.register(stop.fd, select.EPOLLIN)
        except OSError as error:
            raise HostError(error.errno or 0, "epoll") from None

    def wait(self) -> None:
        """Block until there is a signal; signals that came since the last wait count as one."""
        self._epoll.poll(-1, 2)

    def close(self) -> None:
        self._epoll.close()
