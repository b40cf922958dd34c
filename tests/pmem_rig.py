"""A pmem device on a file, and what a driver asks of it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from pyvmm.virtio.device import SharedMemory
from pyvmm.virtio.pmem.device import PmemDevice

PLACE = SharedMemory(5 << 30, 2 << 20)
FLUSH = struct.pack("<L", 0)
DONE, FAILED = bytes(4), b"\xff" * 4


class Storage:
    """Counts the syncs of a file, in whose place it can hang and fail."""

    def __init__(self) -> None:
        self.count = 0
        self.error = 0
        self.begun = Event()
        self.may_end = Event()
        self.may_end.set()

    def sync(self, fd: int) -> None:
        self.begun.set()
        assert self.may_end.wait(60)
        self.count += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        os.fdatasync(fd)

    def break_down(self) -> None:
        self.error = errno.EIO


@contextmanager
def pmem(storage: Storage | None = None, log: list[str] | None = None) -> Iterator[PmemDevice]:
    """A device whose memory is PLACE, on a file of that size."""
    fd = os.memfd_create("pmem")
    os.ftruncate(fd, PLACE.size)
    sync = os.fdatasync if storage is None else storage.sync
    try:
        yield PmemDevice(fd, PLACE, sync=sync, log=None if log is None else log.append)
    finally:
        os.close(fd)
