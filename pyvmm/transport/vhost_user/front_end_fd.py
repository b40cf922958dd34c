"""A front end's eventfds: checked to be such, and never waited for."""

from __future__ import annotations

import errno
import fcntl
import os
import select

from pyvmm.errors import HostError
from pyvmm.host.syscalls import EventFd
from pyvmm.vhost_user.protocol import FrontEndError


class FrontEndFd(EventFd):
    """An eventfd that another process may give and replace; before it does, one of our own.

    The number `fd` stays the same for good, so that a thread about to signal cannot hit another
    file that got the number meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._may_block = False
        # Made once, as `signal` is part of each batch of requests; `fd` never changes.
        self._room, self._count = select.poll(), select.poll()
        self._room.register(self.fd, select.POLLOUT)
        self._count.register(self.fd, select.POLLIN)

    def become(self, fds: tuple[int, ...]) -> None:
        """Be what `fds`, at most one and the caller's to close, is; without one, our own again.

        Raises FrontEndError for anything else than an eventfd, HostError; nothing changes then.
        """
        if fds:
            self._may_block = self._check(fds[0])
            self._take_over(fds[0])
        else:
            with EventFd() as own:
                self._take_over(own.fd)
                self._may_block = False

    @staticmethod
    def _check(fd: int) -> bool:
        """True if reading and writing it may block."""
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        except OSError as error:
            raise HostError(error.errno or 0, "a front end's file descriptor") from None
        # A pipe or a socket could be full for ever, a file would never be readable.
        if kind != "anon_inode:[eventfd]":
            raise FrontEndError(f"{kind} is not an eventfd")
        # O_NONBLOCK belongs to both sides, and a front end may rely on a read that blocks: it is
        # not ours to set.
        return not flags & os.O_NONBLOCK

    def _take_over(self, fd: int) -> None:
        try:
            os.dup2(fd, self.fd, inheritable=False)
        except OSError as error:
            raise HostError(error.errno or errno.EBADF, "dup2") from None

    def signal(self) -> None:
        if self._may_block and not self._room.poll(0):
            return
        super().signal()

    def drain(self) -> int:
        if self._may_block and not self._count.poll(0):
            return 0
        return super().drain()
