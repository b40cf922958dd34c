"""System calls as pyvmm uses them: failures are `HostError`, never `OSError`."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import sys
from contextlib import suppress
from types import TracebackType
from typing import Self

from pyvmm.errors import HostError

# preadv2(2): only what is there already. 0: this Python has no such call.
RWF_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
if not RWF_NOWAIT:
    from pyvmm.host import at_once


def open_file(path: str, flags: int) -> int:
    """Open `path` with `flags` and O_CLOEXEC; the file descriptor. Raises HostError."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(error.errno or 0, f"open {path}") from None


def allow_descriptors(count: int) -> None:
    """Let this process have `count` files open, as far as its hard limit allows: 1,024 is what many
    systems begin with, for the sake of select(2)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def ioctl(fd: int, request: int, arg: int | bytearray | memoryview, call: str) -> int:
    """One ioctl; its result. `arg` is a number, or a buffer that the kernel may change in place.

    Retries on EINTR. Raises HostError that names `call`.
    """
    # fcntl.ioctl wants a signed 32-bit number.
    if isinstance(arg, int) and arg >= 1 << 31:
        arg -= 1 << 32
    while True:
        try:
            if isinstance(arg, int):
                return fcntl.ioctl(fd, request, arg)
            result: int = fcntl.ioctl(fd, request, arg, True)
            return result
        except InterruptedError:
            continue
        except OSError as error:
            raise HostError(error.errno or 0, call) from None


def create_memfd(name: str, size: int, *, fixed: bool = False) -> int:
    """An anonymous file of `size` bytes, all zero and not yet allocated. Raises HostError.

    With `fixed` nobody can change its size, nor seal it further, not even another process that it
    is given to.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if fixed else 0))
    except OSError as error:
        raise HostError(error.errno or 0, "memfd_create") from None
    try:
        os.ftruncate(fd, size)
        if fixed:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        os.close(fd)
        raise HostError(error.errno or 0, f"ftruncate of {name} to {size} bytes") from None
    return fd


def map_shared(fd: int, size: int, *, read_only: bool = False) -> mmap.mmap:
    """Map `size` bytes of `fd` shared, readable and, unless `read_only`, writable. Raises
    HostError."""
    protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
    except OSError as error:
        raise HostError(error.errno or 0, f"mmap of {size} bytes") from None
    except (ValueError, OverflowError):  # Python: the file is shorter, or no length is so large
        raise HostError(errno.EINVAL, f"mmap of {size} bytes") from None


def read_or_empty(path: str) -> str:
    """The text of a file that the kernel makes up (/proc, /sys); "" where it cannot be read. Names
    in it are as os.fsdecode has them: a group of processes, say, may have any."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def umask() -> int:
    """This process's file mode creation mask. (umask(2) would change it, for all threads.)"""
    for line in read_or_empty("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "Umask":
            return int(value, 8)
    return 0o077


def prefer_huge_pages(mapping: mmap.mmap) -> None:
    """Let the kernel back `mapping` with huge pages, if it was built and set up for them.

    For a memfd that is /sys/kernel/mm/transparent_hugepage/shmem_enabled, "advise" or "always".
    """
    with suppress(OSError):  # EINVAL: a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)


class Closable:
    """A thing that a ``with`` block closes at its end."""

    def close(self) -> None:
        """Give up what is held; a second time changes nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class EventFd(Closable):
    """An eventfd(2): a counter that `signal` raises, `drain` zeroes and epoll waits for. One that
    nobody refers to any more is closed."""

    fd = -1
    _lent = False

    def __init__(self) -> None:
        self._drained = 0
        try:
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise HostError(error.errno or 0, "eventfd") from None

    def fileno(self) -> int:
        return self.fd

    def lend(self) -> int:
        """The descriptor, for another process that is not trusted. O_NONBLOCK belongs to all who
        have the file, so from now on neither `signal` nor `drain` relies on it."""
        self._lent = True
        return self.fd

    def signal(self) -> None:
        """Add one. A counter that is full stays full: the reader is already woken."""
        if self._lent and not self._has_room:
            return
        try:
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:
            return

    def drain(self) -> int:
        """Take the counter's value, leaving zero; 0 if it was zero already."""
        try:
            count = self._read_at_once() if self._lent else os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0
        self._drained += count
        return count

    def _read_at_once(self) -> int:
        counter = bytearray(8)
        if RWF_NOWAIT:
            os.preadv(self.fd, [counter], -1, RWF_NOWAIT)
        else:
            at_once.read(self.fd, counter)
        return int.from_bytes(counter, sys.byteorder)

    @property
    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))

    @property
    def is_signalled(self) -> bool:
        """True if the counter is above zero."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def total(self) -> int:
        """The number of signals to it in all, by whomever; as /proc tells (proc(5), fdinfo)."""
        for line in read_or_empty(f"/proc/self/fdinfo/{self.fd}").splitlines():
            name, _, value = line.partition(":")
            if name == "eventfd-count":
                return self._drained + int(value, 16)
        return self._drained

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    __del__ = close
