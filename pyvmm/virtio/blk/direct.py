"""A raw image past the host's page cache (O_DIRECT), whatever the guest's buffers look like.

Direct I/O wants offsets, sizes and memory addresses aligned to the storage's logical block. Guests
nearly always are. Where the kernel refuses a buffer (EINVAL), or a request has only part of a
block, the bytes go through an aligned buffer of our own, which is all that a request costs.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import nullcontext
from threading import Lock

from pyvmm.errors import HostError
from pyvmm.host.files import SECTOR, ImageFile, preadv_all, pwritev_all
from pyvmm.virtio.blk.backend import FileBackend, cut, gather, scatter

_BLOCKS = (512, 1024, 2048, 4096)  # tried in this order to find out what the storage wants
_BOUNCE = 1 << 20  # bytes


class DirectBackend(FileBackend):
    """A raw image opened with O_DIRECT. `block` is the alignment that its storage wants."""

    _at_once = 0  # every read waits for the storage

    def __init__(self, image: ImageFile) -> None:
        """Find out the alignment by reading. Raises HostError, also if no read works."""
        super().__init__(image)
        try:
            self._bounce = memoryview(mmap.mmap(-1, _BOUNCE))  # page-aligned
        except OSError as error:
            raise HostError(error.errno or 0, "mmap of a buffer") from None
        self._bounce_lock = Lock()
        self.block = self._probe()
        # Where the guest may change only part of a block, no other write may come between our
        # reading and our writing of it.
        whole = self.block == SECTOR
        self._write_lock: Lock | nullcontext[None] = nullcontext() if whole else Lock()
        if self.block > SECTOR:
            self.block_sizes = self.block_sizes.with_logical(self.block)
            self._cut_off_tail()

    def _cut_off_tail(self) -> None:
        # The rest of an odd tail cannot be read in one piece.
        self.size_sectors -= self.size_sectors % (self.block // SECTOR)

    def resize(self, size: int | None) -> None:
        """See Backend."""
        super().resize(size)
        self._cut_off_tail()

    def _probe(self) -> int:
        for block in _BLOCKS:
            try:
                os.preadv(self._fd, [self._bounce[:block]], 0)
                return block
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise HostError(error.errno or 0, f"read of {self._image.path}") from None
        raise HostError(errno.EINVAL, f"direct read of {self._image.path}")

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend."""
        if not (offset | size) & (self.block - 1):
            try:
                super().readv(views, size, offset)
                return
            except HostError as error:
                if error.errno != errno.EINVAL:
                    raise
        with self._bounce_lock:
            self._read_bounced(views, size, offset)

    def expect(self, size: int, offset: int) -> None:
        """See Backend: nothing, as the page cache is not to have it."""

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend."""
        with self._write_lock:
            if not (offset | size) & (self.block - 1):
                try:
                    super().writev(views, size, offset)
                    return
                except HostError as error:
                    if error.errno != errno.EINVAL:
                        raise
            with self._bounce_lock:
                self._write_bounced(views, size, offset)

    def _read_bounced(self, views: list[memoryview], size: int, offset: int) -> None:
        for start, first, count in self._pieces(size, offset):
            window = self._fill(offset + start - first, first + count)
            scatter(window[first : first + count], cut(views, start, count))

    def _write_bounced(self, views: list[memoryview], size: int, offset: int) -> None:
        for start, first, count in self._pieces(size, offset):
            place = offset + start - first
            whole = not (first | count) & (self.block - 1)
            window = self._bounce[:count] if whole else self._fill(place, first + count)
            gather(cut(views, start, count), window[first : first + count])
            try:
                done = pwritev_all(self._fd, [window], place)
            except OSError as error:
                raise HostError(error.errno or 0, f"write of {size} bytes at {offset:#x}") from None
            if done != len(window):
                raise HostError(errno.EIO, f"write of {size} bytes at {offset:#x} stopped")

    def _pieces(self, size: int, offset: int) -> list[tuple[int, int, int]]:
        """(start within the request, bytes before it in its block, bytes), each for one window."""
        pieces, start = [], 0
        while start < size:
            first = (offset + start) & (self.block - 1)
            count = min(size - start, _BOUNCE - first)
            pieces.append((start, first, count))
            start += count
        return pieces

    def _fill(self, place: int, size: int) -> memoryview:
        """The whole blocks of the `size` bytes at `place`, read into the buffer."""
        window = self._bounce[: -(-size // self.block) * self.block]
        try:
            done = preadv_all(self._fd, [window], place)
        except OSError as error:
            raise HostError(error.errno or 0, f"read of {size} bytes at {place:#x}") from None
        if done < size:
            raise HostError(
                errno.EIO, f"read of {size} bytes at {place:#x}, past the end the image has now"
            )
        return window
