"""Where a disk's bytes are: a backend moves them between guest memory and its storage.

A backend knows nothing of rings and requests; a new one (an overlay, another format, a network
disk) is a class with these few methods.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from pyvmm.errors import HostError
from pyvmm.host.files import IOV_MAX, SECTOR, ImageFile, preadv_all, pwritev_all

_preadv, _pwritev = os.preadv, os.pwritev


class Backend(Protocol):
    """Storage of `size_sectors` sectors of 512 bytes. Several threads may call it at once.

    Offsets and sizes are in bytes, whole sectors within the size: the device has checked that.
    """

    size_sectors: int
    read_only: bool

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """Fill `views`, `size` bytes in all, with what is at `offset`. Raises HostError, and then
        the views may hold anything."""

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        """Write `views`, `size` bytes in all, at `offset`; need not be durable yet. Raises
        HostError, and then any part of the range may have been written."""

    def flush(self) -> None:
        """Make durable what was written by calls that have returned. Raises HostError."""

    def close(self) -> None:
        """Give up the storage; no call may be in progress or follow."""


class FileBackend:
    """A raw image file or block device, straight to and from guest memory."""

    def __init__(self, image: ImageFile) -> None:
        self._image = image
        self._fd = image.fd
        self.size_sectors = image.size // SECTOR
        self.read_only = image.read_only

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend. An image that somebody cut short under us is a HostError, EIO."""
        try:
            # One call nearly always does it; whatever it left out is done from the start again.
            if len(views) <= IOV_MAX and _preadv(self._fd, views, offset) == size:
                return
            done = preadv_all(self._fd, views, offset)
        except OSError as error:
            raise HostError(error.errno or 0, f"read of {size} bytes at {offset:#x}") from None
        if done != size:
            raise HostError(
                errno.EIO, f"read of {size} bytes at {offset:#x}, past the end the image has now"
            )

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend."""
        try:
            if len(views) <= IOV_MAX and _pwritev(self._fd, views, offset) == size:
                return
            done = pwritev_all(self._fd, views, offset)
        except OSError as error:
            raise HostError(error.errno or 0, f"write of {size} bytes at {offset:#x}") from None
        if done != size:
            raise HostError(errno.EIO, f"write of {size} bytes at {offset:#x} stopped at {done}")

    def flush(self) -> None:
        """See Backend: fdatasync(2), which waits for the storage itself."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise HostError(error.errno or 0, "fdatasync") from None

    def close(self) -> None:
        """See Backend; also gives up the lock on the image."""
        self._fd = -1
        self._image.close()
