"""Backends of disks: they move bytes between guest memory and their storage.

A backend knows nothing of rings and requests; a new one (another format, a network disk, a function
of the sector number) is a class with a few methods:

    class Zeroes(Backend):
        size_sectors, read_only = 2048, True

        def readv(self, views, size, offset):
            scatter(bytes(size), views)

docs/tutorial/03 builds one step by step.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress

from pyvmm.errors import HostError
from pyvmm.host import holes
from pyvmm.host.files import IOV_MAX, SECTOR, ImageFile, preadv_all, pwritev_all
from pyvmm.host.syscalls import RWF_NOWAIT
from pyvmm.virtio.blk.config import BlockSizes

_preadv, _pwritev = os.preadv, os.pwritev
_ZEROES = memoryview(bytes(256 << 10))


class Backend(ABC):
    """Storage of `size_sectors` sectors of 512 bytes. Several threads may call it at once.

    Offsets and sizes are in bytes, whole sectors within the size: the device has checked that. It
    hands over 4 MiB of data at a time at most (PIECE_BYTES), however long a guest's request is. A
    method that fails raises HostError (or OSError); the guest then gets IOERR, the user a line.

    `block_sizes` is what the guest is told to align to. `can_discard` says whether `discard` and
    `write_zeroes` may free storage; DISCARD is offered to the guest only then. `can_resize` says
    that there is a `resize`. `misses` is how many reads have had to wait for the storage so far, as
    far as that is known; while it grows, reads are announced by `expect`.
    """

    size_sectors: int
    read_only: bool = False
    can_discard: bool = False
    can_resize: bool = False
    block_sizes: BlockSizes = BlockSizes()
    misses: int = 0

    @abstractmethod
    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """Fill `views`, `size` bytes in all, with what is at `offset`. Raises HostError, and then
        the views may hold anything."""

    def expect(self, size: int, offset: int) -> None:  # noqa: B027 - a hint, free to be ignored
        """A read of `size` bytes at `offset` comes soon, one of several: the storage may work on
        all of them meanwhile. Does not wait for it, and raises nothing."""

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        """Write `views`, `size` bytes in all, at `offset`; need not be durable yet. Raises
        HostError, and then any part of the range may have been written. Never called if
        `read_only`."""
        raise HostError(errno.EROFS, f"write of {size} bytes at {offset:#x}")

    def flush(self) -> None:  # noqa: B027 - nothing to do for storage that is as durable as it gets
        """Make durable what was written by calls that have returned. Raises HostError."""

    def discard(self, offset: int, size: int) -> None:  # noqa: B027 - a hint, free to be ignored
        """The guest no longer needs these bytes; what they read as from now on is up to you."""

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        """Make `size` bytes at `offset` read as zeroes; storage may be freed if `may_unmap`.

        Raises HostError. Unless overridden it writes them.
        """
        end = offset + size
        while offset < end:
            piece = _ZEROES[: end - offset]
            self.writev([piece], len(piece), offset)
            offset += len(piece)

    def storage_for(self, size: int) -> int:
        """The bytes of storage under a disk of `size` bytes. Raises HostError if it cannot have
        that size."""
        return size

    def resize(self, size: int | None) -> None:
        """Have `size` bytes from now on, whole sectors, or (None) what the storage has become;
        sets `size_sectors`. Raises HostError."""
        raise HostError(errno.EOPNOTSUPP, "resize")

    def share(self) -> None:  # noqa: B027 - nothing to do for one that remembers nothing itself
        """Processes that are forked from now on use the storage one after the other; each may be
        killed at any moment, and the next has to find what it wrote. There is no resize any more.
        Raises HostError."""

    def close(self) -> None:  # noqa: B027 - a choice
        """Give up the storage; no call may be in progress or follow."""


def scatter(data: bytes | bytearray | memoryview, views: list[memoryview]) -> None:
    """Copy `data` into `views`, which have room for just that much."""
    if len(views) == 1:
        views[0][:] = data
        return
    start = 0
    source = memoryview(data)
    for view in views:
        end = start + len(view)
        view[:] = source[start:end]
        start = end


def gather(views: list[memoryview], into: memoryview) -> None:
    """Copy `views` one after the other to the start of `into`, which has room for all of them."""
    start = 0
    for view in views:
        end = start + len(view)
        into[start:end] = view
        start = end


def cut(views: list[memoryview], start: int, size: int) -> list[memoryview]:
    """The part of `views` from byte `start` on, `size` bytes long."""
    part = []
    for view in views:
        if start >= len(view):
            start -= len(view)
            continue
        piece = view[start : start + size]
        part.append(piece)
        size -= len(piece)
        start = 0
        if not size:
            break
    return part


def cut_all(views: list[memoryview], most: int) -> Iterator[tuple[list[memoryview], int]]:
    """`views` in parts of `most` bytes, the last perhaps shorter, and the size of each."""
    part: list[memoryview] = []
    room = most
    for view in views:
        while len(view) >= room:
            part.append(view[:room])
            yield part, most
            view = view[room:]
            part, room = [], most
        if view:
            part.append(view)
            room -= len(view)
    if part:
        yield part, most - room


class FileBackend(Backend):
    """A raw image file or block device, straight to and from guest memory."""

    can_resize = True
    _at_once = RWF_NOWAIT  # only what is in the page cache

    def __init__(self, image: ImageFile) -> None:
        self._image = image
        self._fd = image.fd
        self._holes = holes.Holes(image.fd, image.is_block_device)
        self.size_sectors = image.size // SECTOR
        self.read_only = image.read_only
        self.can_discard = not image.read_only
        self.block_sizes = BlockSizes(*image.block_sizes) if image.block_sizes else BlockSizes()

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend. An image that somebody cut short under us is a HostError, EIO."""
        try:
            # One call nearly always does it.
            if len(views) <= IOV_MAX and _preadv(self._fd, views, offset, self._at_once) == size:
                return
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._at_once = 0  # storage that does not tell: tmpfs, for one
        if self._at_once:
            self.misses += 1
        try:
            # Whatever it left out or refused is done from the start again.
            done = preadv_all(self._fd, views, offset)
        except OSError as error:
            raise HostError(error.errno or 0, f"read of {size} bytes at {offset:#x}") from None
        if done != size:
            raise HostError(
                errno.EIO, f"read of {size} bytes at {offset:#x}, past the end the image has now"
            )

    def expect(self, size: int, offset: int) -> None:
        """See Backend: into the page cache, posix_fadvise(2)."""
        with suppress(OSError):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

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

    def discard(self, offset: int, size: int) -> None:
        """See Backend: a hole in the file; ignored where the file system has none."""
        try:
            self._holes.discard(offset, size)
        except OSError as error:
            raise HostError(error.errno or 0, f"discard of {size} bytes at {offset:#x}") from None

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        """See Backend: a hole or a zeroed extent where the file system has them, or written."""
        try:
            done = self._holes.zero(offset, size, may_unmap)
        except OSError as error:
            raise HostError(
                error.errno or 0, f"write zeroes of {size} bytes at {offset:#x}"
            ) from None
        if not done:
            super().write_zeroes(offset, size, may_unmap)

    def resize(self, size: int | None) -> None:
        """See Backend. A block device has the size it has: EINVAL for another one."""
        try:
            if size is not None and not self._image.is_block_device:
                os.ftruncate(self._fd, size)
            end = os.lseek(self._fd, 0, os.SEEK_END)  # reads and writes say where they are
        except OSError as error:
            raise HostError(error.errno or 0, f"resize of {self._image.path}") from None
        if size is not None and end != size:
            raise HostError(
                errno.EINVAL,
                f"resize of {self._image.path} from here",
                cure="resize the block device itself, then the disk, without a size",
            )
        self.size_sectors = end // SECTOR

    def close(self) -> None:
        """See Backend; also gives up the lock on the image."""
        self._fd = -1
        self._image.close()
